//! `playground up`: starts everything, step by step, each step in the record before it is taken.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail};
use mortar_proto::wire::cluster::{BrickSpec, ServerAddRequest, VolumeCreateRequest, VolumeRequest};

use super::process::{End, find_program, last_lines};
use super::record::{Disk, Mount, Playground, Server};
use super::{UpArgs, VOLUME, disk, down, process, to_json, to_text};
use crate::address::Address;
use crate::bricks::REPLICA;
use crate::cluster::Cluster;
use crate::contact::Contact;
use crate::failure::{Failure, Outcome};
use crate::output::Output;

/// How long a daemon may take to say where it listens, and a mount to be there. Generous: both cores may be busy.
const START: Duration = Duration::from_secs(30);

/// Starts a playground; undoes what was started when anything fails.
///
/// # Errors
/// What was refused or failed.
pub async fn up(args: &UpArgs, output: Output) -> Outcome {
    let brickd = find_program("mortar-brickd")?;
    let mount_program = args.mount.as_ref().map(|_| find_program("mortar-mount")).transpose()?;
    if args.xfs && !rustix::process::geteuid().is_root() {
        return Err(Failure::failed(
            "--xfs makes and mounts file systems, which needs root. Run it as root, or without --xfs and with --dir on an XFS.",
        ));
    }
    if args.mount.is_some() && !Path::new("/dev/fuse").exists() {
        return Err(Failure::failed("--mount needs /dev/fuse, which is missing: load the kernel module 'fuse'."));
    }
    let mut playground = prepare(args)?;
    let result = steps(args, &mut playground, &brickd, mount_program.as_deref(), output).await;
    if let Err(error) = result {
        output.progress("It failed; undoing what was started.");
        let undone = down::undo(&playground, output);
        let after = match undone {
            Ok(()) => "Everything that was started is undone.".to_owned(),
            Err(why) => format!(
                "Not all could be undone: {why} Try 'mortar playground down --dir {}'.",
                playground.dir.display()
            ),
        };
        return Err(Failure::failed(format!("The playground did not come up: {error:#}\n{after}")));
    }
    output.show(&to_json(&playground), || to_text(&playground));
    Ok(())
}

/// Makes the directory and the first record, which names all that will be made.
fn prepare(args: &UpArgs) -> Outcome<Playground> {
    let dir = std::path::absolute(&args.place.dir).context("the playground's directory")?;
    if Playground::load(&dir)?.is_some() {
        return Err(Failure::failed(format!(
            "A playground is up already in {}: 'mortar playground status --dir {0}' shows it, 'mortar playground down --dir {0}' ends it.",
            dir.display()
        )));
    }
    let mount = args.mount.as_ref().map(|path| prepare_mount(path, &dir)).transpose()?;
    let made_dir = !dir.exists();
    std::fs::create_dir_all(&dir).with_context(|| format!("cannot make {}", dir.display()))?;
    let mut entries = std::fs::read_dir(&dir).with_context(|| format!("cannot read {}", dir.display()))?;
    if entries.next().is_some() {
        return Err(Failure::failed(format!(
            "{} is not empty: name an empty directory, or one that does not exist.",
            dir.display()
        )));
    }
    let server = |number: u32| {
        let own = dir.join(format!("server{number}"));
        let mount_point = dir.join(format!("brick{number}"));
        Server {
            number,
            address: String::new(),
            process: None,
            state_dir: own.join("state"),
            // Below the mount point: a brick is never a mount point itself.
            brick: mount_point.join("data"),
            log: own.join("log"),
            disk: args.xfs.then(|| Disk { image: dir.join(format!("brick{number}.img")), mount_point }),
        }
    };
    let servers = (1..=args.servers).map(server).collect();
    let playground = Playground { dir, made_dir, complete: false, servers, mount };
    playground.create()?;
    Ok(playground)
}

