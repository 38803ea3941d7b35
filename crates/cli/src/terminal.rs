//! Colours, on a terminal only.

use std::io::IsTerminal;

/// How a word is shown.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Tone {
    /// All is well.
    Good,
    /// Worth a look.
    Warning,
    /// Something has to be done.
    Bad,
    /// Less important than the rest.
    Faint,
}

/// Whether colours are used on one output.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Palette {
    coloured: bool,
}

impl Palette {
    /// No colours.
    #[cfg(test)]
    pub(crate) const NONE: Palette = Palette { coloured: false };

    /// Colours if `output` is a terminal and nobody has asked for none (<https://no-color.org>).
    pub(crate) fn of(output: &impl IsTerminal) -> Self {
        let refused = std::env::var_os("NO_COLOR").is_some_and(|value| !value.is_empty());
        Self { coloured: output.is_terminal() && !refused }
    }

    /// `text`, padded to `width` columns, in a tone.
    pub(crate) fn paint(self, tone: Tone, text: &str, width: usize) -> String {
        let code = match tone {
            Tone::Good => 32,
            Tone::Warning => 33,
            Tone::Bad => 31,
            Tone::Faint => 2,
        };
        if self.coloured { format!("\x1b[{code}m{text:<width$}\x1b[0m") } else { format!("{text:<width$}") }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn padding_does_not_depend_on_colour() {
        assert_eq!(Palette { coloured: false }.paint(Tone::Good, "ok", 4), "ok  ");
        assert_eq!(Palette { coloured: true }.paint(Tone::Bad, "no", 4), "\x1b[31mno  \x1b[0m");
    }
}
