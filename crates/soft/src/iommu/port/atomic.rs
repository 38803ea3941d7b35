//! Atomic operations of devices: PCI Express AtomicOps (Base Specification 6.15).
//!
//! They are carried out by the CPU's own atomics, so that they are atomic towards drivers and towards each other. PCI
//! Express knows 4 and 8 bytes for all three operations; its 16 bytes for compare-and-swap are left out, for want of a
//! portable instruction.

use super::{Access, Misses, Port, Reached};
use crate::dma::{DmaFault, DmaFaultReason};
use ioasid::{Here, epoch};
use std::sync::atomic::Ordering;

/// What a device does with a word of memory, and is told its former value.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum AtomicOperation<T> {
    /// Adds; wraps.
    FetchAdd(T),
    /// Puts another value there.
    Swap(T),
    /// Puts `new` there if `expected` is what stands there.
    CompareAndSwap {
        /// What has to stand there.
        expected: T,
        /// What takes its place.
        new: T,
    },
}

macro_rules! carry_out {
    ($word:expr, $operation:expr) => {
        match $operation {
            AtomicOperation::FetchAdd(value) => $word.fetch_add(value, Ordering::SeqCst),
            AtomicOperation::Swap(value) => $word.swap(value, Ordering::SeqCst),
            AtomicOperation::CompareAndSwap { expected, new } => {
                match $word.compare_exchange(expected, new, Ordering::SeqCst, Ordering::SeqCst) {
                    Ok(value) | Err(value) => value,
                }
            }
        }
    };
}

impl Port {
    /// An atomic operation on 4 bytes, in the byte order of this machine; the value that stood there before.
    ///
    /// The address must be a multiple of 4 and mapped for reading and writing, and the memory must be mapped in this
    /// process: other memory is refused as [`NotAtomic`](DmaFaultReason::NotAtomic).
    pub fn atomic_u32(&self, iova: u64, operation: AtomicOperation<u32>) -> Result<u32, DmaFault> {
        self.atomic(iova, 4, |memory| Some(carry_out!(memory.atomic_u32()?, operation)))
    }

    /// An atomic operation on 8 bytes, in the byte order of this machine; the value that stood there before. The
    /// address must be a multiple of 8.
    pub fn atomic_u64(&self, iova: u64, operation: AtomicOperation<u64>) -> Result<u64, DmaFault> {
        self.atomic(iova, 8, |memory| Some(carry_out!(memory.atomic_u64()?, operation)))
    }

    fn atomic<T>(
        &self,
        iova: u64,
        length: u64,
        carry_out: impl Fn(&Here<'_>) -> Option<T>,
    ) -> Result<T, DmaFault> {
        let access = Access::READ_WRITE;
        let try_it = || {
            let section = epoch::dma();
            if iova % length != 0 {
                return Err(self.refused(&section, access.fault(iova, DmaFaultReason::Misaligned)));
            }
            let table = self.table(&section, iova, access)?;
            let reached = self.reach(&section, table, iova, length, access);
            let value = reached.and_then(|reached| match reached {
                Reached::Here(memory, count) if count == length => {
                    carry_out(&memory).ok_or(access.fault(iova, DmaFaultReason::NotAtomic))
                }
                _ => Err(access.fault(iova, DmaFaultReason::NotAtomic)),
            });
            self.out_of(&section, table, value)
        };
        let mut misses = Misses::default();
        let result = loop {
            match try_it() {
                Err(refused) => match self.resolve_missed(refused, access, &mut misses) {
                    Ok(()) => {}
                    Err(refused) => break Err(refused),
                },
                done => break done,
            }
        };
        self.noted(result)
    }
}
