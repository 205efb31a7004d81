//! Promises of the metadata log, on several servers in one process, over loopback and real gRPC.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use mortar_brickd::bricks::Bricks;
use mortar_brickd::identity::Identity;
use mortar_brickd::log::Log;
use mortar_brickd::serve::Server;
use mortar_proto::client::control::Control;
use mortar_proto::metadata::{Command, Outcome, State};
use mortar_proto::wire::cluster::cluster_client::ClusterClient;
use mortar_proto::wire::cluster::{Empty, ServerAddRequest, ServerRemoveRequest};
use mortar_proto::wire::session::{KeepAlive, OpenRequest, session_client::SessionClient};
use tempfile::TempDir;
use tokio::net::TcpListener;
use tokio::runtime::Runtime;
use tokio_stream::StreamExt;

/// A server with a runtime of its own, so that dropping that is as abrupt as a kill.
struct Node {
    dir: PathBuf,
    address: String,
    running: Option<(Runtime, Arc<Server>)>,
}

impl Node {
    fn start(dir: &Path) -> Self {
        std::fs::create_dir_all(dir).unwrap();
        let mut node = Self { dir: dir.to_owned(), address: String::new(), running: None };
        node.restart();
        node
    }

    /// Starts it where it was before, or anywhere the first time.
    fn restart(&mut self) {
        self.kill();
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
        let (dir, address) = (self.dir.clone(), self.address.clone());
        let until = Instant::now() + Duration::from_secs(10);
        let (server, address) = runtime.block_on(async {
            let identity = Identity::load(&dir).unwrap();
            let bind = if address.is_empty() { "127.0.0.1:0".to_owned() } else { address };
            // What was killed a moment ago may still hold the port and the database.
            let listener = loop {
                match TcpListener::bind(&bind).await {
                    Ok(listener) => break listener,
                    Err(e) => assert!(Instant::now() < until, "{bind}: {e}"),
                }
                tokio::time::sleep(Duration::from_millis(50)).await;
            };
            let address = listener.local_addr().unwrap().to_string();
            let (log, applied) = loop {
                match Log::open(&dir, identity.clone(), &address).await {
                    Ok(opened) => break opened,
                    Err(e) => assert!(Instant::now() < until, "{e:#}"),
                }
                tokio::time::sleep(Duration::from_millis(50)).await;
            };
            let bricks = Bricks::open(log.clone(), applied, &dir).unwrap();
            let server = Server::new(log, bricks, address.clone(), dir.clone());
            let serving = server.clone();
            tokio::spawn(async move { serving.serve(listener).await });
            (server, address)
        });
        self.address = address;
        self.running = Some((runtime, server));
    }

    fn kill(&mut self) {
        if let Some((runtime, server)) = self.running.take() {
            let raft = server.log.clone();
            runtime.block_on(async move { raft.stop().await });
            drop(server);
            runtime.shutdown_timeout(Duration::from_secs(5));
        }
    }

    fn server(&self) -> &Arc<Server> {
        &self.running.as_ref().expect("it runs").1
    }

    fn log(&self) -> &Log {
        &self.server().log
    }

    /// Does what the daemon's main does when the server joins another cluster: starts anew.
    fn restart_when_asked(&mut self) {
        let (runtime, server) = self.running.as_ref().expect("it runs");
        let asked =
            runtime.block_on(async { tokio::time::timeout(Duration::from_secs(10), server.restart.notified()).await });
        asked.expect("it was asked to join");
        self.restart();
    }

    fn state(&self) -> State {
        self.log().with_state(State::clone)
    }
}

fn until<T>(what: &str, mut look: impl FnMut() -> Option<T>) -> T {
    let end = Instant::now() + Duration::from_secs(20);
    loop {
        if let Some(found) = look() {
            return found;
        }
        assert!(Instant::now() < end, "not within 20 s: {what}");
        std::thread::sleep(Duration::from_millis(20));
    }
}

fn client() -> Runtime {
    tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap()
}

fn add(nodes: &[&Node], address: &str) -> Result<(), tonic::Status> {
    let control = Control::new(nodes.iter().map(|n| n.address.clone()).collect());
    client().block_on(control.call(Duration::from_secs(10), |channel| async move {
        let request = ServerAddRequest { address: address.to_owned() };
        ClusterClient::new(channel).server_add(request).await.map(|_| ())
    }))
}

fn remove(nodes: &[&Node], address: &str) -> Result<(), tonic::Status> {
    let control = Control::new(nodes.iter().map(|n| n.address.clone()).collect());
    client().block_on(control.call(Duration::from_secs(10), |channel| async move {
        let request = ServerRemoveRequest { server: address.to_owned() };
        ClusterClient::new(channel).server_remove(request).await.map(|_| ())
    }))
}

fn leader(nodes: &[&Node]) -> usize {
    until("a leader", || {
        nodes.iter().position(|n| {
            n.running.is_some() && n.log().is_leader() && n.log().leader() == Some(n.log().identity().server)
        })
    })
}

