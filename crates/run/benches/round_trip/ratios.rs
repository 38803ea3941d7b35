//! Each kind of call beside its floor, in turns, so that whatever disturbs the machine disturbs both.
//!
//! Three clients wait for orders on their standard input ("this kind, so many times, in so many threads") and answer with
//! the time it took. One runs under the transport, the others above floors. The table shows medians over the rounds.
//!
//! There are two floors, because threads that wait in the receive call are all woken by each request. One server is the
//! least for one client thread at a time; with four, three wake-ups are for nothing, but several client threads are
//! served at once.

use std::error::Error;
use std::fs::File;
use std::io::{BufRead, BufReader, Write};
use std::os::fd::{AsRawFd, RawFd};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::sync::Barrier;
use std::time::Instant;

use ioasid_run::{Options, run};
use ioasid_server::{Server, ServerOptions};
use rustix::thread::{CpuSet, sched_getaffinity, sched_setaffinity};

use crate::{floor, ioctl};

const ROUNDS: usize = 61;
/// Calls in each round.
const CALLS: u32 = 300;

/// How many threads serve each floor.
const SERVERS: [usize; 2] = [1, 4];

const DESTROY: u32 = 0x3b80;
const IOAS_ALLOC: u32 = 0x3b81;
const IOVA_RANGES: u32 = 0x3b84;
const IOAS_MAP: u32 = 0x3b85;
const IOAS_UNMAP: u32 = 0x3b86;

/// What a client is ordered to do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Floor,
    Refused,
    AllocateDestroy,
    Ranges,
    MapUnmap,
}

impl Kind {
    const OURS: [Self; 4] = [Self::Refused, Self::AllocateDestroy, Self::Ranges, Self::MapUnmap];

    fn name(self) -> &'static str {
        match self {
            Self::Floor => "floor",
            Self::Refused => "DESTROY of nothing (refused)",
            Self::AllocateDestroy => "IOAS_ALLOC, DESTROY",
            Self::Ranges => "IOAS_IOVA_RANGES",
            Self::MapUnmap => "IOAS_MAP, IOAS_UNMAP, no device",
        }
    }

    fn from_name(name: &str) -> Option<Self> {
        [Self::Floor].into_iter().chain(Self::OURS).find(|kind| kind.name() == name)
    }

    /// How many ioctls one turn makes.
    fn ioctls(self) -> u32 {
        match self {
            Self::Floor | Self::Refused | Self::Ranges => 1,
            Self::AllocateDestroy | Self::MapUnmap => 2,
        }
    }
}

/// On which CPUs clients and servers run.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Place {
    OneCpu,
    TwoCpus,
    Anywhere,
}

impl Place {
    fn title(self) -> &'static str {
        match self {
            Self::OneCpu => "client and server on one CPU",
            Self::TwoCpus => "client and server on different CPUs",
            Self::Anywhere => "wherever the kernel puts them",
        }
    }

    fn server(self) -> Option<usize> {
        (self != Self::Anywhere).then_some(0)
    }

    fn client(self) -> Option<usize> {
        match self {
            Self::OneCpu => Some(0),
            Self::TwoCpus => Some(1),
            Self::Anywhere => None,
        }
    }
}

/// A client that waits for orders.
struct Client {
    orders: ChildStdin,
    answers: BufReader<ChildStdout>,
}

impl Client {
    fn new(child: &mut Child) -> Result<Self, Box<dyn Error>> {
        let orders = child.stdin.take().ok_or("no way to the client")?;
        let answers = BufReader::new(child.stdout.take().ok_or("no way from the client")?);
        Ok(Self { orders, answers })
    }

    /// Nanoseconds for each ioctl: of the time from first to last, shared by the calls of all threads.
    fn measure(&mut self, kind: Kind, threads: u32) -> Result<f64, Box<dyn Error>> {
        writeln!(self.orders, "{}|{CALLS}|{threads}", kind.name())?;
        let mut line = String::new();
        self.answers.read_line(&mut line)?;
        let nanoseconds: f64 = line.trim().parse()?;
        Ok(nanoseconds / f64::from(CALLS * threads * kind.ioctls()))
    }
}

