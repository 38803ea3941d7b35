//! Memory that goes while it is in use: objects that are revoked, parts that are given back, registrations that end.

use crate::double::{DERIVED, NATIVE};
use crate::fixture::{OBJECT, PAGE, World, check, iova, page, pages, random};
use ioasid::{AliasError, Backing, IovaRange, MapError, Memory, Permissions, RegisterError, Space};
use shuttle::thread;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

const AT: u64 = 0x200;

/// Whether a leaf of the space leads to the object.
fn leads_to(space: &Space, object: &Arc<Backing>) -> bool {
    let leads =
        |leaf: &ioasid::Leaf| space.object_at(leaf.oa).is_none_or(|(found, _)| Arc::ptr_eq(&found, object));
    space.leaves(IovaRange::ALL).iter().any(leads)
}

#[test]
fn what_was_revoked_is_reached_by_nobody_and_mapped_by_nobody() {
    check(1500, || {
        let world = World::new();
        let other = Space::new(&world.bus);
        let object = world.object(0..4);
        let memory = world.register(&object, 4);
        let devices = [NATIVE, DERIVED].map(|rid| world.double.attached(rid, &world.space));
        world.lent.lend(0..4);
        world.space.map(iova(AT), &memory, 0, PAGE, Permissions::READ_WRITE).unwrap();
        let revoked = Arc::new(AtomicBool::new(false));
        let mut threads = Vec::new();
        for rid in [NATIVE, DERIVED] {
            let world = world.clone();
            threads.push(thread::spawn(move || world.dma_often(rid, AT..AT + 3, 2)));
        }
        {
            // Maps it, also in a space where it never was.
            let (world, other, memory, revoked) =
                (world.clone(), other.clone(), memory.clone(), revoked.clone());
            threads.push(thread::spawn(move || {
                for number in 1..3 {
                    let space = if random(3) == 0 { &other } else { &world.space };
                    let was = revoked.load(Ordering::SeqCst);
                    match space.map(iova(AT + number), &memory, number * PAGE, PAGE, Permissions::READ) {
                        Ok(()) => assert!(!was, "mapped after it was revoked"),
                        // The page may also have been given back.
                        Err(MapError::Revoked | MapError::BeyondMemory { .. }) => {}
                        Err(error) => panic!("{error}"),
                    }
                }
            }));
        }
        match random(4) {
            0 => {
                let (world, other) = (world.clone(), other.clone());
                threads.push(thread::spawn(move || {
                    for at in [AT + 8, AT + 9] {
                        match world.space.alias(page(AT), &other, iova(at), Permissions::READ) {
                            Ok(_) | Err(AliasError::NotMapped { .. }) => {}
                            Err(error) => panic!("{error}"),
                        }
                    }
                }));
            }
            1 => {
                let world = world.clone();
                threads.push(thread::spawn(move || {
                    world.space.unmap(page(AT)).unwrap();
                    world.space.unmap_deferred(page(AT + 1)).unwrap();
                }));
            }
            2 => {
                let memory = memory.clone();
                threads.push(thread::spawn(move || {
                    memory.release(PAGE, PAGE).unwrap();
                }));
            }
            _ => {
                let (world, object) = (world.clone(), object.clone());
                threads.push(thread::spawn(move || {
                    object.revoke();
                    assert!(!leads_to(&world.space, &object));
                    let registered = Memory::register(&object, 0, PAGE, &world.account);
                    assert!(matches!(registered, Err(RegisterError::Revoked)));
                }));
            }
        }
        let attach = (random(2) == 0).then(|| {
            let world = world.clone();
            thread::spawn(move || world.double.attached(crate::double::SMALL, &world.space))
        });
        object.revoke();
        world.lent.take_back(0..4);
        revoked.store(true, Ordering::SeqCst);
        assert!(!leads_to(&world.space, &object) && !leads_to(&other, &object));
        threads.into_iter().for_each(|thread| thread.join().unwrap());
        let attached = attach.map(|thread| thread.join().unwrap());
        assert!(!leads_to(&world.space, &object) && !leads_to(&other, &object));
        drop((devices, attached));
        world.finish();
        drop(memory);
        assert_eq!(world.account.charged_pages(), 0);
    });
}

