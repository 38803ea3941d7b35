//! A device stops in the middle of a write, and what it writes to is taken away: whoever takes it waits for the device.
//!
//! Two kinds of DMA are at work for a while. Memory of this process is copied inside a DMA section, which this device model opens
//! by itself, so that it can stop there; memory behind calls is copied outside of sections, by a call that does not come back
//! here until the test lets it. Each is stopped half-way; another thread takes something away in each way there is; and
//! when that has returned, the device must have ended. While the device is stopped it cannot end, so the test has only to give
//! whoever does not wait the time to return: how long that is says how surely an error is found, and never fails what is right.

use ioasid::pasid::{Limit, Owner, PasidSet, PasidSystem, Spid};
use ioasid::{
    Account, Backing, Bus, Device, Iova, IovaRange, LateBound, Memory, MemoryGone, Permissions, Rid, Space,
    Table, Translated, epoch,
};
use ioasid_soft::dma::DmaPort;
use ioasid_soft::iommu::{Port, SoftIommu, TableKind};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex};
use std::time::Duration;

const PAGE: u64 = 4096;
const AT: u64 = 1 << 30;
const KINDS: [TableKind; 3] = [TableKind::Native, TableKind::VtdSecondStage, TableKind::X86_64];
const RID: Rid = Rid(8);
const NUMBER: u32 = 3;
/// By then a device has begun, however busy the machine is.
const CERTAINTY: Duration = Duration::from_secs(60);
/// For whoever does not wait to return.
const TIME_TO_RETURN: Duration = Duration::from_millis(20);

/// A place at which a device stops until it is let go.
#[derive(Debug, Default)]
struct Halt {
    state: Mutex<(bool, bool)>,
    moved: Condvar,
    /// That the device is in the middle of something.
    at_work: AtomicBool,
}

impl Halt {
    fn stop(&self) {
        let mut state = self.state.lock().unwrap();
        state.0 = true;
        self.moved.notify_all();
        drop(self.moved.wait_while(state, |(_, open)| !*open).unwrap());
    }

    fn until_stopped(&self) {
        let state = self.state.lock().unwrap();
        let (state, waited) =
            self.moved.wait_timeout_while(state, CERTAINTY, |(stopped, _)| !*stopped).unwrap();
        drop(state);
        assert!(!waited.timed_out(), "the device has not begun");
    }

    fn let_go(&self) {
        self.state.lock().unwrap().1 = true;
        self.moved.notify_all();
    }
}

/// Memory behind calls that stop.
#[derive(Debug)]
struct Calls(Arc<Halt>);

impl LateBound for Calls {
    fn read(&self, offset: u64, _buffer: &mut [u8]) -> Result<(), MemoryGone> {
        Err(MemoryGone { offset })
    }

    fn write(&self, _offset: u64, _bytes: &[u8]) -> Result<(), MemoryGone> {
        self.0.at_work.store(true, Ordering::SeqCst);
        self.0.stop();
        self.0.at_work.store(false, Ordering::SeqCst);
        Ok(())
    }
}

/// What a device writes to.
#[derive(Clone, Copy, Debug)]
enum Place {
    Process,
    BehindCalls,
}

struct Scene {
    halt: Arc<Halt>,
    iommu: Arc<SoftIommu>,
    backing: Arc<Backing>,
    space: Arc<Space>,
    /// Where else a device may go, or addresses may lead.
    other_space: Arc<Space>,
    other_memory: Arc<Memory>,
    pasids: Arc<PasidSet>,
    port: Arc<Port>,
    /// These are taken by who drops them.
    memory: Mutex<Option<Arc<Memory>>>,
    device: Mutex<Option<Arc<Device>>>,
}

