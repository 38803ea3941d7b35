//! Pictures are XML, say what they should, and show what is in the report, whatever that is.

use std::collections::BTreeSet;

use ioasid_replay::{Course, HistogramBin, Latency, LiveStep, Options, Report, play, trace::Trace};

use super::{draw_detail, draw_sides};
use crate::replay::comparison::Row;

const HEADER: &str = "t_ns,cpu,dev,op,iova,phys,bytes,dir\n";

fn replayed(lines: &str) -> Report {
    let trace = format!("{HEADER}{lines}");
    play(Trace::new(trace.as_bytes()).unwrap(), &Options::default(), &mut |_| ()).unwrap()
}

/// A hundred mappings come one each millisecond, and go.
fn up_and_down() -> Report {
    let page = |number: u64| 0x10_0000 + number * 0x2000;
    let maps = (0..100).map(|number| {
        format!(
            "{},0,00:03.0,map,{:x},{:x},8192,BIDIRECTIONAL\n",
            number * 1_000_000,
            page(number),
            page(number)
        )
    });
    let unmaps = (0..100).map(|number| {
        let time = (100 + number) * 1_000_000;
        format!("{time},0,00:03.0,unmap,{:x},-,8192,BIDIRECTIONAL\n", page(number))
    });
    replayed(&maps.chain(unmaps).collect::<String>())
}

/// All numbers of attributes that say where something is, and all texts. Everything must be on the paper.
fn texts(picture: &str) -> BTreeSet<String> {
    let document = roxmltree::Document::parse(picture).unwrap();
    let view = document.root_element().attribute("viewBox").unwrap();
    let size: Vec<f64> = view.split(' ').map(|number| number.parse().unwrap()).collect();
    let [_, _, width, height] = size[..] else { panic!("{view}") };
    let mut texts = BTreeSet::new();
    for node in document.descendants().filter(|node| node.is_element()) {
        let on_paper = |value: &str, most: f64| {
            let value: f64 = value.parse().unwrap_or_else(|_| panic!("{value:?} in {node:?}"));
            assert!((0.0..=most).contains(&value), "{value} is beyond the paper's {most}: {node:?}");
        };
        for (names, most) in [(["x", "x1", "x2", "cx"], width), (["y", "y1", "y2", "cy"], height)] {
            names.into_iter().filter_map(|name| node.attribute(name)).for_each(|value| on_paper(value, most));
        }
        for (x, y) in points(&node) {
            on_paper(&x.to_string(), width);
            on_paper(&y.to_string(), height);
        }
        if node.has_tag_name("text") {
            let points = node.attribute("font-size").unwrap().parse::<f64>().unwrap() / 3.528;
            assert!(points >= 8.99, "{points} points: {node:?}");
            texts.insert(node.text().unwrap_or_default().trim().to_owned());
        }
    }
    texts
}

fn points(node: &roxmltree::Node<'_, '_>) -> Vec<(f64, f64)> {
    let pairs = node.attribute("points").unwrap_or_default().split_whitespace();
    let number = |text: &str| text.parse::<f64>().unwrap();
    pairs.map(|pair| pair.split_once(',').unwrap()).map(|(x, y)| (number(x), number(y))).collect()
}

#[test]
fn a_replay_is_drawn_with_all_its_parts() {
    let report = up_and_down();
    let picture = draw_detail("up & down.csv", &report).unwrap();
    let texts = texts(&picture);
    for words in [
        "up & down.csv",
        "Live mappings",
        "mappings, most and least",
        "bytes, most",
        "time in the recording (ms)",
        "bytes (KiB)",
        "Latency",
        "p50",
        "p99",
        "map",
        "unmap",
        "DMA",
        "Latency histogram",
        "time for one",
        "calls",
        "1 µs",
    ] {
        assert!(texts.contains(words), "{words}: {texts:?}");
    }
    let setting =
        texts.iter().find(|text| text.starts_with("native table, strict, 1 thread, 1 device; 200 events"));
    assert!(setting.is_some(), "{texts:?}");
}

