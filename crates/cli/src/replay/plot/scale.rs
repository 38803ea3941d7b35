//! Axes: units in which numbers are short, and what stands beside the ticks.

/// A unit, and how many of the smallest (nanoseconds, bytes) it has.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Unit {
    pub(super) name: &'static str,
    pub(super) size: f64,
}

const TIMES: [Unit; 6] = [
    Unit { name: "ns", size: 1.0 },
    Unit { name: "µs", size: 1e3 },
    Unit { name: "ms", size: 1e6 },
    Unit { name: "s", size: 1e9 },
    Unit { name: "h", size: 3600e9 },
    Unit { name: "days", size: 86_400e9 },
];

const BYTES: [Unit; 5] = [
    Unit { name: "bytes", size: 1.0 },
    Unit { name: "KiB", size: 1024.0 },
    Unit { name: "MiB", size: 1_048_576.0 },
    Unit { name: "GiB", size: 1_073_741_824.0 },
    Unit { name: "TiB", size: 1_099_511_627_776.0 },
];

/// The largest unit of which there are two at least, or else the smallest.
fn unit_for(units: &[Unit], most: f64) -> Unit {
    let fitting = units.iter().rev().find(|unit| most >= 2.0 * unit.size);
    fitting.or(units.first()).copied().unwrap_or(TIMES[0])
}

/// The unit for times up to so many nanoseconds.
pub(super) fn time_unit(longest: u64) -> Unit {
    unit_for(&TIMES, longest as f64)
}

/// The unit for so many bytes.
pub(super) fn bytes_unit(most: u64) -> Unit {
    unit_for(&BYTES, most as f64)
}

/// A number without needless digits.
pub(super) fn number(value: f64) -> String {
    let text = format!("{value:.3}");
    let text = text.trim_end_matches('0').trim_end_matches('.');
    if text == "-0" { "0".to_owned() } else { text.to_owned() }
}

/// A number of things: `250`, `2.5 k`, `10 M`.
pub(super) fn count(value: f64) -> String {
    match value {
        value if value >= 1e9 => format!("{} G", number(value / 1e9)),
        value if value >= 1e6 => format!("{} M", number(value / 1e6)),
        value if value >= 1e3 => format!("{} k", number(value / 1e3)),
        value => number(value),
    }
}

/// A time in nanoseconds: `100 ns`, `1 µs`.
pub(super) fn nanoseconds(value: f64) -> String {
    // Ticks are powers of ten, so one of a unit is enough.
    let seconds_at_most = TIMES.iter().take(4).rev();
    let unit = seconds_at_most.into_iter().find(|unit| value >= 0.999 * unit.size).unwrap_or(&TIMES[0]);
    format!("{} {}", number(value / unit.size), unit.name)
}

/// The powers of ten around some values, which are a factor of ten apart at least.
pub(super) fn decades(values: impl IntoIterator<Item = u64>) -> (f64, f64) {
    let mut bounds = None;
    for value in values.into_iter().filter(|value| *value > 0) {
        let (least, most) = bounds.unwrap_or((value, value));
        bounds = Some((value.min(least), value.max(most)));
    }
    // Without any, what calls take as a rule.
    let (least, most) = bounds.unwrap_or((101, 9_999));
    let (low, high) = ((least as f64).log10().floor(), (most as f64).log10().ceil());
    (10f64.powf(low), 10f64.powf(high.max(low + 1.0)))
}

/// From a little below the least to a little above the most of some values, with a power of ten in between.
pub(super) fn around(values: impl IntoIterator<Item = u64>) -> (f64, f64) {
    let values: Vec<u64> = values.into_iter().filter(|value| *value > 0).collect();
    let (Some(least), Some(most)) = (values.iter().min(), values.iter().max()) else { return decades([]) };
    let (low, high) = (*least as f64 / 1.5, *most as f64 * 1.5);
    if low.log10().ceil() <= high.log10().floor() { (low, high) } else { decades(values) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn units_keep_numbers_short() {
        let time = |longest| time_unit(longest).name;
        assert_eq!([0, 1_999, 2_000, 1_500_000_000, 2_000_000_000].map(time), ["ns", "ns", "µs", "ms", "s"]);
        assert_eq!([7_200_000_000_000, u64::MAX].map(time), ["h", "days"]);
        assert_eq!(
            [0, 4096, 1 << 30, u64::MAX].map(|most| bytes_unit(most).name),
            ["bytes", "KiB", "MiB", "TiB"]
        );
    }

    #[test]
    fn ticks_have_no_needless_digits() {
        assert_eq!([0.0, -0.0, 0.30000000000000004, 12.5].map(number), ["0", "0", "0.3", "12.5"]);
        assert_eq!([0.0, 999.0, 2_500.0, 1e6, 2e10].map(count), ["0", "999", "2.5 k", "1 M", "20 G"]);
        let ticks = [1.0, 100.0, 999.9999999999999, 1e4, 1e6, 1e10];
        assert_eq!(ticks.map(nanoseconds), ["1 ns", "100 ns", "1 µs", "10 µs", "1 ms", "10 s"]);
    }

    #[test]
    fn decades_hold_all_values() {
        assert_eq!(decades([250, 3_000]), (100.0, 10_000.0));
        assert_eq!(decades([0, 100]), (100.0, 1_000.0));
        assert_eq!(decades([]), (100.0, 10_000.0));
        let (low, high) = decades([1, u64::MAX]);
        assert!(low <= 1.0 && high >= u64::MAX as f64);
    }

    #[test]
    fn there_is_a_power_of_ten_around_values() {
        assert_eq!(around([90, 0, 300]), (60.0, 450.0));
        assert_eq!(around([200, 300]), (100.0, 1_000.0));
        assert_eq!(around([]), decades([]));
    }
}
