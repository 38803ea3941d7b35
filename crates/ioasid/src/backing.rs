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
use crate::ledger::coverage::Coverage;
use crate::ledger::{Account, OverLimit};
use crate::mapped_in::{MappedIn, Spaces};
use crate::space::Space;
use crate::sync::{AtomicBool, Mutex, MutexGuard, PoisonError};
use file::MappedFile;
use ioasid_pagetable::{IovaRange, Oa};
use std::collections::BTreeMap;
use std::collections::btree_map::Entry;
use std::io;
use std::ops::{Range, RangeInclusive};
use std::sync::{Arc, Weak};

mod anonymous;
mod file;
#[cfg(feature = "vm-memory")]
mod guest;
mod host;
mod late;
mod place;
mod resident;
mod revoke;

pub use file::FileError;
#[cfg(feature = "vm-memory")]
pub use guest::RegionError;
pub use late::{LateBound, MemoryGone};
pub use place::BackingFile;
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
    /// Set for ever. Its windows on the bus look at it, too.
    revoked: Arc<AtomicBool>,
    /// Where any page of it was ever mapped by way of a registration.
    mapped_in: Spaces,
    /// Held while memory is registered or released, so that a page that is just being unmapped for its last
    /// registration is not registered and mapped anew before that has happened.
    registrations: Mutex<Registrations>,
}

/// What is registered of an object.
#[derive(Debug, Default)]
pub(crate) struct Registrations {
    /// How many registrations hold each page, and who pays for it.
    charges: Charges,
    /// The windows in use, by number of the chunk of the object: those in which a page is held.
    windows: BTreeMap<u64, Occupied>,
    /// Where pages may be mapped on behalf of registrations that do not hold them any more.
    earlier: Vec<MappedIn>,
    /// How many registrations want each page locked.
    locked: Coverage,
}

/// A window in use.
#[derive(Debug)]
struct Occupied {
    oa: Oa,
    /// How many pages are held in it, each as often as it is.
    holds: u64,
}

impl Registrations {
    /// Who pays for which pages.
    pub(crate) fn charges(&mut self) -> &mut Charges {
        &mut self.charges
    }

    /// Those of the pages that this is the only registration to hold, and the others.
    pub(crate) fn held_once(&self, held: Range<u64>) -> (Vec<Range<u64>>, Vec<Range<u64>>) {
        self.charges.held_once(held)
    }

    /// Where pages may be mapped on behalf of registrations that do not hold them any more.
    pub(crate) fn earlier(&mut self) -> &mut Vec<MappedIn> {
        &mut self.earlier
    }

