//! A page table of a space, as one class of devices sees it.
//!
//! A [`Table`] is what devices are attached to (Linux calls it a hardware page table, HWPT). For devices that walk
//! the native table it is that table; for others it owns a derived one, which follows the space from the moment
//! the `Table` is made until the last reference to it goes. Devices of equal class share one unless asked not to, if
//! they are to have the same [coherency](Coherency).
//! Afterwards the space's leaves are as if the table had never been.

use crate::derived::leaves_by_size;
use crate::device::Device;
use crate::epoch;
use crate::iommu::{AttachError, Coherency, DerivedTable, TableClass, TableError};
use crate::space::{ReservationOwner, ReserveError, Space};
use ioasid_pagetable::{IovaRange, PageSize};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Weak};

static TABLES: AtomicU64 = AtomicU64::new(0);

/// A page table of a space that devices can be attached to.
#[derive(Debug)]
pub struct Table {
    id: u64,
    space: Arc<Space>,
    class: TableClass,
    coherency: Coherency,
    derived: Option<Arc<dyn DerivedTable>>,
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
        };
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
            Table { id, space: space.clone(), class, coherency, derived, recording: AtomicBool::new(false) }
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
