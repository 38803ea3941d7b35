//! The commands of `/dev/iommu`, one arm each. `None`: the server did not read the argument, or the command is unknown.

use ioasid_uapi::iommufd as uapi;
use ioasid_uapi::iommufd_test as test;
use ioasid_uapi::iommufd_test::{OPERATIONS, TestCommand};
use ioasid_uapi::{Command, vfio};

use super::{CapturedCall, Words};

/// Permissions and flags of a map.
fn map_flags(words: &mut Words, flags: u32) {
    let access = match (flags & 4 != 0, flags & 2 != 0) {
        (true, true) => "rw",
        (true, false) => "r",
        (false, true) => "w",
        (false, false) => "no-access",
    };
    words.asked(format_args!("{access}"));
    words.flags(flags & !6, &[(1, "fixed")]);
}

/// An address that the client chose, or that was chosen for it.
fn placed(words: &mut Words, name: &str, flags: u32, asked: u64, answered: u64) {
    if flags & 1 != 0 {
        words.asked(format_args!("{name}={asked:#x}"));
    } else {
        words.asked(format_args!("{name}=any"));
        words.answered(format_args!("{name}={answered:#x}"));
    }
}

pub(super) fn decode(call: &CapturedCall, words: &mut Words) -> Option<()> {
    match call.command() {
        uapi::Destroy::NUMBER => words.asked(format_args!("id={}", call.input::<uapi::Destroy>()?.id)),
        uapi::IoasAlloc::NUMBER => {
            let (input, output) = call.both::<uapi::IoasAlloc>()?;
            words.flags(input.flags, &[]);
            words.answered(format_args!("ioas={}", output.out_ioas_id));
        }
        uapi::IoasAllowIovas::NUMBER => {
            let input: uapi::IoasAllowIovas = call.input()?;
            words.asked(format_args!("ioas={} ranges={}", input.ioas_id, input.num_iovas));
        }
        uapi::IoasCopy::NUMBER => {
            let (input, output) = call.both::<uapi::IoasCopy>()?;
            words.asked(format_args!(
                "from=ioas {} iova={:#x} len={:#x} to=ioas {}",
                input.src_ioas_id, input.src_iova, input.length, input.dst_ioas_id
            ));
            placed(words, "iova", input.flags, input.dst_iova, output.dst_iova);
            map_flags(words, input.flags);
        }
        uapi::IoasIovaRanges::NUMBER => {
            let (input, output) = call.both::<uapi::IoasIovaRanges>()?;
            words.asked(format_args!("ioas={} room={}", input.ioas_id, input.num_iovas));
            words.answered(format_args!(
                "ranges={} alignment={:#x}",
                output.num_iovas, output.out_iova_alignment
            ));
        }
        uapi::IoasMap::NUMBER => {
            let (input, output) = call.both::<uapi::IoasMap>()?;
            words.asked(format_args!("ioas={}", input.ioas_id));
            placed(words, "iova", input.flags, input.iova, output.iova);
            words.asked(format_args!("len={:#x}", input.length));
            map_flags(words, input.flags & !1);
            words.asked(format_args!("va={:#x}", input.user_va));
        }
        uapi::IoasMapFile::NUMBER => {
            let (input, output) = call.both::<uapi::IoasMapFile>()?;
            words.asked(format_args!("ioas={}", input.ioas_id));
            placed(words, "iova", input.flags, input.iova, output.iova);
            words.asked(format_args!("len={:#x}", input.length));
            map_flags(words, input.flags & !1);
            words.asked(format_args!("fd={} offset={:#x}", input.fd, input.start));
        }
        uapi::IoasUnmap::NUMBER => {
            let (input, output) = call.both::<uapi::IoasUnmap>()?;
            words.asked(format_args!("ioas={}", input.ioas_id));
            if input.iova == 0 && input.length == u64::MAX {
                words.asked(format_args!("all"));
            } else {
                words.asked(format_args!("iova={:#x} len={:#x}", input.iova, input.length));
            }
            words.answered(format_args!("len={:#x}", output.length));
        }
        uapi::SetOption::NUMBER => {
            let (input, output) = call.both::<uapi::SetOption>()?;
            match input.option_id {
                uapi::OPTION_RLIMIT_MODE => words.asked(format_args!("RLIMIT_MODE")),
                uapi::OPTION_HUGE_PAGES => words.asked(format_args!("HUGE_PAGES")),
                other => words.asked(format_args!("option={other}")),
            }
            if input.object_id != 0 {
                words.asked(format_args!("id={}", input.object_id));
            }
            match input.op {
                uapi::OPTION_OP_SET => words.asked(format_args!("set={}", input.val64)),
                uapi::OPTION_OP_GET => {
                    words.asked(format_args!("get"));
                    words.answered(format_args!("value={}", output.val64));
                }
                other => words.asked(format_args!("op={other}")),
            }
        }
        uapi::VfioIoas::NUMBER => {
            let (input, output) = call.both::<uapi::VfioIoas>()?;
            match input.op {
                uapi::VFIO_IOAS_GET => {
                    words.asked(format_args!("get"));
                    words.answered(format_args!("ioas={}", output.ioas_id));
                }
                uapi::VFIO_IOAS_SET => words.asked(format_args!("set ioas={}", input.ioas_id)),
                uapi::VFIO_IOAS_CLEAR => words.asked(format_args!("clear")),
                other => words.asked(format_args!("op={other} ioas={}", input.ioas_id)),
            }
        }
        uapi::HwptAlloc::NUMBER => {
            let (input, output) = call.both::<uapi::HwptAlloc>()?;
            words.asked(format_args!("dev={} pt={}", input.dev_id, input.pt_id));
            words.flags(input.flags, &[(1, "nest-parent"), (2, "dirty-tracking"), (8, "pasid")]);
            if input.data_len != 0 || input.data_type != 0 {
                words.asked(format_args!("data-type={} data-len={}", input.data_type, input.data_len));
            }
            words.answered(format_args!("hwpt={}", output.out_hwpt_id));
        }
        uapi::GetHwInfo::NUMBER => {
            let (input, output) = call.both::<uapi::GetHwInfo>()?;
            words.asked(format_args!("dev={} room={}", input.dev_id, input.data_len));
            words.flags(input.flags, &[]);
            words.answered(format_args!(
                "type={} len={} capabilities={:#x}",
                output.data_type, output.data_len, output.out_capabilities
            ));
            if output.out_max_pasid_log2 != 0 {
                words.answered(format_args!("pasid-bits={}", output.out_max_pasid_log2));
            }
        }
        uapi::HwptSetDirtyTracking::NUMBER => {
            let input: uapi::HwptSetDirtyTracking = call.input()?;
            words.asked(format_args!("hwpt={}", input.hwpt_id));
            match input.flags {
                0 => words.asked(format_args!("off")),
                flags => words.flags(flags, &[(1, "on")]),
            }
        }
        uapi::HwptGetDirtyBitmap::NUMBER => {
            let input: uapi::HwptGetDirtyBitmap = call.input()?;
            words.asked(format_args!(
                "hwpt={} iova={:#x} len={:#x} page={:#x}",
                input.hwpt_id, input.iova, input.length, input.page_size
            ));
            words.flags(input.flags, &[(1, "no-clear")]);
        }
        uapi::HwptInvalidate::NUMBER => {
            let (input, output) = call.both::<uapi::HwptInvalidate>()?;
            words.asked(format_args!(
                "hwpt={} type={} entries={} of {} bytes",
                input.hwpt_id, input.data_type, input.entry_num, input.entry_len
            ));
            words.answered(format_args!("entries={}", output.entry_num));
        }
        uapi::FaultQueueAlloc::NUMBER => {
            let (input, output) = call.both::<uapi::FaultQueueAlloc>()?;
            words.flags(input.flags, &[]);
            words.answered(format_args!("fault={} fd={}", output.out_fault_id, output.out_fault_fd));
        }
        uapi::ViommuAlloc::NUMBER => {
            let (input, output) = call.both::<uapi::ViommuAlloc>()?;
            words.asked(format_args!(
                "type={} dev={} hwpt={}",
                input.viommu_type, input.dev_id, input.hwpt_id
            ));
            words.flags(input.flags, &[]);
            words.answered(format_args!("viommu={}", output.out_viommu_id));
        }
        uapi::VdeviceAlloc::NUMBER => {
            let (input, output) = call.both::<uapi::VdeviceAlloc>()?;
            words.asked(format_args!(
                "viommu={} dev={} virt={:#x}",
                input.viommu_id, input.dev_id, input.virt_id
            ));
            words.answered(format_args!("vdevice={}", output.out_vdevice_id));
        }
        uapi::IoasChangeProcess::NUMBER => drop(call.input::<uapi::IoasChangeProcess>()?),
        uapi::VeventqAlloc::NUMBER => {
            let (input, output) = call.both::<uapi::VeventqAlloc>()?;
            words.asked(format_args!(
                "viommu={} type={} depth={}",
                input.viommu_id, input.event_type, input.veventq_depth
            ));
            words.answered(format_args!("veventq={} fd={}", output.out_veventq_id, output.out_veventq_fd));
        }
        uapi::HwQueueAlloc::NUMBER => {
            let (input, output) = call.both::<uapi::HwQueueAlloc>()?;
            words.asked(format_args!(
                "viommu={} type={} index={} iova={:#x} len={:#x}",
                input.viommu_id, input.queue_type, input.index, input.nesting_parent_iova, input.length
            ));
            words.answered(format_args!("hw-queue={}", output.out_hw_queue_id));
        }
        uapi::IoasNoiommuGetPa::NUMBER => {
            let (input, output) = call.both::<uapi::IoasNoiommuGetPa>()?;
            words.asked(format_args!("ioas={} iova={:#x}", input.ioas_id, input.iova));
            words.answered(format_args!("phys={:#x} len={:#x}", output.out_phys, output.length));
        }
        TestCommand::NUMBER => {
            let input: TestCommand = call.input()?;
            match OPERATIONS.iter().find(|(number, _)| *number == input.op) {
                Some((_, name)) => {
                    words.asked(format_args!("{} id={}", name.strip_prefix("OP_").unwrap_or(name), input.id));
                }
                None => words.asked(format_args!("op={} id={}", input.op, input.id)),
            }
            match input.op {
                // PASID_REPLACE has the same fields.
                test::OP_PASID_ATTACH | test::OP_PASID_REPLACE => {
                    let test::PasidAttach { pasid, pt_id } = input.payload();
                    words.asked(format_args!("pasid={pasid} pt={pt_id}"));
                    return Some(());
                }
                test::OP_PASID_DETACH => {
                    let test::PasidDetach { pasid } = input.payload();
                    words.asked(format_args!("pasid={pasid}"));
                    return Some(());
                }
                test::OP_PASID_CHECK_HWPT => {
                    let test::PasidCheckHwpt { pasid, hwpt_id } = input.payload();
                    words.asked(format_args!("pasid={pasid} hwpt={hwpt_id}"));
                    return Some(());
                }
                _ => {}
            }
            let used = input.payload.iter().rposition(|word| *word != 0).map_or(0, |last| last + 1);
            let payload: Vec<String> =
                input.payload[..used].iter().map(|word| format!("{word:#x}")).collect();
            words.asked(format_args!("[{}]", payload.join(" ")));
        }
        vfio::CHECK_EXTENSION | vfio::SET_IOMMU => {
            // The argument is a number itself.
            let name = match call.argument {
                1 => "TYPE1",
                3 => "TYPE1v2",
                4 => "DMA_CC",
                9 => "UNMAP_ALL",
                10 => "UPDATE_VADDR",
                other => {
                    words.asked(format_args!("extension={other}"));
                    return Some(());
                }
            };
            words.asked(format_args!("{name}"));
        }
        vfio::GET_API_VERSION => {}
        vfio::Type1Info::NUMBER => {
            let (input, output) = call.both::<vfio::Type1Info>()?;
            words.asked(format_args!("room={}", input.argsz));
            words.answered(format_args!("len={} page-sizes={:#x}", output.argsz, output.iova_pgsizes));
        }
        vfio::Type1DmaMap::NUMBER => {
            let input: vfio::Type1DmaMap = call.input()?;
            words.asked(format_args!("iova={:#x} len={:#x}", input.iova, input.size));
            // Reading is another bit than in iommufd's commands.
            map_flags(words, (input.flags & 1) << 2 | input.flags & 2);
            words.flags(input.flags & !3, &[(4, "vaddr")]);
            words.asked(format_args!("va={:#x}", input.vaddr));
        }
        vfio::Type1DmaUnmap::NUMBER => {
            let (input, output) = call.both::<vfio::Type1DmaUnmap>()?;
            words.asked(format_args!("iova={:#x} len={:#x}", input.iova, input.size));
            words.flags(input.flags, &[(1, "get-dirty-bitmap"), (2, "all"), (4, "vaddr")]);
            words.answered(format_args!("len={:#x}", output.size));
        }
        _ => return None,
    }
    Some(())
}
