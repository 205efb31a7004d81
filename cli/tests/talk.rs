//! How `mortar` talks to servers that are down, hung, not the leader, or silent: answers within seconds, names who did not
//! answer, and never does a thing twice. The servers here say what the test wants to hear; what real ones say is tested
//! with real ones.

mod common;

use std::net::TcpListener;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use common::Run;
use mortar_proto::wire::cluster::cluster_server::{Cluster, ClusterServer};
use mortar_proto::wire::cluster::*;
use tonic::{Code, Request, Response, Status};

/// A server of the tests: what it says, and how often it was asked to start a volume.
#[derive(Clone, Default)]
struct Scripted {
    identity: Arc<Mutex<IdentifyReply>>,
    starts: Arc<AtomicU32>,
    /// What it answers to `VolumeStart`; `None`: done.
    refusal: Arc<Mutex<Option<Status>>>,
    /// It takes that long for `VolumeStart`.
    slow: Option<Duration>,
    /// It dies of `VolumeStart`.
    dies: bool,
    death: Arc<tokio::sync::Notify>,
    infos: Arc<Mutex<VolumeInfoReply>>,
    heal: Arc<Mutex<HealInfoReply>>,
    sent: Arc<Mutex<Vec<VolumeSetRequest>>>,
}

type Reply<T> = Result<Response<T>, Status>;

#[tonic::async_trait]
impl Cluster for Scripted {
    async fn identify(&self, _: Request<Empty>) -> Reply<IdentifyReply> {
        Ok(Response::new(self.identity.lock().unwrap().clone()))
    }
    async fn volume_start(&self, _: Request<VolumeRequest>) -> Reply<Empty> {
        self.starts.fetch_add(1, Ordering::SeqCst);
        if self.dies {
            self.death.notify_one();
            std::future::pending::<()>().await;
        }
        if let Some(slow) = self.slow {
            tokio::time::sleep(slow).await;
        }
        match &*self.refusal.lock().unwrap() {
            Some(status) => Err(status.clone()),
            None => Ok(Response::new(Empty {})),
        }
    }
    async fn volume_info(&self, _: Request<VolumeRequest>) -> Reply<VolumeInfoReply> {
        Ok(Response::new(self.infos.lock().unwrap().clone()))
    }
    async fn heal_info(&self, _: Request<VolumeRequest>) -> Reply<HealInfoReply> {
        Ok(Response::new(self.heal.lock().unwrap().clone()))
    }
    async fn volume_set(&self, request: Request<VolumeSetRequest>) -> Reply<Empty> {
        self.sent.lock().unwrap().push(request.into_inner());
        Ok(Response::new(Empty {}))
    }
    async fn server_list(&self, _: Request<Empty>) -> Reply<ServerListReply> {
        let row = |address: &str, heard_ms| ServerRow {
            id: "a1".into(),
            address: address.into(),
            role: "voter".into(),
            heard_ms,
            ..ServerRow::default()
        };
        let servers = vec![row("s1:7440", 40), row("s2:7440", u32::MAX)];
        Ok(Response::new(ServerListReply { cluster: "c1".into(), servers }))
    }
    async fn server_add(&self, _: Request<ServerAddRequest>) -> Reply<ServerAddReply> {
        Err(Status::unimplemented("not in this test"))
    }
    async fn server_remove(&self, _: Request<ServerRemoveRequest>) -> Reply<Empty> {
        Err(Status::unimplemented("not in this test"))
    }
    async fn volume_create(&self, _: Request<VolumeCreateRequest>) -> Reply<Empty> {
        Err(Status::unimplemented("not in this test"))
    }
    async fn volume_stop(&self, _: Request<VolumeRequest>) -> Reply<Empty> {
        Err(Status::unimplemented("not in this test"))
    }
    async fn volume_delete(&self, _: Request<VolumeRequest>) -> Reply<Empty> {
        Err(Status::unimplemented("not in this test"))
    }
    async fn volume_status(&self, _: Request<VolumeRequest>) -> Reply<VolumeStatusReply> {
        Err(Status::unimplemented("not in this test"))
    }
    async fn check_brick(&self, _: Request<CheckBrickRequest>) -> Reply<Empty> {
        Err(Status::unimplemented("not in this test"))
    }
    async fn brick_heal(&self, _: Request<BrickHealRequest>) -> Reply<BrickHealReply> {
        Err(Status::unimplemented("not in this test"))
    }
}

