//! The edu device: a small PCI device made for learning and for testing drivers.
//!
//! It follows the public description of QEMU's device of that name, so a driver written for one runs on
//! the other. A program sees BAR 0 with registers ([`spec`]): it can ask for a factorial, raise and
//! acknowledge interrupt causes, and have up to 4096 bytes copied between memory and a buffer in the
//! device, one direction at a time, through the [`DmaPort`] that the device was given.
//!
//! # PASIDs
//!
//! This device has one register more, [`spec::DMA_PASID`], which chooses the PASID of its requests. Bit 31 says that they have
//! one, the lowest 20 bits which; like the other registers of a transfer it is not written while one is under way. It reads 0
//! after a reset, and a driver that never touches it has the well-known device. [`Edu::with_pasids`] says what ways there are for requests
//! with PASIDs. A transfer with a PASID that the device does not have moves nothing, as one that is out of range.
//!
//! The PASID capability is not in configuration space, which stays that of a conventional device: Linux's VFIO does not show it
//! to programs either, they are told by `IOMMU_GET_HW_INFO`.
//!
//! # How an access flows
//!
//! [`Edu`] checks it against the regions and memory decode, and cuts it into bus accesses; `registers`
//! answers those and knows no time. What takes time is found there by its busy bit and done by the
//! device's worker thread in `engine`, which starts with the first work and ends with the device.
//!
//! # What differs from QEMU's
//!
//! - There are no interrupts yet. Configuration space says so: interrupt pin 0, no MSI capability.
//!   Causes are recorded and acknowledged all the same, so a driver can poll for them.
//! - A transfer starts at once unless [`EduOptions::dma_latency`] says otherwise.
//! - A transfer that is out of range or that faults moves nothing. It ends like any other (the run bit
//!   falls, the interrupt cause is recorded if asked for), as the device has no register for errors, and
//!   is counted in [`EduDiagnostics`].
//!
//! # Example
//!
//! ```
//! use ioasid_soft::dma::{DmaPort, FlatMemory};
//! use ioasid_soft::edu::{Edu, EduOptions, spec};
//! use ioasid_soft::pci::PciDevice;
//! use std::sync::Arc;
//!
//! let memory = Arc::new(FlatMemory::new(0, 0x2000));
//! memory.write(0x1000, b"some data")?;
//! let edu = Edu::new(Arc::clone(&memory) as Arc<dyn DmaPort>, EduOptions::default())?;
//! edu.open();
//! edu.write_config(0x04, &[0x06, 0])?; // memory decode and bus mastering
//!
//! let write = |offset, value: u64| edu.write_bar(0, offset, &value.to_le_bytes());
//! write(spec::DMA_SOURCE, 0x1000)?;
//! write(spec::DMA_DESTINATION, spec::BUFFER_ADDRESS)?;
//! write(spec::DMA_COUNT, 9)?;
//! write(spec::DMA_COMMAND, 0x1)?;
//! let mut command = [1; 8];
//! while command[0] & 0x1 != 0 {
//!     edu.read_bar(0, spec::DMA_COMMAND, &mut command)?;
//! }
//! assert_eq!(edu.diagnostics().bytes_from_memory, 9);
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```

mod engine;
mod registers;
pub mod spec;

use crate::dma::{DmaFault, DmaPort, PasidPorts};
use crate::pci::access::read_split;
use crate::pci::{
    AccessError, Bar, Command, ConfigSpace, ConfigSpaceSize, HeaderError, PciDevice, RegionTable, Type0Header,
};
use engine::Engine;
use ioasid::pasid::Pasid;
use std::fmt;
use std::sync::Arc;
use std::time::Duration;

/// The address bits that a device drives.
///
/// Only the first address of a transfer is masked, as the description has it: a transfer that begins just
/// below the end of the mask runs past it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DmaMask(u64);

impl DmaMask {
    /// A mask of the lowest `bits` bits, 1 to 64.
    pub fn from_bits(bits: u32) -> Option<Self> {
        u64::MAX.checked_shr(64_u32.checked_sub(bits)?).map(Self)
    }

    /// The mask itself.
    pub fn get(self) -> u64 {
        self.0
    }
}

/// How to make an [`Edu`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct EduOptions {
    /// How many address bits the device drives, 1 to 64; the others are dropped. 28 by default, as in
    /// QEMU.
    pub dma_mask_bits: u32,
    /// How long a transfer waits between its command and its start. None by default; QEMU's device waits
    /// 100 ms of the machine's time.
    pub dma_latency: Duration,
}

impl Default for EduOptions {
    fn default() -> Self {
        Self { dma_mask_bits: spec::DMA_MASK_BITS, dma_latency: Duration::ZERO }
    }
}

/// Why an [`Edu`] cannot be made.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum EduError {
    /// The DMA mask has no bits, or more than an address.
    #[error("a DMA mask of {bits} bits is impossible: use 1 to 64")]
    DmaMask {
        /// How many bits were asked for.
        bits: u32,
    },
    /// The device's header is not one that a PCI function can have.
    #[error("the device's PCI header is invalid")]
    Header(#[from] HeaderError),
}

/// What happened inside the device that its registers do not tell. Counts start when the device is made
/// and survive a reset.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct EduDiagnostics {
    /// Transfers that moved all their bytes.
    pub transfers_completed: u64,
    /// Bytes that completed transfers read from memory.
    pub bytes_from_memory: u64,
    /// Bytes that completed transfers wrote to memory.
    pub bytes_to_memory: u64,
    /// Transfers that moved nothing because bus mastering was off.
    pub refused_bus_master_off: u64,
    /// Transfers that moved nothing because they did not stay within the device's buffer.
    pub refused_out_of_range: u64,
    /// Transfers that moved nothing because the device does not have their PASID.
    pub refused_no_such_pasid: u64,
    /// Transfers that the port refused.
    pub faults: u64,
    /// What the port said last.
    pub last_fault: Option<DmaFault>,
    /// The PASID of that transfer, if it had one.
    pub last_fault_pasid: Option<Pasid>,
    /// Transfers that a reset, a close or the device's end cancelled.
    pub transfers_cancelled: u64,
    /// Transfers whose address lost bits to the DMA mask.
    pub masked_addresses: u64,
    /// Register writes that were dropped because a factorial or a transfer was under way.
    pub dropped_writes: u64,
}

/// An edu device; see the [module](self) for what it does.
///
/// Dropping it cancels what it does and ends its thread, after waiting at most a second for a transfer
/// that the port does not return from.
pub struct Edu {
    regions: RegionTable,
    engine: Arc<Engine>,
}

impl Edu {
    /// A closed device with its registers reset, which reaches memory through `port`, and has no PASIDs.
    ///
    /// # Errors
    /// The options are impossible.
    pub fn new(port: Arc<dyn DmaPort>, options: EduOptions) -> Result<Self, EduError> {
        Self::made(port, None, options)
    }

    /// A device that can use PASIDs, and reaches memory through the ports of `pasids` then.
    ///
    /// # Errors
    /// As of [`new`](Self::new).
    pub fn with_pasids(
        port: Arc<dyn DmaPort>,
        pasids: Arc<dyn PasidPorts>,
        options: EduOptions,
    ) -> Result<Self, EduError> {
        Self::made(port, Some(pasids), options)
    }

    fn made(
        port: Arc<dyn DmaPort>,
        pasids: Option<Arc<dyn PasidPorts>>,
        options: EduOptions,
    ) -> Result<Self, EduError> {
        let bits = options.dma_mask_bits;
        let dma_mask = DmaMask::from_bits(bits).ok_or(EduError::DmaMask { bits })?;
        let mut header = Type0Header {
            vendor_id: spec::VENDOR_ID,
            device_id: spec::DEVICE_ID,
            revision: spec::REVISION,
            class_code: spec::CLASS_CODE,
            ..Type0Header::default()
        };
        header.bars[0] = Bar::Memory32 { size: spec::BAR_SIZE, prefetchable: false };
        let config = ConfigSpace::new(ConfigSpaceSize::Conventional, &header)?;
        Ok(Self {
            regions: RegionTable::new(ConfigSpaceSize::Conventional, &header),
            engine: Arc::new(Engine::new(port, pasids, config, dma_mask, options.dma_latency)),
        })
    }

    /// What happened so far.
    pub fn diagnostics(&self) -> EduDiagnostics {
        self.engine.lock().diagnostics
    }

    /// Resets configuration space and everything else, and leaves `command` in the COMMAND register.
    fn restart(&self, command: Command) {
        let mut state = self.engine.lock();
        state.config.reset();
        state.config.set_command(command);
        self.engine.reset(state);
    }
}

impl fmt::Debug for Edu {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.debug_struct("Edu").field("diagnostics", &self.diagnostics()).finish_non_exhaustive()
    }
}

impl Drop for Edu {
    fn drop(&mut self) {
        self.engine.stop();
    }
}

impl PciDevice for Edu {
    fn regions(&self) -> &RegionTable {
        &self.regions
    }

    fn read_config(&self, offset: u64, buffer: &mut [u8]) -> Result<(), AccessError> {
        self.engine.lock().config.read(offset, buffer)
    }

    fn write_config(&self, offset: u64, bytes: &[u8]) -> Result<(), AccessError> {
        self.engine.write_config(offset, bytes)
    }

    fn read_bar(&self, bar: u32, offset: u64, buffer: &mut [u8]) -> Result<usize, AccessError> {
        let length = self.regions.cut_bar_access(bar, offset, buffer.len())?;
        let state = self.engine.lock();
        if !state.config.command().contains(Command::MEMORY_SPACE) {
            return Err(AccessError::MemoryDecodeOff);
        }
        // Only BAR 0 has a size, so whatever passed the cut is there.
        read_split(offset, &mut buffer[..length], |offset, width| state.registers.read(offset, width));
        Ok(length)
    }

    fn write_bar(&self, bar: u32, offset: u64, bytes: &[u8]) -> Result<usize, AccessError> {
        let length = self.regions.cut_bar_access(bar, offset, bytes.len())?;
        self.engine.write_bar(offset, &bytes[..length])?;
        Ok(length)
    }

    fn open(&self) {
        self.restart(Command::MEMORY_SPACE);
    }

    fn close(&self) {
        self.restart(Command::empty());
    }

    fn reset(&self) {
        self.engine.reset(self.engine.lock());
    }
}
