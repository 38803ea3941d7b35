//! A snapshot for people and programs of what is mapped, attached and charged: the content of `/dev/ioasid`.
//!
//! The structures are the JSON's shape; every number's name ends in its unit. Addresses are text in hexadecimal, since
//! JSON numbers above 2^53 are read wrongly by many programs. Contexts, then each address space, are looked at one after the other,
//! so a snapshot taken while clients work is true of each part, not of one instant.
//!
//! Clients may have more than anybody wants to read. A snapshot lists so many things and says how many it left out; what one context
//! leaves of its share is the others', so that a client with many objects hides its own and nobody else's.

use serde::Serialize;

/// Everything the server holds at one moment.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct Status {
    /// The opens of `/dev/iommu` that live.
    pub contexts: Vec<ContextStatus>,
    /// Who is charged for registered memory.
    pub accounts: Vec<AccountStatus>,
    /// How many contexts, address spaces, page tables, devices and accounts are not listed, because there are too many. Of areas
    /// each address space says it.
    pub not_listed: usize,
}

/// One open of `/dev/iommu`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct ContextStatus {
    /// Counts the opens from 1.
    pub number: u64,
    /// Its I/O address spaces.
    pub address_spaces: Vec<AddressSpaceStatus>,
    /// The devices that are bound to it.
    pub devices: Vec<DeviceStatus>,
}

/// One I/O address space (IOAS).
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct AddressSpaceStatus {
    /// Its object number.
    pub id: u32,
    /// How many areas are mapped; the first of them are in `areas`.
    pub area_count: usize,
    /// Bytes that the areas cover together.
    pub mapped_bytes: u128,
    /// Areas in order of IOVA, at most [`AddressSpaceStatus::AREAS_SHOWN`], and fewer if very much is to be listed.
    pub areas: Vec<AreaStatus>,
    /// The leaves of the address space's own table, by size.
    pub leaves: Vec<LeafStatus>,
    /// Bytes of the pages of the address space's own table.
    pub native_table_bytes: u64,
    /// Bytes of the pages of tables in other formats, as far as they are known.
    pub derived_table_bytes: u64,
    /// Its page tables (HWPT), by object number.
    pub tables: Vec<TableStatus>,
}

impl AddressSpaceStatus {
    /// How many areas of one address space are listed.
    pub const AREAS_SHOWN: usize = 64;
}

/// One area: what one call mapped.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct AreaStatus {
    /// First IOVA.
    pub first: String,
    /// Last IOVA.
    pub last: String,
    /// `r`, `w` or `rw`: what devices may do.
    pub permissions: &'static str,
    /// Where the memory comes from.
    pub source: String,
    /// The address in the process, or the offset in the file, of the first byte.
    pub source_offset: String,
    /// Whether its memory is registered: charged, and reachable by devices.
    pub registered: bool,
}

/// Leaves of one size.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct LeafStatus {
    /// Size of each in bytes.
    pub size_bytes: u64,
    /// How many.
    pub count: u64,
}

/// One page table object (HWPT).
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct TableStatus {
    /// Its object number.
    pub id: u32,
    /// Made by attaching a device, and gone with the last one; otherwise by HWPT_ALLOC.
    pub automatic: bool,
}

/// One bound device.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct DeviceStatus {
    /// Its object number.
    pub id: u32,
    /// Its file.
    pub path: String,
    /// The object number of the page table that its requests without a PASID are attached to.
    pub attached_to: Option<u32>,
    /// How many of its PASIDs are attached.
    pub pasid_count: usize,
    /// The first of them, at most [`DeviceStatus::PASIDS_SHOWN`].
    pub pasids: Vec<PasidStatus>,
    /// How many of its DMA transfers the IOMMU refused or cut short, since the machine was made.
    pub dma_faults: u64,
    /// The latest of them.
    pub last_dma_fault: Option<String>,
}

impl DeviceStatus {
    /// How many PASIDs of a device are listed.
    pub const PASIDS_SHOWN: usize = 64;
}

/// One PASID of a device.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct PasidStatus {
    /// The PASID.
    pub pasid: u32,
    /// The object number of the page table that it is attached to.
    pub attached_to: u32,
}

/// One account.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct AccountStatus {
    /// Who pays.
    pub name: String,
    /// Pages of 4 KiB that are charged now; each page counts once, however often it is mapped.
    pub charged_pages: u64,
    /// The most that were charged at one time.
    pub peak_pages: u64,
    /// The limit, as of the latest charge; none if there is no limit.
    pub limit_pages: Option<u64>,
    /// How many charges were refused.
    pub refused: u64,
}

/// How much more may be listed.
#[derive(Debug)]
pub(crate) struct Listing {
    left: usize,
    not_listed: usize,
}

impl Listing {
    /// Room for `left` things.
    pub(crate) fn new(left: usize) -> Self {
        Self { left, not_listed: 0 }
    }

    /// Whether one more thing may be listed. Otherwise it counts as not listed.
    pub(crate) fn take_one(&mut self) -> bool {
        let listed = self.take(1) == 1;
        if !listed {
            self.leave_out();
        }
        listed
    }

    /// One thing is not listed.
    pub(crate) fn leave_out(&mut self) {
        self.not_listed += 1;
    }

    /// How many of `wanted` things may be listed; somebody else says how many there are.
    pub(crate) fn take(&mut self, wanted: usize) -> usize {
        let taken = wanted.min(self.left);
        self.left -= taken;
        taken
    }

    /// Lists one of `parts` that are still to come, in an equal part of the room; what it leaves is the others'.
    pub(crate) fn list_part<T>(&mut self, parts: usize, list: impl FnOnce(&mut Listing) -> T) -> T {
        let share = self.left / parts.max(1);
        let mut listing = Listing::new(share);
        let listed = list(&mut listing);
        self.left = self.left - share + listing.left;
        self.not_listed += listing.not_listed;
        listed
    }

    /// How many things were not listed.
    pub(crate) fn not_listed(&self) -> usize {
        self.not_listed
    }
}

impl Status {
    /// How many things a snapshot lists at most: contexts, address spaces, areas, page tables, devices, their PASIDs and accounts together. Each is
    /// less than 1 KiB of [`Status::to_json`], which is so never longer than 10 MiB.
    pub const LISTED_AT_MOST: usize = 10_000;

    /// The snapshot as indented JSON text that ends with a newline.
    pub fn to_json(&self) -> String {
        let mut text = serde_json::to_string_pretty(self).unwrap_or_default();
        text.push('\n');
        text
    }
}
