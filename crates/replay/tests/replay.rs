//! Replays: what is asked for happens, on every kind of table, in every mode, on several threads; and what does not fit is
//! counted, or stops the replay, as one likes.

use ioasid_replay::trace::{HEADER, Trace};
use ioasid_replay::{
    Disturbance, HistogramBin, LatencyStep, MOST_DEVICES, Mode, Options, Peer, PlayError, Report, Speed, play,
};
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
        let leaves: u64 = report.leaves.iter().flatten().map(|leaves| leaves.count).sum();
        assert!(leaves >= report.peak.mappings * 8 / 9 / 8, "{report:#?}");
        assert!(report.table_bytes.is_some_and(|bytes| bytes >= 4096), "{report:#?}");
        // A trace has few GiB of addresses, and a device remembers the way to each.
        assert!(report.iotlb_walks.is_some_and(|walks| walks >= report.devices as u64), "{report:#?}");
        assert!(report.iotlb_hit_rate.is_some_and(|rate| rate > 0.9 && rate < 1.0), "{report:#?}");
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

/// Devices of other formats come and go, memory is cut, revoked and dropped beside the trace's, and parts of the trace's own are
/// cut out and mapped back: nobody notices.
#[test]
fn a_replay_that_is_disturbed_is_right() {
    for (seed, name, table, mode, threads) in [
        (1, "boot-ext4-lazy", TableKind::Native, Mode::Deferred, 2),
        (2, "boot-ext4-lazy", TableKind::AmdV1, Mode::Strict, 1),
        (3, "nvme-rand4k-strict", TableKind::Sv39, Mode::Strict, 2),
        (4, "nvme-seq-thp-lazy", TableKind::VtdSecondStage, Mode::Deferred, 2),
    ] {
        let disturbance = Some(Disturbance { seed, threads: 2 });
        let options = Options { table, mode, threads, disturbance, strict_input: true, ..Options::default() };
        let report = replay(&first_of(name, 2_000), &options);
        right(&report);
        let disturbed = report.disturbed.unwrap();
        // Three episodes a thread at least; and an eighth of the trace's mappings.
        assert!(
            disturbed.episodes >= 6 && disturbed.cuts > 100 && disturbed.attachments > 0,
            "{disturbed:?}"
        );
        assert!(disturbed.dma > 0 && disturbed.dma_refused > 0, "{disturbed:?}");
    }
}

/// What cannot be disturbed, or is where the disturbances are.
#[test]
fn disturbances_need_room() {
    let disturbance = Some(Disturbance { seed: 0, threads: 1 });
    let options = Options { disturbance, ..Options::default() };
    let lines = "\
        0,0,00:03.0,map,fee00000,1000,4096,TO_DEVICE\n\
        0,0,00:03.0,map,1ffffff000,1000,4096,TO_DEVICE\n\
        0,0,00:03.0,map,2000000000,1000,4096,TO_DEVICE\n";
    let report = replay(lines, &options);
    right(&report);
    assert_eq!((report.maps, &report.misfits_by_kind), (1, &BTreeMap::from([("not for all tables", 2)])));
    let peer = Options { peer: Some(Peer::BTree), ..options.clone() };
    assert!(matches!(try_replay(lines, &peer), Err(PlayError::Options(_))));
    let none = Options { disturbance: Some(Disturbance { seed: 0, threads: 0 }), ..options };
    assert!(matches!(try_replay(lines, &none), Err(PlayError::Options(_))));
}

/// The peers do the same work, are checked in the same way, and say of what they do not have that they do not have it.
#[test]
fn peers_carry_out_the_same() {
    let lines = first_of("boot-ext4-lazy", 3_000);
    let ours = replay(&lines, &Options { threads: 2, strict_input: true, ..Options::default() });
    for peer in Peer::ALL {
        let options = Options { peer: Some(peer), threads: 2, strict_input: true, ..Options::default() };
        let report = replay(&lines, &options);
        right(&report);
        assert_eq!((report.table, report.peer), (peer.name(), true));
        assert_eq!((report.map.count, report.unmap.count), (ours.map.count, ours.unmap.count));
        assert_eq!((report.dma.count, report.dma_bytes), (ours.dma.count, ours.dma_bytes));
        assert_eq!((report.peak, report.live_at_end), (ours.peak, ours.live_at_end));
        assert!(report.leaves.is_none() && report.table_bytes.is_none() && report.faults.is_none());
        assert!(report.iotlb_walks.is_none() && report.iotlb_hit_rate.is_none());
        let options = Options { mode: Mode::Deferred, ..options };
        assert!(matches!(try_replay(&lines, &options), Err(PlayError::Options(_))));
    }
}

