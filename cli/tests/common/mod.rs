//! Runs the real `mortar`, without anything of the surrounding machine's settings.

#![allow(dead_code, reason = "each test file uses its part")]

use std::process::{Command, Output, Stdio};

/// What a run of `mortar` came to.
pub struct Run {
    pub code: i32,
    pub out: String,
    pub err: String,
}

impl From<Output> for Run {
    fn from(output: Output) -> Self {
        Self {
            code: output.status.code().expect("ended by itself"),
            out: String::from_utf8(output.stdout).expect("UTF-8"),
            err: String::from_utf8(output.stderr).expect("UTF-8"),
        }
    }
}

impl Run {
    /// Standard output as JSON.
    pub fn json(&self) -> serde_json::Value {
        serde_json::from_str(&self.out).unwrap_or_else(|e| panic!("{e}: out {:?}, err {:?}", self.out, self.err))
    }

    /// It ended with this code and said this.
    #[track_caller]
    pub fn expect(&self, code: i32, sentence: &str) -> &Self {
        assert_eq!(self.code, code, "out: {}\nerr: {}", self.out, self.err);
        let said = if code == 0 { &self.out } else { &self.err };
        assert!(said.contains(sentence), "expected {sentence:?}\nout: {}\nerr: {}", self.out, self.err);
        self
    }
}

/// `mortar` with these arguments, no terminal, no settings.
pub fn command(args: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_mortar"));
    command.args(args).stdin(Stdio::null()).env_remove("MORTAR_SERVERS");
    // A file of the machine that runs the tests must not decide them.
    command.env_remove("MORTAR_CLI_CONFIG");
    command
}

/// Runs `mortar` with these arguments, separated by blanks.
pub fn mortar(line: &str) -> Run {
    let args: Vec<_> = line.split_whitespace().collect();
    command(&args).output().expect("mortar starts").into()
}
