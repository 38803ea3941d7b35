//! The format of traces, and how they are read.
//!
//! A trace is text, perhaps compressed with Zstandard: a header line, then one event a line, in the order of time:
//!
//! ```text
//! t_ns,cpu,dev,op,iova,phys,bytes,dir
//! 0,1,00:06.0,map,ffffe000,1223b0000,8192,BIDIRECTIONAL
//! ```
//!
//! (`traces/README.md` explains each field.) A kernel's trace has maps and unmaps; one that `ioasid record` has made has attaches,
//! detaches and each DMA too. A trace may be longer than memory, come from a pipe, end in the middle, or be
//! something else altogether. So it is read line by line and nothing is kept: a line has a [bound](LONGEST_LINE), and a
//! compressed file may not ask for more than 128 MiB to look back into. A line that is no event is an [error](TraceError)
//! with its number, after which the next line is read. Only where nothing more can be read, the trace ends.
//!
//! [`Writer`] writes the same.

mod writer;

pub use writer::Writer;

use ioasid::{Iova, IovaRange, Permissions};
use std::fmt;
use std::io::{self, BufRead, BufReader, Read};
use std::str::FromStr;

/// The first line of a trace.
pub const HEADER: &str = "t_ns,cpu,dev,op,iova,phys,bytes,dir";
/// How many bytes a line may have. No event needs a hundred.
pub const LONGEST_LINE: usize = 255;
/// How many bytes one DMA may have, 2^24: more than one transfer of any device, and little enough to be done at once.
pub const LONGEST_DMA: u64 = 1 << 24;
/// How far a compressed file may ask to look back: 2^27 bytes, which is what `zstd` does without being asked for more.
const LARGEST_WINDOW: u32 = 27;
/// How a Zstandard frame begins, and the frames without content that may stand before it (their last digit varies).
const FRAME: u32 = 0xfd2f_b528;
const SKIPPABLE_FRAME: u32 = 0x184d_2a50;

/// What was done to a device's address space, or through it. Shows itself as a line of a trace.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Event {
    /// Nanoseconds since the recording began.
    pub time: u64,
    /// The processor that made the call.
    pub cpu: u32,
    /// Whose address space it was.
    pub device: DeviceAddress,
    /// What was done.
    pub operation: Operation,
    /// The addresses that the device uses, to the byte: not always whole pages. An attach or detach concerns all of them.
    pub range: IovaRange,
    /// The length of the range. (A range of all 2^64 bytes is no map, unmap or DMA.) Of an attach or detach: 0.
    pub bytes: u64,
    /// Which way the data goes. Of an attach or detach: both.
    pub direction: Direction,
}

/// What was done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Operation {
    /// Mapped, to memory from this physical address on, at the same offset in its page as the I/O virtual address.
    Map {
        /// The first byte's physical address.
        physical: u64,
    },
    /// Unmapped: one or several mappings.
    Unmap,
    /// The device's DMA goes through its address space from here on. If it did before, it is another space now, and what was
    /// mapped has been unmapped in the lines before.
    Attach,
    /// The device's DMA is blocked from here on.
    Detach,
    /// The device has read memory, or tried to.
    Read(Outcome),
    /// The device has written memory, or tried to.
    Write(Outcome),
}

impl Operation {
    /// Whether only `ioasid record` writes such lines: attaches, detaches and DMA.
    pub fn is_recorded(self) -> bool {
        !matches!(self, Operation::Map { .. } | Operation::Unmap)
    }
}

/// What became of a DMA.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// All bytes have moved.
    Done,
    /// It was refused: not all of it was mapped for this, or the device was not attached.
    Fault,
    /// It was let through, but the memory itself was there no more: its process had ended, or its file was cut.
    Gone,
}

impl Outcome {
    const ALL: [Outcome; 3] = [Outcome::Done, Outcome::Fault, Outcome::Gone];

    /// What stands for it in a trace.
    fn name(self) -> &'static str {
        match self {
            Outcome::Done => "-",
            Outcome::Fault => "fault",
            Outcome::Gone => "gone",
        }
    }
}

/// Which way the data of a mapping goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Direction {
    /// The device may read.
    ToDevice,
    /// The device may write.
    FromDevice,
    /// Both.
    Bidirectional,
}

