//! The allocator of addresses as its users see it, against a map of what they have.

use ioasid::iova::{AllocateError, Allocator, Options, Policy, RangeError};
use ioasid::{IovaRange, PageSize};
use proptest::collection::vec;
use proptest::prelude::*;
use std::collections::BTreeMap;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};

const PAGE: u64 = 1 << 12;

fn range(first: u64, length: u64) -> IovaRange {
    IovaRange::with_length(first, length).unwrap()
}

/// What the model knows: who has which addresses. All ranges are in bytes and never overlap.
#[derive(Debug, Default)]
struct Model {
    windows: Vec<IovaRange>,
    allocated: BTreeMap<u64, u64>,
    reserved: BTreeMap<u64, u64>,
}

impl Model {
    fn overlap(map: &BTreeMap<u64, u64>, range: IovaRange) -> bool {
        map.iter().any(|(first, last)| *first <= range.last() && range.first() <= *last)
    }

    fn in_windows(&self, page: u64) -> bool {
        self.windows.iter().any(|window| window.covers(&range(page, PAGE)))
    }

    fn is_free(&self, place: IovaRange) -> bool {
        !Model::overlap(&self.allocated, place)
            && !Model::overlap(&self.reserved, place)
            && (0..=(place.last() - place.first()) / PAGE)
                .all(|page| self.in_windows(place.first() + page * PAGE))
    }

    /// Every place there is, ascending.
    fn places(&self, base: u64, length: u64, alignment: u64) -> impl DoubleEndedIterator<Item = u64> + '_ {
        let places = (0..PAGES).map(move |page| base + page * PAGE);
        places.filter(move |first| {
            first % alignment == 0
                && *first != 0
                && IovaRange::with_length(*first, length).is_some_and(|place| self.is_free(place))
        })
    }
}

const PAGES: u64 = 160;

#[derive(Clone, Debug)]
enum Step {
    Allocate {
        pages: u64,
        bits: u32,
    },
    /// The nth of what is allocated.
    Free(usize),
    /// A part of it: so many pages from the front, and so many from the back.
    FreePart(usize, u64, u64),
    Reserve(u64, u64),
    Release(usize),
    FreeNonsense(u64, u64),
}

fn step() -> impl Strategy<Value = Step> {
    let part = || (0..PAGES, 1..12_u64).prop_map(|(first, count)| (first, count.min(PAGES - first)));
    prop_oneof![
        6 => (1..12_u64, 0..17_u32).prop_map(|(pages, bits)| Step::Allocate { pages, bits }),
        2 => (12..64_u64, 0..17_u32).prop_map(|(pages, bits)| Step::Allocate { pages, bits }),
        4 => any::<usize>().prop_map(Step::Free),
        1 => (any::<usize>(), 0..4_u64, 0..4_u64).prop_map(|(which, front, back)| Step::FreePart(which, front, back)),
        1 => part().prop_map(|(first, count)| Step::Reserve(first, count)),
        1 => any::<usize>().prop_map(Step::Release),
        // Larger than what goes into a magazine unseen.
        1 => part().prop_map(|(first, _)| Step::FreeNonsense(first, 33)),
    ]
}

fn nth(map: &BTreeMap<u64, u64>, which: usize) -> Option<IovaRange> {
    let (first, last) = map.iter().nth(which.checked_rem(map.len())?)?;
    IovaRange::new(*first, *last)
}

