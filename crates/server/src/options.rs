//! What the imaginary machine has: its devices and how their IOMMU stores page tables.

use std::num::NonZeroU8;
use std::ops::RangeInclusive;
use std::str::FromStr;

use ioasid_soft::iommu::{TableKind, UnknownTableKind};

/// The machine that a [`Server`](crate::Server) pretends to be.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ServerOptions {
    /// One entry per device; entry `n` is `/dev/vfio/devices/vfioN`.
    pub devices: Vec<DeviceOptions>,
    /// How much clients may make the server hold.
    pub limits: Limits,
    /// Whether `/dev/iommu` has the test-only command of kernels that are built for their own self-test, by which a
    /// program makes mock devices and more.
    pub test_devices: bool,
}

/// How much clients may make the server hold, each and together. Beyond, they get an errno, and other clients go on.
///
/// Memory that the server uses is at most, but for its own few mebibytes,
///
/// ```text
///     files.total x 4 KiB  +  objects.total x 4 KiB  +  areas.total x 1 KiB  +  page tables  +  requests x 4 MiB
/// ```
///
/// ([`Limits::FILE_BYTES`] and so on). Page tables, with what they record of writes, are bounded by
/// `ioasid_pagetable::HeapTables::set_limit`. Requests are those under way at the same time, whose number is the transport's to
/// bound; most take a few hundred bytes. With [test devices](ServerOptions::test_devices) 256 MiB for dma-bufs are added. Texts of the
/// [status](crate::Server::status), of 10 MiB at most each, are not in this.
///
/// Parses from settings `NAME=PER_CLIENT` or `NAME=PER_CLIENT:TOTAL` with commas between them.
///
/// ```
/// use ioasid_server::{Limit, Limits};
/// let limits: Limits = "files=64,areas=1000:5000".parse()?;
/// assert_eq!(limits.files.per_client, 64);
/// assert_eq!(limits.areas, Limit { per_client: 1000, total: 5000 });
/// assert_eq!(limits.objects, Limits::default().objects);
/// # Ok::<(), ioasid_server::OptionsError>(())
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// Open files: of `/dev/iommu` and of devices; with test devices of accesses and dma-bufs. `EMFILE` for one client, `ENFILE`
    /// for all.
    pub files: Limit,
    /// I/O address spaces, page tables, bound devices and PASIDs that are attached; with test devices mock devices (two each) and accesses. `ENOMEM`.
    pub objects: Limit,
    /// Areas, which is what one map call makes or what is left of it on either side of a cut, and ranges in which automatic
    /// placement is allowed; with test devices also reserved ranges, and the pieces of pins. Memory that is registered for a device
    /// counts one more for each whole 64 GiB that one call has mapped. `ENOMEM`.
    pub areas: Limit,
}

/// A limit for each client and for all together. A client is one process: its threads are the same client, and its forks
/// are others. No client, and no process with all its [descendants](crate::Process::lineage), has more than it leaves to the others, so a
/// limit for each that is above half of the total is never reached.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limit {
    /// How many one client may have.
    pub per_client: usize,
    /// How many all clients may have.
    pub total: usize,
}

impl Limits {
    /// No open file takes more bytes of the server than this, without what is made through it.
    pub const FILE_BYTES: usize = 4 << 10;
    /// No object takes more, without its page tables.
    pub const OBJECT_BYTES: usize = 4 << 10;
    /// No area takes more, without page tables.
    pub const AREA_BYTES: usize = 1 << 10;

    /// Bytes that the server uses at most for what clients have, without page tables.
    pub fn bytes(&self) -> usize {
        let part = |limit: Limit, bytes: usize| limit.total.saturating_mul(bytes);
        part(self.files, Self::FILE_BYTES)
            .saturating_add(part(self.objects, Self::OBJECT_BYTES))
            .saturating_add(part(self.areas, Self::AREA_BYTES))
    }
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            files: Limit { per_client: 1 << 10, total: 1 << 13 },
            objects: Limit { per_client: 1 << 14, total: 1 << 16 },
            areas: Limit { per_client: 1 << 20, total: 1 << 22 },
        }
    }
}

impl FromStr for Limits {
    type Err = OptionsError;

    fn from_str(text: &str) -> Result<Self, OptionsError> {
        let mut limits = Self::default();
        for setting in text.split(',') {
            let unknown = || OptionsError::UnknownLimit(setting.to_owned());
            let (name, value) = setting.split_once('=').ok_or_else(unknown)?;
            let limit = match name {
                "files" => &mut limits.files,
                "objects" => &mut limits.objects,
                "areas" => &mut limits.areas,
                _ => return Err(unknown()),
            };
            let (per_client, total) = value.split_once(':').unwrap_or((value, ""));
            limit.per_client = per_client.parse().map_err(|_| unknown())?;
            if !total.is_empty() {
                limit.total = total.parse().map_err(|_| unknown())?;
            }
        }
        Ok(limits)
    }
}

impl Default for ServerOptions {
    fn default() -> Self {
        Self { devices: vec![DeviceOptions::default()], limits: Limits::default(), test_devices: false }
    }
}

