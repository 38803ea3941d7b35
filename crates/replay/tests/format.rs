//! The format: what is written is read, what is not an event is named by its line, and nothing ends the reading before the
//! file does.

use ioasid::IovaRange;
use ioasid_replay::trace::{
    DeviceAddress, Direction, Event, HEADER, LONGEST_DMA, LONGEST_LINE, Malformed, Operation, Outcome, Trace,
    TraceError, Writer,
};
use proptest::collection::vec;
use proptest::prelude::*;
use std::io::{self, Read};

fn read(bytes: &[u8]) -> Vec<Result<(u64, Event), TraceError>> {
    match Trace::new(bytes) {
        Ok(trace) => trace.collect(),
        Err(error) => vec![Err(error)],
    }
}

/// The reason why a line is no event; it stands behind a header and before an event, which is read.
fn reason(line: &[u8]) -> Malformed {
    let text = [HEADER.as_bytes(), b"\n", line, b"\n9,0,00:03.0,unmap,0,-,4096,TO_DEVICE\n"].concat();
    let mut entries = read(&text);
    assert!(matches!(entries.pop(), Some(Ok((3, Event { time: 9, .. })))));
    match entries.pop() {
        Some(Err(TraceError::Malformed { line: 2, reason })) => reason,
        other => panic!("{other:?}"),
    }
}

fn event() -> impl Strategy<Value = Event> {
    let direction =
        prop_oneof![Just(Direction::ToDevice), Just(Direction::FromDevice), Just(Direction::Bidirectional)];
    let numbers = (any::<u64>(), any::<u32>(), any::<(u16, u16)>());
    (numbers, any::<u64>(), any::<u64>(), any::<u64>(), 0..6, direction).prop_map(
        |((time, cpu, (segment, requester)), first, physical, length, operation, direction)| {
            let device = DeviceAddress { segment, requester };
            let outcome = [Outcome::Done, Outcome::Fault, Outcome::Gone][(length % 3) as usize];
            let (operation, direction) = match operation {
                0 => (None, direction),
                1 => (Some(Operation::Unmap), direction),
                2 => (Some(Operation::Read(outcome)), Direction::ToDevice),
                3 => (Some(Operation::Write(outcome)), Direction::FromDevice),
                other => {
                    let operation = if other == 4 { Operation::Attach } else { Operation::Detach };
                    let (range, direction) = (IovaRange::ALL, Direction::Bidirectional);
                    return Event { time, cpu, device, operation, range, bytes: 0, direction };
                }
            };
            let physical = physical & !4095 | first & 4095;
            let longest = u64::MAX - first.max(physical);
            let most = match operation {
                Some(Operation::Read(_) | Operation::Write(_)) => LONGEST_DMA,
                _ => u64::MAX,
            };
            let bytes = length.min(longest).min(most).max(1);
            let range = IovaRange::with_length(first, bytes).unwrap();
            let operation = operation.unwrap_or(Operation::Map { physical });
            Event { time, cpu, device, operation, range, bytes, direction }
        },
    )
}

proptest! {
    #[test]
    fn what_is_written_is_read(events in vec(event(), 0..20), header: bool, windows: bool, end: bool) {
        let end_of_line = if windows { "\r\n" } else { "\n" };
        let mut lines: Vec<String> = events.iter().map(Event::to_string).collect();
        if header || lines.is_empty() {
            lines.insert(0, HEADER.to_owned());
        }
        let mut text = lines.join(end_of_line);
        if end {
            text += end_of_line;
        }
        let first = lines.len() - events.len() + 1;
        let plain: Vec<_> = read(text.as_bytes()).into_iter().map(Result::unwrap).collect();
        let expected: Vec<_> = (first as u64..).zip(events).collect();
        prop_assert_eq!(&plain, &expected);
        let compressed = zstd::encode_all(text.as_bytes(), 1).unwrap();
        let read: Vec<_> = read(&compressed).into_iter().map(Result::unwrap).collect();
        prop_assert_eq!(read, expected);
    }

    /// Whatever the bytes are: at most one answer for each line, and none after one that ends the trace.
    #[test]
    fn any_bytes_are_read_to_their_end(bytes in vec(prop_oneof![any::<u8>(), Just(b'\n'), Just(b',')], 0..600), header: bool) {
        let bytes = if header { [HEADER.as_bytes(), b"\n", &bytes].concat() } else { bytes };
        let lines = bytes.split(|byte| *byte == b'\n').count();
        let entries = read(&bytes);
        prop_assert!(entries.len() <= lines);
        let last = entries.len().saturating_sub(1);
        let ends = |entry: &Result<_, TraceError>| matches!(entry, Err(error) if !error.is_of_one_line());
        prop_assert!(!entries.iter().take(last).any(ends));
    }

    /// An event with one byte changed is another event or a line that is named; what follows is read all the same.
    #[test]
    fn one_wrong_byte_is_one_wrong_line(event in event(), at: prop::sample::Index, byte: u8) {
        let good = event.to_string();
        let mut bad = good.clone().into_bytes();
        let at = at.index(bad.len());
        prop_assume!(byte != b'\n');
        bad[at] = byte;
        let text = [HEADER.as_bytes(), b"\n", &bad, b"\n", good.as_bytes()].concat();
        let entries = read(&text);
        prop_assert_eq!(entries.len(), 2);
        prop_assert_eq!(entries[1].as_ref().unwrap(), &(3, event));
    }
}

