//! Empty tables that go while others fill, link or empty something in them.

use crate::fixture::*;
use ioasid_pagetable::{CachedWalk, Gather};
use loom::sync::atomic::{AtomicBool, Ordering};
use std::sync::Arc;

/// The mapper of a page is told to come again if its table dies under it; what it mapped is there in the end, wherever
/// the neighbour was in retiring the table. A walker who saw the page and then not will be told by the gather.
#[test]
fn map_against_retirement() {
    check(|| {
        let (radix, memory) = without_allowance(2);
        map(&radix, pages(0, 1), LOW);
        let unmapper = spawn(&radix, |radix| unmap(radix, pages(0, 1)));
        let walker = spawn(&radix, |radix| (output(radix, 1), output(radix, 1)));
        let gather = map_gathered(&radix, pages(1, 1), HIGH);
        assert_eq!(output(&radix, 1), Some(HIGH));
        let other = unmapper.join().unwrap();
        let (first, second) = walker.join().unwrap();
        assert!([first, second].iter().all(|seen| seen.is_none_or(|oa| oa == HIGH)));
        assert!(first.is_none() || second.is_some() || !gather.runs.is_empty(), "nobody is told");
        assert_eq!((output(&radix, 0), output(&radix, 1)), (None, Some(HIGH)));
        finish(radix, &memory, [gather, other]);
    });
}

/// The same with several pages, and on the long way, which begins in the next table.
#[test]
fn long_map_against_retirement() {
    check(|| {
        let (radix, memory) = without_allowance(2);
        map(&radix, pages(4, 1), LOW);
        let unmapper = spawn(&radix, |radix| unmap(radix, pages(4, 1)));
        let gather = map_gathered(&radix, pages(5, 4), MISALIGNED);
        let other = unmapper.join().unwrap();
        assert_eq!(leaves(&radix), [(5, 1), (6, 1), (7, 1), (8, 1)]);
        assert!((0..4).all(|page| output(&radix, 5 + page) == Some(MISALIGNED + (page << 12))));
        finish(radix, &memory, [gather, other]);
    });
}

/// A cached walker has the table that dies, and is told of the page that is mapped in the next one.
#[test]
fn cached_walk_against_map_and_retirement() {
    check(|| {
        let (radix, memory) = without_allowance(2);
        map(&radix, pages(0, 1), LOW);
        let mut cache = CachedWalk::new();
        assert_eq!(output_cached(&radix, 0, &mut cache), Some(LOW));
        let mapped = Arc::new(AtomicBool::new(false));
        let unmapper = spawn(&radix, |radix| unmap(radix, pages(0, 1)));
        let walker = {
            let mapped = Arc::clone(&mapped);
            spawn(&radix, move |radix| {
                let mapped = mapped.load(Ordering::Acquire);
                let seen = output_cached(radix, 1, &mut cache);
                assert!(!mapped || seen == Some(HIGH));
                assert!(seen.is_none_or(|oa| oa == HIGH));
                cache
            })
        };
        let gather = map_gathered(&radix, pages(1, 1), HIGH);
        mapped.store(true, Ordering::Release);
        let other = unmapper.join().unwrap();
        let mut cache = walker.join().unwrap();
        free(gather);
        free(other);
        assert_eq!(output_cached(&radix, 0, &mut cache), None);
        assert_eq!(output_cached(&radix, 1, &mut cache), Some(HIGH));
        finish(radix, &memory, []);
    });
}

/// A release empties a table that nobody may keep, and another claims in it.
#[test]
fn claim_against_retirement() {
    check(|| {
        let (radix, memory) = without_allowance(2);
        map(&radix, pages(0, 1), LOW);
        radix.retract(pages(0, 1), &mut Gather::new()).unwrap();
        let other = spawn(&radix, |radix| {
            let mut gather = Gather::new();
            assert!(claim(radix, pages(1, 2), MISALIGNED, &mut gather));
            radix.publish(pages(1, 2));
            gather
        });
        let mut gather = Gather::new();
        radix.release(pages(0, 1), &mut gather);
        let other = other.join().unwrap();
        assert_eq!(leaves(&radix), [(1, 1), (2, 1)]);
        assert_eq!((output(&radix, 0), output(&radix, 1)), (None, Some(MISALIGNED)));
        finish(radix, &memory, [gather, other]);
    });
}

