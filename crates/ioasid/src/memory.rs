//! Registered memory.
//!
//! Registering is the expensive part of mapping, and it is done once: the pages are charged and held, and their
//! place on the bus is fixed. A mapping made from registered memory afterwards does no system call, charges
//! nothing and holds nothing; it does not even count itself, because that count would be one cache line for all
//! threads that map from the same memory. So a [`Memory`] does not know how often it is mapped. It only notes in
//! which spaces, and between which addresses. When it is dropped, the pages that no other registration holds are
//! unmapped there first: no mapping outlives the memory behind it.
//!
//! # Growing, and giving parts back
//!
//! A registration can grow at its end ([`Memory::grow`]) and give back any pages of it ([`Memory::release`]). Both happen
//! beside mappings, which must neither pay for that nor miss it. How far the memory reaches is a value that every map
//! reads inside of its operation ([`Published`]). Pages that are given back are first entered as such; then the
//! operations that may not have seen that are waited for; and whatever these have mapped is there to be found when
//! the pages are unmapped. What was given back at the end can be had again by growing.

use crate::backing::{
    Backing, HoldError, PAGE_BITS, Places, Registrations, Residency, ResidencyError, pages,
};
use crate::epoch::{self, Published, Reading};
use crate::ledger::coverage::Coverage;
use crate::ledger::{Account, OverLimit};
use crate::mapped_in::{MappedIn, Notes};
use crate::space::{Space, UnmapError};
use crate::sync::{Instant, Mutex, OnceLock, PoisonError, RwLock, RwLockReadGuard};
use ioasid_pagetable::{IovaRange, Oa};
use std::borrow::Cow;
use std::io;
use std::ops::Range;
use std::slice;
use std::sync::Arc;
use std::time::Duration;

/// A registered range of a [`Backing`]: charged to an account, held, and with a place on the bus, until it is
/// dropped. Dropping it unmaps it wherever it is still mapped, and waits for operations that are at work there.
///
/// An operation that a panic of an IOMMU's driver has ended stays at work for ever where it was, since nobody knows what that
/// IOMMU's table says. So a thread that is panicking does not wait for longer than [`PANIC_PATIENCE`]: then what it drops
/// stays registered, held and charged, for the rest of the process. Other threads wait.
#[derive(Debug)]
pub struct Memory {
    backing: Arc<Backing>,
    /// In bytes of the object.
    offset: u64,
    /// Who is charged. Changes only while the backing's registrations are locked.
    payer: Mutex<Account>,
    residency: Residency,
    /// Changed while the backing's registrations are locked.
    extent: Published<Extent>,
    /// Pages before the end that are held no more, from the first time on that there are any; changed under the same
    /// lock.
    given_back: OnceLock<Box<RwLock<Coverage>>>,
    /// Where it was mapped.
    notes: Notes,
}

/// How far registered memory reaches.
#[derive(Debug)]
struct Extent {
    /// In bytes. The last one is not given back.
    length: u64,
    /// The places on the bus of the chunks it lies in.
    places: Places,
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
    /// The object was taken back from everybody.
    #[error("the object was revoked")]
    Revoked,
    /// The pages could not be brought in or locked.
    #[error(transparent)]
    Residency(#[from] ResidencyError),
    /// The file could not be examined or mapped.
    #[error("the file could not be mapped")]
    Unreachable(#[source] io::Error),
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
            HoldError::Revoked => RegisterError::Revoked,
            HoldError::Unreachable(error) => RegisterError::Unreachable(error),
        }
    }
}

/// Why a part was not given back. It is registered as before.
#[derive(Debug, thiserror::Error)]
pub enum ReleaseError {
    /// Some of it is not registered, or not any more.
    #[error("{length:#x} bytes at {offset:#x} are not all registered")]
    NotRegistered {
        /// The first byte of the memory.
        offset: u64,
        /// The length asked for.
        length: u64,
    },
    /// Only whole pages of the object can be given back.
    #[error("{length:#x} bytes at {offset:#x} do not begin and end where pages of 4 KiB do")]
    Misaligned {
        /// The first byte of the memory.
        offset: u64,
        /// The length asked for.
        length: u64,
    },
    /// A space could not unmap exactly the part. Other mappings of it may be unmapped already.
    #[error(transparent)]
    Unmap(#[from] UnmapError),
}

/// Why memory cannot be mapped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Unavailable {
    /// The object was taken back.
    Revoked,
    /// It is not that long, or was given back.
    NotRegistered,
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

impl Memory {
    /// Registers `length` bytes of the object from `offset` on.
    ///
    /// Whole 4 KiB pages are held and charged; a page that this account pays for already is not charged again.
    ///
    /// # Errors
    ///
    /// [`RegisterError`]; then nothing is charged or held.
    pub fn register(
        backing: &Arc<Backing>,
        offset: u64,
        length: u64,
        account: &Account,
    ) -> Result<Arc<Memory>, RegisterError> {
        Memory::register_resident(backing, offset, length, account, Residency::OnDemand)
    }

