//! Nested translation: a table that a guest writes, over a space.
//!
//! A guest with a virtual IOMMU, or one whose processes share their page tables with a device, has tables of its own. They
//! lie in its memory, which is a space to us, and lead to addresses of that space. A device of the guest's is attached to both:
//! the *first stage*, which the guest writes, and the *second*, which is the space. An address of the device's is translated
//! by the first to an address of the space, and by the space to memory; and so is each entry of the first stage that is read on
//! the way.
//!
//! # A shadow is a cache
//!
//! To walk two stages for each access takes up to twenty-five loads, so hardware remembers what came of it, and forgets it when it is
//! told to: by the guest, when it has changed its table, and by whoever changes the second stage. A [`Nesting`] does the same. What
//! it remembers is a table in the native format, the *shadow*, from the device's addresses to memory, which devices walk as they walk
//! any other. It holds nothing that has not been asked for: an address that is not there is [looked up](Nesting::resolve) in
//! both stages, outside of all sections, because the guest's memory may have to be read by calls that block. What it holds is
//! bounded, and forgotten as a whole when the bound is reached ([`SHADOW_BYTES`]).
//!
//! # Whose duty is what
//!
//! - **The guest's**: to say so ([`Nesting::invalidate`]) when it has changed entries that may be remembered. If it does not,
//!   its devices go on by what stood there: to memory that the space gave it, at that address, and to none but that.
//! - **The space's**: nothing that leaves it is left in a shadow. A shadow is one of the tables that follow the space
//!   ([`DerivedTable`]): each unmap and each change in place tells it in the step in which it tells the others. Since a shadow
//!   is only a cache, it answers by forgetting, which cannot fail. Maps tell it nothing: they make nothing untrue.
//!
//! That the two cannot pass each other rests on one lock, the shadow's, and on the native table's rule that whoever changes a
//! leaf owns it first. A leaf is remembered under the lock, after a look at the space's leaf that finds it present and owned by
//! nobody. An operation that comes later owns the leaf, and then takes the lock to have it forgotten; one that came earlier
//! is seen at work. Nobody waits for anything under the lock.
//!
//! A walk reads entries before it takes the lock, and they may be invalidated meanwhile. So walks are written down, with
//! the pages that they have read; what is invalidated makes those *stale* that it concerns, and a stale walk remembers nothing,
//! marks nothing, and begins anew.

use crate::dma::{DmaError, Translated};
use crate::epoch::{self, DmaSection};
use crate::iommu::{Change, DerivedTable, TableError};
use crate::space::{Permissions, Space};
use crate::sync::{Mutex, MutexGuard, PoisonError};
use ioasid_pagetable::{
    Attributes, CachedWalk, ForeignFault, ForeignMemory, Gather, IovaRange, Leaf, Native, Oa, PageSize,
    Radix, Runs,
};
use remembered::Remembered;
use std::any::Any;
use std::collections::BTreeMap;
use std::sync::Weak;
use std::sync::atomic::Ordering;

mod first_stage;
mod remembered;

pub use first_stage::FirstStage;

/// How many bytes a shadow may take, its bookkeeping included, before all that it remembers is forgotten: room for 360 MiB in
/// pages of 4 KiB that lie close to each other.
pub const SHADOW_BYTES: u64 = 16 << 20;

/// At most so many bytes more are taken for a block: a table page of each level, and the notes of it.
const BLOCK_BYTES: u64 = 6 * 4096 + 512;

/// How often an address is looked up anew because it was invalidated meanwhile.
const TRIES: u32 = 64;

/// A first stage over a space, and what is remembered of both. A [`Table`](crate::Table) has it that was made
/// [nested](crate::Table::nested).
#[derive(Debug)]
pub struct Nesting {
    /// The table that has this keeps the space.
    space: Weak<Space>,
    first_stage: FirstStage,
    root: u64,
    /// Addresses of devices that never reach the first stage.
    reserved: Vec<IovaRange>,
    shadow: Radix<Native>,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    remembered: Remembered,
    /// It takes no more bytes than this, together with the shadow. What it really takes would have to be counted each time.
    bytes_at_most: u64,
    /// Those that are looking something up.
    walks: BTreeMap<u64, Walk>,
    next_walk: u64,
}

