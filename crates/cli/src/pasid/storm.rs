//! Many machines that come and go at once.

use std::io::{self, IsTerminal, Write};
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use clap::Args;
use indicatif::{ProgressBar, ProgressStyle};
use ioasid::pasid::{AllocateError, Limit, MOST_PASIDS, Owner, PasidSystem, Priority, Received, Spid};
use serde::Serialize;

use crate::quantity::{rate, time};

/// Many machines on many threads: allocate, bind, free and die at random, and see whether it adds up
///
/// Each thread is one machine after the other. A machine allocates, gives private IDs, binds, frees and looks up, as often as
/// asked, and then dies with whatever it has. One listener hears everything, another one reads too slowly.
#[derive(Debug, Args)]
#[command(after_help = AFTER_HELP)]
pub(super) struct Arguments {
    /// How many threads
    #[arg(long, value_name = "N", default_value_t = 4, value_parser = clap::value_parser!(u32).range(1..=256))]
    threads: u32,

    /// How many machines come and go in each thread
    #[arg(long, value_name = "N", default_value_t = 100)]
    machines: u32,

    /// How many calls each machine makes
    #[arg(long, value_name = "N", default_value_t = 10_000)]
    calls: u32,

    /// How many PASIDs a machine may have
    #[arg(long, value_name = "N", default_value_t = 1000, value_parser = clap::value_parser!(u32).range(1..=4096))]
    quota: u32,

    /// What is drawn at random begins here
    #[arg(long, value_name = "N", default_value_t = 1)]
    seed: u64,

    /// Print JSON
    #[arg(long)]
    json: bool,
}

const AFTER_HELP: &str = "\
Examples:
  ioasid pasid storm
  ioasid pasid storm --threads 16 --quota 4096 --json

Exit status:
  0  every answer was right, and nothing is left at the end
  1  something was not, as it says
  2  bad usage";

#[derive(Debug, Default, Serialize)]
struct Report {
    calls: u64,
    elapsed_seconds: f64,
    calls_per_second: f64,
    /// Allocations that the quota or the limit above refused.
    refused: u64,
    /// Of the limit above all machines, which is below what they want together.
    limit_events: u64,
    peak_pasids: u32,
    events_heard: u64,
    /// Which the one who listens knows of, since it could not keep up.
    events_lost: u64,
    /// By the one who does not read while the storm lasts.
    events_lost_by_the_slow: u64,
    wrong: Vec<String>,
}

/// Runs the storm.
///
/// # Errors
/// Standard output cannot be written.
pub(super) fn storm(arguments: &Arguments) -> anyhow::Result<ExitCode> {
    let system = PasidSystem::new(MOST_PASIDS)?;
    // A little less than all machines may have together, so that it is reached now and then.
    let limit = Limit::new(&system, "host", Some((arguments.threads * arguments.quota).div_ceil(5) * 2));
    let (heard, slow) = (system.subscribe(Priority::Iommu, 1 << 16), system.subscribe(Priority::Device, 8));
    let made = AtomicU64::new(0);
    let all = u64::from(arguments.threads) * u64::from(arguments.machines) * u64::from(arguments.calls);
    let bar = if io::stderr().is_terminal() { ProgressBar::new(all) } else { ProgressBar::hidden() };
    let bar = bar.with_style(ProgressStyle::with_template("{bar:24} {pos} of {len} calls  {eta} left")?);
    let began = Instant::now();
    let mut report = thread::scope(|scope| {
        let machines: Vec<_> = (0..arguments.threads)
            .map(|thread| {
                let (system, limit, made) = (&system, &limit, &made);
                scope.spawn(move || machines(thread, arguments, system, limit, made))
            })
            .collect();
        let (mut heard_events, mut lost) = (0, 0);
        let mut wrong = Vec::new();
        let mut listen = |patience| {
            while let Some(received) = heard.wait(patience) {
                match received {
                    Received::Lost(count) => lost += count,
                    // All events so far were heard, or are known to be lost.
                    Received::Event(event) if event.sequence != heard_events + lost => {
                        wrong.push(format!("event {} comes after {heard_events} and {lost}", event.sequence));
                    }
                    Received::Event(_) => heard_events += 1,
                }
                bar.set_position(made.load(Ordering::Relaxed));
            }
        };
        while machines.iter().any(|machine| !machine.is_finished()) {
            listen(Duration::from_millis(20));
        }
        listen(Duration::ZERO);
        let mut report = Report { events_heard: heard_events, events_lost: lost, wrong, ..Report::default() };
        for machine in machines {
            let (refused, wrong) = match machine.join() {
                Ok(found) => found,
                Err(panic) => std::panic::resume_unwind(panic),
            };
            report.refused += refused;
            report.wrong.extend(wrong);
        }
        report
    });
    bar.finish_and_clear();
    let elapsed = began.elapsed();
    while let Some(received) = slow.next() {
        if let Received::Lost(count) = received {
            report.events_lost_by_the_slow += count;
        }
    }
    let (status, usage) = (system.status(), limit.usage());
    if (status.used, status.reserved, status.sets, usage.current) != (0, 0, 0, 0) {
        report.wrong.push(format!("at the end there is something left: {status:?}, {usage:?}"));
    }
    report.calls = made.load(Ordering::Relaxed);
    report.elapsed_seconds = elapsed.as_secs_f64();
    report.calls_per_second = report.calls as f64 / report.elapsed_seconds.max(1e-9);
    (report.limit_events, report.peak_pasids) = (usage.events, usage.peak);
    print(arguments, &report, elapsed)?;
    Ok(if report.wrong.is_empty() { ExitCode::SUCCESS } else { ExitCode::from(crate::FAILURE) })
}

