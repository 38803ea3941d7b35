//! Borrowed slices: memory that a device model uses in place.
//!
//! A copy is over when it returns, and an unmap can wait for it. A device model that hands guest memory to the kernel
//! (a `preadv` into it, an `io_uring` request), or that works in a ring for as long as the ring is there, wants the
//! memory itself. [`Space::borrow`] gives it a [`BorrowedSlice`]: a pin on the translation.
//!
//! - Whoever takes the translation away while it is borrowed asks the holder to let go ([`SliceHolder::let_go`]) and waits, at
//!   most [`SLICE_PATIENCE`]. If the holder does not let go by then, the unmap fails with a typed error, and nothing has
//!   changed: devices' DMA has gone on all the time. Meanwhile nobody new can borrow there.
//! - The wait has a bound, so there is no deadlock, whoever holds the slice: a thread that unmaps what it has borrowed
//!   itself, and whose `let_go` does not drop it, gets the error after that time.
//! - Where the translation has to go, because the [`Memory`](crate::Memory) behind it is dropped, the holder is asked in the
//!   same way, and after the same time the translation goes all the same. The slice keeps the bytes behind it alive, but
//!   they are not devices' memory any more.
//! - Unmaps of other ranges do not pay: see `slice/registry.rs`.
//!
//! The CPU, other devices and guests write the memory at any time, so there is never a `&[u8]` to it: a slice is copied from
//! and to, its words can be used as atomics, and its pieces have addresses for system calls.

use crate::backing::Source;
use crate::epoch;
use crate::space::{Permissions, Space};
use crate::sync::{AtomicBool, Condvar, Instant, Mutex, Ordering, PoisonError, wait_for_some_time};
use ioasid_pagetable::{Attributes, Iova, IovaRange};
use std::fmt;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU32, AtomicU64};
use std::sync::{Arc, Weak};
use std::time::Duration;

mod registry;

pub(crate) use registry::Registry;

/// How long somebody who takes a translation away waits for those who have borrowed it.
pub const SLICE_PATIENCE: Duration = Duration::from_millis(100);

/// Who can be asked to let go of a [`BorrowedSlice`].
pub trait SliceHolder: Send + Sync {
    /// Somebody wants to take the translation of `wanted` away, which overlaps the slice. Drop the slice soon, here or
    /// elsewhere.
    ///
    /// The space keeps the holder as long as the slice lives, so a holder that owns its slice must own it weakly, or give
    /// it up here. Called from the thread that unmaps, with no lock of the space held. It must not wait for long, and an unmap of the
    /// same range from here fails. Asked once for each attempt.
    fn let_go(&self, wanted: IovaRange);
}

impl<F: Fn(IovaRange) + Send + Sync> SliceHolder for F {
    fn let_go(&self, wanted: IovaRange) {
        self(wanted);
    }
}

/// Why nothing was borrowed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum BorrowError {
    /// No bytes, or a range that reaches past the last address.
    #[error("{length:#x} bytes at {iova} are no range of addresses")]
    NoRange {
        /// The first address.
        iova: Iova,
        /// The length asked for.
        length: u64,
    },
    /// Nothing is mapped there.
    #[error("nothing is mapped at {at}")]
    NotMapped {
        /// The first address without a mapping.
        at: Iova,
    },
    /// The mapping does not allow it.
    #[error("the mapping at {at} does not permit it")]
    NoPermission {
        /// The first address in question.
        at: Iova,
    },
    /// The memory is not mapped in this process, or is there no more. Copies may be possible.
    #[error("the memory at {at} cannot be borrowed")]
    NotHere {
        /// The first address in question.
        at: Iova,
    },
    /// Somebody is just taking the translation away, or changing it. Copies may be possible until that is decided.
    #[error("{range} is about to be unmapped or changed")]
    BeingUnmapped {
        /// What was to be borrowed.
        range: IovaRange,
    },
}

/// Somebody has borrowed the range and does not let go of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{range} is borrowed, and its holder does not let go")]
pub struct StillBorrowed {
    /// The borrowed range.
    pub range: IovaRange,
}

/// What is known of a slice to those who want it back.
pub(crate) struct Pin {
    range: IovaRange,
    holder: Arc<dyn SliceHolder>,
    /// Somebody has asked for it and is waiting.
    asked: AtomicBool,
}

impl fmt::Debug for Pin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Pin").field("range", &self.range).field("asked", &self.asked).finish_non_exhaustive()
    }
}

/// The slices of a space.
#[derive(Debug)]
pub(crate) struct Slices {
    registry: Registry<Pin>,
    /// How many were let go while somebody was waiting for one.
    let_go: Mutex<u64>,
    changed: Condvar,
}

