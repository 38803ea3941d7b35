//! What people asked for on the mailing list in 2021, each as a test that does it.
//!
//! A file is a scenario. It says who would ask and what VFIO's type1 and Linux's iommufd make of it, and then does it: through
//! the engine with the software IOMMU, whose devices walk tables in the formats of hardware and move bytes that are compared;
//! or through the server, where it is about files and processes. `docs/scenarios.md` is the list.
#![forbid(unsafe_code)]

mod abnormal_teardown;
mod bisect;
mod bypass_to_giova;
mod charged_once;
mod dirty_log;
mod fault_attribution;
mod history_independence;
mod incompatible_coherency;
mod machine;
mod nesting_equivalence;
mod ownership_between_vms;
#[path = "../../crates/server/tests/program/mod.rs"]
mod program;
mod quota;
mod unsafe_groups;
mod viommu_storm;
mod virtio_mem;
