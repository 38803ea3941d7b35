//! The DMA of a mapping, and its bytes.
//!
//! The bytes are the mapping's own: a sequence that begins with the line number of its map. What a device reads through a
//! wrong translation, or what it writes to a wrong place, is therefore noticed wherever the place is. The processor's side
//! goes past all tables, directly to the memory.

use super::scene::{GuestMemory, Scene};
use super::worker::Findings;
use crate::live::Mapping;
use crate::statistics::Call;
use ioasid_soft::dma::DmaFaultReason;
use std::sync::Arc;
use std::time::Instant;

/// So many bytes at most are moved in one piece. A mapping of more than two of these is used at both ends.
const PIECE: u64 = 128 << 10;

/// A DMA that was recorded.
#[derive(Debug)]
pub(super) struct Dma {
    pub(super) line: u64,
    pub(super) iova: u64,
    /// At most [`LONGEST_DMA`](crate::trace::LONGEST_DMA).
    pub(super) bytes: u64,
    pub(super) write: bool,
    pub(super) ends: Ends,
}

/// How a recorded DMA has to end.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Ends {
    /// All bytes move, to or from these pieces of memory: offsets and lengths.
    Done(Vec<(u64, u64)>),
    /// It is refused.
    Fault,
    /// It is refused by tables that can forbid reading where writing is allowed.
    Either,
}

/// Bytes that say where in memory they belong, and to which line. Where a DMA reaches the same memory twice, they are the same.
fn fill_places(bytes: &mut [u8], line: u64, write: bool, pieces: &[(u64, u64)]) {
    let mut rest = bytes;
    for (place, length) in pieces {
        let (piece, after) = rest.split_at_mut((*length as usize).min(rest.len()));
        rest = after;
        let mut at = *place;
        let mut piece = &mut piece[..];
        while !piece.is_empty() {
            let within = (at % 8) as usize;
            let (now, later) = piece.split_at_mut((8 - within).min(piece.len()));
            let mut word = [0; 8];
            fill(&mut word, line, at / 8, write);
            now.copy_from_slice(&word[within..within + now.len()]);
            at += now.len() as u64;
            piece = later;
        }
    }
}

/// The memory, and two buffers of a worker: what should be there, and what is.
#[derive(Debug)]
pub(super) struct Buffers {
    memory: Arc<GuestMemory>,
    expected: Vec<u8>,
    found: Vec<u8>,
}

/// Words that say where they belong: to a mapping, a byte of it, and one of the two directions.
fn fill(bytes: &mut [u8], line: u64, first: u64, write: bool) {
    const ODD: u64 = 0x9e37_79b9_7f4a_7c15;
    let mut word = (line << 1 | u64::from(write)).wrapping_mul(ODD) ^ first.rotate_left(17);
    for chunk in bytes.chunks_mut(8) {
        word = word.wrapping_mul(ODD).wrapping_add(line | 1);
        chunk.copy_from_slice(&word.to_ne_bytes()[..chunk.len()]);
    }
}

/// The bytes of each piece, and where in memory it is.
fn each_piece<E>(
    pieces: &[(u64, u64)],
    mut bytes: &mut [u8],
    mut work: impl FnMut(u64, &mut [u8]) -> Result<(), E>,
) -> Result<(), E> {
    for (place, length) in pieces {
        let (piece, after) = bytes.split_at_mut((*length as usize).min(bytes.len()));
        work(*place, piece)?;
        bytes = after;
    }
    Ok(())
}

impl Buffers {
    pub(super) fn new(memory: &Arc<GuestMemory>) -> Buffers {
        Buffers { memory: memory.clone(), expected: Vec::new(), found: Vec::new() }
    }

    /// Has the device use the mapping, in each direction that it may, and writes down how long that took and what was wrong.
    pub(super) fn transfer(&mut self, scene: &dyn Scene, mapping: &Mapping, findings: &mut Findings) {
        let bytes = mapping.bytes;
        let first = bytes.min(PIECE);
        // Up to two pieces that together are everything, or the two ends.
        let second = bytes.saturating_sub(first).min(PIECE);
        let permissions = mapping.direction.permissions();
        for write in [false, true] {
            let wanted = if write { ioasid::Permissions::WRITE } else { ioasid::Permissions::READ };
            if !permissions.contains(wanted) {
                continue;
            }
            for (offset, length) in [(0, first), (bytes - second, second)] {
                if length > 0 {
                    if let Err(what) = self.piece(scene, mapping, offset, length, write, findings) {
                        findings.wrong_dma.note(mapping.line, || what);
                        return;
                    }
                }
            }
        }
    }

