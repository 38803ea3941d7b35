//! What can be done, and how sequences of it are drawn.
//!
//! Steps name slots and pages; whatever they come to depends on what was done before, and most of what can go wrong for a
//! caller is drawn too: memory that is not there, places that are taken, limits, revoked objects. Most of it happens in few
//! places, so that it comes to meetings.

use crate::double::{AMD, AMD_ALL_SIZES, DERIVED, DERIVED_TOO, NATIVE, OWN_NATIVE, RISC_V, SMALL, WIDE, X86};
use ioasid::{IovaRange, Permissions, Rid};
use proptest::collection::vec;
use proptest::prelude::*;
use std::ops::Range;

pub(crate) const PAGE: u64 = 4096;
/// The number of the page behind the last.
pub(crate) const END: u64 = 1 << 52;
/// Small mappings are made below this page; three leaves of 2 MiB fit.
pub(crate) const LOW: u64 = 1536;
/// Large ones between these.
pub(crate) const GIANT: Range<u64> = 1 << 18..3 << 18;
/// And some in so many pages at the end of everything.
pub(crate) const LAST: u64 = 8;

/// The spaces: one that allows everything, one whose mappings are counted, one that keeps them whole, one with leaves of
/// a page alone.
pub(crate) const SPACES: usize = 4;
pub(crate) const COUNTED: usize = 1;
pub(crate) const WHOLE: usize = 2;
pub(crate) const SMALL_LEAVES: usize = 3;
/// How many mappings the counted one may have.
pub(crate) const MOST: u64 = 6;

pub(crate) const MEMORIES: usize = 6;
/// The page from which on each object's pages are used. The third one's are in two windows, the fourth is late-bound, the
/// last has room for leaves of a GiB.
pub(crate) const BEGINNINGS: [u64; 5] = [0, 0, (1 << 18) - 40, (1 << 18) - 8, 0];
pub(crate) const OBJECT_PAGES: [u64; 5] = [64, 1200, 100, 60, 2 << 18];
pub(crate) const LATE: usize = 3;
pub(crate) const GIB: usize = 4;

/// The account above each, and its limit.
pub(crate) const ACCOUNTS: [(Option<usize>, Option<u64>); 5] =
    [(None, Some(2600)), (Some(0), None), (Some(0), Some(1300)), (Some(2), Some(1250)), (None, None)];

pub(crate) const DEVICES: [Rid; 10] =
    [NATIVE, DERIVED, DERIVED_TOO, SMALL, WIDE, AMD, AMD_ALL_SIZES, X86, RISC_V, OWN_NATIVE];
/// Those whose tables cannot do everything while devices use them.
pub(crate) const RIGID: [Rid; 3] = [AMD, AMD_ALL_SIZES, RISC_V];

/// Those whose tables cannot lead to memory that is reached by calls: of the machine, where these tests are run for it.
pub(crate) const OF_THE_MACHINE: &[Rid] = if cfg!(host_iommu) { &[AMD, AMD_ALL_SIZES] } else { &[] };

/// Some pages, from the first on; maybe none.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Pages {
    pub(crate) first: u64,
    pub(crate) count: u64,
}

impl Pages {
    pub(crate) fn range(self) -> Option<IovaRange> {
        let first = self.first.checked_mul(PAGE)?;
        // The last one of all has no end.
        let last = self.count.checked_sub(1)?.checked_mul(PAGE)?.checked_add(PAGE - 1)?.checked_add(first)?;
        IovaRange::new(first, last)
    }

    pub(crate) fn numbers(self) -> Range<u64> {
        self.first..self.first + self.count
    }
}

/// What is to be mapped: memory, a part of it, permissions.
#[derive(Clone, Copy, Debug)]
pub(crate) struct What {
    pub(crate) slot: usize,
    pub(crate) part: Pages,
    pub(crate) permissions: u8,
}

/// How something is unmapped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Manner {
    Strict,
    Deferred,
}