/// The same where the range begins in one table and ends in the next.
#[test]
fn claim_against_long_release() {
    check(|| {
        let (radix, memory) = without_allowance(2);
        map(&radix, pages(3, 2), MISALIGNED);
        radix.retract(pages(3, 2), &mut Gather::new()).unwrap();
        let other = spawn(&radix, |radix| {
            let mut gather = Gather::new();
            assert!(claim_and_publish(radix, pages(2, 1), HIGH, &mut gather));
            gather
        });
        let mut gather = Gather::new();
        radix.release(pages(3, 2), &mut gather);
        let other = other.join().unwrap();
        assert_eq!(leaves(&radix), [(2, 1)]);
        finish(radix, &memory, [gather, other]);
    });
}

/// A table that dies as the last but one of two levels, while another is about to link a table in the upper one.
#[test]
fn link_against_retirement() {
    check(|| {
        let (radix, memory) = without_allowance(3);
        map(&radix, pages(16, 1), LOW);
        let unmapper = spawn(&radix, |radix| unmap(radix, pages(16, 1)));
        let gather = map_gathered(&radix, pages(20, 1), HIGH);
        assert_eq!(output(&radix, 20), Some(HIGH));
        let other = unmapper.join().unwrap();
        assert_eq!(leaves(&radix), [(20, 1)]);
        assert_eq!(output(&radix, 20), Some(HIGH));
        finish(radix, &memory, [gather, other]);
    });
}

/// The same in claiming mode.
#[test]
fn claiming_link_against_retirement() {
    check(|| {
        let (radix, memory) = without_allowance(3);
        map(&radix, pages(16, 1), LOW);
        radix.retract(pages(16, 1), &mut Gather::new()).unwrap();
        let other = spawn(&radix, |radix| {
            let mut gather = Gather::new();
            assert!(claim(radix, pages(20, 1), HIGH, &mut gather));
            radix.publish(pages(20, 1));
            gather
        });
        let mut gather = Gather::new();
        radix.release(pages(16, 1), &mut gather);
        let other = other.join().unwrap();
        assert_eq!(leaves(&radix), [(20, 1)]);
        assert_eq!(output(&radix, 20), Some(HIGH));
        finish(radix, &memory, [gather, other]);
    });
}

/// Two link tables in one that a third wants to retire.
#[test]
fn two_links_against_retirement() {
    check(|| {
        let (radix, memory) = without_allowance(3);
        map(&radix, pages(16, 1), LOW);
        let unmapper = spawn(&radix, |radix| unmap(radix, pages(16, 1)));
        let mapper = spawn(&radix, |radix| map_gathered(radix, pages(24, 1), LOW));
        let gather = map_gathered(&radix, pages(20, 1), HIGH);
        let other = unmapper.join().unwrap();
        let third = mapper.join().unwrap();
        assert_eq!(leaves(&radix), [(20, 1), (24, 1)]);
        assert_eq!((output(&radix, 20), output(&radix, 24)), (Some(HIGH), Some(LOW)));
        finish(radix, &memory, [gather, other, third]);
    });
}

/// Two fill one new table, of which the link may have to be taken back because a third retires the table above.
#[test]
fn two_behind_one_link_against_retirement() {
    check(|| {
        let (radix, memory) = without_allowance(3);
        map(&radix, pages(16, 1), LOW);
        let unmapper = spawn(&radix, |radix| unmap(radix, pages(16, 1)));
        let mapper = spawn(&radix, |radix| map_gathered(radix, pages(21, 1), LOW));
        let gather = map_gathered(&radix, pages(20, 1), HIGH);
        let other = unmapper.join().unwrap();
        let third = mapper.join().unwrap();
        assert_eq!(leaves(&radix), [(20, 1), (21, 1)]);
        assert_eq!((output(&radix, 20), output(&radix, 21)), (Some(HIGH), Some(LOW)));
        finish(radix, &memory, [gather, other, third]);
    });
}

