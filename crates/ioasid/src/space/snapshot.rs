//! Taking a snapshot of a space, and building a space from one.
//!
//! What a leaf leads to is found as its user named it: the bus knows the object, and the byte of the object is in one of
//! the memories of that object that have names.
//!
//! A space is restored with the same map that everybody uses, one leaf at a time, before anybody else knows of the
//! space. What cannot be said to a map is put right afterwards: where mappings begin and how many there are.

use super::{Permissions, Space};
use crate::backing::PAGE_BITS;
use crate::bus::Bus;
use crate::epoch;
use crate::memory::Memory;
use crate::snapshot::{Begins, LEAVES, RestoreError, Run, Snapshot, SnapshotError};
use ioasid_pagetable::{Iova, IovaRange, Leaf, Native, PageSize};
use std::collections::{BTreeMap, HashMap, HashSet};
use std::ops::ControlFlow;
use std::sync::Arc;

/// The memories that have names, by the object that they are parts of.
struct Names(HashMap<usize, Vec<Named>>);

/// A part of an object that has a name.
#[derive(Clone, Copy)]
struct Named {
    first: u64,
    last: u64,
    name: u64,
    /// Where in the object the memory of that name begins.
    offset: u64,
}

impl Names {
    fn new<'a>(memories: impl IntoIterator<Item = (u64, &'a Arc<Memory>)>) -> Result<Names, SnapshotError> {
        let mut objects: HashMap<usize, Vec<Named>> = HashMap::new();
        let mut known = HashSet::new();
        for (name, memory) in memories {
            if !known.insert(name) {
                return Err(SnapshotError::NamedTwice { name });
            }
            let object = Arc::as_ptr(memory.backing()) as usize;
            let parts = objects.entry(object).or_default();
            let offset = memory.offset();
            let Some(last) = memory.length().checked_sub(1).map(|length| offset + length) else { continue };
            // What was given back may be mapped all the same, as a part of another memory.
            parts.extend(memory.held(&memory.pages()).iter().map(|pages| Named {
                first: offset.max(pages.start << PAGE_BITS),
                last: last.min(((pages.end - 1) << PAGE_BITS) | ((1 << PAGE_BITS) - 1)),
                name,
                offset,
            }));
        }
        for parts in objects.values_mut() {
            parts.sort_unstable_by_key(|part| (part.first, std::cmp::Reverse(part.last)));
            // What lies in another one is not needed. The others end in the order in which they begin.
            let mut reach = None;
            parts.retain(|part| {
                let reaches_further = reach.is_none_or(|reach| part.last > reach);
                reach = reach.max(Some(part.last));
                reaches_further
            });
        }
        Ok(Names(objects))
    }

    /// The name of a memory that has all these bytes of an object, and where in it they are.
    fn find(&self, object: usize, first: u64, last: u64) -> Option<(u64, u64)> {
        let parts = self.0.get(&object)?;
        let until = parts.partition_point(|part| part.first <= first);
        let part = parts[..until].last().filter(|part| part.last >= last)?;
        Some((part.name, first - part.offset))
    }
}

impl Space {
    /// All of the space that is its user's, with these names for its memory: everything that is mapped has to be in one of
    /// them. See [`Snapshot`](crate::snapshot) for what it is good for.
    ///
    /// Whoever maps or unmaps meanwhile may or may not be seen.
    pub fn snapshot<'a>(
        &self,
        memories: impl IntoIterator<Item = (u64, &'a Arc<Memory>)>,
    ) -> Result<Snapshot, SnapshotError> {
        let names = Names::new(memories)?;
        let format: &Native = self.native.format();
        let mut snapshot = Snapshot {
            granule: format.granule(),
            largest_leaf: format.largest_leaf(),
            policy: self.policy,
            reserved: self.user_reservations(),
            allowed: self.allowed_ranges(),
            runs: Vec::new(),
        };
        let (mut result, mut leaves, mut end) = (Ok(()), 0, None);
        let _operation = epoch::operation();
        self.native.mapped(IovaRange::ALL, |leaf, begins| {
            // Behind a hole nothing goes on, whoever has made the hole.
            let continues = !begins && end == Some(leaf.iova);
            end = leaf.range().last().checked_add(1);
            let begins = if continues { Begins::Nowhere } else { Begins::First };
            match self.record(&names, &leaf, begins, &mut snapshot, &mut leaves) {
                Ok(()) => ControlFlow::Continue(()),
                Err(error) => {
                    result = Err(error);
                    ControlFlow::Break(())
                }
            }
        });
        result.map(|()| snapshot)
    }