/// One software device. The model is QEMU's `edu`.
///
/// Parses from `edu`, or with settings as in `edu:table=vtd,dma-mask=40`.
///
/// ```
/// use ioasid_server::{DeviceOptions, TableKind};
/// let options: DeviceOptions = "edu:table=vtd,dma-mask=40".parse()?;
/// let expected = DeviceOptions { table: TableKind::VtdSecondStage, dma_mask_bits: 40, ..DeviceOptions::default() };
/// assert_eq!(options, expected);
/// # Ok::<(), ioasid_server::OptionsError>(())
/// ```
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DeviceOptions {
    /// The kind of page table that the IOMMU in front of the device walks.
    pub table: TableKind,
    /// How many low bits of a memory address the device drives, 12 to 64; edu's default is 28.
    pub dma_mask_bits: u32,
    /// How many bits the device's PASIDs have, 1 to 20; 0: it has none.
    pub pasid_bits: u32,
    /// The conventional bus that the device is on, behind a bridge from PCI Express. Devices on one bus are a group: the
    /// bridge makes requests for all of them, and none has a PASID. `None`: a group of its own.
    pub conventional_bus: Option<NonZeroU8>,
    /// Whether the device could make requests that bypass the CPU's caches. It makes none, but who asks whether its
    /// DMA is coherent gets the answer for a device that does.
    pub no_snoop: bool,
}

impl Default for DeviceOptions {
    fn default() -> Self {
        Self {
            table: TableKind::Native,
            dma_mask_bits: 28,
            pasid_bits: 20,
            conventional_bus: None,
            no_snoop: false,
        }
    }
}

/// Why the text of a device's options was refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum OptionsError {
    /// There is no such device model.
    #[error("unknown device model {0:?}; there is \"edu\"")]
    UnknownModel(String),
    /// A setting has an unknown name or no value.
    #[error(
        "unknown device setting {0:?}; there are table=KIND, dma-mask=12..64, pasids=0..20, bus=1..255 and no-snoop"
    )]
    UnknownSetting(String),
    /// A limit has an unknown name or no number.
    #[error("bad limit {0:?}; there are files, objects and areas, as in areas=1000 or areas=1000:5000")]
    UnknownLimit(String),
    /// There is no such kind of table.
    #[error(transparent)]
    UnknownTable(#[from] UnknownTableKind),
    /// A setting's value is out of its domain.
    #[error("bad value {value:?} for the device setting {setting}")]
    BadValue {
        /// The setting's name.
        setting: &'static str,
        /// The value that was given.
        value: String,
    },
}

impl FromStr for DeviceOptions {
    type Err = OptionsError;

    fn from_str(text: &str) -> Result<Self, OptionsError> {
        let (model, settings) = text.split_once(':').unwrap_or((text, ""));
        if model != "edu" {
            return Err(OptionsError::UnknownModel(model.to_owned()));
        }
        let mut options = Self::default();
        for setting in settings.split(',').filter(|setting| !setting.is_empty()) {
            match setting.split_once('=') {
                None if setting == "no-snoop" => options.no_snoop = true,
                Some(("bus", value)) => {
                    let unknown = || OptionsError::BadValue { setting: "bus", value: value.to_owned() };
                    options.conventional_bus = Some(value.parse().map_err(|_| unknown())?);
                }
                Some(("table", kind)) => options.table = kind.parse()?,
                Some(("dma-mask", value)) => options.dma_mask_bits = bits("dma-mask", value, 12..=64)?,
                Some(("pasids", value)) => options.pasid_bits = bits("pasids", value, 0..=20)?,
                _ => return Err(OptionsError::UnknownSetting(setting.to_owned())),
            }
        }
        Ok(options)
    }
}

/// A number of bits, of those that are possible.
fn bits(setting: &'static str, value: &str, possible: RangeInclusive<u32>) -> Result<u32, OptionsError> {
    let bits = value.parse().ok().filter(|bits| possible.contains(bits));
    bits.ok_or_else(|| OptionsError::BadValue { setting, value: value.to_owned() })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bad_limits_are_named() {
        for bad in ["", "areas", "areas=", "areas=x", "areas=1:x", "areas=-1", "spaces=1", "files=1,"] {
            let refused = bad.parse::<Limits>().unwrap_err().to_string();
            assert!(refused.contains("bad limit"), "{bad}");
        }
    }

    #[test]
    fn settings_are_parsed_and_bad_ones_named() {
        assert_eq!("edu".parse(), Ok(DeviceOptions::default()));
        assert_eq!(
            "edu:dma-mask=64,table=native,pasids=0".parse(),
            Ok(DeviceOptions { dma_mask_bits: 64, pasid_bits: 0, ..DeviceOptions::default() })
        );
        let conventional_bus = NonZeroU8::new(2);
        assert_eq!(
            "edu:bus=2,no-snoop".parse(),
            Ok(DeviceOptions { conventional_bus, no_snoop: true, ..DeviceOptions::default() })
        );
        assert_eq!("ioat".parse::<DeviceOptions>(), Err(OptionsError::UnknownModel("ioat".to_owned())));
        let bad = ["dma-mask=11", "dma-mask=65", "dma-mask=x", "pasids=21", "table=arm", "colour=red"];
        for bad in bad.into_iter().chain(["bus=0", "bus=256", "no-snoop=1"]) {
            assert!(format!("edu:{bad}").parse::<DeviceOptions>().is_err(), "{bad}");
        }
    }
}
