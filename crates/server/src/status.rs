//! A snapshot for people and programs of what is mapped, attached and charged: the content of `/dev/ioasid`.

use serde::Serialize;

/// Everything the server holds at one moment.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct Status {}

impl Status {
    /// The snapshot as indented JSON text that ends with a newline.
    pub fn to_json(&self) -> String {
        let mut text = serde_json::to_string_pretty(self).unwrap_or_default();
        text.push('\n');
        text
    }
}
