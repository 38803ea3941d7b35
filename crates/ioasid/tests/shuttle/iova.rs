//! Addresses from an allocator: none is handed out twice, and none is lost.

use crate::fixture::{PAGE, check, pages, random};
use ioasid::IovaRange;
use ioasid::iova::{AllocateError, Allocator, Options, Policy};
use shuttle::thread;
use std::collections::BTreeSet;
use std::sync::{Arc, Mutex};

/// Who has which pages. Read and written in no time, so that it is exact.
#[derive(Default)]
struct Owned(Mutex<BTreeSet<u64>>);

impl Owned {
    fn take(&self, range: IovaRange) {
        for page in range.first() / PAGE..=range.last() / PAGE {
            assert!(self.0.lock().unwrap().insert(page), "page {page:#x} is handed out twice");
        }
    }

    fn give(&self, range: IovaRange) {
        for page in range.first() / PAGE..=range.last() / PAGE {
            assert!(self.0.lock().unwrap().remove(&page));
        }
    }
}

#[test]
fn no_address_is_handed_out_twice_and_none_is_lost() {
    check(2000, || {
        // Few enough to run out of them now and then, with what waits in magazines of others.
        let all = pages(0x10, 24);
        let policy = if random(2) == 0 { Policy::BottomUp } else { Policy::TopDown };
        let allocator = Arc::new(Allocator::new(&[all], Options { policy, ..Options::default() }));
        let owned = Arc::new(Owned::default());
        let threads = [0, 1, 2].map(|_| {
            let (allocator, owned) = (allocator.clone(), owned.clone());
            thread::spawn(move || {
                let mut mine: Vec<IovaRange> = Vec::new();
                for _ in 0..6 {
                    if random(3) > 0 || mine.is_empty() {
                        let length = [1, 1, 2, 4][random(4) as usize] * PAGE;
                        match allocator.allocate(length, PAGE) {
                            Ok(iova) => {
                                let range = IovaRange::with_length(iova.get(), length).unwrap();
                                owned.take(range);
                                mine.push(range);
                            }
                            Err(AllocateError::Exhausted { free, .. }) => assert!(free < length),
                            Err(AllocateError::Fragmented { .. }) => {}
                            Err(error) => panic!("{error}"),
                        }
                    } else {
                        let range = mine.swap_remove(random(mine.len() as u64) as usize);
                        owned.give(range);
                        allocator.free(range).unwrap();
                    }
                }
                for range in mine {
                    owned.give(range);
                    allocator.free(range).unwrap();
                }
            })
        });
        threads.into_iter().for_each(|thread| thread.join().unwrap());
        assert_eq!(allocator.statistics().free_bytes, 24 * PAGE);
        // All of it together: magazines give back what they have.
        let iova = allocator.allocate(24 * PAGE, PAGE).unwrap();
        assert_eq!(iova.get(), all.first());
    });
}

#[test]
fn an_allocation_fails_only_if_there_is_no_place() {
    check(2000, || {
        // Three threads with at most two pages each, and six pages.
        let allocator = Arc::new(Allocator::new(&[pages(0x10, 6)], Options::default()));
        let threads = [0, 1, 2].map(|_| {
            let allocator = allocator.clone();
            thread::spawn(move || {
                for _ in 0..2 {
                    let both = [(); 2].map(|()| allocator.allocate(PAGE, PAGE).unwrap());
                    for iova in both {
                        allocator.free(IovaRange::with_length(iova.get(), PAGE).unwrap()).unwrap();
                    }
                }
            })
        });
        threads.into_iter().for_each(|thread| thread.join().unwrap());
        assert_eq!(allocator.statistics().free_bytes, 6 * PAGE);
    });
}

#[test]
fn what_is_reserved_is_nobodys() {
    check(1000, || {
        let allocator = Arc::new(Allocator::new(&[pages(0x10, 8)], Options::default()));
        let owned = Arc::new(Owned::default());
        let reserver = {
            let (allocator, owned) = (allocator.clone(), owned.clone());
            thread::spawn(move || {
                for _ in 0..3 {
                    let range = pages(0x12, 2);
                    if allocator.reserve(range).is_ok() {
                        owned.take(range);
                        owned.give(range);
                        allocator.release(range).unwrap();
                    }
                }
            })
        };
        let threads = [0, 1].map(|_| {
            let (allocator, owned) = (allocator.clone(), owned.clone());
            thread::spawn(move || {
                for _ in 0..3 {
                    if let Ok(iova) = allocator.allocate(PAGE, PAGE) {
                        let range = IovaRange::with_length(iova.get(), PAGE).unwrap();
                        owned.take(range);
                        owned.give(range);
                        allocator.free(range).unwrap();
                    }
                }
            })
        });
        threads.into_iter().chain([reserver]).for_each(|thread| thread.join().unwrap());
        assert_eq!(allocator.statistics().free_bytes, 8 * PAGE);
    });
}
