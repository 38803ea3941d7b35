//! Putting the machine together: each device of the options behind the IOMMU.

use std::collections::HashMap;
use std::sync::{Arc, Mutex};

use ioasid::{AttachError, Bus, DerivedTable, Iommu, Iova, IovaRange, Requirements, Rid, Table, TableClass};
use ioasid_soft::dma::{DmaFault, DmaFaultReason, DmaPort};
use ioasid_soft::edu::{Edu, EduOptions};

use crate::poison::lock;
use crate::vfio::MachineDevice;
use crate::{DeviceOptions, ServerError};

/// Devices have one function each on one bus, and device 0 is the root complex's.
const LARGEST_COUNT: usize = 31;

/// Makes the devices.
///
/// # Errors
/// See [`ServerError`].
pub(crate) fn devices(
    _bus: &Arc<Bus>,
    options: Vec<DeviceOptions>,
) -> Result<Vec<Arc<MachineDevice>>, ServerError> {
    if options.len() > LARGEST_COUNT {
        return Err(ServerError::TooManyDevices { asked: options.len(), most: LARGEST_COUNT });
    }
    let iommu = Arc::new(StandIn::default());
    let device = |(number, options): (usize, DeviceOptions)| {
        let rid = Rid(((number + 1) << 3) as u16);
        let port = Arc::new(Port { iommu: Arc::clone(&iommu), rid });
        let options = EduOptions { dma_mask_bits: options.dma_mask_bits, ..EduOptions::default() };
        let model =
            Arc::new(Edu::new(port, options).map_err(|error| ServerError::Device(error.to_string()))?);
        Ok(Arc::new(MachineDevice::new(number, rid, model, Arc::clone(&iommu) as Arc<dyn Iommu>)))
    };
    options.into_iter().enumerate().map(device).collect()
}

#[derive(Debug, Default)]
struct StandIn(Mutex<HashMap<Rid, Arc<Table>>>);

impl Iommu for StandIn {
    fn requirements(&self, _: Rid) -> Option<Requirements> {
        let reserved = vec![IovaRange::new(0xfee0_0000, 0xfeef_ffff)?];
        Some(Requirements { class: TableClass::NATIVE, aperture: IovaRange::ALL, reserved, coherent: true })
    }
    fn new_table(&self, _: TableClass) -> Result<Arc<dyn DerivedTable>, AttachError> {
        Err(AttachError::Incompatible)
    }
    fn attach(&self, device: Rid, table: &Arc<Table>) -> Result<(), AttachError> {
        let old = lock(&self.0).insert(device, table.clone());
        if let Some(old) = old {
            old.wait_for_dma();
        }
        Ok(())
    }
    fn block(&self, device: Rid) {
        let old = lock(&self.0).remove(&device);
        if let Some(old) = old {
            old.wait_for_dma();
        }
    }
}

struct Port {
    iommu: Arc<StandIn>,
    rid: Rid,
}

impl Port {
    fn pieces(
        &self,
        iova: u64,
        length: usize,
        write: bool,
        mut copy: impl FnMut(ioasid::Translated<'_>, std::ops::Range<usize>, ioasid::epoch::Section) -> bool,
    ) -> Result<(), DmaFault> {
        let fault = |iova, reason| DmaFault { iova, write, reason };
        let mut done = 0;
        while done < length {
            let at = iova.checked_add(done as u64).ok_or(fault(iova, DmaFaultReason::OutOfRange))?;
            let part = (4096 - (at % 4096) as usize).min(length - done);
            let table =
                lock(&self.iommu.0).get(&self.rid).cloned().ok_or(fault(at, DmaFaultReason::Blocked))?;
            let section = ioasid::epoch::dma();
            let leaf = table.space().walk(Iova::new(at)).ok_or(fault(at, DmaFaultReason::NotMapped))?;
            let wanted = if write { ioasid::Attributes::WRITE } else { ioasid::Attributes::READ };
            if !leaf.attributes.contains(wanted) {
                return Err(fault(at, DmaFaultReason::NoPermission));
            }
            let oa = ioasid::Oa::new(leaf.oa.get() + (at - leaf.iova));
            let memory = table.space().memory_at(&section, oa);
            let memory = memory.map_err(|_| fault(at, DmaFaultReason::MemoryGone))?;
            if !copy(memory, done..done + part, section) {
                return Err(fault(at, DmaFaultReason::MemoryGone));
            }
            done += part;
        }
        Ok(())
    }
}

impl DmaPort for Port {
    fn read(&self, iova: u64, buffer: &mut [u8]) -> Result<(), DmaFault> {
        self.pieces(iova, buffer.len(), false, |memory, part, section| match memory {
            ioasid::Translated::Here(here) => here.read(&mut buffer[part]).is_ok(),
            ioasid::Translated::Late(late) => {
                drop(section);
                late.read(&mut buffer[part]).is_ok()
            }
        })
    }
    fn write(&self, iova: u64, bytes: &[u8]) -> Result<(), DmaFault> {
        self.pieces(iova, bytes.len(), true, |memory, part, section| match memory {
            ioasid::Translated::Here(here) => here.write(&bytes[part]).is_ok(),
            ioasid::Translated::Late(late) => {
                drop(section);
                late.write(&bytes[part]).is_ok()
            }
        })
    }
}
