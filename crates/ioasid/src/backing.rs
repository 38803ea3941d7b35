//! Objects that memory comes from.
//!
//! A [`Backing`] is something whose pages have an identity of their own: a memfd, the private memory of one process,
//! a piece of this process. It knows which of its pages are registered, who pays for them, and at which output
//! addresses they stand. Registering is [`Memory`](crate::Memory)'s part; the books are kept here, because two
//! registrations of the same page must find each other.
//!
//! Memory that this process can reach by pointer is copied directly. Everything else is *late-bound*
//! ([`LateBound`]): the bytes are fetched by calls at the time of the access, which fail cleanly when the memory
//! is gone.

use crate::bus::{Bus, BusFull, CHUNK_BITS, CHUNKS, SMALLEST_WINDOW_BITS, Window};
use crate::epoch;
use crate::host_memory::HostMemory;
use crate::ledger::charges::Charges;
use crate::ledger::{Account, OverLimit};
use crate::mapped_in::MappedIn;
use ioasid_pagetable::Oa;
use std::collections::BTreeMap;
use std::fmt;
use std::io;
use std::ops::{Range, RangeInclusive};
use std::ptr::NonNull;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// Pages are what is held and charged: 4 KiB, whatever the granule of a space.
pub(crate) const PAGE_BITS: u32 = 12;

/// The memory is not there (any more): the process has ended, the file was truncated.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the memory at offset {offset:#x} of its object is gone")]
pub struct MemoryGone {
    /// Where in the object, in bytes.
    pub offset: u64,
}

/// Memory that is not mapped in this process and is reached by copying calls, which may block.
///
/// After an unmap has returned, no call for the unmapped bytes is running.
pub trait LateBound: Send + Sync + fmt::Debug {
    /// Copies `buffer.len()` bytes from `offset` on; all of them, or it is an error.
    fn read(&self, offset: u64, buffer: &mut [u8]) -> Result<(), MemoryGone>;

    /// Copies `bytes` to `offset`. On an error some of them may have been written.
    fn write(&self, offset: u64, bytes: &[u8]) -> Result<(), MemoryGone>;
}

/// Where the bytes are.
#[derive(Debug)]
pub(crate) enum Source {
    Host(HostMemory),
    Late(Arc<dyn LateBound>),
}

/// An object whose pages have an identity.
#[derive(Debug)]
pub struct Backing {
    bus: Arc<Bus>,
    source: Arc<Source>,
    /// For an object that never grows.
    length: Option<u64>,
    /// Held while memory is registered or released, so that a page that is just being unmapped for its last
    /// registration is not registered and mapped anew before that has happened. Guards where pages may be mapped
    /// on behalf of registrations that are gone.
    registering: Mutex<Vec<MappedIn>>,
    books: Mutex<Books>,
}

/// What is registered of an object.
#[derive(Debug, Default)]
pub(crate) struct Books {
    /// How many registrations hold each page, and who pays for it.
    charges: Charges,
    /// The windows in use, by number of the chunk of the object.
    windows: BTreeMap<u64, PlacedWindow>,
}

impl Books {
    /// Who pays for which pages.
    pub(crate) fn charges(&mut self) -> &mut Charges {
        &mut self.charges
    }
}

#[derive(Debug)]
struct PlacedWindow {
    oa: Oa,
    /// How many registrations reach into it.
    registrations: u64,
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

/// Why nothing was held.
#[derive(Debug)]
pub(crate) enum HoldError {
    OverLimit(OverLimit),
    BusFull,
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
    fn new(bus: &Arc<Bus>, source: Source, length: Option<u64>) -> Arc<Backing> {
        let books = Mutex::new(Books::default());
        Arc::new(Backing {
            bus: bus.clone(),
            source: Arc::new(source),
            length,
            registering: Mutex::default(),
            books,
        })
    }

    /// An object that is reached by calls; it has no end.
    pub fn late_bound(bus: &Arc<Bus>, access: Arc<dyn LateBound>) -> Arc<Backing> {
        Backing::new(bus, Source::Late(access), None)
    }

    /// `length` bytes of fresh zeroed memory of this process. Its pages come when they are touched.
    pub fn anonymous(bus: &Arc<Bus>, length: u64) -> io::Result<Arc<Backing>> {
        Ok(Backing::new(bus, Source::Host(HostMemory::anonymous(length)?), Some(length)))
    }

    /// `length` bytes of this process's memory that belong to the caller.
    ///
    /// # Safety
    ///
    /// The memory stays valid for reads and writes until the backing and all that was registered of it are
    /// dropped. As long as a device can reach it, nobody holds a Rust reference to it.
    pub unsafe fn host(bus: &Arc<Bus>, pointer: NonNull<u8>, length: u64) -> Arc<Backing> {
        // SAFETY: passed on to the caller.
        let memory = unsafe { HostMemory::new(pointer, length) };
        Backing::new(bus, Source::Host(memory), Some(length))
    }

