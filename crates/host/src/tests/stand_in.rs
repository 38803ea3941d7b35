//! A stand-in for Linux that knows the rules of areas and groups, and fails when it is told to.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard};

use ioasid_uapi::Command;
use ioasid_uapi::iommufd::{self, Destroy, IoasAlloc, IoasCopy, IoasIovaRanges, IoasMap, IoasUnmap};
use ioasid_uapi::vfio::{DeviceAttachIommufdPt, DeviceBindIommufd, DeviceDetachIommufdPt};
use rustix::fd::{AsFd, BorrowedFd};
use rustix::io::Errno;
use zerocopy::IntoBytes;

use crate::kernel::{Kernel, KernelFile};

const K4: u64 = 4096;

/// Areas by their first address: the last one, and what is there.
pub(super) type Mapped = BTreeMap<u64, (u64, u64)>;

/// What the stand-in has, and what it is told to do wrong.
#[derive(Debug, Default)]
pub(super) struct State {
    pub(super) spaces: BTreeMap<u32, Mapped>,
    next: u32,
    /// The spaces of devices, by the paths of their files.
    pub(super) attached: BTreeMap<PathBuf, u32>,
    /// Devices that belong to somebody.
    bound: BTreeSet<PathBuf>,
    /// All calls that came to an end, by number.
    pub(super) calls: Vec<u32>,
    /// Calls with this number fail so, after so many, for so many.
    pub(super) fails: Option<Fails>,
}

#[derive(Clone, Copy, Debug)]
pub(super) struct Fails {
    number: u32,
    errno: Errno,
    after: u32,
    times: u32,
}

#[derive(Debug, Default)]
pub(super) struct StandIn(Arc<Mutex<State>>);

#[derive(Debug)]
struct Open {
    state: Arc<Mutex<State>>,
    file: File,
    path: PathBuf,
}

impl StandIn {
    pub(super) fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap()
    }

    /// Has the calls of a kind fail from the one after `after` on, so often.
    pub(super) fn fail<C: Command>(&self, errno: Errno, after: u32, times: u32) {
        self.state().fails = Some(Fails { number: C::NUMBER, errno, after, times });
    }

    pub(super) fn count<C: Command>(&self) -> usize {
        self.state().calls.iter().filter(|number| **number == C::NUMBER).count()
    }
}

impl Kernel for StandIn {
    fn open(&self, path: &Path) -> io::Result<Arc<dyn KernelFile>> {
        let file = File::open("/dev/null")?;
        Ok(Arc::new(Open { state: self.0.clone(), file, path: path.to_owned() }))
    }

    /// Devices are named after their groups, such as `group7/one`; others have none.
    fn group(&self, path: &Path, _file: &dyn KernelFile) -> Option<u32> {
        group_of(path)
    }
}

fn group_of(path: &Path) -> Option<u32> {
    path.parent()?.to_str()?.strip_prefix("group")?.parse().ok()
}

impl Drop for Open {
    fn drop(&mut self) {
        let mut state = self.state.lock().unwrap();
        state.bound.remove(&self.path);
        state.attached.remove(&self.path);
    }
}

