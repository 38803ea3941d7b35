//! Programs that die in the middle of everything, and what the supervisor has left of them afterwards: nothing.

use std::collections::BTreeMap;
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::Mutex;
use std::thread;
use std::time::{Duration, Instant};

use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
use rustix::process::{Signal, kill_process};

use crate::calls::*;
use crate::device::{BUFFER_LENGTH, Machine};

const PAGE: u64 = 4096;
const IOVA: u64 = 0x10_0000;
const PASID: u32 = 5;
/// The program's own memory files are called that.
const NAME: &str = "of-the-killed-program";

/// So many descriptors of threads that have died may be open yet: 256 threads are remembered, each by up to four.
const REMEMBERED: usize = 4 * 256;

/// What the supervisor has.
#[derive(Debug, PartialEq, Eq)]
struct Possessions {
    /// What its descriptors lead to, without numbers, and how many lead there; but for those of threads that are remembered,
    /// and of its own, of which there are as many as there was work at once.
    descriptors: BTreeMap<String, usize>,
    /// Mappings of the program's memory files.
    mapped: usize,
    /// Contexts with their objects, areas, devices and PASIDs, and who is charged for how many pages.
    state: String,
}

impl Possessions {
    fn now() -> Possessions {
        let state = std::fs::read_to_string("/dev/ioasid").unwrap();
        // The most that was charged is remembered.
        let state = state.lines().filter(|line| !line.contains("peak_pages")).collect();
        // That was a file as well, whose close is seen before the next call that is served.
        let entries = std::fs::read_dir(format!("/proc/{}/fd", supervisor())).unwrap();
        let mut descriptors = BTreeMap::new();
        let mut remembered = 0;
        for link in entries.filter_map(|entry| std::fs::read_link(entry.unwrap().path()).ok()) {
            let kind: String =
                link.to_string_lossy().chars().filter(|letter| !letter.is_ascii_digit()).collect();
            match kind.as_str() {
                "anon_inode:[eventpoll]" => {}
                kind if kind.starts_with("/proc/") => remembered += 1,
                _ => *descriptors.entry(kind).or_insert(0) += 1,
            }
        }
        assert!(remembered <= REMEMBERED, "{remembered} descriptors of threads");
        let maps = std::fs::read_to_string(format!("/proc/{}/maps", supervisor())).unwrap();
        Possessions { descriptors, mapped: maps.lines().filter(|line| line.contains(NAME)).count(), state }
    }

    /// When nothing has changed for a while.
    fn at_rest() -> Possessions {
        let start = Instant::now();
        let (mut now, mut unchanged) = (Possessions::now(), 0);
        while unchanged < 20 {
            assert!(start.elapsed() < Duration::from_secs(60), "never at rest: {now:#?}");
            thread::sleep(Duration::from_millis(5));
            let before = std::mem::replace(&mut now, Possessions::now());
            unchanged = if now == before { unchanged + 1 } else { 0 };
        }
        now
    }

    /// Returns when the supervisor has just that again; what a death sets free is free soon.
    fn expect_again(&self, when: &str) {
        let start = Instant::now();
        loop {
            let now = Possessions::now();
            if now == *self {
                return;
            }
            assert!(start.elapsed() < Duration::from_secs(60), "{when}:\n{now:#?}\ninstead of\n{self:#?}");
            thread::sleep(Duration::from_millis(2));
        }
    }
}

/// Threads that make calls of every kind while a device copies, until the end of the process.
fn work_until_the_end(at_work: &OwnedFd) {
    let machine = Machine::new();
    let second = allocate(&machine.iommu).unwrap();
    let [plain, other] = [machine.space, second].map(|space| machine.table_for_pasids(space).unwrap());
    let memory = pages(8 * PAGE as usize, libc::PROT_READ | libc::PROT_WRITE);
    for (space, address) in [(machine.space, memory), (second, memory + 2 * PAGE)] {
        machine.map_in(space, address, 2 * PAGE, IOVA).unwrap();
    }
    machine.attach(plain).unwrap();
    machine.attach_pasid(PASID, other).unwrap();
    let file = memfd_create(NAME, MemfdFlags::CLOEXEC).unwrap();
    ftruncate(&file, 4 * PAGE).unwrap();
    let started = Mutex::new(4);
    let start = || {
        let mut missing = started.lock().unwrap();
        *missing -= 1;
        if *missing == 0 {
            rustix::io::write(at_work, b"x").unwrap();
        }
    };
    thread::scope(|scope| {
        // The device copies for the guest and for one of its processes by turns.
        scope.spawn(|| {
            start();
            for pasid in [None, Some(PASID)].into_iter().cycle() {
                machine.use_pasid(pasid);
                machine.fetch(IOVA, BUFFER_LENGTH);
                machine.store(IOVA + PAGE, BUFFER_LENGTH);
            }
        });
        scope.spawn(|| {
            start();
            loop {
                machine.map(memory + 4 * PAGE, 4 * PAGE, 2 * IOVA).unwrap();
                machine.map_file(file.as_raw_fd(), 0, 4 * PAGE, 3 * IOVA).unwrap();
                machine.unmap(2 * IOVA, 4 * PAGE).unwrap();
                machine.unmap(3 * IOVA, 4 * PAGE).unwrap();
            }
        });
        scope.spawn(|| {
            start();
            loop {
                machine.attach_pasid(PASID, plain).unwrap();
                machine.attach_pasid(PASID, other).unwrap();
                machine.detach_pasid(PASID).unwrap();
                machine.attach_pasid(PASID, other).unwrap();
            }
        });
        scope.spawn(|| {
            start();
            loop {
                let own = open_iommu();
                let space = allocate(&own).unwrap();
                machine.map_in(machine.space, memory, PAGE, 4 * IOVA).unwrap();
                machine.unmap(4 * IOVA, PAGE).unwrap();
                assert!(space > 0 && std::fs::read_to_string("/dev/ioasid").is_ok());
            }
        });
    });
}

pub(super) fn killed_in_the_middle_of_everything() {
    let round = |number: u64| {
        let (reading, writing) = rustix::pipe::pipe().unwrap();
        let child = fork(|| work_until_the_end(&writing));
        // Every fourth one dies before it is ready.
        if number % 4 != 3 {
            assert_eq!(rustix::io::read(&reading, &mut [0; 1]), Ok(1));
            assert!(Possessions::now().state.contains("\"attached_to\""), "nothing is there to be left");
        }
        thread::sleep(Duration::from_micros(900 * (number % 16)));
        kill_process(child, Signal::KILL).unwrap();
        assert_eq!(wait(child).terminating_signal(), Some(libc::SIGKILL));
    };
    // What the supervisor opens once for all programs it has after the first one.
    round(0);
    expect_files_in_server(0);
    // The device is free, so the program is gone for good.
    drop(Machine::new());
    expect_files_in_server(0);
    let before = Possessions::at_rest();
    assert!(before.mapped == 0 && !before.state.contains("\"areas\""), "{before:#?}");
    for number in 1..24 {
        round(number);
        before.expect_again(&format!("after death {number}"));
    }
    // And all of it can be had again.
    drop(Machine::new());
    before.expect_again("after one that closes its files");
}
