//! One kind of activity, and who waits for it.
//!
//! Every thread owns a word in a list that only grows: odd while the thread is in a section, one more at each beginning
//! and at each end. Entering and leaving are plain stores. A waiter looks through the words once, and waits until each
//! that was odd has changed; nothing is written that several threads share, so that threads in sections lose no cache
//! line to those who wait, and waiters none to each other.
//!
//! # The fence
//!
//! That is right only if a thread cannot read what the waiter has replaced while its word still looks like
//! "outside" to the waiter, which needs a full fence between the entering store and all that follows. It would be
//! the most expensive instruction of a small DMA. Instead the waiter can have the kernel run a fence on every CPU that
//! runs a thread of ours (membarrier). Afterwards each thread either is seen inside, or sees all that the waiter
//! did before.
//!
//! But that interrupts threads which do something else, and where one thread unmaps a page every microsecond the others would
//! hardly get to work. So each thread has a *mode*. It begins *fenced*: it fences when it enters, and nobody has to
//! interrupt it. After [`CALM`] sections it becomes *plain*, and does not fence any more. A waiter that finds another thread
//! plain has the kernel interrupt all of them, once, and makes the plain ones fenced again: whoever waits often pays for the
//! first time, and whoever enters while others wait pays for a fence. Where the kernel has no membarrier no thread
//! ever becomes plain.
//!
//! To become plain, a thread stores its mode and then fences: a waiter that still finds it fenced has fenced earlier, and
//! what it has done is seen by every section from here on.
//!
//! To make another thread fenced, a waiter puts a number of its own into the mode (which the thread takes for fenced, and other
//! waiters for plain), has all threads interrupted, and exchanges the number for *fenced*, if it is still there. The thread
//! looks at its mode after it has stored its word. So if it has looked before the interrupt, then its word was visible
//! when the mode became fenced; if it looks afterwards, it fences.
//!
//! The atomics and fences come from [`crate::sync`], so that a model checker can put its own in their place and run this
//! very file.

use crate::sync::{
    AtomicBool, AtomicPtr, AtomicU32, AtomicU64, CALM, Ordering, can_fence_everywhere, compiler_fence, fence,
    fence_everywhere, wait_a_little,
};
use std::cell::Cell;
use std::marker::PhantomData;

/// The bit of a word that says that its thread is in a section.
const INSIDE: u64 = 1;

/// Added to the depth when the thread's [`Local`] is gone and only open sections are left.
const ORPHANED: u32 = 1 << 31;

/// The mode of a thread that does not fence.
const PLAIN: u64 = 0;
/// The mode of a thread that fences, and is known to.
const FENCED: u64 = 1;
/// From here on: somebody is making sure that the thread fences.
pub(crate) const FIRST_REQUEST: u64 = 2;

/// A kind of activity.
#[derive(Debug)]
pub(crate) struct Domain {
    /// The number of the next waiter that makes others fence.
    requests: AtomicU64,
    /// The words of all threads there ever were at the same time.
    participants: AtomicPtr<Participant>,
}

/// A thread's word. Never freed: another thread takes it over.
#[derive(Debug)]
#[repr(align(64))]
pub(crate) struct Participant {
    word: AtomicU64,
    mode: AtomicU64,
    /// How many sections are still to be fenced; only the thread itself uses it.
    fenced_left: AtomicU32,
    /// How many sections of the thread are open inside the first; only the thread itself uses it.
    depth: AtomicU32,
    taken: AtomicBool,
    next: Option<&'static Participant>,
}

