//! The standard header of a function, as a device states it.
//!
//! A device fills in a [`Type0Header`]; from it come both the registers of its configuration space and
//! the sizes of its regions, so the two cannot disagree.

use super::config::RegisterLayout;
use ioasid_uapi::pci::{self, BAR_COUNT, Command, Status};

/// The bits of a memory BAR below the address; an address bit more is its smallest size.
const MEMORY_ATTRIBUTES: u64 = 0xf;
/// The same for an I/O BAR.
const IO_ATTRIBUTES: u64 = 0x3;
/// The most that an I/O BAR may ask for, in bytes (PCI Local Bus Specification 3.0, section 6.2.5.1).
const IO_MAXIMUM: u64 = 256;

/// How many dwords the header has.
const HEADER_REGISTERS: usize = pci::HEADER_END / 4;

/// The bits of STATUS that are cleared by writing 1: those that report errors.
const STATUS_ERRORS: Status = Status::MASTER_DATA_PARITY_ERROR
    .union(Status::SIGNALED_TARGET_ABORT)
    .union(Status::RECEIVED_TARGET_ABORT)
    .union(Status::RECEIVED_MASTER_ABORT)
    .union(Status::SIGNALED_SYSTEM_ERROR)
    .union(Status::DETECTED_PARITY_ERROR);

/// The constant part of a type 0 header (an endpoint).
///
/// There is no interrupt pin and no expansion ROM: no device here has one. Both read zero, which means
/// just that.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Type0Header {
    /// Vendor ID.
    pub vendor_id: u16,
    /// Device ID.
    pub device_id: u16,
    /// Revision ID.
    pub revision: u8,
    /// Class code, 24 bits: base class in the upper byte, then subclass, then programming interface.
    pub class_code: u32,
    /// Subsystem vendor ID; 0 if there is none.
    pub subsystem_vendor_id: u16,
    /// Subsystem ID; 0 if there is none.
    pub subsystem_id: u16,
    /// Base address registers. The one above a [`Bar::Memory64`] holds its upper half and stays absent.
    pub bars: [Bar; BAR_COUNT],
}

/// One base address register. Sizes are in bytes and powers of two.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Bar {
    /// Reads zero and ignores writes.
    #[default]
    Absent,
    /// Memory below 4 GiB: 16 bytes to 2 GiB.
    Memory32 {
        /// Size in bytes.
        size: u32,
        /// Whether reads have no side effects.
        prefetchable: bool,
    },
    /// Memory anywhere: 16 bytes to 2^63.
    Memory64 {
        /// Size in bytes.
        size: u64,
        /// Whether reads have no side effects.
        prefetchable: bool,
    },
    /// I/O ports: 4 to 256 bytes.
    Io {
        /// Size in bytes.
        size: u32,
    },
}

impl Bar {
    /// The size of the BAR in bytes; 0 if it is absent.
    pub fn size(self) -> u64 {
        match self {
            Self::Absent => 0,
            Self::Memory32 { size, .. } | Self::Io { size } => size.into(),
            Self::Memory64 { size, .. } => size,
        }
    }

    /// The range of sizes that the specification allows for this kind of BAR.
    fn size_limits(self) -> std::ops::RangeInclusive<u64> {
        match self {
            Self::Absent => 0..=0,
            Self::Memory32 { .. } => MEMORY_ATTRIBUTES + 1..=1 << 31,
            Self::Memory64 { .. } => MEMORY_ATTRIBUTES + 1..=1 << 63,
            Self::Io { .. } => IO_ATTRIBUTES + 1..=IO_MAXIMUM,
        }
    }

    /// The register's bits below the address.
    fn attributes(self) -> u32 {
        let prefetch = |prefetchable| if prefetchable { pci::BAR_PREFETCHABLE } else { 0 };
        match self {
            Self::Absent => 0,
            Self::Memory32 { prefetchable, .. } => pci::BAR_MEMORY_32 | prefetch(prefetchable),
            Self::Memory64 { prefetchable, .. } => pci::BAR_MEMORY_64 | prefetch(prefetchable),
            Self::Io { .. } => pci::BAR_IO,
        }
    }
}

/// A header, or a register, that no function can have.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum HeaderError {
    /// A BAR's size is not a power of two or not allowed for its kind.
    #[error("BAR {bar} cannot be {size:#x} bytes large: use a power of two that its kind allows")]
    BarSize {
        /// Which BAR.
        bar: usize,
        /// The size asked for, in bytes.
        size: u64,
    },
    /// A 64-bit BAR has no free register above it.
    #[error("BAR {bar} is 64 bits wide and needs the register above it, which is taken or does not exist")]
    NoUpperHalf {
        /// Which BAR.
        bar: usize,
    },
    /// The class code has more than 24 bits.
    #[error("class code {class_code:#x} has more than 24 bits")]
    ClassCode {
        /// The class code asked for.
        class_code: u32,
    },
    /// An offset names no dword of the space.
    #[error("configuration space has no dword at offset {offset:#x}")]
    NoSuchRegister {
        /// The offset in bytes.
        offset: usize,
    },
}

impl Type0Header {
    /// The dwords of the header, in order.
    pub(super) fn registers(&self) -> Result<[RegisterLayout; HEADER_REGISTERS], HeaderError> {
        if self.class_code >> 24 != 0 {
            return Err(HeaderError::ClassCode { class_code: self.class_code });
        }
        let mut registers = [RegisterLayout::default(); HEADER_REGISTERS];
        let mut constant =
            |offset: usize, value: u32| registers[offset / 4].reset |= value << (offset % 4 * 8);
        constant(pci::VENDOR_ID, self.vendor_id.into());
        constant(pci::DEVICE_ID, self.device_id.into());
        constant(pci::REVISION_ID, self.revision.into());
        constant(pci::CLASS_CODE, self.class_code);
        constant(pci::SUBSYSTEM_VENDOR_ID, self.subsystem_vendor_id.into());
        constant(pci::SUBSYSTEM_ID, self.subsystem_id.into());

        registers[pci::COMMAND / 4].writable = Command::all().bits().into();
        registers[pci::STATUS / 4].write_one_to_clear =
            u32::from(STATUS_ERRORS.bits()) << (pci::STATUS % 4 * 8);
        // A scratch register for software.
        registers[pci::INTERRUPT_LINE / 4].writable = 0xff;

        for (index, bar) in self.bars.into_iter().enumerate() {
            if bar == Bar::Absent {
                continue;
            }
            let size = bar.size();
            if !size.is_power_of_two() || !bar.size_limits().contains(&size) {
                return Err(HeaderError::BarSize { bar: index, size });
            }
            // The address bits from the size upwards can be set, in both halves.
            let address = !(size - 1);
            let lower = &mut registers[pci::BAR0 / 4 + index];
            lower.reset = bar.attributes();
            lower.writable = address as u32;
            if let Bar::Memory64 { .. } = bar {
                if self.bars.get(index + 1) != Some(&Bar::Absent) {
                    return Err(HeaderError::NoUpperHalf { bar: index });
                }
                registers[pci::BAR0 / 4 + index + 1].writable = (address >> 32) as u32;
            }
        }
        Ok(registers)
    }
}
