//! The calls that clients make, by hand, so that nothing is between them and the kernel.

use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::sync::OnceLock;

use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;
use rustix::process::{Pid, Signal, WaitOptions, WaitStatus, kill_process_group, setpgid, waitpid};

pub(crate) const IOAS_ALLOC: u32 = 0x3b81;
/// A number that no interface uses.
pub(crate) const UNKNOWN: u32 = 0x3bfe;

/// The supervisor's process id: the parent of the first client.
static SUPERVISOR: OnceLock<i32> = OnceLock::new();

pub(crate) fn remember_supervisor(pid: i32) {
    SUPERVISOR.set(pid).unwrap();
}

pub(crate) fn supervisor() -> i32 {
    *SUPERVISOR.get().unwrap()
}

fn errno() -> Errno {
    Errno::from_io_error(&std::io::Error::last_os_error()).unwrap()
}

pub(crate) fn open_iommu() -> OwnedFd {
    open("/dev/iommu", OFlags::RDWR | OFlags::CLOEXEC).unwrap()
}

pub(crate) fn open(path: &str, flags: OFlags) -> Result<OwnedFd, Errno> {
    rustix::fs::open(path, flags, Mode::empty())
}

pub(crate) fn ioctl(fd: i32, command: u32, argument: u64) -> Result<i32, Errno> {
    // SAFETY: what the kernel or the server writes goes to memory that the tests made for it.
    let value = unsafe { libc::ioctl(fd, command.into(), argument) };
    if value == -1 { Err(errno()) } else { Ok(value) }
}

/// IOAS_ALLOC with a structure at `address`.
pub(crate) fn allocate_at(fd: impl AsFd, address: u64) -> Result<(), Errno> {
    ioctl(fd.as_fd().as_raw_fd(), IOAS_ALLOC, address).map(|value| assert_eq!(value, 0))
}

/// IOAS_ALLOC; returns the new object's id.
pub(crate) fn allocate(fd: impl AsFd) -> Result<u32, Errno> {
    allocate_by_number(fd.as_fd().as_raw_fd())
}

pub(crate) fn allocate_by_number(fd: i32) -> Result<u32, Errno> {
    let mut words = [12u32, 0, 0];
    ioctl(fd, IOAS_ALLOC, (&raw mut words).addr() as u64)?;
    Ok(words[2])
}

/// How many of our files are open in the server, by what the supervisor has open itself. Looking is itself a call
/// that the supervisor serves, so every close before it has been seen.
pub(crate) fn files_in_server() -> usize {
    let entries = std::fs::read_dir(format!("/proc/{}/fd", supervisor())).unwrap();
    let links = entries.filter_map(|entry| std::fs::read_link(entry.unwrap().path()).ok());
    links.filter(|link| link.to_string_lossy().starts_with("/memfd:/dev/")).count()
}

/// For closes by somebody who is not us: they take effect soon.
pub(crate) fn expect_files_in_server(expected: usize) {
    let start = std::time::Instant::now();
    while files_in_server() != expected {
        let waited = start.elapsed();
        assert!(
            waited < std::time::Duration::from_secs(60),
            "{} files instead of {expected}",
            files_in_server()
        );
        std::thread::sleep(std::time::Duration::from_millis(1));
    }
}

/// Runs `body` in a child process, which exits with 0 if it returns and with 101 if it panics.
pub(crate) fn fork(body: impl FnOnce()) -> Pid {
    // SAFETY: the tests fork while they have one thread, so the child may do everything.
    let pid = unsafe { libc::fork() };
    if pid == 0 {
        let outcome = std::panic::catch_unwind(std::panic::AssertUnwindSafe(body));
        // SAFETY: ends the process.
        unsafe { libc::_exit(if outcome.is_ok() { 0 } else { 101 }) };
    }
    Pid::from_raw(pid).expect("fork failed")
}

/// A child with all that descends from it, unless it leaves the group. They are killed when this is dropped, so that none of them
/// outlives a test that fails.
pub(crate) struct Family(pub(crate) Pid);

impl Family {
    pub(crate) fn fork(body: impl FnOnce()) -> Self {
        let leader = fork(|| {
            setpgid(None, None).unwrap();
            body();
        });
        // Both do it: neither may go on before it is done. The child may have ended.
        let _ = setpgid(Some(leader), Some(leader));
        Self(leader)
    }
}

