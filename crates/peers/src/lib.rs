//! What programs use today in place of an I/O address space.
//!
//! A VMM or a device model that has none writes its mappings down itself: which addresses of a device lead where, and which way
//! bytes may go. Two ways to do so are common, and ours is measured beside them, by the engine's benchmark call by call and by
//! `ioasid replay --against` under the load of real drivers. Both take them from here, so that it is the same peers they speak of.
//!
//! - [`BTree`]: a `BTreeMap` of mappings by first address, which is what most VMMs write for themselves.
//! - [`VmMemory`]: the IOTLB of rust-vmm's vm-memory, which joins what continues each other.
//!
//! They are *books* alone, and anything but `Sync` tables: whoever shares them puts a readers-writer lock around, does DMA while
//! holding it for reading, and has thereby waited for all DMA when he holds it for writing. That is how their users hold them.
//!
//! A peer is to be compared with at its best. So nothing is checked that its user knows anyway, above all not whether
//! something is mapped already.
//!
//! ```
//! use ioasid_peers::{BTree, Books, Mapping};
//!
//! let mut books = BTree::default();
//! books.map(0x1000, Mapping { length: 0x2000, output: 0x70_0000, read: true, write: false })?;
//! let piece = books.translate(0x1800, 64, false).unwrap();
//! assert_eq!((piece.output, piece.length), (0x70_0800, 64));
//! assert!(books.translate(0x1800, 64, true).is_none());
//! assert_eq!(books.unmap(0x1000, 0x2fff), Some(0x2000));
//! # Ok::<(), ioasid_peers::OutOfRange>(())
//! ```

#![forbid(unsafe_code)]

use std::collections::BTreeMap;
use std::fmt;
use vm_memory::iommu::Iotlb;
use vm_memory::{GuestAddress, Permissions};

/// Where a range of a device's addresses leads, and what the device may do there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Mapping {
    /// How many bytes.
    pub length: u64,
    /// What the first address leads to.
    pub output: u64,
    /// Whether the device may read.
    pub read: bool,
    /// Whether it may write.
    pub write: bool,
}

/// What an address leads to, and how far that goes on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Piece {
    /// What the address leads to.
    pub output: u64,
    /// How many bytes lead to what follows it, at most as many as were asked for.
    pub length: u64,
}

/// The peer cannot say what it was to write down: a mapping of no bytes, or one that is too near to the last address.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct OutOfRange;

impl fmt::Display for OutOfRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("it cannot write down such a range of addresses")
    }
}

impl std::error::Error for OutOfRange {}

/// Mappings, written down somehow.
pub trait Books: Default + fmt::Debug + Send + Sync + 'static {
    /// What the peer is called.
    const NAME: &'static str;

    /// Writes a mapping down. Nothing is mapped there.
    ///
    /// # Errors
    /// The peer cannot write down such a range.
    fn map(&mut self, iova: u64, mapping: Mapping) -> Result<(), OutOfRange>;

    /// Removes all mappings from one address to another, none of which goes beyond. How many bytes went, if the peer knows.
    fn unmap(&mut self, first: u64, last: u64) -> Option<u64>;

    /// Where an address leads, if at least one byte there may be read, or written. Of `length` bytes, those in one piece.
    fn translate(&self, iova: u64, length: u64, write: bool) -> Option<Piece>;
}

/// A `BTreeMap` of mappings by their first address.
#[derive(Debug, Default)]
pub struct BTree(BTreeMap<u64, Mapping>);

impl Books for BTree {
    const NAME: &'static str = "btree";

    #[inline]
    fn map(&mut self, iova: u64, mapping: Mapping) -> Result<(), OutOfRange> {
        mapping.length.checked_sub(1).and_then(|last| iova.checked_add(last)).ok_or(OutOfRange)?;
        self.0.insert(iova, mapping);
        Ok(())
    }

    #[inline]
    fn unmap(&mut self, first: u64, last: u64) -> Option<u64> {
        // Most often it is one mapping, known by its first address.
        let mut bytes = self.0.remove(&first).map_or(0, |mapping| mapping.length);
        while last.checked_sub(first).is_some_and(|beyond| bytes <= beyond) {
            let Some((&next, _)) = self.0.range(first..=last).next() else { break };
            bytes = bytes.saturating_add(self.0.remove(&next).map_or(0, |mapping| mapping.length));
        }
        Some(bytes)
    }

    #[inline]
    fn translate(&self, iova: u64, length: u64, write: bool) -> Option<Piece> {
        let (first, found) = self.0.range(..=iova).next_back()?;
        let offset = iova - first;
        let allowed = if write { found.write } else { found.read };
        if offset >= found.length || !allowed {
            return None;
        }
        Some(Piece { output: found.output.wrapping_add(offset), length: (found.length - offset).min(length) })
    }
}

/// vm-memory's IOTLB. The last addresses of all are beyond what it can say, and it does not tell what it has removed.
#[derive(Debug, Default)]
pub struct VmMemory(Iotlb);

