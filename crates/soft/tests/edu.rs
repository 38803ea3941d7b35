//! The edu device as a driver uses it: through its regions, with memory behind a port.

use ioasid::pasid::Pasid;
use ioasid_soft::dma::{DmaFault, DmaFaultReason, DmaPort, FlatMemory, PasidPorts};
use ioasid_soft::edu::{Edu, EduDiagnostics, EduError, EduOptions, spec};
use ioasid_soft::pci::{AccessError, PciDevice, RegionFlags};
use std::sync::{Arc, Condvar, Mutex};
use std::time::{Duration, Instant};

const RUN: u64 = 0x1;
const TO_MEMORY: u64 = 0x2;
const INTERRUPT: u64 = 0x4;
const CONFIG: u32 = 7;
const MEMORY_BASE: u64 = 0x10_0000;

/// How long a test waits for what has to happen.
const DEADLINE: Duration = Duration::from_secs(60);

fn device_with(port: Arc<dyn DmaPort>, options: EduOptions) -> Edu {
    let edu = Edu::new(port, options).unwrap();
    edu.open();
    edu
}

/// An open device that may do DMA, and 16 KiB of memory at [`MEMORY_BASE`].
fn device() -> (Edu, Arc<FlatMemory>) {
    let memory = Arc::new(FlatMemory::new(MEMORY_BASE, 0x4000));
    let edu = device_with(Arc::clone(&memory) as Arc<dyn DmaPort>, EduOptions::default());
    set_command(&edu, 0x6);
    (edu, memory)
}

fn set_command(edu: &Edu, command: u16) {
    assert_eq!(edu.write_region(CONFIG, 0x04, &command.to_le_bytes()), Ok(2));
}

fn command(edu: &Edu) -> u16 {
    let mut bytes = [0; 2];
    edu.read_config(0x04, &mut bytes).unwrap();
    u16::from_le_bytes(bytes)
}

fn read32(edu: &Edu, offset: u64) -> u32 {
    let mut bytes = [0; 4];
    assert_eq!(edu.read_region(0, offset, &mut bytes), Ok(4));
    u32::from_le_bytes(bytes)
}

fn write32(edu: &Edu, offset: u64, value: u32) {
    assert_eq!(edu.write_region(0, offset, &value.to_le_bytes()), Ok(4));
}

fn write64(edu: &Edu, offset: u64, value: u64) {
    assert_eq!(edu.write_region(0, offset, &value.to_le_bytes()), Ok(8));
}

fn wait_until(what: &str, mut condition: impl FnMut() -> bool) {
    let start = Instant::now();
    while !condition() {
        assert!(start.elapsed() < DEADLINE, "{what} did not happen");
        std::thread::yield_now();
    }
}

fn start_transfer(edu: &Edu, source: u64, destination: u64, count: u64, command: u64) {
    write64(edu, spec::DMA_SOURCE, source);
    write64(edu, spec::DMA_DESTINATION, destination);
    write64(edu, spec::DMA_COUNT, count);
    write64(edu, spec::DMA_COMMAND, command | RUN);
}

fn wait_for_transfer(edu: &Edu) {
    wait_until("the end of the transfer", || u64::from(read32(edu, spec::DMA_COMMAND)) & RUN == 0);
}

/// Starts a transfer and waits for its end.
fn transfer(edu: &Edu, source: u64, destination: u64, count: u64, command: u64) {
    start_transfer(edu, source, destination, count, command);
    wait_for_transfer(edu);
}

/// What the device's buffer holds, fetched by a transfer to `memory` at `scratch`.
fn buffer_contents(edu: &Edu, memory: &FlatMemory, scratch: u64, length: usize) -> Vec<u8> {
    transfer(edu, spec::BUFFER_ADDRESS, scratch, length as u64, TO_MEMORY);
    let mut bytes = vec![0; length];
    memory.read(scratch, &mut bytes).unwrap();
    bytes
}

fn pattern(length: usize) -> Vec<u8> {
    (0..length).map(|index| (index * 7 + index / 256 + 1) as u8).collect()
}

/// A port that holds each transfer until the test lets it go.
#[derive(Default)]
struct GatedPort {
    state: Mutex<Gate>,
    changed: Condvar,
}

