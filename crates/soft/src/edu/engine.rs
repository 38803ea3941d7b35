//! The part of the edu device that works by itself: factorials and transfers.
//!
//! One mutex holds all state. The worker, a thread, looks for a busy bit in the registers, does that work
//! and waits for more. It lets go of the mutex while the [`DmaPort`] moves bytes, because an IOMMU may
//! take its time and the registers can be read meanwhile; the bytes pass through a staging buffer, so
//! nothing half-done is ever seen in the device.
//!
//! Stopping is the hard part, and rests on two facts. Work that has not begun is only a busy bit, so
//! resetting the registers takes it back. A transfer that is inside the port ([`State::moving`]) cannot be
//! called back: whoever stops the device marks it cancelled, so that its outcome is dropped, and waits for
//! it to end. That wait has a bound, since memory behind a port may be a file whose server hangs; a
//! transfer that outlives it stays cancelled, and new ones queue behind it.

use super::registers::{Effect, Registers};
use super::spec;
use super::{DmaMask, EduDiagnostics};
use crate::dma::{DmaFault, DmaPort, PasidPorts};
use crate::pci::access::{AccessWidth, write_split};
use crate::pci::{AccessError, Command, ConfigSpace};
use ioasid::pasid::Pasid;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// How long to wait for a transfer in the port before leaving it behind.
const PATIENCE: Duration = Duration::from_secs(1);

/// What the device and its worker share.
pub(super) struct Engine {
    port: Arc<dyn DmaPort>,
    /// None: the device has no PASIDs.
    pasids: Option<Arc<dyn PasidPorts>>,
    dma_mask: DmaMask,
    dma_latency: Duration,
    state: Mutex<State>,
    /// There may be work, or none will come any more. The worker waits for it.
    work: Condvar,
    /// The worker has left the port, or has ended.
    settled: Condvar,
}

/// Everything that changes.
pub(super) struct State {
    pub(super) config: ConfigSpace,
    pub(super) registers: Registers,
    pub(super) diagnostics: EduDiagnostics,
    buffer: Box<[u8; spec::BUFFER_SIZE]>,
    /// The port of the PASID that was used last: an IOTLB is in it.
    pasid_port: Option<(Pasid, Arc<dyn DmaPort>)>,
    /// When the transfer that is due was commanded.
    commanded: Option<Instant>,
    /// The transfer that is inside the port.
    moving: Option<Moving>,
    /// Numbers transfers, so that waiting for one is not waiting for its successor.
    next_transfer: u64,
    worker: Worker,
}

/// A transfer inside the port.
#[derive(Clone, Copy)]
struct Moving {
    number: u64,
    /// Its outcome is to be dropped.
    cancelled: bool,
}

/// The life of the worker thread.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Worker {
    NotStarted,
    Running,
    /// Asked to end.
    Stopping,
    Ended,
}

/// Why a transfer moved nothing.
#[derive(Clone, Copy)]
enum Refusal {
    BusMasterOff,
    OutOfRange,
    NoSuchPasid,
    Fault(DmaFault, Option<Pasid>),
}

/// What [`Engine::run`] does when there is nothing to do.
#[derive(Clone, Copy, PartialEq, Eq)]
enum WhenIdle {
    Wait,
    Return,
}

impl Engine {
    pub(super) fn new(
        port: Arc<dyn DmaPort>,
        pasids: Option<Arc<dyn PasidPorts>>,
        config: ConfigSpace,
        dma_mask: DmaMask,
        dma_latency: Duration,
    ) -> Self {
        let state = State {
            config,
            registers: Registers::default(),
            diagnostics: EduDiagnostics::default(),
            buffer: Box::new([0; spec::BUFFER_SIZE]),
            pasid_port: None,
            commanded: None,
            moving: None,
            next_transfer: 0,
            worker: Worker::NotStarted,
        };
        Self {
            port,
            pasids,
            dma_mask,
            dma_latency,
            state: Mutex::new(state),
            work: Condvar::new(),
            settled: Condvar::new(),
        }
    }

    /// The state. A panic of another holder does not make it unusable: no invariant spans two fields that
    /// code which can panic would leave apart.
    pub(super) fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Carries out a write of a BAR, already cut to it, and sees to the work that it leaves.
    pub(super) fn write_bar(self: &Arc<Self>, offset: u64, bytes: &[u8]) -> Result<(), AccessError> {
        let mut guard = self.lock();
        let state = &mut *guard;
        if !state.config.command().contains(Command::MEMORY_SPACE) {
            return Err(AccessError::MemoryDecodeOff);
        }
        let mut has_work = false;
        write_split(offset, bytes, |offset, width: AccessWidth, value| {
            match state.registers.write(offset, width, value) {
                Effect::None => {}
                Effect::DroppedBusy => state.diagnostics.dropped_writes += 1,
                Effect::Factorial => has_work = true,
                Effect::Transfer => {
                    state.commanded = Some(Instant::now());
                    has_work = true;
                }
            }
        });
        if has_work {
            self.wake_worker(guard);
        }
        Ok(())
    }

