//! The file of a picture. A replay may take an hour, so whether it can be written is found out first.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::str::FromStr;

use anyhow::Context;

/// The name of a file for a picture.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct PlotPath(PathBuf);

/// Why a name is not one for a picture.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(crate) enum NotAPlot {
    #[error("standard output is for the report; name a file, such as replay.svg")]
    StandardOutput,
    #[error(
        "pictures are SVG, and this would be .{0}; name it .svg (rsvg-convert and others make PNG or PDF of it)"
    )]
    Extension(String),
}

impl FromStr for PlotPath {
    type Err = NotAPlot;

    fn from_str(text: &str) -> Result<PlotPath, NotAPlot> {
        if text == "-" {
            return Err(NotAPlot::StandardOutput);
        }
        let path = PathBuf::from(text);
        match path.extension() {
            Some(extension) if !extension.eq_ignore_ascii_case("svg") => {
                Err(NotAPlot::Extension(extension.to_string_lossy().into_owned()))
            }
            _ => Ok(PlotPath(path)),
        }
    }
}

/// A file that is open for a picture. What was in it before stays until the picture is there; if there was none, there is none
/// after a replay that came to nothing.
#[derive(Debug)]
pub(crate) struct PlotFile {
    path: PathBuf,
    file: File,
    /// It was made by us and has no picture yet.
    is_new: bool,
}

impl PlotFile {
    /// Opens it, and changes nothing that is in it.
    ///
    /// # Errors
    /// It cannot be written.
    pub(crate) fn open(path: &PlotPath) -> anyhow::Result<PlotFile> {
        let PlotPath(path) = path;
        let open = |new: bool| OpenOptions::new().write(true).create_new(new).open(path);
        let (file, is_new) = match open(true) {
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => (open(false), false),
            file => (file, true),
        };
        let file = file.with_context(|| cannot_write(path))?;
        Ok(PlotFile { path: path.clone(), file, is_new })
    }

    /// Writes the picture.
    ///
    /// # Errors
    /// The system refuses, for example because the disk is full.
    pub(crate) fn write(mut self, picture: &str) -> anyhow::Result<()> {
        let mut write = || {
            // A pipe or a device has no length.
            if self.file.metadata()?.is_file() {
                self.file.set_len(0)?;
            }
            self.file.write_all(picture.as_bytes())?;
            self.file.flush()
        };
        write().with_context(|| cannot_write(&self.path))?;
        self.is_new = false;
        Ok(())
    }
}

impl Drop for PlotFile {
    fn drop(&mut self) {
        if self.is_new {
            // The file is empty and nobody else's.
            let _ = fs::remove_file(&self.path);
        }
    }
}

fn cannot_write(path: &Path) -> String {
    format!("cannot write {}", path.display())
}
