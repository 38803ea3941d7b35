//! Accounts: what is charged, at every level and at every moment.

use crate::fixture::{OBJECT, PAGE, World, check, random};
use ioasid::{Account, Memory, RegisterError};
use shuttle::thread;

fn register(
    world: &World,
    object: &std::sync::Arc<ioasid::Backing>,
    first: u64,
    pages: u64,
    account: &Account,
) -> Option<std::sync::Arc<Memory>> {
    let _ = world;
    match Memory::register(object, first * PAGE, pages * PAGE, account) {
        Ok(memory) => Some(memory),
        Err(RegisterError::OverLimit(error)) => {
            assert!(error.charged + error.pages > error.limit);
            None
        }
        Err(error) => panic!("{error}"),
    }
}

#[test]
fn limits_hold_at_every_level_and_every_moment_and_nothing_is_lost() {
    check(1500, || {
        let world = World::new();
        let user = Account::new("user", Some(6));
        let processes = [user.child("one", Some(5)), user.child("other", None)];
        let objects = [world.object(0..0), world.object(0..0)];
        let workers = [0, 1, 2].map(|_| {
            let (world, processes, objects) = (world.clone(), processes.clone(), objects.clone());
            thread::spawn(move || {
                let mut held = Vec::new();
                for _ in 0..4 {
                    let account = &processes[random(2) as usize];
                    let object = &objects[random(2) as usize];
                    match random(5) {
                        0 | 1 => held.extend(register(&world, object, random(3), 1 + random(2), account)),
                        2 => drop(held.pop()),
                        3 => {
                            let all: Vec<&Memory> = held.iter().map(|memory| &**memory).collect();
                            // All or none.
                            let moved = Memory::transfer_all(&all, account).is_ok();
                            assert!(!moved || all.iter().all(|memory| memory.account() == *account));
                        }
                        _ => {
                            if let Some(memory) = held.last() {
                                let _ = memory.release(0, PAGE);
                            }
                        }
                    }
                }
                drop(held);
            })
        });
        let watcher = {
            let (user, processes) = (user.clone(), processes.clone());
            thread::spawn(move || {
                for _ in 0..6 {
                    for account in processes.iter().chain([&user]) {
                        let usage = account.usage();
                        assert!(usage.charged_pages <= usage.peak_pages, "{usage:?}");
                        assert!(usage.limit_pages.is_none_or(|limit| usage.peak_pages <= limit), "{usage:?}");
                    }
                }
            })
        };
        workers.into_iter().chain([watcher]).for_each(|thread| thread.join().unwrap());
        for account in processes.iter().chain([&user]) {
            assert_eq!(account.charged_pages(), 0, "{account:?}");
        }
        assert!(objects.iter().all(|object| object.holds(0, OBJECT) == (0..=0)));
    });
}

#[test]
fn a_page_is_paid_for_once_whoever_comes_and_goes() {
    check(1500, || {
        let world = World::new();
        let user = Account::new("user", Some(2));
        let processes = [user.child("one", None), user.child("other", None)];
        let object = world.object(0..2);
        // The same two pages, by four registrations of two processes: the user's limit of two is never in the way.
        let workers = [0, 1, 0, 1].map(|process: usize| {
            let (processes, object) = (processes.clone(), object.clone());
            thread::spawn(move || {
                let memory = Memory::register(&object, 0, 2 * PAGE, &processes[process]).unwrap();
                memory.transfer(&processes[1 - process]).unwrap();
                drop(memory);
            })
        });
        workers.into_iter().for_each(|thread| thread.join().unwrap());
        assert_eq!((user.charged_pages(), user.peak_pages(), user.failures()), (0, 2, 0));
        assert!(processes.iter().all(|account| account.charged_pages() == 0));
    });
}

#[test]
fn what_moves_is_at_no_moment_paid_for_by_nobody_or_by_both() {
    check(1500, || {
        let world = World::new();
        let user = Account::new("user", None);
        let (one, other) = (user.child("one", Some(4)), user.child("other", Some(4)));
        let object = world.object(0..4);
        let memory = Memory::register(&object, 0, 3 * PAGE, &one).unwrap();
        let movers = [&one, &other].map(|to| {
            let (memory, to) = (memory.clone(), to.clone());
            thread::spawn(move || memory.transfer(&to).unwrap())
        });
        let grower = {
            let memory = memory.clone();
            thread::spawn(move || {
                memory.grow(PAGE).unwrap();
                memory.release(3 * PAGE, PAGE).unwrap();
            })
        };
        let watcher = {
            let user = user.clone();
            thread::spawn(move || {
                for _ in 0..8 {
                    assert!((3..=4).contains(&user.usage().charged_pages));
                }
            })
        };
        movers.into_iter().chain([grower, watcher]).for_each(|thread| thread.join().unwrap());
        let payer = memory.account();
        assert_eq!((payer.charged_pages(), user.charged_pages()), (3, 3));
        assert_eq!(one.charged_pages() + other.charged_pages(), 3);
        drop(memory);
        assert_eq!((one.charged_pages(), other.charged_pages(), user.charged_pages()), (0, 0, 0));
    });
}
