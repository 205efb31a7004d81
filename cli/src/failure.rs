//! How a command ends when it does not end well: a sentence, and the exit code that belongs to it.

use std::fmt;

/// Why a command did not do what it was asked for. Each holds whole sentences for the administrator.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Failure {
    /// The command was called wrongly; nothing was sent to any server. Exit code 2.
    Usage(String),
    /// It was refused, or it failed on the way. Exit code 1.
    Failed(String),
}

/// What every command returns.
pub type Outcome<T = ()> = Result<T, Failure>;

impl Failure {
    /// The process's exit code.
    pub const fn exit_code(&self) -> u8 {
        match self {
            Self::Failed(_) => 1,
            Self::Usage(_) => 2,
        }
    }

    /// A wrong call.
    pub fn usage(sentence: impl Into<String>) -> Self {
        Self::Usage(sentence.into())
    }

    /// A refusal or a failure.
    pub fn failed(sentence: impl Into<String>) -> Self {
        Self::Failed(sentence.into())
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Usage(sentence) | Self::Failed(sentence) => f.write_str(sentence),
        }
    }
}

impl From<anyhow::Error> for Failure {
    fn from(error: anyhow::Error) -> Self {
        Self::Failed(format!("{error:#}"))
    }
}
