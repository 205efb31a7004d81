//! Going into the background: the process that was started waits until the mount is ready, and tells how it went.

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::process::ExitCode;

use rustix::pipe::{PipeFlags, pipe_with};

/// What the child writes when the mount is ready; anything else is a sentence that says why it is not.
const READY: u8 = 0;

/// Whoever waits for the mount to be ready.
pub struct Waiter(Option<OwnedFd>);

impl Waiter {
    /// Nobody but systemd waits: the process stays in the foreground.
    pub const NOBODY: Self = Self(None);

    /// The mount is ready. In the background nobody is left to read standard input and output from here on.
    pub fn ready(self) -> std::io::Result<()> {
        let Some(pipe) = self.0 else {
            return sd_notify::notify(&[sd_notify::NotifyState::Ready]);
        };
        let null = File::options().read(true).write(true).open("/dev/null")?;
        rustix::stdio::dup2_stdin(null.as_fd())?;
        rustix::stdio::dup2_stdout(null.as_fd())?;
        rustix::stdio::dup2_stderr(null.as_fd())?;
        File::from(pipe).write_all(&[READY])
    }

    /// The mount cannot be made, for the reason that `sentence` tells.
    pub fn failed(self, sentence: &str) {
        let told = self.0.map(|pipe| File::from(pipe).write_all(sentence.as_bytes()));
        if !matches!(told, Some(Ok(()))) {
            eprintln!("mortar-mount: {sentence}");
        }
    }
}

/// Runs `child` in a new process and session, and returns when it says that it is ready, or has failed.
///
/// # Safety
/// No other thread may exist: after fork(2) the child has only the calling one.
pub unsafe fn detach(child: impl FnOnce(Waiter) -> ExitCode) -> ExitCode {
    let (reader, writer) = match pipe_with(PipeFlags::CLOEXEC) {
        Ok(pipe) => pipe,
        Err(e) => {
            eprintln!("mortar-mount: no pipe can be made: {e}.");
            return ExitCode::FAILURE;
        }
    };
    // SAFETY: the caller promises that there is no other thread.
    match unsafe { libc::fork() } {
        -1 => {
            eprintln!("mortar-mount: no process can be started: {}.", std::io::Error::last_os_error());
            ExitCode::FAILURE
        }
        0 => {
            drop(reader);
            // The mount must neither end with the terminal nor keep the directory busy that it was started in.
            let _ = rustix::process::setsid();
            let _ = rustix::process::chdir("/");
            child(Waiter(Some(writer)))
        }
        _ => {
            drop(writer);
            wait(File::from(reader))
        }
    }
}

fn wait(mut reader: File) -> ExitCode {
    let mut told = Vec::new();
    let result = reader.read_to_end(&mut told);
    match (result, told.as_slice()) {
        (Ok(_), [READY]) => ExitCode::SUCCESS,
        (Ok(_), [_, ..]) => {
            eprintln!("mortar-mount: {}", String::from_utf8_lossy(&told));
            ExitCode::FAILURE
        }
        _ => {
            eprintln!("mortar-mount: the background process ended before the mount was ready; try with --foreground.");
            ExitCode::FAILURE
        }
    }
}
