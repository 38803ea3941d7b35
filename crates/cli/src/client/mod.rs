//! A client of Linux's iommufd and VFIO interfaces, as any program could have it.
//!
//! Nothing here knows whether a kernel or a server answers; the only things shared with the server are the layouts and
//! the register names, which are public facts. [`Iommufd`] is an open `/dev/iommu`, [`VfioDevice`] an open device file,
//! [`Edu`] the driver of the device behind it, and [`DmaMemory`] memory that a device may write at any time.

mod edu;
mod iommufd;
mod sys;
mod vfio;

pub(crate) use edu::Edu;
pub(crate) use iommufd::{Access, Iommufd};
pub(crate) use sys::DmaMemory;
pub(crate) use vfio::VfioDevice;
