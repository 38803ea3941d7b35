//! Replays: what is asked for happens, on every kind of table, in every mode, on several threads; and what does not fit is
//! counted, or stops the replay, as one likes.

use ioasid_replay::trace::{HEADER, Trace};
use ioasid_replay::{HistogramBin, LatencyStep, MOST_DEVICES, Mode, Options, PlayError, Report, Speed, play};
use ioasid_soft::iommu::TableKind;
use proptest::collection::vec;
use proptest::prelude::*;
use std::collections::BTreeMap;
use std::fmt::Write;
use std::time::{Duration, Instant};

fn try_replay(lines: &str, options: &Options) -> Result<Report, PlayError> {
    let text = format!("{HEADER}\n{lines}");
    play(Trace::new(text.as_bytes()).unwrap(), options, &mut |_| ())
}

fn replay(lines: &str, options: &Options) -> Report {
    try_replay(lines, options).unwrap()
}

fn right(report: &Report) {
    assert!(report.is_right(), "{report:#?}");
}

/// The first events of a trace of the project, as text.
fn first_of(name: &str, events: usize) -> String {
    let path = format!("{}/../../traces/{name}.csv.zst", env!("CARGO_MANIFEST_DIR"));
    let trace = Trace::new(std::fs::File::open(path).unwrap()).unwrap();
    let mut text = String::new();
    for entry in trace.take(events) {
        writeln!(text, "{}", entry.unwrap().1).unwrap();
    }
    text
}

#[test]
fn the_traces_of_the_project_replay() {
    for (name, table, mode, threads) in [
        ("boot-ext4-lazy", TableKind::Native, Mode::Deferred, 1),
        ("boot-ext4-lazy", TableKind::AmdV1, Mode::Strict, 2),
        ("nvme-rand4k-strict", TableKind::VtdSecondStage, Mode::Strict, 2),
        ("nvme-seq-thp-lazy", TableKind::Sv48, Mode::Deferred, 2),
    ] {
        let events = if name == "nvme-seq-thp-lazy" { 2_000 } else { 10_000 };
        let options = Options { table, mode, threads, strict_input: true, ..Options::default() };
        let report = replay(&first_of(name, events), &options);
        right(&report);
        assert_eq!(report.events, events as u64);
        assert_eq!((report.map.count, report.unmap.count), (report.maps, report.unmaps));
        // One for each mapping, and two where the device may do both.
        assert!(report.dma.count >= report.maps && report.dma_bytes > report.maps * 4096);
        let leaves: u64 = report.leaves.iter().map(|leaves| leaves.count).sum();
        assert!(leaves >= report.peak.mappings * 8 / 9 / 8 && report.table_bytes >= 4096, "{report:#?}");
        assert_eq!((report.table, report.mode, report.threads), (table.name(), mode.name(), threads));
    }
}

/// The parts of a replay, over time and by latency, add up to the whole, on any number of threads; and what was live when does
/// not depend on how it was replayed.
#[test]
fn the_course_is_that_of_the_recording() {
    let lines = first_of("boot-ext4-lazy", 6_000);
    let mut courses = Vec::new();
    for (threads, mode, table) in
        [(1, Mode::Strict, TableKind::Native), (3, Mode::Deferred, TableKind::VtdSecondStage)]
    {
        let report = replay(&lines, &Options { threads, mode, table, ..Options::default() });
        right(&report);
        let course = report.course;
        let sum = |count: fn(&LatencyStep) -> u64| course.latency.iter().map(count).sum::<u64>();
        assert_eq!(sum(|step| step.map.count), report.map.count);
        assert_eq!(sum(|step| step.unmap.count), report.unmap.count);
        assert_eq!(sum(|step| step.dma.count), report.dma.count);
        let sum = |count: fn(&HistogramBin) -> u64| report.histogram.iter().map(count).sum::<u64>();
        assert_eq!(sum(|bin| bin.maps), report.map.count);
        assert_eq!(sum(|bin| bin.unmaps), report.unmap.count);
        assert_eq!(sum(|bin| bin.dma), report.dma.count);
        let most = course.live.iter().map(|step| (step.most_mappings, step.most_bytes));
        let (mappings, bytes): (Vec<_>, Vec<_>) = most.unzip();
        assert_eq!(mappings.into_iter().max(), Some(report.peak.mappings));
        assert_eq!(bytes.into_iter().max(), Some(report.peak.bytes));
        courses.push((course.recorded_nanoseconds, course.live_step_nanoseconds, course.live));
    }
    assert_eq!(courses[0], courses[1]);
    assert!(courses[0].2.len() > 100);
}

