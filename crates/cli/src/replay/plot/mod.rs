//! Pictures of replays, as SVG.
//!
//! ```text
//! detail, sides ──► page ──► plotters ──► file
//! (what is shown)   (paper: millimetres, text, lines, scales)
//! ```
//!
//! - [`detail`] draws one replay: what was live and how long calls took over the time of the recording, and a histogram.
//! - [`sides`] draws several replays of a trace side by side, one row for each.
//! - [`page`] knows the paper: a figure is as wide as the text of an A4 page, no text is smaller than 9 points, and lines differ in
//!   thickness, dashes and markers as well as in colours, which people who see few colours can tell apart. [`scale`] knows the axes.
//! - [`file`] opens the file before anything is replayed, and writes it when everything is drawn.
//!
//! docs/decisions/0022 says why plotters.

mod detail;
mod file;
mod page;
mod scale;
mod sides;
#[cfg(test)]
mod tests;

pub(super) use detail::draw as draw_detail;
pub(super) use file::{PlotFile, PlotPath};
pub(super) use sides::draw as draw_sides;
