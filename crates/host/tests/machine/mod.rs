//! The machine of these tests: this project's server, reached by real system calls.
//!
//! A program that declares this module starts itself again below the transport before its tests begin, with the same
//! arguments; the one outside only waits. So the tests inside find a `/dev/iommu` and devices, whatever the machine is, and
//! are ordinary tests otherwise.

#![allow(dead_code, reason = "every test program uses its own part of it")]
#![allow(unsafe_code, reason = "a function that runs before main")]

use std::fs::read_to_string;
use std::path::{Path, PathBuf};
use std::process::exit;
use std::time::{Duration, Instant};

use ioasid_host::DeviceFile;
use ioasid_run::{Options, run};
use ioasid_server::{DeviceOptions, Server, ServerOptions};
use ioasid_soft::edu::spec::{self, DmaCommand};
use ioasid_uapi::pci;
use ioasid_uapi::vfio::{PCI_BAR0_REGION_INDEX, PCI_CONFIG_REGION_INDEX};
use serde_json::Value;

/// How many devices the machine has, all alike.
pub(crate) const DEVICES: usize = 24;

/// Set for the program inside.
const INSIDE: &str = "IOASID_HOST_TESTS";

/// No transfer takes a noticeable part of it.
const DEADLINE: Duration = Duration::from_secs(10);

#[used]
#[unsafe(link_section = ".init_array")]
static BEFORE_MAIN: extern "C" fn() = start_again_inside;

extern "C" fn start_again_inside() {
    if std::env::var_os(INSIDE).is_none() {
        exit(supervise());
    }
}

fn supervise() -> i32 {
    let device = DeviceOptions { dma_mask_bits: 64, ..DeviceOptions::default() };
    let server = Server::new(ServerOptions { devices: vec![device; DEVICES] });
    let own = std::env::current_exe().map(PathBuf::into_os_string);
    let (Ok(server), Ok(own)) = (server, own) else { return 101 };
    let arguments = [format!("{INSIDE}=inside").into(), own].into_iter().chain(std::env::args_os().skip(1));
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