    /// The same, with the pages brought in or locked before this returns. The charge comes first, so nothing is brought
    /// in that may not be.
    ///
    /// # Errors
    ///
    /// [`RegisterError`]; then nothing is charged, held or locked.
    pub fn register_resident(
        backing: &Arc<Backing>,
        offset: u64,
        length: u64,
        account: &Account,
        residency: Residency,
    ) -> Result<Arc<Memory>, RegisterError> {
        if length == 0 {
            return Err(RegisterError::Empty);
        }
        let held = pages(offset, length).ok_or(RegisterError::OutOfBounds { offset, length })?;
        if !backing.reaches(offset + (length - 1)).map_err(RegisterError::Unreachable)? {
            return Err(RegisterError::OutOfBounds { offset, length });
        }
        let places = hold(backing, &mut backing.registrations(), held, account, residency)?;
        Ok(Arc::new(Memory {
            backing: backing.clone(),
            offset,
            payer: Mutex::new(account.clone()),
            residency,
            extent: Published::new(Extent { length, places }),
            given_back: OnceLock::new(),
            notes: Notes::default(),
        }))
    }

    /// How many bytes are registered, or were: to the end of the last page that was not given back.
    pub fn length(&self) -> u64 {
        self.extent.read().length
    }

    /// The object it is a part of.
    pub fn backing(&self) -> &Arc<Backing> {
        &self.backing
    }

    /// Where in the object it begins, in bytes.
    pub fn offset(&self) -> u64 {
        self.offset
    }

    /// Registers `additional` bytes behind the last, of a file that has become longer for example, charged to the same
    /// account and as resident as the rest. Mappings of what was there are not touched.
    ///
    /// Like registering, it is not to be called inside a DMA section or from a call of a
    /// [`DerivedTable`](crate::DerivedTable).
    ///
    /// # Errors
    ///
    /// [`RegisterError`]; then the memory is as long as it was.
    pub fn grow(&self, additional: u64) -> Result<(), RegisterError> {
        if additional == 0 {
            return Err(RegisterError::Empty);
        }
        let mut registrations = self.backing.registrations();
        let (length, mut places) = {
            let extent = self.extent.read();
            (extent.length, extent.places.as_slice().to_vec())
        };
        let beyond =
            RegisterError::OutOfBounds { offset: self.offset.wrapping_add(length), length: additional };
        let Some(total) = length.checked_add(additional) else { return Err(beyond) };
        let Some(all) = pages(self.offset, total) else { return Err(beyond) };
        if !self.backing.reaches(self.offset + (total - 1)).map_err(RegisterError::Unreachable)? {
            return Err(beyond);
        }
        // The last page may have been only partly used.
        let new = pages(self.offset, length).map_or(all.start, |held| held.end)..all.end;
        if new.is_empty() && self.backing.is_revoked() {
            return Err(RegisterError::Revoked);
        }
        if !new.is_empty() {
            let chunk = |page: u64| page >> (self.backing.window_bits() - PAGE_BITS);
            let known = (chunk(new.start) - chunk(all.start)) as usize;
            let added = hold(&self.backing, &mut registrations, new, &self.account(), self.residency)?;
            places.truncate(known);
            places.extend(added.as_slice());
        }
        self.extent.replace(Extent { length: total, places: places.into() });
        Ok(())
    }

