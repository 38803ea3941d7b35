//! A page table of a space, as one class of devices sees it.
//!
//! A [`Table`] is what devices are attached to (Linux calls it a hardware page table, HWPT). For devices that walk
//! the native table it is that table; for others it owns a derived one, which follows the space from the moment
//! the `Table` is made until the last reference to it goes. Devices of equal class share one unless asked not to, if
//! they are to have the same [coherency](Coherency).
//! Afterwards the space's leaves are as if the table had never been.

use crate::derived::leaves_by_size;
use crate::device::Device;
use crate::epoch::{self, DmaSection};
use crate::iommu::{AttachError, Coherency, DerivedTable, TableClass, TableError};
use crate::nesting::{FirstStage, Nesting};
use crate::space::{ReservationOwner, ReserveError, Space};
use ioasid_pagetable::{Iova, IovaRange, Native, PageSize, Radix};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Weak};

/// Tables of first stages begin at multiples of this.
const FIRST_STAGE_ALIGNMENT: u64 = 4096;

static TABLES: AtomicU64 = AtomicU64::new(0);

/// A page table of a space that devices can be attached to.
#[derive(Debug)]
pub struct Table {
    id: u64,
    space: Arc<Space>,
    class: TableClass,
    coherency: Coherency,
    derived: Option<Arc<dyn DerivedTable>>,
    /// The same, if it is a guest's table over the space.
    nesting: Option<Arc<Nesting>>,
    /// Whether devices mark the leaves that they write through.
    recording: AtomicBool,
}

/// The table cannot say what was written through it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("tables of this kind do not record what devices write")]
pub struct NoRecord;

impl From<ReserveError> for AttachError {
    fn from(error: ReserveError) -> AttachError {
        match error {
            ReserveError::Allowed { range } => AttachError::Allowed { range },
            ReserveError::Mapped { range }
            | ReserveError::Reserved { range }
            | ReserveError::Overlapping { range } => AttachError::Mapped { range },
        }
    }
}

impl Table {
    /// The table of the space that devices like this one share, made if there is none yet. Accesses of the device are
    /// [coherent](Device::coherency) if that can be had.
    pub fn for_device(space: &Arc<Space>, device: &Device) -> Result<Arc<Table>, AttachError> {
        Table::with_coherency(space, device, device.coherency())
    }

    /// The same, with a promise of the caller's choice.
    ///
    /// # Errors
    /// [`AttachError::Incoherent`]: the IOMMU cannot keep it. Those of making the table.
    pub fn with_coherency(
        space: &Arc<Space>,
        device: &Device,
        coherency: Coherency,
    ) -> Result<Arc<Table>, AttachError> {
        // Two devices that come at the same time shall not get two tables.
        let _sharing = space.sharing();
        let class = device.class_for(coherency).ok_or(AttachError::Incoherent(device.rid()))?;
        match space.shared_table(class, coherency) {
            Some(table) => Ok(table),
            None => Table::make(space, device, class, coherency, true),
        }
    }

    /// A table of the space of its own for this device, and whoever else is attached to it by name. Accesses are
    /// [coherent](Device::coherency) if that can be had for the device.
    pub fn new(space: &Arc<Space>, device: &Device) -> Result<Arc<Table>, AttachError> {
        let coherency = device.coherency();
        let class = device.class_for(coherency).ok_or(AttachError::Incoherent(device.rid()))?;
        Table::make(space, device, class, coherency, false)
    }

    /// A table whose first stage a guest writes, in memory of the space, with its root at `root`: what the device gives as an
    /// address is translated by the guest's table to an address of the space, and by the space to memory. See [`Nesting`].
    ///
    /// Devices are attached to it as to any other table, with a PASID or without. Whoever hears of it when the guest
    /// invalidates (the model of the guest's IOMMU) passes that on.
    ///
    /// ```
    /// # use ioasid::{Device, FirstStage, Iova, IovaRange, Space, Table};
    /// # use std::sync::Arc;
    /// # fn example(guest_memory: &Arc<Space>, device: &Device, root: Iova, unmapped: IovaRange)
    /// # -> Result<(), Box<dyn std::error::Error>> {
    /// // The guest has written a table for its device, and told its IOMMU where.
    /// let table = Table::nested(guest_memory, device, FirstStage::X86_64, root)?;
    /// device.attach(&table)?;
    /// // It has cleared entries, and said so.
    /// table.nesting().unwrap().invalidate(unmapped);
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Errors
    /// [`AttachError::Incompatible`]: the device's IOMMU does not walk such tables; [`AttachError::NoRoot`]: no table of this
    /// format can be there. Something is mapped where the second stage can have no mapping.
    pub fn nested(
        space: &Arc<Space>,
        device: &Device,
        first_stage: FirstStage,
        root: Iova,
    ) -> Result<Arc<Table>, AttachError> {
        if !device.iommu().first_stages(device.rid()).contains(&first_stage) {
            return Err(AttachError::Incompatible);
        }
        if root.get() % FIRST_STAGE_ALIGNMENT != 0 {
            return Err(AttachError::NoRoot { root });
        }
        let reserved = device.requirements().reserved.clone();
        let nesting = Arc::new(Nesting::new(space, first_stage, root.get(), reserved));
        let derived: Arc<dyn DerivedTable> = nesting.clone();
        let class = TableClass::Nested(first_stage);
        Table::join(space, device, class, device.coherency(), false, Some(derived), Some(nesting))
    }

