//! Real system calls: two devices on tables of the machine's IOMMU, with DMA.

mod machine;

use std::process::Command;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use ioasid::{
    Account, AttachError, Backing, Bus, Device, Iova, IovaRange, LateBound, MapError, Memory, MemoryGone,
    Permissions, ProtectError, RemapError, Rid, Space, Table, TableError, UnmapError,
};
use ioasid_host::{Host, HostError, HostOptions, HostTable, Mapping, OpenError, RemoveError};
use machine::Edu;
use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals, ftruncate, memfd_create};

/// All of them run.
const SKIPPED: &[&str] = &[];

const K4: u64 = 4 << 10;
const M2: u64 = 2 << 20;
const RW: Permissions = Permissions::READ_WRITE;
const ONE: Rid = Rid(0x0100);
const TWO: Rid = Rid(0x0101);
/// Where devices put what they have read, so that the test sees it.
const SCRATCH: u64 = 0x7000_0000;

/// Tests share the devices, and look at what the server has in all.
static ALONE: Mutex<()> = Mutex::new(());

fn range(first: u64, length: u64) -> IovaRange {
    IovaRange::with_length(first, length).unwrap()
}

/// A host with two devices, and memory whose pages begin with their numbers.
struct Scene {
    bus: Arc<Bus>,
    host: Arc<Host>,
    edus: [Edu; 2],
    account: Account,
    backing: Arc<Backing>,
    ram: Arc<Memory>,
    scratch: Arc<Memory>,
    _alone: MutexGuard<'static, ()>,
}

const PAGES: u64 = 2048;
const MARK: u64 = 0x6d61_726b;

impl Scene {
    fn new(mapping: Mapping) -> Scene {
        Scene::with(mapping, |bus| Backing::anonymous(bus, PAGES * K4).unwrap())
    }

    fn with(mapping: Mapping, make: impl FnOnce(&Arc<Bus>) -> Arc<Backing>) -> Scene {
        let alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
        assert_eq!((machine::contexts(), machine::charged_pages()), (0, 0));
        let bus = Bus::new();
        let mut options = HostOptions::default();
        options.mapping = mapping;
        let host = Host::open(options).unwrap();
        let edus = [(ONE, 0), (TWO, 1)]
            .map(|(rid, number)| Edu::new(host.add_device(rid, machine::device(number)).unwrap()));
        let account = Account::new("test", None);
        let backing = make(&bus);
        for page in 0..PAGES {
            backing.write(page * K4, &tag(page).to_le_bytes()).unwrap();
        }
        let ram = Memory::register(&backing, 0, PAGES * K4, &account).unwrap();
        let pad = Backing::anonymous(&bus, 2 * K4).unwrap();
        pad.write(K4, &MARK.to_le_bytes()).unwrap();
        let scratch = Memory::register(&pad, 0, 2 * K4, &account).unwrap();
        Scene { bus, host, edus, account, backing, ram, scratch, _alone: alone }
    }

    /// A space in which devices can put what they read.
    fn space(&self) -> Arc<Space> {
        self.prepare(Space::new(&self.bus))
    }

    fn prepare(&self, space: Arc<Space>) -> Arc<Space> {
        space.map(Iova::new(SCRATCH), &self.scratch, 0, 2 * K4, RW).unwrap();
        space
    }

    fn device(&self, rid: Rid) -> Device {
        Device::new(self.host.clone(), rid).unwrap()
    }

    fn attached(&self, rid: Rid, space: &Arc<Space>) -> Device {
        let device = self.device(rid);
        device.attach(&Table::for_device(space, &device).unwrap()).unwrap();
        device
    }

    /// What a device reads at an address; `None`: nothing is there for it.
    fn read(&self, edu: usize, iova: u64) -> Option<u64> {
        let edu = &self.edus[edu];
        edu.copy(SCRATCH + K4, SCRATCH, 8);
        assert_eq!(self.scratch_word(), MARK, "the device does not reach its scratch memory");
        edu.copy(iova, SCRATCH, 8);
        Some(self.scratch_word()).filter(|word| *word != MARK)
    }