impl Scripted {
    /// Serves until the test ends; returns its address. It says that it leads a cluster of `servers`.
    fn serve(&self, servers: u32) -> String {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap().to_string();
        listener.set_nonblocking(true).unwrap();
        *self.identity.lock().unwrap() =
            IdentifyReply { address: address.clone(), leader: address.clone(), servers, ..IdentifyReply::default() };
        let service = ClusterServer::new(self.clone());
        let death = self.death.clone();
        std::thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
            runtime.block_on(async {
                let listener = tokio::net::TcpListener::from_std(listener).unwrap();
                let incoming = tonic::transport::server::TcpIncoming::from(listener);
                let serving = tonic::transport::Server::builder().add_service(service).serve_with_incoming(incoming);
                tokio::select! {
                    served = serving => served.unwrap(),
                    () = death.notified() => {}
                }
            });
            // With the runtime go its connections, in the middle of whatever they were saying.
        });
        address
    }

    fn says_leader(&self, leader: &str) {
        self.identity.lock().unwrap().leader = leader.to_owned();
    }

    fn starts(&self) -> u32 {
        self.starts.load(Ordering::SeqCst)
    }
}

/// An address that accepts connections and never says a word, as a stopped process does.
fn hung() -> (TcpListener, String) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap().to_string();
    (listener, address)
}

/// Runs `mortar --server …`, and tells how long it took.
fn mortar(servers: &[&str], line: &str) -> (Run, Duration) {
    let begun = Instant::now();
    let run = common::mortar(&format!("--server {} {line}", servers.join(",")));
    (run, begun.elapsed())
}

#[test]
fn when_no_server_answers_each_is_named_with_its_reason_within_seconds() {
    let (_listener, hung) = hung();
    let (run, took) = mortar(&["127.0.0.1:1", &hung], "volume list");
    run.expect(1, "127.0.0.1:1: refused the connection").expect(1, &format!("{hung}: did not answer within 3 s"));
    assert!(took < Duration::from_secs(6), "{took:?}");
}

#[test]
fn a_port_where_something_else_listens_is_told() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap().to_string();
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            drop(stream);
        }
    });
    mortar(&[&address], "volume list").0.expect(1, &address);
}

#[test]
fn servers_that_are_down_or_hung_do_not_hold_up_the_command() {
    let server = Scripted::default();
    let address = server.serve(3);
    let (_listener, hung) = hung();
    let (run, took) = mortar(&["127.0.0.1:1", &hung, &address], "volume start v");
    run.expect(0, "Volume v is started");
    assert!(took < Duration::from_secs(3), "{took:?}");
    assert_eq!(server.starts(), 1);
}

#[test]
fn a_server_that_is_not_the_leader_leads_to_it() {
    let (follower, leader) = (Scripted::default(), Scripted::default());
    let (address, leader_address) = (follower.serve(3), leader.serve(3));
    follower.says_leader(&leader_address);
    mortar(&[&address], "volume start v").0.expect(0, "started");
    assert_eq!((follower.starts(), leader.starts()), (0, 1));
}

#[test]
fn a_server_that_has_just_lost_the_lead_is_not_taken_for_a_refusal() {
    let server = Scripted::default();
    let address = server.serve(3);
    let mut status = Status::new(Code::FailedPrecondition, "not the leader");
    status.metadata_mut().insert("mortar-leader", address.parse().unwrap());
    *server.refusal.lock().unwrap() = Some(status);
    let again = server.refusal.clone();
    std::thread::spawn(move || {
        std::thread::sleep(Duration::from_secs(1));
        *again.lock().unwrap() = None;
    });
    mortar(&[&address], "volume start v").0.expect(0, "started");
    assert!(server.starts() >= 2);
}

#[test]
fn a_cluster_without_a_leader_is_told_so_within_the_time() {
    let server = Scripted::default();
    let address = server.serve(3);
    server.says_leader("");
    let (run, took) = mortar(&[&address, "127.0.0.1:1"], "volume list");
    run.expect(1, "has no leader that can be reached").expect(1, "127.0.0.1:1: refused the connection");
    assert!(took < Duration::from_secs(12), "{took:?}");
    // But each server can be asked who it is.
    let (run, _) = mortar(&[&address, "127.0.0.1:1"], "server status");
    run.expect(0, "none").expect(0, "no: refused the connection");
}

