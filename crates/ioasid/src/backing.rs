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
use crate::coverage::Coverage;
use crate::epoch::Replaced;
use crate::host_memory::HostMemory;
use crate::ledger::{Account, OverLimit};
use crate::memory::MappedIn;
use ioasid_pagetable::Oa;
use std::collections::{BTreeMap, HashMap};
use std::fmt;
use std::io;
use std::ops::{Range, RangeInclusive};
use std::ptr::NonNull;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

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
    itself: Weak<Backing>,
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

#[derive(Debug, Default)]
struct Books {
    /// How many registrations hold each page.
    holds: Coverage,
    /// The same for each account that pays for some of them.
    charges: HashMap<u64, Coverage>,
    /// The windows in use, by number of the chunk of the object.
    windows: BTreeMap<u64, PlacedWindow>,
}

#[derive(Debug)]
struct PlacedWindow {
    oa: Oa,
    /// How many registrations reach into it.
    registrations: u64,
}

/// Why nothing was held.
#[derive(Debug)]
pub(crate) enum HoldError {
    OverLimit(OverLimit),
    BusFull,
}

impl From<BusFull> for HoldError {
    fn from(_: BusFull) -> HoldError {
        HoldError::BusFull
    }
}

impl Backing {
    fn new(bus: &Arc<Bus>, source: Source, length: Option<u64>) -> Arc<Backing> {
        let books = Mutex::new(Books::default());
        Arc::new_cyclic(|itself| Backing {
            itself: itself.clone(),
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
    pub fn holds(&self, offset: u64, length: u64) -> RangeInclusive<u32> {
        pages(offset, length).map_or(0..=0, |pages| self.books().holds.least_and_most(pages))
    }

    fn books(&self) -> MutexGuard<'_, Books> {
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

    /// Charges pages that the account does not pay for yet, holds all of them, and gives each chunk its place on
    /// the bus. All or nothing.
    pub(crate) fn hold(&self, held: Range<u64>, account: &Account) -> Result<Vec<Oa>, HoldError> {
        let bits = self.window_bits();
        let needed = chunks(&held, bits);
        if needed.end - needed.start > CHUNKS {
            return Err(HoldError::BusFull);
        }
        let mut books = self.books();
        let Books { charges, windows, holds } = &mut *books;
        let charge = charges.entry(account.id()).or_default();
        let unpaid = charge.held_exactly(held.clone(), 0).map(|part| part.end - part.start).sum();
        if let Err(error) = account.charge(unpaid) {
            if charge.is_empty() {
                charges.remove(&account.id());
            }
            return Err(HoldError::OverLimit(error));
        }
        charge.hold(held.clone());
        let mut places = Vec::new();
        for chunk in needed.clone() {
            let placed = match windows.get_mut(&chunk) {
                Some(window) => {
                    window.registrations += 1;
                    Ok(window.oa)
                }
                None => {
                    let (source, backing) = (self.source.clone(), self.itself.clone());
                    let window = Window { source, backing, offset: chunk << bits };
                    self.bus.add_window(bits, window).inspect(|&oa| {
                        windows.insert(chunk, PlacedWindow { oa, registrations: 1 });
                    })
                }
            };
            match placed {
                Ok(oa) => places.push(oa),
                Err(error) => {
                    let placed = needed.start..needed.start + places.len() as u64;
                    Replaced::drop_all(self.leave_windows(windows, placed));
                    charge.release(held);
                    if charge.is_empty() {
                        charges.remove(&account.id());
                    }
                    account.credit(unpaid);
                    return Err(error.into());
                }
            }
        }
        holds.hold(held);
        Ok(places)
    }

    /// Those of the pages that this is the only registration to hold, and the others.
    pub(crate) fn held_once(&self, held: Range<u64>) -> (Vec<Range<u64>>, Vec<Range<u64>>) {
        let books = self.books();
        let mut next = held.start;
        let mut others = Vec::new();
        let ours: Vec<Range<u64>> = books.holds.held_exactly(held.clone(), 1).collect();
        for part in &ours {
            if next < part.start {
                others.push(next..part.start);
            }
            next = part.end;
        }
        if next < held.end {
            others.push(next..held.end);
        }
        (ours, others)
    }

    /// Undoes [`hold`](Self::hold). Returns whether anything of the object is still held.
    pub(crate) fn release(&self, held: Range<u64>, account: &Account) -> bool {
        let mut books = self.books();
        let Books { charges, windows, holds } = &mut *books;
        holds.release(held.clone());
        if let Some(charge) = charges.get_mut(&account.id()) {
            let paid = charge.held_exactly(held.clone(), 1).map(|part| part.end - part.start).sum();
            charge.release(held.clone());
            if charge.is_empty() {
                charges.remove(&account.id());
            }
            account.credit(paid);
        }
        let gone = self.leave_windows(windows, chunks(&held, self.window_bits()));
        let others = !holds.is_empty();
        drop(books);
        // All mappings have gone before, but who asks for an address that no table gave is no reason to touch memory
        // that is about to be its owner's again.
        Replaced::drop_all(gone);
        others
    }

    /// Gives back the windows that nobody needs any more.
    fn leave_windows(
        &self,
        windows: &mut BTreeMap<u64, PlacedWindow>,
        chunks: Range<u64>,
    ) -> Vec<Replaced<Window>> {
        let mut gone = Vec::new();
        for chunk in chunks {
            let Some(window) = windows.get_mut(&chunk) else { continue };
            window.registrations -= 1;
            if window.registrations == 0 {
                gone.extend(self.bus.remove_window(window.oa));
                windows.remove(&chunk);
            }
        }
        gone
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
