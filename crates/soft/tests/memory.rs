//! Registered memory as devices see it: register, grow, give back parts, revoke, map, unmap and drop in any order.
//!
//! One test is a sequence of calls against a plain model in which every byte is known; after every step every page of
//! every space is read, and some written, by devices on tables of different formats. The other has everything happen
//! at the same time.

use ioasid::{
    Account, Backing, Bus, Device, Iova, IovaRange, LateBound, MapError, Memory, MemoryGone, Permissions,
    RegisterError, ReleaseError, Residency, Rid, Space, Table,
};
use ioasid_soft::dma::{DmaFaultReason, DmaPort};
use ioasid_soft::iommu::{Port, SoftIommu, TableKind};
use proptest::prelude::*;
use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals, ftruncate, memfd_create};
use std::collections::{BTreeMap, BTreeSet};
use std::os::fd::OwnedFd;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, mpsc};
use std::time::Duration;

const PAGE: u64 = 4096;
/// Pages of I/O addresses that are used.
const PAGES: u64 = 48;
/// Pages that an object with an end can have.
const OBJECT_PAGES: u64 = 24;
/// Pages that an object without an end has really. No sequence gets so far.
const ENDLESS_PAGES: u64 = 512;
const RW: Permissions = Permissions::READ_WRITE;

#[derive(Clone, Debug)]
enum Step {
    Register { slot: usize, object: usize, first: u64, count: u64, account: usize, populate: bool },
    Extend { object: usize, pages: u64 },
    Grow { slot: usize, pages: u64 },
    Release { slot: usize, first: u64, count: u64 },
    Drop { slot: usize },
    Revoke { object: usize },
    Map { space: usize, at: u64, slot: usize, first: u64, count: u64 },
    Unmap { space: usize, at: u64, count: u64 },
    Attach { device: usize },
    Detach { device: usize },
    Write { device: usize, at: u64, value: u64 },
}

const SLOTS: usize = 5;
const SPACES: usize = 2;
const KINDS: usize = 4;
const ACCOUNTS: usize = 2;
/// The space and the kind of table of each device.
const DEVICES: [(usize, TableKind); 3] =
    [(0, TableKind::Native), (0, TableKind::VtdSecondStage), (1, TableKind::VtdSecondStage)];

fn step() -> impl Strategy<Value = Step> {
    let (slot, object) = (0..SLOTS, 0..KINDS);
    prop_oneof![
        5 => (slot.clone(), object.clone(), 0..OBJECT_PAGES, 1..12u64, 0..ACCOUNTS, any::<bool>()).prop_map(
            |(slot, object, first, count, account, populate)| Step::Register { slot, object, first, count, account, populate }
        ),
        2 => (object.clone(), 1..6u64).prop_map(|(object, pages)| Step::Extend { object, pages }),
        3 => (slot.clone(), 1..6u64).prop_map(|(slot, pages)| Step::Grow { slot, pages }),
        4 => (slot.clone(), 0..10u64, 1..6u64).prop_map(|(slot, first, count)| Step::Release { slot, first, count }),
        2 => slot.clone().prop_map(|slot| Step::Drop { slot }),
        1 => object.prop_map(|object| Step::Revoke { object }),
        9 => (0..SPACES, 0..PAGES, slot, 0..6u64, 1..8u64)
            .prop_map(|(space, at, slot, first, count)| Step::Map { space, at, slot, first, count }),
        3 => (0..SPACES, 0..PAGES, 1..12u64).prop_map(|(space, at, count)| Step::Unmap { space, at, count }),
        1 => (0..DEVICES.len()).prop_map(|device| Step::Attach { device }),
        1 => (0..DEVICES.len()).prop_map(|device| Step::Detach { device }),
        5 => (0..DEVICES.len(), 0..PAGES, any::<u64>()).prop_map(|(device, at, value)| Step::Write { device, at, value }),
    ]
}

/// Memory behind calls.
#[derive(Debug)]
struct Elsewhere(Mutex<Vec<u8>>);

impl LateBound for Elsewhere {
    fn read(&self, offset: u64, buffer: &mut [u8]) -> Result<(), MemoryGone> {
        let bytes = self.0.lock().unwrap();
        let source = bytes.get(offset as usize..offset as usize + buffer.len());
        buffer.copy_from_slice(source.ok_or(MemoryGone { offset })?);
        Ok(())
    }

