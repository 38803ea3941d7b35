//! Objects that memory comes from.
//!
//! A [`Backing`] is something whose pages have an identity of their own: a memfd, the private memory of one process,
//! a piece of this process. One module below for each kind says how its bytes are reached. The backing knows which of its pages are registered, who pays for them, and at which output
//! addresses they stand. Registering is [`Memory`](crate::Memory)'s part; the books are kept here, because two
//! registrations of the same page must find each other.
//!
//! Memory that this process can reach by pointer is copied directly. Everything else is *late-bound*
//! ([`LateBound`]): the bytes are fetched by calls at the time of the access, which fail cleanly when the memory
//! is gone.
//!
//! # Revoking
//!
//! The owner of an object can take it back from everybody ([`Backing::revoke`]), as the exporter of a dma-buf does. Each
//! window of the object on the bus has a flag for that, which every DMA reads anyway on its way, so the memory is out
//! of reach at once and in every table, software's or hardware's, before anything has been unmapped. Only then
//! the spaces in which the memory is known to be are gone through. From the flag on nothing can be registered, mapped
//! or grown, so there is nothing to race with: what was under way is waited for, and then what it left is unmapped.

use crate::bus::{Bus, BusFull, CHUNK_BITS, CHUNKS, Identity, SMALLEST_WINDOW_BITS, Window};
use crate::epoch::Replaced;
use crate::host_memory::HostMemory;
use crate::ledger::charges::Charges;
use crate::ledger::{Account, OverLimit};
use crate::memory::Registrations;
use crate::sync::{AtomicBool, Mutex, MutexGuard, PoisonError};
use file::MappedFile;
use ioasid_pagetable::Oa;
use std::collections::BTreeMap;
use std::io;
use std::ops::{Range, RangeInclusive};
use std::sync::{Arc, Weak};

mod anonymous;
mod file;
#[cfg(feature = "vm-memory")]
mod guest;
mod host;
mod late;
mod resident;
mod revoke;

pub use file::FileError;
#[cfg(feature = "vm-memory")]
pub use guest::RegionError;
pub use late::{LateBound, MemoryGone};
pub use resident::{Residency, ResidencyError};

/// Pages are what is held and charged: 4 KiB, whatever the granule of a space.
pub(crate) const PAGE_BITS: u32 = 12;

/// Where the bytes of a window are.
#[derive(Debug)]
pub(crate) enum Source {
    Host(HostMemory),
    Late(Arc<dyn LateBound>),
}

/// Where the bytes of an object are.
#[derive(Debug)]
enum Bytes {
    /// In one place.
    Whole {
        source: Arc<Source>,
        /// For an object that never grows.
        length: Option<u64>,
    },
    /// In a file that is mapped window by window.
    File {
        file: Arc<MappedFile>,
        /// What reaches them if plain copies would be at somebody's mercy.
        calls: Option<Arc<Source>>,
    },
}

/// An object whose pages have an identity.
#[derive(Debug)]
pub struct Backing {
    itself: Weak<Backing>,
    bus: Arc<Bus>,
    bytes: Bytes,
    /// What finds it on the bus, so that the same object is never made twice.
    identity: Option<Identity>,
    /// Set for ever, under the lock of the books.
    revoked: AtomicBool,
    /// Held while memory is registered or released, so that a page that is just being unmapped for its last
    /// registration is not registered and mapped anew before that has happened. Guards where its pages may be mapped.
    registering: Mutex<Registrations>,
    books: Mutex<Books>,
}

/// What is registered of an object.
#[derive(Debug, Default)]
pub(crate) struct Books {
    /// How many registrations hold each page, and who pays for it.
    charges: Charges,
    /// The windows in use, by number of the chunk of the object: those in which a page is held.
    windows: BTreeMap<u64, Oa>,
}

impl Books {
    /// Who pays for which pages.
    pub(crate) fn charges(&mut self) -> &mut Charges {
        &mut self.charges
    }
}

/// The places on the bus of consecutive chunks of an object. Most registrations lie in one.
#[derive(Debug)]
pub(crate) enum Places {
    One([Oa; 1]),
    Several(Box<[Oa]>),
}

impl Places {
    pub(crate) fn as_slice(&self) -> &[Oa] {
        match self {
            Places::One(place) => place,
            Places::Several(places) => places,
        }
    }
}

impl From<Vec<Oa>> for Places {
    fn from(places: Vec<Oa>) -> Places {
        match places[..] {
            [place] => Places::One([place]),
            _ => Places::Several(places.into_boxed_slice()),
        }
    }
}

/// Why nothing was held.
#[derive(Debug)]
pub(crate) enum HoldError {
    OverLimit(OverLimit),
    BusFull,
    /// The object was taken back.
    Revoked,
    /// The file could not be mapped.
    Unreachable(io::Error),
}

