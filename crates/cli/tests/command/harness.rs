//! Starting the command, with a deadline, as a given user.

use std::fs;
use std::io::{self, Read};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::{Path, PathBuf};
use std::process::{ExitStatus, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process_group};

/// No case takes a tenth of it on an idle machine.
const DEADLINE: Duration = Duration::from_secs(120);

/// For whoever has the output open when the command has ended.
const LAST_WORDS: Duration = Duration::from_secs(20);

const NOBODY: u32 = 65_534;

/// As whom the command runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Who {
    /// Whoever runs the tests.
    Tester,
    /// An ordinary user, when root runs the tests.
    Nobody,
}

impl Who {
    pub(crate) fn all() -> &'static [Who] {
        if rustix::process::getuid().is_root() { &[Who::Tester, Who::Nobody] } else { &[Who::Tester] }
    }

    pub(crate) fn name(self) -> &'static str {
        match self {
            Who::Tester if rustix::process::getuid().is_root() => "root",
            _ => "user",
        }
    }
}

/// The command and the clients where every user can read them.
#[derive(Debug)]
pub(crate) struct Installed {
    directory: PathBuf,
    /// The C client, if it could be built without shared libraries.
    pub(crate) static_client: Option<PathBuf>,
    /// Python 3, if it is there for every user.
    pub(crate) python: Option<PathBuf>,
}

impl Installed {
    pub(crate) fn new() -> io::Result<Self> {
        let directory = std::env::temp_dir().join(format!("ioasid-command-{}", std::process::id()));
        fs::create_dir(&directory)?;
        fs::set_permissions(&directory, fs::Permissions::from_mode(0o755))?;
        let mut installed = Self { directory, static_client: None, python: None };
        fs::copy(env!("CARGO_BIN_EXE_ioasid"), installed.program()).inspect_err(|_| installed.remove())?;
        fs::set_permissions(installed.program(), fs::Permissions::from_mode(0o755))?;
        installed.static_client = installed.build_static_client();
        installed.python =
            ["/usr/bin/python3", "/bin/python3"].iter().map(PathBuf::from).find(|path| path.exists());
        Ok(installed)
    }

    pub(crate) fn program(&self) -> PathBuf {
        self.directory.join("ioasid")
    }

    fn build_static_client(&self) -> Option<PathBuf> {
        let (source, program) = (self.directory.join("client.c"), self.directory.join("static-client"));
        fs::write(&source, include_str!("client.c")).ok()?;
        let mut compiler = std::process::Command::new("cc");
        compiler.args(["-static", "-O1", "-o"]).arg(&program).arg(&source).stderr(Stdio::null());
        compiler.status().ok()?.success().then_some(program)
    }

    pub(crate) fn remove(&self) {
        // It is in the directory for temporary files.
        let _ = fs::remove_dir_all(&self.directory);
    }
}

/// The command as one user starts it.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Command<'tests> {
    pub(crate) installed: &'tests Installed,
    pub(crate) who: Who,
}

/// How it ended.
#[derive(Debug)]
pub(crate) struct Ended {
    status: Option<ExitStatus>,
    pub(crate) output: String,
    pub(crate) errors: String,
}

impl<'tests> Command<'tests> {
    pub(crate) fn of(installed: &'tests Installed, who: Who) -> Self {
        Self { installed, who }
    }

    /// Runs `ioasid` with arguments.
    pub(crate) fn run(&self, arguments: &[&str]) -> Ended {
        self.run_with(arguments, &[])
    }

    /// Runs `ioasid run -- sh -c SCRIPT`. In the script, $IOASID is the command.
    pub(crate) fn script(&self, script: &str) -> Ended {
        self.run(&["run", "--", "sh", "-c", script])
    }