#[derive(Default)]
struct Gate {
    inside: u32,
    finished: u32,
    open: bool,
}

impl GatedPort {
    fn pass(&self) {
        let mut gate = self.state.lock().unwrap();
        gate.inside += 1;
        self.changed.notify_all();
        let mut gate = self.changed.wait_while(gate, |gate| !gate.open).unwrap();
        gate.inside -= 1;
        gate.finished += 1;
        self.changed.notify_all();
    }

    fn wait_until_inside(&self) {
        let gate = self.state.lock().unwrap();
        let waited = self.changed.wait_timeout_while(gate, DEADLINE, |gate| gate.inside == 0).unwrap();
        assert!(!waited.1.timed_out(), "no transfer came");
    }

    fn open(&self) {
        self.state.lock().unwrap().open = true;
        self.changed.notify_all();
    }

    fn finished(&self) -> u32 {
        self.state.lock().unwrap().finished
    }
}

impl DmaPort for GatedPort {
    fn read(&self, _iova: u64, buffer: &mut [u8]) -> Result<(), DmaFault> {
        self.pass();
        buffer.fill(0xaa);
        Ok(())
    }

    fn write(&self, _iova: u64, _bytes: &[u8]) -> Result<(), DmaFault> {
        self.pass();
        Ok(())
    }
}

fn gated_device() -> (Edu, Arc<GatedPort>) {
    let port = Arc::new(GatedPort::default());
    let edu = device_with(Arc::clone(&port) as Arc<dyn DmaPort>, EduOptions::default());
    set_command(&edu, 0x6);
    (edu, port)
}

#[test]
fn configuration_space_identifies_the_device_and_promises_no_interrupt() {
    let (edu, _) = device();
    let mut config = [0; 256];
    assert_eq!(edu.read_region(CONFIG, 0, &mut config), Ok(256));
    assert_eq!(config[..4], [0x34, 0x12, 0xe8, 0x11]);
    assert_eq!(config[8..12], [0x10, 0x00, 0xff, 0x00]);
    assert_eq!(config[0x0e], 0, "header type");
    assert_eq!(config[0x3d], 0, "interrupt pin");
    assert_eq!((config[0x06] & 0x10, config[0x34]), (0, 0), "no capability list");
    edu.write_config(0x10, &[0xff; 4]).unwrap();
    edu.read_config(0x10, &mut config[..4]).unwrap();
    assert_eq!(config[..4], [0, 0, 0xf0, 0xff], "1 MiB of 32-bit memory, not prefetchable");
    let error = AccessError::BeyondConfigSpace { offset: 252, length: 5, size: 256 };
    assert_eq!(edu.read_region(CONFIG, 252, &mut config[..5]), Err(error));
}

#[test]
fn the_regions_are_those_of_vfio() {
    let (edu, _) = device();
    for index in 0..8 {
        let region = edu.regions().get(index).unwrap();
        let size = match index {
            0 => 1 << 20,
            7 => 256,
            _ => 0,
        };
        assert_eq!(region.size, size, "region {index}");
        assert_eq!(region.flags == RegionFlags::READ | RegionFlags::WRITE, size != 0);
    }
    for index in [8, 9, u32::MAX] {
        assert_eq!(edu.regions().get(index), Err(AccessError::NoSuchRegion { index }));
        assert_eq!(edu.read_region(index, 0, &mut [0]), Err(AccessError::NoSuchRegion { index }));
    }
    assert_eq!(edu.write_region(6, 0, &[0]), Err(AccessError::ReadOnly { index: 6 }));
    for absent in [1, 5, 6] {
        let error = AccessError::BeyondRegion { index: absent, offset: 0, size: 0 };
        assert_eq!(edu.read_region(absent, 0, &mut [0]), Err(error));
    }
}

