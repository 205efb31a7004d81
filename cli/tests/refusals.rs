//! What real servers refuse: each refusal that an administrator can run into, with the words its sentence must hold. Needs
//! `mortar-brickd` beside `mortar`, root, loop devices and XFS; says so when one is missing.

mod common;

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use common::{Run, mortar};
use mortar_proto::wire::cluster::cluster_client::ClusterClient;
use mortar_proto::wire::cluster::{BrickSpec, VolumeCreateRequest, VolumeSetRequest};

/// A playground of three servers with the started volume `vmstore`, and a fourth server that is a cluster of its own with
/// the volume `other`.
struct World {
    temp: tempfile::TempDir,
    /// On tmpfs, to be refused.
    tmpfs: tempfile::TempDir,
    servers: Vec<String>,
    fourth: Option<(Child, String)>,
}

fn brickd() -> Option<PathBuf> {
    let path = Path::new(env!("CARGO_BIN_EXE_mortar")).with_file_name("mortar-brickd");
    path.is_file().then_some(path)
}

impl World {
    fn new() -> Option<Self> {
        let missing = if brickd().is_none() {
            "there is no mortar-brickd beside mortar"
        } else if !rustix::process::geteuid().is_root() {
            "needs root"
        } else if !Path::new("/dev/loop-control").exists() {
            "needs loop devices"
        } else if Command::new("mkfs.xfs").arg("-V").output().is_err() {
            "needs xfsprogs"
        } else {
            ""
        };
        if !missing.is_empty() {
            println!("skipped: {missing}");
            return None;
        }
        let mut world = Self {
            temp: tempfile::tempdir().unwrap(),
            tmpfs: tempfile::tempdir_in("/dev/shm").unwrap(),
            servers: Vec::new(),
            fourth: None,
        };
        let up = mortar(&format!("--json playground up --xfs --brick-size 1G --dir {}", world.dir().display()));
        assert_eq!(up.code, 0, "{}", up.err);
        let json = up.json();
        world.servers = json["mortar_servers"].as_str().unwrap().split(',').map(str::to_owned).collect();
        world.start_fourth();
        Some(world)
    }

    fn dir(&self) -> PathBuf {
        self.temp.path().join("play")
    }

    /// A path on the XFS of server `n`'s brick, beside the brick.
    fn xfs(&self, n: usize, name: &str) -> String {
        self.dir().join(format!("brick{n}")).join(name).to_string_lossy().into_owned()
    }

    fn start_fourth(&mut self) {
        let state = self.temp.path().join("fourth");
        std::fs::create_dir(&state).unwrap();
        let mut command = Command::new(brickd().unwrap());
        command.arg("--state-dir").arg(&state).args(["--listen", "127.0.0.1:0"]);
        let log = std::fs::File::create(self.temp.path().join("fourth.log")).unwrap();
        let child = command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(log).spawn().unwrap();
        self.fourth = Some((child, String::new()));
        let begun = Instant::now();
        let address = loop {
            match std::fs::read_to_string(state.join("address")) {
                Ok(text) if !text.trim().is_empty() => break text.trim().to_owned(),
                _ if begun.elapsed() > Duration::from_secs(30) => {
                    panic!("the fourth server does not say where it listens")
                }
                _ => std::thread::sleep(Duration::from_millis(50)),
            }
        };
        let brick = |n: u32| format!("{address}:{}", self.xfs(1, &format!("fourth{n}")));
        mortar(&format!(
            "--server {address} volume create other replica 3 {} {} {} --force",
            brick(1),
            brick(2),
            brick(3)
        ))
        .expect(0, "is created");
        if let Some(fourth) = &mut self.fourth {
            fourth.1 = address;
        }
    }

    fn run(&self, line: &str) -> Run {
        mortar(&format!("--server {} {line}", self.servers.join(",")))
    }

    /// `volume create NAME` with the first brick at `path`, the others where bricks may well be.
    fn create(&self, name: &str, path: &str, more: &str) -> String {
        let [s1, s2, s3] = self.servers.as_slice() else { panic!("three servers") };
        format!(
            "volume create {name} replica 3 {s1}:{path} {s2}:{} {s3}:{} {more}",
            self.xfs(2, name),
            self.xfs(3, name)
        )
    }
}