/// The last page of all addresses is one that vm-memory cannot say. It is refused, and nothing else is wrong.
#[test]
fn what_a_peer_cannot_do_is_refused() {
    let lines = "0,0,00:03.0,map,fffffffffffff000,1000,4096,BIDIRECTIONAL\n\
        0,1,00:03.0,map,ffffffffffffe000,3000,4096,BIDIRECTIONAL\n\
        0,0,00:03.0,unmap,ffffffffffffe000,-,8192,BIDIRECTIONAL\n";
    right(&replay(lines, &Options { peer: Some(Peer::BTree), ..Options::default() }));
    let report = replay(lines, &Options { peer: Some(Peer::VmMemory), ..Options::default() });
    assert_eq!((report.refused.count, report.refused.first[0].line), (1, 2), "{report:#?}");
    assert_eq!((report.wrong_dma.count, report.wrong_unmaps.count), (0, 0), "{report:#?}");
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
    assert_eq!(report.leaves.and_then(|all| Some(all.last()?.leaf_bytes)), Some(1 << 30));
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
        assert_eq!(report.wrong_dma.count + report.wrong_unmaps.count, 0, "{report:#?}");
        assert_eq!(report.faults, Some(0));
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

/// What `ioasid record` writes: the DMA that was made, what was refused, and a device that comes, moves and goes.
#[test]
fn recorded_dma_is_made_as_it_was() {
    let lines = "\
        0,0,00:01.0,attach,-,-,-,-\n\
        1,0,00:01.0,map,10000,5000,8192,TO_DEVICE\n\
        1,1,00:01.0,map,12000,5000,4096,FROM_DEVICE\n\
        2,0,00:01.0,read,10ff0,-,4096,TO_DEVICE\n\
        3,1,00:01.0,write,12010,-,7,FROM_DEVICE\n\
        3,1,00:01.0,write,11ff0,fault,32,FROM_DEVICE\n\
        4,0,00:01.0,read,12000,fault,4,TO_DEVICE\n\
        5,1,00:01.0,unmap,12000,-,4096,FROM_DEVICE\n\
        6,0,00:01.0,write,12010,fault,7,FROM_DEVICE\n\
        7,1,00:01.0,unmap,10000,-,8192,TO_DEVICE\n\
        8,0,00:01.0,detach,-,-,-,-\n\
        9,1,00:01.0,read,10000,fault,1,TO_DEVICE\n\
        9,1,00:01.0,attach,-,-,-,-\n\
        9,0,00:01.0,map,10000,9000,4096,BIDIRECTIONAL\n\
        9,1,00:01.0,read,10000,gone,4096,TO_DEVICE\n";
    let tables = TableKind::ALL.iter().map(|table| (*table, None));
    let peers = Peer::ALL.into_iter().map(|peer| (TableKind::default(), Some(peer)));
    for (table, peer) in tables.chain(peers) {
        for threads in [1, 2] {
            let options = Options { table, peer, threads, strict_input: true, ..Options::default() };
            let report = replay(lines, &options);
            right(&report);
            assert_eq!((report.events, report.attaches, report.recorded_dma), (15, 3, 7));
            // Some tables cannot forbid reading what may be written.
            assert!((3..=4).contains(&report.faults_as_recorded), "{report:#?}");
            assert_eq!((report.dma.count, report.dma_bytes), (3, 4096 + 7 + 4096));
            assert_eq!(report.live_at_end.mappings, 1);
        }
    }
}

/// Both views of a page, in one DMA.
#[test]
fn recorded_dma_may_reach_the_same_memory_twice() {
    let lines = "\
        0,0,00:01.0,attach,-,-,-,-\n\
        0,0,00:01.0,map,10000,5000,4096,BIDIRECTIONAL\n\
        0,0,00:01.0,map,11000,5000,4096,BIDIRECTIONAL\n\
        0,0,00:01.0,write,10003,-,8185,FROM_DEVICE\n\
        0,0,00:01.0,read,10003,-,8185,TO_DEVICE\n";
    let report = replay(lines, &Options { strict_input: true, ..Options::default() });
    right(&report);
    assert_eq!(report.dma_bytes, 2 * 8185);
}

#[test]
fn recorded_dma_that_does_not_fit_is_named_and_left_out() {
    let lines = "\
        0,0,00:01.0,attach,-,-,-,-\n\
        0,0,00:01.0,read,10000,-,16,TO_DEVICE\n\
        0,0,00:01.0,map,10000,5000,4096,TO_DEVICE\n\
        0,0,00:01.0,read,10ff8,-,16,TO_DEVICE\n\
        0,0,00:01.0,write,10000,-,16,FROM_DEVICE\n\
        0,0,00:01.0,read,10000,fault,16,TO_DEVICE\n\
        0,0,00:01.0,detach,-,-,-,-\n\
        0,0,00:01.0,read,10000,-,16,TO_DEVICE\n";
    let report = replay(lines, &Options::default());
    right(&report);
    let kinds = [("DMA let through unmapped", 4), ("DMA refused though mapped", 1)];
    assert_eq!(report.misfits_by_kind, BTreeMap::from(kinds));
    assert_eq!((report.events, report.recorded_dma, report.dma.count), (3, 0, 0));
}

/// A device whose DMA is the replay's own is not detached, and has no other.
#[test]
fn a_device_that_begins_with_a_map_has_no_recorded_dma() {
    let lines = "\
        0,0,00:01.0,map,10000,5000,4096,TO_DEVICE\n\
        0,0,00:01.0,detach,-,-,-,-\n\
        0,0,00:01.0,read,10000,fault,16,TO_DEVICE\n\
        0,0,00:01.0,unmap,10000,-,4096,TO_DEVICE\n";
    let report = replay(lines, &Options::default());
    right(&report);
    assert_eq!(report.misfits_by_kind, BTreeMap::from([("DMA not recorded from the start", 2)]));
    assert_eq!((report.events, report.dma_bytes), (2, 4096));
}

/// A refused DMA leaves the memory as it was, and others may look at that meanwhile. A peer writes no first piece either.
#[test]
fn a_refused_dma_moves_nothing() {
    let mut lines = "0,1,00:01.0,attach,-,-,-,-\n0,1,00:01.0,map,10000,5000,4096,BIDIRECTIONAL\n".to_owned();
    for _ in 0..300 {
        lines += "0,1,00:01.0,write,10000,fault,8192,FROM_DEVICE\n";
        lines +=
            "0,0,00:02.0,map,10000,5000,4096,BIDIRECTIONAL\n0,0,00:02.0,unmap,10000,-,4096,BIDIRECTIONAL\n";
    }
    for peer in [None, Some(Peer::BTree), Some(Peer::VmMemory)] {
        let report = replay(&lines, &Options { peer, threads: 2, strict_input: true, ..Options::default() });
        right(&report);
        assert_eq!((report.faults_as_recorded, report.dma.count), (300, 600));
    }
}

/// What was recorded with its DMA may be detached, and use all addresses: it is not disturbed, but what is beside it is.
#[test]
fn recorded_dma_is_not_disturbed() {
    let mut lines =
        "0,1,00:01.0,attach,-,-,-,-\n0,1,00:01.0,map,2000000000,5000,4096,BIDIRECTIONAL\n".to_owned();
    for _ in 0..100 {
        lines += "0,1,00:01.0,detach,-,-,-,-\n0,1,00:01.0,write,2000000000,fault,1,FROM_DEVICE\n";
        lines += "0,1,00:01.0,attach,-,-,-,-\n0,1,00:01.0,write,2000000000,-,1,FROM_DEVICE\n";
        lines +=
            "0,0,00:02.0,map,10000,5000,32768,BIDIRECTIONAL\n0,0,00:02.0,unmap,10000,-,32768,BIDIRECTIONAL\n";
    }
    let disturbance = Some(Disturbance { seed: 5, threads: 1 });
    let options = Options { disturbance, threads: 2, strict_input: true, ..Options::default() };
    let report = replay(&lines, &options);
    right(&report);
    assert_eq!((report.faults_as_recorded, report.dma.count), (100, 300));
    assert!(report.disturbed.is_some_and(|disturbed| disturbed.episodes > 0 && disturbed.cuts > 0));
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

/// A quarter of an hour of what was recorded is not waited for when the line after it is wrong.
#[test]
fn a_wrong_line_is_named_before_the_time_of_those_before_it() {
    for wrong in ["nonsense\n", "0,0,00:03.0,unmap,0,-,4096,TO_DEVICE\n"] {
        let mut lines = String::new();
        // Never more than one mapping: when there are more than ever before the tables are described, which is waited for.
        for event in 0..50u64 {
            let (cpu, second) = (event % 3, event * 10);
            writeln!(lines, "{second}000000000,{cpu},00:03.0,map,{event:x}000,0,4096,TO_DEVICE").unwrap();
            writeln!(lines, "{second}000000000,0,00:03.0,unmap,{event:x}000,-,4096,TO_DEVICE").unwrap();
        }
        lines += wrong;
        let strict = Options { strict_input: true, speed: Speed::Recorded, threads: 3, ..Options::default() };
        let began = Instant::now();
        let error = try_replay(&lines, &strict).unwrap_err();
        assert!(error.to_string().starts_with("line 102: "), "{error}");
        assert!(began.elapsed() < Duration::from_secs(60), "{:?}", began.elapsed());
    }
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
