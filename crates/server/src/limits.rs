//! How much clients may make the server hold.
//!
//! Everything that a client can have many of is taken from a [`Budget`]: open files, objects, and areas, with what
//! costs no more than areas do: the ranges of a list of allowed IOVAs, and with test devices reserved ranges and the pieces
//! that pins have. What is left of an area that was cut is an area. A budget may be part of a larger one, and what is taken is taken
//! from both or from neither: each client has its own, which is part of the server's. A client that uses up its own is refused, and
//! nobody else notices; the server's bounds the memory that all of them together can make it use.
//!
//! A *client* is one address space: its threads are the same client, its forks are others. So that forks do not get more than
//! who forks, budgets are parts of each other as processes descend from each other, and **no part has more than what it leaves to
//! the whole**: it is refused what would make its share larger than the rest. However much a process and its descendants ask for,
//! they come to half, and a neighbour finds the other. The next one that wants everything comes to half of what is
//! left, or, if they all take at the same time, each of N to one part of N + 1, and one is left.
//!
//! What a client opens stays charged to it, whoever uses the descriptor later, until the last close.

use std::collections::HashMap;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, Weak};

use rustix::io::Errno;

use crate::poison::lock;
use crate::{Limit, Limits};

/// A number of things that may be made.
#[derive(Debug)]
pub(crate) struct Budget {
    taken: AtomicUsize,
    most: usize,
    refusal: Errno,
    part_of: Option<Arc<Budget>>,
}

impl Budget {
    /// A budget for `most` things; what is beyond them is refused with `refusal`.
    pub(crate) fn new(most: usize, refusal: Errno, part_of: Option<Arc<Budget>>) -> Arc<Self> {
        Arc::new(Self { taken: AtomicUsize::new(0), most, refusal, part_of })
    }

    /// Takes `count`, or nothing. Parts come first, so that one that may not have more does not disturb the whole by asking.
    ///
    /// # Errors
    /// The refusal of the budget that has too few left, or of the whole of which a part would have too much.
    pub(crate) fn take(&self, count: usize) -> Result<(), Errno> {
        let share = self.part_of.as_ref().map_or(usize::MAX, |whole| whole.room());
        let more = |taken: usize| taken.checked_add(count).filter(|taken| *taken <= self.most.min(share));
        self.taken.fetch_update(Ordering::Relaxed, Ordering::Relaxed, more).map_err(|taken| {
            match &self.part_of {
                Some(whole) if taken.saturating_add(count) <= self.most => whole.refusal,
                _ => self.refusal,
            }
        })?;
        match self.part_of.as_ref().map_or(Ok(()), |whole| whole.take(count)) {
            Ok(()) => Ok(()),
            Err(errno) => {
                self.taken.fetch_sub(count, Ordering::Relaxed);
                Err(errno)
            }
        }
    }

    /// What nobody has, of the whole and of what there is for parts of this one.
    fn room(&self) -> usize {
        let room = self.part_of.as_ref().map_or(self.most, |whole| whole.room().min(self.most));
        room.saturating_sub(self.taken.load(Ordering::Relaxed))
    }

    /// Gives back `count` of what was taken.
    pub(crate) fn give_back(&self, count: usize) {
        if let Some(whole) = &self.part_of {
            whole.give_back(count);
        }
        self.taken.fetch_sub(count, Ordering::Relaxed);
    }
}

/// What was taken from a budget; dropped, it is given back.
#[derive(Debug)]
pub(crate) struct Taken {
    budget: Arc<Budget>,
    count: usize,
}

impl Taken {
    /// Takes `count`, or nothing.
    ///
    /// # Errors
    /// As [`Budget::take`].
    pub(crate) fn some(budget: &Arc<Budget>, count: usize) -> Result<Self, Errno> {
        budget.take(count)?;
        Ok(Self { budget: Arc::clone(budget), count })
    }

    /// Leaves it taken. Somebody else gives it back.
    pub(crate) fn keep(mut self) {
        self.count = 0;
    }
}

impl Drop for Taken {
    fn drop(&mut self) {
        self.budget.give_back(self.count);
    }
}

/// The budgets of one client, of a process with its descendants, or of all.
#[derive(Debug)]
pub(crate) struct Allowance {
    pub(crate) files: Arc<Budget>,
    pub(crate) objects: Arc<Budget>,
    pub(crate) areas: Arc<Budget>,
    parts: Mutex<HashMap<PartOf, Weak<Allowance>>>,
    /// Remembered as long as anybody has a part of it.
    _whole: Option<Arc<Allowance>>,
}

/// Whose a part is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
enum PartOf {
    /// A process with its descendants, by name.
    Family(u64),
    /// A client by itself, by identity.
    Client(u64),
}

impl Allowance {
    fn new(most: [usize; 3], files: Errno, whole: Option<Arc<Self>>) -> Arc<Self> {
        let budget = |most, refusal, part_of: fn(&Self) -> &Arc<Budget>| {
            Budget::new(most, refusal, whole.as_deref().map(part_of).cloned())
        };
        Arc::new(Self {
            files: budget(most[0], files, |whole| &whole.files),
            objects: budget(most[1], Errno::NOMEM, |whole| &whole.objects),
            areas: budget(most[2], Errno::NOMEM, |whole| &whole.areas),
            parts: Mutex::default(),
            _whole: whole,
        })
    }

