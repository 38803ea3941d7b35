//! The kinds of table that a device can walk: the space's own, or one in a format that hardware has.
//!
//! A kind is a name. What goes with it stands here and nowhere else: the class by which the engine tells which devices
//! can share a table, the addresses that such a table translates and those that must stay free, how an empty one is made,
//! and of which type it then is. The last is all that the way of a DMA asks for ([`with_derived`]): each format is walked by
//! code of its own.
//!
//! Tables that sign-extend translate two halves of the 64 bits and nothing in between. Devices behind them get the lower
//! half here, as they do from Linux.

use ioasid::pagetable::{AmdV1, Format, Radix, RiscV, VtdSecondStage, X86_64};
use ioasid::{DerivedTable, FirstStage, IovaRange, PageSize, RadixTable, Table, TableClass};
use std::fmt;
use std::str::FromStr;
use std::sync::Arc;

/// x86 takes writes to these addresses for interrupts, so nothing may be mapped there (VT-d specification 3.14).
const INTERRUPT_WINDOW: (u64, u64) = (0xfee0_0000, 0xfeef_ffff);

/// Of tables of a kind, those whose leaves do not care about caches, and those whose leaves have all accesses snoop.
const PLAIN: u64 = 0;
const SNOOPING: u64 = 1;

/// The classes of table that a kind of device walks.
pub(super) struct Kinds {
    pub(super) class: TableClass,
    /// That through which all accesses snoop, if there is one.
    pub(super) snooping_class: Option<TableClass>,
}

/// Makes tables of any format.
struct Maker {
    snooping: bool,
}

impl Maker {
    fn make(&self, format: impl Format) -> Option<Arc<dyn DerivedTable>> {
        let table = if self.snooping { RadixTable::snooping(format)? } else { RadixTable::new(format) };
        Some(Arc::new(table))
    }
}

/// The kind of table that a device walks.
///
/// Each has a name, as which it is shown and read.
///
/// ```
/// use ioasid_soft::iommu::TableKind;
///
/// assert_eq!("amdv1".parse(), Ok(TableKind::AmdV1));
/// assert_eq!(TableKind::VtdSecondStage.to_string(), "vtd");
/// // The usual one of RISC-V.
/// assert_eq!("riscv".parse(), Ok(TableKind::Sv48));
/// assert!("arm".parse::<TableKind>().unwrap_err().to_string().contains("amdv1"));
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Default)]
pub enum TableKind {
    /// `native`: the space's own table; 64 bits of IOVA.
    #[default]
    Native,
    /// `vtd39`: Intel VT-d's second stage with 3 levels; 39 bits of IOVA.
    VtdSecondStage39,
    /// `vtd`: Intel VT-d's second stage with the usual 4 levels; 48 bits of IOVA.
    VtdSecondStage,
    /// `vtd57`: Intel VT-d's second stage with 5 levels; 57 bits of IOVA.
    VtdSecondStage57,
    /// `amdv1`: AMD's host tables, with leaves of every power of two and a top that grows; 64 bits of IOVA.
    AmdV1,
    /// `x86-64`: the paging of processors, which is VT-d's first stage and AMD's guest tables; the lower half of 48 bits
    /// of IOVA.
    X86_64,
    /// `x86-64-la57`: the same with 5 levels; the lower half of 57 bits of IOVA.
    X86_64La57,
    /// `sv39`: RISC-V with 3 levels and leaves of 64 KiB; the lower half of 39 bits of IOVA.
    Sv39,
    /// `sv48`, or `riscv`: RISC-V with 4 levels and leaves of 64 KiB; the lower half of 48 bits of IOVA.
    Sv48,
    /// `sv57`: RISC-V with 5 levels and leaves of 64 KiB; the lower half of 57 bits of IOVA.
    Sv57,
}

/// There is no kind of table of this name.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("no kind of table is called {name:?}; there are {}", TableKind::names())]
pub struct UnknownTableKind {
    /// The name that was asked for.
    pub name: String,
}

