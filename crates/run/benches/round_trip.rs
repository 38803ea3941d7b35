//! What a call costs under the transport, beside what it costs without.
//!
//! `cargo bench -p ioasid-run --bench round_trip`. The program measures a plain refused ioctl by itself, then starts
//! itself as a client under the transport and measures there.

use std::error::Error;
use std::fs::File;
use std::hint::black_box;
use std::os::fd::{AsRawFd, RawFd};

use criterion::Criterion;
use ioasid_run::{Options, run};
use ioasid_server::{Server, ServerOptions};

/// A number that no interface uses, refused before any argument is looked at.
const UNKNOWN: u32 = 0x3bfe;
/// IOAS_ALLOC; with a structure that is too short it is refused after its size has been read.
const IOAS_ALLOC: u32 = 0x3b81;
/// A terminal's command, which does not trap.
const TCGETS: u32 = 0x5401;

fn main() -> Result<(), Box<dyn Error>> {
    let is_client = std::env::var_os("IOASID_BENCH_CLIENT").is_some();
    let mut criterion = Criterion::default().configure_from_args();
    if is_client {
        measure_client(&mut criterion)?;
    } else {
        measure_alone(&mut criterion)?;
        let own = std::env::current_exe()?.into_os_string();
        let arguments = ["IOASID_BENCH_CLIENT=1".into(), own].into_iter().chain(std::env::args_os().skip(1));
        let server = Server::new(ServerOptions::default())?;
        let outcome = run("env", arguments, &Options::default(), server)?;
        if !outcome.status.success() {
            return Err(format!("the client ended with {}", outcome.status).into());
        }
    }
    criterion.final_summary();
    Ok(())
}

/// An ioctl whose result does not matter.
fn ioctl(fd: RawFd, command: u32, argument: u64) -> i32 {
    // SAFETY: the commands below are refused, or read the structure that the caller passes.
    unsafe { libc::ioctl(fd, command.into(), argument) }
}

fn measure_alone(criterion: &mut Criterion) -> Result<(), Box<dyn Error>> {
    let null = File::open("/dev/null")?;
    criterion.bench_function("alone: refused ioctl", |bencher| {
        bencher.iter(|| black_box(ioctl(null.as_raw_fd(), UNKNOWN, 0)));
    });
    criterion.bench_function("alone: open and close /dev/null", |bencher| {
        bencher.iter(|| File::open("/dev/null").is_ok());
    });
    Ok(())
}

fn measure_client(criterion: &mut Criterion) -> Result<(), Box<dyn Error>> {
    let null = File::open("/dev/null")?;
    let iommu = File::options().read(true).write(true).open("/dev/iommu")?;
    let short = [4u32, 0, 0];
    let short = (&raw const short).addr() as u64;
    criterion.bench_function("client: ioctl that does not trap", |bencher| {
        bencher.iter(|| black_box(ioctl(null.as_raw_fd(), TCGETS, 0)));
    });
    criterion.bench_function("client: refused ioctl", |bencher| {
        bencher.iter(|| black_box(ioctl(iommu.as_raw_fd(), UNKNOWN, 0)));
    });
    criterion.bench_function("client: ioctl refused by its argument", |bencher| {
        bencher.iter(|| black_box(ioctl(iommu.as_raw_fd(), IOAS_ALLOC, short)));
    });
    criterion.bench_function("client: trapped ioctl of another file", |bencher| {
        bencher.iter(|| black_box(ioctl(null.as_raw_fd(), UNKNOWN, 0)));
    });
    criterion.bench_function("client: open and close /dev/null", |bencher| {
        bencher.iter(|| File::open("/dev/null").is_ok());
    });
    criterion.bench_function("client: open and close /dev/iommu", |bencher| {
        bencher.iter(|| File::open("/dev/iommu").is_ok());
    });
    Ok(())
}
