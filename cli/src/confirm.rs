//! Asking before something is done that cannot be undone.

use std::io::{self, BufRead, Write};

use crate::failure::{Failure, Outcome};
use crate::output::can_ask;

/// Asks a person; `--yes` answers. Without a terminal and without `--yes` it is refused: a script never waits for an
/// answer that cannot come, and never deletes by accident.
///
/// # Errors
/// When the answer is no, or nobody can answer.
pub fn confirm(yes: bool, consequence: &str) -> Outcome {
    confirm_by("--yes", yes, consequence)
}

/// The same, where another option answers.
///
/// # Errors
/// When the answer is no, or nobody can answer.
pub fn confirm_by(option: &str, yes: bool, consequence: &str) -> Outcome {
    if yes {
        return Ok(());
    }
    if !can_ask() {
        return Err(Failure::usage(format!(
            "{consequence} There is no terminal to ask on: say {option} if that is meant."
        )));
    }
    eprint!("{consequence} Continue? [y/N] ");
    let _ = io::stderr().flush();
    let mut answer = String::new();
    let read = io::stdin().lock().read_line(&mut answer);
    if read.is_ok() && matches!(answer.trim().to_ascii_lowercase().as_str(), "y" | "yes") {
        Ok(())
    } else {
        Err(Failure::failed("Nothing was done."))
    }
}
