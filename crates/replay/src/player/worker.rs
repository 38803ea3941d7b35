//! The threads that do the work.
//!
//! A worker takes tasks from a bounded queue and counts, for all to see, how many it has done. That count is all there is between
//! workers: a task that comes after a step of another worker waits until that worker has done so many.

use super::disturbance::cut_and_mend;
use super::scene::{GuestMemory, Scene};
use super::transfer::{Buffers, Dma};
use super::{Disturbance, Disturbed, Mode, Options, PlayError};
use crate::live::{Mapping, Step};
use crate::statistics::{Call, LatencyCourse, Noted, Report, Times, histogram};
use ioasid::IovaRange;
use std::collections::HashSet;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::{self, Scope, ScopedJoinHandle};
use std::time::{Duration, Instant};

/// Tasks are handed over so many at a time.
const BATCH: usize = 128;
/// How many batches may wait for a worker.
const BATCHES: usize = 16;

/// What is to be done, when, and after what.
#[derive(Debug)]
pub(super) struct Task {
    /// Not before so much time has passed since the beginning.
    pub(super) due: Duration,
    /// When it was recorded, in nanoseconds after the first event.
    pub(super) recorded: u64,
    /// Steps of other workers.
    pub(super) after: Vec<Step>,
    pub(super) work: Work,
}

/// What is to be done.
#[derive(Debug)]
pub(super) enum Work {
    Map {
        scene: Arc<dyn Scene>,
        mapping: Mapping,
    },
    /// With a DMA for each mapping before (and, if that is asked for, a disturbance), or without.
    Unmap {
        scene: Arc<dyn Scene>,
        line: u64,
        pages: IovaRange,
        mappings: Vec<Mapping>,
        transfer: bool,
    },
    Transfer {
        scene: Arc<dyn Scene>,
        mapping: Mapping,
    },
    Attach {
        scene: Arc<dyn Scene>,
        line: u64,
    },
    Detach {
        scene: Arc<dyn Scene>,
    },
    Dma {
        scene: Arc<dyn Scene>,
        dma: Dma,
    },
}

/// How far a worker has come, on a cache line of its own.
#[derive(Debug, Default)]
#[repr(align(128))]
pub(super) struct Worker {
    done: AtomicU64,
    /// It will do no more.
    ended: AtomicBool,
    /// The lines of maps that were refused, as far as they were not unmapped since.
    refused: Mutex<HashSet<u64>>,
    /// Whether there are any.
    any_refused: AtomicBool,
}

impl Worker {
    fn refused(&self) -> MutexGuard<'_, HashSet<u64>> {
        self.refused.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether the mapping, which this worker made, was refused. It is asked once.
    fn take_refused(&self, mapping: &Mapping) -> bool {
        // Written before the step was counted, which whoever asks has waited for.
        self.any_refused.load(Ordering::Relaxed) && self.refused().remove(&mapping.line)
    }

    /// Returns when the worker has done so many steps, or has ended.
    fn wait_for(&self, number: u64) {
        let mut tries = 0u32;
        while self.done.load(Ordering::Acquire) < number && !self.ended.load(Ordering::Acquire) {
            tries = tries.saturating_add(1);
            match tries {
                0..100 => std::hint::spin_loop(),
                100..1000 => thread::yield_now(),
                _ => thread::sleep(Duration::from_micros(50)),
            }
        }
    }
}

/// The workers, as the reader sees them. When this is dropped they finish what they have and end.
pub(super) struct Workers<'a> {
    workers: &'a [Worker],
    queues: Vec<Queue>,
    /// What was handed out is not to be done any more.
    abandoned: &'a AtomicBool,
}

/// What one worker has been given.
struct Queue {
    sender: SyncSender<Vec<Task>>,
    /// Not handed over yet.
    batch: Vec<Task>,
    /// How many tasks there were, with those in the batch.
    count: u64,
}

