//! The commands of a device file, one arm each. `None`: the server did not read the argument, or the command is unknown.

use ioasid_uapi::Command;
use ioasid_uapi::vfio as uapi;

use super::{CapturedCall, Words};

/// The PASID, if the flags say that there is one, and other flags.
fn pasid(words: &mut Words, flags: u32, pasid: u32) {
    if flags & 1 != 0 {
        words.asked(format_args!("pasid={pasid}"));
    }
    words.flags(flags & !1, &[]);
}

pub(super) fn decode(call: &CapturedCall, words: &mut Words) -> Option<()> {
    match call.command() {
        uapi::DeviceBindIommufd::NUMBER => {
            let (input, output) = call.both::<uapi::DeviceBindIommufd>()?;
            words.asked(format_args!("iommufd={}", input.iommufd));
            words.flags(input.flags, &[(1, "token")]);
            words.answered(format_args!("dev={}", output.out_devid));
        }
        uapi::DeviceAttachIommufdPt::NUMBER => {
            let (input, output) = call.both::<uapi::DeviceAttachIommufdPt>()?;
            words.asked(format_args!("pt={}", input.pt_id));
            pasid(words, input.flags, input.pasid);
            words.answered(format_args!("hwpt={}", output.pt_id));
        }
        uapi::DeviceDetachIommufdPt::NUMBER => {
            let input: uapi::DeviceDetachIommufdPt = call.input()?;
            pasid(words, input.flags, input.pasid);
        }
        uapi::DeviceInfo::NUMBER => {
            let output: uapi::DeviceInfo = call.output()?;
            words.answered(format_args!(
                "flags={:#x} regions={} irqs={}",
                output.flags, output.num_regions, output.num_irqs
            ));
        }
        uapi::RegionInfo::NUMBER => {
            let (input, output) = call.both::<uapi::RegionInfo>()?;
            words.asked(format_args!("index={}", input.index));
            words.answered(format_args!(
                "size={:#x} offset={:#x} flags={:#x}",
                output.size, output.offset, output.flags
            ));
        }
        uapi::IrqInfo::NUMBER => {
            let (input, output) = call.both::<uapi::IrqInfo>()?;
            words.asked(format_args!("index={}", input.index));
            words.answered(format_args!("count={} flags={:#x}", output.count, output.flags));
        }
        uapi::IrqSet::NUMBER => {
            let input: uapi::IrqSet = call.input()?;
            words.asked(format_args!("index={} start={} count={}", input.index, input.start, input.count));
            const NAMES: [(u32, &str); 6] =
                [(1, "none"), (2, "bool"), (4, "eventfd"), (8, "mask"), (16, "unmask"), (32, "trigger")];
            words.flags(input.flags, &NAMES);
        }
        uapi::DeviceFeature::NUMBER => {
            let input: uapi::DeviceFeature = call.input()?;
            words.asked(format_args!("feature={}", input.flags & uapi::DEVICE_FEATURE_MASK));
            let names = [(1 << 16, "get"), (1 << 17, "set"), (1 << 18, "probe")];
            words.flags(input.flags & !uapi::DEVICE_FEATURE_MASK, &names);
        }
        uapi::DEVICE_RESET => {}
        _ => return None,
    }
    Some(())
}