fn command(role: &str, place: Place) -> Result<Command, Box<dyn Error>> {
    let mut command = Command::new(std::env::current_exe()?);
    command.env("IOASID_BENCH_ROLE", role).stdin(Stdio::piped()).stdout(Stdio::piped());
    if let Some(cpu) = place.client() {
        command.env("IOASID_BENCH_CPU", cpu.to_string());
    }
    Ok(command)
}

fn pin(cpu: usize) {
    let mut set = CpuSet::new();
    set.set(cpu);
    // Where that is not permitted, the numbers are those of wherever the kernel puts it.
    let _ = sched_setaffinity(None, &set);
}

/// Measures and prints the table.
pub(crate) fn print() -> Result<(), Box<dyn Error>> {
    let everywhere = sched_getaffinity(None)?;
    for place in [Place::OneCpu, Place::Anywhere, Place::TwoCpus] {
        if place == Place::TwoCpus && !everywhere.is_set(1) {
            println!("\nno second CPU");
            continue;
        }
        if let Some(cpu) = place.server() {
            pin(cpu);
        }
        table(place)?;
        sched_setaffinity(None, &everywhere)?;
    }
    Ok(())
}

fn table(place: Place) -> Result<(), Box<dyn Error>> {
    let mut children = Vec::new();
    let mut listeners = Vec::new();
    for _ in SERVERS {
        let (child, listener) = floor::spawn(&mut command("floor", place)?)?;
        children.push(child);
        listeners.push(listener);
    }
    std::thread::scope(|scope| {
        for (listener, servers) in listeners.iter().zip(SERVERS) {
            for _ in 0..servers {
                scope.spawn(move || floor::serve(listener));
            }
        }
        let clients: Result<Vec<_>, _> = children.iter_mut().map(Client::new).collect();
        let measured = clients.and_then(|floors| beside(floors, place));
        for child in &mut children {
            child.wait()?;
        }
        measured
    })
}

/// The transport takes the program's standard streams from us, so a client of it is this program's grandchild: of a
/// supervisor that is started as the floor's client is.
fn beside(mut floors: Vec<Client>, place: Place) -> Result<(), Box<dyn Error>> {
    let mut supervisor = command("supervisor", place)?.spawn()?;
    let mut ours = Client::new(&mut supervisor)?;

    println!("\n{}: nanoseconds for each ioctl, medians of {ROUNDS} rounds of {CALLS} calls", place.title());
    print!("{:43} {:>8}", "", "ours");
    for servers in SERVERS {
        print!(" {:>8} {:>7}", format!("floor/{servers}"), "ratio");
    }
    println!();
    for kind in Kind::OURS {
        row(kind.name(), kind, 1, &mut ours, &mut floors)?;
    }
    if place == Place::Anywhere {
        for kind in [Kind::Refused, Kind::MapUnmap] {
            for threads in [2, 4] {
                let name = format!("{}, {threads} threads", kind.name());
                row(&name, kind, threads, &mut ours, &mut floors)?;
            }
        }
    }
    drop(ours);
    supervisor.wait()?;
    Ok(())
}

