//! Rounds of something random, for minutes or for hours.
//!
//! A round is a process of its own, so that one that hangs or dies is a round that has failed. Each has a seed, the next one after
//! that of the round before, and whatever fails names the seed and the command that brings the round back.

use std::{
    fs::{self, File},
    path::PathBuf,
    process::{Child, Command, Stdio},
    thread,
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use anyhow::{Context, Result, bail};
use indicatif::{ProgressBar, ProgressStyle};
use serde_json::Value;

use crate::workspace;

#[derive(Debug, clap::Args)]
pub(crate) struct Span {
    /// How long to go on; the round that is running then is finished
    #[arg(long, value_name = "NUMBER", default_value_t = 2, value_parser = clap::value_parser!(u64).range(1..=100_000))]
    minutes: u64,

    /// The seed of the first round; each round has the next one [default: of the moment]
    #[arg(long, value_name = "NUMBER")]
    seed: Option<u64>,

    /// Run so many rounds, however long they take
    #[arg(long, value_name = "NUMBER", conflicts_with = "minutes")]
    rounds: Option<u64>,
}

/// What is done with one seed.
#[derive(Debug)]
pub(crate) struct Round {
    /// Fails if the round was not right, and prints why.
    pub(crate) command: Command,
    /// What it is, in a few words.
    pub(crate) described: String,
    /// What brings it back.
    pub(crate) again: String,
}

/// Runs rounds until the time is over or one fails; `right` gets what each of the others has printed. What was run, in words.
pub(crate) fn run(
    span: &Span,
    name: &str,
    patience: Duration,
    mut round: impl FnMut(u64) -> Result<Round>,
    mut right: impl FnMut(&str) -> Result<()>,
) -> Result<String> {
    let log = workspace::target_directory()?.join(format!("{name}.log"));
    let moment = || SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |now| now.as_secs());
    let first = span.seed.unwrap_or_else(moment);
    let (began, time) = (Instant::now(), Duration::from_secs(span.minutes * 60));
    let bar = match span.rounds {
        Some(rounds) => ProgressBar::new(rounds).with_style(style("{bar:24} {pos}/{len} rounds  {msg}")?),
        None => ProgressBar::new(time.as_secs()).with_style(style("{bar:24} {pos}/{len} s  {msg}")?),
    };
    let mut rounds = 0;
    while span.rounds.map_or_else(|| began.elapsed() < time, |wanted| rounds < wanted) {
        let Round { mut command, described, again } = round(first.wrapping_add(rounds))?;
        bar.set_message(described.clone());
        let file = File::create(&log).with_context(|| format!("cannot write {}", log.display()))?;
        command.stdin(Stdio::null()).stdout(file.try_clone()?).stderr(file);
        let mut child = command.spawn().with_context(|| format!("cannot run {command:?}"))?;
        let ended = wait(&mut child, patience, || match span.rounds {
            Some(_) => bar.set_position(rounds),
            None => bar.set_position(began.elapsed().min(time).as_secs()),
        });
        let named = || format!("round {} ({described}); again: {again}", rounds + 1);
        let printed = fs::read_to_string(&log).context("the round has left no output")?;
        match ended {
            Ok(true) => right(&printed).with_context(named)?,
            Ok(false) => {
                bar.finish_and_clear();
                print!("{printed}");
                bail!("not right: {}", named());
            }
            Err(error) => {
                bar.finish_and_clear();
                return Err(error.context(named()));
            }
        }
        rounds += 1;
    }
    bar.finish_and_clear();
    let last = first.wrapping_add(rounds.saturating_sub(1));
    Ok(format!("{rounds} rounds, seeds {first} to {last}, in {} s", began.elapsed().as_secs()))
}

fn style(template: &str) -> Result<ProgressStyle> {
    ProgressStyle::with_template(template).context("the progress bar's template")
}

/// Whether the round was right.
fn wait(child: &mut Child, patience: Duration, mut tick: impl FnMut()) -> Result<bool> {
    let began = Instant::now();
    loop {
        if let Some(status) = child.try_wait()? {
            return Ok(status.success());
        }
        if began.elapsed() > patience {
            child.kill()?;
            child.wait()?;
            bail!("a round did not end in {} s", patience.as_secs());
        }
        tick();
        thread::sleep(Duration::from_millis(100));
    }
}

/// Builds a program with optimisation, by such arguments of cargo, and finds the target of that name.
pub(crate) fn build(arguments: &[&str], target: &str) -> Result<PathBuf> {
    let mut cargo = workspace::cargo();
    cargo.args(arguments).args(["--release", "--locked", "--message-format", "json-render-diagnostics"]);
    let output = cargo.stderr(Stdio::inherit()).output().context("cannot run cargo")?;
    if !output.status.success() {
        bail!("{target} does not build");
    }
    let messages = String::from_utf8(output.stdout).context("cargo printed something that is no text")?;
    let messages = messages.lines().filter_map(|line| serde_json::from_str::<Value>(line).ok());
    let of_target = |message: &Value| message["target"]["name"] == target;
    let mut programs =
        messages.filter(of_target).filter_map(|message| message["executable"].as_str().map(PathBuf::from));
    programs.next().context("cargo names no program")
}
