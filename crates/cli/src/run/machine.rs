//! The machine that a program is run on, as options of the command line.

use clap::Args;
use ioasid_server::{DeviceOptions, Limits, OptionsError, ServerOptions, TableKind};

use crate::quantity::Bytes;

/// What the machine has.
#[derive(Debug, Args)]
pub(crate) struct Machine {
    /// A software device; the first is vfio0, the next vfio1, and so on [default: edu, and edu:table=vtd]
    ///
    /// SPEC is a model with settings, as in edu:table=vtd,dma-mask=40. The model is edu, after QEMU's device of that name.
    /// Settings: table=KIND is the page table that the device's IOMMU walks: native (default), vtd, amdv1, x86-64, riscv, or
    /// with other levels vtd39, vtd57, x86-64-la57, sv39, sv57; dma-mask=BITS (12 to 64, default 28) is how many address bits the device drives;
    /// pasids=BITS (0 to 20, default 20) how many bits its PASIDs have, of which its register 0xa0 chooses one.
    #[arg(long = "device", value_name = "SPEC")]
    pub(super) devices: Vec<DeviceOptions>,

    /// How much memory the page tables of all devices together may take [default: a quarter of the machine's]
    ///
    /// A map or attach that would need more gets ENOMEM. A mapping takes a 512th of its size where no large page fits.
    #[arg(long, value_name = "BYTES")]
    table_memory: Option<Bytes>,

    /// How much the programs may make the server hold: NAME=PER_CLIENT or NAME=PER_CLIENT:TOTAL, with commas between
    ///
    /// NAME is files (open files; beyond: EMFILE, ENFILE), objects (address spaces, page tables, devices; ENOMEM) or areas
    /// (mappings; ENOMEM). A client is one process. Defaults: files=1024:8192,objects=16384:65536,areas=1048576:4194304. The server's
    /// memory is at most 4 KiB for each file and object and 1 KiB for each area, and --table-memory.
    #[arg(long = "limit", value_name = "LIMITS", default_value = "", hide_default_value = true, value_parser = limits)]
    limits: Limits,
}

impl Machine {
    /// Sets the limits of this process and returns what the server needs to know.
    pub(crate) fn prepare(self, test_devices: bool) -> ServerOptions {
        let table_memory = self.table_memory.map_or_else(quarter_of_memory, |bytes| bytes.0);
        ioasid::pagetable::HeapTables::set_limit(table_memory);
        let devices = match self.devices {
            none if none.is_empty() && test_devices => ServerOptions::default().devices,
            none if none.is_empty() => default_devices(),
            devices => devices,
        };
        ServerOptions { devices, limits: self.limits, test_devices }
    }
}

/// What is said when it cannot be made.
pub(crate) const CANNOT_BE_MADE: &str = "the machine cannot be made; ask for other devices (--device)";

/// The limits that a text asks for; none asks for the defaults.
fn limits(text: &str) -> Result<Limits, OptionsError> {
    if text.is_empty() { Ok(Limits::default()) } else { text.parse() }
}

/// A quarter of the machine's memory, in bytes.
fn quarter_of_memory() -> u64 {
    let machine = rustix::system::sysinfo();
    (machine.totalram as u64).saturating_mul(machine.mem_unit.into()) / 4
}

/// A device on the space's own table and one on a table of another format, so that a space can have both.
pub(super) fn default_devices() -> Vec<DeviceOptions> {
    let native = DeviceOptions::default();
    let vtd = DeviceOptions { table: TableKind::VtdSecondStage, ..native.clone() };
    vec![native, vtd]
}
