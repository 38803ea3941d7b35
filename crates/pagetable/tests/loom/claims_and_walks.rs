//! Claims, cuts and walks beside each other, and walks beside what retires their tables.

use crate::fixture::*;
use ioasid_pagetable::{CachedWalk, Gather, Oa, RetractError, SharedWalk};
use loom::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::Arc;

/// Of two overlapping claims exactly one wins, and the loser leaves nothing behind.
#[test]
fn overlapping_claims() {
    check(|| {
        let (radix, memory) = table(2);
        let other = spawn(&radix, |radix| {
            let mut gather = Gather::new();
            (claim(radix, pages(1, 2), HIGH + 0x1000, &mut gather), gather)
        });
        let mut gather = Gather::new();
        let mine = claim(&radix, pages(0, 2), MISALIGNED, &mut gather);
        let (theirs, other) = other.join().unwrap();
        assert!(mine ^ theirs, "{mine} {theirs}");
        assert_eq!(leaves(&radix), if mine { [(0, 1), (1, 1)] } else { [(1, 1), (2, 1)] });
        finish(radix, &memory, [gather, other]);
    });
}

/// One wants a large leaf, the other a page of it.
#[test]
fn large_claim_against_small() {
    check(|| {
        let (radix, memory) = table(2);
        let other = spawn(&radix, |radix| {
            let mut gather = Gather::new();
            (claim(radix, pages(2, 1), HIGH, &mut gather), gather)
        });
        let mut gather = Gather::new();
        let mine = claim(&radix, pages(0, 4), LOW, &mut gather);
        let (theirs, other) = other.join().unwrap();
        assert!(mine ^ theirs, "{mine} {theirs}");
        radix.publish(if mine { pages(0, 4) } else { pages(2, 1) });
        assert_eq!(output(&radix, 2), Some(if mine { LOW + 0x2000 } else { HIGH }));
        assert_eq!(output(&radix, 3), mine.then_some(LOW + 0x3000));
        finish(radix, &memory, [gather, other]);
    });
}

/// An empty table is in the way of a large leaf, and another claim is about to use it.
#[test]
fn large_claim_retires_what_another_claims_in() {
    check(|| {
        let (radix, memory) = table(2);
        map(&radix, pages(0, 1), LOW);
        radix.unmap(pages(0, 1), &mut Gather::new()).unwrap();
        assert_eq!(memory.tables(), 2, "the empty table is kept");
        let other = spawn(&radix, |radix| {
            let mut gather = Gather::new();
            (claim_and_publish(radix, pages(1, 1), HIGH, &mut gather), gather)
        });
        let walker = spawn(&radix, |radix| output(radix, 1));
        let mut gather = Gather::new();
        let mine = claim_and_publish(&radix, pages(0, 4), LOW, &mut gather);
        let (theirs, other) = other.join().unwrap();
        let seen = walker.join().unwrap();
        assert!(mine ^ theirs, "{mine} {theirs}");
        let now = output(&radix, 1);
        assert_eq!(now, Some(if mine { LOW + 0x1000 } else { HIGH }));
        assert!(seen.is_none() || seen == now, "{seen:x?}");
        finish(radix, &memory, [gather, other]);
    });
}

/// A release empties a whole table and retires it, while another claims a page that has just come free.
#[test]
fn release_retires_what_another_claims_in() {
    check(|| {
        let (radix, memory) = table(2);
        map(&radix, pages(0, 4), MISALIGNED);
        radix.retract(pages(0, 4), &mut Gather::new()).unwrap();
        let other = spawn(&radix, |radix| {
            let mut gather = Gather::new();
            (claim_and_publish(radix, pages(0, 1), HIGH, &mut gather), gather)
        });
        let mut gather = Gather::new();
        radix.release(pages(0, 4), &mut gather);
        let seen = output(&radix, 0);
        let (theirs, other) = other.join().unwrap();
        assert_eq!(output(&radix, 0), theirs.then_some(HIGH));
        assert!(seen.is_none() || theirs && seen == Some(HIGH), "{seen:x?}");
        assert_eq!(leaves(&radix).len(), usize::from(theirs));
        finish(radix, &memory, [gather, other]);
    });
}

