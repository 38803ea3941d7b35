//! Addresses for many threads.
//!
//! ```text
//!   allocate ──► magazines of the thread's shard ──► depot ──► holes, under one lock ──► all magazines drained, holes
//!   free     ──► magazines of the thread's shard ──► depot ──► holes, under one lock
//! ```
//!
//! Small sizes that were just freed are found in magazines, in constant time and without meeting other threads
//! ([`magazines`](super::magazines)). All else is done in the [`Holes`], under one lock, in O(log n). A small size that has
//! to be taken from there is taken eight at a time if there is room, aligned so that with 4 KiB pages all eight are
//! one cache line of a page table: threads that map at them do not write to the same lines then.
//!
//! Before an allocation fails, all magazines are drained, and it is tried again; so it fails only if no place is left.
//! Whoever drains holds the lock over the holes meanwhile, so that no other allocation fails because of addresses that are
//! neither here nor there. The order of locks is: holes, shard, depot.

use super::holes::{HoleError, Holes};
use super::magazines::{Class, Magazines, lock};
use crate::sync::Mutex;
use ioasid_pagetable::{Iova, IovaRange, PageSize};
use std::collections::BTreeMap;

/// How many addresses of a small size are taken from the holes at once.
const RUN: u64 = 8;

/// Which of the places that fit is taken. Addresses that wait in magazines come before either.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Default)]
pub enum Policy {
    /// The lowest.
    #[default]
    BottomUp,
    /// The highest.
    TopDown,
}

/// How an [`Allocator`] allocates.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Options {
    /// What every range begins and ends on. 4 KiB by default.
    pub granule: PageSize,
    /// Which place is taken. The lowest by default.
    pub policy: Policy,
    /// Whether address 0 may be given out, which many programs take for a failure. Not by default.
    pub address_zero: bool,
}

impl Default for Options {
    fn default() -> Options {
        Options { granule: PageSize::SIZE_4K, policy: Policy::default(), address_zero: false }
    }
}

/// An allocator of I/O virtual addresses. See the [module](super) for an example.
///
/// What it costs, with *n* holes: O(1) for a size of 1 to 8, 16 or 32 granules that was just freed; else O(log n), see
/// [`Holes`]; and an allocation that would fail gives all that waits in magazines back first, at O(log n) each.
///
/// Addresses in magazines cannot be used for larger requests until they are drained. There are never more of them than
/// [`most_parked_bytes`](Self::most_parked_bytes).
#[derive(Debug)]
pub struct Allocator {
    options: Options,
    /// By address; neither overlap nor touch.
    windows: Box<[IovaRange]>,
    central: Mutex<Central>,
    magazines: Magazines,
}

#[derive(Debug)]
struct Central {
    holes: Holes,
    /// From first to last address. Do not overlap.
    reserved: BTreeMap<u64, u64>,
}

/// Why no addresses were allocated. Nothing has changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum AllocateError {
    /// The length is 0 or not a multiple of the granule.
    #[error("{length:#x} bytes are no multiple of {granule}, or none")]
    Length {
        /// The length asked for.
        length: u64,
        /// The granule.
        granule: PageSize,
    },
    /// The alignment is no power of two.
    #[error("{alignment:#x} is no power of two, so nothing can be aligned to it")]
    Alignment {
        /// The alignment asked for.
        alignment: u64,
    },
    /// Fewer bytes are free than were asked for.
    #[error("{length:#x} bytes were asked for, and only {free:#x} are free")]
    Exhausted {
        /// The length asked for.
        length: u64,
        /// How many bytes are free.
        free: u64,
    },
    /// Enough bytes are free, but not together, or not at such an address.
    #[error(
        "no {length:#x} bytes at a multiple of {alignment:#x} are free together; of {free:#x} free bytes, at most {largest:#x} are"
    )]
    Fragmented {
        /// The length asked for.
        length: u64,
        /// The alignment asked for.
        alignment: u64,
        /// How many bytes are free; saturates at 2^64 - 1.
        free: u64,
        /// The length of the largest hole; saturates at 2^64 - 1.
        largest: u64,
    },
}

/// Why a range was not freed, reserved or released. Nothing has changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum RangeError {
    /// An end of the range is not on a multiple of the granule.
    #[error("{range} does not begin and end on multiples of {granule}")]
    Misaligned {
        /// The range asked for.
        range: IovaRange,
        /// The granule.
        granule: PageSize,
    },
    /// Not all of the range is allocated.
    #[error("{range} cannot be freed: not all of it is allocated")]
    NotAllocated {
        /// The range asked for.
        range: IovaRange,
    },
    /// A part of the range is allocated.
    #[error("{range} cannot be reserved: a part of it is allocated")]
    Allocated {
        /// The range asked for.
        range: IovaRange,
    },
    /// A part of the range is reserved.
    #[error("{range} is reserved already")]
    Reserved {
        /// What is reserved.
        range: IovaRange,
    },
    /// The range was not reserved, or not as a whole.
    #[error("{range} cannot be released: that is not what was reserved")]
    NotReserved {
        /// The range asked for.
        range: IovaRange,
    },
}