    fn make(
        space: &Arc<Space>,
        device: &Device,
        class: TableClass,
        coherency: Coherency,
        shared: bool,
    ) -> Result<Arc<Table>, AttachError> {
        let derived = match class {
            TableClass::Native => None,
            TableClass::Derived { .. } => {
                let largest_leaf = space.native().format().largest_leaf();
                Some(device.iommu().new_table(class, largest_leaf, space.bus())?)
            }
            TableClass::Nested(_) => return Err(AttachError::Incompatible),
        };
        Table::join(space, device, class, coherency, shared, derived, None)
    }

    /// Lets a table follow the space.
    fn join(
        space: &Arc<Space>,
        device: &Device,
        class: TableClass,
        coherency: Coherency,
        shared: bool,
        derived: Option<Arc<dyn DerivedTable>>,
        nesting: Option<Arc<Nesting>>,
    ) -> Result<Arc<Table>, AttachError> {
        let id = TABLES.fetch_add(1, Ordering::Relaxed);
        let aperture = device.requirements().aperture;
        let below = aperture.first().checked_sub(1).and_then(|last| IovaRange::new(0, last));
        let above = aperture.last().checked_add(1).and_then(|first| IovaRange::new(first, u64::MAX));
        let outside: Vec<IovaRange> = below.into_iter().chain(above).collect();
        space.reserve_all(&outside, ReservationOwner::Table(id))?;
        let mut added = Ok(());
        let table = Arc::new_cyclic(|table: &Weak<Table>| {
            let shared = shared.then_some(coherency);
            added = space.add_table(table, id, class, shared, derived.as_ref());
            let recording = AtomicBool::new(false);
            Table { id, space: space.clone(), class, coherency, derived, nesting, recording }
        });
        // On an error the drop of `table` takes the reservation back.
        added.map(|()| table)
    }

    /// The space whose mappings it holds.
    pub fn space(&self) -> &Arc<Space> {
        &self.space
    }

    /// The kind of table it is.
    pub fn class(&self) -> TableClass {
        self.class
    }

    /// What it promises of the accesses that go through it.
    pub fn coherency(&self) -> Coherency {
        self.coherency
    }

    /// The derived table, for the IOMMU that made it; `None`: devices walk the native one.
    pub fn derived(&self) -> Option<&Arc<dyn DerivedTable>> {
        self.derived.as_ref()
    }

    /// The guest's table, if this is [nested](Self::nested).
    pub fn nesting(&self) -> Option<&Arc<Nesting>> {
        self.nesting.as_ref()
    }

    /// The table in the native format that devices walk which have no format of their own, and all devices where this is
    /// [nested](Self::nested): the space's own, or what is remembered of both stages. In a DMA section.
    #[inline(always)]
    pub fn native<'section>(&'section self, _section: &'section DmaSection) -> &'section Radix<Native> {
        match &self.nesting {
            None => self.space.native(),
            Some(nesting) => nesting.shadow(),
        }
    }

    /// How many leaves of each size the table has, smallest first: what its devices find. `None` if the IOMMU does not
    /// say.
    pub fn leaves_by_size(&self) -> Option<Vec<(PageSize, u64)>> {
        let _operation = epoch::operation();
        match &self.derived {
            None => Some(leaves_by_size(self.space.native())),
            Some(derived) => derived.leaves_by_size(),
        }
    }

    fn recorder(&self) -> Result<&dyn DerivedTable, NoRecord> {
        self.derived.as_deref().filter(|derived| derived.records_writes()).ok_or(NoRecord)
    }