/// The same in exclusive mode, with the ranges apart and a walker beside.
#[test]
fn neighbours_in_one_table() {
    check(|| {
        let (radix, memory) = table(2);
        map(&radix, pages(0, 1), LOW);
        let unmapper = spawn(&radix, |radix| {
            let mut gather = Gather::new();
            radix.unmap(pages(0, 1), &mut gather).unwrap();
            gather
        });
        let walker = spawn(&radix, |radix| {
            let first = output(radix, 1);
            (first, output(radix, 1))
        });
        map(&radix, pages(1, 1), HIGH);
        assert_eq!(output(&radix, 1), Some(HIGH));
        let gather = unmapper.join().unwrap();
        let (first, second) = walker.join().unwrap();
        assert!([first, second].iter().all(|seen| seen.is_none_or(|oa| oa == HIGH)));
        assert!(first.is_none() || second.is_some(), "seen once, it stays");
        assert_eq!((output(&radix, 0), output(&radix, 1)), (None, Some(HIGH)));
        finish(radix, &memory, [gather]);
    });
}

/// Both cuts of one leaf get their boundary, and nothing else changes.
#[test]
fn cut_against_cut() {
    check(|| {
        let (radix, memory) = table(3);
        map(&radix, pages(16, 16), LOW);
        assert_eq!(leaves(&radix), [(16, 16)]);
        let other = spawn(&radix, |radix| radix.cut(17 << 12, &mut Gather::new()).unwrap());
        let walker = spawn(&radix, |radix| output(radix, 21));
        radix.cut(24 << 12, &mut Gather::new()).unwrap();
        other.join().unwrap();
        assert_eq!(walker.join().unwrap(), Some(LOW + 0x5000));
        assert_eq!(leaves(&radix), [(16, 1), (17, 1), (18, 1), (19, 1), (20, 4), (24, 4), (28, 4)]);
        assert!((0..16).all(|page| output(&radix, 16 + page) == Some(LOW + (page << 12))));
        finish(radix, &memory, []);
    });
}

/// Two unmaps cut their parts out of one leaf; a walker between them sees no gap.
#[test]
fn unmaps_cut_the_same_leaf() {
    check(|| {
        let (radix, memory) = table(2);
        map(&radix, pages(0, 4), LOW);
        let other = spawn(&radix, |radix| {
            let mut gather = Gather::new();
            radix.unmap(pages(0, 1), &mut gather).unwrap();
            gather
        });
        let walker = spawn(&radix, |radix| output(radix, 2));
        let mut gather = Gather::new();
        radix.unmap(pages(3, 1), &mut gather).unwrap();
        let other = other.join().unwrap();
        assert_eq!(walker.join().unwrap(), Some(LOW + 0x2000));
        assert_eq!(leaves(&radix), [(1, 1), (2, 1)]);
        assert_eq!((gather.runs.bytes(), other.runs.bytes()), (0x1000, 0x1000));
        finish(radix, &memory, [gather, other]);
    });
}

/// Somebody who has the second half of a leaf may cut it while the first half is unmapped.
#[test]
fn cut_against_unmap() {
    check(|| {
        let (radix, memory) = table(2);
        map(&radix, pages(0, 4), LOW);
        let other = spawn(&radix, |radix| {
            radix.cut(2 << 12, &mut Gather::new()).unwrap();
            radix.cut(3 << 12, &mut Gather::new()).unwrap();
        });
        let mut gather = Gather::new();
        radix.unmap(pages(0, 2), &mut gather).unwrap();
        other.join().unwrap();
        assert_eq!(leaves(&radix), [(2, 1), (3, 1)]);
        assert_eq!(gather.runs.iter().collect::<Vec<_>>(), [pages(0, 2)]);
        finish(radix, &memory, [gather]);
    });
}