    fn write(&self, offset: u64, from: &[u8]) -> Result<(), MemoryGone> {
        let mut bytes = self.0.lock().unwrap();
        let target = bytes.get_mut(offset as usize..offset as usize + from.len());
        target.ok_or(MemoryGone { offset })?.copy_from_slice(from);
        Ok(())
    }
}

/// An object, and what it must be like.
struct Object {
    backing: Arc<Backing>,
    file: Option<OwnedFd>,
    /// How many pages it has.
    pages: u64,
    revoked: bool,
    /// The word at the beginning of each page.
    words: [u64; ENDLESS_PAGES as usize],
}

impl Object {
    /// The first of its kind, or the next after one was revoked.
    fn new(bus: &Arc<Bus>, kind: usize) -> Object {
        let file = |seals| {
            let file = memfd_create("test", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING).unwrap();
            ftruncate(&file, 8 * PAGE).unwrap();
            fcntl_add_seals(&file, seals).unwrap();
            file
        };
        let (backing, file, pages) = match kind {
            0 => (Backing::anonymous(bus, OBJECT_PAGES * PAGE).unwrap(), None, OBJECT_PAGES),
            1 | 2 => {
                let file = file(if kind == 1 { SealFlags::SHRINK } else { SealFlags::empty() });
                let backing = Backing::file(bus, &file).unwrap();
                assert_eq!(backing.is_direct(), kind == 1);
                (backing, Some(file), 8)
            }
            _ => {
                let bytes = vec![0; (ENDLESS_PAGES * PAGE) as usize];
                (Backing::late_bound(bus, Arc::new(Elsewhere(Mutex::new(bytes)))), None, u64::MAX)
            }
        };
        Object { backing, file, pages, revoked: false, words: [0; ENDLESS_PAGES as usize] }
    }
}

/// A registration, and what it must be like.
struct Slot {
    memory: Arc<Memory>,
    object: usize,
    first: u64,
    /// To the end of the last page that is held.
    count: u64,
    given_back: BTreeSet<u64>,
    account: usize,
}

impl Slot {
    fn holds(&self, page: u64) -> bool {
        (self.first..self.first + self.count).contains(&page) && !self.given_back.contains(&page)
    }
}

/// A page of an object.
type Target = (usize, u64);

struct Sequence {
    bus: Arc<Bus>,
    accounts: [Account; ACCOUNTS],
    spaces: [Arc<Space>; SPACES],
    devices: Vec<(Device, Arc<Port>, bool)>,
    /// All there ever were; the last of each kind is used.
    objects: Vec<Object>,
    current: [usize; KINDS],
    slots: [Option<Slot>; SLOTS],
    mapped: [BTreeMap<u64, Target>; SPACES],
}

impl Sequence {
    fn new() -> Sequence {
        let bus = Bus::new();
        let iommu = SoftIommu::new();
        let devices = DEVICES.iter().enumerate().map(|(number, (_, kind))| {
            let rid = Rid(number as u16 * 8);
            let port = iommu.add_device(rid, *kind).unwrap();
            (Device::new(iommu.clone(), rid).unwrap(), port, false)
        });
        Sequence {
            accounts: [Account::new("rich", None), Account::new("poor", Some(20))],
            spaces: [Space::new(&bus), Space::new(&bus)],
            devices: devices.collect(),
            objects: (0..KINDS).map(|kind| Object::new(&bus, kind)).collect(),
            current: std::array::from_fn(|kind| kind),
            slots: Default::default(),
            mapped: Default::default(),
            bus,
        }
    }

    /// What an account must be charged: each page once.
    fn charge(&self, account: usize) -> BTreeSet<Target> {
        let slots = self.slots.iter().flatten().filter(|slot| slot.account == account);
        slots
            .flat_map(|slot| {
                let pages = (slot.first..slot.first + slot.count).filter(|page| slot.holds(*page));
                pages.map(|page| (slot.object, page)).collect::<Vec<_>>()
            })
            .collect()
    }

    /// Whether these pages more go over the limit.
    fn over_limit(&self, account: usize, object: usize, pages: std::ops::Range<u64>) -> bool {
        let charge = self.charge(account);
        let new = pages.filter(|page| !charge.contains(&(object, *page))).count();
        new > 0
            && self.accounts[account].limit_pages().is_some_and(|limit| (charge.len() + new) as u64 > limit)
    }

