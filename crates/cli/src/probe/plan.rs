//! Which memory is mapped where.
//!
//! One piece of memory is cut into eight areas. Four small ones are *near*: adjacent to one another, at IOVAs that a
//! device with few address bits reaches. The rest is four large *far* areas above 4 GiB, adjacent too, and placed so that
//! a device that drops high address bits would meet the first near area instead.
//!
//! ```text
//!   memory   |source|doomed|target|fixed |    far 1    |    far 2    |    far 3    |    far 4    |
//!   IOVA     64 MiB ....................  4 GiB + 64 MiB .......................................
//! ```

use std::str::FromStr;

use crate::client::Access;
use crate::quantity::{Bytes, NotBytes};

const PAGE: u64 = 4096;
const MEBIBYTE: u64 = 1 << 20;

/// The first IOVA of the near areas, in reach of 28 address bits.
const NEAR: u64 = 64 * MEBIBYTE;
/// Where the memory of one of them is mapped anew: behind them, in reach as well.
const MOVED: u64 = 96 * MEBIBYTE;
/// How far above the near areas the far ones begin.
const ALIAS_DISTANCE: u64 = 1 << 32;
/// The largest near area.
const NEAR_LENGTH: u64 = MEBIBYTE;
/// The smallest near area. An unmap needs an inside, and a copy that crosses pages needs two.
const SMALLEST_NEAR: u64 = 2 * PAGE;

/// The memory's alignment: that of a large page, so that IOVA and address agree in all lower bits.
pub(super) const ALIGNMENT: usize = 2 << 20;

/// How much memory is mapped together.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Size(Bytes);

/// Why it cannot be so much.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(super) enum SizeError {
    #[error(transparent)]
    NotBytes(#[from] NotBytes),
    #[error("{0} is not in whole MiB from 1M to 256G")]
    Range(Bytes),
}

impl FromStr for Size {
    type Err = SizeError;

    fn from_str(text: &str) -> Result<Self, SizeError> {
        let bytes: Bytes = text.parse()?;
        let whole = bytes.0 % MEBIBYTE == 0 && (MEBIBYTE..=1 << 38).contains(&bytes.0);
        if whole { Ok(Self(bytes)) } else { Err(SizeError::Range(bytes)) }
    }
}

/// One area: what one call maps.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Area {
    /// Its first byte in the memory.
    pub(super) offset: usize,
    /// Its first IOVA.
    pub(super) iova: u64,
    /// Bytes.
    pub(super) length: u64,
    /// What devices may do with it.
    pub(super) access: Access,
}

impl Area {
    /// The last IOVA.
    pub(super) fn last(&self) -> u64 {
        self.iova + (self.length - 1)
    }
}

/// The areas.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Plan {
    /// The device reads from here.
    pub(super) source: Area,
    /// Adjacent to `source` and `target`, and unmapped while these stay.
    pub(super) doomed: Area,
    /// The device writes here.
    pub(super) target: Area,
    /// The device may only read here.
    pub(super) read_only: Area,
    /// The memory of `doomed` at another IOVA in reach.
    pub(super) moved: Area,
    /// Large ones, above 4 GiB.
    pub(super) far: [Area; 4],
    /// What is mapped in place of `far` if that is more than may be locked.
    pub(super) small_far: Area,
    /// How much this process may have locked, if it is limited.
    pub(super) lock_limit: Option<Bytes>,
}

