//! The one capability that some instances need: CAP_SYS_RESOURCE, to choose who is charged for locked memory.
//!
//! Root of a container or of a locked-down machine may be without it, and then the kernel's own `/dev/iommu` refuses
//! the option too. That says nothing about us.
//!
//! Our server asks for the capability as a process of its own user namespace sees it, as a kernel does of its first one. So if
//! this process has none, the server and the test are run together in a new namespace, where they have all. That works for a
//! server in user space only, and where namespaces may be made; otherwise these instances are not run.

use std::fs;
use std::process::{Command, Stdio};

const CAP_SYS_RESOURCE: u32 = 24;

/// Whether an instance sets the option.
pub(crate) fn needed_by(instance: &str) -> bool {
    instance == "iommufd.global_options"
        || ["change_process.account_user.", "change_process.account_mm."]
            .iter()
            .any(|variant| instance.starts_with(variant))
}

/// Whether this process, and with it the test, has the capability.
pub(crate) fn is_held() -> bool {
    fs::read_to_string("/proc/self/status").is_ok_and(|status| holds(&status))
}

/// What is put before a server and its program to give them a user namespace of their own.
pub(crate) const IN_A_NAMESPACE: &[&str] = &["unshare", "--user", "--map-root-user", "--"];

/// Whether a new user namespace can be had, and the capability in it.
pub(crate) fn is_held_in_a_namespace() -> bool {
    let (unshare, arguments) = (IN_A_NAMESPACE[0], &IN_A_NAMESPACE[1..]);
    let told = Command::new(unshare)
        .args(arguments)
        .args(["cat", "/proc/self/status"])
        .stdin(Stdio::null())
        .stderr(Stdio::null())
        .output();
    told.is_ok_and(|output| output.status.success() && holds(&String::from_utf8_lossy(&output.stdout)))
}

fn holds(status: &str) -> bool {
    status
        .lines()
        .find_map(|line| line.strip_prefix("CapEff:"))
        .and_then(|set| u64::from_str_radix(set.trim(), 16).ok())
        .is_some_and(|set| set >> CAP_SYS_RESOURCE & 1 == 1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_effective_set_decides() {
        assert!(holds("CapPrm:\t0000000000000000\nCapEff:\t000001ffffffffff\n"));
        assert!(!holds("CapPrm:\t000001ffffffffff\nCapEff:\t000001fffeffffff\n"));
        assert!(!holds("nonsense"));
    }

    #[test]
    fn instances_that_set_the_option() {
        assert!(needed_by("iommufd.global_options"));
        assert!(needed_by("change_process.account_mm.basic"));
        assert!(!needed_by("change_process.account_none.basic"));
    }
}
