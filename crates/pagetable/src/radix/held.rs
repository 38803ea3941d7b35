//! What the owner of leaves may do with them while they go on translating.
//!
//! [`hold_all`](Radix::hold_all) and [`hold_exactly`](Radix::hold_exactly) make leaves present *and* busy: walkers use
//! them as before, and nobody else may change them. Their owner brings whatever follows the table in step, changes
//! permissions or outputs here with one store for each leaf, and [lets go](Radix::let_go_all). A walker sees the old
//! leaf or the new one and never nothing. Going back is letting go before anything was changed.
//!
//! Here are also the few questions about where mappings begin: the bit for it belongs to whoever owns the leaf.

use super::claim::software_bits;
use super::{CutError, Next, Radix, RetractError, Slot, Stop, Stretch, Visitor, leaf_span, leaves_span};
use crate::address::{IovaRange, Oa, PageSize};
use crate::atomic::AtomicEntry;
use crate::format::{Attributes, ClaimFormat, Entry};
use crate::gather::Gather;
use crate::memory::TableMemory;
use crate::radix::Leaf;
use core::convert::Infallible;
use core::ops::ControlFlow;

struct HoldAll<'a, F: ClaimFormat, M: TableMemory<A>, A: AtomicEntry> {
    radix: &'a Radix<F, M, A>,
    range: IovaRange,
    /// Leaves that are larger, or reach over an end of the range, are cut first. `None`: every leaf as it is.
    largest: Option<PageSize>,
    gather: &'a mut Gather<M, A>,
}

impl<F: ClaimFormat, M: TableMemory<A>, A: AtomicEntry> Visitor<M, A> for HoldAll<'_, F, M, A> {
    type Error = RetractError;

    /// Takes leaves of the entries' own size as long as they are present and nobody else's.
    fn stretch(&mut self, stretch: Stretch<'_, A>) -> Result<usize, Stop<RetractError>> {
        let Stretch { node, entries, first } = stretch;
        let format = &self.radix.format;
        let size = PageSize(format.shift(node.level) as u8);
        if self.largest.is_some_and(|largest| size > largest) {
            return Ok(0);
        }
        let other = entries.iter().position(|entry| {
            let value = entry.load();
            let free = value & F::BUSY == 0 && matches!(format.decode(node.level, value), Entry::Leaf { .. });
            !free || entry.compare_exchange(value, value | F::BUSY).is_err()
        });
        let done = other.unwrap_or(entries.len());
        if let Some(range) = leaves_span(first, 0, done, size) {
            self.gather.removed(range, size, done as u64);
        }
        Ok(done)
    }

    fn slot(&mut self, slot: Slot<'_, A>) -> Result<Next, Stop<RetractError>> {
        if slot.value & F::BUSY != 0 {
            return Err(Stop::Error(RetractError::Contended { at: slot.first }));
        }
        let Entry::Leaf { size, .. } = slot.decoded else { return Ok(Next::After(slot.last)) };
        let (first, last) = leaf_span(slot.first, size);
        let outside = first < self.range.first() || last > self.range.last();
        if self.largest.is_some_and(|largest| outside || size > largest) {
            let software = software_bits::<F>();
            self.radix.cut_leaf(&slot, software, self.gather).map_err(|error| Stop::Error(error.into()))?;
            return Ok(Next::Again);
        }
        if slot.entry.compare_exchange(slot.value, slot.value | F::BUSY).is_err() {
            return Ok(Next::Again);
        }
        if let Some(leaf) = IovaRange::new(first, last) {
            self.gather.removed(leaf, size, 1);
        }
        Ok(Next::After(last))
    }

    fn gather(&mut self) -> Option<&mut Gather<M, A>> {
        Some(self.gather)
    }
}

/// What becomes of leaves that are held.
#[derive(Clone, Copy)]
enum Change {
    Permissions(Attributes),
    /// The first address of the range leads there.
    Output(IovaRange, Oa, Attributes),
    LetGo,
}

struct ChangeHeld<'a, F: ClaimFormat, M: TableMemory<A>, A: AtomicEntry> {
    radix: &'a Radix<F, M, A>,
    change: Change,
}