impl Drop for Family {
    fn drop(&mut self) {
        let _ = kill_process_group(self.0, Signal::KILL);
    }
}

pub(crate) fn wait(pid: Pid) -> WaitStatus {
    let (_, status) =
        rustix::io::retry_on_intr(|| waitpid(Some(pid), WaitOptions::empty())).unwrap().unwrap();
    status
}

pub(crate) fn expect_success(pid: Pid) {
    assert_eq!(wait(pid).exit_status(), Some(0));
}

/// Private memory with these permissions; `length` bytes, never unmapped.
pub(crate) fn pages(length: usize, protection: i32) -> u64 {
    // SAFETY: a new mapping disturbs nobody.
    let address = unsafe {
        libc::mmap(std::ptr::null_mut(), length, protection, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS, -1, 0)
    };
    assert_ne!(address, libc::MAP_FAILED);
    address.addr() as u64
}

/// Changes the permissions of memory from [`pages`].
pub(crate) fn protect(address: u64, length: usize, protection: i32) {
    // SAFETY: the tests use such memory only through system calls and `poke`.
    let result = unsafe { libc::mprotect(address as *mut libc::c_void, length, protection) };
    assert_eq!(result, 0);
}

pub(crate) fn unmap(address: u64, length: usize) {
    // SAFETY: as above.
    assert_eq!(unsafe { libc::munmap(address as *mut libc::c_void, length) }, 0);
}

/// Writes words to memory from [`pages`].
pub(crate) fn poke(address: u64, words: &[u32]) {
    // SAFETY: the caller passes writable memory of its own that is long enough.
    unsafe { std::ptr::copy_nonoverlapping(words.as_ptr(), address as *mut u32, words.len()) };
}

/// Reads a byte of memory from [`pages`].
pub(crate) fn peek(address: u64) -> u8 {
    // SAFETY: the caller passes readable memory of its own. Devices write to it, so it is read as such.
    unsafe { std::ptr::read_volatile(address as *const u8) }
}

/// Maps a file.
pub(crate) fn map_file(file: impl AsFd, length: usize) -> u64 {
    try_map(file, length, libc::PROT_READ, libc::MAP_SHARED, 0).unwrap()
}

/// Maps a file, or says why not.
pub(crate) fn try_map(
    file: impl AsFd,
    length: usize,
    protection: i32,
    flags: i32,
    offset: i64,
) -> Result<u64, Errno> {
    let number = file.as_fd().as_raw_fd();
    // SAFETY: a new mapping disturbs nobody.
    let address = unsafe { libc::mmap(std::ptr::null_mut(), length, protection, flags, number, offset) };
    if address == libc::MAP_FAILED { Err(errno()) } else { Ok(address.addr() as u64) }
}

/// A raw system call with up to four arguments.
pub(crate) fn system_call(number: libc::c_long, arguments: [u64; 4]) -> Result<u64, Errno> {
    let [a, b, c, d] = arguments;
    // SAFETY: the tests pass pointers to live memory where the call wants one.
    let value = unsafe { libc::syscall(number, a, b, c, d) };
    if value == -1 { Err(errno()) } else { Ok(value as u64) }
}

pub(crate) fn close_number(fd: i32) {
    // SAFETY: the test owns the number.
    assert_eq!(unsafe { libc::close(fd) }, 0);
}

/// Sends a descriptor.
pub(crate) fn send(socket: BorrowedFd<'_>, file: BorrowedFd<'_>) {
    use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};
    let mut space = [std::mem::MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    let files = [file];
    assert!(control.push(SendAncillaryMessage::ScmRights(&files)));
    sendmsg(socket, &[std::io::IoSlice::new(b"x")], &mut control, SendFlags::empty()).unwrap();
}

/// Receives a descriptor.
pub(crate) fn receive(socket: BorrowedFd<'_>) -> OwnedFd {
    use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, recvmsg};
    let mut space = [std::mem::MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let mut byte = [0];
    recvmsg(socket, &mut [std::io::IoSliceMut::new(&mut byte)], &mut control, RecvFlags::CMSG_CLOEXEC)
        .unwrap();
    let received = control.drain().find_map(|message| match message {
        RecvAncillaryMessage::ScmRights(mut files) => files.next(),
        _ => None,
    });
    received.unwrap()
}