impl AsFd for Open {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

/// The argument as a structure.
fn read<C: Command>(argument: &[u8]) -> C {
    C::read_from_bytes(argument).unwrap()
}

impl KernelFile for Open {
    fn ioctl(&self, number: u32, argument: &mut [u8]) -> Result<(), Errno> {
        let mut state = self.state.lock().unwrap();
        if let Some(fails) = state.fails.as_mut().filter(|fails| fails.number == number && fails.times > 0) {
            if fails.after == 0 {
                fails.times -= 1;
                return Err(fails.errno);
            }
            fails.after -= 1;
        }
        let result = state.perform(&self.path, number, argument);
        if result.is_ok() {
            state.calls.push(number);
        }
        result
    }
}

impl State {
    fn perform(&mut self, path: &Path, number: u32, argument: &mut [u8]) -> Result<(), Errno> {
        match number {
            IoasAlloc::NUMBER => {
                self.next += 1;
                self.spaces.insert(self.next, BTreeMap::new());
                let answer = IoasAlloc { out_ioas_id: self.next, ..read(argument) };
                argument.copy_from_slice(answer.as_bytes());
            }
            Destroy::NUMBER => {
                let id = read::<Destroy>(argument).id;
                if self.attached.values().any(|attached| *attached == id) {
                    return Err(Errno::BUSY);
                }
                self.spaces.remove(&id).ok_or(Errno::NOENT)?;
            }
            IoasIovaRanges::NUMBER => {
                let answer = IoasIovaRanges { num_iovas: 1, out_iova_alignment: K4, ..read(argument) };
                argument.copy_from_slice(answer.as_bytes());
                let range = iommufd::IovaRange { start: 0, last: (1 << 48) - 1 };
                // The array has room for more than one.
                crate::sys::tests::put(answer.allowed_iovas, range.as_bytes());
            }
            IoasMap::NUMBER => {
                let map: IoasMap = read(argument);
                self.map(map.ioas_id, map.iova, map.length, map.user_va)?;
            }
            IoasCopy::NUMBER => {
                let copy: IoasCopy = read(argument);
                // As many areas as there are in the source, without a hole.
                let source = self.spaces.get(&copy.src_ioas_id).ok_or(Errno::NOENT)?;
                let end = copy.src_iova + (copy.length - 1);
                let mut parts = Vec::new();
                let mut at = copy.src_iova;
                loop {
                    let (first, (last, va)) = source.range(..=at).next_back().ok_or(Errno::NOENT)?;
                    if at > *last {
                        return Err(Errno::NOENT);
                    }
                    let length = end.min(*last) - at + 1;
                    parts.push((at - copy.src_iova + copy.dst_iova, length, va + (at - first)));
                    if *last >= end {
                        break;
                    }
                    at = last + 1;
                }
                let there = self.spaces.get(&copy.dst_ioas_id).ok_or(Errno::NOENT)?;
                if !overlapping(there, copy.dst_iova, copy.dst_iova + (copy.length - 1)).is_empty() {
                    return Err(Errno::EXIST);
                }
                for (iova, length, va) in parts {
                    self.map(copy.dst_ioas_id, iova, length, va)?;
                }
            }
            IoasUnmap::NUMBER => {
                let unmap: IoasUnmap = read(argument);
                let space = self.spaces.get_mut(&unmap.ioas_id).ok_or(Errno::NOENT)?;
                let last = unmap.iova + (unmap.length - 1);
                let inside: Vec<u64> = overlapping(space, unmap.iova, last);
                let whole = |first: &u64| *first >= unmap.iova && space[first].0 <= last;
                if inside.is_empty() || !inside.iter().all(whole) {
                    return Err(Errno::NOENT);
                }
                space.retain(|first, _| !inside.contains(first));
            }
            DeviceBindIommufd::NUMBER => {
                if !self.bound.insert(path.to_owned()) {
                    return Err(Errno::BUSY);
                }
            }
            DeviceAttachIommufdPt::NUMBER => {
                let id = read::<DeviceAttachIommufdPt>(argument).pt_id;
                self.spaces.get(&id).ok_or(Errno::NOENT)?;
                self.attached.insert(path.to_owned(), id);
                let group = group_of(path).filter(|_| self.attached.len() > 1);
                // Linux would refuse it, or move the others along.
                let alike = |(other, at): (&PathBuf, &u32)| group_of(other) != group || *at == id;
                assert!(group.is_none() || self.attached.iter().all(alike), "{:?}", self.attached);
            }
            DeviceDetachIommufdPt::NUMBER => {
                self.attached.remove(path);
            }
            _ => return Err(Errno::NOTTY),
        }
        Ok(())
    }

    fn map(&mut self, id: u32, iova: u64, length: u64, va: u64) -> Result<(), Errno> {
        let space = self.spaces.get_mut(&id).ok_or(Errno::NOENT)?;
        let last = iova + (length - 1);
        if !overlapping(space, iova, last).is_empty() {
            return Err(Errno::EXIST);
        }
        space.insert(iova, (last, va));
        Ok(())
    }
}

fn overlapping(space: &Mapped, first: u64, last: u64) -> Vec<u64> {
    space.range(..=last).filter(|(_, (end, _))| *end >= first).map(|(first, _)| *first).collect()
}
