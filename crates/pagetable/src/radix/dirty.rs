//! Which leaves were written through.
//!
//! Hardware sets the dirty bit of a leaf with an atomic operation, and so does [`Radix::mark`] for software that plays
//! hardware. Reading and clearing has to be quick, because a migrating guest's whole memory is read again and again:
//! clean pages cost a look at a cache line for eight of them, and dirty ones are cleared by plain stores. That loses
//! nothing. A bit that hardware sets between the look and the store is the dirty bit, which was set already and is
//! being reported, or the accessed bit, which comes with it.
//!
//! After the caller's invalidation, and not before, contents may be copied: until then hardware that remembers a dirty
//! leaf writes without saying so again.

use super::{Next, Radix, Slot, Stop, Stretch, Visitor, WalkFault, leaf_span};
use crate::address::{IovaRange, Oa, PageSize};
use crate::atomic::AtomicEntry;
use crate::format::{Attributes, Entry, Format};
use crate::memory::TableMemory;
use crate::radix::Leaf;

struct Dirty<'a, F: Format, M: TableMemory<A>, A: AtomicEntry, R> {
    radix: &'a Radix<F, M, A>,
    range: IovaRange,
    clear: bool,
    /// Sizes of the leaves that were cleared.
    leaf_sizes: u64,
    report: R,
}

impl<F: Format, M: TableMemory<A>, A: AtomicEntry, R: FnMut(IovaRange)> Dirty<'_, F, M, A, R> {
    fn report(&mut self, first: u64, last: u64) {
        if let Some(dirty) = IovaRange::new(first, last) {
            (self.report)(dirty);
        }
    }
}

impl<F: Format, M: TableMemory<A>, A: AtomicEntry, R: FnMut(IovaRange)> Visitor<M, A>
    for Dirty<'_, F, M, A, R>
{
    type Error = core::convert::Infallible;

    /// Goes over leaves of the entries' own size, eight at a time as far as it can.
    fn stretch(&mut self, stretch: Stretch<'_, A>) -> Result<usize, Stop<Self::Error>> {
        let Stretch { node, entries, first } = stretch;
        let format = &self.radix.format;
        let (dirty, pattern) = (format.dirty_bit(), format.leaf_pattern(node.level));
        let size = PageSize(format.shift(node.level) as u8);
        // Of a leaf of several entries any one may say that it is dirty, and that one may lie outside the range.
        let only_pages = node.level == 1 && format.leaf_sizes(1).is_power_of_two();
        // Where the dirty leaves began that are not reported yet.
        let mut began = None;
        let mut done = 0;
        'entries: for group in entries.chunks(8) {
            let (conjunction, disjunction) = group.iter().fold((u64::MAX, 0), |(all, any), entry| {
                let value = entry.load();
                (all & value, any | value)
            });
            let plain = pattern.matches_all(conjunction, disjunction);
            if disjunction & dirty == 0 && (plain || disjunction == 0 || only_pages) {
                if let Some(began) = began.take() {
                    self.report(began, first + ((done as u64) << size.log2()) - 1);
                }
                done += group.len();
            } else if plain && conjunction & dirty != 0 {
                began.get_or_insert(first + ((done as u64) << size.log2()));
                if self.clear {
                    self.leaf_sizes |= size.bytes();
                    group.iter().for_each(|entry| entry.store(entry.load() & !dirty));
                    self.radix.clean(group);
                }
                done += group.len();
            } else {
                for entry in group {
                    let value = entry.load();
                    if !pattern.matches(value) && value != 0 {
                        // A link, or one of several entries of a leaf.
                        break 'entries;
                    }
                    if value & dirty != 0 {
                        began.get_or_insert(first + ((done as u64) << size.log2()));
                        if self.clear {
                            self.leaf_sizes |= size.bytes();
                            entry.store(value & !dirty);
                            self.radix.clean(core::slice::from_ref(entry));
                        }
                    } else if let Some(began) = began.take() {
                        self.report(began, first + ((done as u64) << size.log2()) - 1);
                    }
                    done += 1;
                }
            }
        }
        if let Some(began) = began {
            self.report(began, first + (((done as u64) << size.log2()) - 1));
        }
        Ok(done)
    }

    fn slot(&mut self, slot: Slot<'_, A>) -> Result<Next, Stop<Self::Error>> {
        let Entry::Leaf { size, .. } = slot.decoded else { return Ok(Next::After(slot.last)) };
        let (first, last) = leaf_span(slot.first, size);
        let dirty = self.radix.format.dirty_bit();
        let entries = self.radix.leaf_entries(slot.node, slot.first, size);
        // As it was read: by now a neighbour may have cut a leaf of which the range has a part, and a link is never dirty.
        if slot.value & dirty != 0 || entries.iter().any(|entry| entry.load() & dirty != 0) {
            let whole = self.range.first() <= first && last <= self.range.last();
            if self.clear && whole {
                self.leaf_sizes |= size.bytes();
                entries.iter().for_each(|entry| entry.store(entry.load() & !dirty));
                self.radix.clean(entries);
            }
            self.report(first.max(self.range.first()), last.min(self.range.last()));
        }
        Ok(Next::After(last))
    }
}

