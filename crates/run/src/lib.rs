//! The transport that gives unmodified programs a `/dev/iommu` and a `/dev/vfio`: seccomp user notification.
//!
//! [`run`] starts a program as a child that has a filter before every system call (`filter`). Four
//! sorts of calls stop there: opens, ioctls of VFIO's and iommufd's type, accesses to device regions, and mappings of files. The kernel
//! puts the caller to sleep and hands us the request through a *listener*; we look into the caller's memory and
//! descriptors, let the [`Server`](ioasid_server::Server) act, and answer. All other calls run at native speed.
//!
//! ```text
//!   client thread                 kernel                    this process
//!   ioctl(fd, cmd, ptr) ──► filter: type ';' ──► listener ──► worker: drain closes (files)
//!        sleeps                                                 who calls? (process)  which file? (files)
//!                                                               Server: copies in, acts, copies out (call)
//!        result ◄──────────────────────────────── answer ◄──── (serve)
//! ```
//!
//! A request that is not about one of our files is handed back, and the kernel executes the original call.
//! Descriptors in the client are open files of memfds, so the kernel itself keeps dup, fork, exec, passing and death
//! right (`files`). Nothing here is a border against the client: it runs as the same user, and the kernel's own
//! protections hold between it and us. It may lie, race and die at any moment; then it gets an errno, or nothing, and
//! nobody else notices.
//!
//! What the machine must offer is in [`requirements`].
//!
//! ```no_run
//! use ioasid_run::{Options, run};
//! use ioasid_server::{Server, ServerOptions};
//!
//! let server = Server::new(ServerOptions::default())?;
//! let outcome = run("ls", ["-l", "/dev/iommu"], &Options::default(), server)?;
//! println!("{}", outcome.status);
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```

#![deny(unsafe_code)]

mod call;
mod files;
mod filter;
mod launch;
mod lineage;
mod listener;
mod locked_memory;
mod maps;
mod path;
mod process;
pub mod requirements;
mod serve;
mod statistics;
mod supervisor;
mod sys;
mod trial;
mod turns;
mod watcher;

pub use launch::RunError;
pub use statistics::{CallKind, CallTotals, Statistics};
pub use supervisor::{Options, Outcome, run};
pub use watcher::{WatchedCall, Watcher, What};
