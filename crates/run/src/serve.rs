//! What happens to a request: it is decoded, the server acts, the client gets an answer.
//!
//! The answer is a value ([`Reply`]) that is sent only when everything that was borrowed for the work has been let go.
//! A file that is still held here for the length of a `send` would outlive a close that the client issues right after
//! it sees the answer.

use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Instant;

use ioasid_server::{Client, File, Opened, Server};
use rustix::fs::OFlags;
use rustix::io::Errno;

use crate::call::{Call, Resolved};
use crate::files::{self, Access, OpenFiles};
use crate::filter::{Architecture, SystemCall};
use crate::listener::{Answer, Listener, Notification};
use crate::locked_memory;
use crate::path;
use crate::process::Processes;
use crate::statistics::{CallKind, Statistics};
use crate::watcher::{WatchedCall, Watcher, What};

/// The longest positioned read or write that is done in one go; more is cut short, as the call allows.
const TRANSFER_MAX: usize = 1 << 20;

/// As many segments of a vectored read or write as the kernel takes.
const SEGMENTS_MAX: usize = 1024;

/// Symbolic links that are followed from a path to one of our files.
const LINKS_MAX: usize = 8;

/// So many workers at most look where symbolic links lead. A file system may be served by one of our clients, whose
/// own calls need a worker while others wait for it.
const LINK_LOOKUPS_MAX: usize = 16;

/// Everything that the workers share.
#[derive(Debug)]
pub(crate) struct Service {
    pub(crate) architecture: Architecture,
    pub(crate) server: Arc<Server>,
    pub(crate) listener: Listener,
    pub(crate) files: OpenFiles,
    pub(crate) processes: Processes,
    pub(crate) link_lookups: AtomicUsize,
    pub(crate) watcher: Option<Arc<dyn Watcher>>,
}

/// What the client is told.
#[derive(Debug)]
enum Reply {
    /// It is not ours: the client's kernel does it.
    Elsewhere,
    Value(u64),
    Error(Errno),
    /// A new descriptor of the client for this open file, whose number is the result.
    Descriptor {
        file: OwnedFd,
        close_on_exec: bool,
    },
}

impl Service {
    /// Serves one request.
    pub(crate) fn handle(&self, notification: Notification, statistics: &mut Statistics) {
        let start = Instant::now();
        self.files.drain();
        let (mut kind, reply, what, process) = {
            let call = Call::new(notification, &self.listener, &self.processes, &self.files);
            // A panic would be a defect of ours; the client must not wait for ever for it.
            let work = std::panic::AssertUnwindSafe(|| self.perform(&call));
            let (kind, reply) = std::panic::catch_unwind(work).unwrap_or_else(|_| {
                tracing::error!(?notification, "a request was given up after a panic");
                (CallKind::Other, Reply::Error(Errno::IO))
            });
            let what = call.what.take();
            let process =
                what.as_ref().and_then(|_| call.thread().and_then(|thread| thread.process_id()).ok());
            (kind, reply, what, process)
        };
        if matches!(reply, Reply::Elsewhere) {
            kind = kind.elsewhere();
            tracing::trace!(thread = notification.thread, "{kind:x?}");
        } else {
            tracing::debug!(thread = notification.thread, "{kind:x?}: {reply:?}");
        }
        let failed = matches!(reply, Reply::Error(_));
        // Sending wakes the client, which may well run before we do again.
        let time = start.elapsed();
        if let Some(watcher) = &self.watcher {
            watcher.called(&WatchedCall { thread: notification.thread, process, kind, time, what });
        }
        self.answer(notification.id, reply);
        statistics.record(kind, failed, time);
    }

    fn answer(&self, id: u64, reply: Reply) {
        let answer = match reply {
            Reply::Elsewhere => Answer::Continue,
            // A system call's result; a region's length is at most `TRANSFER_MAX`, an ioctl's result 32 bits.
            Reply::Value(value) => Answer::Value(value as i64),
            Reply::Error(errno) => Answer::Error(errno),
            Reply::Descriptor { file, close_on_exec } => {
                let added = self.listener.add_descriptor(id, file.as_fd(), close_on_exec);
                // Our own descriptor goes before the client hears of its, so that its close can be the last one. (The
                // kernel could add and answer in one step, but then ours would be closed at some later moment.)
                // If the client has died, this was the last one, and its event lets go of the file.
                drop(file);
                match added {
                    Ok(number) => Answer::Value(number.into()),
                    Err(Errno::NOENT) => return,
                    Err(errno) => Answer::Error(errno),
                }
            }
        };
        if !self.listener.send(id, answer) {
            tracing::debug!(id, ?answer, "the client died before its answer");
        }
    }

