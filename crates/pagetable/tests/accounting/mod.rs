//! A table memory that keeps books, and a reader of raw tables.
//!
//! [`Accounting`] hands out the pages of [`HeapTables`], so that freed ones are really used again, and knows at
//! any time which tables are out. A page that is freed twice, with another layout, or never, fails the test.
//! [`inspect`] reads a table word by word from the top, without the walker, and holds every state against
//! the entries that it counts.

#![allow(dead_code, reason = "every test program uses another part of this")]

use ioasid_pagetable::{Entry, Format, Gather, HeapTables, OutOfTables, Radix, TableLayout, TableMemory};
use std::collections::HashMap;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};

/// Table pages from the heap, and books about them. Clones share the books.
#[derive(Clone, Default)]
pub(crate) struct Accounting {
    books: Arc<Mutex<Books>>,
    /// Set in the addresses that go into entries.
    offset: u64,
}

#[derive(Default)]
struct Books {
    out: HashMap<u64, TableLayout>,
    /// How many allocations succeed before one fails; `None`: all of them.
    until_failure: Option<u64>,
}

impl Accounting {
    fn books(&self) -> MutexGuard<'_, Books> {
        self.books.lock().unwrap()
    }

    /// Tables that seem to lie at 2^50 and above.
    pub(crate) fn far_away() -> Accounting {
        Accounting { offset: 1 << 50, ..Accounting::default() }
    }

    /// How many tables are allocated and not yet freed.
    pub(crate) fn tables(&self) -> u64 {
        self.books().out.len() as u64
    }

    /// After `allocations` more, every further one fails; `None`: memory is back.
    pub(crate) fn fail_after(&self, allocations: Option<u64>) {
        self.books().until_failure = allocations;
    }

    /// Frees the retired tables. Each is handed out once, and is empty if it says so.
    ///
    /// The caller knows that no operation and no walk runs that began before they were retired.
    pub(crate) fn free_retired(&self, gather: &mut Gather<Accounting, AtomicU64>) {
        for table in gather.retired.drain(..) {
            // SAFETY: the caller vouches for it.
            unsafe { table.free() };
        }
    }
}

// SAFETY: all of it is done by `HeapTables`; the books only watch.
unsafe impl TableMemory<AtomicU64> for Accounting {
    fn allocate(&self, layout: TableLayout) -> Result<NonNull<AtomicU64>, OutOfTables> {
        let mut books = self.books();
        if let Some(left) = &mut books.until_failure {
            *left = left.checked_sub(1).ok_or(OutOfTables)?;
        }
        let table = HeapTables.allocate(layout)?;
        let before = books.out.insert(HeapTables.address(table), layout);
        assert!(before.is_none(), "a page that is in use was handed out again");
        Ok(table)
    }

    unsafe fn free(&self, table: NonNull<AtomicU64>, layout: TableLayout, empty: bool) {
        let mut books = self.books();
        assert_eq!(
            books.out.remove(&HeapTables.address(table)),
            Some(layout),
            "freed twice or never handed out"
        );
        if empty {
            for index in 0..layout.entries {
                // SAFETY: still allocated.
                let value = unsafe { table.add(index).as_ref() }.load(Ordering::Relaxed);
                assert_eq!(value, 0, "a table that was said to be empty is not");
            }
        }
        // SAFETY: the page came from there with this layout.
        unsafe { HeapTables.free(table, layout, empty) };
    }

    unsafe fn state<'a>(&self, table: NonNull<AtomicU64>, layout: TableLayout) -> &'a AtomicU64 {
        // SAFETY: passed on.
        unsafe { HeapTables.state(table, layout) }
    }

    fn address(&self, table: NonNull<AtomicU64>) -> u64 {
        HeapTables.address(table) | self.offset
    }

    unsafe fn pointer(&self, address: u64) -> NonNull<AtomicU64> {
        // SAFETY: passed on.
        unsafe { HeapTables.pointer(address & !self.offset) }
    }
}

/// A non-empty entry that leads to no table, as it stands in memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct RawEntry {
    /// The first address that the entry covers.
    pub(crate) first: u64,
    /// The level of its table.
    pub(crate) level: u8,
    /// The entry.
    pub(crate) value: u64,
}

/// What stands in a table's memory.
#[derive(Default)]
pub(crate) struct Inspection {
    /// How many tables are linked.
    pub(crate) tables: u64,
    /// Their bytes.
    pub(crate) bytes: u64,
    /// How many of them, the top one apart, have no entries.
    pub(crate) empty: u64,
    /// How many of them, the top one apart, lead to no entries but links.
    pub(crate) idle: u64,
    /// All entries in use that are not links, ascending.
    pub(crate) entries: Vec<RawEntry>,
}

/// Reads all linked tables. Nobody may be at work on the table meanwhile.
pub(crate) fn inspect<F: Format>(radix: &Radix<F, Accounting>) -> Inspection {
    inspect_by(radix, |level, value| match radix.format().decode(level, value) {
        Entry::Table(address) => Some(address),
        _ => None,
    })
}

/// The same by somebody else's reading: `link` says where an entry of a level leads, if it does.
pub(crate) fn inspect_by<F: Format>(
    radix: &Radix<F, Accounting>,
    link: impl Fn(u8, u64) -> Option<u64>,
) -> Inspection {
    let format = radix.format();
    let mut inspector = Inspector { format, link, found: Inspection::default() };
    if let Some((address, level)) = radix.top() {
        inspector.table(address, level, 0);
        // The top one stays in any case.
        inspector.found.empty -= u64::from(inspector.found.tables == 1 && inspector.found.entries.is_empty());
        inspector.found.idle -= u64::from(inspector.found.entries.is_empty());
    }
    inspector.found
}

struct Inspector<'a, F, L> {
    format: &'a F,
    link: L,
    found: Inspection,
}

impl<F: Format, L: Fn(u8, u64) -> Option<u64>> Inspector<'_, F, L> {
    fn table(&mut self, address: u64, level: u8, base: u64) {
        // SAFETY: the address stands in a link, or is the root's.
        let table = unsafe { HeapTables.pointer(address) };
        let layout = self.format.table_layout(level);
        self.found.tables += 1;
        self.found.bytes += layout.entries as u64 * 8;
        let before = self.found.entries.len();
        let mut used = false;
        for index in 0..1usize << self.format.index_bits(level) {
            // SAFETY: the table is linked, has this many entries, and nobody frees it meanwhile.
            let value = unsafe { table.add(index).as_ref() }.load(Ordering::Acquire);
            if value == 0 {
                continue;
            }
            used = true;
            let first = self.address(base + ((index as u64) << self.format.shift(level)));
            match (self.link)(level, value) {
                Some(child) => {
                    assert_eq!(
                        value & F::TENTATIVE,
                        0,
                        "the level {level} link at {first:#x} is tentative still"
                    );
                    self.table(child, level - 1, first);
                }
                None => self.found.entries.push(RawEntry { first, level, value }),
            }
        }
        // SAFETY: as above.
        let state = unsafe { HeapTables.state(table, layout) }.load(Ordering::Acquire);
        assert_eq!(state >> 62, 0, "a dead or dying table is linked for {base:#x}");
        self.found.empty += u64::from(!used);
        self.found.idle += u64::from(before == self.found.entries.len());
    }

    /// The upper half of a sign-extended table lies at the end of the address space.
    fn address(&self, offset: u64) -> u64 {
        let width = self.format.width(*self.format.top_levels().end());
        if self.format.sign_extended() && offset >> (width - 1) == 1 {
            offset | u64::MAX << width
        } else {
            offset
        }
    }
}
