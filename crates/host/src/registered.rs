//! How Linux is told of memory: the one place that decides between IOAS_MAP and IOAS_COPY.
//!
//! iommufd charges and pins pages for each *map* call anew, also if they are the same pages; only what was *copied* from
//! an existing mapping shares its pages with it. A page that is mapped in two address spaces, or twice in one, shall be
//! pinned and charged once. So there is one more I/O address space, the *parent*, in which a piece of memory is mapped
//! once, the first time it is needed, and from which it is copied wherever it is mapped. No device is ever attached to the
//! parent. Linux is lazy about such an address space, and so mapping all of a window there costs a few hundred bytes and
//! pins nothing: what is pinned is what is copied to address spaces with devices, for as long as it is in any.
//!
//! A range of several blocks, each of which has to be an area of its own, is copied by one call from where the memory is
//! [cut](crate::cut) into such blocks. That works where memory and mapping have the same offset in their blocks, which is
//! always so for pages. Where they have not, and with [`Mapping::Map`], each block takes a call.
//!
//! The parent's addresses are the bus's. So the source of a copy is the output address itself, nothing has to be looked
//! up, and pieces that are neighbours on the bus can be copied by one call. When memory leaves the bus its piece leaves
//! the parent, before the addresses can be anybody else's.
//!
//! # What is not known
//!
//! Whether to copy is also the faster way. On an emulated VT-d with a device attached, a map of 4 KiB and its unmap took
//! 30 us together and a copy alone 45 us; without a device the copy was quicker. That was one kernel on one emulated
//! machine, and has to be measured on a real one. [`Mapping::Map`] is there for that, and for programs whose limit on
//! locked memory is no concern.

use std::collections::BTreeMap;
use std::ops::RangeInclusive;
use std::sync::{Arc, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard, Weak};

use ioasid::{Attributes, Bus, BusObserver, HostBytes, HostPlace, IovaRange, Oa, PageSize};
use rustix::io::Errno;

use crate::areas::in_blocks;
use crate::calls::Iommufd;
use crate::cut::Cuts;
use crate::{CallError, HostError, HostOptions};

/// How mappings are made; see [`HostOptions::mapping`](crate::HostOptions::mapping).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Mapping {
    /// Copied from an address space in which all registered memory is mapped once. Pages are pinned and charged once,
    /// wherever and however often they are mapped.
    #[default]
    Copy,
    /// Mapped anew each time. Pages are pinned and charged as often as they are mapped.
    Map,
}

/// Pages, which are what Linux maps.
const PAGE: u64 = 4096;
pub(crate) const BOTH: Attributes = Attributes::READ.union(Attributes::WRITE);

/// The way of memory into Linux's address spaces.
#[derive(Debug)]
pub(crate) struct Registered {
    iommufd: Arc<Iommufd>,
    bus: Arc<Bus>,
    mapping: Mapping,
    parent: u32,
    /// What is mapped in the parent: first and last address of each piece.
    known: RwLock<BTreeMap<u64, u64>>,
    cuts: Cuts,
}

impl Registered {
    pub(crate) fn new(
        iommufd: Arc<Iommufd>,
        bus: &Arc<Bus>,
        options: &HostOptions,
    ) -> Result<Arc<Registered>, CallError> {
        let parent = iommufd.alloc()?;
        let cuts = Cuts::new(iommufd.clone(), options.most_areas);
        let (bus, mapping) = (bus.clone(), options.mapping);
        let registered =
            Arc::new(Registered { iommufd, bus, mapping, parent, known: RwLock::default(), cuts });
        let itself: Weak<Registered> = Arc::downgrade(&registered);
        registered.bus.observe(itself);
        Ok(registered)
    }