/// In claiming mode the owner of a leaf is not cut under, and the other is told.
#[test]
fn retract_against_partial_retract() {
    check(|| {
        let (radix, memory) = table(2);
        map(&radix, pages(0, 4), LOW);
        let other = spawn(&radix, |radix| {
            let mut gather = Gather::new();
            (radix.retract(pages(1, 1), &mut gather), gather)
        });
        let mut gather = Gather::new();
        let mine = radix.retract(pages(0, 4), &mut gather);
        let (theirs, other) = other.join().unwrap();
        match (mine, theirs) {
            (Ok(()), Err(RetractError::Contended { at: 0x1000 })) => {
                assert_eq!((gather.runs.bytes(), other.runs.bytes()), (0x4000, 0));
            }
            (Err(RetractError::Contended { at: 0x1000 }), Ok(())) => {
                assert_eq!((gather.runs.bytes(), other.runs.bytes()), (0x1000, 0x1000));
            }
            results => panic!("{results:?}"),
        }
        assert_eq!(output(&radix, 1), None);
        finish(radix, &memory, [gather, other]);
    });
}

/// A leaf is held for copying or it is unmapped, never both.
#[test]
fn hold_against_retract() {
    check(|| {
        let (radix, memory) = table(2);
        map(&radix, pages(0, 1), LOW);
        let other = spawn(&radix, |radix| {
            let held = radix.hold(pages(0, 4));
            if let Ok(Some(leaf)) = held {
                assert_eq!(output(radix, 0), Some(LOW), "a held leaf translates");
                radix.let_go(&leaf);
            }
            held
        });
        let mut gather = Gather::new();
        let retracted = radix.retract(pages(0, 1), &mut gather);
        let held = other.join().unwrap();
        match (held.unwrap(), retracted) {
            (Some(_), Err(RetractError::Contended { at: 0 })) => assert_eq!(output(&radix, 0), Some(LOW)),
            (Some(_) | None, Ok(())) => assert_eq!(output(&radix, 0), None),
            results => panic!("{results:?}"),
        }
        finish(radix, &memory, [gather]);
    });
}

/// A walker sees a claimed leaf not at all until it is published, and then whole.
#[test]
fn publish_against_walker() {
    check(|| {
        let (radix, memory) = table(2);
        let walker = spawn(&radix, |radix| {
            // `output` checks the permissions.
            let second = output(radix, 1);
            (output(radix, 0), second)
        });
        let mut gather = Gather::new();
        assert!(claim(&radix, pages(0, 2), MISALIGNED, &mut gather));
        radix.publish(pages(0, 2));
        let (first, second) = walker.join().unwrap();
        assert!(first.is_none_or(|oa| oa == MISALIGNED));
        assert!(second.is_none_or(|oa| oa == MISALIGNED + 0x1000));
        assert!(second.is_none() || first.is_some(), "leaves are published in ascending order");
        finish(radix, &memory, [gather]);
    });
}

/// What is rolled back was never seen.
#[test]
fn a_released_claim_is_never_seen() {
    check(|| {
        let (radix, memory) = table(2);
        map(&radix, pages(2, 1), LOW);
        let walker = spawn(&radix, |radix| (output(radix, 0), output(radix, 2)));
        let mut gather = Gather::new();
        assert!(radix.claim(pages(0, 3), Oa::new(MISALIGNED), READ_WRITE, &mut gather).is_err());
        assert!(claim(&radix, pages(0, 2), HIGH, &mut gather));
        radix.release(pages(0, 2), &mut gather);
        assert_eq!(walker.join().unwrap(), (None, Some(LOW)));
        assert_eq!(leaves(&radix), [(2, 1)]);
        finish(radix, &memory, [gather]);
    });
}

/// Two claims make the first root at different levels.
#[test]
fn root_growth_against_claim() {
    check(|| {
        let (radix, memory) = table(3);
        let other = spawn(&radix, |radix| {
            let mut gather = Gather::new();
            assert!(claim(radix, pages(20, 1), HIGH, &mut gather));
            radix.publish(pages(20, 1));
            gather
        });
        let mut gather = Gather::new();
        assert!(claim(&radix, pages(1, 1), LOW, &mut gather));
        radix.publish(pages(1, 1));
        assert_eq!(output(&radix, 1), Some(LOW));
        let other = other.join().unwrap();
        assert_eq!((output(&radix, 1), output(&radix, 20)), (Some(LOW), Some(HIGH)));
        finish(radix, &memory, [gather, other]);
    });
}

