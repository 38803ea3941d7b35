//! Arbitrary bytes as a trace, and what of it are events carried out.
//!
//! The bytes are a file as it is, compressed or not, or events with few addresses, so that they meet. Whatever is read as
//! an event must be read again from what it is shown as; whatever is carried out must be right, and nothing may be left.
//!
//! `cargo +nightly fuzz run trace -- -max_total_time=60`

#![no_main]

use arbitrary::Arbitrary;
use ioasid_replay::trace::{HEADER, Trace};
use ioasid_replay::{Mode, Options, Peer, play};
use ioasid_soft::iommu::TableKind;
use libfuzzer_sys::fuzz_target;

#[derive(Arbitrary, Debug)]
struct Input {
    content: Content,
    table: u8,
    threads: u8,
    deferred: bool,
}

#[derive(Arbitrary, Debug)]
enum Content {
    Bytes(Vec<u8>),
    Lines(Vec<Line>),
}

#[derive(Arbitrary, Debug)]
struct Line {
    cpu: u8,
    device: u8,
    operation: u8,
    page: u8,
    offset: u16,
    physical: u16,
    bytes: u16,
    /// From the last addresses down in place of from the first up.
    top: bool,
    direction: u8,
}

impl Line {
    fn text(&self) -> String {
        let Line { cpu, device, operation, page, offset, physical, bytes, .. } = self;
        let (page, offset) = (u64::from(page % 32) * 4096, u64::from(offset % 4096));
        let page = if self.top { u64::MAX - 4095 - page } else { page };
        let outcome = ["-", "fault", "gone"][usize::from(physical % 3)];
        let physical = format!("{:x}", u64::from(*physical) * 4096 + offset);
        let direction = ["TO_DEVICE", "FROM_DEVICE", "BIDIRECTIONAL"][usize::from(self.direction % 3)];
        let (operation, physical, direction) = match operation % 8 {
            0..=2 => ("map", physical.as_str(), direction),
            3 => ("unmap", "-", direction),
            4 => ("read", outcome, "TO_DEVICE"),
            5 => ("write", outcome, "FROM_DEVICE"),
            other => {
                let operation = if other == 6 { "attach" } else { "detach" };
                return format!("0,{},00:0{}.0,{operation},-,-,-,-\n", cpu % 4, device % 3);
            }
        };
        let iova = page + offset;
        format!("0,{},00:0{}.0,{operation},{iova:x},{physical},{bytes},{direction}\n", cpu % 4, device % 3)
    }
}

fuzz_target!(|input: Input| {
    let bytes = match &input.content {
        Content::Bytes(bytes) => bytes.clone(),
        Content::Lines(lines) => {
            format!("{HEADER}\n{}", lines.iter().map(Line::text).collect::<String>()).into_bytes()
        }
    };
    let Ok(trace) = Trace::new(bytes.as_slice()) else { return };
    for (_, event) in trace.flatten() {
        let text = event.to_string();
        let again = Trace::new(text.as_bytes()).expect("text").next().expect("an event").expect("an event");
        assert_eq!(again, (1, event));
    }
    // Those that have all addresses, and no place where nothing can be mapped: what is refused is no event of the table's.
    let (table, peer) = match input.table % 4 {
        0 => (TableKind::Native, None),
        1 => (TableKind::AmdV1, None),
        2 => (TableKind::Native, Some(Peer::BTree)),
        _ => (TableKind::Native, Some(Peer::VmMemory)),
    };
    let options = Options {
        table,
        peer,
        mode: if input.deferred && peer.is_none() { Mode::Deferred } else { Mode::Strict },
        threads: usize::from(input.threads % 3) + 1,
        memory: 1 << 20,
        ..Options::default()
    };
    let trace = Trace::new(bytes.as_slice()).expect("it was read before");
    if let Ok(report) = play(trace, &options, &mut |_| ()) {
        assert_eq!(report.wrong_unmaps.count, 0, "{report:#?}");
        // A recorded DMA to what a peer could not map is refused, and was not.
        assert!(report.wrong_dma.count == 0 || report.refused.count > 0, "{report:#?}");
        assert_eq!((report.faults.unwrap_or(0), report.left_charged_pages), (0, 0), "{report:#?}");
        // vm-memory's IOTLB does not have the last page.
        if matches!(input.content, Content::Lines(_)) && peer != Some(Peer::VmMemory) {
            assert!(report.is_right(), "{report:#?}");
        }
    }
});