/// The sections that were open at a point in time.
#[derive(Debug)]
pub(crate) struct Ticket(Vec<(&'static Participant, u64)>);

impl Ticket {
    /// Whether every section that had begun at the ticket has ended.
    pub(crate) fn passed(&self) -> bool {
        // Acquire: what was done in the section is over for whoever asks.
        self.0.iter().all(|(participant, word)| participant.word.load(Ordering::Acquire) != *word)
    }
}

impl Domain {
    /// A domain of a first request and no (null) participants. It does not make its atomics itself, because a
    /// model checker's cannot be made in a constant.
    pub(crate) const fn new(requests: AtomicU64, participants: AtomicPtr<Participant>) -> Domain {
        Domain { requests, participants }
    }

    /// Marks the present: whatever the caller did before is seen by every section that begins later.
    ///
    /// `own` is the caller's word, if it has one.
    pub(crate) fn ticket(&'static self, own: Option<&Participant>) -> Ticket {
        self.fence_others(own);
        let inside = |participant: &'static Participant| {
            let word = participant.word.load(Ordering::Acquire);
            (word & INSIDE != 0).then_some((participant, word))
        };
        Ticket(self.participants().filter_map(inside).collect())
    }

    /// Returns when every section that had begun has ended. A thread that calls this from inside a section of the
    /// same domain waits for itself.
    pub(crate) fn synchronize(&'static self, own: Option<&Participant>) {
        let ticket = self.ticket(own);
        let mut tries = 0u32;
        while !ticket.passed() {
            tries = tries.saturating_add(1);
            wait_a_little(tries);
        }
    }

    /// Fences, and makes sure that every other thread has fenced between its word and what it reads, or will.
    fn fence_others(&'static self, own: Option<&Participant>) {
        fence(Ordering::SeqCst);
        let mut request = None;
        let mut interrupt = false;
        for participant in self.participants() {
            // What the caller does comes one after the other anyway.
            if own.is_some_and(|own| std::ptr::eq(own, participant)) {
                continue;
            }
            let mode = participant.mode.load(Ordering::Acquire);
            if mode == PLAIN {
                let request = *request.get_or_insert_with(|| self.requests.fetch_add(1, Ordering::Relaxed));
                // If not: it has become fenced because its thread has ended, or another waiter has asked.
                let _ =
                    participant.mode.compare_exchange(PLAIN, request, Ordering::Relaxed, Ordering::Relaxed);
            }
            interrupt |= mode != FENCED;
        }
        if !interrupt {
            return;
        }
        fence_everywhere();
        let Some(request) = request else { return };
        for participant in self.participants() {
            if participant.mode.load(Ordering::Relaxed) == request {
                // Whoever finds it fenced also sees what the interrupt has made visible. If it has become plain in the
                // meantime, or another waiter has asked since, that is no longer the same promise.
                let _ =
                    participant.mode.compare_exchange(request, FENCED, Ordering::Release, Ordering::Relaxed);
            }
        }
    }

    fn participants(&self) -> impl Iterator<Item = &'static Participant> {
        // SAFETY: participants are leaked, so a pointer to one is valid for ever.
        let first = unsafe { self.participants.load(Ordering::SeqCst).as_ref() };
        std::iter::successors(first, |participant| participant.next)
    }

    /// A word for a new thread: one that another left, or one more.
    fn join(&self) -> &'static Participant {
        let left = |participant: &&Participant| {
            participant.taken.compare_exchange(false, true, Ordering::AcqRel, Ordering::Relaxed).is_ok()
        };
        if let Some(participant) = self.participants().find(left) {
            return participant;
        }
        let participant: *mut Participant = Box::into_raw(Box::new(Participant {
            word: AtomicU64::new(0),
            mode: AtomicU64::new(FENCED),
            fenced_left: AtomicU32::new(CALM),
            depth: AtomicU32::new(0),
            taken: AtomicBool::new(true),
            next: None,
        }));
        let mut head = self.participants.load(Ordering::SeqCst);
        loop {
            // SAFETY: the new one is not published yet, so nobody else looks at it; the others are leaked.
            unsafe { (*participant).next = head.as_ref() };
            match self.participants.compare_exchange(head, participant, Ordering::SeqCst, Ordering::SeqCst) {
                // SAFETY: leaked above.
                Ok(_) => return unsafe { &*participant },
                Err(other) => head = other,
            }
        }
    }
}

impl Participant {
    /// Fences, as long as this thread has to.
    #[inline(never)]
    fn enter_fenced(&self) {
        match self.fenced_left.load(Ordering::Relaxed) {
            0 if can_fence_everywhere() => {
                self.fenced_left.store(CALM, Ordering::Relaxed);
                // Before the fence, which is also the one of this section. An exchange, because a store could come between
                // another thread's look at the mode and its exchange, as far as model checkers know.
                self.mode.swap(PLAIN, Ordering::Relaxed);
            }
            left => self.fenced_left.store(left.saturating_sub(1), Ordering::Relaxed),
        }
        fence(Ordering::SeqCst);
    }

    /// Ends the last section that is open.
    #[inline(always)]
    fn leave(&self) {
        let word = self.word.load(Ordering::Relaxed);
        self.word.store(word.wrapping_add(1), Ordering::Release);
    }

    /// Ends a section while others of the thread are open, or one that has outlived the thread's [`Local`].
    #[cold]
    fn leave_inner(&self, depth: u32) {
        if depth == ORPHANED {
            self.leave();
            self.depth.store(0, Ordering::Relaxed);
            self.give_back();
        } else {
            self.depth.store(depth - 1, Ordering::Relaxed);
        }
    }

    /// Lets another thread have the word, which begins fenced.
    fn give_back(&self) {
        self.fenced_left.store(CALM, Ordering::Relaxed);
        self.mode.store(FENCED, Ordering::Release);
        self.taken.store(false, Ordering::Release);
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

    /// The thread's word, if it has entered yet.
    pub(crate) fn participant(&self) -> Option<&'static Participant> {
        self.participant.get()
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
        let word = participant.word.load(Ordering::Relaxed);
        if word & INSIDE == 0 {
            // A waiter that sees this value must also see that the section before has ended, hence the release.
            participant.word.store(word.wrapping_add(1), Ordering::Release);
            compiler_fence(Ordering::SeqCst);
            if participant.mode.load(Ordering::Relaxed) != PLAIN {
                participant.enter_fenced();
            }
        } else {
            participant.depth.store(participant.depth.load(Ordering::Relaxed) + 1, Ordering::Relaxed);
        }
        Section { participant, on_this_thread: PhantomData }
    }
}

impl Drop for Local {
    fn drop(&mut self) {
        if let Some(participant) = self.participant.get() {
            if participant.word.load(Ordering::Relaxed) & INSIDE == 0 {
                participant.give_back();
            } else {
                // The word is given back by the last of the sections that outlive us.
                let depth = participant.depth.load(Ordering::Relaxed);
                participant.depth.store(depth | ORPHANED, Ordering::Relaxed);
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
        match self.participant.depth.load(Ordering::Relaxed) {
            0 => self.participant.leave(),
            depth => self.participant.leave_inner(depth),
        }
    }
}
