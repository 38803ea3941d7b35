//! What the scenarios begin with: a bus, a software IOMMU, and devices on tables of any format.

use ioasid::{Account, Backing, Bus, Device, IovaRange, Memory, Permissions, Rid, Space, Table};
use ioasid_soft::dma::{DmaFaultReason, DmaPort};
use ioasid_soft::iommu::{Port, SoftIommu, TableKind};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU16, Ordering};

pub(crate) const K4: u64 = 4 << 10;
pub(crate) const M2: u64 = 2 << 20;
pub(crate) const G1: u64 = 1 << 30;
pub(crate) const RW: Permissions = Permissions::READ_WRITE;

/// `length` bytes from `first` on.
pub(crate) fn range(first: u64, length: u64) -> IovaRange {
    IovaRange::with_length(first, length).unwrap()
}

/// A machine without devices.
pub(crate) struct Machine {
    pub(crate) bus: Arc<Bus>,
    pub(crate) iommu: Arc<SoftIommu>,
    rids: AtomicU16,
}

impl Machine {
    pub(crate) fn new() -> Machine {
        Machine::of(&Bus::new(), &SoftIommu::new())
    }

    /// One whose devices the IOMMU knows to be connected in some way.
    pub(crate) fn of(bus: &Arc<Bus>, iommu: &Arc<SoftIommu>) -> Machine {
        Machine { bus: bus.clone(), iommu: iommu.clone(), rids: AtomicU16::new(8) }
    }

    /// A new device, attached to nothing.
    pub(crate) fn device(&self, kind: TableKind) -> Function {
        let rid = Rid(self.rids.fetch_add(8, Ordering::Relaxed));
        let port = self.iommu.add_device(rid, kind).unwrap();
        Function { kind, device: Device::new(self.iommu.clone(), rid).unwrap(), port }
    }

    /// A new device, attached to the space.
    pub(crate) fn attached(&self, kind: TableKind, space: &Arc<Space>) -> Function {
        let function = self.device(kind);
        function.attach(space);
        function
    }

    /// Memory of its own object.
    pub(crate) fn memory(&self, length: u64, account: &Account) -> Arc<Memory> {
        Memory::register(&Backing::anonymous(&self.bus, length).unwrap(), 0, length, account).unwrap()
    }
}

/// A device, and the way on which it does its DMA.
pub(crate) struct Function {
    pub(crate) kind: TableKind,
    pub(crate) device: Device,
    pub(crate) port: Arc<Port>,
}

impl Function {
    pub(crate) fn attach(&self, space: &Arc<Space>) -> Arc<Table> {
        let table = Table::for_device(space, &self.device).unwrap();
        self.device.attach(&table).unwrap();
        table
    }

    pub(crate) fn table(&self) -> Arc<Table> {
        self.device.table().unwrap()
    }

    /// Reads a number.
    pub(crate) fn read(&self, iova: u64) -> Result<u64, DmaFaultReason> {
        let mut bytes = [0; 8];
        let read = self.port.read(iova, &mut bytes).map_err(|fault| fault.reason);
        read.map(|()| u64::from_le_bytes(bytes))
    }

    pub(crate) fn write(&self, iova: u64, number: u64) -> Result<(), DmaFaultReason> {
        self.port.write(iova, &number.to_le_bytes()).map_err(|fault| fault.reason)
    }

    pub(crate) fn faults(&self) -> u64 {
        self.port.statistics().faults
    }

    /// The sizes of the leaves that the device finds, and how many there are of each; the smallest first.
    pub(crate) fn leaves(&self) -> Vec<(u64, u64)> {
        let leaves = self.table().leaves_by_size().unwrap();
        leaves.into_iter().map(|(size, count)| (size.bytes(), count)).collect()
    }
}

/// What stands at an offset of memory, as its owner sees it.
pub(crate) fn number_at(memory: &Memory, offset: u64) -> u64 {
    let mut bytes = [0; 8];
    memory.backing().read(memory.offset() + offset, &mut bytes).unwrap();
    u64::from_le_bytes(bytes)
}

/// Lets memory have a number at the beginning of each page that `pages` names.
pub(crate) fn number_pages(
    memory: &Memory,
    pages: impl IntoIterator<Item = u64>,
    number: impl Fn(u64) -> u64,
) {
    for page in pages {
        memory.backing().write(memory.offset() + page * K4, &number(page).to_le_bytes()).unwrap();
    }
}

/// Does `work` while a thread for each of the `devices` does DMA, again and again, from before it begins until after it has
/// ended. Each is told how often it has been called before.
pub(crate) fn beside<T>(devices: &[&(dyn Fn(u64) + Sync)], work: impl FnOnce() -> T) -> T {
    /// Ends the threads, also when a check fails.
    struct End<'a>(&'a AtomicBool);
    impl Drop for End<'_> {
        fn drop(&mut self) {
            self.0.store(true, Ordering::SeqCst);
        }
    }
    let ended = AtomicBool::new(false);
    let begun = std::sync::Barrier::new(devices.len() + 1);
    std::thread::scope(|scope| {
        for device in devices {
            let (begun, ended) = (&begun, &ended);
            scope.spawn(move || {
                begun.wait();
                let _end = End(ended);
                let mut number = 0;
                // Once more afterwards.
                let mut last = false;
                while !last {
                    last = ended.load(Ordering::SeqCst);
                    device(number);
                    number += 1;
                    std::thread::yield_now();
                }
            });
        }
        begun.wait();
        let _end = End(&ended);
        work()
    })
}
