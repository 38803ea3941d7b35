//! What a space allows of mappings: how many, and whether they may be cut.
//!
//! Some users of an address space need what VFIO's first interface promised: a bound on the number of mappings, because
//! each used to cost kernel memory, and an unmap that never leaves half of a mapping behind. Neither costs a space
//! anything that does not ask for it: where no bound is set nothing is counted, and where mappings may be cut nobody
//! looks where they begin.
//!
//! A mapping is what one call has mapped. The native table knows where each begins. What an unmap leaves behind a hole
//! that it has cut is a mapping of its own; so exact unmaps can make more of them than the bound allows, and are never
//! refused for it.

use super::Space;
use crate::sync::{AtomicU64, Ordering};
use ioasid_pagetable::{IovaRange, Runs};

/// What a space allows of mappings. By default everything.
///
/// ```
/// use ioasid::pagetable::Native;
/// use ioasid::{Account, Backing, Bus, Iova, IovaRange, MappingPolicy, Memory, Permissions, Space, UnmapError};
///
/// let bus = Bus::new();
/// let ram = Memory::register(&Backing::anonymous(&bus, 1 << 20)?, 0, 1 << 20, &Account::new("guest", None))?;
/// let space = Space::with_policy(&bus, Native::new(), MappingPolicy::TYPE1_V2);
/// space.map(Iova::new(0x10000), &ram, 0, 0x8000, Permissions::READ)?;
/// let whole = IovaRange::with_length(0x10000, 0x8000).unwrap();
/// let half = IovaRange::with_length(0x10000, 0x4000).unwrap();
/// assert!(matches!(space.unmap(half), Err(UnmapError::CutsMapping { mapping }) if mapping == whole));
/// assert_eq!(space.unmap(whole)?.bytes(), 0x8000);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct MappingPolicy {
    /// At most so many mappings; one more is refused ([`MapError::TooManyMappings`](super::MapError::TooManyMappings)).
    pub most: Option<u64>,
    /// Mappings are unmapped whole: an unmap that would cut one is refused and names it. Memory that goes is unmapped in
    /// any case.
    pub whole_only: bool,
}

impl MappingPolicy {
    /// What a container of VFIO's type1 IOMMU, version 2, allows unless its module was told otherwise.
    pub const TYPE1_V2: MappingPolicy = MappingPolicy { most: Some(65535), whole_only: true };

    /// Whether it has to be known where mappings begin.
    pub(super) fn knows_mappings(&self) -> bool {
        self.most.is_some() || self.whole_only
    }
}

/// How many mappings there are, in a space that counts them.
#[derive(Debug, Default)]
pub(super) struct MappingCount(AtomicU64);

impl MappingCount {
    /// Counts some more, if that does not make them too many.
    pub(super) fn count_in(&self, count: u64, most: u64) -> bool {
        let more = |now: u64| now.checked_add(count).filter(|sum| *sum <= most);
        self.0.fetch_update(Ordering::Relaxed, Ordering::Relaxed, more).is_ok()
    }

    /// Counts some less.
    pub(super) fn count_out(&self, count: u64) {
        if count > 0 {
            self.0.fetch_sub(count, Ordering::Relaxed);
        }
    }

    /// Counts anew.
    pub(super) fn set(&self, count: u64) {
        self.0.store(count, Ordering::Relaxed);
    }

    fn count_one_more(&self) {
        self.0.fetch_add(1, Ordering::Relaxed);
    }
}

impl Space {
    /// What the space allows of mappings.
    pub fn policy(&self) -> MappingPolicy {
        self.policy
    }

    /// How many mappings there are. A space that has no bound for them counts them now, by looking at every leaf; if it
    /// need not know where they begin either, neighbours may count as one after unmaps and merges.
    pub fn mapping_count(&self) -> u64 {
        if self.policy.most.is_some() {
            return self.mappings.0.load(Ordering::Relaxed);
        }
        let _operation = crate::epoch::operation();
        self.native.beginnings(IovaRange::ALL)
    }

    /// A mapping that an unmap of the range would cut. Inside an operation.
    pub(super) fn cut_by(&self, range: IovaRange) -> Option<IovaRange> {
        let ends = [Some(range.first()), range.last().checked_add(1)];
        let at = ends.into_iter().flatten().find(|at| *at != 0 && self.native.continues(*at))?;
        // From where it begins, as far as it is one.
        let mut first = at;
        while self.native.continues(first) {
            let Some(leaf) = first.checked_sub(1).and_then(|before| self.native.walk(before).ok()) else {
                break;
            };
            first = leaf.iova;
        }
        let mut last = at;
        while let Ok(leaf) = self.native.walk(last) {
            last = leaf.range().last();
            match last.checked_add(1) {
                Some(next) if self.native.continues(next) => last = next,
                _ => break,
            }
        }
        IovaRange::new(first, last.max(at))
    }

    /// Counts the mappings that begin in what was retracted, before it is released.
    pub(super) fn count_out_runs(&self, runs: &Runs) {
        if self.policy.most.is_some() {
            let count = runs.iter().map(|run| self.native.beginnings(run)).sum();
            self.mappings.count_out(count);
        }
    }

    /// What an unmap has left of mappings behind the runs are mappings of their own from now on. Outside of all sections.
    pub(super) fn begin_behind_runs(&self, runs: &Runs) {
        if !self.policy.knows_mappings() {
            return;
        }
        for at in runs.iter().filter_map(|run| run.last().checked_add(1)) {
            let Some(page) = IovaRange::new(at, at) else { continue };
            let mut tries = 0;
            while !self.begin_at(at, page) {
                self.step_aside(&mut tries);
            }
        }
    }

    /// `false`: somebody is at work there.
    fn begin_at(&self, at: u64, page: IovaRange) -> bool {
        let _operation = crate::epoch::operation();
        if !self.native.continues(at) {
            return true;
        }
        let Ok(Some(leaf)) = self.native.hold(page) else { return false };
        if self.native.continues(at) {
            self.native.set_beginning(at, true);
            if self.policy.most.is_some() {
                self.mappings.count_one_more();
            }
        }
        self.native.let_go(&leaf);
        true
    }
}
