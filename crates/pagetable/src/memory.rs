//! Where table pages come from.
//!
//! A walker wants three things of a table page: its entries, the address that goes into the entry above it, and a
//! word that stands *beside* the page and says what is to become of it. Hardware leaves no room in the page itself,
//! and a word kept with the parent would be shared by operations below different entries of it.
//!
//! The allocator is told entries and alignment for each level, because a format may have a root of several pages
//! (concatenated second stages) or tables smaller than a page.

use crate::atomic::AtomicEntry;
use crate::format::TableLayout;
use core::ptr::NonNull;

/// No memory for another table page. Nothing was changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("no memory for another table page")]
pub struct OutOfTables;

/// An allocator of table pages.
///
/// # Safety
///
/// - [`allocate`](Self::allocate) returns `layout.entries` entries of value 0 at `layout.alignment`, used by
///   nobody else and valid until [`free`](Self::free); the state belonging to them is 0.
/// - [`address`](Self::address) is below 2^56, a multiple of 64, and [`pointer`](Self::pointer) is its inverse.
/// - [`state`](Self::state) always gives the same word for the same table, and different words for different ones.
/// - If one thread stores and then calls [`light_fence`](Self::light_fence), and another stores and then calls
///   [`heavy_fence`](Self::heavy_fence), at least one of them loads what the other has stored.
/// - Clones stand for the same allocator.
pub unsafe trait TableMemory<A: AtomicEntry>: Clone + Send + Sync + 'static {
    /// A fresh table of absent entries.
    fn allocate(&self, layout: TableLayout) -> Result<NonNull<A>, OutOfTables>;

    /// Takes a table back. `empty`: all its entries are 0 again, and need not be cleared for the next user.
    ///
    /// # Safety
    ///
    /// `table` came from `allocate` with this `layout`, and nobody uses it or its state any more. If `empty`, all
    /// entries are 0.
    unsafe fn free(&self, table: NonNull<A>, layout: TableLayout, empty: bool);

    /// The word beside the table that says whether it stays.
    ///
    /// # Safety
    ///
    /// `table` came from `allocate` with this `layout` and is not freed before the last use of the reference.
    unsafe fn state<'a>(&self, table: NonNull<A>, layout: TableLayout) -> &'a A;

    /// Whether whoever walks the tables sees at once what processors write. Where it does not (VT-d: ECAP.C, or SMPWC for
    /// scalable mode, is 0), [`clean`](Self::clean) is called for everything that was written in exclusive mode, before
    /// anybody relies on it.
    const COHERENT: bool = true;

    /// Writes the cache lines of these entries back to memory, and returns when that is done.
    fn clean(&self, _entries: &[A]) {}

    /// The frequent half of an asymmetric fence: called in exclusive mode after entries were filled.
    #[inline(always)]
    fn light_fence(&self) {
        A::fence();
    }

    /// The rare half: called in exclusive mode before a table is retired that others may be filling.
    fn heavy_fence(&self) {
        A::fence();
    }

    /// What the entry that leads to the table holds.
    fn address(&self, table: NonNull<A>) -> u64;

    /// The table at an address.
    ///
    /// # Safety
    ///
    /// [`address`](Self::address) gave it.
    unsafe fn pointer(&self, address: u64) -> NonNull<A>;
}

#[cfg(feature = "std")]
pub use heap::HeapTables;

#[cfg(feature = "std")]
mod heap {
    //! Table pages from the program's heap, in slabs.
    //!
    //! A 4 KiB table on its own would need a second, mostly empty page for its state. So 64 pages are taken
    //! together, aligned to their size: the first holds the states of the other 63, found by masking the address.
    //! Each has a cache line to itself, or threads at work on neighbouring tables would share one. A table costs
    //! 4 KiB and 1/63. A slab whose pages are all free goes back to the heap, unless there is little to spare: memory
    //! that comes back from the system has to be brought in and cleared, which costs several times a table's use.
    //!
    //! Free pages are clear, and so are their states. Most tables come back empty, since being empty is why they were retired, so whoever
    //! needs a table seldom waits for 4 KiB to be cleared, and never between a map call and its return.

