//! What BAR 0 of the edu device answers, as a state machine without time or threads.
//!
//! A write may leave work to do: it sets [`Status::COMPUTING`] or [`DmaCommand::RUN`]. Whoever does the
//! work reports it back with [`complete_factorial`](Registers::complete_factorial) and
//! [`complete_transfer`](Registers::complete_transfer). The busy bits are therefore the only record that
//! work is due, and a reset, which clears them, takes it back.

use super::spec::{self, DmaCommand, DmaPasid, InterruptCauses, Status};
use crate::pci::access::AccessWidth;
use ioasid::pasid::Pasid;

/// What a read yields where there is nothing to read.
const ALL_ONES: u64 = u64::MAX;

/// The register file.
#[derive(Debug, Default)]
pub(super) struct Registers {
    /// What [`spec::LIVENESS`] reads, already inverted.
    liveness: u32,
    factorial: u32,
    status: Status,
    interrupt_status: InterruptCauses,
    dma_source: u64,
    dma_destination: u64,
    dma_count: u64,
    dma_command: DmaCommand,
    dma_pasid: DmaPasid,
}

/// What a write has left to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Effect {
    /// Nothing.
    None,
    /// A factorial is to be computed.
    Factorial,
    /// A transfer is to be done.
    Transfer,
    /// Nothing, because what the register belongs to is busy and the write was dropped.
    DroppedBusy,
}

/// A transfer as the registers describe it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Transfer {
    /// From the buffer to memory.
    pub(super) to_memory: bool,
    /// The address in memory, before the DMA mask.
    pub(super) memory: u64,
    /// The first byte in the buffer. `buffer + length` is at most [`spec::BUFFER_SIZE`].
    pub(super) buffer: usize,
    /// How many bytes.
    pub(super) length: usize,
}

impl Registers {
    /// One bus read. Accesses that no register allows yield all ones.
    pub(super) fn read(&self, offset: u64, width: AccessWidth) -> u64 {
        if !width_is_allowed(offset, width) {
            return ALL_ONES;
        }
        match offset {
            spec::IDENTIFICATION => spec::IDENTIFICATION_VALUE.into(),
            spec::LIVENESS => self.liveness.into(),
            spec::FACTORIAL => self.factorial.into(),
            spec::STATUS => self.status.bits().into(),
            spec::INTERRUPT_STATUS => self.interrupt_status.bits().into(),
            spec::DMA_SOURCE => self.dma_source,
            spec::DMA_DESTINATION => self.dma_destination,
            spec::DMA_COUNT => self.dma_count,
            spec::DMA_COMMAND => self.dma_command.bits(),
            spec::DMA_PASID => self.dma_pasid.bits(),
            _ => ALL_ONES,
        }
    }

    /// One bus write. Accesses that no register allows are dropped. `value` has no bits above the width.
    pub(super) fn write(&mut self, offset: u64, width: AccessWidth, value: u64) -> Effect {
        if !width_is_allowed(offset, width) {
            return Effect::None;
        }
        // For the registers of 4 bytes, which the width check has left with no upper half.
        let narrow = value as u32;
        match offset {
            spec::LIVENESS => self.liveness = !narrow,
            spec::FACTORIAL if self.is_computing() => return Effect::DroppedBusy,
            spec::FACTORIAL => {
                self.factorial = narrow;
                self.status.insert(Status::COMPUTING);
                return Effect::Factorial;
            }
            spec::STATUS => {
                let asked = Status::from_bits_truncate(narrow).contains(Status::INTERRUPT_AFTER_FACTORIAL);
                self.status.set(Status::INTERRUPT_AFTER_FACTORIAL, asked);
            }
            spec::INTERRUPT_RAISE => self.raise(InterruptCauses::from_bits_retain(narrow)),
            spec::INTERRUPT_ACKNOWLEDGE => {
                self.interrupt_status.remove(InterruptCauses::from_bits_retain(narrow));
            }
            spec::DMA_SOURCE
            | spec::DMA_DESTINATION
            | spec::DMA_COUNT
            | spec::DMA_COMMAND
            | spec::DMA_PASID
                if self.is_transferring() =>
            {
                return Effect::DroppedBusy;
            }
            spec::DMA_SOURCE => self.dma_source = value,
            spec::DMA_DESTINATION => self.dma_destination = value,
            spec::DMA_COUNT => self.dma_count = value,
            spec::DMA_PASID => self.dma_pasid = DmaPasid::from_bits_truncate(value),
            spec::DMA_COMMAND => {
                let command = DmaCommand::from_bits_retain(value);
                if command.contains(DmaCommand::RUN) {
                    self.dma_command = command;
                    return Effect::Transfer;
                }
            }
            _ => {}
        }
        Effect::None
    }