    fn scratch_word(&self) -> u64 {
        let mut bytes = [0; 8];
        self.scratch.backing().read(0, &mut bytes).unwrap();
        u64::from_le_bytes(bytes)
    }

    /// Lets everything go, and looks whether anything is left.
    fn end(self) {
        let Scene { bus, host, edus, ram, scratch, backing, account, _alone } = self;
        drop((host, edus));
        assert_eq!((machine::contexts(), machine::charged_pages()), (0, 0));
        drop((ram, scratch, backing, bus));
        assert_eq!(account.charged_pages(), 0);
    }
}

fn tag(page: u64) -> u64 {
    0x7461_6700_0000_0000 | page
}

fn host_table(device: &Device) -> (u32, Vec<(IovaRange, u64)>) {
    let table = device.table().unwrap();
    let derived = table.derived().unwrap().as_any().downcast_ref::<HostTable>().unwrap();
    assert_eq!(derived.broken(), None);
    (derived.ioas(), derived.areas().into_iter().map(|area| (area.range, area.oa.get())).collect())
}

#[test]
fn devices_reach_what_is_mapped_and_nothing_else() {
    for mapping in [Mapping::Copy, Mapping::Map] {
        let scene = Scene::new(mapping);
        let space = scene.space();
        // Some of it before there is a table.
        space.map(Iova::new(M2), &scene.ram, 0, 16 * K4, Permissions::READ).unwrap();
        let devices = [scene.attached(ONE, &space), scene.attached(TWO, &space)];
        space.map(Iova::new(3 * M2), &scene.ram, 5 * K4, M2, RW).unwrap();
        for edu in 0..2 {
            assert_eq!(scene.read(edu, M2 + 3 * K4), Some(tag(3)));
            assert_eq!(scene.read(edu, 3 * M2 + M2 - K4), Some(tag(5 + 511)));
            assert_eq!(scene.read(edu, M2 + 16 * K4), None);
            assert_eq!(scene.read(edu, 4 * M2), None);
        }
        // Writing, where that is allowed.
        scene.edus[0].copy(3 * M2, M2, 8);
        scene.edus[0].copy(3 * M2, 3 * M2 + 7 * K4, 8);
        assert_eq!(scene.read(1, M2), Some(tag(0)));
        assert_eq!(scene.read(1, 3 * M2 + 7 * K4), Some(tag(5)));

        space.unmap(range(3 * M2, M2)).unwrap();
        assert_eq!(scene.read(0, 3 * M2), None);
        assert_eq!(scene.read(0, M2), Some(tag(0)));
        drop(devices);
        drop(space);
        scene.end();
    }
}

#[test]
fn what_a_space_says_it_will_be_cut_at_can_be_unmapped() {
    for (log2, mapping) in [(12, Mapping::Copy), (12, Mapping::Map), (21, Mapping::Copy)] {
        let scene = Scene::new(mapping);
        let granule = 1u64 << log2;
        let space = space_of_leaves(&scene.bus, log2);
        let space = scene.prepare(space);
        let device = scene.attached(ONE, &space);
        space.map(Iova::new(2 * M2), &scene.ram, 0, 4 * M2, RW).unwrap();
        let middle = range(3 * M2, granule);
        // As many areas in the kernel's place as the table says, whether by one call or by many.
        let (ioas, areas) = host_table(&device);
        assert_eq!(area_count(ioas), areas.len() as u64);
        assert_eq!(space.unmap(middle).unwrap().bytes(), granule);
        assert_eq!(scene.read(0, 3 * M2 - K4), Some(tag(511)));
        assert_eq!(scene.read(0, 3 * M2), None);
        assert_eq!(scene.read(0, 3 * M2 + granule), Some(tag((M2 + granule) / K4)));
        // Less than that is refused, and nothing has changed.
        if granule > K4 {
            let before = host_table(&device);
            let refused = space.unmap(range(2 * M2, K4));
            assert!(matches!(refused, Err(UnmapError::Table(TableError::CannotCut { .. }))), "{refused:?}");
            assert_eq!(scene.read(0, 2 * M2), Some(tag(0)));
            assert_eq!(host_table(&device), before);
        }
        // One call for any number of areas.
        assert_eq!(space.unmap(range(2 * M2, 4 * M2)).unwrap().bytes(), 4 * M2 - granule);
        assert_eq!(host_table(&device).1.len(), 2);
        drop(device);
        drop(space);
        scene.end();
    }
}

