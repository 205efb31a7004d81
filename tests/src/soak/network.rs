//! Hosts as network namespaces, a switch between them in a namespace of its own, and what is cut. Nothing of the machine's own
//! network is touched, so runs beside each other may use the same addresses.

use std::collections::BTreeSet;
use std::io::Write as _;
use std::process::{Command, Stdio};

use anyhow::{Context as _, Result, ensure};

use crate::harness::run;

/// A host, 1 to 6: servers are 1 to 3, clients 4 and 5, and the administrator sits at 6.
pub type Host = usize;

/// The administrator's.
pub const ADMINISTRATOR: Host = 6;
const HOSTS: std::ops::RangeInclusive<Host> = 1..=ADMINISTRATOR;

/// The hosts of a run, and the switch.
#[derive(Debug)]
pub struct Network {
    id: String,
    /// Frames from the first to the second are lost.
    cut: BTreeSet<(Host, Host)>,
}

fn ip(line: &str) -> Result<String> {
    run(Command::new("ip").args(line.split_whitespace()))
}

impl Network {
    /// Makes it. `id` is the run's.
    ///
    /// # Errors
    /// When the kernel or a tool refuses.
    pub fn up(id: &str) -> Result<Self> {
        let network = Self { id: id.to_owned(), cut: BTreeSet::new() };
        let switch = format!("{id}-switch");
        ip(&format!("netns add {switch}"))?;
        ip(&format!("-n {switch} link add br0 type bridge"))?;
        ip(&format!("-n {switch} link set br0 up"))?;
        for host in HOSTS {
            let name = network.namespace(host);
            ip(&format!("netns add {name}"))?;
            ip(&format!("-n {switch} link add p{host} type veth peer name eth0 netns {name}"))?;
            ip(&format!("-n {switch} link set p{host} master br0 up"))?;
            ip(&format!("-n {name} addr add {}/24 dev eth0", Self::address(host)))?;
            ip(&format!("-n {name} link set eth0 up"))?;
            ip(&format!("-n {name} link set lo up"))?;
        }
        Ok(network)
    }

    fn namespace(&self, host: Host) -> String {
        format!("{}-h{host}", self.id)
    }

    /// A host's address.
    #[must_use]
    pub fn address(host: Host) -> String {
        format!("10.77.0.{host}")
    }

    /// A command that will run in a host's network; mounts it makes are everybody's.
    #[must_use]
    pub fn on(&self, host: Host, program: &std::path::Path) -> Command {
        let mut command = Command::new("nsenter");
        command.arg(format!("--net=/run/netns/{}", self.namespace(host))).arg("--").arg(program);
        command
    }

    /// Frames from `from` to `to` are lost from now on, silently.
    ///
    /// # Errors
    /// When nft refuses.
    pub fn cut(&mut self, from: Host, to: Host) -> Result<()> {
        self.cut.insert((from, to));
        self.apply()
    }

    /// Cuts a host from all others: what it sends, what is sent to it, or both.
    ///
    /// # Errors
    /// When nft refuses.
    pub fn cut_off(&mut self, host: Host, sends: bool, hears: bool) -> Result<()> {
        for other in HOSTS.filter(|other| *other != host && *other != ADMINISTRATOR) {
            if sends {
                self.cut.insert((host, other));
            }
            if hears {
                self.cut.insert((other, host));
            }
        }
        self.apply()
    }

    /// Nothing is cut any more.
    ///
    /// # Errors
    /// When nft refuses.
    pub fn mend(&mut self) -> Result<()> {
        self.cut.clear();
        self.apply()
    }

    /// One table of the switch has all cuts; it is replaced in one step.
    fn apply(&self) -> Result<()> {
        let mut rules = "table bridge cut\ndelete table bridge cut\ntable bridge cut {\n chain forward {\n  \
                         type filter hook forward priority 0;\n"
            .to_owned();
        for (from, to) in &self.cut {
            rules.push_str(&format!("  iifname p{from} oifname p{to} drop\n"));
        }
        rules.push_str(" }\n}\n");
        let mut nft = Command::new("ip")
            .args(["netns", "exec", &format!("{}-switch", self.id), "nft", "-f", "-"])
            .stdin(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .context("starting nft")?;
        nft.stdin.take().context("nft has no input")?.write_all(rules.as_bytes())?;
        let out = nft.wait_with_output()?;
        ensure!(out.status.success(), "nft refused {rules}: {}", String::from_utf8_lossy(&out.stderr));
        Ok(())
    }

    /// Removes the namespaces of the run `id`, and with them all that was in them.
    pub fn remove(id: &str) {
        let names = std::fs::read_dir("/run/netns").into_iter().flatten().flatten();
        for name in names.filter_map(|entry| entry.file_name().into_string().ok()) {
            if name.strip_prefix(id).is_some_and(|rest| rest.starts_with('-')) {
                let _ = ip(&format!("netns del {name}"));
            }
        }
    }
}