impl<F: Format, M: TableMemory<A>, A: AtomicEntry> Radix<F, M, A> {
    /// Reports what was written through leaves since they were last clean, in ascending order, and makes them clean.
    /// Of a leaf that reaches over an end of the range the part inside is reported, and it stays dirty.
    ///
    /// Exclusive mode: nobody but hardware changes the range meanwhile. The sizes of the leaves that were cleared, as
    /// bits, for the invalidation that has to follow.
    ///
    /// Meaningful where [hardware marks](Format::hardware_marks) leaves; in a table of any other kind a clean leaf may
    /// fault when it is written.
    pub fn read_and_clear_dirty(&self, range: IovaRange, report: impl FnMut(IovaRange)) -> u64 {
        self.visit_dirty(range, true, report)
    }

    /// Reports the same and clears nothing.
    pub fn dirty(&self, range: IovaRange, report: impl FnMut(IovaRange)) {
        self.visit_dirty(range, false, report);
    }

    fn visit_dirty(&self, range: IovaRange, clear: bool, report: impl FnMut(IovaRange)) -> u64 {
        if self.format.dirty_bit() == 0 {
            return 0;
        }
        let mut dirty = Dirty { radix: self, range, clear, leaf_sizes: 0, report };
        let Ok(()) = self.run(&mut dirty, range);
        let leaf_sizes = dirty.leaf_sizes;
        self.clean_ways(range);
        leaf_sizes
    }

    /// Marks the leaf at `iova` as hardware does when it uses it: sets its accessed bit, its dirty bit, or both
    /// ([`Attributes::USED`]; other attributes play no part), and tells what the leaf was before. Nothing happens in a
    /// format that has no such bit.
    ///
    /// May run beside any other operation, like a walk. It is for software that plays hardware.
    pub fn mark(&self, iova: u64, used: Attributes) -> Result<Leaf, WalkFault> {
        let used = used & Attributes::USED;
        loop {
            let (node, value) = self.walk_entry(iova)?;
            let Entry::Leaf { oa, size, attributes } = self.format.decode(node.level, value) else {
                return Err(WalkFault::NotMapped(iova));
            };
            let unmarked = self.leaf_like(node.level, size, oa, attributes);
            let marked = self.leaf_like(node.level, size, oa, attributes | used);
            let marked = value | (unmarked ^ marked);
            let entry = self.entry(node, self.index(node.level, iova));
            if marked == value || entry.compare_exchange(value, marked).is_ok() {
                return Ok(Leaf { iova: leaf_span(iova, size).0, oa: Oa::new(oa), size, attributes });
            }
        }
    }
}