/// A call. After a split the leaves of the device's table have two to this power of pages at most.
#[derive(Clone, Debug)]
pub(crate) enum Step {
    Register { slot: usize, object: usize, pages: Pages, account: usize, populated: bool },
    Drop { slot: usize },
    Grow { slot: usize, pages: u64 },
    Release { slot: usize, part: Pages },
    Revoke { object: usize },
    Transfer { slots: Vec<usize>, to: usize },
    Limit { account: usize, limit: Option<u64> },
    Map { space: usize, at: u64, what: What },
    MapAnywhere { space: usize, what: What },
    Unmap { space: usize, pages: Pages, manner: Manner },
    Batch { space: usize, ranges: Vec<Pages> },
    Flush { space: usize },
    Protect { space: usize, pages: Pages, permissions: u8 },
    Remap { space: usize, at: u64, what: What },
    Alias { space: usize, pages: Pages, target: usize, at: u64, permissions: u8 },
    Merge { space: usize, pages: Pages },
    Split { device: usize, pages: Pages, power: u8 },
    Reserve { space: usize, pages: Pages, owner: u64 },
    Unreserve { space: usize, owner: u64 },
    Allow { space: usize, ranges: Vec<Pages> },
    Attach { device: usize, space: usize, own: bool },
    Detach { device: usize },
    Restore { space: usize },
}

/// What goes wrong in a step that nobody who calls could know.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Trouble {
    None,
    /// The `number`th call of an IOMMU fails, from 1 on. `late`: after it has done its work and undone it.
    Call {
        number: u64,
        late: bool,
    },
    /// After so many table pages there is no memory for another.
    Tables(u64),
}

pub(crate) fn permissions(bits: u8) -> Permissions {
    [Permissions::READ, Permissions::WRITE, Permissions::READ_WRITE][usize::from(bits) - 1]
}

/// Most of it happens in one, so that several tables have to follow.
fn space() -> impl Strategy<Value = usize> + Clone {
    prop_oneof![5 => Just(0), 3 => 1..SPACES]
}

fn place() -> impl Strategy<Value = u64> {
    prop_oneof![
        12 => 0..40u64,
        6 => 500..560u64,
        3 => Just(512u64),
        2 => Just(1024u64),
        2 => Just(GIANT.start),
        1 => GIANT.start + 500..GIANT.start + 1100,
        1 => END - LAST..END,
    ]
}

fn count() -> impl Strategy<Value = u64> {
    prop_oneof![6 => 0..12u64, 2 => 12..40u64, 2 => Just(512u64), 1 => Just(1u64 << 18)]
}

/// Pages that do not reach over the end of everything.
fn pages() -> impl Strategy<Value = Pages> {
    prop_oneof![
        16 => (place(), count()).prop_map(|(first, count)| Pages { first, count: count.min(END - first) }),
        1 => Just(Pages { first: 0, count: LOW }),
        1 => Just(Pages { first: 0, count: END }),
    ]
}

fn what() -> impl Strategy<Value = What> {
    let part = prop_oneof![
        6 => (0..20u64, count()).prop_map(|(first, count)| Pages { first, count }),
        2 => (0..2u64).prop_map(|half| Pages { first: half * 512, count: 512 }),
        1 => (0..2u64).prop_map(|half| Pages { first: half << 18, count: 1 << 18 }),
    ];
    (0..MEMORIES, part, 1..4u8).prop_map(|(slot, part, permissions)| What { slot, part, permissions })
}

pub(crate) fn registration() -> impl Strategy<Value = Step> {
    let object_pages = prop_oneof![
        3 => (0..20u64, 0..60u64).prop_map(|(first, count)| Pages { first, count }),
        3 => Just(Pages { first: 0, count: 1200 }),
        1 => Just(Pages { first: 0, count: 2 << 18 }),
    ];
    (0..MEMORIES, 0..BEGINNINGS.len(), object_pages, 0..ACCOUNTS.len(), prop::bool::weighted(0.1)).prop_map(
        |(slot, object, pages, account, populated)| Step::Register {
            slot,
            object,
            pages,
            account,
            populated,
        },
    )
}