    /// Whether a factorial is to be computed.
    pub(super) fn is_computing(&self) -> bool {
        self.status.contains(Status::COMPUTING)
    }

    /// Computes the factorial asked for. The result is stored before the busy bit falls, and the
    /// interrupt is asked for last, so that it may be requested while the computation runs.
    pub(super) fn complete_factorial(&mut self) {
        self.factorial = factorial(self.factorial);
        self.status.remove(Status::COMPUTING);
        if self.status.contains(Status::INTERRUPT_AFTER_FACTORIAL) {
            self.raise(InterruptCauses::FACTORIAL);
        }
    }

    /// Whether a transfer is to be done or being done.
    pub(super) fn is_transferring(&self) -> bool {
        self.dma_command.contains(DmaCommand::RUN)
    }

    /// The transfer that the registers describe; none if it does not stay within the buffer.
    pub(super) fn transfer(&self) -> Option<Transfer> {
        let to_memory = self.dma_command.contains(DmaCommand::TO_MEMORY);
        let (in_buffer, memory) = match to_memory {
            true => (self.dma_source, self.dma_destination),
            false => (self.dma_destination, self.dma_source),
        };
        let buffer = usize::try_from(in_buffer.checked_sub(spec::BUFFER_ADDRESS)?).ok()?;
        let length = usize::try_from(self.dma_count).ok()?;
        let fits = buffer < spec::BUFFER_SIZE && length <= spec::BUFFER_SIZE - buffer;
        fits.then_some(Transfer { to_memory, memory, buffer, length })
    }

    /// The PASID that requests have, if they have one.
    pub(super) fn pasid(&self) -> Option<Pasid> {
        let number = (self.dma_pasid.bits() & spec::DMA_PASID_NUMBER) as u32;
        Pasid::new(number).filter(|_| self.dma_pasid.contains(DmaPasid::ENABLE))
    }

    /// Ends the transfer, whatever became of it: the device has no way to report an error.
    pub(super) fn complete_transfer(&mut self) {
        self.dma_command.remove(DmaCommand::RUN);
        if self.dma_command.contains(DmaCommand::INTERRUPT_WHEN_DONE) {
            self.raise(InterruptCauses::DMA);
        }
    }

    /// Records causes of an interrupt. All of them pass here; a device with an interrupt would signal it
    /// now if any cause is recorded.
    fn raise(&mut self, causes: InterruptCauses) {
        self.interrupt_status.insert(causes);
    }
}

/// Whether registers at an offset answer accesses of this width.
fn width_is_allowed(offset: u64, width: AccessWidth) -> bool {
    width == AccessWidth::Dword || (width == AccessWidth::Qword && offset >= spec::WIDE_REGISTERS)
}

/// n! modulo 2^32, in a bounded number of steps.
fn factorial(n: u32) -> u32 {
    if n >= spec::FIRST_ZERO_FACTORIAL {
        return 0;
    }
    (1..=n).fold(1, u32::wrapping_mul)
}

#[cfg(test)]
mod tests {
    use super::AccessWidth::{Byte, Dword, Qword, Word};
    use super::*;

    const DMA_REGISTERS: [u64; 5] =
        [spec::DMA_SOURCE, spec::DMA_DESTINATION, spec::DMA_COUNT, spec::DMA_COMMAND, spec::DMA_PASID];

    #[test]
    fn identification_is_constant() {
        let mut registers = Registers::default();
        registers.write(spec::IDENTIFICATION, Dword, 0);
        assert_eq!(registers.read(spec::IDENTIFICATION, Dword), 0x0100_00ed);
    }

    #[test]
    fn liveness_inverts_and_starts_at_zero() {
        let mut registers = Registers::default();
        assert_eq!(registers.read(spec::LIVENESS, Dword), 0);
        registers.write(spec::LIVENESS, Dword, 0x1234_5678);
        assert_eq!(registers.read(spec::LIVENESS, Dword), 0xedcb_a987);
    }

