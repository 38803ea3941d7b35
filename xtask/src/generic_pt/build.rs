//! Builds the programs of `peers/generic_pt` from the kernel's source, unless they are there and younger than all that
//! they are made from.

use std::{
    fs,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    time::SystemTime,
};

use anyhow::{Context, Result};

use crate::{command, kernel_source::Kernel, workspace};

/// The compiler for all files. Debian's kernels are built with GCC 14, which Debian 12 does not have, and its GCC 12
/// makes this code slower than it is in a distribution's kernel; clang 19 does not, and both releases have it.
const COMPILER: &str = "clang-19";

/// What to build, with flags like whose.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum Flavour {
    /// gpbench-kernel: the kernel's own build
    Kernel,
    /// gpbench-user: an ordinary program
    User,
    /// gpdrive: an ordinary program, with the kernel's assertions
    Check,
}

impl Flavour {
    /// Its name in build.sh.
    fn name(self) -> &'static str {
        match self {
            Flavour::Kernel => "kernel",
            Flavour::User => "user",
            Flavour::Check => "check",
        }
    }

    /// The program that it yields.
    fn program(self) -> &'static str {
        match self {
            Flavour::Kernel => "gpbench-kernel",
            Flavour::User => "gpbench-user",
            Flavour::Check => "gpdrive",
        }
    }
}

/// Builds what is not up to date, and returns the programs in the flavours' order.
pub(crate) fn programs(kernel: &Kernel, flavours: &[Flavour]) -> Result<Vec<PathBuf>> {
    let sources = workspace::root().join("peers/generic_pt");
    let output = kernel.build_directory().join("generic_pt");
    let prepared = output.join("kbuild/prepared");
    if prepared.exists() && changed(&prepared) < changed(&kernel.version_file()) {
        // Of another kernel.
        fs::remove_dir_all(&output).with_context(|| format!("cannot remove {}", output.display()))?;
    }
    let newest = newest_of(&sources)?.max(changed(&kernel.version_file()));
    let mut programs = Vec::new();
    for &flavour in flavours {
        let program = output.join(flavour.program());
        if changed(&program) <= newest {
            eprintln!("building {} from the source of Linux {} ...", flavour.program(), kernel.version());
            let jobs = std::thread::available_parallelism().map_or(1, usize::from);
            let mut build = Command::new("sh");
            build.arg(sources.join("build.sh")).arg(kernel.source("")).arg(&output);
            build.env("FLAVOUR", flavour.name()).env("CC", COMPILER).env("KCC", COMPILER);
            // It prints the program's path; what goes wrong is on its standard error.
            command::run(build.env("JOBS", jobs.to_string()).stdout(Stdio::null()))?;
        }
        programs.push(program);
    }
    Ok(programs)
}

fn changed(path: &Path) -> Option<SystemTime> {
    fs::metadata(path).ok()?.modified().ok()
}

/// When the last of a directory's files was changed.
fn newest_of(directory: &Path) -> Result<Option<SystemTime>> {
    let files = fs::read_dir(directory).with_context(|| format!("cannot read {}", directory.display()))?;
    Ok(files.filter_map(|file| changed(&file.ok()?.path())).max())
}
