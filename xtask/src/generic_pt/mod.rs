//! Our page tables against the kernel's own code: the same operations on both, and then the same question as ever, what
//! differs?
//!
//! ```text
//! kernel_source ─► build (peers/generic_pt) ─► gpdrive ◄── peer ◄─┐
//!                                                                 ├─ comparison ─► work ─► report
//!                     operations ─► tables ─► ioasid-pagetable ◄──┘   entries      minimise
//!                                                                    answers
//! ```
//!
//! `peers/generic_pt` builds Linux' drivers/iommu/generic_pt as an ordinary program. That is the kernel's code, under
//! the kernel's licence, so it stays a program of its own: the comparison talks to it over pipes.

mod answers;
mod build;
mod comparison;
mod entries;
mod minimise;
mod operations;
mod peer;
mod report;
mod tables;
mod work;

use std::path::PathBuf;

use anyhow::{Context, Result, bail};

use self::{build::Flavour, peer::Peer, tables::Table, work::Work};
use crate::kernel_source;

#[derive(Debug, clap::Args)]
pub(crate) struct Arguments {
    #[command(flatten)]
    kernel: kernel_source::Arguments,

    /// Build the programs of peers/generic_pt, print where they are, and compare nothing
    #[arg(long)]
    build: bool,

    /// What to build [default: all]
    #[arg(long, value_enum, requires = "build")]
    flavour: Vec<Flavour>,

    /// How many sequences to run, of all tables together
    #[arg(long, value_name = "NUMBER", default_value = "10000")]
    sequences: usize,

    /// Where the random numbers begin: the same seed gives the same sequences
    #[arg(long, value_name = "NUMBER", default_value = "1")]
    seed: u64,

    /// Compare only this table, as a report names it; repeatable
    #[arg(long = "table", value_name = "NAME")]
    tables: Vec<String>,

    /// Run only the sequence of this number, for each table
    #[arg(long, value_name = "NUMBER")]
    only: Option<usize>,

    /// Use this gpdrive instead of building one
    #[arg(long, value_name = "PROGRAM", conflicts_with = "build")]
    driver: Option<PathBuf>,

    /// Print the results as JSON
    #[arg(long, conflicts_with = "build")]
    json: bool,
}

/// The chore.
pub(crate) fn run(arguments: &Arguments) -> Result<()> {
    let tables = chosen(arguments)?;
    let driver = match &arguments.driver {
        Some(driver) => driver.clone(),
        None => {
            let kernel = kernel_source::fetch(&arguments.kernel, kernel_source::PREPARING)?;
            let all = [Flavour::Kernel, Flavour::User, Flavour::Check];
            let flavours = match (arguments.build, arguments.flavour.as_slice()) {
                (false, _) => &[Flavour::Check],
                (true, []) => &all[..],
                (true, some) => some,
            };
            let programs = build::programs(&kernel, flavours)?;
            if arguments.build {
                programs.iter().for_each(|program| println!("{}", program.display()));
                return Ok(());
            }
            programs.into_iter().next().context("nothing was built")?
        }
    };
    let offered = peer::formats(&mut Peer::start(&driver)?)?;
    if let Some(missing) = tables.iter().find(|table| !offered.iter().any(|name| name == table.name())) {
        bail!("{} has no {}", driver.display(), missing.name());
    }
    let numbers = match arguments.only {
        Some(number) => vec![number],
        None => (0..arguments.sequences.div_ceil(tables.len().max(1))).collect(),
    };
    let work = Work::new(arguments.seed, numbers, tables);
    let seconds = work.run(&driver)?;
    report::print(&work, seconds, arguments.json)
}

/// The tables that the arguments name.
fn chosen(arguments: &Arguments) -> Result<Vec<Box<dyn Table>>> {
    let mut tables = tables::all()?;
    for name in &arguments.tables {
        if !tables.iter().any(|table| table.name() == name) {
            let all: Vec<_> = tables.iter().map(|table| table.name()).collect();
            bail!("there is no table {name}, but there are {}", all.join(", "));
        }
    }
    if !arguments.tables.is_empty() {
        tables.retain(|table| arguments.tables.iter().any(|name| name == table.name()));
    }
    Ok(tables)
}
