//! What `mortar` refuses by itself, before anything is sent: each with its own sentence and with exit code 2.

mod common;

use common::{command, mortar};

/// Nobody listens there: a command that got past its checks would say so, with exit code 1.
const NOWHERE: &str = "--server 127.0.0.1:1";

#[test]
fn volume_create_refuses_each_mistake_with_its_own_sentence() {
    for (words, sentence) in [
        ("-x replica 3 a:/1 b:/2 c:/3", "unexpected argument"),
        (".v replica 3 a:/1 b:/2 c:/3", "\".v\" is no name for a volume"),
        ("v/w replica 3 a:/1 b:/2 c:/3", "\"v/w\" is no name for a volume"),
        (
            "vvvvvvvvvvvvvvvvvvvvvvvvvvvvvvvvvvvvvvvvvvvvvvvvvvvvvvvvvvvvvvvvv replica 3 a:/1 b:/2 c:/3",
            "use 1 to 63 letters",
        ),
        ("v", "The word 'replica' and the bricks are missing"),
        ("v a:/1 b:/2 c:/3", "the word 'replica' must follow, not 'a:/1'"),
        ("v replica", "The number after 'replica' and the bricks are missing"),
        ("v replica a:/1 b:/2 c:/3", "the number 3 must follow, not 'a:/1'"),
        ("v replica 2 a:/1 b:/2", "Replica 2 is not possible"),
        ("v replica 5 a:/1 b:/2 c:/3", "Replica 5 is not possible"),
        ("v replica 3", "No brick is given"),
        ("v replica 3 a:/1 b:/2", "2 bricks are given, but a replica set has 3"),
        ("v replica 3 a:/1 b:/2 c:/3 d:/4", "4 bricks are given, which is no multiple of 3"),
        ("v replica 3 a:1 b:/2 c:/3", "'a:1' is no brick"),
        ("v replica 3 a b:/2 c:/3", "'a' is no brick"),
        ("v replica 3 a:bricks/b1 b:/2 c:/3", "is not absolute"),
        ("v replica 3 127.0.0.1:7441:bricks b:/2 c:/3", "is not absolute"),
        ("v replica 3 a:/x/../y b:/2 c:/3", "has '..' in it"),
        ("v replica 3 a:/ b:/2 c:/3", "is the root directory"),
        ("v replica 3 ::1:/1 b:/2 c:/3", "IPv6 address in brackets"),
        ("v replica 3 a:0:/1 b:/2 c:/3", "the port must be"),
        ("v replica 3 :/1 b:/2 c:/3", "the host is missing"),
        ("v replica 3 a:/1 a:/2 c:/3", "Server a:7440 is named twice in replica set 1"),
        ("v replica 3 a:/1 b:/1 c:/1 a:/2 b:/2 b:7440:/3", "Server b:7440 is named twice in replica set 2"),
        ("v replica 3 a:/1 a:/1 c:/3 --force", "Brick a:7440:/1 is named twice"),
        ("v replica 3 a:/1 a:/1/in c:/3 --force", "lies inside brick a:7440:/1"),
    ] {
        mortar(&format!("{NOWHERE} volume create {words}")).expect(2, sentence);
    }
}

#[test]
fn a_right_volume_create_gets_past_the_checks() {
    for words in [
        "v replica 3 a:/1 b:/2 c:/3",
        "v replica 3 a:/1 a:/2 a:/3 --force",
        "v-1.x replica 3 [::1]:7441:/1 127.0.0.1:/2 c:7442:/3",
        "v --force replica 3 a:/1 b:/1 c:/1 a:/2 b:/2 c:/2",
    ] {
        mortar(&format!("{NOWHERE} volume create {words}")).expect(1, "No server answered");
    }
}

#[test]
fn options_are_checked_before_anything_is_sent() {
    mortar(&format!("{NOWHERE} volume set v io-timout 1s")).expect(2, "the nearest is \"io-timeout\"");
    mortar(&format!("{NOWHERE} volume set v auth.alow 1.2.3.4")).expect(2, "the nearest is \"auth.allow\"");
    mortar(&format!("{NOWHERE} volume reset v repair.rat")).expect(2, "the nearest is \"repair.rate\"");
    mortar(&format!("{NOWHERE} volume get v read-leas")).expect(2, "the nearest is \"read-lease\"");
    mortar(&format!("{NOWHERE} volume set v zzzzzz 1")).expect(2, "there is no option \"zzzzzz\"");
    mortar(&format!("{NOWHERE} volume set v io-timeout soon"))
        .expect(2, "\"soon\" for option io-timeout is not of its type");
    mortar(&format!("{NOWHERE} volume set v storage.owner-uid -5")).expect(2, "\"-5\" for option");
    mortar(&format!("{NOWHERE} volume set v auth.allow 10.0.0.0/99")).expect(2, "10.0.0.0/99");
}

#[test]
fn what_cannot_be_undone_is_not_done_without_an_answer() {
    for verb in ["stop", "delete"] {
        mortar(&format!("{NOWHERE} volume {verb} v")).expect(2, "say --yes if that is meant");
        mortar(&format!("{NOWHERE} volume {verb} v --yes")).expect(1, "No server answered");
    }
}

