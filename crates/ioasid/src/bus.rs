//! The bus address space: every page of memory has one output address (OA).
//!
//! A page table maps I/O virtual addresses to output addresses, and something has to say what those are. Here they
//! are addresses on an imaginary bus below 2^48. An object that memory comes from ([`Backing`](crate::Backing))
//! gets *windows* of it, one for each GiB of the object that is in use, aligned so that a leaf of a GiB is
//! possible; a small object gets a small one. So the same page has the same OA in every space, whether two
//! mappings name the same page is an integer comparison, and a table's entries say nothing about processes,
//! files or pointers.
//!
//! # From an OA to memory
//!
//! The bus is a directory of chunks of 1 GiB, each cut into windows of one size. The size of a chunk's windows
//! is chosen when the first one is needed and stays. Finding the window of an address takes no search: two
//! levels of the directory, and an index into the chunk. A radix table could also merge and split free space, which
//! windows do not need: objects are either large, and whole chunks are all alike, or small and of few sizes.
//!
//! A window holds no reference count that a mapping would have to touch. It goes when no registration holds memory
//! in it any more, after all mappings of that memory are gone. All windows of an object can be closed before, for ever: then
//! nothing is found there, whatever tables say, but the addresses stay taken as long as tables may say so.
//!
//! The bus also knows the objects that have an identity outside of this program, such as files, so that nobody makes a
//! second object of the same memory.

use crate::backing::{Backing, Source};
use crate::epoch::{self, DmaSection, Protected, Replaced};
use crate::place::BusObserver;
use crate::sync::{AtomicBool, Mutex, MutexGuard, OnceLock, Ordering, PoisonError};
use ioasid_pagetable::Oa;
use std::collections::HashMap;
use std::sync::{Arc, Weak};

/// Logarithm of the largest window and of the size of a chunk.
pub(crate) const CHUNK_BITS: u32 = 30;
/// Logarithm of the smallest window.
pub(crate) const SMALLEST_WINDOW_BITS: u32 = 12;
/// Addresses on the bus are below 2^48.
const ADDRESS_BITS: u32 = 48;
const DIRECTORY_BITS: u32 = 9;
const DIRECTORY: usize = 1 << DIRECTORY_BITS;
/// How many chunks there are.
pub(crate) const CHUNKS: u64 = 1 << (ADDRESS_BITS - CHUNK_BITS);

/// Places that are filled when they are needed and then stay.
type Directory<T> = Box<[OnceLock<T>]>;

/// A bus address space. Memory, spaces and devices that shall meet share one.
pub struct Bus {
    /// Chunks by the upper and the lower half of their number.
    directory: Directory<Directory<Chunk>>,
    free: Mutex<Free>,
    /// Holds nothing alive.
    objects: Mutex<HashMap<Identity, Weak<Backing>>>,
}

/// What makes an object the same object, whoever brings it. It stays true as long as the object is held.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Identity {
    /// A file.
    File { device: u64, inode: u64 },
    /// A mapped region of a guest's memory, by the address of its description.
    #[cfg(feature = "vm-memory")]
    Region(usize),
}

/// A GiB of the bus, cut into windows of 2^`window_bits` bytes.
struct Chunk {
    window_bits: u32,
    windows: Box<[Protected<Window>]>,
}

/// Which part of which object stands at a piece of the bus.
#[derive(Debug)]
pub(crate) struct Window {
    pub(crate) source: Arc<Source>,
    /// The object itself, for those who only have an address.
    pub(crate) backing: Weak<Backing>,
    /// Where in the object the window begins, in bytes.
    pub(crate) start: u64,
    /// Where in the source the window begins, in bytes.
    pub(crate) offset: u64,
    /// Nothing is found here any more. One flag for all windows of an object.
    pub(crate) revoked: Arc<AtomicBool>,
}

struct Free {
    /// The lowest chunk that was never used. Chunk 0 is left out, so that no memory has the OA 0.
    next_chunk: u64,
    /// Free windows by the logarithm of their size.
    windows: [Vec<u64>; (CHUNK_BITS + 1) as usize],
    /// Who wants to know of windows that go.
    observers: Vec<Weak<dyn BusObserver>>,
}

/// No addresses are left on the bus for windows of this size.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the bus address space is full")]
pub struct BusFull;

impl Bus {
    /// An empty bus.
    pub fn new() -> Arc<Bus> {
        crate::epoch::prepare();
        Arc::new(Bus {
            directory: (0..DIRECTORY).map(|_| OnceLock::new()).collect(),
            free: Mutex::new(Free {
                next_chunk: 1,
                windows: [const { Vec::new() }; (CHUNK_BITS + 1) as usize],
                observers: Vec::new(),
            }),
            objects: Mutex::default(),
        })
    }

    fn chunk(&self, number: u64) -> Option<&Chunk> {
        let upper = self.directory.get((number >> DIRECTORY_BITS) as usize)?.get()?;
        upper.get(number as usize & (DIRECTORY - 1))?.get()
    }

    fn objects(&self) -> MutexGuard<'_, HashMap<Identity, Weak<Backing>>> {
        self.objects.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The object that there is already, or the one that `make` makes.
    pub(crate) fn find_or_make<E>(
        &self,
        identity: Identity,
        make: impl FnOnce() -> Result<Arc<Backing>, E>,
    ) -> Result<Arc<Backing>, E> {
        let mut objects = self.objects();
        if let Some(backing) = objects.get(&identity).and_then(Weak::upgrade) {
            return Ok(backing);
        }
        let backing = make()?;
        objects.insert(identity, Arc::downgrade(&backing));
        Ok(backing)
    }

