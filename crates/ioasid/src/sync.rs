//! What threads share the engine by: atomics, locks, time, and a way to wait.
//!
//! Everything that orders threads comes from here, so that the engine as it is runs under a model checker, which puts its
//! own in the place of the standard library's and tries the orders in which threads can take their steps. A protocol that is
//! checked in a copy of the code is not checked.
//!
//! - **shuttle** (`--cfg shuttle`) runs the whole engine ([`modelled`]): spaces, memory and derived tables, under
//!   schedules drawn at random. See `tests/shuttle`.
//! - **loom** runs single files of the engine, which name what they need as `crate::sync`: the tests in `tests/loom` include
//!   them beside a `sync` of their own. Under its rules for weak memory the whole engine would have too many executions.
//!
//! What is *not* from here is no point at which a model's threads change places, nor need it be: reference counts, the
//! numbers of objects, and the words of memory that devices share. The entries of page tables are the page-table crate's
//! words; there, all that is written is such a point.

#[cfg(shuttle)]
mod modelled;
#[cfg(not(shuttle))]
mod real;

#[cfg(shuttle)]
pub(crate) use modelled::*;
#[cfg(not(shuttle))]
pub(crate) use real::*;

/// A static of the engine: of the process, or of one execution of a model.
#[cfg(not(shuttle))]
macro_rules! global {
    ($(#[$attribute:meta])* static $name:ident: $type:ty = $value:expr;) => {
        $(#[$attribute])*
        static $name: $type = $value;
    };
}
#[cfg(shuttle)]
macro_rules! global {
    ($(#[$attribute:meta])* static $name:ident: $type:ty = $value:expr;) => {
        shuttle::lazy_static! {
            $(#[$attribute])*
            static ref $name: $type = $value;
        }
    };
}

/// A static of each thread, of a value that needs no code to be made.
#[cfg(not(shuttle))]
macro_rules! of_thread {
    ($(#[$attribute:meta])* static $name:ident: $type:ty = $value:expr;) => {
        thread_local! {
            $(#[$attribute])*
            static $name: $type = const { $value };
        }
    };
}
#[cfg(shuttle)]
macro_rules! of_thread {
    ($(#[$attribute:meta])* static $name:ident: $type:ty = $value:expr;) => {
        shuttle::thread_local! {
            $(#[$attribute])*
            static $name: $type = $value;
        }
    };
}

pub(crate) use {global, of_thread};