    /// Writes configuration space. A transfer that runs while bus mastering is turned off is waited for.
    pub(super) fn write_config(&self, offset: u64, bytes: &[u8]) -> Result<(), AccessError> {
        let mut state = self.lock();
        let before = state.config.command();
        state.config.write(offset, bytes)?;
        if (before - state.config.command()).contains(Command::BUS_MASTER) {
            drop(self.wait_until_still(state));
        }
        Ok(())
    }

    /// Forgets everything but configuration space; see [`PciDevice::reset`](crate::pci::PciDevice::reset).
    pub(super) fn reset(&self, mut state: MutexGuard<'_, State>) {
        state.cancel();
        state.registers = Registers::default();
        state.buffer.fill(0);
        state.pasid_port = None;
        drop(self.wait_until_still(state));
    }

    /// Ends the worker. If it is stuck in the port, it ends when it comes back.
    pub(super) fn stop(&self) {
        let mut state = self.lock();
        state.cancel();
        state.registers = Registers::default();
        if state.worker != Worker::Running {
            return;
        }
        state.worker = Worker::Stopping;
        self.work.notify_all();
        let stopping = |state: &mut State| state.worker == Worker::Stopping;
        let waited = self.settled.wait_timeout_while(state, PATIENCE, stopping);
        let (_state, timeout) = waited.unwrap_or_else(PoisonError::into_inner);
        if timeout.timed_out() {
            tracing::warn!(
                "an edu device was dropped while its DMA is stuck; its thread ends when that returns"
            );
        }
    }

    /// Lets the worker look for work, starting it if this is the first.
    fn wake_worker(self: &Arc<Self>, mut state: MutexGuard<'_, State>) {
        if state.worker == Worker::NotStarted {
            let engine = Arc::clone(self);
            let body = move || {
                engine.run(WhenIdle::Wait);
                engine.lock().worker = Worker::Ended;
                engine.settled.notify_all();
            };
            match std::thread::Builder::new().name("edu".to_owned()).spawn(body) {
                // Nobody joins the thread: what has to be waited for is announced by `settled`.
                Ok(_detached) => state.worker = Worker::Running,
                Err(error) => {
                    tracing::warn!(%error, "no thread for an edu device; its work is done by whoever asks for it");
                    drop(state);
                    self.run(WhenIdle::Return);
                    return;
                }
            }
        }
        self.work.notify_all();
    }

    /// Does work while there is some.
    fn run(&self, when_idle: WhenIdle) {
        let mut state = self.lock();
        while state.worker != Worker::Stopping {
            if state.registers.is_computing() {
                state.registers.complete_factorial();
            } else if state.registers.is_transferring() && state.moving.is_none() {
                let elapsed = state.commanded.map_or(Duration::MAX, |commanded| commanded.elapsed());
                match self.dma_latency.checked_sub(elapsed).filter(|remaining| !remaining.is_zero()) {
                    None => state = self.transfer(state),
                    Some(remaining) => {
                        let waited = self.work.wait_timeout(state, remaining);
                        state = waited.unwrap_or_else(PoisonError::into_inner).0;
                    }
                }
            } else if when_idle == WhenIdle::Wait {
                state = self.work.wait(state).unwrap_or_else(PoisonError::into_inner);
            } else {
                break;
            }
        }
    }

    /// Does the transfer that the registers describe.
    fn transfer<'engine>(&'engine self, mut state: MutexGuard<'engine, State>) -> MutexGuard<'engine, State> {
        let Some(transfer) = state.registers.transfer() else {
            state.finish_transfer(Err(Refusal::OutOfRange));
            return state;
        };
        if !state.config.command().contains(Command::BUS_MASTER) {
            state.finish_transfer(Err(Refusal::BusMasterOff));
            return state;
        }
        let pasid = state.registers.pasid();
        let Some(port) = self.port(&mut state, pasid) else {
            state.finish_transfer(Err(Refusal::NoSuchPasid));
            return state;
        };
        let iova = transfer.memory & self.dma_mask.get();
        if iova != transfer.memory {
            state.diagnostics.masked_addresses += 1;
        }
        let range = transfer.buffer..transfer.buffer + transfer.length;
        let mut staging = [0; spec::BUFFER_SIZE];
        let bytes = &mut staging[..transfer.length];
        if transfer.to_memory {
            bytes.copy_from_slice(&state.buffer[range.clone()]);
        }

        let number = state.next_transfer;
        state.next_transfer += 1;
        state.moving = Some(Moving { number, cancelled: false });
        drop(state);
        let result = match (bytes.is_empty(), transfer.to_memory) {
            (true, _) => Ok(()),
            (false, true) => port.write(iova, bytes),
            (false, false) => port.read(iova, bytes),
        };
        let mut state = self.lock();
        let cancelled = state.moving.take().is_some_and(|moving| moving.cancelled);
        self.settled.notify_all();
        if cancelled {
            return state;
        }
        if result.is_ok() && !transfer.to_memory {
            state.buffer[range].copy_from_slice(bytes);
        }
        let moved = result.map(|()| (transfer.to_memory, transfer.length as u64));
        state.finish_transfer(moved.map_err(|fault| Refusal::Fault(fault, pasid)));
        state
    }

