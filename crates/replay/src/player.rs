//! Carrying out a trace.
//!
//! The calling thread reads. It decides for each event what it means ([`live`](crate::live)) and hands it to a worker: all events of
//! a processor to the same one, so that what one processor did in a row is done in a row. Between workers the order is kept where
//! it matters: an event names the steps of other workers that it comes after, and its worker waits until they are done. Those
//! are always earlier in the trace, and everything earlier has been handed out when a queue is waited for, so the earliest
//! event that is not done yet never waits for anything, and the replay ends.
//!
//! What a worker does with a mapping: it maps it; just before it is unmapped (or at the end of the trace) it has the device do
//! DMA through it and checks every byte, so that the mapping has stood while everything in between went on beside it; it unmaps,
//! and looks whether the device is still let through.
//!
//! A device whose first line is neither map nor unmap was recorded with its DMA (`ioasid record`): then that DMA is made, just so,
//! and no other. It comes after every change of its device before it and before every change after it, so that what was let through
//! is let through again, and what was refused is refused.
//!
//! Nothing grows with the length of the trace: queues are bounded, and so are [mappings](MOST_LIVE) and [devices](MOST_DEVICES).

use crate::live::{Latest, Live, Mapping, Meets, Misfit, Step};
use crate::statistics::{LeafCount, LiveCourse, Report};
use crate::trace::{DeviceAddress, Event, Malformed, Operation, Outcome, Trace, TraceError};
pub use disturbance::{Disturbance, Disturbed};
use disturbance::{Disturbers, Scenery};
use ioasid::{Account, AttachError, RegisterError, Rid};
use ioasid_soft::iommu::TableKind;
pub use peer::Peer;
use scene::{Counts, GuestMemory, Scene, Tables};
use space::SpaceScene;
use std::collections::BTreeMap;
use std::fmt;
use std::io::{self, Read};
use std::str::FromStr;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::thread;
use std::time::{Duration, Instant};
use transfer::{Dma, Ends};
use worker::{Findings, Task, Work, Worker, Workers};

mod disturbance;
mod peer;
mod scene;
mod space;
mod transfer;
mod worker;

/// How many mappings may be live at the same time, of all devices together.
pub const MOST_LIVE: u64 = 1 << 20;
/// How many devices a trace may have.
pub const MOST_DEVICES: usize = 1024;
/// With [`Speed::Recorded`], a longer time without an event is cut to this.
pub const LONGEST_PAUSE: Duration = Duration::from_secs(10);
/// How many threads there may be.
const MOST_THREADS: usize = 256;
/// How many unmapped ranges are remembered before those that nobody has to wait for are forgotten.
const REMEMBERED: usize = 1 << 14;
/// How many events go by between two calls of the observer.
const EVENTS_BETWEEN: u64 = 4096;

/// How unmaps are made.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Mode {
    /// Each waits until no device uses the memory any more.
    #[default]
    Strict,
    /// They leave the wait to a flush that serves many, as Linux does unless told otherwise.
    Deferred,
}

impl Mode {
    /// Its name: `strict` or `deferred`.
    pub fn name(self) -> &'static str {
        match self {
            Mode::Strict => "strict",
            Mode::Deferred => "deferred",
        }
    }
}

/// When events are carried out.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Speed {
    /// As soon as possible.
    #[default]
    Max,
    /// Not before their time in the recording.
    Recorded,
}

/// There is no mode or speed of this name.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{found:?} is not {expected}")]
pub struct UnknownName {
    found: String,
    expected: &'static str,
}

impl FromStr for Mode {
    type Err = UnknownName;

    fn from_str(name: &str) -> Result<Mode, UnknownName> {
        let known = [Mode::Strict, Mode::Deferred].into_iter().find(|mode| mode.name() == name);
        known.ok_or(UnknownName { found: name.to_owned(), expected: "strict or deferred" })
    }
}

impl FromStr for Speed {
    type Err = UnknownName;

    fn from_str(name: &str) -> Result<Speed, UnknownName> {
        match name {
            "max" => Ok(Speed::Max),
            "recorded" => Ok(Speed::Recorded),
            _ => Err(UnknownName { found: name.to_owned(), expected: "max or recorded" }),
        }
    }
}

impl fmt::Display for Mode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