impl Direction {
    /// What the device may do.
    pub fn permissions(self) -> Permissions {
        match self {
            Direction::ToDevice => Permissions::READ,
            Direction::FromDevice => Permissions::WRITE,
            Direction::Bidirectional => Permissions::READ_WRITE,
        }
    }

    /// Its name in a trace.
    pub fn name(self) -> &'static str {
        match self {
            Direction::ToDevice => "TO_DEVICE",
            Direction::FromDevice => "FROM_DEVICE",
            Direction::Bidirectional => "BIDIRECTIONAL",
        }
    }
}

/// The address of a PCI device: `00:03.0`, or `0001:00:03.0` in another segment than 0.
///
/// ```
/// use ioasid_replay::trace::DeviceAddress;
///
/// let device: DeviceAddress = "0000:17:1f.7".parse()?;
/// assert_eq!((device.segment, device.requester), (0, 0x17ff));
/// assert_eq!(device.to_string(), "17:1f.7");
/// # Ok::<(), ioasid_replay::trace::Malformed>(())
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct DeviceAddress {
    /// The PCI segment, which Linux calls a domain.
    pub segment: u16,
    /// Bus (8 bits), device (5) and function (3).
    pub requester: u16,
}

impl fmt::Display for DeviceAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.segment != 0 {
            write!(f, "{:04x}:", self.segment)?;
        }
        let (bus, device, function) = (self.requester >> 8, self.requester >> 3 & 0x1f, self.requester & 7);
        write!(f, "{bus:02x}:{device:02x}.{function}")
    }
}

impl FromStr for DeviceAddress {
    type Err = Malformed;

    fn from_str(text: &str) -> Result<DeviceAddress, Malformed> {
        let parse = || {
            let (rest, function) = text.rsplit_once('.')?;
            let (rest, device) = rest.rsplit_once(':')?;
            let (segment, bus) = rest.rsplit_once(':').unwrap_or(("0", rest));
            let number = |text: &str, digits: usize, bound: u64| {
                let number = if text.len() <= digits { hexadecimal(text) } else { None };
                number.filter(|number| *number < bound).and_then(|number| u16::try_from(number).ok())
            };
            let (bus, device) = (number(bus, 2, 0x100)?, number(device, 2, 0x20)?);
            let requester = bus << 8 | device << 3 | number(function, 1, 8)?;
            Some(DeviceAddress { segment: number(segment, 4, 0x1_0000)?, requester })
        };
        parse().ok_or_else(|| Malformed::Device(text.to_owned()))
    }
}

impl fmt::Display for Event {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Event { time, cpu, device, operation, range, bytes, direction } = self;
        let (iova, direction) = (range.first(), direction.name());
        match operation {
            Operation::Map { physical } => {
                write!(f, "{time},{cpu},{device},map,{iova:x},{physical:x},{bytes},{direction}")
            }
            Operation::Unmap => write!(f, "{time},{cpu},{device},unmap,{iova:x},-,{bytes},{direction}"),
            Operation::Attach => write!(f, "{time},{cpu},{device},attach,-,-,-,-"),
            Operation::Detach => write!(f, "{time},{cpu},{device},detach,-,-,-,-"),
            Operation::Read(outcome) => {
                let outcome = outcome.name();
                write!(f, "{time},{cpu},{device},read,{iova:x},{outcome},{bytes},{direction}")
            }
            Operation::Write(outcome) => {
                let outcome = outcome.name();
                write!(f, "{time},{cpu},{device},write,{iova:x},{outcome},{bytes},{direction}")
            }
        }
    }
}