#[test]
fn bar_accesses_are_cut_at_the_end_and_refused_past_it() {
    let (edu, _) = device();
    let mut bytes = [0; 16];
    assert_eq!(edu.read_region(0, (1 << 20) - 6, &mut bytes), Ok(6));
    assert_eq!(bytes[..7], [0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0]);
    assert_eq!(edu.write_region(0, (1 << 20) - 1, &[0; 2]), Ok(1));
    for offset in [1 << 20, u64::MAX] {
        let error = AccessError::BeyondRegion { index: 0, offset, size: 1 << 20 };
        assert_eq!(edu.read_region(0, offset, &mut bytes), Err(error));
        assert_eq!(edu.write_region(0, offset, &bytes), Err(error));
        assert_eq!(edu.read_region(0, offset, &mut []), Ok(0));
    }
}

#[test]
fn a_long_access_reaches_each_register_at_its_own_width() {
    let (edu, _) = device();
    // From 4: a dword, then aligned qwords, which registers below 0x80 do not answer.
    write32(&edu, spec::LIVENESS, 0);
    let mut bytes = [0; 12];
    assert_eq!(edu.read_region(0, 4, &mut bytes), Ok(12));
    assert_eq!(bytes, [0xff; 12]);
    write32(&edu, spec::LIVENESS, 0x5555_5555);
    edu.read_region(0, 4, &mut bytes).unwrap();
    assert_eq!(bytes[..4], [0xaa; 4]);
    // All four DMA registers in one go; the command comes last and starts the transfer.
    let mut registers = Vec::new();
    for value in [MEMORY_BASE, spec::BUFFER_ADDRESS, 16, RUN] {
        registers.extend(value.to_le_bytes());
    }
    assert_eq!(edu.write_region(0, spec::DMA_SOURCE, &registers), Ok(32));
    wait_for_transfer(&edu);
    assert_eq!(edu.diagnostics().transfers_completed, 1);
    // Two words are not a dword.
    edu.write_region(0, spec::LIVENESS + 2, &[0; 4]).unwrap();
    assert_eq!(read32(&edu, spec::LIVENESS), 0xaaaa_aaaa);
}

#[test]
fn bars_do_not_answer_while_memory_decode_is_off() {
    let (edu, _) = device();
    set_command(&edu, 0x4);
    assert_eq!(edu.read_region(0, 0, &mut [0; 4]), Err(AccessError::MemoryDecodeOff));
    assert_eq!(edu.write_region(0, spec::LIVENESS, &[0; 4]), Err(AccessError::MemoryDecodeOff));
    set_command(&edu, 0x6);
    assert_eq!(read32(&edu, spec::LIVENESS), 0);
}

#[test]
fn a_factorial_appears_by_itself_and_records_its_cause() {
    let (edu, _) = device();
    for (n, expected) in [(0, 1), (1, 1), (10, 3_628_800), (13, 1_932_053_504), (34, 0), (u32::MAX, 0)] {
        write32(&edu, spec::STATUS, 0x80);
        write32(&edu, spec::FACTORIAL, n);
        wait_until("the factorial", || read32(&edu, spec::STATUS) & 0x01 == 0);
        assert_eq!(read32(&edu, spec::FACTORIAL), expected, "{n}!");
        assert_eq!(read32(&edu, spec::INTERRUPT_STATUS), 0x001);
        write32(&edu, spec::INTERRUPT_ACKNOWLEDGE, 0x001);
        assert_eq!(read32(&edu, spec::INTERRUPT_STATUS), 0);
    }
}

#[test]
fn data_goes_into_the_device_and_comes_back() {
    let (edu, memory) = device();
    let data = pattern(4096);
    memory.write(MEMORY_BASE, &data).unwrap();
    transfer(&edu, MEMORY_BASE, spec::BUFFER_ADDRESS, 4096, 0);
    assert_eq!(read32(&edu, spec::INTERRUPT_STATUS), 0, "not asked for");
    transfer(&edu, spec::BUFFER_ADDRESS, MEMORY_BASE + 0x1001, 4096, TO_MEMORY | INTERRUPT);
    assert_eq!(read32(&edu, spec::INTERRUPT_STATUS), 0x100);
    assert_eq!(read32(&edu, spec::DMA_COMMAND), 0x6, "all but the run bit stay");
    let mut bytes = vec![0; 4098];
    memory.read(MEMORY_BASE + 0x1000, &mut bytes).unwrap();
    assert_eq!(bytes[1..4097], data);
    assert_eq!((bytes[0], bytes[4097]), (0, 0));
    assert_eq!(
        edu.diagnostics(),
        EduDiagnostics {
            transfers_completed: 2,
            bytes_from_memory: 4096,
            bytes_to_memory: 4096,
            ..EduDiagnostics::default()
        }
    );
}

