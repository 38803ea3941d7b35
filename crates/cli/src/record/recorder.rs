//! From what the server tells to lines of a trace.
//!
//! The observer is called with locks of the server held, so it does little: it looks at the clock, and hands the event to a
//! thread that formats, compresses and writes. Their queue is bounded; a disk that is slower than the program makes the
//! program wait, a disk that fails does not.
//!
//! **Physical addresses** are made here: which object the memory belongs to, in the order in which objects come by, and above
//! that the virtual address or file offset, 48 bits of it. So the same page always has the same, what lies in a row stays in a row, and
//! pages of different objects differ (up to 32,767 objects). Addresses on the server's bus would do neither: an object is in pieces there,
//! and its place is given to others when it has gone.
//!
//! **A PASID of a device is a device of its own** in a trace, which has no PASIDs: what it reaches has nothing to do with what the
//! device reaches without it. It has the device's address in another PCI segment: 1 for the PASID that comes by first, and so on, which
//! is said on standard error. All devices are in segment 0.

use std::collections::HashMap;
use std::io::{self, Write};
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, sync_channel};
use std::sync::{Mutex, PoisonError};
use std::thread::{Builder, JoinHandle};
use std::time::{Duration, Instant};

use ioasid::{IovaRange, Permissions};
use ioasid_replay::trace::{
    DeviceAddress, Direction, Event as Line, LONGEST_DMA, Operation, Outcome, Writer,
};
use ioasid_server::{Event, MemoryAt, MemoryOwner, Observer, Requester};
use ioasid_soft::dma::DmaFaultReason;

/// How many lines may wait to be written.
const QUEUE: usize = 1 << 12;
/// How often what has been written is handed to the system.
const FLUSH: Duration = Duration::from_secs(1);
/// Where the number of the object stands in a physical address.
const OBJECT_SHIFT: u32 = 48;
/// How many objects are told apart.
const OBJECTS: u64 = 1 << 15;

/// Hears what happens and hands it on.
#[derive(Debug)]
pub(super) struct Recorder {
    began: Instant,
    inner: Mutex<Inner>,
}

#[derive(Debug)]
struct Inner {
    lines: SyncSender<Message>,
    objects: HashMap<MemoryOwner, u64>,
    /// Which segment stands for a PASID of a device.
    segments: HashMap<Requester, u16>,
}

/// What the writing thread is told.
#[derive(Debug)]
enum Message {
    Line(Line),
    /// Something that no line can say, for the user.
    Note(String),
    /// That was all, even if a device that was left behind in the middle of a transfer still has the recorder.
    End,
}

/// The thread that writes.
#[derive(Debug)]
pub(super) struct Writing {
    thread: JoinHandle<io::Result<u64>>,
    lines: SyncSender<Message>,
}

impl Recorder {
    /// Begins a trace. It is complete when [`Writing::finish`] has returned.
    ///
    /// # Errors
    /// The beginning cannot be written, or there is no thread.
    pub(super) fn start<W>(sink: W, compressed: bool) -> io::Result<(Self, Writing)>
    where
        W: Write + Send + 'static,
    {
        let mut writer = Writer::new(sink, compressed)?;
        writer.flush()?;
        let (lines, queue) = sync_channel(QUEUE);
        let write = move || {
            let written = write_all(writer, &queue);
            if let Err(error) = &written {
                eprintln!("ioasid: the recording ends here: {error}");
            }
            // From here on nobody receives, and sending fails without waiting.
            written
        };
        let thread = Builder::new().name("ioasid-record".to_owned()).spawn(write)?;
        let inner =
            Mutex::new(Inner { lines: lines.clone(), objects: HashMap::new(), segments: HashMap::new() });
        Ok((Self { began: Instant::now(), inner }, Writing { thread, lines }))
    }

    fn record(
        &self,
        requester: Requester,
        make: impl FnOnce(&mut Inner) -> Option<(Operation, IovaRange, Direction)>,
    ) {
        let cpu = u32::try_from(rustix::thread::sched_getcpu()).unwrap_or(0);
        let mut inner = self.inner.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(device) = inner.address(requester) else { return };
        let Some((operation, range, direction)) = make(&mut inner) else { return };
        // Under the lock, so that times ascend.
        let time = u64::try_from(self.began.elapsed().as_nanos()).unwrap_or(u64::MAX);
        let bytes = range.length().unwrap_or(0);
        let line = Line { time, cpu, device, operation, range, bytes, direction };
        // Fails if the recording has ended before the program, which has been said.
        let _ = inner.lines.send(Message::Line(line));
    }
}

