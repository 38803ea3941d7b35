//! The registers of the edu device: numbers only.
//!
//! The source is the device's public description, "EDU device" in QEMU's documentation of emulated
//! device specifications. Offsets are in BAR 0. [`DMA_PASID`] is not in it: it is an extension of this project.

use bitflags::bitflags;

/// PCI vendor ID.
pub const VENDOR_ID: u16 = 0x1234;
/// PCI device ID.
pub const DEVICE_ID: u16 = 0x11e8;
/// PCI revision ID.
pub const REVISION: u8 = 0x10;
/// PCI class code: no class that is defined.
pub const CLASS_CODE: u32 = 0x00_ff00;
/// Size of BAR 0 in bytes.
pub const BAR_SIZE: u32 = 1 << 20;

/// 4 bytes, read-only: what the device is and its version.
pub const IDENTIFICATION: u64 = 0x00;
/// The value of [`IDENTIFICATION`]: version 1.0, then a constant.
pub const IDENTIFICATION_VALUE: u32 = 0x0100_00ed;
/// 4 bytes: reads the bitwise inverse of what was written last.
pub const LIVENESS: u64 = 0x04;
/// 4 bytes: writing n starts the computation of n! modulo 2^32, which can be read when it is done.
pub const FACTORIAL: u64 = 0x08;
/// 4 bytes: [`Status`].
pub const STATUS: u64 = 0x20;
/// 4 bytes, read-only: the [`InterruptCauses`] raised and not yet acknowledged.
pub const INTERRUPT_STATUS: u64 = 0x24;
/// 4 bytes, write-only: causes to raise.
pub const INTERRUPT_RAISE: u64 = 0x60;
/// 4 bytes, write-only: causes to acknowledge.
pub const INTERRUPT_ACKNOWLEDGE: u64 = 0x64;
/// 4 or 8 bytes: the address that a transfer reads from.
pub const DMA_SOURCE: u64 = 0x80;
/// 4 or 8 bytes: the address that a transfer writes to.
pub const DMA_DESTINATION: u64 = 0x88;
/// 4 or 8 bytes: how many bytes a transfer moves.
pub const DMA_COUNT: u64 = 0x90;
/// 4 or 8 bytes: [`DmaCommand`].
pub const DMA_COMMAND: u64 = 0x98;
/// 4 or 8 bytes, an extension of this project: [`DmaPasid`]. 0 after a reset, and then the device is the one described.
pub const DMA_PASID: u64 = 0xa0;
/// The bits of [`DMA_PASID`] that are the PASID.
pub const DMA_PASID_NUMBER: u64 = 0xf_ffff;
/// The first offset whose registers may be accessed 8 bytes at a time.
pub const WIDE_REGISTERS: u64 = 0x80;

/// The address by which a transfer names the device's own buffer. It cannot be reached through the BAR.
pub const BUFFER_ADDRESS: u64 = 0x4_0000;
/// Size of that buffer in bytes.
pub const BUFFER_SIZE: usize = 4096;

/// How many address bits the device drives unless told otherwise.
pub const DMA_MASK_BITS: u32 = 28;

/// The smallest n whose factorial is a multiple of 2^32, so that all from here on give 0.
pub const FIRST_ZERO_FACTORIAL: u32 = 34;

bitflags! {
    /// The register [`STATUS`].
    #[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
    pub struct Status: u32 {
        /// A factorial is being computed. Read-only.
        const COMPUTING = 0x01;
        /// Raise [`InterruptCauses::FACTORIAL`] when it is done.
        const INTERRUPT_AFTER_FACTORIAL = 0x80;
    }

    /// The register [`INTERRUPT_STATUS`]. Software may raise bits that have no name here.
    #[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
    pub struct InterruptCauses: u32 {
        /// A factorial has been computed.
        const FACTORIAL = 0x001;
        /// A transfer has ended.
        const DMA = 0x100;
        const _ = !0;
    }

    /// The register [`DMA_COMMAND`]. Bits that have no name are stored and mean nothing.
    #[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
    pub struct DmaCommand: u64 {
        /// Start a transfer; set until it has ended.
        const RUN = 0x1;
        /// From the device's buffer to memory, rather than from memory to the buffer.
        const TO_MEMORY = 0x2;
        /// Raise [`InterruptCauses::DMA`] when it has ended.
        const INTERRUPT_WHEN_DONE = 0x4;
        const _ = !0;
    }

    /// The register [`DMA_PASID`]. Its lowest 20 bits are [the PASID](DMA_PASID_NUMBER); other bits without a name read zero.
    #[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
    pub struct DmaPasid: u64 {
        /// Requests have the PASID. Without this bit they have none, whatever the number.
        const ENABLE = 0x8000_0000;
        const _ = DMA_PASID_NUMBER;
    }
}
