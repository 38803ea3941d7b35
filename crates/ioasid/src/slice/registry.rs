//! Who has borrowed what, as unmaps see it.
//!
//! A borrower and an unmap that meet have to notice each other, without a lock that all unmaps share. Each writes first
//! and looks afterwards: the borrower enters itself here, fences, and only then looks whether the leaves translate; the unmap
//! takes the leaves back by exchanges, and only then looks here. At least one of them sees the other. A borrower that
//! finds no leaf gives up; an unmap that finds a borrower gives its leaves back, asks, and tries again.
//!
//! Entries are kept in shards by the 2 MiB regions that they touch, each with its count on a cache line of its own. An unmap
//! reads one flag if the space never had a borrower, and the counts of its own regions otherwise.
//!
//! While an unmap asks, the range is *closed*: nobody new may borrow there, so that the unmap is not kept waiting by one
//! borrower after the other.
//!
//! The atomics come from [`crate::sync`], so that a model checker can run this very file.

use crate::sync::{AtomicBool, AtomicUsize, Mutex, OnceLock, Ordering, PoisonError, fence};
use ioasid_pagetable::{Attributes, IovaRange};
use std::sync::Arc;

const SHARDS: usize = 16;
const REGION_BITS: u32 = 21;

/// What borrowers are entered in.
#[derive(Debug)]
pub(crate) struct Registry<T> {
    /// Whether there ever was a borrower.
    used: AtomicBool,
    shards: OnceLock<Box<[Shard<T>]>>,
}

/// The borrowers of some regions.
#[derive(Debug)]
#[repr(align(64))]
struct Shard<T> {
    count: AtomicUsize,
    entries: Mutex<Entries<T>>,
}

#[derive(Debug)]
struct Entries<T> {
    borrowed: Vec<(IovaRange, Attributes, Arc<T>)>,
    /// Where nobody may borrow now, and which rights that is about. One of them for each who has closed it.
    closed: Vec<(IovaRange, Attributes)>,
}

/// The range is closed: somebody is taking these rights away.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Closed;

impl<T> Shard<T> {
    fn new() -> Shard<T> {
        let entries = Entries { borrowed: Vec::new(), closed: Vec::new() };
        Shard { count: AtomicUsize::new(0), entries: Mutex::new(entries) }
    }

    fn with<R>(&self, f: impl FnOnce(&mut Entries<T>) -> R) -> R {
        f(&mut self.entries.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

/// The shards that the regions of a range are in, each once.
fn shards_of(range: IovaRange) -> impl Iterator<Item = usize> {
    let (first, last) = (range.first() >> REGION_BITS, range.last() >> REGION_BITS);
    let count = (last - first).saturating_add(1).min(SHARDS as u64);
    (0..count).map(move |index| first.wrapping_add(index) as usize % SHARDS)
}

impl<T> Registry<T> {
    pub(crate) fn new() -> Registry<T> {
        Registry { used: AtomicBool::new(false), shards: OnceLock::new() }
    }

    fn shards(&self) -> &[Shard<T>] {
        let shards = self.shards.get_or_init(|| (0..SHARDS).map(|_| Shard::new()).collect());
        self.used.store(true, Ordering::SeqCst);
        shards
    }

    /// Enters a borrower. When this has returned, he may look whether what he borrows is there.
    pub(crate) fn enter(
        &self,
        range: IovaRange,
        access: Attributes,
        borrower: &Arc<T>,
    ) -> Result<(), Closed> {
        let shards = self.shards();
        for (done, index) in shards_of(range).enumerate() {
            let entered = shards[index].with(|entries| {
                let closed = |(closed, rights): &(IovaRange, Attributes)| {
                    closed.overlaps(&range) && rights.intersects(access)
                };
                if entries.closed.iter().any(closed) {
                    return false;
                }
                entries.borrowed.push((range, access, borrower.clone()));
                true
            });
            if !entered {
                for index in shards_of(range).take(done) {
                    self.leave_shard(&shards[index], borrower);
                }
                return Err(Closed);
            }
            shards[index].count.fetch_add(1, Ordering::SeqCst);
        }
        fence(Ordering::SeqCst);
        Ok(())
    }

    /// Takes a borrower's entry out.
    pub(crate) fn leave(&self, range: IovaRange, borrower: &Arc<T>) {
        let shards = self.shards();
        for index in shards_of(range) {
            self.leave_shard(&shards[index], borrower);
        }
    }

    fn leave_shard(&self, shard: &Shard<T>, borrower: &Arc<T>) {
        shard.with(|entries| entries.borrowed.retain(|(_, _, other)| !Arc::ptr_eq(other, borrower)));
        shard.count.fetch_sub(1, Ordering::SeqCst);
    }

    /// Whether somebody may have borrowed these rights in the range. Behind the exchanges by which the caller has taken
    /// the range's leaves back: then whoever is not seen here sees that they are gone.
    #[inline]
    pub(crate) fn any(&self, range: IovaRange, rights: Attributes) -> bool {
        self.used.load(Ordering::SeqCst) && self.any_entered(range, rights)
    }

    fn any_entered(&self, range: IovaRange, rights: Attributes) -> bool {
        let Some(shards) = self.shards.get() else { return false };
        shards_of(range).any(|index| {
            shards[index].count.load(Ordering::SeqCst) > 0
                && shards[index].with(|entries| {
                    entries
                        .borrowed
                        .iter()
                        .any(|(borrowed, access, _)| borrowed.overlaps(&range) && access.intersects(rights))
                })
        })
    }

    /// Who has borrowed any of the rights in the range, each once.
    pub(crate) fn borrowers(&self, range: IovaRange, rights: Attributes) -> Vec<(IovaRange, Arc<T>)> {
        let mut found: Vec<(IovaRange, Arc<T>)> = Vec::new();
        let shards = self.shards();
        for index in shards_of(range) {
            shards[index].with(|entries| {
                for (borrowed, access, borrower) in &entries.borrowed {
                    let new = !found.iter().any(|(_, other)| Arc::ptr_eq(other, borrower));
                    if new && borrowed.overlaps(&range) && access.intersects(rights) {
                        found.push((*borrowed, borrower.clone()));
                    }
                }
            });
        }
        found
    }

    /// Lets nobody borrow the rights in the range until [`open`](Self::open) is called with the same.
    pub(crate) fn close(&self, range: IovaRange, rights: Attributes) {
        let shards = self.shards();
        for index in shards_of(range) {
            shards[index].with(|entries| entries.closed.push((range, rights)));
        }
    }

    pub(crate) fn open(&self, range: IovaRange, rights: Attributes) {
        let shards = self.shards();
        for index in shards_of(range) {
            shards[index].with(|entries| {
                if let Some(index) = entries.closed.iter().position(|closed| *closed == (range, rights)) {
                    entries.closed.swap_remove(index);
                }
            });
        }
    }
}
