//! What is mapped in a client's address space, and with which permissions.
//!
//! Linux 6.11 answers for one address at a time; before, `/proc/PID/maps` is read as text from its beginning, which
//! takes longer the more mappings come before the one that matters.

use std::fs::File;
use std::io::{BufRead, BufReader, Read, Seek, SeekFrom};
use std::os::fd::AsFd;
use std::sync::{Mutex, PoisonError};

use rustix::io::Errno;

use crate::sys::memory::{Mapping, SharedObject, query_mapping};

/// A line of the maps file is a path of at most 4096 bytes, each perhaps written as four, and some numbers.
const LINE_MAX: u64 = 32 * 1024;

/// Checks that `[address, address + length)` is mapped without a hole, readable, and writable if `write`.
///
/// # Errors
/// `EFAULT` if not, or if the address space is gone.
pub(crate) fn check_access(maps: &Mutex<File>, address: u64, length: u64, write: bool) -> Result<(), Errno> {
    let Some(last_offset) = length.checked_sub(1) else { return Ok(()) };
    let last = address.checked_add(last_offset).ok_or(Errno::FAULT)?;
    let mut maps = maps.lock().unwrap_or_else(PoisonError::into_inner);
    let mut range = Range { next: address, last, write };
    loop {
        match query_mapping(maps.as_fd(), range.next) {
            Ok(mapping) => {
                if range.advance(&mapping)? {
                    return Ok(());
                }
            }
            Err(Errno::NOTTY) => break,
            Err(_) => return Err(Errno::FAULT),
        }
    }
    maps.seek(SeekFrom::Start(0)).map_err(|_| Errno::FAULT)?;
    check_text(BufReader::new(&mut *maps), range)
}

/// The mapping that covers `address`.
///
/// # Errors
/// `EFAULT` if there is none, or if the address space is gone.
pub(crate) fn mapping_of(maps: &Mutex<File>, address: u64) -> Result<Mapping, Errno> {
    let mut maps = maps.lock().unwrap_or_else(PoisonError::into_inner);
    match query_mapping(maps.as_fd(), address) {
        Err(Errno::NOTTY) => {}
        other => return other.map_err(|_| Errno::FAULT),
    }
    maps.seek(SeekFrom::Start(0)).map_err(|_| Errno::FAULT)?;
    let mut text = BufReader::new(&mut *maps);
    let mut line = Vec::new();
    loop {
        line.clear();
        let length = text.by_ref().take(LINE_MAX).read_until(b'\n', &mut line).map_err(|_| Errno::FAULT)?;
        let mapping = (length > 0).then(|| parse(&line)).flatten().ok_or(Errno::FAULT)?;
        if mapping.end > address {
            return if mapping.start <= address { Ok(mapping) } else { Err(Errno::FAULT) };
        }
    }
}

/// The part of the range that no mapping has been found for yet.
#[derive(Debug, Clone, Copy)]
struct Range {
    next: u64,
    last: u64,
    write: bool,
}

impl Range {
    /// Takes away what `mapping`, which covers `next`, provides; true if that was all. Each step goes forward.
    fn advance(&mut self, mapping: &Mapping) -> Result<bool, Errno> {
        let covers = mapping.start <= self.next && self.next < mapping.end;
        if !covers || !mapping.readable || (self.write && !mapping.writable) {
            return Err(Errno::FAULT);
        }
        self.next = mapping.end;
        Ok(self.last < mapping.end)
    }
}

/// The same over the text, whose lines ascend.
fn check_text(mut text: impl BufRead, mut range: Range) -> Result<(), Errno> {
    let mut line = Vec::new();
    loop {
        line.clear();
        let length = text.by_ref().take(LINE_MAX).read_until(b'\n', &mut line).map_err(|_| Errno::FAULT)?;
        if length == 0 {
            return Err(Errno::FAULT);
        }
        let mapping = parse(&line).ok_or(Errno::FAULT)?;
        if mapping.end > range.next && range.advance(&mapping)? {
            return Ok(());
        }
    }
}