    /// Adds a leaf to the snapshot; in halves if it leads to several memories.
    fn record(
        &self,
        names: &Names,
        leaf: &Leaf,
        begins: Begins,
        snapshot: &mut Snapshot,
        leaves: &mut u64,
    ) -> Result<(), SnapshotError> {
        if let Some((memory, offset)) = self.name_of(names, leaf) {
            *leaves += 1;
            if *leaves > LEAVES {
                return Err(SnapshotError::TooManyLeaves);
            }
            let permissions = Permissions::of(leaf.attributes);
            let (first, leaf) = (leaf.iova, leaf.size);
            snapshot.push(Run { first, leaves: 1, memory, offset, leaf, permissions, begins });
            return Ok(());
        }
        let half = leaf.size.log2().checked_sub(1).and_then(PageSize::from_log2);
        let half = half.filter(|half| *half >= self.granule());
        let size = half.ok_or(SnapshotError::UnknownMemory { range: leaf.range() })?;
        let lower = Leaf { size, ..*leaf };
        let upper =
            Leaf { iova: leaf.iova + size.bytes(), oa: leaf.output(leaf.iova + size.bytes()), ..lower };
        self.record(names, &lower, begins, snapshot, leaves)?;
        self.record(names, &upper, Begins::Nowhere, snapshot, leaves)
    }

    /// The memory that all of a leaf leads to, and where in it.
    fn name_of(&self, names: &Names, leaf: &Leaf) -> Option<(u64, u64)> {
        let (oa, length) = (leaf.oa.get(), leaf.size.bytes());
        let last = oa.checked_add(length - 1)?;
        let (object, offset, mut end) = self.bus.object(oa)?;
        // A large leaf lies over several windows of one object.
        while end < last {
            let (next, at, next_end) = self.bus.object(end + 1)?;
            if !Arc::ptr_eq(&next, &object) || at != offset + (end + 1 - oa) {
                return None;
            }
            end = next_end;
        }
        names.find(Arc::as_ptr(&object) as usize, offset, offset.checked_add(length - 1)?)
    }

    /// A space as it is in the snapshot.
    pub(crate) fn from_snapshot(
        snapshot: &Snapshot,
        bus: &Arc<Bus>,
        memories: &BTreeMap<u64, Arc<Memory>>,
    ) -> Result<Arc<Space>, RestoreError> {
        let space = Space::with_policy(bus, snapshot.format().unwrap_or_default(), snapshot.policy);
        let mut leaves = 0u64;
        for run in &snapshot.runs {
            let name = run.memory;
            let memory = memories.get(&name).ok_or(RestoreError::NoMemory { name })?;
            leaves = leaves.saturating_add(run.leaves.saturating_mul(pieces_of_leaf(run, memory, &space)));
            if leaves > LEAVES {
                return Err(RestoreError::TooManyLeaves);
            }
            if let Some(range) = run.range() {
                // Once for all leaves.
                memory.note_mapped(&space, range);
            }
            for number in 0..run.leaves {
                let (distance, length) = (number * run.leaf.bytes(), run.leaf.bytes());
                let (first, offset) = (run.first + distance, run.offset + distance);
                // What was mapped is not refused because there are too many now.
                space.mappings.set(0);
                space.map(Iova::new(first), memory, offset, length, run.permissions).map_err(|source| {
                    let range = IovaRange::with_length(first, length).unwrap_or(IovaRange::ALL);
                    RestoreError::Map { name, range, source }
                })?;
                let begins = match run.begins {
                    Begins::Nowhere => false,
                    Begins::First => number == 0,
                    Begins::Each => true,
                };
                if !begins {
                    space.continue_at(first);
                }
            }
        }
        space.mappings.set(space.native.beginnings(IovaRange::ALL));
        space.set_ranges(&snapshot.reserved, &snapshot.allowed);
        Ok(space)
    }

    /// The mapping before goes on at a leaf. Nobody else uses the space yet.
    fn continue_at(&self, at: u64) {
        let Some(page) = IovaRange::new(at, at) else { return };
        let _operation = epoch::operation();
        if let Ok(Some(leaf)) = self.native.hold(page) {
            self.native.set_beginning(at, false);
            self.native.let_go(&leaf);
        }
    }
}

/// How many leaves at most it takes to map what was one leaf. Where the memory has moved in its object it may be many.
fn pieces_of_leaf(run: &Run, memory: &Memory, space: &Space) -> u64 {
    // No leaf can rely on more than the size of the largest window of the bus.
    let largest = run.leaf.min(PageSize::SIZE_1G);
    let possible = memory.offset().wrapping_add(run.offset) % largest.bytes() == 0;
    let piece = if possible { largest } else { space.granule() };
    run.leaf.bytes() / piece.bytes().min(run.leaf.bytes())
}
