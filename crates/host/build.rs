//! Says to the engine's tests, which are built here once more, that some of their tables are the machine's
//! (`tests/engine`).

fn main() {
    println!("cargo::rustc-cfg=host_iommu");
    println!("cargo::rerun-if-changed=build.rs");
}
