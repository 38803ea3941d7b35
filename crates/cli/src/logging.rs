//! What is logged, and how much of it: to standard error, so that a program's output stays its own.

use anyhow::Context;
use clap::{ArgAction, Args};
use tracing::level_filters::LevelFilter;
use tracing_subscriber::filter::Targets;
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::util::SubscriberInitExt;

/// Overrides the options; its value is a level, or `target=level` pairs separated by commas.
const VARIABLE: &str = "IOASID_LOG";

/// How much is logged.
#[derive(Debug, Args)]
pub(crate) struct Verbosity {
    /// Log more to standard error: -v what happens, -vv each call of the program, -vvv everything
    #[arg(short = 'v', action = ArgAction::Count, global = true)]
    verbosity: u8,
}

impl Verbosity {
    /// Starts logging for the rest of the process.
    ///
    /// # Errors
    /// The environment's value is not understood.
    pub(crate) fn start(&self) -> anyhow::Result<()> {
        let filter = match std::env::var(VARIABLE) {
            Ok(text) if !text.is_empty() => parse(&text)?,
            _ => Targets::new().with_default(self.level()),
        };
        let lines = tracing_subscriber::fmt::layer().with_writer(std::io::stderr).with_ansi(false);
        tracing_subscriber::registry().with(lines).with(filter).init();
        Ok(())
    }

    fn level(&self) -> LevelFilter {
        match self.verbosity {
            0 => LevelFilter::WARN,
            1 => LevelFilter::INFO,
            2 => LevelFilter::DEBUG,
            _ => LevelFilter::TRACE,
        }
    }
}

fn parse(text: &str) -> anyhow::Result<Targets> {
    text.parse().with_context(|| {
        format!("{VARIABLE}={text:?} is not understood: use off, error, warn, info, debug or trace, or such as \"warn,ioasid_run=debug\"")
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use tracing::Level;

    #[test]
    fn levels_rise_with_each_v() {
        let level = |verbosity| Verbosity { verbosity }.level();
        assert_eq!(
            [0, 1, 2, 3, 200].map(level),
            [
                LevelFilter::WARN,
                LevelFilter::INFO,
                LevelFilter::DEBUG,
                LevelFilter::TRACE,
                LevelFilter::TRACE
            ]
        );
    }

    #[test]
    fn the_variable_takes_levels_and_targets() {
        let targets = parse("warn,ioasid_run=debug").unwrap();
        assert!(targets.would_enable("ioasid_run::files", &Level::DEBUG));
        assert!(!targets.would_enable("ioasid_server", &Level::INFO));
        assert!(parse("ioasid_run=loud").is_err_and(|error| error.to_string().contains("IOASID_LOG")));
    }
}