    /// Makes a DMA that was recorded, and looks whether it ends as it did.
    pub(super) fn dma(&mut self, scene: &dyn Scene, dma: &Dma, findings: &mut Findings) {
        if let Err(what) = self.try_dma(scene, dma, findings) {
            findings.wrong_dma.note(dma.line, || what);
        }
    }

    fn try_dma(&mut self, scene: &dyn Scene, dma: &Dma, findings: &mut Findings) -> Result<(), String> {
        let Dma { line, iova, bytes, write, ref ends } = *dma;
        let size = bytes as usize;
        self.expected.resize(size, 0);
        self.found.resize(size, 0);
        let pieces = if let Ends::Done(pieces) = ends { pieces.as_slice() } else { &[] };
        fill_places(&mut self.expected, line, write, pieces);
        let memory = &self.memory;
        let gone = |error: ioasid::MemoryGone| error.to_string();
        let _nobody_else = memory.lock_all(pieces);
        if !write {
            each_piece(pieces, &mut self.expected, |place, bytes| memory.backing.write(place, bytes))
                .map_err(gone)?;
        }
        let began = Instant::now();
        let result = match write {
            true => scene.write(iova, &self.expected),
            false => scene.read(iova, &mut self.found),
        };
        let time = began.elapsed();
        match (result, ends) {
            (Ok(()), Ends::Fault) => {
                return Err(format!("a DMA at {iova:#x} was refused, and is let through"));
            }
            (Err(fault), Ends::Fault | Ends::Either) if fault.reason != DmaFaultReason::MemoryGone => {
                findings.faults_as_recorded += 1;
                return Ok(());
            }
            (Ok(()), Ends::Either) => return Ok(()),
            (Err(fault), _) => return Err(fault.to_string()),
            (Ok(()), Ends::Done(_)) => {}
        }
        findings.record(Call::Dma, time);
        findings.dma_bytes = findings.dma_bytes.saturating_add(bytes);
        if write {
            each_piece(pieces, &mut self.found, |place, bytes| memory.backing.read(place, bytes))
                .map_err(gone)?;
        }
        if self.found == self.expected {
            return Ok(());
        }
        let at = self.found.iter().zip(&self.expected).position(|(found, expected)| found != expected);
        let at = iova + at.unwrap_or(0) as u64;
        let who = if write { "the device wrote" } else { "the device read" };
        Err(format!("{who} at {at:#x}, and the bytes are not those of the memory"))
    }

    /// Moves one piece: `write` means to memory.
    fn piece(
        &mut self,
        scene: &dyn Scene,
        mapping: &Mapping,
        offset: u64,
        length: u64,
        write: bool,
        findings: &mut Findings,
    ) -> Result<(), String> {
        // At most a piece.
        let size = length as usize;
        self.expected.resize(size, 0);
        self.found.resize(size, 0);
        fill(&mut self.expected, mapping.line, offset, write);
        let iova = mapping.iova + offset;
        let place = mapping.memory + (iova - mapping.pages.first());
        let memory = &self.memory;
        let _nobody_else = memory.lock(place, length);
        let gone = |error: ioasid::MemoryGone| error.to_string();
        if write {
            let began = Instant::now();
            let written = scene.write(iova, &self.expected);
            findings.record(Call::Dma, began.elapsed());
            written.map_err(|fault| fault.to_string())?;
            memory.backing.read(place, &mut self.found).map_err(gone)?;
        } else {
            memory.backing.write(place, &self.expected).map_err(gone)?;
            let began = Instant::now();
            let read = scene.read(iova, &mut self.found);
            findings.record(Call::Dma, began.elapsed());
            read.map_err(|fault| fault.to_string())?;
        }
        findings.dma_bytes = findings.dma_bytes.saturating_add(length);
        if self.found == self.expected {
            return Ok(());
        }
        let at = self.found.iter().zip(&self.expected).position(|(found, expected)| found != expected);
        let at = iova + at.unwrap_or(0) as u64;
        let who = if write { "the device wrote" } else { "the device read" };
        Err(format!("{who} at {at:#x}, and the bytes are not those of the mapping"))
    }
}