#[test]
fn a_fresh_server_that_is_named_too_is_not_taken_for_the_cluster() {
    let (fresh, cluster) = (Scripted::default(), Scripted::default());
    let (fresh_address, cluster_address) = (fresh.serve(1), cluster.serve(3));
    mortar(&[&fresh_address, &cluster_address], "volume start v").0.expect(0, "started");
    assert_eq!((fresh.starts(), cluster.starts()), (0, 1));
}

#[test]
fn a_refusal_is_shown_as_the_server_put_it() {
    let server = Scripted::default();
    let address = server.serve(3);
    *server.refusal.lock().unwrap() = Some(Status::failed_precondition("Volume 'v' is started already."));
    mortar(&[&address], "volume start v").0.expect(1, "mortar: Volume 'v' is started already.");
    assert_eq!(server.starts(), 1);
}

#[test]
fn a_change_whose_answer_is_lost_is_not_sent_again() {
    let server = Scripted { slow: Some(Duration::from_secs(60)), ..Scripted::default() };
    let address = server.serve(3);
    let (run, took) = mortar(&[&address], "volume start v");
    run.expect(1, "It may or may not have been done");
    assert!(took < Duration::from_secs(12), "{took:?}");
    assert_eq!(server.starts(), 1);
}

#[test]
fn a_change_during_which_the_server_dies_is_not_sent_to_another() {
    let (dying, other) = (Scripted { dies: true, ..Scripted::default() }, Scripted::default());
    let (dying_address, other_address) = (dying.serve(3), other.serve(3));
    let (run, took) = mortar(&[&dying_address, &other_address], "volume start v");
    run.expect(1, "the connection broke before it answered").expect(1, "It may or may not have been done");
    assert!(took < Duration::from_secs(3), "{took:?}");
    assert_eq!((dying.starts(), other.starts()), (1, 0));
}

#[test]
fn json_has_stable_names_and_null_for_what_is_not_known() {
    let server = Scripted::default();
    let address = server.serve(1);
    let brick = BrickRow {
        server: "s1:7440".into(),
        path: "/b".into(),
        state: "in-sync".into(),
        reachable: true,
        ..BrickRow::default()
    };
    *server.infos.lock().unwrap() = VolumeInfoReply {
        volumes: vec![VolumeRow {
            name: "v".into(),
            id: "1".into(),
            started: true,
            replica: 3,
            bricks: vec![brick],
            ..VolumeRow::default()
        }],
    };
    let json = |line: &str| mortar(&[&address], &format!("--json {line}")).0.json();
    let volume = &json("volume info v")["volumes"][0];
    assert_eq!((&volume["name"], &volume["sets"]), (&"v".into(), &1.into()));
    assert_eq!(volume["bricks"][0]["state"], "in-sync");
    assert_eq!(volume["bricks"][0]["failed"], serde_json::Value::Null);
    assert_eq!(json("volume list")["volumes"][0]["bricks_in_sync"], 1);
    let servers = json("server list");
    assert_eq!(servers["servers"][0]["heard_ms"], 40);
    assert_eq!(servers["servers"][1]["heard_ms"], serde_json::Value::Null);
    assert_eq!(json("volume start v")["done"], "volume started");
    assert_eq!(json("server status")["servers"][0]["answers"], true);
    assert_eq!(json("volume heal v info")["nothing_to_heal"], true);
    let options = json("volume get v");
    assert!(options["options"].as_array().unwrap().iter().all(|option| option["set"] == false));
}

#[test]
fn tables_show_what_the_servers_say() {
    let server = Scripted::default();
    let address = server.serve(1);
    mortar(&[&address], "volume list").0.expect(0, "There is no volume.");
    mortar(&[&address], "server list").0.expect(0, "never").expect(0, "40 ms ago");
    mortar(&[&address], "volume heal v info").0.expect(0, "nothing to heal");
    mortar(&[&address], "volume get v").0.expect(1, "There is no volume 'v'.");
    mortar(&[&address], "server remove s9").0.expect(1, "Its servers are: s1:7440, s2:7440.");
}

#[test]
fn set_and_reset_send_what_was_written() {
    let server = Scripted::default();
    let address = server.serve(1);
    mortar(&[&address], "volume set v auth.allow 10.0.0.0/8").0.expect(0, "auth.allow of volume v is now 10.0.0.0/8");
    mortar(&[&address], "volume reset v auth.allow").0.expect(0, "again");
    let sent = server.sent.lock().unwrap().clone();
    assert_eq!((sent[0].key.as_str(), sent[0].value.as_str(), sent[0].reset), ("auth.allow", "10.0.0.0/8", false));
    assert!(sent[1].reset);
}