#[test]
fn what_was_given_back_is_reached_by_nobody_and_mapped_by_nobody() {
    check(1500, || {
        let world = World::new();
        let object = world.object(0..8);
        let memory = world.register(&object, 8);
        let devices = [NATIVE, DERIVED].map(|rid| world.double.attached(rid, &world.space));
        world.lent.lend(0..8);
        world.space.map(iova(AT), &memory, 0, 2 * PAGE, Permissions::READ_WRITE).unwrap();
        let given_back = Arc::new(AtomicBool::new(false));
        let mut threads = Vec::new();
        for rid in [NATIVE, DERIVED] {
            let world = world.clone();
            threads.push(thread::spawn(move || world.dma_often(rid, AT..AT + 4, 2)));
        }
        {
            let (world, memory, given_back) = (world.clone(), memory.clone(), given_back.clone());
            threads.push(thread::spawn(move || {
                for at in [AT + 2, AT + 4] {
                    let was = given_back.load(Ordering::SeqCst);
                    match world.space.map(iova(at), &memory, PAGE, 2 * PAGE, Permissions::READ) {
                        Ok(()) => assert!(!was, "mapped after it was given back"),
                        Err(MapError::BeyondMemory { .. }) => {}
                        Err(error) => panic!("{error}"),
                    }
                }
            }));
        }
        {
            let world = world.clone();
            threads.push(thread::spawn(move || match random(3) {
                0 => {
                    for at in [AT + 8, AT + 10] {
                        match world.space.alias(pages(AT, 2), &world.space, iova(at), Permissions::READ) {
                            Ok(_) | Err(AliasError::NotMapped { .. }) => {}
                            Err(error) => panic!("{error}"),
                        }
                    }
                }
                1 => drop(world.space.unmap_deferred(page(AT + 1)).unwrap()),
                _ => drop(world.space.protect(pages(AT, 4), Permissions::READ).unwrap()),
            }));
        }
        // One that is mapped, in the middle or with the end.
        memory.release(PAGE, PAGE).unwrap();
        world.lent.take_back([1]);
        given_back.store(true, Ordering::SeqCst);
        threads.into_iter().for_each(|thread| thread.join().unwrap());
        for leaf in world.space.leaves(IovaRange::ALL) {
            let offset = world.space.object_at(leaf.oa).unwrap().1;
            assert_ne!(offset, PAGE, "what was given back is mapped at {:#x}", leaf.iova);
        }
        assert_eq!(world.account.charged_pages(), 7);
        drop(devices);
        world.finish();
    });
}

#[test]
fn no_alias_outlives_the_memory_behind_it() {
    check(1000, || {
        let world = World::new();
        let (source, target) = (world.space.clone(), Space::new(&world.bus));
        let memory = world.register(&world.object(0..2), 2);
        let device = world.double.attached(DERIVED, &source);
        world.lent.lend(0..2);
        source.map(iova(AT), &memory, 0, 2 * PAGE, Permissions::READ).unwrap();
        let aliases = [0, 1].map(|number| {
            let (source, target) = (source.clone(), target.clone());
            thread::spawn(move || {
                let to = if random(2) == 0 { &target } else { &source };
                match source.alias(pages(AT, 2), to, iova(AT + 8 + 2 * number), Permissions::READ) {
                    Ok(bytes) => assert_eq!(bytes, 2 * PAGE),
                    Err(AliasError::NotMapped { .. }) => {}
                    Err(error) => panic!("{error}"),
                }
                // An alias of an alias.
                let again =
                    to.alias(pages(AT + 8, 2), &source, iova(AT + 16 + 2 * number), Permissions::READ);
                assert!(matches!(again, Ok(_) | Err(AliasError::NotMapped { .. })), "{again:?}");
            })
        });
        let dma = {
            let world = world.clone();
            thread::spawn(move || {
                for at in [AT, AT + 8, AT + 16] {
                    world.dma(DERIVED, at);
                }
            })
        };
        drop(memory);
        world.lent.take_back(0..2);
        assert_eq!((source.leaves(IovaRange::ALL), target.leaves(IovaRange::ALL)), (vec![], vec![]));
        aliases.into_iter().chain([dma]).for_each(|thread| thread.join().unwrap());
        assert_eq!((source.leaves(IovaRange::ALL), target.leaves(IovaRange::ALL)), (vec![], vec![]));
        assert_eq!(world.account.charged_pages(), 0);
        drop(device);
        world.finish();
    });
}

