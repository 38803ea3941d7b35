//! A format of four entries to a table, and pages for it that never go back to the heap.

use ioasid_pagetable::{
    Attributes, ClaimFormat, Entry, Format, LiveChanges, OutOfTables, PageSize, Pattern, TableLayout,
    TableMemory,
};
use loom::sync::atomic::{AtomicU64, Ordering};
use std::collections::BTreeMap;
use std::ops::RangeInclusive;
use std::ptr::NonNull;
use std::sync::{Arc, Mutex};

/// Levels of four entries: 4 KiB, 16 KiB and 64 KiB leaves.
#[derive(Clone, Debug)]
pub(crate) struct Tiny {
    pub(crate) highest: u8,
}

pub(crate) const TABLE: u64 = 1 << 3;
pub(crate) const READ: u64 = 1 << 4;
pub(crate) const WRITE: u64 = 1 << 5;
pub(crate) const ADDRESS: u64 = 0x00ff_ffff_ffff_ffc0;
pub(crate) const ACCESSED: u64 = 1 << 56;
pub(crate) const DIRTY: u64 = 1 << 57;

impl Format for Tiny {
    const NAME: &'static str = "tiny";
    const TENTATIVE: u64 = 1 << 58;

    fn top_levels(&self) -> RangeInclusive<u8> {
        2..=self.highest
    }

    fn shift(&self, level: u8) -> u32 {
        10 + 2 * u32::from(level)
    }

    fn index_bits(&self, _level: u8) -> u32 {
        2
    }

    fn leaf_sizes(&self, level: u8) -> u64 {
        1 << self.shift(level)
    }

    fn output_bits(&self) -> u32 {
        56
    }

    fn live_changes(&self) -> LiveChanges {
        LiveChanges::SIZE | LiveChanges::PERMISSIONS
    }

    fn dirty_bit(&self) -> u64 {
        DIRTY
    }

    fn hardware_marks(&self) -> bool {
        true
    }

    fn software_bits(&self, _level: u8) -> u64 {
        0
    }

    fn table_pattern(&self, _level: u8) -> Pattern {
        Pattern::new(Self::PRESENT | TABLE, Self::TENTATIVE)
    }

    fn leaf_pattern(&self, _level: u8) -> Pattern {
        Pattern::new(Self::PRESENT, TABLE | Self::BUSY)
    }

    fn table_address(&self, entry: u64) -> u64 {
        entry & ADDRESS
    }

    fn decode(&self, level: u8, entry: u64) -> Entry {
        if entry & Self::PRESENT == 0 {
            return Entry::Absent;
        }
        if entry & TABLE != 0 {
            return Entry::Table(entry & ADDRESS);
        }
        let mut attributes = Attributes::empty();
        attributes.set(Attributes::READ, entry & READ != 0);
        attributes.set(Attributes::WRITE, entry & WRITE != 0);
        attributes.set(Attributes::ACCESSED, entry & ACCESSED != 0);
        attributes.set(Attributes::DIRTY, entry & DIRTY != 0);
        let size = PageSize::from_log2(self.shift(level)).unwrap();
        Entry::Leaf { oa: entry & ADDRESS, size, attributes }
    }

    fn table_entry(&self, _level: u8, address: u64) -> u64 {
        address | TABLE | Self::PRESENT
    }

    fn leaf_entry(&self, _level: u8, _size: PageSize, oa: u64, attributes: Attributes) -> u64 {
        let bits = [
            (Attributes::READ, READ),
            (Attributes::WRITE, WRITE),
            (Attributes::ACCESSED, ACCESSED),
            (Attributes::DIRTY, DIRTY),
        ];
        let set = bits.iter().filter(|(attribute, _)| attributes.contains(*attribute));
        set.fold(oa | Self::PRESENT, |entry, (_, bit)| entry | bit)
    }

    fn table_layout(&self, _level: u8) -> TableLayout {
        TableLayout { entries: 4, alignment: 64 }
    }
}

impl ClaimFormat for Tiny {
    const PRESENT: u64 = 1 << 0;
    const BUSY: u64 = 1 << 1;
    const FIRST: u64 = 1 << 2;
}

#[repr(C, align(64))]
struct Page {
    entries: [AtomicU64; 4],
    state: AtomicU64,
}

/// Pages by address.
#[derive(Clone, Default)]
pub(crate) struct Pages(Arc<Mutex<BTreeMap<u64, Owned>>>);

struct Owned {
    /// Stays allocated as long as the memory does.
    #[expect(dead_code, reason = "only keeps the page alive")]
    page: Box<Page>,
    freed: bool,
}

impl Pages {
    pub(crate) fn tables(&self) -> u64 {
        self.0.lock().unwrap().values().filter(|owned| !owned.freed).count() as u64
    }
}

// SAFETY: pages are zero when handed out, never handed out twice, and live as long as the memory does.
unsafe impl TableMemory<AtomicU64> for Pages {
    fn allocate(&self, _layout: TableLayout) -> Result<NonNull<AtomicU64>, OutOfTables> {
        let page = Box::new(Page { entries: [(); 4].map(|()| AtomicU64::new(0)), state: AtomicU64::new(0) });
        let table = NonNull::from(&*page).cast();
        self.0.lock().unwrap().insert(self.address(table), Owned { page, freed: false });
        Ok(table)
    }

    unsafe fn free(&self, table: NonNull<AtomicU64>, _layout: TableLayout, empty: bool) {
        // The lock must be free again where loom may change threads.
        let freed = |owned: &mut Owned| std::mem::replace(&mut owned.freed, true);
        let twice = self.0.lock().unwrap().get_mut(&self.address(table)).is_none_or(freed);
        assert!(!twice, "freed twice");
        for index in 0..4 {
            let nonsense = Tiny::PRESENT | READ | ADDRESS & !0xfff;
            // SAFETY: the page stays allocated.
            let entry = unsafe { table.add(index).as_ref() };
            assert!(!empty || entry.load(Ordering::Relaxed) == 0, "not as empty as it was said to be");
            entry.store(nonsense, Ordering::Relaxed);
        }
    }

    unsafe fn state<'a>(&self, table: NonNull<AtomicU64>, _layout: TableLayout) -> &'a AtomicU64 {
        // SAFETY: the entries are a page's first field.
        unsafe { &(*table.cast::<Page>().as_ptr()).state }
    }

    fn address(&self, table: NonNull<AtomicU64>) -> u64 {
        table.as_ptr().expose_provenance() as u64
    }

    unsafe fn pointer(&self, address: u64) -> NonNull<AtomicU64> {
        NonNull::new(std::ptr::with_exposed_provenance_mut(address as usize)).unwrap()
    }
}
