//! Where mappings may be, and the tables that follow the native one.
//!
//! A change is made in three steps, under the space's one lock for changes: publish the new layout, wait for the
//! operations that may still be using the old one, then check it against what is mapped. If the check fails, the
//! old layout is published again. So a mapper that has seen no reservation is found by the one who reserves; one
//! that sees a reservation which is not decided yet waits for the decision. And a table misses no mapping: what was
//! mapped before it was published is copied, what is mapped afterwards is mapped in it by the mapper, and where both
//! happen the copy finds an equal leaf. A table joins in two such steps, so that at no time an operation maps in it
//! what another one, running beside it, does not know to unmap there.

use super::Space;
use crate::epoch;
use crate::iommu::{AttachError, Coherency, DerivedTable, TableClass, TableError};
use crate::table::Table;
use ioasid_pagetable::{IovaRange, RetractError};
use std::ops::ControlFlow;
use std::sync::{Arc, Weak};

/// On whose behalf a range is reserved.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum ReservationOwner {
    /// The user of the space, with a number of its choice.
    User(u64),
    /// A table that cannot translate these addresses.
    Table(u64),
    /// An attached device.
    Device(u64),
}

/// Why a range was not reserved, or ranges not allowed. Everything is as before.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ReserveError {
    /// Something is mapped there.
    #[error("{range} cannot be reserved: something is mapped there")]
    Mapped {
        /// What was to be reserved.
        range: IovaRange,
    },
    /// The addresses are among the allowed ones.
    #[error("{range} cannot be reserved: it is among the allowed addresses")]
    Allowed {
        /// What was to be reserved.
        range: IovaRange,
    },
    /// The addresses are reserved.
    #[error("{range} cannot be allowed: it is reserved")]
    Reserved {
        /// What was to be allowed.
        range: IovaRange,
    },
    /// The allowed ranges overlap each other.
    #[error("{range} is named twice")]
    Overlapping {
        /// One of them.
        range: IovaRange,
    },
}

/// What every operation has to know of a space besides its table.
#[derive(Clone, Debug, Default)]
pub(super) struct Layout {
    /// By first address; may overlap each other.
    reserved: Vec<(IovaRange, ReservationOwner)>,
    /// What will be reserved unless something is mapped there.
    undecided: Vec<IovaRange>,
    /// By first address; do not overlap. None: everywhere.
    allowed: Vec<IovaRange>,
    tables: Vec<Follower>,
}

/// A table that devices may be attached to.
#[derive(Clone, Debug)]
struct Follower {
    id: u64,
    class: TableClass,
    /// Devices that come later and are to have this may share it.
    shared: Option<Coherency>,
    derived: Option<Arc<dyn DerivedTable>>,
    /// Mappings are made in it. Before that comes a time in which they are only removed.
    filling: bool,
    table: Weak<Table>,
}

impl Layout {
    /// A reserved range that overlaps this one, the one that reaches furthest.
    pub(super) fn reserved_in(&self, range: IovaRange) -> Option<IovaRange> {
        let until = self.reserved.partition_point(|(reserved, _)| reserved.first() <= range.last());
        let overlapping = self.reserved[..until].iter().map(|(reserved, _)| *reserved);
        overlapping.filter(|reserved| reserved.overlaps(&range)).max_by_key(IovaRange::last)
    }

    /// Whether a part of the range is just being reserved, successfully or not.
    pub(super) fn is_undecided(&self, range: IovaRange) -> bool {
        self.undecided.iter().any(|undecided| undecided.overlaps(&range))
    }

    /// Asks `find` for a place in each range in which mappings may be placed, lowest first.
    pub(super) fn find_place<T>(&self, mut find: impl FnMut(IovaRange) -> Option<T>) -> Option<T> {
        // Nothing that is allowed is reserved.
        if self.allowed.is_empty() {
            self.usable().find_map(find)
        } else {
            self.allowed.iter().find_map(|allowed| find(*allowed))
        }
    }

    /// What is not reserved, ascending.
    fn usable(&self) -> impl Iterator<Item = IovaRange> + '_ {
        let mut next = Some(0u64);
        let mut reserved = self.reserved.iter();
        std::iter::from_fn(move || {
            loop {
                let first = next?;
                let Some((taken, _)) = reserved.next() else {
                    next = None;
                    return IovaRange::new(first, u64::MAX);
                };
                next = taken.last().checked_add(1).map(|end| end.max(first));
                let hole = taken.first().checked_sub(1).and_then(|last| IovaRange::new(first, last));
                if hole.is_some() {
                    return hole;
                }
            }
        })
    }

    /// The tables from which mappings are removed.
    pub(super) fn derived(&self) -> impl Iterator<Item = &Arc<dyn DerivedTable>> {
        self.tables.iter().filter_map(|follower| follower.derived.as_ref())
    }

    /// The tables in which mappings are made.
    pub(super) fn filling(&self) -> impl Iterator<Item = &Arc<dyn DerivedTable>> {
        self.tables
            .iter()
            .filter(|follower| follower.filling)
            .filter_map(|follower| follower.derived.as_ref())
    }

    pub(super) fn table_count(&self) -> usize {
        self.tables.len()
    }

    fn reserve(&mut self, range: IovaRange, owner: ReservationOwner) {
        let index = self.reserved.partition_point(|(reserved, _)| reserved.first() <= range.first());
        self.reserved.insert(index, (range, owner));
    }
}