/// An address that somebody is looking up.
#[derive(Debug)]
struct Walk {
    iova: u64,
    /// The pages that entries were read from.
    pages: Vec<u64>,
    /// Something of it was invalidated.
    stale: bool,
}

/// Why an address of a device translates to nothing.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum NestingFault {
    /// The guest's table cannot translate it, however it is written.
    #[error("no first stage of this format translates the address")]
    OutOfRange,
    /// The guest's table has nothing there.
    #[error("the guest's table has nothing there")]
    NotMapped,
    /// The guest's table does not permit the access.
    #[error("the guest's table does not permit it")]
    NoPermission,
    /// The guest's table, or an entry of it, leads to an address at which the space has nothing, or not for this access.
    #[error("the guest's table leads to {address:#x}, where its address space has nothing for it")]
    SecondStage {
        /// The address in the space.
        address: u64,
    },
    /// The memory in which the guest's table lies is gone.
    #[error("the memory of the guest's table at {address:#x} is gone")]
    MemoryGone {
        /// The address in the space.
        address: u64,
    },
    /// An entry has to be marked as used, and lies in memory that takes no atomic operations.
    #[error("the guest's table at {address:#x} is in memory that takes no atomic operations")]
    NotAtomic {
        /// The address in the space.
        address: u64,
    },
    /// The device is not attached to this any more.
    #[error("the device is attached elsewhere by now")]
    Detached,
    /// The guest changes its table all the while, or there is no memory to remember anything in.
    #[error("the guest's table does not keep still")]
    Unsettled,
}

/// How a walk can end early.
enum Interrupted {
    Stale,
    Fault(NestingFault),
}

impl Nesting {
    pub(crate) fn new(
        space: &Space,
        first_stage: FirstStage,
        root: u64,
        reserved: Vec<IovaRange>,
    ) -> Nesting {
        // Leaves of either stage may be smaller than those of the other.
        let granule = space.granule().min(PageSize::SIZE_4K);
        let native = Native::new();
        let format = native.clone().with_granule(granule).unwrap_or(native);
        Nesting {
            space: space.weak(),
            first_stage,
            root,
            reserved,
            shadow: Radix::native(format),
            state: Mutex::default(),
        }
    }

    /// The format of the guest's table.
    pub fn first_stage(&self) -> FirstStage {
        self.first_stage
    }

    /// Where in the space the root of the guest's table is.
    pub fn root(&self) -> u64 {
        self.root
    }

    /// How many pieces of the guest's address space are remembered.
    pub fn remembered(&self) -> usize {
        self.state().remembered.len()
    }

