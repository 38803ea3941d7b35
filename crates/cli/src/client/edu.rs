//! A driver of QEMU's `edu` device, polling: no interrupts are used.
//!
//! The device copies a few thousand bytes at a time between memory and a buffer of its own. It has no register for
//! errors: after a transfer that faulted it looks as after any other, and only the bytes tell.

use std::thread;
use std::time::{Duration, Instant};

use ioasid_soft::edu::spec::{self, DmaCommand, Status};
use ioasid_uapi::vfio::PCI_BAR0_REGION_INDEX;
use rustix::io::Errno;

use super::VfioDevice;

/// QEMU's device takes a tenth of a second of the machine's time for a transfer; an emulated machine may be slow, and busy.
const DEADLINE: Duration = Duration::from_secs(20);

/// Polls without a pause for so long, which is enough for a device that takes no time.
const EAGER: Duration = Duration::from_millis(1);

/// Why the device did not do as it was told.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub(crate) enum Stuck {
    /// An access to a register failed.
    #[error("an access to register {register:#04x} failed: {errno}")]
    Access {
        /// Its offset in BAR 0.
        register: u64,
        /// Why.
        errno: Errno,
    },
    /// It was busy for too long.
    #[error("the device was still {doing} after {} s", DEADLINE.as_secs())]
    Busy {
        /// With what.
        doing: &'static str,
    },
}

/// The device behind an open, bound file.
#[derive(Debug)]
pub(crate) struct Edu {
    file: VfioDevice,
    /// Where BAR 0 begins in the file.
    bar: u64,
}

impl Edu {
    /// How many bytes a transfer moves at most. QEMU 7.2 takes a transfer that fills the buffer to the end for one that
    /// exceeds it, and stops the machine.
    pub(crate) const LARGEST_TRANSFER: usize = spec::BUFFER_SIZE - 1;

    /// Finds the device's registers.
    pub(crate) fn new(file: VfioDevice) -> Result<Self, Errno> {
        let region = file.region(PCI_BAR0_REGION_INDEX)?;
        // Register offsets are added to it below.
        if region.offset > i64::MAX as u64 - u64::from(spec::BAR_SIZE) {
            return Err(Errno::OVERFLOW);
        }
        let bar = region.offset;
        Ok(Self { file, bar })
    }

    /// The device as VFIO sees it.
    pub(crate) fn file(&self) -> &VfioDevice {
        &self.file
    }

    fn read(&self, register: u64) -> Result<u32, Stuck> {
        let mut bytes = [0; 4];
        self.file.read(self.bar + register, &mut bytes).map_err(|errno| Stuck::Access { register, errno })?;
        Ok(u32::from_le_bytes(bytes))
    }

    /// Writes 4 or, where the register allows, 8 bytes, in one access.
    fn write(&self, register: u64, bytes: &[u8]) -> Result<(), Stuck> {
        let written = self.file.write(self.bar + register, bytes);
        written.map_err(|errno| Stuck::Access { register, errno })
    }

    /// What the device says it is; see [`spec::IDENTIFICATION_VALUE`].
    pub(crate) fn identification(&self) -> Result<u32, Stuck> {
        self.read(spec::IDENTIFICATION)
    }

    /// The bitwise inverse of `value`, from the device.
    pub(crate) fn invert(&self, value: u32) -> Result<u32, Stuck> {
        self.write(spec::LIVENESS, &value.to_le_bytes())?;
        self.read(spec::LIVENESS)
    }

    /// n! modulo 2^32, from the device.
    pub(crate) fn factorial(&self, n: u32) -> Result<u32, Stuck> {
        self.write(spec::FACTORIAL, &n.to_le_bytes())?;
        self.wait(spec::STATUS, Status::COMPUTING.bits(), "computing")?;
        self.read(spec::FACTORIAL)
    }

    /// Copies from memory to the device's buffer, from its start.
    pub(crate) fn fetch(&self, iova: u64, length: usize) -> Result<(), Stuck> {
        self.transfer(iova, spec::BUFFER_ADDRESS, length, DmaCommand::RUN)
    }

    /// Copies from the start of the device's buffer to memory.
    pub(crate) fn store(&self, iova: u64, length: usize) -> Result<(), Stuck> {
        self.transfer(spec::BUFFER_ADDRESS, iova, length, DmaCommand::RUN | DmaCommand::TO_MEMORY)
    }

    /// Copies from memory to memory, by way of the buffer.
    pub(crate) fn copy(&self, from: u64, to: u64, length: usize) -> Result<(), Stuck> {
        self.fetch(from, length)?;
        self.store(to, length)
    }

    fn transfer(&self, from: u64, to: u64, length: usize, command: DmaCommand) -> Result<(), Stuck> {
        self.write(spec::DMA_SOURCE, &from.to_le_bytes())?;
        self.write(spec::DMA_DESTINATION, &to.to_le_bytes())?;
        self.write(spec::DMA_COUNT, &(length as u64).to_le_bytes())?;
        self.write(spec::DMA_COMMAND, &command.bits().to_le_bytes())?;
        self.wait(spec::DMA_COMMAND, DmaCommand::RUN.bits() as u32, "copying")
    }

    /// Waits until `busy` is clear in a register.
    fn wait(&self, register: u64, busy: u32, doing: &'static str) -> Result<(), Stuck> {
        let start = Instant::now();
        while self.read(register)? & busy != 0 {
            match start.elapsed() {
                elapsed if elapsed > DEADLINE => return Err(Stuck::Busy { doing }),
                elapsed if elapsed > EAGER => thread::sleep(Duration::from_millis(1)),
                _ => thread::yield_now(),
            }
        }
        Ok(())
    }
}
