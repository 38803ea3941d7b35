//! What a program finds around itself, its descendants, and its end.

use std::io::Write;
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

use crate::calls::*;

pub(super) fn surroundings_are_as_before() {
    let own = std::fs::read_to_string("/proc/self/status").unwrap();
    let theirs = std::fs::read_to_string(format!("/proc/{}/status", supervisor())).unwrap();
    let field = |status: &str, name: &str| {
        status.lines().find_map(|line| line.strip_prefix(name)).map(|value| value.trim().to_owned()).unwrap()
    };
    // What the supervisor's own parent ignores, the supervisor did from the beginning.
    let parent = || std::fs::read_to_string(format!("/proc/{}/status", field(&theirs, "PPid:"))).unwrap();
    for signal in [libc::SIGHUP, libc::SIGINT, libc::SIGQUIT, libc::SIGTERM, libc::SIGCHLD] {
        let ignored =
            |status: &str| u64::from_str_radix(&field(status, "SigIgn:"), 16).unwrap() >> (signal - 1) & 1;
        assert_eq!(ignored(&own), ignored(&parent()), "signal {signal}");
    }
    // It runs other tests meanwhile, and for the moment in which a thread starts another all signals are blocked.
    let start = Instant::now();
    while field(&own, "SigBlk:") != field(&parent(), "SigBlk:") {
        assert!(start.elapsed() < Duration::from_secs(20), "{own}");
        thread::sleep(Duration::from_millis(1));
    }
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

pub(super) fn a_shell_and_its_children() {
    let script = "exec 3<>/dev/iommu && (exec 4>&3; true) && cat /dev/ioasid | cat && \
                  for i in 1 2 3; do sh -c 'true 5<>/dev/iommu' & done; wait";
    let output = Command::new("sh").arg("-c").arg(script).output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    assert!(output.stdout.starts_with(b"{"));
    expect_files_in_server(0);
}

pub(super) fn leave_an_orphan() {
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

pub(super) fn await_terminate() {
    await_signal(libc::SIGTERM);
}

pub(super) fn await_interrupt() {
    await_signal(libc::SIGINT);
}

pub(super) fn nest() {
    let own = std::env::current_exe().unwrap();
    let output = Command::new(own).args(["supervise", "nested", "true"]).output().unwrap();
    assert_eq!(output.status.code(), Some(125));
    std::io::stdout().write_all(&output.stdout).unwrap();
}
