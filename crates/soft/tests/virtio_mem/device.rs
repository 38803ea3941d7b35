//! A device that reads and writes all over the region, and holds what it finds against what must be there.

use crate::random::Random;
use crate::region::{BASE, BLOCKS, PAGE, Phase, Region, STAMP, WATCHED, judge, page_of, stamp};
use ioasid::{Device, Permissions, Rid, Space, Table, Translated, epoch};
use ioasid_soft::dma::{DmaFault, DmaFaultReason, DmaPort};
use ioasid_soft::iommu::{DmaSegment, Port, SoftIommu, TableKind};
use std::fmt;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

/// The most pages that one DMA touches: those at both sides of a border between two blocks.
const WINDOW: u64 = WATCHED / BLOCKS;
/// Stands in a buffer before it is filled.
const MARK: u8 = 0xa5;
/// Where in a page the places of the devices begin.
const PLACES: u64 = STAMP as u64;

/// A device on a table of some kind.
pub(crate) struct VirtualDevice {
    kind: TableKind,
    port: Arc<Port>,
    device: Device,
    table: Arc<Table>,
}

/// What a device has done.
#[derive(Debug, Default)]
pub(crate) struct Done {
    reads: u64,
    writes: u64,
    /// How many of both have faulted, as they had to or as they might.
    pub(crate) faults: u64,
    /// Pages at which something happened during a DMA, so that a fault or none was right.
    undecided: u64,
    /// Pages that had to be reached and were, and that had to fault and did.
    reached: u64,
    refused: u64,
}

impl fmt::Display for Done {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{} reads, {} writes, {} faults; {} pages were reached and {} refused as they had to be, {} were changing",
            self.reads, self.writes, self.faults, self.reached, self.refused, self.undecided
        )
    }
}

/// What a device remembers of its own place in a page: what it has written there last.
#[derive(Clone, Copy)]
struct Written {
    /// How often the page had been plugged by then.
    plug: u64,
    /// `None`: it has met a change, and may have arrived or not.
    value: Option<u64>,
}

impl VirtualDevice {
    pub(crate) fn attach(kind: TableKind, iommu: &Arc<SoftIommu>, space: &Arc<Space>) -> VirtualDevice {
        let rid = (0..).map(Rid).find(|rid| ioasid::Iommu::requirements(&**iommu, *rid).is_none()).unwrap();
        let port = iommu.add_device(rid, kind).unwrap();
        let device = Device::new(iommu.clone(), rid).unwrap();
        let table = Table::for_device(space, &device).unwrap();
        device.attach(&table).unwrap();
        VirtualDevice { kind, port, device, table }
    }

    pub(crate) fn detach(&mut self) {
        self.device.detach();
        assert_eq!(self.port.read(BASE, &mut [0]).unwrap_err().reason, DmaFaultReason::Blocked);
    }

    pub(crate) fn name(&self) -> &'static str {
        self.kind.name()
    }

    pub(crate) fn table(&self) -> &Arc<Table> {
        &self.table
    }

    /// How many faults the IOMMU has written down.
    pub(crate) fn faults(&self) -> u64 {
        self.port.statistics().faults
    }

    /// Does DMA until it is told to end.
    pub(crate) fn work(&self, number: usize, region: &Region, least: u64, ended: &AtomicBool) -> Done {
        let mut worker = Worker {
            port: &self.port,
            space: self.table.space(),
            name: self.name(),
            number: number as u64,
            region,
            random: Random::new(1000 + number as u64),
            written: vec![Written { plug: 0, value: None }; WATCHED as usize],
            buffer: vec![0; (WINDOW * PAGE) as usize],
            done: Done::default(),
        };
        while !ended.load(Ordering::SeqCst) || worker.done.reads + worker.done.writes < least {
            let pages = worker.choose();
            match worker.random.below(16) {
                0 => worker.slowly(pages.start),
                1..5 => worker.write(pages),
                _ => worker.read(pages),
            }
            // Where there are fewer processors than threads: better here than in the middle of a DMA, which an unmap would
            // have to wait for until this thread gets its turn again.
            std::thread::yield_now();
        }
        worker.done
    }
}

