//! `/dev/iommu`: all commands, their arguments, and the values that the arguments carry.
//!
//! An open file of `/dev/iommu` owns numbered objects: I/O address spaces (IOAS), page tables (HWPT), devices that VFIO
//! has bound to it, fault queues, virtual IOMMUs. Each command names objects by these ids. The commands are grouped
//! here as the interface thinks: [address spaces](ioas), [devices, page tables and their faults](hwpt), and the
//! [virtual IOMMUs](viommu) that a VMM builds from them. Everything is re-exported at this level.
//!
//! Dispatch: the *complete* number has to match, else ENOTTY. The first `u32` of every argument is the caller's size
//! of it in bytes: below [`min_size`](CommandInfo::min_size) EINVAL, and non-zero bytes beyond what is known E2BIG. The
//! reply writes back min(caller's size, known size). A reserved field that is not zero, and a flag that is not known,
//! is EOPNOTSUPP; ids that name nothing are ENOENT. [`COMMANDS`] holds these facts for every command, also for those
//! that a server does not implement.

pub mod hwpt;
pub mod ioas;
pub mod viommu;

pub use hwpt::*;
pub use ioas::*;
pub use viommu::*;

use crate::{Command, CommandInfo};

/// Every command of `/dev/iommu` in the order of its number, the self-test's included.
pub const COMMANDS: &[CommandInfo] = &[
    Destroy::INFO,
    IoasAlloc::INFO,
    IoasAllowIovas::INFO,
    IoasCopy::INFO,
    IoasIovaRanges::INFO,
    IoasMap::INFO,
    IoasUnmap::INFO,
    SetOption::INFO,
    VfioIoas::INFO,
    HwptAlloc::INFO,
    GetHwInfo::INFO,
    HwptSetDirtyTracking::INFO,
    HwptGetDirtyBitmap::INFO,
    HwptInvalidate::INFO,
    FaultQueueAlloc::INFO,
    IoasMapFile::INFO,
    ViommuAlloc::INFO,
    VdeviceAlloc::INFO,
    IoasChangeProcess::INFO,
    VeventqAlloc::INFO,
    HwQueueAlloc::INFO,
    IoasNoiommuGetPa::INFO,
    crate::iommufd_test::TestCommand::INFO,
];

/// The entry of [`COMMANDS`] for a complete ioctl number; `None` is ENOTTY, after VFIO's
/// [container commands](crate::vfio::CONTAINER_COMMANDS) have been looked at, which this file answers too.
pub fn command(number: u32) -> Option<&'static CommandInfo> {
    COMMANDS.iter().find(|command| command.number == number)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_numbers_are_gapless_and_found() {
        let numbers = (0x3b80..=0x3b95).chain([0x3ba0]);
        assert!(COMMANDS.iter().map(|command| command.number).eq(numbers));
        assert_eq!(command(0x3b85).map(|command| command.name), Some("IOMMU_IOAS_MAP"));
        assert_eq!(command(0x3b64), None, "a VFIO number");
        assert_eq!(command(0x1_3b85 & !0xff00), None, "the type byte counts");
    }

    /// The least sizes follow from fields; here they are as plain figures.
    #[test]
    fn least_and_full_sizes() {
        let sizes = |name| {
            let command = COMMANDS.iter().find(|command| command.name == name).unwrap();
            (command.min_size, command.size)
        };
        assert_eq!(sizes("IOMMU_DESTROY"), (8, 8));
        assert_eq!(sizes("IOMMU_IOAS_ALLOC"), (12, 12));
        assert_eq!(sizes("IOMMU_HWPT_ALLOC"), (24, 48));
        assert_eq!(sizes("IOMMU_GET_HW_INFO"), (32, 40));
        assert_eq!(sizes("IOMMU_VIOMMU_ALLOC"), (24, 40));
        assert_eq!(sizes("IOMMU_VEVENTQ_ALLOC"), (28, 32));
        assert_eq!(sizes("IOMMU_TEST_CMD"), (68, 72));
        for command in COMMANDS {
            assert!(command.min_size <= command.size, "{command:?}");
        }
    }
}
