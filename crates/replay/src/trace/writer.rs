//! Writing a trace as it happens.

use super::{Event, HEADER};
use std::fmt;
use std::io::{self, BufWriter, Write};

/// A trace that is being written.
///
/// Nothing is kept but a buffer. What has been [flushed](Writer::flush) can be read, even if nothing comes after it; a trace that is
/// complete is [finished](Writer::finish).
///
/// ```
/// use ioasid_replay::trace::{Trace, Writer};
///
/// let text = "0,1,00:06.0,map,ffffe000,1223b0000,8192,BIDIRECTIONAL";
/// let (_, event) = Trace::new(text.as_bytes())?.next().unwrap()?;
/// let mut bytes = Vec::new();
/// let mut writer = Writer::new(&mut bytes, false)?;
/// writer.write(&event)?;
/// writer.finish()?;
/// assert_eq!(bytes, format!("t_ns,cpu,dev,op,iova,phys,bytes,dir\n{text}\n").as_bytes());
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
pub struct Writer<W: Write> {
    sink: Sink<W>,
}

enum Sink<W: Write> {
    Plain(BufWriter<W>),
    Compressed(Box<BufWriter<zstd::Encoder<'static, W>>>),
}

impl<W: Write> Writer<W> {
    /// Begins a trace, compressed with Zstandard or not.
    ///
    /// # Errors
    /// Those of the sink, and of Zstandard if it has no memory.
    pub fn new(sink: W, compressed: bool) -> io::Result<Writer<W>> {
        let sink = if compressed {
            let mut encoder = zstd::Encoder::new(sink, zstd::DEFAULT_COMPRESSION_LEVEL)?;
            encoder.include_checksum(true)?;
            Sink::Compressed(Box::new(BufWriter::new(encoder)))
        } else {
            Sink::Plain(BufWriter::new(sink))
        };
        let mut writer = Writer { sink };
        writeln!(writer.text(), "{HEADER}")?;
        Ok(writer)
    }

    fn text(&mut self) -> &mut dyn Write {
        match &mut self.sink {
            Sink::Plain(text) => text,
            Sink::Compressed(text) => text,
        }
    }

    /// Writes one event.
    ///
    /// # Errors
    /// Those of the sink.
    pub fn write(&mut self, event: &Event) -> io::Result<()> {
        writeln!(self.text(), "{event}")
    }

    /// Hands over what has been written so far, so that it can be read if nothing follows. Compression suffers a little.
    ///
    /// # Errors
    /// Those of the sink.
    pub fn flush(&mut self) -> io::Result<()> {
        self.text().flush()
    }

    /// Ends the trace.
    ///
    /// # Errors
    /// Those of the sink.
    pub fn finish(self) -> io::Result<()> {
        match self.sink {
            Sink::Plain(mut text) => text.flush(),
            Sink::Compressed(mut text) => {
                text.flush()?;
                let encoder = text.into_inner().map_err(io::IntoInnerError::into_error)?;
                encoder.finish()?.flush()
            }
        }
    }
}

impl<W: Write> fmt::Debug for Writer<W> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let compressed = matches!(self.sink, Sink::Compressed(_));
        f.debug_struct("Writer").field("compressed", &compressed).finish_non_exhaustive()
    }
}
