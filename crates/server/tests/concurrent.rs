//! Several threads of two programs at the same files: nothing hangs, nothing is lost, nothing is left.

mod program;

use std::sync::Barrier;
use std::sync::atomic::{AtomicBool, Ordering};

use ioasid_server::Errno;
use ioasid_uapi::iommufd as uapi;
use program::{BUFFER, FIXED, PAGE, Program, READ, WRITE, region, server, server_with};

/// Small random numbers, the same in every run of a thread.
struct Random(u64);

impl Random {
    fn below(&mut self, bound: u64) -> u64 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) % bound
    }
}

#[test]
fn any_mixture_of_calls_ends_with_nothing_on_a_native_table() {
    any_mixture_of_calls_ends_with_nothing("edu");
}

#[test]
fn any_mixture_of_calls_ends_with_nothing_on_a_derived_table() {
    any_mixture_of_calls_ends_with_nothing("edu:table=vtd");
}

fn any_mixture_of_calls_ends_with_nothing(device: &str) {
    const THREADS: u64 = 4;
    const CALLS: u64 = 3000;
    let server = server_with(device);
    let first = Program::of(&server);
    let iommu = first.iommu();
    let device = first.bind(iommu);
    let spaces = [first.ioas(iommu), first.ioas(iommu)];
    let second = first.forked();
    second.set_memory_lock_limit(Some(8 * PAGE));
    let start = Barrier::new(THREADS as usize);
    std::thread::scope(|scope| {
        for thread in 0..THREADS {
            let (program, start, device) = (if thread % 2 == 0 { &first } else { &second }, &start, &device);
            scope.spawn(move || {
                let mut random = Random(thread);
                start.wait();
                for _ in 0..CALLS {
                    let ioas = spaces[random.below(2) as usize];
                    let iova = random.below(12) * PAGE;
                    let length = (1 + random.below(4)) * PAGE;
                    match random.below(12) {
                        0..3 => drop(program.map_fixed(iommu, ioas, BUFFER + iova, length, iova)),
                        3..5 => drop(program.unmap(iommu, ioas, iova, length)),
                        5 => drop(program.attach(device, ioas)),
                        6 => drop(program.detach(device)),
                        7 => {
                            if let Ok(table) = program.hwpt(iommu, device.id, ioas) {
                                let _ = program.attach(device, table);
                                // Busy if the device is attached to it now.
                                let _ = program.destroy(iommu, table);
                            }
                        }
                        8 => {
                            let copy = uapi::IoasCopy {
                                flags: FIXED | READ | WRITE,
                                src_ioas_id: spaces[0],
                                dst_ioas_id: spaces[1],
                                src_iova: iova,
                                dst_iova: (20 + random.below(12)) * PAGE,
                                length,
                                ..Default::default()
                            };
                            let _ = program.run(iommu, copy);
                        }
                        9 => {
                            let pasid = 1 + random.below(3) as u32;
                            if let Ok(table) = program.hwpt_for_pasids(iommu, device.id, ioas) {
                                let _ = program.attach_pasid(device, pasid, table);
                                let _ = program.destroy(iommu, table);
                            }
                        }
                        10 => drop(program.detach_pasid(device, 1 + random.below(3) as u32)),
                        _ => {
                            // A transfer that nobody waits for.
                            program
                                .use_pasid(device, Some(random.below(4) as u32).filter(|pasid| *pasid > 0));
                            let registers = [iova, program::EDU_BUFFER, 64, 1].map(u64::to_le_bytes).concat();
                            let _ = program.pwrite(device.fd, region(0) + 0x80, &registers);
                            assert!(status_adds_up(program));
                        }
                    }
                }
            });
        }
    });
    for ioas in spaces {
        assert!(matches!(first.destroy(iommu, ioas), Ok(()) | Err(Errno::BUSY)));
    }
    drop(first);
    assert_eq!(server.status().contexts.len(), 1, "the second program has the files open");
    drop(second);
    let status = server.status();
    assert!(status.contexts.is_empty());
    assert!(status.accounts.iter().all(|account| account.charged_pages == 0), "{status:?}");
}

fn status_adds_up(program: &Program) -> bool {
    let status = program.server.status();
    status.accounts.iter().all(|account| account.charged_pages <= account.peak_pages)
}

#[test]
fn a_device_is_bound_by_one_of_many() {
    let server = server();
    let program = Program::of(&server);
    let iommu = program.iommu();
    for _ in 0..50 {
        let files: Vec<i32> = (0..4).map(|_| program.open("/dev/vfio/devices/vfio0")).collect();
        let start = Barrier::new(files.len());
        let bound = std::thread::scope(|scope| {
            let bind = |&fd: &i32| {
                let (program, start) = (&program, &start);
                scope.spawn(move || {
                    start.wait();
                    program.bind_at(fd, iommu)
                })
            };
            let threads: Vec<_> = files.iter().map(bind).collect();
            threads.into_iter().map(|thread| thread.join().unwrap()).collect::<Vec<_>>()
        });
        assert_eq!(bound.iter().filter(|result| result.is_ok()).count(), 1, "{bound:?}");
        assert_eq!(bound.iter().filter(|result| **result == Err(Errno::INVAL)).count(), 3, "{bound:?}");
        for fd in files {
            program.close(fd).unwrap();
        }
    }
}

/// Whoever looks at what a device is bound to keeps nobody from binding it next.
#[test]
fn a_device_is_free_at_once_when_it_is_closed() {
    let program = Program::new();
    let iommu = program.iommu();
    let done = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !done.load(Ordering::Relaxed) {
                program.server.status();
            }
        });
        let bound = (0..2000).try_for_each(|_| {
            let fd = program.open("/dev/vfio/devices/vfio0");
            program.bind_at(fd, iommu)?;
            program.close(fd)
        });
        done.store(true, Ordering::Relaxed);
        assert_eq!(bound, Ok(()));
    });
}
