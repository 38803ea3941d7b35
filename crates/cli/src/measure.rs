//! `ioasid measure`: what a call costs a program, in medians.
//!
//! A refused ioctl is the price of a call itself: under `ioasid run` the way to the server and back, on a kernel a system
//! call. A pair of calls that maps and unmaps 4 KiB adds the work, without a page table and with one or two devices'. How
//! much of it was spent in the server is in the summary of `ioasid run --summary`.

use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use clap::{Args, ValueEnum};
use rustix::io::Errno;
use serde::Serialize;

use crate::client::{Access, DmaMemory, Iommufd, VfioDevice};
use crate::quantity::time;

/// Time the calls of a program that maps and unmaps
///
/// Run it under `ioasid run --summary` to see also how long the server took for the same calls.
#[derive(Debug, Args)]
#[command(after_help = AFTER_HELP)]
pub(crate) struct Arguments {
    /// How often each case is repeated
    #[arg(long, value_name = "N", default_value_t = 10_000, value_parser = clap::value_parser!(u32).range(1..=100_000_000))]
    pairs: u32,

    /// The cases [default: all]
    #[arg(long = "case", value_name = "CASE")]
    cases: Vec<Case>,

    /// The device files of the cases with devices
    #[arg(
        long = "device",
        value_name = "PATH",
        default_values = ["/dev/vfio/devices/vfio0", "/dev/vfio/devices/vfio1"]
    )]
    devices: Vec<PathBuf>,

    /// Print JSON
    #[arg(long)]
    json: bool,
}

const AFTER_HELP: &str = "\
Examples:
  ioasid run --summary -- ioasid measure
  ioasid run --summary -- ioasid measure --case pair --pairs 100000

Exit status:
  0  measured
  1  something could not be measured, as it says
  2  bad usage";

/// What is timed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum, Serialize)]
#[serde(rename_all = "kebab-case")]
enum Case {
    /// An ioctl that is refused: DESTROY of an object that is not there
    Refused,
    /// MAP and UNMAP of 4 KiB where no device is attached
    Pair,
    /// The same with one device attached
    PairDevice,
    /// The same with two devices attached
    PairTwoDevices,
}

impl Case {
    fn devices(self) -> usize {
        match self {
            Self::Refused | Self::Pair => 0,
            Self::PairDevice => 1,
            Self::PairTwoDevices => 2,
        }
    }

    fn describe(self) -> &'static str {
        match self {
            Self::Refused => "a refused ioctl",
            Self::Pair => "map and unmap 4 KiB, no device",
            Self::PairDevice => "map and unmap 4 KiB, one device",
            Self::PairTwoDevices => "map and unmap 4 KiB, two devices",
        }
    }
}

/// Times of one case.
#[derive(Debug, Serialize)]
struct Measured {
    case: Case,
    repetitions: usize,
    median_nanoseconds: u128,
    /// 99 of 100 took no longer.
    percentile_99_nanoseconds: u128,
    longest_nanoseconds: u128,
}

impl Measured {
    /// From at least one time.
    fn from_times(case: Case, mut times: Vec<Duration>) -> Option<Self> {
        times.sort_unstable();
        let at = |percent: usize| times.get((times.len() - 1) * percent / 100).map(Duration::as_nanos);
        let (median, percentile_99) = (at(50)?, at(99)?);
        Some(Self {
            case,
            repetitions: times.len(),
            median_nanoseconds: median,
            percentile_99_nanoseconds: percentile_99,
            longest_nanoseconds: at(100)?,
        })
    }
}

const PAGE: u64 = 4096;
/// In reach of every device.
const IOVA: u64 = 1 << 26;

/// Measures and prints.
///
/// # Errors
/// A call failed that should not, or standard output cannot be written.
pub(crate) fn measure(arguments: &Arguments) -> anyhow::Result<ExitCode> {
    let mut output = std::io::stdout();
    let cases = if arguments.cases.is_empty() { Case::value_variants() } else { &arguments.cases };
    let mut all = Vec::new();
    for case in cases {
        let measured = time_case(*case, arguments).context(case.describe())?;
        if !arguments.json {
            let shown =
                |nanoseconds| time(Duration::from_nanos(u64::try_from(nanoseconds).unwrap_or(u64::MAX)));
            writeln!(
                output,
                "{:<34} median {:>9}   99 % within {:>9}   longest {:>9}   of {}",
                case.describe(),
                shown(measured.median_nanoseconds),
                shown(measured.percentile_99_nanoseconds),
                shown(measured.longest_nanoseconds),
                measured.repetitions
            )?;
        }
        all.push(measured);
    }
    if arguments.json {
        writeln!(output, "{}", serde_json::to_string_pretty(&all)?)?;
    }
    Ok(ExitCode::SUCCESS)
}

/// Each case has an address space of its own, which goes at its end.
fn time_case(case: Case, arguments: &Arguments) -> anyhow::Result<Measured> {
    let iommu = Iommufd::open()
        .context("cannot open /dev/iommu; start this under `ioasid run`, or on a kernel with iommufd")?;
    let ioas = iommu.alloc().context("cannot allocate an address space")?;
    let Some(paths) = arguments.devices.get(..case.devices()) else {
        bail!("this needs {} devices; name so many (--device)", case.devices());
    };
    let attach = |path: &PathBuf| attach(&iommu, ioas, path);
    let devices: Vec<VfioDevice> = paths.iter().map(attach).collect::<Result<_, _>>()?;
    let memory = DmaMemory::reserve(PAGE as usize, PAGE as usize).context("cannot reserve memory")?;
    memory.write(0, b"touched").context("cannot touch memory")?;

    let once = || match case {
        Case::Refused => match iommu.destroy(u32::MAX) {
            Err(Errno::NOENT) => Ok(()),
            other => bail!("DESTROY of an object that is not there: expected ENOENT, got {other:?}"),
        },
        Case::Pair | Case::PairDevice | Case::PairTwoDevices => {
            iommu.map(ioas, &memory, 0, PAGE, IOVA, Access::ReadWrite).context("MAP")?;
            iommu.unmap(ioas, IOVA, PAGE).context("UNMAP")?;
            Ok(())
        }
    };
    for _ in 0..arguments.pairs / 10 {
        once()?;
    }
    let mut times = Vec::new();
    for _ in 0..arguments.pairs {
        let start = Instant::now();
        once()?;
        times.push(start.elapsed());
    }
    drop(devices);
    Measured::from_times(case, times).context("nothing was measured")
}

fn attach(iommu: &Iommufd, ioas: u32, path: &Path) -> anyhow::Result<VfioDevice> {
    let device = VfioDevice::open(path).with_context(|| format!("cannot open {}", path.display()))?;
    device
        .bind(iommu)
        .with_context(|| format!("cannot bind {}; another program may have", path.display()))?;
    device.attach(ioas).with_context(|| format!("cannot attach {}", path.display()))?;
    Ok(device)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn medians_and_percentiles_are_of_the_sorted_times() {
        let times = (1..=101).rev().map(Duration::from_nanos).collect();
        let measured = Measured::from_times(Case::Pair, times).unwrap();
        assert_eq!((measured.median_nanoseconds, measured.percentile_99_nanoseconds), (51, 100));
        assert_eq!((measured.longest_nanoseconds, measured.repetitions), (101, 101));
        let one = Measured::from_times(Case::Refused, vec![Duration::from_nanos(7)]).unwrap();
        assert_eq!((one.median_nanoseconds, one.longest_nanoseconds), (7, 7));
    }
}