    pub(crate) fn shadow(&self) -> &Radix<Native> {
        &self.shadow
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Forgets what is remembered of the guest's addresses in the range, because the guest has changed its table there. When
    /// this returns, no DMA is running that goes by what stood there before, and no look-up.
    ///
    /// A guest that has made an entry present which was absent need not say so: nothing is remembered of absent ones.
    pub fn invalidate(&self, range: IovaRange) {
        {
            let _operation = epoch::operation();
            let mut state = self.state();
            for walk in state.walks.values_mut() {
                walk.stale |= range.first() <= walk.iova && walk.iova <= range.last();
            }
            let taken = state.remembered.take_at(range);
            let retired = self.remove(&taken);
            drop(state);
            epoch::retire(retired);
        }
        epoch::wait_for_dma();
        if let Some(space) = self.space.upgrade() {
            space.sleeping().wait();
        }
    }

    /// Looks an address up in both stages and remembers what comes of it, so that devices find it in the shadow: for the page in
    /// which it is, at least, and until it is invalidated.
    ///
    /// `in_force` says, in a section, whether whoever asks is still attached: only as long as that is true is the guest's table
    /// read. May block as long as the guest's memory does, so not to be called in a section.
    ///
    /// # Errors
    /// What a device is told instead.
    pub fn resolve(
        &self,
        iova: u64,
        access: Permissions,
        in_force: impl Fn(&DmaSection) -> bool,
    ) -> Result<(), NestingFault> {
        let space = self.space.upgrade().ok_or(NestingFault::Detached)?;
        if self.reserved.iter().any(|range| range.first() <= iova && iova <= range.last()) {
            return Err(NestingFault::NotMapped);
        }
        let wanted = access.attributes();
        let written_down = WrittenDown::new(self, iova);
        for _ in 0..TRIES {
            written_down.restart();
            let mut memory = Tables { space: &space, walk: &written_down, in_force: &in_force };
            let leaf = match self.first_stage.walk(self.root, iova, wanted, &mut memory) {
                Ok(leaf) => leaf,
                Err(ForeignFault::Memory(Interrupted::Stale) | ForeignFault::Unsettled) => continue,
                Err(ForeignFault::Memory(Interrupted::Fault(fault))) => return Err(fault),
                Err(ForeignFault::OutOfRange) => return Err(NestingFault::OutOfRange),
                Err(ForeignFault::NotMapped) => return Err(NestingFault::NotMapped),
                Err(ForeignFault::NoPermission) => return Err(NestingFault::NoPermission),
            };
            match self.remember(&space, &written_down, &leaf, wanted) {
                Ok(()) => return Ok(()),
                Err(Interrupted::Stale) => {}
                Err(Interrupted::Fault(fault)) => return Err(fault),
            }
        }
        Err(NestingFault::Unsettled)
    }

    /// Remembers what a leaf of the first stage leads to.
    fn remember(
        &self,
        space: &Space,
        walk: &WrittenDown<'_>,
        leaf: &Leaf,
        wanted: Attributes,
    ) -> Result<(), Interrupted> {
        let address = leaf.output(walk.iova).get();
        let mut tries = 0;
        loop {
            {
                let _operation = epoch::operation();
                let mut state = self.state();
                if state.is_stale(walk.number) {
                    return Err(Interrupted::Stale);
                }
                // Somebody was quicker, and may be using it.
                if self.shadow.walk(walk.iova).is_ok_and(|leaf| leaf.attributes.contains(wanted)) {
                    return Ok(());
                }
                let second = match space.settled_leaf(address) {
                    Some(Some(second)) if second.attributes.contains(wanted) => Some(second),
                    // Somebody is at work there. A leaf that is being changed in place translates on; one that does not is
                    // as good as gone.
                    None if space.native().walk(address).is_ok() => None,
                    _ => return Err(Interrupted::Fault(NestingFault::SecondStage { address })),
                };
                if let Some(second) = second {
                    let retired = self.insert(&mut state, walk, leaf, &second, address);
                    drop(state);
                    let (tables, inserted) = retired;
                    epoch::retire(tables);
                    return inserted;
                }
            }
            space.step_aside(&mut tries);
        }
    }

    /// Enters a block, as large as both leaves allow. Under the lock, in an operation. What is left over of the table has to be
    /// retired.
    fn insert(
        &self,
        state: &mut State,
        walk: &WrittenDown<'_>,
        first: &Leaf,
        second: &Leaf,
        address: u64,
    ) -> (Vec<epoch::Retired>, Result<(), Interrupted>) {
        let size = first.size.min(second.size);
        let within = size.bytes() - 1;
        let (iova, source) = (walk.iova & !within, address & !within);
        let mut permitted = first.attributes & second.attributes & Attributes::PERMISSIONS;
        // The first write has to be seen in the guest's table.
        if !first.attributes.contains(Attributes::DIRTY) {
            permitted.remove(Attributes::WRITE);
        }
        let mut retired = Vec::new();
        if state.bytes_at_most + BLOCK_BYTES > SHADOW_BYTES {
            state.bytes_at_most = self.shadow.table_bytes().saturating_add(state.remembered.bytes());
            // So that there is something between two counts.
            if state.bytes_at_most > SHADOW_BYTES / 4 * 3 {
                state.remembered.clear();
                state.bytes_at_most = 0;
                retired.extend(self.remove(&[IovaRange::ALL]));
            }
        }
        state.bytes_at_most += BLOCK_BYTES;
        let Some(block) = IovaRange::new(iova, iova | within) else { return (retired, Ok(())) };
        // What is there may say less, or be of another size.
        let taken = state.remembered.take_at(block);
        retired.extend(self.remove(&taken));
        let output = second.output(source);
        let mut gather = Gather::new();
        let mapped = self.shadow.map(block, output, permitted, &mut gather);
        retired.extend(gather.retired);
        if mapped.is_err() {
            return (retired, Err(Interrupted::Fault(NestingFault::Unsettled)));
        }
        state.remembered.insert(iova, source, size);
        if let Some(walk) = state.walks.get(&walk.number) {
            state.remembered.insert_tables(walk.pages.iter().copied());
        }
        (retired, Ok(()))
    }

    /// Empties blocks of the shadow. Under the lock, in an operation.
    fn remove(&self, blocks: &[IovaRange]) -> Vec<epoch::Retired> {
        let mut retired = Vec::new();
        for block in blocks {
            let mut gather = Gather::new();
            // A block ends where its leaves end, so that nothing has to be cut.
            let removed = self.shadow.unmap(*block, &mut gather);
            debug_assert!(removed.is_ok());
            retired.extend(gather.retired);
        }
        retired
    }

    /// Forgets all that leads to a part of the space that is about to change, or was read from there.
    fn forget(&self, range: IovaRange) {
        let mut state = self.state();
        for walk in state.walks.values_mut() {
            walk.stale |= walk.pages.iter().any(|page| page_range(*page).overlaps(&range));
        }
        let taken = if state.remembered.has_read(range) {
            state.remembered.clear();
            vec![IovaRange::ALL]
        } else {
            state.remembered.take_from(range)
        };
        let retired = self.remove(&taken);
        drop(state);
        epoch::retire(retired);
    }
}

fn page_range(page: u64) -> IovaRange {
    IovaRange::new(page, page | 0xfff).unwrap_or(IovaRange::ALL)
}

impl State {
    fn is_stale(&self, walk: u64) -> bool {
        self.walks.get(&walk).is_none_or(|walk| walk.stale)
    }
}

/// A look-up that invalidations know of, until this is dropped.
struct WrittenDown<'a> {
    nesting: &'a Nesting,
    number: u64,
    iova: u64,
}

