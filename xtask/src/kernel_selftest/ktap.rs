//! The results that a kernel self-test prints: KTAP, the kernel's dialect of the Test Anything Protocol.
//!
//! ```text
//! TAP version 13
//! 1..1
//! # Starting 1 tests from 1 test cases.
//! #  RUN           iommufd.cmd_length ...
//! # iommufd.c:101:cmd_length:Expected EINVAL (22) == errno (95)
//! # cmd_length: Test failed
//! #          FAIL  iommufd.cmd_length
//! not ok 1 iommufd.cmd_length
//! ```
//!
//! A result line is `ok` or `not ok`, a number, the name, and perhaps `#` with a directive (SKIP, XFAIL, XPASS) and a
//! reason. Everything else is talk; of it the lines that say what was expected are worth showing.

use super::Verdict;

/// What the output says of one test, and why.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct TestResult {
    pub(crate) verdict: Verdict,
    /// A skip's reason, or the first expectation that did not hold. May be empty.
    pub(crate) note: String,
}

/// The result of the test `name`; `None` if the output has none.
pub(crate) fn result_of(output: &str, name: &str) -> Option<TestResult> {
    let (passed, directive) = output.lines().find_map(|line| {
        let (passed, printed_name, directive) = result_line(line)?;
        (printed_name == name).then_some((passed, directive))
    })?;
    let (keyword, reason) = directive.split_once(' ').unwrap_or((directive, ""));
    let result = match (passed, keyword) {
        (true, "SKIP") => TestResult { verdict: Verdict::Skip, note: reason.trim().to_owned() },
        // The test did not hold, and the kernel's authors know: for us it has not passed.
        (true, "XFAIL") => TestResult { verdict: Verdict::Fail, note: format!("expected failure {reason}") },
        (true, _) => TestResult { verdict: Verdict::Pass, note: String::new() },
        (false, _) => TestResult {
            verdict: Verdict::Fail,
            note: first_complaint(output).unwrap_or_default().to_owned(),
        },
    };
    Some(result)
}

/// The first line that tells of an expectation which did not hold, or of a test that was ended.
pub(crate) fn first_complaint(output: &str) -> Option<&str> {
    output.lines().filter_map(|line| line.strip_prefix("# ")).find(|line| {
        line.contains("Expected ") || line.contains("Test terminated") || line.contains("Bail out")
    })
}

/// Whether it is `ok`, the name, and what follows `#`.
fn result_line(line: &str) -> Option<(bool, &str, &str)> {
    let (passed, rest) = match line.strip_prefix("ok ") {
        Some(rest) => (true, rest),
        None => (false, line.strip_prefix("not ok ")?),
    };
    let (number, rest) = rest.split_once(' ')?;
    number.parse::<u32>().ok()?;
    let (name, directive) = rest.split_once('#').unwrap_or((rest, ""));
    // Some printers put a dash between number and name.
    let name = name.trim();
    Some((passed, name.strip_prefix("- ").unwrap_or(name), directive.trim()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn verdict(output: &str, name: &str) -> Option<Verdict> {
        result_of(output, name).map(|result| result.verdict)
    }

    #[test]
    fn a_pass_and_a_failure_with_its_first_complaint() {
        let output = "TAP version 13\n1..2\n# Starting 2 tests from 1 test cases.\n\
            #  RUN           iommufd.simple_close ...\n#            OK  iommufd.simple_close\n\
            ok 1 iommufd.simple_close\n#  RUN           iommufd.cmd_length ...\n\
            # iommufd.c:101:cmd_length:Expected 22 (22) == errno (95)\n\
            # iommufd.c:102:cmd_length:Expected 1 (1) == 2 (2)\n# cmd_length: Test failed\n\
            #          FAIL  iommufd.cmd_length\nnot ok 2 iommufd.cmd_length\n\
            # FAILED: 1 / 2 tests passed.\n# Totals: pass:1 fail:1 xfail:0 xpass:0 skip:0 error:0\n";
        assert_eq!(verdict(output, "iommufd.simple_close"), Some(Verdict::Pass));
        let failure = result_of(output, "iommufd.cmd_length").unwrap();
        assert_eq!(failure.verdict, Verdict::Fail);
        assert_eq!(failure.note, "iommufd.c:101:cmd_length:Expected 22 (22) == errno (95)");
        assert_eq!(verdict(output, "iommufd.cmd"), None, "names are whole");
    }

    #[test]
    fn directives() {
        let output = "ok 1 a.b # SKIP Skipping test for variant no_viommu\nok 2 c # XFAIL unknown\n\
            ok 3 d # XPASS unknown\nnot ok 4 e #  died\nok 5 - f\n";
        let skip = result_of(output, "a.b").unwrap();
        assert_eq!((skip.verdict, &*skip.note), (Verdict::Skip, "Skipping test for variant no_viommu"));
        assert_eq!(verdict(output, "c"), Some(Verdict::Fail));
        assert_eq!(verdict(output, "d"), Some(Verdict::Pass));
        assert_eq!(verdict(output, "e"), Some(Verdict::Fail));
        assert_eq!(verdict(output, "f"), Some(Verdict::Pass));
    }

    #[test]
    fn talk_is_no_result() {
        for output in ["", "ok\n", "ok then\n", "ok x name\n", "# ok 1 name\n", "okay 1 name\n", "not ok\n"] {
            assert_eq!(verdict(output, "name"), None, "{output:?}");
        }
    }
}