#[test]
fn parts_of_the_buffer_can_be_named() {
    let (edu, memory) = device();
    memory.write(MEMORY_BASE, b"abcdef").unwrap();
    transfer(&edu, MEMORY_BASE, spec::BUFFER_ADDRESS + 4090, 6, 0);
    transfer(&edu, spec::BUFFER_ADDRESS + 4092, MEMORY_BASE + 0x100, 4, TO_MEMORY);
    let mut bytes = [0; 5];
    memory.read(MEMORY_BASE + 0x100, &mut bytes).unwrap();
    assert_eq!(&bytes, b"cdef\0");
}

#[test]
fn an_empty_transfer_succeeds_without_touching_memory() {
    let (edu, _) = device();
    transfer(&edu, 0, spec::BUFFER_ADDRESS, 0, INTERRUPT);
    assert_eq!(read32(&edu, spec::INTERRUPT_STATUS), 0x100);
    let diagnostics = edu.diagnostics();
    assert_eq!((diagnostics.transfers_completed, diagnostics.faults), (1, 0));
}

#[test]
fn the_mask_drops_address_bits() {
    let (edu, memory) = device();
    memory.write(MEMORY_BASE, b"masked").unwrap();
    transfer(&edu, 0xffff_ffff_f000_0000 | MEMORY_BASE, spec::BUFFER_ADDRESS, 6, 0);
    assert_eq!(edu.diagnostics().masked_addresses, 1);
    assert_eq!(buffer_contents(&edu, &memory, MEMORY_BASE + 0x100, 6), b"masked");
    assert_eq!(edu.diagnostics().masked_addresses, 1);
}

#[test]
fn a_wide_mask_reaches_the_last_page() {
    let memory = Arc::new(FlatMemory::new(u64::MAX - 0xfff, 0x1000));
    let options = EduOptions { dma_mask_bits: 64, ..EduOptions::default() };
    let edu = device_with(Arc::clone(&memory) as Arc<dyn DmaPort>, options);
    set_command(&edu, 0x6);
    memory.write(u64::MAX - 3, b"last").unwrap();
    transfer(&edu, u64::MAX - 3, spec::BUFFER_ADDRESS, 4, 0);
    assert_eq!(buffer_contents(&edu, &memory, u64::MAX - 0xfff, 4), b"last");
    transfer(&edu, u64::MAX - 3, spec::BUFFER_ADDRESS, 5, 0);
    let fault = DmaFault { iova: u64::MAX - 3, write: false, reason: DmaFaultReason::OutOfRange };
    assert_eq!(edu.diagnostics().last_fault, Some(fault));
}

#[test]
fn impossible_masks_are_refused() {
    for bits in [0, 65, u32::MAX] {
        let port = Arc::new(FlatMemory::new(0, 0));
        let options = EduOptions { dma_mask_bits: bits, ..EduOptions::default() };
        assert_eq!(Edu::new(port, options).unwrap_err(), EduError::DmaMask { bits });
    }
}

#[test]
fn transfers_out_of_range_move_nothing_and_end() {
    let (edu, memory) = device();
    memory.write(MEMORY_BASE, &[0x77; 0x1001]).unwrap();
    for (source, destination, count, command) in [
        (MEMORY_BASE, spec::BUFFER_ADDRESS, 4097, 0),
        (MEMORY_BASE, spec::BUFFER_ADDRESS + 4095, 2, 0),
        (MEMORY_BASE, spec::BUFFER_ADDRESS, u64::MAX, 0),
        (MEMORY_BASE, MEMORY_BASE, 1, 0),
        (spec::BUFFER_ADDRESS - 1, MEMORY_BASE, 2, TO_MEMORY),
    ] {
        transfer(&edu, source, destination, count, command | INTERRUPT);
        assert_eq!(read32(&edu, spec::INTERRUPT_STATUS), 0x100);
        write32(&edu, spec::INTERRUPT_ACKNOWLEDGE, 0x100);
    }
    let diagnostics = edu.diagnostics();
    assert_eq!((diagnostics.refused_out_of_range, diagnostics.transfers_completed), (5, 0));
    assert_eq!(buffer_contents(&edu, &memory, MEMORY_BASE + 0x2000, 4096), [0; 4096]);
}