impl Slices {
    pub(crate) fn new() -> Slices {
        Slices { registry: Registry::new(), let_go: Mutex::new(0), changed: Condvar::new() }
    }

    /// Whether any of the rights may be borrowed in the range. Behind the exchanges that took the leaves back.
    #[inline]
    pub(crate) fn any(&self, range: IovaRange, rights: Attributes) -> bool {
        self.registry.any(range, rights)
    }

    /// Closes the range and gets back what is borrowed of it, until a deadline. Outside of all sections.
    pub(crate) fn recall(
        &self,
        range: IovaRange,
        rights: Attributes,
        deadline: Instant,
    ) -> Result<Recalled<'_>, (Recalled<'_>, StillBorrowed)> {
        self.registry.close(range, rights);
        let recalled = Recalled { slices: self, range, rights };
        let mut asked = Asked(Vec::new());
        loop {
            let seen = *self.let_go.lock().unwrap_or_else(PoisonError::into_inner);
            let borrowers = self.registry.borrowers(range, rights);
            let Some(first) = borrowers.first().map(|(range, _)| *range) else { return Ok(recalled) };
            let mut news = false;
            for (_, pin) in borrowers {
                if !pin.asked.swap(true, Ordering::SeqCst) {
                    asked.0.push(pin.clone());
                    pin.holder.let_go(range);
                    news = true;
                }
            }
            if news {
                // Who has let go before he was marked as asked did not say so.
                continue;
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err((recalled, StillBorrowed { range: first }));
            }
            let counter = self.let_go.lock().unwrap_or_else(PoisonError::into_inner);
            if *counter == seen {
                drop(wait_for_some_time(&self.let_go, &self.changed, counter, left));
            }
        }
    }

    fn leave(&self, pin: &Arc<Pin>) {
        self.registry.leave(pin.range, pin);
        if pin.asked.load(Ordering::SeqCst) {
            *self.let_go.lock().unwrap_or_else(PoisonError::into_inner) += 1;
            self.changed.notify_all();
        }
    }
}

/// Pins that were asked for; if they are still there, the next one asks again.
struct Asked(Vec<Arc<Pin>>);

impl Drop for Asked {
    fn drop(&mut self) {
        self.0.iter().for_each(|pin| pin.asked.store(false, Ordering::SeqCst));
    }
}

/// A range in which nobody has, or can get, any of the rights in question, until this is dropped.
#[derive(Debug)]
#[must_use = "the range is open again when this is dropped"]
pub(crate) struct Recalled<'a> {
    slices: &'a Slices,
    range: IovaRange,
    rights: Attributes,
}

impl Drop for Recalled<'_> {
    fn drop(&mut self) {
        self.slices.registry.open(self.range, self.rights);
    }
}

/// Consecutive bytes of one object.
#[derive(Clone)]
struct Part {
    source: Arc<Source>,
    offset: u64,
    length: u64,
}

/// A translated range of addresses, borrowed from a [`Space`] ([`Space::borrow`]).
///
/// It is a pin: whoever unmaps some of it, or changes it in place, has its holder asked to let go and waits for at most
/// [`SLICE_PATIENCE`]; then he fails, and nothing has changed. Only when the [`Memory`](crate::Memory) behind it is dropped or
/// its object is revoked, the translation goes after that time all the same; the slice keeps the bytes alive then, but they
/// are not devices' memory any more. The CPU, other devices and guests write the memory at any time, so there is never a
/// reference to its bytes: they are copied from and to, used as atomics, or named to system calls by address.
///
/// It can be kept for as long as its holder likes, and moved between threads. Dropping it lets go.
pub struct BorrowedSlice {
    space: Arc<Space>,
    pin: Arc<Pin>,
    permissions: Permissions,
    parts: Vec<Part>,
}

impl fmt::Debug for BorrowedSlice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("BorrowedSlice")
            .field("pin", &self.pin)
            .field("permissions", &self.permissions)
            .field("parts", &self.parts.len())
            .finish_non_exhaustive()
    }
}

/// An access outside of a slice, or of a kind that it was not borrowed for. Nothing was done.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{length} bytes at {offset:#x} cannot be accessed through the borrowed slice")]
pub struct SliceError {
    /// From the beginning of the slice.
    pub offset: u64,
    /// How many bytes.
    pub length: u64,
}

