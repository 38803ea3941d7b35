//! The standard header of a function, as a device states it.
//!
//! A device fills in a [`Type0Header`]; from it come both the registers of its configuration space and
//! the sizes of its regions, so the two cannot disagree.

use super::config::RegisterLayout;
use super::spec::{self, BAR_COUNT, Command};

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
        let memory_minimum = u64::from(spec::BAR_MEMORY_ATTRIBUTES) + 1;
        match self {
            Self::Absent => 0..=0,
            Self::Memory32 { .. } => memory_minimum..=1 << 31,
            Self::Memory64 { .. } => memory_minimum..=1 << 63,
            Self::Io { .. } => u64::from(spec::BAR_IO_ATTRIBUTES) + 1..=spec::BAR_IO_MAXIMUM.into(),
        }
    }

    /// The register's bits below the address.
    fn attributes(self) -> u32 {
        let prefetch = |prefetchable| if prefetchable { spec::BAR_PREFETCHABLE } else { 0 };
        match self {
            Self::Absent => 0,
            Self::Memory32 { prefetchable, .. } => prefetch(prefetchable),
            Self::Memory64 { prefetchable, .. } => spec::BAR_MEMORY_64 | prefetch(prefetchable),
            Self::Io { .. } => spec::BAR_IO,
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
        offset: u16,
    },
}

impl Type0Header {
    /// The registers of the header, with their offsets.
    pub(super) fn registers(&self) -> Result<Vec<(u16, RegisterLayout)>, HeaderError> {
        if self.class_code >> 24 != 0 {
            return Err(HeaderError::ClassCode { class_code: self.class_code });
        }
        let constant = |low: u16, high: u16| RegisterLayout {
            reset: u32::from(low) | u32::from(high) << 16,
            ..RegisterLayout::default()
        };
        let mut registers = vec![
            (spec::IDENTIFICATION, constant(self.vendor_id, self.device_id)),
            (
                spec::COMMAND_AND_STATUS,
                RegisterLayout {
                    reset: 0,
                    writable: Command::all().bits().into(),
                    write_one_to_clear: u32::from(spec::STATUS_ERRORS) << 16,
                },
            ),
            (
                spec::REVISION_AND_CLASS,
                RegisterLayout {
                    reset: u32::from(self.revision) | self.class_code << 8,
                    ..RegisterLayout::default()
                },
            ),
            (spec::SUBSYSTEM, constant(self.subsystem_vendor_id, self.subsystem_id)),
            // The line is a scratch register for software; the pin above it is 0: no interrupt pin.
            (spec::INTERRUPT, RegisterLayout { writable: 0xff, ..RegisterLayout::default() }),
        ];
        let mut offset = spec::BAR_0;
        for (index, bar) in self.bars.into_iter().enumerate() {
            let size = bar.size();
            if bar != Bar::Absent && (!size.is_power_of_two() || !bar.size_limits().contains(&size)) {
                return Err(HeaderError::BarSize { bar: index, size });
            }
            let attributes = bar.attributes();
            if bar != Bar::Absent {
                // The address bits from the size upwards, in both halves.
                let address = !(size - 1);
                let layout =
                    RegisterLayout { reset: attributes, writable: address as u32, write_one_to_clear: 0 };
                registers.push((offset, layout));
                if let Bar::Memory64 { .. } = bar {
                    if self.bars.get(index + 1) != Some(&Bar::Absent) {
                        return Err(HeaderError::NoUpperHalf { bar: index });
                    }
                    let upper =
                        RegisterLayout { writable: (address >> 32) as u32, ..RegisterLayout::default() };
                    registers.push((offset + 4, upper));
                }
            }
            offset += 4;
        }
        Ok(registers)
    }
}