/// Why a line is no event.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Malformed {
    /// It is longer than [`LONGEST_LINE`].
    #[error("longer than {LONGEST_LINE} bytes")]
    TooLong,
    /// It is not UTF-8.
    #[error("not text")]
    NotText,
    /// It has too few fields, or too many.
    #[error("{found} fields where there should be 8: {HEADER}")]
    Fields {
        /// How many it has.
        found: usize,
    },
    /// A field that is a number has none, or one that is too large.
    #[error("{field} is {text:?}, not a {} number that fits", if *.hexadecimal { "hexadecimal" } else { "decimal" })]
    Number {
        /// The field's name in the header.
        field: &'static str,
        /// What stands there.
        text: String,
        /// Whether it should be hexadecimal, without 0x.
        hexadecimal: bool,
    },
    /// The device is no PCI address.
    #[error("dev is {0:?}, not a PCI address such as 00:03.0")]
    Device(String),
    /// Nothing that is known.
    #[error("op is {0:?}, not map, unmap, attach, detach, read or write")]
    Operation(String),
    /// No direction.
    #[error("dir is {0:?}, not TO_DEVICE, FROM_DEVICE or BIDIRECTIONAL")]
    Direction(String),
    /// An unmap that names memory.
    #[error("phys is {0:?}, and is - in an unmap")]
    UnmapWithMemory(String),
    /// An attach or detach that names something.
    #[error("{field} is {text:?}, and is - in an attach or detach")]
    NotEmpty {
        /// The field's name in the header.
        field: &'static str,
        /// What stands there.
        text: String,
    },
    /// A DMA that ends in no known way.
    #[error("phys is {0:?}, and is -, fault or gone in a read or write")]
    Outcome(String),
    /// A DMA in the wrong direction.
    #[error("dir is {0}, and is TO_DEVICE in a read, FROM_DEVICE in a write")]
    DmaDirection(&'static str),
    /// A DMA longer than [`LONGEST_DMA`].
    #[error("{0} bytes are more than one DMA has, at most {LONGEST_DMA}")]
    LongDma(u64),
    /// No bytes, or bytes beyond the last address.
    #[error("{bytes} bytes from {field} {first:#x} on are no range of addresses")]
    NoRange {
        /// The field that the range begins with.
        field: &'static str,
        /// Its value.
        first: u64,
        /// How many bytes there should be.
        bytes: u64,
    },
    /// Pages cannot lead from the one address to the other.
    #[error("iova {iova:#x} and phys {physical:#x} are at different offsets in their pages of 4096 bytes")]
    Offsets {
        /// The I/O virtual address.
        iova: u64,
        /// The physical address.
        physical: u64,
    },
}

/// What is wrong with a trace.
#[derive(Debug, thiserror::Error)]
pub enum TraceError {
    /// A line is no event. The next one may be.
    #[error("line {line}: {reason}")]
    Malformed {
        /// The line's number, the header's being 1.
        line: u64,
        /// What is wrong.
        reason: Malformed,
    },
    /// The first line is neither the header nor an event. Nothing more is read.
    #[error("this is no trace: line 1 should be {HEADER}, and as an event: {reason}")]
    NotATrace {
        /// Why the line is no event.
        reason: Malformed,
    },
    /// There is nothing at all.
    #[error("this is no trace: it is empty")]
    Empty,
    /// It cannot be read any further, or what was compressed is damaged or ends in the middle.
    #[error("line {line} cannot be read, nor what comes after it: {error}")]
    Unreadable {
        /// The line that would have been next.
        line: u64,
        /// Why.
        error: io::Error,
    },
}

impl TraceError {
    /// Whether there may be more to read.
    pub fn is_of_one_line(&self) -> bool {
        matches!(self, TraceError::Malformed { .. })
    }
}

/// A trace that is being read: the events with the numbers of their lines.
///
/// After an error that is not [of one line](TraceError::is_of_one_line) there is nothing more.
///
/// ```
/// use ioasid_replay::trace::{Trace, TraceError};
///
/// let text = "t_ns,cpu,dev,op,iova,phys,bytes,dir\n0,0,00:03.0,unmap,1000,-,4096,TO_DEVICE\n5,0,00:03.0,umap\n";
/// let mut trace = Trace::new(text.as_bytes())?;
/// let (line, event) = trace.next().unwrap()?;
/// assert_eq!((line, event.bytes), (2, 4096));
/// assert_eq!(trace.next().unwrap().unwrap_err().to_string().split(':').next(), Some("line 3"));
/// assert!(trace.next().is_none());
/// # Ok::<(), TraceError>(())
/// ```
pub struct Trace<R: Read> {
    text: Text<R>,
    /// The last line that was read.
    line: u64,
    buffer: Vec<u8>,
    ended: bool,
}