impl Plan {
    /// A plan for so much memory, in which the near areas fit into the limit on locked memory if they can.
    pub(super) fn new(size: Size, lock_limit: Option<Bytes>) -> Self {
        let Size(Bytes(size)) = size;
        let affordable = lock_limit.map_or(u64::MAX, |limit| limit.0 / 8);
        let near_length = NEAR_LENGTH.min(size / 32).min(affordable);
        let near_length = (near_length - near_length % PAGE).max(SMALLEST_NEAR);
        let near = |number: u64, access| Area {
            offset: (number * near_length) as usize,
            iova: NEAR + number * near_length,
            length: near_length,
            access,
        };
        let far_start = 4 * near_length;
        let quarter = (size - far_start) / 4;
        let quarter = quarter - quarter % PAGE;
        let far = |number: u64| {
            let skipped = number * quarter;
            let length = if number == 3 { size - far_start - skipped } else { quarter };
            let (offset, iova) = ((far_start + skipped) as usize, ALIAS_DISTANCE + NEAR + skipped);
            Area { offset, iova, length, access: Access::ReadWrite }
        };
        Self {
            source: near(0, Access::ReadWrite),
            doomed: near(1, Access::ReadWrite),
            target: near(2, Access::ReadWrite),
            read_only: near(3, Access::Read),
            moved: Area { iova: MOVED, ..near(1, Access::ReadWrite) },
            far: [0, 1, 2, 3].map(far),
            small_far: Area { length: near_length.min(quarter), ..far(0) },
            lock_limit,
        }
    }

    /// All areas, in order of IOVA.
    pub(super) fn areas(&self) -> impl Iterator<Item = Area> + '_ {
        self.near().into_iter().chain(self.far)
    }

    /// The near areas.
    pub(super) fn near(&self) -> [Area; 4] {
        [self.source, self.doomed, self.target, self.read_only]
    }

    /// How much memory all areas have together.
    pub(super) fn size(&self) -> Bytes {
        Bytes(self.areas().map(|area| area.length).sum())
    }

    /// The part of an address that every device of the kind drives, if it drives no more: an IOVA of `far` becomes the
    /// one of `source`.
    pub(super) fn alias(iova: u64) -> u64 {
        iova - ALIAS_DISTANCE
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn size(text: &str) -> Size {
        text.parse().unwrap()
    }

    #[test]
    fn sizes_are_whole_mebibytes_in_range() {
        for good in ["1M", "1G", "1025M", "256G"] {
            assert!(good.parse::<Size>().is_ok(), "{good}");
        }
        for bad in ["0", "512K", "1025K", "257G", "x"] {
            assert!(bad.parse::<Size>().is_err(), "{bad}");
        }
    }

    #[test]
    fn areas_fill_the_memory_and_are_adjacent_within_their_groups() {
        let limits =
            [None, Some(Bytes(0)), Some(Bytes(64 << 10)), Some(Bytes(8 << 20)), Some(Bytes(u64::MAX))];
        for (text, limit) in ["1M", "2M", "33M", "1G", "1023M", "256G"].into_iter().zip(limits.iter().cycle())
        {
            let plan = Plan::new(size(text), *limit);
            let areas: Vec<_> = plan.areas().collect();
            let mut offset = 0;
            for (index, area) in areas.iter().enumerate() {
                assert_eq!(area.offset, offset, "{text}");
                offset += area.length as usize;
                assert!(area.length >= SMALLEST_NEAR && area.length % PAGE == 0, "{text}: {area:?}");
                if index % 4 != 0 {
                    assert_eq!(area.iova, areas[index - 1].last() + 1, "{text}");
                }
            }
            assert_eq!(plan.size(), size(text).0);
            assert!(areas[3].last() < 1 << 28, "in reach of 28 bits");
            assert!(plan.moved.iova > areas[3].last() && plan.moved.last() < 1 << 28);
            assert_eq!(Plan::alias(plan.far[0].iova), plan.source.iova);
            assert!(plan.small_far.length <= plan.far[0].length);
        }
    }

    #[test]
    fn near_areas_fit_into_the_limit_if_they_can() {
        let locked = |limit| {
            let plan = Plan::new(size("1G"), Some(Bytes(limit)));
            plan.near().iter().map(|area| area.length).sum::<u64>() + plan.small_far.length
        };
        assert_eq!(locked(8 << 20), 5 << 20);
        assert!(locked(128 << 10) <= 128 << 10);
    }
}