    use super::{OutOfTables, TableMemory};
    use crate::format::TableLayout;
    use core::ptr::NonNull;
    use core::sync::atomic::AtomicU64;
    use std::alloc::{Layout, alloc, alloc_zeroed, dealloc};
    use std::sync::{Mutex, MutexGuard, PoisonError};

    const PAGE: usize = 4096;
    const PAGES: usize = 64;
    const SLAB: Layout = match Layout::from_size_align(PAGE * PAGES, PAGE * PAGES) {
        Ok(layout) => layout,
        Err(_) => panic!("a slab is a power of two"),
    };
    /// Every page but the header's.
    const ALL_FREE: u64 = !1;
    /// So many pages may be to spare, and half as many again as are in use.
    const SPARE: usize = 16 * (PAGES - 1);

    /// A state on a cache line of its own.
    #[repr(C, align(64))]
    struct State(AtomicU64);

    /// Table pages from the program's heap; the entry's address is the page's virtual address.
    ///
    /// All handles stand for one pool of the process, so that a million small address spaces share pages.
    #[derive(Clone, Copy, Debug, Default)]
    pub struct HeapTables;

    impl HeapTables {
        /// Lets all tables of the process together have no more than so many bytes of pages from now on. Whoever wants
        /// more gets [`OutOfTables`]. Without a limit, whoever may map what he likes may use up all memory: a mapping
        /// in small pages takes a 512th of its size in tables.
        pub fn set_limit(bytes: u64) {
            pool().limit = usize::try_from(bytes / PAGE as u64).unwrap_or(usize::MAX);
        }

        /// How many bytes of pages all tables of the process have together, retired ones included that somebody may still be
        /// walking: what [`set_limit`](Self::set_limit) bounds.
        pub fn bytes_in_use() -> u64 {
            (pool().in_use * PAGE) as u64
        }
    }

    /// The first page of a slab. The states are shared with the walkers; the rest is only touched under the pool's lock.
    #[repr(C)]
    struct Header {
        books: Books,
        /// Of the pages from number 1 on.
        states: [State; PAGES - 1],
    }

    /// The part of the header that the lock guards, so that no exclusive reference ever covers the states.
    #[repr(C, align(64))]
    struct Books {
        /// Bit n: page n is free.
        free: u64,
        /// Where the slab stands in the pool's list, while it has free pages.
        position: usize,
    }

    const _: () = assert!(size_of::<Header>() == PAGE);

    /// Slabs that have free pages.
    struct Pool {
        slabs: Vec<NonNull<Header>>,
        /// How many pages there are in all slabs, how many are handed out, and how many may be.
        pages: usize,
        in_use: usize,
        limit: usize,
    }

    // SAFETY: the pointers name heap memory that is reached only under the pool's lock.
    unsafe impl Send for Pool {}

    static POOL: Mutex<Pool> = Mutex::new(Pool { slabs: Vec::new(), pages: 0, in_use: 0, limit: usize::MAX });

    fn pool() -> MutexGuard<'static, Pool> {
        // The lists are consistent between any two statements that can panic: there are none.
        POOL.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn is_page(layout: TableLayout) -> bool {
        layout.entries * 8 == PAGE && layout.alignment == PAGE
    }

    /// A table of another shape stands alone, with its state in front of it, `alignment` bytes before.
    fn single(layout: TableLayout) -> Result<Layout, OutOfTables> {
        let size = layout
            .entries
            .checked_mul(8)
            .and_then(|size| size.checked_add(layout.alignment))
            .ok_or(OutOfTables)?;
        Layout::from_size_align(size, layout.alignment.max(64)).map_err(|_| OutOfTables)
    }

