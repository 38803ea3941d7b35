//! What happens when Linux fails, against a [stand-in](stand_in) for it.

mod devices;
mod stand_in;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use ioasid::{
    Account, AttachError, Backing, Bus, Device, Iova, IovaRange, MapError, Memory, Oa, Permissions, Rid,
    Space, Table, TableError,
};
use ioasid_uapi::iommufd::{IoasAlloc, IoasCopy, IoasMap, IoasUnmap};
use ioasid_uapi::vfio::DeviceAttachIommufdPt;
use proptest::prelude::*;
use rustix::io::Errno;

use self::stand_in::StandIn;
use crate::{Host, HostError, HostOptions, HostTable, Mapping};

const K4: u64 = 4096;
const M2: u64 = 2 << 20;
const RID: Rid = Rid(1);
const RW: Permissions = Permissions::READ_WRITE;

/// A device on a table of a space whose leaves are no larger than a page.
struct Scene {
    kernel: Arc<StandIn>,
    bus: Arc<Bus>,
    account: Account,
    ram: Arc<Memory>,
    space: Arc<Space>,
    device: Device,
}

impl Scene {
    fn new(log2: u32, options: HostOptions) -> Scene {
        let kernel = Arc::new(StandIn::default());
        let host = Host::over(kernel.clone(), options).unwrap();
        host.add_device(RID, "device").unwrap();
        let (bus, account) = (Bus::new(), Account::new("test", None));
        let ram = Memory::register(&Backing::anonymous(&bus, 8 * M2).unwrap(), 0, 8 * M2, &account).unwrap();
        let largest = ioasid::PageSize::from_log2(log2).unwrap();
        let space = Space::with_format(&bus, ioasid::pagetable::Native::new().with_largest_leaf(largest));
        let device = Device::new(host, RID).unwrap();
        device.attach(&Table::for_device(&space, &device).unwrap()).unwrap();
        Scene { kernel, bus, account, ram, space, device }
    }

    /// Where the device is, as the stand-in has it.
    fn attached(&self) -> Option<u32> {
        self.kernel.state().attached.values().next().copied()
    }

    fn table(&self) -> Arc<Table> {
        self.device.table().unwrap()
    }

    fn with_table<T>(&self, look: impl FnOnce(&HostTable) -> T) -> T {
        look(self.table().derived().unwrap().as_any().downcast_ref().unwrap())
    }

    /// What the stand-in has for the table: areas and the addresses behind them, as offsets in the memory.
    fn mapped(&self) -> Vec<(u64, u64, u64)> {
        let ioas = self.with_table(HostTable::ioas);
        let base = self.bus.locate(self.ram.output(0).unwrap()).unwrap().memory;
        let ioasid::HostBytes::Address(base) = base else { panic!("{base:?}") };
        let state = self.kernel.state();
        state.spaces[&ioas].iter().map(|(first, (last, va))| (*first, last - first + 1, va - base)).collect()
    }

    /// What the table says of itself is what there is.
    fn in_step(&self) {
        let first = self.ram.output(0).unwrap().get();
        let said = self.with_table(HostTable::areas);
        let said =
            said.iter().map(|area| (area.range.first(), area.range.length().unwrap(), area.oa.get() - first));
        assert_eq!(said.collect::<Vec<_>>(), self.mapped());
    }

    fn map(&self, iova: u64, offset: u64, length: u64) -> Result<(), MapError> {
        self.space.map(Iova::new(iova), &self.ram, offset, length, RW)
    }

    /// Lets everything go; the stand-in has nothing left.
    fn end(self) {
        let Scene { kernel, bus, ram, space, device, account } = self;
        drop((device, space, ram, bus));
        assert_eq!(account.charged_pages(), 0);
        let state = kernel.state();
        assert!(state.spaces.is_empty(), "{state:?}");
        assert_eq!(state.attached, BTreeMap::new());
    }
}

fn range(first: u64, length: u64) -> IovaRange {
    IovaRange::with_length(first, length).unwrap()
}

fn reason(error: &TableError) -> HostError {
    let TableError::Refused(source) = error else { panic!("{error:?}") };
    *source.downcast_ref().unwrap()
}

#[test]
fn a_map_that_fails_late_has_not_happened() {
    for after in 0..8 {
        let scene = Scene::new(12, HostOptions::default());
        scene.map(0, 0, 4 * K4).unwrap();
        let before = scene.mapped();
        scene.kernel.fail::<IoasCopy>(Errno::NOMEM, after, 1);
        let refused = scene.map(16 * K4, 16 * K4, 8 * K4);
        let Err(MapError::Table(error)) = refused else { panic!("{refused:?}") };
        assert!(matches!(reason(&error), HostError::Call(error) if error.errno == Errno::NOMEM), "{error}");
        assert_eq!(scene.mapped(), before);
        scene.in_step();
        // The addresses are free, and so is the table.
        scene.map(16 * K4, 16 * K4, 8 * K4).unwrap();
        assert_eq!(scene.mapped().len(), 12);
        scene.end();
    }
}