fn run(base: u64, windows: &[(u64, u64)], policy: Policy, steps: &[Step]) {
    let windows: Vec<IovaRange> =
        windows.iter().map(|(first, count)| range(base + first * PAGE, count * PAGE)).collect();
    let allocator = Allocator::new(&windows, Options { policy, ..Options::default() });
    let mut model = Model { windows, ..Model::default() };
    // Whether magazines may hold anything, so that the place is not the policy's alone.
    let mut small = false;
    for step in steps {
        match *step {
            Step::Allocate { pages, bits } => {
                let (length, alignment) = (pages * PAGE, 1 << bits);
                let alignment_of_pages = PAGE.max(alignment);
                // A size that magazines hold may come out of an aligned run of several, the rest of which is parked.
                let parks = pages < 12 || pages == 16 || pages == 32;
                let result = allocator.allocate(length, alignment);
                let mut places = model.places(base, length, alignment_of_pages);
                let expected = match policy {
                    Policy::BottomUp => places.next(),
                    Policy::TopDown => places.next_back(),
                };
                assert_eq!(
                    result.is_ok(),
                    expected.is_some(),
                    "{result:?} for {length:#x} at {alignment:#x}"
                );
                drop(places);
                match result {
                    Ok(iova) => {
                        let place = range(iova.get(), length);
                        assert!(iova.get() % alignment == 0 && iova.get() != 0);
                        assert!(model.is_free(place), "{place} is not free");
                        assert!(small || parks || Some(iova.get()) == expected);
                        model.allocated.insert(place.first(), place.last());
                    }
                    Err(AllocateError::Exhausted { length: asked, free }) => {
                        assert!(free < length && asked == length);
                    }
                    Err(AllocateError::Fragmented { free, largest, .. }) => {
                        assert!(free >= length && (largest < length || alignment > PAGE));
                    }
                    Err(error) => panic!("{error}"),
                }
                small |= parks;
            }
            Step::Free(which) => {
                if let Some(place) = nth(&model.allocated, which) {
                    allocator.free(place).unwrap();
                    model.allocated.remove(&place.first());
                    small = true;
                }
            }
            Step::FreePart(which, front, back) => {
                if let Some(whole) = nth(&model.allocated, which) {
                    let (first, last) =
                        (whole.first().wrapping_add(front * PAGE), whole.last().wrapping_sub(back * PAGE));
                    if let Some(part) = IovaRange::new(first, last).filter(|part| whole.covers(part)) {
                        allocator.free(part).unwrap();
                        model.allocated.remove(&whole.first());
                        let before =
                            first.checked_sub(1).and_then(|last| IovaRange::new(whole.first(), last));
                        let after = last.checked_add(1).and_then(|first| IovaRange::new(first, whole.last()));
                        let rest = before.into_iter().chain(after).map(|rest| (rest.first(), rest.last()));
                        model.allocated.extend(rest);
                        small = true;
                    }
                }
            }
            Step::Reserve(first, count) => {
                let asked = range(base + first * PAGE, count * PAGE);
                let result = allocator.reserve(asked);
                if Model::overlap(&model.reserved, asked) {
                    assert!(matches!(result, Err(RangeError::Reserved { range }) if range.overlaps(&asked)));
                } else if Model::overlap(&model.allocated, asked) {
                    assert_eq!(result, Err(RangeError::Allocated { range: asked }));
                } else {
                    assert_eq!(result, Ok(()));
                    model.reserved.insert(asked.first(), asked.last());
                }
            }
            Step::Release(which) => {
                if let Some(reserved) = nth(&model.reserved, which) {
                    allocator.release(reserved).unwrap();
                    assert_eq!(allocator.release(reserved), Err(RangeError::NotReserved { range: reserved }));
                    model.reserved.remove(&reserved.first());
                }
            }
            Step::FreeNonsense(first, count) => {
                if let Some(asked) = IovaRange::with_length(base + first * PAGE, count * PAGE) {
                    let mut pages = (0..count).map(|page| range(asked.first() + page * PAGE, PAGE));
                    let all_allocated = pages.all(|page| Model::overlap(&model.allocated, page));
                    // What waits in magazines is not told from what is allocated.
                    if !all_allocated && !small {
                        assert_eq!(allocator.free(asked), Err(RangeError::NotAllocated { range: asked }));
                    }
                }
            }
        }
        let free = (0..PAGES).map(|page| base.wrapping_add(page * PAGE)).filter(|page| *page != 0);
        let free = free.filter(|page| model.is_free(range(*page, PAGE))).count() as u64;
        let statistics = allocator.statistics();
        assert_eq!(statistics.free_bytes, free * PAGE);
        assert!(statistics.parked_bytes <= allocator.most_parked_bytes());
    }
    let reserved: Vec<IovaRange> =
        model.reserved.iter().map(|(first, last)| IovaRange::new(*first, *last).unwrap()).collect();
    assert_eq!(allocator.reserved_ranges(), reserved);
    // Everything comes back, and all holes become one again.
    for (first, last) in &model.allocated {
        allocator.free(IovaRange::new(*first, *last).unwrap()).unwrap();
    }
    reserved.into_iter().for_each(|reserved| allocator.release(reserved).unwrap());
    let mut lengths: Vec<u64> = allocator.windows().iter().filter_map(IovaRange::length).collect();
    lengths.sort_unstable();
    for length in lengths.into_iter().rev() {
        allocator.allocate(length, PAGE).unwrap();
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 400, ..ProptestConfig::default() })]

    /// At the bottom, where page 0 is left out, around a large aligned address, and in the last pages of all.
    #[test]
    fn nobody_gets_what_another_has_and_what_is_free_is_found(
        base in prop_oneof![Just(0), Just((1 << 28) - 70 * PAGE), Just(0u64.wrapping_sub(PAGES * PAGE))],
        windows in prop_oneof![
            1 => Just(vec![(0, PAGES)]),
            1 => vec((0..PAGES / 2, 1..PAGES / 2), 0..4),
        ],
        policy in prop_oneof![Just(Policy::BottomUp), Just(Policy::TopDown)],
        steps in vec(step(), 1..120),
    ) {
        run(base, &windows, policy, &steps);
    }
}