/// The recording begins with its first event, and what is out of order is with the latest before it.
#[test]
fn times_are_counted_from_the_first_event() {
    let event = |time: u64, page: u64| format!("{time},0,00:03.0,map,{page:x}000,1000,4096,TO_DEVICE\n");
    let first = 1 << 60;
    let lines = [event(first, 1), event(first + 5_000, 2), event(7, 3)].concat();
    let course = replay(&lines, &Options::default()).course;
    assert_eq!(course.recorded_nanoseconds, 5_000);
    assert_eq!(course.live_step_nanoseconds, 1024);
    let live: Vec<_> = course.live.iter().map(|step| step.most_mappings).collect();
    assert_eq!(live, [1, 1, 1, 1, 3]);
    let counts: Vec<_> = course.latency.iter().map(|step| (step.begin_nanoseconds, step.map.count)).collect();
    assert_eq!(counts, [(0, 1), (4096, 2)]);
    let none = replay("", &Options::default());
    assert!(none.course.live.is_empty() && none.course.latency.is_empty() && none.histogram.is_empty());
}

#[test]
fn every_kind_of_table_serves() {
    let lines = first_of("boot-ext4-lazy", 1_500);
    for table in TableKind::ALL {
        for mode in [Mode::Strict, Mode::Deferred] {
            right(&replay(&lines, &Options { table, mode, strict_input: true, ..Options::default() }));
        }
    }
}

/// One address is mapped by one processor and unmapped by the other, over and over, with other memory each time.
#[test]
fn the_order_at_an_address_holds_between_threads() {
    let mut lines = String::new();
    for round in 0..4_000u64 {
        let iova = 0x10_0000 + (round % 3) * 4096;
        let (mapper, unmapper) = (round % 2, round / 2 % 2);
        writeln!(lines, "0,{mapper},00:03.0,map,{iova:x},{:x},4096,BIDIRECTIONAL", round * 4096).unwrap();
        if round % 3 == 2 {
            writeln!(lines, "0,{unmapper},00:03.0,unmap,100000,-,12288,BIDIRECTIONAL").unwrap();
        }
    }
    for (threads, mode) in [(2, Mode::Strict), (2, Mode::Deferred), (1, Mode::Strict)] {
        let options = Options { threads, mode, strict_input: true, ..Options::default() };
        let report = replay(&lines, &options);
        right(&report);
        assert_eq!((report.maps, report.unmaps), (4_000, 1_333));
    }
}

/// What two processors map for two devices is the same memory: each finds its own bytes in it.
#[test]
fn memory_that_mappings_share_is_no_mistake() {
    let mut lines = String::new();
    for round in 0..200 {
        for cpu in 0..2 {
            let iova = (round * 2 + cpu) * 262_144;
            writeln!(lines, "0,{cpu},00:0{cpu}.0,map,{iova:x},5000,262144,BIDIRECTIONAL").unwrap();
            writeln!(lines, "0,{cpu},00:0{cpu}.0,unmap,{iova:x},-,262144,BIDIRECTIONAL").unwrap();
        }
    }
    right(&replay(&lines, &Options { threads: 2, strict_input: true, ..Options::default() }));
}

#[test]
fn bytes_within_pages_are_used_and_whole_pages_are_mapped() {
    let lines = "\
        0,0,00:04.0,map,ffffa840,122595840,1522,FROM_DEVICE\n\
        0,0,00:04.0,map,ffff9ff0,1225aaff0,20,TO_DEVICE\n\
        1,0,00:04.0,unmap,ffffa840,-,1522,FROM_DEVICE\n";
    // The second ends in the first byte of the page of the first.
    let report = replay(lines, &Options::default());
    assert_eq!(report.misfits_by_kind, BTreeMap::from([("mapped already", 1)]));
    let apart = lines.replace("ffff9ff0,1225aaff0,20", "ffff8ff0,1225aaff0,20");
    let report = replay(&apart, &Options { strict_input: true, ..Options::default() });
    right(&report);
    assert_eq!(report.dma_bytes, 1522 + 20);
    assert_eq!((report.live_at_end.mappings, report.live_at_end.bytes), (1, 8192));
    assert_eq!((report.peak.mappings, report.peak.bytes), (2, 12288));
}

