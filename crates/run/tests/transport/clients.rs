//! The client programs. Each is a function that asserts what a program may rely on.

use std::fs::File;
use std::io::{IoSlice, IoSliceMut, Read, Write};
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::os::unix::process::CommandExt;
use std::process::{Command, ExitCode};
use std::thread;
use std::time::{Duration, Instant};

use rustix::fs::{Mode, OFlags, ResolveFlags};
use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};
use rustix::process::{Pid, Signal, kill_process};

use crate::calls::*;
use crate::device::{BUFFER_LENGTH, Machine};

/// Those that succeed or fail by themselves; each is a test.
pub(crate) const CLIENTS: &[(&str, fn())] = &[
    ("open_and_close", open_and_close),
    ("every_way_to_open", every_way_to_open),
    ("open_flags", open_flags),
    ("a_text_file_is_read_only", text_file),
    ("foreign_and_closed_descriptors", foreign_and_closed_descriptors),
    ("bad_pointers", bad_pointers),
    ("duplicates_and_the_last_close", duplicates_and_the_last_close),
    ("close_before_the_next_call", close_before_the_next_call),
    ("forks_and_the_last_close", forks_and_the_last_close),
    ("a_descriptor_in_flight", a_descriptor_in_flight),
    ("a_file_opened_anew_through_proc", a_file_opened_anew_through_proc),
    ("a_mapping_keeps_a_file_open", a_mapping_keeps_a_file_open),
    ("exec_closes_and_inherits", exec_closes_and_inherits),
    ("threads", threads),
    ("exec_by_another_thread", exec_by_another_thread),
    ("many_files", many_files),
    ("too_many_descriptors", too_many_descriptors),
    ("killed_at_any_moment", killed_at_any_moment),
    ("killed_while_the_server_sleeps", killed_while_the_server_sleeps),
    ("a_stalled_client_stops_nobody", a_stalled_client_stops_nobody),
    ("signals_do_not_repeat_calls", signals_do_not_repeat_calls),
    ("not_dumpable", not_dumpable),
    ("surroundings_are_as_before", surroundings_are_as_before),
    ("a_shell_and_its_children", a_shell_and_its_children),
    ("device_regions", device_regions),
    ("a_device_copies_private_memory", a_device_copies_private_memory),
    ("a_device_copies_a_memory_file", a_device_copies_a_memory_file),
    ("a_device_is_free_after_its_close", a_device_is_free_after_its_close),
    ("mapped_memory_must_be_there", mapped_memory_must_be_there),
    ("a_child_has_memory_of_its_own", a_child_has_memory_of_its_own),
    ("memory_goes_with_its_program", memory_goes_with_its_program),
    ("killed_while_a_device_works", killed_while_a_device_works),
];

/// Those that tests run with a special expectation, or that clients exec.
const PROGRAMS: &[(&str, fn())] = &[
    ("exit_with_seven", || std::process::exit(7)),
    ("abort", || std::process::abort()),
    ("leave_an_orphan", leave_an_orphan),
    ("await_terminate", await_terminate),
    ("await_interrupt", await_interrupt),
    ("nest", nest),
    ("after_exec", after_exec),
    ("after_exec_with_device", after_exec_with_device),
];

/// Runs the client that is named first.
pub(crate) fn main(arguments: &[String]) -> ExitCode {
    // A client that was execed by one knows the supervisor from it.
    let inherited = std::env::var("IOASID_TEST_SUPERVISOR").ok().and_then(|pid| pid.parse().ok());
    let parent = rustix::process::getppid().map_or(0, Pid::as_raw_pid);
    remember_supervisor(inherited.unwrap_or(parent));
    let (_, client) = CLIENTS.iter().chain(PROGRAMS).find(|(name, _)| *name == arguments[0]).unwrap();
    client();
    ExitCode::SUCCESS
}

/// A command that becomes another client.
fn this_program(client: &str) -> Command {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.arg("client").arg(client).env("IOASID_TEST_SUPERVISOR", supervisor().to_string());
    command
}

fn open_and_close() {
    assert_eq!(files_in_server(), 0);
    let iommu = open_iommu();
    assert_ne!(allocate(&iommu).unwrap(), 0);
    assert_eq!(ioctl(iommu.as_raw_fd(), UNKNOWN, 0), Err(Errno::NOTTY));
    let mut short = [4u32, 0, 0];
    assert_eq!(allocate_at(&iommu, (&raw mut short).addr() as u64), Err(Errno::INVAL));
    assert_eq!(files_in_server(), 1);
    drop(iommu);
    assert_eq!(files_in_server(), 0);
}

