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

/// Fewer that were put off are not worth a look at whether their callers are still alive.
const FEW: usize = 32;

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
    /// Those that were put off, as they came.
    requests: VecDeque<(Lineage, Notification)>,
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
        let lineage = lineage_of(notification.id, notification.thread, listener, processes);
        let mut waiting = self.waiting();
        waiting.learn_lineages(listener, processes);
        if waiting.at_work(self.most).leaves_room_for(&lineage) {
            self.take(place, &notification);
            return true;
        }
        if waiting.requests.len() > waiting.swept_at {
            waiting.requests.retain(|(_, notification)| listener.is_valid(notification.id));
            waiting.swept_at = 2 * waiting.requests.len() + FEW;
        }
        waiting.requests.push_back((lineage, notification));
        self.put_off.store(waiting.requests.len(), Ordering::SeqCst);
        false
    }

    /// The request in this place has been answered.
    pub(crate) fn ended(&self, place: &Place) {
        place.request.store(NOBODY, Ordering::SeqCst);
        self.busy.fetch_sub(1, Ordering::SeqCst);
    }

    /// The first request that was put off and whose turn it is. To be asked after one has ended, and after one was put off: the
    /// last one at work may have ended before it was. All are looked at, since nobody may come and ask again.
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
        waiting.learn_lineages(listener, processes);
        let first = waiting.first(self.most)?;
        let (_, notification) = waiting.requests.remove(first)?;
        self.put_off.store(waiting.requests.len(), Ordering::SeqCst);
        self.take(place, &notification);
        Some(notification)
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

    fn waiting(&self) -> MutexGuard<'_, Waiting> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Waiting {
    /// Looks up for whom those in the places work.
    fn learn_lineages(&mut self, listener: &Listener, processes: &Processes) {
        let mut at_work = HashMap::with_capacity(self.places.len());
        for place in &self.places {
            let thread = place.thread.load(Ordering::SeqCst);
            let request = place.request.load(Ordering::SeqCst);
            if request != NOBODY {
                let known = self.lineages.remove(&request);
                let lineage = known.unwrap_or_else(|| lineage_of(request, thread, listener, processes));
                at_work.insert(request, lineage);
            }
        }
        self.lineages = at_work;
    }

    fn at_work(&self, most: usize) -> AtWork<'_> {
        AtWork::new(most, self.lineages.values().map(|lineage| &**lineage))
    }

    /// Where the first of the requests is whose turn it is.
    fn first(&self, most: usize) -> Option<usize> {
        let at_work = self.at_work(most);
        self.requests.iter().position(|(lineage, _)| at_work.leaves_room_for(lineage))
    }
}

fn lineage_of(request: u64, thread: u32, listener: &Listener, processes: &Processes) -> Lineage {
    match processes.thread(listener, request, thread) {
        Ok(thread) => processes.lineage_of(&thread),
        // It has died, and its request will soon have ended.
        Err(_) => Lineage::default(),
    }
}

/// How many are at work for whom.
#[derive(Debug)]
struct AtWork<'a> {
    /// How many more there may be.
    room: usize,
    /// By a process and those it descends from: for it and for all who descend from it.
    families: HashMap<&'a [u64], usize>,
    /// For a process by itself.
    themselves: HashMap<&'a [u64], usize>,
}

impl<'a> AtWork<'a> {
    fn new(most: usize, lineages: impl Iterator<Item = &'a [u64]>) -> Self {
        let mut at_work = Self { room: most, families: HashMap::new(), themselves: HashMap::new() };
        for lineage in lineages {
            at_work.room = at_work.room.saturating_sub(1);
            for generation in 1..=lineage.len() {
                *at_work.families.entry(&lineage[..generation]).or_default() += 1;
            }
            *at_work.themselves.entry(lineage).or_default() += 1;
        }
        at_work
    }

    /// Whether one more for `lineage` is no more, in any generation, than what is left.
    fn leaves_room_for(&self, lineage: &[u64]) -> bool {
        let mut room = self.room;
        for generation in 1..=lineage.len() {
            let taken = self.families.get(&lineage[..generation]).copied().unwrap_or(0);
            if taken >= room {
                return false;
            }
            room -= taken;
        }
        self.themselves.get(lineage).copied().unwrap_or(0) < room
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn most_of(most: usize, at_work: &mut Vec<Vec<u64>>, lineage: &[u64]) -> usize {
        let before = at_work.len();
        while AtWork::new(most, at_work.iter().map(Vec::as_slice)).leaves_room_for(lineage) {
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

    fn request(id: u64) -> Notification {
        Notification { id, thread: 1, number: 0, arguments: [0; 6] }
    }

    /// Somebody's requests all stall, and many more are put off. Nobody else may ever ask again, so that a neighbour's request
    /// has to be found among them at the first asking.
    #[test]
    fn a_turn_is_found_behind_any_number_of_others() {
        let waiting = Waiting {
            lineages: (0..50).map(|id| (id, Lineage::from([7]))).collect(),
            requests: (0..1000)
                .map(|id| (Lineage::from([7, id % 40]), request(100 + id)))
                .chain([(Lineage::from([8]), request(5000)), (Lineage::from([9]), request(5001))])
                .collect(),
            ..Waiting::default()
        };
        assert_eq!(waiting.first(100), Some(1000));
        assert_eq!(waiting.first(51), Some(1000), "the last worker");
        assert_eq!(waiting.first(50), None);
        assert_eq!(waiting.first(104), Some(0), "in the order in which they came");
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