/// More than a piece is moved; of more than two, the ends.
#[test]
fn long_mappings_are_used_at_both_ends() {
    let lines =
        "0,0,00:04.0,map,40000000,40000000,1073741824,TO_DEVICE\n0,0,00:04.0,map,0,0,200000,FROM_DEVICE\n";
    let report = replay(lines, &Options::default());
    right(&report);
    assert_eq!((report.dma_bytes, report.dma.count), (256 * 1024 + 200_000, 4));
    assert_eq!(report.leaves.last().map(|leaves| leaves.leaf_bytes), Some(1 << 30));
}

#[test]
fn addresses_beyond_the_memory_begin_again() {
    let options = Options { memory: 1 << 20, ..Options::default() };
    let lines = "\
        0,0,00:04.0,map,ff000,7fff000ff000,8192,BIDIRECTIONAL\n\
        0,0,00:04.0,map,fffffffffff00000,ffffffffffe00000,1048576,BIDIRECTIONAL\n\
        0,0,00:04.0,map,10000000,0,1048577,BIDIRECTIONAL\n";
    let report = replay(lines, &options);
    right(&report);
    assert_eq!((report.maps, report.misfits.count), (2, 1));
    assert_eq!(report.misfits_by_kind, BTreeMap::from([("longer than memory", 1)]));
    assert!(try_replay("", &Options { memory: 5000, ..Options::default() }).is_err());
    assert!(try_replay("", &Options { threads: 0, ..Options::default() }).is_err());
}

#[test]
fn what_does_not_fit_is_named_and_left_out() {
    let lines = "\
        0,0,00:03.0,unmap,1000,-,4096,TO_DEVICE\n\
        0,0,00:03.0,map,1000,1000,8192,TO_DEVICE\n\
        0,0,00:03.0,map,2000,9000,4096,TO_DEVICE\n\
        0,0,00:03.0,unmap,2000,-,4096,TO_DEVICE\n\
        nonsense\n\
        0,0,00:03.0,map,4000,9000,4096,TO_DEVICE\n\
        0,0,00:03.0,unmap,1000,-,16384,TO_DEVICE\n\
        0,0,00:04.0,unmap,1000,-,16384,TO_DEVICE\n";
    let report = replay(lines, &Options::default());
    right(&report);
    assert_eq!((report.events, report.maps, report.unmaps), (3, 2, 1));
    let kinds =
        [("mapped already", 1), ("nothing mapped", 2), ("unmap of a part", 1), ("unmap over a hole", 1)];
    assert_eq!(report.misfits_by_kind, BTreeMap::from(kinds));
    assert_eq!((report.misfits.count, report.malformed.count), (5, 1));
    assert_eq!(report.malformed.first[0].line, 6);
    let lines_of_misfits: Vec<u64> = report.misfits.first.iter().map(|note| note.line).collect();
    assert_eq!(lines_of_misfits, [2, 4, 5, 8, 9]);

    let strict = Options { strict_input: true, ..Options::default() };
    assert!(matches!(try_replay(lines, &strict), Err(PlayError::Misfit { line: 2, .. })));
    assert!(matches!(try_replay("0,0\n", &strict), Err(PlayError::Malformed { line: 2, .. })));
}

/// Devices may not use the window of interrupts: the space says so, and what was refused is missing nowhere else.
#[test]
fn what_the_space_refuses_is_wrong_and_said() {
    let lines = "\
        0,0,00:03.0,map,fee00000,1000,4096,TO_DEVICE\n\
        0,1,00:03.0,map,fedff000,2000,4096,TO_DEVICE\n\
        0,1,00:03.0,unmap,fedff000,-,8192,TO_DEVICE\n\
        0,1,00:03.0,map,fee00000,1000,4096,TO_DEVICE\n";
    for threads in [1, 2] {
        let options = Options { table: TableKind::VtdSecondStage, threads, ..Options::default() };
        let report = replay(lines, &options);
        assert!(!report.is_right());
        assert_eq!((report.refused.count, report.refused.first[0].line), (2, 2), "{report:#?}");
        assert_eq!(report.wrong_dma.count + report.wrong_unmaps.count + report.faults, 0, "{report:#?}");
        right(&replay(lines, &Options { table: TableKind::Sv48, threads, ..Options::default() }));
    }
}

