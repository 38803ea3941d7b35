//! What a machine must offer for [`run`](crate::run), and what it means when something is missing.
//!
//! Each check tries the thing itself where that is possible: a version number says little about a container. Most of
//! them are made on one child that runs under the real filter for a moment (`trial`).

use std::fmt;

use rustix::fs::inotify;
use rustix::io::Errno;
use rustix::process::{Resource, getrlimit};
use rustix::thread::{MembarrierCommand, membarrier_query};

use crate::files;
use crate::filter::Architecture;
use crate::launch::refused_filter;
use crate::process::CAP_IPC_LOCK;
use crate::sys::credentials::effective_capabilities;
use crate::trial::{self, Findings};

/// How a requirement is met.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum State {
    /// As it should be.
    Met,
    /// Programs run, but something is slower, or a part of the interface is missing.
    Limited,
    /// Programs cannot be run.
    Missing,
}

/// One requirement and how this machine meets it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Requirement {
    /// What is looked at, in a few words.
    pub name: &'static str,
    /// How it is met.
    pub state: State,
    /// What was found.
    pub finding: String,
    /// What follows from it. Empty if all is well.
    pub consequence: &'static str,
    /// What can be done about it. Empty if all is well.
    pub remedy: &'static str,
}

impl Requirement {
    fn met(name: &'static str, finding: impl Into<String>) -> Self {
        Self { name, state: State::Met, finding: finding.into(), consequence: "", remedy: "" }
    }

    fn unmet(
        name: &'static str,
        state: State,
        finding: impl Into<String>,
        consequence: &'static str,
        remedy: &'static str,
    ) -> Self {
        Self { name, state, finding: finding.into(), consequence, remedy }
    }
}

impl fmt::Display for Requirement {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let state = match self.state {
            State::Met => "ok",
            State::Limited => "limited",
            State::Missing => "missing",
        };
        write!(formatter, "{}: {state} ({})", self.name, self.finding)?;
        if self.state != State::Met {
            write!(formatter, ". {} {}", self.consequence, self.remedy)?;
        }
        Ok(())
    }
}

/// Looks at everything, in the order in which it should be put right.
pub fn check() -> Vec<Requirement> {
    let mut all = vec![architecture(), kernel(), proc()];
    all.extend(notification(trial::attempt()));
    all.extend([
        yama(),
        memfd(),
        leases(),
        inotify_limits(),
        membarrier(),
        open_files(),
        locked_memory(),
        huge_pages(),
    ]);
    all
}

fn architecture() -> Requirement {
    const NAME: &str = "architecture";
    let found = std::env::consts::ARCH;
    match Architecture::native() {
        Some(_) => Requirement::met(NAME, found),
        None => Requirement::unmet(
            NAME,
            State::Missing,
            found,
            "The filter does not know this architecture's system calls.",
            "Use a 64-bit x86 or Arm machine.",
        ),
    }
}

fn kernel() -> Requirement {
    const NAME: &str = "kernel";
    let release = std::fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
    let release = release.trim();
    let mut numbers =
        release.split(|c: char| !c.is_ascii_digit()).map(|number| number.parse::<u32>().unwrap_or(0));
    let version = (numbers.next().unwrap_or(0), numbers.next().unwrap_or(0));
    let found = format!("Linux {release}");
    if version < (5, 19) {
        Requirement::unmet(
            NAME,
            State::Missing,
            found,
            "Without WAIT_KILLABLE_RECV a signal would make a client's call happen twice.",
            "Use Linux 5.19 or later, best 6.6 or later.",
        )
    } else if version < (6, 6) {
        Requirement::unmet(
            NAME,
            State::Limited,
            found,
            "Client and server are woken on different CPUs, so each call takes several times as long.",
            "Use Linux 6.6 or later.",
        )
    } else {
        Requirement::met(NAME, found)
    }
}

fn proc() -> Requirement {
    const NAME: &str = "/proc";
    let ours = rustix::process::getpid().as_raw_nonzero().to_string();
    match rustix::fs::readlink("/proc/self", Vec::new()) {
        Ok(link) if link.as_bytes() == ours.as_bytes() => {
            Requirement::met(NAME, "mounted, of this pid namespace")
        }
        Ok(_) => Requirement::unmet(
            NAME,
            State::Missing,
            "of another pid namespace",
            "Clients cannot be looked up by their ids.",
            "Mount a fresh one: mount -t proc proc /proc.",
        ),
        Err(errno) => Requirement::unmet(
            NAME,
            State::Missing,
            errno.to_string(),
            "Clients cannot be looked into.",
            "Mount it: mount -t proc proc /proc.",
        ),
    }
}