fn row(
    name: &str,
    kind: Kind,
    threads: u32,
    ours: &mut Client,
    floors: &mut [Client],
) -> Result<(), Box<dyn Error>> {
    let mut times = Vec::new();
    let mut least = vec![Vec::new(); floors.len()];
    for round in 0..=ROUNDS {
        let time = ours.measure(kind, threads)?;
        // The first one is for caches and for workers to be started.
        if round > 0 {
            times.push(time);
        }
        for (floor, least) in floors.iter_mut().zip(&mut least) {
            let time = floor.measure(Kind::Floor, threads)?;
            if round > 0 {
                least.push(time);
            }
        }
    }
    let time = median(times);
    print!("{name:43} {time:>8.0}");
    for floor in least.into_iter().map(median) {
        print!(" {floor:>8.0} {:>7.2}", time / floor);
    }
    println!();
    Ok(())
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

/// The process that serves ours; started as the floor's client is.
pub(crate) fn supervise() -> Result<(), Box<dyn Error>> {
    let client_cpu = std::env::var("IOASID_BENCH_CPU").unwrap_or_default();
    let own = std::env::current_exe()?;
    let mut options = Options::default();
    options.foreground = false;
    let role = "IOASID_BENCH_ROLE=ours".to_owned();
    let cpu = format!("IOASID_BENCH_CPU={client_cpu}");
    let arguments = [role, cpu].into_iter().map(Into::into).chain([own.into_os_string()]);
    run("env", arguments, &options, Server::new(ServerOptions::default())?)?;
    Ok(())
}

/// A client: obeys until its input ends.
pub(crate) fn obey(under_transport: bool) -> Result<(), Box<dyn Error>> {
    if let Some(cpu) = std::env::var("IOASID_BENCH_CPU").ok().and_then(|cpu| cpu.parse().ok()) {
        pin(cpu);
    }
    let path = if under_transport { "/dev/iommu" } else { "/dev/null" };
    for line in std::io::stdin().lines() {
        let line = line?;
        if !under_transport {
            // The first order says that it has been taken.
            floor::leave_listener();
        }
        let mut words = line.split('|');
        let kind = words.next().and_then(Kind::from_name).ok_or("an unknown kind")?;
        let mut number = || words.next().and_then(|word| word.parse::<u32>().ok()).ok_or("a missing number");
        let (calls, threads) = (number()?, number()?);
        let barrier = Barrier::new(threads as usize);
        let nanoseconds = std::thread::scope(|scope| {
            let threads: Vec<_> = (0..threads)
                .map(|_| {
                    scope.spawn(|| {
                        let mut turn = Turn::new(path, kind);
                        barrier.wait();
                        let start = Instant::now();
                        for _ in 0..calls {
                            turn.take();
                        }
                        start.elapsed().as_nanos()
                    })
                })
                .collect();
            threads.into_iter().map(|thread| thread.join().unwrap_or(0)).max()
        });
        println!("{}", nanoseconds.unwrap_or(0));
    }
    Ok(())
}

/// What is repeated, on a file and in an address space of the thread's own.
struct Turn {
    file: File,
    kind: Kind,
    space: u32,
    memory: Vec<u8>,
    ranges: [[u64; 2]; 8],
}

impl Turn {
    fn new(path: &str, kind: Kind) -> Self {
        let file = File::options().read(true).write(true).open(path).expect("the file is there");
        let mut alloc = [12_u32, 0, 0];
        if matches!(kind, Kind::Ranges | Kind::MapUnmap) {
            expect(file.as_raw_fd(), IOAS_ALLOC, &mut alloc);
        }
        Self { file, kind, space: alloc[2], memory: vec![0; 8192], ranges: [[0; 2]; 8] }
    }

    fn take(&mut self) {
        let fd = self.file.as_raw_fd();
        let space = u64::from(self.space);
        let page = (self.memory.as_ptr().addr() as u64).next_multiple_of(4096);
        match self.kind {
            Kind::Floor => expect(fd, IOAS_MAP, &mut [0_u8; floor::ARGUMENT]),
            Kind::Refused => {
                let mut nothing = [8_u32, 1000];
                let refused = ioctl(fd, DESTROY, (&raw mut nothing).addr() as u64);
                assert_eq!(refused, -1);
            }
            Kind::AllocateDestroy => {
                let mut alloc = [12_u32, 0, 0];
                expect(fd, IOAS_ALLOC, &mut alloc);
                expect(fd, DESTROY, &mut [8, alloc[2]]);
            }
            Kind::Ranges => {
                let array = (&raw mut self.ranges).addr() as u64;
                // Size, space, room, reserved, array, alignment.
                expect(fd, IOVA_RANGES, &mut [32 | space << 32, 8, array, 0]);
            }
            Kind::MapUnmap => {
                // Size and flags (fixed, writable, readable), space, address, length, IOVA.
                expect(fd, IOAS_MAP, &mut [40 | 7 << 32, space, page, 4096, 0x10_0000]);
                expect(fd, IOAS_UNMAP, &mut [24 | space << 32, 0x10_0000, 4096]);
            }
        }
    }
}

/// An ioctl that succeeds.
fn expect<T: ?Sized>(fd: RawFd, command: u32, argument: &mut T) {
    assert_eq!(ioctl(fd, command, std::ptr::from_mut(argument).cast::<u8>().addr() as u64), 0);
}