/// The text, however it is stored.
enum Text<R: Read> {
    Plain(Start<R>),
    Compressed(Box<BufReader<zstd::Decoder<'static, Start<R>>>>),
}

/// A reader whose first bytes have been looked at.
type Start<R> = io::Chain<io::Cursor<Vec<u8>>, BufReader<R>>;

impl<R: Read> Trace<R> {
    /// Begins to read. Whether it is compressed is seen from the first bytes, not from a name.
    ///
    /// # Errors
    /// The first bytes cannot be read.
    pub fn new(source: R) -> Result<Trace<R>, TraceError> {
        let unreadable = |error| TraceError::Unreadable { line: 1, error };
        let mut source = BufReader::with_capacity(1 << 16, source);
        let mut first = Vec::with_capacity(4);
        source.by_ref().take(4).read_to_end(&mut first).map_err(unreadable)?;
        let magic = <[u8; 4]>::try_from(first.as_slice()).map(u32::from_le_bytes);
        let compressed = magic.is_ok_and(|magic| magic == FRAME || magic & !0xf == SKIPPABLE_FRAME);
        let start = io::Cursor::new(first).chain(source);
        let text = if compressed {
            let mut decoder = zstd::Decoder::with_buffer(start).map_err(unreadable)?;
            decoder.window_log_max(LARGEST_WINDOW).map_err(unreadable)?;
            Text::Compressed(Box::new(BufReader::with_capacity(1 << 16, decoder)))
        } else {
            Text::Plain(start)
        };
        Ok(Trace { text, line: 0, buffer: Vec::with_capacity(LONGEST_LINE + 1), ended: false })
    }

    /// Reads a line without its end into the buffer: whether there was one, and whether it was short enough.
    fn read_line(&mut self) -> io::Result<Option<Result<(), Malformed>>> {
        fn line(text: &mut impl BufRead, buffer: &mut Vec<u8>) -> io::Result<Option<Result<(), Malformed>>> {
            buffer.clear();
            text.by_ref().take(LONGEST_LINE as u64 + 1).read_until(b'\n', buffer)?;
            match buffer.last() {
                None => return Ok(None),
                Some(b'\n') => drop(buffer.pop()),
                Some(_) if buffer.len() > LONGEST_LINE => {
                    text.skip_until(b'\n')?;
                    return Ok(Some(Err(Malformed::TooLong)));
                }
                // The last line may have no end.
                Some(_) => {}
            }
            if buffer.last() == Some(&b'\r') {
                buffer.pop();
            }
            Ok(Some(Ok(())))
        }
        match &mut self.text {
            Text::Plain(text) => line(text, &mut self.buffer),
            Text::Compressed(text) => line(text, &mut self.buffer),
        }
    }

    fn end(&mut self, error: TraceError) -> Option<Result<(u64, Event), TraceError>> {
        self.ended = true;
        Some(Err(error))
    }
}

impl<R: Read> Iterator for Trace<R> {
    type Item = Result<(u64, Event), TraceError>;

    fn next(&mut self) -> Option<Self::Item> {
        while !self.ended {
            let line = self.line.saturating_add(1);
            let read = match self.read_line() {
                Ok(Some(read)) => read,
                Ok(None) if line == 1 => return self.end(TraceError::Empty),
                Ok(None) => {
                    self.ended = true;
                    return None;
                }
                Err(error) => return self.end(TraceError::Unreadable { line, error }),
            };
            self.line = line;
            if line == 1 && read.is_ok() && self.buffer == HEADER.as_bytes() {
                continue;
            }
            match read.and_then(|()| parse(&self.buffer)) {
                Ok(event) => return Some(Ok((line, event))),
                Err(reason) if line == 1 => return self.end(TraceError::NotATrace { reason }),
                Err(reason) => return Some(Err(TraceError::Malformed { line, reason })),
            }
        }
        None
    }
}

impl<R: Read> fmt::Debug for Trace<R> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Trace").field("line", &self.line).finish_non_exhaustive()
    }
}

/// A number of digits alone: what stands for others, a sign for example, stands in no trace.
fn hexadecimal(text: &str) -> Option<u64> {
    let digits = text.bytes().all(|byte| byte.is_ascii_hexdigit());
    if digits { u64::from_str_radix(text, 16).ok() } else { None }
}

