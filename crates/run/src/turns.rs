//! Whose turn it is: no client has all workers wait for it.
//!
//! A request may wait for its client's own memory for as long as that client likes (userfaultfd, a FUSE file), and takes a
//! worker meanwhile. So workers are shared as everything else that is limited (docs/decisions/0029): along the tree of processes,
//! and no part has more of them than it leaves to the whole. A request that would be too much is *put off*: its caller sleeps
//! on, and its turn comes when others have ended.
//!
//! As long as few are at work nobody can have too much, and nothing is asked: a worker writes down for whom it works, and
//! that is all.

use std::collections::{HashMap, VecDeque};
use std::sync::atomic::{AtomicU32, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::lineage::GENERATIONS;
use crate::listener::{Listener, Notification};
use crate::process::Processes;

/// Which processes the caller descends from; its own process alone, without its children, is below the last.
type Lineage = Arc<[u64]>;

/// How many of those that were put off are looked at when a request has ended.
const LOOKS: usize = 32;

/// For whom a worker works.
#[derive(Debug, Default)]
pub(crate) struct Place {
    /// The request's id, or [`NOBODY`].
    request: AtomicU64,
    thread: AtomicU32,
}

/// What stands in an empty place. The kernel's ids begin anywhere, but are used once.
const NOBODY: u64 = u64::MAX;

/// Who is at work and who was put off.
#[derive(Debug)]
pub(crate) struct Turns {
    most: usize,
    busy: AtomicUsize,
    put_off: AtomicUsize,
    waiting: Mutex<Waiting>,
}

#[derive(Debug, Default)]
struct Waiting {
    places: Vec<Arc<Place>>,
    requests: VecDeque<Notification>,
    /// How many there may be before it is looked whether their callers are still alive.
    swept_at: usize,
    /// Of requests in places, as far as somebody had to know.
    lineages: HashMap<u64, Lineage>,
}

impl Turns {
    /// Turns for at most so many workers.
    pub(crate) fn new(most: usize) -> Self {
        Self { most, busy: AtomicUsize::new(0), put_off: AtomicUsize::new(0), waiting: Mutex::default() }
    }

    /// A place for one more worker.
    pub(crate) fn place(&self) -> Arc<Place> {
        let place = Arc::new(Place { request: AtomicU64::new(NOBODY), thread: AtomicU32::new(0) });
        self.waiting().places.push(Arc::clone(&place));
        place
    }

    /// Whether it is the turn of a request that has just come; if not, it is kept.
    pub(crate) fn begins(
        &self,
        place: &Place,
        notification: Notification,
        listener: &Listener,
        processes: &Processes,
    ) -> bool {
        if self.cannot_be_too_much(self.busy.load(Ordering::SeqCst)) {
            self.take(place, &notification);
            return true;
        }
        let mut waiting = self.waiting();
        if self.may_begin(&mut waiting, &notification, listener, processes) {
            self.take(place, &notification);
            return true;
        }
        if waiting.requests.len() > waiting.swept_at {
            waiting.requests.retain(|notification| listener.is_valid(notification.id));
            waiting.swept_at = 2 * waiting.requests.len() + LOOKS;
        }
        waiting.requests.push_back(notification);
        self.put_off.store(waiting.requests.len(), Ordering::SeqCst);
        false
    }

    /// The request in this place has been answered.
    pub(crate) fn ended(&self, place: &Place) {
        place.request.store(NOBODY, Ordering::SeqCst);
        self.busy.fetch_sub(1, Ordering::SeqCst);
    }

    /// A request that was put off and whose turn it is. To be asked after one has ended, and after one was put off: the last one at
    /// work may have ended before it was.
    pub(crate) fn next(
        &self,
        place: &Place,
        listener: &Listener,
        processes: &Processes,
    ) -> Option<Notification> {
        if self.put_off.load(Ordering::SeqCst) == 0 {
            return None;
        }
        let mut waiting = self.waiting();
        for _ in 0..waiting.requests.len().min(LOOKS) {
            let notification = waiting.requests.pop_front()?;
            if self.may_begin(&mut waiting, &notification, listener, processes) {
                self.put_off.store(waiting.requests.len(), Ordering::SeqCst);
                self.take(place, &notification);
                return Some(notification);
            }
            waiting.requests.push_back(notification);
        }
        None
    }

    fn take(&self, place: &Place, notification: &Notification) {
        place.thread.store(notification.thread, Ordering::SeqCst);
        place.request.store(notification.id, Ordering::SeqCst);
        self.busy.fetch_add(1, Ordering::SeqCst);
    }

    /// Whether one more request is none too many, whoever the others are from: even if all of them count at each generation and for
    /// the process itself, there is room.
    fn cannot_be_too_much(&self, busy: usize) -> bool {
        busy.saturating_mul(GENERATIONS + 2) < self.most
    }

    fn may_begin(
        &self,
        waiting: &mut Waiting,
        notification: &Notification,
        listener: &Listener,
        processes: &Processes,
    ) -> bool {
        let lineage_of = |request, thread| match processes.thread(listener, request, thread) {
            Ok(thread) => processes.lineage_of(&thread),
            // It has died, and its request will soon have ended.
            Err(_) => Lineage::default(),
        };
        let Waiting { places, lineages, .. } = waiting;
        let mut at_work = HashMap::with_capacity(places.len());
        for place in places.iter() {
            let thread = place.thread.load(Ordering::SeqCst);
            let request = place.request.load(Ordering::SeqCst);
            if request != NOBODY {
                let known = lineages.remove(&request);
                at_work.insert(request, known.unwrap_or_else(|| lineage_of(request, thread)));
            }
        }
        *lineages = at_work;
        let lineage = lineage_of(notification.id, notification.thread);
        is_no_more_than_its_share(self.most, lineages.values().map(|lineage| &**lineage), &lineage)
    }

    fn waiting(&self) -> MutexGuard<'_, Waiting> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Whether one more for `lineage` is no more, in any generation, than what is left of `most`.
fn is_no_more_than_its_share<'a>(
    most: usize,
    at_work: impl Iterator<Item = &'a [u64]> + Clone,
    lineage: &[u64],
) -> bool {
    let mut room = most.saturating_sub(at_work.clone().count());
    for generation in 1..=lineage.len() {
        let family = &lineage[..generation];
        let taken = at_work.clone().filter(|other| other.starts_with(family)).count();
        if taken >= room {
            return false;
        }
        room = room.saturating_sub(taken);
    }
    at_work.filter(|other| *other == lineage).count() < room
}

#[cfg(test)]
mod tests {
    use super::*;

    fn most_of(most: usize, at_work: &mut Vec<Vec<u64>>, lineage: &[u64]) -> usize {
        let before = at_work.len();
        while is_no_more_than_its_share(most, at_work.iter().map(Vec::as_slice), lineage) {
            at_work.push(lineage.to_vec());
        }
        at_work.len() - before
    }

    #[test]
    fn a_family_leaves_half() {
        let mut at_work = Vec::new();
        let stalled: usize = (0..200).map(|fork| most_of(100, &mut at_work, &[7, fork])).sum();
        assert_eq!(stalled, 50);
        assert_eq!(most_of(100, &mut at_work, &[7, 3, 9]), 0);
        assert_eq!(most_of(100, &mut at_work, &[]), 25, "the first program itself");
        assert!(most_of(100, &mut at_work, &[8]) > 5);
    }

    #[test]
    fn few_are_never_asked_about() {
        let turns = Turns::new(100);
        let lineage: Vec<u64> = (0..GENERATIONS as u64).collect();
        let mut at_work = Vec::new();
        most_of(100, &mut at_work, &lineage);
        let asked_from = (0..100).find(|busy| !turns.cannot_be_too_much(*busy)).unwrap();
        assert!(asked_from <= at_work.len(), "{asked_from} {}", at_work.len());
        assert!(asked_from > 0);
    }
}