impl<F: ClaimFormat, M: TableMemory<A>, A: AtomicEntry> Visitor<M, A> for ChangeHeld<'_, F, M, A> {
    type Error = Infallible;

    fn slot(&mut self, slot: Slot<'_, A>) -> Result<Next, Stop<Infallible>> {
        let Entry::Leaf { oa, size, attributes } = slot.decoded else { return Ok(Next::After(slot.last)) };
        let (first, last) = leaf_span(slot.first, size);
        if slot.value & F::BUSY == 0 {
            return Ok(Next::After(last));
        }
        let (level, format) = (slot.node.level, &self.radix.format);
        let kept = slot.value & (F::BUSY | F::FIRST);
        // The leaf is ours: a store is enough.
        slot.entry.store(match self.change {
            Change::Permissions(permissions) => {
                let attributes = attributes.difference(Attributes::PERMISSIONS) | permissions;
                format.leaf_entry(level, size, oa, attributes) | kept
            }
            Change::Output(range, oa, attributes) => {
                let oa = oa.get().wrapping_add(first.wrapping_sub(range.first()));
                format.leaf_entry(level, size, oa, attributes) | kept
            }
            Change::LetGo => slot.value & !F::BUSY,
        });
        self.radix.clean(core::slice::from_ref(slot.entry));
        Ok(Next::After(last))
    }
}

/// Calls back for every entry that is not empty, whoever owns it: its whole span, its value, and the leaf in it.
struct Owners<'a, F: ClaimFormat, M: TableMemory<A>, A: AtomicEntry, C> {
    radix: &'a Radix<F, M, A>,
    callback: C,
}

impl<F, M, A, C> Visitor<M, A> for Owners<'_, F, M, A, C>
where
    F: ClaimFormat,
    M: TableMemory<A>,
    A: AtomicEntry,
    C: FnMut(IovaRange, u64, Option<Leaf>) -> ControlFlow<()>,
{
    type Error = ();

    fn slot(&mut self, slot: Slot<'_, A>) -> Result<Next, Stop<()>> {
        if slot.value == 0 {
            return Ok(Next::After(slot.last));
        }
        // A leaf of this kind of format is one entry.
        let size = PageSize(self.radix.format.shift(slot.node.level) as u8);
        let (first, last) = leaf_span(slot.first, size);
        let leaf = match slot.decoded {
            Entry::Leaf { oa, size, attributes } => {
                Some(Leaf { iova: first, oa: Oa::new(oa), size, attributes })
            }
            _ => None,
        };
        match IovaRange::new(first, last).map(|span| (self.callback)(span, slot.value, leaf)) {
            Some(ControlFlow::Break(())) => Err(Stop::Error(())),
            _ => Ok(Next::After(slot.last)),
        }
    }
}

impl<F: ClaimFormat, M: TableMemory<A>, A: AtomicEntry> Radix<F, M, A> {
    /// Owns every present leaf that has an address in the range, as it is: it goes on translating, and nobody else
    /// changes it. The gather's runs name the leaves, with all that they map; each run ends in
    /// [`let_go_all`](Self::let_go_all), also after an error.
    pub fn hold_all(&self, range: IovaRange, gather: &mut Gather<M, A>) -> Result<(), RetractError> {
        self.run(&mut HoldAll { radix: self, range, largest: None, gather }, range)
    }

    /// The same for leaves that lie in the range and are no larger than `largest`: what is larger, or reaches over an
    /// end, is cut before, which changes no translation.
    pub fn hold_exactly(
        &self,
        range: IovaRange,
        largest: PageSize,
        gather: &mut Gather<M, A>,
    ) -> Result<(), RetractError> {
        let low = (1 << self.format.shift(1)) - 1;
        if (range.first() | !range.last()) & low != 0 {
            return Err(RetractError::Cut(CutError::Misaligned { at: range.first() }));
        }
        let largest = Some(largest.max(PageSize(self.format.shift(1) as u8)));
        self.run(&mut HoldAll { radix: self, range, largest, gather }, range)
    }