    #[test]
    fn factorials_are_right_modulo_2_to_the_32() {
        let mut wide = 1_u64;
        for n in 0..40_u32 {
            wide = wide.wrapping_mul(n.max(1).into());
            assert_eq!(factorial(n), wide as u32, "{n}!");
        }
        assert_ne!(factorial(33), 0);
        assert_eq!(factorial(u32::MAX), 0);
    }

    #[test]
    fn a_factorial_is_busy_until_completed_and_drops_writes_meanwhile() {
        let mut registers = Registers::default();
        assert_eq!(registers.write(spec::FACTORIAL, Dword, 5), Effect::Factorial);
        assert_eq!(registers.read(spec::STATUS, Dword), 0x01);
        assert_eq!(registers.write(spec::FACTORIAL, Dword, 3), Effect::DroppedBusy);
        registers.complete_factorial();
        assert_eq!(registers.read(spec::FACTORIAL, Dword), 120);
        assert_eq!(registers.read(spec::STATUS, Dword), 0);
        assert_eq!(registers.read(spec::INTERRUPT_STATUS, Dword), 0);
    }

    #[test]
    fn only_the_interrupt_bit_of_status_is_writable_and_works_while_computing() {
        let mut registers = Registers::default();
        registers.write(spec::STATUS, Dword, 0xffff_ffff);
        assert_eq!(registers.read(spec::STATUS, Dword), 0x80);
        registers.write(spec::STATUS, Dword, 0);
        registers.write(spec::FACTORIAL, Dword, 4);
        registers.write(spec::STATUS, Dword, 0x80);
        assert_eq!(registers.read(spec::STATUS, Dword), 0x81);
        registers.complete_factorial();
        assert_eq!(registers.read(spec::STATUS, Dword), 0x80);
        assert_eq!(registers.read(spec::INTERRUPT_STATUS, Dword), 0x001);
    }

    #[test]
    fn interrupt_causes_add_up_and_are_acknowledged_one_by_one() {
        let mut registers = Registers::default();
        registers.write(spec::INTERRUPT_RAISE, Dword, 0x8000_0001);
        registers.write(spec::INTERRUPT_RAISE, Dword, 0x100);
        registers.write(spec::INTERRUPT_STATUS, Dword, 0);
        assert_eq!(registers.read(spec::INTERRUPT_STATUS, Dword), 0x8000_0101);
        registers.write(spec::INTERRUPT_ACKNOWLEDGE, Dword, 0x101);
        assert_eq!(registers.read(spec::INTERRUPT_STATUS, Dword), 0x8000_0000);
        for write_only in [spec::INTERRUPT_RAISE, spec::INTERRUPT_ACKNOWLEDGE] {
            assert_eq!(registers.read(write_only, Dword) as u32, u32::MAX);
        }
    }

    #[test]
    fn every_offset_and_width_is_as_described() {
        let readable = [0x00, 0x04, 0x08, 0x20, 0x24];
        let mut registers = Registers::default();
        // Values that are not all ones, so that all ones means "no register".
        for register in DMA_REGISTERS {
            registers.write(register, Qword, 0x1_0000_0010);
        }
        for offset in 0..0x200 {
            for width in [Byte, Word, Dword, Qword] {
                let answers = match width {
                    Dword => readable.contains(&offset) || DMA_REGISTERS.contains(&offset),
                    Qword => DMA_REGISTERS.contains(&offset),
                    Byte | Word => false,
                };
                assert_eq!(registers.read(offset, width) != ALL_ONES, answers, "{offset:#x} {width:?}");
            }
        }
        assert_eq!(registers.read(spec::BUFFER_ADDRESS, Dword), ALL_ONES);
    }

    #[test]
    fn wrong_widths_change_nothing() {
        let mut registers = Registers::default();
        for offset in 0..0x200 {
            for width in [Byte, Word, Qword] {
                if width == Qword && DMA_REGISTERS.contains(&offset) {
                    continue;
                }
                assert_eq!(registers.write(offset, width, 0x81), Effect::None);
            }
        }
        let untouched = Registers::default();
        for offset in (0..0x200).step_by(4) {
            assert_eq!(registers.read(offset, Dword), untouched.read(offset, Dword), "{offset:#x}");
        }
    }

