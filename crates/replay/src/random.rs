//! Random numbers that a seed brings back.

/// A sequence of numbers: SplitMix64, by Steele, Lea and Flood.
#[derive(Clone, Debug)]
pub(crate) struct Random(u64);

impl Random {
    pub(crate) fn new(seed: u64) -> Random {
        Random(seed)
    }

    /// Another sequence, which has nothing to do with this one.
    pub(crate) fn fork(seed: u64, number: u64) -> Random {
        Random(Random(seed).next().wrapping_add(Random(!number).next()))
    }

    pub(crate) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mixed = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }

    /// A number below a bound, which is not 0.
    pub(crate) fn below(&mut self, bound: u64) -> u64 {
        ((u128::from(self.next()) * u128::from(bound)) >> 64) as u64
    }

    /// True one time in so many.
    pub(crate) fn one_in(&mut self, times: u64) -> bool {
        self.below(times) == 0
    }

    pub(crate) fn choose<'a, T>(&mut self, from: &'a [T]) -> Option<&'a T> {
        let bound = (from.len() as u64).max(1);
        from.get(self.below(bound) as usize)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_seed_brings_the_same_back_and_another_does_not() {
        let numbers = |mut random: Random| (0..100).map(|_| random.below(1000)).collect::<Vec<_>>();
        assert_eq!(numbers(Random::new(7)), numbers(Random::new(7)));
        assert_ne!(numbers(Random::fork(7, 0)), numbers(Random::fork(7, 1)));
        assert!(numbers(Random::new(1)).iter().all(|number| *number < 1000));
        assert!(numbers(Random::new(1)).iter().any(|number| *number > 900));
        assert_eq!(Random::new(3).choose(&[0u8; 0]), None);
    }
}