impl Space {
    /// Keeps mappings out of the range until [`unreserve`](Self::unreserve). Fails where something is mapped or
    /// explicitly allowed.
    pub fn reserve(&self, range: IovaRange, owner: ReservationOwner) -> Result<(), ReserveError> {
        self.reserve_all(&[range], owner)
    }

    /// Reserves several ranges or none.
    pub(crate) fn reserve_all(
        &self,
        ranges: &[IovaRange],
        owner: ReservationOwner,
    ) -> Result<(), ReserveError> {
        if ranges.is_empty() {
            return Ok(());
        }
        let _changing = self.changing();
        let old = self.layout.read().clone();
        for range in ranges {
            if old.allowed.iter().any(|allowed| allowed.overlaps(range)) {
                return Err(ReserveError::Allowed { range: *range });
            }
        }
        let mut new = old.clone();
        new.undecided = ranges.to_vec();
        self.layout.replace(new.clone());
        // What is unmapped already and only waits for a flush is in nobody's way.
        self.flush();
        let mapped = {
            let _operation = epoch::operation();
            ranges.iter().find(|range| self.occupied_in(**range).is_some())
        };
        if let Some(range) = mapped {
            self.layout.replace(old);
            return Err(ReserveError::Mapped { range: *range });
        }
        new.undecided = Vec::new();
        for range in ranges {
            new.reserve(*range, owner);
        }
        self.layout.replace(new);
        Ok(())
    }

    /// Gives back all that was reserved for this owner.
    pub fn unreserve(&self, owner: ReservationOwner) {
        let _changing = self.changing();
        let mut layout = self.layout.read().clone();
        layout.reserved.retain(|(_, of)| *of != owner);
        self.layout.replace(layout);
    }

    /// Sets the ranges in which [`map_anywhere`](Self::map_anywhere) places mappings and which cannot be reserved
    /// from now on; none: everywhere. Mappings at addresses of the caller's choice are not limited.
    pub fn set_allowed(&self, ranges: &[IovaRange]) -> Result<(), ReserveError> {
        let mut sorted = ranges.to_vec();
        sorted.sort_unstable();
        if let Some(pair) = sorted.windows(2).find(|pair| pair[0].overlaps(&pair[1])) {
            return Err(ReserveError::Overlapping { range: pair[1] });
        }
        let _changing = self.changing();
        let mut layout = self.layout.read().clone();
        if let Some(range) = sorted.iter().find(|range| layout.reserved_in(**range).is_some()) {
            return Err(ReserveError::Reserved { range: *range });
        }
        layout.allowed = sorted;
        self.layout.replace(layout);
        Ok(())
    }

    /// The allowed ranges, ascending.
    pub fn allowed_ranges(&self) -> Vec<IovaRange> {
        self.layout.read().allowed.clone()
    }

    /// The reserved ranges by first address; they may overlap.
    pub fn reserved_ranges(&self) -> Vec<IovaRange> {
        self.layout.read().reserved.iter().map(|(range, _)| *range).collect()
    }

    /// What users have reserved, by first address, with the number of each.
    pub(super) fn user_reservations(&self) -> Vec<(IovaRange, u64)> {
        let layout = self.layout.read();
        let of_users = layout.reserved.iter().filter_map(|(range, owner)| match owner {
            ReservationOwner::User(number) => Some((*range, *number)),
            ReservationOwner::Table(_) | ReservationOwner::Device(_) => None,
        });
        of_users.collect()
    }

    /// Sets all reserved and allowed ranges, sorted and apart from each other, of a space that nobody uses yet and that
    /// has no mapping in a reserved one.
    pub(super) fn set_ranges(&self, reserved: &[(IovaRange, u64)], allowed: &[IovaRange]) {
        let _changing = self.changing();
        let mut layout = self.layout.read().clone();
        let of_user = |&(range, number)| (range, ReservationOwner::User(number));
        layout.reserved = reserved.iter().map(of_user).collect();
        layout.allowed = allowed.to_vec();
        self.layout.replace(layout);
    }

    /// The addresses that are not reserved, ascending.
    pub fn usable_ranges(&self) -> Vec<IovaRange> {
        self.layout.read().usable().collect()
    }

    /// Something in the range that is mapped or being mapped. Inside an operation.
    pub(super) fn occupied_in(&self, range: IovaRange) -> Option<IovaRange> {
        let mut found = None;
        self.native.occupied(range, |occupied| {
            found = Some(occupied);
            ControlFlow::Break(())
        });
        found
    }

    /// The table that devices of a class share which are to have this coherency, if there is one. One that is just going away does not count.
    pub(crate) fn shared_table(&self, class: TableClass, coherency: Coherency) -> Option<Arc<Table>> {
        let layout = self.layout.read();
        let fits = |table: &&Follower| table.shared == Some(coherency) && table.class == class;
        let mut shared = layout.tables.iter().filter(fits);
        shared.find_map(|table| table.table.upgrade())
    }