    /// Begins to record what devices write through the table, from an empty record on, or ends it; what was recorded by
    /// then stays.
    ///
    /// When it returns after beginning, every write that is not in the record has ended.
    ///
    /// # Errors
    /// [`NoRecord`]: the table is of a kind that cannot.
    pub fn record_writes(&self, record: bool) -> Result<(), NoRecord> {
        let recorder = self.recorder()?;
        if record {
            self.space.take_written(recorder, IovaRange::ALL, |_| ());
        }
        self.recording.store(record, Ordering::SeqCst);
        if record {
            self.wait_for_dma();
        }
        Ok(())
    }

    /// Whether devices have to [mark](Self::mark_written) what they write.
    #[inline]
    pub fn is_recording(&self) -> bool {
        self.recording.load(Ordering::Relaxed)
    }

    /// Reports what devices have written in the range since it was [taken](Self::take_written) last, leaf by leaf in
    /// ascending order: all of a leaf that lies in the range counts as written if any of it was.
    ///
    /// # Errors
    /// [`NoRecord`]: the table is of a kind that cannot.
    pub fn written(&self, range: IovaRange, mut report: impl FnMut(IovaRange)) -> Result<(), NoRecord> {
        let recorder = self.recorder()?;
        let _operation = epoch::operation();
        recorder.written(range, false, &mut report);
        Ok(())
    }

    /// Reports the same, and forgets it, but for a leaf that reaches over an end of the range. Every write that is not
    /// reported after this has been, or will be the next time; so memory may be copied as soon as it returns.
    ///
    /// # Errors
    /// [`NoRecord`]: the table is of a kind that cannot.
    pub fn take_written(&self, range: IovaRange, report: impl FnMut(IovaRange)) -> Result<(), NoRecord> {
        self.space.take_written(self.recorder()?, range, report);
        Ok(())
    }

    /// Makes leaves of at most `largest` of all larger ones of this table that have an address in the range. No translation
    /// changes, no device notices, and the space's other tables stay as they are. [`Space::merge`] is the way back.
    ///
    /// This is how finely [writes are recorded](Self::record_writes): split before the record begins, or every piece of a leaf
    /// that was written counts as written. What is mapped later has the largest leaves again, until it is split too.
    ///
    /// It goes on in pieces, beside other operations. For each 2 MiB that become pages of 4 KiB it takes a table page of
    /// 4 KiB.
    ///
    /// ```
    /// # use ioasid::{Account, Backing, Bus, Device, Iova, IovaRange, Memory, PageSize, Permissions, Space, Table};
    /// # fn example(device: &Device, space: &std::sync::Arc<Space>) -> Result<(), Box<dyn std::error::Error>> {
    /// let table = Table::for_device(space, device)?;
    /// let guest = IovaRange::with_length(0x1_0000_0000, 1 << 30).unwrap();
    /// table.split(guest, PageSize::SIZE_4K)?;
    /// table.record_writes(true)?;
    /// // The guest is copied, while its devices write on.
    /// table.take_written(guest, |written| println!("copy {written} again"))?;
    /// table.record_writes(false)?;
    /// space.merge(guest);
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Errors
    /// There is no memory for table pages, or the table has a leaf that cannot be cut while devices use it. What comes before
    /// that leaf stays split.
    pub fn split(&self, range: IovaRange, largest: PageSize) -> Result<(), TableError> {
        self.space.split(self.derived.as_deref(), range, largest)
    }

    /// Records what is mapped in the range as written; for who has taken a report and cannot use it.
    ///
    /// # Errors
    /// [`NoRecord`]: the table is of a kind that cannot.
    pub fn mark_written(&self, range: IovaRange) -> Result<(), NoRecord> {
        let recorder = self.recorder()?;
        let _operation = epoch::operation();
        recorder.mark_written(range);
        Ok(())
    }

    /// Whether a leaf reaches from before `at` to behind it. A table that does not know says yes.
    pub fn reaches_over(&self, at: u64) -> bool {
        let _operation = epoch::operation();
        self.derived.as_ref().is_some_and(|derived| derived.reaches_over(at))
    }

    /// Returns when no DMA that began through this table is running.
    pub fn wait_for_dma(&self) {
        epoch::wait_for_dma();
        self.space.sleeping().wait();
    }
}

impl Drop for Table {
    fn drop(&mut self) {
        self.space.remove_table(self.id);
        self.space.unreserve(ReservationOwner::Table(self.id));
    }
}
