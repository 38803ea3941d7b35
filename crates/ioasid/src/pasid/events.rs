//! What happens to IDs, told to whoever asked, through one bounded queue for each.
//!
//! The kernel's series called its listeners, one from inside the other, with locks held. Here a listener has a queue, and
//! whoever allocates or frees puts the event there and goes on. A listener that is slow finds, in the place of what its
//! queue had no room for, how many events it [lost](Received::Lost), and can look at the [sets](super::PasidSet::list) themselves.
//!
//! # Order
//!
//! Events are numbered in the order in which things happened, and every queue has them in that order. Of one event, queues
//! are served by [`Priority`]: a CPU's first, so that a thread that waits for it is woken before those of IOMMUs and devices.
//! That one is woken first does not mean that it is done first. What has to be over before an ID can be used again is
//! said by references: the ID of an event waits for everybody who holds it.

use super::{Owner, Pasid, PasidSystem, Spid};
use crate::sync::{Condvar, Instant, Mutex, MutexGuard, PoisonError, wait_for_some_time};
use std::collections::VecDeque;
use std::fmt;
use std::sync::Arc;
use std::time::Duration;

/// What happened.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Transition {
    /// A free ID is allocated.
    Allocate,
    /// An ID has its first binding: it is active.
    Bind,
    /// The last binding has gone: it is idle.
    Unbind,
    /// It was freed. If somebody holds it, it waits for them; whoever does should let go.
    Free,
}

/// Something that happened to an ID.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Event {
    /// Numbers the events of a system, from 0 on.
    pub sequence: u64,
    /// What happened.
    pub transition: Transition,
    /// To which ID.
    pub pasid: Pasid,
    /// The private ID that the set had for it.
    pub spid: Option<Spid>,
    /// Whose set it is in.
    pub owner: Owner,
    /// What was given when it was allocated.
    pub data: u64,
}

/// Whose queue is served first.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Priority {
    /// Who loads PASIDs into processors.
    Cpu,
    /// Who has them in an IOMMU's tables.
    Iommu,
    /// Who has them in devices.
    Device,
}

/// What a queue gives.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Received {
    /// Something that happened.
    Event(Event),
    /// So many events, between the one before and the next one, found no room.
    Lost(u64),
}

/// A queue of events. Dropping it ends it.
pub struct Subscription {
    pub(super) system: Arc<PasidSystem>,
    pub(super) queue: Arc<Queue>,
    /// `None`: the events of all sets.
    pub(super) set: Option<u32>,
}

pub(super) struct Queue {
    pub(super) priority: Priority,
    capacity: usize,
    waiting: Mutex<Waiting>,
    arrived: Condvar,
}

#[derive(Debug, Default)]
struct Waiting {
    /// As many events as there is room for, and between any two of them at most one note of what was lost.
    entries: VecDeque<Received>,
    events: usize,
    /// How many threads wait. Waking nobody is a system call, too.
    sleepers: usize,
    /// The set has gone: no more will come.
    over: bool,
}

impl Queue {
    pub(super) fn new(priority: Priority, capacity: usize) -> Queue {
        Queue { priority, capacity, waiting: Mutex::default(), arrived: Condvar::new() }
    }

    fn lock(&self) -> MutexGuard<'_, Waiting> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn put(&self, event: Event) {
        let mut waiting = self.lock();
        if waiting.events < self.capacity {
            waiting.events += 1;
            waiting.entries.push_back(Received::Event(event));
        } else if let Some(Received::Lost(count)) = waiting.entries.back_mut() {
            *count = count.saturating_add(1);
        } else {
            waiting.entries.push_back(Received::Lost(1));
        }
        if waiting.sleepers > 0 {
            self.arrived.notify_one();
        }
    }

    pub(super) fn end(&self) {
        self.lock().over = true;
        self.arrived.notify_all();
    }
}

impl Waiting {
    fn next(&mut self) -> Option<Received> {
        let next = self.entries.pop_front()?;
        self.events -= usize::from(matches!(next, Received::Event(_)));
        Some(next)
    }
}

impl Subscription {
    /// What is there.
    pub fn next(&self) -> Option<Received> {
        self.queue.lock().next()
    }

    /// What is there, or what comes within `time`; `None` at once if nothing can come any more.
    pub fn wait(&self, time: Duration) -> Option<Received> {
        // A time that has no end is as good as a year.
        let end = Instant::now() + time.min(Duration::from_secs(365 * 24 * 3600));
        let mut waiting = self.queue.lock();
        loop {
            let left = end.saturating_duration_since(Instant::now());
            let next = waiting.next();
            if next.is_some() || waiting.over || left.is_zero() {
                return next;
            }
            waiting.sleepers += 1;
            waiting = wait_for_some_time(&self.queue.waiting, &self.queue.arrived, waiting, left);
            waiting.sleepers -= 1;
        }
    }

    /// Whether nothing is there, and nothing will come: the set has gone.
    pub fn is_over(&self) -> bool {
        let waiting = self.queue.lock();
        waiting.over && waiting.entries.is_empty()
    }
}

impl Drop for Subscription {
    fn drop(&mut self) {
        self.system.lock().unsubscribe(self.set, &self.queue);
    }
}

impl fmt::Debug for Subscription {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Subscription").field("priority", &self.queue.priority).finish_non_exhaustive()
    }
}