    /// Lets a table follow the space from now on, and fills it with what is mapped already.
    pub(crate) fn add_table(
        &self,
        table: &Weak<Table>,
        id: u64,
        class: TableClass,
        shared: Option<Coherency>,
        derived: Option<&Arc<dyn DerivedTable>>,
    ) -> Result<(), AttachError> {
        let _changing = self.changing();
        let follower =
            Follower { id, class, shared, derived: derived.cloned(), filling: false, table: table.clone() };
        // First everybody removes from it, and only then anybody adds to it: an operation that does not know the
        // table yet would leave in it what another one, that does, has mapped.
        self.change_layout(|layout| layout.tables.push(follower));
        // What a shadow remembers has been asked for; the space only takes it away.
        let fills = !matches!(class, TableClass::Nested(_));
        if let Some(derived) = derived.filter(|_| fills) {
            self.change_layout(|layout| {
                layout
                    .tables
                    .iter_mut()
                    .filter(|table| table.id == id)
                    .for_each(|table| table.filling = true);
            });
            if let Err(error) = self.fill(&**derived) {
                self.change_layout(|layout| layout.tables.retain(|follower| follower.id != id));
                return Err(error.into());
            }
        }
        Ok(())
    }

    /// Publishes a layout with a change, and waits until every operation uses it. Under the lock for changes.
    fn change_layout(&self, change: impl FnOnce(&mut Layout)) {
        let mut layout = self.layout.read().clone();
        change(&mut layout);
        self.layout.replace(layout);
    }

    /// Copies all leaves into a new table, while operations go on.
    fn fill(&self, table: &dyn DerivedTable) -> Result<(), TableError> {
        let mut first = Some(0);
        let mut tries = 0;
        while let Some(range) = first.and_then(|first| IovaRange::new(first, u64::MAX)) {
            let operation = epoch::operation();
            match self.native.hold(range) {
                Ok(None) => break,
                Ok(Some(leaf)) => {
                    let result = table.fill(leaf.range(), leaf.oa, leaf.attributes);
                    self.native.let_go(&leaf);
                    result?;
                    first = leaf.range().last().checked_add(1);
                    tries = 0;
                }
                Err(RetractError::Contended { at }) => {
                    drop(operation);
                    first = Some(at);
                    self.step_aside(&mut tries);
                }
                Err(RetractError::Cut(_)) => break,
            }
        }
        Ok(())
    }

    /// Ends what [`add_table`](Self::add_table) began: no operation uses the table any more.
    pub(crate) fn remove_table(&self, id: u64) {
        let _changing = self.changing();
        self.change_layout(|layout| layout.tables.retain(|follower| follower.id != id));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Bus;

    fn range(first: u64, last: u64) -> IovaRange {
        IovaRange::new(first, last).unwrap()
    }

    #[test]
    fn usable_is_what_is_not_reserved() {
        let space = Space::new(&Bus::new());
        assert_eq!(space.usable_ranges(), [IovaRange::ALL]);
        space.reserve(range(0x2000, 0x4fff), ReservationOwner::User(1)).unwrap();
        space.reserve(range(0x3000, 0x3fff), ReservationOwner::User(2)).unwrap();
        space.reserve(range(0, 0xfff), ReservationOwner::User(2)).unwrap();
        assert_eq!(space.usable_ranges(), [range(0x1000, 0x1fff), range(0x5000, u64::MAX)]);
        space.reserve(range(0x8000, u64::MAX), ReservationOwner::User(1)).unwrap();
        assert_eq!(space.usable_ranges(), [range(0x1000, 0x1fff), range(0x5000, 0x7fff)]);
        space.unreserve(ReservationOwner::User(1));
        assert_eq!(space.usable_ranges(), [range(0x1000, 0x2fff), range(0x4000, u64::MAX)]);
    }

    #[test]
    fn allowed_and_reserved_exclude_each_other() {
        let space = Space::new(&Bus::new());
        space.set_allowed(&[range(0x4000, 0x4fff), range(0x1000, 0x1fff)]).unwrap();
        assert_eq!(space.allowed_ranges(), [range(0x1000, 0x1fff), range(0x4000, 0x4fff)]);
        let refused = space.reserve(range(0x4fff, 0x5fff), ReservationOwner::User(1));
        assert_eq!(refused, Err(ReserveError::Allowed { range: range(0x4fff, 0x5fff) }));
        space.reserve(range(0x2000, 0x2fff), ReservationOwner::User(1)).unwrap();
        let twice = [range(0, 1), range(1, 2)];
        assert_eq!(space.set_allowed(&twice), Err(ReserveError::Overlapping { range: range(1, 2) }));
        let over = range(0x2800, 0x3000);
        assert_eq!(space.set_allowed(&[over]), Err(ReserveError::Reserved { range: over }));
        space.set_allowed(&[]).unwrap();
        space.reserve(range(0x4000, 0x4fff), ReservationOwner::User(1)).unwrap();
    }
}
