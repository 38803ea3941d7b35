//! What a page-table format is: facts.
//!
//! A format says how entries look and which leaves each level may hold. It knows nothing of tables in memory, of
//! concurrency or of ranges: that is the walker's part ([`Radix`](crate::Radix)), written once. Adding a format
//! means one module here with the bit layout, the section of the specification it was read in, and golden
//! entries worked out by hand.
//!
//! Two conventions hold for all of them.
//! - Levels count from 1, which holds the smallest pages, up to the root. (Arm counts the other way; its module
//!   will translate.)
//! - The absent entry that *we* write is 0. A format whose hardware takes other values for absent too reports
//!   them as [`Entry::Absent`], but a fresh table of zeroes is always an empty table.
//!
//! # Two ways to read an entry
//!
//! [`decode`](Format::decode) is the whole truth about any 64 bits, reserved bits included. It is too much work to
//! do 512 times for a table of pages that are all alike, and nearly all are. So a format also names two
//! [`Pattern`]s per level, one that only links have and one that only plain pages have: whatever matches is
//! certainly that, and whatever does not is decoded. A pattern is one AND and one comparison, and it can be
//! applied to many entries at once.

use crate::address::{IovaRange, PageSize};
use core::ops::RangeInclusive;

#[cfg(test)]
mod agreement;
mod amd_v1;
mod native;
mod risc_v;
mod vtd_second_stage;
mod x86_64;

pub use amd_v1::AmdV1;
pub use native::Native;
pub use risc_v::RiscV;
pub use vtd_second_stage::VtdSecondStage;
pub use x86_64::X86_64;

bitflags::bitflags! {
    /// What a leaf allows and how it is accessed, in no format's own bits.
    ///
    /// The memory type is a field of three bits, not a flag; see [`with_memory_type`](Attributes::with_memory_type).
    #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
    pub struct Attributes: u32 {
        /// Devices may read.
        const READ = 1 << 0;
        /// Devices may write.
        const WRITE = 1 << 1;
        /// Accesses snoop the CPU's caches, whatever the device asks for.
        const FORCE_SNOOP = 1 << 2;
        /// The leaf was used (only formats and modes in which hardware says so).
        const ACCESSED = 1 << 3;
        /// The leaf was written through (only formats and modes in which hardware says so).
        const DIRTY = 1 << 4;
        /// Devices may fetch instructions (only formats that tell this from reading).
        const EXECUTE = 1 << 5;
        /// The bits of the memory type.
        const MEMORY_TYPE = 7 << 8;
    }
}

impl Attributes {
    /// What is asked of an access: the part of the attributes that [`Radix::protect`](crate::Radix::protect)
    /// changes.
    pub const PERMISSIONS: Attributes = Attributes::READ.union(Attributes::WRITE).union(Attributes::EXECUTE);
    /// What hardware adds to a leaf.
    pub const USED: Attributes = Attributes::ACCESSED.union(Attributes::DIRTY);

    /// The same with this memory type.
    pub const fn with_memory_type(self, memory_type: MemoryType) -> Attributes {
        let others = self.difference(Attributes::MEMORY_TYPE);
        others.union(Attributes::from_bits_retain((memory_type as u32) << 8))
    }

    /// The memory type.
    pub const fn memory_type(self) -> MemoryType {
        match self.intersection(Attributes::MEMORY_TYPE).bits() >> 8 {
            1 => MemoryType::Uncached,
            2 => MemoryType::WriteCombining,
            3 => MemoryType::WriteThrough,
            4 => MemoryType::WriteProtected,
            5 => MemoryType::WriteBack,
            _ => MemoryType::Inherit,
        }
    }
}

/// How memory behind a leaf is cached, in the terms of the x86 manuals, which are the ones most formats borrow.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Default)]
#[repr(u8)]
pub enum MemoryType {
    /// Whatever the machine, or an outer stage of translation, has for it.
    #[default]
    Inherit = 0,
    /// Device memory: neither cached nor combined nor reordered.
    Uncached = 1,
    /// Not cached, but writes may be combined and reordered.
    WriteCombining = 2,
    /// Cached for reads; writes go to memory.
    WriteThrough = 3,
    /// Cached for reads; writes go to memory and drop the cached line everywhere.
    WriteProtected = 4,
    /// Cached.
    WriteBack = 5,
}

