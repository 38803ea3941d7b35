//! Looking on while calls are served.
//!
//! A [`Watcher`] in the [`Options`](crate::Options) hears of every request when its answer is known and before the client gets it, so that what
//! it prints stands before what the client does next. Without one, nothing of a call is kept.

use std::fmt::Debug;
use std::path::PathBuf;
use std::time::Duration;

use ioasid_server::Errno;
use ioasid_server::decode::{CapturedCall, FileName};

use crate::statistics::CallKind;

/// Hears of calls.
///
/// Called by the thread that serves the call, several at once; the client waits meanwhile. It must not panic.
pub trait Watcher: Send + Sync + Debug {
    /// A call has been served.
    fn called(&self, call: &WatchedCall);
}

/// A call that has been served.
#[derive(Debug)]
#[non_exhaustive]
pub struct WatchedCall {
    /// The thread that made it.
    pub thread: u32,
    /// Its process; `None` if that could not be found out, or nobody needed to know.
    pub process: Option<u32>,
    /// Its kind, as in the [`Statistics`](crate::Statistics).
    pub kind: CallKind,
    /// From its receipt to the answer.
    pub time: Duration,
    /// What there is to say about it; `None` for calls that were handed back to the kernel, and those that were given up.
    pub what: Option<What>,
}

/// What was called on one of our files.
#[derive(Debug)]
#[non_exhaustive]
pub enum What {
    /// It was opened.
    Open {
        /// By this path, without symbolic links.
        path: PathBuf,
        /// Which open file it is; `None`: a text.
        result: Result<Option<FileName>, Errno>,
    },
    /// An `ioctl`.
    Ioctl(CapturedCall),
    /// A positioned read or write of a device region.
    Access {
        /// The file.
        file: FileName,
        /// Whether it was a write.
        write: bool,
        /// Where in the file.
        offset: u64,
        /// How many bytes were asked for.
        length: u64,
        /// How many moved.
        result: Result<u64, Errno>,
    },
    /// An `mmap`.
    Map {
        /// The file.
        file: FileName,
        /// How many bytes were asked for.
        length: u64,
        /// From where in the file on.
        offset: u64,
        /// Why there is no such mapping.
        refusal: Errno,
    },
}
