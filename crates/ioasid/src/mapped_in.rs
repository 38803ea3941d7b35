//! Where memory was mapped.
//!
//! Mapping does not count on the memory that is mapped, but somebody has to know where to look when the memory goes.
//! So the first mapping into a space leaves a note, and later ones widen the note's range if they have to; to map
//! again in the same place only reads.
//!
//! There are two kinds. The object knows in which spaces any of its memory was mapped, within large blocks ([`Spaces`]); that is
//! for taking the object back from everybody, and saves a list of all registrations. And each registration knows where it was
//! mapped itself ([`Notes`]), so that releasing one of a million pages looks at one page and not at all of them. Most memory is
//! only ever mapped into one space, which is noted in place, by number: no allocation, and no count of who refers to
//! the space. The object's note says which space that is, and so comes first.

use crate::memory::Piece;
use crate::space::Space;
use crate::sync::{ArcSwapOption, AtomicU64, Instant, OnceLock, Ordering, wait_a_little};
use ioasid_pagetable::IovaRange;
use std::sync::{Arc, Weak};

/// In which blocks an object notes where it was mapped.
const BLOCK: u64 = 1 << 30;

/// A note that memory was mapped into a space, nowhere but between these addresses.
#[derive(Clone, Debug)]
pub(crate) struct MappedIn {
    pub(crate) space: Weak<Space>,
    pub(crate) hull: IovaRange,
}

impl MappedIn {
    /// Adds a note to others, of which there is one for each space.
    pub(crate) fn add_to(&self, notes: &mut Vec<MappedIn>) {
        match notes.iter_mut().find(|note| note.space.ptr_eq(&self.space)) {
            Some(note) => note.widen(self.hull),
            None => notes.push(self.clone()),
        }
    }

    /// Makes its range one that has the other in it, too.
    pub(crate) fn widen(&mut self, range: IovaRange) {
        let (first, last) = (self.hull.first().min(range.first()), self.hull.last().max(range.last()));
        self.hull = IovaRange::new(first, last).unwrap_or(IovaRange::ALL);
    }

    /// Unmaps every leaf there that leads to one of the pieces, by output address. `false`: a deadline has passed, and
    /// an operation that is at work there may still lead to them.
    pub(crate) fn unmap(&self, pieces: &[Piece], deadline: Option<Instant>) -> bool {
        self.space.upgrade().is_none_or(|space| space.unmap_outputs(self.hull, pieces, deadline))
    }

    /// Whether something there leads, or may lead in a moment, to one of the pieces, by output address.
    pub(crate) fn may_lead_to(&self, pieces: &[Piece]) -> bool {
        self.space.upgrade().is_some_and(|space| space.may_lead_to(self.hull, pieces))
    }

    /// Whether the space is still there.
    pub(crate) fn is_current(&self) -> bool {
        self.space.strong_count() > 0
    }
}

/// A range that may grow while it is read.
#[derive(Debug)]
struct Hull {
    first: AtomicU64,
    last: AtomicU64,
}

impl Hull {
    fn new(range: IovaRange) -> Hull {
        Hull { first: AtomicU64::new(range.first()), last: AtomicU64::new(range.last()) }
    }

    /// Whoever finds that it does has also seen what was noted elsewhere before.
    fn covers(&self, range: IovaRange) -> bool {
        self.first.load(Ordering::Acquire) <= range.first()
            && range.last() <= self.last.load(Ordering::Acquire)
    }

    fn widen(&self, range: IovaRange) {
        // Both only ever grow outwards, so what is seen here is no more than what there is.
        if range.first() < self.first.load(Ordering::Relaxed) {
            self.first.fetch_min(range.first(), Ordering::SeqCst);
        }
        if range.last() > self.last.load(Ordering::Relaxed) {
            self.last.fetch_max(range.last(), Ordering::SeqCst);
        }
    }

    fn range(&self) -> IovaRange {
        let (first, last) = (self.first.load(Ordering::SeqCst), self.last.load(Ordering::SeqCst));
        IovaRange::new(first, last).unwrap_or(IovaRange::ALL)
    }
}

/// In which spaces some memory was mapped.
#[derive(Debug, Default)]
pub(crate) struct Spaces {
    first: OnceLock<Note>,
    /// By the number of the space.
    others: ArcSwapOption<Vec<Arc<Note>>>,
}

/// One of them. A space that is gone keeps its few hundred bytes as long as the note is there.
#[derive(Debug)]
struct Note {
    number: u64,
    space: Weak<Space>,
    hull: Hull,
}

impl Note {
    fn new(space: &Arc<Space>, range: IovaRange) -> Note {
        Note { number: space.number(), space: Arc::downgrade(space), hull: Hull::new(range) }
    }

    fn mapped_in(&self) -> MappedIn {
        MappedIn { space: self.space.clone(), hull: self.hull.range() }
    }
}

