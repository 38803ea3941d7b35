//! Software devices, and what stands between them and memory.
//!
//! - [`pci`] is what every software PCI device has in common: a configuration space, regions, and the
//!   rules by which a program's reads and writes reach them. Its trait [`pci::PciDevice`] is all that
//!   a server of `/dev/vfio` sees of a device.
//! - [`dma`] is the way out of a device: a [`dma::DmaPort`] takes an IOVA and bytes, and either moves
//!   them or says in a [`dma::DmaFault`] why it did not. The device does not know what translates.
//! - [`edu`] is a device after the public description of QEMU's `edu`, small enough to read at one
//!   sitting and complete enough to drive DMA in both directions.
//! - [`iommu`] is the software IOMMU: an implementation of the engine's trait that walks tables, caches the
//!   way to them, and copies. Its ports are what devices do DMA through.
//!
//! The two traits keep the halves apart: a device is tested against plain memory, and an IOMMU is
//! tested without a device.
#![forbid(unsafe_code)]

pub mod dma;
pub mod edu;
pub mod iommu;
pub mod pci;