#[test]
fn a_busy_kernel_is_asked_again() {
    let scene = Scene::new(12, HostOptions::default());
    scene.map(0, 0, 4 * K4).unwrap();
    scene.kernel.fail::<IoasUnmap>(Errno::BUSY, 0, 5);
    assert_eq!(scene.space.unmap(range(K4, 2 * K4)).unwrap().bytes(), 2 * K4);
    assert_eq!(scene.with_table(HostTable::broken), None);
    assert_eq!(scene.mapped(), [(0, K4, 0), (3 * K4, K4, 3 * K4)]);
    // All of it with one call.
    assert_eq!(scene.kernel.count::<IoasUnmap>(), 1);
    scene.end();
}

#[test]
fn an_unmap_that_fails_for_good_leaves_devices_nothing_and_breaks_the_table() {
    let scene = Scene::new(12, HostOptions::default());
    scene.map(0, 0, 4 * K4).unwrap();
    assert!(scene.attached().is_some());
    scene.kernel.fail::<IoasUnmap>(Errno::IO, 0, 1);
    // To whom the memory belongs it is unmapped: no device reaches it.
    assert_eq!(scene.space.unmap(range(K4, K4)).unwrap().bytes(), K4);
    assert_eq!(scene.attached(), None);
    assert_eq!(scene.with_table(HostTable::broken).map(|error| error.errno), Some(Errno::IO));
    let Err(MapError::Table(error)) = scene.map(8 * K4, 0, K4) else { panic!("mapped") };
    assert!(matches!(reason(&error), HostError::Broken(_)));
    let Err(AttachError::Table(error)) = scene.device.attach(&scene.table()) else { panic!("attached") };
    assert!(matches!(reason(&error), HostError::Broken(_)));
    // Another table of the same space is as good as any.
    let other = Table::new(&scene.space, &scene.device).unwrap();
    scene.device.attach(&other).unwrap();
    assert!(scene.attached().is_some());
    assert_eq!(scene.mapped().len(), 3);
    drop(other);
    scene.end();
}

#[test]
fn areas_are_bounded() {
    let scene = Scene::new(12, HostOptions { most_areas: 3, ..HostOptions::default() });
    let Err(MapError::Table(error)) = scene.map(0, 0, 4 * K4) else { panic!("mapped") };
    assert_eq!(reason(&error), HostError::TooManyAreas { most: 3 });
    assert_eq!(scene.mapped(), []);
    scene.map(0, 0, 3 * K4).unwrap();
    scene.space.unmap(range(0, K4)).unwrap();
    scene.map(7 * K4, 0, K4).unwrap();
    assert!(scene.map(9 * K4, 0, K4).is_err());
    scene.in_step();
    scene.end();
}

#[test]
fn calls_are_as_few_as_areas_allow() {
    let scene = Scene::new(21, HostOptions::default());
    let copies = || scene.kernel.count::<IoasCopy>();
    let areas = || scene.mapped().len();
    // A part of a block, two whole ones, and a part; the memory is cut into as many blocks for it.
    scene.map(M2 + K4, K4, 3 * M2).unwrap();
    assert_eq!((copies(), areas()), (4 + 1, 4));
    // Where it is cut, one call is enough; also for parts.
    scene.map(16 * M2, 0, 4 * M2).unwrap();
    scene.map(24 * M2 + 2 * K4, 2 * K4, 2 * M2 + K4).unwrap();
    assert_eq!((copies(), areas()), (4 + 3, 4 + 4 + 3));
    // So many are missing.
    scene.map(32 * M2, 2 * M2, 4 * M2).unwrap();
    assert_eq!((copies(), areas()), (4 + 3 + 2 + 1, 4 + 4 + 3 + 4));
    // Within a block nothing has to be cut, and where blocks do not match nothing can.
    scene.map(40 * M2, 7 * M2, 4 * K4).unwrap();
    scene.map(48 * M2 + K4, 0, 2 * M2).unwrap();
    assert_eq!((copies(), areas()), (10 + 1 + 3, 15 + 1 + 3));
    scene.in_step();
    // The memory was registered once.
    assert_eq!(scene.kernel.count::<IoasMap>(), 1);
    scene.space.unmap(range(0, 64 * M2)).unwrap();
    assert_eq!(scene.kernel.count::<IoasUnmap>(), 6, "one for each run of neighbours");
    scene.end();
}

