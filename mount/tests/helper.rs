//! `mount.mortar`, as mount(8) calls it: what reaches `mortar-mount`, and what never does.

use std::os::unix::fs::PermissionsExt;
use std::process::{Command, Output};

const HELPER: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../packaging/mount.mortar");

/// Runs the helper with a `mortar-mount` that prints its arguments, one a line.
fn run(arguments: &[&str]) -> Output {
    let dir = tempfile::tempdir().expect("a directory");
    let program = dir.path().join("mortar-mount");
    std::fs::write(&program, "#!/bin/sh\nprintf '%s\\n' \"$@\"\n").expect("a program");
    std::fs::set_permissions(&program, PermissionsExt::from_mode(0o755)).expect("a mode");
    let path = format!("{}:/usr/bin:/bin", dir.path().display());
    Command::new("sh").arg(HELPER).args(arguments).env("PATH", path).output().expect("the helper starts")
}

#[track_caller]
fn passes(arguments: &[&str], expected: &[&str]) {
    let output = run(arguments);
    let passed = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    assert_eq!(passed.lines().collect::<Vec<_>>(), expected);
}

#[test]
fn source_path_and_options_are_passed_on() {
    passes(&["s1,s2:/v", "/mnt"], &["s1,s2:/v", "/mnt"]);
    passes(
        &["s1:/v", "/a path", "-n", "-o", "rw,_netdev,context=\"a:b:c:s0:c1,c2\"", "-t", "mortar"],
        &["s1:/v", "/a path", "-o", "rw,_netdev,context=\"a:b:c:s0:c1,c2\""],
    );
    passes(&["s1:/v", "/mnt", "-r", "-s", "-o", "noatime"], &["s1:/v", "/mnt", "-o", "ro,noatime"]);
}

#[test]
fn a_fake_mount_does_nothing_and_is_not_taken_for_the_foreground() {
    passes(&["s1:/v", "/mnt", "-f"], &[]);
}

#[test]
fn what_it_does_not_know_is_refused() {
    for arguments in
        [&["s1:/v"][..], &["s1:/v", "/mnt", "-q"], &["s1:/v", "/mnt", "-N", "7"], &["s1:/v", "/mnt", "more"]]
    {
        let output = run(arguments);
        assert_eq!(output.status.code(), Some(1), "{arguments:?}");
        assert!(output.stdout.is_empty() && output.stderr.starts_with(b"mount.mortar: "), "{arguments:?}");
    }
}