impl<'a> WrittenDown<'a> {
    fn new(nesting: &'a Nesting, iova: u64) -> WrittenDown<'a> {
        let mut state = nesting.state();
        let number = state.next_walk;
        state.next_walk += 1;
        state.walks.insert(number, Walk { iova, pages: Vec::new(), stale: false });
        WrittenDown { nesting, number, iova }
    }

    /// Nothing has been read yet.
    fn restart(&self) {
        if let Some(walk) = self.nesting.state().walks.get_mut(&self.number) {
            walk.pages.clear();
            walk.stale = false;
        }
    }

    /// Notes the page of an entry that is about to be read.
    fn note(&self, address: u64) -> Result<(), Interrupted> {
        let mut state = self.nesting.state();
        match state.walks.get_mut(&self.number) {
            Some(walk) if !walk.stale => {
                walk.pages.push(address & !0xfff);
                Ok(())
            }
            _ => Err(Interrupted::Stale),
        }
    }
}

impl Drop for WrittenDown<'_> {
    fn drop(&mut self) {
        self.nesting.state().walks.remove(&self.number);
    }
}

/// The guest's tables, as an address space has them.
struct Tables<'a, I> {
    space: &'a Space,
    walk: &'a WrittenDown<'a>,
    in_force: I,
}

impl<I: Fn(&DmaSection) -> bool> Tables<'_, I> {
    /// The memory of an entry, as a device would find it.
    fn reach<'s>(
        &'s self,
        section: &'s DmaSection,
        address: u64,
        needed: Attributes,
    ) -> Result<Translated<'s>, NestingFault> {
        if !(self.in_force)(section) {
            return Err(NestingFault::Detached);
        }
        let leaf = self.space.walk_for_dma(section, address, &mut CachedWalk::new());
        let leaf = leaf.ok().filter(|leaf| leaf.attributes.contains(needed));
        let leaf = leaf.ok_or(NestingFault::SecondStage { address })?;
        self.space.memory_at(section, leaf.output(address)).map_err(|_| NestingFault::MemoryGone { address })
    }

    fn read_entry(&self, address: u64) -> Result<u64, NestingFault> {
        let gone = |_: DmaError| NestingFault::MemoryGone { address };
        let mut bytes = [0; 8];
        let section = epoch::dma();
        match self.reach(&section, address, Attributes::READ)? {
            Translated::Here(memory) => memory.read(&mut bytes).map_err(gone)?,
            Translated::Late(memory) => {
                drop(section);
                memory.read(&mut bytes).map_err(gone)?;
            }
        }
        Ok(u64::from_le_bytes(bytes))
    }

    fn mark_entry(&self, address: u64, entry: u64, new: u64) -> Result<bool, NestingFault> {
        let section = epoch::dma();
        // Whoever puts a mark there writes.
        match self.reach(&section, address, Attributes::READ | Attributes::WRITE)? {
            Translated::Here(memory) => {
                let word = memory.atomic_u64().ok_or(NestingFault::NotAtomic { address })?;
                let exchanged =
                    word.compare_exchange(entry.to_le(), new.to_le(), Ordering::SeqCst, Ordering::SeqCst);
                Ok(exchanged.is_ok())
            }
            Translated::Late(_) => Err(NestingFault::NotAtomic { address }),
        }
    }
}

