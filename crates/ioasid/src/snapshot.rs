//! A space as bytes, and back.
//!
//! A VMM that updates itself without stopping its guest starts its new version, hands the guest's memory over as file
//! descriptors, and has to build the same address spaces again in the new process. A [`Snapshot`] is all of a space that
//! is its user's: where memory is mapped, with leaves of which sizes and which permissions, where mappings begin; what is
//! reserved and allowed; the granule, the largest leaf and the policy. It is a value; [`Snapshot::to_bytes`] and
//! [`Snapshot::from_bytes`] carry it from one process to another, or to another version of the program.
//!
//! What is not in it:
//!
//! - **Memory**, which has names instead: numbers that the caller gives when it takes the snapshot. The new process
//!   registers the same objects, and says which [`Memory`] has which number now. Output addresses differ between
//!   the two; offsets in a memory do not.
//! - **Tables and devices.** They are attached to the restored space as to any other; a derived table is filled then, and
//!   what devices and tables reserve for themselves is reserved again.
//!
//! A snapshot is of no single moment: whoever maps while it is taken may or may not be seen. A VMM has stopped by then.
//!
//! # Leaves
//!
//! A snapshot has *runs*: leaves of one size, one behind the other, that lead to consecutive bytes of one memory and allow
//! the same. The guest's memory is a few of them; in the worst case each leaf is one. A restored space has the same
//! leaves, and not the largest possible ones, because their sizes may have a meaning: a table that cannot be cut, dirty
//! tracking by the page. Only where the new bus has put the memory less well aligned are they smaller.
//!
//! # Trust
//!
//! Bytes are believed nothing. A checksum tells of damage; what still reads as numbers is checked for everything that the
//! picture of a space must be: sorted, apart, aligned, below 2^64. Nothing is allocated but in proportion to the bytes there
//! are. Restoring takes table pages, for at most 2^28 leaves, which map a TiB by the page; whoever wants less looks at
//! [`Snapshot::leaves`] first. It brings back everything, or fails and leaves nothing behind.
//!
//! ```
//! use ioasid::{Account, Backing, Bus, Iova, IovaRange, Memory, Permissions, Snapshot, Space};
//! # fn guest_memory(bus: &std::sync::Arc<Bus>) -> std::sync::Arc<Memory> {
//! #     let backing = Backing::anonymous(bus, 1 << 30).unwrap();
//! #     Memory::register(&backing, 0, 1 << 30, &Account::new("guest", None)).unwrap()
//! # }
//! const GUEST_MEMORY: u64 = 0;
//!
//! // The old process.
//! let bus = Bus::new();
//! let memory = guest_memory(&bus);
//! let space = Space::new(&bus);
//! space.map(Iova::new(0x4000_0000), &memory, 0, 1 << 30, Permissions::READ_WRITE)?;
//! space.unmap(IovaRange::with_length(0x5000_0000, 2 << 20).unwrap())?;
//! let bytes = space.snapshot([(GUEST_MEMORY, &memory)])?.to_bytes();
//!
//! // The new one, in which the same file is registered.
//! let bus = Bus::new();
//! let memory = guest_memory(&bus);
//! let snapshot = Snapshot::from_bytes(&bytes)?;
//! assert_eq!(snapshot.memories().get(&GUEST_MEMORY), Some(&(1 << 30)));
//! let space = snapshot.restore(&bus, |name| (name == GUEST_MEMORY).then(|| memory.clone()))?;
//! assert!(space.walk(Iova::new(0x4fff_ffff)).is_some());
//! assert!(space.walk(Iova::new(0x5000_0000)).is_none());
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```

use crate::memory::Memory;
use crate::space::{MapError, MappingPolicy, Permissions};
use crate::{Bus, Space};
use ioasid_pagetable::{IovaRange, Native, PageSize};
use std::collections::BTreeMap;
use std::sync::Arc;

mod bytes;

/// How many leaves a snapshot may have.
pub(crate) const LEAVES: u64 = 1 << 28;

/// All of a space that is its user's. See the [module](self) for an example.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Snapshot {
    pub(crate) granule: PageSize,
    pub(crate) largest_leaf: PageSize,
    pub(crate) policy: MappingPolicy,
    /// By first address, with the number of the user who has reserved them.
    pub(crate) reserved: Vec<(IovaRange, u64)>,
    /// Ascending.
    pub(crate) allowed: Vec<IovaRange>,
    /// Ascending.
    pub(crate) runs: Vec<Run>,
}

/// Leaves of one size that follow each other, in the space as in a memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Run {
    pub(crate) first: u64,
    pub(crate) leaves: u64,
    pub(crate) memory: u64,
    pub(crate) offset: u64,
    pub(crate) leaf: PageSize,
    pub(crate) permissions: Permissions,
    pub(crate) begins: Begins,
}

/// With which leaves of a run a mapping begins.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Begins {
    /// With none: the mapping before goes on.
    Nowhere = 0,
    /// With the first.
    First = 1,
    /// With each, of which there are several.
    Each = 2,
}

impl Run {
    /// Its addresses; `None` if there are none or some are beyond the last.
    pub(crate) fn range(&self) -> Option<IovaRange> {
        IovaRange::with_length(self.first, self.leaves.checked_mul(self.leaf.bytes())?)
    }

    /// The number of its bytes.
    fn length(&self) -> u64 {
        self.leaves.saturating_mul(self.leaf.bytes())
    }

    /// Whether the other is more of the same.
    fn goes_on(&self, next: &Run) -> bool {
        let length = self.length();
        self.first.checked_add(length) == Some(next.first)
            && self.offset.checked_add(length) == Some(next.offset)
            && (self.memory, self.leaf, self.permissions) == (next.memory, next.leaf, next.permissions)
    }
}

/// Why no snapshot was taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SnapshotError {
    /// Memory is mapped there that has no name.
    #[error("what is mapped at {range} is in none of the memories that were named")]
    UnknownMemory {
        /// The addresses.
        range: IovaRange,
    },
    /// Two memories have the same name.
    #[error("two memories were named {name}")]
    NamedTwice {
        /// The name.
        name: u64,
    },
    /// There are more leaves than a snapshot may have.
    #[error("the space has more than 2^28 leaves")]
    TooManyLeaves,
}

/// Why bytes are no snapshot.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum BadSnapshot {
    /// They are something else.
    #[error("this is no snapshot of a space")]
    Magic,
    /// They were written by another version.
    #[error("the snapshot is of version {version}; only version 1 is known")]
    Version {
        /// The version.
        version: u32,
    },
    /// There are more or fewer bytes than there should be.
    #[error("the snapshot is cut off, or something follows it")]
    Length,
    /// They were damaged.
    #[error("the snapshot is damaged: its checksum is not that of its content")]
    Checksum,
    /// No space has these properties.
    #[error("the snapshot is of no possible space: {field}")]
    Header {
        /// What is wrong.
        field: &'static str,
    },
    /// Ranges overlap, are not sorted or not aligned, or say things that are not known.
    #[error("the snapshot is of no possible space: what it says of {at:#x} cannot be")]
    Content {
        /// The address in question.
        at: u64,
    },
    /// Restoring it would take too much memory for tables.
    #[error("the snapshot has more than 2^28 leaves")]
    TooManyLeaves,
}

/// Why a snapshot was not restored. Nothing was.
#[derive(Debug, thiserror::Error)]
pub enum RestoreError {
    /// A memory is missing.
    #[error("nobody knows the memory that was named {name}")]
    NoMemory {
        /// Its name.
        name: u64,
    },
    /// A memory cannot be mapped as it was: it may be shorter than before, or belong to another bus.
    #[error("the memory that was named {name} cannot be mapped at {range}")]
    Map {
        /// Its name.
        name: u64,
        /// Where.
        range: IovaRange,
        /// The reason.
        #[source]
        source: MapError,
    },
    /// The memories begin elsewhere in their objects than they did, so that it takes smaller leaves, and too many.
    #[error("it would take more than 2^28 leaves to map the memory that is named now")]
    TooManyLeaves,
}

impl Snapshot {
    /// Reads what [`to_bytes`](Self::to_bytes) has written.
    pub fn from_bytes(bytes: &[u8]) -> Result<Snapshot, BadSnapshot> {
        bytes::read(bytes)
    }

    /// The snapshot as bytes: 52 of them, 40 for each run of leaves, 24 for each reserved and 16 for each allowed range.
    pub fn to_bytes(&self) -> Vec<u8> {
        bytes::write(self)
    }

    /// The names of all memories that are mapped, and how many bytes each must at least have.
    pub fn memories(&self) -> BTreeMap<u64, u64> {
        let mut memories = BTreeMap::new();
        for run in &self.runs {
            let end = run.offset.saturating_add(run.length());
            let length = memories.entry(run.memory).or_insert(0);
            *length = end.max(*length);
        }
        memories
    }

    /// How many leaves there are. In the restored space's native table each takes 8 bytes, and those that stand alone
    /// the table pages around them.
    pub fn leaves(&self) -> u64 {
        self.runs.iter().map(|run| run.leaves).sum()
    }

    /// The smallest page that can be mapped in the space.
    pub fn granule(&self) -> PageSize {
        self.granule
    }

    /// Builds the space anew on this bus. `memories` is asked for the memory of each name, once.
    ///
    /// Everything is as before, or there is an error and no space.
    pub fn restore(
        &self,
        bus: &Arc<Bus>,
        mut memories: impl FnMut(u64) -> Option<Arc<Memory>>,
    ) -> Result<Arc<Space>, RestoreError> {
        let mut named = BTreeMap::new();
        for (name, _) in self.memories() {
            named.insert(name, memories(name).ok_or(RestoreError::NoMemory { name })?);
        }
        Space::from_snapshot(self, bus, &named)
    }

    /// Adds the next leaf, or leaves of one size.
    pub(crate) fn push(&mut self, next: Run) {
        let Some(last) = self.runs.last_mut() else { return self.runs.push(next) };
        let continues = next.begins == Begins::Nowhere;
        if continues && last.begins == Begins::Each {
            // The last one of them has more than one leaf. It is taken out to go on.
            let all = last.leaves;
            last.leaves -= 1;
            let mut alone = *last;
            if last.leaves == 1 {
                last.begins = Begins::First;
            }
            alone.first += (all - 1) * alone.leaf.bytes();
            alone.offset += (all - 1) * alone.leaf.bytes();
            (alone.leaves, alone.begins) = (1, Begins::First);
            self.runs.push(alone);
            return self.push(next);
        }
        let alike = match last.begins {
            Begins::Each => true,
            Begins::First => continues || last.leaves == 1,
            Begins::Nowhere => continues,
        };
        if alike && last.goes_on(&next) {
            last.leaves += next.leaves;
            if !continues {
                last.begins = Begins::Each;
            }
        } else {
            self.runs.push(next);
        }
    }

    /// The format of the native table.
    pub(crate) fn format(&self) -> Result<Native, BadSnapshot> {
        let format = Native::new().with_granule(self.granule);
        let format = format.ok_or(BadSnapshot::Header { field: "granule" })?;
        Ok(format.with_largest_leaf(self.largest_leaf))
    }
}
