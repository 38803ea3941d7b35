//! Process address space IDs (PASIDs), in sets that belong to somebody.
//!
//! A PASID is a number of 20 bits that stands in a device's requests beside its requester ID, and chooses one of many
//! address spaces for the device. Processors and IOMMUs have it in their tables as well, so there is one space of these
//! numbers for a machine, and somebody has to give them out. (The kernel's patches of 2021 called them IOASIDs.)
//!
//! - A [`PasidSystem`] has a *capacity*: how many IDs there are. Part of it can be [reserved](PasidSystem::reserve).
//! - A [`PasidSet`] belongs to an [`Owner`], such as a virtual machine, and has a *quota*, which is taken from the capacity
//!   when the set is made: an allocation within the quota fails for no other set's doing. The IDs of a set can be used
//!   through the set only, so nobody can use, bind or free what is another's, whatever numbers a guest may say.
//! - A [`Limit`] bounds the IDs in use of all sets below it, in levels.
//! - An ID may have a private one in its set ([`Spid`]): what a guest calls it. Both are found from each other in one step.
//! - A [`Subscription`] says what happens to IDs, in order, and holds up nobody.
//!
//! # The life of an ID
//!
//! ```text
//!            allocate             bind (first)
//!     FREE ──────────► IDLE ◄──────────────────► ACTIVE
//!      ▲  ▲             │      unbind (last)        │
//!      │  └─────────────┤ free: held by nobody      │
//!      │                │ free: held                │ free
//!      │                ▼                           │
//!      └───────── FREE_PENDING ◄────────────────────┘
//!       last reference gone
//! ```
//!
//! Whoever has an ID in a table holds a [`PasidReference`] or [`PasidBinding`]. A freed ID that is held is parked: it counts as
//! used, cannot be held anew, and is given out again only when the last one has let go. So no DMA with an old meaning of a number can
//! ever meet a new one.
//!
//! # One lock
//!
//! All of a system is behind one lock, which is held for some tens of nanoseconds: allocating and freeing is done when
//! processes come and go, not by DMA, which has what it needs in its device's tables. One lock makes it plain that quota, limits,
//! states and events change together. No operation waits for a listener or calls anybody while it holds the lock.
//!
//! ```
//! use ioasid::pasid::{Freed, Limit, Owner, PasidState, PasidSystem, Spid};
//!
//! let system = PasidSystem::new(1 << 20)?;
//! let host = Limit::new(&system, "host", Some(5000));
//! let machine = system.create_set(Owner::Machine(7), 1000, &host.child("machine 7", None))?;
//!
//! // The guest's PASID 5 is one of ours.
//! let pasid = machine.allocate(1..=u32::MAX, 0)?;
//! machine.set_spid(pasid, Spid::new(5))?;
//! assert_eq!(machine.find(Spid::new(5).unwrap()), Some(pasid));
//!
//! // A device uses it. It is freed meanwhile, and stays out of reach until the device has let go.
//! let binding = machine.bind(pasid)?;
//! assert_eq!(machine.free(pasid)?, Freed::Pending);
//! assert_eq!(machine.lookup(pasid)?.state, PasidState::FreePending);
//! assert_ne!(machine.allocate(1..=u32::MAX, 0)?, pasid);
//! drop(binding);
//! assert_eq!(machine.allocate(1..=u32::MAX, 0)?, pasid);
//! assert_eq!(host.usage().current, 2);
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```

use crate::sync::{Mutex, MutexGuard, PoisonError};
use events::Queue;
use state::State;
use std::fmt;
use std::sync::Arc;

mod events;
mod free;
mod limit;
mod records;
mod set;
mod state;

pub use events::{Event, Priority, Received, Subscription, Transition};
pub use limit::{Limit, LimitUsage};
pub use set::{PasidBinding, PasidReference, PasidSet, QuotaError};

/// How many PASIDs there are at most: they have 20 bits (PCI Express Base Specification, PASID TLP Prefix).
pub const MOST_PASIDS: u32 = 1 << 20;

/// A process address space ID, below 2^20.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Pasid(u32);

/// A set's private ID for a PASID, below 2^20: a guest's PASID.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Spid(u32);

macro_rules! twenty_bits {
    ($($name:ident)*) => {$(
        impl $name {
            /// `None`: it does not fit into 20 bits.
            pub fn new(number: u32) -> Option<$name> {
                (number < MOST_PASIDS).then_some($name(number))
            }

            /// The number.
            pub fn get(self) -> u32 {
                self.0
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                self.0.fmt(f)
            }
        }
    )*};
}
twenty_bits!(Pasid Spid);

/// Whose a set is. Those with a number have one set each.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Owner {
    /// Nobody's in particular: the host's own.
    Nobody,
    /// A process, by a number of the caller's.
    Process(u64),
    /// A virtual machine, by a number of the caller's.
    Machine(u64),
}

impl fmt::Display for Owner {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Owner::Nobody => f.write_str("nobody"),
            Owner::Process(number) => write!(f, "process {number}"),
            Owner::Machine(number) => write!(f, "machine {number}"),
        }
    }
}

/// What an ID in use is at the moment. One that is free is in no set.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PasidState {
    /// Allocated, and bound to nothing.
    Idle,
    /// Bound to something.
    Active,
    /// Freed, and held by somebody.
    FreePending,
}

/// What an ID in use is like.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Status {
    /// The ID.
    pub pasid: Pasid,
    /// What it is.
    pub state: PasidState,
    /// The private ID that its set has for it.
    pub spid: Option<Spid>,
    /// Whose set it is in.
    pub owner: Owner,
    /// What was given when it was allocated.
    pub data: u64,
    /// How many references and bindings hold it.
    pub references: u32,
    /// How many of them are bindings.
    pub bindings: u32,
}

/// What a set is like.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SetStatus {
    /// Whose it is.
    pub owner: Owner,
    /// How many IDs it may have.
    pub quota: u32,
    /// How many it has, parked ones included.
    pub used: u32,
    /// The name of the limit they are charged to.
    pub limit: String,
}

/// What a system is like.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SystemStatus {
    /// How many IDs there are.
    pub capacity: u32,
    /// How many of them are set aside, by sets and reservations.
    pub reserved: u32,
    /// How many are in use, parked ones included.
    pub used: u32,
    /// How many sets there are, with those whose owners have gone and whose IDs are still held.
    pub sets: usize,
    /// How many limits.
    pub limits: usize,
    /// How many bytes the tables of IDs have, private IDs not counted.
    pub table_bytes: u64,
}

/// Whether a freed ID is free.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Freed {
    /// It is.
    Now,
    /// When the last reference has gone.
    Pending,
}

/// There is no such capacity.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("a capacity of {asked} is not between 1 and {MOST_PASIDS}")]
pub struct CapacityError {
    /// What was asked for.
    pub asked: u32,
}

/// More of the capacity was asked for than is left.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "{asked} IDs are more than the {left} of {capacity} that are not set aside; give up sets or reservations"
)]
pub struct OverCapacity {
    /// What was asked for.
    pub asked: u32,
    /// What is left.
    pub left: u32,
    /// What there is in all.
    pub capacity: u32,
}

/// A limit refuses another ID.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("limit {limit:?} of {max} IDs is reached: there are {current}; free some, or raise the limit")]
pub struct OverLimit {
    /// The name of the limit that refuses: that of the set, or one above.
    pub limit: String,
    /// How many it allows.
    pub max: u32,
    /// How many there are.
    pub current: u32,
}

/// Why there is no new set.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum CreateSetError {
    /// The owner has one.
    #[error("{0} has a set")]
    OwnerHasOne(Owner),
    /// The quota is more than is left.
    #[error(transparent)]
    Capacity(#[from] OverCapacity),
    /// The limit belongs to another system.
    #[error("the limit belongs to another system")]
    OtherSystem,
}

/// Why no ID was allocated. Nothing was charged.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum AllocateError {
    /// The set has as many as it may have.
    #[error("the set has all {quota} IDs of its quota; free some, or raise the quota")]
    QuotaUsedUp {
        /// How many it may have.
        quota: u32,
    },
    /// A limit is in the way.
    #[error(transparent)]
    Limit(#[from] OverLimit),
    /// There is no free ID in the range.
    #[error("no ID from {first} to {last} is free")]
    NoneFree {
        /// The lowest that was allowed.
        first: u32,
        /// The highest.
        last: u32,
    },
}

/// The ID is not one of this set. Whether it is another's is not said.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("PASID {pasid} is not one of this set")]
pub struct UnknownPasid {
    /// Which.
    pub pasid: Pasid,
}

/// Why an ID cannot be used.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum UseError {
    /// It is not one of this set.
    #[error(transparent)]
    Unknown(#[from] UnknownPasid),
    /// It was freed, and waits until it is let go.
    #[error("PASID {pasid} was freed, and waits for those who hold it")]
    FreePending {
        /// Which.
        pasid: Pasid,
    },
    /// It is held 2^32 - 1 times.
    #[error("PASID {pasid} is held too many times")]
    TooManyReferences {
        /// Which.
        pasid: Pasid,
    },
}

/// Why an ID has no new private one. It keeps the one that it had.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SpidError {
    /// Another one has it.
    #[error("PASID {by} of this set has the private ID {spid}")]
    Taken {
        /// What was to be given.
        spid: Spid,
        /// Who has it.
        by: Pasid,
    },
    /// The ID cannot be used.
    #[error(transparent)]
    Use(#[from] UseError),
}

/// A set that was to be ended has IDs.
#[derive(Debug, thiserror::Error)]
#[error("the set has {used} IDs")]
pub struct NotEmpty {
    /// The set, as it was.
    pub set: PasidSet,
    /// How many IDs it has, parked ones included.
    pub used: u32,
}

/// All PASIDs of a machine.
pub struct PasidSystem {
    state: Mutex<State>,
}

/// IDs that are set aside for a purpose outside of sets: no quota is taken from them. Dropping it gives them back.
#[derive(Debug)]
pub struct Reservation {
    system: Arc<PasidSystem>,
    count: u32,
}

impl Reservation {
    /// How many.
    pub fn count(&self) -> u32 {
        self.count
    }

    /// Gives some back; all, if it is not so many.
    pub fn give_back(&mut self, count: u32) {
        let count = count.min(self.count);
        self.count -= count;
        self.system.lock().give_back(count);
    }
}

impl Drop for Reservation {
    fn drop(&mut self) {
        self.give_back(self.count);
    }
}

impl PasidSystem {
    /// A system of the IDs below `capacity`.
    ///
    /// # Errors
    /// It is 0, or more than [`MOST_PASIDS`].
    pub fn new(capacity: u32) -> Result<Arc<PasidSystem>, CapacityError> {
        if capacity == 0 || capacity > MOST_PASIDS {
            return Err(CapacityError { asked: capacity });
        }
        Ok(Arc::new(PasidSystem { state: Mutex::new(State::new(capacity)) }))
    }

    /// Sets part of the capacity aside.
    ///
    /// # Errors
    /// There is not so much left.
    pub fn reserve(self: &Arc<Self>, count: u32) -> Result<Reservation, OverCapacity> {
        self.lock().reserve(count)?;
        Ok(Reservation { system: self.clone(), count })
    }

    /// Makes a set, whose quota is taken from the capacity and whose IDs are charged to `limit`.
    ///
    /// # Errors
    /// The owner has a set; there is not so much capacity left; the limit belongs to another system.
    pub fn create_set(
        self: &Arc<Self>,
        owner: Owner,
        quota: u32,
        limit: &Limit,
    ) -> Result<PasidSet, CreateSetError> {
        if !Arc::ptr_eq(self, &limit.system) {
            return Err(CreateSetError::OtherSystem);
        }
        let key = self.lock().create_set(owner, quota, limit.level)?;
        Ok(PasidSet { system: self.clone(), key })
    }

    /// What an ID is like, whosever it is: for the host's own eyes. `None`: it is free.
    pub fn lookup(&self, pasid: Pasid) -> Option<Status> {
        self.lock().status(pasid)
    }

    /// What all sets are like, those whose owners have gone among them.
    pub fn sets(&self) -> Vec<SetStatus> {
        self.lock().sets()
    }

    /// What the system is like.
    pub fn status(&self) -> SystemStatus {
        self.lock().system_status()
    }

    /// Events of all sets from now on. A queue that has `capacity` events loses what comes until some are taken.
    pub fn subscribe(self: &Arc<Self>, priority: Priority, capacity: usize) -> Subscription {
        self.subscribe_to(None, priority, capacity)
    }

    fn subscribe_to(self: &Arc<Self>, set: Option<u32>, priority: Priority, capacity: usize) -> Subscription {
        let queue = Arc::new(Queue::new(priority, capacity));
        self.lock().subscribers_of(set).add(queue.clone());
        Subscription { system: self.clone(), queue, set }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // Nothing below panics half-way.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Limit {
    /// A limit of a system, below no other. `None`: any number.
    pub fn new(system: &Arc<PasidSystem>, name: impl Into<String>, max: Option<u32>) -> Limit {
        let level = system.lock().limits.add(name.into(), max, None);
        Limit { system: system.clone(), level }
    }
}

impl fmt::Debug for PasidSystem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("PasidSystem").field(&self.status()).finish()
    }
}
