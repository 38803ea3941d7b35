//! Configuration space as data.
//!
//! The space is a list of dwords, because that is what a configuration transaction carries: one dword
//! with byte enables. Each has three masks (its value after reset, which bits a write stores, which bits
//! a write of 1 clears), and these alone decide what a write does. Sizing a BAR needs no code: the address
//! bits below the size are not writable, so writing all ones and reading back gives the size.
//!
//! An access of a program may have any length and alignment. It is cut at dwords, and each part changes
//! only the bytes it covers.

use super::device::AccessError;
use super::header::{HeaderError, Type0Header};
use ioasid_uapi::pci::{self, Command};

/// The dword whose low half is COMMAND.
const COMMAND_REGISTER: usize = pci::COMMAND / 4;

/// How much configuration space a function has.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum ConfigSpaceSize {
    /// 256 bytes: conventional PCI.
    Conventional,
    /// 4096 bytes: PCI Express. The extended capability list at 0x100 is empty unless defined.
    Extended,
}

impl ConfigSpaceSize {
    /// The size in bytes.
    pub const fn bytes(self) -> usize {
        match self {
            Self::Conventional => pci::CONFIG_SPACE_SIZE,
            Self::Extended => pci::EXPRESS_CONFIG_SPACE_SIZE,
        }
    }
}

/// What one dword of configuration space does. Bits in neither mask are constant.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct RegisterLayout {
    /// The value after a reset.
    pub reset: u32,
    /// The bits that take the value written.
    pub writable: u32,
    /// The bits that are cleared by writing 1 and unchanged by writing 0. A bit that is also in
    /// `writable` behaves as one of these.
    pub write_one_to_clear: u32,
}

#[derive(Clone, Copy, Debug, Default)]
struct Register {
    value: u32,
    layout: RegisterLayout,
}

impl Register {
    /// One configuration write. `enabled` has all bits set of each byte that the access covers.
    fn write(&mut self, data: u32, enabled: u32) {
        let stored = self.layout.writable & !self.layout.write_one_to_clear & enabled;
        let cleared = self.layout.write_one_to_clear & enabled & data;
        self.value = (self.value & !stored & !cleared) | (data & stored);
    }
}

/// The configuration space of one function.
///
/// ```
/// use ioasid_soft::pci::{Bar, ConfigSpace, ConfigSpaceSize, Type0Header};
///
/// let mut header = Type0Header { vendor_id: 0x1234, device_id: 0x11e8, ..Type0Header::default() };
/// header.bars[0] = Bar::Memory32 { size: 1 << 20, prefetchable: false };
/// let mut config = ConfigSpace::new(ConfigSpaceSize::Conventional, &header)?;
///
/// let mut bar = [0; 4];
/// config.write(0x10, &[0xff; 4])?;
/// config.read(0x10, &mut bar)?;
/// assert_eq!(u32::from_le_bytes(bar), 0xfff0_0000);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Clone, Debug)]
pub struct ConfigSpace {
    registers: Vec<Register>,
}

/// The part of an access that falls into one dword.
struct Lane {
    /// Which dword.
    register: usize,
    /// Which of its bytes, and which bytes of the caller's buffer; both of the same length.
    lane: std::ops::Range<usize>,
    buffer: std::ops::Range<usize>,
}

impl ConfigSpace {
    /// A space with the header given and no capabilities. Everything else reads zero and ignores writes.
    pub fn new(size: ConfigSpaceSize, header: &Type0Header) -> Result<Self, HeaderError> {
        let mut space = Self { registers: vec![Register::default(); size.bytes() / 4] };
        for (index, layout) in header.registers()?.into_iter().enumerate() {
            space.define(index * 4, layout)?;
        }
        Ok(space)
    }

    /// Gives the dword at `offset` (bytes, a multiple of 4) a layout, and its reset value.
    pub fn define(&mut self, offset: usize, layout: RegisterLayout) -> Result<(), HeaderError> {
        let register = if offset % 4 == 0 { self.registers.get_mut(offset / 4) } else { None };
        *register.ok_or(HeaderError::NoSuchRegister { offset })? = Register { value: layout.reset, layout };
        Ok(())
    }

    /// Reads bytes at any offset and of any length. Nothing is read if the end is outside of the space.
    pub fn read(&self, offset: u64, buffer: &mut [u8]) -> Result<(), AccessError> {
        for part in self.lanes(offset, buffer.len())? {
            let value = self.registers[part.register].value.to_le_bytes();
            buffer[part.buffer].copy_from_slice(&value[part.lane]);
        }
        Ok(())
    }

    /// Writes bytes at any offset and of any length; the masks decide what changes. Nothing is written if
    /// the end is outside of the space.
    pub fn write(&mut self, offset: u64, bytes: &[u8]) -> Result<(), AccessError> {
        for part in self.lanes(offset, bytes.len())? {
            let (mut data, mut enabled) = ([0; 4], [0; 4]);
            data[part.lane.clone()].copy_from_slice(&bytes[part.buffer]);
            enabled[part.lane].fill(0xff);
            self.registers[part.register].write(u32::from_le_bytes(data), u32::from_le_bytes(enabled));
        }
        Ok(())
    }

    /// Every register takes its reset value.
    pub fn reset(&mut self) {
        for register in &mut self.registers {
            register.value = register.layout.reset;
        }
    }

    /// The COMMAND register.
    pub fn command(&self) -> Command {
        let value = self.registers[COMMAND_REGISTER].value;
        Command::from_bits_truncate(value as u16)
    }

    /// Sets the COMMAND register as the function's owner would.
    pub fn set_command(&mut self, command: Command) {
        self.registers[COMMAND_REGISTER].write(command.bits().into(), 0xffff);
    }

    /// Cuts an access at dwords, after checking that all of it is inside the space.
    fn lanes(&self, offset: u64, length: usize) -> Result<impl Iterator<Item = Lane> + use<>, AccessError> {
        let size = self.registers.len() * 4;
        let beyond = AccessError::BeyondConfigSpace { offset, length, size };
        let first = usize::try_from(offset).map_err(|_| beyond)?;
        let end = first.checked_add(length).filter(|end| *end <= size).ok_or(beyond)?;
        Ok((first / 4..end.div_ceil(4)).map(move |register| {
            let (from, to) = (first.max(register * 4), end.min(register * 4 + 4));
            Lane { register, lane: from - register * 4..to - register * 4, buffer: from - first..to - first }
        }))
    }
}
