//! Putting the machine together: each device of the options behind the IOMMU.
//!
//! One software IOMMU serves all devices, as one unit serves a whole bus; which table a device walks is its own
//! property. A device model is given the ports through which it does DMA, and knows nothing else of all this.

use std::sync::Arc;

use ioasid::{Iommu, Rid};
use ioasid_soft::edu::{Edu, EduOptions};
use ioasid_soft::iommu::SoftIommu;
use ioasid_soft::pci::PciDevice;

use crate::dma::{DevicePasids, DevicePort, DmaFaults};
use crate::observer::{Observer, WatchedDevice};
use crate::vfio::MachineDevice;
use crate::{DeviceOptions, ServerError};

/// Devices have one function each on bus 0, and device 0 is the root complex's.
const LARGEST_COUNT: usize = 31;

/// Makes the devices.
///
/// # Errors
/// See [`ServerError`].
pub(crate) fn devices(
    options: Vec<DeviceOptions>,
    observer: Option<&Arc<dyn Observer>>,
) -> Result<Vec<Arc<MachineDevice>>, ServerError> {
    if options.len() > LARGEST_COUNT {
        return Err(ServerError::TooManyDevices { asked: options.len(), most: LARGEST_COUNT });
    }
    let iommu = SoftIommu::new();
    let rids = (1_u16..).map(|device| Rid(device << 3));
    let device = |(number, (options, rid)): (usize, (DeviceOptions, Rid))| {
        let port = iommu.add_device(rid, options.table)?;
        let edu_options = EduOptions { dma_mask_bits: options.dma_mask_bits, ..EduOptions::default() };
        let watched = observer.map(|observer| Arc::new(WatchedDevice::new(rid, observer)));
        let faults = Arc::new(DmaFaults::default());
        let plain = DevicePort {
            port,
            faults: Arc::clone(&faults),
            watched: watched.as_ref().map(|watched| Arc::clone(watched.plain())),
        };
        let pasids = DevicePasids {
            iommu: Arc::clone(&iommu),
            device: rid,
            bits: options.pasid_bits,
            faults: Arc::clone(&faults),
            watched: watched.clone(),
        };
        let model: Arc<dyn PciDevice> = match options.pasid_bits {
            0 => Arc::new(Edu::new(Arc::new(plain), edu_options)?),
            _ => Arc::new(Edu::with_pasids(Arc::new(plain), Arc::new(pasids), edu_options)?),
        };
        let iommu = Arc::clone(&iommu) as Arc<dyn Iommu>;
        let pasid_bits = options.pasid_bits;
        Ok(Arc::new(MachineDevice {
            number,
            rid,
            model,
            faults,
            iommu,
            pasid_bits,
            bound: false.into(),
            watched,
        }))
    };
    options.into_iter().zip(rids).enumerate().map(device).collect()
}