impl Drop for World {
    fn drop(&mut self) {
        if let Some((child, _)) = &mut self.fourth {
            let _ = child.kill();
            let _ = child.wait();
        }
        let down = mortar(&format!("playground down --dir {}", self.dir().display()));
        if down.code != 0 {
            eprintln!("{}", down.err);
        }
    }
}

/// All of these words, whatever the case; of words with `|` between them, one.
fn says(text: &str, words: &str) -> bool {
    let text = text.to_lowercase();
    words.to_lowercase().split(" + ").all(|word| word.split('|').any(|one| text.contains(one)))
}

#[test]
fn servers_refuse_what_cannot_be_with_a_sentence_that_says_why() {
    let Some(world) = World::new() else { return };
    let full = world.xfs(1, "full");
    std::fs::create_dir(&full).unwrap();
    std::fs::write(Path::new(&full).join("mine"), "precious").unwrap();
    let file = world.xfs(1, "file");
    std::fs::write(&file, "precious").unwrap();
    let tmpfs = world.tmpfs.path().join("b").to_string_lossy().into_owned();
    let on_root = "/var/mortar-test-brick-that-is-never-made";
    let data = world.xfs(1, "data");
    let fourth = world.fourth.as_ref().map(|(_, address)| address.clone()).unwrap();

    let table = [
        ("unknown volume, start", "volume start nosuch".to_owned(), "nosuch"),
        ("unknown volume, stop", "volume stop nosuch --yes".to_owned(), "nosuch"),
        ("unknown volume, delete", "volume delete nosuch --yes".to_owned(), "nosuch"),
        ("unknown volume, info", "volume info nosuch".to_owned(), "nosuch"),
        ("unknown volume, status", "volume status nosuch".to_owned(), "nosuch"),
        ("unknown volume, set", "volume set nosuch auth.allow 10.0.0.1".to_owned(), "nosuch"),
        ("unknown volume, heal", "volume heal nosuch info".to_owned(), "nosuch"),
        (
            "a name that is taken",
            world.create("vmstore", &world.xfs(1, "vmstore"), ""),
            "vmstore + exists|already|taken",
        ),
        ("not on XFS", world.create("v", &tmpfs, ""), "xfs"),
        ("not on XFS, and force does not help", world.create("v", &tmpfs, "--force"), "xfs"),
        ("on the root file system", world.create("v", on_root, ""), "root file system|xfs"),
        ("a mount point itself", world.create("v", &world.xfs(1, "")[..data.len() - 5], ""), "mount point"),
        ("not empty", world.create("v", &full, ""), "not empty"),
        ("not empty, and force does not help", world.create("v", &full, "--force"), "not empty"),
        ("not a directory", world.create("v", &file, ""), "director"),
        ("already a brick", world.create("v", &data, ""), "brick + vmstore"),
        ("already a brick, and force does not help", world.create("v", &data, "--force"), "brick + vmstore"),
        ("inside a brick", world.create("v", &format!("{data}/sub"), ""), "inside|in brick|within"),
        (
            "inside a brick, and force does not help",
            world.create("v", &format!("{data}/sub"), "--force"),
            "inside|in brick|within",
        ),
        (
            "a server that is not in the cluster",
            format!(
                "volume create v replica 3 nosuch:/a {}:{} {}:{}",
                world.servers[1],
                world.xfs(2, "v"),
                world.servers[2],
                world.xfs(3, "v")
            ),
            "nosuch",
        ),
        ("deleting a started volume", "volume delete vmstore --yes".to_owned(), "stop"),
        ("starting twice", "volume start vmstore".to_owned(), "started|already"),
        ("adding a server to itself", format!("server add {}", world.servers[0]), "already|itself"),
        ("adding a server that has volumes", format!("server add {fourth}"), "volume"),
        ("adding a server that is not there", "server add 127.0.0.1:1".to_owned(), "127.0.0.1:1"),
        ("removing a server with bricks", format!("server remove {}", world.servers[1]), "brick"),
        ("removing a server that is not there", "server remove nosuch".to_owned(), "nosuch"),
    ];
    let mut wrong = Vec::new();
    for (what, line, words) in &table {
        let begun = Instant::now();
        let run = world.run(line);
        println!("{what}: {}", run.err.trim());
        if run.code != 1 || !says(&run.err, words) {
            wrong.push(format!("{what}: exit code {}, {:?} does not say {words:?}", run.code, run.err.trim()));
        }
        if begun.elapsed() > Duration::from_secs(11) {
            wrong.push(format!("{what}: took {:?}", begun.elapsed()));
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
    assert_eq!(std::fs::read_to_string(Path::new(&full).join("mine")).unwrap(), "precious");
    assert!(!Path::new(on_root).exists(), "a refused brick leaves nothing on the root file system");
    assert!(!Path::new(&world.xfs(2, "v")).join(".mortar").exists(), "a refused volume leaves no brick behind");
    let volumes = mortar(&format!("--server {} --json volume list", world.servers[0])).json();
    assert_eq!(volumes["volumes"].as_array().unwrap().len(), 1, "only vmstore: {volumes}");

    raw_refusals(&world);
}

/// What the command would not even send: the servers refuse it too, for other programs speak to them as well.
fn raw_refusals(world: &World) {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(async {
        let mut client = ClusterClient::connect(format!("http://{}", world.servers[0])).await.unwrap();
        for (key, value, words) in [
            ("io-timout", "1", "io-timeout"),
            ("io-timeout", "soon", "soon|io-timeout"),
            ("storage.owner-uid", "-5", "storage.owner-uid|-5"),
            ("auth.allow", "10.0.0.0/99", "10.0.0.0/99"),
        ] {
            let request =
                VolumeSetRequest { name: "vmstore".into(), key: key.into(), value: value.into(), reset: false };
            let refusal = client.volume_set(request).await.expect_err("an option that cannot be");
            println!("{key}={value}: {}", refusal.message());
            assert!(says(refusal.message(), words), "{key}={value}: {refusal:?}");
        }
        let brick = |at: usize, path: String| BrickSpec { server: world.servers[at].clone(), path };
        let good = || (0..3).map(|at| brick(at, world.xfs(at + 1, "raw"))).collect::<Vec<_>>();
        let mut same = good();
        same[1] = brick(0, world.xfs(1, "raw2"));
        let mut relative = good();
        relative[0] = brick(0, "bricks/b1".into());
        for (name, replica, bricks, words) in [
            ("a/b", 3, good(), "name"),
            ("raw", 2, good(), "replica|3"),
            ("raw", 3, good()[..2].to_vec(), "brick|3"),
            ("raw", 3, relative, "absolute"),
            ("raw", 3, same, "server"),
        ] {
            let request = VolumeCreateRequest { name: name.into(), replica, bricks, force: false };
            let refusal = client.volume_create(request).await.expect_err("a volume that cannot be");
            println!("{name} replica {replica}: {}", refusal.message());
            assert!(says(refusal.message(), words), "{refusal:?}");
        }
    });
}

#[test]
fn a_volume_goes_through_its_life() {
    let Some(world) = World::new() else { return };
    world.run("volume info vmstore").expect(0, "started");
    world.run("volume status vmstore").expect(0, "in-sync");
    world.run("volume heal vmstore info").expect(0, "nothing to heal");
    world.run("volume set vmstore auth.allow 127.0.0.1").expect(0, "is now 127.0.0.1");
    world.run("volume get vmstore auth.allow").expect(0, "127.0.0.1");
    world.run("volume reset vmstore auth.allow").expect(0, "again");
    world.run("volume stop vmstore --yes").expect(0, "is stopped");
    world.run("volume list").expect(0, "stopped");
    world.run("volume delete vmstore --yes").expect(0, "is deleted");
    world.run("volume list").expect(0, "There is no volume");
    // The brick keeps its files: it is not taken again without being emptied.
    let again = world.run(&world.create("second", &world.xfs(1, "data"), ""));
    assert_eq!(again.code, 1, "{}", again.out);
    // Without bricks a server can go.
    world.run(&format!("server remove {}", world.servers[2])).expect(0, "Removed");
    let list = world.run("--json server list").json();
    assert_eq!(list["servers"].as_array().unwrap().len(), 2, "{list}");
}
