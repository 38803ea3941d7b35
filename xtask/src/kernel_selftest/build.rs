//! Builds the self-test with the C compiler alone: it is one source file, and the kernel's build system would ask for
//! more of the machine.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
    time::SystemTime,
};

use anyhow::{Context, Result};

use crate::{command, kernel_source::Kernel};

/// The built self-test; built now unless it is younger than its source.
pub(crate) fn self_test(kernel: &Kernel) -> Result<PathBuf> {
    let directory = kernel.build_directory();
    let program = directory.join("iommufd");
    if changed(&program).is_some_and(|built| Some(built) > unpacked(kernel)) {
        return Ok(program);
    }
    fs::create_dir_all(&directory).with_context(|| format!("cannot create {}", directory.display()))?;
    eprintln!("building the self-test of Linux {} ...", kernel.version());
    let mut compiler = Command::new("gcc");
    // From the source's own directory, so that failed expectations name the file alone.
    compiler.current_dir(kernel.source("tools/testing/selftests/iommu"));
    compiler.args(["-O2", "-Wno-unused-function", "-D_GNU_SOURCE="]);
    // The kernel's headers come first, also before those that the machine has of an older kernel.
    for headers in kernel.header_directories() {
        compiler.arg("-isystem").arg(headers);
    }
    compiler.arg("-I").arg(kernel.source("tools/testing/selftests"));
    compiler.arg("-o").arg(&program).args(["iommufd.c", "-lcap", "-lpthread"]);
    command::run(&mut compiler)?;
    Ok(program)
}

fn changed(path: &Path) -> Option<SystemTime> {
    fs::metadata(path).ok()?.modified().ok()
}

/// When the kernel was unpacked. The files inside have the times that the archive gives them, which say nothing.
fn unpacked(kernel: &Kernel) -> Option<SystemTime> {
    changed(&kernel.version_file())
}