impl TableKind {
    /// All of them.
    pub const ALL: [TableKind; 10] = [
        TableKind::Native,
        TableKind::VtdSecondStage39,
        TableKind::VtdSecondStage,
        TableKind::VtdSecondStage57,
        TableKind::AmdV1,
        TableKind::X86_64,
        TableKind::X86_64La57,
        TableKind::Sv39,
        TableKind::Sv48,
        TableKind::Sv57,
    ];

    /// Its name.
    pub const fn name(self) -> &'static str {
        match self {
            TableKind::Native => "native",
            TableKind::VtdSecondStage39 => "vtd39",
            TableKind::VtdSecondStage => "vtd",
            TableKind::VtdSecondStage57 => "vtd57",
            TableKind::AmdV1 => "amdv1",
            TableKind::X86_64 => "x86-64",
            TableKind::X86_64La57 => "x86-64-la57",
            TableKind::Sv39 => "sv39",
            TableKind::Sv48 => "sv48",
            TableKind::Sv57 => "sv57",
        }
    }

    fn names() -> String {
        TableKind::ALL.map(TableKind::name).join(", ")
    }

    /// Which devices of an IOMMU can share a table: those of the same kind, if they want the same of it.
    ///
    /// Leaves of VT-d's second stage and of AMD's tables can have accesses snoop; those of the others cannot, and of what else
    /// an IOMMU has for it nothing is modelled. Devices that walk a native table have their bytes copied by a CPU, so that
    /// they find what its caches hold in any case.
    pub(super) fn classes(self, iommu: u64) -> Kinds {
        let of_variant = |variant| TableClass::Derived { iommu, format: self.name(), variant };
        match self {
            TableKind::Native => {
                Kinds { class: TableClass::NATIVE, snooping_class: Some(TableClass::NATIVE) }
            }
            _ => {
                let snooping_class = self.can_snoop().then(|| of_variant(SNOOPING));
                Kinds { class: of_variant(PLAIN), snooping_class }
            }
        }
    }

    fn can_snoop(self) -> bool {
        match self {
            TableKind::VtdSecondStage39
            | TableKind::VtdSecondStage
            | TableKind::VtdSecondStage57
            | TableKind::AmdV1 => true,
            TableKind::Native
            | TableKind::X86_64
            | TableKind::X86_64La57
            | TableKind::Sv39
            | TableKind::Sv48
            | TableKind::Sv57 => false,
        }
    }

    /// The addresses that it translates.
    pub(super) fn aperture(self) -> Option<IovaRange> {
        let bits = match self {
            TableKind::Native | TableKind::AmdV1 => 64,
            TableKind::VtdSecondStage39 => 39,
            TableKind::VtdSecondStage => 48,
            TableKind::VtdSecondStage57 => 57,
            TableKind::Sv39 => 38,
            TableKind::X86_64 | TableKind::Sv48 => 47,
            TableKind::X86_64La57 | TableKind::Sv57 => 56,
        };
        IovaRange::new(0, u64::MAX >> (64 - bits))
    }

    /// The addresses at which its devices can have no mapping.
    pub(super) fn reserved(self) -> Vec<IovaRange> {
        match self {
            TableKind::Sv39 | TableKind::Sv48 | TableKind::Sv57 => Vec::new(),
            _ => IovaRange::new(INTERRUPT_WINDOW.0, INTERRUPT_WINDOW.1).into_iter().collect(),
        }
    }

    /// Whether its leaves have a mark for what was written: all but those of the native kind.
    pub(super) fn records_writes(self) -> bool {
        self != TableKind::Native
    }

    /// The formats of tables that guests may write for its devices. What hardware of the kind walks as a first stage; the native
    /// kind, which no hardware has, walks all.
    pub(super) fn first_stages(self) -> &'static [FirstStage] {
        match self {
            TableKind::Native => &[
                FirstStage::X86_64,
                FirstStage::X86_64La57,
                FirstStage::Sv39,
                FirstStage::Sv48,
                FirstStage::Sv57,
            ],
            TableKind::VtdSecondStage39
            | TableKind::VtdSecondStage
            | TableKind::VtdSecondStage57
            | TableKind::AmdV1 => &[FirstStage::X86_64, FirstStage::X86_64La57],
            TableKind::Sv39 => &[FirstStage::Sv39],
            TableKind::Sv48 => &[FirstStage::Sv39, FirstStage::Sv48],
            TableKind::Sv57 => &[FirstStage::Sv39, FirstStage::Sv48, FirstStage::Sv57],
            // These are first stages themselves.
            TableKind::X86_64 | TableKind::X86_64La57 => &[],
        }
    }

    /// An empty table of a derived kind, in which no leaf that cannot be cut while devices use it is larger than
    /// `largest_leaf`, and with `snooping` each has accesses snoop; `None` if there is no such table.
    pub(super) fn new_table(self, largest_leaf: PageSize, snooping: bool) -> Option<Arc<dyn DerivedTable>> {
        let table = Maker { snooping };
        // Of RISC-V's leaves only those of 64 KiB, which have several entries, cannot be cut.
        let risc_v = |levels| {
            let format = RiscV::new(levels)?.with_accessed_dirty(true);
            Some(format.with_napot(largest_leaf.log2() >= 16))
        };
        let vtd = |levels| VtdSecondStage::new(levels).map(|format| format.with_accessed_dirty(true));
        match self {
            TableKind::Native => None,
            TableKind::VtdSecondStage39 => table.make(vtd(3)?),
            TableKind::VtdSecondStage => table.make(vtd(4)?),
            TableKind::VtdSecondStage57 => table.make(vtd(5)?),
            TableKind::AmdV1 => {
                let sizes = largest_leaf.bytes() | (largest_leaf.bytes() - 1);
                table.make(AmdV1::new().with_leaf_sizes(sizes).with_accessed_dirty(true))
            }
            TableKind::X86_64 => table.make(X86_64::new(4)?),
            TableKind::X86_64La57 => table.make(X86_64::new(5)?),
            TableKind::Sv39 => table.make(risc_v(3)?),
            TableKind::Sv48 => table.make(risc_v(4)?),
            TableKind::Sv57 => table.make(risc_v(5)?),
        }
    }
}