impl VmMemory {
    /// A length as it wants it, for a range that it can say.
    fn length(iova: u64, length: u64) -> Option<usize> {
        iova.checked_add(length)?;
        usize::try_from(length).ok().filter(|length| *length > 0)
    }
}

impl Books for VmMemory {
    const NAME: &'static str = "vm-memory";

    #[inline]
    fn map(&mut self, iova: u64, mapping: Mapping) -> Result<(), OutOfRange> {
        let length = VmMemory::length(iova, mapping.length).ok_or(OutOfRange)?;
        let permissions = match (mapping.read, mapping.write) {
            (false, false) => Permissions::No,
            (true, false) => Permissions::Read,
            (false, true) => Permissions::Write,
            (true, true) => Permissions::ReadWrite,
        };
        let output = GuestAddress(mapping.output);
        self.0.set_mapping(GuestAddress(iova), output, length, permissions).map_err(|_| OutOfRange)
    }

    #[inline]
    fn unmap(&mut self, first: u64, last: u64) -> Option<u64> {
        let length = last.checked_sub(first)?.saturating_add(1);
        // What is too near to the last address was never mapped.
        let length = VmMemory::length(first, length.min(u64::MAX - first))?;
        self.0.invalidate_mapping(GuestAddress(first), length);
        None
    }

    #[inline]
    fn translate(&self, iova: u64, length: u64, write: bool) -> Option<Piece> {
        let length = VmMemory::length(iova, length)?;
        let access = if write { Permissions::Write } else { Permissions::Read };
        let piece = Iotlb::lookup(&self.0, GuestAddress(iova), length, access).ok()?.next()?;
        Some(Piece { output: piece.base.0, length: piece.length as u64 })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::collection::vec;
    use proptest::prelude::*;

    /// Whatever is mapped and unmapped, each byte leads where a plain list says.
    fn agrees<B: Books>(events: &[(u64, u64, bool, bool, bool)], base: u64) {
        let mut books = B::default();
        let mut model: Vec<(u64, Mapping)> = Vec::new();
        for (number, &(first, length, map, read, write)) in events.iter().enumerate() {
            let (iova, last) = (base + first, base + first + length - 1);
            let within =
                |(other, mapping): &(u64, Mapping)| *other >= iova && other + mapping.length - 1 <= last;
            let beside =
                |(other, mapping): &(u64, Mapping)| *other > last || other + mapping.length - 1 < iova;
            if map && model.iter().all(beside) {
                let mapping = Mapping { length, output: number as u64 * 1000, read, write };
                books.map(iova, mapping).unwrap();
                model.push((iova, mapping));
            } else if !map && model.iter().all(|known| within(known) || beside(known)) {
                let bytes: u64 =
                    model.iter().filter(|known| within(known)).map(|(_, known)| known.length).sum();
                let found = books.unmap(iova, last);
                assert!(found.is_none_or(|found| found == bytes));
                model.retain(|known| !within(known));
            }
            for at in base..base + 72 {
                let known = model.iter().find(|(first, mapping)| at >= *first && at - first < mapping.length);
                for write in [false, true] {
                    let expected =
                        known.filter(|(_, mapping)| if write { mapping.write } else { mapping.read });
                    let found = books.translate(at, 1, write);
                    assert_eq!(
                        found,
                        expected.map(|(first, mapping)| Piece {
                            output: mapping.output + (at - first),
                            length: 1
                        })
                    );
                }
            }
        }
    }

    proptest! {
        #[test]
        fn books_say_what_was_mapped(
            events in vec((0u64..56, 1u64..16, any::<bool>(), any::<bool>(), any::<bool>()), 1..40),
            high: bool,
        ) {
            let base = if high { u64::MAX - 80 } else { 0 };
            agrees::<BTree>(&events, base);
            agrees::<VmMemory>(&events, base);
        }
    }

    #[test]
    fn the_last_addresses_are_refused_where_they_cannot_be_said() {
        let mapping = |length| Mapping { length, output: 0, read: true, write: true };
        let mut btree = BTree::default();
        assert_eq!(btree.map(u64::MAX - 9, mapping(10)), Ok(()));
        assert_eq!(btree.map(u64::MAX - 9, mapping(11)), Err(OutOfRange));
        assert_eq!(btree.translate(u64::MAX, 5, true), Some(Piece { output: 9, length: 1 }));
        assert_eq!(btree.unmap(0, u64::MAX), Some(10));
        let mut vm_memory = VmMemory::default();
        assert_eq!(vm_memory.map(u64::MAX - 9, mapping(10)), Err(OutOfRange));
        assert_eq!(vm_memory.map(u64::MAX - 9, mapping(9)), Ok(()));
        assert_eq!(vm_memory.translate(u64::MAX, 1, true), None);
        assert_eq!(vm_memory.unmap(0, u64::MAX), None);
        assert_eq!(vm_memory.translate(u64::MAX - 9, 1, true), None);
        assert_eq!(
            (btree.map(0, mapping(0)), vm_memory.map(0, mapping(0))),
            (Err(OutOfRange), Err(OutOfRange))
        );
    }
}
