//! Bytes and times as people write and read them.

use std::fmt;
use std::str::FromStr;
use std::time::Duration;

/// A number of bytes. Reads `4096`, `64K`, `128M`, `1G`, `1GiB`; shows itself in the largest unit that leaves no rest.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Bytes(pub(crate) u64);

const UNITS: [(&str, u32); 4] = [("T", 40), ("G", 30), ("M", 20), ("K", 10)];

/// Why a text is not a number of bytes.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("not a number of bytes below 2^64: {0:?}; write for example 4096, 64K, 128M or 1G")]
pub(crate) struct NotBytes(String);

impl FromStr for Bytes {
    type Err = NotBytes;

    fn from_str(text: &str) -> Result<Self, NotBytes> {
        let refused = || NotBytes(text.to_owned());
        let digits = text.bytes().take_while(u8::is_ascii_digit).count();
        let (number, unit) = text.split_at(digits);
        let number: u64 = number.parse().map_err(|_| refused())?;
        let unit = unit.to_ascii_uppercase();
        let unit = unit.strip_suffix("IB").or(unit.strip_suffix('B')).unwrap_or(&unit);
        let shift = match UNITS.iter().find(|(name, _)| *name == unit) {
            Some((_, shift)) => *shift,
            None if unit.is_empty() => 0,
            None => return Err(refused()),
        };
        number.checked_mul(1 << shift).map(Self).ok_or_else(refused)
    }
}

impl fmt::Display for Bytes {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (name, shift) in UNITS {
            if self.0 != 0 && self.0 % (1 << shift) == 0 {
                return write!(formatter, "{} {name}iB", self.0 >> shift);
            }
        }
        write!(formatter, "{} bytes", self.0)
    }
}

/// Bytes in a unit of which there is at least one, to a tenth: `60.3 MiB`.
pub(crate) fn about(bytes: u64) -> String {
    let unit = UNITS.iter().find(|(_, shift)| bytes >> shift != 0);
    match unit {
        // The fraction's digit is all that is wanted of a float.
        Some((name, shift)) => format!("{:.1} {name}iB", bytes as f64 / (1u64 << shift) as f64),
        None => format!("{bytes} bytes"),
    }
}

/// So many in each second: `812`, `81.2 k`, `2.10 M`.
pub(crate) fn rate(per_second: f64) -> String {
    match per_second {
        rate if rate >= 1e6 => format!("{:.2} M", rate / 1e6),
        rate if rate >= 1e4 => format!("{:.1} k", rate / 1e3),
        rate => format!("{rate:.0}"),
    }
}

/// A duration with four digits or fewer and its unit, such as `12.3 us`.
pub(crate) fn time(duration: Duration) -> String {
    let nanoseconds = duration.as_nanos();
    match nanoseconds {
        0..1_000 => format!("{nanoseconds} ns"),
        1_000..1_000_000 => format!("{:.1} us", nanoseconds as f64 / 1e3),
        1_000_000..1_000_000_000 => format!("{:.1} ms", nanoseconds as f64 / 1e6),
        _ => format!("{:.2} s", duration.as_secs_f64()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_are_read_with_units() {
        for (text, bytes) in [
            ("0", 0),
            ("4096", 4096),
            ("64K", 64 << 10),
            ("64k", 64 << 10),
            ("2MB", 2 << 20),
            ("1G", 1 << 30),
            ("1GiB", 1 << 30),
            ("3T", 3 << 40),
            ("18446744073709551615", u64::MAX),
        ] {
            assert_eq!(text.parse(), Ok(Bytes(bytes)), "{text}");
        }
    }

    #[test]
    fn what_is_not_bytes_is_refused_with_an_example() {
        for text in ["", "G", "-1", "1.5G", "1X", "1 G", "18446744073709551616", "16777216T", "1BB", "+5"] {
            let refused = text.parse::<Bytes>().unwrap_err();
            assert!(refused.to_string().contains("1G"), "{text}");
        }
    }

    #[test]
    fn bytes_are_shown_in_the_largest_whole_unit() {
        let shown = |bytes| Bytes(bytes).to_string();
        assert_eq!(shown(0), "0 bytes");
        assert_eq!(shown(100), "100 bytes");
        assert_eq!(shown(4096), "4 KiB");
        assert_eq!(shown(3 << 19), "1536 KiB");
        assert_eq!(shown(1 << 30), "1 GiB");
    }

    #[test]
    fn what_is_shown_is_read_back() {
        for bytes in [4096, 1 << 20, 5 << 30, 7 << 40, 1023 << 10] {
            let shown = Bytes(bytes).to_string().replace(' ', "");
            assert_eq!(shown.parse(), Ok(Bytes(bytes)));
        }
    }

    #[test]
    fn what_is_rounded_keeps_a_digit_or_two() {
        assert_eq!(
            [0, 1023, 1024, 63_229_133, u64::MAX].map(about),
            ["0 bytes", "1023 bytes", "1.0 KiB", "60.3 MiB", "16777216.0 TiB"]
        );
        assert_eq!([0.0, 812.4, 81_234.0, 2_104_000.0].map(rate), ["0", "812", "81.2 k", "2.10 M"]);
    }

    #[test]
    fn times_have_a_fitting_unit() {
        let shown = |nanoseconds| time(Duration::from_nanos(nanoseconds));
        assert_eq!(shown(0), "0 ns");
        assert_eq!(shown(999), "999 ns");
        assert_eq!(shown(12_340), "12.3 us");
        assert_eq!(shown(1_000_000), "1.0 ms");
        assert_eq!(shown(2_500_000_000), "2.50 s");
    }
}