#[test]
fn the_last_page_is_given_out_and_address_zero_only_when_asked_for() {
    let last_page = IovaRange::new(u64::MAX - 0xfff, u64::MAX).unwrap();
    let allocator = Allocator::new(&[last_page], Options::default());
    let iova = allocator.allocate(PAGE, PAGE).unwrap();
    assert_eq!(iova.get(), last_page.first());
    assert_eq!(allocator.allocate(PAGE, PAGE), Err(AllocateError::Exhausted { length: PAGE, free: 0 }));
    allocator.free(last_page).unwrap();
    assert_eq!(allocator.allocate(PAGE, 1).unwrap().get(), last_page.first());

    let everything = Allocator::new(&[IovaRange::ALL], Options::default());
    assert_eq!(everything.windows(), [IovaRange::new(PAGE, u64::MAX).unwrap()]);
    assert_eq!(everything.allocate(1 << 63, 1 << 63).unwrap().get(), 1 << 63);
    assert!(matches!(everything.allocate(1 << 63, 1), Err(AllocateError::Exhausted { .. })));

    let options = Options { address_zero: true, ..Options::default() };
    let with_zero = Allocator::new(&[range(0, 2 * PAGE), range(PAGE, 3 * PAGE)], options);
    assert_eq!(with_zero.windows(), [range(0, 4 * PAGE)]);
    assert_eq!(with_zero.allocate(4 * PAGE, PAGE).unwrap().get(), 0);
}