    /// What nobody holds any more is not mapped.
    fn forget_unheld(&mut self) {
        let held = |(object, page): Target| {
            self.slots.iter().flatten().any(|slot| slot.object == object && slot.holds(page))
        };
        for mapped in &mut self.mapped {
            mapped.retain(|_, target| held(*target));
        }
    }

    fn run(&mut self, step: &Step) {
        match *step {
            Step::Register { slot, object, first, count, account, populate } => {
                let number = self.current[object];
                let residency = match populate && object != 3 {
                    true => Residency::Populated,
                    false => Residency::OnDemand,
                };
                let (object, account_of) = (&self.objects[number], &self.accounts[account]);
                let result = Memory::register_resident(
                    &object.backing,
                    first * PAGE,
                    count * PAGE,
                    account_of,
                    residency,
                );
                if object.pages < first + count {
                    assert!(matches!(result, Err(RegisterError::OutOfBounds { .. })), "{result:?}");
                } else if self.over_limit(account, number, first..first + count) {
                    assert!(matches!(result, Err(RegisterError::OverLimit(_))), "{result:?}");
                } else {
                    let given_back = BTreeSet::new();
                    let new =
                        Slot { memory: result.unwrap(), object: number, first, count, given_back, account };
                    self.slots[slot] = Some(new);
                    self.forget_unheld();
                }
            }
            Step::Extend { object, pages } => {
                let object = &mut self.objects[self.current[object]];
                if let Some(file) = &object.file {
                    object.pages = (object.pages + pages).min(OBJECT_PAGES);
                    ftruncate(file, object.pages * PAGE).unwrap();
                }
            }
            Step::Grow { slot, pages } => {
                let Some(old) = &self.slots[slot] else { return };
                let (object, end) = (&self.objects[old.object], old.first + old.count);
                let result = old.memory.grow(pages * PAGE);
                if object.pages < end + pages {
                    assert!(matches!(result, Err(RegisterError::OutOfBounds { .. })), "{result:?}");
                } else if object.revoked {
                    assert!(matches!(result, Err(RegisterError::Revoked)), "{result:?}");
                } else if self.over_limit(old.account, old.object, end..end + pages) {
                    assert!(matches!(result, Err(RegisterError::OverLimit(_))), "{result:?}");
                } else {
                    result.unwrap();
                    self.slots[slot].as_mut().unwrap().count += pages;
                }
            }
            Step::Release { slot, first, count } => {
                let Some(old) = &mut self.slots[slot] else { return };
                let pages = old.first + first..old.first + first + count;
                let result = old.memory.release(first * PAGE, count * PAGE);
                if !pages.clone().all(|page| old.holds(page)) {
                    assert!(matches!(result, Err(ReleaseError::NotRegistered { .. })), "{result:?}");
                    return;
                }
                result.unwrap();
                old.given_back.extend(pages);
                while old.count > 0 && old.given_back.remove(&(old.first + old.count - 1)) {
                    old.count -= 1;
                }
                self.forget_unheld();
            }
            Step::Drop { slot } => {
                self.slots[slot] = None;
                self.forget_unheld();
            }
            Step::Revoke { object: kind } => {
                let number = self.current[kind];
                self.objects[number].backing.revoke();
                self.objects[number].revoked = true;
                for mapped in &mut self.mapped {
                    mapped.retain(|_, (object, _)| *object != number);
                }
                let again = Memory::register(&self.objects[number].backing, 0, PAGE, &self.accounts[0]);
                assert!(matches!(again, Err(RegisterError::Revoked)));
                self.current[kind] = self.objects.len();
                self.objects.push(Object::new(&self.bus, kind));
            }
            Step::Map { space, at, slot, first, count } => {
                let Some(slot) = &self.slots[slot] else { return };
                let result = self.spaces[space].map(
                    Iova::new(at * PAGE),
                    &slot.memory,
                    first * PAGE,
                    count * PAGE,
                    RW,
                );
                let pages = slot.first + first..slot.first + first + count;
                let revoked = self.objects[slot.object].revoked;
                if !pages.clone().all(|page| slot.holds(page)) {
                    let told = matches!(result, Err(MapError::BeyondMemory { .. }));
                    assert!(told || revoked && matches!(result, Err(MapError::Revoked)), "{result:?}");
                } else if revoked {
                    assert!(matches!(result, Err(MapError::Revoked)), "{result:?}");
                } else if self.mapped[space].range(at..at + count).next().is_some() {
                    assert!(matches!(result, Err(MapError::AlreadyMapped { .. })), "{result:?}");
                } else {
                    result.unwrap();
                    let object = slot.object;
                    self.mapped[space].extend((at..).zip(pages.map(|page| (object, page))));
                }
            }
            Step::Unmap { space, at, count } => {
                let range = IovaRange::with_length(at * PAGE, count * PAGE).unwrap();
                let unmapped = self.spaces[space].unmap(range).unwrap();
                let before = self.mapped[space].len();
                self.mapped[space].retain(|page, _| !(at..at + count).contains(page));
                assert_eq!(unmapped.bytes(), (before - self.mapped[space].len()) as u64 * PAGE);
            }
            Step::Attach { device } => {
                let (device, _, attached) = &mut self.devices[device];
                let space = DEVICES[usize::from(device.rid().0 / 8)].0;
                device.attach(&Table::for_device(&self.spaces[space], device).unwrap()).unwrap();
                *attached = true;
            }
            Step::Detach { device } => {
                let (device, _, attached) = &mut self.devices[device];
                device.detach();
                *attached = false;
            }
            Step::Write { device: number, at, value } => {
                let (_, port, attached) = &self.devices[number];
                let target = self.mapped[DEVICES[number].0].get(&at).filter(|_| *attached);
                let result = port.write(at * PAGE, &value.to_le_bytes());
                assert_eq!(result.is_ok(), target.is_some(), "{result:?}");
                if let Some(&(object, page)) = target {
                    self.objects[object].words[page as usize] = value;
                }
            }
        }
    }

