//! What a command prints: JSON for programs, tables and sentences for people. No command writes to standard output by
//! any other way.

use std::io::{self, IsTerminal, Write};

use comfy_table::{Cell, CellAlignment, Color, Table, presets};
use serde_json::Value;

use crate::failure::Failure;

/// Where a command's result goes and in which form.
#[derive(Clone, Copy, Debug)]
pub struct Output {
    /// `--json` was given.
    pub json: bool,
}

impl Output {
    /// Prints the result: `json` for programs, else what `text` makes of it.
    pub fn show(self, json: &Value, text: impl FnOnce() -> String) {
        let out = if self.json { format!("{json:#}") } else { text() };
        print_to(&mut io::stdout().lock(), &out);
    }

    /// Prints one of many results, one after the other: `json` on a line of its own for programs, else what `text` makes of it.
    pub fn next(self, json: &Value, text: impl FnOnce() -> String) {
        let out = if self.json { json.to_string() } else { text() };
        print_to(&mut io::stdout().lock(), &out);
    }

    /// A person looks at standard output: what was printed can be drawn over.
    pub fn can_draw(self) -> bool {
        !self.json && io::stdout().is_terminal()
    }

    /// Prints that something was done: `{"done": …}` or one sentence.
    pub fn done(self, what: &str, sentence: &str) {
        self.show(&serde_json::json!({ "done": what }), || sentence.to_owned());
    }

    /// Tells a person how far a long command is. Programs are not told: they read the result.
    pub fn progress(self, sentence: &str) {
        if !self.json {
            print_to(&mut io::stderr().lock(), sentence);
        }
    }

    /// Prints why the command failed, on standard error.
    pub fn failure(self, failure: &Failure) {
        let out = if self.json {
            format!("{:#}", serde_json::json!({ "error": failure.to_string(), "exit_code": failure.exit_code() }))
        } else {
            format!("mortar: {failure}")
        };
        print_to(&mut io::stderr().lock(), &out);
    }
}

/// A reader that went away (`mortar … | head -1`) is no failure of the command.
fn print_to(stream: &mut impl Write, text: &str) {
    let _ = writeln!(stream, "{}", text.trim_end());
}

/// Standard input and standard error are a terminal: a person can be asked.
pub fn can_ask() -> bool {
    io::stdin().is_terminal() && io::stderr().is_terminal()
}

/// A table in the command's one style, with a header.
pub fn table(header: &[&str]) -> Table {
    let mut table = Table::new();
    table.load_style(presets::NOTHING).set_header(header.iter().map(|h| Cell::new(h.to_uppercase())));
    table
}

/// The table as text, its edges not padded.
pub fn text_of(table: &Table) -> String {
    let line = |line: &str| line.strip_prefix(' ').unwrap_or(line).trim_end().to_owned();
    table.to_string().lines().map(line).collect::<Vec<_>>().join("\n")
}

/// What takes a terminal's cursor up over a text that was printed, and clears it away.
pub fn over(text: &str) -> String {
    format!("\u{1b}[{}A\u{1b}[J", text.trim_end().lines().count())
}

/// A number, to the right.
pub fn number(value: impl ToString) -> Cell {
    Cell::new(value.to_string()).set_alignment(CellAlignment::Right)
}

/// A brick's state, coloured on a terminal. A brick that is not reachable is told so, whatever the log says of it.
pub fn state(state: &str, reachable: bool) -> Cell {
    match (state, reachable) {
        (state, false) => Cell::new(format!("{state}, not reachable")).fg(Color::Red),
        (state, true) if state.starts_with("in-sync") => Cell::new(state).fg(Color::Green),
        ("syncing", true) => Cell::new(state).fg(Color::Yellow),
        (other, true) => Cell::new(other).fg(Color::Red),
    }
}

/// Bytes for people: `1.5 GiB`.
#[expect(clippy::cast_precision_loss, reason = "one decimal is shown")]
pub fn bytes(bytes: u64) -> String {
    let mut value = bytes as f64;
    let mut unit = "B";
    for larger in ["KiB", "MiB", "GiB", "TiB", "PiB", "EiB"] {
        if value < 1024.0 {
            break;
        }
        value /= 1024.0;
        unit = larger;
    }
    if unit == "B" { format!("{bytes} B") } else { format!("{value:.1} {unit}") }
}

/// Seconds for people: `1 h 5 min`.
pub fn seconds(seconds: u64) -> String {
    match seconds {
        0..=59 => format!("{seconds} s"),
        60..=3599 => format!("{} min {} s", seconds / 60, seconds % 60),
        _ => format!("{} h {} min", seconds / 3600, seconds / 60 % 60),
    }
}

/// "1 brick", "2 bricks".
pub fn count(n: u64, one: &str) -> String {
    if n == 1 { format!("1 {one}") } else { format!("{n} {one}s") }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_and_times_are_told_in_the_largest_unit_that_fits() {
        assert_eq!(bytes(0), "0 B");
        assert_eq!(bytes(1023), "1023 B");
        assert_eq!(bytes(1536), "1.5 KiB");
        assert_eq!(bytes(10 << 30), "10.0 GiB");
        assert_eq!(seconds(59), "59 s");
        assert_eq!(seconds(61), "1 min 1 s");
        assert_eq!(seconds(3900), "1 h 5 min");
        assert_eq!(count(1, "brick"), "1 brick");
        assert_eq!(count(0, "brick"), "0 bricks");
    }
}
