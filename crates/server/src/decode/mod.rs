//! Calls in words: what a client asked for and what it got, for people who look on.
//!
//! [`File::ioctl_captured`](crate::File::ioctl_captured) is `ioctl`, and keeps the bytes of the argument as they passed by: those
//! that the server read, and those that it wrote back. So nothing is read twice. A client that changes its argument meanwhile changes
//! nothing here: what is shown is what the server decided on, and of an argument that it did not read nothing is shown.
//!
//! The layouts are those of `ioasid-uapi`. Each command that it has is decoded here, also those that the server refuses.

mod errno;
mod iommufd;
mod vfio;

use std::borrow::Cow;
use std::cell::RefCell;
use std::fmt::{self, Write};
use std::sync::Arc;

use ioasid_uapi::Command;
use ioasid_uapi::iommufd::command;
use ioasid_uapi::vfio::{CONTAINER_COMMANDS, DEVICE_COMMANDS};
use rustix::io::Errno;

use crate::{Client, Descriptor, File, Process};

pub use errno::errno_name;

/// So many bytes of an argument are kept. No structure is longer.
const KEPT: usize = 128;

/// An open file of the server, as people call it: `iommu1`, `vfio0`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum FileName {
    /// An open `/dev/iommu`; opens are counted from 1.
    Iommufd(u64),
    /// An open `/dev/vfio/devices/vfioN`.
    Device(usize),
    /// A file of the test-only command, which has no commands of its own.
    Test,
}

impl fmt::Display for FileName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Iommufd(number) => write!(f, "iommu{number}"),
            Self::Device(number) => write!(f, "vfio{number}"),
            Self::Test => f.write_str("test"),
        }
    }
}

/// An `ioctl` that has been answered, with what the server saw of its argument.
///
/// Shows itself as one line: `IOAS_UNMAP ioas=1 iova=0x1000 len=0x1000 -> -1 ENOENT (No such file or directory)`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CapturedCall {
    file: FileName,
    command: u32,
    argument: u64,
    /// What the server read, from the first byte on without a gap.
    before: Vec<u8>,
    /// The same with what it wrote.
    after: Vec<u8>,
    result: Result<u32, Errno>,
}

impl CapturedCall {
    /// The file that was called.
    pub fn file(&self) -> FileName {
        self.file
    }

    /// The command's number.
    pub fn command(&self) -> u32 {
        self.command
    }

    /// What the client was answered.
    pub fn result(&self) -> Result<u32, Errno> {
        self.result
    }

    /// The argument as the server read it; `None` if this is another command, or the server did not read so much.
    pub fn input<T: Command>(&self) -> Option<T> {
        self.structure(&self.before)
    }

    /// The argument as the server left it; `None` as for [`input`](Self::input).
    pub fn output<T: Command>(&self) -> Option<T> {
        self.structure(&self.after)
    }

    fn structure<T: Command>(&self, bytes: &[u8]) -> Option<T> {
        if self.command != T::NUMBER || bytes.len() < T::MIN_SIZE {
            return None;
        }
        let mut value = T::new_zeroed();
        let length = bytes.len().min(T::SIZE);
        value.as_mut_bytes()[..length].copy_from_slice(&bytes[..length]);
        Some(value)
    }

    /// Both, for the decoders.
    fn both<T: Command>(&self) -> Option<(T, T)> {
        Some((self.input()?, self.output()?))
    }

    /// The command's name in the kernel's headers, without `IOMMU_`; or its number.
    pub fn name(&self) -> Cow<'static, str> {
        let commands = match self.file {
            FileName::Iommufd(_) => CONTAINER_COMMANDS,
            FileName::Device(_) => DEVICE_COMMANDS,
            FileName::Test => &[],
        };
        let of_iommufd = || match self.file {
            FileName::Iommufd(_) => command(self.command).map(|info| info.name),
            FileName::Device(_) | FileName::Test => None,
        };
        let known = commands.iter().find(|(number, _)| *number == self.command).map(|(_, name)| *name);
        match of_iommufd().or(known) {
            Some(name) => Cow::Borrowed(name.strip_prefix("IOMMU_").unwrap_or(name)),
            None => Cow::Owned(format!("ioctl {:#06x}", self.command)),
        }
    }

    /// What was asked for and what came back, in words: `ioas=2 iova=0x1000 len=0x1000 rw`, and perhaps `ioas=2`.
    pub fn words(&self) -> (String, String) {
        let mut words = Words::default();
        let decoded = match self.file {
            FileName::Iommufd(_) => iommufd::decode(self, &mut words),
            FileName::Device(_) => vfio::decode(self, &mut words),
            FileName::Test => None,
        };
        if decoded.is_none() {
            words = Words::default();
            words.asked(format_args!("arg={:#x}", self.argument));
        }
        (words.asked, words.answered)
    }
}