/// A root grows over a table in which others are at work.
#[test]
fn root_growth_over_running_operations() {
    check(|| {
        let (radix, memory) = table(3);
        map(&radix, pages(0, 1), LOW);
        let other = spawn(&radix, |radix| map(radix, pages(20, 1), HIGH));
        let walker = spawn(&radix, |radix| output(radix, 0));
        map(&radix, pages(1, 1), HIGH + 0x1000);
        other.join().unwrap();
        assert_eq!(walker.join().unwrap(), Some(LOW));
        assert_eq!(leaves(&radix), [(0, 1), (1, 1), (20, 1)]);
        finish(radix, &memory, []);
    });
}

/// A table is retired under a remembered walk. What is mapped afterwards is found, as soon as its mapper says so.
#[test]
fn cached_walk_against_retirement() {
    check(|| {
        let (radix, memory) = table(2);
        map(&radix, pages(0, 1), LOW);
        let mut cache = CachedWalk::new();
        assert_eq!(output_cached(&radix, 0, &mut cache), Some(LOW));
        let mapped = Arc::new(AtomicBool::new(false));
        let walker = {
            let mapped = Arc::clone(&mapped);
            spawn(&radix, move |radix| {
                let mapped = mapped.load(Ordering::Acquire);
                let seen = output_cached(radix, 0, &mut cache);
                if mapped {
                    assert_eq!(seen, Some(HIGH));
                }
                assert!(seen.is_none_or(|oa| oa == LOW || oa == HIGH));
                cache
            })
        };
        let mut gather = Gather::new();
        radix.unmap(pages(0, 4), &mut gather).unwrap();
        assert_eq!(gather.retired.len(), 1);
        map(&radix, pages(0, 1), HIGH);
        mapped.store(true, Ordering::Release);
        let mut cache = walker.join().unwrap();
        for retired in gather.retired.drain(..) {
            // SAFETY: the only walk beside has ended.
            unsafe { retired.free() };
        }
        assert_eq!(output_cached(&radix, 0, &mut cache), Some(HIGH));
        finish(radix, &memory, []);
    });
}

/// By the shared way if it leads there, and otherwise from the root; then the way is remembered.
fn output_shared(radix: &Table, page: u64, way: &SharedWalk<AtomicU64>) -> Option<u64> {
    let needed = READ_WRITE;
    if let Some((oa, _)) = radix.translate_remembered(page << 12, 1, needed, None, std::slice::from_ref(way))
    {
        return Some(oa.get());
    }
    let mut walk = CachedWalk::new();
    let seen = output_cached(radix, page, &mut walk);
    radix.remember(page << 12, &walk, way);
    seen
}

/// Three threads use one remembered way for two tables. Nobody takes the address of one for the other.
#[test]
fn shared_walk_of_two_tables() {
    check(|| {
        let (radix, memory) = table(2);
        map(&radix, pages(0, 1), LOW);
        map(&radix, pages(4, 1), HIGH);
        let way = Arc::new(SharedWalk::new());
        assert_eq!(output_shared(&radix, 0, &way), Some(LOW));
        let other = {
            let way = Arc::clone(&way);
            spawn(&radix, move |radix| assert_eq!(output_shared(radix, 4, &way), Some(HIGH)))
        };
        let walker = {
            let way = Arc::clone(&way);
            spawn(&radix, move |radix| {
                assert_eq!(output_shared(radix, 0, &way), Some(LOW));
            })
        };
        other.join().unwrap();
        walker.join().unwrap();
        assert_eq!(output_shared(&radix, 4, &way), Some(HIGH));
        finish(radix, &memory, []);
    });
}

