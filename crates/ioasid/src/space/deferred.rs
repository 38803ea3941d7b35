//! Deferred invalidation: unmapping now, waiting later.
//!
//! A strict unmap waits for the DMA that had begun before it. A *deferred* one returns at once and leaves the wait to a
//! flush that serves many. In between:
//!
//! - The range translates no more: DMA that begins after the unmap has returned faults, where tables are walked by
//!   software. DMA that had begun before may go on, and an IOMMU with caches of its own may go on using them.
//! - The native entries stay busy. Nothing else can be mapped at the addresses, by anybody, until no device can have
//!   the former translation. Whoever wants to (a map of the same place, an unmap that meets them, a reservation, a
//!   search for free addresses that finds no others) flushes first, so that nobody waits for longer than a strict unmap
//!   would have waited.
//! - The memory may still be read and written by devices. Its owner may hand it to somebody else after a
//!   [`flush`](Space::flush); dropping a [`Memory`](crate::Memory) flushes.
//!
//! # Bounds
//!
//! At most [`DEFERRED_RANGES`] of a space wait, and none for longer than [`DEFERRED_TIME`]. The unmap for whose range there is
//! no room left flushes what threads like its own have left, so that others go on side by side with it. Time is kept by one thread of the process, started by the first deferred unmap, so that the bound
//! holds also if nobody calls any more; where no thread can be had, all unmaps are strict. The thread waits for no copy
//! of [late-bound](crate::LateBound) memory, which may block for as long as its owner likes: ranges of a space in which such
//! copies run are looked at again after the same time, and as many again may have been queued by then, but not more.

use super::Space;
use crate::epoch;
use crate::flusher;
use crate::sleeping::Mark;
use crate::sync::{
    AtomicBool, AtomicUsize, Mutex, MutexGuard, OnceLock, Ordering, PoisonError, global, of_thread,
};
use ioasid_pagetable::{Gather, IovaRange, Runs};
use std::cell::Cell;
use std::time::Duration;

/// How many ranges of a space wait for a flush at most.
pub const DEFERRED_RANGES: usize = 512;
/// How long a range waits for a flush at most, not counting what the flush itself has to wait for.
pub const DEFERRED_TIME: Duration = Duration::from_millis(10);

/// Threads that unmap side by side do not share a queue.
const QUEUES: usize = 8;
const ROOM: usize = DEFERRED_RANGES / QUEUES;

/// What a space has deferred.
#[derive(Debug, Default)]
pub(super) struct Deferred {
    queues: OnceLock<Box<[Queue; QUEUES]>>,
    /// Ranges that only late-bound copies may still be using. Held by whoever flushes.
    settling: Mutex<Vec<Settling>>,
    /// The flusher is going to look.
    armed: AtomicBool,
}

/// The ranges that some of the threads have unmapped, on a cache line of their own. Locked while they are released, so that
/// whoever flushes waits for that.
#[derive(Debug, Default)]
#[repr(align(64))]
struct Queue(Mutex<Vec<IovaRange>>);

#[derive(Debug)]
struct Settling {
    /// The copies that had begun by then.
    mark: Mark,
    ranges: Vec<IovaRange>,
}

global! {
    /// How many threads have deferred anything.
    static THREADS: AtomicUsize = AtomicUsize::new(0);
}

of_thread! {
    /// The queue that the thread uses; more than all until it has one.
    static QUEUE: Cell<usize> = Cell::new(usize::MAX);
}

fn queue() -> usize {
    // A thread that is ending has lost its number.
    QUEUE
        .try_with(|queue| {
            if queue.get() == usize::MAX {
                queue.set(THREADS.fetch_add(1, Ordering::Relaxed) % QUEUES);
            }
            queue.get()
        })
        .unwrap_or(0)
}

impl Queue {
    fn lock(&self) -> MutexGuard<'_, Vec<IovaRange>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Deferred {
    fn settling(&self) -> MutexGuard<'_, Vec<Settling>> {
        self.settling.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn queues(&self) -> impl Iterator<Item = &Queue> {
        self.queues.get().into_iter().flat_map(|queues| queues.iter())
    }

    /// The queue of this thread.
    fn own(&self) -> &Queue {
        let queues = self.queues.get_or_init(Box::default);
        &queues[queue()]
    }

    /// Puts the ranges into the queue of this thread, all or none.
    fn push(&self, runs: &Runs) -> bool {
        let mut queue = self.own().lock();
        let fits = queue.len() + runs.iter().count() <= ROOM;
        if fits {
            queue.extend(runs.iter());
        }
        fits
    }
}

/// Several unmaps with one wait at the end: see [`Space::batch`].
#[derive(Debug)]
#[must_use = "the batch ends when this is dropped"]
pub struct UnmapBatch<'a> {
    space: &'a Space,
}

impl UnmapBatch<'_> {
    /// Unmaps a range, as [`Space::unmap_deferred`] does.
    pub fn unmap(&mut self, range: IovaRange) -> Result<super::Unmapped, super::UnmapError> {
        self.space.unmap_deferred(range)
    }

    /// Returns when no device reaches anything of what the batch has unmapped. Dropping the batch does the same.
    pub fn finish(self) {}
}

impl Drop for UnmapBatch<'_> {
    fn drop(&mut self) {
        self.space.flush();
    }
}

