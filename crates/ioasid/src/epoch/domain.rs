//! One kind of activity, and who waits for it.
//!
//! Every thread owns a word in a list that only grows. Entering a section stores the current epoch there, leaving
//! stores 0: two plain stores. A waiter advances the epoch and looks through the words until none holds an older
//! one.
//!
//! That is right only if a thread cannot read what the waiter has replaced while its word still looks like
//! "outside" to the waiter, which needs a full fence between the entering store and all that follows. It would be
//! the most expensive instruction of a small DMA. Instead the waiter has the kernel run a fence on every CPU that
//! runs a thread of ours (membarrier). Afterwards each thread either is seen inside, or sees all that the waiter
//! did before. Where membarrier is missing, both sides fence.
//!
//! The atomics and fences come from [`crate::sync`], so that a model checker can put its own in their place and run this
//! very file.

use crate::sync::{
    AtomicBool, AtomicPtr, AtomicU32, AtomicU64, Ordering, heavy_fence, light_fence, wait_a_little,
};
use std::cell::Cell;
use std::marker::PhantomData;

/// The word of a thread that is in no section.
const OUTSIDE: u64 = 0;

/// Added to the depth when the thread's [`Local`] is gone and only open sections are left.
const ORPHANED: u32 = 1 << 31;

/// A kind of activity.
#[derive(Debug)]
pub(crate) struct Domain {
    /// The current epoch, from 1.
    epoch: AtomicU64,
    /// The words of all threads there ever were at the same time.
    participants: AtomicPtr<Participant>,
}

/// A thread's word. Never freed: another thread takes it over.
#[derive(Debug)]
pub(crate) struct Participant {
    epoch: AtomicU64,
    /// How many sections of the thread are open inside each other; only the thread itself uses it.
    depth: AtomicU32,
    taken: AtomicBool,
    next: *const Participant,
}

/// A point in time that all sections begun before can be asked to have passed.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Ticket(u64);

impl Domain {
    /// A domain of an epoch from 1 on and no (null) participants. It does not make its atomics itself, because a
    /// model checker's cannot be made in a constant.
    pub(crate) const fn new(epoch: AtomicU64, participants: AtomicPtr<Participant>) -> Domain {
        Domain { epoch, participants }
    }

    /// Marks the present: whatever the caller did before is seen by every section that begins later.
    pub(crate) fn ticket(&self) -> Ticket {
        heavy_fence();
        Ticket(self.epoch.fetch_add(1, Ordering::SeqCst) + 1)
    }

    /// Whether every section that had begun at the ticket has ended.
    pub(crate) fn passed(&self, ticket: Ticket) -> bool {
        self.participants().all(|participant| {
            let epoch = participant.epoch.load(Ordering::Acquire);
            epoch == OUTSIDE || epoch >= ticket.0
        })
    }

    /// Makes the first fence, so that no later one is the first.
    pub(crate) fn prepare(&self) {
        heavy_fence();
    }

    /// Returns when every section that had begun has ended. A thread that calls this from inside a section of the
    /// same domain waits for itself.
    pub(crate) fn synchronize(&self) {
        let ticket = self.ticket();
        let mut tries = 0u32;
        while !self.passed(ticket) {
            tries = tries.saturating_add(1);
            wait_a_little(tries);
        }
    }

    fn participants(&self) -> impl Iterator<Item = &Participant> {
        let mut next: *const Participant = self.participants.load(Ordering::SeqCst);
        std::iter::from_fn(move || {
            // SAFETY: participants are leaked, so a pointer from the list is valid for ever; `next` is written
            // before the participant is published and never after.
            let participant = unsafe { next.as_ref() }?;
            next = participant.next;
            Some(participant)
        })
    }

    /// A word for a new thread: one that another left, or one more.
    fn join(&self) -> &'static Participant {
        let mut head = self.participants.load(Ordering::SeqCst);
        let mut next: *const Participant = head;
        // SAFETY: as in `participants`.
        while let Some(participant) = unsafe { next.as_ref() } {
            if participant.taken.compare_exchange(false, true, Ordering::AcqRel, Ordering::Relaxed).is_ok() {
                return participant;
            }
            next = participant.next;
        }
        let participant: *mut Participant = Box::into_raw(Box::new(Participant {
            epoch: AtomicU64::new(OUTSIDE),
            depth: AtomicU32::new(0),
            taken: AtomicBool::new(true),
            next: head,
        }));
        while let Err(other) =
            self.participants.compare_exchange(head, participant, Ordering::SeqCst, Ordering::SeqCst)
        {
            head = other;
            // SAFETY: not published yet, so nobody else looks at it.
            unsafe { (*participant).next = head };
        }
        // SAFETY: leaked above.
        unsafe { &*participant }
    }
}

/// What a thread keeps of a domain.
#[derive(Debug)]
pub(crate) struct Local {
    domain: &'static Domain,
    participant: Cell<Option<&'static Participant>>,
}

impl Local {
    /// For a thread that has not entered yet.
    pub(crate) const fn new(domain: &'static Domain) -> Local {
        Local { domain, participant: Cell::new(None) }
    }

    /// Begins a section, or one more inside another.
    #[inline]
    pub(crate) fn enter(&self) -> Section {
        let participant = match self.participant.get() {
            Some(participant) => participant,
            None => {
                let participant = self.domain.join();
                self.participant.set(Some(participant));
                participant
            }
        };
        let depth = participant.depth.load(Ordering::Relaxed);
        participant.depth.store(depth + 1, Ordering::Relaxed);
        if depth == 0 {
            // An old epoch only makes a waiter wait for a section that it need not wait for.
            // A waiter that sees this value must also see that the section before has ended, hence the release.
            participant.epoch.store(self.domain.epoch.load(Ordering::Relaxed), Ordering::Release);
            light_fence();
        }
        Section { participant, on_this_thread: PhantomData }
    }
}

impl Drop for Local {
    fn drop(&mut self) {
        if let Some(participant) = self.participant.get() {
            match participant.depth.load(Ordering::Relaxed) {
                0 => participant.taken.store(false, Ordering::Release),
                // The word is given back by the last of the sections that outlive us.
                depth => participant.depth.store(depth | ORPHANED, Ordering::Relaxed),
            }
        }
    }
}

/// An open section; it ends when this is dropped, on the thread that began it.
#[derive(Debug)]
#[must_use = "the section ends when this is dropped"]
pub(crate) struct Section {
    participant: &'static Participant,
    on_this_thread: PhantomData<*const ()>,
}

impl Drop for Section {
    #[inline]
    fn drop(&mut self) {
        let participant = self.participant;
        let depth = participant.depth.load(Ordering::Relaxed) - 1;
        participant.depth.store(depth, Ordering::Relaxed);
        if depth == 0 {
            participant.epoch.store(OUTSIDE, Ordering::Release);
        } else if depth == ORPHANED {
            participant.epoch.store(OUTSIDE, Ordering::Release);
            participant.depth.store(0, Ordering::Relaxed);
            participant.taken.store(false, Ordering::Release);
        }
    }
}
