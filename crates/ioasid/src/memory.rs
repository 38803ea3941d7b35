//! Registered memory.
//!
//! Registering is the expensive part of mapping, and it is done once: the pages are charged and held, and their
//! place on the bus is fixed. A mapping made from registered memory afterwards does no system call, charges
//! nothing and holds nothing; it does not even count itself, because that count would be one cache line for all
//! threads that map from the same memory. So a [`Memory`] does not know how often it is mapped. It only notes in
//! which spaces, and between which addresses. When it is dropped, the pages that no other registration holds are
//! unmapped there first: no mapping outlives the memory behind it.

use crate::backing::{Backing, HoldError, PAGE_BITS, pages};
use crate::ledger::{Account, OverLimit};
use crate::space::Space;
use arc_swap::ArcSwapOption;
use ioasid_pagetable::{IovaRange, Oa};
use std::ops::Range;
use std::sync::{Arc, Mutex, PoisonError, Weak};

/// A registered range of a [`Backing`]: charged to an account, held, and with a place on the bus, until it is
/// dropped. Dropping it unmaps it wherever it is still mapped.
#[derive(Debug)]
pub struct Memory {
    backing: Arc<Backing>,
    /// In bytes of the object.
    offset: u64,
    length: u64,
    account: Account,
    held: Range<u64>,
    /// The places on the bus of the chunks it lies in.
    places: Box<[Oa]>,
    /// Where it was mapped.
    mapped: Mutex<Vec<MappedIn>>,
    /// The newest of these notes, so that mapping again in the same place takes no lock.
    newest: ArcSwapOption<MappedIn>,
}

/// A note that memory was mapped into a space, nowhere but between these addresses.
#[derive(Clone, Debug)]
pub(crate) struct MappedIn {
    space_id: u64,
    space: Weak<Space>,
    hull: IovaRange,
}

/// Why memory was not registered. Nothing is charged or held.
#[derive(Debug, thiserror::Error)]
pub enum RegisterError {
    /// The account may not be charged for so much.
    #[error(transparent)]
    OverLimit(#[from] OverLimit),
    /// The object has no such bytes.
    #[error("{length:#x} bytes at {offset:#x} reach beyond the object")]
    OutOfBounds {
        /// The first byte asked for.
        offset: u64,
        /// How many were asked for.
        length: u64,
    },
    /// No addresses are left on the bus.
    #[error("the bus address space is full")]
    BusFull,
    /// No bytes were asked for.
    #[error("memory of no bytes cannot be registered")]
    Empty,
}

impl From<HoldError> for RegisterError {
    fn from(error: HoldError) -> RegisterError {
        match error {
            HoldError::OverLimit(error) => RegisterError::OverLimit(error),
            HoldError::BusFull => RegisterError::BusFull,
        }
    }
}

/// A piece of memory whose output addresses are consecutive.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Piece {
    pub(crate) oa: Oa,
    pub(crate) length: u64,
}

impl Piece {
    /// Its last output address.
    pub(crate) fn last(&self) -> u64 {
        self.oa.get() + (self.length - 1)
    }
}

impl MappedIn {
    /// Adds a note to others, of which there is one for each space.
    fn add_to(&self, notes: &mut Vec<MappedIn>) {
        match notes.iter_mut().find(|note| note.space_id == self.space_id) {
            Some(note) => note.widen(self.hull),
            None => notes.push(self.clone()),
        }
    }

    /// Adds a note that memory of the object is about to be mapped there on behalf of no registration in particular.
    pub(crate) fn note(notes: &mut Vec<MappedIn>, space: &Arc<Space>, hull: IovaRange) {
        MappedIn { space_id: space.id(), space: Arc::downgrade(space), hull }.add_to(notes);
    }

    fn widen(&mut self, range: IovaRange) {
        let (first, last) = (self.hull.first().min(range.first()), self.hull.last().max(range.last()));
        self.hull = IovaRange::new(first, last).unwrap_or(IovaRange::ALL);
    }
}

impl Memory {
    /// Registers `length` bytes of the object from `offset` on.
    ///
    /// Whole 4 KiB pages are held and charged; a page that this account pays for already is not charged again.
    pub fn register(
        backing: &Arc<Backing>,
        offset: u64,
        length: u64,
        account: &Account,
    ) -> Result<Arc<Memory>, RegisterError> {
        if length == 0 {
            return Err(RegisterError::Empty);
        }
        let held = pages(offset, length).ok_or(RegisterError::OutOfBounds { offset, length })?;
        if backing.length().is_some_and(|size| offset + (length - 1) >= size) {
            return Err(RegisterError::OutOfBounds { offset, length });
        }
        let _registering = backing.registering();
        let places = backing.hold(held.clone(), account)?.into_boxed_slice();
        Ok(Arc::new(Memory {
            backing: backing.clone(),
            offset,
            length,
            account: account.clone(),
            held,
            places,
            mapped: Mutex::new(Vec::new()),
            newest: ArcSwapOption::empty(),
        }))
    }

    /// How many bytes are registered.
    pub fn length(&self) -> u64 {
        self.length
    }

    /// The object it is a part of.
    pub fn backing(&self) -> &Arc<Backing> {
        &self.backing
    }