#[test]
fn memory_that_goes_is_in_blocks_no_more() {
    let scene = Scene::new(12, HostOptions { most_areas: 24, ..HostOptions::default() });
    for _ in 0..4 {
        // The next one gets the same place on the bus, and as many blocks.
        let backing = Backing::anonymous(&scene.bus, 16 * K4).unwrap();
        let memory = Memory::register(&backing, 0, 16 * K4, &scene.account).unwrap();
        for at in [0, 32 * K4] {
            let before = scene.kernel.count::<IoasCopy>();
            scene.space.map(Iova::new(at), &memory, 0, 12 * K4, RW).unwrap();
            let copies = scene.kernel.count::<IoasCopy>() - before;
            assert_eq!(copies, if at == 0 { 12 + 1 } else { 1 });
        }
        drop((memory, backing));
        assert_eq!(scene.mapped(), []);
    }
    // Nothing is left in any space.
    assert_eq!(scene.kernel.state().spaces.values().map(BTreeMap::len).sum::<usize>(), 0);
    // More blocks than there may be of a size: each takes a call, as if there were none.
    scene.map(0, 0, 16 * K4).unwrap();
    scene.space.unmap(IovaRange::ALL).unwrap();
    let before = scene.kernel.count::<IoasCopy>();
    scene.map(0, 16 * K4, 16 * K4).unwrap();
    assert_eq!(scene.kernel.count::<IoasCopy>() - before, 8 + 16);
    scene.in_step();
    scene.end();
}

#[test]
fn a_failed_attachment_leaves_nothing() {
    let scene = Scene::new(21, HostOptions::default());
    let other = Space::new(&scene.bus);
    scene.kernel.fail::<DeviceAttachIommufdPt>(Errno::NOMEM, 0, 1);
    let before = scene.attached();
    let refused = scene.device.attach(&Table::for_device(&other, &scene.device).unwrap());
    assert!(matches!(refused, Err(AttachError::Table(_))), "{refused:?}");
    assert_eq!(scene.attached(), before);
    assert_eq!(other.statistics().tables, 0);
    scene.kernel.fail::<IoasAlloc>(Errno::NOMEM, 0, 1);
    assert!(Table::for_device(&other, &scene.device).is_err());
    scene.end();
}

/// Something that is done to a space of pages.
#[derive(Clone, Copy, Debug)]
enum Step {
    Map { at: u64, from: u64, pages: u64 },
    Unmap { at: u64, pages: u64 },
    Reattach,
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        4 => (0..64u64, 0..64u64, 1..20u64).prop_map(|(at, from, pages)| Step::Map { at, from, pages }),
        3 => (0..64u64, 1..40u64).prop_map(|(at, pages)| Step::Unmap { at, pages }),
        1 => Just(Step::Reattach),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, failure_persistence: None, ..ProptestConfig::default() })]

    /// Whatever is mapped and unmapped, and whichever call fails, the kernel has what the space has.
    #[test]
    fn the_kernel_has_what_the_space_has(
        steps in prop::collection::vec((step(), prop::option::weighted(0.3, 0..12u32)), 1..40),
        map in any::<bool>(),
    ) {
        let mapping = if map { Mapping::Map } else { Mapping::Copy };
        let scene = Scene::new(12, HostOptions { mapping, ..HostOptions::default() });
        let mut model: BTreeMap<u64, u64> = BTreeMap::new();
        // Pages of the memory that are cut.
        let mut cut: BTreeSet<u64> = BTreeSet::new();
        for (step, fails) in steps {
            if let Some(after) = fails {
                match mapping {
                    Mapping::Copy => scene.kernel.fail::<IoasCopy>(Errno::NOMEM, after, 1),
                    Mapping::Map => scene.kernel.fail::<IoasMap>(Errno::NOMEM, after, 1),
                }
            }
            match step {
                Step::Map { at, from, pages } => {
                    let taken = (at..at + pages).any(|page| model.contains_key(&page));
                    let result = scene.map(at * K4, from * K4, pages * K4);
                    let missing: Vec<u64> = (from..from + pages).filter(|page| !cut.contains(page)).collect();
                    let (cuts, calls) = match mapping {
                        Mapping::Copy if pages > 1 => (missing.len(), missing.len() + 1),
                        _ => (0, pages as usize),
                    };
                    let failed = fails.is_some_and(|after| (after as usize) < calls);
                    if !taken {
                        let done = fails.map_or(cuts, |after| cuts.min(after as usize));
                        cut.extend(&missing[..done]);
                    }
                    prop_assert_eq!(result.is_err(), taken || failed, "{:?}", result);
                    if result.is_ok() {
                        model.extend((0..pages).map(|page| (at + page, from + page)));
                    }
                }
                Step::Unmap { at, pages } => {
                    scene.space.unmap(range(at * K4, pages * K4)).unwrap();
                    model.retain(|page, _| !(at..at + pages).contains(page));
                }
                Step::Reattach => {
                    scene.kernel.state().fails = None;
                    scene.device.attach(&Table::new(&scene.space, &scene.device).unwrap()).unwrap();
                }
            }
            scene.kernel.state().fails = None;
            let pages: Vec<_> = model.iter().map(|(at, from)| (at * K4, K4, from * K4)).collect();
            prop_assert_eq!(scene.mapped(), pages);
            scene.in_step();
            let shown: Vec<Oa> = scene.space.leaves(IovaRange::ALL).iter().map(|leaf| leaf.oa).collect();
            prop_assert_eq!(shown.len(), model.len());
        }
        scene.end();
    }
}