/// As `cached_walk_against_retirement`, by a way that both threads know.
#[test]
fn shared_walk_against_retirement() {
    check(|| {
        let (radix, memory) = table(2);
        map(&radix, pages(0, 1), LOW);
        let way = Arc::new(SharedWalk::new());
        assert_eq!(output_shared(&radix, 0, &way), Some(LOW));
        let mapped = Arc::new(AtomicBool::new(false));
        let walker = {
            let (way, mapped) = (Arc::clone(&way), Arc::clone(&mapped));
            spawn(&radix, move |radix| {
                let mapped = mapped.load(Ordering::Acquire);
                let seen = output_shared(radix, 0, &way);
                assert!(seen == Some(HIGH) || !mapped && seen.is_none_or(|oa| oa == LOW));
            })
        };
        let mut gather = Gather::new();
        radix.unmap(pages(0, 4), &mut gather).unwrap();
        map(&radix, pages(0, 1), HIGH);
        mapped.store(true, Ordering::Release);
        walker.join().unwrap();
        for retired in gather.retired.drain(..) {
            // SAFETY: the only walk beside has ended.
            unsafe { retired.free() };
        }
        assert_eq!(output_shared(&radix, 0, &way), Some(HIGH));
        finish(radix, &memory, []);
    });
}

/// Two retirements at a time: the number of the one must not vouch for a table that the other one took.
#[test]
fn cached_walk_against_two_retirements() {
    check(|| {
        let (radix, memory) = table(2);
        map(&radix, pages(0, 1), LOW);
        map(&radix, pages(4, 1), HIGH);
        let walker = spawn(&radix, |radix| {
            let mut cache = CachedWalk::new();
            let seen = output_cached(radix, 0, &mut cache);
            assert!(seen.is_none_or(|oa| oa == LOW));
            cache
        });
        let other = spawn(&radix, |radix| {
            let mut gather = Gather::new();
            radix.unmap(pages(0, 4), &mut gather).unwrap();
            gather
        });
        let mut gather = Gather::new();
        radix.unmap(pages(4, 4), &mut gather).unwrap();
        let mut cache = walker.join().unwrap();
        for retired in gather.retired.drain(..).chain(other.join().unwrap().retired) {
            // SAFETY: the only walk beside has ended.
            unsafe { retired.free() };
        }
        assert_eq!(output_cached(&radix, 0, &mut cache), None);
        finish(radix, &memory, []);
    });
}

/// A table is unlinked and has not changed the generation yet when somebody maps at its place. A walker who is told
/// of the mapping may still remember the old table, and must not believe its emptiness.
#[test]
fn cached_walk_between_unlinking_and_generation() {
    check(|| {
        let (radix, memory) = table(2);
        map(&radix, pages(0, 4), MISALIGNED);
        let mut cache = CachedWalk::new();
        assert_eq!(output_cached(&radix, 0, &mut cache), Some(MISALIGNED));
        radix.retract(pages(0, 4), &mut Gather::new()).unwrap();
        let mapped = Arc::new(AtomicBool::new(false));
        let mapper = {
            let mapped = Arc::clone(&mapped);
            spawn(&radix, move |radix| {
                let mut gather = Gather::new();
                let won = claim_and_publish(radix, pages(0, 1), HIGH, &mut gather);
                mapped.store(won, Ordering::Release);
                (won, gather)
            })
        };
        let walker = spawn(&radix, move |radix| {
            let mapped = mapped.load(Ordering::Acquire);
            let seen = output_cached(radix, 0, &mut cache);
            assert!(!mapped || seen == Some(HIGH));
            assert!(seen.is_none_or(|oa| oa == HIGH));
            cache
        });
        let mut gather = Gather::new();
        radix.release(pages(0, 4), &mut gather);
        let (won, other) = mapper.join().unwrap();
        let mut cache = walker.join().unwrap();
        for retired in gather.retired.drain(..).chain(other.retired) {
            // SAFETY: the only walk beside has ended.
            unsafe { retired.free() };
        }
        assert_eq!(output_cached(&radix, 0, &mut cache), won.then_some(HIGH));
        finish(radix, &memory, []);
    });
}
