//! How much clients may make the server hold.
//!
//! Everything that a client can have many of is taken from a [`Budget`]: open files, objects, and areas (with the
//! ranges of a list of allowed IOVAs). A budget may be part of a larger one, and what is taken is taken from both or from
//! neither: each client has its own, which is part of the server's. A client that uses up its own is refused, and
//! nobody else notices; the server's bounds the memory that all of them together can make it use.
//!
//! A *client* is one address space: its threads are the same client, its forks are others. What it opens stays
//! charged to it, whoever uses the descriptor later, until the last close.

use std::collections::HashMap;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, Weak};

use rustix::io::Errno;

use crate::poison::lock;
use crate::{Limit, Limits};

/// A number of things that may still be made.
#[derive(Debug)]
pub(crate) struct Budget {
    left: AtomicUsize,
    refusal: Errno,
    part_of: Option<Arc<Budget>>,
}

impl Budget {
    /// A budget for `count` things; what is beyond them is refused with `refusal`.
    pub(crate) fn new(count: usize, refusal: Errno, part_of: Option<Arc<Budget>>) -> Arc<Self> {
        Arc::new(Self { left: AtomicUsize::new(count), refusal, part_of })
    }

    /// Takes `count`, or nothing.
    ///
    /// # Errors
    /// The refusal of the budget that has too few left.
    pub(crate) fn take(&self, count: usize) -> Result<(), Errno> {
        let less = |left: usize| left.checked_sub(count);
        self.left.fetch_update(Ordering::Relaxed, Ordering::Relaxed, less).map_err(|_| self.refusal)?;
        match self.part_of.as_ref().map_or(Ok(()), |whole| whole.take(count)) {
            Ok(()) => Ok(()),
            Err(errno) => {
                self.left.fetch_add(count, Ordering::Relaxed);
                Err(errno)
            }
        }
    }

    /// Gives back `count` of what was taken.
    pub(crate) fn give_back(&self, count: usize) {
        if let Some(whole) = &self.part_of {
            whole.give_back(count);
        }
        self.left.fetch_add(count, Ordering::Relaxed);
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
}

impl Drop for Taken {
    fn drop(&mut self) {
        self.budget.give_back(self.count);
    }
}

/// The budgets of one client, or of all.
#[derive(Debug)]
pub(crate) struct Allowance {
    pub(crate) files: Arc<Budget>,
    pub(crate) objects: Arc<Budget>,
    pub(crate) areas: Arc<Budget>,
}

/// The clients that have something.
#[derive(Debug)]
pub(crate) struct Allowances {
    limits: Limits,
    all: Allowance,
    clients: Mutex<HashMap<u64, Weak<Allowance>>>,
}

impl Allowances {
    pub(crate) fn new(limits: Limits) -> Self {
        let budget = |limit: Limit, refusal| Budget::new(limit.total, refusal, None);
        let all = Allowance {
            files: budget(limits.files, Errno::NFILE),
            objects: budget(limits.objects, Errno::NOMEM),
            areas: budget(limits.areas, Errno::NOMEM),
        };
        Self { limits, all, clients: Mutex::default() }
    }

    /// The allowance of the client with this identity.
    pub(crate) fn of(&self, identity: u64) -> Arc<Allowance> {
        let mut clients = lock(&self.clients);
        if let Some(known) = clients.get(&identity).and_then(Weak::upgrade) {
            return known;
        }
        let part = |limit: Limit, refusal, whole: &Arc<Budget>| {
            Budget::new(limit.per_client, refusal, Some(Arc::clone(whole)))
        };
        let allowance = Arc::new(Allowance {
            files: part(self.limits.files, Errno::MFILE, &self.all.files),
            objects: part(self.limits.objects, Errno::NOMEM, &self.all.objects),
            areas: part(self.limits.areas, Errno::NOMEM, &self.all.areas),
        });
        // Each that lives has a file open, so this is bounded, and a sweep at a power of two is rare.
        if clients.len().is_power_of_two() {
            clients.retain(|_, allowance| allowance.strong_count() > 0);
        }
        clients.insert(identity, Arc::downgrade(&allowance));
        allowance
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_the_whole_refuses_is_not_taken_from_the_part() {
        let whole = Budget::new(5, Errno::NFILE, None);
        let part = Budget::new(4, Errno::MFILE, Some(Arc::clone(&whole)));
        let other = Budget::new(4, Errno::MFILE, Some(Arc::clone(&whole)));
        assert_eq!(part.take(5), Err(Errno::MFILE));
        assert_eq!(part.take(3), Ok(()));
        assert_eq!(other.take(3), Err(Errno::NFILE));
        assert_eq!(other.take(2), Ok(()));
        part.give_back(3);
        other.give_back(2);
        assert_eq!(other.take(4), Ok(()), "the refusal has taken nothing");
        assert_eq!(part.take(1), Ok(()));
    }

    #[test]
    fn a_client_is_forgotten_with_what_it_had() {
        let allowances = Allowances::new(Limits::default());
        for identity in 0..1000 {
            let allowance = allowances.of(identity);
            assert!(Arc::ptr_eq(&allowance, &allowances.of(identity)));
        }
        assert!(lock(&allowances.clients).len() <= 2);
    }
}