/// Opens a session: a command that draws a number, so applying it twice shows.
fn open_session(node: &Node, nonce: u128) -> Outcome {
    let command =
        Command::SessionOpen { nonce, volume: String::new(), client: format!("test {nonce}"), address: "::1".into() };
    let (runtime, server) = node.running.as_ref().expect("it runs");
    runtime.block_on(server.log.propose(command, None)).unwrap()
}

/// A cluster of `count` in which all vote.
fn cluster(dir: &TempDir, count: usize) -> Vec<Node> {
    let mut nodes: Vec<Node> = (0..count).map(|i| Node::start(&dir.path().join(i.to_string()))).collect();
    leader(&[&nodes[0]]);
    for i in 1..count {
        let (first, joining) = nodes.split_at_mut(i);
        let address = joining[0].address.clone();
        // It is answered when the new server has been heard, which starts anew to join.
        std::thread::scope(|scope| {
            let added = scope.spawn(|| add(&[&first[0]], &address));
            joining[0].restart_when_asked();
            added.join().unwrap().unwrap();
        });
    }
    until("all vote", || (nodes[0].log().voters().len() == count).then_some(()));
    nodes
}

fn caught_up(nodes: &[&Node]) {
    until("all have applied the same", || {
        let applied: Vec<_> = nodes.iter().map(|n| n.log().applied()).collect();
        applied.iter().all(|a| *a == applied[0]).then_some(())
    });
}

#[test]
fn servers_that_were_added_vote_and_have_the_same_state() {
    let dir = tempfile::tempdir().unwrap();
    let nodes = cluster(&dir, 3);
    for nonce in 1..=20 {
        assert!(matches!(open_session(&nodes[0], nonce), Outcome::Session { .. }));
    }
    let all: Vec<&Node> = nodes.iter().collect();
    caught_up(&all);
    assert_eq!(nodes[1].state(), nodes[0].state());
    assert_eq!(nodes[2].state(), nodes[0].state());
    assert_eq!(nodes[0].state().servers.len(), 3);
}

#[test]
fn a_dead_leader_is_replaced_and_nothing_that_was_answered_is_lost() {
    let dir = tempfile::tempdir().unwrap();
    let mut nodes = cluster(&dir, 3);
    let first = leader(&nodes.iter().collect::<Vec<_>>());
    open_session(&nodes[first], 7);
    nodes[first].kill();
    let began = Instant::now();
    let second = leader(&nodes.iter().collect::<Vec<_>>());
    eprintln!("a new leader after {:?}", began.elapsed());
    assert!(began.elapsed() < Duration::from_secs(10));
    open_session(&nodes[second], 8);
    let nonces: Vec<u128> = nodes[second].state().sessions.values().map(|s| s.nonce).collect();
    assert_eq!(nonces, [7, 8]);
    nodes[first].restart();
    until("the old leader follows", || (nodes[first].state() == nodes[second].state()).then_some(()));
}

#[test]
fn after_all_were_stopped_the_state_is_the_same_again() {
    let dir = tempfile::tempdir().unwrap();
    let mut nodes = cluster(&dir, 3);
    for nonce in 1..=5 {
        open_session(&nodes[0], nonce);
    }
    caught_up(&nodes.iter().collect::<Vec<_>>());
    let before = nodes[0].state();
    nodes.iter_mut().for_each(Node::kill);
    nodes.iter_mut().for_each(Node::restart);
    let now = leader(&nodes.iter().collect::<Vec<_>>());
    until("the state", || (nodes[now].state().sessions == before.sessions).then_some(()));
    assert_eq!(nodes[now].state().servers, before.servers);
}

#[test]
fn only_a_fresh_server_is_absorbed() {
    let dir = tempfile::tempdir().unwrap();
    let ours = cluster(&dir, 2);
    let other_dir = tempfile::tempdir().unwrap();
    let others = cluster(&other_dir, 2);
    let refused = add(&[&ours[0]], &others[1].address).unwrap_err();
    assert!(refused.message().contains("belongs to another cluster"), "{refused}");
    let refused = add(&[&ours[0]], &ours[1].address).unwrap_err();
    assert!(refused.message().contains("in this cluster already"), "{refused}");
}

#[test]
fn a_server_that_was_removed_counts_no_more() {
    let dir = tempfile::tempdir().unwrap();
    let mut nodes = cluster(&dir, 3);
    let gone = nodes[2].address.clone();
    remove(&[&nodes[0]], &gone).unwrap();
    until("two voters", || (nodes[0].log().voters().len() == 2).then_some(()));
    nodes[2].kill();
    open_session(&nodes[leader(&[&nodes[0], &nodes[1]])], 1);
    assert_eq!(nodes[0].state().servers.len(), 2);
}

#[test]
fn the_first_server_is_named_before_anybody_can_be_added() {
    let dir = tempfile::tempdir().unwrap();
    let node = Node::start(dir.path());
    let known: Vec<String> = node.state().servers.values().map(|s| s.address.clone()).collect();
    assert_eq!(known, std::slice::from_ref(&node.address));
}