#[test]
fn a_trace_that_ends_in_the_middle_is_replayed_as_far_as_it_goes() {
    let text = format!("{HEADER}\n{}", first_of("boot-ext4-lazy", 6_000));
    let compressed = zstd::encode_all(text.as_bytes(), 3).unwrap();
    let half = &compressed[..compressed.len() / 2];
    let report = play(Trace::new(half).unwrap(), &Options::default(), &mut |_| ()).unwrap();
    assert!(report.events > 500 && report.unreadable.is_some() && !report.is_right());
    assert_eq!(report.wrong_dma.count + report.refused.count + report.left_charged_pages, 0);
    let strict = Options { strict_input: true, ..Options::default() };
    assert!(matches!(play(Trace::new(half).unwrap(), &strict, &mut |_| ()), Err(PlayError::Trace(_))));
}

#[test]
fn devices_are_bounded() {
    let mut lines = String::new();
    for device in 0..MOST_DEVICES + 3 {
        let (bus, slot, function) = (device >> 8, device >> 3 & 31, device & 7);
        writeln!(lines, "0,0,{bus:x}:{slot:x}.{function},map,0,0,4096,TO_DEVICE").unwrap();
    }
    let report = replay(&lines, &Options { memory: 1 << 20, ..Options::default() });
    right(&report);
    assert_eq!((report.devices, report.misfits.count), (MOST_DEVICES, 3));
}

#[test]
fn the_recorded_time_is_kept() {
    let lines = "\
        0,0,00:03.0,map,1000,1000,4096,TO_DEVICE\n\
        60000000,0,00:03.0,unmap,1000,-,4096,TO_DEVICE\n\
        50000000,0,00:03.0,map,1000,1000,4096,TO_DEVICE\n\
        70000000,1,00:03.0,unmap,1000,-,4096,TO_DEVICE\n";
    let began = Instant::now();
    let options = Options { speed: Speed::Recorded, threads: 2, ..Options::default() };
    right(&replay(lines, &options));
    // The third event is late already; the fourth comes 20 ms after it.
    assert!(began.elapsed() >= Duration::from_millis(80));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    /// Any events at all: what is carried out is what a map from pages to lines says, and all of it is right.
    #[test]
    fn any_events_replay_as_a_plain_model_says(
        events in vec((0u64..40, 1u64..8, any::<bool>(), 0u32..4, 0usize..2, 0u64..64), 1..120),
        threads in 1usize..4,
        deferred: bool,
        table in prop::sample::select(TableKind::ALL.as_slice()),
    ) {
        let mut lines = String::new();
        let mut model = BTreeMap::<(usize, u64), usize>::new();
        let (mut maps, mut unmaps, mut misfits) = (0, 0, 0);
        for (number, (page, count, map, cpu, device, physical)) in events.into_iter().enumerate() {
            let (iova, bytes) = (page * 4096, count * 4096);
            let pages: Vec<_> = (page..page + count).map(|page| (device, page)).collect();
            let found: Vec<_> = pages.iter().filter_map(|page| model.get(page).copied()).collect();
            if map {
                writeln!(lines, "0,{cpu},00:0{device}.0,map,{iova:x},{:x},{bytes},BIDIRECTIONAL", physical * 4096).unwrap();
                if found.is_empty() {
                    maps += 1;
                    model.extend(pages.iter().map(|page| (*page, number)));
                } else {
                    misfits += 1;
                }
            } else {
                writeln!(lines, "0,{cpu},00:0{device}.0,unmap,{iova:x},-,{bytes},BIDIRECTIONAL").unwrap();
                let all_of = |line: usize| model.values().filter(|known| **known == line).count();
                let whole = found.iter().all(|line| all_of(*line) == found.iter().filter(|found| *found == line).count());
                if whole && !found.is_empty() {
                    unmaps += 1;
                    misfits += u64::from(found.len() < pages.len());
                    model.retain(|page, _| !pages.contains(page));
                } else {
                    misfits += 1;
                }
            }
        }
        let mode = if deferred { Mode::Deferred } else { Mode::Strict };
        let options = Options { table, mode, threads, memory: 1 << 20, ..Options::default() };
        let report = replay(&lines, &options);
        prop_assert!(report.is_right(), "{report:#?}");
        prop_assert_eq!((report.maps, report.unmaps, report.misfits.count), (maps, unmaps, misfits));
        prop_assert_eq!(report.live_at_end.bytes, model.len() as u64 * 4096);
    }
}
