//! What the kernel's side answers, against what ours said.

use ioasid_pagetable::{IovaRange, MapError, WalkFault};

/// What the kernel's side has to answer.
#[derive(Debug)]
pub(crate) enum Expected {
    /// The range is mapped.
    Mapped(IovaRange),
    /// It is not, for the reason that we gave.
    Refused(IovaRange, MapError),
    /// So many bytes are unmapped.
    Unmapped(IovaRange),
    /// The address leads there, or nowhere.
    Walked(u64, Option<u64>),
    /// The leaf is dirty now, or there is none for the reason that we gave.
    Marked(u64, Option<WalkFault>),
}

/// The numbers of the errors.
const ENOENT: u32 = 2;
const ENXIO: u32 = 6;
const ERANGE: u32 = 34;
const EADDRINUSE: u32 = 98;

/// What is wrong with an answer, if anything is.
pub(crate) fn complaint(expected: &Expected, answer: &str) -> Option<String> {
    let number = |prefix: &str| u64::from_str_radix(answer.strip_prefix(prefix)?, 16).ok();
    match expected {
        Expected::Mapped(_) if answer == "ok" => None,
        Expected::Mapped(range) => Some(format!("we map {range}; the kernel says '{answer}'")),
        Expected::Refused(range, error) => {
            let same = match error {
                MapError::Occupied { .. } => EADDRINUSE,
                MapError::OutOfRange { .. } | MapError::OutputOutOfRange { .. } => ERANGE,
                MapError::Misaligned { .. } => ENXIO,
                // Nothing that anybody asked for.
                MapError::NoAccess { .. } | MapError::NoMemoryType { .. } | MapError::OutOfTables(_) => 0,
            };
            (answer != format!("error {same}"))
                .then(|| format!("we do not map {range}: {error}; the kernel says '{answer}'"))
        }
        Expected::Unmapped(range) => {
            let bytes = range.last().wrapping_sub(range.first()).wrapping_add(1);
            (number("ok ") != Some(bytes))
                .then(|| format!("to unmap {range}, {bytes:#x} bytes, the kernel says '{answer}'"))
        }
        Expected::Marked(iova, error) => {
            let same = match error {
                None => "ok".to_owned(),
                Some(WalkFault::NotMapped(_)) => format!("error {ENOENT}"),
                Some(_) => format!("error {ERANGE}"),
            };
            (answer != same)
                .then(|| format!("writing through {iova:#x} gives us {error:?}; the kernel says '{answer}'"))
        }
        Expected::Walked(iova, output) => {
            // The kernel's word for "nothing is mapped" is the address 0.
            (number("ok ") != Some(output.unwrap_or(0))).then(|| match output {
                Some(output) => format!("{iova:#x} is {output:#x} to us; the kernel says '{answer}'"),
                None => format!("{iova:#x} is not mapped to us; the kernel says '{answer}'"),
            })
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn answers_are_compared_by_meaning() {
        let range = IovaRange::new(0x1000, 0x1fff).unwrap();
        let fine = |expected: Expected, answer| complaint(&expected, answer).is_none();
        assert!(fine(Expected::Mapped(range), "ok") && !fine(Expected::Mapped(range), "error 98"));
        let occupied = || Expected::Refused(range, MapError::Occupied { at: 0x1000 });
        assert!(fine(occupied(), "error 98"));
        assert!(!fine(occupied(), "error 34") && !fine(occupied(), "ok"));
        assert!(fine(Expected::Unmapped(range), "ok 1000") && !fine(Expected::Unmapped(range), "ok 2000"));
        assert!(fine(Expected::Walked(0x1234, Some(0x5234)), "ok 5234"));
        assert!(fine(Expected::Walked(0x1234, None), "ok 0"));
        assert!(!fine(Expected::Walked(0x1234, Some(0x5234)), "ok 0"));
        assert!(!fine(Expected::Walked(0x1234, None), "ok 5234") && !fine(Expected::Walked(1, None), ""));
    }
}