    /// An object of this identity is going. There may be a new one by now.
    pub(crate) fn forget(&self, identity: &Identity) {
        let mut objects = self.objects();
        if objects.get(identity).is_some_and(|backing| backing.strong_count() == 0) {
            objects.remove(identity);
        }
    }

    /// The window at an address, unless it is closed; how far into the window it points, and how many bytes the window has
    /// from there on. The window stays until the section ends.
    #[inline]
    pub(crate) fn find<'s>(&'s self, section: &'s DmaSection, oa: u64) -> Option<(&'s Window, u64, u64)> {
        let chunk = self.chunk(oa >> CHUNK_BITS)?;
        let within = oa & ((1 << CHUNK_BITS) - 1);
        let window = chunk.windows.get((within >> chunk.window_bits) as usize)?.load(section)?;
        if window.revoked.load(Ordering::Acquire) {
            return None;
        }
        let size = 1u64 << chunk.window_bits;
        let offset = within & (size - 1);
        Some((window, offset, size - offset))
    }

    /// The object at an address, where in it that is, and the last address of the same window.
    pub(crate) fn object(&self, oa: u64) -> Option<(Arc<Backing>, u64, u64)> {
        let section = epoch::dma();
        let (window, within, left) = self.find(&section, oa)?;
        Some((window.backing.upgrade()?, window.start + within, oa + (left - 1)))
    }

    /// The object whose window has an address in it, closed or not; the window's first address, where in the object it
    /// begins, and its size.
    pub(crate) fn window_of(&self, oa: Oa) -> Option<(Arc<Backing>, Oa, u64, u64)> {
        let chunk = self.chunk(oa.get() >> CHUNK_BITS)?;
        let within = oa.get() & ((1 << CHUNK_BITS) - 1);
        let size = 1u64 << chunk.window_bits;
        let section = epoch::dma();
        let window = chunk.windows.get((within >> chunk.window_bits) as usize)?.load(&section)?;
        Some((window.backing.upgrade()?, Oa::new(oa.get() & !(size - 1)), window.start, size))
    }

    fn free(&self) -> MutexGuard<'_, Free> {
        self.free.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Has an observer told from now on.
    pub(crate) fn add_observer(&self, observer: Weak<dyn BusObserver>) {
        let observers = &mut self.free().observers;
        observers.retain(|observer| observer.strong_count() > 0);
        observers.push(observer);
    }

    /// Gives a part of an object 2^`bits` bytes of the bus.
    pub(crate) fn add_window(&self, bits: u32, window: Window) -> Result<Oa, BusFull> {
        let bits = bits.clamp(SMALLEST_WINDOW_BITS, CHUNK_BITS);
        let mut free = self.free();
        let oa = match free.windows[bits as usize].pop() {
            Some(oa) => oa,
            None => {
                let number = free.next_chunk;
                if number >= CHUNKS {
                    return Err(BusFull);
                }
                free.next_chunk += 1;
                let first = number << CHUNK_BITS;
                let count = 1u64 << (CHUNK_BITS - bits);
                // The lowest address is used first.
                free.windows[bits as usize].extend((1..count).rev().map(|index| first + (index << bits)));
                first
            }
        };
        drop(free);
        let number = oa >> CHUNK_BITS;
        let upper = self.directory[(number >> DIRECTORY_BITS) as usize]
            .get_or_init(|| (0..DIRECTORY).map(|_| OnceLock::new()).collect());
        let chunk = upper[number as usize & (DIRECTORY - 1)].get_or_init(|| Chunk {
            window_bits: bits,
            windows: (0..1usize << (CHUNK_BITS - bits)).map(|_| Protected::default()).collect(),
        });
        let within = oa & ((1 << CHUNK_BITS) - 1);
        // Its place was free, so nothing is replaced that anybody could be using.
        drop(chunk.windows[(within >> bits) as usize].replace(Some(Arc::new(window))));
        Ok(Oa::new(oa))
    }

    /// Takes a window back. Nothing maps it any more; but somebody may be asking for an address that no table gave.
    pub(crate) fn remove_window(&self, oa: Oa) -> Option<Replaced<Window>> {
        let chunk = self.chunk(oa.get() >> CHUNK_BITS)?;
        let within = oa.get() & ((1 << CHUNK_BITS) - 1);
        let removed = chunk.windows.get((within >> chunk.window_bits) as usize)?.replace(None);
        if removed.is_some() {
            let mut free = self.free();
            if !free.observers.is_empty() {
                let observers: Vec<_> = free.observers.iter().filter_map(Weak::upgrade).collect();
                drop(free);
                for observer in observers {
                    observer.vacated(oa, 1 << chunk.window_bits);
                }
                free = self.free();
            }
            free.windows[chunk.window_bits as usize].push(oa.get());
        }
        Some(removed)
    }
}

impl std::fmt::Debug for Bus {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let free = self.free();
        f.debug_struct("Bus").field("chunks", &(free.next_chunk - 1)).finish_non_exhaustive()
    }
}
