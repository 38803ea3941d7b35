//! What happened when, in a bounded number of pieces, however long the recording.
//!
//! Time begins at 0 and is cut into pieces of equal length, a power of two. What happens goes to the piece of its time. An event
//! that would need more pieces than there may be makes all of them twice as long: neighbours become one, and what they
//! hold is added up. So nobody has to know beforehand how long a recording is, nothing is thrown away but when exactly something
//! happened, and because lengths are powers of two, timelines of several threads fit into each other.

/// Pieces are never shorter than 1024 ns. Where there is less to look at, one piece is enough.
const SHORTEST_BITS: u32 = 10;

/// What a piece of a timeline holds.
pub(crate) trait Content: Default {
    /// Adds what happened in a piece that is not earlier.
    fn add(&mut self, later: Self);
}

/// Pieces of time, from 0 on.
#[derive(Clone, Debug)]
pub(crate) struct Timeline<C> {
    most: usize,
    /// The length of a piece is 2 to this power, in nanoseconds.
    bits: u32,
    pieces: Vec<C>,
}

impl<C: Content> Timeline<C> {
    /// Nothing has happened, and there will be at most so many pieces: at least two.
    pub(crate) fn new(most: usize) -> Timeline<C> {
        Timeline { most: most.max(2), bits: SHORTEST_BITS, pieces: Vec::new() }
    }

    /// The piece of a time in nanoseconds.
    pub(crate) fn at(&mut self, time: u64) -> &mut C {
        // At the latest with pieces of 2^63 ns there are two of them.
        while time >> self.bits >= self.most as u64 {
            self.double();
        }
        let index = (time >> self.bits) as usize;
        if index >= self.pieces.len() {
            self.pieces.resize_with(index + 1, C::default);
        }
        &mut self.pieces[index]
    }

    /// Makes pieces twice as long.
    fn double(&mut self) {
        let mut pieces = std::mem::take(&mut self.pieces).into_iter();
        self.pieces.reserve(pieces.len().div_ceil(2));
        while let Some(mut piece) = pieces.next() {
            if let Some(later) = pieces.next() {
                piece.add(later);
            }
            self.pieces.push(piece);
        }
        self.bits += 1;
    }

    /// Adds another timeline, as if what it has seen had been seen here.
    pub(crate) fn add(&mut self, mut other: Timeline<C>) {
        while self.bits < other.bits {
            self.double();
        }
        while other.bits < self.bits {
            other.double();
        }
        let mut others = other.pieces.into_iter();
        for (piece, other) in self.pieces.iter_mut().zip(others.by_ref()) {
            piece.add(other);
        }
        self.pieces.extend(others);
        while self.pieces.len() > self.most {
            self.double();
        }
    }

    /// How many nanoseconds a piece is long.
    pub(crate) fn piece_nanoseconds(&self) -> u64 {
        1 << self.bits
    }

    /// The pieces up to the last in which something happened, each with the time at which it begins.
    pub(crate) fn pieces(&self) -> impl Iterator<Item = (u64, &C)> {
        self.pieces.iter().zip(0u64..).map(|(piece, index)| (index << self.bits, piece))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::collection::vec;
    use proptest::prelude::*;
    use std::collections::BTreeMap;

    /// Everything that happened, in order.
    #[derive(Clone, Debug, Default, PartialEq)]
    struct All(Vec<(u64, u32)>);

    impl Content for All {
        fn add(&mut self, later: All) {
            self.0.extend(later.0);
        }
    }

    /// Times of every magnitude, up to the last nanosecond.
    fn times() -> impl Strategy<Value = u64> {
        (0u32..64, any::<u64>()).prop_map(|(bits, time)| time >> bits)
    }

    fn sorted(mut all: Vec<(u64, u32)>) -> Vec<(u64, u32)> {
        all.sort_unstable();
        all
    }

    proptest! {
        /// A plain model has all events in a list and sorts them into pieces at the end, when the longest time is known.
        #[test]
        fn what_happened_is_in_the_piece_of_its_time(
            events in vec((times(), 0usize..4), 0..80),
            most in 2usize..20,
        ) {
            let mut timelines: Vec<_> = (0..4).map(|_| Timeline::<All>::new(most)).collect();
            for (number, &(time, thread)) in (0..).zip(&events) {
                timelines[thread].at(time).0.push((time, number));
            }
            let mut whole = Timeline::<All>::new(most);
            timelines.into_iter().for_each(|timeline| whole.add(timeline));

            let longest = events.iter().map(|(time, _)| *time).max().unwrap_or(0);
            let length = (10..64).map(|bits| 1u64 << bits).find(|length| longest / length < most as u64).unwrap();
            let mut model = BTreeMap::<u64, Vec<(u64, u32)>>::new();
            for (number, &(time, _)) in (0..).zip(&events) {
                model.entry(time / length * length).or_default().push((time, number));
            }
            prop_assert_eq!(whole.piece_nanoseconds(), length);
            prop_assert!(whole.pieces().count() <= most);
            let found = whole.pieces().filter(|(_, piece)| !piece.0.is_empty());
            let found: BTreeMap<_, _> = found.map(|(begin, piece)| (begin, sorted(piece.0.clone()))).collect();
            let model: BTreeMap<_, _> = model.into_iter().map(|(begin, piece)| (begin, sorted(piece))).collect();
            prop_assert_eq!(found, model);
        }

        /// In one thread's timeline, what came first comes first.
        #[test]
        fn what_is_added_up_keeps_its_order(mut events in vec(times(), 1..80), most in 2usize..9) {
            events.sort_unstable();
            let mut timeline = Timeline::<All>::new(most);
            for (number, &time) in (0..).zip(&events) {
                timeline.at(time).0.push((time, number));
            }
            let found: Vec<_> = timeline.pieces().flat_map(|(_, piece)| piece.0.clone()).collect();
            let expected: Vec<_> = events.into_iter().zip(0..).collect();
            prop_assert_eq!(found, expected);
        }
    }
}
