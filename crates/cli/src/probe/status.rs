//! What is mapped and charged, from whoever knows.
//!
//! The server of `ioasid run` answers in full, in `/dev/ioasid`. A kernel tells only how much of a process's memory is
//! pinned.

use std::{fmt, io};

use serde::Deserialize;

use crate::quantity::Bytes;

/// The file that `ioasid run` provides.
const SERVER: &str = "/dev/ioasid";
/// What every kernel provides.
const KERNEL: &str = "/proc/self/status";

const PAGE: u64 = 4096;

/// What is known.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Known {
    /// By the server.
    Server(Machine),
    /// By the kernel.
    Kernel(Pinned),
}

/// How much memory of this process is pinned, for whatever purpose.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Pinned(pub(super) Bytes);

/// The part of the server's answer that is looked at.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub(super) struct Machine {
    contexts: Vec<Context>,
    accounts: Vec<Account>,
}

#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
struct Context {
    address_spaces: Vec<AddressSpace>,
    devices: Vec<Device>,
}

/// One I/O address space.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub(super) struct AddressSpace {
    id: u32,
    pub(super) area_count: u64,
    pub(super) mapped_bytes: u64,
    leaves: Vec<Leaves>,
    native_table_bytes: u64,
    derived_table_bytes: u64,
}

#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
struct Leaves {
    size_bytes: u64,
    count: u64,
}

#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
struct Device {
    path: String,
}

#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
struct Account {
    name: String,
    charged_pages: u64,
}

/// Asks.
pub(super) fn ask() -> io::Result<Known> {
    match std::fs::read_to_string(SERVER) {
        Ok(text) => Ok(Known::Server(serde_json::from_str(&text)?)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            let text = std::fs::read_to_string(KERNEL)?;
            let pinned = pinned(&text).ok_or_else(|| io::Error::other(format!("no VmPin in {KERNEL}")))?;
            Ok(Known::Kernel(pinned))
        }
        Err(error) => Err(error),
    }
}

/// Finds what is pinned in a text such as `/proc/self/status`.
fn pinned(text: &str) -> Option<Pinned> {
    let value = text.lines().find_map(|line| line.strip_prefix("VmPin:"))?;
    let kibibytes: u64 = value.trim().strip_suffix("kB")?.trim().parse().ok()?;
    kibibytes.checked_mul(1024).map(|bytes| Pinned(Bytes(bytes)))
}

impl fmt::Display for Pinned {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "{} pinned, says the kernel", self.0)
    }
}

impl Machine {
    /// The address space `id` of whoever has bound the device.
    pub(super) fn address_space(&self, device: &str, id: u32) -> Option<&AddressSpace> {
        let bound = |context: &&Context| context.devices.iter().any(|bound| bound.path == device);
        self.contexts.iter().find(bound)?.address_spaces.iter().find(|space| space.id == id)
    }

    /// Pages charged to all accounts together.
    pub(super) fn charged_pages(&self) -> u64 {
        self.accounts.iter().fold(0, |sum, account| sum.saturating_add(account.charged_pages))
    }

    /// Who is charged, for people.
    pub(super) fn charges(&self) -> String {
        let charged = self.accounts.iter().filter(|account| account.charged_pages > 0);
        let said: Vec<_> = charged
            .map(|account| {
                format!("{} to {}", Bytes(account.charged_pages.saturating_mul(PAGE)), account.name)
            })
            .collect();
        if said.is_empty() {
            "nothing is charged".to_owned()
        } else {
            format!("charged: {}", said.join(", "))
        }
    }
}

impl AddressSpace {
    /// What the leaves of its own page table cover.
    pub(super) fn leaf_bytes(&self) -> u64 {
        self.leaves
            .iter()
            .fold(0, |sum, leaves| sum.saturating_add(leaves.size_bytes.saturating_mul(leaves.count)))
    }

    /// Its page tables, for people.
    pub(super) fn tables(&self) -> String {
        let leaves: Vec<_> = self
            .leaves
            .iter()
            .map(|leaves| format!("{} x {}", leaves.count, Bytes(leaves.size_bytes)))
            .collect();
        let tables = Bytes(self.native_table_bytes.saturating_add(self.derived_table_bytes));
        format!("{} in {tables} of tables", leaves.join(" + "))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use ioasid_server::{AccountStatus, AddressSpaceStatus, ContextStatus, DeviceStatus, LeafStatus, Status};

    #[test]
    fn what_a_kernel_has_pinned_is_read() {
        let text = "VmLck:\t       0 kB\nVmPin:\t   65536 kB\nVmHWM:\t    2048 kB\n";
        assert_eq!(pinned(text), Some(Pinned(Bytes(64 << 20))));
        for odd in ["", "VmPin:", "VmPin: x kB", "VmPin: 1 MB", "VmPin: 18446744073709551615 kB"] {
            assert_eq!(pinned(odd), None, "{odd}");
        }
    }

    #[test]
    fn the_servers_own_text_is_understood() {
        let space = AddressSpaceStatus {
            id: 3,
            area_count: 2,
            mapped_bytes: 1 << 21,
            leaves: vec![LeafStatus { size_bytes: 4096, count: 512 }],
            native_table_bytes: 8192,
            ..AddressSpaceStatus::default()
        };
        let device = DeviceStatus { path: "/dev/vfio/devices/vfio0".to_owned(), ..DeviceStatus::default() };
        let account =
            AccountStatus { name: "user 7".to_owned(), charged_pages: 512, ..AccountStatus::default() };
        let context =
            ContextStatus { address_spaces: vec![space], devices: vec![device], ..ContextStatus::default() };
        let contexts = vec![ContextStatus::default(), context];
        let status = Status { contexts, accounts: vec![account], ..Status::default() };
        let machine: Machine = serde_json::from_str(&status.to_json()).unwrap();
        let space = machine.address_space("/dev/vfio/devices/vfio0", 3).unwrap();
        assert_eq!((space.area_count, space.mapped_bytes), (2, 1 << 21));
        assert_eq!(space.tables(), "512 x 4 KiB in 8 KiB of tables");
        assert_eq!(space.leaf_bytes(), 2 << 20);
        assert_eq!(machine.charges(), "charged: 2 MiB to user 7");
        assert_eq!(machine.charged_pages(), 512);
        assert!(machine.address_space("/dev/vfio/devices/vfio0", 1).is_none());
        assert!(machine.address_space("/dev/vfio/devices/vfio1", 3).is_none());
    }
}