    /// Ends [`hold_all`](Self::hold_all) and [`hold_exactly`](Self::hold_exactly). All present leaves of the range that
    /// are busy must be the caller's.
    pub fn let_go_all(&self, range: IovaRange) {
        self.change_held(range, Change::LetGo);
    }

    /// Gives the caller's present and busy leaves in the range these [permissions](Attributes::PERMISSIONS).
    pub fn protect_held(&self, range: IovaRange, permissions: Attributes) {
        self.change_held(range, Change::Permissions(permissions & Attributes::PERMISSIONS));
    }

    /// Lets the caller's present and busy leaves in the range lead to the output addresses from `oa` on. They lie in it
    /// as a whole and are small enough for the output to be a multiple of each one's size.
    pub fn remap_held(&self, range: IovaRange, oa: Oa, attributes: Attributes) {
        self.change_held(range, Change::Output(range, oa, attributes));
    }

    fn change_held(&self, range: IovaRange, change: Change) {
        let Ok(()) = self.run(&mut ChangeHeld { radix: self, change }, range);
    }

    /// Shows what is not free to be mapped in `range`, ascending: the span of each leaf, and the leaf itself. `None`: an
    /// operation owns it, and nobody else can say what becomes of it.
    pub fn settled(
        &self,
        range: IovaRange,
        mut callback: impl FnMut(IovaRange, Option<Leaf>) -> ControlFlow<()>,
    ) {
        let show =
            |span, value: u64, leaf: Option<Leaf>| callback(span, leaf.filter(|_| value & F::BUSY == 0));
        self.owners(range, show);
    }

    /// Shows the present leaves that have an address in `range`, ascending, and whether a mapping begins with each.
    pub fn mapped(&self, range: IovaRange, mut callback: impl FnMut(Leaf, bool) -> ControlFlow<()>) {
        let show = |_, value: u64, leaf: Option<Leaf>| match leaf {
            Some(leaf) => callback(leaf, value & F::FIRST != 0),
            None => ControlFlow::Continue(()),
        };
        self.owners(range, show);
    }

    /// How many mappings begin in the range, whoever owns their leaves.
    pub fn beginnings(&self, range: IovaRange) -> u64 {
        let mut count = 0;
        let show = |span: IovaRange, value: u64, _| {
            count += u64::from(value & F::FIRST != 0 && range.contains(span.first()));
            ControlFlow::Continue(())
        };
        self.owners(range, show);
        count
    }

    /// Whether `at` lies in a leaf, whoever owns it, and no mapping begins there: a mapping that holds the address before
    /// it goes on.
    pub fn continues(&self, at: u64) -> bool {
        let mut continues = false;
        if let Some(range) = IovaRange::new(at, at) {
            self.owners(range, |span, value, _| {
                continues = value & F::FIRST == 0 || span.first() != at;
                ControlFlow::Break(())
            });
        }
        continues
    }

    fn owners(
        &self,
        range: IovaRange,
        callback: impl FnMut(IovaRange, u64, Option<Leaf>) -> ControlFlow<()>,
    ) {
        // The only error is the callback's wish to end.
        let _ = self.run(&mut Owners { radix: self, callback }, range);
    }

    /// Says whether a mapping begins at the caller's busy leaf in which `at` lies.
    pub fn set_beginning(&self, at: u64, begins: bool) {
        struct Set<F>(bool, core::marker::PhantomData<F>);

        impl<F: ClaimFormat, M: TableMemory<A>, A: AtomicEntry> Visitor<M, A> for Set<F> {
            type Error = Infallible;

            fn slot(&mut self, slot: Slot<'_, A>) -> Result<Next, Stop<Infallible>> {
                if slot.value & F::BUSY != 0 {
                    slot.entry.store(if self.0 { slot.value | F::FIRST } else { slot.value & !F::FIRST });
                }
                Ok(Next::After(slot.last))
            }
        }

        if let Some(range) = IovaRange::new(at, at) {
            let Ok(()) = self.run(&mut Set::<F>(begins, core::marker::PhantomData), range);
        }
    }
}
