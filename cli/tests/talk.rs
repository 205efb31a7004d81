//! How `mortar` talks to servers that are down, hung, not the leader, or silent: answers within seconds, names who did not
//! answer, and never does a thing twice. The servers here say what the test wants to hear; what real ones say is tested
//! with real ones.

mod common;

use std::net::TcpListener;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
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
    /// It does not say who it is any more.
    mute: Arc<AtomicBool>,
    infos: Arc<Mutex<VolumeInfoReply>>,
    heal: Arc<Mutex<HealInfoReply>>,
    /// What it answers to `HealInfo` before it answers `heal`, last first.
    heals: Arc<Mutex<Vec<Reply<HealInfoReply>>>>,
    sent: Arc<Mutex<Vec<VolumeSetRequest>>>,
    clients: Arc<Mutex<ClientListReply>>,
    evicted: Arc<Mutex<Vec<String>>>,
    losses: Arc<Mutex<Vec<AcceptLossRequest>>>,
    replaced: Arc<Mutex<Vec<BrickReplaceRequest>>>,
}

type Reply<T> = Result<Response<T>, Status>;

#[tonic::async_trait]
impl Cluster for Scripted {
    async fn identify(&self, _: Request<Empty>) -> Reply<IdentifyReply> {
        if self.mute.load(Ordering::SeqCst) {
            std::future::pending::<()>().await;
        }
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
        if let Some(next) = self.heals.lock().unwrap().pop() {
            return next;
        }
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
    async fn accept_loss(&self, request: Request<AcceptLossRequest>) -> Reply<AcceptLossReply> {
        self.losses.lock().unwrap().push(request.into_inner());
        Ok(Response::new(AcceptLossReply { lost: vec!["Everything since noon is lost.".into()] }))
    }
    async fn heal_full(&self, _: Request<VolumeRequest>) -> Reply<Empty> {
        Ok(Response::new(Empty {}))
    }
    async fn brick_replace(&self, request: Request<BrickReplaceRequest>) -> Reply<Empty> {
        self.replaced.lock().unwrap().push(request.into_inner());
        Ok(Response::new(Empty {}))
    }
    async fn heal_start(&self, _: Request<VolumeRequest>) -> Reply<HealStartReply> {
        let row = |path: &str, awaits: &str| HealStartRow {
            server: "s1:7440".into(),
            path: path.into(),
            state: "out".into(),
            awaits: awaits.into(),
        };
        Ok(Response::new(HealStartReply { bricks: vec![row("/b1", ""), row("/b2", "it is not heard")] }))
    }
    async fn client_list(&self, _: Request<VolumeRequest>) -> Reply<ClientListReply> {
        Ok(Response::new(self.clients.lock().unwrap().clone()))
    }
    async fn client_evict(&self, request: Request<ClientEvictRequest>) -> Reply<Empty> {
        self.evicted.lock().unwrap().push(request.into_inner().session);
        Ok(Response::new(Empty {}))
    }
    async fn check_brick(&self, _: Request<CheckBrickRequest>) -> Reply<Empty> {
        Err(Status::unimplemented("not in this test"))
    }
    async fn volume_scrub(&self, _: Request<VolumeScrubRequest>) -> Reply<VolumeScrubReply> {
        Err(Status::unimplemented("not in this test"))
    }
    async fn brick_scrub(&self, _: Request<BrickScrubRequest>) -> Reply<ScrubStatus> {
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
    // One that was too slow for the last question, for which little time was left, has said so before.
    let mute = server.mute.clone();
    std::thread::spawn(move || {
        std::thread::sleep(Duration::from_millis(8500));
        mute.store(true, Ordering::SeqCst);
    });
    let (run, took) = mortar(&[&address, "127.0.0.1:1"], "volume list");
    run.expect(1, "has no leader that can be reached");
    assert!(took < Duration::from_secs(12), "{took:?}");
    server.mute.store(false, Ordering::SeqCst);
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

#[test]
fn clients_are_listed_with_what_they_hold_and_one_is_evicted_only_when_that_is_meant() {
    let server = Scripted::default();
    let address = server.serve(1);
    mortar(&[&address], "client list").0.expect(0, "No client has a volume mounted.");
    let file = SessionFile { path: "/vm1.qcow2".into(), ino: 7, open: true, lease: true };
    let row = SessionRow {
        session: "1f".into(),
        client: "h1:/mnt (process 9)".into(),
        address: "10.0.0.9".into(),
        volume: "vmstore".into(),
        heard_ms: 40,
        in_flight: 3,
        open_files: 1,
        leases: 1,
        files: vec![file],
        ..SessionRow::default()
    };
    let janitor =
        SessionRow { session: "2".into(), client: "janitor".into(), heard_ms: u32::MAX, ..SessionRow::default() };
    *server.clients.lock().unwrap() = ClientListReply { clients: vec![row, janitor] };
    let json = mortar(&[&address], "--json client list").0.json();
    assert_eq!((&json["clients"][0]["in_flight"], &json["clients"][0]["heard_ms"]), (&3.into(), &40.into()));
    assert_eq!(json["clients"][0]["files"][0]["lease"], true);
    assert_eq!((&json["clients"][1]["volume"], &json["clients"][1]["heard_ms"]), (&().into(), &().into()));
    let (plain, _) = mortar(&[&address], "client list");
    plain.expect(0, "h1:/mnt (process 9)").expect(0, "40 ms ago");
    assert!(!plain.out.contains("/vm1.qcow2"), "{}", plain.out);
    mortar(&[&address], "client list --files").0.expect(0, "/vm1.qcow2  OL");

    mortar(&[&address], "client evict 1f").0.expect(2, "say --yes if that is meant").expect(2, "1 file open, 1 lease");
    mortar(&[&address], "client evict x!").0.expect(2, "'x!' is no session");
    mortar(&[&address], "client evict 77 --yes").0.expect(1, "There is no session 77");
    assert_eq!(server.evicted.lock().unwrap().len(), 0);
    mortar(&[&address], "client evict 1F --yes").0.expect(0, "h1:/mnt (process 9) is evicted");
    assert_eq!(*server.evicted.lock().unwrap(), ["1f"]);
}

#[test]
fn heal_says_what_goes_on_and_what_waits_for_what() {
    let server = Scripted::default();
    let address = server.serve(1);
    let (run, _) = mortar(&[&address], "volume heal v");
    run.expect(0, "s1:7440:/b1 (out) comes back now").expect(0, "s1:7440:/b2 (out) waits: it is not heard");
    let json = mortar(&[&address], "--json volume heal v").0.json();
    assert_eq!(json["bricks"][0]["awaits"], serde_json::Value::Null);
    assert_eq!(json["bricks"][1]["awaits"], "it is not heard");
}

#[test]
fn watching_goes_on_until_nothing_is_left_to_heal_and_writes_plain_lines_to_a_pipe() {
    let server = Scripted::default();
    let address = server.serve(1);
    let info = |regions: u64, rate_bytes: u64, left_seconds: u32| {
        let row = BrickHealRow {
            server: "s1:7440".into(),
            path: "/b".into(),
            state: "syncing".into(),
            missed_regions: regions,
            missed_bytes: regions << 20,
            rate_bytes,
            left_seconds,
            files: vec![FileHealRow { path: "/vm1".into(), ino: 7, regions, bytes: regions << 20 }],
            corruption: None,
            compare: false,
        };
        Ok(Response::new(HealInfoReply { bricks: vec![row] }))
    };
    // The leader is lost in between: that ends no watch.
    let lost = || Err(Status::internal("the disk is on fire"));
    let script = || vec![info(1, 1 << 20, 1), lost(), info(3, 0, u32::MAX)];
    *server.heals.lock().unwrap() = script();
    let (run, took) = mortar(&[&address], "volume heal v watch");
    run.expect(0, "s1:7440:/b syncing, 3 regions (3.0 MiB) left in 1 file");
    run.expect(0, "s1:7440:/b syncing, 1 region (1.0 MiB) left in 1 file, 1.0 MiB/s, 1 s to go")
        .expect(0, "nothing to heal");
    assert!(run.err.contains("the disk is on fire") && !run.out.contains('\u{1b}'), "{} {}", run.out, run.err);
    assert!(took < Duration::from_secs(10), "{took:?}");
    *server.heals.lock().unwrap() = script();
    let (run, _) = mortar(&[&address], "--json volume heal v watch");
    let lines: Vec<serde_json::Value> = run.out.lines().map(|l| serde_json::from_str(l).unwrap()).collect();
    assert_eq!(lines.iter().map(|l| l["nothing_to_heal"] == true).collect::<Vec<_>>(), [false, false, true]);
    // The first question is answered, or there is nothing to watch.
    *server.heals.lock().unwrap() = vec![Err(Status::invalid_argument("there is no volume \"v\""))];
    mortar(&[&address], "volume heal v watch").0.expect(1, "there is no volume");
}

#[test]
fn replacing_and_resetting_a_brick_say_which_and_ask_first() {
    let server = Scripted::default();
    let address = server.serve(1);
    let said = mortar(&[&address], "volume replace-brick v s1:/b/1 s4:/b/4").0;
    said.expect(2, "say --yes if that is meant").expect(2, "s1:/b/1").expect(2, "s4:/b/4");
    mortar(&[&address], "volume replace-brick v s1:/b/1 s1:/b/1 --yes")
        .0
        .expect(2, "mortar volume reset-brick v s1:/b/1");
    mortar(&[&address], "volume reset-brick v s1").0.expect(2, "'s1' is no brick");
    mortar(&[&address], "volume reset-brick v s1:/b/1").0.expect(2, "say --yes if that is meant");
    assert_eq!(server.replaced.lock().unwrap().len(), 0);
    mortar(&[&address], "volume replace-brick v s1:/b/1 s4:/b/4 --yes").0.expect(0, "heal v watch");
    mortar(&[&address], "volume reset-brick v s1:/b/1 --yes --force").0.expect(0, "is built anew");
    mortar(&[&address], "volume heal v full").0.expect(0, "one of a replica set at a time");
    let sent = server.replaced.lock().unwrap().clone();
    let spec = |server: &str, path: &str| Some(BrickSpec { server: server.into(), path: path.into() });
    assert_eq!(
        (sent[0].old.clone(), sent[0].new.clone(), sent[0].force),
        (spec("s1", "/b/1"), spec("s4", "/b/4"), false)
    );
    assert_eq!((sent[1].old.clone(), sent[1].new.clone(), sent[1].force), (spec("s1", "/b/1"), None, true));
}

#[test]
fn accepting_a_loss_tells_what_is_lost_before_it_asks_and_plain_yes_is_no_answer() {
    let server = Scripted::default();
    let address = server.serve(1);
    let line = "volume heal v accept-data-loss s3:/b";
    let (run, _) = mortar(&[&address], line);
    run.expect(2, "Everything since noon is lost.").expect(2, "--yes-i-lose-data");
    mortar(&[&address], &format!("{line} --yes")).0.expect(2, "unexpected argument");
    assert!(server.losses.lock().unwrap().iter().all(|asked| !asked.commit));
    mortar(&[&address], &format!("{line} --yes-i-lose-data")).0.expect(0, "s3:/b is in sync now");
    let sent = server.losses.lock().unwrap().last().cloned().unwrap();
    assert_eq!((sent.commit, sent.brick), (true, Some(BrickSpec { server: "s3".into(), path: "/b".into() })));
}