/// How a trace is replayed.
#[derive(Clone, Debug)]
pub struct Options {
    /// What the devices walk.
    pub table: TableKind,
    /// What the trace is carried out by in place of our spaces. No peer has tables to choose from, and none defers its unmaps.
    pub peer: Option<Peer>,
    /// How unmaps are made.
    pub mode: Mode,
    /// How many threads do the work, 1 to 256. One more reads.
    pub threads: usize,
    /// When events are carried out.
    pub speed: Speed,
    /// Stop at the first malformed line or misfit, at once: what was read before it and is not done yet is not done any more.
    pub strict_input: bool,
    /// What is thrown in meanwhile, at our spaces alone, and not at those of devices whose DMA was recorded.
    pub disturbance: Option<Disturbance>,
    /// How many bytes of memory stand for the guest's: whole pages. Physical addresses beyond begin again at its start; only what
    /// DMA touches takes memory of the machine.
    pub memory: u64,
}

impl Default for Options {
    /// One thread on native tables, strict, as soon as possible, 8 GiB.
    fn default() -> Options {
        Options {
            table: TableKind::default(),
            peer: None,
            mode: Mode::default(),
            threads: 1,
            speed: Speed::default(),
            strict_input: false,
            disturbance: None,
            memory: 8 << 30,
        }
    }
}

/// Why there is no report.
#[derive(Debug, thiserror::Error)]
pub enum PlayError {
    /// An option is out of bounds.
    #[error("{0}")]
    Options(&'static str),
    /// What was given is no trace.
    #[error(transparent)]
    Trace(TraceError),
    /// A line is malformed, and the input should be right.
    #[error("line {line}: {reason}")]
    Malformed {
        /// The line's number.
        line: u64,
        /// What is wrong.
        reason: Malformed,
    },
    /// An event does not fit those before it, and the input should be right.
    #[error("line {line}: {misfit}")]
    Misfit {
        /// The line's number.
        line: u64,
        /// What is wrong.
        misfit: Misfit,
    },
    /// There is no memory to stand for the guest's.
    #[error("no memory for the guest's {bytes} bytes: {error}")]
    NoMemory {
        /// How much was asked for.
        bytes: u64,
        /// Why.
        error: io::Error,
    },
    /// The memory cannot be registered.
    #[error("the guest's memory cannot be registered: {0}")]
    Register(#[from] RegisterError),
    /// A device cannot be attached to a table of the kind.
    #[error("device {device} cannot be attached: {error}")]
    Attach {
        /// The device.
        device: DeviceAddress,
        /// Why.
        error: AttachError,
    },
    /// No thread to work with.
    #[error("no thread: {0}")]
    NoThread(io::Error),
}

/// A device as the reader knows it.
struct Known {
    scene: Arc<dyn Scene>,
    live: Live,
    /// Its first line is neither map nor unmap: its DMA was recorded.
    as_recorded: bool,
    /// Whether its DMA goes through its space.
    attached: bool,
    /// The latest maps, unmaps, attaches and detaches.
    changes: Latest,
    /// The latest DMA that was recorded.
    dma: Latest,
}

/// What the reading thread knows.
struct Reader<'a> {
    options: &'a Options,
    workers: Workers<'a>,
    scenery: &'a Scenery,
    disturbers: Disturbers<'a>,
    memory: Arc<GuestMemory>,
    devices: BTreeMap<DeviceAddress, Known>,
    live: crate::statistics::Live,
    /// The peak whose tables the report describes.
    described: u64,
    report: Report,
    /// The time of the event before, and when that is due.
    time: u64,
    due: Duration,
    /// The time of the first event, and how much later the latest was recorded.
    first: Option<u64>,
    recorded: u64,
    course: LiveCourse,
}

/// Replays a trace. The observer is told now and then how many events have been read.
///
/// # Errors
/// It is no trace, or with [`strict_input`](Options::strict_input) not a right one; the options are out of bounds; there is no
/// memory. What goes wrong in the replay itself is in the report, and so is a trace that ends in the middle.
pub fn play<R: Read>(
    trace: Trace<R>,
    options: &Options,
    observe: &mut dyn FnMut(u64),
) -> Result<Report, PlayError> {
    if !(1..=MOST_THREADS).contains(&options.threads) {
        return Err(PlayError::Options("there must be 1 to 256 threads"));
    }
    if options.memory < 1 << 20 || options.memory % crate::trace::PAGE != 0 {
        return Err(PlayError::Options("the guest's memory must be a MiB at least, and a multiple of 4 KiB"));
    }
    if options.peer.is_some() && options.mode != Mode::Strict {
        return Err(PlayError::Options("the peers unmap strictly and in no other way"));
    }
    if let Some(disturbance) = options.disturbance {
        if options.peer.is_some() {
            return Err(PlayError::Options("only our own spaces can be disturbed"));
        }
        if !(1..=Disturbance::MOST_THREADS).contains(&disturbance.threads) {
            return Err(PlayError::Options("there must be 1 to 16 threads that disturb"));
        }
    }
    let account = Account::new("replay", None);
    let scenery = Scenery::default();
    let abandoned = AtomicBool::new(false);
    let memory = Arc::new(GuestMemory::new(options.memory, &account)?);
    let workers: Vec<Worker> = (0..options.threads).map(|_| Worker::default()).collect();
    let (mut report, findings) = thread::scope(|scope| {
        let (queues, threads) = Workers::start(scope, &workers, &memory, &abandoned, options)?;
        let disturbers = Disturbers::start(scope, options.disturbance, &scenery, &account);
        let disturbers = disturbers.map_err(PlayError::NoThread)?;
        let mut reader = Reader {
            options,
            workers: queues,
            scenery: &scenery,
            disturbers,
            memory: memory.clone(),
            devices: BTreeMap::new(),
            live: Default::default(),
            described: 0,
            report: Report::new(options),
            time: 0,
            due: Duration::ZERO,
            first: None,
            recorded: 0,
            course: LiveCourse::new(),
        };
        let began = Instant::now();
        let ended = reader.read(trace, observe).and_then(|()| reader.finish(began));
        let Reader { mut report, workers, course, .. } = reader;
        course.report(&mut report.course);
        if ended.is_err() {
            workers.abandon(&threads);
        }
        drop(workers);
        let mut findings = Findings::new();
        for thread in threads {
            match thread.join() {
                Ok(found) => findings.add(found),
                Err(panic) => std::panic::resume_unwind(panic),
            }
        }
        ended.map(|()| (report, findings))
    })?;
    findings.report(&mut report);
    drop(scenery);
    drop(memory);
    report.left_charged_pages = account.charged_pages();
    Ok(report)
}

impl<'a> Reader<'a> {
    /// Hands out everything that the trace has.
    fn read<R: Read>(&mut self, trace: Trace<R>, observe: &mut dyn FnMut(u64)) -> Result<(), PlayError> {
        for (count, entry) in trace.enumerate() {
            match entry {
                Ok((line, event)) => self.event(line, &event)?,
                Err(TraceError::Malformed { line, reason }) if self.options.strict_input => {
                    return Err(PlayError::Malformed { line, reason });
                }
                Err(TraceError::Malformed { line, reason }) => {
                    self.report.malformed.note(line, || reason.to_string());
                }
                Err(error @ TraceError::Unreadable { .. }) => {
                    if self.options.strict_input {
                        return Err(PlayError::Trace(error));
                    }
                    self.report.unreadable = Some(error.to_string());
                }
                Err(error) => return Err(PlayError::Trace(error)),
            }
            if count as u64 % EVENTS_BETWEEN == 0 {
                observe(count as u64);
            }
        }
        Ok(())
    }

