//! The program that calls, as the server sees it.
//!
//! A command arrives with a pointer into somebody else's memory, names files by that program's descriptor numbers
//! and may ask that the program's pages stay reachable after the call. Those three needs are [`Client`] (for the
//! length of one call) and [`Process`] (for as long as any mapping of its memory lives). Each transport implements
//! them its own way; [`InProcess`](crate::InProcess) does so for tests.
//!
//! The client is the hostile side. The server copies what it needs once, decides on the copy, and never holds a
//! lock while it calls into these traits in a way that could wait for another client.

use std::fmt::Debug;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use rustix::io::Errno;

use crate::File;

/// The program that makes one call.
pub trait Client {
    /// Fills `buffer` from the program's memory at `address`.
    ///
    /// # Errors
    /// `EFAULT` unless every byte could be read; the buffer's content is then unspecified.
    fn read(&self, address: u64, buffer: &mut [u8]) -> Result<(), Errno>;

    /// Writes `bytes` to the program's memory at `address`.
    ///
    /// # Errors
    /// `EFAULT` unless every byte could be written.
    fn write(&self, address: u64, bytes: &[u8]) -> Result<(), Errno>;

    /// What the program's descriptor number `fd` refers to.
    ///
    /// # Errors
    /// `EBADF` if it is not open.
    fn descriptor(&self, fd: i32) -> Result<Descriptor, Errno>;

    /// Gives the program a new descriptor of `file`, which stays although the call may fail afterwards.
    ///
    /// # Errors
    /// `EMFILE`, `ENFILE` or `ENOMEM`: it cannot have one; the file is closed then.
    fn give_descriptor(&self, file: File, close_on_exec: bool) -> Result<i32, Errno>;

    /// The address space that addresses of this call belong to: the same `Arc` as long as it is the same one.
    ///
    /// # Errors
    /// `ESRCH` when the program is gone already.
    fn process(&self) -> Result<Arc<dyn Process>, Errno>;
}

/// What a descriptor of the client refers to.
#[derive(Debug)]
pub enum Descriptor {
    /// An open file of this server.
    Ours(Arc<File>),
    /// Any other file: a duplicate of the client's descriptor (a memfd, for example).
    Foreign(OwnedFd),
}

/// One address space of a client. It outlives the call: mapped memory is reached through it later.
///
/// As [`LateBound`](ioasid::LateBound) memory its offsets are virtual addresses; once the address space has gone
/// (exit or exec) every access answers [`MemoryGone`](ioasid::MemoryGone).
pub trait Process: ioasid::LateBound + Debug {
    /// A number that no other address space has had or will have while the server lives.
    fn identity(&self) -> u64;

    /// The process id, for people to read.
    fn id(&self) -> u32;

    /// Names of the processes that it descends from, the oldest first and itself last, without the one that all clients descend
    /// from: numbers that no others have had. What is limited is shared along them: see [`Limits`](crate::Limits). Asked at an open.
    /// Empty, as by default: it is that one, or it has no relatives.
    fn lineage(&self) -> Vec<u64> {
        Vec::new()
    }

    /// The user id that is charged for memory.
    fn user(&self) -> u32;

    /// `RLIMIT_MEMLOCK` in bytes; `None` if unlimited or if the process may lock without limit (`CAP_IPC_LOCK`).
    fn memory_lock_limit(&self) -> Option<u64>;

    /// [`Process::user`] and [`Process::memory_lock_limit`] at once, which may be cheaper: every map asks for both.
    fn user_and_memory_lock_limit(&self) -> (u32, Option<u64>) {
        (self.user(), self.memory_lock_limit())
    }

    /// Whether the process may change who is charged (`CAP_SYS_RESOURCE`).
    fn may_change_resource_mode(&self) -> bool;

    /// Checks that every byte of `[address, address + length)` is mapped in the address space with read, and if
    /// `write` also with write permission. Nothing is touched.
    ///
    /// # Errors
    /// `EFAULT` if not.
    fn check_access(&self, address: u64, length: u64, write: bool) -> Result<(), Errno>;

    /// The file behind `[address, address + length)`, open for reading and if possible writing, and where in it the bytes
    /// begin: if all of them are one shared mapping of memory (tmpfs, which anonymous shared memory is too) whose file can
    /// be opened. Such memory is that file's, not the process's, and stays when the process ends. `None` otherwise; then
    /// the bytes are reached through the process.
    fn shared_file(&self, _address: u64, _length: u64) -> Option<(OwnedFd, u64)> {
        None
    }
}
