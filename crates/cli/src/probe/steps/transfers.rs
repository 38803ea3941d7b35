//! What a device does with memory, judged by the bytes.
//!
//! The device has no register for errors, so every check is of this kind: put known bytes where they may come from, other
//! ones where they may go to, transfer, and look. Bytes that must not arrive differ from all that may be there instead:
//! what was there before, and zeros, which some machines deliver for a read that faults.

use super::super::plan::{Area, Plan};
use super::super::report::{Failure, Verdict};
use super::{LOOK_DEEPER, unexpected};
use crate::client::{DmaMemory, Edu};

/// One device that is attached, and the memory behind it.
#[derive(Debug, Clone, Copy)]
pub(super) struct Transfers<'probe> {
    pub(super) memory: &'probe DmaMemory,
    pub(super) edu: &'probe Edu,
    pub(super) plan: &'probe Plan,
    pub(super) name: &'probe str,
}

/// Transfers begin here in an area, so that they cross a page.
const ODD: usize = 100;

/// Bytes that are never zero, and for different seeds (below 125) differ everywhere.
fn pattern(seed: u8) -> Vec<u8> {
    (0..Transfers::LENGTH).map(|index| ((index * 31 + usize::from(seed) * 2) % 251 + 1) as u8).collect()
}

impl Transfers<'_> {
    /// How many bytes a transfer has.
    pub(super) const LENGTH: usize = Edu::LARGEST_TRANSFER;

    fn put(&self, area: Area, at: usize, bytes: &[u8]) -> Result<(), Failure> {
        self.memory.write(area.offset + at, bytes).map_err(unexpected("room in the memory"))
    }

    fn get(&self, area: Area, at: usize, length: usize) -> Result<Vec<u8>, Failure> {
        self.memory.read(area.offset + at, length).map_err(unexpected("room in the memory"))
    }

    /// The bytes at `at` have to be `expected`.
    fn arrived(&self, area: Area, at: usize, expected: &[u8]) -> Result<(), Failure> {
        let found = self.get(area, at, expected.len())?;
        match found.iter().zip(expected).position(|(found, expected)| found != expected) {
            None => Ok(()),
            Some(wrong) => Err(Failure::new(
                format!("{} bytes at IOVA {:#x}", expected.len(), area.iova + at as u64),
                format!("byte {wrong} is {:#04x}, not {:#04x}", found[wrong], expected[wrong]),
                "see whether the IOMMU has logged a fault (`ioasid -vv run`, or `dmesg` on a kernel)",
            )),
        }
    }

    /// Copies between two areas and compares, with a look at the bytes on both sides of the copy.
    fn copies(&self, from: Area, to: Area, seed: u8) -> Result<(u64, u64), Failure> {
        let bytes = pattern(seed);
        let end = to.length as usize - ODD - Self::LENGTH;
        let untouched = pattern(seed + 1);
        self.put(from, ODD, &bytes)?;
        self.put(to, end - 1, &untouched[..1])?;
        self.put(to, end + Self::LENGTH, &untouched[..1])?;
        let (source, target) = (from.iova + ODD as u64, to.iova + end as u64);
        self.edu.copy(source, target, Self::LENGTH).map_err(unexpected("an end of the transfer"))?;
        self.arrived(to, end, &bytes)?;
        self.arrived(to, end - 1, &untouched[..1])?;
        self.arrived(to, end + Self::LENGTH, &untouched[..1])?;
        Ok((source, target))
    }

    /// Copies from the source to the target.
    pub(super) fn copy(&self) -> Verdict<()> {
        let (source, target) = self.copies(self.plan.source, self.plan.target, 1)?;
        Ok(((), format!("{source:#x} to {target:#x}, the bytes are right")))
    }

    /// Reads above 4 GiB. A device that drives fewer address bits must read what is at the address without them.
    pub(super) fn above_4_gib(&self) -> Verdict<()> {
        let far = self.plan.far[0];
        let (high, low) = (pattern(10), pattern(11));
        self.put(far, ODD, &high)?;
        self.put(self.plan.source, ODD, &low)?;
        let iova = far.iova + ODD as u64;
        self.edu
            .copy(iova, self.plan.target.iova, Self::LENGTH)
            .map_err(unexpected("an end of the transfer"))?;
        let found = self.get(self.plan.target, 0, Self::LENGTH)?;
        if found == high {
            Ok(((), format!("the bytes of {iova:#x} are right")))
        } else if found == low {
            let alias = Plan::alias(iova);
            Ok(((), format!("it drives fewer address bits, and so reads {alias:#x} for {iova:#x}")))
        } else {
            let expected = format!("the bytes at {iova:#x}, or those at the same address without high bits");
            Err(Failure::new(expected, "neither", LOOK_DEEPER).into())
        }
    }

    /// Writes to an area that is mapped for reading.
    pub(super) fn read_only(&self) -> Verdict<()> {
        let area = self.plan.read_only;
        let (fixed, other) = (pattern(20), pattern(21));
        self.put(area, 0, &fixed)?;
        self.put(self.plan.source, 0, &other)?;
        self.edu
            .copy(self.plan.source.iova, area.iova, Self::LENGTH)
            .map_err(unexpected("an end of the transfer"))?;
        self.arrived(area, 0, &fixed)?;
        self.edu
            .copy(area.iova, self.plan.target.iova, Self::LENGTH)
            .map_err(unexpected("an end of the transfer"))?;
        self.arrived(self.plan.target, 0, &fixed)?;
        Ok(((), "its bytes have stayed, and can be read".to_owned()))
    }

    /// This device writes, and the other one reads what it has written.
    pub(super) fn relay(&self, other: &Self) -> Verdict<()> {
        let Plan { source, doomed, target, .. } = *self.plan;
        let bytes = pattern(30);
        self.put(source, ODD, &bytes)?;
        let ended = || unexpected("an end of the transfer");
        self.edu.copy(source.iova + ODD as u64, doomed.iova + ODD as u64, Self::LENGTH).map_err(ended())?;
        other.edu.copy(doomed.iova + ODD as u64, target.iova, Self::LENGTH).map_err(ended())?;
        self.arrived(target, 0, &bytes)?;
        Ok(((), format!("{} writes, {} reads", self.name, other.name)))
    }

    /// Neither reads nor writes an area.
    pub(super) fn cannot_reach(&self, area: Area) -> Verdict<()> {
        const ADVICE: &str = "stop using this machine's IOMMU for protection: unmapped memory is reachable";
        let Plan { source, target, .. } = *self.plan;
        let (secret, known) = (pattern(40), pattern(41));
        let ended = || unexpected("an end of the transfer");
        // Something known is in the device's buffer, so that what does not arrive can be told from what was there.
        let before = if area == source { target } else { source };
        self.put(before, 0, &known)?;
        self.edu.fetch(before.iova, Self::LENGTH).map_err(ended())?;

        self.put(area, 0, &secret)?;
        self.edu.store(area.iova, Self::LENGTH).map_err(ended())?;
        if self.get(area, 0, Self::LENGTH)? != secret {
            return Err(Failure::new("the memory unchanged", "the device has written it", ADVICE).into());
        }
        self.edu.fetch(area.iova, Self::LENGTH).map_err(ended())?;
        self.put(target, 0, &pattern(42))?;
        self.edu.store(target.iova, Self::LENGTH).map_err(ended())?;
        if self.get(target, 0, Self::LENGTH)? == secret {
            return Err(Failure::new("no byte of the memory", "the device has read it", ADVICE).into());
        }
        Ok(((), "it neither reads nor writes the memory".to_owned()))
    }

    /// Reads memory at one area's IOVAs, and does not at another's, which had the same memory before.
    pub(super) fn reaches_only(&self, here: Area, not_there: Area) -> Verdict<()> {
        self.copies(here, self.plan.target, 60)?;
        self.cannot_reach(not_there)?;
        Ok(((), format!("not at {:#x}", not_there.iova)))
    }

    /// Copies between the last page before the area that was unmapped and the first page after it.
    pub(super) fn neighbours(&self) -> Verdict<()> {
        let Plan { source, doomed, target, .. } = *self.plan;
        let bytes = pattern(50);
        let last = source.length as usize - Self::LENGTH;
        self.put(source, last, &bytes)?;
        self.edu
            .copy(doomed.iova - Self::LENGTH as u64, target.iova, Self::LENGTH)
            .map_err(unexpected("an end of the transfer"))?;
        self.arrived(target, 0, &bytes)?;
        self.copies(target, source, 51)?;
        Ok(((), format!("to the last byte before and from the first after {:#x}", doomed.iova)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn patterns_have_no_zeros_and_differ_everywhere() {
        for (one, other) in [(1, 2), (10, 11), (40, 41), (40, 42), (50, 52)] {
            let (one, other) = (pattern(one), pattern(other));
            assert!(one.iter().all(|byte| *byte != 0));
            assert!(one.iter().zip(&other).all(|(one, other)| one != other));
        }
    }
}
