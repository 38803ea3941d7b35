//! Small addresses that were just freed, where the next allocation finds them.
//!
//! These are the magazines of Bonwick's vmem, which Linux's IOVA allocator has too. A *magazine* is a stack of up to 32
//! addresses of one size. A *shard* has two for each size: one that is loaded, and another that is full or empty, so
//! that a thread which frees and allocates in turn around the end of a magazine does not exchange magazines all the
//! time. Both full or both empty, it exchanges one with the *depot*, where full magazines wait for whoever allocates:
//! addresses that one thread frees and another one allocates go from one to the other 32 at a time.
//!
//! Each thread has a number, and goes to the shard of that number. There are as many shards as the machine has processors;
//! where two threads meet nevertheless, the one that comes second goes on to another shard. So a shard's lock is
//! almost always free and in the cache of its user. Nothing is kept in thread-local memory but the number, and nothing is
//! lost when a thread ends.
//!
//! Addresses in magazines are stranded: they are free, but no part of a hole. There are never more of them than
//! [`Magazines::most_granules`], and [`Magazines::drain`] gives them back.

use crate::sync::{AtomicUsize, Mutex, MutexGuard, Ordering, PoisonError, TryLockError, global, of_thread};
use std::cell::Cell;
use std::num::NonZero;

/// How many addresses a magazine holds.
const ROUNDS: usize = 32;

/// The sizes that have magazines, in granules.
const SIZES: [u64; 10] = [1, 2, 3, 4, 5, 6, 7, 8, 16, 32];

/// More shards than this strand more than they help.
const MOST_SHARDS: usize = 64;

/// One of the sizes that have magazines.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Class(usize);

impl Class {
    /// The class of a size.
    pub(super) fn of(granules: u64) -> Option<Class> {
        match granules {
            1..=8 => Some(Class(granules as usize - 1)),
            16 => Some(Class(8)),
            32 => Some(Class(9)),
            _ => None,
        }
    }

    /// Its size.
    pub(super) fn granules(self) -> u64 {
        SIZES[self.0]
    }
}

type Magazine = Vec<u64>;

#[derive(Debug, Default)]
struct Pair {
    loaded: Magazine,
    /// Full or empty.
    previous: Magazine,
}

/// The magazines of those threads that come to the same place. Two shards share no cache line, nor a pair of them that
/// processors fetch together.
#[derive(Debug, Default)]
#[repr(align(128))]
struct Shard(Mutex<[Pair; SIZES.len()]>);

#[derive(Debug, Default)]
struct Depot {
    full: [Vec<Magazine>; SIZES.len()],
    empty: Vec<Magazine>,
}

/// All magazines of an allocator.
#[derive(Debug)]
pub(super) struct Magazines {
    shards: Box<[Shard]>,
    depot: Mutex<Depot>,
}

/// A shard while its lock is held.
pub(super) struct Loaded<'a> {
    pairs: MutexGuard<'a, [Pair; SIZES.len()]>,
    magazines: &'a Magazines,
}

global! {
    static THREADS: AtomicUsize = AtomicUsize::new(0);
}

of_thread! {
    /// The shard that the thread goes to first; more than all until it has one.
    static HOME: Cell<usize> = Cell::new(usize::MAX);
}

fn home() -> usize {
    // A thread that has lost its locals already is as good as a new one.
    HOME.try_with(|home| {
        if home.get() == usize::MAX {
            home.set(THREADS.fetch_add(1, Ordering::Relaxed) % MOST_SHARDS);
        }
        home.get()
    })
    .unwrap_or(0)
}

impl Magazines {
    /// With as many shards as the machine has processors.
    pub(super) fn new() -> Magazines {
        Magazines::with_shards(std::thread::available_parallelism().map_or(1, NonZero::get))
    }

    pub(super) fn with_shards(count: usize) -> Magazines {
        let count = count.clamp(1, MOST_SHARDS);
        Magazines { shards: (0..count).map(|_| Shard::default()).collect(), depot: Mutex::default() }
    }

    /// A shard that nobody else is using, the thread's own if possible.
    pub(super) fn load(&self) -> Loaded<'_> {
        let home = home();
        let count = self.shards.len();
        let free = (0..count).find_map(|next| match self.shards[(home + next) % count].0.try_lock() {
            Ok(pairs) => Some(pairs),
            Err(TryLockError::Poisoned(poisoned)) => Some(poisoned.into_inner()),
            Err(TryLockError::WouldBlock) => None,
        });
        let pairs = free.unwrap_or_else(|| lock(&self.shards[home % count].0));
        Loaded { pairs, magazines: self }
    }

    /// Takes every address out of every magazine. What others put in meanwhile may stay.
    pub(super) fn drain(&self, mut give_back: impl FnMut(Class, u64)) {
        let mut empty = |class: usize, magazine: &mut Magazine| {
            magazine.drain(..).for_each(|address| give_back(Class(class), address));
        };
        for shard in &self.shards {
            for (class, pair) in lock(&shard.0).iter_mut().enumerate() {
                empty(class, &mut pair.loaded);
                empty(class, &mut pair.previous);
            }
        }
        let full = std::mem::take(&mut lock(&self.depot).full);
        for (class, mut magazines) in full.into_iter().enumerate() {
            magazines.iter_mut().for_each(|magazine| empty(class, magazine));
        }
    }

    /// How many granules are in magazines, counted one shard after the other.
    pub(super) fn granules(&self) -> u64 {
        let count = |(class, addresses): (usize, usize)| SIZES[class] * addresses as u64;
        let shards = self.shards.iter().map(|shard| {
            let pairs = lock(&shard.0);
            let sizes = pairs.iter().map(|pair| pair.loaded.len() + pair.previous.len());
            sizes.enumerate().map(count).sum::<u64>()
        });
        let in_shards = shards.sum::<u64>();
        let depot = lock(&self.depot);
        let sizes = depot.full.iter().map(|magazines| magazines.iter().map(Vec::len).sum());
        in_shards + sizes.enumerate().map(count).sum::<u64>()
    }

    /// How many granules there can be in magazines: of each size, two magazines in each shard and one more in the depot
    /// for each shard.
    pub(super) fn most_granules(&self) -> u64 {
        (self.shards.len() * 3 * ROUNDS) as u64 * SIZES.iter().sum::<u64>()
    }
}

