//! What every software PCI device has in common.
//!
//! A program reaches a device through regions, numbered as VFIO numbers them: its BARs, its ROM and its
//! configuration space. A server looks an access up in the device's [`RegionTable`] and hands it to the
//! [`PciDevice`]; the device answers from a [`ConfigSpace`] (data: masks decide what a write does) or
//! from registers of its own, which see only the naturally aligned accesses into which
//! [`access`](mod@access) splits whatever the program asked for.
//!
//! Real hardware has these layers too: software issues any access, the host bridge cuts it into bus
//! transactions, and the device decodes one transaction at a time. Keeping the cut outside of devices
//! means that none of them has to think about odd lengths. The offsets and bits themselves are data of
//! [`ioasid_uapi::pci`].

pub mod access;
mod config;
mod device;
mod header;

pub use config::{ConfigSpace, ConfigSpaceSize, RegisterLayout};
pub use device::{AccessError, PciDevice, Region, RegionTable};
pub use header::{Bar, HeaderError, Type0Header};
pub use ioasid_uapi::pci::Command;
pub use ioasid_uapi::vfio::RegionFlags;