impl<I: Fn(&DmaSection) -> bool> ForeignMemory for Tables<'_, I> {
    type Error = Interrupted;

    fn read(&mut self, address: u64) -> Result<u64, Interrupted> {
        self.walk.note(address)?;
        self.read_entry(address).map_err(Interrupted::Fault)
    }

    fn mark(&mut self, address: u64, entry: u64, new: u64) -> Result<bool, Interrupted> {
        // A guest that has taken a page of tables away, and said so, may use it for something else: from then on nothing is
        // marked there any more.
        let state = self.walk.nesting.state();
        if state.is_stale(self.walk.number) {
            return Err(Interrupted::Stale);
        }
        self.mark_entry(address, entry, new).map_err(Interrupted::Fault)
    }
}

/// How a shadow follows the space: by forgetting. It is never told of mappings, and its leaves need not be cut, since they can go
/// as a whole.
impl DerivedTable for Nesting {
    fn map(&self, _range: IovaRange, _oa: Oa, _attributes: Attributes) -> Result<(), TableError> {
        Ok(())
    }

    fn fill(&self, _range: IovaRange, _oa: Oa, _attributes: Attributes) -> Result<(), TableError> {
        Ok(())
    }

    fn check(&self, _range: IovaRange, _change: Change) -> Result<(), TableError> {
        Ok(())
    }

    fn reaches_over(&self, _at: u64) -> bool {
        false
    }

    fn cut(&self, _at: u64) -> Result<(), TableError> {
        Ok(())
    }

    fn unmap(&self, range: IovaRange) {
        self.forget(range);
    }

    fn protect(&self, range: IovaRange, _permissions: Attributes) -> Result<(), TableError> {
        self.forget(range);
        Ok(())
    }

    fn remap(&self, range: IovaRange, _oa: Oa, _attributes: Attributes) -> Result<(), TableError> {
        self.forget(range);
        Ok(())
    }

    fn invalidate(&self, _runs: &Runs) {
        // What is forgotten is forgotten in the shadow, which walkers read anew each time.
    }

    fn table_bytes(&self) -> Option<u64> {
        Some(self.shadow.table_bytes())
    }

    fn leaves_by_size(&self) -> Option<Vec<(PageSize, u64)>> {
        let _operation = epoch::operation();
        Some(crate::derived::leaves_by_size(&self.shadow))
    }

    fn as_any(&self) -> &dyn Any {
        self
    }
}