    impl Pool {
        fn take(&mut self) -> Result<NonNull<AtomicU64>, OutOfTables> {
            if self.in_use >= self.limit {
                return Err(OutOfTables);
            }
            let slab = match self.slabs.last() {
                Some(slab) => *slab,
                None => {
                    // SAFETY: the layout's size is not zero.
                    let memory = NonNull::new(unsafe { alloc(SLAB) }).ok_or(OutOfTables)?;
                    bring_in(memory);
                    // SAFETY: that many bytes were just allocated.
                    unsafe { memory.write_bytes(0, SLAB.size()) };
                    let slab = memory.cast::<Header>();
                    // SAFETY: zeroed memory is a valid header, and nobody else knows it yet.
                    unsafe {
                        (*slab.as_ptr()).books = Books { free: ALL_FREE, position: 0 };
                    }
                    self.slabs.push(slab);
                    self.pages += PAGES - 1;
                    slab
                }
            };
            // SAFETY: slabs in the list are allocated; these fields are only touched under the lock.
            let free = unsafe { &mut (*slab.as_ptr()).books.free };
            let page = free.trailing_zeros() as usize;
            self.in_use += 1;
            *free &= *free - 1;
            if *free == 0 {
                self.slabs.pop();
            }
            // SAFETY: `page` is below PAGES, so the result lies in the slab.
            Ok(unsafe { slab.cast::<u8>().add(page * PAGE).cast() })
        }

        fn put(&mut self, table: NonNull<AtomicU64>) {
            self.in_use -= 1;
            let (slab, page) = locate(table);
            // SAFETY: the slab of a table in use is allocated; these fields are only touched under the lock.
            let books = unsafe { &mut (*slab.as_ptr()).books };
            if books.free == 0 {
                books.position = self.slabs.len();
                self.slabs.push(slab);
            }
            books.free |= 1 << page;
            if books.free == ALL_FREE && self.pages - self.in_use > SPARE + self.in_use / 2 {
                self.pages -= PAGES - 1;
                let position = books.position;
                self.slabs.swap_remove(position);
                if let Some(moved) = self.slabs.get(position) {
                    // SAFETY: as above; `moved` is another slab of the list.
                    unsafe { (*moved.as_ptr()).books.position = position };
                }
                // SAFETY: allocated with this layout; all of its pages are free, so nobody uses it.
                unsafe { dealloc(slab.cast().as_ptr(), SLAB) };
            }
        }
    }

    /// Has the system give a new slab all of its memory in one call, which takes half of the time that the 64 faults of
    /// clearing it would. Where that cannot be done they do it.
    fn bring_in(slab: NonNull<u8>) {
        #[cfg(target_os = "linux")]
        // SAFETY: the slab was just allocated and is nobody else's; this changes no byte of it that was written.
        unsafe {
            libc::madvise(slab.as_ptr().cast(), SLAB.size(), libc::MADV_POPULATE_WRITE);
        }
        #[cfg(not(target_os = "linux"))]
        let _ = slab;
    }

    /// Whether all entries of a table page are 0.
    ///
    /// # Safety
    ///
    /// `table` is a page of the pool.
    unsafe fn is_clear(table: NonNull<AtomicU64>) -> bool {
        use core::sync::atomic::Ordering::Relaxed;
        // SAFETY: the caller vouches for the page.
        (0..PAGE / 8).all(|index| unsafe { table.add(index).as_ref() }.load(Relaxed) == 0)
    }

    /// The slab of a table page, and which of its pages that is.
    #[inline(always)]
    fn locate(table: NonNull<AtomicU64>) -> (NonNull<Header>, usize) {
        let address = table.as_ptr().expose_provenance();
        let offset = address & (SLAB.size() - 1);
        // SAFETY: `offset` is how far the page stands in its slab, which is aligned to its size.
        (unsafe { table.cast::<u8>().sub(offset).cast() }, offset / PAGE)
    }

    // SAFETY: pages are zeroed when handed out and owned by one table at a time; the state of page n is in cache
    // line n of its slab's header (for a single table, the word in front of it); `fence` is such a pair of fences; addresses are exposed pointers, which on
    // the supported 64-bit machines are below 2^56.
    unsafe impl TableMemory<AtomicU64> for HeapTables {
        fn allocate(&self, layout: TableLayout) -> Result<NonNull<AtomicU64>, OutOfTables> {
            if is_page(layout) {
                return pool().take();
            }
            let single = single(layout)?;
            // SAFETY: the size is not zero.
            let memory = NonNull::new(unsafe { alloc_zeroed(single) }).ok_or(OutOfTables)?;
            // SAFETY: the allocation is `alignment` bytes larger than the table.
            Ok(unsafe { memory.add(layout.alignment).cast() })
        }

