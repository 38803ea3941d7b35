//! What a call costs under the transport, beside what it costs without, and beside the least that it could cost.
//!
//! `cargo bench -p ioasid-run --bench round_trip`. The program measures a plain refused ioctl by itself, then starts
//! itself as a client under the transport and measures there. At the end, or alone with `-- ratios`, comes a table of
//! kinds of calls beside the floor of any server behind seccomp user notification (`floor`, `ratios`).

mod floor;
mod ratios;

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
const IOAS_MAP: u32 = 0x3b85;
const IOAS_UNMAP: u32 = 0x3b86;
/// A terminal's command, which does not trap.
const TCGETS: u32 = 0x5401;

fn main() -> Result<(), Box<dyn Error>> {
    match std::env::var("IOASID_BENCH_ROLE").as_deref() {
        Ok("floor") => return ratios::obey(false),
        Ok("ours") => return ratios::obey(true),
        Ok("supervisor") => return ratios::supervise(),
        _ => {}
    }
    if std::env::args().any(|argument| argument == "ratios") {
        return ratios::print();
    }
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
        println!("the supervisor's share, between receiving and sending:");
        for (kind, totals) in outcome.statistics.iter() {
            let mean = totals.total.as_secs_f64() * 1e6 / totals.calls as f64;
            println!("  {kind:?}: {} calls, {mean:.2} us each", totals.calls);
        }
        if !outcome.status.success() {
            return Err(format!("the client ended with {}", outcome.status).into());
        }
        ratios::print()?;
    }
    criterion.final_summary();
    Ok(())
}

/// An ioctl whose result does not matter.
fn ioctl(fd: RawFd, command: u32, argument: u64) -> i32 {
    // SAFETY: the commands below are refused, or read the structure that the caller passes.
    unsafe { libc::ioctl(fd, command.into(), argument) }
}

/// Maps and unmaps one page, of a file and of none.
fn measure_mappings(criterion: &mut Criterion, who: &str) -> Result<(), Box<dyn Error>> {
    let own = File::open(std::env::current_exe()?)?;
    for (what, flags) in [
        ("a page of no file", libc::MAP_PRIVATE | libc::MAP_ANONYMOUS),
        ("a page of a file, as a loader does", libc::MAP_PRIVATE | libc::MAP_DENYWRITE),
        ("a page of a file", libc::MAP_PRIVATE),
    ] {
        criterion.bench_function(&format!("{who}: map and unmap {what}"), |bencher| {
            // SAFETY: a new mapping disturbs nobody, and nobody has learned of it when it goes.
            bencher.iter(|| unsafe {
                let page = libc::mmap(std::ptr::null_mut(), 4096, libc::PROT_READ, flags, own.as_raw_fd(), 0);
                assert_eq!(libc::munmap(page, 4096), 0);
            });
        });
    }
    Ok(())
}

fn measure_alone(criterion: &mut Criterion) -> Result<(), Box<dyn Error>> {
    measure_mappings(criterion, "alone")?;
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
    measure_mappings(criterion, "client with none of ours open")?;
    let null = File::open("/dev/null")?;
    let iommu = File::options().read(true).write(true).open("/dev/iommu")?;
    measure_mappings(criterion, "client")?;
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
    let mut alloc = [12u32, 0, 0];
    if ioctl(iommu.as_raw_fd(), IOAS_ALLOC, (&raw mut alloc).addr() as u64) != 0 {
        return Err("no address space".into());
    }
    let memory = vec![0u8; 8192];
    let page = (memory.as_ptr().addr() as u64).next_multiple_of(4096);
    // Size and flags (fixed, writable, readable), space, address, length, IOVA.
    let map = [40 | 7 << 32, alloc[2].into(), page, 4096, 0x10_0000u64];
    let map_address = (&raw const map).addr() as u64;
    let unmap = [24 | u64::from(alloc[2]) << 32, 0x10_0000, 4096];
    criterion.bench_function("client: map and unmap 4 KiB, no device", |bencher| {
        bencher.iter(|| {
            let mapped = ioctl(iommu.as_raw_fd(), IOAS_MAP, map_address);
            // What was unmapped is written back, so each time it is asked for anew.
            let mut command = unmap;
            let unmapped = ioctl(iommu.as_raw_fd(), IOAS_UNMAP, (&raw mut command).addr() as u64);
            assert_eq!((mapped, unmapped), (0, 0));
        });
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
