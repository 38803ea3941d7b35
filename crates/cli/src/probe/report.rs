//! The record of a probe: what held, what failed, what was not run.
//!
//! A step yields a value that later steps need. [`Held`] is that value, or the reason why it is not there; a step whose
//! needs have failed is recorded as not run, and the reason travels on. So one failure is reported once, and what
//! follows from it is visible as that. What needs something that this machine has not, and need not have, is left out.

use std::io::{self, Stdout, Write};
use std::time::{Duration, Instant};

use serde::Serialize;

use crate::quantity::time;
use crate::terminal::{Palette, Tone};

/// What a step has yielded.
#[derive(Debug, Clone)]
pub(super) enum Held<T> {
    /// It held.
    Yes(T),
    /// It did not, or was not run: why, in words that follow "not run, ".
    No(String),
    /// The machine has nothing to try it on.
    Absent,
}

impl<T> Held<T> {
    /// Borrows the value.
    pub(super) fn as_ref(&self) -> Held<&T> {
        match self {
            Self::Yes(value) => Held::Yes(value),
            Self::No(reason) => Held::No(reason.clone()),
            Self::Absent => Held::Absent,
        }
    }

    /// The value as another one.
    pub(super) fn map<U>(self, change: impl FnOnce(T) -> U) -> Held<U> {
        match self {
            Self::Yes(value) => Held::Yes(change(value)),
            Self::No(reason) => Held::No(reason),
            Self::Absent => Held::Absent,
        }
    }

    /// Both values; without them, the reason of the first that has one.
    pub(super) fn and<U>(self, other: Held<U>) -> Held<(T, U)> {
        match (self, other) {
            (Self::Yes(first), Held::Yes(second)) => Held::Yes((first, second)),
            (Self::Absent, _) | (_, Held::Absent) => Held::Absent,
            (Self::No(reason), _) | (_, Held::No(reason)) => Held::No(reason),
        }
    }

    /// This value, if the other step held too.
    pub(super) fn if_also<U>(self, other: &Held<U>) -> Self {
        self.and(other.as_ref()).map(|(value, _)| value)
    }
}

/// How a step ends that does not hold.
#[derive(Debug)]
pub(super) enum Stop {
    /// It should have held.
    Failed(Failure),
    /// What it tries is not on this machine, and need not be: why.
    Absent(String),
}

/// A step that should have held.
#[derive(Debug)]
pub(super) struct Failure {
    /// What should have happened.
    expected: String,
    /// What happened.
    happened: String,
    /// What to do about it.
    advice: String,
}

impl Failure {
    pub(super) fn new(
        expected: impl Into<String>,
        happened: impl Into<String>,
        advice: impl Into<String>,
    ) -> Self {
        Self { expected: expected.into(), happened: happened.into(), advice: advice.into() }
    }
}

impl From<Failure> for Stop {
    fn from(failure: Failure) -> Self {
        Self::Failed(failure)
    }
}

/// What a step yields: a value, and for people what was found, which may be empty.
pub(super) type Verdict<T> = Result<(T, String), Stop>;

#[derive(Debug, Serialize)]
#[serde(rename_all = "snake_case", tag = "status")]
enum Outcome {
    Ok,
    Failed { expected: String, happened: String, advice: String },
    NotRun { reason: String },
}

#[derive(Debug, Serialize)]
struct Step {
    name: String,
    #[serde(flatten)]
    outcome: Outcome,
    /// What was found.
    #[serde(skip_serializing_if = "String::is_empty")]
    detail: String,
    nanoseconds: u128,
}

#[derive(Debug, Serialize)]
struct Summary<'report> {
    held: usize,
    failed: usize,
    not_run: usize,
    nanoseconds: u128,
    steps: &'report [Step],
}

/// Where the time stands, in columns.
const TIME_COLUMN: usize = 100;

/// The record, printed line by line as it grows, or as JSON at the end.
#[derive(Debug)]
pub(super) struct Report {
    json: bool,
    output: Stdout,
    /// The first failure to write, after which nothing more is written.
    written: io::Result<()>,
    palette: Palette,
    start: Instant,
    steps: Vec<Step>,
}

impl Report {
    pub(super) fn new(json: bool) -> Self {
        let output = io::stdout();
        let palette = Palette::of(&output);
        Self { json, output, written: Ok(()), palette, start: Instant::now(), steps: Vec::new() }
    }

    /// A step that needs no other.
    pub(super) fn step<T>(
        &mut self,
        name: impl Into<String>,
        action: impl FnOnce() -> Verdict<T>,
    ) -> Held<T> {
        self.after(Held::Yes(()), name, |()| action())
    }

    /// A step that needs what earlier ones have yielded. Its time is that of `action`.
    pub(super) fn after<N, T>(
        &mut self,
        needs: Held<N>,
        name: impl Into<String>,
        action: impl FnOnce(N) -> Verdict<T>,
    ) -> Held<T> {
        let name = name.into();
        let needs = match needs {
            Held::Yes(needs) => needs,
            Held::No(reason) => {
                self.record(name, Outcome::NotRun { reason: reason.clone() }, String::new(), Duration::ZERO);
                return Held::No(reason);
            }
            Held::Absent => return Held::Absent,
        };
        let start = Instant::now();
        let verdict = action(needs);
        let taken = start.elapsed();
        match verdict {
            Ok((value, detail)) => {
                self.record(name, Outcome::Ok, detail, taken);
                Held::Yes(value)
            }
            Err(Stop::Absent(reason)) => {
                self.record(name, Outcome::NotRun { reason }, String::new(), taken);
                Held::Absent
            }
            Err(Stop::Failed(Failure { expected, happened, advice })) => {
                let reason = format!("because this failed: {name}");
                self.record(name, Outcome::Failed { expected, happened, advice }, String::new(), taken);
                Held::No(reason)
            }
        }
    }