    /// Runs `ioasid` with arguments and environment.
    pub(crate) fn run_with(&self, arguments: &[&str], environment: &[(&str, &str)]) -> Ended {
        let mut command = std::process::Command::new(self.installed.program());
        command
            .args(arguments)
            .env("IOASID", self.installed.program())
            // Others may have directories that this user cannot look into, which changes what "not found" is.
            .env("PATH", "/usr/local/bin:/usr/bin:/bin")
            .env_remove("IOASID_LOG")
            .envs(environment.iter().copied())
            .current_dir("/")
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .process_group(0);
        if self.who == Who::Nobody {
            command.uid(NOBODY).gid(NOBODY);
        }
        let mut child = command.spawn().expect("the command was installed");
        let (output, errors) = (read(child.stdout.take()), read(child.stderr.take()));
        let mut status = None;
        within(DEADLINE, || {
            status = child.try_wait().ok().flatten();
            status.is_some()
        });
        // Whoever has the output open has outlived the command. The group is still ours: it has not been waited for, or somebody
        // is left in it.
        if status.is_none() || !within(LAST_WORDS, || output.is_finished() && errors.is_finished()) {
            status = None;
            let _ = kill_process_group(Pid::from_child(&child), Signal::KILL);
            let _ = child.wait();
        }
        let text = |reader: thread::JoinHandle<String>| reader.join().unwrap_or_default();
        Ended { status, output: text(output), errors: text(errors) }
    }

    /// A new file that this user may write.
    pub(crate) fn writable_file(&self, name: &str) -> io::Result<PathBuf> {
        let path = self.installed.directory.join(format!("{}-{name}", self.who.name()));
        fs::write(&path, "")?;
        fs::set_permissions(&path, fs::Permissions::from_mode(0o666))?;
        Ok(path)
    }

    /// A new directory that this user may write to.
    pub(crate) fn writable_directory(&self, name: &str) -> io::Result<PathBuf> {
        let path = self.installed.directory.join(format!("{}-{name}", self.who.name()));
        fs::create_dir(&path)?;
        fs::set_permissions(&path, fs::Permissions::from_mode(0o777))?;
        Ok(path)
    }

    /// Python's client, if Python is here.
    pub(crate) fn python_client(&self) -> Option<(&'tests Path, &'static str)> {
        self.installed.python.as_deref().map(|python| (python, include_str!("client.py")))
    }
}

fn read(source: Option<impl Read + Send + 'static>) -> thread::JoinHandle<String> {
    thread::spawn(move || {
        let mut text = Vec::new();
        if let Some(mut source) = source {
            // What was read before an error is still worth showing.
            let _ = source.read_to_end(&mut text);
        }
        String::from_utf8_lossy(&text).into_owned()
    })
}

/// Whether it is so before the time is up.
fn within(time: Duration, mut is_so: impl FnMut() -> bool) -> bool {
    let start = Instant::now();
    while !is_so() {
        if start.elapsed() > time {
            return false;
        }
        thread::sleep(Duration::from_millis(2));
    }
    true
}

impl Ended {
    /// Fails with everything that is known unless the exit status is `code`.
    pub(crate) fn exits(self, code: i32) -> Result<Self, String> {
        if self.status.and_then(|status| status.code()) == Some(code) {
            Ok(self)
        } else {
            Err(self.report(&format!("exit status {code} was expected")))
        }
    }

    /// Fails unless standard output has these words.
    pub(crate) fn prints(self, words: &str) -> Result<Self, String> {
        if self.output.contains(words) {
            Ok(self)
        } else {
            Err(self.report(&format!("not printed: {words}")))
        }
    }

    /// Fails unless standard error has these words.
    pub(crate) fn complains(self, words: &str) -> Result<Self, String> {
        if self.errors.contains(words) { Ok(self) } else { Err(self.report(&format!("not said: {words}"))) }
    }

    /// Standard output as JSON.
    pub(crate) fn json(self) -> Result<serde_json::Value, String> {
        serde_json::from_str(&self.output).map_err(|error| self.report(&format!("not JSON: {error}")))
    }

    pub(crate) fn report(&self, complaint: &str) -> String {
        let end = match self.status {
            None => "killed at the deadline, or somebody was left behind".to_owned(),
            Some(status) => format!("exit status {:?}, signal {:?}", status.code(), status.signal()),
        };
        format!("{complaint}; {end}\n--- output\n{}\n--- errors\n{}", self.output, self.errors)
    }
}