    fn perform(&self, call: &Call<'_>) -> (CallKind, Reply) {
        let [first, second, third, fourth, ..] = call.notification.arguments;
        let Some(system_call) = self.architecture.call(call.notification.number) else {
            return (CallKind::Other, Reply::Elsewhere);
        };
        // Descriptor numbers and flags are C ints: the kernel looks at the low words only.
        let flags = |argument: u64| OFlags::from_bits_retain(argument as u32);
        match system_call {
            SystemCall::Open => (CallKind::Open, self.open(call, libc::AT_FDCWD, first, flags(second))),
            SystemCall::Creat => {
                let flags = OFlags::CREATE | OFlags::WRONLY | OFlags::TRUNC;
                (CallKind::Open, self.open(call, libc::AT_FDCWD, first, flags))
            }
            SystemCall::OpenAt => (CallKind::Open, self.open(call, first as i32, second, flags(third))),
            SystemCall::OpenAt2 => (CallKind::Open, self.open2(call, first as i32, second, third, fourth)),
            SystemCall::Ioctl => {
                let command = second as u32;
                (CallKind::Ioctl(command), self.ioctl(call, first as i32, command, third))
            }
            SystemCall::Map => (CallKind::Map, self.map(call)),
            SystemCall::Read => (CallKind::Read, self.read(call, first as i32, &[(second, third)], fourth)),
            SystemCall::Write => {
                (CallKind::Write, self.write(call, first as i32, &[(second, third)], fourth))
            }
            SystemCall::ReadVectored => (
                CallKind::Read,
                self.segments(call, second, third)
                    .map_or_else(Reply::Error, |segments| self.read(call, first as i32, &segments, fourth)),
            ),
            SystemCall::WriteVectored => (
                CallKind::Write,
                self.segments(call, second, third)
                    .map_or_else(Reply::Error, |segments| self.write(call, first as i32, &segments, fourth)),
            ),
        }
    }

    /// `openat2`: the flags are in a structure in memory.
    fn open2(&self, call: &Call<'_>, directory: i32, path: u64, how: u64, size: u64) -> Reply {
        const RESOLVE_BENEATH: u64 = 0x08;
        const RESOLVE_IN_ROOT: u64 = 0x10;
        let mut words = [0u8; 24];
        // What is wrong with the structure, the kernel will say.
        if size < words.len() as u64 || call.read(how, &mut words).is_err() {
            return Reply::Elsewhere;
        }
        let word = |at: usize| words[at..at + 8].try_into().map(u64::from_ne_bytes).unwrap_or(0);
        let (flags, resolve) = (word(0), word(16));
        let Ok(flags) = u32::try_from(flags) else { return Reply::Elsewhere };
        if resolve & (RESOLVE_BENEATH | RESOLVE_IN_ROOT) != 0 {
            return Reply::Elsewhere;
        }
        self.open(call, directory, path, OFlags::from_bits_retain(flags))
    }

    fn open(&self, call: &Call<'_>, directory: i32, path: u64, flags: OFlags) -> Reply {
        if flags.contains(OFlags::PATH) {
            return Reply::Elsewhere;
        }
        // A path that cannot be fetched: the kernel will say EFAULT; or we may not look into the client, and then it
        // must still be able to open everything that is not ours.
        let Ok(path) = path::fetch(path, |address, buffer| call.read(address, buffer)) else {
            return Reply::Elsewhere;
        };
        let Some((path, opened)) = self.find(call, directory, &path) else { return Reply::Elsewhere };
        let status_flags = flags & OFlags::NONBLOCK;
        let access = match flags & OFlags::RWMODE {
            OFlags::RDONLY => Access::Read,
            OFlags::WRONLY => Access::Write,
            _ => Access::ReadWrite,
        };
        let close_on_exec = flags.contains(OFlags::CLOEXEC);
        let opened = opened.and_then(|opened| {
            let file = if let Opened::File(file) = &opened { Some(file.name()) } else { None };
            if flags.contains(OFlags::CREATE | OFlags::EXCL) {
                return Err(Errno::EXIST);
            }
            if flags.contains(OFlags::DIRECTORY) {
                return Err(Errno::NOTDIR);
            }
            let name = path.to_string_lossy();
            let descriptor = match opened {
                Opened::File(file) => self.files.insert(file, &name, access, status_flags),
                Opened::Text(_) if access.writes() => Err(Errno::ACCESS),
                Opened::Text(text) => files::text(&name, &text, status_flags),
            }?;
            Ok((descriptor, file))
        });
        if self.watcher.is_some() {
            let result = opened.as_ref().map(|(_, file)| *file).map_err(|errno| *errno);
            *call.what.borrow_mut() = Some(What::Open { path, result });
        }
        match opened {
            Ok((file, _)) => Reply::Descriptor { file, close_on_exec },
            Err(errno) => Reply::Error(errno),
        }
    }