#[test]
fn each_way_to_be_wrong_has_its_reason() {
    let cases = [
        ("0,0,00:03.0,map,1000,2000,4096", "7 fields where there should be 8"),
        ("0,0,00:03.0,map,1000,2000,4096,TO_DEVICE,", "9 fields"),
        ("", "1 fields"),
        ("-1,0,00:03.0,map,1000,2000,4096,TO_DEVICE", "t_ns is \"-1\", not a decimal"),
        ("0,+1,00:03.0,map,1000,2000,4096,TO_DEVICE", "cpu is \"+1\""),
        ("0,4294967296,00:03.0,map,1000,2000,4096,TO_DEVICE", "cpu is"),
        ("0,0,00:20.0,map,1000,2000,4096,TO_DEVICE", "dev is \"00:20.0\", not a PCI address"),
        ("0,0,00:03.8,map,1000,2000,4096,TO_DEVICE", "dev is"),
        ("0,0,100:03.0,map,1000,2000,4096,TO_DEVICE", "dev is"),
        ("0,0,00:03.0,Map,1000,2000,4096,TO_DEVICE", "op is \"Map\""),
        ("0,0,00:03.0,map,0x1000,2000,4096,TO_DEVICE", "iova is \"0x1000\", not a hexadecimal"),
        ("0,0,00:03.0,map,,2000,4096,TO_DEVICE", "iova is \"\""),
        ("0,0,00:03.0,map,1000,-,4096,TO_DEVICE", "phys is \"-\""),
        ("0,0,00:03.0,unmap,1000,2000,4096,TO_DEVICE", "phys is \"2000\", and is - in an unmap"),
        ("0,0,00:03.0,map,1000,2000,0,TO_DEVICE", "0 bytes from iova 0x1000 on are no range"),
        ("0,0,00:03.0,attach,0,-,-,-", "iova is \"0\", and is - in an attach"),
        ("0,0,00:03.0,detach,-,-,-,TO_DEVICE", "dir is \"TO_DEVICE\", and is - in an attach or detach"),
        ("0,0,00:03.0,read,1000,2000,4096,TO_DEVICE", "phys is \"2000\", and is -, fault or gone"),
        ("0,0,00:03.0,read,1000,-,4096,FROM_DEVICE", "dir is FROM_DEVICE, and is TO_DEVICE in a read"),
        ("0,0,00:03.0,write,1000,fault,4096,BIDIRECTIONAL", "dir is BIDIRECTIONAL"),
        ("0,0,00:03.0,write,1000,-,16777217,FROM_DEVICE", "16777217 bytes are more than one DMA has"),
        ("0,0,00:03.0,map,fffffffffffff000,2000,4097,TO_DEVICE", "4097 bytes from iova"),
        ("0,0,00:03.0,map,0,fffffffffffff000,4097,TO_DEVICE", "4097 bytes from phys"),
        ("0,0,00:03.0,map,1000,2800,4096,TO_DEVICE", "at different offsets in their pages"),
        ("0,0,00:03.0,map,1000,2000,4096,TO_DEV", "dir is \"TO_DEV\""),
    ];
    for (line, words) in cases {
        let said = reason(line.as_bytes()).to_string();
        assert!(said.contains(words), "{line}: {said}");
    }
    assert_eq!(reason(b"0,0,00:03.0,map,1000,2000,4096,TO_\xff"), Malformed::NotText);
    assert_eq!(reason(HEADER.as_bytes()).to_string(), "t_ns is \"t_ns\", not a decimal number that fits");
}

#[test]
fn lines_have_a_bound() {
    assert_eq!(reason(&[b'1'; LONGEST_LINE + 1]), Malformed::TooLong);
    assert_eq!(reason(&vec![b','; 1 << 20]), Malformed::TooLong);
    assert!(matches!(reason(&[b'1'; LONGEST_LINE]), Malformed::Fields { found: 1 }));
}

#[test]
fn the_last_page_of_all_is_a_range() {
    let entries = read(b"0,0,00:03.0,map,ffffffffffffffff,fff,1,TO_DEVICE");
    let (_, event) = entries[0].as_ref().unwrap();
    assert_eq!(event.pages(), IovaRange::new(u64::MAX - 4095, u64::MAX).unwrap());
}

#[test]
fn what_is_no_trace_is_left_alone() {
    assert!(matches!(read(b"").as_slice(), [Err(TraceError::Empty)]));
    let entries = read(b"%PDF-1.7\n0,0,00:03.0,map,1000,2000,4096,TO_DEVICE\n");
    assert!(matches!(entries.as_slice(), [Err(TraceError::NotATrace { .. })]), "{entries:?}");
    assert!(entries[0].as_ref().unwrap_err().to_string().contains(HEADER));
}

