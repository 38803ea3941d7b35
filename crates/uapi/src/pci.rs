//! PCI configuration space, as far as software devices have it (PCI Express Base Specification, section 7.5).
//!
//! Offsets are in bytes from the start of configuration space, or, in the capabilities' parts, from the start of the
//! capability. Registers are little-endian whatever the machine.

/// Bytes of a conventional device's configuration space.
pub const CONFIG_SPACE_SIZE: usize = 256;
/// Bytes of a PCI Express device's configuration space.
pub const EXPRESS_CONFIG_SPACE_SIZE: usize = 4096;

/// Vendor ID, 16 bits.
pub const VENDOR_ID: usize = 0x00;
/// Device ID, 16 bits.
pub const DEVICE_ID: usize = 0x02;
/// Command register, 16 bits: [`Command`].
pub const COMMAND: usize = 0x04;
/// Status register, 16 bits: [`Status`].
pub const STATUS: usize = 0x06;
/// Revision ID, 8 bits.
pub const REVISION_ID: usize = 0x08;
/// Class code, 24 bits: programming interface, subclass, class.
pub const CLASS_CODE: usize = 0x09;
/// Cache line size, 8 bits, writable and without effect.
pub const CACHE_LINE_SIZE: usize = 0x0c;
/// Latency timer, 8 bits.
pub const LATENCY_TIMER: usize = 0x0d;
/// Header type, 8 bits: 0 for a device; bit 7 for several functions.
pub const HEADER_TYPE: usize = 0x0e;
/// Built-in self test, 8 bits.
pub const BIST: usize = 0x0f;
/// First base address register, 32 bits; BAR n is 4 * n further.
pub const BAR0: usize = 0x10;
/// Base address registers of a device.
pub const BAR_COUNT: usize = 6;
/// Subsystem vendor ID, 16 bits.
pub const SUBSYSTEM_VENDOR_ID: usize = 0x2c;
/// Subsystem ID, 16 bits.
pub const SUBSYSTEM_ID: usize = 0x2e;
/// Expansion ROM base address, 32 bits.
pub const ROM_ADDRESS: usize = 0x30;
/// Offset of the first capability, 8 bits.
pub const CAPABILITIES_POINTER: usize = 0x34;
/// Interrupt line, 8 bits, writable and without effect on the device.
pub const INTERRUPT_LINE: usize = 0x3c;
/// Interrupt pin, 8 bits: 0 none, 1 INTA.
pub const INTERRUPT_PIN: usize = 0x3d;
/// First byte behind the header; capabilities begin here at the earliest.
pub const HEADER_END: usize = 0x40;
/// First byte of the extended capabilities of a PCI Express device.
pub const EXTENDED_CAPABILITIES: usize = 0x100;

bitflags::bitflags! {
    /// Bits of the [`COMMAND`] register.
    #[derive(Debug, Clone, Copy, PartialEq, Eq)]
    pub struct Command: u16 {
        /// I/O BARs answer.
        const IO_SPACE = 0x1;
        /// Memory BARs answer.
        const MEMORY_SPACE = 0x2;
        /// The device may do DMA and send message-signalled interrupts.
        const BUS_MASTER = 0x4;
        /// Parity errors are acted on.
        const PARITY_ERROR_RESPONSE = 0x40;
        /// System errors are reported.
        const SERR_ENABLE = 0x100;
        /// The interrupt pin stays quiet.
        const INTX_DISABLE = 0x400;
    }

    /// Bits of the [`STATUS`] register.
    #[derive(Debug, Clone, Copy, PartialEq, Eq)]
    pub struct Status: u16 {
        /// The device asks for an interrupt by pin.
        const INTERRUPT = 0x8;
        /// There are capabilities.
        const CAPABILITIES_LIST = 0x10;
        /// A parity error was seen as master; written 1 to clear, as are all bits below.
        const MASTER_DATA_PARITY_ERROR = 0x100;
        /// A transaction was ended by the device as target.
        const SIGNALED_TARGET_ABORT = 0x800;
        /// A transaction of the device was ended by the target.
        const RECEIVED_TARGET_ABORT = 0x1000;
        /// A transaction of the device found no target.
        const RECEIVED_MASTER_ABORT = 0x2000;
        /// A system error was reported.
        const SIGNALED_SYSTEM_ERROR = 0x4000;
        /// A parity error was seen.
        const DETECTED_PARITY_ERROR = 0x8000;
    }
}

/// BAR bit: I/O, not memory.
pub const BAR_IO: u32 = 0x1;
/// BAR bits 2:1 of a memory BAR below 4 GiB.
pub const BAR_MEMORY_32: u32 = 0x0;
/// BAR bits 2:1 of a memory BAR whose upper half is in the next register.
pub const BAR_MEMORY_64: u32 = 0x4;
/// BAR bit: reads have no side effect.
pub const BAR_PREFETCHABLE: u32 = 0x8;
/// [`ROM_ADDRESS`] bit: the ROM answers.
pub const ROM_ENABLE: u32 = 0x1;

/// Offset of a capability's id, 8 bits.
pub const CAPABILITY_ID: usize = 0;
/// Offset of the pointer to the next capability, 8 bits; 0 in the last.
pub const CAPABILITY_NEXT: usize = 1;

/// Capability id of power management.
pub const CAPABILITY_POWER_MANAGEMENT: u8 = 0x01;
/// Capability id of MSI.
pub const CAPABILITY_MSI: u8 = 0x05;
/// Capability id of PCI Express.
pub const CAPABILITY_EXPRESS: u8 = 0x10;
/// Capability id of MSI-X.
pub const CAPABILITY_MSIX: u8 = 0x11;

/// MSI: offset of the message control register, 16 bits: [`MsiControl`].
pub const MSI_CONTROL: usize = 2;
/// MSI: offset of the message address, 32 bits.
pub const MSI_ADDRESS: usize = 4;
/// MSI with 64-bit addresses: offset of the upper half of the message address, 32 bits.
pub const MSI_UPPER_ADDRESS: usize = 8;
/// MSI without 64-bit addresses: offset of the message data, 16 bits.
pub const MSI_DATA_32: usize = 8;
/// MSI with 64-bit addresses: offset of the message data, 16 bits.
pub const MSI_DATA_64: usize = 12;
/// Bytes of an MSI capability with 64-bit addresses and no masks.
pub const MSI_SIZE_64: usize = 14;

bitflags::bitflags! {
    /// Bits of [`MSI_CONTROL`]. Bits 3:1 are log2 of the vectors that the device can use, bits 6:4 of those that it may.
    #[derive(Debug, Clone, Copy, PartialEq, Eq)]
    pub struct MsiControl: u16 {
        /// MSI is used.
        const ENABLE = 0x1;
        /// The address has 64 bits.
        const ADDRESS_64 = 0x80;
        /// Each vector can be masked.
        const PER_VECTOR_MASKING = 0x100;
    }
}
