//! The developers' chores, as one command: `cargo xtask CHORE`.
//!
//! What `cargo build` and `cargo test` cannot do alone is here: fetching a kernel's sources and headers, comparing our
//! layouts with them, running the kernel's own test program against us, checking the dependencies' Rust versions. Each
//! chore is one module with a `run`; the continuous integration calls the same chores that people do.
//!
//! Chores write below the build directory only. What they tell on the way goes to standard error, results to standard
//! output, and the exit status is 0 only if everything held.

#![forbid(unsafe_code)]

mod bench;
mod command;
mod generic_pt;
mod kernel_selftest;
mod kernel_source;
mod msrv;
mod rounds;
mod sequences;
mod soak;
mod uapi_check;
mod workspace;

use clap::{Parser, Subcommand};

/// Chores of the ioasid developers.
#[derive(Debug, Parser)]
#[command(name = "cargo xtask", bin_name = "cargo xtask", max_term_width = 110)]
struct Arguments {
    #[command(subcommand)]
    chore: Chore,
}

#[derive(Debug, Subcommand)]
enum Chore {
    /// Fetch a Linux kernel's headers and the parts of its source that other chores need
    ///
    /// Takes the newest linux-source-X.Y and the linux-libc-dev of the same version from a suite of Debian, by the
    /// mirror that this machine's apt uses, and unpacks them below the build directory. Does nothing if they are there
    /// already. No root needed, apart from --install.
    KernelSource(kernel_source::Arguments),

    /// Compare ioasid-uapi with the kernel's headers: every size, offset, number and flag
    UapiCheck(uapi_check::Arguments),

    /// Check that no dependency needs a newer Rust than this workspace says it needs
    Msrv,

    /// Run the kernel's own iommufd self-test under `ioasid run`
    ///
    /// Builds tools/testing/selftests/iommu/iommufd.c, runs each instance (a test of a fixture's variant) by itself,
    /// prints the results, and compares them with docs/conformance.md. The exit status is 0 only if every instance
    /// ended as that list says: an instance that is not listed has to pass, one that is listed must not.
    KernelSelftest(kernel_selftest::Arguments),

    /// Run benchmarks whose results are judged: against other programs, and against goals
    Bench(bench::Arguments),

    /// Compare our page tables with the kernel's own code
    ///
    /// Builds Linux' drivers/iommu/generic_pt as an ordinary program (peers/generic_pt), runs random sequences of
    /// operations on its tables and on ours, and compares results, translations and, where nothing was cut, the entries
    /// bit for bit. The exit status is 0 only if nothing differs.
    GenericPt(generic_pt::Arguments),

    /// Run sequences of calls of the engine against its model, for minutes or hours
    ///
    /// Spaces, derived tables of every format, accounts, memory, devices and snapshots, drawn at random: whole calls, each
    /// failure point in turn, devices that come and go, several threads. Every round has a new seed; a sequence that fails is
    /// shrunk and printed, with what brings it back.
    Sequences(sequences::Arguments),

    /// Replay traces of real drivers while everything else happens beside them, for minutes or hours
    ///
    /// Each round replays one trace, on tables, in a mode and with threads drawn at random, while further devices on tables of
    /// other formats come and go, parts are cut out of mappings, and memory is revoked and dropped. Every byte of every DMA is
    /// checked, DMA to what is gone has to fault, and at the end everything counts to zero.
    Soak(soak::Arguments),
}

fn main() -> anyhow::Result<()> {
    match Arguments::parse().chore {
        Chore::KernelSource(arguments) => kernel_source::run(&arguments),
        Chore::UapiCheck(arguments) => uapi_check::run(&arguments),
        Chore::Msrv => msrv::run(),
        Chore::KernelSelftest(arguments) => kernel_selftest::run(&arguments),
        Chore::Bench(arguments) => bench::run(&arguments),
        Chore::GenericPt(arguments) => generic_pt::run(&arguments),
        Chore::Sequences(arguments) => sequences::run(&arguments),
        Chore::Soak(arguments) => soak::run(&arguments),
    }
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    #[test]
    fn the_command_line_is_consistent() {
        super::Arguments::command().debug_assert();
    }
}