/// How many areas the server has in an address space.
fn area_count(ioas: u32) -> u64 {
    let status = machine::status();
    let spaces = status["contexts"][0]["address_spaces"].as_array().unwrap();
    spaces.iter().find(|space| space["id"] == ioas).unwrap()["area_count"].as_u64().unwrap()
}

fn space_of_leaves(bus: &Arc<Bus>, log2: u32) -> Arc<Space> {
    let largest = ioasid::PageSize::from_log2(log2).unwrap();
    Space::with_format(bus, ioasid::pagetable::Native::new().with_largest_leaf(largest))
}

#[test]
fn a_device_moves_in_one_step_and_is_blocked_when_it_is_detached() {
    let scene = Scene::new(Mapping::Copy);
    let (space, other) = (scene.space(), scene.space());
    space.map(Iova::new(M2), &scene.ram, 0, K4, RW).unwrap();
    other.map(Iova::new(M2), &scene.ram, 9 * K4, K4, RW).unwrap();
    let device = scene.attached(ONE, &space);
    assert_eq!(scene.read(0, M2), Some(tag(0)));
    let before = host_table(&device).0;
    device.attach(&Table::for_device(&other, &device).unwrap()).unwrap();
    assert_eq!(scene.read(0, M2), Some(tag(9)));
    assert_ne!(host_table(&device).0, before);
    // The first table is gone, and its pages with it.
    assert_eq!(machine::charged_pages(), 1 + 2);
    device.detach();
    assert_eq!(machine::charged_pages(), 0);
    // Nothing is reached, not even what is always there.
    scene.edus[0].copy(M2, SCRATCH, 8);
    assert_eq!(scene.scratch_word(), tag(9));
    scene.scratch.backing().write(0, &[0; 8]).unwrap();
    scene.edus[0].copy(M2, SCRATCH, 8);
    assert_eq!(scene.scratch_word(), 0);
    drop((device, space, other));
    scene.end();
}

#[test]
fn a_page_is_charged_once_however_often_it_is_mapped() {
    let scene = Scene::new(Mapping::Copy);
    let (space, other) = (scene.space(), scene.space());
    let _devices = [scene.attached(ONE, &space), scene.attached(TWO, &other)];
    let pad = machine::charged_pages();
    for place in 0..8 {
        space.map(Iova::new(place * M2), &scene.ram, 0, M2, RW).unwrap();
        other.map(Iova::new(place * M2), &scene.ram, K4, M2, Permissions::READ).unwrap();
    }
    assert_eq!(machine::charged_pages() - pad, 513);
    space.unmap(range(0, 8 * M2)).unwrap();
    other.unmap(range(0, 8 * M2)).unwrap();
    assert_eq!(machine::charged_pages(), pad);
    drop(_devices);
    drop((space, other));
    scene.end();
}

#[test]
fn files_are_mapped_as_files_and_may_grow() {
    let memfd = memfd_create("ram", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING).unwrap();
    ftruncate(&memfd, PAGES * K4).unwrap();
    fcntl_add_seals(&memfd, SealFlags::SHRINK).unwrap();
    for mapping in [Mapping::Copy, Mapping::Map] {
        let scene = Scene::with(mapping, |bus| Backing::file(bus, &memfd).unwrap());
        let space = scene.space();
        let device = scene.attached(ONE, &space);
        space.map(Iova::new(M2), &scene.ram, 3 * K4, 4 * K4, RW).unwrap();
        assert_eq!(scene.read(0, M2), Some(tag(3)));
        let status = machine::status();
        let spaces = status["contexts"][0]["address_spaces"].as_array().unwrap();
        let sources: Vec<&str> = spaces
            .iter()
            .flat_map(|space| space["areas"].as_array().unwrap())
            .map(|area| area["source"].as_str().unwrap())
            .collect();
        assert!(sources.contains(&"file"), "{sources:?}");

        let length = rustix::fs::fstat(&memfd).unwrap().st_size as u64;
        ftruncate(&memfd, length + M2).unwrap();
        let grown = Memory::register(&scene.backing, length, M2, &scene.account).unwrap();
        scene.backing.write(length + K4, &tag(77).to_le_bytes()).unwrap();
        space.map(Iova::new(8 * M2), &grown, 0, M2, RW).unwrap();
        assert_eq!(scene.read(0, 8 * M2 + K4), Some(tag(77)));
        drop((device, space, grown));
        scene.end();
    }
}