fn every_way_to_open() {
    let flags = OFlags::RDWR;
    let dev = open("/dev", OFlags::RDONLY | OFlags::DIRECTORY).unwrap();
    let path = c"/dev/iommu".as_ptr().addr() as u64;
    let relative = c"../dev/./iommu".as_ptr().addr() as u64;
    let mut opened = vec![
        open("/dev/iommu", flags).unwrap(),
        open("//dev//.././dev/iommu", flags).unwrap(),
        open("/proc/../dev/iommu", flags).unwrap(),
        rustix::fs::openat(&dev, "iommu", flags, Mode::empty()).unwrap(),
        rustix::fs::openat(&dev, "/dev/iommu", flags, Mode::empty()).unwrap(),
        rustix::fs::openat2(&dev, "iommu", flags, Mode::empty(), ResolveFlags::NO_SYMLINKS).unwrap(),
    ];
    let mut raw =
        vec![system_call(libc::SYS_openat, [dev.as_raw_fd() as u64, relative, libc::O_RDWR as u64, 0])];
    std::env::set_current_dir("/dev").unwrap();
    opened.push(open("iommu", flags).unwrap());
    #[cfg(target_arch = "x86_64")]
    {
        raw.push(system_call(libc::SYS_open, [path, libc::O_RDWR as u64, 0, 0]));
        raw.push(system_call(libc::SYS_creat, [path, 0o600, 0, 0]));
    }
    let high_garbage = 0xdead_beef_0000_0000 | libc::O_RDWR as u64;
    raw.push(system_call(libc::SYS_openat, [libc::AT_FDCWD as u64, path, high_garbage, 0]));

    let link = std::env::temp_dir().join(format!("ioasid-link-{}", std::process::id()));
    std::os::unix::fs::symlink("/dev/iommu", &link).unwrap();
    let through_link = open(link.to_str().unwrap(), flags);
    std::fs::remove_file(&link).unwrap();
    opened.push(through_link.unwrap());

    for fd in &raw {
        // SAFETY: the call has just returned it to us.
        opened.push(unsafe { OwnedFd::from_raw_fd(fd.unwrap() as i32) });
    }
    for fd in &opened {
        allocate(fd).unwrap();
    }
    assert_eq!(files_in_server(), opened.len());
    drop(opened);
    assert_eq!(files_in_server(), 0);

    for path in ["/dev/iommu/", "/dev/iommu/x", "/dev/iomm", "/dev/iommu2", "/iommu"] {
        assert!(open(path, flags).is_err(), "{path}");
    }
    assert_eq!(open("/dev/vfio/nothing", flags).err(), Some(Errno::NOENT));
    let nowhere = system_call(libc::SYS_openat, [libc::AT_FDCWD as u64, 8, 0, 0]);
    assert_eq!(nowhere, Err(Errno::FAULT));
}

fn open_flags() {
    let close_on_exec = |flags| {
        let fd = open("/dev/iommu", flags).unwrap();
        rustix::io::fcntl_getfd(&fd).unwrap().contains(rustix::io::FdFlags::CLOEXEC)
    };
    assert!(close_on_exec(OFlags::RDWR | OFlags::CLOEXEC));
    assert!(!close_on_exec(OFlags::RDWR));
    let nonblocking = open("/dev/iommu", OFlags::RDWR | OFlags::NONBLOCK).unwrap();
    assert!(rustix::fs::fcntl_getfl(&nonblocking).unwrap().contains(OFlags::NONBLOCK));
    let read_only = open("/dev/iommu", OFlags::RDONLY).unwrap();
    assert_eq!(rustix::fs::fcntl_getfl(&read_only).unwrap() & OFlags::RWMODE, OFlags::RDONLY);
    allocate(&read_only).unwrap();
    assert_eq!(open("/dev/iommu", OFlags::RDWR | OFlags::DIRECTORY).err(), Some(Errno::NOTDIR));
    assert_eq!(open("/dev/iommu", OFlags::RDWR | OFlags::CREATE | OFlags::EXCL).err(), Some(Errno::EXIST));
    drop((nonblocking, read_only));
    assert_eq!(files_in_server(), 0);
}

fn text_file() {
    let mut text = String::new();
    File::open("/dev/ioasid").unwrap().read_to_string(&mut text).unwrap();
    assert!(text.starts_with('{') && text.ends_with("}\n"), "{text}");
    assert_eq!(open("/dev/ioasid", OFlags::RDWR).err(), Some(Errno::ACCESS));
    let read_only = open("/dev/ioasid", OFlags::RDONLY).unwrap();
    assert!(rustix::io::write(&read_only, b"x").is_err());
    assert_eq!(ioctl(read_only.as_raw_fd(), IOAS_ALLOC, 0), Err(Errno::NOTTY));
}

