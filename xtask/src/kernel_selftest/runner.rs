//! Runs one instance and makes sure that nothing of it is left.
//!
//! The self-test puts each test into a process group of its own and forks further, and the transport in front of it has
//! processes too, so killing a child or its group is not enough. Instead this process becomes the reaper of all its
//! descendants' orphans, and whatever descends from it after an instance has ended, or when its time is up, is killed by
//! its process id. Output goes to a file, not a pipe, which a stray process could keep open.

use std::{
    collections::HashMap,
    fs::{self, File},
    io,
    os::unix::process::CommandExt,
    path::PathBuf,
    process::{Command, ExitStatus, Stdio},
    sync::{Arc, atomic::AtomicBool, atomic::Ordering},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail};
use rustix::process::{Pid, Signal, WaitOptions};

use super::{Outcome, Verdict, ktap};

/// Largest output of an instance that is looked at, in bytes.
const OUTPUT_LIMIT: usize = 16 << 20;

#[derive(Debug)]
pub(crate) struct Runner {
    /// Program and arguments in front of the self-test; may be empty.
    prefix: Vec<String>,
    self_test: PathBuf,
    logs: PathBuf,
    timeout: Duration,
    /// Set by a signal that asks this process to end.
    interrupted: Arc<AtomicBool>,
}

impl Runner {
    pub(crate) fn new(
        prefix: Vec<String>,
        self_test: PathBuf,
        logs: PathBuf,
        timeout: Duration,
    ) -> Result<Runner> {
        fs::create_dir_all(&logs).with_context(|| format!("cannot create {}", logs.display()))?;
        rustix::process::set_child_subreaper(Some(rustix::process::getpid()))
            .context("cannot become the reaper of orphans")?;
        let interrupted = Arc::new(AtomicBool::new(false));
        for signal in [signal_hook::consts::SIGINT, signal_hook::consts::SIGTERM, signal_hook::consts::SIGHUP]
        {
            signal_hook::flag::register(signal, Arc::clone(&interrupted)).context("cannot handle signals")?;
        }
        Ok(Runner { prefix, self_test, logs, timeout, interrupted })
    }

    /// Runs one instance to its end, or to the end of its time, with `before` in front of the whole command. An error means that
    /// none could be run.
    pub(crate) fn run(&self, instance: &str, before: &[&str]) -> Result<Outcome> {
        let mut words: Vec<_> = before.iter().map(Into::into).collect();
        words.extend(self.prefix.iter().map(Into::into));
        words.push(self.self_test.clone().into_os_string());
        words.extend(["-r".into(), instance.into()]);
        let mut command = Command::new(&words[0]);
        command.args(&words[1..]);

        let log = self.logs.join(format!("{instance}.log"));
        let begin = Instant::now();
        let status = self.run_to_end(&mut command, &log)?;
        let seconds = begin.elapsed().as_secs_f64();
        let output = fs::read(&log).with_context(|| format!("cannot read {}", log.display()))?;
        let output = String::from_utf8_lossy(&output[..output.len().min(OUTPUT_LIMIT)]);
        let (verdict, note) = match status {
            Some(status) => judge(&output, instance, status),
            None => (Verdict::Fail, format!("did not end within {} s", self.timeout.as_secs())),
        };
        Ok(Outcome { instance: instance.to_owned(), verdict, note, seconds })
    }

    /// The exit status, or `None` if time was up. Afterwards no process of it is left.
    fn run_to_end(&self, command: &mut Command, log: &PathBuf) -> Result<Option<ExitStatus>> {
        let file = File::create(log).with_context(|| format!("cannot create {}", log.display()))?;
        let mut child = command
            .stdin(Stdio::null())
            .stdout(file.try_clone()?)
            .stderr(file)
            // The terminal's interrupt is for this process, which then ends the others.
            .process_group(0)
            .spawn()
            .with_context(|| format!("cannot run {}", command.get_program().to_string_lossy()))?;
        let end = Instant::now() + self.timeout;
        let mut pause = Duration::from_millis(1);
        let status = loop {
            if let Some(status) = child.try_wait()? {
                break Some(status);
            }
            if self.interrupted.load(Ordering::Relaxed) || Instant::now() >= end {
                break None;
            }
            thread::sleep(pause);
            pause = (pause * 2).min(Duration::from_millis(20));
        };
        if status.is_none() {
            kill_descendants()?;
            child.wait()?;
        }
        end_descendants()?;
        if self.interrupted.load(Ordering::Relaxed) {
            bail!("interrupted");
        }
        Ok(status)
    }
}

/// What an instance that ended by itself has shown.
fn judge(output: &str, instance: &str, status: ExitStatus) -> (Verdict, String) {
    match ktap::result_of(output, instance) {
        Some(result) if result.verdict == Verdict::Pass && !status.success() => {
            (Verdict::Fail, format!("passed, and then ended with {status}"))
        }
        Some(result) => (result.verdict, result.note),
        None => {
            let said = ktap::first_complaint(output)
                .or_else(|| output.lines().rfind(|line| !line.trim().is_empty()));
            (Verdict::Fail, format!("no result, ended with {status}: {}", said.unwrap_or("no output")))
        }
    }
}