fn print(arguments: &Arguments, report: &Report, elapsed: Duration) -> anyhow::Result<()> {
    let mut output = io::stdout();
    if arguments.json {
        writeln!(output, "{}", serde_json::to_string_pretty(report)?)?;
        return Ok(());
    }
    let per_call = elapsed.mul_f64(1.0 / report.calls.max(1) as f64);
    writeln!(
        output,
        "{} machines on {} threads: {} calls in {}, {} a second, {} each",
        arguments.threads * arguments.machines,
        arguments.threads,
        report.calls,
        time(elapsed),
        rate(report.calls_per_second),
        time(per_call)
    )?;
    writeln!(output, "  PASIDs in use   {} at most", report.peak_pasids)?;
    writeln!(
        output,
        "  refused         {}, {} of them by the limit above all",
        report.refused, report.limit_events
    )?;
    writeln!(
        output,
        "  events          {} heard in order, {} known to be lost; {} lost by one who does not read",
        report.events_heard, report.events_lost, report.events_lost_by_the_slow
    )?;
    if report.wrong.is_empty() {
        writeln!(output, "  verdict         all right; nothing is left")?;
    }
    for wrong in report.wrong.iter().take(10) {
        writeln!(output, "  WRONG           {wrong}")?;
    }
    Ok(())
}

/// What one thread's machines were refused, and what was wrong.
fn machines(
    thread: u32,
    arguments: &Arguments,
    system: &Arc<PasidSystem>,
    limit: &Limit,
    made: &AtomicU64,
) -> (u64, Vec<String>) {
    let (mut refused, mut wrong) = (0, Vec::new());
    // Knuth's linear congruential generator; the upper bits are good enough to mix calls.
    let mut state = arguments.seed ^ (u64::from(thread) << 32);
    let mut random = move |below: usize| {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        ((state >> 33) % below.max(1) as u64) as usize
    };
    let mut outliving = Vec::new();
    for _ in 0..arguments.machines {
        let owner = Owner::Machine(u64::from(thread));
        let set = match system.create_set(owner, arguments.quota, limit) {
            Ok(set) => set,
            Err(error) => {
                wrong.push(format!("no set for {owner}: {error}"));
                continue;
            }
        };
        let (mut ids, mut bindings) = (Vec::new(), Vec::new());
        for call in 0..arguments.calls {
            match random(8) {
                0..=2 => match set.allocate(1..=u32::MAX, u64::from(call)) {
                    Ok(pasid) => ids.push(pasid),
                    Err(AllocateError::QuotaUsedUp { .. } | AllocateError::Limit(_)) => refused += 1,
                    Err(error) => wrong.push(error.to_string()),
                },
                3 if !ids.is_empty() => {
                    let spid = Spid::new(random(arguments.quota as usize) as u32);
                    let pasid = ids[random(ids.len())];
                    let given = set.set_spid(pasid, spid).is_ok();
                    if given && spid.and_then(|spid| set.find(spid)) != Some(pasid) {
                        wrong.push(format!("PASID {pasid} is not found by its private ID"));
                    }
                }
                4 if !ids.is_empty() => match set.bind(ids[random(ids.len())]) {
                    Ok(binding) => bindings.push(binding),
                    Err(error) => wrong.push(error.to_string()),
                },
                5 if !bindings.is_empty() => drop(bindings.swap_remove(random(bindings.len()))),
                6 if !ids.is_empty() => {
                    if let Err(error) = set.free(ids.swap_remove(random(ids.len()))) {
                        wrong.push(error.to_string());
                    }
                }
                _ if !ids.is_empty() => {
                    let pasid = ids[random(ids.len())];
                    if set.lookup(pasid).map(|status| status.owner) != Ok(owner) {
                        wrong.push(format!("PASID {pasid} is not of {owner}"));
                    }
                }
                _ => {}
            }
            made.fetch_add(1, Ordering::Relaxed);
        }
        // It dies. Its devices have some of its IDs until the next one is dead.
        drop(set);
        outliving = bindings;
    }
    drop(outliving);
    (refused, wrong)
}