fn prepare_mount(path: &Path, dir: &Path) -> Outcome<Mount> {
    let path = std::path::absolute(path).context("the mount's directory")?;
    if path.starts_with(dir) || dir.starts_with(&path) {
        return Err(Failure::failed(format!(
            "The mount {} and the playground's directory {} must lie beside each other, not one in the other.",
            path.display(),
            dir.display()
        )));
    }
    if disk::is_mount_point(&path) {
        return Err(Failure::failed(format!(
            "Something is mounted at {} already: unmount it, or name another directory.",
            path.display()
        )));
    }
    // Below a symbolic link the kernel would show the mount under another name than the one looked for later.
    let made_path = !path.exists();
    let path = if made_path {
        path
    } else {
        path.canonicalize().with_context(|| format!("cannot look at {}", path.display()))?
    };
    if !made_path && !path.is_dir() {
        return Err(Failure::failed(format!("{} is no directory: name one to mount the volume at.", path.display())));
    }
    let log = dir.join("mount.log");
    Ok(Mount { path, made_path, process: None, log })
}

async fn steps(
    args: &UpArgs,
    playground: &mut Playground,
    brickd: &Path,
    mount_program: Option<&Path>,
    output: Output,
) -> Result<()> {
    for at in 0..playground.servers.len() {
        let server = &playground.servers[at];
        if let Some(disk) = &server.disk {
            output.progress(&format!("making an XFS for brick {} in {}", server.number, disk.image.display()));
            disk::make(disk, args.brick_size, &playground.dir)?;
        }
        std::fs::create_dir_all(&server.brick).with_context(|| format!("cannot make {}", server.brick.display()))?;
        std::fs::create_dir_all(&server.state_dir)
            .with_context(|| format!("cannot make {}", server.state_dir.display()))?;
        output.progress(&format!("starting server {}", server.number));
        start_daemon(playground, at, brickd, "127.0.0.1:0")?;
    }
    for at in 0..playground.servers.len() {
        playground.servers[at].address = wait_for_address(&playground.servers[at])?;
        playground.save()?;
    }
    let (first, others) = playground.servers.split_first().context("a playground has servers")?;
    let address = Address::parse(&first.address).map_err(|why| anyhow!(why))?;
    let cluster = Cluster::patient(Contact::of(vec![address]));
    for server in others {
        output.progress(&format!("adding server {} ({})", server.number, server.address));
        let request = ServerAddRequest { address: server.address.clone() };
        cluster
            .change(async |mut client| client.server_add(request.clone()).await)
            .await
            .map_err(|e| anyhow!("{e}"))?;
    }
    make_volume(args, playground, &cluster, output).await?;
    if let Some(program) = mount_program {
        mount(playground, program, output)?;
    }
    playground.complete = true;
    playground.save()
}

/// Starts the daemon of the server at this place of the list.
fn start_daemon(playground: &mut Playground, at: usize, brickd: &Path, listen: &str) -> Result<()> {
    let server = playground.servers.get_mut(at).context("no such server")?;
    // The file of an earlier start must not be taken for this one's.
    match std::fs::remove_file(server.state_dir.join("address")) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            return Err(error).context("cannot remove the address of the last start");
        }
        _ => {}
    }
    let state_dir = server.state_dir.as_os_str().to_owned();
    let args = ["--state-dir".into(), state_dir, "--listen".into(), listen.into()];
    server.process = Some(process::start(brickd, args, &playground.dir, &server.log)?);
    playground.save()
}

fn wait_for_address(server: &Server) -> Result<String> {
    let path = server.state_dir.join("address");
    let until = Instant::now() + START;
    loop {
        if let Ok(text) = std::fs::read_to_string(&path)
            && let Some(line) = text.lines().next()
            && let Ok(address) = Address::parse(line.trim())
        {
            return Ok(address.as_str().to_owned());
        }
        if !server.process.is_some_and(process::Id::is_alive) {
            bail!("the daemon of server {} has ended; {}", server.number, last_lines(&server.log));
        }
        if Instant::now() >= until {
            bail!(
                "the daemon of server {} did not say within {} s where it listens; {}",
                server.number,
                START.as_secs(),
                last_lines(&server.log)
            );
        }
        std::thread::sleep(Duration::from_millis(20));
    }
}

