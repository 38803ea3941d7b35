//! Choosing I/O virtual addresses.
//!
//! Who maps memory for a device without caring where, needs an address that nobody else uses. That is all this module
//! is about; it knows nothing of tables. What it gives is a proposal, and the claim of the native table decides: a
//! mistake here makes a map fail, it never makes two mappings share a page.
//!
//! - [`Holes`]: the free addresses in order, with the lowest or highest place for any size and alignment in
//!   O(log n). A space uses it for [`map_anywhere`](crate::Space::map_anywhere).
//! - [`Allocator`]: made of it, for many threads that allocate and free all the time. Addresses of small sizes that were
//!   just freed wait in magazines and are handed out again without anything that threads share.
//!
//! A driver's way of mapping is an allocation, a map at that address, an unmap, and only then a free:
//!
//! ```
//! use ioasid::iova::{Allocator, Options};
//! use ioasid::{Account, Backing, Bus, IovaRange, Memory, Permissions, Space};
//!
//! let bus = Bus::new();
//! let memory = Memory::register(&Backing::anonymous(&bus, 0x4000)?, 0, 0x4000, &Account::new("vm", None))?;
//! let space = Space::new(&bus);
//! // Where a device with 32 address bits can reach, but for the interrupt window of x86.
//! let addresses = Allocator::new(&[IovaRange::new(0, u32::MAX.into()).unwrap()], Options::default());
//! addresses.reserve(IovaRange::new(0xfee0_0000, 0xfeef_ffff).unwrap())?;
//!
//! let iova = addresses.allocate(0x4000, 0x4000)?;
//! space.map(iova, &memory, 0, 0x4000, Permissions::READ_WRITE)?;
//! let range = IovaRange::with_length(iova.get(), 0x4000).unwrap();
//! space.unmap(range)?;
//! addresses.free(range)?;
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```

mod allocator;
mod holes;
mod magazines;
mod tree;

pub use allocator::{AllocateError, Allocator, Options, Policy, RangeError, Statistics};
pub use holes::{HoleError, Holes};