impl Loaded<'_> {
    /// The address of this size that was freed last, if it is a multiple of `alignment`.
    pub(super) fn pop(&mut self, class: Class, alignment: u64) -> Option<u64> {
        let pair = &mut self.pairs[class.0];
        if pair.loaded.is_empty() {
            std::mem::swap(&mut pair.loaded, &mut pair.previous);
        }
        if pair.loaded.is_empty() {
            let mut depot = lock(&self.magazines.depot);
            let full = depot.full[class.0].pop()?;
            depot.empty.push(std::mem::replace(&mut pair.loaded, full));
        }
        let aligned = pair.loaded.last()? & (alignment - 1) == 0;
        if aligned { pair.loaded.pop() } else { None }
    }

    /// Keeps an address; whether there was room.
    pub(super) fn push(&mut self, class: Class, address: u64) -> bool {
        let pair = &mut self.pairs[class.0];
        if pair.loaded.len() == ROUNDS {
            if !pair.previous.is_empty() {
                let mut depot = lock(&self.magazines.depot);
                if depot.full[class.0].len() == self.magazines.shards.len() {
                    return false;
                }
                let empty = depot.empty.pop().unwrap_or_default();
                depot.full[class.0].push(std::mem::replace(&mut pair.previous, empty));
            }
            std::mem::swap(&mut pair.loaded, &mut pair.previous);
        }
        if pair.loaded.capacity() == 0 {
            pair.loaded.reserve_exact(ROUNDS);
        }
        pair.loaded.push(address);
        true
    }
}

/// A panic elsewhere leaves magazines that are as good as ever.
pub(super) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_freed_last_comes_first_until_all_have_come() {
        let magazines = Magazines::with_shards(1);
        let one = Class::of(1).unwrap();
        let mut shard = magazines.load();
        // Two magazines in the shard, one in the depot.
        for address in 0..96 {
            assert!(shard.push(one, address));
        }
        assert!(!shard.push(one, 96));
        let mut seen: Vec<u64> = Vec::new();
        seen.extend(std::iter::from_fn(|| shard.pop(one, 1)));
        assert!(seen[..64].iter().copied().eq((32..96).rev()));
        seen.sort_unstable();
        assert!(seen.into_iter().eq(0..96));
        // Around the end of a magazine nothing goes to the depot and back.
        for address in 0..33 {
            assert!(shard.push(one, address));
        }
        for _ in 0..10 {
            assert_eq!((shard.pop(one, 1), shard.pop(one, 1)), (Some(32), Some(31)));
            assert!(shard.push(one, 31) && shard.push(one, 32));
        }
        assert!(lock(&magazines.depot).full.iter().all(Vec::is_empty));
    }

    #[test]
    fn sizes_do_not_mix_and_alignment_is_kept() {
        let magazines = Magazines::with_shards(2);
        let (three, four) = (Class::of(3).unwrap(), Class::of(4).unwrap());
        let mut shard = magazines.load();
        assert!(shard.push(three, 0x3000) && shard.push(four, 0x4000) && shard.push(four, 0x6000));
        assert_eq!(shard.pop(three, 0x4000), None);
        assert_eq!(shard.pop(four, 0x4000), None);
        assert_eq!(shard.pop(four, 0x2000), Some(0x6000));
        assert_eq!(shard.pop(four, 0x4000), Some(0x4000));
        drop(shard);
        assert_eq!(magazines.granules(), 3);
        let mut left = Vec::new();
        magazines.drain(|class, address| left.push((class.granules(), address)));
        assert_eq!(left, [(3, 0x3000)]);
        assert_eq!(magazines.granules(), 0);
        let sizes: Vec<u64> = (0..100).filter_map(|size| Class::of(size).map(Class::granules)).collect();
        assert_eq!(sizes, SIZES);
        assert!(Class::of(1 << 32 | 1).is_none());
    }

    #[test]
    fn never_more_than_the_bound() {
        let magazines = Magazines::with_shards(3);
        let mut shards = [magazines.load(), magazines.load(), magazines.load()];
        for shard in &mut shards {
            for size in SIZES {
                let class = Class::of(size).unwrap();
                while shard.push(class, 0) {}
            }
        }
        drop(shards);
        assert_eq!(magazines.granules(), magazines.most_granules());
    }

    #[test]
    fn a_thread_that_finds_its_shard_in_use_takes_another() {
        let magazines = Magazines::with_shards(2);
        let mut first = magazines.load();
        assert!(first.push(Class(0), 1));
        let mut second = magazines.load();
        assert_eq!(second.pop(Class(0), 1), None);
        drop(first);
        drop(second);
        assert_eq!(magazines.load().pop(Class(0), 1), Some(1));
    }
}