    /// Adds a note that memory of the object is about to be mapped there on behalf of no registration in particular.
    pub(crate) fn note(&mut self, space: &Arc<Space>, hull: IovaRange) {
        MappedIn { space: Arc::downgrade(space), hull }.add_to(&mut self.earlier);
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
            revoked: Arc::default(),
            mapped_in: Spaces::default(),
            registrations: Mutex::default(),
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

    /// The fewest and the most registrations that hold a page of these bytes. Waits for a release that is under way.
    pub fn holds(&self, offset: u64, length: u64) -> RangeInclusive<u64> {
        let pages = pages(offset, length).unwrap_or_default();
        let (least, most) = self.registrations().charges.least_and_most(pages);
        least..=most
    }

    /// What is registered of it, with the right to register or release.
    pub(crate) fn registrations(&self) -> MutexGuard<'_, Registrations> {
        self.registrations.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Where any page of it was ever mapped by way of a registration.
    pub(crate) fn mapped_in(&self) -> &Spaces {
        &self.mapped_in
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
        let (backing, revoked) = (self.itself.clone(), self.revoked.clone());
        Ok(Window { source, backing, start, offset, revoked })
    }

    /// Charges pages that the account and those above it do not pay for yet, holds all of them, and gives each chunk its
    /// place on the bus. All or nothing.
    pub(crate) fn hold(
        &self,
        registrations: &mut Registrations,
        held: Range<u64>,
        account: &Account,
    ) -> Result<Places, HoldError> {
        let needed = chunks(&held, self.window_bits());
        if needed.end - needed.start > CHUNKS {
            return Err(HoldError::BusFull);
        }
        if self.is_revoked() {
            return Err(HoldError::Revoked);
        }
        let Registrations { charges, windows, .. } = registrations;
        charges.hold(held.clone(), account);
        let placed = account.charge(charges.changed(account), || self.enter_windows(windows, &held));
        if placed.is_err() {
            charges.release(held, account);
            charges.forget(account);
        }
        placed
    }

    /// Finds or makes a window for each of the chunks that the pages lie in; all or none.
    fn enter_windows(
        &self,
        windows: &mut BTreeMap<u64, Occupied>,
        held: &Range<u64>,
    ) -> Result<Places, HoldError> {
        let bits = self.window_bits();
        let mut enter = |chunk| -> Result<Oa, HoldError> {
            let pages = pages_in(chunk, held, bits);
            match windows.entry(chunk) {
                Entry::Occupied(window) => {
                    let window = window.into_mut();
                    window.holds += pages;
                    Ok(window.oa)
                }
                Entry::Vacant(place) => {
                    let oa = self.bus.add_window(bits, self.window(chunk)?)?;
                    Ok(place.insert(Occupied { oa, holds: pages }).oa)
                }
            }
        };
        let chunks = chunks(held, bits);
        if chunks.end - chunks.start == 1 {
            return Ok(Places::One([enter(chunks.start)?]));
        }
        let mut places = Vec::with_capacity((chunks.end - chunks.start) as usize);
        for chunk in chunks {
            match enter(chunk) {
                Ok(oa) => places.push(oa),
                Err(error) => {
                    let entered = held.start..(chunk << (bits - PAGE_BITS)).max(held.start);
                    Replaced::drop_all(self.leave_windows(windows, &entered));
                    return Err(error);
                }
            }
        }
        Ok(places.into())
    }

    /// Undoes [`hold`](Self::hold).
    pub(crate) fn release(&self, registrations: &mut Registrations, held: Range<u64>, account: &Account) {
        let Registrations { charges, windows, earlier, .. } = registrations;
        charges.release(held.clone(), account);
        account.credit(charges.changed(account));
        charges.forget(account);
        if charges.is_empty() {
            earlier.clear();
        }
        // All mappings have gone before, but who asks for an address that no table gave is no reason to touch memory
        // that is about to be its owner's again.
        Replaced::drop_all(self.leave_windows(windows, &held));
    }

    /// Gives back the windows in which nothing is held any more.
    fn leave_windows(
        &self,
        windows: &mut BTreeMap<u64, Occupied>,
        held: &Range<u64>,
    ) -> Vec<Replaced<Window>> {
        let mut gone = Vec::new();
        if held.is_empty() {
            return gone;
        }
        for chunk in chunks(held, self.window_bits()) {
            let Entry::Occupied(mut window) = windows.entry(chunk) else { continue };
            let holds = &mut window.get_mut().holds;
            *holds = holds.saturating_sub(pages_in(chunk, held, self.window_bits()));
            if *holds == 0 {
                gone.extend(self.bus.remove_window(window.remove().oa));
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

/// How many of the pages lie in a chunk. Pages are numbered below 2^52, so the end of the last chunk does not overflow.
fn pages_in(chunk: u64, pages: &Range<u64>, window_bits: u32) -> u64 {
    let shift = window_bits - PAGE_BITS;
    pages.end.min((chunk + 1) << shift).saturating_sub(pages.start.max(chunk << shift))
}

/// The numbers of the chunks that the pages lie in.
fn chunks(pages: &Range<u64>, window_bits: u32) -> Range<u64> {
    let shift = window_bits - PAGE_BITS;
    pages.start >> shift..((pages.end - 1) >> shift) + 1
}