/// A device at work.
struct Worker<'a> {
    port: &'a Port,
    space: &'a Arc<Space>,
    name: &'static str,
    number: u64,
    region: &'a Region,
    random: Random,
    /// What stands in its own place, for each watched page.
    written: Vec<Written>,
    buffer: Vec<u8>,
    done: Done,
}

fn iova(watched: u64) -> u64 {
    BASE + page_of(watched) * PAGE
}

impl Worker<'_> {
    /// Watched pages in one piece: anywhere, or near what is being plugged or unplugged.
    fn choose(&mut self) -> Range<u64> {
        let border = match self.random.below(4) {
            choice @ 0..2 => self.region.block_at_work(choice == 0) + self.random.below(2),
            _ => self.random.below(BLOCKS + 1),
        };
        let (low, high) = ((border * WINDOW).saturating_sub(WINDOW / 2), border * WINDOW + WINDOW / 2);
        let high = high.min(WATCHED);
        let first = low + self.random.below(high - low);
        first..first + 1 + self.random.below(high - first)
    }

    fn phases(&self, pages: &Range<u64>) -> Vec<Phase> {
        pages.clone().map(|watched| self.region.phase(watched)).collect()
    }

    /// The own place in a page.
    fn place(&self) -> u64 {
        PLACES + self.number * STAMP as u64
    }

    /// Reads whole pages in one DMA.
    fn read(&mut self, pages: Range<u64>) {
        self.done.reads += 1;
        let first = iova(pages.start);
        let mut buffer = std::mem::take(&mut self.buffer);
        let bytes = &mut buffer[..((pages.end - pages.start) * PAGE) as usize];
        bytes.iter_mut().step_by(PAGE as usize).for_each(|byte| *byte = MARK);
        let before = self.phases(&pages);
        let result = self.port.read(first, bytes);
        let after = self.phases(&pages);
        // Where it ended: behind the last page, or in the one that has faulted.
        let reached = self.pages_before(&pages, result);
        let settled = before.iter().all(|phase| phase.is_settled()) && before == after;
        if result.is_err() && settled {
            let untouched = bytes.iter().step_by(PAGE as usize).all(|byte| *byte == MARK);
            assert!(untouched, "{}: bytes have moved before the fault at {reached}", self.name);
        }
        let checked = pages.clone().zip(before.into_iter().zip(after)).zip(bytes.chunks_exact(PAGE as usize));
        for ((watched, (before, after)), bytes) in checked {
            let found = match result {
                Ok(()) => Some(&bytes[..STAMP]),
                Err(_) if watched == reached => None,
                // What comes after a fault was not looked at.
                Err(_) => continue,
            };
            self.judge(watched, before, after, found);
            if result.is_ok() {
                self.check_own(watched, before, after, &bytes[self.place() as usize..][..STAMP]);
            }
        }
        self.buffer = buffer;
    }

    /// Writes to the own place in each page, with one list.
    fn write(&mut self, pages: Range<u64>) {
        self.done.writes += 1;
        let value = self.done.writes;
        let segments: Vec<DmaSegment> = pages
            .clone()
            .map(|watched| DmaSegment { iova: iova(watched) + self.place(), length: STAMP as u64 })
            .collect();
        let bytes: Vec<u8> =
            pages.clone().flat_map(|watched| stamp([page_of(watched), value, 1 + self.number])).collect();
        let before = self.phases(&pages);
        let result = self.port.write_list(&segments, &bytes);
        let after = self.phases(&pages);
        let reached = self.pages_before(&pages, result.map(drop).map_err(|partial| partial.fault));
        let moved = result.unwrap_or_else(|partial| partial.moved);
        assert_eq!(moved, (reached - pages.start) * STAMP as u64, "{}", self.name);
        for (watched, (before, after)) in pages.zip(before.into_iter().zip(after)) {
            if watched > reached {
                break;
            }
            let arrived = watched < reached;
            // A device that writes is told no bytes: those that had to be there are right.
            let any = stamp([page_of(watched), after.plugs(), 0]);
            self.judge(watched, before, after, arrived.then_some(&any[..]));
            self.note_written(watched, before, after, arrived.then_some(value));
        }
    }

    /// Notes that a value has arrived, or may have.
    fn note_written(&mut self, watched: u64, before: Phase, after: Phase, value: Option<u64>) {
        if before != after {
            self.written[watched as usize] = Written { plug: after.plugs(), value: None };
        } else if value.is_some() {
            self.written[watched as usize] = Written { plug: after.plugs(), value };
        }
    }

    /// A DMA to one page that takes its time between finding the memory and copying, as any can: an unmap has to wait for
    /// it all the same.
    fn slowly(&mut self, watched: u64) {
        let (write, value) = (self.random.below(2) == 0, self.done.writes + 1);
        let (place, wanted) = if write { (self.place(), Permissions::WRITE) } else { (0, Permissions::READ) };
        let mut bytes = if write { stamp([page_of(watched), value, 1 + self.number]) } else { [MARK; STAMP] };
        let before = self.region.phase(watched);
        let arrived = {
            let section = epoch::dma();
            let translation = self.port.translate(&section, iova(watched) + place, wanted).ok();
            translation.map(|translation| {
                std::thread::yield_now();
                match self.space.memory_at(&section, translation.oa) {
                    Ok(Translated::Here(memory)) if write => memory.write(&bytes).unwrap(),
                    Ok(Translated::Here(memory)) => memory.read(&mut bytes).unwrap(),
                    _ => panic!("{}: no memory where {:#x} leads", self.name, iova(watched)),
                }
            })
        };
        let after = self.region.phase(watched);
        let any = stamp([page_of(watched), after.plugs(), 0]);
        self.judge(watched, before, after, arrived.map(|()| if write { &any[..] } else { &bytes[..] }));
        if write {
            self.done.writes += 1;
            self.note_written(watched, before, after, arrived.map(|()| value));
        } else {
            self.done.reads += 1;
        }
    }

    /// The first page that was not reached.
    fn pages_before(&mut self, pages: &Range<u64>, result: Result<(), DmaFault>) -> u64 {
        let Err(fault) = result else { return pages.end };
        self.done.faults += 1;
        assert_eq!(fault.reason, DmaFaultReason::NotMapped, "{}", self.name);
        let reached = pages.clone().find(|watched| fault.iova - fault.iova % PAGE == iova(*watched));
        reached.unwrap_or_else(|| panic!("{}: {fault}, which is none of its pages", self.name))
    }

    fn judge(&mut self, watched: u64, before: Phase, after: Phase, found: Option<&[u8]>) {
        if let Err(mistake) = judge(watched, before, after, found) {
            panic!("{}: {mistake:?} at {:#x}, {before:?} to {after:?}", self.name, iova(watched));
        }
        match found {
            _ if before != after || !before.is_settled() => self.done.undecided += 1,
            Some(_) => self.done.reached += 1,
            None => self.done.refused += 1,
        }
    }

    /// Holds what stands in the own place against what was written there last.
    fn check_own(&self, watched: u64, before: Phase, after: Phase, found: &[u8]) {
        if before != after || !before.is_plugged() {
            return;
        }
        let Written { plug, value } = self.written[watched as usize];
        let right = match value {
            // Plugged again since, and clean.
            _ if plug < before.plugs() => found.iter().all(|byte| *byte == 0),
            Some(value) => found == stamp([page_of(watched), value, 1 + self.number]),
            None => return,
        };
        assert!(right, "{}: not what it wrote itself, at {:#x}", self.name, iova(watched));
    }
}