fn foreign_and_closed_descriptors() {
    let null = open("/dev/null", OFlags::RDWR).unwrap();
    assert_eq!(allocate(&null), Err(Errno::NOTTY));
    let memory = rustix::fs::memfd_create("/dev/iommu", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
    assert_eq!(allocate(&memory), Err(Errno::NOTTY));
    for number in [-1, 1000, i32::MIN, i32::MAX] {
        assert_eq!(allocate_by_number(number), Err(Errno::BADF));
    }
    let iommu = open_iommu();
    let number = iommu.as_raw_fd();
    // The kernel ignores the high words of a descriptor number and of a command.
    let mut words = [12u32, 0, 0];
    let garbage = 0x5a5a_5a5a_0000_0000;
    let arguments =
        [garbage | number as u64, garbage | u64::from(IOAS_ALLOC), (&raw mut words).addr() as u64, 0];
    assert_eq!(system_call(libc::SYS_ioctl, arguments), Ok(0));
    assert_ne!(words[2], 0);
    drop(iommu);
    assert_eq!(allocate_by_number(number), Err(Errno::BADF));
    // The number now means something else.
    let duplicate = rustix::io::dup(&null).unwrap();
    assert_eq!(duplicate.as_raw_fd(), number);
    assert_eq!(allocate_by_number(number), Err(Errno::NOTTY));
    let path_only = open("/dev/null", OFlags::PATH).unwrap();
    assert!(allocate(&path_only).is_err());
}

fn bad_pointers() {
    const PAGE: usize = 4096;
    let iommu = open_iommu();
    let memory = pages(4 * PAGE, libc::PROT_READ | libc::PROT_WRITE);
    for address in [0, 1, 0xffff_8000_0000_0000, u64::MAX, u64::MAX - 11] {
        assert_eq!(allocate_at(&iommu, address), Err(Errno::FAULT), "{address:#x}");
    }
    poke(memory, &[12, 0, 0]);
    poke(memory + PAGE as u64 - 12, &[12, 0, 0]);
    poke(memory + PAGE as u64 - 8, &[12, 0, 0]);
    unmap(memory + PAGE as u64, PAGE);
    allocate_at(&iommu, memory).unwrap();
    assert_eq!(allocate_at(&iommu, memory + PAGE as u64 - 8), Err(Errno::FAULT), "its end is not mapped");
    poke(memory + PAGE as u64 - 12, &[12, 0, 0]);
    allocate_at(&iommu, memory + PAGE as u64 - 12).unwrap();

    poke(memory, &[12, 0, 0]);
    protect(memory, PAGE, libc::PROT_READ);
    assert_eq!(allocate_at(&iommu, memory), Err(Errno::FAULT), "the result cannot be written");
    protect(memory, PAGE, libc::PROT_NONE);
    assert_eq!(allocate_at(&iommu, memory), Err(Errno::FAULT));
    protect(memory, PAGE, libc::PROT_READ | libc::PROT_WRITE);
    allocate_at(&iommu, memory).unwrap();

    // Pages of a file beyond its end are mapped, and fault.
    let file = rustix::fs::memfd_create("short", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
    assert_eq!(allocate_at(&iommu, map_file(&file, PAGE)), Err(Errno::FAULT));
}

fn duplicates_and_the_last_close() {
    let iommu = open_iommu();
    let first = allocate(&iommu).unwrap();
    let second = rustix::io::dup(&iommu).unwrap();
    let mut third = open("/dev/null", OFlags::RDONLY).unwrap();
    rustix::io::dup2(&iommu, &mut third).unwrap();
    drop(iommu);
    assert_eq!(files_in_server(), 1);
    assert_ne!(allocate(&second).unwrap(), first, "the same open file goes on counting");
    drop(second);
    assert_eq!(files_in_server(), 1);
    allocate(&third).unwrap();
    let another = open_iommu();
    assert_eq!(files_in_server(), 2);
    // Replacing it is a close as well.
    rustix::io::dup2(&another, &mut third).unwrap();
    assert_eq!(files_in_server(), 1);
    drop((another, third));
    assert_eq!(files_in_server(), 0);
}

fn close_before_the_next_call() {
    for _ in 0..500 {
        let iommu = open_iommu();
        assert_eq!(ioctl(iommu.as_raw_fd(), UNKNOWN, 0), Err(Errno::NOTTY));
        drop(iommu);
        assert_eq!(files_in_server(), 0);
    }
}

fn forks_and_the_last_close() {
    let iommu = open_iommu();
    let before = allocate(&iommu).unwrap();
    let (reading, writing) = rustix::pipe::pipe().unwrap();
    let child = fork(|| {
        assert_ne!(allocate(&iommu).unwrap(), before);
        rustix::io::read(&reading, &mut [0; 1]).unwrap();
        allocate(&iommu).unwrap();
        assert_eq!(files_in_server(), 1);
    });
    drop(iommu);
    assert_eq!(files_in_server(), 1, "the child has it");
    rustix::io::write(&writing, b"x").unwrap();
    expect_success(child);
    assert_eq!(files_in_server(), 0);

    // A grandchild that outlives its parent, and is killed.
    let iommu = open_iommu();
    let child = fork(|| {
        let grandchild = fork(|| thread::sleep(Duration::from_secs(60)));
        rustix::io::write(&writing, &grandchild.as_raw_pid().to_ne_bytes()).unwrap();
    });
    expect_success(child);
    drop(iommu);
    let mut grandchild = [0; 4];
    rustix::io::read(&reading, &mut grandchild).unwrap();
    assert_eq!(files_in_server(), 1);
    kill_process(Pid::from_raw(i32::from_ne_bytes(grandchild)).unwrap(), Signal::KILL).unwrap();
    expect_files_in_server(0);
}

fn a_descriptor_in_flight() {
    let (ours, theirs) =
        socketpair(AddressFamily::UNIX, SocketType::STREAM, SocketFlags::CLOEXEC, None).unwrap();
    let iommu = open_iommu();
    let first = allocate(&iommu).unwrap();
    send(ours.as_fd(), iommu.as_fd());
    drop(iommu);
    assert_eq!(files_in_server(), 1, "nobody has it, but it can be received");
    let child = fork(|| {
        let received = receive(theirs.as_fd());
        assert_ne!(allocate(&received).unwrap(), first);
    });
    expect_success(child);
    assert_eq!(files_in_server(), 0);

    let iommu = open_iommu();
    send(ours.as_fd(), iommu.as_fd());
    drop(iommu);
    assert_eq!(files_in_server(), 1);
    drop((ours, theirs));
    expect_files_in_server(0);
}

fn a_file_opened_anew_through_proc() {
    let iommu = open_iommu();
    let first = allocate(&iommu).unwrap();
    let path = format!("/proc/self/fd/{}", iommu.as_raw_fd());
    let mut more: Vec<OwnedFd> = (0..5).map(|_| open(&path, OFlags::RDWR).unwrap()).collect();
    more.push(open(&path, OFlags::RDONLY).unwrap());
    let path_only = open(&path, OFlags::PATH).unwrap();
    drop(iommu);
    assert_eq!(files_in_server(), 1);
    assert!(allocate(&more[0]).unwrap() > first, "it is the same file");
    // Several equal events in a row, which the kernel merges into one.
    more.truncate(1);
    assert_eq!(files_in_server(), 1);
    allocate(&more[0]).unwrap();
    drop(more);
    assert_eq!(files_in_server(), 0);
    drop(path_only);

    // All at once, by the end of a process.
    let child = fork(|| {
        let iommu = open_iommu();
        let path = format!("/proc/self/fd/{}", iommu.as_raw_fd());
        let more: Vec<OwnedFd> = (0..5).map(|_| open(&path, OFlags::RDWR).unwrap()).collect();
        assert_eq!(files_in_server(), 1);
        std::mem::forget((iommu, more));
    });
    expect_success(child);
    assert_eq!(files_in_server(), 0);
}

fn a_mapping_keeps_a_file_open() {
    let iommu = open_iommu();
    let address = map_file(&iommu, 4096);
    drop(iommu);
    assert_eq!(files_in_server(), 1);
    unmap(address, 4096);
    assert_eq!(files_in_server(), 0);
}

fn exec_closes_and_inherits() {
    let closed = open_iommu();
    let inherited = open("/dev/iommu", OFlags::RDWR).unwrap();
    allocate(&closed).unwrap();
    allocate(&inherited).unwrap();
    assert_eq!(files_in_server(), 2);
    let numbers = [closed.as_raw_fd().to_string(), inherited.as_raw_fd().to_string()];
    let error = this_program("after_exec").args(numbers).exec();
    panic!("{error}");
}

fn after_exec() {
    let numbers: Vec<i32> = std::env::args().skip(3).map(|number| number.parse().unwrap()).collect();
    assert_eq!(files_in_server(), 1);
    assert_eq!(allocate_by_number(numbers[0]), Err(Errno::BADF));
    assert!(allocate_by_number(numbers[1]).unwrap() > 1);
    close_number(numbers[1]);
    assert_eq!(files_in_server(), 0);
}

fn threads() {
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

/// The thread that execs becomes the first one of its process, with that one's id.
fn exec_by_another_thread() {
    let closed = open_iommu();
    let inherited = open("/dev/iommu", OFlags::RDWR).unwrap();
    let busy = open_iommu();
    allocate(&inherited).unwrap();
    thread::scope(|scope| {
        for _ in 0..3 {
            scope.spawn(|| {
                loop {
                    let _ = allocate(&busy);
                }
            });
        }
        scope.spawn(|| {
            thread::sleep(Duration::from_millis(20));
            allocate(&inherited).unwrap();
            let numbers = [closed.as_raw_fd().to_string(), inherited.as_raw_fd().to_string()];
            panic!("{}", this_program("after_exec").args(numbers).exec());
        });
    });
}

fn many_files() {
    let files: Vec<OwnedFd> = (0..300).map(|_| open_iommu()).collect();
    assert_eq!(files_in_server(), 300);
    for file in &files {
        allocate(file).unwrap();
    }
    let mut files = files;
    files.truncate(150);
    assert_eq!(files_in_server(), 150);
    drop(files);
    assert_eq!(files_in_server(), 0);
}

fn too_many_descriptors() {
    use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
    let before = getrlimit(Resource::Nofile);
    let first = open_iommu();
    setrlimit(Resource::Nofile, Rlimit { current: Some(first.as_raw_fd() as u64 + 3), ..before }).unwrap();
    let more: Vec<OwnedFd> = std::iter::from_fn(|| match open("/dev/iommu", OFlags::RDWR) {
        Ok(fd) => Some(fd),
        Err(errno) => {
            assert_eq!(errno, Errno::MFILE);
            None
        }
    })
    .take(100)
    .collect();
    assert_eq!(more.len(), 2);
    for _ in 0..20 {
        assert_eq!(open("/dev/iommu", OFlags::RDWR).err(), Some(Errno::MFILE));
    }
    setrlimit(Resource::Nofile, before).unwrap();
    expect_files_in_server(3);
    drop((first, more));
    assert_eq!(files_in_server(), 0);
}

fn killed_at_any_moment() {
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

/// Tells when all threads of the supervisor have stopped, without a call that would need it.
struct StopWatch(Vec<File>);

impl StopWatch {
    fn new() -> Self {
        let threads = std::fs::read_dir(format!("/proc/{}/task", supervisor())).unwrap();
        Self(threads.map(|thread| File::open(thread.unwrap().path().join("stat")).unwrap()).collect())
    }

    fn wait(&self) {
        let start = Instant::now();
        let is_stopped = |file: &File| {
            let mut text = [0; 512];
            let length = file.read_at(&mut text, 0).unwrap();
            // The state is the word after the name in parentheses.
            let name_end = text[..length].iter().rposition(|byte| *byte == b')').unwrap();
            text[name_end + 2] == b'T'
        };
        while !self.0.iter().all(is_stopped) {
            assert!(start.elapsed() < Duration::from_secs(20));
            thread::sleep(Duration::from_millis(1));
        }
    }
}

/// Nothing between the two signals may need the supervisor.
fn killed_while_the_server_sleeps() {
    let iommu = open_iommu();
    let supervisor = Pid::from_raw(supervisor()).unwrap();
    for _ in 0..10 {
        let (reading, writing) = rustix::pipe::pipe().unwrap();
        let child = fork(|| {
            rustix::io::read(&reading, &mut [0; 1]).unwrap();
            let _ = allocate(&iommu);
        });
        let stopped = StopWatch::new();
        kill_process(supervisor, Signal::STOP).unwrap();
        stopped.wait();
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

/// Copying from a client may take for ever: from memory that somebody else provides page by page, and does not.
fn a_stalled_client_stops_nobody() {
    let new_userfaultfd = || system_call(libc::SYS_userfaultfd, [libc::O_CLOEXEC as u64, 0, 0, 0]);
    match new_userfaultfd() {
        Ok(descriptor) => close_number(descriptor as i32),
        // Only root, or vm.unprivileged_userfaultfd, may stall the kernel.
        Err(errno) => {
            assert!(!rustix::process::getuid().is_root(), "{errno}");
            return;
        }
    }
    let iommu = open_iommu();
    let child = fork(|| {
        const PAGE: u64 = 4096;
        const UFFDIO_API: u32 = 0xc018_aa3f;
        const UFFDIO_REGISTER: u32 = 0xc020_aa00;
        let userfaultfd = new_userfaultfd().unwrap() as i32;
        let mut api = [0xaau64, 0, 0];
        ioctl(userfaultfd, UFFDIO_API, (&raw mut api).addr() as u64).unwrap();
        let memory = pages(8 * PAGE as usize, libc::PROT_READ | libc::PROT_WRITE);
        let mut register = [memory, 8 * PAGE, 1, 0];
        ioctl(userfaultfd, UFFDIO_REGISTER, (&raw mut register).addr() as u64).unwrap();
        thread::scope(|scope| {
            for number in 0..8 {
                let iommu = &iommu;
                scope.spawn(move || allocate_at(iommu, memory + number * PAGE));
            }
        });
    });
    // Long enough for all eight to be stuck.
    thread::sleep(Duration::from_millis(200));
    let start = Instant::now();
    for _ in 0..100 {
        allocate(&iommu).unwrap();
    }
    assert!(start.elapsed() < Duration::from_secs(10));
    kill_process(child, Signal::KILL).unwrap();
    assert_eq!(wait(child).terminating_signal(), Some(libc::SIGKILL));
    allocate(&iommu).unwrap();
    drop(iommu);
    expect_files_in_server(0);
}

fn signals_do_not_repeat_calls() {
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

fn not_dumpable() {
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

fn surroundings_are_as_before() {
    let own = std::fs::read_to_string("/proc/self/status").unwrap();
    let theirs = std::fs::read_to_string(format!("/proc/{}/status", supervisor())).unwrap();
    let field = |status: &str, name: &str| {
        status.lines().find_map(|line| line.strip_prefix(name)).map(|value| value.trim().to_owned()).unwrap()
    };
    // What the supervisor's own parent ignores, the supervisor did from the beginning.
    let parent = std::fs::read_to_string(format!("/proc/{}/status", field(&theirs, "PPid:"))).unwrap();
    for signal in [libc::SIGHUP, libc::SIGINT, libc::SIGQUIT, libc::SIGTERM, libc::SIGCHLD] {
        let ignored =
            |status: &str| u64::from_str_radix(&field(status, "SigIgn:"), 16).unwrap() >> (signal - 1) & 1;
        assert_eq!(ignored(&own), ignored(&parent), "signal {signal}");
    }
    assert_eq!(field(&own, "SigBlk:"), field(&parent, "SigBlk:"));
    let privileged = field(&theirs, "CapEff:") != "0000000000000000";
    assert_eq!(field(&own, "NoNewPrivs:"), if privileged { "0" } else { "1" });
    let soft = |pid: &str| {
        let limits = std::fs::read_to_string(format!("/proc/{pid}/limits")).unwrap();
        let line = limits.lines().find_map(|line| line.strip_prefix("Max open files")).unwrap().to_owned();
        let mut words = line.split_whitespace().map(str::to_owned);
        (words.next().unwrap(), words.next().unwrap())
    };
    let (own_soft, own_hard) = soft("self");
    let (their_soft, their_hard) = soft(&supervisor().to_string());
    assert_eq!(own_hard, their_hard);
    assert_eq!(their_soft, their_hard);
    assert!(own_soft.parse::<u64>().unwrap() <= own_hard.parse::<u64>().unwrap());
    for entry in std::fs::read_dir("/proc/self/fd").unwrap() {
        let link = std::fs::read_link(entry.unwrap().path()).unwrap_or_default();
        let link = link.to_string_lossy();
        assert!(!["seccomp", "inotify", "pidfd", "memfd"].iter().any(|kind| link.contains(kind)), "{link}");
    }
}

fn a_shell_and_its_children() {
    let script = "exec 3<>/dev/iommu && (exec 4>&3; true) && cat /dev/ioasid | cat && \
                  for i in 1 2 3; do sh -c 'true 5<>/dev/iommu' & done; wait";
    let output = Command::new("sh").arg("-c").arg(script).output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    assert!(output.stdout.starts_with(b"{"));
    expect_files_in_server(0);
}

fn leave_an_orphan() {
    // An orphan that has not been reaped would be left when the run is over.
    fork(|| {
        fork(|| {
            thread::sleep(Duration::from_millis(300));
            let iommu = open_iommu();
            assert_ne!(allocate(&iommu).unwrap(), 0);
            println!("the orphan has an address space");
        });
    });
    std::process::exit(7);
}

/// Reports that it is ready and waits for a signal that ends the program with the signal's number.
fn await_signal(signal: i32) {
    extern "C" fn end(signal: libc::c_int) {
        // SAFETY: async-signal-safe, ends the process.
        unsafe { libc::_exit(signal) };
    }
    // SAFETY: the handler is async-signal-safe; an all-zero sigaction is valid otherwise.
    unsafe {
        let mut action: libc::sigaction = std::mem::zeroed();
        action.sa_sigaction = end as extern "C" fn(libc::c_int) as libc::sighandler_t;
        assert_eq!(libc::sigaction(signal, &raw const action, std::ptr::null_mut()), 0);
    }
    println!("ready");
    std::io::stdout().flush().unwrap();
    thread::sleep(Duration::from_secs(50));
}

fn await_terminate() {
    await_signal(libc::SIGTERM);
}

fn await_interrupt() {
    await_signal(libc::SIGINT);
}

fn nest() {
    let own = std::env::current_exe().unwrap();
    let output = Command::new(own).args(["supervise", "foreground", "true"]).output().unwrap();
    assert_eq!(output.status.code(), Some(125));
    std::io::stdout().write_all(&output.stdout).unwrap();
}

fn device_regions() {
    let machine = Machine::new();
    let Machine { device, config, registers, .. } = &machine;
    let mut ids = [0; 4];
    device.read_exact_at(&mut ids, *config).unwrap();
    assert_eq!(ids, [0x34, 0x12, 0xe8, 0x11]);
    device.write_all_at(&0x1234_5678u32.to_le_bytes(), registers + 4).unwrap();
    let mut inverted = [0; 4];
    device.read_exact_at(&mut inverted, registers + 4).unwrap();
    assert_eq!(u32::from_le_bytes(inverted), !0x1234_5678);

    // The same in pieces.
    let (mut vendor, mut rest) = ([0; 2], [0; 2]);
    let mut pieces = [IoSliceMut::new(&mut vendor), IoSliceMut::new(&mut rest)];
    assert_eq!(rustix::io::preadv(device, &mut pieces, *config).unwrap(), 4);
    assert_eq!((vendor, rest), ([0x34, 0x12], [0xe8, 0x11]));
    let value = 0x9abc_def0u32.to_le_bytes();
    let pieces = [IoSlice::new(&value[..1]), IoSlice::new(&[]), IoSlice::new(&value[1..])];
    assert_eq!(rustix::io::pwritev(device, &pieces, registers + 4).unwrap(), 4);
    device.read_exact_at(&mut inverted, registers + 4).unwrap();
    assert_eq!(u32::from_le_bytes(inverted), !0x9abc_def0);

    let read = |address: u64, length: u64, offset: u64| {
        system_call(libc::SYS_pread64, [device.as_raw_fd() as u64, address, length, offset])
    };
    assert_eq!(read(8, 4, *config), Err(Errno::FAULT));
    assert_eq!(read(8, 0, *config), Ok(0));
    let memory = pages(4096, libc::PROT_READ);
    assert_eq!(read(memory, 4, *config), Err(Errno::FAULT), "it cannot be written");

    // The same offsets mean nothing to other files.
    let null = File::open("/dev/null").unwrap();
    assert_eq!(null.read_at(&mut ids, *config).unwrap(), 0);
    let closed = system_call(libc::SYS_pread64, [900, memory, 4, *config]);
    assert_eq!(closed, Err(Errno::BADF));

    let read_only = open("/dev/vfio/devices/vfio0", OFlags::RDONLY).unwrap();
    assert_eq!(rustix::io::pwrite(&read_only, b"x", *config), Err(Errno::BADF));
}

/// Fills memory from [`pages`] with bytes that tell their place.
fn fill(address: u64, length: u64, seed: u32) {
    let words: Vec<u32> =
        (0..length as u32 / 4).map(|number| number.wrapping_mul(0x9e37_79b9) ^ seed).collect();
    poke(address, &words);
}

fn same(left: u64, right: u64, length: u64) -> bool {
    (0..length).all(|offset| peek(left + offset) == peek(right + offset))
}

const PAGE: u64 = 4096;
/// Where the tests map things for devices.
const IOVA: u64 = 0x10_0000;

fn a_device_copies_private_memory() {
    let machine = Machine::new();
    let memory = pages(4 * PAGE as usize, libc::PROT_READ | libc::PROT_WRITE);
    machine.map(memory, 4 * PAGE, IOVA).unwrap();
    fill(memory, PAGE, 1);
    machine.fetch(IOVA, BUFFER_LENGTH);
    machine.store(IOVA + 2 * PAGE, BUFFER_LENGTH);
    assert!(same(memory, memory + 2 * PAGE, PAGE));
    assert!(!same(memory, memory + PAGE, PAGE));
    // From a place that straddles two pages.
    fill(memory + PAGE, PAGE, 2);
    machine.fetch(IOVA + PAGE / 2, BUFFER_LENGTH);
    machine.store(IOVA + 2 * PAGE + 8, BUFFER_LENGTH);
    assert!(same(memory + PAGE / 2, memory + 2 * PAGE + 8, PAGE));
    // The program's other threads have the same memory.
    thread::scope(|scope| {
        scope.spawn(|| {
            machine.unmap(IOVA, 4 * PAGE).unwrap();
            machine.map(memory + PAGE, PAGE, IOVA).unwrap();
            machine.fetch(IOVA, BUFFER_LENGTH);
            machine.map(memory, PAGE, 2 * IOVA).unwrap();
            machine.store(2 * IOVA, BUFFER_LENGTH);
        });
    });
    assert!(same(memory, memory + PAGE, PAGE));
    machine.unmap(IOVA, PAGE).unwrap();
    fill(memory, PAGE, 3);
    machine.store(IOVA, BUFFER_LENGTH);
    assert!(!same(memory, memory + PAGE, PAGE), "what is unmapped is not written");
}

fn a_device_copies_a_memory_file() {
    let machine = Machine::new();
    let file = rustix::fs::memfd_create("memory", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
    rustix::fs::ftruncate(&file, 4 * PAGE).unwrap();
    machine.map_file(file.as_raw_fd(), PAGE, 2 * PAGE, IOVA).unwrap();
    let bytes: Vec<u8> = (0..PAGE).map(|number| (number % 251) as u8).collect();
    rustix::io::pwrite(&file, &bytes, PAGE).unwrap();
    machine.fetch(IOVA, BUFFER_LENGTH);
    machine.store(IOVA + PAGE, BUFFER_LENGTH);
    let mut copied = vec![0; PAGE as usize];
    rustix::io::pread(&file, &mut copied, 2 * PAGE).unwrap();
    assert_eq!(copied, bytes);
    // It stays reachable when the program has closed it.
    let keep = rustix::io::dup(&file).unwrap();
    drop(file);
    rustix::io::pwrite(&keep, &bytes[1..], PAGE).unwrap();
    machine.fetch(IOVA, BUFFER_LENGTH);
    machine.store(IOVA + PAGE, BUFFER_LENGTH);
    rustix::io::pread(&keep, &mut copied, 2 * PAGE).unwrap();
    assert_eq!(copied[..PAGE as usize - 1], bytes[1..]);

    assert_eq!(machine.map_file(900, 0, PAGE, 2 * IOVA), Err(Errno::BADF));
    let null = File::open("/dev/null").unwrap();
    assert!(machine.map_file(null.as_raw_fd(), 0, PAGE, 2 * IOVA).is_err());
    assert!(machine.map_file(machine.iommu.as_raw_fd(), 0, PAGE, 2 * IOVA).is_err());
}

fn a_device_is_free_after_its_close() {
    for round in 0..100 {
        let machine = Machine::new();
        let second = open("/dev/vfio/devices/vfio0", OFlags::RDWR).unwrap();
        assert!(
            Machine::bind(&machine.iommu, &second).is_err(),
            "round {round}: it is bound through another file"
        );
        let Machine { device, iommu, .. } = machine;
        // In either order.
        if round % 2 == 0 {
            drop((device, iommu));
        } else {
            drop((iommu, device));
        }
        let iommu = open_iommu();
        Machine::bind(&iommu, &second).unwrap();
    }
}

fn mapped_memory_must_be_there() {
    let machine = Machine::new();
    let memory = pages(8 * PAGE as usize, libc::PROT_READ | libc::PROT_WRITE);
    unmap(memory + PAGE, PAGE as usize);
    protect(memory + 3 * PAGE, PAGE as usize, libc::PROT_READ);
    protect(memory + 5 * PAGE, PAGE as usize, libc::PROT_NONE);
    machine.map(memory, PAGE, IOVA).unwrap();
    assert_eq!(machine.map(memory, 2 * PAGE, 2 * IOVA), Err(Errno::FAULT), "a hole at the end");
    assert_eq!(machine.map(memory + PAGE, 2 * PAGE, 2 * IOVA), Err(Errno::FAULT), "a hole at the start");
    assert_eq!(machine.map(memory + 2 * PAGE, 2 * PAGE, 2 * IOVA), Err(Errno::FAULT), "not writable");
    machine.map_read_only(memory + 2 * PAGE, 3 * PAGE, 2 * IOVA).unwrap();
    assert_eq!(
        machine.map_read_only(memory + 4 * PAGE, 2 * PAGE, 3 * IOVA),
        Err(Errno::FAULT),
        "not readable"
    );
    assert_eq!(machine.map(0, PAGE, 3 * IOVA), Err(Errno::FAULT));
    assert_eq!(machine.map(0u64.wrapping_sub(PAGE), PAGE, 3 * IOVA).map_err(|_| ()), Err(()));
    machine.map(memory + 6 * PAGE, 2 * PAGE, 3 * IOVA).unwrap();
}

fn a_child_has_memory_of_its_own() {
    let machine = Machine::new();
    let memory = pages(2 * PAGE as usize, libc::PROT_READ | libc::PROT_WRITE);
    fill(memory, PAGE, 1);
    let child = fork(|| {
        fill(memory, PAGE, 2);
        // The address space now maps the child's page at one place...
        machine.map(memory, PAGE, IOVA).unwrap();
    });
    expect_success(child);
    // ...which has gone with the child, and the parent's at another.
    machine.map(memory, 2 * PAGE, 2 * IOVA).unwrap();
    machine.fetch(2 * IOVA, BUFFER_LENGTH);
    machine.fetch(IOVA, BUFFER_LENGTH);
    machine.store(2 * IOVA + PAGE, BUFFER_LENGTH);
    assert!(same(memory, memory + PAGE, PAGE));
}

fn memory_goes_with_its_program() {
    let machine = Machine::new();
    let memory = pages(PAGE as usize, libc::PROT_READ | libc::PROT_WRITE);
    fill(memory, PAGE, 1);
    machine.map(memory, PAGE, IOVA).unwrap();
    machine.fetch(IOVA, BUFFER_LENGTH);
    let (iommu, device) = (machine.iommu, machine.device);
    rustix::io::fcntl_setfd(&iommu, rustix::io::FdFlags::empty()).unwrap();
    rustix::io::fcntl_setfd(&device, rustix::io::FdFlags::empty()).unwrap();
    let numbers =
        [iommu.as_raw_fd(), device.as_raw_fd(), machine.space as i32].map(|number| number.to_string());
    panic!("{}", this_program("after_exec_with_device").args(numbers).arg(memory.to_string()).exec());
}

fn after_exec_with_device() {
    let numbers: Vec<u64> = std::env::args().skip(3).map(|number| number.parse().unwrap()).collect();
    // SAFETY: the program before this one left these descriptors to us.
    let [iommu, device] =
        [numbers[0], numbers[1]].map(|number| unsafe { OwnedFd::from_raw_fd(number as i32) });
    let machine = Machine::inherited(iommu, device, numbers[2] as u32);
    // Something of ours where the other program had its page.
    // SAFETY: nothing is there, or the call fails.
    let same_place = unsafe {
        libc::mmap(
            numbers[3] as *mut libc::c_void,
            PAGE as usize,
            libc::PROT_READ | libc::PROT_WRITE,
            libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED_NOREPLACE,
            -1,
            0,
        )
    };
    if same_place == libc::MAP_FAILED {
        println!("the place is taken, which is as good a target");
    } else {
        fill(numbers[3], PAGE, 7);
    }
    let memory = pages(2 * PAGE as usize, libc::PROT_READ | libc::PROT_WRITE);
    fill(memory, PAGE, 7);
    // The device still holds what it fetched before, and cannot write it into the new program's memory.
    machine.store(IOVA, BUFFER_LENGTH);
    if same_place != libc::MAP_FAILED {
        assert!(same(memory, numbers[3], PAGE));
    }
    // What the new program maps is its own.
    machine.map(memory, 2 * PAGE, 2 * IOVA).unwrap();
    machine.fetch(2 * IOVA, BUFFER_LENGTH);
    machine.store(2 * IOVA + PAGE, BUFFER_LENGTH);
    assert!(same(memory, memory + PAGE, PAGE));
    drop(machine);
    assert_eq!(files_in_server(), 0);
}

fn killed_while_a_device_works() {
    for round in 0..20 {
        let child = fork(|| {
            let machine = Machine::new();
            let memory = pages(2 * PAGE as usize, libc::PROT_READ | libc::PROT_WRITE);
            loop {
                machine.map(memory, 2 * PAGE, IOVA).unwrap();
                machine.fetch(IOVA, BUFFER_LENGTH);
                machine.store(IOVA + PAGE, BUFFER_LENGTH);
                machine.unmap(IOVA, 2 * PAGE).unwrap();
            }
        });
        thread::sleep(Duration::from_micros(2000 + 700 * round));
        kill_process(child, Signal::KILL).unwrap();
        assert_eq!(wait(child).terminating_signal(), Some(libc::SIGKILL));
        expect_files_in_server(0);
        // The device is free for the next.
        drop(Machine::new());
    }
}
