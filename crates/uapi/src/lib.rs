//! Memory layouts and numbers of the Linux interfaces that programs use to reach an IOMMU: `/dev/iommu` (iommufd), the
//! device side of `/dev/vfio`, iommufd's self-test ioctl, and the few PCI configuration-space facts that a software
//! device needs.
//!
//! This crate is data only. It has no behaviour, allocates nothing, knows no other crate of the project and is
//! `no_std`. What a command *does* is the server's business; what its bytes mean is written here, once.
//!
//! Every argument structure is a plain `repr(C)` structure with explicit padding, so that the `zerocopy` derives prove
//! that any bytes of a client are a valid value and that no uninitialised byte can leak back. Fields which a client
//! may fill with anything (flags, types, operations) are bare integers; the [`bitflags`] types beside them give the
//! known bits, and `from_bits` tells whether there are others. Integers are in the machine's own byte order, as in the
//! kernel's interface; the two architectures that the project runs on are little-endian.
//!
//! Field names are those of the interface, so that its documentation applies, except where a name is a Rust keyword or
//! a reserved field's underscores add nothing. `tests/kernel_headers.rs` compares every size, offset, number and flag
//! with the kernel's own headers (`cargo xtask uapi-check` runs it).
//!
//! # Receiving a command
//!
//! iommufd's arguments begin with their own size, VFIO's with `argsz`, which is the same idea. A receiver reads that
//! word, refuses less than [`Command::MIN_SIZE`], starts from zeroes and copies what the client has:
//!
//! ```
//! use ioasid_uapi::{Command, iommufd::IoasAlloc};
//! use zerocopy::{FromZeros, IntoBytes};
//!
//! let from_client = [12, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
//! assert!(from_client.len() >= IoasAlloc::MIN_SIZE);
//! let mut command = IoasAlloc::new_zeroed();
//! let length = from_client.len().min(IoasAlloc::SIZE);
//! command.as_mut_bytes()[..length].copy_from_slice(&from_client[..length]);
//! assert_eq!(command.size, 12);
//! ```

#![no_std]
#![forbid(unsafe_code)]

pub mod iommufd;
pub mod iommufd_test;
pub mod pci;
pub mod vfio;

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

/// The type byte (`;`) that all ioctl numbers of iommufd and VFIO share, as the interface shifts it: bits 15:8 of the
/// number. Bits 31:16 (size and direction) are zero in every one of them.
pub const IOCTL_TYPE: u32 = 0x3b << 8;

/// The full ioctl number of command `number` of the shared type byte.
pub(crate) const fn ioctl_number(number: u8) -> u32 {
    // `u32::from` is not callable in constants.
    IOCTL_TYPE | number as u32
}

/// The argument structure of one ioctl.
pub trait Command: FromBytes + IntoBytes + Immutable + KnownLayout + Copy {
    /// The complete ioctl number, as it is given to the system call.
    const NUMBER: u32;
    /// The ioctl's name in the kernel's headers.
    const NAME: &'static str;
    /// Bytes that a caller has to bring at least. Less is EINVAL.
    const MIN_SIZE: usize;
    /// Bytes of the structure as known here. A caller may bring more (a newer program) or, down to
    /// [`MIN_SIZE`](Self::MIN_SIZE), less (an older one).
    const SIZE: usize = size_of::<Self>();
    /// The same facts as a value, for tables.
    const INFO: CommandInfo =
        CommandInfo { number: Self::NUMBER, name: Self::NAME, min_size: Self::MIN_SIZE, size: Self::SIZE };
}

/// What [`Command`] says about one ioctl, as a value.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CommandInfo {
    /// The complete ioctl number.
    pub number: u32,
    /// The ioctl's name in the kernel's headers.
    pub name: &'static str,
    /// Least size of the argument in bytes.
    pub min_size: usize,
    /// Known size of the argument in bytes.
    pub size: usize,
}

/// Implements [`Command`]: the name, the number beneath the shared type byte, and the last field that the first version
/// of the command had, from which the least size follows.
macro_rules! command {
    ($structure:ident, $name:literal, $number:expr, through $last:ident) => {
        impl $crate::Command for $structure {
            const NUMBER: u32 = $crate::ioctl_number($number);
            const NAME: &'static str = $name;
            const MIN_SIZE: usize = core::mem::offset_of!($structure, $last)
                + $crate::field_size(|structure: &$structure| &structure.$last);
        }
    };
}
pub(crate) use command;

/// The size in bytes of the field that `_select` returns.
pub(crate) const fn field_size<Structure, Field>(_select: fn(&Structure) -> &Field) -> usize {
    size_of::<Field>()
}
