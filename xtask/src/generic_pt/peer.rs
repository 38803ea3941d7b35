//! `gpdrive`, the program that holds the kernel's tables: a process, and questions sent ahead of their answers.
//!
//! A question costs a few hundred nanoseconds as long as neither side has to wait for the other, and two changes of
//! process if both wait for each answer. So questions are collected and sent many at a time; what is asked of the
//! kernel's tables never depends on what they answered before.

use std::{
    fmt::Write as _,
    io::{BufRead, BufReader, Read, Write},
    path::Path,
    process::{Child, ChildStdin, ChildStdout, Command, Stdio},
};

use anyhow::{Context, Result, bail};
use ioasid_pagetable::IovaRange;

/// So many bytes of questions are sent before the answers are read. The program reads 64 KiB at a time, and a pipe holds
/// as much, so it never waits for us while we wait for it.
const SENT_AHEAD: usize = 32 << 10;

/// A running `gpdrive`.
#[derive(Debug)]
pub(crate) struct Peer {
    process: Child,
    questions: ChildStdin,
    answers: BufReader<ChildStdout>,
}

/// A line of the answer to `entries`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum EntryLine {
    /// An entry that leads to a table.
    Table { level: u8, iova: u64, entry: u64 },
    /// `count` neighbouring entries that map, each `step` more than the one before.
    Leaves { level: u8, iova: u64, entry: u64, step: u64, count: u64 },
}

impl Peer {
    pub(crate) fn start(program: &Path) -> Result<Peer> {
        let mut process = Command::new(program)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .with_context(|| format!("cannot run {}", program.display()))?;
        let questions = process.stdin.take().context("no pipe to the program")?;
        let answers = BufReader::new(process.stdout.take().context("no pipe from the program")?);
        Ok(Peer { process, questions, answers })
    }

    /// Asks one thing and reads the line of the answer.
    pub(crate) fn ask(&mut self, question: &str) -> Result<String> {
        self.send(&format!("{question}\n"))?;
        let mut answer = String::new();
        self.read_line(&mut answer)?;
        Ok(answer)
    }

    /// All entries of the open table that are not empty.
    pub(crate) fn entries(&mut self) -> Result<Vec<EntryLine>> {
        let answer = self.ask("entries")?;
        let count: usize = answer
            .strip_prefix("entries ")
            .and_then(|count| count.parse().ok())
            .with_context(|| format!("the kernel's side answers '{answer}' instead of so many entries"))?;
        let mut lines = Vec::with_capacity(count.min(1 << 16));
        let mut line = String::new();
        for _ in 0..count {
            self.read_line(&mut line)?;
            let parsed = entry_line(&line);
            lines.push(parsed.with_context(|| format!("the kernel's side shows an entry as '{line}'"))?);
        }
        Ok(lines)
    }

    /// What is dirty, as the kernel reports it; it is clean then.
    pub(crate) fn harvest(&mut self, first: u64, length: u64) -> Result<Vec<IovaRange>> {
        let answer = self.ask(&format!("harvest {first:x} {length:x}"))?;
        let count: usize =
            answer.strip_prefix("dirty ").and_then(|count| count.parse().ok()).with_context(|| {
                format!("the kernel's side answers '{answer}' instead of so many dirty leaves")
            })?;
        let mut line = String::new();
        (0..count)
            .map(|_| {
                self.read_line(&mut line)?;
                let numbers = line.split_once(' ').and_then(|(first, length)| {
                    let number = |text| u64::from_str_radix(text, 16).ok();
                    IovaRange::with_length(number(first)?, number(length)?)
                });
                numbers.with_context(|| format!("the kernel's side shows what is dirty as '{line}'"))
            })
            .collect()
    }

    fn send(&mut self, text: &str) -> Result<()> {
        if let Err(error) = self.questions.write_all(text.as_bytes()) {
            return Err(self.last_words().context(error));
        }
        Ok(())
    }