    /// Gives back `length` bytes from `offset` on: what is mapped there is unmapped, exactly, unless another
    /// registration holds the same pages; and the pages are charged and held no more. The rest stays as it is, and
    /// what is given back at the end can be had again with [`grow`](Self::grow).
    ///
    /// Only whole pages of 4 KiB of the object can be given back, except at the ends of the memory. When this returns, no
    /// device reaches what was given back by a mapping of this memory.
    ///
    /// ```
    /// use ioasid::{Account, Backing, Bus, Iova, Memory, Permissions, Space};
    ///
    /// let bus = Bus::new();
    /// let account = Account::new("guest", None);
    /// let memory = Memory::register(&Backing::anonymous(&bus, 1 << 20)?, 0, 1 << 20, &account)?;
    /// let space = Space::new(&bus);
    /// space.map(Iova::new(0), &memory, 0, 1 << 20, Permissions::READ)?;
    /// memory.release(0x4000, 0x1000)?;
    /// assert_eq!(account.charged_pages(), 255);
    /// assert!(space.walk(Iova::new(0x4000)).is_none() && space.walk(Iova::new(0x5000)).is_some());
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    ///
    /// # Errors
    ///
    /// [`ReleaseError`]; then all of it is registered as before.
    pub fn release(&self, offset: u64, length: u64) -> Result<(), ReleaseError> {
        let mut registrations = self.backing.registrations();
        let whole = self.length();
        let end = offset.checked_add(length).filter(|end| length > 0 && *end <= whole);
        let end = end.ok_or(ReleaseError::NotRegistered { offset, length })?;
        let is_boundary = |byte: u64| (self.offset.wrapping_add(byte)) & ((1 << PAGE_BITS) - 1) == 0;
        if !(offset == 0 || is_boundary(offset)) || !(end == whole || is_boundary(end)) {
            return Err(ReleaseError::Misaligned { offset, length });
        }
        let going = pages(self.offset + offset, length).filter(|pages| !self.misses_any(pages));
        let going = going.ok_or(ReleaseError::NotRegistered { offset, length })?;
        self.change_holes(|holes| holes.hold(going.clone()));
        epoch::wait_for_operations();
        if let Err(error) = self.unmap(&mut registrations, slice::from_ref(&going), Effort::Exact) {
            self.change_holes(|holes| holes.release(going));
            return Err(error.into());
        }
        let_go(&self.backing, &mut registrations, going, &self.account(), self.residency);
        if end == whole {
            self.cut_end();
        }
        Ok(())
    }

    /// The end was given back: the memory ends with the last page that was not.
    fn cut_end(&self) {
        let extent = self.extent.read();
        let all = pages(self.offset, extent.length).unwrap_or(0..0);
        let end = self.held(&all).last().map_or(all.start, |part| part.end);
        let chunk = |page: u64| page >> (self.backing.window_bits() - PAGE_BITS);
        let (length, chunks) = match end > all.start {
            true => ((end << PAGE_BITS) - self.offset, (chunk(end - 1) - chunk(all.start)) as usize + 1),
            false => (0, 0),
        };
        let places = extent.places.as_slice();
        let places = places.get(..chunks).unwrap_or(places).to_vec().into();
        drop(extent);
        self.extent.replace(Extent { length, places });
        self.change_holes(|holes| holes.release(end..all.end));
    }

    /// All pages from its first to its last, by number in the object.
    pub(crate) fn pages(&self) -> Range<u64> {
        pages(self.offset, self.length()).unwrap_or_default()
    }

