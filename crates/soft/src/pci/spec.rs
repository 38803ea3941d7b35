//! The type 0 configuration header: offsets and bits, no behaviour.
//!
//! Section numbers are those of the PCI Local Bus Specification, revision 3.0.

use bitflags::bitflags;

/// Vendor ID in the low half, device ID in the high half (6.2.1).
pub const IDENTIFICATION: u16 = 0x00;
/// COMMAND in the low half (6.2.2), STATUS in the high half (6.2.3).
pub const COMMAND_AND_STATUS: u16 = 0x04;
/// Revision ID in the low byte, class code in the upper three (6.2.1).
pub const REVISION_AND_CLASS: u16 = 0x08;
/// The first of six base address registers (6.2.5.1).
pub const BAR_0: u16 = 0x10;
/// Subsystem vendor ID in the low half, subsystem ID in the high half (6.2.4).
pub const SUBSYSTEM: u16 = 0x2c;
/// Interrupt line in the low byte, interrupt pin in the one above (6.2.4).
pub const INTERRUPT: u16 = 0x3c;

/// How many base address registers a type 0 header has (6.2.5.1).
pub const BAR_COUNT: usize = 6;

bitflags! {
    /// The COMMAND register (6.2.2).
    #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
    pub struct Command: u16 {
        /// The device answers accesses to its I/O BARs.
        const IO_DECODE = 1 << 0;
        /// The device answers accesses to its memory BARs.
        const MEMORY_DECODE = 1 << 1;
        /// The device may start transactions: DMA and message-signalled interrupts.
        const BUS_MASTER = 1 << 2;
        /// The device reacts to parity errors.
        const PARITY_ERROR_RESPONSE = 1 << 6;
        /// The device may report system errors.
        const SYSTEM_ERROR_ENABLE = 1 << 8;
        /// The device may not assert its interrupt pin.
        const INTX_DISABLE = 1 << 10;
    }
}

/// The bits of STATUS that report errors and are cleared by writing 1 (6.2.3): master data parity error,
/// signalled target abort, received target abort, received master abort, signalled system error,
/// detected parity error.
pub const STATUS_ERRORS: u16 = 1 << 8 | 1 << 11 | 1 << 12 | 1 << 13 | 1 << 14 | 1 << 15;

/// BAR: this is an I/O BAR (6.2.5.1).
pub const BAR_IO: u32 = 1 << 0;
/// Memory BAR: it takes this and the next register, and may be anywhere in 64 bits (6.2.5.1).
pub const BAR_MEMORY_64: u32 = 1 << 2;
/// Memory BAR: reads have no side effect (6.2.5.1).
pub const BAR_PREFETCHABLE: u32 = 1 << 3;
/// Memory BAR: the bits below the address (6.2.5.1). They also bound its size from below.
pub const BAR_MEMORY_ATTRIBUTES: u32 = 0xf;
/// I/O BAR: the bits below the address (6.2.5.1). They also bound its size from below.
pub const BAR_IO_ATTRIBUTES: u32 = 0x3;
/// The most that an I/O BAR may ask for, in bytes (6.2.5.1).
pub const BAR_IO_MAXIMUM: u32 = 256;