    /// Asks the server for the file at `path`, and if there is none and the path is a symbolic link, for what it
    /// points to.
    fn find(&self, call: &Call<'_>, directory: i32, path: &Path) -> Option<(PathBuf, Result<Opened, Errno>)> {
        let base = if path.is_absolute() { PathBuf::from("/") } else { self.directory(call, directory)? };
        let mut path = path::normalize(&base, path)?;
        if let Some(text) = locked_memory::status(&self.server, &self.processes, call, &path) {
            return Some((path, Ok(Opened::Text(text))));
        }
        for _ in 0..LINKS_MAX {
            if let Some(opened) = self.server.open(call, &path) {
                return Some((path, opened));
            }
            // Links there do not say where they lead.
            if path.starts_with("/proc") {
                return None;
            }
            path = path::normalize(path.parent()?, &self.link(call, &path)?)?;
        }
        None
    }

    /// Where the symbolic link at `path` leads, if it is one and the answer can be waited for.
    fn link(&self, call: &Call<'_>, path: &Path) -> Option<PathBuf> {
        let in_client = Path::new("root").join(path.strip_prefix("/").ok()?);
        let thread = call.thread().ok()?;
        let in_client = in_client.to_str()?;
        let target = if self.link_lookups.fetch_add(1, Ordering::Relaxed) < LINK_LOOKUPS_MAX {
            thread.directory.link(in_client).ok()
        } else {
            None
        };
        self.link_lookups.fetch_sub(1, Ordering::Relaxed);
        target
    }

    /// The path of a directory that the client has open, or works in, within the client's root.
    fn directory(&self, call: &Call<'_>, directory: i32) -> Option<PathBuf> {
        let thread = call.current_thread().ok()?;
        let links = &thread.directory;
        let path = if directory == libc::AT_FDCWD {
            links.link("cwd").ok()?
        } else {
            links.link(&format!("fd/{directory}")).ok()?
        };
        let root = links.link("root").ok()?;
        let path = Path::new("/").join(path.strip_prefix(&root).ok()?);
        path.is_absolute().then_some(path)
    }

    fn ioctl(&self, call: &Call<'_>, fd: i32, command: u32, argument: u64) -> Reply {
        match call.resolve(fd) {
            Ok(Resolved::Ours(open_file)) => {
                let result = if self.watcher.is_some() {
                    let captured = open_file.file.ioctl_captured(call, command, argument);
                    let result = captured.result();
                    *call.what.borrow_mut() = Some(What::Ioctl(captured));
                    result
                } else {
                    open_file.file.ioctl(call, command, argument)
                };
                match result {
                    Ok(value) => Reply::Value(value.into()),
                    Err(errno) => Reply::Error(errno),
                }
            }
            Ok(Resolved::Foreign(_)) => Reply::Elsewhere,
            Err(errno) => Reply::Error(errno),
        }
    }

    /// `mmap` of a file, which is refused if it is ours, in the order in which a kernel looks.
    fn map(&self, call: &Call<'_>) -> Reply {
        let [_, length, protection, flags, fd, offset] = call.notification.arguments;
        let (protection, flags) = (protection as i32, flags as i32);
        if self.files.is_empty() || is_refused_for_any_file(length, flags, offset) {
            return Reply::Elsewhere;
        }
        let open_file = match call.resolve(fd as i32) {
            Ok(Resolved::Ours(open_file)) => open_file,
            // It may not be possible to look into the client, which must still be able to map what is not ours.
            Ok(Resolved::Foreign(_)) | Err(_) => return Reply::Elsewhere,
        };
        let shared = match flags & libc::MAP_TYPE {
            libc::MAP_PRIVATE => false,
            libc::MAP_SHARED | libc::MAP_SHARED_VALIDATE => true,
            _ => return Reply::Elsewhere,
        };
        let writes = open_file.access.writes();
        let refusal =
            if !open_file.access.reads() || (shared && !writes && protection & libc::PROT_WRITE != 0) {
                Errno::ACCESS
            } else {
                open_file.file.mmap(shared && writes, protection & libc::PROT_EXEC != 0)
            };
        if self.watcher.is_some() {
            let file = open_file.file.name();
            *call.what.borrow_mut() = Some(What::Map { file, length, offset, refusal });
        }
        Reply::Error(refusal)
    }

