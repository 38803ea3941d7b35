//! The kernel's own iommufd self-test as a client of ours, and its results against the list of what is known to fail.
//!
//! ```text
//! kernel_source ─► build ─► instances ─► runner (one process tree each) ─► ktap ─► conformance ─► report
//!                  (cc)     (-l)          with huge_pages around it                (docs/conformance.md)
//! ```
//!
//! Each instance, which is one test of one variant of a fixture, runs in a process of its own under a server of its
//! own. That costs a start for each, and buys that a crash, a hang or a leak of one says nothing about the others.

mod build;
mod capability;
mod conformance;
mod huge_pages;
mod instances;
mod ktap;
mod report;
mod runner;

use std::{path::PathBuf, time::Duration};

use anyhow::{Context, Result, bail};

use crate::{command, kernel_source, workspace};

#[derive(Debug, clap::Args)]
pub(crate) struct Arguments {
    #[command(flatten)]
    kernel: kernel_source::Arguments,

    /// What to run: a fixture, FIXTURE.VARIANT, or a whole instance's name; repeatable [default: everything]
    #[arg(long = "fixture", value_name = "NAME")]
    fixtures: Vec<String>,

    /// Command to put before the test program, split at spaces [default: the built `ioasid run --test-devices --`]
    #[arg(long, value_name = "COMMAND")]
    run_with: Option<String>,

    /// Seconds after which an instance is ended and has failed
    #[arg(long, value_name = "SECONDS", default_value = "60")]
    timeout: u64,

    /// List the chosen instances and run nothing
    #[arg(long)]
    list: bool,

    /// Print the results as JSON
    #[arg(long)]
    json: bool,
}

/// How an instance ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Verdict {
    /// It held.
    Pass,
    /// It did not hold, crashed, or hung.
    Fail,
    /// The test itself said that it does not apply.
    Skip,
    /// The machine lacks something that the test needs, so it was not started.
    NotRun,
}

/// One instance's result.
#[derive(Debug, serde::Serialize)]
pub(crate) struct Outcome {
    /// FIXTURE.VARIANT.TEST, or FIXTURE.TEST for a fixture without variants.
    pub(crate) instance: String,
    pub(crate) verdict: Verdict,
    /// Why, as far as one line can tell; empty after a pass.
    pub(crate) note: String,
    pub(crate) seconds: f64,
}

/// The chore.
pub(crate) fn run(arguments: &Arguments) -> Result<()> {
    let kernel = kernel_source::fetch(&arguments.kernel, kernel_source::BUILDING_TESTS)?;
    let program = build::self_test(&kernel)?;
    let all = instances::list(&program)?;
    let chosen = choose(arguments, &all)?;
    if arguments.list {
        for instance in &chosen {
            println!("{instance}");
        }
        return Ok(());
    }
    let list_path = workspace::root().join("docs/conformance.md");
    let list = conformance::read(&list_path, &all)?;
    let logs = kernel.build_directory().join("logs");
    let timeout = Duration::from_secs(arguments.timeout);
    let runner = runner::Runner::new(prefix(arguments)?, program, logs.clone(), timeout)?;
    eprintln!(
        "the iommufd self-test of Linux {}; all that it prints goes to {}",
        kernel.version(),
        logs.display()
    );

    let wants_huge_pages = chosen.iter().any(|instance| huge_pages::needed_by(instance));
    let huge_pages = wants_huge_pages.then(huge_pages::reserve);
    if let Some(Err(reason)) = &huge_pages {
        eprintln!("{reason}");
        eprintln!("instances that need huge pages are not run");
    }
    // What has its own answer to the capability is a server of ours; a kernel's own `/dev/iommu` minds the first namespace.
    let in_a_namespace = !capability::is_held()
        && arguments.run_with.is_none()
        && chosen.iter().any(|instance| capability::needed_by(instance))
        && capability::is_held_in_a_namespace();
    let mut outcomes = Vec::new();
    for instance in &chosen {
        let lacking = if matches!(huge_pages, Some(Err(_))) && huge_pages::needed_by(instance) {
            Some("no huge pages")
        } else if capability::needed_by(instance) && !capability::is_held() && !in_a_namespace {
            Some("no CAP_SYS_RESOURCE")
        } else {
            None
        };
        let outcome = match lacking {
            Some(what) => Outcome {
                instance: instance.clone(),
                verdict: Verdict::NotRun,
                note: what.to_owned(),
                seconds: 0.0,
            },
            None if in_a_namespace && capability::needed_by(instance) => {
                runner.run(instance, capability::IN_A_NAMESPACE)?
            }
            None => runner.run(instance, &[])?,
        };
        let line = report::line(&outcome, &list);
        if arguments.json {
            eprintln!("{line}");
        } else {
            println!("{line}");
        }
        outcomes.push(outcome);
    }
    drop(huge_pages);

    let deviations = list.compare(&outcomes);
    if arguments.json {
        report::json(kernel.version(), &outcomes, &list, &deviations)?;
    } else {
        report::conclusion(&outcomes, &deviations);
    }
    if !deviations.is_empty() {
        bail!("{} instances did not end as {} says", deviations.len(), list_path.display());
    }
    Ok(())
}

/// The instances that the arguments name, in the test program's order.
fn choose(arguments: &Arguments, all: &[String]) -> Result<Vec<String>> {
    if arguments.fixtures.is_empty() {
        return Ok(all.to_vec());
    }
    for fixture in &arguments.fixtures {
        if !all.iter().any(|instance| belongs(instance, fixture)) {
            bail!("the self-test has no fixture, variant or instance {fixture}");
        }
    }
    let chosen = |instance: &&String| arguments.fixtures.iter().any(|fixture| belongs(instance, fixture));
    Ok(all.iter().filter(chosen).cloned().collect())
}

/// Whether `instance` is `name` or one of what `name` stands for.
fn belongs(instance: &str, name: &str) -> bool {
    instance.strip_prefix(name).is_some_and(|rest| rest.is_empty() || rest.starts_with('.'))
}

/// What is put before the test program. Builds `ioasid` if that is it.
fn prefix(arguments: &Arguments) -> Result<Vec<String>> {
    if let Some(command) = &arguments.run_with {
        return Ok(command.split_whitespace().map(str::to_owned).collect());
    }
    command::run(workspace::cargo().args(["build", "--release", "--quiet", "--package", "ioasid-cli"]))?;
    let ioasid: PathBuf = workspace::target_directory()?.join("release/ioasid");
    let ioasid =
        ioasid.into_os_string().into_string().ok().context("the build directory's name is not UTF-8")?;
    Ok([&*ioasid, "run", "--test-devices", "--"].map(str::to_owned).to_vec())
}

#[cfg(test)]
mod tests {
    use super::belongs;

    #[test]
    fn names_stand_for_whole_parts() {
        assert!(belongs("iommufd.simple_close", "iommufd"));
        assert!(!belongs("iommufd_ioas.no_domain.area", "iommufd"));
        assert!(belongs("iommufd_ioas.no_domain.area", "iommufd_ioas.no_domain"));
        assert!(belongs("iommufd_ioas.no_domain.area", "iommufd_ioas.no_domain.area"));
        assert!(!belongs("iommufd_ioas.no_domain.area_allowed", "iommufd_ioas.no_domain.area"));
    }
}