    fn check(&self) {
        for (account, of) in self.accounts.iter().enumerate() {
            assert_eq!(of.charged_pages(), self.charge(account).len() as u64);
        }
        for slot in self.slots.iter().flatten() {
            assert_eq!(slot.memory.length(), slot.count * PAGE);
        }
        for object in &self.objects {
            let mut word = [0; 8];
            let pages = object.pages.min(ENDLESS_PAGES);
            for page in (0..pages).filter(|page| object.words[*page as usize] != 0 || object.revoked) {
                let read = object.backing.read(page * PAGE, &mut word);
                assert_eq!(read.is_ok(), !object.revoked);
                assert!(read.is_err() || u64::from_le_bytes(word) == object.words[page as usize]);
            }
        }
        for ((_, port, attached), (space, _)) in self.devices.iter().zip(DEVICES) {
            for page in 0..PAGES + 8 {
                let mut word = [0; 8];
                let result = port.read(page * PAGE, &mut word);
                match self.mapped[space].get(&page) {
                    _ if !attached => assert_eq!(result.unwrap_err().reason, DmaFaultReason::Blocked),
                    None => assert_eq!(result.unwrap_err().reason, DmaFaultReason::NotMapped, "{page}"),
                    Some(&(object, of)) => {
                        result.unwrap();
                        assert_eq!(
                            u64::from_le_bytes(word),
                            self.objects[object].words[of as usize],
                            "{page}"
                        );
                    }
                }
            }
        }
        for (space, mapped) in self.spaces.iter().zip(&self.mapped) {
            assert_eq!(space.statistics().mapped_bytes, mapped.len() as u64 * PAGE);
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 150, ..ProptestConfig::default() })]

    #[test]
    fn any_sequence_gives_what_the_model_gives(steps in prop::collection::vec(step(), 1..60)) {
        let mut sequence = Sequence::new();
        for device in 0..DEVICES.len() {
            sequence.run(&Step::Attach { device });
        }
        for step in &steps {
            sequence.run(step);
            sequence.check();
        }
        for slot in 0..SLOTS {
            sequence.run(&Step::Drop { slot });
        }
        sequence.check();
        prop_assert!(sequence.mapped.iter().all(BTreeMap::is_empty));
        prop_assert!(sequence.accounts.iter().all(|account| account.charged_pages() == 0));
    }
}

/// What the owner writes to memory that it has back.
const OWNERS: u64 = 0x0123_4567_89ab_cdef;
/// What devices write.
const DEVICES_WORD: u64 = 0x5555_5555_5555_5555;

/// Numbers that look random, from a seed.
fn random(state: &mut u64) -> u64 {
    *state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
    *state >> 33
}

