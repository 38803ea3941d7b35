//! The address space: made, filled, attached, and emptied by areas.

use ioasid_uapi::iommufd::IovaRange;
use rustix::io::Errno;

use super::super::plan::{ALIGNMENT, Area, Plan};
use super::super::report::{Failure, Verdict};
use super::device::open_failure;
use super::{LOOK_DEEPER, refused_with, unexpected};
use crate::client::{DmaMemory, Edu, Iommufd};
use crate::quantity::Bytes;

const PAGE: u64 = 4096;

/// An address space of an open `/dev/iommu`.
#[derive(Debug, Clone, Copy)]
pub(super) struct Space<'probe> {
    iommu: &'probe Iommufd,
    /// Its object number.
    pub(super) id: u32,
}

/// What is mapped behind the first device.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Attachment {
    /// All areas of the plan.
    All,
    /// So much may not be locked: the device is not attached yet.
    OverLimit,
    /// The near areas and one small far one.
    Less,
}

impl Attachment {
    pub(super) fn areas(self, plan: &Plan) -> Vec<Area> {
        match self {
            Self::All => plan.areas().collect(),
            Self::OverLimit => Vec::new(),
            Self::Less => plan.near().into_iter().chain([plan.small_far]).collect(),
        }
    }
}

pub(super) fn open() -> Verdict<Iommufd> {
    let iommu = Iommufd::open().map_err(|error| open_failure(&error))?;
    Ok((iommu, String::new()))
}

pub(super) fn reserve(plan: &Plan) -> Verdict<DmaMemory> {
    let reserved = usize::try_from(plan.size().0).map_err(|_| Errno::NOMEM);
    let memory = reserved.and_then(|size| DmaMemory::reserve(size, ALIGNMENT)).map_err(|errno| {
        let advice = "try a smaller --size, or raise the limit on address space (ulimit -v)";
        Failure::new("memory", errno.to_string(), advice)
    })?;
    Ok((memory, "touched only where it is used".to_owned()))
}

impl<'probe> Space<'probe> {
    pub(super) fn allocate(iommu: &'probe Iommufd) -> Verdict<Self> {
        let id = iommu.alloc().map_err(unexpected("a number"))?;
        Ok((Self { iommu, id }, format!("number {id}")))
    }

    pub(super) fn destroy(self) -> Result<(), Errno> {
        self.iommu.destroy(self.id)
    }

    /// All areas of the plan have to be within the ranges that can be mapped.
    pub(super) fn ranges(self, plan: &Plan) -> Verdict<()> {
        let ranges = self.iommu.ranges(self.id).map_err(unexpected("ranges"))?;
        for area in plan.areas() {
            let holds = |range: &IovaRange| range.start <= area.iova && area.last() <= range.last;
            if !ranges.allowed.iter().any(holds) {
                let wanted = format!("{:#x} to {:#x} within a range", area.iova, area.last());
                let advice = "the device or its IOMMU cannot have these IOVAs; try a smaller --size, or another device";
                return Err(Failure::new(wanted, shown(&ranges.allowed), advice).into());
            }
        }
        Ok(((), format!("{} (alignment {})", shown(&ranges.allowed), ranges.alignment)))
    }

    pub(super) fn map(self, memory: &DmaMemory, area: Area) -> Result<(), Failure> {
        let Area { offset, iova, length, access } = area;
        self.iommu.map(self.id, memory, offset, length, iova, access).map_err(|errno| {
            let expected = format!("{} mapped at {iova:#x}", Bytes(length));
            Failure::new(expected, errno.to_string(), "try a smaller --size")
        })
    }

    pub(super) fn unmap(self, area: Area) -> Result<(), Failure> {
        let failure =
            |happened| Failure::new(format!("{} bytes unmapped", area.length), happened, LOOK_DEEPER);
        match self.iommu.unmap(self.id, area.iova, area.length) {
            Ok(length) if length == area.length => Ok(()),
            Ok(length) => Err(failure(format!("{length} bytes"))),
            Err(errno) => Err(failure(errno.to_string())),
        }
    }

    /// Areas go as a whole or not at all.
    pub(super) fn unmap_inside(self, area: Area) -> Verdict<()> {
        let inside = self.iommu.unmap(self.id, area.iova + PAGE, PAGE);
        refused_with(&inside, Errno::NOENT, "UNMAP")
    }

    /// Attaches, unless so much memory may not be locked.
    pub(super) fn attach_all(self, edu: &Edu, plan: &Plan) -> Verdict<Attachment> {
        match (edu.file().attach(self.id), plan.lock_limit) {
            (Ok(table), _) => Ok((Attachment::All, format!("page table number {table}"))),
            (Err(Errno::NOMEM), Some(limit)) if limit < plan.size() => {
                let found =
                    format!("refused rightly: {} is over this user's {limit} of locked memory", plan.size());
                Ok((Attachment::OverLimit, found))
            }
            (Err(errno), _) => {
                let advice = match errno {
                    Errno::NOMEM => {
                        "other programs of this user have memory locked, or there is too little; \
                                     try a smaller --size"
                    }
                    _ => LOOK_DEEPER,
                };
                Err(Failure::new("a page table", errno.to_string(), advice).into())
            }
        }
    }

    /// Attaches with what may be locked.
    pub(super) fn attach_less(self, memory: &DmaMemory, edu: &Edu, plan: &Plan) -> Verdict<Attachment> {
        for area in plan.far {
            self.unmap(area)?;
        }
        self.map(memory, plan.small_far)?;
        let table = edu.file().attach(self.id).map_err(|errno| {
            Failure::new("a page table", errno.to_string(), "raise the limit on locked memory (ulimit -l)")
        })?;
        let left = Bytes(Attachment::Less.areas(plan).iter().map(|area| area.length).sum());
        Ok((Attachment::Less, format!("{left}, page table number {table} (raise `ulimit -l` for all of it)")))
    }
}

fn shown(ranges: &[IovaRange]) -> String {
    let shown: Vec<_> = ranges.iter().map(|range| format!("{:#x}-{:#x}", range.start, range.last)).collect();
    if shown.is_empty() { "none".to_owned() } else { shown.join(", ") }
}