impl Scene {
    /// A page, and a device that reaches it, by a PASID or without one.
    fn new(place: Place, kind: TableKind, with_pasid: bool) -> Scene {
        let (bus, account, halt) = (Bus::new(), Account::new("guest", None), Arc::new(Halt::default()));
        let backing = match place {
            Place::Process => Backing::anonymous(&bus, PAGE).unwrap(),
            Place::BehindCalls => Backing::late_bound(&bus, Arc::new(Calls(halt.clone()))),
        };
        let other_backing = Backing::anonymous(&bus, PAGE).unwrap();
        let [memory, other_memory] =
            [&backing, &other_backing].map(|backing| Memory::register(backing, 0, PAGE, &account).unwrap());
        let [space, other_space] = [(); 2].map(|()| Space::new(&bus));
        space.map(Iova::new(AT), &memory, 0, PAGE, Permissions::READ_WRITE).unwrap();
        let iommu = SoftIommu::new();
        let plain = iommu.add_device(RID, kind).unwrap();
        let device = Device::new(iommu.clone(), RID).unwrap();
        let table = Table::for_device(&space, &device).unwrap();
        let system = PasidSystem::new(64).unwrap();
        let pasids =
            Arc::new(system.create_set(Owner::Machine(1), 8, &Limit::new(&system, "all", None)).unwrap());
        let pasid = pasids.allocate(1..=u32::MAX, 0).unwrap();
        let port = if with_pasid {
            let binding = pasids.bind(pasid).unwrap();
            device.attach_pasid(Spid::new(NUMBER).unwrap(), binding, &table).unwrap();
            iommu.port_with_pasid(RID, pasid).unwrap()
        } else {
            device.attach(&table).unwrap();
            plain
        };
        let (memory, device) = (Mutex::new(Some(memory)), Mutex::new(Some(Arc::new(device))));
        Scene { halt, iommu, backing, space, other_space, other_memory, pasids, port, memory, device }
    }

    fn memory(&self) -> Arc<Memory> {
        self.memory.lock().unwrap().clone().unwrap()
    }

    fn device(&self) -> Arc<Device> {
        self.device.lock().unwrap().clone().unwrap()
    }

    fn page(&self) -> IovaRange {
        IovaRange::with_length(AT, PAGE).unwrap()
    }

    /// A write that stops in the middle.
    fn write_and_stop(&self, place: Place) {
        match place {
            Place::BehindCalls => self.port.write(AT, &[1; 64]).unwrap(),
            Place::Process => {
                let section = epoch::dma();
                let found = self.port.translate(&section, AT, Permissions::WRITE).unwrap();
                let Ok(Translated::Here(page)) = self.space.memory_at(&section, found.oa) else {
                    panic!("memory of this process is not behind calls");
                };
                self.halt.at_work.store(true, Ordering::SeqCst);
                self.halt.stop();
                page.write(&[1; 64]).unwrap();
                self.halt.at_work.store(false, Ordering::SeqCst);
            }
        }
    }

    fn number() -> Spid {
        Spid::new(NUMBER).unwrap()
    }
}