impl Spaces {
    /// Shows the note for a space, if there is one.
    #[inline]
    fn with<T>(&self, number: u64, show: impl FnOnce(&Note) -> T) -> Option<T> {
        let first = self.first.get()?;
        if first.number == number {
            return Some(show(first));
        }
        let others = self.others.load();
        let others = others.as_ref()?;
        find(others, number).ok().map(|place| show(&others[place]))
    }

    /// Notes that the memory is about to be mapped there.
    pub(crate) fn add(&self, space: &Arc<Space>, range: IovaRange) {
        let known = self.with(space.number(), |note| note.hull.widen(range));
        if known.is_none() {
            self.add_space(space, range);
        }
    }

    #[cold]
    fn add_space(&self, space: &Arc<Space>, range: IovaRange) {
        let first = self.first.get_or_init(|| Note::new(space, range));
        if first.number == space.number() {
            return first.hull.widen(range);
        }
        let new = Arc::new(Note::new(space, range));
        self.others.rcu(|others| {
            let others = others.iter().flat_map(|notes| notes.iter());
            let current = others.filter(|note| note.space.strong_count() > 0);
            let mut notes: Vec<Arc<Note>> = current.cloned().collect();
            match find(&notes, new.number) {
                // Another thread was faster.
                Ok(place) => notes[place].hull.widen(range),
                Err(place) => notes.insert(place, new.clone()),
            }
            Some(Arc::new(notes))
        });
    }

    /// Shows what was noted of spaces that are still there.
    pub(crate) fn for_each(&self, mut show: impl FnMut(MappedIn)) {
        let others = self.others.load();
        for note in self
            .first
            .get()
            .into_iter()
            .chain(others.iter().flat_map(|notes| notes.iter()).map(|note| &**note))
        {
            if note.space.strong_count() > 0 {
                show(note.mapped_in());
            }
        }
    }
}

/// The place of the note for a space, or the one where it would be.
fn find(notes: &[Arc<Note>], number: u64) -> Result<usize, usize> {
    notes.binary_search_by_key(&number, |note| note.number)
}

/// Where a registration was mapped.
#[derive(Debug)]
pub(crate) struct Notes {
    /// The number of the first space, or one of the two below.
    space: AtomicU64,
    hull: Hull,
    others: OnceLock<Box<Spaces>>,
}

/// No space yet.
const NOWHERE: u64 = u64::MAX;
/// Just being written.
const WRITING: u64 = u64::MAX - 1;

impl Default for Notes {
    fn default() -> Notes {
        Notes { space: AtomicU64::new(NOWHERE), hull: Hull::new(IovaRange::ALL), others: OnceLock::new() }
    }
}

impl Notes {
    /// Notes that the memory is about to be mapped there. `object` says where any memory of the object is.
    #[inline]
    pub(crate) fn add(&self, space: &Arc<Space>, range: IovaRange, object: &Spaces) {
        let number = space.number();
        if self.space.load(Ordering::Acquire) != number || !self.hull.covers(range) {
            self.add_uncovered(space, range, object);
        }
    }

    fn add_uncovered(&self, space: &Arc<Space>, range: IovaRange, object: &Spaces) {
        // Who finds the note here relies on the object's. In large blocks: whoever maps page after page would move the end
        // for each, and wait for others who do so.
        let (first, last) = (range.first() & !(BLOCK - 1), range.last() | (BLOCK - 1));
        object.add(space, IovaRange::new(first, last).unwrap_or(IovaRange::ALL));
        let number = space.number();
        let begun = self.space.compare_exchange(NOWHERE, WRITING, Ordering::Acquire, Ordering::Acquire);
        if begun.is_ok() {
            self.hull.first.store(range.first(), Ordering::Relaxed);
            self.hull.last.store(range.last(), Ordering::Relaxed);
            return self.space.store(number, Ordering::Release);
        }
        if self.first_space() == number {
            self.hull.widen(range);
        } else {
            self.others.get_or_init(Box::default).add(space, range);
        }
    }

    /// The number of the first space.
    fn first_space(&self) -> u64 {
        let mut tries = 0u32;
        loop {
            match self.space.load(Ordering::Acquire) {
                // For two stores.
                WRITING => wait_a_little(tries),
                space => return space,
            }
            tries = tries.saturating_add(1);
        }
    }

    /// Shows what was noted of spaces that are still there.
    pub(crate) fn for_each(&self, object: &Spaces, mut show: impl FnMut(MappedIn)) {
        // Whoever is just writing has not mapped anything yet.
        let first = self.space.load(Ordering::Acquire);
        if first < WRITING {
            let space = object.with(first, |note| note.space.clone());
            if let Some(space) = space.filter(|space| space.strong_count() > 0) {
                show(MappedIn { space, hull: self.hull.range() });
            }
        }
        if let Some(others) = self.others.get() {
            others.for_each(show);
        }
    }
}
