//! The tables that both sides have, by the names of `gpdrive`, with our formats configured as the kernel's are.

use anyhow::{Context, Result};
use ioasid_pagetable::{AmdV1, Attributes, Format, RiscV, VtdSecondStage, X86_64};

use super::{
    comparison::{self, Counts, Dialect, Difference},
    operations::{Facts, Operation, Random},
    peer::Peer,
};

/// A table of some format.
pub(crate) trait Table: Send + Sync {
    /// Its name on the kernel's side.
    fn name(&self) -> &'static str;

    fn facts(&self) -> Facts;

    /// Runs the operations on both sides.
    fn compare(
        &self,
        operations: &[Operation],
        random: Random,
        peer: &mut Peer,
    ) -> Result<Counts, Difference>;
}

struct Of<F> {
    name: &'static str,
    format: F,
    dialect: Dialect,
}

impl<F: Format> Table for Of<F> {
    fn name(&self) -> &'static str {
        self.name
    }

    fn facts(&self) -> Facts {
        Facts::of(&self.format, self.dialect.dirty)
    }

    fn compare(
        &self,
        operations: &[Operation],
        random: Random,
        peer: &mut Peer,
    ) -> Result<Counts, Difference> {
        comparison::compare(&self.format, self.dialect, self.name, operations, random, peer)
    }
}

fn table<F: Format>(name: &'static str, format: Option<F>, dialect: Dialect) -> Result<Box<dyn Table>> {
    let format = format.with_context(|| format!("{name} is no format of ours"))?;
    Ok(Box::new(Of { name, format, dialect }))
}

/// All of them.
pub(crate) fn all() -> Result<Vec<Box<dyn Table>>> {
    let dirty = Dialect { always: Attributes::empty(), executes: false, dirty: true };
    let dirty_snooped = Dialect { always: Attributes::FORCE_SNOOP, ..dirty };
    let plain = Dialect { dirty: false, ..dirty };
    let executable = Dialect { executes: true, ..plain };
    // The kernel offers no leaf of half of all addresses or more, except where that is more than a leaf can be.
    let amd = |levels, largest: u32| AmdV1::new().with_leaf_sizes((2 << largest) - 1).with_top_levels(levels);
    let mock = || AmdV1::new().with_granule_2k().with_leaf_sizes((2 << 36) - 1).with_top_levels(3..=3);
    Ok(vec![
        table("vtdss_3", VtdSecondStage::new(3), dirty)?,
        table("vtdss_4", VtdSecondStage::new(4), dirty)?,
        table("vtdss_4_snoop", VtdSecondStage::new(4), dirty_snooped)?,
        table("vtdss_5", VtdSecondStage::new(5), dirty)?,
        table("x86_64_4", X86_64::new(4), plain)?,
        table("x86_64_5", X86_64::new(5), plain)?,
        table("amdv1_4", amd(4..=4, 46), dirty_snooped)?,
        table("amdv1_dynamic", amd(3..=6, 51), dirty_snooped)?,
        table("amdv1_mock", mock(), dirty)?,
        table("riscv64_sv39", RiscV::new(3), executable)?,
        table("riscv64_sv48", RiscV::new(4), executable)?,
        table("riscv64_sv57", RiscV::new(5), executable)?,
    ])
}
