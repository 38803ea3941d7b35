//! I/O page tables: formats as facts over one generic, concurrent walker.
//!
//! A program that emulates an IOMMU, programs a real one, or simply needs to find the memory behind an I/O
//! virtual address has a page table. This crate is that table.
//!
//! ```
//! use ioasid_pagetable::{Attributes, Gather, IovaRange, Native, Oa, PageSize, Radix};
//!
//! let table = Radix::native(Native::new());
//! let gigabyte = IovaRange::with_length(0x4000_0000, 1 << 30).unwrap();
//! let mut gather = Gather::new();
//! table.map(gigabyte, Oa::new(0x1_4000_0000), Attributes::READ | Attributes::WRITE, &mut gather)?;
//! assert_eq!(table.walk(0x4012_3456)?.size, PageSize::SIZE_1G);
//!
//! // Unplug 2 MiB from the middle: only they go.
//! let block = IovaRange::with_length(0x4020_0000, 2 << 20).unwrap();
//! table.unmap(block, &mut gather)?;
//! assert!(table.walk(0x4020_0000).is_err());
//! assert_eq!(table.walk(0x401f_ffff)?.output(0x401f_ffff), Oa::new(0x1_401f_ffff));
//! assert_eq!(table.walk(0x4040_0000)?.size, PageSize::SIZE_2M);
//!
//! // Plug them in again, and make it one leaf again.
//! table.map(block, Oa::new(0x1_4020_0000), Attributes::READ | Attributes::WRITE, &mut gather)?;
//! table.merge(gigabyte, &mut gather)?;
//! assert_eq!(table.walk(0x4020_0000)?.size, PageSize::SIZE_1G);
//! // Here the caller invalidates its IOTLBs, waits for its walkers, and frees `gather.retired`.
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
//!
//! # Formats
//!
//! A [`Format`] is a module of facts: how entries look, which leaves each level may hold, what may change live.
//!
//! | format | levels | leaves | addresses |
//! |---|---|---|---|
//! | [`Native`]: ours, for tables that software walks | 4 to 6, grows | granule of 2 to 64 KiB, times 512, ... | 64 bits |
//! | [`VtdSecondStage`] | 3, 4, 5 | 4K, 2M, 1G | 39, 48, 57 bits |
//! | [`X86_64`]: VT-d first stage, AMD v2, processors | 4, 5 | 4K, 2M, 1G | 48, 57 bits, sign-extended |
//! | [`AmdV1`]: AMD host tables | 1 to 6, grows | every power of two but 512G | 64 bits |
//! | [`RiscV`]: Sv39, Sv48, Sv57 with Svnapot and Svpbmt | 3, 4, 5 | 4K, 64K, 2M, 1G, ... | 39, 48, 57 bits, sign-extended |
//!
//! # Operations
//!
//! A [`Radix`] is a table of one format in memory.
//! [`map`](Radix::map) uses the largest leaves that fit, [`unmap`](Radix::unmap) takes away exactly what it was asked to: a leaf
//! that reaches over the edge is [cut](Radix::cut) into smaller ones while walkers run. What was cut can be
//! [merged](Radix::merge). [`protect`](Radix::protect) changes permissions in place, [`remap`](Radix::remap) outputs.
//! [`read_and_clear_dirty`](Radix::read_and_clear_dirty) tells what was written.
//! [`walk`](Radix::walk) translates, [`cursor`](Radix::cursor) shows leaves and holes.
//!
//! Every operation happens as a whole or not at all. Where a format does not allow a change while walkers run, the error says
//! so (*needs break*), and nothing was changed. What an operation takes away is written into a [`Gather`]: the caller
//! invalidates, waits, and only then frees the tables in it.
//!
//! A table that somebody else writes, the first stage of a guest's, is walked by [`walk_foreign`], which believes nothing of it.
//!
//! # Threads
//!
//! Nothing takes a lock. Walkers always run; operations on disjoint ranges run side by side, each table in one of two
//! modes.
//!
//! - *Exclusive* operations ([`Radix::map`], [`Radix::unmap`] and all others but those named below) rely on the caller
//!   to have arbitrated: nobody else works in the same range. They write leaves with plain stores.
//! - *Claiming* operations ([`Radix::claim`], [`publish`](Radix::publish), [`retract`](Radix::retract),
//!   [`release`](Radix::release), [`hold`](Radix::hold), [`let_go`](Radix::let_go), [`hold_all`](Radix::hold_all),
//!   [`hold_exactly`](Radix::hold_exactly), [`let_go_all`](Radix::let_go_all), [`cut_claimed`](Radix::cut_claimed),
//!   [`merge_claimed`](Radix::merge_claimed)) arbitrate between each other, entry by entry, with a busy bit of the
//!   [native format](ClaimFormat).
//!
//! # Without the standard library
//!
//! The feature `std`, on by default, adds [`HeapTables`], table pages from the heap. Without it the crate needs `alloc` and
//! whatever [`TableMemory`] the program has.

#![cfg_attr(not(feature = "std"), no_std)]
#![deny(unsafe_code)]

extern crate alloc;

mod address;
mod atomic;
mod dirty_bitmap;
#[cfg(feature = "std")]
#[allow(unsafe_code, reason = "one system call")]
pub mod fence;
mod foreign;
mod format;
#[allow(unsafe_code, reason = "a retired table is freed when its caller vouches for it")]
mod gather;
#[allow(unsafe_code, reason = "table pages are raw memory")]
mod memory;
#[allow(unsafe_code, reason = "links of a table are addresses")]
mod radix;

pub use address::{Iova, IovaRange, Oa, PageSize};
pub use atomic::AtomicEntry;
pub use dirty_bitmap::DirtyBitmap;
pub use foreign::{FirstStageFormat, ForeignFault, ForeignMemory, walk_foreign};
pub use format::{
    AmdV1, Attributes, ClaimFormat, Entry, Format, LiveChanges, MemoryType, Native, Pattern, RiscV,
    TableLayout, VtdSecondStage, X86_64,
};
pub use gather::{Gather, RetiredTable, Runs};
#[cfg(feature = "std")]
pub use memory::HeapTables;
pub use memory::{OutOfTables, TableMemory};
pub use radix::{
    CachedWalk, ClaimError, Cursor, CutError, Leaf, MapError, ProtectError, Radix, RemapError, RetractError,
    SharedWalk, Span, UnmapError, WalkFault,
};