impl Inner {
    /// The device that a requester is in the trace; `None`: no segment is left for it.
    fn address(&mut self, requester: Requester) -> Option<DeviceAddress> {
        let Requester { device, pasid } = requester;
        let segment = match (pasid, self.segments.get(&requester)) {
            (None, _) => 0,
            (Some(_), Some(segment)) => *segment,
            (Some(pasid), None) => {
                let segment = u16::try_from(self.segments.len() + 1).ok()?;
                let address = DeviceAddress { segment, requester: device.0 };
                let note = format!("PASID {pasid} of device {device} is device {address} in the recording");
                let _ = self.lines.send(Message::Note(note));
                self.segments.insert(requester, segment);
                segment
            }
        };
        Some(DeviceAddress { segment, requester: device.0 })
    }

    fn physical(&mut self, memory: MemoryAt) -> u64 {
        let next = self.objects.len() as u64 % OBJECTS;
        // Objects beyond those that are told apart share a number, and are not remembered.
        let object = match self.objects.get(&memory.owner) {
            Some(object) => *object,
            None if self.objects.len() as u64 >= OBJECTS => 0,
            None => *self.objects.entry(memory.owner).or_insert(next),
        };
        object << OBJECT_SHIFT | memory.offset & ((1 << OBJECT_SHIFT) - 1)
    }
}

fn direction(permissions: Permissions) -> Direction {
    match (permissions.contains(Permissions::READ), permissions.contains(Permissions::WRITE)) {
        (true, true) => Direction::Bidirectional,
        (false, true) => Direction::FromDevice,
        (_, false) => Direction::ToDevice,
    }
}

impl Observer for Recorder {
    fn happened(&self, event: &Event<'_>) {
        match *event {
            Event::Attached { requester } => {
                self.record(requester, |_| {
                    Some((Operation::Attach, IovaRange::ALL, Direction::Bidirectional))
                });
            }
            Event::Detached { requester } => {
                self.record(requester, |_| {
                    Some((Operation::Detach, IovaRange::ALL, Direction::Bidirectional))
                });
            }
            Event::Mapped { requester, range, memory, permissions } => self.record(requester, |inner| {
                let operation = Operation::Map { physical: inner.physical(memory) };
                Some((operation, range, direction(permissions)))
            }),
            Event::Unmapped { requester, range, permissions } => {
                self.record(requester, |_| Some((Operation::Unmap, range, direction(permissions))));
            }
            Event::Dma { requester, iova, length, write, result } => {
                let outcome = match result.map_err(|fault| fault.reason) {
                    Ok(()) => Outcome::Done,
                    Err(DmaFaultReason::MemoryGone) => Outcome::Gone,
                    // No line can say it, and nothing depends on it.
                    Err(DmaFaultReason::OutOfRange) => return,
                    Err(_) => Outcome::Fault,
                };
                let (operation, direction) = match write {
                    true => (Operation::Write(outcome), Direction::FromDevice),
                    false => (Operation::Read(outcome), Direction::ToDevice),
                };
                // No device transfers more at once than a line can say; if one does, its beginning is written.
                let range = IovaRange::with_length(iova, length.min(LONGEST_DMA));
                self.record(requester, |_| Some((operation, range?, direction)));
            }
            _ => {}
        }
    }
}

/// Writes what comes, until the end; returns how many lines there were.
fn write_all<W: Write>(mut writer: Writer<W>, queue: &Receiver<Message>) -> io::Result<u64> {
    let mut count = 0;
    let mut flushed = Instant::now();
    let mut pending = false;
    loop {
        match queue.recv_timeout(FLUSH) {
            Ok(Message::Line(line)) => {
                writer.write(&line)?;
                count += 1;
                pending = true;
            }
            Ok(Message::Note(note)) => eprintln!("ioasid: {note}"),
            Err(RecvTimeoutError::Timeout) => {}
            Ok(Message::End) | Err(RecvTimeoutError::Disconnected) => break,
        }
        if pending && flushed.elapsed() >= FLUSH {
            writer.flush()?;
            flushed = Instant::now();
            pending = false;
        }
    }
    writer.finish()?;
    Ok(count)
}