    fn known(&self) -> RwLockReadGuard<'_, BTreeMap<u64, u64>> {
        self.known.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn known_mut(&self) -> RwLockWriteGuard<'_, BTreeMap<u64, u64>> {
        self.known.write().unwrap_or_else(PoisonError::into_inner)
    }

    /// Maps memory, which is registered until this returns, at a range that is free, so that no area reaches over a
    /// multiple of `block`. If it fails a part may be mapped.
    pub(crate) fn enter(
        &self,
        ioas: u32,
        range: IovaRange,
        oa: Oa,
        rights: Attributes,
        block: PageSize,
    ) -> Result<(), HostError> {
        let last = range.length().and_then(|length| oa.get().checked_add(length - 1));
        let last = last.ok_or(HostError::NotThere { oa })?;
        let copies = self.mapping == Mapping::Copy;
        if copies {
            self.make_known(oa.get(), last)?;
            let several = (range.first() ^ range.last()) >= block.bytes();
            let aligned = (range.first() ^ oa.get()) & (block.bytes() - 1) == 0;
            if several && aligned {
                let cut = self.cuts.of_size(block)?;
                if cut.provide(self.parent, (oa.get(), last), &self.pieces(oa.get(), last))? {
                    let length = last - oa.get() + 1;
                    let source = (cut.ioas(), oa.get());
                    return Ok(self.iommufd.copy((ioas, range.first()), source, length, rights)?);
                }
            }
        }
        for part in in_blocks(range, block) {
            let first = oa.get() + (part.first() - range.first());
            let last = first + (part.last() - part.first());
            if copies {
                self.iommufd.copy((ioas, part.first()), (self.parent, first), last - first + 1, rights)?;
            } else {
                self.map_anew(ioas, part.first(), first, last, rights)?;
            }
        }
        Ok(())
    }

    /// Maps memory without a copy.
    fn map_anew(
        &self,
        ioas: u32,
        iova: u64,
        first: u64,
        last: u64,
        rights: Attributes,
    ) -> Result<(), HostError> {
        let mut at = first;
        loop {
            let place = self.place(at)?;
            let end = (place.first.get() + (place.length - 1)).min(last);
            self.map(ioas, iova + (at - first), &place, at, end, rights)?;
            if end == last {
                return Ok(());
            }
            at = end + 1;
        }
    }

    /// The pieces in the parent that have one of these addresses in them.
    fn pieces(&self, first: u64, last: u64) -> Vec<RangeInclusive<u64>> {
        let known = self.known();
        let before = known.range(..first).next_back().filter(|(_, end)| **end >= first);
        before.into_iter().chain(known.range(first..=last)).map(|(first, end)| *first..=*end).collect()
    }

    /// What there is at an output address: at least that one page.
    fn place(&self, oa: u64) -> Result<HostPlace, HostError> {
        let not_there = HostError::NotThere { oa: Oa::new(oa) };
        let Some(mut place) = self.bus.locate(Oa::new(oa)) else { return Err(not_there) };
        place.length &= !(PAGE - 1);
        if oa - place.first.get() < place.length { Ok(place) } else { Err(not_there) }
    }

    /// Maps the memory from one output address to another, which are both in one place.
    fn map(
        &self,
        ioas: u32,
        iova: u64,
        place: &HostPlace,
        oa: u64,
        last: u64,
        rights: Attributes,
    ) -> Result<(), HostError> {
        let (within, length) = (oa - place.first.get(), last - oa + 1);
        match &place.memory {
            HostBytes::Address(address) => {
                self.iommufd.map(ioas, iova, address.wrapping_add(within), length, rights)?;
            }
            HostBytes::File(file, start) => {
                let start = start.wrapping_add(within);
                self.iommufd.map_file(ioas, iova, (file, start), length, rights)?;
            }
            _ => return Err(HostError::ReachedByCalls),
        }
        Ok(())
    }

    /// Maps in the parent what is missing there.
    fn make_known(&self, first: u64, last: u64) -> Result<(), HostError> {
        if first_missing(&self.known(), first, last).is_none() {
            return Ok(());
        }
        let mut known = self.known_mut();
        while let Some(oa) = first_missing(&known, first, last) {
            let place = self.place(oa)?;
            // Where a file has grown, or memory was mapped in part, some of it is there.
            let before = known.range(..oa).next_back().map_or(0, |(_, last)| last + 1);
            let behind = known.range(oa..).next().map_or(u64::MAX, |(first, _)| first - 1);
            let from = place.first.get().max(before);
            let to = (place.first.get() + (place.length - 1)).min(behind);
            self.map(self.parent, from, &place, from, to, BOTH)?;
            known.insert(from, to);
        }
        Ok(())
    }
}

/// The first address between two that is in no piece.
fn first_missing(known: &BTreeMap<u64, u64>, first: u64, last: u64) -> Option<u64> {
    let mut at = first;
    while let Some((_, end)) = known.range(..=at).next_back().filter(|(_, end)| **end >= at) {
        if *end >= last {
            return None;
        }
        at = end + 1;
    }
    Some(at)
}

impl Drop for Registered {
    fn drop(&mut self) {
        let destroyed = self.iommufd.destroy(self.parent);
        debug_assert!(destroyed.is_ok(), "{destroyed:?}");
    }
}

impl BusObserver for Registered {
    fn vacated(&self, first: Oa, length: u64) {
        let Some(range) = IovaRange::with_length(first.get(), length) else { return };
        let mut known = self.known_mut();
        let pieces = known.range(range.first()..=range.last());
        let pieces: Vec<RangeInclusive<u64>> = pieces.map(|(first, last)| *first..=*last).collect();
        if pieces.is_empty() {
            return;
        }
        for piece in &pieces {
            known.remove(piece.start());
        }
        self.cuts.forget(&pieces);
        // Nobody copies from there any more, and no device was ever attached. Should Linux refuse all the same, then it will
        // refuse to map other memory there too, which will say so.
        let _ = unmap_patiently(&self.iommufd, self.parent, range);
    }
}

/// How often an unmap is tried that Linux is too busy for, with pauses of [`PAUSE`].
const TRIES: u32 = 200;
const PAUSE: std::time::Duration = std::time::Duration::from_millis(1);

/// Unmaps, again and again for a while if Linux is too busy. That nothing is there is no error.
pub(crate) fn unmap_patiently(iommufd: &Iommufd, ioas: u32, range: IovaRange) -> Result<(), CallError> {
    let mut tries = 0;
    loop {
        match iommufd.unmap(ioas, range) {
            Err(error)
                if matches!(error.errno, Errno::BUSY | Errno::INTR | Errno::AGAIN) && tries < TRIES =>
            {
                tries += 1;
                std::thread::sleep(PAUSE);
            }
            result => return result,
        }
    }
}