impl<'a> Workers<'a> {
    /// Starts one thread for each worker.
    pub(super) fn start<'scope>(
        scope: &'scope Scope<'scope, '_>,
        workers: &'a [Worker],
        memory: &'scope Arc<GuestMemory>,
        abandoned: &'a AtomicBool,
        options: &Options,
    ) -> Result<(Workers<'a>, Vec<ScopedJoinHandle<'scope, Findings>>), PlayError>
    where
        'a: 'scope,
    {
        let began = Instant::now();
        let (mode, disturbance) = (options.mode, options.disturbance);
        let (mut queues, mut threads) = (Vec::new(), Vec::new());
        for number in 0..workers.len() {
            let (sender, receiver) = sync_channel(BATCHES);
            let builder = thread::Builder::new().name(format!("replay {number}"));
            let thread = builder
                .spawn_scoped(scope, move || {
                    let worker = Working {
                        workers,
                        own: &workers[number],
                        memory,
                        abandoned,
                        mode,
                        disturbance,
                        began,
                    };
                    worker.work(&receiver)
                })
                .map_err(PlayError::NoThread)?;
            queues.push(Queue { sender, batch: Vec::with_capacity(BATCH), count: 0 });
            threads.push(thread);
        }
        Ok((Workers { workers, queues, abandoned }, threads))
    }

    /// The step that the next task of a worker will be.
    pub(super) fn next_step(&self, worker: usize) -> Step {
        Step { worker, number: self.queues[worker].count + 1 }
    }

    pub(super) fn is_done(&self, step: Step) -> bool {
        self.workers[step.worker].done.load(Ordering::Acquire) >= step.number
    }

    /// Gives a task to a worker. If its queue is full, this waits.
    pub(super) fn hand_out(&mut self, worker: usize, task: Task) {
        let queue = &mut self.queues[worker];
        queue.batch.push(task);
        queue.count += 1;
        if queue.batch.len() >= BATCH {
            self.hand_over();
        }
    }

    /// Hands over what every worker has been given. All of them: a worker may be waiting for a task that is still here.
    fn hand_over(&mut self) {
        for queue in &mut self.queues {
            if !queue.batch.is_empty() {
                let batch = std::mem::replace(&mut queue.batch, Vec::with_capacity(BATCH));
                // A worker that has ended by itself has panicked, which is seen when it is joined.
                let _ = queue.sender.send(batch);
            }
        }
    }

    /// Has the workers end at once, whatever is still to be done and whenever that would be.
    pub(super) fn abandon(&self, threads: &[ScopedJoinHandle<'_, Findings>]) {
        self.abandoned.store(true, Ordering::Release);
        threads.iter().for_each(|thread| thread.thread().unpark());
    }

    /// Returns when everything that was handed out is done.
    pub(super) fn wait_for_all(&mut self) {
        self.hand_over();
        for (worker, queue) in self.workers.iter().zip(&self.queues) {
            worker.wait_for(queue.count);
        }
    }

    /// The lines of the maps that were refused and not unmapped since.
    pub(super) fn refused(&self) -> HashSet<u64> {
        self.workers.iter().flat_map(|worker| worker.refused().clone()).collect()
    }
}

impl Drop for Workers<'_> {
    fn drop(&mut self) {
        self.hand_over();
    }
}

/// What a worker has seen.
#[derive(Debug)]
pub(super) struct Findings {
    /// When the event that is being carried out was recorded.
    recorded: u64,
    course: LatencyCourse,
    map: Times,
    unmap: Times,
    dma: Times,
    pub(super) dma_bytes: u64,
    pub(super) faults_as_recorded: u64,
    refused: Noted,
    pub(super) wrong_dma: Noted,
    wrong_unmaps: Noted,
    disturbed: Disturbed,
}

impl Findings {
    pub(super) fn new() -> Findings {
        Findings {
            recorded: 0,
            course: LatencyCourse::new(),
            map: Times::new(),
            unmap: Times::new(),
            dma: Times::new(),
            dma_bytes: 0,
            faults_as_recorded: 0,
            refused: Noted::default(),
            wrong_dma: Noted::default(),
            wrong_unmaps: Noted::default(),
            disturbed: Disturbed::default(),
        }
    }

    /// A call for the event that is being carried out took so long.
    pub(super) fn record(&mut self, call: Call, time: Duration) {
        let times = match call {
            Call::Map => &mut self.map,
            Call::Unmap => &mut self.unmap,
            Call::Dma => &mut self.dma,
        };
        times.record(time);
        self.course.record(call, self.recorded, time);
    }

    pub(super) fn add(&mut self, other: Findings) {
        self.course.add(other.course);
        self.map.add(&other.map);
        self.unmap.add(&other.unmap);
        self.dma.add(&other.dma);
        self.dma_bytes = self.dma_bytes.saturating_add(other.dma_bytes);
        self.faults_as_recorded = self.faults_as_recorded.saturating_add(other.faults_as_recorded);
        self.refused.add(other.refused);
        self.wrong_dma.add(other.wrong_dma);
        self.wrong_unmaps.add(other.wrong_unmaps);
        self.disturbed.add(other.disturbed);
    }