async fn make_volume(args: &UpArgs, playground: &Playground, cluster: &Cluster, output: Output) -> Result<()> {
    output.progress(&format!("creating and starting volume {VOLUME}"));
    let bricks: Vec<_> = playground
        .servers
        .iter()
        .map(|server| BrickSpec { server: server.address.clone(), path: server.brick.to_string_lossy().into_owned() })
        .take(playground.servers.len() / REPLICA * REPLICA)
        .collect();
    let request = VolumeCreateRequest { name: VOLUME.to_owned(), replica: 3, bricks, force: true };
    let created = cluster.change(async |mut client| client.volume_create(request.clone()).await).await;
    if let Err(failure) = created {
        if !args.xfs && !on_xfs(&playground.dir) {
            bail!(
                "{failure} ({} is not on XFS. Say --xfs to give each brick an XFS of its own in a file, or name a --dir that is on XFS.)",
                playground.dir.display()
            );
        }
        bail!("{failure}");
    }
    let request = VolumeRequest { name: VOLUME.to_owned(), force: false };
    cluster.change(async |mut client| client.volume_start(request.clone()).await).await.map_err(|e| anyhow!("{e}"))?;
    Ok(())
}

fn on_xfs(dir: &Path) -> bool {
    /// `XFS_SUPER_MAGIC`
    const XFS: u64 = 0x5846_5342;
    #[expect(clippy::cast_sign_loss, reason = "a magic number, whose type differs between machines")]
    rustix::fs::statfs(dir).is_ok_and(|fs| fs.f_type as u64 == XFS)
}

/// Mounts the volume, in a process that stays in the foreground, so that its pid is known.
fn mount(playground: &mut Playground, program: &Path, output: Output) -> Result<()> {
    let source = format!("{}:/{VOLUME}", playground.addresses());
    let mount = playground.mount.as_mut().context("no mount was asked for")?;
    output.progress(&format!("mounting {VOLUME} at {}", mount.path.display()));
    std::fs::create_dir_all(&mount.path).with_context(|| format!("cannot make {}", mount.path.display()))?;
    mount.path = mount.path.canonicalize().with_context(|| format!("cannot look at {}", mount.path.display()))?;
    let id =
        process::start(program, [source.as_ref(), mount.path.as_os_str(), "-f".as_ref()], &playground.dir, &mount.log)?;
    mount.process = Some(id);
    let (path, log): (PathBuf, PathBuf) = (mount.path.clone(), mount.log.clone());
    playground.save()?;
    let until = Instant::now() + START;
    while !disk::is_mortar_mount(&path) {
        if !id.is_alive() {
            bail!("mortar-mount has ended; {}", last_lines(&log));
        }
        if Instant::now() >= until {
            bail!("the volume was not mounted within {} s; {}", START.as_secs(), last_lines(&log));
        }
        std::thread::sleep(Duration::from_millis(20));
    }
    Ok(())
}

/// Starts one daemon again, on the address it had.
///
/// # Errors
/// When it runs already, or does not start.
pub async fn start_again(playground: &mut Playground, n: u32, output: Output) -> Outcome {
    let server = super::server(playground, n)?;
    if server.process.is_some_and(process::Id::is_alive) {
        return Err(Failure::failed(format!("Server {n} runs already.")));
    }
    if server.address.is_empty() {
        return Err(Failure::failed(format!(
            "Server {n} never told where it listens; end this playground with 'mortar playground down'."
        )));
    }
    let address = server.address.clone();
    let at = playground.servers.iter().position(|server| server.number == n).context("no such server")?;
    start_daemon(playground, at, &find_program("mortar-brickd")?, &address)?;
    let server = &playground.servers[at];
    if let Err(error) = wait_for_address(server) {
        if let Some(id) = server.process {
            let _ = process::end(id, End::Kill);
        }
        return Err(Failure::failed(format!("Server {n} was not started: {error:#}")));
    }
    output.done("server started", &format!("Server {n} runs again on {address}."));
    Ok(())
}
