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

use crate::address::{IovaRange, PageSize};
use core::ops::RangeInclusive;

mod native;
mod vtd_second_stage;

pub use native::Native;
pub use vtd_second_stage::VtdSecondStage;

bitflags::bitflags! {
    /// What a leaf allows and how it is accessed, in no format's own bits.
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
    }
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

/// Whether a leaf may be replaced by a table of smaller leaves with the same translation while walkers run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Split {
    /// It may; old or new is used until the invalidation, and both are right.
    Live,
    /// The leaf has to be absent and invalidated in between.
    NeedsBreak,
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

    /// Levels at which a root may stand. More than one: the table grows a level when an address asks for it.
    fn top_levels(&self) -> RangeInclusive<u8>;

    /// Logarithm of the bytes that one entry at `level` covers.
    fn shift(&self, level: u8) -> u32;

    /// Logarithm of the number of entries in a table at `level`.
    fn index_bits(&self, level: u8) -> u32;

    /// Leaf sizes allowed at `level`: bit n stands for 2^n bytes, from [`shift`](Self::shift)`(level)` on.
    fn leaf_sizes(&self, level: u8) -> u64;

    /// Whether every address of the range can be looked up (width, sign-extension gap).
    fn accepts(&self, range: &IovaRange) -> bool;

    /// Output addresses are below 2^this.
    fn output_bits(&self) -> u32;

    /// Whether leaves may be cut under running walkers.
    fn split(&self) -> Split;

    /// What the entry says. Every value of `entry` is possible input.
    fn decode(&self, level: u8, entry: u64) -> Entry;

    /// The entry that leads from a table at `level` to the table one level lower at `address`.
    fn table_entry(&self, level: u8, address: u64) -> u64;

    /// The entry, at `level`, of a leaf that begins at `oa`. `size` is one of
    /// [`leaf_sizes`](Self::leaf_sizes)`(level)` and `oa` a multiple of it.
    fn leaf_entry(&self, level: u8, size: PageSize, oa: u64, attributes: Attributes) -> u64;

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
