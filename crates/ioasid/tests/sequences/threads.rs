//! Sequences side by side.
//!
//! Several threads work on one space, of which devices read all the while through tables of several formats, and tables come
//! and go beside that. A page always leads to a page of the object that has the same remainder, so that a device that has read
//! any page knows whether it could have been this one.
//!
//! Threads with parts of their own know what every call has to come to. Threads that share one part do not; but what was
//! mapped less what was unmapped is what is there, in every table, and nothing is left when it is gone.

use crate::double::{DERIVED, Double, DoubleTable, NATIVE, OWN_NATIVE, WIDE, X86};
use crate::plain::{Lead, PlainSpace};
use crate::runner;
use crate::steps::{Manner, PAGE, Pages, permissions};
use crate::world::tag;
use ioasid::{
    Account, AliasError, Backing, Bus, Device, Iova, IovaRange, MapError, Memory, Oa, PageSize, RemapError,
    Rid, Space, Table, Translated, epoch,
};
use proptest::collection::vec;
use proptest::prelude::*;
use std::ops::Range;
use std::sync::atomic::{AtomicBool, AtomicI64, AtomicU64, Ordering};
use std::sync::{Arc, Barrier};

/// Pages lead to pages with the same remainder by this.
const REMAINDER: u64 = 64;
const OBJECT_PAGES: u64 = 1024;
const THREADS: u64 = 3;
/// The part of a thread that has one of its own. Not a multiple of the size of a leaf, so that neighbours share tables.
const PART: u64 = 300;

#[derive(Clone, Copy, Debug)]
enum Call {
    Map {
        pages: Pages,
        from: u64,
        permissions: u8,
    },
    Unmap {
        pages: Pages,
        manner: Manner,
    },
    Protect {
        pages: Pages,
        permissions: u8,
    },
    Remap {
        pages: Pages,
        from: u64,
        permissions: u8,
    },
    /// By so many times the remainder.
    Alias {
        pages: Pages,
        by: u64,
        permissions: u8,
    },
    Merge,
    /// Of the n-th device's table.
    Split(usize, Pages),
    Flush,
}

fn call() -> impl Strategy<Value = Call> {
    let count = prop_oneof![3 => 1..8u64, 1 => 1..PART];
    let pages = (0..PART, count).prop_map(|(first, count)| Pages { first, count: count.min(PART - first) });
    let manner = prop_oneof![Just(Manner::Strict), Just(Manner::Deferred)];
    let from = 0..OBJECT_PAGES / REMAINDER;
    prop_oneof![
        4 => (pages.clone(), from.clone(), 1..4u8)
            .prop_map(|(pages, from, permissions)| Call::Map { pages, from, permissions }),
        3 => (pages.clone(), manner).prop_map(|(pages, manner)| Call::Unmap { pages, manner }),
        2 => (pages.clone(), 1..4u8).prop_map(|(pages, permissions)| Call::Protect { pages, permissions }),
        2 => (pages.clone(), from, 1..4u8)
            .prop_map(|(pages, from, permissions)| Call::Remap { pages, from, permissions }),
        1 => (0..3usize, pages.clone()).prop_map(|(device, pages)| Call::Split(device, pages)),
        1 => (pages, 1..4u64, 1..4u8)
            .prop_map(|(pages, by, permissions)| Call::Alias { pages, by, permissions }),
        1 => Just(Call::Merge),
        1 => Just(Call::Flush),
    ]
}

struct Scene {
    space: Arc<Space>,
    memory: Arc<Memory>,
    double: Arc<Double>,
    account: Account,
    stop: AtomicBool,
    /// Pages that were mapped less those that were unmapped.
    balance: AtomicI64,
    read: AtomicU64,
}