#[test]
fn a_leader_can_be_removed_and_stays_out() {
    let dir = tempfile::tempdir().unwrap();
    let nodes = cluster(&dir, 3);
    let all: Vec<&Node> = nodes.iter().collect();
    let first = leader(&all);
    remove(&all, &nodes[first].address).unwrap();
    let rest: Vec<&Node> = all.iter().enumerate().filter(|(i, _)| *i != first).map(|(_, n)| *n).collect();
    let next = leader(&rest);
    until("two voters", || (rest[next].log().voters().len() == 2).then_some(()));
    // Longer than it takes a leader to tell of itself.
    std::thread::sleep(Duration::from_secs(1));
    assert!(!rest[next].state().servers.contains_key(&nodes[first].log().identity().server));
    open_session(rest[leader(&rest)], 1);
}

#[test]
fn any_server_answers_for_itself() {
    let dir = tempfile::tempdir().unwrap();
    let nodes = cluster(&dir, 2);
    for node in &nodes {
        until("it knows both servers", || {
            let control = Control::new(vec![node.address.clone()]);
            let reply = client().block_on(async {
                let channel = control.channel(&node.address)?;
                ClusterClient::new(channel).identify(Empty {}).await
            });
            (reply.unwrap().into_inner().servers == 2).then_some(())
        });
    }
}

#[test]
fn a_server_that_lost_its_disk_is_not_drawn_into_the_quorum_by_its_old_address() {
    let dir = tempfile::tempdir().unwrap();
    let mut nodes = cluster(&dir, 3);
    let cluster = nodes[0].log().identity().cluster;
    nodes[2].kill();
    std::fs::remove_dir_all(&nodes[2].dir).unwrap();
    std::fs::create_dir_all(&nodes[2].dir).unwrap();
    nodes[2].restart();
    let fresh = nodes[2].log().identity().clone();
    assert_ne!(fresh.cluster, cluster);
    let now = leader(&[&nodes[0], &nodes[1]]);
    for nonce in 1..=10 {
        open_session(&nodes[now], nonce);
    }
    std::thread::sleep(Duration::from_secs(2));
    let state = nodes[2].state();
    assert!(state.sessions.is_empty(), "it applied entries of a cluster that it does not belong to");
    assert_eq!(state.servers.keys().copied().collect::<Vec<_>>(), [fresh.server]);
    assert!(nodes[2].log().is_leader(), "it is a cluster of one");
}

#[test]
fn the_session_that_has_every_volume_is_for_the_servers_own_machine() {
    let dir = TempDir::new().unwrap();
    let node = Node::start(&dir.path().join("a"));
    until("a leader", || node.log().is_leader().then_some(()));
    let open = |from: &str| {
        let from = from.parse().unwrap();
        let endpoint = tonic::transport::Endpoint::from_shared(format!("http://{}", node.address)).unwrap();
        client().block_on(async move {
            let channel = endpoint.local_address(Some(from)).connect().await.unwrap();
            let request =
                OpenRequest { nonce: vec![7; 16].into(), volume: String::new(), client: "test".into(), previous: 0 };
            SessionClient::new(channel).open(request).await.map(|_| ())
        })
    };
    until("the leader takes its own", || open("127.0.0.1").ok());
    // Nobody else's either; whom it refuses is tried in `serve/session.rs`, for here all addresses are this machine's.
    until("the leader takes its own by another name", || open("127.0.0.2").ok());
}

#[test]
fn a_client_that_listens_to_a_leader_hears_that_it_was_elected_anew() {
    let dir = tempfile::tempdir().unwrap();
    let nodes = cluster(&dir, 3);
    let all: Vec<&Node> = nodes.iter().collect();
    let first = leader(&all);
    let Outcome::Session { session, .. } = open_session(all[first], 7) else { panic!("no session") };
    let client = client();
    let mut events = client.block_on(async {
        let channel = Control::new(Vec::new()).channel(&all[first].address).unwrap();
        // One keep-alive and then no more: the stream must not need another to end.
        let beats = tokio_stream::iter([KeepAlive { session: session.0, ..KeepAlive::default() }])
            .chain(tokio_stream::pending());
        SessionClient::new(channel).watch(beats).await.unwrap().into_inner()
    });
    let elect = |number: usize| {
        let (runtime, server) = all[number].running.as_ref().expect("it runs");
        until("it leads", || {
            runtime.block_on(server.log.stand_for_election()).unwrap();
            std::thread::sleep(Duration::from_millis(300));
            (leader(&all) == number).then_some(())
        });
    };
    elect((first + 1) % 3);
    elect(first);
    let end = client.block_on(async {
        tokio::time::timeout(Duration::from_secs(10), async { while let Ok(Some(_)) = events.message().await {} }).await
    });
    assert!(end.is_ok(), "the stream is still open, and nobody tells it anything");
}