/// An entry, understood.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Entry {
    /// Translates nothing.
    Absent,
    /// Leads to the table of the next lower level at this address.
    Table(u64),
    /// Maps.
    Leaf {
        /// Where the leaf begins: aligned to its size.
        oa: u64,
        /// How much it maps. More than one entry's worth means that the entry is one of several of the same
        /// leaf.
        size: PageSize,
        /// What it allows.
        attributes: Attributes,
    },
    /// Has bits set that the format reserves: a walker must fault.
    Malformed,
}

bitflags::bitflags! {
    /// What may change in a present leaf while walkers run. Anything else needs *break before make*: the leaf has to
    /// be absent, and invalidated, in between.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub struct LiveChanges: u8 {
        /// A leaf of one entry and a table of smaller leaves with the same translation may replace each other: until
        /// the invalidation walkers use the old or the new, and both are right.
        const SIZE = 1 << 0;
        /// The permissions of a leaf.
        const PERMISSIONS = 1 << 1;
        /// Where a leaf of one entry leads, together with its permissions and its memory type: until the invalidation
        /// walkers use the old entry or the new.
        const OUTPUT = 1 << 2;
    }
}

/// A test that only entries of one kind pass: `entry & mask == value`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Pattern {
    /// The bits that are looked at.
    pub mask: u64,
    /// What they have to be.
    pub value: u64,
}

impl Pattern {
    /// Nothing passes.
    pub const NEVER: Pattern = Pattern { mask: 0, value: 1 };

    /// The pattern of entries in which all bits of `set` are 1 and all bits of `clear` are 0.
    pub const fn new(set: u64, clear: u64) -> Pattern {
        Pattern { mask: set | clear, value: set }
    }

    /// Whether the entry passes.
    #[inline(always)]
    pub const fn matches(self, entry: u64) -> bool {
        entry & self.mask == self.value
    }

    /// Whether entries pass of which the conjunction and the disjunction of their bits are known: all of them, or
    /// at least one does not.
    #[inline(always)]
    pub const fn matches_all(self, conjunction: u64, disjunction: u64) -> bool {
        conjunction & self.value == self.value && disjunction & self.mask & !self.value == 0 && self.mask != 0
    }
}

/// Size and alignment of a table, which differ by level in some formats (concatenated roots).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TableLayout {
    /// How many 8-byte entries.
    pub entries: usize,
    /// Alignment of its address in bytes, at least 64.
    pub alignment: usize,
}

