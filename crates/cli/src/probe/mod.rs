//! `ioasid probe`: an ordinary program that tries an I/O address space with a device, step by step.
//!
//! It uses Linux's interfaces only, so the same binary runs under `ioasid run` and on a kernel with QEMU's `edu` device
//! bound to VFIO. [`steps`] is the sequence, [`plan`] says which memory is mapped where, [`status`] asks what is mapped
//! and charged, and [`report`] keeps the record: what held, what failed, and what could not be tried because of that.

mod plan;
mod report;
mod status;
mod steps;

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::Context;
use clap::Args;
use rustix::process::{Resource, getrlimit};

use crate::quantity::Bytes;
use plan::{Plan, Size};
use report::Report;

/// The subcommand's name.
pub(crate) const NAME: &str = "probe";

/// Try an I/O address space and a device, step by step
///
/// An ordinary client of /dev/iommu and /dev/vfio: it maps memory of its own in several areas, has devices copy data through
/// them, compares the bytes, unmaps one area and shows that devices no longer reach it while its neighbours still work.
/// Each step is one line with the time it took.
///
/// It needs nothing but Linux's interfaces, so it also runs on a kernel with QEMU's edu device bound to vfio-pci.
#[derive(Debug, Args)]
#[command(after_help = AFTER_HELP)]
pub(crate) struct Arguments {
    /// Memory to map: whole MiB, from 1M to 256G
    #[arg(long, value_name = "BYTES", default_value = "1G")]
    size: Size,

    /// The device files: the first is tried in full, the second shares its address space
    #[arg(
        long = "device",
        value_name = "PATH",
        num_args = 1,
        default_values = ["/dev/vfio/devices/vfio0", "/dev/vfio/devices/vfio1"]
    )]
    devices: Vec<PathBuf>,

    /// Print JSON instead of lines
    #[arg(long)]
    json: bool,
}

const AFTER_HELP: &str = "\
Examples:
  ioasid run                                 runs the probe on software devices
  ioasid run -- ioasid probe --size 64M      with less memory
  ioasid run -- ioasid probe --json          for programs
  qemu-system-x86_64 -device edu ...         then, in the guest, with the device bound to vfio-pci:
  ioasid probe --size 64M                    the same on a real kernel

Exit status:
  0  every step held (a second device may be absent)
  1  a step failed; later ones that need it were not run
  2  bad usage";

/// Runs the steps.
///
/// # Errors
/// Standard output cannot be written.
pub(crate) fn probe(arguments: &Arguments) -> anyhow::Result<ExitCode> {
    let limit = getrlimit(Resource::Memlock).current.map(Bytes);
    let plan = Plan::new(arguments.size, limit);
    let mut report = Report::new(arguments.json);
    steps::run(&mut report, &plan, &arguments.devices);
    let held = report.finish().context("cannot write to standard output")?;
    Ok(ExitCode::from(u8::from(!held)))
}