impl From<OverLimit> for HoldError {
    fn from(error: OverLimit) -> HoldError {
        HoldError::OverLimit(error)
    }
}

impl From<BusFull> for HoldError {
    fn from(_: BusFull) -> HoldError {
        HoldError::BusFull
    }
}

impl Backing {
    fn new(bus: &Arc<Bus>, bytes: Bytes, identity: Option<Identity>) -> Arc<Backing> {
        Arc::new_cyclic(|itself| Backing {
            itself: itself.clone(),
            bus: bus.clone(),
            bytes,
            identity,
            revoked: AtomicBool::new(false),
            registering: Mutex::default(),
            books: Mutex::default(),
        })
    }

    /// An object whose bytes are all in one place.
    fn whole(bus: &Arc<Bus>, source: Source, length: Option<u64>) -> Arc<Backing> {
        Backing::new(bus, Bytes::Whole { source: Arc::new(source), length }, None)
    }

    /// The bus on which its pages stand.
    pub fn bus(&self) -> &Arc<Bus> {
        &self.bus
    }

    /// The size in bytes of an object that has one; of a file, when somebody last looked.
    pub fn length(&self) -> Option<u64> {
        match &self.bytes {
            Bytes::Whole { length, .. } => *length,
            Bytes::File { file, .. } => Some(file.size()),
        }
    }

    /// The size in bytes of the pages that its memory consists of: 4 KiB, or that of the huge pages of a hugetlb file.
    pub fn page_size(&self) -> u64 {
        match &self.bytes {
            Bytes::Whole { .. } => 1 << PAGE_BITS,
            Bytes::File { file, .. } => file.page_size(),
        }
    }

    /// Whether DMA copies its bytes directly. If not, each access is a call that may block and that fails cleanly.
    pub fn is_direct(&self) -> bool {
        match &self.bytes {
            Bytes::Whole { source, .. } => matches!(&**source, Source::Host(_)),
            Bytes::File { calls, .. } => calls.is_none(),
        }
    }

    /// Whether it has this byte. Looks whether a file has grown, if it matters.
    pub(crate) fn reaches(&self, last: u64) -> io::Result<bool> {
        match &self.bytes {
            Bytes::Whole { length, .. } => Ok(length.is_none_or(|length| last < length)),
            Bytes::File { file, .. } => file.reaches(last),
        }
    }

    /// Reads as the CPU does, past all tables.
    pub fn read(&self, offset: u64, buffer: &mut [u8]) -> Result<(), MemoryGone> {
        if self.is_revoked() {
            return Err(MemoryGone { offset });
        }
        match &self.bytes {
            Bytes::Whole { source, .. } => match &**source {
                Source::Host(memory) => memory.read(offset, buffer).ok_or(MemoryGone { offset }),
                Source::Late(access) => access.read(offset, buffer),
            },
            Bytes::File { file, calls } => file.read(offset, buffer, calls.is_some()),
        }
    }

    /// Writes as the CPU does, past all tables.
    pub fn write(&self, offset: u64, bytes: &[u8]) -> Result<(), MemoryGone> {
        if self.is_revoked() {
            return Err(MemoryGone { offset });
        }
        match &self.bytes {
            Bytes::Whole { source, .. } => match &**source {
                Source::Host(memory) => memory.write(offset, bytes).ok_or(MemoryGone { offset }),
                Source::Late(access) => access.write(offset, bytes),
            },
            Bytes::File { file, calls } => file.write(offset, bytes, calls.is_some()),
        }
    }

    /// The fewest and the most registrations that hold a page of these bytes.
    pub fn holds(&self, offset: u64, length: u64) -> RangeInclusive<u64> {
        let pages = pages(offset, length).unwrap_or_default();
        let (least, most) = self.books().charges.least_and_most(pages);
        least..=most
    }

    /// What is registered of it, locked.
    pub(crate) fn books(&self) -> MutexGuard<'_, Books> {
        self.books.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes the right to register or release.
    pub(crate) fn registering(&self) -> MutexGuard<'_, Registrations> {
        self.registering.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Logarithm of the bytes that one window of this object has.
    pub(crate) fn window_bits(&self) -> u32 {
        match &self.bytes {
            Bytes::Whole { length, .. } => window_bits(*length),
            Bytes::File { file, .. } => file.window_bits(),
        }
    }

    /// What stands at the bus in the window of a chunk.
    fn window(&self, chunk: u64) -> Result<Window, HoldError> {
        let start = chunk << self.window_bits();
        let (source, offset) = match &self.bytes {
            Bytes::Whole { source, .. } => (source.clone(), start),
            Bytes::File { calls: Some(calls), .. } => (calls.clone(), start),
            Bytes::File { file, calls: None } => (file.window(chunk).map_err(HoldError::Unreachable)?, 0),
        };
        let backing = self.itself.clone();
        Ok(Window { source, backing, start, offset, revoked: AtomicBool::new(false) })
    }