impl Space {
    /// Borrows the memory behind `length` bytes of addresses for device models that use it in place.
    ///
    /// All of it must be mapped with these permissions, and be memory of this process. `holder` is asked when
    /// somebody wants it back.
    ///
    /// ```
    /// # use ioasid::{Account, Backing, Bus, Iova, IovaRange, Memory, Permissions, Space};
    /// # use std::sync::{Arc, Mutex};
    /// # let bus = Bus::new();
    /// # let memory = Memory::register(&Backing::anonymous(&bus, 1 << 20)?, 0, 1 << 20, &Account::new("guest", None))?;
    /// # let space = Space::new(&bus);
    /// space.map(Iova::new(0x1000), &memory, 0, 0x1000, Permissions::READ_WRITE)?;
    /// // A holder that lets go as soon as it is asked.
    /// let held = Arc::new(Mutex::new(None));
    /// let place = Arc::downgrade(&held);
    /// let let_go = move |_: IovaRange| drop(place.upgrade().and_then(|held| held.lock().unwrap().take()));
    /// let slice = space.borrow(Iova::new(0x1800), 16, Permissions::READ_WRITE, Arc::new(let_go))?;
    /// slice.write(0, b"in place")?;
    /// *held.lock().unwrap() = Some(slice);
    /// space.unmap(IovaRange::with_length(0x1000, 0x1000).unwrap())?;
    /// assert!(held.lock().unwrap().is_none());
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn borrow(
        self: &Arc<Self>,
        iova: Iova,
        length: u64,
        permissions: Permissions,
        holder: Arc<dyn SliceHolder>,
    ) -> Result<BorrowedSlice, BorrowError> {
        let range =
            IovaRange::with_length(iova.get(), length).ok_or(BorrowError::NoRange { iova, length })?;
        let pin = Arc::new(Pin { range, holder, asked: AtomicBool::new(false) });
        self.slices()
            .registry
            .enter(range, permissions.attributes(), &pin)
            .map_err(|_| BorrowError::BeingUnmapped { range })?;
        // From here on whoever unmaps it sees us, or we see that it is unmapped. On an error the drop leaves.
        let mut slice = BorrowedSlice { space: self.clone(), pin, permissions, parts: Vec::new() };
        slice.find_parts()?;
        Ok(slice)
    }
}

impl BorrowedSlice {
    fn find_parts(&mut self) -> Result<(), BorrowError> {
        let range = self.pin.range;
        let mut next = Some(range.first());
        let deadline = Instant::now() + SLICE_PATIENCE;
        let mut tries = 0;
        while let Some(at) = next.filter(|at| *at <= range.last()) {
            // Leaf and window belong together only within one section; a section for each leaf keeps them short.
            let section = epoch::dma();
            let leaf = match self.space.settled_leaf(at) {
                Some(leaf) => leaf.ok_or(BorrowError::NotMapped { at: Iova::new(at) })?,
                // What an operation that is at work here leaves behind is what counts.
                None if Instant::now() < deadline => {
                    drop(section);
                    self.space.step_aside(&mut tries);
                    continue;
                }
                None => return Err(BorrowError::BeingUnmapped { range }),
            };
            if !leaf.attributes.contains(self.permissions.attributes()) {
                return Err(BorrowError::NoPermission { at: Iova::new(at) });
            }
            let not_here = BorrowError::NotHere { at: Iova::new(at) };
            let oa = leaf.output(at);
            let (window, within, in_window) = self.space.bus().find(&section, oa.get()).ok_or(not_here)?;
            let Source::Host(memory) = &*window.source else { return Err(not_here) };
            let offset = window.offset + within;
            let in_memory = memory.length().saturating_sub(offset);
            let last = leaf.range().last().min(range.last());
            let length = (last - at).saturating_add(1).min(in_window).min(in_memory);
            if length == 0 {
                return Err(not_here);
            }
            match self.parts.last_mut() {
                Some(part)
                    if Arc::ptr_eq(&part.source, &window.source) && part.offset + part.length == offset =>
                {
                    part.length += length;
                }
                _ => self.parts.push(Part { source: window.source.clone(), offset, length }),
            }
            next = at.checked_add(length);
        }
        Ok(())
    }

    /// The addresses that it translates.
    pub fn range(&self) -> IovaRange {
        self.pin.range
    }

    /// What it was borrowed for.
    pub fn permissions(&self) -> Permissions {
        self.permissions
    }

    /// Whether somebody has asked for it and is waiting.
    pub fn is_wanted(&self) -> bool {
        self.pin.asked.load(Ordering::Relaxed)
    }