impl Space {
    /// Begins a batch of unmaps that waits for DMA once, at its end, or once for every 64 ranges if there are more. Each of
    /// them happens whole or not at all by itself, and until the end all of them are as [deferred](Self::unmap_deferred).
    ///
    /// ```
    /// # use ioasid::{Account, Backing, Bus, Iova, IovaRange, Memory, Permissions, Space};
    /// # let bus = Bus::new();
    /// # let memory = Memory::register(&Backing::anonymous(&bus, 1 << 20)?, 0, 1 << 20, &Account::new("guest", None))?;
    /// # let space = Space::new(&bus);
    /// space.map(Iova::new(0), &memory, 0, 1 << 20, Permissions::READ)?;
    /// let mut batch = space.batch();
    /// for page in [0x3000, 0x9000, 0x5000] {
    ///     batch.unmap(IovaRange::with_length(page, 0x1000).unwrap())?;
    /// }
    /// batch.finish();
    /// // No device reaches the three pages any more.
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn batch(&self) -> UnmapBatch<'_> {
        UnmapBatch { space: self }
    }

    /// Returns when no device reaches anything of what was unmapped before, deferred or not.
    pub fn flush(&self) {
        if self.deferred.queues.get().is_some() {
            let mut settling = self.deferred.settling();
            self.begin_to_settle(&mut settling);
            for Settling { mark, ranges } in settling.drain(..) {
                self.sleeping.wait_for(mark);
                self.release_deferred(&ranges);
            }
        }
    }

    /// How many ranges are unmapped and wait for a flush, as far as nobody is flushing them right now.
    pub fn deferred_ranges(&self) -> usize {
        self.deferred.queues().map(|queue| queue.lock().len()).sum()
    }

    /// Flushes if there is anything to flush; whether there was. First that is only what this thread has left, which is what
    /// it mostly meets again; to be called once more if that did not help.
    pub(super) fn flush_any(&self) -> bool {
        if self.deferred.queues.get().is_none() {
            return false;
        }
        if !self.deferred.own().lock().is_empty() {
            self.flush_own();
            return true;
        }
        let queued = self.deferred.queues().any(|queue| !queue.lock().is_empty());
        let any = queued || !self.deferred.settling().is_empty();
        if any {
            self.flush();
        }
        any
    }

    /// Leaves the rest of an unmap to a flush: the ranges are retracted, and the derived tables do not have them any
    /// more. `false`: that cannot be left to anybody. Outside of all sections.
    pub(super) fn defer(&self, runs: &Runs) -> bool {
        if !self.deferred.push(runs) {
            self.flush_own();
            if !self.deferred.push(runs) {
                return false;
            }
        }
        // After the push: the flusher takes its mark back before it looks.
        if !self.deferred.armed.load(Ordering::SeqCst)
            && !self.deferred.armed.swap(true, Ordering::SeqCst)
            && !flusher::look_after(&self.this, DEFERRED_TIME)
        {
            self.deferred.armed.store(false, Ordering::SeqCst);
            self.flush();
        }
        true
    }

    /// Flushes what threads with the same queue as this one have left.
    fn flush_own(&self) {
        {
            let mut queue = self.deferred.own().lock();
            if queue.is_empty() {
                return;
            }
            self.invalidate_and_wait(&mut queue);
            // Such a copy may take as long as it likes, and nobody may have to wait for the queue meanwhile.
            if !self.sleeping.any() {
                self.release_deferred(&queue);
                return queue.clear();
            }
        }
        self.flush();
    }

    /// What the flusher does when the time has come: all that can be done without waiting for late-bound copies.
    pub(crate) fn flush_what_is_due(&self) {
        self.deferred.armed.store(false, Ordering::SeqCst);
        let settled = match self.deferred.settling.try_lock() {
            Ok(mut settling) => {
                self.settle_what_is_over(&mut settling);
                // As long as a copy blocks, no more is taken from the queues, whose room is the bound.
                if settling.is_empty() {
                    self.begin_to_settle(&mut settling);
                    self.settle_what_is_over(&mut settling);
                }
                settling.is_empty()
            }
            // Somebody else is flushing, though perhaps not all.
            Err(_) => false,
        };
        if !settled && !self.deferred.armed.swap(true, Ordering::SeqCst) {
            // From the flusher itself, which is there.
            flusher::look_after(&self.this, DEFERRED_TIME);
        }
    }

    /// Releases what no late-bound copy can be using any more.
    fn settle_what_is_over(&self, settling: &mut Vec<Settling>) {
        settling.retain(|Settling { mark, ranges }| {
            let over = self.sleeping.passed(*mark);
            if over {
                self.release_deferred(ranges);
            }
            !over
        });
    }

    /// Takes what is queued, has it invalidated, and waits for the DMA that may be using it.
    fn begin_to_settle(&self, settling: &mut Vec<Settling>) {
        let mut ranges = Vec::new();
        for queue in self.deferred.queues() {
            ranges.append(&mut queue.lock());
        }
        if ranges.is_empty() {
            return;
        }
        self.invalidate_and_wait(&mut ranges);
        settling.push(Settling { mark: self.sleeping.mark(), ranges });
    }

    /// Has the ranges invalidated, and waits for the DMA that may be using them.
    fn invalidate_and_wait(&self, ranges: &mut [IovaRange]) {
        ranges.sort_unstable();
        let mut runs = Runs::default();
        ranges.iter().for_each(|range| runs.push(*range));
        self.invalidate(&runs);
        epoch::wait_for_dma();
    }

    /// Has IOMMUs forget what they remember of ranges that their tables do not have any more.
    pub(super) fn invalidate(&self, runs: &Runs) {
        self.layout.read().derived().for_each(|table| table.invalidate(runs));
    }

    fn release_deferred(&self, ranges: &[IovaRange]) {
        let mut gather = Gather::new();
        {
            let _operation = epoch::operation();
            for range in ranges {
                self.native.release(*range, &mut gather);
                self.propose_again(*range);
            }
        }
        epoch::retire(gather.retired);
    }
}