impl Scene {
    fn new() -> Scene {
        let bus = Bus::new();
        let account = Account::new("test", None);
        let backing = Backing::anonymous(&bus, OBJECT_PAGES * PAGE).unwrap();
        for page in 0..OBJECT_PAGES {
            backing.write(page * PAGE, &tag(0, page)).unwrap();
        }
        let memory = Memory::register(&backing, 0, OBJECT_PAGES * PAGE, &account).unwrap();
        let space = Space::new(&bus);
        // One leaf of 2 MiB and more over the parts of all.
        let pages = THREADS * PART;
        space.map(Iova::new(0), &memory, 0, pages * PAGE, permissions(3)).unwrap();
        Scene {
            space,
            memory,
            double: Double::new(),
            account,
            stop: AtomicBool::new(false),
            balance: AtomicI64::new(pages as i64),
            read: AtomicU64::new(0),
        }
    }

    fn went(&self, pages: u64, sign: i64) {
        self.balance.fetch_add(pages as i64 * sign, Ordering::Relaxed);
    }

    /// Reads pages as a device does, until it is told to stop. Whatever it finds was mapped there at some time.
    fn dma(&self, device: &Device) {
        let table = device.table().unwrap();
        let derived = table.derived().map(|derived| derived.as_any().downcast_ref::<DoubleTable>().unwrap());
        let mut page = 0;
        while !self.stop.load(Ordering::Relaxed) {
            page = (page + 37) % (THREADS * PART);
            let section = epoch::dma();
            let found = match derived {
                None => self.space.walk(Iova::new(page * PAGE)).map(|leaf| leaf.output(page * PAGE).get()),
                Some(derived) => derived.walk(page * PAGE).map(|(oa, _)| oa),
            };
            let Some(oa) = found else { continue };
            let Ok(Translated::Here(here)) = self.space.memory_at(&section, Oa::new(oa)) else {
                panic!("page {page} leads nowhere")
            };
            let mut bytes = [0; 8];
            here.read(&mut bytes).unwrap();
            let there = u64::from_le_bytes(bytes);
            assert_eq!(there % REMAINDER, page % REMAINDER, "page {page} leads to page {there}");
            self.read.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// Lets devices come and go.
    fn attach(&self) {
        let devices = [WIDE, X86].map(|rid| self.double.device(rid));
        while !self.stop.load(Ordering::Relaxed) {
            for device in &devices {
                let table = Table::for_device(&self.space, device).unwrap();
                device.attach(&table).unwrap();
                std::thread::yield_now();
            }
            devices.iter().for_each(Device::detach);
        }
    }

    /// Makes the calls of a thread on pages from `first` on. `own`: nobody else does.
    fn work(&self, calls: &[Call], first: u64, own: Option<&mut PlainSpace>) {
        let mut own = own;
        for call in calls {
            self.call(*call, first, own.as_deref_mut());
        }
    }

    fn call(&self, call: Call, first: u64, own: Option<&mut PlainSpace>) {
        let space = &self.space;
        let there = |pages: Pages| Pages { first: first + pages.first, ..pages };
        // Where in the object a page may lead, so that the rest of the pages fit.
        let output = |pages: Pages, from: u64| {
            let shift = from * REMAINDER + pages.first % REMAINDER;
            if shift + pages.count <= OBJECT_PAGES { shift } else { pages.first % REMAINDER }
        };
        let all = 0..THREADS * PART;
        match call {
            Call::Map { pages, from, permissions: bits } => {
                let pages = there(pages);
                let from = output(pages, from);
                let length = pages.count * PAGE;
                let result = space.map(
                    Iova::new(pages.first * PAGE),
                    &self.memory,
                    from * PAGE,
                    length,
                    permissions(bits),
                );
                match &result {
                    Ok(()) => self.went(pages.count, 1),
                    Err(MapError::AlreadyMapped { .. }) => {}
                    Err(error) => panic!("{error:?}"),
                }
                if let Some(plain) = own {
                    let taken = plain.first_mapped(pages.numbers());
                    assert_eq!(result.is_err(), taken.is_some(), "{call:?}: {result:?}");
                    if taken.is_none() {
                        let shift = from.wrapping_sub(pages.first);
                        plain.map(pages.numbers(), Lead { object: 0, shift, permissions: permissions(bits) });
                    }
                }
            }
            Call::Unmap { pages, manner } => {
                let pages = there(pages);
                let range = pages.range().unwrap();
                let unmapped = match manner {
                    Manner::Strict => space.unmap(range),
                    Manner::Deferred => space.unmap_deferred(range),
                };
                let gone = unmapped.unwrap().bytes() / PAGE;
                self.went(gone, -1);
                if let Some(plain) = own {
                    assert_eq!(gone, plain.count(pages.numbers()), "{call:?}");
                    let runs = plain.runs(pages.numbers());
                    runs.into_iter().for_each(|run| plain.unmap(run));
                }
            }
            Call::Protect { pages, permissions: bits } => {
                let pages = there(pages);
                let bytes = space.protect(pages.range().unwrap(), permissions(bits)).unwrap();
                if let Some(plain) = own {
                    assert_eq!(bytes / PAGE, plain.count(pages.numbers()), "{call:?}");
                    for (piece, lead) in plain.pieces(pages.numbers()) {
                        plain.mapped.insert(piece, Lead { permissions: permissions(bits), ..lead });
                    }
                }
            }
            Call::Remap { pages, from, permissions: bits } => {
                let pages = there(pages);
                let from = output(pages, from);
                let result = space.remap(
                    Iova::new(pages.first * PAGE),
                    &self.memory,
                    from * PAGE,
                    pages.count * PAGE,
                    permissions(bits),
                );
                assert!(matches!(result, Ok(()) | Err(RemapError::NotMapped { .. })), "{result:?}");
                if let Some(plain) = own {
                    let whole = plain.count(pages.numbers()) == pages.count;
                    assert_eq!(result.is_ok(), whole, "{call:?}");
                    if whole {
                        let shift = from.wrapping_sub(pages.first);
                        let lead = Lead { object: 0, shift, permissions: permissions(bits) };
                        plain.mapped.insert(pages.numbers(), lead);
                    }
                }
            }
            Call::Alias { pages, by, permissions: bits } => {
                let pages = there(pages);
                let target = pages.first + by * REMAINDER;
                if target + pages.count > first + PART {
                    return;
                }
                let source = pages.range().unwrap();
                let result = space.alias(source, space, Iova::new(target * PAGE), permissions(bits));
                match &result {
                    Ok(bytes) => self.went(bytes / PAGE, 1),
                    Err(
                        AliasError::NotMapped { .. }
                        | AliasError::NoPermission { .. }
                        | AliasError::Target(MapError::AlreadyMapped { .. }),
                    ) => {}
                    Err(error) => panic!("{error:?}"),
                }
                if let (Some(plain), Ok(_)) = (own, result) {
                    for (piece, lead) in plain.pieces(pages.numbers()) {
                        let moved = piece.start + by * REMAINDER..piece.end + by * REMAINDER;
                        let wanted = permissions(bits);
                        let both = if lead.permissions.contains(wanted) { wanted } else { lead.permissions };
                        let shift = lead.shift.wrapping_sub(by * REMAINDER);
                        plain.map(moved, Lead { shift, permissions: both, ..lead });
                    }
                }
            }
            Call::Merge => {
                space.merge(Pages { first: all.start, count: all.end }.range().unwrap());
            }
            Call::Split(device, pages) => {
                let table = self.double.table_of([NATIVE, DERIVED, OWN_NATIVE][device]).unwrap();
                table.split(there(pages).range().unwrap(), PageSize::SIZE_4K).unwrap();
            }
            Call::Flush => space.flush(),
        }
    }

    /// Runs the calls of each thread beside devices, and compares what all can agree on.
    fn run(&self, threads: &[Vec<Call>], own: Option<&mut Vec<PlainSpace>>) {
        let devices = [NATIVE, DERIVED, OWN_NATIVE].map(|rid: Rid| self.double.attached(rid, &self.space));
        let start = Barrier::new(threads.len());
        std::thread::scope(|scope| {
            // Whoever panics must not keep the others waiting.
            struct Stop<'a>(&'a AtomicBool);
            impl Drop for Stop<'_> {
                fn drop(&mut self) {
                    self.0.store(true, Ordering::Relaxed);
                }
            }
            let _stop = Stop(&self.stop);
            for device in &devices {
                scope.spawn(|| self.dma(device));
            }
            scope.spawn(|| self.attach());
            let mut parts: Vec<Option<&mut PlainSpace>> = match own {
                Some(parts) => parts.iter_mut().map(Some).collect(),
                None => threads.iter().map(|_| None).collect(),
            };
            let workers: Vec<_> = threads
                .iter()
                .zip(parts.drain(..))
                .enumerate()
                .map(|(number, (calls, part))| {
                    let first = if part.is_some() { number as u64 * PART } else { PART / 2 };
                    let start = &start;
                    scope.spawn(move || {
                        start.wait();
                        self.work(calls, first, part);
                    })
                })
                .collect();
            for worker in workers {
                if let Err(panic) = worker.join() {
                    std::panic::resume_unwind(panic);
                }
            }
        });
        self.space.flush();
        let mapped = self.space.statistics().mapped_bytes / PAGE;
        assert_eq!(mapped as i64, self.balance.load(Ordering::Relaxed), "pages that are mapped");
        for table in self.double.tables() {
            assert_eq!(table.mappings(), table.expected(&self.space));
            assert!(table.is_invalidated() && !table.is_stale());
        }
        for leaf in self.space.leaves(IovaRange::ALL) {
            let page = self.space.object_at(leaf.oa).unwrap().1 / PAGE;
            assert_eq!(page % REMAINDER, leaf.iova / PAGE % REMAINDER, "{leaf:?}");
        }
    }