    fn misfit(&mut self, line: u64, misfit: Misfit) -> Result<(), PlayError> {
        if self.options.strict_input {
            return Err(PlayError::Misfit { line, misfit });
        }
        self.report.misfits.note(line, || misfit.to_string());
        let count = self.report.misfits_by_kind.entry(misfit.kind()).or_default();
        *count = count.saturating_add(1);
        Ok(())
    }

    /// When an event of this time is due. Recordings are in order; what is not is due at once.
    fn due(&mut self, time: u64) -> Duration {
        if self.options.speed == Speed::Recorded {
            self.due += Duration::from_nanos(time.saturating_sub(self.time)).min(LONGEST_PAUSE);
            self.time = time;
        }
        self.due
    }

    /// What a new device is replayed on. If its DMA was recorded, its space is not disturbed.
    fn scene(&self, device: DeviceAddress, as_recorded: bool) -> Result<Arc<dyn Scene>, PlayError> {
        if let Some(peer) = self.options.peer {
            return Ok(peer.scene(&self.memory));
        }
        // There are at most 1024.
        let rid = Rid(self.devices.len() as u16 + 1);
        let scene = SpaceScene::new(&self.memory, rid, self.options.table)
            .map_err(|error| PlayError::Attach { device, error })?;
        scene.space().filter(|_| !as_recorded).into_iter().for_each(|space| self.scenery.add(space));
        Ok(Arc::new(scene))
    }

