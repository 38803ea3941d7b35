//! Epochs: who waits, and for whom.

use crate::interrupts::{answer, interruptible, wait_until_asked};
use crate::sync::{AtomicPtr, AtomicU64, CALM, Ordering};
use crate::{model, model_with_interrupts};
use loom::cell::UnsafeCell;
use loom::sync::Arc;
use loom::sync::atomic::AtomicUsize;
use loom::thread;

#[path = "../../src/epoch/domain.rs"]
#[allow(
    unreachable_pub,
    dead_code,
    reason = "the file is a module of the engine and not all of it is used here"
)]
pub(crate) mod domain;

use domain::{Domain, Local, Section};

const ALIVE: u64 = 1;
const FREED: u64 = 2;

/// Something that is replaced: two places, of which one is the current one.
struct Replaced {
    domain: &'static Domain,
    current: AtomicUsize,
    /// Loom fails the test when a write is not ordered after every read.
    places: [UnsafeCell<u64>; 2],
}

fn new_domain() -> &'static Domain {
    let domain = Domain::new(AtomicU64::new(domain::FIRST_REQUEST), AtomicPtr::new(std::ptr::null_mut()));
    Box::leak(Box::new(domain))
}

impl Replaced {
    fn new() -> Arc<Replaced> {
        Replaced::of(new_domain())
    }

    fn of(domain: &'static Domain) -> Arc<Replaced> {
        Arc::new(Replaced {
            domain,
            current: AtomicUsize::new(0),
            places: [UnsafeCell::new(ALIVE), UnsafeCell::new(ALIVE)],
        })
    }

    /// Reads what is current, as a walker does.
    fn read(&self, _section: &Section) -> usize {
        answer();
        let place = self.current.load(Ordering::Acquire);
        // SAFETY: what the model checks: nobody writes the place while a section is open that has found it.
        let value = self.places[place].with(|value| unsafe { *value });
        assert_eq!(value, ALIVE);
        place
    }

    /// Reads what was found before, in the same section.
    fn read_again(&self, _section: &Section, place: usize) {
        // SAFETY: as above.
        assert_eq!(self.places[place].with(|value| unsafe { *value }), ALIVE);
    }

    /// Replaces the first place, waits, and frees it.
    fn replace(&self) {
        self.current.store(1, Ordering::Release);
        self.domain.synchronize(None);
        // SAFETY: what the model checks: every section that may have found the place has ended.
        self.places[0].with_mut(|value| unsafe { *value = FREED });
    }
}

#[test]
fn a_section_never_sees_what_was_freed() {
    model(4, || {
        let replaced = Replaced::new();
        let reader = replaced.clone();
        let thread = thread::spawn(move || {
            let local = Local::new(reader.domain);
            let section = local.enter();
            let place = reader.read(&section);
            reader.read_again(&section, place);
        });
        replaced.replace();
        thread.join().unwrap();
    });
}

#[test]
fn the_end_of_a_section_is_seen_with_the_next_one() {
    model(4, || {
        let replaced = Replaced::new();
        let reader = replaced.clone();
        let thread = thread::spawn(move || {
            let local = Local::new(reader.domain);
            for _ in 0..2 {
                reader.read(&local.enter());
            }
        });
        replaced.replace();
        thread.join().unwrap();
    });
}

#[test]
fn a_word_is_taken_over_by_another_thread() {
    model(2, || {
        let replaced = Replaced::new();
        let readers = [(); 2].map(|()| {
            let reader = replaced.clone();
            thread::spawn(move || {
                // Comes, reads and goes; the second may find the word that the first has left, or bring its own.
                let local = Local::new(reader.domain);
                reader.read(&local.enter());
            })
        });
        replaced.replace();
        for reader in readers {
            reader.join().unwrap();
        }
    });
}

#[test]
fn inner_sections_end_without_ending_the_outer_one() {
    model(3, || {
        let replaced = Replaced::new();
        let reader = replaced.clone();
        let thread = thread::spawn(move || {
            let local = Local::new(reader.domain);
            let outer = local.enter();
            let place = reader.read(&outer);
            drop(local.enter());
            reader.read_again(&outer, place);
            // One that begins later and ends later.
            let kept = local.enter();
            drop(outer);
            reader.read_again(&kept, place);
        });
        replaced.replace();
        thread.join().unwrap();
    });
}

#[test]
fn a_section_outlives_its_threads_local() {
    model(3, || {
        let replaced = Replaced::new();
        let reader = replaced.clone();
        let thread = thread::spawn(move || {
            let section = Local::new(reader.domain).enter();
            let place = reader.read(&section);
            drop(Local::new(reader.domain).enter());
            reader.read_again(&section, place);
            drop(section);
            // Now the word may be taken over.
            reader.read(&Local::new(reader.domain).enter());
        });
        // The word must not be given to this one, whose end would look like the other's.
        drop(Local::new(replaced.domain).enter());
        replaced.replace();
        thread.join().unwrap();
    });
}

