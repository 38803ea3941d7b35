//! Looking on during a run: each call as a line, and what the summary at the end is made of.
//!
//! Nothing here grows with the length of the run: there are few kinds of calls, a histogram of times has a fixed size, and the
//! hints and what was left are bounded.

use std::collections::BTreeMap;
use std::io::{self, Write};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use hdrhistogram::Histogram;
use ioasid_run::{CallKind, WatchedCall, Watcher, What};
use ioasid_server::decode::Failed;
use ioasid_server::{Event, Observer};
use serde::Serialize;

use super::hints::Hints;
use crate::quantity::{Bytes, time};

/// How many closes with something left are told apart; the others are counted.
const MOST_LEFT: usize = 64;
/// Longer than any call should take; what takes longer is counted as this, in nanoseconds.
const LONGEST: u64 = 3_600_000_000_000;

/// What a run is watched with.
pub(super) struct Watch {
    began: Instant,
    lines: Option<Mutex<Lines>>,
    collected: Option<Mutex<Collected>>,
}

impl std::fmt::Debug for Watch {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Watch").finish_non_exhaustive()
    }
}

/// Where lines go, until that fails.
struct Lines {
    output: Box<dyn Write + Send>,
    failed: Option<io::Error>,
}

/// What the summary is made of.
#[derive(Debug, Default)]
pub(super) struct Collected {
    pub(super) kinds: BTreeMap<CallKind, Times>,
    pub(super) hints: Hints,
    pub(super) left: Vec<Left>,
    /// Closes that left something and are not in the list.
    pub(super) more_left: u64,
}

/// The calls of one kind.
#[derive(Debug)]
pub(super) struct Times {
    pub(super) failed: u64,
    pub(super) total: Duration,
    /// In nanoseconds, to one part in a hundred.
    pub(super) times: Histogram<u64>,
}

impl Default for Times {
    fn default() -> Self {
        // The bounds are constants: from a nanosecond on, with two digits.
        let times = Histogram::new_with_bounds(1, LONGEST, 2).expect("these bounds are allowed");
        Self { failed: 0, total: Duration::ZERO, times }
    }
}

/// What was there when a file was closed for the last time.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub(super) struct Left {
    /// The file that was closed: `iommu1` or `vfio0`.
    pub(super) file: String,
    /// A device: the page table that it was still attached to.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) attached_to: Option<u32>,
    /// A device: how many of its PASIDs were still attached.
    #[serde(skip_serializing_if = "is_zero")]
    pub(super) pasids: usize,
    /// An open `/dev/iommu`: the address spaces that had something mapped.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub(super) mapped: Vec<LeftMapped>,
    /// Who was charged for pinned pages at that moment, and for how many.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub(super) charged: Vec<(String, u64)>,
}

fn is_zero(count: &usize) -> bool {
    *count == 0
}

/// What was mapped in one address space.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub(super) struct LeftMapped {
    pub(super) ioas: u32,
    pub(super) areas: usize,
    pub(super) bytes: u64,
    /// Whose memory that was, of the first areas.
    pub(super) sources: Vec<String>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Watch {
    pub(super) fn new(lines: Option<Box<dyn Write + Send>>, collect: bool) -> Self {
        Self {
            began: Instant::now(),
            lines: lines.map(|output| Mutex::new(Lines { output, failed: None })),
            collected: collect.then(Mutex::default),
        }
    }

    /// What has been collected.
    pub(super) fn take_collected(&self) -> Collected {
        self.collected.as_ref().map(|collected| std::mem::take(&mut *lock(collected))).unwrap_or_default()
    }

    /// Writes out what is still in buffers.
    ///
    /// # Errors
    /// Not all lines could be written, now or before.
    pub(super) fn finish_lines(&self) -> io::Result<()> {
        let Some(lines) = &self.lines else { return Ok(()) };
        let mut lines = lock(lines);
        match lines.failed.take() {
            Some(error) => Err(error),
            None => lines.output.flush(),
        }
    }

    fn print(&self, call: &WatchedCall, what: &What) {
        let Some(lines) = &self.lines else { return };
        let line = describe(self.began.elapsed(), call, what);
        let mut lines = lock(lines);
        if lines.failed.is_none() {
            // The program runs on, whatever becomes of the lines.
            lines.failed = lines.output.write_all(line.as_bytes()).err();
        }
    }
}