    /// Reads a line, without its end, into `line`.
    fn read_line(&mut self, line: &mut String) -> Result<()> {
        line.clear();
        if self.answers.read_line(line)? == 0 {
            return Err(self.last_words());
        }
        line.truncate(line.trim_end().len());
        Ok(())
    }

    /// Why the program ended.
    fn last_words(&mut self) -> anyhow::Error {
        let mut words = String::new();
        if let Some(mut stderr) = self.process.stderr.take() {
            // Without them the status has to do.
            let _ = stderr.read_to_string(&mut words);
        }
        match self.process.wait() {
            Ok(status) => anyhow::anyhow!("the kernel's side ended, {status}: {}", words.trim_end()),
            Err(error) => error.into(),
        }
    }
}

impl Drop for Peer {
    fn drop(&mut self) {
        // It may be in the middle of something; nothing of it is worth keeping.
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

fn entry_line(line: &str) -> Option<EntryLine> {
    let mut words = line.split(' ');
    let kind = words.next()?;
    let level = words.next()?.parse().ok()?;
    let mut number = || u64::from_str_radix(words.next()?, 16).ok();
    let (iova, entry) = (number()?, number()?);
    match kind {
        "table" => Some(EntryLine::Table { level, iova, entry }),
        "leaf" => {
            let step = number()?;
            let count = words.next()?.parse().ok()?;
            Some(EntryLine::Leaves { level, iova, entry, step, count })
        }
        _ => None,
    }
}

/// Questions that wait to be sent, each with what is to be done with its answer.
#[derive(Debug)]
pub(crate) struct Questions<T> {
    text: String,
    expected: Vec<T>,
}

impl<T> Questions<T> {
    pub(crate) fn new() -> Questions<T> {
        Questions { text: String::new(), expected: Vec::new() }
    }

    pub(crate) fn push(&mut self, question: std::fmt::Arguments<'_>, expected: T) {
        // Writing to a string does not fail.
        let _ = writeln!(self.text, "{question}");
        self.expected.push(expected);
    }

    /// Whether it is time to [`ask`](Self::ask).
    pub(crate) fn is_full(&self) -> bool {
        self.text.len() >= SENT_AHEAD
    }

    /// Sends all questions and shows each answer to `check`, until that objects.
    pub(crate) fn ask<E: From<anyhow::Error>>(
        &mut self,
        peer: &mut Peer,
        mut check: impl FnMut(T, &str) -> Result<(), E>,
    ) -> Result<(), E> {
        // A question is a few dozen bytes, so what goes beyond the limit is little.
        peer.send(&self.text)?;
        self.text.clear();
        let mut answer = String::new();
        for expected in self.expected.drain(..) {
            peer.read_line(&mut answer)?;
            check(expected, &answer)?;
        }
        Ok(())
    }
}

/// Asks the program which formats it has.
pub(crate) fn formats(peer: &mut Peer) -> Result<Vec<String>> {
    let answer = peer.ask("formats")?;
    let Some(count) = answer.strip_prefix("formats ").and_then(|count| count.parse().ok()) else {
        bail!("the kernel's side answers '{answer}' instead of so many formats");
    };
    let mut line = String::new();
    (0..count)
        .map(|_: u32| {
            peer.read_line(&mut line)?;
            Ok(line.clone())
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn entry_lines() {
        let leaves = EntryLine::Leaves { level: 1, iova: 0x1000, entry: 0x5003, step: 0x1000, count: 16 };
        assert_eq!(entry_line("leaf 1 1000 5003 1000 16"), Some(leaves));
        let table = EntryLine::Table { level: 4, iova: 0, entry: u64::MAX };
        assert_eq!(entry_line("table 4 0 ffffffffffffffff"), Some(table));
        for nonsense in ["", "leaf 1 1000 5003 1000", "table 4", "other 1 2 3", "leaf x 0 0 0 1"] {
            assert_eq!(entry_line(nonsense), None, "{nonsense:?}");
        }
    }
}