#[test]
fn a_failure_says_whether_bytes_are_missing_or_only_not_together() {
    let granule = PageSize::SIZE_2M;
    let m2 = granule.bytes();
    let allocator = Allocator::new(&[range(m2 / 2, 40 * m2)], Options { granule, ..Options::default() });
    assert_eq!(allocator.windows(), [range(m2, 39 * m2)], "only whole granules");
    assert!(matches!(allocator.allocate(0, m2), Err(AllocateError::Length { .. })));
    assert!(matches!(allocator.allocate(m2 / 2, m2), Err(AllocateError::Length { .. })));
    assert!(matches!(allocator.allocate(m2, 3), Err(AllocateError::Alignment { alignment: 3 })));
    let too_much = allocator.allocate(40 * m2, m2);
    assert_eq!(too_much, Err(AllocateError::Exhausted { length: 40 * m2, free: 39 * m2 }));
    let (low, high) = (range(9 * m2, m2), range(20 * m2, 2 * m2));
    allocator.reserve(low).unwrap();
    allocator.reserve(high).unwrap();
    let (length, alignment) = (20 * m2, m2);
    assert_eq!(
        allocator.allocate(length, alignment),
        Err(AllocateError::Fragmented { length, alignment, free: 36 * m2, largest: 18 * m2 })
    );
    assert_eq!(
        allocator.allocate(length, alignment).unwrap_err().to_string(),
        "no 0x2800000 bytes at a multiple of 0x200000 are free together; \
         of 0x4800000 free bytes, at most 0x2400000 are"
    );
    // Large enough, but nowhere aligned.
    assert!(matches!(
        allocator.allocate(m2 * 17, m2 * 32),
        Err(AllocateError::Fragmented { largest, .. }) if largest == 18 * m2
    ));
    assert_eq!(allocator.allocate(17 * m2, 2 * m2).unwrap().get(), 22 * m2);
}

#[test]
fn an_address_just_freed_is_the_next() {
    let allocator = Allocator::new(&[IovaRange::ALL], Options::default());
    for pages in [1, 2, 3, 5, 8, 16, 32] {
        let taken: Vec<u64> = (0..3).map(|_| allocator.allocate(pages * PAGE, PAGE).unwrap().get()).collect();
        for iova in &taken {
            allocator.free(range(*iova, pages * PAGE)).unwrap();
        }
        for iova in taken.iter().rev() {
            assert_eq!(allocator.allocate(pages * PAGE, PAGE).unwrap().get(), *iova);
        }
    }
}

#[test]
fn what_waits_in_magazines_comes_back_before_anything_fails() {
    let pages = 512;
    let allocator = Allocator::new(&[range(PAGE, pages * PAGE)], Options::default());
    let take_all = || -> Vec<u64> {
        std::iter::from_fn(|| allocator.allocate(PAGE, PAGE).ok()).map(ioasid::Iova::get).collect()
    };
    let taken = take_all();
    assert_eq!(taken.len() as u64, pages);
    // Every second page: none of the small ones is lost, and no two lie together.
    let (even, odd): (Vec<u64>, Vec<u64>) = taken.iter().partition(|iova| *iova / PAGE % 2 == 0);
    even.iter().for_each(|iova| allocator.free(range(*iova, PAGE)).unwrap());
    assert!(allocator.statistics().parked_bytes > 0);
    assert!(matches!(
        allocator.allocate(2 * PAGE, PAGE),
        Err(AllocateError::Fragmented { largest: PAGE, .. })
    ));
    assert_eq!(allocator.statistics().parked_bytes, 0);
    assert_eq!(take_all().len(), even.len());
    // Freed by other threads, into their shards.
    std::thread::scope(|scope| {
        for part in [&even, &odd] {
            let allocator = &allocator;
            scope.spawn(move || part.iter().for_each(|iova| allocator.free(range(*iova, PAGE)).unwrap()));
        }
    });
    assert!(allocator.statistics().parked_bytes <= allocator.most_parked_bytes());
    assert_eq!(allocator.allocate(pages * PAGE, PAGE).unwrap().get(), PAGE);
}

#[test]
fn what_is_mapped_elsewhere_is_reserved_even_out_of_magazines() {
    let allocator = Allocator::new(&[range(PAGE, 64 * PAGE)], Options::default());
    let iova = allocator.allocate(PAGE, PAGE).unwrap().get();
    let place = range(iova, PAGE);
    assert_eq!(allocator.reserve(place), Err(RangeError::Allocated { range: place }));
    allocator.free(place).unwrap();
    // It waits in a magazine now, with its neighbours; and the range reaches beyond the windows.
    let fixed = IovaRange::new(0, 32 * PAGE - 1).unwrap();
    allocator.reserve(fixed).unwrap();
    assert_eq!(allocator.reserve(place), Err(RangeError::Reserved { range: fixed }));
    for _ in 0..33 {
        assert!(allocator.allocate(PAGE, PAGE).unwrap().get() > fixed.last());
    }
    assert_eq!(allocator.release(place), Err(RangeError::NotReserved { range: place }));
    allocator.release(fixed).unwrap();
    assert_eq!(allocator.allocate(31 * PAGE, PAGE).unwrap().get(), PAGE);
}