/// A line like `7f0c8000-7f0ca000 rw-p 00000000 00:00 0   name`.
fn parse(line: &[u8]) -> Option<Mapping> {
    // The name at the end may be any bytes.
    let text = std::str::from_utf8(line.get(..line.len().min(128))?)
        .or_else(|error| std::str::from_utf8(&line[..error.valid_up_to()]))
        .ok()?;
    let (range, rest) = text.split_once(' ')?;
    let (start, end) = range.split_once('-')?;
    let mut fields = rest.split(' ');
    let permissions = fields.next()?.as_bytes();
    let shared = match permissions.get(3)? {
        b's' => {
            let offset = u64::from_str_radix(fields.next()?, 16).ok()?;
            let (major, minor) = fields.next()?.split_once(':')?;
            let number = |text| u32::from_str_radix(text, 16).ok();
            let device = rustix::fs::makedev(number(major)?, number(minor)?);
            let inode = fields.next()?.trim_end().parse().ok()?;
            Some(SharedObject { device, inode, offset })
        }
        _ => None,
    };
    Some(Mapping {
        shared,
        start: u64::from_str_radix(start, 16).ok()?,
        end: u64::from_str_radix(end, 16).ok()?,
        readable: *permissions.first()? == b'r',
        writable: *permissions.get(1)? == b'w',
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const TEXT: &str = "\
00400000-00402000 r-xp 00000000 fe:00 1234   /usr/bin/\u{2713}program with spaces
00402000-00404000 rw-p 00002000 fe:00 1234   /usr/bin/program
00404000-00405000 ---p 00000000 00:00 0
00405000-00406000 -w-p 00000000 00:00 0
7ffffffde000-7ffffffff000 rw-p 00000000 00:00 0 [stack]
ffffffffff600000-ffffffffff601000 --xp 00000000 00:00 0 [vsyscall]
";

    fn check(address: u64, last: u64, write: bool) -> bool {
        check_text(TEXT.as_bytes(), Range { next: address, last, write }).is_ok()
    }

    #[test]
    fn text_is_checked_for_holes_and_permissions() {
        assert!(check(0x40_0000, 0x40_3fff, false));
        assert!(!check(0x40_0000, 0x40_3fff, true), "the first page is not writable");
        assert!(check(0x40_2000, 0x40_3fff, true));
        assert!(check(0x40_3fff, 0x40_3fff, true));
        assert!(!check(0x40_3fff, 0x40_4000, false), "no permission at all");
        assert!(!check(0x40_5000, 0x40_5000, true), "written memory is also read");
        assert!(!check(0x3f_ffff, 0x40_0000, false), "a hole at the start");
        assert!(!check(0x40_6000, 0x7fff_fffd_efff, false), "a hole in the middle");
        assert!(check(0x7fff_fffd_e000, 0x7fff_ffff_efff, true));
        assert!(!check(0x7fff_ffff_f000, 0x7fff_ffff_f000, false));
        assert!(!check(0xffff_ffff_ffff_f000, u64::MAX, false));
    }

    /// This process's own mappings, asked for by both ways.
    #[test]
    fn both_ways_agree_about_a_live_process() {
        let text = std::fs::read_to_string("/proc/self/maps").unwrap();
        let maps = Mutex::new(File::open("/proc/self/maps").unwrap());
        for line in text.lines().filter(|line| line.contains("/ioasid_run")) {
            let mapping = parse(line.as_bytes()).unwrap();
            for write in [false, true] {
                let expected = mapping.readable && (mapping.writable || !write);
                let length = mapping.end - mapping.start;
                let way = check_access(&maps, mapping.start, length, write);
                assert_eq!(way.is_ok(), expected, "{line}");
                let by_text = check_text(
                    BufReader::new(File::open("/proc/self/maps").unwrap()),
                    Range { next: mapping.start, last: mapping.end - 1, write },
                );
                assert_eq!(by_text.is_ok(), expected, "{line}");
            }
        }
        assert_eq!(check_access(&maps, 0, 1, false), Err(Errno::FAULT));
        assert_eq!(check_access(&maps, u64::MAX, 2, false), Err(Errno::FAULT));
        assert_eq!(check_access(&maps, 12, 0, true), Ok(()));
    }
}