#[test]
fn faults_move_nothing_and_are_counted() {
    let (edu, memory) = device();
    memory.write(MEMORY_BASE, &[0x55; 16]).unwrap();
    transfer(&edu, MEMORY_BASE, spec::BUFFER_ADDRESS, 16, 0);
    memory.write(MEMORY_BASE + 0x3ff8, &[0x77; 8]).unwrap();
    transfer(&edu, MEMORY_BASE + 0x3ff8, spec::BUFFER_ADDRESS, 16, INTERRUPT);
    assert_eq!(read32(&edu, spec::INTERRUPT_STATUS), 0x100);
    let fault = DmaFault { iova: MEMORY_BASE + 0x4000, write: false, reason: DmaFaultReason::NotMapped };
    let diagnostics = edu.diagnostics();
    assert_eq!((diagnostics.faults, diagnostics.last_fault), (1, Some(fault)));
    assert_eq!(buffer_contents(&edu, &memory, MEMORY_BASE, 16), [0x55; 16]);
    transfer(&edu, spec::BUFFER_ADDRESS, 0x1000, 16, TO_MEMORY);
    assert_eq!(edu.diagnostics().last_fault, Some(DmaFault { iova: 0x1000, write: true, ..fault }));
}

#[test]
fn without_bus_mastering_nothing_moves() {
    let (edu, memory) = device();
    memory.write(MEMORY_BASE, &[0x77; 16]).unwrap();
    set_command(&edu, 0x2);
    transfer(&edu, MEMORY_BASE, spec::BUFFER_ADDRESS, 16, INTERRUPT);
    assert_eq!(read32(&edu, spec::INTERRUPT_STATUS), 0x100);
    assert_eq!(edu.diagnostics().refused_bus_master_off, 1);
    set_command(&edu, 0x6);
    assert_eq!(buffer_contents(&edu, &memory, MEMORY_BASE + 0x100, 16), [0; 16]);
}

#[test]
fn a_running_transfer_drops_writes_and_lets_reads_through() {
    let (edu, port) = gated_device();
    start_transfer(&edu, 0x1000, spec::BUFFER_ADDRESS, 8, INTERRUPT);
    port.wait_until_inside();
    for register in [spec::DMA_SOURCE, spec::DMA_DESTINATION, spec::DMA_COUNT, spec::DMA_COMMAND] {
        write64(&edu, register, 0x3);
    }
    assert_eq!(edu.diagnostics().dropped_writes, 4);
    assert_eq!(read32(&edu, spec::DMA_SOURCE), 0x1000);
    assert_eq!(read32(&edu, spec::DMA_COMMAND), 0x5);
    port.open();
    wait_for_transfer(&edu);
    assert_eq!(edu.diagnostics().bytes_from_memory, 8);
}

#[test]
fn latency_delays_a_transfer() {
    let memory = Arc::new(FlatMemory::new(0, 0x1000));
    let latency = Duration::from_millis(60);
    let options = EduOptions { dma_latency: latency, ..EduOptions::default() };
    let edu = device_with(memory, options);
    set_command(&edu, 0x6);
    let start = Instant::now();
    transfer(&edu, 0, spec::BUFFER_ADDRESS, 16, 0);
    assert!(start.elapsed() >= latency);
    assert_eq!(edu.diagnostics().transfers_completed, 1);
}

