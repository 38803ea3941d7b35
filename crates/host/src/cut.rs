//! Many areas by one call.
//!
//! Linux makes one area of whatever it is asked to map; only a copy over several areas of its source makes as many. So the
//! memory that is to be mapped in blocks stands cut into such blocks in one more I/O address space, a [`Cut`], from which
//! any number of neighbouring blocks is copied by one call. It takes a call to cut each block, the first time it is mapped
//! together with others; there is no way to cut faster, because a call makes no more than two boundaries. Memory is mapped
//! again and again by those who map much (a guest's buffers, behind a virtual IOMMU), and then it is cut.
//!
//! There is one for each size of blocks, made when it is first needed. It is copied from the address space in which the
//! memory was registered, whole and before anybody said how finely: so it shares its pages, which are pinned and charged
//! once all the same, and costs the kernel an area for each block. No device is ever attached to it. Blocks are those of the
//! output addresses, and cut once more where pieces of memory end.

use std::collections::BTreeMap;
use std::ops::RangeInclusive;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock};

use ioasid::{IovaRange, PageSize};
use rangemap::RangeInclusiveSet;

use crate::CallError;
use crate::areas::in_blocks;
use crate::calls::Iommufd;
use crate::registered::{BOTH, unmap_patiently};

/// Memory in blocks, by their sizes.
#[derive(Debug)]
pub(crate) struct Cuts {
    iommufd: Arc<Iommufd>,
    /// How many blocks of a size there may be.
    most: u64,
    by_size: Mutex<BTreeMap<PageSize, Arc<Cut>>>,
}

impl Cuts {
    pub(crate) fn new(iommufd: Arc<Iommufd>, most: u64) -> Cuts {
        Cuts { iommufd, most, by_size: Mutex::default() }
    }

    fn by_size(&self) -> MutexGuard<'_, BTreeMap<PageSize, Arc<Cut>>> {
        self.by_size.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Memory in blocks of a size, of which there may be none yet.
    pub(crate) fn of_size(&self, block: PageSize) -> Result<Arc<Cut>, CallError> {
        let mut by_size = self.by_size();
        if let Some(cut) = by_size.get(&block) {
            return Ok(cut.clone());
        }
        let (iommufd, most) = (self.iommufd.clone(), self.most);
        let ioas = iommufd.alloc()?;
        let cut = Arc::new(Cut { iommufd, ioas, block, most, there: RwLock::default() });
        by_size.insert(block, cut.clone());
        Ok(cut)
    }

    /// Forgets memory that stood in the parent in these pieces.
    pub(crate) fn forget(&self, pieces: &[RangeInclusive<u64>]) {
        let all: Vec<Arc<Cut>> = self.by_size().values().cloned().collect();
        for cut in all {
            pieces.iter().for_each(|piece| cut.forget(piece));
        }
    }
}

/// Memory in blocks of one size.
#[derive(Debug)]
pub(crate) struct Cut {
    iommufd: Arc<Iommufd>,
    ioas: u32,
    block: PageSize,
    most: u64,
    there: RwLock<There>,
}

/// Which memory is there.
#[derive(Debug, Default)]
struct There {
    /// By output addresses.
    ranges: RangeInclusiveSet<u64>,
    areas: u64,
}

impl Cut {
    /// The address space to copy from.
    pub(crate) fn ioas(&self) -> u32 {
        self.ioas
    }

    /// Sees to it that memory from a first to a last output address is there. Whether it is: there may not be more than
    /// so many blocks.
    ///
    /// Until this returns all of it is registered, and stands in `parent` in these `pieces`, of which there may be more on
    /// both sides. If it fails some is there.
    pub(crate) fn provide(
        &self,
        parent: u32,
        (first, last): (u64, u64),
        pieces: &[RangeInclusive<u64>],
    ) -> Result<bool, CallError> {
        // Whole blocks, so that the rest of one needs no area of its own later.
        let low = self.block.bytes() - 1;
        for piece in pieces {
            let wanted = (first & !low).max(*piece.start())..=(last | low).min(*piece.end());
            let missing: Vec<_> = {
                let there = self.there.read().unwrap_or_else(PoisonError::into_inner);
                there.ranges.gaps(&wanted).collect()
            };
            for part in missing.iter().flat_map(|gap| self.blocks(gap)) {
                if !self.cut(parent, part)? {
                    return Ok(false);
                }
            }
        }
        Ok(true)
    }

    /// Cuts a block, unless somebody else has. Others may come in between two blocks.
    fn cut(&self, parent: u32, part: IovaRange) -> Result<bool, CallError> {
        let mut there = self.there.write().unwrap_or_else(PoisonError::into_inner);
        let at = part.first();
        if there.ranges.contains(&at) {
            return Ok(true);
        }
        if there.areas >= self.most {
            return Ok(false);
        }
        self.iommufd.copy((self.ioas, at), (parent, at), part.last() - at + 1, BOTH)?;
        there.ranges.insert(at..=part.last());
        there.areas += 1;
        Ok(true)
    }

    fn forget(&self, piece: &RangeInclusive<u64>) {
        let mut there = self.there.write().unwrap_or_else(PoisonError::into_inner);
        let inside =
            |run: &RangeInclusive<u64>| *run.start().max(piece.start())..=*run.end().min(piece.end());
        let areas: usize = there.ranges.overlapping(piece).map(|run| self.blocks(&inside(run)).count()).sum();
        if areas == 0 {
            return;
        }
        there.ranges.remove(piece.clone());
        there.areas -= areas as u64;
        // As with the parent: should Linux refuse, then it will refuse to have other memory there too.
        if let Some(range) = IovaRange::new(*piece.start(), *piece.end()) {
            let _ = unmap_patiently(&self.iommufd, self.ioas, range);
        }
    }

    /// The parts of a range that lie in one block each.
    fn blocks(&self, range: &RangeInclusive<u64>) -> impl Iterator<Item = IovaRange> + use<> {
        let block = self.block;
        IovaRange::new(*range.start(), *range.end())
            .into_iter()
            .flat_map(move |range| in_blocks(range, block))
    }
}

impl Drop for Cut {
    fn drop(&mut self) {
        let destroyed = self.iommufd.destroy(self.ioas);
        debug_assert!(destroyed.is_ok(), "{destroyed:?}");
    }
}
