//! Many at once, killed, stopped, stalled, interrupted, and closed to us.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::thread;
use std::time::{Duration, Instant};

use rustix::fs::OFlags;
use rustix::io::Errno;
use rustix::process::{Pid, Signal, kill_process};

use crate::calls::*;
use crate::device::Machine;

pub(super) fn threads() {
    let shared = open_iommu();
    thread::scope(|scope| {
        for _ in 0..8 {
            scope.spawn(|| {
                let mut last = 0;
                for round in 0..200 {
                    let id = allocate(&shared).unwrap();
                    assert!(id > last, "each id is given once");
                    last = id;
                    if round % 20 == 0 {
                        let own = open_iommu();
                        allocate(&own).unwrap();
                    }
                }
            });
        }
    });
    assert_eq!(files_in_server(), 1);
    drop(shared);
    assert_eq!(files_in_server(), 0);
}

pub(super) fn killed_at_any_moment() {
    let iommu = open_iommu();
    for round in 0..60 {
        let child = fork(|| {
            thread::scope(|scope| {
                for _ in 0..3 {
                    scope.spawn(|| {
                        loop {
                            let own = open_iommu();
                            let _ = (allocate(&iommu), allocate(&own), File::open("/dev/null"));
                        }
                    });
                }
            });
        });
        thread::sleep(Duration::from_micros(300 * (round % 20)));
        kill_process(child, Signal::KILL).unwrap();
        assert_eq!(wait(child).terminating_signal(), Some(libc::SIGKILL));
        // The others notice nothing.
        allocate(&iommu).unwrap();
        expect_files_in_server(1);
    }
}

/// The threads that the supervisor had at a time, to be looked at without a call that would need it.
struct ThreadsOfServer(Vec<File>);

impl ThreadsOfServer {
    fn now() -> Self {
        let threads = std::fs::read_dir(format!("/proc/{}/task", supervisor())).unwrap();
        // One may end meanwhile.
        Self(threads.filter_map(|thread| File::open(thread.unwrap().path().join("stat")).ok()).collect())
    }

    /// The states of those that have not ended, by the kernel's letters.
    fn states(&self) -> impl Iterator<Item = u8> {
        self.0.iter().filter_map(|file| {
            let mut text = [0; 512];
            let length = file.read_at(&mut text, 0).ok()?;
            // The state is the word after the name in parentheses.
            let end = text[..length].iter().rposition(|byte| *byte == b')')?;
            Some(text[end + 2])
        })
    }

    /// How many wait for something that cannot be interrupted.
    fn stuck(&self) -> usize {
        self.states().filter(|state| *state == b'D').count()
    }

    fn wait_until_stopped(&self) {
        let start = Instant::now();
        while !self.states().all(|state| matches!(state, b'T' | b'Z' | b'X')) {
            assert!(start.elapsed() < Duration::from_secs(60));
            thread::sleep(Duration::from_millis(1));
        }
    }
}

/// Nothing between the two signals may need the supervisor.
pub(super) fn killed_while_the_server_sleeps() {
    let iommu = open_iommu();
    let supervisor = Pid::from_raw(supervisor()).unwrap();
    for _ in 0..10 {
        let (reading, writing) = rustix::pipe::pipe().unwrap();
        let child = fork(|| {
            rustix::io::read(&reading, &mut [0; 1]).unwrap();
            let _ = allocate(&iommu);
        });
        let threads = ThreadsOfServer::now();
        kill_process(supervisor, Signal::STOP).unwrap();
        threads.wait_until_stopped();
        rustix::io::write(&writing, b"x").unwrap();
        thread::sleep(Duration::from_millis(20));
        kill_process(child, Signal::KILL).unwrap();
        let status = wait(child);
        kill_process(supervisor, Signal::CONT).unwrap();
        assert_eq!(status.terminating_signal(), Some(libc::SIGKILL), "a killed client does not wait for us");
        allocate(&iommu).unwrap();
    }
    drop(iommu);
    assert_eq!(files_in_server(), 0);
}

const PAGE: u64 = 4096;

/// Memory that somebody else provides page by page, and does not: whoever touches it waits as long as this process
/// lives.
fn pages_that_never_come(count: u64) -> u64 {
    const UFFDIO_API: u32 = 0xc018_aa3f;
    const UFFDIO_REGISTER: u32 = 0xc020_aa00;
    let userfaultfd = system_call(libc::SYS_userfaultfd, [libc::O_CLOEXEC as u64, 0, 0, 0]).unwrap() as i32;
    let mut api = [0xaau64, 0, 0];
    ioctl(userfaultfd, UFFDIO_API, (&raw mut api).addr() as u64).unwrap();
    let memory = pages((count * PAGE) as usize, libc::PROT_READ | libc::PROT_WRITE);
    let mut register = [memory, count * PAGE, 1, 0];
    ioctl(userfaultfd, UFFDIO_REGISTER, (&raw mut register).addr() as u64).unwrap();
    memory
}