    fn read(&self, call: &Call<'_>, fd: i32, segments: &[(u64, u64)], offset: u64) -> Reply {
        let open_file = match call.resolve(fd) {
            Ok(Resolved::Ours(open_file)) => open_file,
            Ok(Resolved::Foreign(_)) => return Reply::Elsewhere,
            Err(errno) => return Reply::Error(errno),
        };
        if !open_file.access.reads() {
            return Reply::Error(Errno::BADF);
        }
        let read = buffer_for(segments).and_then(|mut buffer| {
            let count = open_file.file.read_at(offset, &mut buffer)?;
            let mut rest = buffer.get(..count).ok_or(Errno::IO)?;
            for (address, length) in segments {
                let (now, later) =
                    rest.split_at(rest.len().min(usize::try_from(*length).unwrap_or(usize::MAX)));
                call.write(*address, now)?;
                rest = later;
            }
            Ok(count)
        });
        self.note_access(call, &open_file.file, false, segments, offset, &read);
        read.map_or_else(Reply::Error, |count| Reply::Value(count as u64))
    }

    fn write(&self, call: &Call<'_>, fd: i32, segments: &[(u64, u64)], offset: u64) -> Reply {
        let open_file = match call.resolve(fd) {
            Ok(Resolved::Ours(open_file)) => open_file,
            Ok(Resolved::Foreign(_)) => return Reply::Elsewhere,
            Err(errno) => return Reply::Error(errno),
        };
        if !open_file.access.writes() {
            return Reply::Error(Errno::BADF);
        }
        let written = buffer_for(segments).and_then(|mut buffer| {
            let mut rest = &mut buffer[..];
            for (address, length) in segments {
                let length = rest.len().min(usize::try_from(*length).unwrap_or(usize::MAX));
                let (now, later) = rest.split_at_mut(length);
                call.read(*address, now)?;
                rest = later;
            }
            open_file.file.write_at(offset, &buffer)
        });
        self.note_access(call, &open_file.file, true, segments, offset, &written);
        written.map_or_else(Reply::Error, |count| Reply::Value(count as u64))
    }

    /// Keeps what there is to say about an access to a device region, if somebody looks on.
    fn note_access(
        &self,
        call: &Call<'_>,
        file: &File,
        write: bool,
        segments: &[(u64, u64)],
        offset: u64,
        result: &Result<usize, Errno>,
    ) {
        if self.watcher.is_some() {
            let length = segments.iter().fold(0_u64, |sum, (_, length)| sum.saturating_add(*length));
            let result = result.map(|count| count as u64);
            let file = file.name();
            *call.what.borrow_mut() = Some(What::Access { file, write, offset, length, result });
        }
    }

    /// The segments of a vectored call: pairs of address and length.
    fn segments(&self, call: &Call<'_>, vector: u64, count: u64) -> Result<Vec<(u64, u64)>, Errno> {
        let count = usize::try_from(count).ok().filter(|count| *count <= SEGMENTS_MAX).ok_or(Errno::INVAL)?;
        let mut bytes = vec![0; count * 16];
        call.read(vector, &mut bytes)?;
        let word = |bytes: &[u8]| bytes.try_into().map(u64::from_ne_bytes).unwrap_or(0);
        Ok(bytes.chunks_exact(16).map(|pair| (word(&pair[..8]), word(&pair[8..]))).collect())
    }
}

/// Whether the kernel refuses such a mapping before it asks the file, and of ours as of any other.
fn is_refused_for_any_file(length: u64, flags: i32, offset: u64) -> bool {
    /// No process can address more, with five levels of page tables even.
    const LONGEST: u64 = 1 << 56;
    // Huge pages are of files that have them, or anonymous. MAP_SYNC is the one flag that a file has to support if its
    // meaning is to be relied on, and ours do not.
    let unsupported = flags & libc::MAP_TYPE == libc::MAP_SHARED_VALIDATE && flags & libc::MAP_SYNC != 0;
    length == 0 || length > LONGEST || offset % 4096 != 0 || flags & libc::MAP_HUGETLB != 0 || unsupported
}

/// A buffer as long as the segments together, or as long as we go at once.
fn buffer_for(segments: &[(u64, u64)]) -> Result<Vec<u8>, Errno> {
    let total = segments
        .iter()
        .try_fold(0u64, |total, (_, length)| total.checked_add(*length))
        .ok_or(Errno::INVAL)?;
    // The kernel refuses totals that are negative as a signed number.
    if i64::try_from(total).is_err() {
        return Err(Errno::INVAL);
    }
    Ok(vec![0; usize::try_from(total).unwrap_or(usize::MAX).min(TRANSFER_MAX)])
}
