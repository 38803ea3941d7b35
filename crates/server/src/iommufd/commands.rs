//! What each command of `/dev/iommu` does.
//!
//! The order of the checks is the interface: where two things are wrong with a call, clients see the error that Linux
//! would give. Objects are held only as long as the command works on them, never while the client's memory is
//! accessed.

use std::sync::Arc;

use ioasid::{IovaRange, Permissions};
use ioasid_uapi::iommufd as uapi;
use ioasid_uapi::iommufd::{HwCapabilities, HwInfoFlags, HwptAllocFlags, IoasMapFlags};
use rustix::fs::OFlags;
use rustix::io::Errno;
use zerocopy::{FromZeros, IntoBytes};

use super::hwpt::Hwpt;
use super::ioas::change_process::change_process;
use super::ioas::{Ioas, Placement, RANGES_PER_IOAS, Slice, TableUse};
use super::objects::{Held, HeldObject, Object};
use super::{Call, Context};
use crate::memory::{PAGE_SIZE, Pages, dma_buf_pages};
use crate::{Client, Descriptor};
use std::sync::atomic::Ordering;

/// The most room for hardware information that is zeroed for a client; what exists is a few dozen bytes.
const LARGEST_HW_INFO: u32 = 1 << 20;

/// How many ranges are copied between us and the client at a time.
const RANGES_AT_A_TIME: usize = 256;

/// Linux refuses these values, whose end would be 2^64, in front of every other look at them.
fn check_bounded(values: &[u64]) -> Result<(), Errno> {
    if values.contains(&u64::MAX) { Err(Errno::OVERFLOW) } else { Ok(()) }
}

fn map_flags(flags: u32) -> Result<IoasMapFlags, Errno> {
    IoasMapFlags::from_bits(flags).ok_or(Errno::OPNOTSUPP)
}

fn permissions(flags: IoasMapFlags) -> Result<Permissions, Errno> {
    match (flags.contains(IoasMapFlags::READABLE), flags.contains(IoasMapFlags::WRITEABLE)) {
        (true, true) => Ok(Permissions::READ_WRITE),
        (true, false) => Ok(Permissions::READ),
        (false, true) => Ok(Permissions::WRITE),
        (false, false) => Err(Errno::INVAL),
    }
}

fn placement(flags: IoasMapFlags, iova: u64) -> Placement {
    if flags.contains(IoasMapFlags::FIXED_IOVA) { Placement::Fixed(iova) } else { Placement::Anywhere }
}

/// A length that a mapping can have: not 0, and its pages can be counted.
fn check_length(length: u64) -> Result<(), Errno> {
    if length == 0 || length > u64::MAX - PAGE_SIZE { Err(Errno::INVAL) } else { Ok(()) }
}

impl Context {
    /// Maps `(address, length)` of the client's memory; returns the IOVA.
    pub(super) fn map_memory(
        &self,
        client: &dyn Client,
        ioas: &Ioas,
        (address, length): (u64, u64),
        placement: Placement,
        permissions: Permissions,
    ) -> Result<u64, Errno> {
        address.checked_add(length).ok_or(Errno::OVERFLOW)?;
        check_length(length)?;
        let process = client.process()?;
        let charge = self.memory.charge(&*process, self.charges_processes());
        let writable = permissions.contains(Permissions::WRITE);
        let pages = self.memory.process_pages(process, address, writable, charge);
        ioas.map(whole(pages, length), placement, permissions)
    }

    fn charges_processes(&self) -> bool {
        self.charge_processes.load(Ordering::Relaxed)
    }
}

