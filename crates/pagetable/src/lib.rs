//! I/O page tables: formats as facts over one generic, concurrent walker.
//!
//! A program that emulates an IOMMU, programs a real one, or simply needs to find the memory behind an I/O
//! virtual address has a page table. This crate is that table.
//!
//! - A [`Format`] is a module of facts: [`Native`] is ours, for tables that software walks; [`VtdSecondStage`] is
//!   Intel's.
//! - A [`Radix`] is a table of one format in memory. Any range can be mapped with the largest leaves that fit,
//!   and any granule-aligned piece unmapped again: a leaf that reaches over the edge is *cut* into smaller ones
//!   while walkers run.
//! - Nothing takes a lock. Walkers always run; operations on disjoint ranges run side by side, each in one of two
//!   modes. *Claiming* operations ([`Radix::claim`] and what follows) arbitrate between each other, entry by entry,
//!   with a busy bit of the native format. *Exclusive* ones ([`Radix::map`], [`Radix::unmap`]) rely on the caller
//!   to have arbitrated already, and write leaves with plain stores.
//! - What an operation takes away is written into a [`Gather`]: the caller invalidates, waits, and then frees.
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
//! // Here the caller invalidates its IOTLBs, waits for its walkers, and frees `gather.retired`.
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```

#![cfg_attr(not(feature = "std"), no_std)]
#![deny(unsafe_code)]

extern crate alloc;

mod address;
mod atomic;
mod format;
#[allow(unsafe_code, reason = "a retired table is freed when its caller vouches for it")]
mod gather;
#[allow(unsafe_code, reason = "table pages are raw memory")]
mod memory;
#[allow(unsafe_code, reason = "links of a table are addresses")]
mod radix;

pub use address::{Iova, IovaRange, Oa, PageSize};
pub use atomic::AtomicEntry;
pub use format::{
    AmdV1, Attributes, ClaimFormat, Entry, Format, LiveChanges, MemoryType, Native, Pattern, RiscV,
    TableLayout, VtdSecondStage, X86_64,
};
pub use gather::{Gather, RetiredTable, Runs};
#[cfg(feature = "std")]
pub use memory::HeapTables;
pub use memory::{OutOfTables, TableMemory};
pub use radix::{
    CachedWalk, ClaimError, CutError, Leaf, MapError, Radix, RetractError, UnmapError, WalkFault,
};