/// Copying from a client may take for ever.
pub(super) fn a_stalled_client_stops_nobody() {
    const CALLERS: u64 = 200;
    let iommu = open_iommu();
    let callers = fork(|| {
        let memory = pages_that_never_come(CALLERS);
        thread::scope(|scope| {
            for number in 0..CALLERS {
                let iommu = &iommu;
                scope.spawn(move || allocate_at(iommu, memory + number * PAGE));
            }
        });
    });
    // A device that is stuck in the memory of its program, which closes it.
    let closer = fork(|| {
        let machine = Machine::new();
        machine.map(pages_that_never_come(1), PAGE, 0x10_0000).unwrap();
        machine.begin_to_fetch(0x10_0000);
        thread::sleep(Duration::from_millis(50));
        drop(machine);
        thread::sleep(Duration::from_secs(3600));
    });
    // Long enough for all of them to be stuck.
    thread::sleep(Duration::from_millis(300));
    let start = Instant::now();
    for _ in 0..100 {
        allocate(&iommu).unwrap();
    }
    drop(open_iommu());
    assert!(start.elapsed() < Duration::from_secs(40));
    for child in [callers, closer] {
        kill_process(child, Signal::KILL).unwrap();
        assert_eq!(wait(child).terminating_signal(), Some(libc::SIGKILL));
    }
    allocate(&iommu).unwrap();
    drop(iommu);
    expect_files_in_server(0);
    // The device is free again when its last transfer has failed, which happens at the death of its program.
    let start = Instant::now();
    while start.elapsed() < Duration::from_secs(40) {
        let iommu = open_iommu();
        let device = open("/dev/vfio/devices/vfio0", OFlags::RDWR | OFlags::CLOEXEC).unwrap();
        if Machine::bind(&iommu, &device).is_ok() {
            return;
        }
        thread::sleep(Duration::from_millis(50));
    }
    panic!("the device is still busy");
}

/// More requests that wait for ever than there are workers, from many processes of one.
pub(super) fn stalled_clients_have_half() {
    const PROCESSES: usize = 8;
    const THREADS: u64 = 150;
    let workers = ioasid_run::Options::default().workers;
    assert!(PROCESSES * THREADS as usize > workers);
    let iommu = open_iommu();
    let storm = Family::fork(|| {
        for _ in 0..PROCESSES {
            fork(|| {
                let memory = pages_that_never_come(THREADS);
                thread::scope(|scope| {
                    for number in 0..THREADS {
                        let iommu = &iommu;
                        scope.spawn(move || allocate_at(iommu, memory + number * PAGE));
                    }
                });
            });
        }
        thread::sleep(Duration::from_secs(3600));
    });
    // Until all of them are stuck, or wait for their turn: for a second nothing has changed.
    let start = Instant::now();
    let (mut stuck, mut unchanged) = (0, 0);
    while stuck < workers / 4 || unchanged < 5 {
        assert!(start.elapsed() < Duration::from_secs(60), "{stuck} of {workers} are stuck");
        let before = stuck;
        stuck = ThreadsOfServer::now().stuck();
        unchanged = if stuck == before { unchanged + 1 } else { 0 };
        allocate(&iommu).unwrap();
        thread::sleep(Duration::from_millis(200));
    }
    assert!(stuck <= workers / 2, "{stuck} of {workers} are stuck");
    for _ in 0..100 {
        allocate(&iommu).unwrap();
    }
    // And we may have many at once.
    thread::scope(|scope| {
        for _ in 0..50 {
            scope.spawn(|| allocate(&iommu).unwrap());
        }
    });
    let leader = storm.0;
    drop(storm);
    assert_eq!(wait(leader).terminating_signal(), Some(libc::SIGKILL));
    allocate(&iommu).unwrap();
    drop(iommu);
    expect_files_in_server(0);
}

pub(super) fn signals_do_not_repeat_calls() {
    extern "C" fn ignore(_: libc::c_int) {}
    for flags in [0, libc::SA_RESTART] {
        // SAFETY: the handler does nothing; an all-zero sigaction is valid otherwise.
        unsafe {
            let mut action: libc::sigaction = std::mem::zeroed();
            action.sa_sigaction = ignore as extern "C" fn(libc::c_int) as libc::sighandler_t;
            action.sa_flags = flags;
            assert_eq!(libc::sigaction(libc::SIGUSR1, &raw const action, std::ptr::null_mut()), 0);
        }
        let iommu = open_iommu();
        let parent = rustix::process::getpid();
        let pest = fork(|| {
            loop {
                if kill_process(parent, Signal::USR1).is_err() {
                    return;
                }
                thread::sleep(Duration::from_micros(50));
            }
        });
        let mut successes = 0;
        let mut last = 0;
        for _ in 0..3000 {
            match allocate(&iommu) {
                Ok(id) => {
                    successes += 1;
                    last = id;
                }
                Err(errno) => assert_eq!(errno, Errno::INTR),
            }
        }
        kill_process(pest, Signal::KILL).unwrap();
        wait(pest);
        assert_eq!(last, successes, "an interrupted call has not been executed");
    }
}

pub(super) fn not_dumpable() {
    let iommu = open_iommu();
    rustix::process::set_dumpable_behavior(rustix::process::DumpableBehavior::NotDumpable).unwrap();
    let result = allocate(&iommu);
    // A supervisor with CAP_SYS_PTRACE may look into it all the same.
    if rustix::process::getuid().is_root() {
        result.unwrap();
    } else {
        assert_eq!(result, Err(Errno::FAULT));
    }
    File::open("/dev/null").unwrap();
    assert!(File::open("/nonexistent").is_err());
    rustix::process::set_dumpable_behavior(rustix::process::DumpableBehavior::Dumpable).unwrap();
    allocate(&iommu).unwrap();
}