/// Figures about an [`Allocator`], for people and tests.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Statistics {
    /// Bytes that are free, those in magazines included; saturates at 2^64 - 1.
    pub free_bytes: u64,
    /// Bytes that are free, but wait in magazines.
    pub parked_bytes: u64,
    /// The length of the largest hole; saturates at 2^64 - 1.
    pub largest_hole: u64,
}

impl Allocator {
    /// An allocator of the addresses in these windows, which may overlap. A granule that is only partly in one is not
    /// allocated.
    pub fn new(windows: &[IovaRange], options: Options) -> Allocator {
        Allocator::with_magazines(windows, options, Magazines::new())
    }

    fn with_magazines(windows: &[IovaRange], options: Options, magazines: Magazines) -> Allocator {
        let below = options.granule.bytes() - 1;
        let lowest = if options.address_zero { 0 } else { options.granule.bytes() };
        let whole = |window: &IovaRange| {
            let first = window.first().max(lowest).checked_add(below)? & !below;
            // One behind the last granule, but for the last of all.
            let last = match window.last() & below == below {
                true => window.last(),
                false => (window.last() & !below).checked_sub(1)?,
            };
            IovaRange::new(first, last)
        };
        let mut holes = Holes::new(options.granule);
        // Later, every hole there is would have to be entered.
        holes.prepare(PageSize::from_log2(u64::BITS - 1).unwrap_or(options.granule));
        windows.iter().filter_map(whole).for_each(|window| holes.set_free(window));
        let mut windows = Vec::new();
        holes.for_each(|window| windows.push(window));
        Allocator {
            options,
            windows: windows.into_boxed_slice(),
            central: Mutex::new(Central { holes, reserved: BTreeMap::new() }),
            magazines,
        }
    }

    /// How it allocates.
    pub fn options(&self) -> Options {
        self.options
    }

    /// Where it allocates: whole granules, ascending, neighbours joined.
    pub fn windows(&self) -> &[IovaRange] {
        &self.windows
    }

    /// The first of `length` consecutive addresses that nobody has, at a multiple of `alignment`.
    ///
    /// The length is a multiple of the granule, the alignment a power of two; one below the granule is as good as the
    /// granule.
    pub fn allocate(&self, length: u64, alignment: u64) -> Result<Iova, AllocateError> {
        let granule = self.options.granule;
        if length == 0 || length % granule.bytes() != 0 {
            return Err(AllocateError::Length { length, granule });
        }
        if !alignment.is_power_of_two() {
            return Err(AllocateError::Alignment { alignment });
        }
        let class = Class::of(length >> granule.log2());
        if let Some(class) = class {
            if let Some(address) = self.magazines.load().pop(class, alignment) {
                return Ok(Iova::new(address));
            }
        }
        let mut central = lock(&self.central);
        if let Some(class) = class.filter(|_| length.is_power_of_two() && alignment <= length) {
            if let Some(run) = self.take(&mut central, length * RUN, length * RUN) {
                drop(central);
                return Ok(self.park_rest(class, run, length));
            }
        }
        if let Some(place) = self.take(&mut central, length, alignment) {
            return Ok(Iova::new(place.first()));
        }
        self.drain(&mut central);
        if let Some(place) = self.take(&mut central, length, alignment) {
            return Ok(Iova::new(place.first()));
        }
        let (free, largest) = (central.holes.free_bytes(), central.holes.largest());
        Err(match free < length {
            true => AllocateError::Exhausted { length, free },
            false => AllocateError::Fragmented { length, alignment, free, largest },
        })
    }

    fn take(&self, central: &mut Central, length: u64, alignment: u64) -> Option<IovaRange> {
        let place = match self.options.policy {
            Policy::BottomUp => central.holes.lowest(IovaRange::ALL, length, alignment),
            Policy::TopDown => central.holes.highest(IovaRange::ALL, length, alignment),
        }?;
        central.holes.take(place).ok().map(|()| place)
    }

    /// Gives the first address of a run that was taken, as the policy has it, and keeps the others in a magazine.
    fn park_rest(&self, class: Class, run: IovaRange, length: u64) -> Iova {
        let at = |number: u64| match self.options.policy {
            Policy::BottomUp => run.first() + number * length,
            Policy::TopDown => run.last() - number * length - (length - 1),
        };
        let mut shard = self.magazines.load();
        // What is put in last comes out first.
        let left = (1..RUN).rev().find(|number| !shard.push(class, at(*number)));
        drop(shard);
        if let Some(left) = left {
            let mut central = lock(&self.central);
            for number in 1..=left {
                self.free_in(&mut central, class, at(number));
            }
        }
        Iova::new(at(0))
    }

    /// Gives everything in magazines back to the holes.
    fn drain(&self, central: &mut Central) {
        self.magazines.drain(|class, address| self.free_in(central, class, address));
    }

