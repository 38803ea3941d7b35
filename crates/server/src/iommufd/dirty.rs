//! What devices have written: HWPT_SET_DIRTY_TRACKING and HWPT_GET_DIRTY_BITMAP.
//!
//! A page table that was made for it marks the leaves that devices write through. A client, which copies a guest's
//! memory while the guest runs, reads and clears the marks again and again, as bits of a bitmap in its own memory.
//!
//! A mark that was cleared and did not reach the client would be a page that is never copied. So what is taken from the
//! table and cannot be written to the client is put back, and the call fails. It goes in portions, because the bitmap
//! may be large; no portion ends within a leaf, which could only be cleared as a whole (docs/decisions/0025). No lock is
//! held while client memory is accessed; the table is, so that it cannot be destroyed until the call ends.

use ioasid::pagetable::DirtyBitmap;
use ioasid::{IovaRange, PageSize, Table};
use ioasid_uapi::iommufd as uapi;
use ioasid_uapi::iommufd::{DirtyTrackingFlags, GetDirtyBitmapFlags};
use rustix::io::Errno;
use zerocopy::IntoBytes;

use super::Call;

/// How many bits of a client's bitmap are read and written at a time. Every other page may have been written, and what was
/// is remembered while the client's memory keeps us waiting: 2 MiB for each request under way.
const BITS_AT_A_TIME: u64 = 1 << 18;

/// The longest bitmap of one call, in bytes: 32 TiB in pages of 4 KiB.
const LONGEST_BITMAP: u64 = 1 << 30;

impl Call<'_> {
    pub(super) fn hwpt_set_dirty_tracking(&self) -> Result<(), Errno> {
        let command: uapi::HwptSetDirtyTracking = self.receive()?;
        let flags = DirtyTrackingFlags::from_bits(command.flags).ok_or(Errno::OPNOTSUPP)?;
        let table = self.context.objects.hold_hwpt(command.hwpt_id)?.recording_table()?;
        let enable = flags.contains(DirtyTrackingFlags::ENABLE);
        table.record_writes(enable).map_err(|_| Errno::OPNOTSUPP)
    }

    pub(super) fn hwpt_get_dirty_bitmap(&self) -> Result<(), Errno> {
        let command: uapi::HwptGetDirtyBitmap = self.receive()?;
        let flags = GetDirtyBitmapFlags::from_bits(command.flags).ok_or(Errno::OPNOTSUPP)?;
        if command.reserved != 0 {
            return Err(Errno::OPNOTSUPP);
        }
        let hwpt = self.context.objects.hold_hwpt(command.hwpt_id)?;
        let (range, page) = checked(&command, hwpt.alignment())?;
        let bitmap = ClientBitmap { call: self, first: range.first(), page, address: command.data };
        let clear = !flags.contains(GetDirtyBitmapFlags::NO_CLEAR);
        bitmap.fill(&*hwpt.recording_table()?, range, clear)
    }
}

/// The range that a command names, and the size of its pages.
///
/// # Errors
/// - `EINVAL`: empty, not aligned to mappings or pages, no size of pages, or a longer bitmap than is served at once.
/// - `EOVERFLOW`: past 2^64.
fn checked(command: &uapi::HwptGetDirtyBitmap, alignment: u64) -> Result<(IovaRange, PageSize), Errno> {
    if command.length == 0 {
        return Err(Errno::INVAL);
    }
    let range = IovaRange::with_length(command.iova, command.length).ok_or(Errno::OVERFLOW)?;
    let page = Some(command.page_size).filter(|size| size.is_power_of_two());
    let page = page.and_then(|size| PageSize::from_log2(size.ilog2())).ok_or(Errno::INVAL)?;
    let aligned = |to: u64| (command.iova | range.last().wrapping_add(1)) & (to - 1) == 0;
    let pages = command.length >> page.log2();
    if !aligned(alignment) || !aligned(page.bytes()) || pages.div_ceil(8) > LONGEST_BITMAP {
        return Err(Errno::INVAL);
    }
    Ok((range, page))
}