/// One call as a line: when, who, on what, what, and how it ended.
pub(super) fn describe(since: Duration, call: &WatchedCall, what: &What) -> String {
    let text = match what {
        What::Open { path, result } => match result {
            Ok(Some(file)) => format!("open {} -> {file}", path.display()),
            Ok(None) => format!("open {} -> a text", path.display()),
            Err(errno) => format!("open {} -> {}", path.display(), Failed(*errno)),
        },
        What::Ioctl(captured) => format!("{} {captured}", captured.file()),
        What::Access { file, write, offset, length, result } => {
            let (region, within) = (offset >> 40 & 0xff, offset & ((1 << 40) - 1));
            let name = if *write { "pwrite" } else { "pread" };
            let end = match result {
                Ok(count) => count.to_string(),
                Err(errno) => Failed(*errno).to_string(),
            };
            format!("{file} {name} region={region} offset={within:#x} len={length} -> {end}")
        }
        _ => String::new(),
    };
    let taken = time(call.time).replace(' ', "");
    format!("{:>10.6} {} {text}, {taken}\n", since.as_secs_f64(), call.thread)
}

impl Watcher for Watch {
    fn called(&self, call: &WatchedCall) {
        if let Some(what) = &call.what {
            self.print(call, what);
        }
        let Some(collected) = &self.collected else { return };
        let mut collected = lock(collected);
        let times = collected.kinds.entry(call.kind).or_default();
        times.total = times.total.saturating_add(call.time);
        times.times.saturating_record(u64::try_from(call.time.as_nanos()).unwrap_or(u64::MAX));
        let failed = match &call.what {
            Some(What::Open { result, .. }) => result.is_err(),
            Some(What::Ioctl(captured)) => captured.result().is_err(),
            Some(What::Access { result, .. }) => result.is_err(),
            _ => false,
        };
        times.failed += u64::from(failed);
        if let Some(What::Ioctl(captured)) = &call.what {
            collected.hints.see(call.process, captured);
        }
    }
}

impl Observer for Watch {
    fn happened(&self, event: &Event<'_>) {
        let (Some(collected), Event::Closing { device, context, accounts }) = (&self.collected, event) else {
            return;
        };
        let charged: Vec<_> = accounts
            .iter()
            .filter(|account| account.charged_pages > 0)
            .map(|account| (account.name.clone(), account.charged_pages))
            .collect();
        let left = match device {
            Some(number) => {
                let path = format!("/dev/vfio/devices/vfio{number}");
                let device = context.devices.iter().find(|device| device.path == path);
                let (attached_to, pasids) =
                    device.map_or((None, 0), |device| (device.attached_to, device.pasid_count));
                let file = format!("vfio{number}");
                let left = attached_to.is_some() || pasids > 0;
                left.then_some(Left { file, attached_to, pasids, mapped: Vec::new(), charged })
            }
            None => {
                let spaces = context.address_spaces.iter().filter(|space| space.area_count > 0);
                let mapped: Vec<_> = spaces
                    .map(|space| {
                        let mut sources: Vec<_> =
                            space.areas.iter().map(|area| area.source.clone()).collect();
                        sources.sort_unstable();
                        sources.dedup();
                        LeftMapped {
                            ioas: space.id,
                            areas: space.area_count,
                            bytes: u64::try_from(space.mapped_bytes).unwrap_or(u64::MAX),
                            sources,
                        }
                    })
                    .collect();
                let file = format!("iommu{}", context.number);
                (!mapped.is_empty()).then_some(Left { file, attached_to: None, pasids: 0, mapped, charged })
            }
        };
        let Some(left) = left else { return };
        let mut collected = lock(collected);
        if collected.left.len() < MOST_LEFT {
            collected.left.push(left);
        } else {
            collected.more_left += 1;
        }
    }
}

impl Left {
    /// For people.
    pub(super) fn describe(&self) -> String {
        let mut parts = Vec::new();
        if let Some(table) = self.attached_to {
            parts.push(format!("attached to page table {table}"));
        }
        match self.pasids {
            0 => {}
            1 => parts.push("1 PASID attached".to_owned()),
            pasids => parts.push(format!("{pasids} PASIDs attached")),
        }
        for mapped in &self.mapped {
            let areas =
                if mapped.areas == 1 { "1 area".to_owned() } else { format!("{} areas", mapped.areas) };
            let sources = mapped.sources.join(", ");
            parts.push(format!("ioas {}: {areas}, {} of {sources}", mapped.ioas, Bytes(mapped.bytes)));
        }
        for (name, pages) in &self.charged {
            parts.push(format!("{} pinned and charged to {name}", Bytes(pages.saturating_mul(4096))));
        }
        format!("{}: {}", self.file, parts.join("; "))
    }
}