/// Everything that the trial tells.
fn notification(trial: Result<Findings, Errno>) -> Vec<Requirement> {
    const NAME: &str = "seccomp user notification";
    const REMEDY_PTRACE: &str = "Run as an ordinary user with programs of the same user, set kernel.yama.ptrace_scope \
                                 to 0 or 1, and allow ptrace and process_vm_readv in the container's profile.";
    let findings = match trial {
        Ok(findings) => findings,
        Err(errno) => {
            let remedy = match errno {
                Errno::BUSY => {
                    "Run outside of the other `ioasid run` or container manager that uses the listener."
                }
                Errno::PERM | Errno::ACCESS => {
                    "Allow the seccomp system call in the container's or sandbox's profile."
                }
                _ => "Use Linux 5.19 or later with CONFIG_SECCOMP_FILTER.",
            };
            let finding = refused_filter(errno).to_string();
            let consequence = "No program can be run.";
            return vec![Requirement::unmet(NAME, State::Missing, finding, consequence, remedy)];
        }
    };
    let tried = |name, result: Result<(), Errno>, state, consequence, remedy| match result {
        Ok(()) => Requirement::met(name, "works on a child"),
        Err(errno) => Requirement::unmet(name, state, errno.to_string(), consequence, remedy),
    };
    vec![
        tried(
            NAME,
            findings.round_trip,
            State::Missing,
            "No program can be run.",
            "Please report this with the kernel's version.",
        ),
        if findings.synchronous {
            Requirement::met("synchronous wake-up", "offered")
        } else {
            Requirement::unmet(
                "synchronous wake-up",
                State::Limited,
                "not offered",
                "Client and server are woken on different CPUs, so each call takes several times as long.",
                "Use Linux 6.6 or later.",
            )
        },
        tried(
            "client memory (process_vm_readv, process_vm_writev)",
            findings.memory_read.and(findings.memory_write),
            State::Missing,
            "Arguments of calls cannot be fetched: every ioctl fails with EFAULT.",
            REMEDY_PTRACE,
        ),
        tried(
            "client memory for devices (/proc/PID/mem)",
            findings.memory_handle,
            State::Limited,
            "Private memory cannot be mapped for devices; memory files (memfd) can.",
            REMEDY_PTRACE,
        ),
        tried(
            "client descriptors (/proc/PID/fd)",
            findings.descriptor_status,
            State::Missing,
            "Descriptors cannot be recognised: every ioctl fails with EFAULT.",
            REMEDY_PTRACE,
        ),
        tried(
            "copies of client descriptors (pidfd_getfd)",
            findings.descriptor_duplicate,
            State::Limited,
            "Memory files are opened anew instead, which needs their permission bits to allow it.",
            "Allow pidfd_open and pidfd_getfd in the container's profile, or add CAP_SYS_PTRACE.",
        ),
    ]
}

fn yama() -> Requirement {
    const NAME: &str = "Yama ptrace restriction";
    let read = std::fs::read_to_string("/proc/sys/kernel/yama/ptrace_scope");
    match read.as_deref().map(str::trim) {
        Err(_) => Requirement::met(NAME, "not in this kernel"),
        Ok("0") => Requirement::met(NAME, "0: none"),
        Ok("1") => Requirement::met(NAME, "1: descendants only, which clients are"),
        Ok(other) => Requirement::unmet(
            NAME,
            State::Limited,
            other,
            "Memory of clients is out of reach without CAP_SYS_PTRACE (2) or altogether (3).",
            "Set kernel.yama.ptrace_scope to 1; after 3 that needs a reboot.",
        ),
    }
}

fn memfd() -> Requirement {
    const NAME: &str = "memory files (memfd_create)";
    match files::text("ioasid-check", "x", rustix::fs::OFlags::empty()) {
        Ok(_) => Requirement::met(NAME, "can be created, sealed and reopened"),
        Err(errno) => Requirement::unmet(
            NAME,
            State::Missing,
            errno.to_string(),
            "Clients cannot be given descriptors.",
            "Allow memfd_create, and mount /proc.",
        ),
    }
}

fn leases() -> Requirement {
    const NAME: &str = "file leases";
    match files::check_leases() {
        Ok(()) => Requirement::met(NAME, "tell who has a file open"),
        Err(errno) => Requirement::unmet(
            NAME,
            State::Limited,
            errno.to_string(),
            "A file that a client opens anew through /proc is closed with its first descriptor.",
            "Set fs.leases-enable to 1.",
        ),
    }
}