#[test]
fn memory_that_grows_and_shrinks_is_mapped_where_it_is() {
    check(1000, || {
        let world = World::new();
        let object = world.object(0..4);
        let memory = world.register(&object, 2);
        let device = world.double.attached(NATIVE, &world.space);
        world.lent.lend(0..4);
        let mapper = {
            let (world, memory) = (world.clone(), memory.clone());
            thread::spawn(move || {
                let mut seen = 0;
                for number in 0..3 {
                    let at = AT + 4 * number;
                    match world.space.map(iova(at), &memory, 2 * PAGE, PAGE, Permissions::READ) {
                        Ok(()) => seen += 1,
                        Err(MapError::BeyondMemory { .. }) => {}
                        Err(error) => panic!("{error}"),
                    }
                    world.dma(NATIVE, at);
                }
                seen
            })
        };
        let registrar = {
            let (world, object) = (world.clone(), object.clone());
            thread::spawn(move || {
                // Somebody else has the same pages for a while.
                let other = Memory::register(&object, PAGE, 3 * PAGE, &world.account).unwrap();
                world.space.map(iova(AT + 32), &other, PAGE, PAGE, Permissions::READ).unwrap();
                drop(other);
            })
        };
        memory.grow(PAGE).unwrap();
        memory.release(2 * PAGE, PAGE).unwrap();
        memory.grow(2 * PAGE).unwrap();
        memory.release(2 * PAGE, 2 * PAGE).unwrap();
        mapper.join().unwrap();
        registrar.join().unwrap();
        assert_eq!(world.account.charged_pages(), 2);
        assert_eq!(memory.length(), 2 * PAGE);
        assert_eq!(object.holds(0, OBJECT), 0..=1);
        assert_eq!(world.space.leaves(IovaRange::ALL), []);
        drop(device);
        world.finish();
    });
}

#[test]
fn an_alias_leads_to_no_memory_that_was_not_told() {
    check(2000, || {
        let world = World::new();
        let (source, target) = (world.space.clone(), Space::new(&world.bus));
        let objects = [world.object(0..1), world.object(8..9)];
        let [old, new] = objects.each_ref().map(|object| world.register(object, 1));
        source.map(iova(AT), &old, 0, PAGE, Permissions::READ).unwrap();
        let changer = {
            let (source, target, object) = (source.clone(), target.clone(), objects[1].clone());
            thread::spawn(move || {
                // Other memory stands there all of a sudden, and goes soon.
                source.unmap(page(AT)).unwrap();
                source.map(iova(AT), &new, 0, PAGE, Permissions::READ).unwrap();
                drop(new);
                assert!(!leads_to(&source, &object) && !leads_to(&target, &object));
            })
        };
        match source.alias(page(AT), &target, iova(AT + 8), Permissions::READ) {
            Ok(bytes) => assert_eq!(bytes, PAGE),
            Err(AliasError::NotMapped { .. }) => {}
            Err(error) => panic!("{error}"),
        }
        changer.join().unwrap();
        assert!(!leads_to(&target, &objects[1]), "an alias has outlived the memory behind it");
        drop(old);
        assert_eq!(target.leaves(IovaRange::ALL), []);
        world.finish();
    });
}

#[test]
fn who_maps_memory_notes_it_before_others_rely_on_the_note() {
    check(3000, || {
        let world = World::new();
        let object = world.object(0..1);
        let memories = [(); 2].map(|()| world.register(&object, 1));
        let spaces = [world.space.clone(), Space::new(&world.bus), Space::new(&world.bus)];
        // The others come to what is there already, or not.
        if random(2) == 0 {
            spaces[0].map(iova(AT + 8), &memories[0], 0, PAGE, Permissions::READ).unwrap();
        }
        // Blocks of addresses far apart, and places in one block.
        let places = [AT, AT + 1, AT + (1 << 20)];
        let mappers = [(); 3].map(|()| {
            let (memories, spaces) = (memories.clone(), spaces.clone());
            thread::spawn(move || {
                let (memory, space) = (&memories[random(2) as usize], &spaces[random(3) as usize]);
                match space.map(iova(places[random(3) as usize]), memory, 0, PAGE, Permissions::READ) {
                    Ok(()) | Err(MapError::AlreadyMapped { .. } | MapError::Revoked) => {}
                    Err(MapError::BeyondMemory { .. }) => {}
                    Err(error) => panic!("{error}"),
                }
            })
        });
        if random(2) == 0 {
            object.revoke();
        } else {
            memories.iter().for_each(|memory| memory.release(0, PAGE).unwrap());
        }
        assert!(!spaces.iter().any(|space| leads_to(space, &object)), "something was not found");
        mappers.into_iter().for_each(|thread| thread.join().unwrap());
        assert!(!spaces.iter().any(|space| leads_to(space, &object)), "something came afterwards");
        world.finish();
    });
}