fn text(events: u64) -> String {
    let line = |number: u64| format!("{number},0,00:03.0,unmap,{number:x}000,-,4096,TO_DEVICE\n");
    format!("{HEADER}\n{}", (0..events).map(line).collect::<String>())
}

#[test]
fn a_compressed_trace_that_ends_in_the_middle_is_read_as_far_as_it_goes() {
    let compressed = zstd::encode_all(text(40_000).as_bytes(), 3).unwrap();
    let entries = read(&compressed[..compressed.len() / 2]);
    let (last, before) = entries.split_last().unwrap();
    assert!(before.len() > 1000, "{}", before.len());
    assert!(before.iter().take(before.len() - 1).all(Result::is_ok));
    let Err(TraceError::Unreadable { line, .. }) = last else { panic!("{last:?}") };
    assert!(*line > 1000, "{line}");
    // And one that is damaged.
    let mut damaged = compressed.clone();
    damaged[compressed.len() / 2..][..64].fill(0xa5);
    assert!(read(&damaged).into_iter().any(|entry| entry.is_err_and(|error| !error.is_of_one_line())));
}

#[test]
fn several_frames_are_one_trace() {
    let both = text(10);
    let (first, second) = both.split_at(100);
    let frames: Vec<u8> =
        [first, second].iter().flat_map(|part| zstd::encode_all(part.as_bytes(), 1).unwrap()).collect();
    assert_eq!(read(&frames).into_iter().filter(Result::is_ok).count(), 10);
}

/// A reader that says how much was taken from it before each event.
struct Endless {
    line: Vec<u8>,
    given: usize,
}

impl Read for Endless {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let count = buffer.len().min(self.line.len() - self.given % self.line.len());
        let from = self.given % self.line.len();
        buffer[..count].copy_from_slice(&self.line[from..from + count]);
        self.given += count;
        Ok(count)
    }
}

/// A stream without an end is read event by event: nobody waits for the rest of it.
#[test]
fn reading_is_not_ahead_of_the_events() {
    let line = b"0,0,00:03.0,map,1000,2000,4096,TO_DEVICE\n".to_vec();
    let mut source = Endless { line, given: 0 };
    let read = Trace::new(&mut source).unwrap().take(50_000).filter(Result::is_ok).count();
    assert_eq!(read, 50_000);
    assert!(source.given < 50_000 * source.line.len() + (1 << 18), "{}", source.given);
}

#[test]
fn the_traces_of_the_project_are_right() {
    for (name, events) in
        [("boot-ext4-lazy", 99_710), ("nvme-rand4k-strict", 200_013), ("nvme-seq-thp-lazy", 74_861)]
    {
        let path = format!("{}/../../traces/{name}.csv.zst", env!("CARGO_MANIFEST_DIR"));
        let trace = Trace::new(std::fs::File::open(path).unwrap()).unwrap();
        assert_eq!(trace.map(|entry| entry.map(drop)).collect::<Result<Vec<()>, _>>().unwrap().len(), events);
    }
}

/// A writer whose text is read back: whole when it was finished, up to the last flush when it was not.
#[test]
fn what_a_writer_has_flushed_is_read_whatever_comes_after() {
    let events: Vec<Event> = read(text(3000).as_bytes()).into_iter().map(|entry| entry.unwrap().1).collect();
    for compressed in [false, true] {
        let mut bytes = Vec::new();
        let mut writer = Writer::new(&mut bytes, compressed).unwrap();
        for event in &events[..2000] {
            writer.write(event).unwrap();
        }
        writer.flush().unwrap();
        for event in &events[2000..] {
            writer.write(event).unwrap();
        }
        // Killed: nothing more is written.
        std::mem::forget(writer);
        let found: Vec<_> = read(&bytes).into_iter().map_while(Result::ok).map(|(_, event)| event).collect();
        assert!(found.len() >= 2000, "{}", found.len());
        assert_eq!(found, events[..found.len()]);

        let mut bytes = Vec::new();
        let mut writer = Writer::new(&mut bytes, compressed).unwrap();
        events.iter().for_each(|event| writer.write(event).unwrap());
        writer.finish().unwrap();
        let found: Vec<_> = read(&bytes).into_iter().map(|entry| entry.unwrap().1).collect();
        assert_eq!(found, events);
        assert_eq!(bytes.starts_with(HEADER.as_bytes()), !compressed);
    }
}

/// A sink that is full after so many bytes.
struct Full(usize);

impl io::Write for Full {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let count = bytes.len().min(self.0);
        self.0 -= count;
        if count == 0 { Err(io::ErrorKind::StorageFull.into()) } else { Ok(count) }
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[test]
fn a_full_disk_is_an_error_of_the_writer() {
    let event = read(text(1).as_bytes()).pop().unwrap().unwrap().1;
    for compressed in [false, true] {
        let mut writer = Writer::new(Full(10), compressed).unwrap();
        let wrote = (0..10).try_for_each(|_| writer.write(&event)).and_then(|()| writer.finish());
        assert_eq!(wrote.unwrap_err().kind(), io::ErrorKind::StorageFull);
    }
}