    pub(super) fn report(self, report: &mut Report) {
        report.map = self.map.summary();
        report.unmap = self.unmap.summary();
        report.dma = self.dma.summary();
        report.dma_bytes = self.dma_bytes;
        let rate = |walks: u64| 1.0 - walks.min(report.dma.count) as f64 / report.dma.count as f64;
        report.iotlb_hit_rate = report.iotlb_walks.filter(|_| report.dma.count > 0).map(rate);
        report.faults_as_recorded = self.faults_as_recorded;
        report.faults = report.faults.map(|faults| faults.saturating_sub(self.faults_as_recorded));
        report.histogram = histogram(&self.map, &self.unmap, &self.dma);
        self.course.report(&mut report.course);
        let seconds = report.map.total_seconds + report.unmap.total_seconds;
        let calls = (report.map.count + report.unmap.count) as f64;
        report.calls_per_second = if seconds > 0.0 { calls / seconds } else { 0.0 };
        report.refused.add(self.refused);
        report.wrong_dma.add(self.wrong_dma);
        report.wrong_unmaps.add(self.wrong_unmaps);
        if let Some(disturbed) = &mut report.disturbed {
            disturbed.add(self.disturbed);
        }
    }
}

/// A worker at work.
struct Working<'a> {
    workers: &'a [Worker],
    own: &'a Worker,
    memory: &'a Arc<GuestMemory>,
    abandoned: &'a AtomicBool,
    mode: Mode,
    disturbance: Option<Disturbance>,
    began: Instant,
}

/// Says that the worker has ended, however it did, so that nobody waits for it for ever.
struct Ending<'a>(&'a Worker);

impl Drop for Ending<'_> {
    fn drop(&mut self) {
        self.0.ended.store(true, Ordering::Release);
    }
}

