//! `ioasid pasid`: PASIDs in sets, tried by hand and under load.
//!
//! [`play`] carries out a few lines of text and says what came of each, so that somebody who wonders what happens to an ID that is freed
//! while a device has it, or to a set that is moved under a limit which is too low, can see it. [`storm`] lets many
//! threads be many machines for a while, and looks whether everything adds up at the end.

use std::process::ExitCode;

use clap::{Args, Subcommand};

mod play;
mod storm;

/// Give out PASIDs (the kernel's IOASIDs) in sets, with quotas and limits: by hand, or in a storm
#[derive(Debug, Args)]
pub(crate) struct Arguments {
    #[command(subcommand)]
    how: How,
}

#[derive(Debug, Subcommand)]
enum How {
    Play(play::Arguments),
    Storm(storm::Arguments),
}

/// Does it.
///
/// # Errors
/// A script cannot be read, or standard output cannot be written.
pub(crate) fn pasid(arguments: &Arguments) -> anyhow::Result<ExitCode> {
    match &arguments.how {
        How::Play(arguments) => play::play(arguments),
        How::Storm(arguments) => storm::storm(arguments),
    }
}
