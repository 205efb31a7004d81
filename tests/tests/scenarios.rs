//! The promises of `mortar_tests::scenarios`, tried on a local file system: what it does not keep is no promise to ask of a
//! mount. The folder is `SCENARIOS_DIR`, or a temporary one; a second view of it is `SCENARIOS_SECOND`, or itself.

use std::path::{Path, PathBuf};

fn folder(variable: &str, or: &Path) -> PathBuf {
    std::env::var_os(variable).map_or_else(|| or.to_owned(), PathBuf::from)
}

#[test]
fn a_local_file_system_keeps_every_promise_about_one_mount() {
    let dir = tempfile::tempdir_in("/var/tmp").expect("a directory");
    mortar_tests::scenarios::run_one(&folder("SCENARIOS_DIR", dir.path())).unwrap_or_else(|e| panic!("{e:#}"));
}

#[test]
fn a_local_file_system_keeps_every_promise_about_two_mounts() {
    let dir = tempfile::tempdir_in("/var/tmp").expect("a directory");
    let a = folder("SCENARIOS_DIR", dir.path());
    mortar_tests::scenarios::run_two(&a, &folder("SCENARIOS_SECOND", &a)).unwrap_or_else(|e| panic!("{e:#}"));
}