impl Working<'_> {
    fn work(&self, tasks: &Receiver<Vec<Task>>) -> Findings {
        let _ending = Ending(self.own);
        let mut findings = Findings::new();
        let mut buffers = Buffers::new(self.memory);
        let mut done = 0;
        for task in tasks.iter().flatten() {
            for step in &task.after {
                self.workers[step.worker].wait_for(step.number);
            }
            if !self.wait_until(task.due) {
                break;
            }
            findings.recorded = task.recorded;
            match task.work {
                Work::Map { scene, mapping } => self.map(&*scene, &mapping, &mut findings),
                Work::Unmap { scene, line, pages, mappings, transfer } => {
                    let buffers = transfer.then_some(&mut buffers);
                    self.unmap(&*scene, line, pages, &mappings, buffers, &mut findings);
                }
                Work::Attach { scene, line } => {
                    if let Err(error) = scene.attach() {
                        findings.refused.note(line, || format!("attach: {error}"));
                    }
                }
                Work::Detach { scene } => scene.detach(),
                Work::Dma { scene, dma } => buffers.dma(&*scene, &dma, &mut findings),
                Work::Transfer { scene, mapping } => {
                    if !self.own.refused().contains(&mapping.line) {
                        buffers.transfer(&*scene, &mapping, &mut findings);
                    }
                }
            }
            done += 1;
            self.own.done.store(done, Ordering::Release);
        }
        findings
    }

    /// Returns when it is time: false if there is nothing more to be done.
    fn wait_until(&self, due: Duration) -> bool {
        while !self.abandoned.load(Ordering::Acquire) {
            let early = due.saturating_sub(self.began.elapsed());
            if early.is_zero() {
                return true;
            }
            // Whoever abandons it all wakes us.
            thread::park_timeout(early);
        }
        false
    }

    fn map(&self, scene: &dyn Scene, mapping: &Mapping, findings: &mut Findings) {
        let began = Instant::now();
        let mapped = scene.map(mapping);
        let time = began.elapsed();
        match mapped {
            Ok(()) => findings.record(Call::Map, time),
            Err(error) => {
                self.own.refused().insert(mapping.line);
                self.own.any_refused.store(true, Ordering::Relaxed);
                findings.refused.note(mapping.line, || format!("map of {}: {error}", mapping.pages));
            }
        }
    }

    fn unmap(
        &self,
        scene: &dyn Scene,
        line: u64,
        pages: IovaRange,
        mappings: &[Mapping],
        mut buffers: Option<&mut Buffers>,
        findings: &mut Findings,
    ) {
        let mut expected = 0u64;
        for mapping in mappings {
            if !self.workers[mapping.step.worker].take_refused(mapping) {
                if let Some(buffers) = &mut buffers {
                    if let Some(Disturbance { seed, .. }) = self.disturbance {
                        cut_and_mend(scene, self.memory, mapping, seed, &mut findings.disturbed);
                    }
                    buffers.transfer(scene, mapping, findings);
                }
                expected = expected.saturating_add(mapping.page_bytes());
            }
        }
        let began = Instant::now();
        let unmapped = scene.unmap(pages, self.mode);
        let time = began.elapsed();
        match unmapped {
            Ok(unmapped) => {
                findings.record(Call::Unmap, time);
                if let Some(found) = unmapped.filter(|found| *found != expected) {
                    let what = || format!("unmap of {pages}: {found} bytes went, not {expected}");
                    findings.wrong_unmaps.note(line, what);
                }
                let ends = [pages.first(), pages.last()];
                if let Some(iova) = ends.into_iter().find(|iova| scene.reaches(*iova)) {
                    let what = || format!("unmap of {pages}: the device still reaches {iova:#x}");
                    findings.wrong_unmaps.note(line, what);
                }
            }
            Err(error) => findings.refused.note(line, || format!("unmap of {pages}: {error}")),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::player::space::SpaceScene;
    use crate::trace::Direction;
    use ioasid::{Account, Rid};
    use ioasid_soft::iommu::TableKind;

    fn mapping(line: u64, page: u64, memory: u64, direction: Direction) -> Mapping {
        let pages = IovaRange::with_length(page * 4096, 8192).unwrap();
        let step = Step { worker: 0, number: line };
        Mapping { line, pages, memory: memory * 4096, iova: pages.first() + 5, bytes: 8000, direction, step }
    }

    fn with_worker(work: impl FnOnce(&Working<'_>, &dyn Scene, &mut Findings)) -> Findings {
        let memory = Arc::new(GuestMemory::new(1 << 20, &Account::new("test", None)).unwrap());
        let scene = SpaceScene::new(&memory, Rid(1), TableKind::VtdSecondStage).unwrap();
        let worker = Worker::default();
        let workers = std::slice::from_ref(&worker);
        let abandoned = AtomicBool::new(false);
        let working = Working {
            workers,
            own: &worker,
            memory: &memory,
            abandoned: &abandoned,
            mode: Mode::Strict,
            disturbance: None,
            began: Instant::now(),
        };
        let mut findings = Findings::new();
        work(&working, &scene, &mut findings);
        findings
    }

    /// A space that translates to another page is found out, whichever way the bytes go.
    #[test]
    fn wrong_translations_are_noticed() {
        for direction in [Direction::ToDevice, Direction::FromDevice] {
            let findings = with_worker(|worker, scene, findings| {
                worker.map(scene, &mapping(2, 7, 16, direction), findings);
                // Other bytes, which are there when the wrong place is looked for.
                Buffers::new(worker.memory).transfer(scene, &mapping(1, 7, 16, direction), findings);
                assert_eq!(findings.wrong_dma.count, 0);
                Buffers::new(worker.memory).transfer(scene, &mapping(2, 7, 17, direction), findings);
            });
            assert_eq!(findings.wrong_dma.count, 1);
            assert!(findings.wrong_dma.first[0].what.contains("at 0x700"), "{:?}", findings.wrong_dma);
        }
    }

    #[test]
    fn dma_that_is_refused_and_unmaps_that_find_something_else_are_noticed() {
        let both = Direction::Bidirectional;
        let findings = with_worker(|worker, scene, findings| {
            worker.map(scene, &mapping(2, 7, 16, Direction::ToDevice), findings);
            let known = mapping(2, 7, 16, both);
            worker.unmap(scene, 3, known.pages, &[known], Some(&mut Buffers::new(worker.memory)), findings);
            assert_eq!((findings.wrong_dma.count, findings.wrong_unmaps.count), (1, 0));
            worker.unmap(scene, 4, known.pages, &[known], Some(&mut Buffers::new(worker.memory)), findings);
            assert_eq!(scene.counts().map(|counts| counts.faults), Some(2));
        });
        assert_eq!((findings.wrong_dma.count, findings.wrong_unmaps.count), (2, 1));
        assert!(findings.wrong_unmaps.first[0].what.contains("0 bytes went, not 8192"));
    }

    #[test]
    fn a_device_that_is_still_let_through_is_noticed() {
        let findings = with_worker(|worker, scene, findings| {
            let known = mapping(2, 7, 16, Direction::FromDevice);
            worker.map(scene, &known, findings);
            assert!(scene.reaches(known.pages.first()) && scene.reaches(known.pages.last()));
            worker.unmap(scene, 3, known.pages, &[known], Some(&mut Buffers::new(worker.memory)), findings);
            assert!(!scene.reaches(known.pages.first()) && !scene.reaches(known.pages.last()));
        });
        assert_eq!(findings.wrong_unmaps.count, 0);
    }
}
