//! Tables of guests over a space: what is remembered of them, against unmaps and changes below, and against the guest.

use crate::double::NATIVE;
use crate::fixture::{OBJECT, PAGE, Seen, World, check, iova, others_may_run, page, pages};
use ioasid::epoch::DmaSection;
use ioasid::{
    Attributes, Backing, Device, FirstStage, Iova, IovaRange, LateBound, Memory, MemoryGone, NestingFault,
    Permissions, Rid, Table,
};
use shuttle::thread;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

/// Where the space has data, and where it has the guest's tables.
const DATA: u64 = 0x10;
const TABLES: u64 = 0x20;
/// The page of the device's that the guest maps.
const AT: u64 = 5;
/// P, R/W and U/S of x86-64, and the marks of use.
const ENTRY: u64 = 7;
const MARKS: u64 = 0x60;
/// The index of the tables' pages among those that are lent.
const TABLES_LENT: u64 = 100;

/// The words of the guest's tables: one page for each level, the root first.
fn words(marks: u64) -> [[u64; 512]; 4] {
    let mut words = [[0; 512]; 4];
    for (level, table) in words.iter_mut().enumerate().take(3) {
        table[0] = ((TABLES + 1 + level as u64) * PAGE) | ENTRY | marks;
    }
    words[3][AT as usize] = (DATA * PAGE) | ENTRY | marks;
    words
}

/// A guest's tables in memory of this process.
struct Guest {
    backing: Arc<Backing>,
    _memory: Arc<Memory>,
}

impl Guest {
    fn new(world: &World, marks: u64) -> Guest {
        let backing = Backing::anonymous(&world.bus, OBJECT).unwrap();
        let memory = world.register(&backing, 4);
        world.space.map(iova(TABLES), &memory, 0, 4 * PAGE, Permissions::READ_WRITE).unwrap();
        let guest = Guest { backing, _memory: memory };
        for (level, words) in words(marks).iter().enumerate() {
            words.iter().enumerate().for_each(|(index, word)| guest.set(level as u64, index as u64, *word));
        }
        guest
    }

    fn set(&self, level: u64, index: u64, word: u64) {
        self.backing.write(level * PAGE + index * 8, &word.to_le_bytes()).unwrap();
    }

    fn word(&self, level: u64, index: u64) -> u64 {
        let mut bytes = [0; 8];
        self.backing.read(level * PAGE + index * 8, &mut bytes).unwrap();
        u64::from_le_bytes(bytes)
    }
}

fn attached(world: &World, rid: Rid) -> (Device, Arc<Table>) {
    let device = world.double.device(rid);
    let root = Iova::new(TABLES * PAGE);
    let table = Table::nested(&world.space, &device, FirstStage::X86_64, root).unwrap();
    device.attach(&table).unwrap();
    (device, table)
}

/// A device reads through the guest's table, and has looked up what is not there.
fn read(world: &World, rid: Rid) -> Result<Seen, NestingFault> {
    read_for(world, rid, Permissions::READ)
}

fn read_for(world: &World, rid: Rid, access: Permissions) -> Result<Seen, NestingFault> {
    let Some(table) = world.double.table_of(rid) else { return Ok(Seen::Blocked) };
    let nesting = table.nesting().unwrap();
    let in_force = |_: &DmaSection| {
        others_may_run();
        world.double.table_of(rid).is_some_and(|now| Arc::ptr_eq(&now, &table))
    };
    nesting.resolve(AT * PAGE + 8, access, in_force)?;
    Ok(world.dma(rid, AT))
}

/// Several devices' threads, each of which reads so often.
fn readers(world: &Arc<World>, rids: &[Rid], times: usize) -> Vec<thread::JoinHandle<()>> {
    let reader = |rid: &Rid| {
        let (world, rid) = (world.clone(), *rid);
        thread::spawn(move || {
            for _ in 0..times {
                // What it comes to depends on who was quicker.
                let _ = read(&world, rid);
            }
        })
    };
    rids.iter().map(reader).collect()
}

fn join(threads: Vec<thread::JoinHandle<()>>) {
    threads.into_iter().for_each(|thread| thread.join().unwrap());
}

#[test]
fn what_leaves_the_space_leaves_the_shadow() {
    check(600, || {
        let world = World::new();
        let guest = Guest::new(&world, MARKS);
        let memory = world.register(&world.object(0..4), 4);
        let (device, table) = attached(&world, NATIVE);
        let threads = readers(&world, &[NATIVE, NATIVE], 2);
        for round in 0..2 {
            world.lent.lend([round]);
            world.space.map(iova(DATA), &memory, round * PAGE, PAGE, Permissions::READ_WRITE).unwrap();
            if round == 0 {
                world.space.unmap(page(DATA)).unwrap();
            } else {
                world.space.unmap_deferred(page(DATA)).unwrap();
                world.space.flush();
            }
            world.lent.take_back([round]);
        }
        join(threads);
        assert_eq!(read(&world, NATIVE), Err(NestingFault::SecondStage { address: DATA * PAGE + 8 }));
        drop((device, table));
        drop(guest);
        world.finish();
    });
}