    /// The addresses in this process and the lengths of the pieces that it consists of, in order, for system calls. They are
    /// valid until the slice is dropped; devices, guests and other threads read and write them at any time.
    pub fn pieces(&self) -> impl Iterator<Item = (NonNull<u8>, usize)> + '_ {
        self.parts.iter().filter_map(|part| match &*part.source {
            Source::Host(memory) => {
                let length = part.length as usize;
                Some((memory.at(part.offset, length)?, length))
            }
            Source::Late(_) => None,
        })
    }

    /// The parts of the slice that `length` bytes from `offset` on are in: source, offset there, and how many bytes.
    fn parts(
        &self,
        offset: u64,
        length: u64,
        needed: Permissions,
    ) -> Result<impl Iterator<Item = (&Source, u64, usize)>, SliceError> {
        let all: u64 = self.parts.iter().map(|part| part.length).sum();
        let inside = offset.checked_add(length).is_some_and(|end| end <= all);
        if !inside || !self.permissions.contains(needed) {
            return Err(SliceError { offset, length });
        }
        let (mut skip, mut left) = (offset, length);
        Ok(self.parts.iter().filter_map(move |part| {
            let skipped = skip.min(part.length);
            skip -= skipped;
            let count = (part.length - skipped).min(left);
            left -= count;
            (count > 0).then_some((&*part.source, part.offset + skipped, count as usize))
        }))
    }

    /// Copies out of the memory, from `offset` in the slice on. An aligned read of 1, 2, 4 or 8 bytes happens at once.
    pub fn read(&self, offset: u64, buffer: &mut [u8]) -> Result<(), SliceError> {
        let error = SliceError { offset, length: buffer.len() as u64 };
        let mut rest = buffer;
        for (source, offset, count) in self.parts(offset, error.length, Permissions::READ)? {
            let (now, later) = rest.split_at_mut(count);
            rest = later;
            match source {
                Source::Host(memory) => memory.read(offset, now).ok_or(error)?,
                Source::Late(_) => return Err(error),
            }
        }
        Ok(())
    }

    /// Copies into the memory, from `offset` in the slice on. An aligned write of 1, 2, 4 or 8 bytes happens at once.
    pub fn write(&self, offset: u64, bytes: &[u8]) -> Result<(), SliceError> {
        let error = SliceError { offset, length: bytes.len() as u64 };
        let mut rest = bytes;
        for (source, offset, count) in self.parts(offset, error.length, Permissions::WRITE)? {
            let (now, later) = rest.split_at(count);
            rest = later;
            match source {
                Source::Host(memory) => memory.write(offset, now).ok_or(error)?,
                Source::Late(_) => return Err(error),
            }
        }
        Ok(())
    }

    /// The 4 bytes at `offset` as an atomic of the CPU, of a slice borrowed for reading and writing; `None` if they
    /// are not aligned or not all there.
    pub fn atomic_u32(&self, offset: u64) -> Option<&AtomicU32> {
        match self.parts(offset, 4, Permissions::READ_WRITE).ok()?.next()? {
            (Source::Host(memory), offset, 4) => memory.atomic_u32(offset),
            _ => None,
        }
    }

    /// The 8 bytes at `offset` as an atomic of the CPU.
    pub fn atomic_u64(&self, offset: u64) -> Option<&AtomicU64> {
        match self.parts(offset, 8, Permissions::READ_WRITE).ok()?.next()? {
            (Source::Host(memory), offset, 8) => memory.atomic_u64(offset),
            _ => None,
        }
    }

    /// A way to ask for the slice without holding it.
    pub fn handle(&self) -> SliceHandle {
        SliceHandle { space: Arc::downgrade(&self.space), pin: Arc::downgrade(&self.pin) }
    }
}

impl Drop for BorrowedSlice {
    fn drop(&mut self) {
        self.space.slices().leave(&self.pin);
    }
}

/// A way to get a [`BorrowedSlice`] back from its holder, for whoever lent it out.
#[derive(Clone, Debug)]
pub struct SliceHandle {
    space: Weak<Space>,
    pin: Weak<Pin>,
}

impl SliceHandle {
    /// Whether the slice is still held.
    pub fn is_held(&self) -> bool {
        self.pin.strong_count() > 0
    }

    /// Whether the slice is one of this space.
    pub fn is_of(&self, space: &Arc<Space>) -> bool {
        std::ptr::eq(self.space.as_ptr(), Arc::as_ptr(space))
    }

    /// Asks the holders of all these slices to let go, and waits at most [`SLICE_PATIENCE`] for all of them together.
    /// Other slices at the same addresses are asked for too. The error names one that was not given back.
    pub fn recall_all(handles: &[SliceHandle]) -> Result<(), StillBorrowed> {
        let deadline = Instant::now() + SLICE_PATIENCE;
        let all = Permissions::READ_WRITE.attributes();
        let mut result = Ok(());
        for handle in handles {
            let (Some(space), Some(pin)) = (handle.space.upgrade(), handle.pin.upgrade()) else { continue };
            let range = pin.range;
            drop(pin);
            if let Err((_, error)) = space.slices().recall(range, all, deadline) {
                result = Err(error);
            }
        }
        result
    }
}