#[test]
fn names_are_checked_by_every_command_that_takes_one() {
    for words in ["start", "stop --yes", "delete --yes", "info", "status", "get"] {
        mortar(&format!("{NOWHERE} volume {words} a/b")).expect(2, "\"a/b\" is no name for a volume");
    }
    mortar(&format!("{NOWHERE} volume heal a/b info")).expect(2, "\"a/b\" is no name for a volume");
    mortar(&format!("{NOWHERE} volume set a/b io-timeout 1")).expect(2, "\"a/b\" is no name for a volume");
}

#[test]
fn server_addresses_are_checked() {
    mortar(&format!("{NOWHERE} server add ::1")).expect(2, "in brackets");
    mortar(&format!("{NOWHERE} server add s1 s1:7440")).expect(2, "Server s1:7440 is named twice");
    mortar(&format!("{NOWHERE} server add")).expect(2, "required");
    mortar("--server s1:x server list").expect(2, "--server: 's1:x' is no server address");
    mortar("--server , server list").expect(2, "names no server");
}

#[test]
fn a_wrong_call_ends_with_two() {
    for line in [
        "",
        "volume",
        "volume frobnicate",
        "server",
        "volume list --nonsense",
        "volume heal",
        "volume heal v frobnicate",
        "completions nosuchshell",
    ] {
        assert_eq!(mortar(line).code, 2, "{line}");
    }
}

#[test]
fn every_command_has_a_help_that_names_what_it_takes() {
    for (line, part) in [
        ("", "Exit codes: 0 done"),
        ("server", "Take fresh servers into the cluster"),
        ("server add", "Examples:"),
        ("server remove", "Example:"),
        ("server list", "leader"),
        ("server status", "3 s to answer"),
        ("volume", "three a replica set"),
        ("volume create", "mortar volume create vmstore replica 3"),
        ("volume start", "Example:"),
        ("volume stop", "--yes"),
        ("volume delete", "files stay on the bricks"),
        ("volume list", "--json"),
        ("volume info", "[NAME]"),
        ("volume status", "[NAME]"),
        ("volume set", "auth.allow 10.0.0.0/24"),
        ("volume get", "[KEY]"),
        ("volume reset", "<KEY>"),
        ("volume options", "default, range, meaning"),
        ("volume heal", "mortar volume heal vmstore info"),
        ("playground", "SIGSTOP"),
        ("playground up", "--brick-size"),
        ("playground status", "--dir"),
        ("playground down", "one that failed"),
        ("playground kill", "--clean"),
        ("playground stop", "SIGSTOP"),
        ("playground cont", "SIGCONT"),
        ("playground start", "old address"),
        ("completions", "bash"),
    ] {
        mortar(&format!("{line} --help")).expect(0, part);
    }
}

#[test]
fn completions_are_printed_for_every_common_shell() {
    for (shell, part) in [("bash", "complete -F"), ("zsh", "#compdef mortar"), ("fish", "complete -c mortar")] {
        mortar(&format!("completions {shell}")).expect(0, part);
    }
}

#[test]
fn the_options_are_listed_without_any_server() {
    let keys = [
        "storage.owner-uid",
        "storage.owner-gid",
        "storage.reserve",
        "auth.allow",
        "io-timeout",
        "read-lease",
        "session-ttl",
        "no-quorum",
        "repair.rate",
    ];
    let text = mortar("volume options");
    let json = mortar("--json volume options").json();
    let options = json["options"].as_array().expect("a list");
    for key in keys {
        text.expect(0, key);
        let option = options.iter().find(|option| option["key"] == key).unwrap_or_else(|| panic!("{key} is missing"));
        for field in ["default", "range", "meaning"] {
            assert!(option[field].is_string(), "{key} has no {field}");
        }
    }
}

#[test]
fn nothing_is_coloured_when_the_output_is_no_terminal() {
    for line in ["volume options", "--help"] {
        assert!(!mortar(line).out.contains('\u{1b}'), "{line}");
    }
}

#[test]
fn failures_are_json_too_when_that_is_asked_for() {
    let run = mortar("--json volume stop v");
    assert_eq!(run.code, 2);
    assert_eq!(run.out, "");
    let error: serde_json::Value = serde_json::from_str(&run.err).expect("JSON on standard error");
    assert_eq!(error["exit_code"], 2);
    assert!(error["error"].as_str().expect("a sentence").contains("--yes"));
}

#[test]
fn servers_come_from_the_option_then_the_environment_then_the_file() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("cli.toml");
    std::fs::write(&file, "servers = [\"127.0.0.1:3\"]\n").unwrap();
    let run = |option: bool, environment: bool| -> common::Run {
        let mut command =
            command(if option { &["--server", "127.0.0.1:1", "volume", "list"] } else { &["volume", "list"] });
        if environment {
            command.env("MORTAR_SERVERS", "127.0.0.1:2");
        }
        command.env("MORTAR_CLI_CONFIG", &file).output().unwrap().into()
    };
    run(true, true).expect(1, "(named by --server): 127.0.0.1:1:");
    run(false, true).expect(1, "(named by MORTAR_SERVERS): 127.0.0.1:2:");
    run(false, false).expect(1, "cli.toml): 127.0.0.1:3:");

    std::fs::write(&file, "server = 1\n").unwrap();
    run(false, false).expect(1, "must read: servers =");
    std::fs::remove_file(&file).unwrap();
    run(false, false).expect(1, "cannot read");
}
