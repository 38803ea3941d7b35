//! Our benchmark and its peers as processes: building, pinning, running.
//!
//! Pinning is done to this process, and children inherit it: the standard library cannot set the affinity of a child,
//! and `taskset` would be one more program to have. The peers are told the core as well, in their own way, which comes
//! to the same.

use std::{
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context, Result, bail};
use rustix::thread::{CpuSet, sched_getaffinity, sched_setaffinity};
use serde_json::Value;

use super::rows::{self, Row, TwoThreads};
use crate::{command, workspace};

/// Keeps this process and those that it starts from now on on one core; which one.
pub(crate) fn pin(cpu: Option<usize>) -> Result<usize> {
    let allowed = sched_getaffinity(None).context("cannot tell which cores this process may use")?;
    let cpu = match cpu {
        Some(cpu) if cpu < CpuSet::MAX_CPU && allowed.is_set(cpu) => cpu,
        Some(cpu) => bail!("this process may not use core {cpu}"),
        // The first cores are where most interrupts go.
        None => {
            (0..CpuSet::MAX_CPU).rev().find(|&cpu| allowed.is_set(cpu)).context("there is no core to use")?
        }
    };
    let mut one = CpuSet::new();
    one.set(cpu);
    sched_setaffinity(None, &one).with_context(|| format!("cannot stay on core {cpu}"))?;
    Ok(cpu)
}

/// Builds a benchmark as `cargo bench` does.
pub(crate) fn build(package: &str, bench: &str) -> Result<PathBuf> {
    let mut cargo = workspace::cargo();
    cargo.args(["bench", "--package", package, "--bench", bench, "--no-run"]);
    let messages = command::output(cargo.args(["--message-format", "json-render-diagnostics"]))?;
    executable(&messages, bench).with_context(|| format!("cargo built no benchmark `{bench}`"))
}

/// The benchmark `rows` of ioasid-pagetable.
pub(crate) struct OurRows {
    program: PathBuf,
    op: String,
    memory: String,
}

impl OurRows {
    pub(crate) fn build(op: &str, memory: &str) -> Result<OurRows> {
        let program = build("ioasid-pagetable", "rows")?;
        Ok(OurRows { program, op: op.to_owned(), memory: memory.to_owned() })
    }

    fn command(&self) -> Command {
        let mut command = Command::new(&self.program);
        command.args(["--bench", "--memory", &self.memory, "--op", &self.op]);
        command
    }

    /// The names of all formats.
    pub(crate) fn formats(&self) -> Result<Vec<String>> {
        let list = command::output(self.command().arg("--list"))?;
        let names = list.lines().find_map(|line| line.strip_prefix("formats:")).unwrap_or_default();
        Ok(names.split_whitespace().map(str::to_owned).collect())
    }

    /// One round of a format.
    pub(crate) fn times(&self, format: &str) -> Result<Vec<Row>> {
        rows::times(&command::output(self.command().args(["--rounds", "1", "--format", format]))?)
    }

    /// Table pages allocated per call.
    pub(crate) fn tables(&self, format: &str) -> Result<Vec<Row>> {
        rows::our_tables(&command::output(self.command().args(["--tables", "--format", format]))?)
    }

    /// Two threads on one table and on two.
    pub(crate) fn two_threads(&self, format: &str, rounds: u32) -> Result<Vec<TwoThreads>> {
        let rounds = rounds.to_string();
        let mut command = self.command();
        rows::two_threads(&command::output(command.args([
            "--threads",
            "--rounds",
            &rounds,
            "--format",
            format,
        ]))?)
    }
}

/// The program that cargo's messages name for a target.
fn executable(messages: &str, target: &str) -> Option<PathBuf> {
    messages
        .lines()
        .filter_map(|line| serde_json::from_str::<Value>(line).ok())
        .filter(|message| message["reason"] == "compiler-artifact" && message["target"]["name"] == target)
        .find_map(|message| message["executable"].as_str().map(PathBuf::from))
}

/// A program to compare with.
pub(crate) struct Peer {
    program: PathBuf,
    name: String,
}

impl Peer {
    pub(crate) fn new(path: &Path) -> Result<Peer> {
        let program = path.canonicalize().with_context(|| format!("there is no peer {}", path.display()))?;
        let name = program.file_name().unwrap_or(program.as_os_str()).to_string_lossy().into_owned();
        Ok(Peer { program, name })
    }

    pub(crate) fn name(&self) -> &str {
        &self.name
    }

    fn command(&self, format: &str, cpu: usize) -> Command {
        let mut command = Command::new(&self.program);
        command.env("GP_CPU", cpu.to_string()).args(["-r", "1", "-f", format]);
        command
    }

    /// One round of a format; no rows of it if the peer does not have the format.
    pub(crate) fn times(&self, format: &str, cpu: usize) -> Result<Vec<Row>> {
        rows::times(&command::output(self.command(format, cpu).arg("-q"))?)
            .with_context(|| format!("cannot understand {}", self.name))
    }

    /// Table pages allocated per call, which it tells where it is not asked to be quiet.
    pub(crate) fn tables(&self, format: &str, cpu: usize) -> Result<Vec<Row>> {
        rows::peer_tables(&command::output(&mut self.command(format, cpu))?)
            .with_context(|| format!("cannot understand {}", self.name))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cargo_names_the_program_it_built() {
        let messages = concat!(
            r#"{"reason":"compiler-artifact","target":{"name":"ioasid_pagetable"},"executable":null}"#,
            "\n",
            r#"{"reason":"compiler-artifact","target":{"name":"rows"},"executable":"/target/rows-0123"}"#,
            "\n",
            r#"{"reason":"build-finished","success":true}"#,
        );
        assert_eq!(executable(messages, "rows"), Some(PathBuf::from("/target/rows-0123")));
        assert_eq!(executable(messages, "pagetable"), None);
    }
}