    /// The pieces with consecutive output addresses that `length` bytes from `offset` on consist of; `None` if
    /// that is nothing or more than what is registered.
    pub(crate) fn pieces(&self, offset: u64, length: u64) -> Option<impl Iterator<Item = Piece> + '_> {
        let last = offset.checked_add(length.checked_sub(1)?).filter(|last| *last < self.length)?;
        Some(self.object_pieces(self.offset + offset, self.offset + last))
    }

    /// The same for bytes of the object, all of them registered, to the last one.
    fn object_pieces(&self, mut at: u64, last: u64) -> impl Iterator<Item = Piece> + '_ {
        let bits = self.backing.window_bits();
        let first_chunk = (self.held.start << PAGE_BITS) >> bits;
        let low = (1u64 << bits) - 1;
        let mut done = false;
        std::iter::from_fn(move || {
            if done {
                return None;
            }
            let chunk = ((at >> bits) - first_chunk) as usize;
            let place = self.places.get(chunk)?.get();
            let mut end = at | low;
            // A large object mostly has one window behind the other.
            let mut behind = self.places.iter().skip(chunk + 1);
            let mut expected = place;
            while end < last {
                expected += low + 1;
                if behind.next().is_none_or(|next| next.get() != expected) {
                    break;
                }
                end += low + 1;
            }
            let end = end.min(last);
            let piece = Piece { oa: Oa::new(place + (at & low)), length: end - at + 1 };
            done = end == last;
            at = end.wrapping_add(1);
            Some(piece)
        })
    }

    /// Notes that it is about to be mapped there.
    pub(crate) fn note_mapped(&self, space: &Arc<Space>, range: IovaRange) {
        if let Some(newest) = &*self.newest.load() {
            if newest.space_id == space.id() && newest.hull.covers(&range) {
                return;
            }
        }
        let mut mapped = self.mapped.lock().unwrap_or_else(PoisonError::into_inner);
        let note = match mapped.iter_mut().find(|mapped| mapped.space_id == space.id()) {
            Some(mapped) => {
                mapped.widen(range);
                mapped.clone()
            }
            None => {
                mapped.retain(|mapped| mapped.space.strong_count() > 0);
                let note = MappedIn { space_id: space.id(), space: Arc::downgrade(space), hull: range };
                mapped.push(note.clone());
                note
            }
        };
        self.newest.store(Some(Arc::new(note)));
    }

    /// The pieces that these pages, all of them registered, consist of, by output address.
    fn page_pieces(&self, pages: &[Range<u64>]) -> Vec<Piece> {
        let last = |page: u64| (page << PAGE_BITS) | ((1 << PAGE_BITS) - 1);
        let bytes = pages.iter().map(|pages| (pages.start << PAGE_BITS, last(pages.end - 1)));
        let mut pieces: Vec<Piece> =
            bytes.flat_map(|(first, last)| self.object_pieces(first, last)).collect();
        pieces.sort_unstable_by_key(|piece| piece.oa);
        pieces
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        let mut earlier = self.backing.registering();
        let own = std::mem::take(self.mapped.get_mut().unwrap_or_else(PoisonError::into_inner));
        let (ours, shared) = self.backing.held_once(self.held.clone());
        let going = self.page_pieces(&ours);
        if !going.is_empty() {
            for note in own.iter().chain(earlier.iter()) {
                if let Some(space) = note.space.upgrade() {
                    space.unmap_outputs(note.hull, &going);
                }
            }
        }
        // Pages that others hold stay mapped where we mapped them. The last of the others will need to know; but
        // mostly nothing is mapped any more, and a note less is a space less that they have to look through.
        let staying = self.page_pieces(&shared);
        for note in own {
            let space = note.space.upgrade();
            if !staying.is_empty() && space.is_some_and(|space| space.may_lead_to(note.hull, &staying)) {
                note.add_to(&mut earlier);
            }
        }
        earlier.retain(|note| note.space.strong_count() > 0);
        if !self.backing.release(self.held.clone(), &self.account) {
            earlier.clear();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Bus, Iova, Permissions};

    const PAGE: u64 = 1 << PAGE_BITS;

    #[test]
    fn notes_stay_only_where_something_is_mapped_and_one_for_each_space() {
        let bus = Bus::new();
        let backing = Backing::anonymous(&bus, 4 * PAGE).unwrap();
        let account = Account::new("test", None);
        let space = Space::new(&bus);
        let register = || Memory::register(&backing, 0, 4 * PAGE, &account).unwrap();
        let stays = register();
        for round in 0..10 {
            let memory = register();
            space.map(Iova::new(round * PAGE), &memory, 0, PAGE, Permissions::READ).unwrap();
            space.unmap(IovaRange::ALL).unwrap();
            drop(memory);
            assert!(backing.registering().is_empty());
        }
        for round in 0..10 {
            space.map(Iova::new(round * PAGE), &register(), 0, PAGE, Permissions::READ).unwrap();
        }
        let notes: Vec<IovaRange> = backing.registering().iter().map(|note| note.hull).collect();
        assert_eq!(notes, [IovaRange::with_length(0, 10 * PAGE).unwrap()]);
        drop(stays);
        assert!(backing.registering().is_empty() && space.leaves(IovaRange::ALL).is_empty());
    }
}