#[test]
fn a_change_below_is_seen_at_once() {
    check(600, || {
        let world = World::new();
        let guest = Guest::new(&world, MARKS);
        let memory = world.register(&world.object(0..4), 4);
        world.lent.lend([0, 1]);
        world.space.map(iova(DATA), &memory, 0, PAGE, Permissions::READ_WRITE).unwrap();
        let (device, table) = attached(&world, NATIVE);
        let threads = readers(&world, &[NATIVE, NATIVE], 2);
        world.space.remap(iova(DATA), &memory, PAGE, PAGE, Permissions::READ_WRITE).unwrap();
        world.lent.take_back([0]);
        assert_eq!(read(&world, NATIVE), Ok(Seen::Page(1)));
        // From now on nobody may write, whatever was remembered.
        world.space.protect(page(DATA), Permissions::READ).unwrap();
        let section = ioasid::epoch::dma();
        let writable = table
            .native(&section)
            .walk(AT * PAGE)
            .is_ok_and(|leaf| leaf.attributes.contains(Attributes::WRITE));
        assert!(!writable);
        drop(section);
        join(threads);
        let refused = read_for(&world, NATIVE, Permissions::WRITE);
        assert_eq!(refused, Err(NestingFault::SecondStage { address: DATA * PAGE + 8 }));
        drop((device, table));
        drop(guest);
        world.finish();
    });
}

#[test]
fn what_the_guest_has_invalidated_is_used_no_more() {
    check(600, || {
        let world = World::new();
        let guest = Guest::new(&world, MARKS);
        let memory = world.register(&world.object(0..4), 4);
        world.lent.lend([0, 1]);
        world.space.map(iova(DATA), &memory, 0, 2 * PAGE, Permissions::READ_WRITE).unwrap();
        let (device, table) = attached(&world, NATIVE);
        let threads = readers(&world, &[NATIVE, NATIVE], 2);
        // Another page. The first one is the guest's own again when it has said so.
        guest.set(3, AT, ((DATA + 1) * PAGE) | ENTRY | MARKS);
        others_may_run();
        table.nesting().unwrap().invalidate(page(AT));
        world.lent.take_back([0]);
        assert_eq!(read(&world, NATIVE), Ok(Seen::Page(1)));
        join(threads);
        drop((device, table));
        drop(guest);
        world.finish();
    });
}

#[test]
fn a_page_of_tables_is_marked_no_more_when_it_was_invalidated() {
    check(600, || {
        let world = World::new();
        let guest = Guest::new(&world, 0);
        let memory = world.register(&world.object(0..4), 4);
        world.lent.lend([0]);
        world.space.map(iova(DATA), &memory, 0, PAGE, Permissions::READ_WRITE).unwrap();
        let (device, table) = attached(&world, NATIVE);
        let threads = readers(&world, &[NATIVE, NATIVE], 1);
        // The lowest table is linked nowhere any more, and its page is used for something that looks like an entry.
        guest.set(2, 0, 0);
        others_may_run();
        table.nesting().unwrap().invalidate(IovaRange::ALL);
        guest.set(3, AT, (DATA * PAGE) | ENTRY);
        join(threads);
        assert_eq!(guest.word(3, AT), (DATA * PAGE) | ENTRY, "somebody has marked what is no table any more");
        drop((device, table));
        drop(guest);
        world.finish();
    });
}

#[test]
fn tables_that_leave_the_space_are_forgotten() {
    check(600, || {
        let world = World::new();
        let guest = Guest::new(&world, MARKS);
        let memory = world.register(&world.object(0..4), 4);
        world.lent.lend([0]);
        world.space.map(iova(DATA), &memory, 0, PAGE, Permissions::READ_WRITE).unwrap();
        let (device, table) = attached(&world, NATIVE);
        let threads = readers(&world, &[NATIVE, NATIVE], 2);
        world.space.unmap(pages(TABLES + 3, 1)).unwrap();
        // What was translated by that table is translated no more.
        world.lent.take_back([0]);
        let gone = NestingFault::SecondStage { address: (TABLES + 3) * PAGE + AT * 8 };
        assert_eq!(read(&world, NATIVE), Err(gone));
        join(threads);
        drop((device, table));
        drop(guest);
        world.finish();
    });
}

/// Tables behind calls, which may be read as long as they are lent.
#[derive(Debug)]
struct Calls {
    words: Box<[[u64; 512]; 4]>,
    world: Mutex<std::sync::Weak<World>>,
    reads: AtomicU64,
}

impl LateBound for Calls {
    fn read(&self, offset: u64, buffer: &mut [u8]) -> Result<(), MemoryGone> {
        let world = self.world.lock().unwrap().upgrade().unwrap();
        world.lent.use_page(TABLES_LENT);
        self.reads.fetch_add(1, Ordering::Relaxed);
        let word = self.words[(offset / PAGE) as usize][(offset % PAGE / 8) as usize];
        buffer.copy_from_slice(&word.to_le_bytes());
        Ok(())
    }

    fn write(&self, _offset: u64, _bytes: &[u8]) -> Result<(), MemoryGone> {
        Ok(())
    }
}

#[test]
fn a_device_that_is_detached_reads_no_tables() {
    check(600, || {
        let world = World::new();
        let calls = Arc::new(Calls {
            words: Box::new(words(MARKS)),
            world: Mutex::new(Arc::downgrade(&world)),
            reads: AtomicU64::new(0),
        });
        let tables = world.register(&Backing::late_bound(&world.bus, calls), 4);
        let memory = world.register(&world.object(0..4), 4);
        world.lent.lend([0, TABLES_LENT]);
        world.space.map(iova(TABLES), &tables, 0, 4 * PAGE, Permissions::READ).unwrap();
        world.space.map(iova(DATA), &memory, 0, PAGE, Permissions::READ_WRITE).unwrap();
        let (device, table) = attached(&world, NATIVE);
        let threads = readers(&world, &[NATIVE, NATIVE], 1);
        others_may_run();
        device.detach();
        world.lent.take_back([0, TABLES_LENT]);
        join(threads);
        drop((device, table));
        drop((tables, memory));
        world.finish();
    });
}