/// Kills what descends from this process until nothing does, and reaps it. The runner has no other children.
fn end_descendants() -> Result<()> {
    for _ in 0..6000 {
        // Children that nobody waits for: those that became ours as orphans.
        while let Ok(Some(_)) = rustix::process::wait(WaitOptions::NOHANG) {}
        if kill_descendants()? == 0 {
            return Ok(());
        }
        thread::sleep(Duration::from_millis(10));
    }
    bail!("processes of the self-test are left and do not end")
}

/// Sends SIGKILL to each process that descends from this one and returns how many there were.
fn kill_descendants() -> Result<usize> {
    let descendants = descendants_of(std::process::id(), &parents()?);
    for process in &descendants {
        if let Some(pid) = i32::try_from(*process).ok().and_then(Pid::from_raw) {
            // One that has ended by itself meanwhile is no error.
            let _ = rustix::process::kill_process(pid, Signal::KILL);
        }
    }
    Ok(descendants.len())
}

/// The parent of each process that has not ended.
fn parents() -> io::Result<HashMap<u32, u32>> {
    let mut parents = HashMap::new();
    for entry in fs::read_dir("/proc")? {
        let Some(process) = entry?.file_name().to_str().and_then(|name| name.parse().ok()) else { continue };
        // Processes may end while we look.
        let Ok(text) = fs::read_to_string(format!("/proc/{process}/stat")) else { continue };
        if let Some(parent) = living_parent(&text) {
            parents.insert(process, parent);
        }
    }
    Ok(parents)
}

/// The parent in the text of /proc/PID/stat, unless the process has ended and only waits to be reaped.
fn living_parent(stat: &str) -> Option<u32> {
    // The second field is a name in parentheses which may itself contain any character.
    let mut fields = stat.rsplit_once(')')?.1.split_whitespace();
    let state = fields.next()?;
    let parent = fields.next()?.parse().ok()?;
    (!matches!(state, "Z" | "X")).then_some(parent)
}

fn descendants_of(ancestor: u32, parents: &HashMap<u32, u32>) -> Vec<u32> {
    let mut found = vec![ancestor];
    let mut examined = 0;
    while examined < found.len() {
        let parent = found[examined];
        let children = parents.iter().filter(|(process, its)| **its == parent && !found.contains(process));
        let children: Vec<u32> = children.map(|(process, _)| *process).collect();
        found.extend(children);
        examined += 1;
    }
    found.split_off(1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn descent_is_followed_to_the_end() {
        let parents = HashMap::from([(2, 1), (3, 2), (4, 3), (5, 1), (6, 9), (9, 6)]);
        let mut found = descendants_of(2, &parents);
        found.sort_unstable();
        assert_eq!(found, [3, 4]);
        assert_eq!(descendants_of(6, &parents), [9], "a loop ends");
    }

    #[test]
    fn parents_of_stat() {
        assert_eq!(living_parent("12 (a) b) S 7 12 12 0"), Some(7));
        assert_eq!(living_parent("12 (sh) Z 7 12 12 0"), None);
        assert_eq!(living_parent(""), None);
    }

    /// All in one test, since the runner takes every child of this process for its own.
    #[test]
    fn programs_pass_fail_crash_hang_and_leave_processes() {
        let logs = std::env::temp_dir().join(format!("xtask-runner-{}", std::process::id()));
        let run_for = |timeout: Duration, script: &str| {
            // The script stands for the transport; it gets the self-test and its arguments as its own.
            let prefix = ["sh", "-c", script].map(str::to_owned).to_vec();
            let runner = Runner::new(prefix, PathBuf::from("self-test"), logs.clone(), timeout).unwrap();
            let outcome = runner.run("a.b", &[]).unwrap();
            assert_eq!(descendants_of(std::process::id(), &parents().unwrap()), [] as [u32; 0], "{script}");
            outcome
        };
        let run = |script| run_for(Duration::from_secs(60), script);
        assert_eq!(run("echo ok 1 $2").verdict, Verdict::Pass);
        assert_eq!(run("echo not ok 1 $2; exit 1").verdict, Verdict::Fail);
        assert_eq!(run("echo 'ok 1 a.b # SKIP why'").note, "why");
        let late_crash = run("echo ok 1 $2; exit 3");
        assert_eq!(late_crash.verdict, Verdict::Fail);
        assert!(late_crash.note.contains("exit status: 3"), "{late_crash:?}");
        let silent = run("echo some words; kill -9 $$");
        assert_eq!(silent.verdict, Verdict::Fail);
        assert!(silent.note.contains("signal: 9") && silent.note.contains("some words"), "{silent:?}");
        let hung = run_for(Duration::from_millis(500), "setsid sleep 1000 & sleep 1000");
        assert!(hung.note.contains("did not end"), "{hung:?}");
        assert_eq!(run("setsid sh -c 'sleep 1000 & sleep 1000' & echo ok 1 $2").verdict, Verdict::Pass);
        fs::remove_dir_all(&logs).unwrap();
    }
}
