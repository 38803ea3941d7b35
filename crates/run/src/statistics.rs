//! How many calls were served and how long they took, by kind.

use std::collections::BTreeMap;
use std::time::Duration;

/// A kind of call. The ioctl commands that come here differ only in their low byte, so there are few kinds.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[non_exhaustive]
pub enum CallKind {
    /// `open`, `openat`, `openat2` or `creat` of one of our files.
    Open,
    /// One of these of another file, handed back to the kernel.
    OpenElsewhere,
    /// An `ioctl` with this command on one of our files.
    Ioctl(u32),
    /// An `ioctl` of this type on another file, handed back to the kernel.
    IoctlElsewhere,
    /// A positioned read of a device region.
    Read,
    /// A positioned write of a device region.
    Write,
    /// An `mmap` of one of our files.
    Map,
    /// An `mmap` of another file, handed back to the kernel.
    MapElsewhere,
    /// Anything else, handed back to the kernel.
    Other,
}

impl CallKind {
    /// The kind of the same call on a file that is not ours.
    pub(crate) fn elsewhere(self) -> Self {
        match self {
            Self::Open => Self::OpenElsewhere,
            Self::Ioctl(_) => Self::IoctlElsewhere,
            Self::Map => Self::MapElsewhere,
            Self::Read | Self::Write => Self::Other,
            other => other,
        }
    }
}

/// What the calls of one kind add up to. Times are those of the supervisor, from when it has received a request to when
/// it has the answer; the way between client and supervisor comes on top.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct CallTotals {
    /// How many there were.
    pub calls: u64,
    /// How many of them failed with an errno of ours.
    pub failures: u64,
    /// The time they took together.
    pub total: Duration,
    /// The time that the longest one took.
    pub longest: Duration,
}

/// Counts of calls by kind.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Statistics {
    by_kind: BTreeMap<CallKind, CallTotals>,
}

impl Statistics {
    /// The totals of each kind that occurred.
    pub fn iter(&self) -> impl Iterator<Item = (CallKind, CallTotals)> + '_ {
        self.by_kind.iter().map(|(kind, totals)| (*kind, *totals))
    }

    /// The totals of one kind.
    pub fn get(&self, kind: CallKind) -> CallTotals {
        self.by_kind.get(&kind).copied().unwrap_or_default()
    }

    pub(crate) fn record(&mut self, kind: CallKind, failed: bool, time: Duration) {
        let totals = self.by_kind.entry(kind).or_default();
        totals.add(&CallTotals { calls: 1, failures: u64::from(failed), total: time, longest: time });
    }

    pub(crate) fn merge(&mut self, other: &Self) {
        for (kind, totals) in &other.by_kind {
            self.by_kind.entry(*kind).or_default().add(totals);
        }
    }
}

impl CallTotals {
    fn add(&mut self, other: &Self) {
        self.calls += other.calls;
        self.failures += other.failures;
        self.total = self.total.saturating_add(other.total);
        self.longest = self.longest.max(other.longest);
    }
}