/// Operations on spaces alone.
pub(crate) fn operation() -> impl Strategy<Value = Step> {
    let space = space();
    let manner = prop_oneof![2 => Just(Manner::Strict), 1 => Just(Manner::Deferred)];
    prop_oneof![
        9 => (space.clone(), place(), what()).prop_map(|(space, at, what)| Step::Map { space, at, what }),
        3 => (space.clone(), what()).prop_map(|(space, what)| Step::MapAnywhere { space, what }),
        5 => (space.clone(), pages(), manner)
            .prop_map(|(space, pages, manner)| Step::Unmap { space, pages, manner }),
        1 => (space.clone(), vec(pages(), 1..4)).prop_map(|(space, ranges)| Step::Batch { space, ranges }),
        1 => space.clone().prop_map(|space| Step::Flush { space }),
        5 => (space.clone(), pages(), 1..4u8)
            .prop_map(|(space, pages, permissions)| Step::Protect { space, pages, permissions }),
        5 => (space.clone(), place(), what()).prop_map(|(space, at, what)| Step::Remap { space, at, what }),
        4 => (space.clone(), pages(), space.clone(), place(), 1..4u8).prop_map(
            |(space, pages, target, at, permissions)| Step::Alias { space, pages, target, at, permissions }
        ),
        3 => (space, pages()).prop_map(|(space, pages)| Step::Merge { space, pages }),
        3 => (0..DEVICES.len(), pages(), prop_oneof![3 => Just(0u8), 1 => Just(4), 1 => Just(9)]).prop_map(
            |(device, pages, power)| {
                // Pages of 4 KiB of a whole GiB are more than every other test can afford to look at.
                let power = if pages.count > LOW { 9 } else { power };
                Step::Split { device, pages, power }
            }
        ),
    ]
}

/// Everything.
pub(crate) fn step() -> impl Strategy<Value = Step> {
    let space = space();
    let slot = 0..MEMORIES;
    let limit = prop::option::weighted(0.8, 0..2600u64);
    prop_oneof![
        30 => operation(),
        5 => registration(),
        1 => slot.clone().prop_map(|slot| Step::Drop { slot }),
        1 => (slot.clone(), 0..40u64).prop_map(|(slot, pages)| Step::Grow { slot, pages }),
        2 => (slot.clone(), 0..20u64, prop_oneof![0..10u64, Just(512u64), Just(1190u64)])
            .prop_map(|(slot, first, count)| Step::Release { slot, part: Pages { first, count } }),
        1 => (0..BEGINNINGS.len()).prop_map(|object| Step::Revoke { object }),
        1 => (vec(slot, 0..3), 0..ACCOUNTS.len()).prop_map(|(slots, to)| Step::Transfer { slots, to }),
        1 => (0..ACCOUNTS.len(), limit).prop_map(|(account, limit)| Step::Limit { account, limit }),
        1 => (space.clone(), pages(), 0..2u64)
            .prop_map(|(space, pages, owner)| Step::Reserve { space, pages, owner }),
        1 => (space.clone(), 0..2u64).prop_map(|(space, owner)| Step::Unreserve { space, owner }),
        1 => (space.clone(), vec(pages(), 0..3)).prop_map(|(space, ranges)| Step::Allow { space, ranges }),
        5 => (0..DEVICES.len(), space.clone(), prop::bool::weighted(0.2))
            .prop_map(|(device, space, own)| Step::Attach { device, space, own }),
        2 => (0..DEVICES.len()).prop_map(|device| Step::Detach { device }),
        1 => space.prop_map(|space| Step::Restore { space }),
    ]
}

/// Mostly none.
pub(crate) fn trouble() -> impl Strategy<Value = Trouble> {
    prop_oneof![
        8 => Just(Trouble::None),
        2 => (1..6u64, any::<bool>()).prop_map(|(number, late)| Trouble::Call { number, late }),
        1 => (0..4u64).prop_map(Trouble::Tables),
    ]
}

/// Something to work with: memory of several objects, and some devices.
pub(crate) fn beginning() -> impl Strategy<Value = Vec<Step>> {
    let register = |slot, object, count| {
        let pages = Pages { first: 0, count };
        Step::Register { slot, object, pages, account: slot % ACCOUNTS.len(), populated: false }
    };
    let memories =
        [register(0, 1, 1200), register(1, 2, 100), register(3, LATE, 30), register(4, GIB, 2 << 18)];
    let attach =
        (0..DEVICES.len(), space()).prop_map(|(device, space)| Step::Attach { device, space, own: false });
    vec(attach, 0..6).prop_map(move |devices| memories.iter().cloned().chain(devices).collect())
}