/// The line of the live mappings is a triangle: it rises to the middle and falls again.
#[test]
fn the_line_of_live_mappings_is_what_the_report_says() {
    let picture = draw_detail("up and down", &up_and_down()).unwrap();
    let document = roxmltree::Document::parse(&picture).unwrap();
    let lines = document.descendants().filter(|node| node.has_tag_name("polyline"));
    let mut lines =
        lines.filter(|node| node.attribute("stroke") == Some("#0072B2")).map(|node| points(&node));
    let line = lines.find(|line| line.len() > 100).unwrap();
    let highest = line.iter().map(|(_, y)| *y).fold(f64::MAX, f64::min);
    let (left, right) = (line[0].0, line[line.len() - 1].0);
    let tops: Vec<_> = line.iter().filter(|(_, y)| *y <= highest + 2.0).map(|(x, _)| *x).collect();
    let middle = (left + right) / 2.0;
    assert!(tops.iter().all(|x| (x - middle).abs() < (right - left) * 0.05), "{tops:?} around {middle}");
    let before: Vec<_> = line.iter().filter(|(x, _)| *x < tops[0]).collect();
    assert!(before.len() > 50 && before.windows(2).all(|pair| pair[0].1 >= pair[1].1), "{before:?}");
}

#[test]
fn traces_with_little_or_nothing_in_them_are_drawn() {
    let one = "77,0,00:03.0,map,1000,1000,4096,TO_DEVICE\n";
    for lines in ["", "nonsense\n", one] {
        let report = replayed(lines);
        texts(&draw_detail("little", &report).unwrap());
        let row = Row { trace: "little", label: "native strict".to_owned(), report: &report };
        texts(&draw_sides("sides", &[row]).unwrap());
    }
    texts(&draw_sides("none", &[]).unwrap());
}

/// What no trace of this world has, but a file may.
#[test]
fn numbers_without_measure_are_drawn() {
    let extreme = |latency: u64| Latency {
        count: u64::MAX,
        p50_nanoseconds: latency,
        p99_nanoseconds: latency,
        p999_nanoseconds: u64::MAX,
        ..Latency::default()
    };
    let live = [0, 1 << 63].map(|begin_nanoseconds| LiveStep {
        begin_nanoseconds,
        least_mappings: 0,
        most_mappings: u64::MAX,
        most_bytes: u64::MAX,
    });
    let bin = HistogramBin { from_nanoseconds: 1, below_nanoseconds: 2, maps: u64::MAX, unmaps: 1, dma: 0 };
    let course = Course {
        recorded_nanoseconds: u64::MAX,
        live_step_nanoseconds: 1 << 63,
        live: live.to_vec(),
        ..Course::default()
    };
    let (map, dma) = (extreme(0), extreme(u64::MAX));
    let report = Report {
        course,
        histogram: vec![bin],
        map,
        dma,
        events_per_second: u64::MAX as f64 * 1e9,
        ..Report::default()
    };
    texts(&draw_detail("extreme", &report).unwrap());
    texts(&draw_sides("extreme", &[Row { trace: "t", label: "l".repeat(999), report: &report }]).unwrap());
}

#[test]
fn names_that_xml_and_paper_have_no_room_for_are_shown_as_far_as_they_fit() {
    let report = up_and_down();
    let name = format!("{}/<\"a\u{1}b\n&>.csv", "directory".repeat(40));
    for picture in [
        draw_detail(&name, &report).unwrap(),
        draw_sides("x", &[Row { trace: &name, label: "native".to_owned(), report: &report }]).unwrap(),
    ] {
        let texts = texts(&picture);
        let shown = texts.iter().find(|text| text.ends_with("/<\"a\u{fffd}b\u{fffd}&>.csv"));
        assert!(shown.is_some_and(|text| text.starts_with('…')), "{texts:?}");
    }
}

#[test]
fn sides_have_a_row_for_each_and_a_part_for_each_trace() {
    let report = up_and_down();
    let row = |trace, label: &str| Row { trace, label: label.to_owned(), report: &report };
    let rows = [row("a.csv", "native strict"), row("b.csv", "vtd strict"), row("a.csv", "btree")];
    let picture = draw_sides("Replays side by side", &rows).unwrap();
    let texts = texts(&picture);
    for words in [
        "a.csv",
        "b.csv",
        "native strict",
        "vtd strict",
        "btree",
        "map",
        "unmap",
        "DMA",
        "p99.9",
        "per second",
    ] {
        assert!(texts.contains(words), "{words}: {texts:?}");
    }
    // A disc at the p50 of each row and kind, and of the legends, is right of nothing that is later.
    let document = roxmltree::Document::parse(&picture).unwrap();
    let discs = document.descendants().filter(|node| node.has_tag_name("circle"));
    let discs = discs.filter(|node| node.attribute("r") == Some("8")).count();
    assert_eq!(discs, 3 * 3 + 2);
    let lower = draw_sides("x", &rows[..1]).unwrap();
    assert!(lower.len() < picture.len() / 2);
}