    /// Charges pages that the account and those above it do not pay for yet, holds all of them, and gives each chunk its
    /// place on the bus. All or nothing.
    pub(crate) fn hold(&self, held: Range<u64>, account: &Account) -> Result<Places, HoldError> {
        let needed = chunks(&held, self.window_bits());
        if needed.end - needed.start > CHUNKS {
            return Err(HoldError::BusFull);
        }
        let mut books = self.books();
        if self.is_revoked() {
            return Err(HoldError::Revoked);
        }
        let Books { charges, windows } = &mut *books;
        charges.hold(held.clone(), account);
        let placed = account.charge(charges.changed(account), || self.enter_windows(windows, needed.clone()));
        if placed.is_err() {
            charges.release(held, account);
            charges.forget(account);
            // Some windows may have been made before the one that could not.
            Replaced::drop_all(self.leave_windows(windows, charges, needed));
        }
        placed
    }

    /// Finds or makes a window for each of the chunks. What was made before one that cannot be made stays.
    fn enter_windows(
        &self,
        windows: &mut BTreeMap<u64, Oa>,
        chunks: Range<u64>,
    ) -> Result<Places, HoldError> {
        let bits = self.window_bits();
        let mut enter = |chunk| match windows.get(&chunk) {
            Some(&oa) => Ok(oa),
            None => {
                let oa = self.bus.add_window(bits, self.window(chunk)?)?;
                windows.insert(chunk, oa);
                Ok(oa)
            }
        };
        if chunks.end - chunks.start == 1 {
            return Ok(Places::One([enter(chunks.start)?]));
        }
        Ok(Places::Several(chunks.map(enter).collect::<Result<_, HoldError>>()?))
    }

    /// Those of the pages that this is the only registration to hold, and the others.
    pub(crate) fn held_once(&self, held: Range<u64>) -> (Vec<Range<u64>>, Vec<Range<u64>>) {
        self.books().charges.held_once(held)
    }

    /// Undoes [`hold`](Self::hold). Returns whether anything of the object is still held.
    pub(crate) fn release(&self, held: Range<u64>, account: &Account) -> bool {
        let mut books = self.books();
        let Books { charges, windows } = &mut *books;
        charges.release(held.clone(), account);
        account.credit(charges.changed(account));
        charges.forget(account);
        let gone = self.leave_windows(windows, charges, chunks(&held, self.window_bits()));
        let others = !charges.is_empty();
        drop(books);
        // All mappings have gone before, but who asks for an address that no table gave is no reason to touch memory
        // that is about to be its owner's again.
        Replaced::drop_all(gone);
        others
    }

    /// Gives back the windows in which nothing is held any more; whether there were any.
    fn leave_windows(
        &self,
        windows: &mut BTreeMap<u64, Oa>,
        charges: &Charges,
        chunks: Range<u64>,
    ) -> Vec<Replaced<Window>> {
        let mut gone = Vec::new();
        let shift = self.window_bits() - PAGE_BITS;
        for chunk in chunks {
            // Pages are numbered below 2^52, so the end of the last chunk does not overflow.
            if charges.is_free(chunk << shift..(chunk + 1) << shift) {
                if let Some(oa) = windows.remove(&chunk) {
                    gone.extend(self.bus.remove_window(oa));
                }
            }
        }
        gone
    }
}

impl Drop for Backing {
    fn drop(&mut self) {
        if let Some(identity) = &self.identity {
            self.bus.forget(identity);
        }
    }
}

/// Logarithm of the bytes that one window has of an object of a length for ever, or of one that may grow.
fn window_bits(length: Option<u64>) -> u32 {
    match length {
        Some(length) if length <= 1 << CHUNK_BITS => {
            length.max(1).next_power_of_two().trailing_zeros().max(SMALLEST_WINDOW_BITS)
        }
        _ => CHUNK_BITS,
    }
}

/// The pages that the bytes touch, by number; `None` for no bytes, or past the end of all things.
pub(crate) fn pages(offset: u64, length: u64) -> Option<Range<u64>> {
    let last = offset.checked_add(length.checked_sub(1)?)?;
    Some(offset >> PAGE_BITS..(last >> PAGE_BITS) + 1)
}

/// The numbers of the chunks that the pages lie in.
fn chunks(pages: &Range<u64>, window_bits: u32) -> Range<u64> {
    let shift = window_bits - PAGE_BITS;
    pages.start >> shift..((pages.end - 1) >> shift) + 1
}