    /// Those of its pages that are held. They stay while the backing's registrations are locked.
    pub(crate) fn held<'a>(&self, pages: &'a Range<u64>) -> Cow<'a, [Range<u64>]> {
        match self.given_back() {
            Some(holes) => Cow::Owned(holes.divide(pages.clone(), 0).0),
            None if pages.is_empty() => Cow::Borrowed(&[]),
            None => Cow::Borrowed(slice::from_ref(pages)),
        }
    }

    /// The account that is charged. Not to be changed unless the backing's registrations are locked.
    pub(crate) fn payer(&self) -> &Mutex<Account> {
        &self.payer
    }

    /// What was given back, if ever anything was.
    fn given_back(&self) -> Option<RwLockReadGuard<'_, Coverage>> {
        self.given_back.get().map(|holes| holes.read().unwrap_or_else(PoisonError::into_inner))
    }

    /// Whether some of the pages were given back.
    fn misses_any(&self, pages: &Range<u64>) -> bool {
        self.given_back().is_some_and(|holes| !holes.is_free(pages.clone()))
    }

    fn change_holes(&self, change: impl FnOnce(&mut Coverage) -> u64) {
        let holes = self.given_back.get_or_init(Box::default);
        change(&mut holes.write().unwrap_or_else(PoisonError::into_inner));
    }

    /// Whether these bytes can be mapped. In an operation they can be for the rest of it, and the pieces stay the same; and
    /// what is mapped in it is found by whoever takes them back meanwhile.
    #[inline]
    pub(crate) fn check(&self, offset: u64, length: u64) -> Result<(), Unavailable> {
        if self.backing.is_revoked() {
            return Err(Unavailable::Revoked);
        }
        let end = offset.checked_add(length).filter(|_| length > 0);
        if end.is_none_or(|end| end > self.extent.read().length) {
            return Err(Unavailable::NotRegistered);
        }
        // Within the extent, so it is a range of pages.
        if pages(self.offset + offset, length).is_none_or(|pages| self.misses_any(&pages)) {
            return Err(Unavailable::NotRegistered);
        }
        Ok(())
    }

    /// The output address of the byte at `offset`: which byte of which object it is, whoever asks. `None` behind the end of
    /// what is registered.
    ///
    /// ```
    /// use ioasid::{Account, Backing, Bus, Memory};
    ///
    /// let bus = Bus::new();
    /// let backing = Backing::anonymous(&bus, 1 << 20)?;
    /// let account = Account::new("guest", None);
    /// let (all, tail) = (
    ///     Memory::register(&backing, 0, 1 << 20, &account)?,
    ///     Memory::register(&backing, 0x8000, 0x1000, &account)?,
    /// );
    /// assert_eq!(all.output(0x8123), tail.output(0x123));
    /// assert_eq!(tail.output(0x1000), None);
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn output(&self, offset: u64) -> Option<Oa> {
        self.first_output(offset, 1)
    }

    /// The output address of the byte at `offset`; `None` if it and the `length` bytes from it on are not registered, or are none.
    #[inline]
    pub(crate) fn first_output(&self, offset: u64, length: u64) -> Option<Oa> {
        let extent = self.extent.read();
        offset.checked_add(length.checked_sub(1)?).filter(|last| *last < extent.length)?;
        let (at, bits) = (self.offset + offset, self.backing.window_bits());
        let place = extent.places.as_slice().get(((at >> bits) - (self.offset >> bits)) as usize)?;
        Some(Oa::new(place.get() + (at & ((1 << bits) - 1))))
    }

    /// The same, if all of the bytes lie in one window of the bus: then they are one piece, and it is found without a loop.
    #[inline]
    pub(crate) fn only_output(&self, offset: u64, length: u64) -> Option<Oa> {
        let output = self.first_output(offset, length)?;
        // Registered, so neither sum overflows.
        let (first, bits) = (self.offset + offset, self.backing.window_bits());
        (first >> bits == (first + (length - 1)) >> bits).then_some(output)
    }

    /// The pieces with consecutive output addresses that `length` bytes from `offset` on consist of; `None` if
    /// that is nothing or more than what is registered.
    #[inline]
    pub(crate) fn pieces(&self, offset: u64, length: u64) -> Option<impl Iterator<Item = Piece> + '_> {
        let extent = self.extent.read();
        let last = offset.checked_add(length.checked_sub(1)?).filter(|last| *last < extent.length)?;
        Some(self.object_pieces(extent, self.offset + offset, self.offset + last))
    }

    /// The pieces of bytes of the object, all of them registered, to the last one.
    fn object_pieces<'a>(
        &self,
        extent: Reading<'a, Extent>,
        mut at: u64,
        last: u64,
    ) -> impl Iterator<Item = Piece> + use<'a> {
        let bits = self.backing.window_bits();
        let first_chunk = self.offset >> bits;
        let low = (1u64 << bits) - 1;
        let mut done = false;
        std::iter::from_fn(move || {
            if done {
                return None;
            }
            let chunk = ((at >> bits) - first_chunk) as usize;
            let place = extent.places.as_slice().get(chunk)?.get();
            let mut end = at | low;
            // A large object mostly has one window behind the other.
            let mut behind = extent.places.as_slice().iter().skip(chunk + 1);
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
        self.notes.add(space, range, self.backing.mapped_in());
    }

    /// The pieces that these pages, all of them registered, consist of, by output address.
    fn page_pieces(&self, pages: &[Range<u64>]) -> Vec<Piece> {
        let last = |page: u64| (page << PAGE_BITS) | ((1 << PAGE_BITS) - 1);
        let mut pieces = Vec::with_capacity(pages.len());
        for part in pages {
            let (first, last) = (part.start << PAGE_BITS, last(part.end - 1));
            pieces.extend(self.object_pieces(self.extent.read(), first, last));
        }
        pieces.sort_unstable_by_key(|piece| piece.oa);
        pieces
    }

    /// Unmaps the pages, all of them registered, that no other registration holds, wherever they are mapped. `false`: a
    /// deadline has passed, and they may still be mapped.
    fn unmap(
        &self,
        registrations: &mut Registrations,
        parts: &[Range<u64>],
        effort: Effort,
    ) -> Result<bool, UnmapError> {
        registrations.earlier().retain(MappedIn::is_current);
        // Mostly nothing is mapped any more.
        let pieces = self.page_pieces(parts);
        let mut notes = Vec::new();
        let mut look = |note: MappedIn| {
            if note.may_lead_to(&pieces) {
                notes.push(note);
            }
        };
        registrations.earlier().iter().cloned().for_each(&mut look);
        self.notes.for_each(self.backing.mapped_in(), look);
        if notes.is_empty() {
            return Ok(true);
        }
        let (mut ours, mut shared) = (Vec::new(), Vec::new());
        for part in parts {
            let (only_ours, others) = registrations.held_once(part.clone());
            ours.extend(only_ours);
            shared.extend(others);
        }
        let going = self.page_pieces(&ours);
        if !going.is_empty() {
            for note in &notes {
                match effort {
                    Effort::AtAnyPrice(deadline) => {
                        if !note.unmap(&going, deadline) {
                            return Ok(false);
                        }
                    }
                    Effort::Exact => {
                        if let Some(space) = note.space.upgrade() {
                            space.unmap_outputs_exactly(note.hull, &going)?;
                        }
                    }
                }
            }
        }
        // Pages that others hold stay mapped where we mapped them. The last of the others will need to know; but a note
        // less is a space less that they have to look through.
        let staying = self.page_pieces(&shared);
        for note in notes {
            if !staying.is_empty() && note.may_lead_to(&staying) {
                note.add_to(registrations.earlier());
            }
        }
        Ok(true)
    }
}