fn decimal<N: FromStr>(text: &str) -> Option<N> {
    let digits = text.bytes().all(|byte| byte.is_ascii_digit());
    if digits { text.parse().ok() } else { None }
}

/// The event that a line is.
fn parse(line: &[u8]) -> Result<Event, Malformed> {
    let line = std::str::from_utf8(line).map_err(|_| Malformed::NotText)?;
    let mut fields = [""; 8];
    let mut found = 0;
    for text in line.split(',') {
        if let Some(field) = fields.get_mut(found) {
            *field = text;
        }
        found += 1;
    }
    if found != fields.len() {
        return Err(Malformed::Fields { found });
    }
    let [time, cpu, device, operation, iova, physical, bytes, direction] = fields;
    let not =
        |field, text: &str, hexadecimal| Malformed::Number { field, text: text.to_owned(), hexadecimal };
    let time = decimal(time).ok_or_else(|| not("t_ns", time, false))?;
    let cpu = decimal(cpu).ok_or_else(|| not("cpu", cpu, false))?;
    let device = device.parse()?;
    let about_attachment = match operation {
        "attach" => Some(Operation::Attach),
        "detach" => Some(Operation::Detach),
        _ => None,
    };
    if let Some(operation) = about_attachment {
        let fields = [("iova", iova), ("phys", physical), ("bytes", bytes), ("dir", direction)];
        if let Some((field, text)) = fields.into_iter().find(|(_, text)| *text != "-") {
            return Err(Malformed::NotEmpty { field, text: text.to_owned() });
        }
        let (range, direction) = (IovaRange::ALL, Direction::Bidirectional);
        return Ok(Event { time, cpu, device, operation, range, bytes: 0, direction });
    }
    let iova = hexadecimal(iova).ok_or_else(|| not("iova", iova, true))?;
    let bytes: u64 = decimal(bytes).ok_or_else(|| not("bytes", bytes, false))?;
    let no_range = |field, first| Malformed::NoRange { field, first, bytes };
    let range = IovaRange::with_length(iova, bytes).ok_or_else(|| no_range("iova", iova))?;
    let operation = match operation {
        "map" => {
            let physical = hexadecimal(physical).ok_or_else(|| not("phys", physical, true))?;
            IovaRange::with_length(physical, bytes).ok_or_else(|| no_range("phys", physical))?;
            if (iova ^ physical) % 4096 != 0 {
                return Err(Malformed::Offsets { iova, physical });
            }
            Operation::Map { physical }
        }
        "unmap" if physical == "-" => Operation::Unmap,
        "unmap" => return Err(Malformed::UnmapWithMemory(physical.to_owned())),
        "read" | "write" => {
            let outcome = Outcome::ALL.into_iter().find(|outcome| outcome.name() == physical);
            let outcome = outcome.ok_or_else(|| Malformed::Outcome(physical.to_owned()))?;
            if bytes > LONGEST_DMA {
                return Err(Malformed::LongDma(bytes));
            }
            if operation == "read" { Operation::Read(outcome) } else { Operation::Write(outcome) }
        }
        other => return Err(Malformed::Operation(other.to_owned())),
    };
    let direction = [Direction::ToDevice, Direction::FromDevice, Direction::Bidirectional]
        .into_iter()
        .find(|known| known.name() == direction)
        .ok_or_else(|| Malformed::Direction(direction.to_owned()))?;
    match (operation, direction) {
        (Operation::Read(_), Direction::ToDevice) | (Operation::Write(_), Direction::FromDevice) => {}
        (Operation::Read(_) | Operation::Write(_), _) => {
            return Err(Malformed::DmaDirection(direction.name()));
        }
        _ => {}
    }
    Ok(Event { time, cpu, device, operation, range, bytes, direction })
}

/// A page of addresses.
pub(crate) const PAGE: u64 = 4096;

impl Event {
    /// Where the range begins.
    pub fn iova(&self) -> Iova {
        Iova::new(self.range.first())
    }

    /// The whole pages that the range lies in: what a kernel maps for a request that ends within a page.
    pub fn pages(&self) -> IovaRange {
        let (first, last) = (self.range.first() & !(PAGE - 1), self.range.last() | (PAGE - 1));
        IovaRange::new(first, last).unwrap_or(self.range)
    }
}