#[test]
fn memory_that_goes_is_forgotten_by_the_kernel_too() {
    let scene = Scene::new(Mapping::Copy);
    let space = scene.space();
    let device = scene.attached(ONE, &space);
    for round in 0..20u64 {
        // The next one gets the same place on the bus.
        let backing = Backing::anonymous(&scene.bus, M2).unwrap();
        backing.write(0, &tag(1000 + round).to_le_bytes()).unwrap();
        let memory = Memory::register(&backing, 0, M2, &scene.account).unwrap();
        space.map(Iova::new(M2), &memory, 0, M2, RW).unwrap();
        assert_eq!(scene.read(0, M2), Some(tag(1000 + round)));
        drop(memory);
        assert_eq!(scene.read(0, M2), None);
    }
    // The scratch memory: one area in the parent and, since it was there before the table, one for each leaf in that.
    let status = machine::status();
    let spaces = status["contexts"][0]["address_spaces"].as_array().unwrap();
    let areas: Vec<u64> = spaces.iter().map(|space| space["area_count"].as_u64().unwrap()).collect();
    assert_eq!(areas, [1, 2]);
    drop((device, space));
    scene.end();
}

/// Memory that no kernel can be told of.
#[derive(Debug)]
struct Elsewhere;

impl LateBound for Elsewhere {
    fn read(&self, _offset: u64, buffer: &mut [u8]) -> Result<(), MemoryGone> {
        buffer.fill(0);
        Ok(())
    }

    fn write(&self, offset: u64, _bytes: &[u8]) -> Result<(), MemoryGone> {
        Err(MemoryGone { offset })
    }
}

fn reason(error: &TableError) -> Option<HostError> {
    let TableError::Refused(source) = error else { return None };
    source.downcast_ref::<HostError>().copied()
}

#[test]
fn what_linux_cannot_do_is_refused_whole() {
    let scene = Scene::new(Mapping::Copy);
    let space = scene.space();
    let device = scene.attached(ONE, &space);
    let far = Memory::register(&Backing::late_bound(&scene.bus, Arc::new(Elsewhere)), 0, M2, &scene.account);
    let far = far.unwrap();
    let before = host_table(&device);
    let refused = space.map(Iova::new(M2), &far, 0, K4, RW);
    let Err(MapError::Table(error)) = refused else { panic!("{refused:?}") };
    assert_eq!(reason(&error), Some(HostError::ReachedByCalls));
    assert_eq!((host_table(&device), space.walk(Iova::new(M2))), (before, None));

    space.map(Iova::new(M2), &scene.ram, 0, M2, RW).unwrap();
    let refused = space.protect(range(M2, M2), Permissions::READ);
    assert!(matches!(refused, Err(ProtectError::Table(TableError::NeedsBreak { .. }))), "{refused:?}");
    let refused = space.remap(Iova::new(M2), &scene.ram, K4, M2, RW);
    assert!(matches!(refused, Err(RemapError::Table(TableError::NeedsBreak { .. }))), "{refused:?}");
    // Nothing would change.
    assert_eq!(space.protect(range(M2, M2), RW).unwrap(), M2);
    space.remap(Iova::new(M2), &scene.ram, 0, M2, RW).unwrap();
    assert_eq!(scene.read(0, M2), Some(tag(0)));

    // A space with such memory gets no table.
    let other = Space::new(&scene.bus);
    other.map(Iova::new(0), &far, 0, K4, RW).unwrap();
    let refused = Table::for_device(&other, &device);
    let Err(AttachError::Table(error)) = refused else { panic!("{refused:?}") };
    assert_eq!(reason(&error), Some(HostError::ReachedByCalls));
    drop((device, space, other, far));
    scene.end();
}