#[test]
fn a_transfer_that_waits_lets_a_factorial_pass_and_is_taken_back_by_a_reset() {
    let memory = Arc::new(FlatMemory::new(0, 0x1000));
    let options = EduOptions { dma_latency: Duration::MAX, ..EduOptions::default() };
    let edu = device_with(memory, options);
    set_command(&edu, 0x6);
    start_transfer(&edu, 0, spec::BUFFER_ADDRESS, 16, INTERRUPT);
    write32(&edu, spec::FACTORIAL, 3);
    wait_until("the factorial", || read32(&edu, spec::FACTORIAL) == 6);
    edu.reset();
    assert_eq!(read32(&edu, spec::DMA_COMMAND), 0);
    assert_eq!(read32(&edu, spec::INTERRUPT_STATUS), 0);
    assert_eq!(edu.diagnostics().transfers_cancelled, 1);
    drop(edu);
    // The worker ends although it waits, before the drop gives up; at least once, where many want the processor.
    let ends_in_time = || {
        let edu = device_with(Arc::new(FlatMemory::new(0, 0x1000)), options);
        set_command(&edu, 0x6);
        start_transfer(&edu, 0, spec::BUFFER_ADDRESS, 16, 0);
        let start = Instant::now();
        drop(edu);
        start.elapsed() < Duration::from_millis(900)
    };
    assert!((0..20).any(|_| ends_in_time()), "the drop ran into its time limit");
}

#[test]
fn a_reset_clears_the_device_and_keeps_configuration_space() {
    let (edu, memory) = device();
    memory.write(MEMORY_BASE, &[0x77; 16]).unwrap();
    transfer(&edu, MEMORY_BASE, spec::BUFFER_ADDRESS, 16, INTERRUPT);
    write32(&edu, spec::LIVENESS, 1);
    write32(&edu, spec::STATUS, 0x80);
    edu.write_config(0x10, &[0, 0, 0xb0, 0xfe]).unwrap();
    edu.reset();
    for register in [spec::LIVENESS, spec::STATUS, spec::INTERRUPT_STATUS, spec::DMA_COUNT, spec::DMA_COMMAND]
    {
        assert_eq!(read32(&edu, register), 0, "{register:#x}");
    }
    assert_eq!(command(&edu), 0x6);
    let mut bar = [0; 4];
    edu.read_config(0x10, &mut bar).unwrap();
    assert_eq!(bar, [0, 0, 0xb0, 0xfe]);
    assert_eq!(buffer_contents(&edu, &memory, MEMORY_BASE + 0x100, 16), [0; 16]);
}

#[test]
fn open_and_close_leave_the_command_register_as_linux_does() {
    let memory = Arc::new(FlatMemory::new(0, 0x1000));
    let edu = Edu::new(memory, EduOptions::default()).unwrap();
    assert_eq!(command(&edu), 0);
    edu.open();
    assert_eq!(command(&edu), 0x2);
    set_command(&edu, 0x6);
    write32(&edu, spec::LIVENESS, 1);
    edu.close();
    assert_eq!(command(&edu), 0);
    assert_eq!(edu.read_region(0, 0, &mut [0; 4]), Err(AccessError::MemoryDecodeOff));
    edu.open();
    assert_eq!(command(&edu), 0x2);
    assert_eq!(read32(&edu, spec::LIVENESS), 0, "the next user sees nothing of the last");
}

/// Runs `stop` while a transfer is in the port, lets the port go, and says whether it had ended when
/// `stop` returned.
fn stop_during_transfer(edu: &Edu, port: &GatedPort, stop: impl FnOnce(&Edu) + Send) -> u32 {
    start_transfer(edu, 0x1000, spec::BUFFER_ADDRESS, 8, INTERRUPT);
    port.wait_until_inside();
    std::thread::scope(|scope| {
        let stopped = scope.spawn(|| {
            stop(edu);
            port.finished()
        });
        std::thread::sleep(Duration::from_millis(30));
        port.open();
        stopped.join().unwrap()
    })
}

#[test]
fn a_reset_waits_for_the_running_transfer_and_drops_its_outcome() {
    let (edu, port) = gated_device();
    assert_eq!(stop_during_transfer(&edu, &port, |edu| edu.reset()), 1);
    assert_eq!(read32(&edu, spec::DMA_COMMAND), 0);
    assert_eq!(read32(&edu, spec::INTERRUPT_STATUS), 0, "the old transfer does not interrupt");
    let diagnostics = edu.diagnostics();
    assert_eq!((diagnostics.transfers_cancelled, diagnostics.transfers_completed), (1, 0));
    transfer(&edu, 0x1000, spec::BUFFER_ADDRESS, 8, 0);
    assert_eq!(edu.diagnostics().transfers_completed, 1);
}

