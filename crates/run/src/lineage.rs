//! Which processes a process descends from.
//!
//! A program that wants more than its share forks, so what clients share is shared along the tree of processes
//! (docs/decisions/0029). The tree is the kernel's: who forked whom, read from `/proc/ID/stat` when somebody has to know. A
//! process whose parent has died was given to another one, and where it came from cannot be told any more; all of those together
//! have what one child of the first program has. So have those that are too far from the first program to be followed.

use rustix::io::Errno;

use crate::process::TaskDirectory;

/// As many generations below the first program are told apart; whoever is further down counts as its ancestor there.
pub(crate) const GENERATIONS: usize = 8;

/// How far up somebody is followed.
const ANCESTORS_MAX: usize = 64;

/// The name that all have who cannot be traced back to the first program.
const ASTRAY: u64 = 0;

/// Process ids have no more bits. A number has room for the time of their beginning above them.
const ID_BITS: u32 = 22;

/// The processes from the oldest one below `first` down to `id` itself: names that no others have had. Of the first program
/// there are none.
pub(crate) fn lineage(directory: &TaskDirectory, id: u32, first: u32) -> Vec<u64> {
    let mut path = walk(directory, id, first).unwrap_or_else(|_| vec![ASTRAY]);
    path.reverse();
    path.truncate(GENERATIONS);
    path
}

/// From the process upwards.
fn walk(directory: &TaskDirectory, id: u32, first: u32) -> Result<Vec<u64>, Errno> {
    let mut path = Vec::new();
    let mut parent_directory;
    let (mut directory, mut id) = (directory, id);
    // A parent may die at every step, and then it is asked again.
    for _ in 0..ANCESTORS_MAX {
        if id == first {
            return Ok(path);
        }
        let Ancestry { parent, start } = Ancestry::of(directory)?;
        if parent <= 1 || parent == std::process::id() {
            path.push(start << ID_BITS | u64::from(id));
            break;
        }
        let opened = TaskDirectory::open(parent);
        // As long as it is the parent it lives, so the directory is its own.
        if Ancestry::of(directory)?.parent == parent {
            path.push(start << ID_BITS | u64::from(id));
            parent_directory = opened?;
            (directory, id) = (&parent_directory, parent);
        }
    }
    path.push(ASTRAY);
    Ok(path)
}

/// What a process says of where it comes from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Ancestry {
    parent: u32,
    /// When it was made, in ticks of the kernel's.
    start: u64,
}

impl Ancestry {
    fn of(directory: &TaskDirectory) -> Result<Self, Errno> {
        Self::parse(&directory.text("stat")?).ok_or(Errno::SRCH)
    }

    /// The name, in parentheses, may have anything in it. Behind it come the state and the parent, and 17 words later the time.
    fn parse(text: &str) -> Option<Self> {
        let (_, behind_name) = text.rsplit_once(')')?;
        let mut words = behind_name.split_ascii_whitespace().skip(1);
        let parent = words.next()?.parse().ok()?;
        let start = words.nth(17)?.parse().ok()?;
        Some(Self { parent, start })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_may_look_like_the_rest() {
        let text = "7 (a) S 1 (b) R 42 5 6 7 8 9 10 11 12 13 14 15 16 17 18 19 20 21 98765 23\n";
        assert_eq!(Ancestry::parse(text), Some(Ancestry { parent: 42, start: 98765 }));
        assert_eq!(Ancestry::parse("7 (a) S 1"), None);
        assert_eq!(Ancestry::parse(""), None);
    }

    #[test]
    fn a_process_descends_from_its_parent_and_from_itself() {
        let mut child = std::process::Command::new("sleep").arg("60").spawn().unwrap();
        let directory = TaskDirectory::open(child.id()).unwrap();
        let of_first = lineage(&directory, child.id(), child.id());
        let of_child =
            lineage(&directory, child.id(), rustix::process::getppid().unwrap().as_raw_pid() as u32);
        child.kill().unwrap();
        child.wait().unwrap();
        assert!(of_first.is_empty(), "{of_first:?}");
        // This process is the one that adopts orphans.
        assert_eq!(of_child.len(), 2);
        assert_eq!((of_child[0], of_child[1] & 0x3f_ffff), (ASTRAY, child.id().into()));
    }
}