/// Everything there is to do with memory, in threads, and in the middle of it the memory is taken back.
fn revoke_in_the_middle_of_everything(round: u64) {
    const LENGTH: u64 = 64;
    // The owner's own memory, so that it can look.
    let words: Vec<AtomicU64> = (0..LENGTH * PAGE / 8 + PAGE / 8).map(|_| AtomicU64::new(0)).collect();
    let start = words.as_ptr().addr().next_multiple_of(PAGE as usize) - words.as_ptr().addr();
    let words_of_pages = &words[start / 8..start / 8 + (LENGTH * PAGE / 8) as usize];
    let bus = Bus::new();
    let pointer = NonNull::new(words_of_pages.as_ptr().cast_mut().cast::<u8>()).unwrap();
    // SAFETY: `words` outlives everything in this function, and atomics may be written at any time.
    let backing = unsafe { Backing::host(&bus, pointer, LENGTH * PAGE) };
    let account = Account::new("test", None);
    let iommu = SoftIommu::new();
    let spaces = [Space::new(&bus), Space::new(&bus)];
    let mut ports = Vec::new();
    let mut devices = Vec::new();
    for (number, (space, kind)) in DEVICES.iter().enumerate() {
        let rid = Rid(number as u16 * 8);
        ports.push(iommu.add_device(rid, *kind).unwrap());
        let device = Device::new(iommu.clone(), rid).unwrap();
        device.attach(&Table::for_device(&spaces[*space], &device).unwrap()).unwrap();
        devices.push(device);
    }
    let whole = Memory::register(&backing, 0, LENGTH * PAGE, &account).unwrap();
    let (stop, revoked) = (AtomicBool::new(false), AtomicBool::new(false));
    let running = || !stop.load(Ordering::Relaxed);
    std::thread::scope(|scope| {
        for port in &ports {
            scope.spawn(|| {
                let mut state = round ^ std::ptr::from_ref(port).addr() as u64;
                while running() {
                    let page = random(&mut state) % LENGTH;
                    let mut word = [0; 8];
                    let before = revoked.load(Ordering::SeqCst);
                    let result = match state & 1 {
                        0 => port.read(page * PAGE, &mut word),
                        _ => port.write(page * PAGE, &DEVICES_WORD.to_le_bytes()),
                    };
                    assert!(!(before && result.is_ok()), "DMA to revoked memory");
                    assert_ne!(u64::from_le_bytes(word), OWNERS, "a device read what is not its own");
                }
            });
        }
        // Maps and unmaps, of the registration that lasts.
        for (number, space) in spaces.iter().enumerate() {
            let whole = &whole;
            scope.spawn(move || {
                let mut state = round + number as u64;
                while running() {
                    let (page, count) = (random(&mut state) % LENGTH, 1 + random(&mut state) % 8);
                    let count = count.min(LENGTH - page);
                    let _ = space.map(Iova::new(page * PAGE), whole, page * PAGE, count * PAGE, RW);
                    if random(&mut state) % 2 == 0 {
                        space.unmap(IovaRange::with_length(page * PAGE, count * PAGE).unwrap()).unwrap();
                    }
                }
            });
        }
        // Registers, grows, gives back and drops others.
        scope.spawn(|| {
            let mut state = round;
            while running() {
                let page = random(&mut state) % (LENGTH - 16);
                let before = revoked.load(Ordering::SeqCst);
                let result = Memory::register(&backing, page * PAGE, 8 * PAGE, &account);
                assert!(!before || matches!(result, Err(RegisterError::Revoked)));
                let Ok(memory) = result else { continue };
                let space = &spaces[random(&mut state) as usize % 2];
                let _ = space.map(Iova::new(page * PAGE), &memory, 0, 8 * PAGE, RW);
                let _ = memory.grow(4 * PAGE);
                let _ = memory.release(2 * PAGE, 2 * PAGE);
                let _ = space.map(Iova::new((page + 8) * PAGE), &memory, 8 * PAGE, 4 * PAGE, RW);
                if random(&mut state) % 2 == 0 {
                    let _ = memory.release(6 * PAGE, 6 * PAGE);
                }
            }
        });
        // Moves a device in and out, so that its table comes and goes.
        scope.spawn(|| {
            let device = &devices[1];
            while running() {
                device.detach();
                device.attach(&Table::for_device(&spaces[0], device).unwrap()).unwrap();
            }
        });
        scope.spawn(|| {
            std::thread::sleep(Duration::from_micros(round * 137 % 5000));
            // Two at once, as if the object had two owners.
            std::thread::scope(|scope| {
                scope.spawn(|| backing.revoke());
                backing.revoke();
            });
            // The memory is ours again.
            words_of_pages.iter().for_each(|word| word.store(OWNERS, Ordering::SeqCst));
            revoked.store(true, Ordering::SeqCst);
            std::thread::sleep(Duration::from_millis(5));
            let untouched = words_of_pages.iter().all(|word| word.load(Ordering::SeqCst) == OWNERS);
            stop.store(true, Ordering::Relaxed);
            assert!(untouched, "a device wrote to revoked memory");
        });
    });
    for space in &spaces {
        assert!(space.leaves(IovaRange::ALL).is_empty());
    }
    drop(whole);
    assert_eq!(account.charged_pages(), 0);
}