fn inotify_limits() -> Requirement {
    const NAME: &str = "inotify";
    /// One watch per open file; a program has few, a test suite's children many.
    const ENOUGH: u64 = 1024;
    let limit = std::fs::read_to_string("/proc/sys/fs/inotify/max_user_watches");
    let watches = limit.ok().and_then(|limit| limit.trim().parse::<u64>().ok());
    match (inotify::init(inotify::CreateFlags::CLOEXEC), watches) {
        (Err(errno), _) => Requirement::unmet(
            NAME,
            State::Missing,
            errno.to_string(),
            "Closes of files cannot be seen.",
            "Raise fs.inotify.max_user_instances.",
        ),
        (Ok(_), Some(watches)) if watches < ENOUGH => Requirement::unmet(
            NAME,
            State::Limited,
            format!("{watches} watches for a user"),
            "That many files can be open at once, of all runs of this user.",
            "Raise fs.inotify.max_user_watches.",
        ),
        (Ok(_), watches) => {
            let found = watches.map_or("unknown number of".to_owned(), |watches| watches.to_string());
            Requirement::met(NAME, format!("{found} watches for a user"))
        }
    }
}

fn membarrier() -> Requirement {
    const NAME: &str = "membarrier";
    if membarrier_query().contains_command(MembarrierCommand::PrivateExpedited) {
        Requirement::met(NAME, "private expedited")
    } else {
        Requirement::unmet(
            NAME,
            State::Limited,
            "not offered",
            "Device accesses pay for a memory fence that unmapping would otherwise pay for.",
            "Allow the membarrier system call in the container's profile.",
        )
    }
}

fn open_files() -> Requirement {
    const NAME: &str = "open files (RLIMIT_NOFILE)";
    const ENOUGH: u64 = 1024;
    // No limit is the highest one.
    let hard = getrlimit(Resource::Nofile).maximum.unwrap_or(u64::MAX);
    if hard < ENOUGH {
        Requirement::unmet(
            NAME,
            State::Limited,
            format!("at most {hard}"),
            "Each file that clients open, and each client process, takes one to three of ours.",
            "Raise the hard limit (ulimit -Hn).",
        )
    } else {
        Requirement::met(NAME, format!("up to {hard}"))
    }
}

fn locked_memory() -> Requirement {
    const NAME: &str = "locked memory (RLIMIT_MEMLOCK)";
    const ENOUGH: u64 = 1 << 30;
    let own = rustix::process::getpid().as_raw_nonzero().get().unsigned_abs();
    if effective_capabilities(own).is_ok_and(|set| set >> CAP_IPC_LOCK & 1 == 1) {
        return Requirement::met(NAME, "no limit with CAP_IPC_LOCK");
    }
    match getrlimit(Resource::Memlock).current {
        None => Requirement::met(NAME, "no limit"),
        Some(bytes) if bytes >= ENOUGH => Requirement::met(NAME, format!("{} MiB", bytes >> 20)),
        Some(bytes) => Requirement::unmet(
            NAME,
            State::Limited,
            format!("{} KiB", bytes >> 10),
            "As with the kernel's interface, a program without CAP_IPC_LOCK cannot map more than this for devices.",
            "Raise it for programs that map more (ulimit -l, or limits.conf).",
        ),
    }
}

fn huge_pages() -> Requirement {
    const NAME: &str = "huge pages for tests";
    let free = std::fs::read_to_string("/proc/meminfo").ok().and_then(|text| {
        let line = text.lines().find_map(|line| line.strip_prefix("HugePages_Free:"))?;
        line.trim().parse::<u64>().ok()
    });
    match free {
        Some(free @ 1..) => Requirement::met(NAME, format!("{free} free")),
        _ => Requirement::unmet(
            NAME,
            State::Limited,
            "none free",
            "Tests that want huge pages are not run; nothing else needs them.",
            "Set vm.nr_hugepages to 64 or so.",
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_unmet_requirement_says_what_follows_and_what_to_do() {
        for requirement in check() {
            assert!(!requirement.finding.is_empty(), "{requirement:?}");
            let explained = !requirement.consequence.is_empty() && !requirement.remedy.is_empty();
            assert_eq!(explained, requirement.state != State::Met, "{requirement:?}");
        }
    }

    #[test]
    fn a_refused_filter_is_the_last_word_about_notification() {
        for (errno, word) in
            [(Errno::BUSY, "already"), (Errno::INVAL, "5.19"), (Errno::PERM, "not permitted")]
        {
            let requirements = notification(Err(errno));
            assert_eq!(requirements.len(), 1);
            assert_eq!(requirements[0].state, State::Missing);
            assert!(requirements[0].finding.contains(word), "{}", requirements[0]);
        }
    }
}