type End = (&'static str, fn(&Scene));

/// Ways in which memory goes from under a device, however that is attached.
const MEMORY_GOES: [End; 13] = [
    ("an unmap", |scene| assert_eq!(scene.space.unmap(scene.page()).unwrap().bytes(), PAGE)),
    ("an unmap of everything", |scene| drop(scene.space.unmap(IovaRange::ALL).unwrap())),
    ("a deferred unmap and its flush", |scene| {
        scene.space.unmap_deferred(scene.page()).unwrap();
        scene.space.flush();
    }),
    ("a batch of unmaps", |scene| {
        let mut batch = scene.space.batch();
        batch.unmap(scene.page()).unwrap();
        batch.finish();
    }),
    ("a deferred unmap and the drop of the memory", |scene| {
        scene.space.unmap_deferred(scene.page()).unwrap();
        *scene.memory.lock().unwrap() = None;
    }),
    ("a remap", |scene| {
        scene.space.remap(Iova::new(AT), &scene.other_memory, 0, PAGE, Permissions::READ_WRITE).unwrap();
    }),
    ("a protect", |scene| {
        assert_eq!(scene.space.protect(scene.page(), Permissions::READ).unwrap(), PAGE);
    }),
    ("a release", |scene| scene.memory().release(0, PAGE).unwrap()),
    ("a revoke", |scene| scene.backing.revoke()),
    ("the drop of the memory", |scene| *scene.memory.lock().unwrap() = None),
    ("the unbinding of the device", |scene| scene.device().unbind()),
    ("the drop of the memory beside an unmap", |scene| {
        beside_an_unmap(scene, || *scene.memory.lock().unwrap() = None);
    }),
    ("a revoke beside an unmap", |scene| beside_an_unmap(scene, || scene.backing.revoke())),
];

/// While an unmap waits for the device, so that nothing is mapped any more.
fn beside_an_unmap(scene: &Scene, end: impl FnOnce()) {
    std::thread::scope(|scope| {
        let unmapping = scope.spawn(|| scene.space.unmap(scene.page()).unwrap());
        while scene.space.walk(Iova::new(AT)).is_some() && !unmapping.is_finished() {
            std::thread::yield_now();
        }
        end();
        assert!(!scene.halt.at_work.load(Ordering::SeqCst), "returned before the unmap");
    });
}

const DEVICE_GOES: [End; 4] = [
    ("a detach", |scene| scene.device().detach()),
    ("an attach elsewhere", |scene| {
        scene.device().attach(&Table::for_device(&scene.other_space, &scene.device()).unwrap()).unwrap();
    }),
    ("an attach to another table of the space", |scene| {
        scene.device().attach(&Table::new(&scene.space, &scene.device()).unwrap()).unwrap();
    }),
    ("the drop of the device", |scene| *scene.device.lock().unwrap() = None),
];

const PASID_GOES: [End; 3] = [
    ("a detach of the PASID", |scene| assert!(scene.device().detach_pasid(Scene::number()))),
    ("an attach of the PASID elsewhere", |scene| {
        let table = Table::for_device(&scene.other_space, &scene.device()).unwrap();
        scene.device().replace_pasid(Scene::number(), &table).unwrap();
    }),
    ("the drop of the device", |scene| *scene.device.lock().unwrap() = None),
];

/// Each of these ends waits for a device that is in the middle of a write, and comes when the device has ended.
fn all_wait(place: Place, with_pasid: bool, ends: &[End]) {
    for kind in KINDS {
        for (name, end) in ends {
            let scene = Scene::new(place, kind, with_pasid);
            std::thread::scope(|scope| {
                scope.spawn(|| scene.write_and_stop(place));
                scene.halt.until_stopped();
                let ending = scope.spawn(|| {
                    end(&scene);
                    !scene.halt.at_work.load(Ordering::SeqCst)
                });
                std::thread::sleep(TIME_TO_RETURN);
                scene.halt.let_go();
                let waited = ending.join();
                assert!(
                    waited.unwrap(),
                    "{name} has returned before the device has ended ({kind:?}, {place:?})"
                );
            });
            let kept = scene.memory.lock().unwrap().as_ref().map(Arc::strong_count);
            assert!(kept.is_none_or(|count| count == 1), "{name} keeps the memory");
            // Nobody has kept the device either, nor its PASID.
            *scene.device.lock().unwrap() = None;
            drop(Device::new(scene.iommu.clone(), RID).unwrap());
            assert!(scene.pasids.list().iter().all(|pasid| scene.pasids.free(pasid.pasid).is_ok()), "{name}");
        }
    }
}

#[test]
fn memory_of_the_process_goes_when_the_device_has_ended() {
    all_wait(Place::Process, false, &MEMORY_GOES);
    all_wait(Place::Process, true, &MEMORY_GOES);
}

#[test]
fn memory_behind_calls_goes_when_the_call_has_ended() {
    all_wait(Place::BehindCalls, false, &MEMORY_GOES);
    all_wait(Place::BehindCalls, true, &MEMORY_GOES);
}

#[test]
fn a_device_goes_when_its_dma_has_ended() {
    for place in [Place::Process, Place::BehindCalls] {
        all_wait(place, false, &DEVICE_GOES);
        all_wait(place, true, &PASID_GOES);
    }
}
