//! Abnormal teardown: a program is killed while its devices work and its threads are in the middle of calls.
//!
//! Who asks: whoever has seen a VMM crash with a network card running, and has found the card's packets in another program's memory,
//! or a leak of pinned pages that only a reboot cures.
//!
//! - VFIO type1: the release of the files unmaps and unpins everything; devices are reset where they can be. What was pinned for
//!   `mdev` drivers has leaked more than once.
//! - iommufd: closing `/dev/iommu` with devices bound waits for their files' release, in whatever order they are closed.
//! - Here DMA ends before memory goes, whatever is closed first; then everything counts to zero, the device is the next
//!   program's, and a program beside it has noticed nothing.

use crate::machine::beside;
use crate::program::{BUFFER, BUFFER_SIZE, EDU_BUFFER, FIXED, PAGE, Program, READ, WRITE, memfd, region};
use ioasid_server::{InProcess, Server, ServerOptions};
use ioasid_uapi::iommufd as uapi;
use std::os::fd::OwnedFd;
use std::sync::Arc;

const ROUNDS: u64 = if cfg!(debug_assertions) { 60 } else { 1000 };
const FILE_PAGES: u64 = 8;

/// Small random numbers, the same in every run.
struct Random(u64);

impl Random {
    fn below(&mut self, bound: u64) -> u64 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) % bound
    }
}

fn program(server: &Arc<Server>, user: u32) -> Program {
    let client = InProcess::new(user);
    client.map_memory(BUFFER, BUFFER_SIZE);
    Program { server: server.clone(), client }
}

/// A program in the middle of its work: some calls of each thread, none of which is waited for, and then it is dead. As the
/// kernel does it: what a thread has begun is finished, and what is open is closed by whichever thread is the last one.
fn live_and_be_killed(server: &Arc<Server>, file: &OwnedFd, seed: u64) {
    let program = Arc::new(program(server, 1001));
    let iommu = program.iommu();
    let device = Arc::new(program.bind(iommu));
    let spaces = [program.ioas(iommu), program.ioas(iommu)];
    let file = program.insert_foreign(file.try_clone().unwrap());
    program.map_file(iommu, spaces[0], file, 0, FILE_PAGES * PAGE).unwrap();
    program.map_fixed(iommu, spaces[1], BUFFER, BUFFER_SIZE, 0x10_0000).unwrap();
    let threads: Vec<_> = (0..3)
        .map(|thread| {
            let (program, device) = (program.clone(), device.clone());
            let mut random = Random(seed * 3 + thread);
            std::thread::spawn(move || {
                for _ in 0..20 + random.below(60) {
                    let ioas_id = spaces[random.below(2) as usize];
                    let iova = random.below(12) * PAGE;
                    let length = (1 + random.below(4)) * PAGE;
                    // Calls may fail: others are at the same places.
                    match random.below(8) {
                        0 => drop(program.attach(&device, ioas_id)),
                        1 => drop(program.map_fixed(iommu, ioas_id, BUFFER + iova, length, iova)),
                        2 => {
                            let flags = FIXED | READ | WRITE;
                            let part = uapi::IoasMapFile {
                                flags,
                                ioas_id,
                                fd: file,
                                length: 2 * PAGE,
                                iova,
                                ..Default::default()
                            };
                            let _ = program.run(iommu, part);
                        }
                        3 => drop(program.unmap(iommu, ioas_id, iova, length)),
                        4 if random.below(4) == 0 => drop(program.detach(&device)),
                        5 if random.below(8) == 0 => {
                            let _ = program.close([iommu, device.fd, file][random.below(3) as usize]);
                        }
                        _ => {
                            // To memory or from it, and nobody waits for the end.
                            let transfer = match random.below(2) {
                                0 => [iova, EDU_BUFFER, length.min(4096), 1],
                                _ => [EDU_BUFFER, iova, length.min(4096), 3],
                            };
                            let registers = transfer.map(u64::to_le_bytes).concat();
                            let _ = program.pwrite(device.fd, region(0) + 0x80, &registers);
                        }
                    }
                }
            })
        })
        .collect();
    drop((program, device));
    threads.into_iter().for_each(|thread| thread.join().unwrap());
}

