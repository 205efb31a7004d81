//! Finding the metadata log's leader, and asking it.
//!
//! Any server may be asked: one that is not the leader names it in the metadata key [`LEADER_KEY`], and is believed. Servers
//! that do not answer are gone round until the caller's deadline.

use std::collections::HashMap;
use std::future::Future;
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use tonic::transport::{Channel, Endpoint};
use tonic::{Code, Status};

/// The port that is meant when an address names none.
pub const DEFAULT_PORT: u16 = 7440;
/// The metadata key in which a server that is not the leader names it.
pub const LEADER_KEY: &str = "mortar-leader";

/// How long a connection may take to be made.
const CONNECT_TIMEOUT: Duration = Duration::from_millis(1000);
/// A server that hangs is known to within the sum of both: before an `io-timeout` ends, so that a report of a brick that hangs
/// with the leader finds the next leader at once.
const ALIVE_EVERY: Duration = Duration::from_millis(400);
const ALIVE_TIMEOUT: Duration = Duration::from_millis(1000);
/// The wait before the servers are gone round again.
const ROUND_WAIT: Duration = Duration::from_millis(60);
/// Addresses that are remembered at most.
const MAX_SERVERS: usize = 64;

/// `host:port` of what an administrator wrote: `host`, `host:port`, `[v6]:port` or a bare IPv6 address.
#[must_use]
pub fn with_port(server: &str) -> String {
    let server = server.trim();
    if server.starts_with('[') {
        return if server.ends_with(']') { format!("{server}:{DEFAULT_PORT}") } else { server.to_owned() };
    }
    match server.matches(':').count() {
        0 => format!("{server}:{DEFAULT_PORT}"),
        1 => server.to_owned(),
        _ => format!("[{server}]:{DEFAULT_PORT}"),
    }
}

#[derive(Default)]
struct Known {
    servers: Vec<String>,
    /// Who answered last.
    leader: Option<String>,
    channels: HashMap<String, Channel>,
}

/// A client of the control plane.
#[derive(Default)]
pub struct Control {
    known: Mutex<Known>,
}

impl Control {
    /// A client that begins with these servers, `host` or `host:port`.
    #[must_use]
    pub fn new(servers: Vec<String>) -> Self {
        let control = Self::default();
        control.learn(servers);
        control
    }

    /// Adds servers.
    pub fn learn(&self, servers: Vec<String>) {
        let mut known = self.known.lock();
        for server in servers.iter().filter(|s| !s.trim().is_empty()) {
            let server = with_port(server);
            if known.servers.len() < MAX_SERVERS && !known.servers.contains(&server) {
                known.servers.push(server);
            }
        }
    }

    /// The servers known so far, `host:port`.
    #[must_use]
    pub fn servers(&self) -> Vec<String> {
        self.known.lock().servers.clone()
    }

    /// A connection to one server, made when it is first used.
    ///
    /// # Errors
    /// When the address is none.
    pub fn channel(&self, server: &str) -> Result<Channel, Status> {
        let mut known = self.known.lock();
        if let Some(channel) = known.channels.get(server) {
            return Ok(channel.clone());
        }
        let endpoint = Endpoint::from_shared(format!("http://{server}"))
            .map_err(|e| Status::invalid_argument(format!("{server} is no address of a server: {e}")))?
            .connect_timeout(CONNECT_TIMEOUT)
            .tcp_nodelay(true)
            .http2_keep_alive_interval(ALIVE_EVERY)
            .keep_alive_timeout(ALIVE_TIMEOUT)
            .keep_alive_while_idle(true);
        let channel = endpoint.connect_lazy();
        known.channels.insert(server.to_owned(), channel.clone());
        Ok(channel)
    }

    fn order(&self) -> Vec<String> {
        let known = self.known.lock();
        let leader = known.leader.iter().cloned();
        leader.chain(known.servers.iter().filter(|s| Some(*s) != known.leader.as_ref()).cloned()).collect()
    }

    /// Calls the leader, whoever that is, until `deadline` has passed. `ask` may be called many times.
    ///
    /// # Errors
    /// What the leader answered, if it did; else `UNAVAILABLE` with a sentence that says which servers were asked in vain.
    pub async fn call<T, F, Fut>(&self, deadline: Duration, ask: F) -> Result<T, Status>
    where
        F: Fn(Channel) -> Fut,
        Fut: Future<Output = Result<T, Status>>,
    {
        let until = Instant::now() + deadline;
        let mut complaints: HashMap<String, String> = HashMap::new();
        loop {
            let mut queue = self.order();
            queue.reverse();
            let mut hops = 0;
            while let Some(server) = queue.pop() {
                let left = until.saturating_duration_since(Instant::now());
                if left.is_zero() {
                    break;
                }
                let channel = match self.channel(&server) {
                    Ok(channel) => channel,
                    Err(status) => {
                        complaints.insert(server, status.message().to_owned());
                        continue;
                    }
                };
                let status = match tokio::time::timeout(left, ask(channel)).await {
                    Ok(Ok(answer)) => {
                        self.known.lock().leader = Some(server);
                        return Ok(answer);
                    }
                    Ok(Err(status)) => status,
                    Err(_) => Status::deadline_exceeded("no answer in time"),
                };
                let named = status.metadata().get(LEADER_KEY).and_then(|v| v.to_str().ok()).map(str::to_owned);
                match (named, status.code()) {
                    (Some(leader), _) => {
                        complaints.insert(server.clone(), "is not the leader".into());
                        if !leader.is_empty() && leader != server && hops < 4 {
                            hops += 1;
                            self.learn(vec![leader.clone()]);
                            queue.retain(|s| *s != leader);
                            queue.push(leader);
                        }
                    }
                    (None, Code::Unavailable | Code::DeadlineExceeded | Code::Cancelled | Code::Unknown) => {
                        let mut known = self.known.lock();
                        // A broken channel is made anew, with a fresh name look-up.
                        known.channels.remove(&server);
                        if known.leader.as_ref() == Some(&server) {
                            known.leader = None;
                        }
                        drop(known);
                        complaints.insert(server, status.message().to_owned());
                    }
                    _ => return Err(status),
                }
            }
            if Instant::now() + ROUND_WAIT >= until {
                let mut said: Vec<String> = complaints.into_iter().map(|(s, why)| format!("{s}: {why}")).collect();
                said.sort();
                let said = if said.is_empty() { "no server is known".to_owned() } else { said.join("; ") };
                return Err(Status::unavailable(format!(
                    "no server could answer within {} s ({said})",
                    deadline.as_secs()
                )));
            }
            tokio::time::sleep(ROUND_WAIT).await;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::with_port;

    #[test]
    fn addresses_get_the_default_port_unless_they_name_one() {
        for (written, meant) in [
            ("s1", "s1:7440"),
            ("s1:7", "s1:7"),
            (" s1 ", "s1:7440"),
            ("::1", "[::1]:7440"),
            ("[::1]", "[::1]:7440"),
            ("[::1]:9", "[::1]:9"),
        ] {
            assert_eq!(with_port(written), meant);
        }
    }
}