#[test]
fn turning_bus_mastering_off_waits_for_the_running_transfer() {
    let (edu, port) = gated_device();
    assert_eq!(stop_during_transfer(&edu, &port, |edu| set_command(edu, 0x2)), 1);
    wait_for_transfer(&edu);
    assert_eq!(edu.diagnostics().transfers_completed, 1, "it is not cancelled");
}

#[test]
fn a_close_waits_for_the_running_transfer() {
    let (edu, port) = gated_device();
    assert_eq!(stop_during_transfer(&edu, &port, |edu| edu.close()), 1);
    assert_eq!(command(&edu), 0);
}

#[test]
fn a_stuck_transfer_does_not_hold_up_a_reset_for_ever() {
    let (edu, port) = gated_device();
    start_transfer(&edu, 0x1000, spec::BUFFER_ADDRESS, 8, INTERRUPT);
    port.wait_until_inside();
    edu.reset();
    assert_eq!(port.finished(), 0);
    assert_eq!(read32(&edu, spec::DMA_COMMAND), 0);
    // The next one queues behind it, and only its own outcome counts.
    start_transfer(&edu, 0x1000, spec::BUFFER_ADDRESS, 4, 0);
    port.open();
    wait_for_transfer(&edu);
    let diagnostics = edu.diagnostics();
    assert_eq!((diagnostics.transfers_cancelled, diagnostics.transfers_completed), (1, 1));
    assert_eq!(diagnostics.bytes_from_memory, 4);
    assert_eq!(read32(&edu, spec::INTERRUPT_STATUS), 0);
}

#[test]
fn dropping_the_device_ends_its_thread_and_frees_the_port() {
    let (edu, port) = gated_device();
    start_transfer(&edu, 0x1000, spec::BUFFER_ADDRESS, 8, 0);
    port.wait_until_inside();
    let opener = std::thread::spawn({
        let port = Arc::clone(&port);
        move || {
            std::thread::sleep(Duration::from_millis(30));
            port.open();
        }
    });
    drop(edu);
    assert_eq!(port.finished(), 1, "the drop waited for the transfer");
    opener.join().unwrap();
    wait_until("the end of the thread", || Arc::strong_count(&port) == 1);
}

#[test]
fn dropping_the_device_does_not_wait_for_ever() {
    let (edu, port) = gated_device();
    start_transfer(&edu, 0x1000, spec::BUFFER_ADDRESS, 8, 0);
    port.wait_until_inside();
    drop(edu);
    assert_eq!(port.finished(), 0);
    port.open();
    wait_until("the end of the thread", || Arc::strong_count(&port) == 1);
}

#[test]
fn many_threads_may_use_one_device() {
    let (edu, _) = device();
    std::thread::scope(|scope| {
        for thread in 0..4_u64 {
            let edu = &edu;
            scope.spawn(move || {
                for round in 0..100_u64 {
                    match (thread + round) % 4 {
                        0 => edu.reset(),
                        1 => set_command(edu, if round % 8 < 4 { 0x2 } else { 0x6 }),
                        2 => write32(edu, spec::FACTORIAL, round as u32),
                        _ => start_transfer(edu, MEMORY_BASE, spec::BUFFER_ADDRESS, 64, INTERRUPT),
                    }
                }
            });
        }
    });
    edu.open();
    set_command(&edu, 0x6);
    let before = edu.diagnostics().transfers_completed;
    transfer(&edu, MEMORY_BASE, spec::BUFFER_ADDRESS, 64, 0);
    assert_eq!(edu.diagnostics().transfers_completed, before + 1);
}

/// Memory for each of a few PASIDs, from 1 on.
struct Memories(Vec<Arc<FlatMemory>>);

impl PasidPorts for Memories {
    fn port(&self, pasid: Pasid) -> Option<Arc<dyn DmaPort>> {
        let memory = self.0.get((pasid.get() as usize).checked_sub(1)?)?;
        Some(Arc::clone(memory) as _)
    }
}