/// The derived table of a kind, as what it is, in an expression; `None` for the native kind.
macro_rules! with_derived {
    ($kind:expr, $table:expr, $radix:ident => $expression:expr) => {{
        use ioasid::pagetable::{AmdV1, RiscV, VtdSecondStage, X86_64};
        use $crate::iommu::kind::{TableKind, radix};
        match $kind {
            TableKind::Native => None,
            TableKind::VtdSecondStage39 | TableKind::VtdSecondStage | TableKind::VtdSecondStage57 => {
                radix::<VtdSecondStage>($table).map(|$radix| $expression)
            }
            TableKind::AmdV1 => radix::<AmdV1>($table).map(|$radix| $expression),
            TableKind::X86_64 | TableKind::X86_64La57 => radix::<X86_64>($table).map(|$radix| $expression),
            TableKind::Sv39 | TableKind::Sv48 | TableKind::Sv57 => {
                radix::<RiscV>($table).map(|$radix| $expression)
            }
        }
    }};
}
pub(super) use with_derived;

#[inline(always)]
pub(super) fn radix<F: Format>(table: &Table) -> Option<&Radix<F>> {
    let derived = table.derived()?.as_any().downcast_ref::<RadixTable<F>>()?;
    Some(derived.radix())
}

impl fmt::Display for TableKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

impl FromStr for TableKind {
    type Err = UnknownTableKind;

    fn from_str(name: &str) -> Result<TableKind, UnknownTableKind> {
        let name = if name == "riscv" { "sv48" } else { name };
        let kind = TableKind::ALL.into_iter().find(|kind| kind.name() == name);
        kind.ok_or_else(|| UnknownTableKind { name: name.to_owned() })
    }
}
