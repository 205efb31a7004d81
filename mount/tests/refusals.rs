//! What `mortar-mount` refuses, and how it says so: one sentence on standard error, exit code 2 for a wrong command line and
//! 1 for a volume that cannot be mounted.

use std::net::TcpListener;
use std::path::Path;
use std::process::{Command, Output};

fn run(arguments: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_mortar-mount")).args(arguments).output().expect("the program starts")
}

#[track_caller]
fn refused(arguments: &[&str], code: i32, words: &[&str]) {
    let output = run(arguments);
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(code), "{arguments:?}: {said}");
    for word in words {
        assert!(said.contains(word), "{arguments:?} does not say '{word}': {said}");
    }
    assert!(!said.contains("panicked"), "{said}");
}

fn text(path: &Path) -> &str {
    path.to_str().expect("a path of letters")
}

#[test]
fn a_missing_argument_is_a_wrong_command_line() {
    refused(&[], 2, &["Usage"]);
    refused(&["s1:/vmstore"], 2, &["PATH"]);
}

#[test]
fn a_source_without_server_or_volume_is_refused() {
    let dir = tempfile::tempdir().expect("a directory");
    refused(&["s1,s2", text(dir.path())], 2, &["'s1,s2'", "no volume"]);
    refused(&[":/vmstore", text(dir.path())], 2, &["no server"]);
    refused(&["s1:/vmstore/images", text(dir.path())], 2, &["whole volume"]);
}

#[test]
fn a_mount_point_that_is_no_directory_is_refused() {
    let dir = tempfile::tempdir().expect("a directory");
    let file = dir.path().join("file");
    std::fs::write(&file, "").expect("a file");
    refused(&["s1:/vmstore", text(&file)], 2, &[text(&file), "no directory"]);
    refused(&["s1:/vmstore", text(&dir.path().join("none"))], 2, &["does not exist"]);
}

#[test]
fn an_unknown_option_is_refused_by_name() {
    let dir = tempfile::tempdir().expect("a directory");
    refused(&["s1:/vmstore", text(dir.path()), "-o", "ro,nosiud"], 2, &["'nosiud'"]);
    refused(&["s1:/vmstore", text(dir.path()), "-o", "remount"], 2, &["unmount"]);
    refused(&["s1:/vmstore", text(dir.path()), "--log-level", "loud"], 2, &["loud", "info"]);
}

#[test]
fn a_volume_that_cannot_be_mounted_is_told_by_the_background_process() {
    let dir = tempfile::tempdir().expect("a directory");
    let log = dir.path().join("no such directory").join("log");
    refused(&["127.0.0.1:1:/v", text(dir.path()), "--log-file", text(&log)], 1, &["log file", "no such directory"]);
}

#[test]
fn servers_that_do_not_answer_are_named() {
    // A port that was free a moment ago.
    let port = TcpListener::bind("127.0.0.1:0").and_then(|l| l.local_addr()).expect("a port").port();
    let dir = tempfile::tempdir().expect("a directory");
    let source = format!("127.0.0.1:{port}:/vmstore");
    std::thread::scope(|scope| {
        scope.spawn(|| refused(&[&source, text(dir.path())], 1, &["mortar-mount: "]));
        scope.spawn(|| refused(&[&source, text(dir.path()), "-f"], 1, &["mortar-mount: "]));
    });
}