    /// A part, as it is known or a new one.
    fn part(self: &Arc<Self>, of: PartOf, most: [usize; 3], files: Errno) -> Arc<Self> {
        let mut parts = lock(&self.parts);
        if let Some(known) = parts.get(&of).and_then(Weak::upgrade) {
            return known;
        }
        // Each that lives has a file open, so this is bounded, and a sweep at a power of two is rare.
        if parts.len().is_power_of_two() {
            parts.retain(|_, part| part.strong_count() > 0);
        }
        let part = Self::new(most, files, Some(Arc::clone(self)));
        parts.insert(of, Arc::downgrade(&part));
        part
    }
}

/// Everybody's, and thereby those of all who have something.
#[derive(Debug)]
pub(crate) struct Allowances {
    limits: Limits,
    all: Arc<Allowance>,
}

impl Allowances {
    pub(crate) fn new(limits: Limits) -> Self {
        let most = [limits.files, limits.objects, limits.areas].map(|limit: Limit| limit.total);
        Self { limits, all: Allowance::new(most, Errno::NFILE, None) }
    }

    /// The allowance of the client with this identity, which descends from these processes.
    pub(crate) fn of(&self, identity: u64, lineage: &[u64]) -> Arc<Allowance> {
        let family = lineage.iter().fold(Arc::clone(&self.all), |whole, name| {
            whole.part(PartOf::Family(*name), [usize::MAX; 3], Errno::NFILE)
        });
        let Limits { files, objects, areas } = self.limits;
        let most = [files, objects, areas].map(|limit| limit.per_client);
        family.part(PartOf::Client(identity), most, Errno::MFILE)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_the_whole_refuses_is_not_taken_from_the_part() {
        let whole = Budget::new(9, Errno::NFILE, None);
        let part = Budget::new(4, Errno::MFILE, Some(Arc::clone(&whole)));
        let other = Budget::new(8, Errno::MFILE, Some(Arc::clone(&whole)));
        assert_eq!(part.take(5), Err(Errno::MFILE));
        assert_eq!(part.take(4), Ok(()));
        assert_eq!(other.take(6), Err(Errno::NFILE), "there are five");
        assert_eq!(other.take(5), Ok(()));
        assert_eq!(whole.take(1), Err(Errno::NFILE));
        part.give_back(4);
        other.give_back(5);
        assert_eq!(whole.take(9), Ok(()), "the refusal has taken nothing");
    }

    /// As many as there are, one by one.
    fn greedy(budget: &Budget) -> usize {
        (0..).take_while(|_| budget.take(1).is_ok()).count()
    }

    #[test]
    fn who_asks_for_everything_leaves_as_much() {
        let limit = Limit { per_client: 1000, total: 1200 };
        let limits = Limits { files: limit, objects: limit, areas: limit };
        for greedy_ones in 1..5 {
            let allowances = Allowances::new(limits);
            let hogs: Vec<_> = (0..greedy_ones).map(|hog| allowances.of(hog, &[hog])).collect();
            for hog in &hogs {
                greedy(&hog.areas);
            }
            let modest = allowances.of(99, &[99]);
            let left = limits.areas.total - allowances.all.areas.taken.load(Ordering::Relaxed);
            assert!(left >= (limits.areas.total >> greedy_ones) - greedy_ones as usize, "{left}");
            assert!(greedy(&modest.areas) >= left / 3);
        }
    }

    #[test]
    fn forks_have_no_more_together_than_one_has() {
        let limits = Limits::default();
        let total = limits.files.total;
        let allowances = Allowances::new(limits);
        // Each forks the next one, and a thousand more.
        let (parent, bystander) = (allowances.of(1, &[]), allowances.of(2, &[8]));
        bystander.files.take(1).unwrap();
        let mut storm = Vec::new();
        for number in 0..1000 {
            let child = allowances.of(100 + 2 * number, &[7, 100 + number]);
            let grandchild = allowances.of(101 + 2 * number, &[7, 100 + number, 5]);
            storm.push((greedy(&child.files) + greedy(&grandchild.files), child, grandchild));
        }
        let taken: usize = storm.iter().map(|(taken, ..)| taken).sum();
        assert!(taken <= total / 2, "{taken}");
        assert!(storm[0].0 >= total / 4, "as long as nobody else is there, one has much: {}", storm[0].0);
        bystander.files.take(limits.files.per_client - 1).unwrap();
        parent.files.take(limits.files.per_client).unwrap();
        drop(storm);
    }

    #[test]
    fn a_client_is_forgotten_with_what_it_had() {
        let allowances = Allowances::new(Limits::default());
        for identity in 0..1000 {
            let allowance = allowances.of(identity, &[identity, 5]);
            assert!(Arc::ptr_eq(&allowance, &allowances.of(identity, &[identity, 5])));
        }
        assert!(lock(&allowances.all.parts).len() <= 2);
    }
}