    /// The bus on which its pages stand.
    pub fn bus(&self) -> &Arc<Bus> {
        &self.bus
    }

    /// The size in bytes of an object that has one.
    pub fn length(&self) -> Option<u64> {
        self.length
    }

    /// Reads as the CPU does, past all tables.
    pub fn read(&self, offset: u64, buffer: &mut [u8]) -> Result<(), MemoryGone> {
        match &*self.source {
            Source::Host(memory) => memory.read(offset, buffer).ok_or(MemoryGone { offset }),
            Source::Late(access) => access.read(offset, buffer),
        }
    }

    /// Writes as the CPU does, past all tables.
    pub fn write(&self, offset: u64, bytes: &[u8]) -> Result<(), MemoryGone> {
        match &*self.source {
            Source::Host(memory) => memory.write(offset, bytes).ok_or(MemoryGone { offset }),
            Source::Late(access) => access.write(offset, bytes),
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
    pub(crate) fn registering(&self) -> MutexGuard<'_, Vec<MappedIn>> {
        self.registering.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Logarithm of the bytes that one window of this object has.
    pub(crate) fn window_bits(&self) -> u32 {
        match self.length {
            Some(length) if length <= 1 << CHUNK_BITS => {
                length.max(1).next_power_of_two().trailing_zeros().max(SMALLEST_WINDOW_BITS)
            }
            _ => CHUNK_BITS,
        }
    }

    /// Charges pages that the account and those above it do not pay for yet, holds all of them, and gives each chunk its
    /// place on the bus. All or nothing.
    pub(crate) fn hold(&self, held: Range<u64>, account: &Account) -> Result<Places, HoldError> {
        let needed = chunks(&held, self.window_bits());
        if needed.end - needed.start > CHUNKS {
            return Err(HoldError::BusFull);
        }
        let mut books = self.books();
        let Books { charges, windows } = &mut *books;
        charges.hold(held.clone(), account);
        let placed = account.charge(charges.changed(account), || self.enter_windows(windows, needed));
        if placed.is_err() {
            charges.release(held, account);
            charges.forget(account);
        }
        placed
    }

    /// Those of the pages that this is the only registration to hold, and the others.
    pub(crate) fn held_once(&self, held: Range<u64>) -> (Vec<Range<u64>>, Vec<Range<u64>>) {
        self.books().charges.held_once(held)
    }

    /// Undoes [`hold`](Self::hold). Returns whether anything of the object is still held.
    pub(crate) fn release(&self, held: Range<u64>, account: &Account) -> bool {
        let mut books = self.books();
        let Books { charges, windows } = &mut *books;
        let gone = self.leave_windows(windows, chunks(&held, self.window_bits()));
        charges.release(held, account);
        account.credit(charges.changed(account));
        charges.forget(account);
        let others = !charges.is_empty();
        drop(books);
        if gone && matches!(&*self.source, Source::Host(memory) if memory.is_borrowed()) {
            // All mappings have gone before, but who asks for an address that no table gave is no reason to touch
            // memory that is about to be its owner's again.
            epoch::wait_for_dma();
        }
        others
    }

    /// Finds or makes a window for each of the chunks. All or nothing.
    fn enter_windows(
        &self,
        windows: &mut BTreeMap<u64, PlacedWindow>,
        chunks: Range<u64>,
    ) -> Result<Places, HoldError> {
        if chunks.end - chunks.start == 1 {
            return Ok(Places::One([self.enter_window(windows, chunks.start)?]));
        }
        let mut places = Vec::new();
        for chunk in chunks.clone() {
            match self.enter_window(windows, chunk) {
                Ok(oa) => places.push(oa),
                Err(error) => {
                    self.leave_windows(windows, chunks.start..chunk);
                    return Err(error.into());
                }
            }
        }
        Ok(Places::Several(places.into_boxed_slice()))
    }

    fn enter_window(&self, windows: &mut BTreeMap<u64, PlacedWindow>, chunk: u64) -> Result<Oa, BusFull> {
        if let Some(window) = windows.get_mut(&chunk) {
            window.registrations += 1;
            return Ok(window.oa);
        }
        let bits = self.window_bits();
        let oa = self.bus.add_window(bits, Window { source: self.source.clone(), offset: chunk << bits })?;
        windows.insert(chunk, PlacedWindow { oa, registrations: 1 });
        Ok(oa)
    }

    /// Gives back the windows that nobody needs any more; whether there were any.
    fn leave_windows(&self, windows: &mut BTreeMap<u64, PlacedWindow>, chunks: Range<u64>) -> bool {
        let before = windows.len();
        for chunk in chunks {
            let Some(window) = windows.get_mut(&chunk) else { continue };
            window.registrations -= 1;
            if window.registrations == 0 {
                self.bus.remove_window(window.oa);
                windows.remove(&chunk);
            }
        }
        windows.len() < before
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
