//! Putting the machine together: each device of the options behind the IOMMU.
//!
//! One software IOMMU serves all devices, as one unit serves a whole bus; which table a device walks is its own
//! property. Devices stand alone on bus 0, unless the options put several behind a bridge to conventional PCI, which makes a group of
//! them. A device model is given the ports through which it does DMA, and knows nothing else of all this.

use std::collections::{BTreeMap, BTreeSet};
use std::num::NonZeroU8;
use std::sync::Arc;

use ioasid::{Iommu, Rid};
use ioasid_soft::edu::{Edu, EduOptions};
use ioasid_soft::iommu::{Bridge, SoftIommu, Topology, TopologyError};
use ioasid_soft::pci::PciDevice;

use crate::dma::{DevicePasids, DevicePort, DmaFaults};
use crate::iommufd::device::PlainRoute;
use crate::observer::{Observer, WatchedDevice};
use crate::vfio::MachineDevice;
use crate::{DeviceOptions, ServerError};

/// Devices have one function each, all a number of their own, and device 0 of bus 0 is the root complex's.
const LARGEST_COUNT: usize = 31;

/// The root complex, which has the bridges.
const ROOT: Rid = Rid(0);

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
    let iommu = SoftIommu::with_topology(topology(&options)?);
    // All groups of this machine are of devices that share a requester ID, and with it their way.
    let mut routes: BTreeMap<Rid, Arc<PlainRoute>> = BTreeMap::new();
    let device = |((number, options), slot): ((usize, DeviceOptions), u16)| {
        let bus = options.conventional_bus.map_or(0, NonZeroU8::get);
        let rid = Rid(u16::from(bus) << 8 | slot << 3);
        let port = if options.no_snoop {
            iommu.add_no_snoop_device(rid, options.table)?
        } else {
            iommu.add_device(rid, options.table)?
        };
        let edu_options = EduOptions { dma_mask_bits: options.dma_mask_bits, ..EduOptions::default() };
        let watched = observer.map(|observer| Arc::new(WatchedDevice::new(rid, observer)));
        let faults = Arc::new(DmaFaults::default());
        let plain = DevicePort {
            port,
            faults: Arc::clone(&faults),
            watched: watched.as_ref().map(|watched| Arc::clone(watched.plain())),
        };
        // On conventional PCI no request has a PASID.
        let pasid_bits = if bus == 0 { options.pasid_bits } else { 0 };
        let pasids = DevicePasids {
            iommu: Arc::clone(&iommu),
            device: rid,
            bits: pasid_bits,
            faults: Arc::clone(&faults),
            watched: watched.clone(),
        };
        let model: Arc<dyn PciDevice> = match pasid_bits {
            0 => Arc::new(Edu::new(Arc::new(plain), edu_options)?),
            _ => Arc::new(Edu::with_pasids(Arc::new(plain), Arc::new(pasids), edu_options)?),
        };
        let iommu = Arc::clone(&iommu) as Arc<dyn Iommu>;
        let plain = Arc::clone(routes.entry(iommu.requester(rid)).or_default());
        Ok(Arc::new(MachineDevice {
            number,
            rid,
            model,
            faults,
            iommu,
            pasid_bits,
            bound: false.into(),
            plain,
            complained: false.into(),
            watched,
        }))
    };
    options.into_iter().enumerate().zip(1..).map(device).collect()
}

/// A bridge for each bus that a device is on.
fn topology(options: &[DeviceOptions]) -> Result<Topology, TopologyError> {
    let buses: BTreeSet<_> = options.iter().filter_map(|options| options.conventional_bus).collect();
    buses
        .into_iter()
        .try_fold(Topology::new(), |topology, bus| topology.bridge(ROOT, bus.get(), Bridge::ToConventional))
}
