//! How long a trace is, or a line of it, is nothing that memory grows with.
//!
//! A program of its own with a single test: what is looked at is how much memory the process ever had.

use ioasid_replay::trace::{HEADER, Trace};
use ioasid_replay::{Options, play};
use std::io::{self, Read};

/// Far less than what is read, and less than 64 bytes for each event that is carried out.
const ROOM_KIB: u64 = 2 << 10;

/// A piece of text so many times over.
struct Repeated<'a> {
    piece: &'a [u8],
    given: usize,
    bytes: usize,
}

impl Read for Repeated<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let from = self.given % self.piece.len();
        let count = buffer.len().min(self.piece.len() - from).min(self.bytes - self.given);
        buffer[..count].copy_from_slice(&self.piece[from..from + count]);
        self.given += count;
        Ok(count)
    }
}

fn repeated(piece: &[u8], times: usize) -> Repeated<'_> {
    Repeated { piece, given: 0, bytes: piece.len() * times }
}

/// The most memory that the process ever had.
fn peak_kib() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).unwrap();
    line.trim().trim_end_matches(" kB").parse().unwrap()
}

#[test]
fn memory_does_not_grow_with_length() {
    // Each piece leaves what it found. Two processors, which now and then have to wait for each other.
    let mut piece = String::new();
    for page in 0..300 {
        let (iova, physical) = (page * 0x3_5000u64, page * 0x7000);
        let (cpu, other) = (page / 50 % 2, page / 75 % 2);
        piece += &format!("{page},{cpu},00:03.0,map,{iova:x},{physical:x},4096,BIDIRECTIONAL\n");
        piece += "wrong\n";
        piece += &format!("{page},{other},00:03.0,unmap,{iova:x},-,4096,BIDIRECTIONAL\n");
    }
    let options = Options { threads: 2, memory: 1 << 20, ..Options::default() };
    let play_times = |times| {
        let source =
            Read::chain(HEADER.as_bytes(), Read::chain(&b"\n"[..], repeated(piece.as_bytes(), times)));
        play(Trace::new(source).unwrap(), &options, &mut |_| ()).unwrap()
    };
    // Whatever a replay takes, it has taken once.
    assert!(play_times(20).is_right());
    let before = peak_kib();
    let report = play_times(60);
    assert!(report.is_right() && report.events == 36_000 && report.malformed.count == 18_000, "{report:?}");
    assert!(peak_kib() - before < ROOM_KIB, "{} KiB for a long replay", peak_kib() - before);

    let before = peak_kib();
    let events = Trace::new(repeated(piece.as_bytes(), 300)).unwrap().filter(Result::is_ok).count();
    assert_eq!(events, 180_000);
    // A line without an end, as it is and compressed.
    let line = b"1".repeat(1 << 16);
    let endless = || Read::chain(HEADER.as_bytes(), Read::chain(&b"\n"[..], repeated(&line, 1 << 9)));
    assert_eq!(Trace::new(endless()).unwrap().filter(Result::is_err).count(), 1);
    assert!(peak_kib() - before < ROOM_KIB, "{} KiB for a long file", peak_kib() - before);
    let mut compressed = Vec::new();
    zstd::stream::copy_encode(endless(), &mut compressed, 1).unwrap();
    let before = peak_kib();
    assert_eq!(Trace::new(compressed.as_slice()).unwrap().filter(Result::is_err).count(), 1);
    assert!(peak_kib() - before < ROOM_KIB, "{} KiB for a long line", peak_kib() - before);
}
