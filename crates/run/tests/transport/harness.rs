//! Supervisors with a deadline.

use std::io::Read;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitCode, ExitStatus, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use ioasid_run::{Options, run};
use ioasid_server::{Server, ServerOptions};
use rustix::process::{Pid, Signal, kill_process, kill_process_group};

use crate::calls::{close_number, system_call};

/// No run of these tests takes a tenth of it on an idle machine.
const DEADLINE: Duration = Duration::from_secs(120);

/// For whoever has the output open when the supervisor has ended. It is shorter than any client sleeps that should have died.
const LAST_WORDS: Duration = Duration::from_secs(20);

/// The same for the run that makes a million areas, which is asked for by this variable.
const DEADLINE_OF_MANY: (&str, Duration) = ("IOASID_TEST_AREAS", Duration::from_secs(600));

const NOBODY: u32 = 65_534;

/// As whom supervisor and client run.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Who {
    /// Whoever runs the tests.
    Tester,
    /// An ordinary user, when root runs the tests.
    Nobody,
}

impl Who {
    pub(crate) fn name(self) -> &'static str {
        match self {
            Who::Tester if rustix::process::getuid().is_root() => "root",
            _ => "user",
        }
    }
}

pub(crate) fn users() -> Vec<Who> {
    if rustix::process::getuid().is_root() { vec![Who::Tester, Who::Nobody] } else { vec![Who::Tester] }
}

/// How to run a client.
#[derive(Debug, Clone)]
pub(crate) struct How {
    pub(crate) who: Who,
    /// Another program than the client.
    pub(crate) program: Option<PathBuf>,
    /// Do not behave like a command at a terminal.
    pub(crate) background: bool,
    /// Sent once the client has said that it is ready: SIGINT to the group, others to the supervisor.
    pub(crate) signal: Option<i32>,
}

impl How {
    pub(crate) fn of(who: Who) -> Self {
        Self { who, program: None, background: false, signal: None }
    }
}

/// What came of it.
#[derive(Debug)]
pub(crate) struct Run {
    pub(crate) code: Option<i32>,
    pub(crate) signal: Option<i32>,
    pub(crate) output: String,
}

impl Run {
    pub(crate) fn succeeded(&self) -> Result<(), String> {
        self.exited_with(0)
    }

    pub(crate) fn exited_with(&self, code: i32) -> Result<(), String> {
        if self.code == Some(code) { Ok(()) } else { Err(self.report()) }
    }

    pub(crate) fn said(&self, words: &str) -> Result<(), String> {
        if self.output.contains(words) {
            Ok(())
        } else {
            Err(format!("not said: {words}\n{}", self.report()))
        }
    }

    pub(crate) fn report(&self) -> String {
        format!("exit status {:?}, signal {:?}\n{}", self.code, self.signal, self.output)
    }
}

/// Runs a client under a supervisor of its own.
pub(crate) fn supervise(client: &str, how: &How) -> Run {
    let own = std::env::current_exe().unwrap();
    let mut command = Command::new(&own);
    command.arg("supervise").arg(if how.background { "background" } else { "foreground" });
    match &how.program {
        Some(program) => command.arg(program),
        None => command.arg(&own).arg("client").arg(client),
    };
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).current_dir("/");
    if how.who == Who::Nobody {
        command.uid(NOBODY).gid(NOBODY);
    }
    let mut child = command.spawn().unwrap();
    let pid = Pid::from_child(&child);
    let errors = drain(child.stderr.take().unwrap());
    let mut output = child.stdout.take().unwrap();
    let (say, heard) = std::sync::mpsc::channel();
    let reader = thread::spawn(move || {
        let mut text = Vec::new();
        let mut piece = [0; 4096];
        while let Ok(count @ 1..) = output.read(&mut piece) {
            text.extend_from_slice(&piece[..count]);
            if text.windows(5).any(|window| window == b"ready") {
                // Nobody may be listening.
                let _ = say.send(());
            }
        }
        String::from_utf8_lossy(&text).into_owned()
    });
    if let Some(signal) = how.signal {
        if heard.recv_timeout(DEADLINE).is_ok() {
            match signal {
                libc::SIGINT => kill_process_group(pid, Signal::INT).unwrap(),
                libc::SIGTERM => kill_process(pid, Signal::TERM).unwrap(),
                _ => kill_process(pid, Signal::KILL).unwrap(),
            }
        }
    }
    let status = wait(&mut child);
    let is_over = status.is_some() && within(LAST_WORDS, || reader.is_finished() && errors.is_finished());
    let verdict = if is_over { String::new() } else { format!("\n(killed: {})", left_in(pid).join(", ")) };
    if status.is_none() {
        let _ = child.kill();
        let _ = child.wait();
    }
    end_session(pid);
    let (output, errors) = (reader.join().unwrap(), errors.join().unwrap());
    let status = status.filter(|_| is_over);
    Run {
        code: status.and_then(|status| status.code()),
        signal: status.and_then(|status| status.signal()),
        output: format!("{output}{errors}{verdict}"),
    }
}

fn drain(mut source: impl Read + Send + 'static) -> thread::JoinHandle<String> {
    thread::spawn(move || {
        let mut text = Vec::new();
        // What was read before an error is still worth showing.
        let _ = source.read_to_end(&mut text);
        String::from_utf8_lossy(&text).into_owned()
    })
}

fn deadline() -> Duration {
    let (asked, deadline) = DEADLINE_OF_MANY;
    if std::env::var_os(asked).is_some() { deadline } else { DEADLINE }
}

/// Waits until the deadline.
fn wait(child: &mut Child) -> Option<ExitStatus> {
    let mut status = None;
    within(deadline(), || {
        status = child.try_wait().unwrap();
        status.is_some()
    });
    status
}