    /// How much later than the first event one of this time was recorded. What is out of order is with the latest before it.
    fn recorded(&mut self, time: u64) -> u64 {
        let first = *self.first.get_or_insert(time);
        self.recorded = self.recorded.max(time.saturating_sub(first));
        self.recorded
    }

    fn event(&mut self, line: u64, event: &Event) -> Result<(), PlayError> {
        let pages = event.pages();
        let worker = event.cpu as usize % self.options.threads;
        let step = self.workers.next_step(worker);
        if !self.devices.contains_key(&event.device) {
            if self.devices.len() >= MOST_DEVICES {
                return self.misfit(line, Misfit::TooManyDevices { most: MOST_DEVICES });
            }
            let as_recorded = event.operation.is_recorded();
            let known = Known {
                scene: self.scene(event.device, as_recorded)?,
                live: Live::default(),
                as_recorded,
                attached: true,
                changes: Latest::default(),
                dma: Latest::default(),
            };
            self.devices.insert(event.device, known);
            self.report.devices = self.devices.len();
        }
        let Some(known) = self.devices.get_mut(&event.device) else { return Ok(()) };
        if !known.as_recorded && event.operation.is_recorded() {
            return self.misfit(line, Misfit::NotRecorded);
        }
        if !known.as_recorded && self.options.disturbance.is_some() && !Disturbance::leaves(&pages) {
            return self.misfit(line, Misfit::NotForAll { pages });
        }
        let (scene, transfer) = (known.scene.clone(), !known.as_recorded);
        let (mut after, work) = match event.operation {
            Operation::Map { physical } => {
                let Some(memory) = self.memory.place(physical, &pages) else {
                    return self.misfit(line, Misfit::LongerThanMemory { bytes: event.bytes });
                };
                if self.live.mappings >= MOST_LIVE {
                    return self.misfit(line, Misfit::TooManyMappings { most: MOST_LIVE });
                }
                let (iova, bytes, direction) = (event.range.first(), event.bytes, event.direction);
                let mapping = Mapping { line, pages, memory, iova, bytes, direction, step };
                let after = match known.live.map(mapping) {
                    Ok(after) => after,
                    Err(misfit) => return self.misfit(line, misfit),
                };
                self.live.mappings += 1;
                self.live.bytes = self.live.bytes.saturating_add(mapping.page_bytes());
                self.report.maps += 1;
                (after, Work::Map { scene, mapping })
            }
            Operation::Unmap => {
                let removed = match known.live.unmap(pages, step) {
                    Ok(removed) => removed,
                    Err(misfit) => return self.misfit(line, misfit),
                };
                if known.live.remembered() >= REMEMBERED {
                    known.live.forget(|step| self.workers.is_done(step));
                }
                for mapping in &removed.mappings {
                    self.live.mappings -= 1;
                    self.live.bytes = self.live.bytes.saturating_sub(mapping.page_bytes());
                }
                if removed.hole {
                    self.misfit(line, Misfit::Hole { pages })?;
                }
                self.report.unmaps += 1;
                let mappings = removed.mappings;
                (removed.after, Work::Unmap { scene, line, pages, mappings, transfer })
            }
            Operation::Attach | Operation::Detach => {
                known.attached = event.operation == Operation::Attach;
                self.report.attaches += 1;
                let mut after = Vec::new();
                known.changes.add_to(&mut after, worker);
                (after, if known.attached { Work::Attach { scene, line } } else { Work::Detach { scene } })
            }
            Operation::Read(outcome) | Operation::Write(outcome) => {
                let write = matches!(event.operation, Operation::Write(_));
                let meets =
                    if known.attached { known.live.meets(event.range, write) } else { Meets::Nothing };
                let ends = match (outcome, meets) {
                    (Outcome::Done | Outcome::Gone, Meets::Memory(pieces)) => Ends::Done(pieces),
                    (Outcome::Done | Outcome::Gone, _) => {
                        return self.misfit(line, Misfit::DmaNotMapped { range: event.range });
                    }
                    (Outcome::Fault, Meets::Memory(_)) => {
                        return self.misfit(line, Misfit::DmaMapped { range: event.range });
                    }
                    (Outcome::Fault, Meets::OtherDirection) if !write => Ends::Either,
                    (Outcome::Fault, _) => Ends::Fault,
                };
                self.report.recorded_dma += 1;
                let mut after = Vec::new();
                known.changes.add_to(&mut after, worker);
                let (iova, bytes) = (event.range.first(), event.bytes);
                (after, Work::Dma { scene, dma: Dma { line, iova, bytes, write, ends } })
            }
        };
        if let Some(known) = self.devices.get_mut(&event.device) {
            if matches!(work, Work::Dma { .. }) {
                known.dma.note(step);
            } else {
                known.dma.add_to(&mut after, worker);
                known.changes.note(step);
            }
        }
        self.report.events += 1;
        let (due, recorded) = (self.due(event.time), self.recorded(event.time));
        self.workers.hand_out(worker, Task { due, recorded, after, work });
        self.course.record(recorded, self.live);
        self.note_peak();
        Ok(())
    }

