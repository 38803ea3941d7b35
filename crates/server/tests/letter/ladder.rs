//! What can be wrong with a call, in the order in which it is found.

use ioasid_server::Errno;

use crate::program::{IsCommand, Program};

/// A rule in words, the answer to a call that breaks it, and how to make a call break it.
pub(crate) type Fault<'a, C> = (&'a str, Errno, &'a dyn Fn(&mut C));

/// Tries each fault in `good`, alone and with each that comes behind it: the earlier one is the answer, the argument stays as
/// it was, and nothing changes. (The earlier one is put in last, so it may overwrite what the later one has done.)
pub(crate) fn ladder<C: IsCommand>(program: &Program, fd: i32, good: C, faults: &[Fault<'_, C>]) {
    let before = program.server.status().contexts;
    for (number, (rule, errno, spoil)) in faults.iter().enumerate() {
        for (later, _, spoil_more) in &faults[number..] {
            let mut command = good.sized();
            spoil_more(&mut command);
            spoil(&mut command);
            let mut argument = command;
            let answer = program.call(fd, C::NUMBER, argument.as_mut_bytes());
            let named = format!("{}: {rule}, with: {later}", C::NAME);
            assert_eq!(answer, Err(*errno), "{named}");
            assert_eq!(argument.as_bytes(), command.as_bytes(), "the argument of {named}");
            assert_eq!(program.server.status().contexts, before, "what is there after {named}");
        }
    }
}
