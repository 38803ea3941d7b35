//! The thread that flushes what spaces have deferred, when nobody else does in time.
//!
//! There is one for the process, because a thread for each space would be many, and a bound in time that only holds as long
//! as somebody calls would be none. It is started when it is needed first and stays; without work it sleeps. It
//! keeps no space alive.

use crate::space::Space;
use crate::sync::{Builder, Condvar, Instant, Mutex, MutexGuard, PoisonError, global, wait_for_some_time};
use std::collections::VecDeque;
use std::sync::Weak;
use std::time::Duration;

#[derive(Debug)]
struct Work {
    /// Spaces, and when to look after them; all wait equally long, so the first is due first.
    due: VecDeque<(Instant, Weak<Space>)>,
    running: bool,
}

global! {
    static WORK: Mutex<Work> = Mutex::new(Work { due: VecDeque::new(), running: false });
}
global! {
    static MORE: Condvar = Condvar::new();
}

fn lock() -> MutexGuard<'static, Work> {
    WORK.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Has the space flushed after a time, which is the same for all. `false`: there is no thread to do it.
pub(crate) fn look_after(space: &Weak<Space>, time: Duration) -> bool {
    let mut work = lock();
    if !work.running {
        let thread = Builder::new().name("ioasid-flush".into()).spawn(run);
        if thread.is_err() {
            return false;
        }
        work.running = true;
    }
    work.due.push_back((Instant::now() + time, space.clone()));
    MORE.notify_one();
    true
}

fn run() {
    let mut work = lock();
    loop {
        let now = Instant::now();
        work = match work.due.front() {
            // A model has to end, so there the thread does, and is started again when there is work.
            None if cfg!(shuttle) => {
                work.running = false;
                return;
            }
            None => MORE.wait(work).unwrap_or_else(PoisonError::into_inner),
            Some((due, _)) if *due > now => {
                let left = *due - now;
                wait_for_some_time(&WORK, &MORE, work, left)
            }
            Some(_) => {
                let space = work.due.pop_front().and_then(|(_, space)| space.upgrade());
                drop(work);
                if let Some(space) = space {
                    space.flush_what_is_due();
                }
                lock()
            }
        };
    }
}