#[test]
fn nonsense_is_not_freed() {
    let allocator = Allocator::new(&[range(PAGE, 64 * PAGE)], Options::default());
    let outside = range(65 * PAGE, PAGE);
    assert_eq!(allocator.free(outside), Err(RangeError::NotAllocated { range: outside }));
    let zero = range(0, PAGE);
    assert_eq!(allocator.free(zero), Err(RangeError::NotAllocated { range: zero }));
    assert!(matches!(allocator.free(range(PAGE, 1)), Err(RangeError::Misaligned { .. })));
    assert!(matches!(allocator.reserve(range(1, PAGE)), Err(RangeError::Misaligned { .. })));
    let free = range(PAGE, 40 * PAGE);
    assert_eq!(allocator.free(free), Err(RangeError::NotAllocated { range: free }));
    assert_eq!(allocator.free(IovaRange::ALL), Err(RangeError::NotAllocated { range: IovaRange::ALL }));
}

/// Threads allocate, hand over to each other and free, in a space so small that they meet at its end all the time.
#[test]
fn threads_never_have_the_same_address_and_all_of_it_comes_back() {
    const PAGES: u64 = 2048;
    let window = range(1 << 20, PAGES * PAGE);
    let allocator = Allocator::new(&[window], Options::default());
    let owned: Vec<AtomicBool> = (0..PAGES).map(|_| AtomicBool::new(false)).collect();
    let handed_over = Mutex::new(Vec::<IovaRange>::new());
    let set = |place: IovaRange, to: bool| {
        let first = (place.first() - window.first()) / PAGE;
        let last = (place.last() - window.first()) / PAGE;
        for page in first..=last {
            assert_ne!(owned[page as usize].swap(to, Ordering::Relaxed), to, "{place}");
        }
    };
    let failures = std::thread::scope(|scope| {
        let work = |seed: u64| {
            let (mut random, mut mine, mut failures) = (seed, Vec::new(), 0u64);
            for _ in 0..20_000 {
                random = random.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
                let choice = random >> 40;
                if choice & 1 == 0 {
                    let pages: u64 = [1, 1, 1, 2, 3, 4, 8, 9, 16, 40][(choice >> 1) as usize % 10];
                    let alignment = if choice & 64 == 0 { PAGE } else { pages.next_power_of_two() * PAGE };
                    match allocator.allocate(pages * PAGE, alignment) {
                        Ok(iova) => {
                            assert_eq!(iova.get() % alignment, 0);
                            let place = range(iova.get(), pages * PAGE);
                            set(place, true);
                            mine.push(place);
                        }
                        Err(_) => failures += 1,
                    }
                } else if let Some(place) = mine.pop() {
                    let mut others = handed_over.lock().unwrap();
                    others.push(place);
                    let at = (choice >> 8) as usize % others.len();
                    let place = others.swap_remove(at);
                    drop(others);
                    set(place, false);
                    allocator.free(place).unwrap();
                }
                if mine.len() > 100 {
                    handed_over.lock().unwrap().append(&mut mine);
                }
            }
            handed_over.lock().unwrap().append(&mut mine);
            failures
        };
        let threads: Vec<_> = (1..=4).map(|seed| scope.spawn(move || work(seed))).collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).sum::<u64>()
    });
    assert!(failures > 0, "the end of the space was never met");
    for place in handed_over.into_inner().unwrap() {
        set(place, false);
        allocator.free(place).unwrap();
    }
    assert_eq!(allocator.statistics().free_bytes, PAGES * PAGE);
    assert_eq!(allocator.allocate(PAGES * PAGE, PAGE).unwrap().get(), window.first());
}