/// How long a thread that is panicking waits for operations that are at work where its memory may be mapped.
pub const PANIC_PATIENCE: Duration = Duration::from_millis(100);

/// What is done when exactly the pages cannot be unmapped.
#[derive(Clone, Copy)]
enum Effort {
    /// Nothing.
    Exact,
    /// More is unmapped; until a deadline, if there is one.
    AtAnyPrice(Option<Instant>),
}

/// Charges and holds pages and makes them resident, all or nothing. Returns the places of their chunks.
fn hold(
    backing: &Backing,
    registrations: &mut Registrations,
    pages: Range<u64>,
    account: &Account,
    residency: Residency,
) -> Result<Places, RegisterError> {
    let places = backing.hold(registrations, pages.clone(), account)?;
    if let Err(error) = backing.make_resident(registrations, pages.clone(), residency) {
        backing.release(registrations, pages, account);
        return Err(error.into());
    }
    Ok(places)
}

/// Holds the pages no longer.
fn let_go(
    backing: &Backing,
    registrations: &mut Registrations,
    pages: Range<u64>,
    account: &Account,
    residency: Residency,
) {
    backing.leave_resident(registrations, pages.clone(), residency);
    backing.release(registrations, pages, account);
}

impl Drop for Memory {
    fn drop(&mut self) {
        let mut registrations = self.backing.registrations();
        let pages = self.pages();
        let parts = self.held(&pages);
        let deadline = std::thread::panicking().then(|| Instant::now() + PANIC_PATIENCE);
        // Unmapping at any price does not fail; but what may still be mapped must not go.
        if let Ok(false) = self.unmap(&mut registrations, &parts, Effort::AtAnyPrice(deadline)) {
            return;
        }
        let account = self.payer.get_mut().unwrap_or_else(PoisonError::into_inner);
        for part in parts.iter() {
            let_go(&self.backing, &mut registrations, part.clone(), account, self.residency);
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
            assert!(backing.registrations().earlier().is_empty());
        }
        for round in 0..10 {
            space.map(Iova::new(round * PAGE), &register(), 0, PAGE, Permissions::READ).unwrap();
        }
        let notes: Vec<IovaRange> = backing.registrations().earlier().iter().map(|note| note.hull).collect();
        assert_eq!(notes, [IovaRange::with_length(0, 10 * PAGE).unwrap()]);
        drop(stays);
        assert!(backing.registrations().earlier().is_empty() && space.leaves(IovaRange::ALL).is_empty());
    }
}
