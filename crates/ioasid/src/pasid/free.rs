//! Which IDs are free: a bitmap under bitmaps.
//!
//! A word of the lowest level says which of 64 IDs are free, a bit of each higher level whether the word below it has any bit.
//! For the 2^20 IDs that PCIe has these are four levels, so the lowest free ID from some ID on is found by looking at eight
//! words at most. A tree of free ranges would be smaller while nothing is allocated, and larger when it matters: with every
//! second ID in use it has half a million nodes, and this still has an eighth of a byte for each ID.

/// The free IDs below some number.
#[derive(Debug)]
pub(super) struct FreeIds {
    /// Lowest first. The last has one word.
    levels: Vec<Box<[u64]>>,
}

const WORD: usize = u64::BITS as usize;

impl FreeIds {
    /// All IDs below `count` are free.
    pub(super) fn new(count: u32) -> FreeIds {
        let mut levels = Vec::new();
        let mut bits = count as usize;
        loop {
            let mut words = vec![u64::MAX; bits.div_ceil(WORD).max(1)].into_boxed_slice();
            let used = bits - (words.len() - 1) * WORD;
            if let Some(last) = words.last_mut().filter(|_| used < WORD) {
                *last = (1 << used) - 1;
            }
            bits = words.len();
            levels.push(words);
            if bits == 1 {
                return FreeIds { levels };
            }
        }
    }

    /// The lowest free ID that is not below `from`.
    pub(super) fn first_from(&self, from: u32) -> Option<u32> {
        let mut at = from as usize;
        for (height, level) in self.levels.iter().enumerate() {
            let word = level.get(at / WORD)? & (u64::MAX << (at % WORD));
            if word != 0 {
                let found = at / WORD * WORD + word.trailing_zeros() as usize;
                let down = self.levels[..height].iter().rev();
                let found =
                    down.fold(found, |found, level| found * WORD + level[found].trailing_zeros() as usize);
                return u32::try_from(found).ok();
            }
            at = at / WORD + 1;
        }
        None
    }

    /// Takes a free ID.
    pub(super) fn take(&mut self, id: u32) {
        let mut at = id as usize;
        for level in &mut self.levels {
            level[at / WORD] &= !(1 << (at % WORD));
            if level[at / WORD] != 0 {
                return;
            }
            at /= WORD;
        }
    }

    /// Gives back an ID that was taken.
    pub(super) fn give_back(&mut self, id: u32) {
        let mut at = id as usize;
        for level in &mut self.levels {
            let others = level[at / WORD];
            level[at / WORD] |= 1 << (at % WORD);
            if others != 0 {
                return;
            }
            at /= WORD;
        }
    }

    /// How many bytes it has.
    pub(super) fn bytes(&self) -> u64 {
        self.levels.iter().map(|level| size_of_val::<[u64]>(level) as u64).sum()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::BTreeSet;

    proptest! {
        /// Against a set, at sizes on both sides of a word and of a level.
        #[test]
        fn the_lowest_is_found(
            count in prop_oneof![1..200u32, 4030..4200u32, Just(1u32 << 20)],
            steps in prop::collection::vec((any::<bool>(), any::<prop::sample::Index>()), 1..200),
        ) {
            let mut free = FreeIds::new(count);
            let mut taken = BTreeSet::new();
            // The first ones go first, so that whole words are used up.
            for id in 0..count.min(130) {
                free.take(id);
                taken.insert(id);
            }
            for (take, index) in steps {
                let from = index.index(count as usize) as u32;
                let expected = (from..count).find(|id| !taken.contains(id));
                prop_assert_eq!(free.first_from(from), expected);
                match expected {
                    Some(id) if take => {
                        free.take(id);
                        taken.insert(id);
                    }
                    _ if taken.remove(&from) => free.give_back(from),
                    _ => {}
                }
            }
            prop_assert_eq!(free.first_from(count), None);
            prop_assert_eq!(free.first_from(u32::MAX), None);
        }
    }

    #[test]
    fn every_id_can_be_taken_and_given_back() {
        let mut free = FreeIds::new(4097);
        for id in 0..4097 {
            assert_eq!(free.first_from(0), Some(id));
            free.take(id);
        }
        assert_eq!(free.first_from(0), None);
        free.give_back(4096);
        assert_eq!(free.first_from(0), Some(4096));
        free.give_back(63);
        assert_eq!((free.first_from(0), free.first_from(64)), (Some(63), Some(4096)));
    }
}