#[test]
fn a_killed_program_leaves_nothing_and_its_neighbour_alone() {
    for tables in ["edu", "edu:table=vtd"] {
        let devices = vec![tables.parse().unwrap(); 2];
        let server = Server::new(ServerOptions { devices, ..Default::default() }).unwrap();
        let neighbour = program(&server, 1000);
        let iommu = neighbour.iommu();
        let ioas = neighbour.ioas(iommu);
        let device = neighbour.bind_device(iommu, 1);
        neighbour.attach(&device, ioas).unwrap();
        neighbour.map_fixed(iommu, ioas, BUFFER, BUFFER_SIZE, 0).unwrap();
        let neighbour_works = |round: u64| {
            let bytes = round.to_le_bytes();
            neighbour.put(BUFFER, &bytes).unwrap();
            neighbour.device_copies(&device, 0, 5 * PAGE - 4, 8);
            assert_eq!(neighbour.get(BUFFER + 5 * PAGE - 4, 8).unwrap(), bytes);
        };

        let file = memfd(FILE_PAGES * PAGE);
        let all = |byte: u8| vec![byte; (FILE_PAGES * PAGE) as usize];
        beside(&[&neighbour_works], || {
            for round in 0..ROUNDS {
                live_and_be_killed(&server, &file, round);
                // From here on the file is ours alone: no device writes into it any more.
                rustix::io::pwrite(&file, &all(round as u8), 0).unwrap();
                let status = server.status();
                assert_eq!(status.contexts.len(), 1, "round {round}: {status:?}");
                for account in status.accounts.iter().filter(|account| account.name.starts_with("user 1001"))
                {
                    assert_eq!(account.charged_pages, 0, "round {round}: {account:?}");
                }
                let mut there = all(0);
                rustix::io::pread(&file, &mut there, 0).unwrap();
                assert!(
                    there == all(round as u8),
                    "round {round}: a device has written after its program's end"
                );
            }
        });
        drop(neighbour);
        let status = server.status();
        assert!(status.contexts.is_empty());
        assert!(status.accounts.iter().all(|account| account.charged_pages == 0), "{status:?}");
    }
}

/// The three files of a program in each of the six orders, while other threads use them. Whatever a close leaves behind works on or says
/// so; a device that has lost its file, or its context's last one, is blocked when the close returns.
#[test]
fn files_are_closed_in_every_order_under_load() {
    let orders = [[0, 1, 2], [0, 2, 1], [1, 0, 2], [1, 2, 0], [2, 0, 1], [2, 1, 0]];
    let server =
        Server::new(ServerOptions { devices: vec!["edu:table=vtd".parse().unwrap()], ..Default::default() });
    let server = server.unwrap();
    for (round, order) in (0u8..).zip(orders.into_iter().cycle().take(30)) {
        let file = memfd(FILE_PAGES * PAGE);
        let program = program(&server, 1001);
        let (iommu, memory) = (program.iommu(), program.insert_foreign(file.try_clone().unwrap()));
        let ioas = program.ioas(iommu);
        let device = program.bind(iommu);
        program.attach(&device, ioas).unwrap();
        let at = program.map_file(iommu, ioas, memory, 0, FILE_PAGES * PAGE).unwrap();
        let transfers = |number: u64| {
            let to = at + number % FILE_PAGES * PAGE;
            let registers = [EDU_BUFFER, to, 4096, 3].map(u64::to_le_bytes).concat();
            let _ = program.pwrite(device.fd, region(0) + 0x80, &registers);
        };
        let maps = |number: u64| {
            let iova = 0x100_0000 + number % 16 * PAGE;
            let _ = program.map_fixed(iommu, ioas, BUFFER, PAGE, iova);
            let _ = program.attach(&device, ioas);
            let _ = program.unmap(iommu, ioas, iova, PAGE);
        };
        beside(&[&transfers, &maps], || {
            for which in order {
                for _ in 0..20 {
                    std::thread::yield_now();
                }
                program.close([iommu, device.fd, memory][which]).unwrap();
            }
        });
        // Nothing is open any more, so no device writes.
        let bytes = vec![round; (FILE_PAGES * PAGE) as usize];
        rustix::io::pwrite(&file, &bytes, 0).unwrap();
        let status = server.status();
        assert!(status.contexts.is_empty(), "{order:?}: {status:?}");
        assert!(status.accounts.iter().all(|account| account.charged_pages == 0), "{order:?}: {status:?}");
        let mut there = vec![0; bytes.len()];
        rustix::io::pread(&file, &mut there, 0).unwrap();
        assert!(there == bytes, "{order:?}");
    }
}
