//! The self-test's instances, from the table that the program prints for `-l`.
//!
//! The harness prints for each fixture its variants and its tests side by side, in columns that start at 0, 21 and 47
//! unless a longer name shifts them; an instance is every test with every variant:
//!
//! ```text
//! # FIXTURE            VARIANT                   TEST
//! change_process       account_none              basic
//!                      account_user
//! --------------------------------------------------------------------------------
//! iommufd                                        simple_close
//!                                                cmd_fail
//! ```

use std::{path::Path, process::Command};

use anyhow::{Context, Result, bail};

/// First column of the variants.
const VARIANT_COLUMN: usize = 21;

/// Asks the program for its instances.
pub(crate) fn list(program: &Path) -> Result<Vec<String>> {
    // The exit status is the harness's number for "skipped"; the table is on standard error.
    let output = Command::new(program)
        .arg("-l")
        .output()
        .with_context(|| format!("cannot run {}", program.display()))?;
    let instances = parse(&String::from_utf8_lossy(&output.stderr));
    if instances.is_empty() {
        bail!("{} -l lists no tests", program.display());
    }
    Ok(instances)
}

/// The instances' names in the order in which the program would run them.
fn parse(table: &str) -> Vec<String> {
    let mut fixtures: Vec<Fixture> = Vec::new();
    for line in table.lines().filter(|line| !line.starts_with(['#', '-'])) {
        let words: Vec<&str> = line.split_whitespace().collect();
        let begins_fixture = line.starts_with(|first: char| !first.is_whitespace());
        let cells = if begins_fixture {
            let Some((name, cells)) = words.split_first() else { continue };
            fixtures.push(Fixture { name: (*name).to_owned(), variants: Vec::new(), tests: Vec::new() });
            cells
        } else {
            &words
        };
        let Some(fixture) = fixtures.last_mut() else { continue };
        match *cells {
            [variant, test] => {
                fixture.variants.push(variant.to_owned());
                fixture.tests.push(test.to_owned());
            }
            // A fixture's first line always has a test. Elsewhere the column decides.
            [variant] if !begins_fixture && line.find(variant) == Some(VARIANT_COLUMN) => {
                fixture.variants.push(variant.to_owned());
            }
            [test] => fixture.tests.push(test.to_owned()),
            _ => {}
        }
    }
    fixtures.iter().flat_map(Fixture::instances).collect()
}

#[derive(Debug)]
struct Fixture {
    name: String,
    variants: Vec<String>,
    tests: Vec<String>,
}

impl Fixture {
    fn instances(&self) -> Vec<String> {
        let Fixture { name, variants, tests } = self;
        if variants.is_empty() {
            return tests.iter().map(|test| format!("{name}.{test}")).collect();
        }
        let of_variant = |variant| tests.iter().map(move |test| format!("{name}.{variant}.{test}"));
        variants.iter().flat_map(of_variant).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fixtures_with_and_without_variants() {
        let table = "\
# FIXTURE            VARIANT                   TEST
iommufd                                        simple_close
                                               cmd_fail
--------------------------------------------------------------------------------
change_process       account_none              basic
                     account_user              
--------------------------------------------------------------------------------
vfio_compat_mock_domain Ver1v2                    simple_close
                     Ver1v0                    get_info
                                               map
";
        let expected = [
            "iommufd.simple_close",
            "iommufd.cmd_fail",
            "change_process.account_none.basic",
            "change_process.account_user.basic",
            "vfio_compat_mock_domain.Ver1v2.simple_close",
            "vfio_compat_mock_domain.Ver1v2.get_info",
            "vfio_compat_mock_domain.Ver1v2.map",
            "vfio_compat_mock_domain.Ver1v0.simple_close",
            "vfio_compat_mock_domain.Ver1v0.get_info",
            "vfio_compat_mock_domain.Ver1v0.map",
        ];
        assert_eq!(parse(table), expected);
    }

    #[test]
    fn nonsense_lists_nothing() {
        assert!(parse("").is_empty());
        assert!(parse("   \n\n   orphan\n").is_empty());
    }
}
