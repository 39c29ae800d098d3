//! The one error type of the codec, divided by who is at fault.

use thiserror::Error;

/// What can go wrong. Every message says what was found and what was expected.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum CodecError {
    /// A codec configuration is not valid. `field` is the dotted path inside the configuration.
    #[error("{field}: {message}")]
    Config {
        /// Dotted path of the field, for example `residual_bins.0.element_bits`.
        field: String,
        /// What was found and what is allowed.
        message: String,
    },
    /// The caller's arrays have a wrong shape or wrong values.
    #[error("{0}")]
    Input(String),
    /// Stored bytes contradict their description.
    #[error("{0}")]
    Corrupt(String),
    /// Stored bytes end early, or there are more of them than described.
    #[error("{what}: found {found} bytes, expected {expected}")]
    Truncated {
        /// What was being read.
        what: String,
        /// The number of bytes at hand.
        found: usize,
        /// The number of bytes needed.
        expected: usize,
    },
    /// The caller said not to go on.
    #[error("interrupted")]
    Interrupted,
}

/// Result with [`CodecError`].
pub type Result<T> = std::result::Result<T, CodecError>;

/// What came of a run of rows; a failure names the failing row, counted from the start of the run.
pub(crate) type RowResult<T = ()> = std::result::Result<T, (usize, CodecError)>;

pub(crate) fn config_error<T>(field: impl Into<String>, message: impl Into<String>) -> Result<T> {
    Err(CodecError::Config { field: field.into(), message: message.into() })
}

impl CodecError {
    /// The same error with the row it happened in, for the kinds that come from rows.
    #[must_use]
    pub fn at_row(self, row: usize) -> Self {
        match self {
            Self::Input(message) => Self::Input(format!("row {row}: {message}")),
            Self::Corrupt(message) => Self::Corrupt(format!("row {row}: {message}")),
            other => other,
        }
    }
}
