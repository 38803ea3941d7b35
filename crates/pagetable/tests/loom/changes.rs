//! What changes leaves that are mapped: merging, marking, protecting, reading dirt.

use crate::fixture::*;
use crate::table::*;
use ioasid_pagetable::{Attributes, CachedWalk, Gather, Oa, RetractError, Span};
use loom::sync::atomic::{AtomicBool, Ordering};
use std::sync::Arc;

/// Four pages that are one leaf, cut.
fn four_pages(highest: u8) -> (Arc<Table>, Pages) {
    let (radix, memory) = table(highest);
    map(&radix, pages(0, 4), LOW);
    radix.cut(1 << 12, &mut Gather::new()).unwrap();
    assert_eq!(leaves(&radix).len(), 4);
    (radix, memory)
}

fn is_dirty(radix: &Table, page: u64) -> bool {
    radix.walk(page << 12).unwrap().attributes.contains(Attributes::DIRTY)
}

/// Walkers see the table or the leaf in its place, remembered ways included, and a neighbour is not in the way.
#[test]
fn merge_against_walkers() {
    check(|| {
        let (radix, memory) = four_pages(2);
        let mut cache = CachedWalk::new();
        assert_eq!(output_cached(&radix, 1, &mut cache), Some(LOW + 0x1000));
        let walker = spawn(&radix, move |radix| {
            assert_eq!(output(radix, 2), Some(LOW + 0x2000));
            assert_eq!(output_cached(radix, 1, &mut cache), Some(LOW + 0x1000));
        });
        let neighbour = spawn(&radix, |radix| map_gathered(radix, pages(4, 1), HIGH));
        let mut gather = Gather::new();
        assert_eq!(radix.merge(pages(0, 4), &mut gather), Ok(1));
        walker.join().unwrap();
        let other = neighbour.join().unwrap();
        assert_eq!(leaves(&radix), [(0, 4), (4, 1)]);
        finish(radix, &memory, [gather, other]);
    });
}

/// The leaf that has come of a merge is unmapped. Whoever is told of that finds nothing there, also if he remembers the
/// way to the table that was merged, in which the old leaves stand.
#[test]
fn claiming_merge_against_retract() {
    check(|| {
        let (radix, memory) = four_pages(2);
        let mut cache = CachedWalk::new();
        assert_eq!(output_cached(&radix, 1, &mut cache), Some(LOW + 0x1000));
        let unmapped = Arc::new(AtomicBool::new(false));
        let other = {
            let unmapped = Arc::clone(&unmapped);
            spawn(&radix, move |radix| {
                let mut gather = Gather::new();
                let retracted = radix.retract(pages(0, 4), &mut gather);
                if retracted.is_ok() {
                    radix.release(pages(0, 4), &mut gather);
                    unmapped.store(true, Ordering::Release);
                }
                (retracted, gather)
            })
        };
        let walker = spawn(&radix, move |radix| {
            let unmapped = unmapped.load(Ordering::Acquire);
            let seen = output_cached(radix, 1, &mut cache);
            assert!(!unmapped || seen.is_none(), "translated after the unmap");
            assert!(seen.is_none_or(|oa| oa == LOW + 0x1000));
        });
        let mut gather = Gather::new();
        let merged = radix.merge_claimed(pages(0, 4), &mut gather);
        let (retracted, other) = other.join().unwrap();
        walker.join().unwrap();
        match (merged, retracted) {
            (0 | 1, Ok(())) => assert_eq!(leaves(&radix), []),
            (1, Err(RetractError::Contended { .. })) => assert_eq!(leaves(&radix), [(0, 4)]),
            // The one met the other in the middle.
            (0, Err(RetractError::Contended { .. })) => assert_eq!(leaves(&radix).len(), 4),
            results => panic!("{results:?}"),
        }
        finish(radix, &memory, [gather, other]);
    });
}

/// A page is taken out of a table that is being merged: out of the table, out of the leaf, or not now.
#[test]
fn claiming_merge_against_partial_retract() {
    check(|| {
        let (radix, memory) = four_pages(2);
        let other = spawn(&radix, |radix| {
            let mut gather = Gather::new();
            (radix.retract(pages(2, 1), &mut gather), gather)
        });
        let mut gather = Gather::new();
        let merged = radix.merge_claimed(pages(0, 4), &mut gather);
        let (retracted, other) = other.join().unwrap();
        assert_eq!(output(&radix, 2).is_none(), retracted.is_ok());
        assert!([0, 1, 3].into_iter().all(|page| output(&radix, page) == Some(LOW + (page << 12))));
        if retracted.is_ok() {
            assert_eq!(other.runs.iter().collect::<Vec<_>>(), [pages(2, 1)]);
        } else {
            assert_eq!(merged, 1);
        }
        finish(radix, &memory, [gather, other]);
    });
}