/// A table that somebody has linked a moment ago, and not filled yet, is empty again because of another.
#[test]
fn unmap_behind_a_tentative_link() {
    check(|| {
        let (radix, memory) = without_allowance(3);
        map(&radix, pages(48, 1), LOW);
        let mapper = spawn(&radix, |radix| map_gathered(radix, pages(20, 1), HIGH));
        let gather = map_gathered(&radix, pages(24, 1), LOW);
        let other = unmap(&radix, pages(24, 1));
        let third = mapper.join().unwrap();
        assert_eq!(leaves(&radix), [(20, 1), (48, 1)]);
        assert_eq!(output(&radix, 20), Some(HIGH));
        finish(radix, &memory, [gather, other, third]);
    });
}

/// A large leaf takes the place of a table that somebody has linked a moment ago, or that is merged into one.
#[test]
fn large_claim_and_merge_over_a_tentative_link() {
    check(|| {
        let (radix, memory) = table(3);
        map(&radix, pages(48, 1), LOW);
        let small = spawn(&radix, |radix| {
            let mut gather = Gather::new();
            (claim_and_publish(radix, pages(20, 1), HIGH, &mut gather), gather)
        });
        let mut gather = Gather::new();
        let large_won = claim_and_publish(&radix, pages(16, 16), LOW, &mut gather);
        radix.merge_claimed(pages(16, 16), &mut gather);
        let (small_won, other) = small.join().unwrap();
        assert!(!(large_won && small_won));
        let expected = |page: u64| if large_won { Some(LOW + ((page - 16) << 12)) } else { None };
        let found: Vec<_> = [16, 21, 31].map(|page| output(&radix, page)).into();
        assert_eq!(found, [16, 21, 31].map(expected));
        assert_eq!(output(&radix, 20), if small_won { Some(HIGH) } else { expected(20) });
        finish(radix, &memory, [gather, other]);
    });
}

/// A large leaf goes into an entry of a table that dies because its last table has gone.
#[test]
fn large_map_against_retirement() {
    check(|| {
        let (radix, memory) = without_allowance(3);
        map(&radix, pages(20, 1), HIGH);
        let unmapper = spawn(&radix, |radix| unmap(radix, pages(20, 1)));
        let walker = spawn(&radix, |radix| output(radix, 17));
        let gather = map_gathered(&radix, pages(16, 4), LOW);
        let other = unmapper.join().unwrap();
        assert!(walker.join().unwrap().is_none_or(|oa| oa == LOW + 0x1000));
        assert_eq!(leaves(&radix), [(16, 4)]);
        assert_eq!(output(&radix, 17), Some(LOW + 0x1000));
        finish(radix, &memory, [gather, other]);
    });
}

/// A large leaf takes the place of a tree of empty tables, while others work beside it and walkers are below.
#[test]
fn large_map_over_empty_tables() {
    check(|| {
        let (radix, memory) = table(3);
        map(&radix, pages(16, 1), HIGH);
        map(&radix, pages(20, 1), HIGH);
        let mut cache = CachedWalk::new();
        assert_eq!(output_cached(&radix, 20, &mut cache), Some(HIGH));
        assert!(
            unmap(&radix, pages(16, 1)).retired.is_empty() && unmap(&radix, pages(20, 1)).retired.is_empty()
        );
        let neighbour = spawn(&radix, |radix| map_gathered(radix, pages(0, 1), HIGH));
        let mapped = Arc::new(AtomicBool::new(false));
        let walker = {
            let mapped = Arc::clone(&mapped);
            spawn(&radix, move |radix| {
                let mapped = mapped.load(Ordering::Acquire);
                let seen = output_cached(radix, 20, &mut cache);
                assert!(!mapped || seen.is_some());
                assert!(seen.is_none_or(|oa| oa == LOW + 0x4000));
                cache
            })
        };
        let gather = map_gathered(&radix, pages(16, 16), LOW);
        mapped.store(true, Ordering::Release);
        assert_eq!(gather.retired.len(), 3);
        let other = neighbour.join().unwrap();
        let mut cache = walker.join().unwrap();
        free(gather);
        assert_eq!(leaves(&radix), [(0, 1), (16, 16)]);
        assert_eq!(output_cached(&radix, 20, &mut cache), Some(LOW + 0x4000));
        finish(radix, &memory, [other]);
    });
}

