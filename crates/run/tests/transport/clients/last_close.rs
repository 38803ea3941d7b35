//! The last close of a file, wherever its descriptors have gone.

use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::thread;
use std::time::Duration;

use rustix::fs::OFlags;
use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};
use rustix::process::{Pid, Signal, kill_process};

use super::this_program;
use crate::calls::*;

pub(super) fn duplicates_and_the_last_close() {
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

pub(super) fn close_before_the_next_call() {
    for _ in 0..500 {
        let iommu = open_iommu();
        assert_eq!(ioctl(iommu.as_raw_fd(), UNKNOWN, 0), Err(Errno::NOTTY));
        drop(iommu);
        assert_eq!(files_in_server(), 0);
    }
}

pub(super) fn forks_and_the_last_close() {
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
        let grandchild = fork(|| thread::sleep(Duration::from_secs(3600)));
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

pub(super) fn a_descriptor_in_flight() {
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

pub(super) fn a_file_opened_anew_through_proc() {
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

pub(super) fn a_mapping_keeps_a_file_open() {
    let iommu = open_iommu();
    // A kernel maps nothing of it. With this flag, which only loaders use, nobody looks.
    let flags = libc::MAP_SHARED | libc::MAP_DENYWRITE;
    let address = try_map(&iommu, 4096, libc::PROT_READ, flags, 0).unwrap();
    drop(iommu);
    assert_eq!(files_in_server(), 1);
    unmap(address, 4096);
    assert_eq!(files_in_server(), 0);
}

pub(super) fn exec_closes_and_inherits() {
    let closed = open_iommu();
    let inherited = open("/dev/iommu", OFlags::RDWR).unwrap();
    allocate(&closed).unwrap();
    allocate(&inherited).unwrap();
    assert_eq!(files_in_server(), 2);
    let numbers = [closed.as_raw_fd().to_string(), inherited.as_raw_fd().to_string()];
    let error = this_program("after_exec").args(numbers).exec();
    panic!("{error}");
}

/// What other threads were about when they died, the server may be about a moment longer.
pub(super) fn after_exec_of_a_thread() {
    expect_files_in_server(1);
    after_exec();
}

pub(super) fn after_exec() {
    let numbers: Vec<i32> = std::env::args().skip(3).map(|number| number.parse().unwrap()).collect();
    assert_eq!(files_in_server(), 1);
    assert_eq!(allocate_by_number(numbers[0]), Err(Errno::BADF));
    assert!(allocate_by_number(numbers[1]).unwrap() > 1);
    close_number(numbers[1]);
    assert_eq!(files_in_server(), 0);
}

/// The thread that execs becomes the first one of its process, with that one's id.
pub(super) fn exec_by_another_thread() {
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
            panic!("{}", this_program("after_exec_of_a_thread").args(numbers).exec());
        });
    });
}

pub(super) fn many_files() {
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
