//! The client programs. Each is a function that asserts what a program may rely on.

mod devices;
mod disturbed;
mod hostile;
mod killed;
mod last_close;
mod opening;
mod processes;

use std::process::{Command, ExitCode};

use rustix::process::Pid;

use crate::calls::{remember_supervisor, supervisor};

/// Those that succeed or fail by themselves; each is a test.
pub(crate) const CLIENTS: &[(&str, fn())] = &[
    ("open_and_close", opening::open_and_close),
    ("every_way_to_open", opening::every_way_to_open),
    ("open_flags", opening::open_flags),
    ("a_text_file_is_read_only", opening::text_file),
    ("foreign_and_closed_descriptors", opening::foreign_and_closed_descriptors),
    ("bad_pointers", opening::bad_pointers),
    ("nothing_of_ours_can_be_mapped", opening::nothing_of_ours_can_be_mapped),
    ("duplicates_and_the_last_close", last_close::duplicates_and_the_last_close),
    ("close_before_the_next_call", last_close::close_before_the_next_call),
    ("forks_and_the_last_close", last_close::forks_and_the_last_close),
    ("a_descriptor_in_flight", last_close::a_descriptor_in_flight),
    ("a_file_opened_anew_through_proc", last_close::a_file_opened_anew_through_proc),
    ("a_mapping_keeps_a_file_open", last_close::a_mapping_keeps_a_file_open),
    ("exec_closes_and_inherits", last_close::exec_closes_and_inherits),
    ("threads", disturbed::threads),
    ("exec_by_another_thread", last_close::exec_by_another_thread),
    ("many_files", last_close::many_files),
    ("too_many_descriptors", opening::too_many_descriptors),
    ("killed_at_any_moment", disturbed::killed_at_any_moment),
    ("killed_while_the_server_sleeps", disturbed::killed_while_the_server_sleeps),
    ("killed_in_the_middle_of_everything", killed::killed_in_the_middle_of_everything),
    ("signals_do_not_repeat_calls", disturbed::signals_do_not_repeat_calls),
    ("not_dumpable", disturbed::not_dumpable),
    ("surroundings_are_as_before", processes::surroundings_are_as_before),
    ("a_shell_and_its_children", processes::a_shell_and_its_children),
    ("device_regions", devices::device_regions),
    ("a_device_copies_private_memory", devices::a_device_copies_private_memory),
    ("a_device_copies_a_memory_file", devices::a_device_copies_a_memory_file),
    ("each_pasid_has_its_own_memory", devices::each_pasid_has_its_own_memory),
    ("a_device_is_free_after_its_close", devices::a_device_is_free_after_its_close),
    ("mapped_memory_must_be_there", devices::mapped_memory_must_be_there),
    ("a_child_has_memory_of_its_own", devices::a_child_has_memory_of_its_own),
    ("memory_goes_with_its_program", devices::memory_goes_with_its_program),
    ("killed_while_a_device_works", devices::killed_while_a_device_works),
    ("arguments_that_change", hostile::arguments_that_change),
    ("memory_that_goes_under_dma", hostile::memory_that_goes_under_dma),
    ("descriptors_of_other_kinds", hostile::descriptors_of_other_kinds),
    ("everything_is_used_up", hostile::everything_is_used_up),
    ("forks_without_end", hostile::forks_without_end),
    ("forks_that_take_everything", hostile::forks_that_take_everything),
];

/// Those that tests run with a special expectation, or that clients exec.
const PROGRAMS: &[(&str, fn())] = &[
    ("exit_with_seven", || std::process::exit(7)),
    ("abort", || std::process::abort()),
    ("leave_an_orphan", processes::leave_an_orphan),
    ("await_terminate", processes::await_terminate),
    ("await_interrupt", processes::await_interrupt),
    ("nest", processes::nest),
    ("stall", disturbed::a_stalled_client_stops_nobody),
    ("stall_everything", disturbed::stalled_clients_have_half),
    ("after_exec", last_close::after_exec),
    ("after_exec_of_a_thread", last_close::after_exec_of_a_thread),
    ("after_exec_with_device", devices::after_exec_with_device),
];

/// Runs the client that is named first.
pub(crate) fn main(arguments: &[String]) -> ExitCode {
    // A client that was execed by one knows the supervisor from it.
    let inherited = std::env::var("IOASID_TEST_SUPERVISOR").ok().and_then(|pid| pid.parse().ok());
    let parent = rustix::process::getppid().map_or(0, Pid::as_raw_pid);
    remember_supervisor(inherited.unwrap_or(parent));
    let (_, client) = CLIENTS.iter().chain(PROGRAMS).find(|(name, _)| *name == arguments[0]).unwrap();
    client();
    ExitCode::SUCCESS
}

/// A command that becomes another client.
fn this_program(client: &str) -> Command {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.arg("client").arg(client).env("IOASID_TEST_SUPERVISOR", supervisor().to_string());
    command
}