#[test]
fn a_device_says_where_nothing_can_be_mapped() {
    let scene = Scene::new(Mapping::Copy);
    let device = scene.device(ONE);
    assert_eq!(device.requirements().aperture, IovaRange::ALL);
    assert_eq!(device.requirements().reserved, [IovaRange::new(0xfee0_0000, 0xfeef_ffff).unwrap()]);
    assert_eq!(device.requirements().class, scene.device(TWO).requirements().class);
    let taken = scene.host.add_device(ONE, machine::device(3));
    assert!(matches!(taken, Err(OpenError::RidTaken(ONE))));
    let busy = scene.host.add_device(Rid(9), machine::device(1));
    assert!(
        matches!(busy, Err(OpenError::Call(error)) if error.errno == ioasid_host::Errno::INVAL),
        "{busy:?}"
    );
    let missing = scene.host.add_device(Rid(9), "/dev/vfio/devices/vfio999");
    assert!(matches!(missing, Err(OpenError::File { .. })));
    // Tables of one host are nothing to another.
    let other = Host::open(HostOptions::default()).unwrap();
    other.add_device(ONE, machine::device(2)).unwrap();
    let stranger = Device::new(other, ONE).unwrap();
    let table = Table::for_device(&scene.space(), &device).unwrap();
    assert!(matches!(stranger.attach(&table), Err(AttachError::Incompatible)));
    drop((device, table, stranger));
    scene.end();
}

/// For the program that a test starts: which device it takes.
const TAKES: &str = "IOASID_HOST_TESTS_TAKES";

#[test]
fn a_device_is_given_back_and_anybody_can_take_it() {
    let scene = Scene::new(Mapping::Copy);
    let (rid, path) = (Rid(0x0200), machine::device(2));
    let other = Host::open(HostOptions::default()).unwrap();
    let space = scene.space();
    space.map(Iova::new(M2), &scene.ram, 0, K4, RW).unwrap();
    for host in [&scene.host, &other, &scene.host] {
        let edu = Edu::new(host.add_device(rid, &path).unwrap());
        assert!(matches!(scene.host.add_device(Rid(9), &path), Err(OpenError::Call(_))));
        let device = Device::new(host.clone(), rid).unwrap();
        device.attach(&Table::for_device(&space, &device).unwrap()).unwrap();
        scene.scratch.backing().write(0, &[0; 8]).unwrap();
        edu.copy(M2, SCRATCH, 8);
        assert_eq!(scene.scratch_word(), tag(0));
        assert_eq!(host.remove_device(rid), Err(RemoveError::Attached(rid)));
        drop(device);
        assert_eq!(host.remove_device(rid), Err(RemoveError::FileInUse(rid)));
        drop(edu);
        host.remove_device(rid).unwrap();
    }
    // The hosts are there, and other devices at work.
    let device = scene.attached(ONE, &space);
    let mut child = Command::new(std::env::current_exe().unwrap());
    let child = child.args(["--exact", "a_device_is_taken_and_given_back"]).env(TAKES, "2");
    let output = child.output().unwrap();
    assert!(output.status.success(), "{output:?}");
    assert_eq!(scene.read(0, M2), Some(tag(0)));
    scene.host.add_device(rid, &path).unwrap();
    drop((device, space, other));
    scene.end();
}

#[test]
fn a_device_is_taken_and_given_back() {
    let _alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
    let number = std::env::var(TAKES).map_or(3, |number| number.parse().unwrap());
    let host = Host::open(HostOptions::default()).unwrap();
    for _ in 0..3 {
        host.add_device(ONE, machine::device(number)).unwrap();
        host.remove_device(ONE).unwrap();
    }
    // The host goes with a device.
    host.add_device(ONE, machine::device(number)).unwrap();
}