/// One wants to put a large leaf in the place of an empty table, and has looked whether it is empty. Another claims a page
/// in it, by which the table stays, and then wants the same himself. The first must not take his mark for its own.
#[test]
fn the_mark_of_another() {
    check(|| {
        let (radix, memory) = table(2);
        map(&radix, pages(0, 1), LOW);
        unmap(&radix, pages(0, 1));
        let large = spawn(&radix, |radix| {
            let mut gather = Gather::new();
            (claim_and_publish(radix, pages(0, 4), LOW, &mut gather), gather)
        });
        let small = spawn(&radix, |radix| {
            let mut gather = Gather::new();
            let won = claim_and_publish(radix, pages(2, 1), MISALIGNED, &mut gather);
            let all = claim_and_publish(radix, pages(0, 4), HIGH, &mut gather);
            assert!(!all || !won);
            (won, all, gather)
        });
        let (first, gather) = large.join().unwrap();
        let (won, all, other) = small.join().unwrap();
        let expected = match (first, won, all) {
            (true, false, false) => LOW + 0x2000,
            (false, true, false) => MISALIGNED,
            (false, false, true) => HIGH + 0x2000,
            won => panic!("{won:?}"),
        };
        assert_eq!(output(&radix, 2), Some(expected));
        finish(radix, &memory, [gather, other]);
    });
}

/// Two empty the last two pages of a table, and each may take the other's for filled. Whoever maps there next finds
/// the table as good as ever, or another one.
#[test]
fn two_removals_at_once() {
    check(|| {
        let (radix, memory) = without_allowance(3);
        map(&radix, pages(16, 1), LOW);
        map(&radix, pages(17, 1), HIGH);
        let mut cache = CachedWalk::new();
        assert_eq!(output_cached(&radix, 16, &mut cache), Some(LOW));
        let other = spawn(&radix, |radix| unmap(radix, pages(16, 1)));
        let walker = spawn(&radix, move |radix| {
            assert!(output_cached(radix, 17, &mut cache).is_none_or(|oa| oa == HIGH));
            cache
        });
        let gather = unmap(&radix, pages(17, 1));
        assert_eq!(output(&radix, 17), None);
        let other = other.join().unwrap();
        let mut cache = walker.join().unwrap();
        assert!(matches!(gather.retired.len() + other.retired.len(), 0 | 2));
        free(gather);
        free(other);
        assert_eq!(output_cached(&radix, 16, &mut cache), None);
        let gather = map_gathered(&radix, pages(18, 1), LOW);
        assert_eq!(output_cached(&radix, 18, &mut cache), Some(LOW));
        assert_eq!(leaves(&radix), [(18, 1)]);
        finish(radix, &memory, [gather]);
    });
}

/// Two empty a table and a third fills it.
#[test]
fn two_removals_against_map() {
    check(|| {
        let (radix, memory) = without_allowance(2);
        map(&radix, pages(0, 1), LOW);
        map(&radix, pages(1, 1), HIGH);
        let first = spawn(&radix, |radix| unmap(radix, pages(0, 1)));
        let second = spawn(&radix, |radix| unmap(radix, pages(1, 1)));
        let gather = map_gathered(&radix, pages(2, 1), LOW);
        let gathers = [gather, first.join().unwrap(), second.join().unwrap()];
        assert_eq!(leaves(&radix), [(2, 1)]);
        assert_eq!(output(&radix, 2), Some(LOW));
        finish(radix, &memory, gathers);
    });
}