/// A device with two PASIDs, the memory of its requests without one, and that of those with 1 and 2. The first byte of each is
/// its number, from 0.
fn device_with_pasids() -> (Edu, Vec<Arc<FlatMemory>>) {
    let memory = |number: u8| {
        let memory = Arc::new(FlatMemory::new(MEMORY_BASE, 0x1000));
        memory.write(MEMORY_BASE, &[number]).unwrap();
        memory
    };
    let memories: Vec<_> = (0..3).map(memory).collect();
    let plain = Arc::clone(&memories[0]) as Arc<dyn DmaPort>;
    let edu = Edu::with_pasids(plain, Arc::new(Memories(memories[1..].to_vec())), EduOptions::default());
    let edu = edu.unwrap();
    edu.open();
    set_command(&edu, 0x6);
    (edu, memories)
}

const ENABLE: u32 = 1 << 31;

#[test]
fn the_register_chooses_the_pasid_of_transfers() {
    let (edu, memories) = device_with_pasids();
    assert_eq!(read32(&edu, spec::DMA_PASID), 0);
    // A number alone chooses nothing.
    for (chosen, reached) in [(0, 0), (1, 0), (ENABLE | 1, 1), (ENABLE | 2, 2), (ENABLE | 1, 1), (2, 0)] {
        write32(&edu, spec::DMA_PASID, chosen);
        transfer(&edu, MEMORY_BASE, spec::BUFFER_ADDRESS, 1, 0);
        transfer(&edu, spec::BUFFER_ADDRESS, MEMORY_BASE + 8, 1, TO_MEMORY);
        let copied: Vec<u8> = memories
            .iter()
            .map(|memory| {
                let mut byte = [0];
                memory.read(MEMORY_BASE + 8, &mut byte).unwrap();
                memory.write(MEMORY_BASE + 8, &[0xee]).unwrap();
                byte[0]
            })
            .collect();
        assert_eq!(copied[reached], reached as u8, "{chosen:#x}");
        assert_eq!(copied.iter().filter(|byte| ![0, 0xee].contains(byte)).count(), usize::from(reached > 0));
    }
    assert_eq!(edu.diagnostics().transfers_completed, 12);
}

#[test]
fn a_pasid_that_the_device_does_not_have_moves_nothing() {
    let (with_two, _) = device_with_pasids();
    let (without, _) = device();
    for (edu, pasid) in [(&with_two, 3), (&with_two, 0), (&with_two, 0xf_ffff), (&without, 1)] {
        let before = edu.diagnostics();
        write32(edu, spec::DMA_PASID, ENABLE | pasid);
        transfer(edu, MEMORY_BASE, spec::BUFFER_ADDRESS, 1, INTERRUPT);
        let refused_no_such_pasid = before.refused_no_such_pasid + 1;
        assert_eq!(edu.diagnostics(), EduDiagnostics { refused_no_such_pasid, ..before });
        assert_eq!(read32(edu, spec::INTERRUPT_STATUS), 0x100, "it ends like any other");
    }
}

#[test]
fn a_fault_is_remembered_with_its_pasid() {
    let (edu, _) = device_with_pasids();
    for pasid in [Some(2), None] {
        write32(&edu, spec::DMA_PASID, pasid.map_or(0, |pasid| ENABLE | pasid));
        transfer(&edu, 0, spec::BUFFER_ADDRESS, 1, 0);
        let diagnostics = edu.diagnostics();
        assert_eq!(diagnostics.last_fault.map(|fault| fault.reason), Some(DmaFaultReason::NotMapped));
        assert_eq!(diagnostics.last_fault_pasid, pasid.and_then(Pasid::new));
    }
}

#[test]
fn a_reset_or_a_new_owner_finds_no_pasid() {
    let (edu, memories) = device_with_pasids();
    let leave: [fn(&Edu); 2] = [|edu| edu.reset(), |edu| edu.close()];
    for leave in leave {
        write32(&edu, spec::DMA_PASID, ENABLE | 1);
        transfer(&edu, MEMORY_BASE, spec::BUFFER_ADDRESS, 1, 0);
        assert_eq!(Arc::strong_count(&memories[1]), 3, "the device keeps the port that it uses");
        leave(&edu);
        assert_eq!(Arc::strong_count(&memories[1]), 2, "no port of the former owner's is left");
        edu.open();
        set_command(&edu, 0x6);
        assert_eq!(read32(&edu, spec::DMA_PASID), 0);
    }
}
