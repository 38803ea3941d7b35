//! The machine of these tests: this project's server, reached by real system calls.
//!
//! A program that declares this module starts itself again below the transport before its tests begin, with the same
//! arguments; the one outside only waits. So the tests inside find a `/dev/iommu` and devices, whatever the machine is, and
//! are ordinary tests otherwise.

#![allow(dead_code, reason = "every test program uses its own part of it")]
#![allow(unsafe_code, reason = "a function that runs before main")]

use std::ffi::c_void;
use std::fs::read_to_string;
use std::path::{Path, PathBuf};
use std::process::exit;
use std::time::{Duration, Instant};

use ioasid_host::DeviceFile;
use ioasid_run::{Options, run};
use ioasid_server::{DeviceOptions, Server, ServerOptions, TableKind};
use ioasid_soft::edu::spec::{self, DmaCommand};
use ioasid_uapi::vfio::{PCI_BAR0_REGION_INDEX, PCI_CONFIG_REGION_INDEX};
use ioasid_uapi::{Command, pci};
use rustix::fd::AsFd;
use rustix::ioctl::{Ioctl, IoctlOutput, Opcode, ioctl};
use serde_json::Value;

/// How many devices the machine has whose IOMMU walks our native format, and reserves the interrupt window.
pub(crate) const NATIVE_DEVICES: usize = 4;
/// How many come behind them whose IOMMU walks RISC-V's, and reserves nothing below 2^56.
pub(crate) const RISC_V_DEVICES: usize = 24;

/// Tests of this program that are not run.
const SKIPPED: &[&str] = super::SKIPPED;

/// Set for the program inside.
const INSIDE: &str = "IOASID_HOST_TESTS";

/// No transfer takes a noticeable part of it.
const DEADLINE: Duration = Duration::from_secs(60);

#[used]
#[unsafe(link_section = ".init_array")]
static BEFORE_MAIN: extern "C" fn() = start_again_inside;

extern "C" fn start_again_inside() {
    if std::env::var_os(INSIDE).is_none() {
        exit(supervise());
    }
}

fn supervise() -> i32 {
    let devices = [(TableKind::Native, NATIVE_DEVICES), (TableKind::Sv57, RISC_V_DEVICES)];
    let devices = devices.into_iter().flat_map(|(table, count)| {
        std::iter::repeat_n(DeviceOptions { table, dma_mask_bits: 64, ..Default::default() }, count)
    });
    let server = Server::new(ServerOptions { devices: devices.collect(), ..ServerOptions::default() });
    let own = std::env::current_exe().map(PathBuf::into_os_string);
    let (Ok(server), Ok(own)) = (server, own) else { return 101 };
    let arguments = [format!("{INSIDE}=inside").into(), own].into_iter().chain(std::env::args_os().skip(1));
    let skipped = SKIPPED.iter().flat_map(|name| ["--skip".into(), (*name).into()]);
    let arguments = arguments.chain(skipped);
    match run("env", arguments, &Options::default(), server) {
        Ok(outcome) => outcome.status.code().unwrap_or(101),
        Err(error) => {
            eprintln!("these tests cannot run here: {error}");
            101
        }
    }
}

/// The path of a device.
pub(crate) fn device(number: usize) -> PathBuf {
    Path::new("/dev/vfio/devices").join(format!("vfio{number}"))
}

/// What the server has, as it says itself.
pub(crate) fn status() -> Value {
    serde_json::from_str(&read_to_string("/dev/ioasid").unwrap()).unwrap()
}

/// Pages that anybody is charged for.
pub(crate) fn charged_pages() -> u64 {
    let status = status();
    let accounts = status["accounts"].as_array().unwrap();
    accounts.iter().map(|account| account["charged_pages"].as_u64().unwrap()).sum()
}

/// How many opens of `/dev/iommu` live.
pub(crate) fn contexts() -> usize {
    status()["contexts"].as_array().unwrap().len()
}

/// The driver of an edu device, which copies between memory and a buffer of its own.
#[derive(Debug)]
pub(crate) struct Edu {
    file: DeviceFile,
    bar: u64,
}

impl Edu {
    /// Lets the device answer and do DMA.
    pub(crate) fn new(file: DeviceFile) -> Edu {
        let config = file.region_offset(PCI_CONFIG_REGION_INDEX).unwrap();
        let command = (pci::Command::BUS_MASTER | pci::Command::MEMORY_SPACE).bits().to_le_bytes();
        assert_eq!(file.write_at(config + pci::COMMAND as u64, &command), Ok(2));
        let bar = file.region_offset(PCI_BAR0_REGION_INDEX).unwrap();
        Edu { file, bar }
    }

    /// Has the device copy from one address to another, by way of its buffer. Of what it cannot read it keeps what it had.
    pub(crate) fn copy(&self, from: u64, to: u64, length: usize) {
        self.transfer(from, spec::BUFFER_ADDRESS, length, DmaCommand::RUN);
        self.transfer(spec::BUFFER_ADDRESS, to, length, DmaCommand::RUN | DmaCommand::TO_MEMORY);
    }

    fn transfer(&self, from: u64, to: u64, length: usize, command: DmaCommand) {
        self.write(spec::DMA_SOURCE, from);
        self.write(spec::DMA_DESTINATION, to);
        self.write(spec::DMA_COUNT, length as u64);
        self.write(spec::DMA_COMMAND, command.bits());
        let start = Instant::now();
        let mut bytes = [0; 4];
        loop {
            assert_eq!(self.file.read_at(self.bar + spec::DMA_COMMAND, &mut bytes), Ok(4));
            if u32::from_le_bytes(bytes) & DmaCommand::RUN.bits() as u32 == 0 {
                return;
            }
            assert!(start.elapsed() < DEADLINE, "the device does not end");
            std::thread::yield_now();
        }
    }

    fn write(&self, register: u64, value: u64) {
        assert_eq!(self.file.write_at(self.bar + register, &value.to_le_bytes()), Ok(8));
    }
}

/// Performs an ioctl of VFIO, whose argument has no address in it.
pub(crate) fn vfio<C: Command>(file: impl AsFd, command: &mut C) {
    /// The call.
    struct Call(u32, *mut c_void);

    // SAFETY: number and argument are those of the call.
    unsafe impl Ioctl for Call {
        type Output = ();

        const IS_MUTATING: bool = true;

        fn opcode(&self) -> Opcode {
            self.0 as Opcode
        }

        fn as_ptr(&mut self) -> *mut c_void {
            self.1
        }

        unsafe fn output_from_ptr(_: IoctlOutput, _: *mut c_void) -> rustix::io::Result<()> {
            Ok(())
        }
    }

    let bytes = command.as_mut_bytes();
    let size = bytes.len() as u32;
    bytes[..4].copy_from_slice(&size.to_ne_bytes());
    // SAFETY: the argument says its size, and no address.
    unsafe { ioctl(file, Call(C::NUMBER, bytes.as_mut_ptr().cast())) }.unwrap();
}