        unsafe fn free(&self, table: NonNull<AtomicU64>, layout: TableLayout, empty: bool) {
            if is_page(layout) {
                // SAFETY: a whole page of entries; the caller gave it back.
                debug_assert!(!empty || unsafe { is_clear(table) }, "an empty table has something in it");
                // SAFETY: the page and its state are nobody else's any more.
                unsafe {
                    if !empty {
                        table.cast::<u8>().write_bytes(0, PAGE);
                    }
                    self.state(table, layout).store(0, core::sync::atomic::Ordering::Relaxed);
                }
                pool().put(table);
            } else if let Ok(single) = single(layout) {
                // SAFETY: allocated with this layout, `alignment` bytes further down.
                unsafe { dealloc(table.cast::<u8>().sub(layout.alignment).as_ptr(), single) };
            }
        }

        #[inline(always)]
        unsafe fn state<'a>(&self, table: NonNull<AtomicU64>, layout: TableLayout) -> &'a AtomicU64 {
            if is_page(layout) {
                let (slab, page) = locate(table);
                // SAFETY: `page` is below PAGES and not 0, and the header lives as long as the table does. Number n has
                // the n-th cache line of the header.
                unsafe { slab.cast::<State>().add(page).cast::<AtomicU64>().as_ref() }
            } else {
                // SAFETY: the word lies in the same allocation, in front of the table.
                unsafe { table.sub(8).as_ref() }
            }
        }

        #[inline(always)]
        fn light_fence(&self) {
            crate::fence::light();
        }

        fn heavy_fence(&self) {
            crate::fence::heavy();
        }

        #[inline(always)]
        fn address(&self, table: NonNull<AtomicU64>) -> u64 {
            table.as_ptr().expose_provenance() as u64
        }

        #[inline(always)]
        unsafe fn pointer(&self, address: u64) -> NonNull<AtomicU64> {
            let pointer = core::ptr::with_exposed_provenance_mut(address as usize);
            // SAFETY: the address of a table is not null.
            unsafe { NonNull::new_unchecked(pointer) }
        }
    }

    #[cfg(test)]
    mod tests {
        use super::*;

        const LAYOUT: TableLayout = TableLayout { entries: 512, alignment: 4096 };

        #[test]
        fn pages_are_fresh_distinct_and_have_their_own_states() {
            use core::sync::atomic::Ordering::Relaxed;
            let memory = HeapTables;
            let tables: Vec<_> = (0..200).map(|_| memory.allocate(LAYOUT).unwrap()).collect();
            for (number, &table) in tables.iter().enumerate() {
                // SAFETY: allocated above, freed below.
                unsafe {
                    assert_eq!(memory.pointer(memory.address(table)), table);
                    assert_eq!(table.as_ref().swap(number as u64, Relaxed), 0);
                    assert_eq!(memory.state(table, LAYOUT).swap(number as u64, Relaxed), 0);
                }
            }
            for (number, &table) in tables.iter().enumerate() {
                // SAFETY: as above.
                unsafe {
                    assert_eq!(table.as_ref().load(Relaxed), number as u64);
                    assert_eq!(memory.state(table, LAYOUT).load(Relaxed), number as u64);
                }
            }
            for table in tables {
                // SAFETY: allocated with this layout, used no more.
                unsafe { memory.free(table, LAYOUT, false) };
            }
        }

        #[test]
        fn a_concatenated_root_has_its_alignment() {
            let memory = HeapTables;
            let layout = TableLayout { entries: 2048, alignment: 16384 };
            let table = memory.allocate(layout).unwrap();
            assert_eq!(memory.address(table) % 16384, 0);
            // SAFETY: allocated above with this layout.
            unsafe {
                memory.state(table, layout).fetch_add(1, core::sync::atomic::Ordering::Relaxed);
                assert_eq!(table.as_ref().load(core::sync::atomic::Ordering::Relaxed), 0);
                memory.free(table, layout, false);
            }
        }
    }
}
