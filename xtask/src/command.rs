//! Running other programs, with errors that say which one failed and what it had to say.

use std::process::Command;

use anyhow::{Context, Result, bail};

/// Runs a program with our standard output and error; an error unless it succeeds.
pub(crate) fn run(command: &mut Command) -> Result<()> {
    let status = command.status().with_context(|| format!("cannot run {}", shown(command)))?;
    if !status.success() {
        bail!("{} failed: {status}", shown(command));
    }
    Ok(())
}

/// Runs a program and returns its standard output as text; an error with its standard error unless it succeeds.
pub(crate) fn output(command: &mut Command) -> Result<String> {
    let output = command.output().with_context(|| format!("cannot run {}", shown(command)))?;
    if !output.status.success() {
        let said = String::from_utf8_lossy(&output.stderr);
        bail!("{} failed: {}\n{}", shown(command), output.status, said.trim_end());
    }
    String::from_utf8(output.stdout)
        .with_context(|| format!("{} printed something that is no text", shown(command)))
}

/// The program and its first arguments, short enough for a message.
fn shown(command: &Command) -> String {
    let mut text = command.get_program().to_string_lossy().into_owned();
    for argument in command.get_args() {
        if text.len() > 100 {
            return text + " ...";
        }
        text = text + " " + &argument.to_string_lossy();
    }
    text
}