    #[test]
    fn narrow_writes_of_dma_registers_clear_the_upper_half() {
        for register in [spec::DMA_SOURCE, spec::DMA_DESTINATION, spec::DMA_COUNT] {
            let mut registers = Registers::default();
            registers.write(register, Qword, 0x1122_3344_5566_7788);
            assert_eq!(registers.read(register, Qword), 0x1122_3344_5566_7788);
            registers.write(register + 4, Dword, 0x99);
            assert_eq!(registers.read(register, Qword), 0x1122_3344_5566_7788);
            registers.write(register, Dword, 0xaabb_ccdd);
            assert_eq!(registers.read(register, Qword), 0xaabb_ccdd);
        }
    }

    #[test]
    fn a_command_needs_the_run_bit() {
        let mut registers = Registers::default();
        assert_eq!(registers.write(spec::DMA_COMMAND, Dword, 0x6), Effect::None);
        assert_eq!(registers.read(spec::DMA_COMMAND, Dword), 0);
        assert_eq!(registers.write(spec::DMA_COMMAND, Qword, 0x1_0000_0007), Effect::Transfer);
        registers.complete_transfer();
        assert_eq!(registers.read(spec::DMA_COMMAND, Qword), 0x1_0000_0006);
        assert_eq!(registers.read(spec::INTERRUPT_STATUS, Dword), 0x100);
    }

    #[test]
    fn a_pasid_has_twenty_bits_and_has_to_be_enabled() {
        let mut registers = Registers::default();
        assert_eq!((registers.read(spec::DMA_PASID, Qword), registers.pasid()), (0, None));
        registers.write(spec::DMA_PASID, Dword, 5);
        assert_eq!((registers.read(spec::DMA_PASID, Dword), registers.pasid()), (5, None));
        registers.write(spec::DMA_PASID, Dword, 0x8000_0005);
        assert_eq!((registers.read(spec::DMA_PASID, Dword), registers.pasid()), (0x8000_0005, Pasid::new(5)));
        registers.write(spec::DMA_PASID, Qword, u64::MAX);
        assert_eq!(registers.read(spec::DMA_PASID, Qword), 0x800f_ffff, "other bits do not exist");
        assert_eq!(registers.pasid(), Pasid::new(0xf_ffff));
    }

    #[test]
    fn a_running_transfer_drops_writes_of_all_dma_registers() {
        let mut registers = Registers::default();
        registers.write(spec::DMA_COMMAND, Dword, 0x1);
        for register in DMA_REGISTERS {
            let before = registers.read(register, Qword);
            assert_eq!(registers.write(register, Dword, 0x7), Effect::DroppedBusy);
            assert_eq!(registers.read(register, Qword), before);
        }
        registers.write(spec::LIVENESS, Dword, 0);
        assert_eq!(registers.read(spec::LIVENESS, Dword), 0xffff_ffff);
    }

    #[test]
    fn a_transfer_must_stay_within_the_buffer() {
        let plan = |command, source, destination, count| {
            let mut registers = Registers::default();
            registers.write(spec::DMA_SOURCE, Qword, source);
            registers.write(spec::DMA_DESTINATION, Qword, destination);
            registers.write(spec::DMA_COUNT, Qword, count);
            registers.write(spec::DMA_COMMAND, Qword, command);
            registers.transfer()
        };
        let whole = Transfer { to_memory: true, memory: 0x9000, buffer: 0, length: 4096 };
        assert_eq!(plan(3, 0x4_0000, 0x9000, 4096), Some(whole));
        let last = Transfer { to_memory: false, memory: u64::MAX, buffer: 4095, length: 1 };
        assert_eq!(plan(1, u64::MAX, 0x4_0fff, 1), Some(last));
        for (source, count) in [
            (0x4_0000, 4097),
            (0x4_0001, 4096),
            (0x4_1000, 0),
            (0x3_ffff, 1),
            (0x4_0000, u64::MAX),
            (u64::MAX, 2),
        ] {
            assert_eq!(plan(3, source, 0x9000, count), None, "{source:#x} {count:#x}");
        }
        // The direction says which of the two addresses has to name the buffer.
        assert_eq!(plan(1, 0x4_0000, 0x9000, 16), None);
    }
}
