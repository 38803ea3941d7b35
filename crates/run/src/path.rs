//! Paths that clients open: fetched from their memory, made absolute, cleaned of `.` and `..`.
//!
//! The result is only compared with the paths of our files; whatever is not ours is opened by the client's own kernel
//! from the client's own bytes. So cleaning is lexical, as if no component before the last were a symbolic link.

use std::ffi::OsString;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Component, Path, PathBuf};

use rustix::io::Errno;

/// The longest path that the kernel takes, with its terminating zero.
const PATH_MAX: usize = 4096;

/// Memory is readable or not by the page, so a string is fetched in pieces that end where a page ends.
const PAGE: u64 = 4096;

/// Most paths are shorter than this; the first piece fetches no more.
const FIRST_PIECE: usize = 256;

/// Fetches a zero-terminated path; `read` copies from the client's memory, all or nothing.
///
/// # Errors
/// `EFAULT` from `read`, `ENAMETOOLONG` without a zero in the first 4096 bytes, `ENOENT` if it is empty.
pub(crate) fn fetch(
    address: u64,
    mut read: impl FnMut(u64, &mut [u8]) -> Result<(), Errno>,
) -> Result<PathBuf, Errno> {
    let mut path = Vec::new();
    while path.len() < PATH_MAX {
        let from = address.checked_add(path.len() as u64).ok_or(Errno::FAULT)?;
        let to_page_end = (PAGE - from % PAGE) as usize;
        let limit = if path.is_empty() { FIRST_PIECE } else { PATH_MAX - path.len() };
        let start = path.len();
        path.resize(start + to_page_end.min(limit), 0);
        read(from, &mut path[start..])?;
        if let Some(end) = path[start..].iter().position(|byte| *byte == 0) {
            path.truncate(start + end);
            return if path.is_empty() { Err(Errno::NOENT) } else { Ok(OsString::from_vec(path).into()) };
        }
    }
    Err(Errno::NAMETOOLONG)
}

/// `path` as seen from the directory `base`, without `.`, `..` and doubled slashes. `None` if it ends in a slash or
/// dot, because then it names a directory, which none of our files is.
pub(crate) fn normalize(base: &Path, path: &Path) -> Option<PathBuf> {
    let bytes = path.as_os_str().as_bytes();
    if bytes.ends_with(b"/")
        || bytes.ends_with(b"/.")
        || bytes.ends_with(b"/..")
        || bytes == b"."
        || bytes == b".."
    {
        return None;
    }
    let mut clean = PathBuf::from("/");
    for component in base.join(path).components() {
        match component {
            Component::Normal(name) => clean.push(name),
            Component::ParentDir => {
                clean.pop();
            }
            Component::RootDir | Component::CurDir | Component::Prefix(_) => {}
        }
    }
    Some(clean)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn clean(base: &str, path: &str) -> Option<String> {
        normalize(Path::new(base), Path::new(path)).map(|path| path.to_str().unwrap().to_owned())
    }

    #[test]
    fn paths_are_cleaned_as_the_kernel_would_without_links() {
        for (base, path, expected) in [
            ("/", "/dev/iommu", "/dev/iommu"),
            ("/root", "//dev///./iommu", "/dev/iommu"),
            ("/root", "/dev/vfio/../iommu", "/dev/iommu"),
            ("/", "/../../dev/iommu", "/dev/iommu"),
            ("/dev", "iommu", "/dev/iommu"),
            ("/dev/vfio", "../iommu", "/dev/iommu"),
            ("/dev/vfio", "./devices/vfio0", "/dev/vfio/devices/vfio0"),
            ("/home/x", "dev/iommu", "/home/x/dev/iommu"),
        ] {
            assert_eq!(clean(base, path).as_deref(), Some(expected), "{base} {path}");
        }
    }

    #[test]
    fn a_path_that_must_be_a_directory_is_none_of_ours() {
        for path in ["/dev/iommu/", "/dev/iommu/.", "/dev/iommu/..", ".", ".."] {
            assert_eq!(clean("/dev", path), None, "{path}");
        }
    }

    /// A client whose memory is one readable stretch.
    fn memory(start: u64, bytes: Vec<u8>) -> impl FnMut(u64, &mut [u8]) -> Result<(), Errno> {
        move |address, buffer| {
            let from = usize::try_from(address.checked_sub(start).ok_or(Errno::FAULT)?).unwrap();
            let to = from.checked_add(buffer.len()).ok_or(Errno::FAULT)?;
            buffer.copy_from_slice(bytes.get(from..to).ok_or(Errno::FAULT)?);
            Ok(())
        }
    }

    #[test]
    fn a_path_at_the_very_end_of_memory_is_fetched() {
        let mut bytes = vec![b'x'; 4096 - 11];
        bytes.extend_from_slice(b"/dev/iommu\0");
        let path = fetch(0x1000 + 4096 - 11, memory(0x1000, bytes)).unwrap();
        assert_eq!(path, Path::new("/dev/iommu"));
    }

    #[test]
    fn a_path_over_two_pages_is_fetched_and_a_hole_is_a_fault() {
        let long: Vec<u8> = [vec![b'/'; 3000], vec![0]].concat();
        let mut bytes = vec![0; 2000];
        bytes.extend_from_slice(&long);
        bytes.resize(8192, 0);
        let path = fetch(0x1000 + 2000, memory(0x1000, bytes)).unwrap();
        assert_eq!(path.as_os_str().len(), 3000);

        let unterminated = memory(0x1000, vec![b'/'; 4096]);
        assert_eq!(fetch(0x1f00, unterminated), Err(Errno::FAULT));
    }

    #[test]
    fn lengths_at_the_limit() {
        let mut at_limit = vec![b'a'; 4095];
        at_limit.push(0);
        at_limit.resize(8192, 1);
        assert_eq!(fetch(0x10_0000, memory(0x10_0000, at_limit)).unwrap().as_os_str().len(), 4095);
        assert_eq!(fetch(0x10_0000, memory(0x10_0000, vec![b'a'; 8192])), Err(Errno::NAMETOOLONG));
        assert_eq!(fetch(0x10_0000, memory(0x10_0000, vec![0; 4096])), Err(Errno::NOENT));
        assert_eq!(
            fetch(u64::MAX, |_, buffer| {
                buffer.fill(b'a');
                Ok(())
            }),
            Err(Errno::FAULT)
        );
    }
}
