//! Huge pages for the instances that map memory with MAP_HUGETLB: whether there are enough, and getting them if we may.
//!
//! The kernel keeps a pool of them, empty by default, whose size root can set. [`reserve`] grows it if it has to and
//! can, and the [`Reservation`] restores the former size when it ends.

use std::{fmt, fs};

/// The self-test's largest buffer is 128 MiB.
const WANTED_PAGES: u64 = 64;
/// Size of a page that the test counts on, in KiB.
const PAGE_KIB: u64 = 2048;
const POOL: &str = "/proc/sys/vm/nr_hugepages";

/// Whether an instance maps huge pages: some variants of fixtures say so in their names, two tests always do.
pub(crate) fn needed_by(instance: &str) -> bool {
    let mut parts = instance.rsplit('.');
    // The first test's name is misspelled in the kernel.
    matches!(parts.next(), Some("access_domain_destory" | "huge_map"))
        || parts.next().is_some_and(|variant| variant.ends_with("hugepage") || variant.ends_with("_huge"))
}

/// While it lives there are enough huge pages, unless somebody else takes them.
#[derive(Debug)]
pub(crate) struct Reservation {
    former_size: Option<u64>,
}

impl Drop for Reservation {
    fn drop(&mut self) {
        let Some(size) = self.former_size else { return };
        match fs::write(POOL, size.to_string()) {
            Ok(()) => eprintln!("the pool of huge pages is back at {size}"),
            Err(error) => eprintln!("cannot set {POOL} back to {size}: {error}"),
        }
    }
}

/// Why there are not enough huge pages, for people, with what to do.
#[derive(Debug)]
pub(crate) struct Unavailable(String);

impl fmt::Display for Unavailable {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(&self.0)
    }
}

/// Makes sure of enough free huge pages.
pub(crate) fn reserve() -> Result<Reservation, Unavailable> {
    let pool = pool()?;
    if pool.page_kib != PAGE_KIB {
        return Err(Unavailable(format!(
            "this machine's huge pages have {} KiB, the self-test needs {PAGE_KIB} KiB",
            pool.page_kib
        )));
    }
    if pool.free >= WANTED_PAGES {
        return Ok(Reservation { former_size: None });
    }
    let size = pool.total + (WANTED_PAGES - pool.free);
    if let Err(error) = fs::write(POOL, size.to_string()) {
        return Err(Unavailable(format!(
            "{} huge pages are free, the self-test needs {WANTED_PAGES}; as root: echo {size} > {POOL} ({error})",
            pool.free
        )));
    }
    // From here on the former size is restored, also if the kernel found too few.
    let reservation = Reservation { former_size: Some(pool.total) };
    let free = self::pool()?.free;
    if free < WANTED_PAGES {
        return Err(Unavailable(format!(
            "the kernel found memory for {free} free huge pages, the self-test needs {WANTED_PAGES}"
        )));
    }
    eprintln!("the pool of huge pages has been grown from {} to {size} for this run", pool.total);
    Ok(reservation)
}

/// The pool of the default size, which is what MAP_HUGETLB alone takes from.
#[derive(Debug, PartialEq, Eq)]
struct Pool {
    total: u64,
    free: u64,
    page_kib: u64,
}

fn pool() -> Result<Pool, Unavailable> {
    let text = fs::read_to_string("/proc/meminfo")
        .map_err(|error| Unavailable(format!("cannot read /proc/meminfo: {error}")))?;
    parse_pool(&text)
        .ok_or_else(|| Unavailable("this kernel has no huge pages (CONFIG_HUGETLBFS)".to_owned()))
}

fn parse_pool(meminfo: &str) -> Option<Pool> {
    let value = |name: &str| -> Option<u64> {
        let line = meminfo.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'))?;
        line.split_whitespace().next()?.parse().ok()
    };
    let reserved = value("HugePages_Rsvd").unwrap_or(0);
    let free = value("HugePages_Free")?.saturating_sub(reserved);
    Some(Pool { total: value("HugePages_Total")?, free, page_kib: value("Hugepagesize")? })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn instances_that_map_huge_pages() {
        assert!(needed_by("iommufd_ioas.no_domain.access_domain_destory"));
        assert!(needed_by("iommufd_mock_domain.one_domain_file_hugepage.basic"));
        assert!(needed_by("iommufd_dirty_tracking.domain_dirty64M_huge.get_dirty_bitmap"));
        assert!(needed_by("vfio_compat_mock_domain.Ver1v2.huge_map"));
        assert!(!needed_by("iommufd_ioas.no_domain.ioas_option_huge_pages"));
        assert!(!needed_by("iommufd_mock_domain.one_domain.basic"));
        assert!(!needed_by("iommufd.simple_close"));
    }

    #[test]
    fn pool_of_meminfo() {
        let text = "MemTotal:       100 kB\nHugePages_Total:     128\nHugePages_Free:      100\n\
            HugePages_Rsvd:       10\nHugepagesize:       2048 kB\n";
        assert_eq!(parse_pool(text), Some(Pool { total: 128, free: 90, page_kib: 2048 }));
        assert_eq!(parse_pool("MemTotal: 100 kB\n"), None);
    }
}