    fn record(&mut self, name: String, outcome: Outcome, detail: String, taken: Duration) {
        let step = Step { name, outcome, detail, nanoseconds: taken.as_nanos() };
        if !self.json {
            let line = line(&step, taken, self.palette);
            self.write(&line);
        }
        self.steps.push(step);
    }

    fn write(&mut self, text: &str) {
        if self.written.is_ok() {
            self.written = self.output.write_all(text.as_bytes()).and_then(|()| self.output.flush());
        }
    }

    fn count(&self, wanted: impl Fn(&Outcome) -> bool) -> usize {
        self.steps.iter().filter(|step| wanted(&step.outcome)).count()
    }

    /// Prints the summary; returns whether no step failed.
    ///
    /// # Errors
    /// Something could not be printed, now or before.
    pub(super) fn finish(mut self) -> io::Result<bool> {
        let taken = self.start.elapsed();
        let summary = Summary {
            held: self.count(|outcome| matches!(outcome, Outcome::Ok)),
            failed: self.count(|outcome| matches!(outcome, Outcome::Failed { .. })),
            not_run: self.count(|outcome| matches!(outcome, Outcome::NotRun { .. })),
            nanoseconds: taken.as_nanos(),
            steps: &self.steps,
        };
        let all_held = summary.failed == 0;
        let text = if self.json {
            let mut text = serde_json::to_string_pretty(&summary)?;
            text.push('\n');
            text
        } else {
            let Summary { held, failed, not_run, .. } = summary;
            let all = self.steps.len();
            let advice = self.steps.iter().find_map(|step| match &step.outcome {
                Outcome::Failed { advice, .. } => Some(format!("\nTo do first ({}): {advice}.\n", step.name)),
                _ => None,
            });
            let counts =
                format!("{all} steps: {held} ok, {failed} failed, {not_run} not run; {}", time(taken));
            format!("\n{counts}\n{}", advice.unwrap_or_default())
        };
        self.write(&text);
        self.written.map(|()| all_held)
    }
}

/// One step for people; more lines if it failed.
fn line(step: &Step, taken: Duration, palette: Palette) -> String {
    let name = &step.name;
    match &step.outcome {
        Outcome::Ok => {
            let mut text = name.clone();
            if !step.detail.is_empty() {
                text += ": ";
                text += &step.detail;
            }
            let padding = TIME_COLUMN.saturating_sub(text.chars().count() + time(taken).len());
            format!(
                "{} {text} {:padding$}{}\n",
                palette.paint(Tone::Good, "ok", 4),
                "",
                palette.paint(Tone::Faint, &time(taken), 0)
            )
        }
        Outcome::NotRun { reason } => {
            format!("{} {name}: not run, {reason}\n", palette.paint(Tone::Warning, "--", 4))
        }
        Outcome::Failed { expected, happened, advice } => {
            let mark = palette.paint(Tone::Bad, "FAIL", 4);
            format!(
                "{mark} {name}\n     expected: {expected}\n     happened: {happened}\n     to do:    {advice}\n"
            )
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_needs_a_failed_step_is_not_run_and_names_it() {
        let mut report = Report::new(true);
        let good = report.step("good", || Ok((1, String::new())));
        let bad: Held<i32> = report.after(good.as_ref(), "bad", |_| Err(Failure::new("a", "b", "c").into()));
        let both = report.after(good.as_ref().and(bad.as_ref()), "both", |_| Ok(((), String::new())));
        let later: Held<()> = report.after(both, "later", |()| unreachable!());
        assert!(matches!(later, Held::No(reason) if reason == "because this failed: bad"));
        let held = report.after(good.if_also(&Held::<()>::No("so".to_owned())), "only", |_| unreachable!());
        assert!(matches!(held, Held::<()>::No(reason) if reason == "so"));
        assert_eq!(report.count(|outcome| matches!(outcome, Outcome::Ok)), 1);
        assert_eq!(report.count(|outcome| matches!(outcome, Outcome::NotRun { .. })), 3);
    }

    #[test]
    fn what_is_absent_is_no_failure() {
        let mut report = Report::new(true);
        let absent: Held<()> = report.step("second", || Err(Stop::Absent("there is one device".to_owned())));
        let later: Held<()> = report.after(absent, "both", |()| unreachable!());
        assert!(matches!(later, Held::Absent));
        assert_eq!(report.steps.len(), 1, "what needs it is left out");
        assert_eq!(report.count(|outcome| matches!(outcome, Outcome::Failed { .. })), 0);
    }

    #[test]
    fn a_failure_says_what_to_do() {
        let outcome =
            Outcome::Failed { expected: "e".to_owned(), happened: "h".to_owned(), advice: "a".to_owned() };
        let step = Step { name: "n".to_owned(), outcome, detail: String::new(), nanoseconds: 0 };
        let palette = Palette::of(&std::fs::File::open("/dev/null").unwrap());
        let shown = line(&step, Duration::ZERO, palette);
        assert_eq!(shown, "FAIL n\n     expected: e\n     happened: h\n     to do:    a\n");
    }
}