/// A page is mapped to something else after the merge has looked, and before it owns the page.
#[test]
fn claiming_merge_against_remapping() {
    check(|| {
        let (radix, memory) = four_pages(2);
        let other = spawn(&radix, |radix| {
            let mut gather = Gather::new();
            let retracted = radix.retract(pages(2, 1), &mut gather).is_ok();
            if retracted {
                radix.release(pages(2, 1), &mut gather);
                assert!(claim_and_publish(radix, pages(2, 1), HIGH, &mut gather));
            }
            (retracted, gather)
        });
        let merger = spawn(&radix, |radix| {
            let mut gather = Gather::new();
            (radix.merge_claimed(pages(0, 4), &mut gather), gather)
        });
        let (remapped, other) = other.join().unwrap();
        let (merged, gather) = merger.join().unwrap();
        assert!(merged == 1 || remapped);
        let expected = [LOW, LOW + 0x1000, if remapped { HIGH } else { LOW + 0x2000 }, LOW + 0x3000];
        assert!((0..4).all(|page| output(&radix, page) == Some(expected[page as usize])));
        finish(radix, &memory, [gather, other]);
    });
}

/// A leaf that is held for copying is not merged meanwhile, and letting it go changes nothing else.
#[test]
fn claiming_merge_against_hold() {
    check(|| {
        let (radix, memory) = four_pages(2);
        let other = spawn(&radix, |radix| {
            let held = radix.hold(pages(2, 2));
            if let Ok(Some(leaf)) = held {
                assert_eq!(output(radix, 2), Some(LOW + 0x2000));
                radix.let_go(&leaf);
            }
            held
        });
        let mut gather = Gather::new();
        let merged = radix.merge_claimed(pages(0, 4), &mut gather);
        let held = other.join().unwrap();
        assert!(merged == 1 || matches!(held, Ok(Some(_))), "{held:?}");
        assert_eq!(leaves(&radix).len(), if merged == 1 { 1 } else { 4 });
        // Nobody owns anything any more.
        radix.retract(pages(0, 4), &mut Gather::new()).unwrap();
        finish(radix, &memory, [gather]);
    });
}

/// Mappings are claimed where leaves are being merged, and beside them.
#[test]
fn claiming_merge_against_claims() {
    check(|| {
        let (radix, memory) = four_pages(2);
        let inside = spawn(&radix, |radix| {
            let mut gather = Gather::new();
            (radix.claim(pages(3, 1), Oa::new(HIGH), READ_WRITE, &mut gather), gather)
        });
        let beside = spawn(&radix, |radix| {
            let mut gather = Gather::new();
            assert!(claim_and_publish(radix, pages(4, 1), HIGH, &mut gather));
            gather
        });
        let mut gather = Gather::new();
        assert_eq!(radix.merge_claimed(pages(0, 4), &mut gather), 1);
        let (refused, other) = inside.join().unwrap();
        assert!(refused.is_err());
        let third = beside.join().unwrap();
        assert_eq!(leaves(&radix), [(0, 4), (4, 1)]);
        assert_eq!(output(&radix, 3), Some(LOW + 0x3000));
        finish(radix, &memory, [gather, other, third]);
    });
}

/// Two merges of the same tables at two levels: each table goes once.
#[test]
fn merges_at_two_levels() {
    check(|| {
        let (radix, memory) = table(3);
        map(&radix, pages(16, 16), LOW);
        radix.cut(17 << 12, &mut Gather::new()).unwrap();
        let merge = |range| {
            move |radix: &Table| {
                let mut gather = Gather::new();
                (radix.merge_claimed(range, &mut gather), gather)
            }
        };
        let other = spawn(&radix, merge(pages(16, 4)));
        let walker = spawn(&radix, |radix| output(radix, 18));
        let (upper, gather) = merge(pages(16, 16))(&radix);
        let (lower, other) = other.join().unwrap();
        assert_eq!(walker.join().unwrap(), Some(LOW + 0x2000));
        // Whoever meets the other in the middle leaves it to him.
        assert!(lower + upper <= 2);
        assert_eq!(leaves(&radix).len() as u64, 7 - 3 * (lower + upper));
        assert!((0..16).all(|page| output(&radix, 16 + page) == Some(LOW + (page << 12))));
        radix.retract(pages(16, 16), &mut Gather::new()).unwrap();
        finish(radix, &memory, [gather, other]);
    });
}

