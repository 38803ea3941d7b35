//! `/proc/PID/status` as a kernel would answer it that had pinned what our clients have mapped.
//!
//! Two of its lines tell how much memory a process has pinned and locked. The kernel below knows of none of it, so for servers
//! that [say so](ioasid_server::Server::pinned_memory) the file is opened as a text of ours: the kernel's, with those two
//! numbers raised. A process that maps nothing sees its own.

use std::path::Path;

use ioasid_server::{PinnedMemory, Server};

use crate::call::Call;
use crate::process::Processes;

/// KiB in a page of 4 KiB.
const PAGE_KIB: u64 = 4;

/// The text for `path`, if it is such a file and the server has something to say.
pub(crate) fn status(server: &Server, processes: &Processes, call: &Call<'_>, path: &Path) -> Option<String> {
    let process = path.to_str()?.strip_prefix("/proc/")?.strip_suffix("/status")?;
    // Whether such texts are wanted at all is cheap to tell; no process has the identity 0.
    server.pinned_memory(0)?;
    let id = match process {
        "self" => call.thread().ok()?.process_id().ok()?,
        number => number.parse().ok()?,
    };
    let pinned = server.pinned_memory(processes.identity_of(id)?)?;
    let text = processes.status_text(id).ok()?;
    Some(raised(&text, pinned))
}

/// The text with the two numbers raised.
fn raised(text: &str, pinned: PinnedMemory) -> String {
    let mut answer = String::with_capacity(text.len() + 16);
    for line in text.split_inclusive('\n') {
        let more = match line.split_once(':') {
            Some(("VmPin", value)) => Some(("VmPin", value, pinned.pages)),
            Some(("VmLck", value)) => Some(("VmLck", value, pinned.locked_pages)),
            _ => None,
        };
        let value = more.and_then(|(name, value, pages)| {
            let kib: u64 = value.trim().strip_suffix("kB")?.trim().parse().ok()?;
            Some((name, kib.saturating_add(pages.saturating_mul(PAGE_KIB))))
        });
        match value {
            Some((name, kib)) => answer.push_str(&format!("{name}:\t{kib:8} kB\n")),
            None => answer.push_str(line),
        }
    }
    answer
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn two_numbers_are_raised_and_nothing_else() {
        let text = "Name:\tcat\nVmPeak:\t    5536 kB\nVmLck:\t       8 kB\nVmPin:\t       0 kB\nVmPin\n";
        let expected = "Name:\tcat\nVmPeak:\t    5536 kB\nVmLck:\t      12 kB\nVmPin:\t     400 kB\nVmPin\n";
        assert_eq!(raised(text, PinnedMemory { pages: 100, locked_pages: 1 }), expected);
        assert_eq!(raised(text, PinnedMemory::default()), text);
        assert_eq!(raised("VmPin:\tmuch\n", PinnedMemory { pages: 1, locked_pages: 1 }), "VmPin:\tmuch\n");
    }
}
