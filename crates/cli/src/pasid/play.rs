//! A script of lines, each one call.
//!
//! A line is parsed as the arguments of a command are, by the same library, so `help` works in a script as it does in a shell.
//! A refusal is an answer: it is printed, and the script goes on. A line that cannot be understood ends it.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, BufRead, BufReader, IsTerminal, Write};
use std::path::PathBuf;
use std::process::ExitCode;
use std::str::FromStr;
use std::sync::Arc;

use anyhow::Context;
use clap::{Args, Parser, Subcommand};
use ioasid::pasid::{
    Freed, Limit, MOST_PASIDS, Owner, Pasid, PasidBinding, PasidReference, PasidSet, PasidSystem, Priority,
    Received, Spid, Subscription,
};

/// Carry out a script: make sets, allocate, bind and free PASIDs, and see what comes of it
#[derive(Debug, Args)]
#[command(after_help = AFTER_HELP)]
pub(super) struct Arguments {
    /// The script; `-` is standard input
    #[arg(default_value = "-")]
    script: PathBuf,

    /// How many PASIDs there are
    #[arg(long, value_name = "N", default_value_t = MOST_PASIDS, value_parser = clap::value_parser!(u32).range(1..=i64::from(MOST_PASIDS)))]
    capacity: u32,

    /// How many events wait to be printed before some are lost
    #[arg(long, value_name = "N", default_value_t = 1024)]
    queue: usize,
}

const AFTER_HELP: &str = "\
A script has one command in each line; `#` begins a comment. `help` lists the commands, `help allocate` explains one.

Example:
  ioasid pasid play - <<'END'
  limit host 100
  set guest --owner machine:7 --quota 10 --limit host
  allocate guest --spid 5
  bind guest 0
  free guest 0
  allocate guest --spid 5      # the guest's number is free again; ours is parked until it is unbound
  show
  unbind 0
  show
  END

Exit status:
  0  every line was understood, whatever the answers were
  1  a line was not, or the script cannot be read
  2  bad usage";

/// A line of a script.
#[derive(Debug, Parser)]
#[command(multicall = true, disable_version_flag = true)]
struct Line {
    #[command(subcommand)]
    call: Call,
}

#[derive(Debug, Subcommand)]
enum Call {
    /// A limit for all PASIDs below it
    Limit {
        name: String,
        /// How many; none: any number
        max: Option<u32>,
        /// The limit above
        #[arg(long)]
        below: Option<String>,
    },
    /// Change a limit
    Max { limit: String, max: Option<u32> },
    /// Make a set
    Set {
        name: String,
        /// nobody, process:N or machine:N
        #[arg(long, default_value = "nobody")]
        owner: Whose,
        #[arg(long)]
        quota: u32,
        #[arg(long)]
        limit: String,
    },
    /// Change the quota of a set
    Quota { set: String, quota: u32 },
    /// Put a set under another limit
    Move { set: String, limit: String },
    /// Allocate the lowest free PASID of a range
    Allocate {
        set: String,
        #[arg(long, default_value_t = 0)]
        first: u32,
        #[arg(long, default_value_t = u32::MAX)]
        last: u32,
        /// The private ID that it shall have
        #[arg(long)]
        spid: Option<Private>,
    },
    /// Give a PASID a private ID; none: take it away
    Spid { set: String, pasid: Number, spid: Option<Private> },
    /// Which PASID has this private ID
    Find { set: String, spid: Private },
    /// Bind a PASID to something that uses it
    Bind { set: String, pasid: Number },
    /// Undo a bind
    Unbind { pasid: Number },
    /// Hold a PASID, so that it is not given out anew
    Hold { set: String, pasid: Number },
    /// Undo a hold
    Release { pasid: Number },
    /// Free a PASID
    Free { set: String, pasid: Number },
    /// End an empty set
    End { set: String },
    /// Drop a set with all that is in it, as a process that dies does
    Drop { set: String },
    /// Reserve PASIDs outside of all sets, in addition to what is reserved
    Reserve { count: u32 },
    /// Show the system, the limits, the sets and their PASIDs
    Show,
}

#[derive(Clone, Copy, Debug)]
struct Number(Pasid);

#[derive(Clone, Copy, Debug)]
struct Private(Spid);

#[derive(Clone, Copy, Debug)]
struct Whose(Owner);

