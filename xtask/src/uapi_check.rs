//! Runs the comparison of `ioasid-uapi` with the kernel's headers, which is a test of that crate
//! (`crates/uapi/tests/kernel_headers`), on headers that it fetches.

use anyhow::Result;

use crate::{command, kernel_source, workspace};

#[derive(Debug, clap::Args)]
pub(crate) struct Arguments {
    #[command(flatten)]
    kernel: kernel_source::Arguments,
}

/// Fetches the headers if they are not there, and compares.
pub(crate) fn run(arguments: &Arguments) -> Result<()> {
    let kernel = kernel_source::fetch(&arguments.kernel, kernel_source::COMPILING)?;
    let mut directories = kernel.header_directories();
    directories.push(kernel.source("drivers/iommu/iommufd"));
    command::run(
        workspace::cargo()
            .args(["test", "--quiet", "--package", "ioasid-uapi", "--test", "kernel_headers"])
            .env("IOASID_KERNEL_HEADERS", std::env::join_paths(directories)?),
    )
}