/// A page-table format: facts, and the encoding of single entries.
pub trait Format: Clone + core::fmt::Debug + Send + Sync + 'static {
    /// Its name in benchmarks and messages.
    const NAME: &'static str;

    /// A bit that no hardware looks at in a link. A link has it for the moment in which it is not certain yet that the
    /// table in which it stands will stay.
    const TENTATIVE: u64;

    /// Levels at which a root may stand. More than one: the table grows a level when an address asks for it.
    fn top_levels(&self) -> RangeInclusive<u8>;

    /// Logarithm of the bytes that one entry at `level` covers.
    fn shift(&self, level: u8) -> u32;

    /// Logarithm of the number of entries in a table at `level`.
    fn index_bits(&self, level: u8) -> u32;

    /// Which entry of a table at `level` an address goes through.
    #[inline(always)]
    fn index(&self, level: u8, iova: u64) -> usize {
        (iova >> self.shift(level)) as usize & ((1 << self.index_bits(level)) - 1)
    }

    /// Leaf sizes allowed at `level`: bit n stands for 2^n bytes, from [`shift`](Self::shift)`(level)` on.
    fn leaf_sizes(&self, level: u8) -> u64;

    /// Whether the address bits above the table's width repeat the highest one within it: the table translates the
    /// lowest and the highest addresses of the 2^64, and nothing in the gap between.
    fn sign_extended(&self) -> bool {
        false
    }

    /// Logarithm of the number of addresses that a table with its top at `level` translates; 64 at most.
    #[inline(always)]
    fn width(&self, level: u8) -> u32 {
        self.shift(level) + self.index_bits(level)
    }

    /// Whether every address of the range can be looked up (width, sign-extension gap).
    #[inline(always)]
    fn accepts(&self, range: &IovaRange) -> bool {
        let width = self.width(*self.top_levels().end());
        if width >= 64 {
            return true;
        }
        if self.sign_extended() {
            // Two halves, each with all of the bits from the sign on alike.
            let signs = |iova: u64| (iova as i64) >> (width - 1);
            signs(range.first()) == signs(range.last()) && matches!(signs(range.first()), 0 | -1)
        } else {
            range.last() >> width == 0
        }
    }

    /// Output addresses are below 2^this, which is below 2^64.
    fn output_bits(&self) -> u32;

    /// Whether a leaf can say the memory type of these attributes. What else it cannot say is left out: a format
    /// without forced snooping has none, and one that cannot forbid reading what may be written allows it.
    fn has_memory_type(&self, memory_type: MemoryType) -> bool {
        memory_type == MemoryType::Inherit
    }

    /// What may change in a present leaf while walkers run.
    fn live_changes(&self) -> LiveChanges;

    /// The bit that says, where it is 1 in a leaf, that the leaf was written through; 0 if there is none.
    fn dirty_bit(&self) -> u64;

    /// Whether hardware sets accessed and dirty bits in this table by itself.
    fn hardware_marks(&self) -> bool;

    /// The bits of a leaf at `level` that no hardware looks at. Operations that change a leaf keep them.
    fn software_bits(&self, level: u8) -> u64;

    /// Only [`Entry::Table`]s of `level` pass that are not [tentative](Self::TENTATIVE), and those that
    /// [`table_entry`](Self::table_entry) writes do.
    fn table_pattern(&self, level: u8) -> Pattern;

    /// Only [`Entry::Leaf`]s of one entry at `level`, of its own size, pass; those of reading and writing do.
    fn leaf_pattern(&self, level: u8) -> Pattern;

    /// Where a table entry leads: the inverse of [`table_entry`](Self::table_entry).
    fn table_address(&self, entry: u64) -> u64;

    /// What the entry says. Every value of `entry` is possible input.
    fn decode(&self, level: u8, entry: u64) -> Entry;

    /// The entry that leads from a table at `level` to the table one level lower at `address`.
    fn table_entry(&self, level: u8, address: u64) -> u64;

    /// The entry, at `level`, of a leaf that begins at `oa`. `size` is one of
    /// [`leaf_sizes`](Self::leaf_sizes)`(level)` and `oa` a multiple of it.
    fn leaf_entry(&self, level: u8, size: PageSize, oa: u64, attributes: Attributes) -> u64;

    /// What the entries of two neighbouring leaves of `level`'s own size differ by, if they map neighbouring output.
    #[inline(always)]
    fn leaf_step(&self, level: u8) -> u64 {
        let size = PageSize(self.shift(level) as u8);
        let entry = |oa| self.leaf_entry(level, size, oa, Attributes::READ);
        entry(size.bytes()).wrapping_sub(entry(0))
    }

    /// The shape of a table at `level`.
    fn table_layout(&self, level: u8) -> TableLayout {
        let entries = 1usize << self.index_bits(level);
        TableLayout { entries, alignment: (entries * 8).max(4096) }
    }
}

/// A format in which operations can own entries: the native one, which arbitrates for all others.
///
/// The three bits are software's. A leaf entry is *claimed* while [`BUSY`](Self::BUSY) is set, and translates if
/// and only if [`PRESENT`](Self::PRESENT) is set; the two are independent.
pub trait ClaimFormat: Format {
    /// The entry translates.
    const PRESENT: u64;
    /// One operation owns the entry; nobody else may change it.
    const BUSY: u64;
    /// A mapping begins at this leaf.
    const FIRST: u64;
}