/// Two halves of one leaf are unmapped, by which it is cut, emptied and retired; a third page's owner looks on.
#[test]
fn halves_of_a_leaf_go_with_their_table() {
    check(|| {
        let (radix, memory) = without_allowance(2);
        map(&radix, pages(0, 4), LOW);
        let other = spawn(&radix, |radix| unmap(radix, pages(0, 2)));
        let walker = spawn(&radix, |radix| (output(radix, 3), output(radix, 3)));
        let gather = unmap(&radix, pages(2, 2));
        let other = other.join().unwrap();
        let (first, second) = walker.join().unwrap();
        assert!([first, second].iter().all(|seen| seen.is_none_or(|oa| oa == LOW + 0x3000)));
        assert!(first.is_some() || second.is_none(), "once gone, it stays so");
        assert_eq!(leaves(&radix), []);
        assert_eq!(gather.runs.iter().collect::<Vec<_>>(), [pages(2, 2)]);
        assert_eq!(other.runs.iter().collect::<Vec<_>>(), [pages(0, 2)]);
        finish(radix, &memory, [gather, other]);
    });
}

/// A tree of tables is unlinked with all that is in it, under walkers, while the neighbours of the topmost come and go.
#[test]
fn unmap_of_whole_tables() {
    check(|| {
        let (radix, memory) = table(3);
        map(&radix, pages(16, 1), LOW);
        map(&radix, pages(20, 1), HIGH);
        let mut cache = CachedWalk::new();
        assert_eq!(output_cached(&radix, 20, &mut cache), Some(HIGH));
        let unmapped = Arc::new(AtomicBool::new(false));
        let walker = {
            let unmapped = Arc::clone(&unmapped);
            spawn(&radix, move |radix| {
                let unmapped = unmapped.load(Ordering::Acquire);
                let seen = (output(radix, 16), output_cached(radix, 20, &mut cache));
                assert!(!unmapped || seen == (None, None));
                assert!(seen.0.is_none_or(|oa| oa == LOW) && seen.1.is_none_or(|oa| oa == HIGH));
                cache
            })
        };
        let neighbour = spawn(&radix, |radix| map_gathered(radix, pages(32, 1), LOW));
        let gather = unmap(&radix, pages(16, 16));
        unmapped.store(true, Ordering::Release);
        assert_eq!(gather.retired.len(), 3);
        let other = neighbour.join().unwrap();
        let mut cache = walker.join().unwrap();
        free(gather);
        assert_eq!(output_cached(&radix, 20, &mut cache), None);
        assert_eq!(leaves(&radix), [(32, 1)]);
        finish(radix, &memory, [other]);
    });
}

/// One is about to keep an empty table, another puts a large leaf in its place, a third fills it.
#[test]
fn keep_against_large_claim() {
    check(|| {
        let (radix, memory) = table(2);
        map(&radix, pages(0, 1), LOW);
        radix.retract(pages(0, 1), &mut Gather::new()).unwrap();
        let large = spawn(&radix, |radix| {
            let mut gather = Gather::new();
            (claim_and_publish(radix, pages(0, 4), LOW, &mut gather), gather)
        });
        let small = spawn(&radix, |radix| {
            let mut gather = Gather::new();
            (claim_and_publish(radix, pages(3, 1), HIGH, &mut gather), gather)
        });
        let mut gather = Gather::new();
        radix.release(pages(0, 1), &mut gather);
        let (large, other) = large.join().unwrap();
        let (small, third) = small.join().unwrap();
        assert!(!(large && small));
        let expected = if small { Some(HIGH) } else { large.then_some(LOW + 0x3000) };
        assert_eq!(output(&radix, 3), expected);
        finish(radix, &memory, [gather, other, third]);
    });
}

/// The root grows over a table that loses its last table below, while somebody links another one there.
#[test]
fn root_growth_against_retirement() {
    check(|| {
        let (radix, memory) = without_allowance(3);
        let top = || radix.top().unwrap().1;
        assert_eq!(top(), 2);
        map(&radix, pages(0, 1), LOW);
        let unmapper = spawn(&radix, |radix| unmap(radix, pages(0, 1)));
        let grower = spawn(&radix, |radix| map_gathered(radix, pages(16, 1), LOW));
        let gather = map_gathered(&radix, pages(4, 1), HIGH);
        let gathers = [gather, unmapper.join().unwrap(), grower.join().unwrap()];
        assert_eq!(top(), 3);
        assert_eq!(leaves(&radix), [(4, 1), (16, 1)]);
        assert_eq!((output(&radix, 4), output(&radix, 16)), (Some(HIGH), Some(LOW)));
        finish(radix, &memory, gathers);
    });
}
