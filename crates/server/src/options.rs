//! What the imaginary machine has: its devices and how their IOMMU stores page tables.

use std::str::FromStr;

use ioasid_soft::iommu::{TableKind, UnknownTableKind};

/// The machine that a [`Server`](crate::Server) pretends to be.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ServerOptions {
    /// One entry per device; entry `n` is `/dev/vfio/devices/vfioN`.
    pub devices: Vec<DeviceOptions>,
    /// Whether `/dev/iommu` has the test-only command of kernels that are built for their own self-test, by which a
    /// program makes mock devices and more. Then address spaces have a granule of 2 KiB, and devices whose tables cannot
    /// follow that are refused, see [`ServerError::TableTooCoarse`](crate::ServerError::TableTooCoarse).
    pub test_devices: bool,
}

impl Default for ServerOptions {
    fn default() -> Self {
        Self { devices: vec![DeviceOptions::default()], test_devices: false }
    }
}

/// One software device. The model is QEMU's `edu`.
///
/// Parses from `edu`, or with settings as in `edu:table=vtd,dma-mask=40`.
///
/// ```
/// use ioasid_server::{DeviceOptions, TableKind};
/// let options: DeviceOptions = "edu:table=vtd,dma-mask=40".parse()?;
/// assert_eq!(options, DeviceOptions { table: TableKind::VtdSecondStage, dma_mask_bits: 40 });
/// # Ok::<(), ioasid_server::OptionsError>(())
/// ```
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DeviceOptions {
    /// The kind of page table that the IOMMU in front of the device walks.
    pub table: TableKind,
    /// How many low bits of a memory address the device drives, 12 to 64; edu's default is 28.
    pub dma_mask_bits: u32,
}

impl Default for DeviceOptions {
    fn default() -> Self {
        Self { table: TableKind::Native, dma_mask_bits: 28 }
    }
}

/// Why the text of a device's options was refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum OptionsError {
    /// There is no such device model.
    #[error("unknown device model {0:?}; there is \"edu\"")]
    UnknownModel(String),
    /// A setting has an unknown name or no value.
    #[error("unknown device setting {0:?}; there are table=KIND and dma-mask=12..64")]
    UnknownSetting(String),
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
                Some(("table", kind)) => options.table = kind.parse()?,
                Some(("dma-mask", value)) => {
                    options.dma_mask_bits =
                        value.parse().ok().filter(|bits| (12..=64).contains(bits)).ok_or_else(|| {
                            OptionsError::BadValue { setting: "dma-mask", value: value.to_owned() }
                        })?;
                }
                _ => return Err(OptionsError::UnknownSetting(setting.to_owned())),
            }
        }
        Ok(options)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn settings_are_parsed_and_bad_ones_named() {
        assert_eq!("edu".parse(), Ok(DeviceOptions::default()));
        assert_eq!(
            "edu:dma-mask=64,table=native".parse(),
            Ok(DeviceOptions { table: TableKind::Native, dma_mask_bits: 64 })
        );
        assert_eq!("ioat".parse::<DeviceOptions>(), Err(OptionsError::UnknownModel("ioat".to_owned())));
        for bad in ["edu:dma-mask=11", "edu:dma-mask=65", "edu:dma-mask=x", "edu:table=arm", "edu:colour=red"]
        {
            assert!(bad.parse::<DeviceOptions>().is_err(), "{bad}");
        }
    }
}
