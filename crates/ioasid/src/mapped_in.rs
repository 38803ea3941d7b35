//! Where memory was mapped.
//!
//! Mapping does not count on the memory that is mapped, but somebody has to know where to look when the memory goes.
//! So the first mapping into a space leaves a note, and later ones widen the note's range if they have to; to map
//! again in the same place only reads. Most memory is only ever mapped into one space: the first note has its place in
//! the [`Notes`] themselves, and takes no allocation.
//!
//! There are two kinds. Each registration knows where it was mapped, so that releasing one of a million pages looks at one
//! page and not at all of them. The object knows in which spaces any of its memory was mapped, within large blocks; that is
//! for taking the object back from everybody, and saves a list of all registrations.

use crate::memory::Piece;
use crate::space::Space;
use arc_swap::ArcSwap;
use ioasid_pagetable::IovaRange;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, OnceLock, Weak};

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

    /// Unmaps every leaf there that leads to one of the pieces, by output address.
    pub(crate) fn unmap(&self, pieces: &[Piece]) {
        if let Some(space) = self.space.upgrade() {
            space.unmap_outputs(self.hull, pieces);
        }
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

/// In which spaces some memory was mapped.
#[derive(Debug, Default)]
pub(crate) struct Notes {
    first: OnceLock<Note>,
    others: OnceLock<Box<Others>>,
}

/// By the address of the space.
type Others = ArcSwap<Vec<Arc<Note>>>;

/// A note that may grow while it is read. A space that is gone is not mistaken for another, because the note keeps its
/// address from being used again.
#[derive(Debug)]
struct Note {
    space: Weak<Space>,
    first: AtomicU64,
    last: AtomicU64,
}

impl Note {
    fn new(space: &Arc<Space>, range: IovaRange) -> Note {
        let (first, last) = (AtomicU64::new(range.first()), AtomicU64::new(range.last()));
        Note { space: Arc::downgrade(space), first, last }
    }

    fn is_for(&self, space: &Arc<Space>) -> bool {
        self.space.as_ptr() == Arc::as_ptr(space)
    }

    /// Whoever finds that it does has also seen what was noted elsewhere before.
    fn covers(&self, range: IovaRange) -> bool {
        self.first.load(Ordering::Relaxed) <= range.first()
            && range.last() <= self.last.load(Ordering::Relaxed)
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

    fn mapped_in(&self) -> MappedIn {
        let (first, last) = (self.first.load(Ordering::SeqCst), self.last.load(Ordering::SeqCst));
        MappedIn { space: self.space.clone(), hull: IovaRange::new(first, last).unwrap_or(IovaRange::ALL) }
    }
}

impl Notes {
    /// Whether it is noted already that the memory may be mapped there.
    #[inline]
    pub(crate) fn cover(&self, space: &Arc<Space>, range: IovaRange) -> bool {
        match self.first.get() {
            None => false,
            Some(first) if first.is_for(space) => first.covers(range),
            Some(_) => self.others.get().is_some_and(|others| {
                let notes = others.load();
                find(&notes, space).is_ok_and(|place| notes[place].covers(range))
            }),
        }
    }

    /// Notes that the memory is about to be mapped there.
    pub(crate) fn add(&self, space: &Arc<Space>, range: IovaRange) {
        let first = self.first.get_or_init(|| Note::new(space, range));
        if first.is_for(space) {
            return first.widen(range);
        }
        let others = self.others.get_or_init(Box::default);
        let notes = others.load();
        if let Ok(place) = find(&notes, space) {
            return notes[place].widen(range);
        }
        let new = Arc::new(Note::new(space, range));
        others.rcu(|others| {
            let current = others.iter().filter(|note| note.space.strong_count() > 0);
            let mut notes: Vec<Arc<Note>> = current.cloned().collect();
            match find(&notes, space) {
                // Another thread was faster.
                Ok(place) => notes[place].widen(range),
                Err(place) => notes.insert(place, new.clone()),
            }
            notes
        });
    }

    /// Shows what was noted of spaces that are still there.
    pub(crate) fn for_each(&self, mut show: impl FnMut(MappedIn)) {
        let mut show = |note: &Note| {
            if note.space.strong_count() > 0 {
                show(note.mapped_in());
            }
        };
        self.first.get().into_iter().for_each(&mut show);
        if let Some(others) = self.others.get() {
            others.load().iter().for_each(|note| show(note));
        }
    }
}

/// The place of the note for a space, or the one where it would be.
fn find(notes: &[Arc<Note>], space: &Arc<Space>) -> Result<usize, usize> {
    notes.binary_search_by_key(&Arc::as_ptr(space), |note| note.space.as_ptr())
}
