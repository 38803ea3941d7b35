//! Whether the Rust version that the workspace promises (`rust-version`) is enough for all of its dependencies.
//!
//! cargo's resolver prefers versions of dependencies that fit, but takes others if it finds none, and a lock file can be
//! changed by hand. So the promise is checked against what every package in the dependency graph declares, for all
//! platforms and for the tests too. Packages that declare nothing cannot be checked this way.

use anyhow::{Context, Result, bail};
use serde_json::Value;

use crate::workspace;

/// Checks the dependency graph.
pub(crate) fn run() -> Result<()> {
    let metadata = workspace::metadata()?;
    let packages = metadata["packages"].as_array().context("cargo metadata lists no packages")?;
    let promised = packages
        .iter()
        .find(|package| package["name"] == env!("CARGO_PKG_NAME") && package["source"].is_null())
        .and_then(|package| package["rust_version"].as_str())
        .context("the workspace declares no rust-version")?;
    let offenders = newer_than(packages, promised)?;
    if offenders.is_empty() {
        println!("{} packages, none needs more than Rust {promised}", packages.len());
        return Ok(());
    }
    for (name, version) in &offenders {
        println!("{name} needs Rust {version}");
    }
    bail!("{} packages need a newer Rust than {promised}, which Cargo.toml promises", offenders.len());
}

/// Packages ("name version") that declare a newer Rust than `promised`, with that version.
fn newer_than(packages: &[Value], promised: &str) -> Result<Vec<(String, String)>> {
    let promised = parse(promised)?;
    let mut offenders = Vec::new();
    for package in packages {
        let Some(declared) = package["rust_version"].as_str() else { continue };
        if parse(declared)? > promised {
            let name = package["name"].as_str().unwrap_or("?");
            let version = package["version"].as_str().unwrap_or("?");
            offenders.push((format!("{name} {version}"), declared.to_owned()));
        }
    }
    Ok(offenders)
}

/// "1.85" or "1.85.0" as numbers that can be compared.
fn parse(version: &str) -> Result<[u64; 3]> {
    let mut numbers = [0; 3];
    let mut parts = version.split('.');
    for (number, part) in numbers.iter_mut().zip(parts.by_ref()) {
        *number = part.parse().with_context(|| format!("{version:?} is not a Rust version"))?;
    }
    if parts.next().is_some() {
        bail!("{version:?} is not a Rust version");
    }
    Ok(numbers)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn finds_packages_that_need_more() {
        let packages = [
            json!({ "name": "old", "version": "1.0.0", "rust_version": "1.9" }),
            json!({ "name": "same", "version": "1.0.0", "rust_version": "1.85.0" }),
            json!({ "name": "silent", "version": "1.0.0", "rust_version": null }),
            json!({ "name": "new", "version": "2.1.0", "rust_version": "1.85.1" }),
        ];
        let offenders = newer_than(&packages, "1.85").unwrap();
        assert_eq!(offenders, [("new 2.1.0".to_owned(), "1.85.1".to_owned())]);
    }

    #[test]
    fn versions_are_numbers() {
        assert!(parse("1.100").unwrap() > parse("1.85.9").unwrap());
        assert!(parse("1.x").is_err());
        assert!(parse("1.2.3.4").is_err());
    }
}
