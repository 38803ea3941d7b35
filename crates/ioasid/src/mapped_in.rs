//! Where memory was mapped.
//!
//! Mapping does not count on the memory that is mapped, but somebody has to know where to look when the memory goes.
//! So the first mapping into a space leaves a note, and later ones widen the note's range if they have to; to map
//! again in the same place only reads. Most memory is only ever mapped into one space: the first note has its place in
//! the [`Notes`] themselves, and takes no allocation.

use crate::memory::Piece;
use crate::space::Space;
use crate::sync::{ArcSwapOption, AtomicU64, OnceLock, Ordering};
use ioasid_pagetable::IovaRange;
use std::sync::{Arc, Weak};

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

    /// Whether the space is still there.
    pub(crate) fn is_current(&self) -> bool {
        self.space.strong_count() > 0
    }
}

/// In which spaces some memory was mapped.
#[derive(Debug, Default)]
pub(crate) struct Notes {
    first: OnceLock<Note>,
    others: ArcSwapOption<Vec<Arc<Note>>>,
}

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
    /// Notes that the memory is about to be mapped there.
    pub(crate) fn add(&self, space: &Arc<Space>, range: IovaRange) {
        let first = self.first.get_or_init(|| Note::new(space, range));
        if first.is_for(space) {
            return first.widen(range);
        }
        if let Some(note) =
            self.others.load().iter().flat_map(|notes| notes.iter()).find(|note| note.is_for(space))
        {
            return note.widen(range);
        }
        let new = Arc::new(Note::new(space, range));
        self.others.rcu(|others| {
            let others = others.iter().flat_map(|notes| notes.iter());
            let mut notes: Vec<Arc<Note>> =
                others.filter(|note| note.space.strong_count() > 0).cloned().collect();
            // Another thread may have been faster.
            match notes.iter().find(|note| note.is_for(space)) {
                Some(note) => note.widen(range),
                None => notes.push(new.clone()),
            }
            Some(Arc::new(notes))
        });
    }

    /// What was noted.
    pub(crate) fn all(&self) -> Vec<MappedIn> {
        let others = self.others.load();
        let others = others.iter().flat_map(|notes| notes.iter()).map(|note| &**note);
        self.first.get().into_iter().chain(others).map(Note::mapped_in).collect()
    }
}