    /// Frees an address that was or might have been in a magazine.
    fn free_in(&self, central: &mut Central, class: Class, address: u64) {
        let length = class.granules() << self.options.granule.log2();
        if let Some(range) = IovaRange::with_length(address, length) {
            // What somebody has freed twice is free; what nobody had is none of ours.
            let _ = central.free(range);
        }
    }

    /// Frees addresses that were allocated: all that one call gave, or any part of it on multiples of the granule.
    ///
    /// What is refused is not all allocated. Not every mistake is noticed, though: addresses of a small size go into a
    /// magazine unseen, so that one which is freed twice may be allocated twice. Two mappings cannot come of that,
    /// since the space refuses the second one.
    pub fn free(&self, range: IovaRange) -> Result<(), RangeError> {
        let granule = self.options.granule;
        if !range.is_aligned(granule) {
            return Err(RangeError::Misaligned { range, granule });
        }
        if !self.in_a_window(range) {
            return Err(RangeError::NotAllocated { range });
        }
        let class = range.length().and_then(|length| Class::of(length >> granule.log2()));
        if class.is_some_and(|class| self.magazines.load().push(class, range.first())) {
            return Ok(());
        }
        lock(&self.central).free(range)
    }

    fn in_a_window(&self, range: IovaRange) -> bool {
        let until = self.windows.partition_point(|window| window.first() <= range.first());
        self.windows[..until].last().is_some_and(|window| window.covers(&range))
    }

    /// Keeps addresses from being allocated until they are [released](Self::release): somebody maps at an address of
    /// its own choice, or a device cannot use them. They may reach beyond the windows.
    ///
    /// Fails where something is allocated or reserved.
    pub fn reserve(&self, range: IovaRange) -> Result<(), RangeError> {
        let granule = self.options.granule;
        if !range.is_aligned(granule) {
            return Err(RangeError::Misaligned { range, granule });
        }
        let mut central = lock(&self.central);
        if let Some(reserved) = central.reserved_in(range) {
            return Err(RangeError::Reserved { range: reserved });
        }
        if !self.is_free(&central, range) {
            self.drain(&mut central);
            if !self.is_free(&central, range) {
                return Err(RangeError::Allocated { range });
            }
        }
        central.holes.set_taken(range);
        central.reserved.insert(range.first(), range.last());
        Ok(())
    }

    /// Makes addresses available again that one call of [`reserve`](Self::reserve) has reserved.
    pub fn release(&self, range: IovaRange) -> Result<(), RangeError> {
        let mut central = lock(&self.central);
        if central.reserved.get(&range.first()) != Some(&range.last()) {
            return Err(RangeError::NotReserved { range });
        }
        central.reserved.remove(&range.first());
        for part in self.parts(range) {
            central.holes.set_free(part);
        }
        Ok(())
    }

    /// The reserved ranges, ascending.
    pub fn reserved_ranges(&self) -> Vec<IovaRange> {
        let central = lock(&self.central);
        central.reserved.iter().filter_map(|(first, last)| IovaRange::new(*first, *last)).collect()
    }

    /// What of the range is in windows.
    fn parts(&self, range: IovaRange) -> impl Iterator<Item = IovaRange> + '_ {
        let from = self.windows.partition_point(|window| window.last() < range.first());
        self.windows[from..].iter().map_while(move |window| window.intersection(&range))
    }

    /// Whether all of the range that is in windows is in holes.
    fn is_free(&self, central: &Central, range: IovaRange) -> bool {
        self.parts(range).all(|part| central.holes.overlapping(part).is_some_and(|hole| hole.covers(&part)))
    }

    /// How many bytes there can be in magazines: of each size that has them, 96 addresses for each processor.
    pub fn most_parked_bytes(&self) -> u64 {
        self.magazines.most_granules().saturating_mul(self.options.granule.bytes())
    }

    /// Counts what is free.
    pub fn statistics(&self) -> Statistics {
        let central = lock(&self.central);
        let parked_bytes = self.magazines.granules().saturating_mul(self.options.granule.bytes());
        Statistics {
            free_bytes: central.holes.free_bytes().saturating_add(parked_bytes),
            parked_bytes,
            largest_hole: central.holes.largest(),
        }
    }
}

impl Central {
    /// Frees what is neither in a hole nor reserved.
    fn free(&mut self, range: IovaRange) -> Result<(), RangeError> {
        if self.reserved_in(range).is_some() {
            return Err(RangeError::NotAllocated { range });
        }
        self.holes.free(range).map_err(|error| match error {
            HoleError::Misaligned { range, granule } => RangeError::Misaligned { range, granule },
            HoleError::Free { range } | HoleError::Taken { range } => RangeError::NotAllocated { range },
        })
    }

    /// A reserved range that overlaps this one.
    fn reserved_in(&self, range: IovaRange) -> Option<IovaRange> {
        let (first, last) = self.reserved.range(..=range.last()).next_back()?;
        IovaRange::new(*first, *last).filter(|reserved| reserved.overlaps(&range))
    }
}