/// Whether it is so before the time is up.
fn within(time: Duration, mut is_so: impl FnMut() -> bool) -> bool {
    let start = Instant::now();
    loop {
        if is_so() {
            return true;
        }
        if start.elapsed() > time {
            return false;
        }
        thread::sleep(Duration::from_millis(2));
    }
}

/// Who has not ended of a session: what the kernel says of each process, its id, name and state first.
fn left_in(session: Pid) -> Vec<String> {
    let stats = std::fs::read_dir("/proc").unwrap().filter_map(|entry| {
        let process = entry.ok()?.path();
        let stat = std::fs::read_to_string(process.join("stat")).ok()?;
        let (name, rest) = stat.rsplit_once(')')?;
        let mut fields = rest.split_whitespace();
        let (state, its_session) = (fields.next()?, fields.nth(2)?);
        let is_left = its_session.parse() == Ok(session.as_raw_pid()) && !matches!(state, "Z" | "X");
        let waits_in = std::fs::read_to_string(process.join("wchan")).unwrap_or_default();
        is_left.then(|| format!("{name}) {state} {waits_in}"))
    });
    stats.collect()
}

/// Kills all that is left of a session, also whoever has left the supervisor's process group. Nobody may hold up the other tests.
fn end_session(session: Pid) {
    let is_empty = || {
        let left = left_in(session);
        for process in &left {
            let id = process.split_whitespace().next().and_then(|id| id.parse().ok()).and_then(Pid::from_raw);
            let _ = kill_process(id.unwrap(), Signal::KILL);
        }
        left.is_empty()
    };
    if !within(LAST_WORDS, is_empty) {
        eprintln!("processes of a test do not end: {}", left_in(session).join(", "));
    }
}

/// The supervisor: `foreground|background|nested PROGRAM ARGUMENTS`. Its exit status is the program's, by the shell's rules.
pub(crate) fn supervisor(arguments: &[String]) -> ExitCode {
    // All that descends from it can be found by that.
    if arguments[0] != "nested" {
        rustix::process::setsid().unwrap();
    }
    let mut options = Options::default();
    options.foreground = arguments[0] != "background";
    let server = Server::new(ServerOptions::default()).unwrap();
    match run(&arguments[1], &arguments[2..], &options, server) {
        Ok(outcome) => {
            for (kind, totals) in outcome.statistics.iter() {
                println!("{kind:?}: calls {}, failures {}", totals.calls, totals.failures);
            }
            let children = rustix::process::waitpid(None, rustix::process::WaitOptions::NOHANG);
            if children.is_err() {
                println!("no zombies");
            }
            let code = outcome.status.code().or(outcome.status.signal().map(|signal| 128 + signal));
            ExitCode::from(code.and_then(|code| u8::try_from(code).ok()).unwrap_or(255))
        }
        Err(error) => {
            println!("{error}");
            ExitCode::from(125)
        }
    }
}

/// A small program without any shared library, which no preloaded library could reach.
pub(crate) struct StaticProgram(PathBuf);

const SOURCE: &str = r#"
#include <fcntl.h>
#include <stdio.h>
#include <sys/ioctl.h>
int main(void) {
    struct { unsigned size, flags, id; } alloc = { 12, 0, 0 };
    int fd = open("/dev/iommu", O_RDWR);
    if (fd < 0 || ioctl(fd, 0x3b81, &alloc) != 0)
        return 1;
    printf("static: address space %u\n", alloc.id);
    return 0;
}
"#;

impl StaticProgram {
    pub(crate) fn build() -> Result<Self, String> {
        static NUMBER: std::sync::atomic::AtomicU32 = std::sync::atomic::AtomicU32::new(0);
        let number = NUMBER.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
        let stem = format!("ioasid-static-{}-{number}", std::process::id());
        let program = std::env::temp_dir().join(&stem);
        let source = program.with_extension("c");
        std::fs::write(&source, SOURCE).map_err(|error| error.to_string())?;
        let compiled = Command::new("cc").args(["-static", "-o"]).arg(&program).arg(&source).output();
        let _ = std::fs::remove_file(&source);
        let compiled = compiled.map_err(|error| error.to_string())?;
        let built = Self(program);
        if compiled.status.success() {
            Ok(built)
        } else {
            Err(String::from_utf8_lossy(&compiled.stderr).into_owned())
        }
    }

    pub(crate) fn path(&self) -> &Path {
        &self.0
    }
}

impl Drop for StaticProgram {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.0);
    }
}

/// Whether a C compiler and a static C library are here; without them the test is reported as not run.
pub(crate) fn can_link_statically() -> bool {
    Command::new("cc")
        .args(["-static", "-x", "c", "-", "-o", "/dev/null"])
        .stdin(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .and_then(|mut child| {
            use std::io::Write;
            child
                .stdin
                .take()
                .map(|mut input| input.write_all(b"int main(void) { return 0; }\n"))
                .transpose()?;
            child.wait()
        })
        .is_ok_and(|status| status.success())
}

/// Whether a client can make the kernel wait for memory that it does not provide (userfaultfd for the kernel's own
/// accesses); where it cannot, nobody else needs protection from it.
pub(crate) fn may_stall(who: Who) -> bool {
    match who {
        Who::Tester => {
            let tried = system_call(libc::SYS_userfaultfd, [libc::O_CLOEXEC as u64, 0, 0, 0]);
            tried.map(|descriptor| close_number(descriptor as i32)).is_ok()
        }
        Who::Nobody => {
            let open_to_all = std::fs::read_to_string("/proc/sys/vm/unprivileged_userfaultfd");
            open_to_all.is_ok_and(|value| value.trim() == "1")
        }
    }
}