impl fmt::Display for CapturedCall {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (asked, answered) = self.words();
        f.write_str(&self.name())?;
        if !asked.is_empty() {
            write!(f, " {asked}")?;
        }
        match self.result {
            Ok(value) => write!(f, " -> {value}")?,
            Err(errno) => write!(f, " -> {}", Failed(errno))?,
        }
        if self.result.is_ok() && !answered.is_empty() {
            write!(f, " {answered}")?;
        }
        Ok(())
    }
}

/// An error as `strace` shows it: `-1 EEXIST (File exists)`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Failed(pub Errno);

impl fmt::Display for Failed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let text = std::io::Error::from(self.0).to_string();
        let text = text.split(" (os error").next().unwrap_or_default();
        match errno_name(self.0) {
            Some(name) => write!(f, "-1 {name} ({text})"),
            None => write!(f, "-1 errno {} ({text})", self.0.raw_os_error()),
        }
    }
}

/// What is being said about a call.
#[derive(Debug, Default)]
struct Words {
    asked: String,
    answered: String,
}

impl Words {
    fn add(text: &mut String, words: fmt::Arguments<'_>) {
        let separator = if text.is_empty() { "" } else { " " };
        // Writing to a string does not fail.
        let _ = write!(text, "{separator}{words}");
    }

    fn asked(&mut self, words: fmt::Arguments<'_>) {
        Self::add(&mut self.asked, words);
    }

    fn answered(&mut self, words: fmt::Arguments<'_>) {
        Self::add(&mut self.answered, words);
    }

    /// Flags by name, those without a name as a number; nothing if there are none.
    fn flags(&mut self, flags: u32, names: &[(u32, &str)]) {
        let mut rest = flags;
        for (bit, name) in names {
            if flags & bit == *bit {
                self.asked(format_args!("{name}"));
                rest &= !bit;
            }
        }
        if rest != 0 {
            self.asked(format_args!("flags={rest:#x}"));
        }
    }
}

/// A client whose argument is looked at as it passes by.
pub(crate) struct Capture<'a> {
    client: &'a dyn Client,
    argument: u64,
    kept: RefCell<Kept>,
}

#[derive(Default)]
struct Kept {
    before: Vec<u8>,
    written: Vec<(usize, Vec<u8>)>,
}

impl<'a> Capture<'a> {
    pub(crate) fn new(client: &'a dyn Client, argument: u64) -> Self {
        Self { client, argument, kept: RefCell::default() }
    }

    pub(crate) fn call(self, file: FileName, command: u32, result: Result<u32, Errno>) -> CapturedCall {
        let Kept { before, written } = self.kept.into_inner();
        let mut after = before.clone();
        for (offset, bytes) in written {
            let end = offset + bytes.len();
            if after.len() < end {
                after.resize(end, 0);
            }
            after[offset..end].copy_from_slice(&bytes);
        }
        CapturedCall { file, command, argument: self.argument, before, after, result }
    }

    /// Where in what is kept an access lies, and how much of it.
    fn place(&self, address: u64, length: usize) -> Option<(usize, usize)> {
        let offset = usize::try_from(address.checked_sub(self.argument)?).ok()?;
        Some((offset, length.min(KEPT.checked_sub(offset)?)))
    }
}

impl Client for Capture<'_> {
    fn read(&self, address: u64, buffer: &mut [u8]) -> Result<(), Errno> {
        self.client.read(address, buffer)?;
        if let Some((offset, length)) = self.place(address, buffer.len()) {
            let before = &mut self.kept.borrow_mut().before;
            // Behind a gap it is something else that happens to lie near.
            if offset <= before.len() {
                if before.len() < offset + length {
                    before.resize(offset + length, 0);
                }
                before[offset..offset + length].copy_from_slice(&buffer[..length]);
            }
        }
        Ok(())
    }

    fn write(&self, address: u64, bytes: &[u8]) -> Result<(), Errno> {
        self.client.write(address, bytes)?;
        if let Some((offset, length)) = self.place(address, bytes.len()) {
            self.kept.borrow_mut().written.push((offset, bytes[..length].to_vec()));
        }
        Ok(())
    }

    fn descriptor(&self, fd: i32) -> Result<Descriptor, Errno> {
        self.client.descriptor(fd)
    }

    fn process(&self) -> Result<Arc<dyn Process>, Errno> {
        self.client.process()
    }

    fn give_descriptor(&self, file: File, close_on_exec: bool) -> Result<i32, Errno> {
        self.client.give_descriptor(file, close_on_exec)
    }
}