#[derive(Clone, Copy, Debug, thiserror::Error)]
enum Misspelt {
    #[error("not a number below 2^20")]
    Number,
    #[error("neither nobody nor process:N nor machine:N")]
    Owner,
}

impl FromStr for Number {
    type Err = Misspelt;

    fn from_str(text: &str) -> Result<Number, Misspelt> {
        text.parse().ok().and_then(Pasid::new).map(Number).ok_or(Misspelt::Number)
    }
}

impl FromStr for Private {
    type Err = Misspelt;

    fn from_str(text: &str) -> Result<Private, Misspelt> {
        text.parse().ok().and_then(Spid::new).map(Private).ok_or(Misspelt::Number)
    }
}

impl FromStr for Whose {
    type Err = Misspelt;

    fn from_str(text: &str) -> Result<Whose, Misspelt> {
        if text == "nobody" {
            return Ok(Whose(Owner::Nobody));
        }
        let (kind, number) = text.split_once(':').ok_or(Misspelt::Owner)?;
        let number = number.parse().map_err(|_| Misspelt::Owner)?;
        match kind {
            "process" => Ok(Whose(Owner::Process(number))),
            "machine" => Ok(Whose(Owner::Machine(number))),
            _ => Err(Misspelt::Owner),
        }
    }
}

/// What the script has made, by the names that it gave.
struct Play {
    system: Arc<PasidSystem>,
    events: Subscription,
    limits: BTreeMap<String, Limit>,
    sets: BTreeMap<String, PasidSet>,
    bindings: Vec<PasidBinding>,
    references: Vec<PasidReference>,
    reservations: Vec<ioasid::pasid::Reservation>,
}

/// Plays a script.
///
/// # Errors
/// It cannot be read, a line is not understood, or standard output cannot be written.
pub(super) fn play(arguments: &Arguments) -> anyhow::Result<ExitCode> {
    let from_input = arguments.script.as_os_str() == "-";
    let script: Box<dyn BufRead> = if from_input {
        if io::stdin().is_terminal() {
            eprintln!("one command in each line; `help` lists them, end of file ends");
        }
        Box::new(io::stdin().lock())
    } else {
        let name = arguments.script.display();
        Box::new(BufReader::new(
            File::open(&arguments.script).with_context(|| format!("cannot open {name}"))?,
        ))
    };
    let system = PasidSystem::new(arguments.capacity)?;
    let mut play = Play {
        events: system.subscribe(Priority::Device, arguments.queue),
        system,
        limits: BTreeMap::new(),
        sets: BTreeMap::new(),
        bindings: Vec::new(),
        references: Vec::new(),
        reservations: Vec::new(),
    };
    let mut output = io::stdout();
    for (number, line) in (1..).zip(script.lines()) {
        let line = line.with_context(|| format!("line {number}"))?;
        let words = line.split('#').next().unwrap_or_default().split_whitespace();
        let words: Vec<&str> = words.collect();
        if words.is_empty() {
            continue;
        }
        let answer = match Line::try_parse_from(&words) {
            Ok(line) => play.call(line.call).unwrap_or_else(|refusal| format!("refused: {refusal}")),
            Err(help) if !help.use_stderr() => help.to_string(),
            Err(error) => anyhow::bail!("line {number}: {error}"),
        };
        writeln!(output, "{}: {}", words.join(" "), answer.trim_end())?;
        play.print_events(&mut output)?;
    }
    Ok(ExitCode::SUCCESS)
}

/// Why a call was not made.
type Refusal = Box<dyn std::error::Error>;

impl Play {
    fn limit(&self, name: &str) -> Result<&Limit, Refusal> {
        self.limits.get(name).ok_or_else(|| format!("there is no limit {name}").into())
    }

    fn set(&self, name: &str) -> Result<&PasidSet, Refusal> {
        self.sets.get(name).ok_or_else(|| format!("there is no set {name}").into())
    }

