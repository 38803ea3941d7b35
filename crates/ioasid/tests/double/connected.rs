//! The double, as it is when some of its devices are connected so that it cannot keep them apart.

use super::{DERIVED, DERIVED_TOO, Double};
use ioasid::pasid::Pasid;
use ioasid::{AttachError, Bus, DerivedTable, Iommu, PageSize, Requirements, Rid, Table, TableClass};
use std::sync::Arc;

/// The members are one group, and two of them have one requester ID: [`DERIVED`], and [`DERIVED_TOO`].
#[derive(Debug)]
pub(crate) struct Connected {
    pub(crate) double: Arc<Double>,
    members: Vec<Rid>,
    /// Called before a device is attached or blocked.
    pause: fn(),
}

impl Connected {
    pub(crate) fn new(double: Arc<Double>, members: &[Rid], pause: fn()) -> Arc<Connected> {
        Arc::new(Connected { double, members: members.to_vec(), pause })
    }

    /// Where requests of the device go.
    pub(crate) fn table_of(&self, device: Rid) -> Option<Arc<Table>> {
        self.double.table_of(self.requester(device))
    }
}

impl Iommu for Connected {
    fn requirements(&self, device: Rid) -> Option<Requirements> {
        self.double.requirements(device)
    }

    fn requester(&self, device: Rid) -> Rid {
        if device == DERIVED_TOO { DERIVED } else { device }
    }

    fn group(&self, _device: Rid) -> Vec<Rid> {
        self.members.clone()
    }

    fn new_table(
        &self,
        class: TableClass,
        largest_leaf: PageSize,
        bus: &Arc<Bus>,
    ) -> Result<Arc<dyn DerivedTable>, AttachError> {
        self.double.new_table(class, largest_leaf, bus)
    }

    fn attach(&self, device: Rid, table: &Arc<Table>) -> Result<(), AttachError> {
        (self.pause)();
        self.double.attach(self.requester(device), table)
    }

    fn block(&self, device: Rid) {
        (self.pause)();
        self.double.block(self.requester(device));
    }

    fn attach_pasid(&self, device: Rid, pasid: Pasid, table: &Arc<Table>) -> Result<(), AttachError> {
        (self.pause)();
        self.double.attach_pasid(device, pasid, table)
    }

    fn block_pasid(&self, device: Rid, pasid: Pasid) {
        (self.pause)();
        self.double.block_pasid(device, pasid);
    }
}