impl Writing {
    /// Waits until all that was told is written; returns how many events the trace has.
    ///
    /// # Errors
    /// It is not complete.
    pub(super) fn finish(self) -> io::Result<u64> {
        // Fails if the thread has ended before, and says why below.
        let _ = self.lines.send(Message::End);
        self.thread.join().unwrap_or_else(|_| Err(io::Error::other("the thread that writes it has ended")))
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use ioasid::Rid;
    use ioasid::pasid::Pasid;
    use ioasid_replay::trace::Trace;
    use std::sync::Arc;

    /// A file whose content can be looked at.
    #[derive(Clone, Default)]
    pub(in crate::record) struct Shared(pub(in crate::record) Arc<Mutex<Vec<u8>>>);

    impl Write for Shared {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.0.lock().unwrap().write(bytes)
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    /// A disk that takes the header and nothing more.
    struct Full(usize);

    impl Write for Full {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            let count = bytes.len().min(self.0);
            self.0 -= count;
            if count == 0 { Err(io::ErrorKind::StorageFull.into()) } else { Ok(count) }
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    fn requester(pasid: Option<u32>) -> Requester {
        Requester { device: Rid(8), pasid: pasid.and_then(Pasid::new) }
    }

    fn mapped(owner: MemoryOwner, offset: u64) -> Event<'static> {
        let range = IovaRange::with_length(0x1000, 0x1000).unwrap();
        let memory = MemoryAt { owner, offset };
        Event::Mapped { requester: requester(None), range, memory, permissions: Permissions::READ_WRITE }
    }

    #[test]
    fn the_same_page_has_the_same_physical_address_and_others_have_others() {
        let file = Shared::default();
        let (recorder, writing) = Recorder::start(file.clone(), false).unwrap();
        let (process, memfd) = (MemoryOwner::Process(7), MemoryOwner::File(1, 2));
        for (owner, offset) in
            [(process, 0x7f00_0000_1000), (memfd, 0x1000), (process, 0x7f00_0000_1000), (memfd, 0x2000)]
        {
            recorder.happened(&mapped(owner, offset));
        }
        drop(recorder);
        assert_eq!(writing.finish().unwrap(), 4);
        let text = file.0.lock().unwrap().clone();
        let lines: Vec<Line> = Trace::new(&text[..]).unwrap().map(|entry| entry.unwrap().1).collect();
        let physical = |line: &Line| match line.operation {
            Operation::Map { physical } => physical,
            _ => panic!("{line}"),
        };
        let found: Vec<u64> = lines.iter().map(physical).collect();
        assert_eq!(found, [0x7f00_0000_1000, 1 << 48 | 0x1000, 0x7f00_0000_1000, 1 << 48 | 0x2000]);
        assert!(lines.windows(2).all(|two| two[0].time <= two[1].time));
    }

    #[test]
    fn each_pasid_is_a_device_of_its_own() {
        let file = Shared::default();
        let (recorder, writing) = Recorder::start(file.clone(), false).unwrap();
        let other = Requester { device: Rid(16), pasid: Pasid::new(5) };
        let requesters = [requester(None), requester(Some(5)), requester(Some(6)), other, requester(Some(5))];
        for requester in requesters {
            recorder.happened(&Event::Attached { requester });
        }
        drop(recorder);
        assert_eq!(writing.finish().unwrap(), 5);
        let text = String::from_utf8(file.0.lock().unwrap().clone()).unwrap();
        let devices: Vec<_> = text.lines().skip(1).map(|line| line.split(',').nth(2).unwrap()).collect();
        assert_eq!(devices, ["00:01.0", "0001:00:01.0", "0002:00:01.0", "0003:00:02.0", "0001:00:01.0"]);
    }

    /// However much is told to a recorder whose disk is full, it says so at the end and keeps nobody waiting.
    #[test]
    fn a_full_disk_stops_the_recording_and_nothing_else() {
        for compressed in [false, true] {
            let (recorder, writing) = Recorder::start(Full(200), compressed).unwrap();
            for number in 0..100_000_u64 {
                let noise = number.wrapping_mul(0x9e37_79b9_7f4a_7c15) & !0xfff;
                recorder.happened(&mapped(MemoryOwner::Process(7), noise));
            }
            drop(recorder);
            assert_eq!(writing.finish().unwrap_err().kind(), io::ErrorKind::StorageFull);
        }
    }
}