/// A bitmap in the client's memory.
struct ClientBitmap<'a> {
    call: &'a Call<'a>,
    /// What the first bit stands for.
    first: u64,
    page: PageSize,
    address: u64,
}

impl ClientBitmap<'_> {
    /// Sets the bits of what was written in the range; with `clear` the marks are cleared.
    fn fill(&self, table: &Table, range: IovaRange, clear: bool) -> Result<(), Errno> {
        let portion = BITS_AT_A_TIME.checked_mul(self.page.bytes()).map_or(u64::MAX, |bytes| bytes - 1);
        let mut next = Some(range.first());
        while let Some(rest) = next.and_then(|first| IovaRange::new(first, range.last())) {
            let part = whole_leaves(table, rest, (rest.first() | portion).min(range.last()));
            let mut written = Vec::new();
            let report = |range| self.add_to(&mut written, range);
            let reported = if clear { table.take_written(part, report) } else { table.written(part, report) };
            reported.map_err(|_| Errno::OPNOTSUPP)?;
            if let Err(error) = self.set(part, &written) {
                for range in written.iter().filter(|_| clear) {
                    let _ = table.mark_written(*range);
                }
                return Err(error);
            }
            next = part.last().checked_add(1);
        }
        Ok(())
    }

    /// Adds a range to those that ascend, in whole pages: there are no more than pages then.
    fn add_to(&self, written: &mut Vec<IovaRange>, range: IovaRange) {
        let within = self.page.bytes() - 1;
        let (first, last) = (range.first() & !within, range.last() | within);
        let joined = written.last_mut().filter(|before| first <= before.last().saturating_add(1));
        match (joined, IovaRange::new(first, last)) {
            (Some(before), _) => *before = IovaRange::new(before.first(), last).unwrap_or(*before),
            (None, range) => written.extend(range),
        }
    }

    /// Sets the bits of the ranges, which ascend in `part`. All of the bitmap's words for it have to be readable, and those
    /// that change writable.
    fn set(&self, part: IovaRange, written: &[IovaRange]) -> Result<(), Errno> {
        let bit = |iova: u64| (iova - self.first) >> self.page.log2();
        let last_word = bit(part.last()) / 64;
        let mut word = bit(part.first()) / 64;
        let mut written = written.iter().copied().peekable();
        while word <= last_word {
            let count = (last_word - word + 1).min(BITS_AT_A_TIME / 64);
            let offset = word.checked_mul(8).ok_or(Errno::FAULT)?;
            let address = self.address.checked_add(offset).ok_or(Errno::FAULT)?;
            let begin = self.first + ((word * 64) << self.page.log2());
            let mut words = vec![0_u64; count as usize];
            self.call.client.read(address, words.as_mut_bytes())?;
            let before = words.clone();
            let mut bits = DirtyBitmap::new(&mut words, begin, self.page);
            while let Some(range) = written.peek().filter(|range| bit(range.first()) / 64 < word + count) {
                bits.set(*range);
                if bit(range.last()) / 64 >= word + count {
                    break;
                }
                written.next();
            }
            if words != before {
                self.call.client.write(address, words.as_bytes())?;
            }
            word += count;
        }
        Ok(())
    }
}

/// What `rest` begins with, to `last` or as far beyond as no leaf ends within it.
fn whole_leaves(table: &Table, rest: IovaRange, mut last: u64) -> IovaRange {
    // Leaves are as large as they are aligned, so the end of one that reaches over a place is aligned better than that.
    while let Some(end) = last.checked_add(1).filter(|_| last < rest.last()) {
        if !table.reaches_over(end) {
            break;
        }
        last = (end - 1).saturating_add(end & end.wrapping_neg());
    }
    IovaRange::new(rest.first(), last.min(rest.last())).unwrap_or(rest)
}
