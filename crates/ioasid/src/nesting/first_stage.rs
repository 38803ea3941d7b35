//! The formats in which guests write tables.

use ioasid_pagetable::{Attributes, ForeignFault, ForeignMemory, Leaf, RiscV, X86_64, walk_foreign};
use std::fmt;

/// The format of a first stage: of a table that a guest writes, in memory of a space.
///
/// ```
/// use ioasid::FirstStage;
///
/// assert_eq!(FirstStage::X86_64.to_string(), "x86-64");
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum FirstStage {
    /// `x86-64`: that of processors with four levels, which is VT-d's first stage and AMD's guest tables.
    X86_64,
    /// `x86-64-la57`: the same with five levels.
    X86_64La57,
    /// `sv39`: RISC-V with three levels.
    Sv39,
    /// `sv48`: RISC-V with four levels.
    Sv48,
    /// `sv57`: RISC-V with five levels.
    Sv57,
}

impl FirstStage {
    /// Its name.
    pub const fn name(self) -> &'static str {
        match self {
            FirstStage::X86_64 => "x86-64",
            FirstStage::X86_64La57 => "x86-64-la57",
            FirstStage::Sv39 => "sv39",
            FirstStage::Sv48 => "sv48",
            FirstStage::Sv57 => "sv57",
        }
    }

    /// Translates an address by the table at `root`, and marks what it used, as hardware does. See [`walk_foreign`].
    pub(super) fn walk<M: ForeignMemory>(
        self,
        root: u64,
        iova: u64,
        access: Attributes,
        memory: &mut M,
    ) -> Result<Leaf, ForeignFault<M::Error>> {
        let x86 = |levels| X86_64::new(levels).map(|format| format.with_execute_disable(true));
        let risc_v = |levels| RiscV::new(levels).map(|format| format.with_accessed_dirty(true));
        let walked = match self {
            FirstStage::X86_64 => x86(4).map(|format| walk_foreign(&format, root, iova, access, memory)),
            FirstStage::X86_64La57 => x86(5).map(|format| walk_foreign(&format, root, iova, access, memory)),
            FirstStage::Sv39 => risc_v(3).map(|format| walk_foreign(&format, root, iova, access, memory)),
            FirstStage::Sv48 => risc_v(4).map(|format| walk_foreign(&format, root, iova, access, memory)),
            FirstStage::Sv57 => risc_v(5).map(|format| walk_foreign(&format, root, iova, access, memory)),
        };
        // There are formats of these levels.
        walked.unwrap_or(Err(ForeignFault::OutOfRange))
    }
}

impl fmt::Display for FirstStage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}