    /// Looks whether there were never so many mappings. If there are clearly more than when the tables were described last, they
    /// are described again: everything handed out is waited for, which happens some dozens of times in a trace.
    fn note_peak(&mut self) {
        let peak = &mut self.report.peak;
        peak.bytes = peak.bytes.max(self.live.bytes);
        if self.live.mappings <= peak.mappings {
            return;
        }
        peak.mappings = self.live.mappings;
        if self.live.mappings > self.described + self.described / 8 {
            self.describe();
        }
    }

    /// Writes down what the tables look like now.
    fn describe(&mut self) {
        self.workers.wait_for_all();
        self.described = self.live.mappings;
        let tables: Option<Vec<Tables>> = self.devices.values().map(|known| known.scene.tables()).collect();
        let Some(tables) = tables else { return };
        let mut leaves = BTreeMap::<u64, u64>::new();
        for LeafCount { leaf_bytes, count } in tables.iter().flat_map(|tables| &tables.leaves) {
            *leaves.entry(*leaf_bytes).or_default() += count;
        }
        let counts = leaves.into_iter().filter(|(_, count)| *count > 0);
        self.report.leaves =
            Some(counts.map(|(leaf_bytes, count)| LeafCount { leaf_bytes, count }).collect());
        let bytes = tables.iter().map(|tables| tables.bytes).fold(0, u64::saturating_add);
        self.report.table_bytes = Some(bytes);
    }

    /// Has what is live used once more, stops the clock, and then unmaps everything.
    fn finish(&mut self, began: Instant) -> Result<(), PlayError> {
        self.report.live_at_end = self.live;
        for known in self.devices.values().filter(|known| !known.as_recorded) {
            for mapping in known.live.mappings() {
                // By the worker that made it, after it did.
                let (scene, mapping) = (known.scene.clone(), *mapping);
                let Step { worker, .. } = mapping.step;
                let work = Work::Transfer { scene, mapping };
                let (due, recorded) = (self.due, self.recorded);
                self.workers.hand_out(worker, Task { due, recorded, after: Vec::new(), work });
            }
        }
        self.workers.wait_for_all();
        let elapsed = began.elapsed().as_secs_f64();
        self.report.elapsed_seconds = elapsed;
        self.report.events_per_second = if elapsed > 0.0 { self.report.events as f64 / elapsed } else { 0.0 };
        let counts: Option<Vec<Counts>> = self.devices.values().map(|known| known.scene.counts()).collect();
        let counts = counts.filter(|_| self.options.peer.is_none());
        let sum = |which: fn(&Counts) -> u64| {
            counts.as_ref().map(|counts| counts.iter().map(which).fold(0, u64::saturating_add))
        };
        self.report.faults = sum(|counts| counts.faults);
        self.report.iotlb_walks = sum(|counts| counts.walks);
        let disturbed = self.disturbers.end();
        self.report.disturbed = self.options.disturbance.map(|_| disturbed);
        let refused = self.workers.refused();
        for (device, known) in std::mem::take(&mut self.devices) {
            let expected = known.live.mappings().filter(|mapping| !refused.contains(&mapping.line));
            let expected = expected.map(Mapping::page_bytes).fold(0, u64::saturating_add);
            let what = match known.scene.clear() {
                Ok(found) if found.is_none_or(|found| found == expected) => continue,
                Ok(found) => format!("{} bytes mapped, not {expected}", found.unwrap_or_default()),
                Err(error) => error,
            };
            self.report.wrong_unmaps.note(0, || format!("at the end, device {device}: {what}"));
        }
        Ok(())
    }
}
