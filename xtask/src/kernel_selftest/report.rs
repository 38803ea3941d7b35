//! Results for people and for programs.

use anyhow::Result;
use serde_json::json;

use super::{
    Outcome, Verdict,
    conformance::{Deviation, DeviationKind, List},
};

/// One instance's line of the table.
pub(crate) fn line(outcome: &Outcome, list: &List) -> String {
    let verdict = match outcome.verdict {
        Verdict::Pass => "pass",
        Verdict::Fail => "fail",
        Verdict::Skip => "skip",
        Verdict::NotRun => "not run",
    };
    let line = format!("{:<52} {verdict:<7} {:>6.2} s", outcome.instance, outcome.seconds);
    match list.entry(&outcome.instance) {
        // What the test says of a failure that was expected is in its log.
        Some(entry) => line + "  listed: " + &entry.reason,
        None if outcome.note.is_empty() => line,
        None => line + "  " + &outcome.note,
    }
}

/// What follows the table: what deviates, and the sums.
pub(crate) fn conclusion(outcomes: &[Outcome], deviations: &[Deviation]) {
    for deviation in deviations {
        let meaning = match deviation.kind {
            DeviationKind::Regression => "has to pass and does not",
            DeviationKind::NowPasses => "passes now: take it off the list",
            DeviationKind::OtherThanListed => "neither passes nor ends as it is listed",
        };
        println!("{}: {meaning}", deviation.instance);
    }
    let not_run = count(outcomes, Verdict::NotRun);
    if not_run > 0 {
        println!(
            "{not_run} of the skipped were not run, for want of what the machine lacks; they are not known to pass"
        );
    }
    println!("{}", summary(outcomes));
}

/// The same as one JSON object.
pub(crate) fn json(kernel: &str, outcomes: &[Outcome], list: &List, deviations: &[Deviation]) -> Result<()> {
    let instances: Vec<_> = outcomes
        .iter()
        .map(|outcome| {
            let entry = list.entry(&outcome.instance);
            json!({
                "instance": outcome.instance,
                "verdict": outcome.verdict,
                "expected": entry.map_or(Verdict::Pass, |entry| entry.expected),
                "reason": entry.map(|entry| &entry.reason),
                "note": outcome.note,
                "seconds": outcome.seconds,
            })
        })
        .collect();
    let object = json!({
        "kernel": kernel,
        "passed": count(outcomes, Verdict::Pass),
        "failed": count(outcomes, Verdict::Fail),
        "skipped": count(outcomes, Verdict::Skip) + count(outcomes, Verdict::NotRun),
        "not_run": count(outcomes, Verdict::NotRun),
        "instances": instances,
        "deviations": deviations,
    });
    println!("{}", serde_json::to_string_pretty(&object)?);
    Ok(())
}

/// `N passed, N failed, N skipped`; what was not run counts as skipped.
fn summary(outcomes: &[Outcome]) -> String {
    let skipped = count(outcomes, Verdict::Skip) + count(outcomes, Verdict::NotRun);
    let [passed, failed] = [Verdict::Pass, Verdict::Fail].map(|verdict| count(outcomes, verdict));
    format!("{passed} passed, {failed} failed, {skipped} skipped")
}

fn count(outcomes: &[Outcome], verdict: Verdict) -> usize {
    outcomes.iter().filter(|outcome| outcome.verdict == verdict).count()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sums() {
        let verdicts = [Verdict::Pass, Verdict::Pass, Verdict::Fail, Verdict::Skip, Verdict::NotRun];
        let outcomes = verdicts.map(|verdict| Outcome {
            instance: "a.b".to_owned(),
            verdict,
            note: String::new(),
            seconds: 0.0,
        });
        assert_eq!(summary(&outcomes), "2 passed, 1 failed, 2 skipped");
    }
}
