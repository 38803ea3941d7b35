//! Real programs under the transport, with a real server.
//!
//! The test program is all three parts. As a test it starts itself as a *supervisor* (`supervise`), a process of its
//! own with a deadline, which runs it once more as the *client* of that name (`client`). Clients are the functions of
//! the module `clients`; they assert for themselves, and a failed assertion is a failed exit status. As root, every
//! client is run as an ordinary user as well, supervisor included.

mod calls;
mod clients;
mod device;
mod harness;

use std::process::ExitCode;

use libtest_mimic::{Arguments, Conclusion, Trial};

use harness::{How, Who, supervise};

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().collect();
    match arguments.get(1).map(String::as_str) {
        Some("supervise") => harness::supervisor(&arguments[2..]),
        Some("client") => clients::main(&arguments[2..]),
        _ => {
            let conclusion: Conclusion = libtest_mimic::run(&Arguments::from_args(), trials());
            conclusion.exit_code()
        }
    }
}

fn trials() -> Vec<Trial> {
    let mut trials = Vec::new();
    for who in harness::users() {
        for (name, _) in clients::CLIENTS {
            trials.push(trial(who, name, move || supervise(name, &How::of(who)).succeeded()));
        }
        for (name, client) in
            [("a_stalled_client_stops_nobody", "stall"), ("stalled_clients_have_half", "stall_everything")]
        {
            trials.push(
                trial(who, name, move || supervise(client, &How::of(who)).succeeded())
                    .with_ignored_flag(!harness::may_stall(who)),
            );
        }
        trials.push(trial(who, "exit_status", exit_status(who)));
        trials.push(trial(who, "death_by_signal", death_by_signal(who)));
        trials.push(trial(who, "a_background_run_serves_as_well", move || {
            supervise("threads", &How { background: true, ..How::of(who) }).succeeded()
        }));
        trials.push(trial(who, "orphans_are_served_and_reaped", orphans(who)));
        trials.push(trial(who, "terminate_is_passed_on", terminate(who)));
        trials.push(trial(who, "interrupts_are_left_to_the_program", interrupt(who)));
        trials.push(trial(who, "a_nested_run_is_refused", nested(who)));
        trials.push(trial(who, "a_missing_program_is_named", missing(who)));
        trials.push(trial(who, "statistics_count_calls", statistics(who)));
        trials.push(trial(who, "the_program_dies_with_its_supervisor", orphaned_program(who)));
        trials.push(
            trial(who, "a_static_program", static_program(who))
                .with_ignored_flag(!harness::can_link_statically()),
        );
    }
    trials
}

fn trial(who: Who, name: &str, check: impl FnOnce() -> Result<(), String> + Send + 'static) -> Trial {
    Trial::test(format!("{}::{name}", who.name()), move || check().map_err(Into::into))
}

fn exit_status(who: Who) -> impl FnOnce() -> Result<(), String> {
    move || supervise("exit_with_seven", &How::of(who)).exited_with(7)
}

fn death_by_signal(who: Who) -> impl FnOnce() -> Result<(), String> {
    move || supervise("abort", &How::of(who)).exited_with(128 + 6)
}

fn orphans(who: Who) -> impl FnOnce() -> Result<(), String> {
    move || {
        let run = supervise("leave_an_orphan", &How::of(who));
        run.exited_with(7)?;
        run.said("the orphan has an address space")?;
        run.said("no zombies")
    }
}

fn terminate(who: Who) -> impl FnOnce() -> Result<(), String> {
    move || supervise("await_terminate", &How { signal: Some(libc::SIGTERM), ..How::of(who) }).exited_with(15)
}

fn interrupt(who: Who) -> impl FnOnce() -> Result<(), String> {
    // To the group, as a terminal would send it.
    move || supervise("await_interrupt", &How { signal: Some(libc::SIGINT), ..How::of(who) }).exited_with(2)
}

fn nested(who: Who) -> impl FnOnce() -> Result<(), String> {
    move || {
        let run = supervise("nest", &How::of(who));
        run.succeeded()?;
        run.said("already runs under a seccomp filter with a listener")
    }
}

fn missing(who: Who) -> impl FnOnce() -> Result<(), String> {
    move || {
        let run = supervise("", &How { program: Some("/nonexistent/program".into()), ..How::of(who) });
        run.exited_with(125)?;
        run.said("cannot execute \"/nonexistent/program\"")
    }
}

fn statistics(who: Who) -> impl FnOnce() -> Result<(), String> {
    move || {
        let run = supervise("open_and_close", &How::of(who));
        run.succeeded()?;
        run.said("Ioctl(15233): calls 2, failures 1")?;
        run.said("Open: calls 1, failures 0")
    }
}

fn orphaned_program(who: Who) -> impl FnOnce() -> Result<(), String> {
    move || {
        // The output's end is seen only when the program, which sleeps for long, has died too.
        let run = supervise("await_terminate", &How { signal: Some(libc::SIGKILL), ..How::of(who) });
        if run.signal == Some(libc::SIGKILL) { Ok(()) } else { Err(run.report()) }
    }
}

fn static_program(who: Who) -> impl FnOnce() -> Result<(), String> {
    move || {
        let program = harness::StaticProgram::build()?;
        let run = supervise("", &How { program: Some(program.path().to_owned()), ..How::of(who) });
        run.succeeded()?;
        run.said("static: address space")
    }
}