    /// Nothing is left.
    fn end(self) {
        let Scene { space, memory, double, account, .. } = self;
        drop(memory);
        assert_eq!(space.leaves(IovaRange::ALL), []);
        assert_eq!(space.unmap(IovaRange::ALL).unwrap().bytes(), 0);
        assert!(double.tables().is_empty());
        assert_eq!((account.charged_pages(), account.peak_pages()), (0, OBJECT_PAGES));
    }
}

/// What a part holds at the beginning.
fn part(pages: Range<u64>) -> PlainSpace {
    let mut plain = PlainSpace::default();
    plain.map(pages, Lead { object: 0, shift: 0, permissions: permissions(3) });
    plain
}

#[test]
fn threads_with_parts_of_their_own_notice_nothing_of_each_other() {
    let threads = vec(vec(call(), 1..40), THREADS as usize);
    runner::run("threads_apart", 8, threads, |threads| {
        let scene = Scene::new();
        let mut parts: Vec<PlainSpace> =
            (0..THREADS).map(|number| part(number * PART..(number + 1) * PART)).collect();
        scene.run(&threads, Some(&mut parts));
        let mut all = PlainSpace::default();
        parts.iter().flat_map(|part| part.mapped.iter()).for_each(|(piece, lead)| {
            all.mapped.insert(piece.clone(), *lead);
        });
        for page in 0..THREADS * PART {
            let real = scene.space.query(Iova::new(page * PAGE)).map(|mapped| {
                let oa = Oa::new(mapped.oa.get() + (page * PAGE - mapped.range.first()));
                (scene.space.object_at(oa).unwrap().1 / PAGE, mapped.permissions)
            });
            let plain = all.mapped.get(&page).map(|lead| (lead.page(page), lead.permissions));
            assert_eq!(real, plain, "page {page}");
        }
        scene.end();
    });
}

#[test]
fn threads_in_each_others_way_lose_nothing_and_leave_nothing() {
    let threads = vec(vec(call(), 1..40), THREADS as usize);
    runner::run("threads_together", 8, threads, |threads| {
        let scene = Scene::new();
        scene.run(&threads, None);
        scene.end();
    });
}
