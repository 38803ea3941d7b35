//! `ioasid doctor`: what this machine lacks, what follows, what to do.

use std::io::Write;
use std::process::ExitCode;

use anyhow::Context;
use clap::Args;
use ioasid_run::requirements::{Requirement, State, check};
use serde::Serialize;

use crate::terminal::{Palette, Tone};

/// Say what this machine lacks for `ioasid run`, and what to do
///
/// Everything is tried, not guessed: a small child process goes through what a program under `ioasid run` needs.
#[derive(Debug, Args)]
#[command(after_help = AFTER_HELP)]
pub(crate) struct Arguments {
    /// Print JSON
    #[arg(long)]
    json: bool,
}

const AFTER_HELP: &str = "\
Examples:
  ioasid doctor
  ioasid doctor --json | jq '.[] | select(.state != \"ok\")'

Exit status:
  0  programs can be run; something may be slower or limited, as it says
  1  something is missing without which no program can be run
  2  bad usage";

/// One check, for programs.
#[derive(Debug, Serialize)]
struct Finding<'check> {
    name: &'check str,
    state: &'static str,
    finding: &'check str,
    consequence: &'check str,
    remedy: &'check str,
}

impl<'check> From<&'check Requirement> for Finding<'check> {
    fn from(requirement: &'check Requirement) -> Self {
        let Requirement { name, state, finding, consequence, remedy } = requirement;
        Self { name, state: word(*state).0, finding, consequence, remedy }
    }
}

/// Checks and prints.
///
/// # Errors
/// Standard output cannot be written.
pub(crate) fn doctor(arguments: &Arguments) -> anyhow::Result<ExitCode> {
    let requirements = check();
    let mut output = std::io::stdout();
    if arguments.json {
        writeln!(output, "{}", json(&requirements)?)
    } else {
        let palette = Palette::of(&output);
        output.write_all(text(&requirements, palette).as_bytes())
    }
    .context("cannot write to standard output")?;
    let missing = requirements.iter().any(|requirement| requirement.state == State::Missing);
    Ok(ExitCode::from(u8::from(missing)))
}

fn word(state: State) -> (&'static str, Tone) {
    match state {
        State::Met => ("ok", Tone::Good),
        State::Limited => ("limited", Tone::Warning),
        State::Missing => ("missing", Tone::Bad),
    }
}

fn json(requirements: &[Requirement]) -> anyhow::Result<String> {
    let findings: Vec<_> = requirements.iter().map(Finding::from).collect();
    Ok(serde_json::to_string_pretty(&findings)?)
}

/// One line for each, two more for those that are not met, and the verdict.
fn text(requirements: &[Requirement], palette: Palette) -> String {
    let mut text = String::new();
    for requirement in requirements {
        let (word, tone) = word(requirement.state);
        let indent = " ".repeat(9);
        text += &format!("{} {}: {}\n", palette.paint(tone, word, 8), requirement.name, requirement.finding);
        for line in [requirement.consequence, requirement.remedy].iter().filter(|line| !line.is_empty()) {
            text += &format!("{indent}{line}\n");
        }
    }
    let count = |state| requirements.iter().filter(|requirement| requirement.state == state).count();
    text += &match (count(State::Missing), count(State::Limited)) {
        (0, 0) => "\nThis machine has all that `ioasid run` needs.\n".to_owned(),
        (0, limited) => {
            format!("\nThis machine has what `ioasid run` needs; limited: {limited}, as said above.\n")
        }
        (missing, _) => format!(
            "\n`ioasid run` cannot work here: {missing} missing. Put them right from the top; later ones may follow \
             from earlier ones.\n"
        ),
    };
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    fn requirement(name: &'static str, state: State) -> Requirement {
        let said = |text| if state == State::Met { "" } else { text };
        Requirement {
            name,
            state,
            finding: "found".to_owned(),
            consequence: said("So it goes."),
            remedy: said("Do it."),
        }
    }

    #[test]
    fn what_is_not_met_is_explained_and_the_verdict_counts() {
        let palette = Palette::of(&std::fs::File::open("/dev/null").unwrap());
        let all = [
            requirement("a", State::Met),
            requirement("b", State::Limited),
            requirement("c", State::Missing),
        ];
        let shown = text(&all, palette);
        assert!(
            shown
                .starts_with("ok       a: found\nlimited  b: found\n         So it goes.\n         Do it.\n")
        );
        assert!(shown.contains("cannot work here: 1 missing"), "{shown}");
        assert!(text(&all[..2], palette).ends_with("limited: 1, as said above.\n"));
        assert!(text(&all[..1], palette).ends_with("all that `ioasid run` needs.\n"));
    }

    #[test]
    fn json_has_every_check() {
        let all = [requirement("a", State::Met), requirement("c", State::Missing)];
        let parsed: serde_json::Value = serde_json::from_str(&json(&all).unwrap()).unwrap();
        assert_eq!(parsed[0]["state"], "ok");
        assert_eq!(parsed[1]["remedy"], "Do it.");
    }
}