/// A page is written through while its leaf is cut: its piece is dirty.
#[test]
fn mark_against_cut() {
    check(|| {
        let (radix, memory) = table(2);
        map(&radix, pages(0, 4), LOW);
        let other = spawn(&radix, |radix| {
            let before = radix.mark(1 << 12, Attributes::USED).unwrap();
            assert!(!before.attributes.contains(Attributes::DIRTY));
        });
        radix.cut(2 << 12, &mut Gather::new()).unwrap();
        other.join().unwrap();
        assert!(is_dirty(&radix, 1));
        finish(radix, &memory, []);
    });
}

/// The same while leaves are merged.
#[test]
fn mark_against_merge() {
    check(|| {
        let (radix, memory) = four_pages(2);
        let other = spawn(&radix, |radix| radix.mark(1 << 12, Attributes::USED).map(|_| ()));
        let mut gather = Gather::new();
        radix.merge(pages(0, 4), &mut gather).unwrap();
        other.join().unwrap().unwrap();
        assert!(is_dirty(&radix, 1));
        finish(radix, &memory, [gather]);
    });
}

/// The same while it is made read-only: what was written stays dirty.
#[test]
fn mark_against_protect() {
    check(|| {
        let (radix, memory) = table(2);
        map(&radix, pages(0, 2), MISALIGNED);
        let other = spawn(&radix, |radix| {
            radix.mark(0, Attributes::ACCESSED).unwrap();
            radix.mark(1 << 12, Attributes::DIRTY).unwrap();
        });
        radix.protect(pages(0, 2), Attributes::READ, &mut Gather::new()).unwrap();
        other.join().unwrap();
        let attributes = |page: u64| radix.walk(page << 12).unwrap().attributes;
        assert_eq!(attributes(0), Attributes::READ | Attributes::ACCESSED);
        assert_eq!(attributes(1), Attributes::READ | Attributes::DIRTY);
        finish(radix, &memory, []);
    });
}

/// The same while dirty leaves are read and cleaned: it is reported or it is dirty still.
#[test]
fn mark_against_read_and_clear() {
    check(|| {
        let (radix, memory) = table(2);
        map(&radix, pages(0, 2), MISALIGNED);
        radix.mark(0, Attributes::USED).unwrap();
        let other = spawn(&radix, |radix| {
            radix.mark(0, Attributes::USED).unwrap();
            radix.mark(1 << 12, Attributes::USED).unwrap();
        });
        let reader = spawn(&radix, |radix| {
            let mut reported = Vec::new();
            radix.read_and_clear_dirty(pages(0, 4), |dirty| reported.push(dirty));
            reported
        });
        other.join().unwrap();
        let reported = reader.join().unwrap();
        let reported = |page: u64| reported.iter().any(|dirty| dirty.contains(page << 12));
        assert!(reported(0));
        assert!(reported(1) || is_dirty(&radix, 1));
        finish(radix, &memory, []);
    });
}

/// A neighbour cuts the leaf that is dirty: the part of it is reported all the same.
#[test]
fn read_and_clear_against_cut() {
    check(|| {
        let (radix, memory) = table(2);
        map(&radix, pages(0, 4), LOW);
        radix.mark(0, Attributes::USED).unwrap();
        let other = spawn(&radix, |radix| unmap(radix, pages(2, 2)));
        let reader = spawn(&radix, |radix| {
            let mut reported = Vec::new();
            radix.read_and_clear_dirty(pages(0, 2), |dirty| reported.push(dirty));
            reported
        });
        let other = other.join().unwrap();
        let reported = reader.join().unwrap();
        let pages: u64 = reported.iter().map(|dirty| dirty.length().unwrap() >> 12).sum();
        assert_eq!(pages, 2, "{reported:?}");
        finish(radix, &memory, [other]);
    });
}

/// A cursor is in a table that goes with all that is in it. What it shows was there when it began.
#[test]
fn cursor_against_unmap_of_its_table() {
    check(|| {
        let (radix, memory) = table(2);
        map(&radix, pages(0, 2), MISALIGNED);
        map(&radix, pages(4, 1), HIGH);
        let other = spawn(&radix, |radix| {
            let mut at = 0;
            for span in radix.cursor(pages(0, 8)) {
                let range = match span {
                    Span::Leaf(leaf) => {
                        assert_eq!(
                            leaf.oa.get(),
                            if leaf.iova >> 12 == 4 { HIGH } else { MISALIGNED + leaf.iova }
                        );
                        leaf.range()
                    }
                    Span::Hole(hole) => hole,
                };
                assert_eq!(range.first(), at);
                at = range.last() + 1;
            }
            assert_eq!(at, 8 << 12);
        });
        let gather = unmap(&radix, pages(0, 4));
        other.join().unwrap();
        finish(radix, &memory, [gather]);
    });
}
