//! Putting the machine together: each device of the options behind the IOMMU.
//!
//! One software IOMMU serves all devices, as one unit serves a whole bus; which table a device walks is its own
//! property. A device model is given the port through which it does DMA, and knows nothing else of all this.

use std::sync::Arc;

use ioasid::{Iommu, Rid};
use ioasid_soft::dma::DmaPort;
use ioasid_soft::edu::{Edu, EduOptions};
use ioasid_soft::iommu::SoftIommu;

use crate::observer::{Observer, Watched, WatchedPort};
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
        let watched = observer.map(|observer| Watched::new(rid, Arc::clone(observer)));
        let dma: Arc<dyn DmaPort> = match &watched {
            Some(watched) => Arc::new(WatchedPort { port: Arc::clone(&port), watched: Arc::clone(watched) }),
            None => Arc::clone(&port) as _,
        };
        let model = Arc::new(Edu::new(dma, edu_options)?);
        let behind = Arc::clone(&iommu) as Arc<dyn Iommu>;
        Ok(Arc::new(MachineDevice::new(number, rid, model, port, behind, watched)))
    };
    options.into_iter().zip(rids).enumerate().map(device).collect()
}