    /// The way of requests with this PASID, or without one.
    fn port(&self, state: &mut State, pasid: Option<Pasid>) -> Option<Arc<dyn DmaPort>> {
        let Some(pasid) = pasid else { return Some(Arc::clone(&self.port)) };
        match &state.pasid_port {
            Some((last, port)) if *last == pasid => Some(Arc::clone(port)),
            _ => {
                let port = self.pasids.as_ref()?.port(pasid)?;
                state.pasid_port = Some((pasid, Arc::clone(&port)));
                Some(port)
            }
        }
    }

    /// Waits until the transfer that is inside the port now has left it, but not for ever.
    fn wait_until_still<'engine>(
        &'engine self,
        state: MutexGuard<'engine, State>,
    ) -> MutexGuard<'engine, State> {
        let Some(Moving { number, .. }) = state.moving else { return state };
        let still_there = |state: &mut State| state.moving.is_some_and(|moving| moving.number == number);
        let waited = self.settled.wait_timeout_while(state, PATIENCE, still_there);
        let (state, timeout) = waited.unwrap_or_else(PoisonError::into_inner);
        if timeout.timed_out() {
            tracing::warn!("a transfer of an edu device does not end and is left behind");
        }
        state
    }
}

impl State {
    /// Takes back a transfer that is due, and drops the outcome of one that is running.
    fn cancel(&mut self) {
        if self.registers.is_transferring() {
            self.diagnostics.transfers_cancelled += 1;
        }
        self.commanded = None;
        if let Some(moving) = &mut self.moving {
            moving.cancelled = true;
        }
    }

    /// Accounts for a transfer and ends it in the registers. If it went well, `outcome` says whether
    /// memory was written and how many bytes moved.
    fn finish_transfer(&mut self, outcome: Result<(bool, u64), Refusal>) {
        let diagnostics = &mut self.diagnostics;
        match outcome {
            Ok((to_memory, length)) => {
                diagnostics.transfers_completed += 1;
                let bytes = if to_memory {
                    &mut diagnostics.bytes_to_memory
                } else {
                    &mut diagnostics.bytes_from_memory
                };
                *bytes += length;
            }
            Err(Refusal::BusMasterOff) => diagnostics.refused_bus_master_off += 1,
            Err(Refusal::OutOfRange) => diagnostics.refused_out_of_range += 1,
            Err(Refusal::NoSuchPasid) => diagnostics.refused_no_such_pasid += 1,
            Err(Refusal::Fault(fault, pasid)) => {
                tracing::debug!(%fault, ?pasid, "a transfer of an edu device faulted");
                diagnostics.faults += 1;
                diagnostics.last_fault = Some(fault);
                diagnostics.last_fault_pasid = pasid;
            }
        }
        self.commanded = None;
        self.registers.complete_transfer();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::dma::FlatMemory;
    use crate::pci::{ConfigSpaceSize, Type0Header};

    /// Where no thread can be had, whoever writes the register does the work.
    #[test]
    fn work_is_done_without_a_thread() {
        let memory = Arc::new(FlatMemory::new(0, 16));
        let mut config = ConfigSpace::new(ConfigSpaceSize::Conventional, &Type0Header::default()).unwrap();
        config.set_command(Command::BUS_MASTER);
        let mask = DmaMask::from_bits(64).unwrap();
        let engine = Engine::new(memory, None, config, mask, Duration::from_millis(1));
        let mut state = engine.lock();
        state.registers.write(spec::FACTORIAL, AccessWidth::Dword, 6);
        state.registers.write(spec::DMA_DESTINATION, AccessWidth::Qword, spec::BUFFER_ADDRESS);
        state.registers.write(spec::DMA_COUNT, AccessWidth::Qword, 16);
        state.registers.write(spec::DMA_COMMAND, AccessWidth::Qword, 1);
        state.commanded = Some(Instant::now());
        drop(state);
        engine.run(WhenIdle::Return);
        let state = engine.lock();
        assert_eq!(state.registers.read(spec::FACTORIAL, AccessWidth::Dword), 720);
        assert_eq!(state.diagnostics.bytes_from_memory, 16);
    }
}