impl Call<'_> {
    pub(super) fn destroy(&self) -> Result<(), Errno> {
        let command: uapi::Destroy = self.receive()?;
        match self.context.objects.retire(command.id)? {
            Object::Ioas(ioas) => ioas.clear(),
            Object::Hwpt(hwpt) => hwpt.destroy(),
            // Its file uses a device or an access for as long as it is open, so it is never taken out this way.
            Object::Device(_) | Object::Access(_) => {}
            Object::TestDevice(device) => device.end(self.context),
        }
        Ok(())
    }

    pub(super) fn ioas_alloc(&self) -> Result<(), Errno> {
        let mut command: uapi::IoasAlloc = self.receive()?;
        if command.flags != 0 {
            return Err(Errno::OPNOTSUPP);
        }
        let reservation = self.context.objects.reserve()?;
        let areas = Arc::clone(&self.context.allowance.areas);
        let ioas = Arc::new(Ioas::new(self.context.memory.bus(), areas));
        command.out_ioas_id = reservation.id();
        self.respond(&command)?;
        reservation.install(Object::Ioas(ioas));
        Ok(())
    }

    pub(super) fn ioas_iova_ranges(&self) -> Result<(), Errno> {
        let mut command: uapi::IoasIovaRanges = self.receive()?;
        if command.reserved != 0 {
            return Err(Errno::OPNOTSUPP);
        }
        let (ranges, alignment) = self.context.objects.hold_ioas(command.ioas_id)?.usable();
        let room = command.num_iovas as usize;
        let fits = &ranges[..ranges.len().min(room)];
        let entries: Vec<_> =
            fits.iter().map(|range| uapi::IovaRange { start: range.first(), last: range.last() }).collect();
        if !entries.is_empty() {
            self.client.write(command.allowed_iovas, entries.as_slice().as_bytes())?;
        }
        command.num_iovas = u32::try_from(ranges.len()).map_err(|_| Errno::OVERFLOW)?;
        command.out_iova_alignment = alignment;
        self.respond(&command)?;
        if ranges.len() > room { Err(Errno::MSGSIZE) } else { Ok(()) }
    }

    pub(super) fn ioas_allow_iovas(&self) -> Result<(), Errno> {
        let command: uapi::IoasAllowIovas = self.receive()?;
        if command.reserved != 0 {
            return Err(Errno::OPNOTSUPP);
        }
        // The answer to an unknown space comes before that to a bad list.
        drop(self.context.objects.hold_ioas(command.ioas_id)?);
        let ranges = self.read_ranges(command.allowed_iovas, command.num_iovas as usize)?;
        self.context.objects.hold_ioas(command.ioas_id)?.set_allowed(&ranges)
    }

    /// Reads a list of ranges; each must have at least two bytes and overlap none of the others.
    fn read_ranges(&self, mut address: u64, count: usize) -> Result<Vec<IovaRange>, Errno> {
        let mut seen = super::areas::Areas::new();
        let mut left = count;
        while left > 0 {
            let mut entries = [uapi::IovaRange::new_zeroed(); RANGES_AT_A_TIME];
            let entries = &mut entries[..left.min(RANGES_AT_A_TIME)];
            // Entry by entry if the array ends in the middle: an error in what can be read comes first.
            let whole = self.client.read(address, entries.as_mut_bytes());
            for entry in entries.iter_mut() {
                if whole.is_err() {
                    self.client.read(address, entry.as_mut_bytes())?;
                }
                address = address.checked_add(size_of::<uapi::IovaRange>() as u64).ok_or(Errno::FAULT)?;
                let range =
                    IovaRange::new(entry.start, entry.last).filter(|range| range.first() < range.last());
                seen.insert(range.ok_or(Errno::INVAL)?, ()).map_err(|()| Errno::INVAL)?;
                if seen.len() > RANGES_PER_IOAS {
                    return Err(Errno::NOMEM);
                }
            }
            left -= entries.len();
        }
        Ok(seen.iter().map(|(range, ())| range).collect())
    }

    pub(super) fn ioas_map(&self) -> Result<(), Errno> {
        let mut command: uapi::IoasMap = self.receive()?;
        let flags = map_flags(command.flags)?;
        if command.reserved != 0 {
            return Err(Errno::OPNOTSUPP);
        }
        check_bounded(&[command.iova, command.length])?;
        let permissions = permissions(flags)?;
        let ioas = self.context.objects.hold_ioas(command.ioas_id)?;
        let placement = placement(flags, command.iova);
        let memory = (command.user_va, command.length);
        command.iova = self.context.map_memory(self.client, &ioas, memory, placement, permissions)?;
        drop(ioas);
        self.respond(&command)
    }

    pub(super) fn ioas_map_file(&self) -> Result<(), Errno> {
        let mut command: uapi::IoasMapFile = self.receive()?;
        let flags = map_flags(command.flags)?;
        check_bounded(&[command.iova, command.length])?;
        let permissions = permissions(flags)?;
        let ioas = self.context.objects.hold_ioas(command.ioas_id)?;
        if command.length == 0 {
            return Err(Errno::INVAL);
        }
        command.start.checked_add(command.length - 1).ok_or(Errno::OVERFLOW)?;
        let file = match self.client.descriptor(command.fd)? {
            Descriptor::Ours(file) => {
                if let Some(buffer) = file.dma_buf() {
                    check_length(command.length)?;
                    let slice = whole(dma_buf_pages(buffer, command.start, command.length)?, command.length);
                    command.iova = ioas.map(slice, placement(flags, command.iova), permissions)?;
                    drop(ioas);
                    return self.respond(&command);
                }
                None
            }
            // A descriptor that only names a file counts as none.
            Descriptor::Foreign(fd) if rustix::fs::fcntl_getfl(&fd)?.contains(OFlags::PATH) => {
                return Err(Errno::BADF);
            }
            Descriptor::Foreign(fd) => Some(fd),
        };
        check_length(command.length)?;

        let process = self.client.process()?;
        let charge = self.context.memory.charge(&*process, self.context.charges_processes());
        let writable = permissions.contains(Permissions::WRITE);
        let pages = self.context.memory.file_pages(file, command.start, writable, charge)?;
        let slice = whole(pages, command.length);
        command.iova = ioas.map(slice, placement(flags, command.iova), permissions)?;
        drop(ioas);
        self.respond(&command)
    }

    pub(super) fn ioas_copy(&self) -> Result<(), Errno> {
        let mut command: uapi::IoasCopy = self.receive()?;
        let flags = map_flags(command.flags)?;
        check_bounded(&[command.length, command.src_iova, command.dst_iova])?;
        let permissions = permissions(flags)?;
        let (slices, counted) = {
            let source = self.context.objects.hold_ioas(command.src_ioas_id)?;
            if command.length == 0 {
                return Err(Errno::INVAL);
            }
            let range = IovaRange::with_length(command.src_iova, command.length).ok_or(Errno::OVERFLOW)?;
            source.slices(range)?
        };
        let destination = self.context.objects.hold_ioas(command.dst_ioas_id)?;
        command.dst_iova =
            destination.map_all(slices, counted, placement(flags, command.dst_iova), permissions)?;
        drop(destination);
        self.respond(&command)
    }

    pub(super) fn ioas_unmap(&self) -> Result<(), Errno> {
        let mut command: uapi::IoasUnmap = self.receive()?;
        let ioas = self.context.objects.hold_ioas(command.ioas_id)?;
        command.length = if command.iova == 0 && command.length == u64::MAX {
            ioas.unmap(IovaRange::ALL)?
        } else {
            check_bounded(&[command.iova, command.length])?;
            if command.length == 0 {
                return Err(Errno::INVAL);
            }
            let range = IovaRange::with_length(command.iova, command.length).ok_or(Errno::OVERFLOW)?;
            match ioas.unmap(range)? {
                0 => return Err(Errno::NOENT),
                bytes => bytes,
            }
        };
        drop(ioas);
        self.respond(&command)
    }

    pub(super) fn ioas_change_process(&self) -> Result<(), Errno> {
        let command: uapi::IoasChangeProcess = self.receive()?;
        if command.reserved != 0 {
            return Err(Errno::OPNOTSUPP);
        }
        let process = self.client.process()?;
        let memory = &self.context.memory;
        let charge = memory.charge(&*process, self.context.charges_processes());
        let spaces: Vec<_> = self
            .context
            .objects
            .snapshot()
            .into_iter()
            .filter_map(|(_, object)| match object {
                Object::Ioas(ioas) => Some(ioas),
                _ => None,
            })
            .collect();
        change_process(&spaces, &charge, &memory.charge_without_limit(&*process))
    }

    pub(super) fn option(&self) -> Result<(), Errno> {
        let mut command: uapi::SetOption = self.receive()?;
        if command.reserved != 0 {
            return Err(Errno::OPNOTSUPP);
        }
        match command.option_id {
            uapi::OPTION_RLIMIT_MODE => self.option_rlimit_mode(&mut command)?,
            uapi::OPTION_HUGE_PAGES => {
                let ioas = self.context.objects.hold_ioas(command.object_id)?;
                match (command.op, command.val64) {
                    (uapi::OPTION_OP_GET, _) => command.val64 = u64::from(ioas.large_pages()),
                    (uapi::OPTION_OP_SET, value @ (0 | 1)) => ioas.set_large_pages(value == 1)?,
                    (uapi::OPTION_OP_SET, _) => return Err(Errno::INVAL),
                    _ => return Err(Errno::OPNOTSUPP),
                }
            }
            _ => return Err(Errno::OPNOTSUPP),
        }
        // Only the value is written back, and always: the least size of this command reaches behind it.
        let value = self.argument.checked_add(std::mem::offset_of!(uapi::SetOption, val64) as u64);
        self.client.write(value.ok_or(Errno::FAULT)?, &command.val64.to_ne_bytes())
    }

    fn option_rlimit_mode(&self, command: &mut uapi::SetOption) -> Result<(), Errno> {
        if command.object_id != 0 {
            return Err(Errno::OPNOTSUPP);
        }
        match command.op {
            uapi::OPTION_OP_GET => command.val64 = u64::from(self.context.charges_processes()),
            uapi::OPTION_OP_SET => {
                if !self.client.process()?.may_change_resource_mode() {
                    return Err(Errno::PERM);
                }
                if !self.context.objects.is_empty() {
                    return Err(Errno::BUSY);
                }
                match command.val64 {
                    value @ (0 | 1) => self.context.charge_processes.store(value == 1, Ordering::Relaxed),
                    _ => return Err(Errno::INVAL),
                }
            }
            _ => return Err(Errno::OPNOTSUPP),
        }
        Ok(())
    }

    pub(super) fn hwpt_alloc(&self) -> Result<(), Errno> {
        let mut command: uapi::HwptAlloc = self.receive()?;
        if command.reserved != 0 {
            return Err(Errno::OPNOTSUPP);
        }
        if (command.data_type == uapi::HWPT_DATA_NONE) != (command.data_len == 0) {
            return Err(Errno::INVAL);
        }
        let device = self.context.objects.hold_device(command.dev_id)?;
        let parent = self.context.objects.hold(command.pt_id).map_err(|_| Errno::INVAL)?;
        let ioas = match parent {
            HeldObject::Ioas(ioas) => ioas,
            // A nested table: only mock devices could use one, and no table can be a parent.
            HeldObject::Hwpt(_) if command.data_len == 0 || device.mock().is_none() => {
                return Err(Errno::OPNOTSUPP);
            }
            _ => return Err(Errno::INVAL),
        };
        let dirty_tracking = command.flags & HwptAllocFlags::DIRTY_TRACKING.bits() != 0;
        let for_pasids = command.flags & HwptAllocFlags::PASID.bits() != 0;
        let served = HwptAllocFlags::DIRTY_TRACKING | HwptAllocFlags::PASID;
        let flags_of_others = command.flags & !served.bits();
        let engine = match device.mock() {
            Some(mock) => mock.engine(self.mock_table(mock, &command)?),
            // Nesting and faults are capabilities that the software IOMMU does not have.
            None if flags_of_others != 0 || command.data_len != 0 => return Err(Errno::OPNOTSUPP),
            None => device.engine(),
        };
        if dirty_tracking && !engine.records_writes() {
            return Err(Errno::OPNOTSUPP);
        }
        let reservation = self.context.objects.reserve()?;
        let hwpt = ioas.with_table(engine, TableUse::Own, |table, _| {
            let user = Held::new(ioas.arc()).ok_or(Errno::NOENT)?;
            let hwpt = Hwpt::new(reservation.id(), table, user, false);
            Ok(Arc::new(hwpt.with_dirty_tracking(dirty_tracking).with_pasids(for_pasids)))
        })?;
        drop((device, ioas));
        command.out_hwpt_id = reservation.id();
        match self.respond(&command) {
            Ok(()) => reservation.install(Object::Hwpt(hwpt)),
            Err(error) => {
                hwpt.destroy();
                return Err(error);
            }
        }
        Ok(())
    }

    pub(super) fn get_hw_info(&self) -> Result<(), Errno> {
        let mut command: uapi::GetHwInfo = self.receive()?;
        if HwInfoFlags::from_bits(command.flags).is_none() || command.reserved != [0; 3] {
            return Err(Errno::OPNOTSUPP);
        }
        let wanted = HwInfoFlags::from_bits_truncate(command.flags).contains(HwInfoFlags::INPUT_TYPE);
        let wanted = if wanted { command.data_type } else { uapi::HW_INFO_TYPE_NONE };
        let device = self.context.objects.hold_device(command.dev_id)?;
        // The software IOMMU has no registers of a real one to report: no data, of type none. The client's room is
        // zeroed behind the data.
        let info = match device.mock() {
            Some(mock) => mock.hw_info(wanted)?,
            None => {
                let mut capabilities = HwCapabilities::ATS_NOT_SUPPORTED;
                capabilities.set(HwCapabilities::DIRTY_TRACKING, device.records_writes());
                let data_type = uapi::HW_INFO_TYPE_NONE;
                let max_pasid_log2 = device.pasid_bits() as u8;
                HwInfo { data: Vec::new(), data_type, capabilities, max_pasid_log2 }
            }
        };
        drop(device);
        if command.data_len > LARGEST_HW_INFO {
            return Err(Errno::TOOBIG);
        }
        let fits = info.data.len().min(command.data_len as usize);
        if fits > 0 {
            self.client.write(command.data_uptr, &info.data[..fits])?;
        }
        let zeroes = [0; PAGE_SIZE as usize];
        let mut at = fits as u32;
        while at < command.data_len {
            let part = (command.data_len - at).min(PAGE_SIZE as u32);
            let address = command.data_uptr.checked_add(u64::from(at)).ok_or(Errno::FAULT)?;
            self.client.write(address, &zeroes[..part as usize])?;
            at += part;
        }
        command.data_type = info.data_type;
        command.data_len = info.data.len() as u32;
        command.out_capabilities = info.capabilities.bits();
        command.out_max_pasid_log2 = info.max_pasid_log2;
        self.respond(&command)
    }
}

/// What GET_HW_INFO answers for a device.
pub(crate) struct HwInfo {
    pub(super) data: Vec<u8>,
    pub(super) data_type: u32,
    pub(super) capabilities: HwCapabilities,
    pub(super) max_pasid_log2: u8,
}

/// All of `pages`, which have `length` bytes.
fn whole(pages: Pages, length: u64) -> Slice {
    Slice { pages: Arc::new(pages), offset: 0, length }
}