    fn call(&mut self, call: Call) -> Result<String, Refusal> {
        let done = || Ok("done".to_owned());
        match call {
            Call::Limit { name, max, below } => {
                let limit = match below {
                    Some(below) => self.limit(&below)?.child(name.clone(), max),
                    None => Limit::new(&self.system, name.clone(), max),
                };
                self.limits.insert(name, limit);
            }
            Call::Max { limit, max } => self.limit(&limit)?.set_max(max),
            Call::Set { name, owner, quota, limit } => {
                if self.sets.contains_key(&name) {
                    return Err(format!("there is a set {name}").into());
                }
                let set = self.system.create_set(owner.0, quota, self.limit(&limit)?)?;
                self.sets.insert(name, set);
            }
            Call::Quota { set, quota } => self.set(&set)?.set_quota(quota)?,
            Call::Move { set, limit } => self.set(&set)?.charge_to(self.limit(&limit)?),
            Call::Allocate { set, first, last, spid } => {
                let set = self.set(&set)?;
                let pasid = set.allocate(first..=last, 0)?;
                if let Some(Private(spid)) = spid {
                    if let Err(error) = set.set_spid(pasid, Some(spid)) {
                        set.free(pasid)?;
                        return Err(error.into());
                    }
                }
                return Ok(pasid.to_string());
            }
            Call::Spid { set, pasid, spid } => self.set(&set)?.set_spid(pasid.0, spid.map(|spid| spid.0))?,
            Call::Find { set, spid } => {
                let found = self.set(&set)?.find(spid.0);
                return Ok(found.map_or("none".to_owned(), |pasid| pasid.to_string()));
            }
            Call::Bind { set, pasid } => {
                let binding = self.set(&set)?.bind(pasid.0)?;
                self.bindings.push(binding);
            }
            Call::Unbind { pasid } => {
                let place = self.bindings.iter().position(|binding| binding.pasid() == pasid.0);
                self.bindings.swap_remove(place.ok_or("it is not bound")?);
            }
            Call::Hold { set, pasid } => {
                let reference = self.set(&set)?.hold(pasid.0)?;
                self.references.push(reference);
            }
            Call::Release { pasid } => {
                let place = self.references.iter().position(|reference| reference.pasid() == pasid.0);
                self.references.swap_remove(place.ok_or("it is not held")?);
            }
            Call::Free { set, pasid } => {
                return Ok(match self.set(&set)?.free(pasid.0)? {
                    Freed::Now => "free".to_owned(),
                    Freed::Pending => "parked until it is let go".to_owned(),
                });
            }
            Call::End { set: name } => {
                let set = self.sets.remove(&name).ok_or_else(|| format!("there is no set {name}"))?;
                if let Err(not_empty) = set.end() {
                    let refusal = not_empty.to_string();
                    self.sets.insert(name, not_empty.set);
                    return Err(refusal.into());
                }
            }
            Call::Drop { set } => {
                self.sets.remove(&set).ok_or_else(|| format!("there is no set {set}"))?;
            }
            Call::Reserve { count } => {
                let reservation = self.system.reserve(count)?;
                self.reservations.push(reservation);
            }
            Call::Show => return Ok(self.show()),
        }
        done()
    }

    /// What happened because of a line.
    fn print_events(&self, output: &mut impl Write) -> io::Result<()> {
        while let Some(received) = self.events.next() {
            match received {
                Received::Lost(count) => writeln!(output, "  event: {count} lost")?,
                Received::Event(event) => {
                    let transition = format!("{:?}", event.transition).to_lowercase();
                    let spid = event.spid.map_or(String::new(), |spid| format!(", private ID {spid}"));
                    let (pasid, owner) = (event.pasid, event.owner);
                    writeln!(output, "  event {}: {transition} {pasid} of {owner}{spid}", event.sequence)?;
                }
            }
        }
        Ok(())
    }

    fn show(&self) -> String {
        let status = self.system.status();
        let mut lines = vec![format!(
            "{} of {} PASIDs in use, {} set aside, {} sets",
            status.used, status.capacity, status.reserved, status.sets
        )];
        for limit in self.limits.values() {
            let usage = limit.usage();
            let max = usage.max.map_or("any number".to_owned(), |max| max.to_string());
            lines.push(format!(
                "limit {}: {} of {max}, peak {}, {} refused",
                usage.name, usage.current, usage.peak, usage.events
            ));
        }
        for (name, set) in &self.sets {
            let status = set.status();
            let (used, quota, owner, limit) = (status.used, status.quota, status.owner, status.limit);
            lines.push(format!("set {name} of {owner}: {used} of {quota} under {limit}"));
            for id in set.list().into_iter().rev() {
                let spid = id.spid.map_or(String::new(), |spid| format!(", private ID {spid}"));
                let state = format!("{:?}", id.state).to_lowercase();
                lines.push(format!("  {}: {state}, held {} times{spid}", id.pasid, id.references));
            }
        }
        lines.join("\n")
    }
}