#[test]
fn a_ticket_is_passed_when_what_began_before_has_ended() {
    model(3, || {
        let replaced = Replaced::new();
        let reader = replaced.clone();
        let thread = thread::spawn(move || {
            let local = Local::new(reader.domain);
            reader.read(&local.enter());
        });
        replaced.current.store(1, Ordering::Release);
        let ticket = replaced.domain.ticket(None);
        // Who does not wait but asks, and frees only on a yes.
        if ticket.passed() {
            // SAFETY: what the model checks.
            replaced.places[0].with_mut(|value| unsafe { *value = FREED });
        }
        thread.join().unwrap();
        assert!(ticket.passed());
    });
}

/// A thread that is plain already.
fn plain(domain: &'static Domain) -> Local {
    let local = Local::new(domain);
    // One section for each that is fenced, and the one in which it becomes plain.
    for _ in 0..=CALM {
        drop(local.enter());
    }
    local
}

/// Reads all of them in each of several sections.
fn read_in_sections(local: &Local, sections: usize, replaced: &[Arc<Replaced>]) {
    for _ in 0..sections {
        answer();
        let section = local.enter();
        for replaced in replaced {
            let place = replaced.read(&section);
            replaced.read_again(&section, place);
        }
    }
}

// Here the first thread reads, because it runs first without an involuntary switch.

#[test]
fn a_plain_thread_is_interrupted() {
    model_with_interrupts(3, 1, || {
        let replaced = Replaced::new();
        let local = plain(replaced.domain);
        let waiter = replaced.clone();
        let waiter = thread::spawn(move || waiter.replace());
        interruptible(0, || read_in_sections(&local, 2, std::slice::from_ref(&replaced)));
        drop(local);
        waiter.join().unwrap();
    });
}

#[test]
fn whoever_finds_a_thread_fenced_need_not_interrupt_it() {
    model_with_interrupts(3, 1, || {
        let domain = new_domain();
        let replaced = [(); 2].map(|()| Replaced::of(domain));
        let local = plain(domain);
        let waiter = replaced.clone();
        // The first time it is made fenced, the second it may be found so, or plain again.
        let waiter = thread::spawn(move || waiter.iter().for_each(|replaced| replaced.replace()));
        interruptible(0, || read_in_sections(&local, 2, &replaced));
        drop(local);
        waiter.join().unwrap();
    });
}

#[test]
fn two_who_wait_do_not_mistake_each_others_requests() {
    model_with_interrupts(2, 1, || {
        let domain = new_domain();
        let replaced = [(); 3].map(|()| Replaced::of(domain));
        let local = plain(domain);
        let [first, other, second] = replaced.clone();
        let waiters = [
            thread::spawn(move || {
                first.replace();
                second.replace();
            }),
            thread::spawn(move || other.replace()),
        ];
        interruptible(0, || read_in_sections(&local, 2, &replaced[2..]));
        drop(local);
        for waiter in waiters {
            waiter.join().unwrap();
        }
    });
}

#[test]
fn a_word_that_a_plain_thread_left_is_fenced() {
    model_with_interrupts(2, 2, || {
        let replaced = Replaced::new();
        let readers = [0, 1].map(|number| {
            let replaced = replaced.clone();
            thread::spawn(move || {
                interruptible(number, || {
                    read_in_sections(&plain(replaced.domain), 1, std::slice::from_ref(&replaced));
                });
            })
        });
        replaced.replace();
        for reader in readers {
            reader.join().unwrap();
        }
    });
}

#[test]
fn a_request_is_not_taken_for_another_waiters() {
    model_with_interrupts(2, 1, || {
        let domain = new_domain();
        let replaced = Replaced::of(domain);
        let local = plain(domain);
        let waiter = replaced.clone();
        let first = thread::spawn(move || {
            drop(domain.ticket(None));
            // Now the thread is fenced; or somebody else has asked it, and only he may say so.
            waiter.replace();
        });
        let mut second = None;
        interruptible(0, || {
            wait_until_asked();
            // Fenced, and then plain again, when another waiter comes.
            (0..=CALM).for_each(|_| drop(local.enter()));
            second = Some(thread::spawn(move || drop(domain.ticket(None))));
            read_in_sections(&local, 1, std::slice::from_ref(&replaced));
        });
        drop(local);
        for waiter in second.into_iter().chain([first]) {
            waiter.join().unwrap();
        }
    });
}