#[test]
fn revoking_in_the_middle_of_everything_ends_and_leaves_nothing() {
    let (done, wait) = mpsc::channel();
    let rounds = std::thread::spawn(move || {
        for round in 0..30 {
            revoke_in_the_middle_of_everything(round);
        }
        let _ = done.send(());
    });
    if let Err(mpsc::RecvTimeoutError::Timeout) = wait.recv_timeout(Duration::from_secs(120)) {
        panic!("it hangs");
    }
    rounds.join().unwrap();
}

/// Memory whose first page keeps whoever reads it waiting.
#[derive(Debug, Default)]
struct Stubborn {
    state: Mutex<(bool, bool)>,
    moved: Condvar,
}

impl LateBound for Stubborn {
    fn read(&self, offset: u64, buffer: &mut [u8]) -> Result<(), MemoryGone> {
        buffer.fill(1);
        if offset < PAGE {
            let mut state = self.state.lock().unwrap();
            state.0 = true;
            self.moved.notify_all();
            drop(self.moved.wait_while(state, |(_, open)| !*open).unwrap());
        }
        Ok(())
    }

    fn write(&self, offset: u64, _bytes: &[u8]) -> Result<(), MemoryGone> {
        Err(MemoryGone { offset })
    }
}

#[test]
fn revoked_memory_is_out_of_reach_even_while_an_unmap_of_it_has_to_wait() {
    let bus = Bus::new();
    let stubborn = Arc::new(Stubborn::default());
    let backing = Backing::late_bound(&bus, stubborn.clone() as Arc<dyn LateBound>);
    let memory = Memory::register(&backing, 0, 2 * PAGE, &Account::new("test", None)).unwrap();
    let iommu = SoftIommu::new();
    // The space in which somebody waits is the older one.
    let spaces = [Space::new(&bus), Space::new(&bus)];
    let attached = |number: usize| {
        let rid = Rid(number as u16);
        let port = iommu.add_device(rid, TableKind::VtdSecondStage).unwrap();
        let device = Device::new(iommu.clone(), rid).unwrap();
        spaces[number].map(Iova::new(0), &memory, 0, 2 * PAGE, Permissions::READ).unwrap();
        device.attach(&Table::for_device(&spaces[number], &device).unwrap()).unwrap();
        (device, port)
    };
    let devices = [attached(0), attached(1)];
    std::thread::scope(|scope| {
        scope.spawn(|| devices[0].1.read(0, &mut [0; 8]));
        let state = stubborn.state.lock().unwrap();
        drop(stubborn.moved.wait_while(state, |(reading, _)| !*reading).unwrap());
        let revoking = scope.spawn(|| backing.revoke());
        let begun = std::time::Instant::now();
        while devices[1].1.read(PAGE, &mut [0; 8]).is_ok() && begun.elapsed() < Duration::from_secs(30) {
            std::thread::yield_now();
        }
        let out_of_reach = devices[1].1.read(PAGE, &mut [0; 8]).map_err(|fault| fault.reason);
        let waited = !revoking.is_finished();
        stubborn.state.lock().unwrap().1 = true;
        stubborn.moved.notify_all();
        revoking.join().unwrap();
        assert!(waited, "somebody was still reading");
        assert!(out_of_reach.is_err());
    });
    assert!(spaces.iter().all(|space| space.leaves(IovaRange::ALL).is_empty()));
}
