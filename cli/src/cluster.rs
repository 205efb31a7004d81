//! Talking to the cluster: finds the leader among the servers that answer, within seconds also when some do not.
//!
//! Each command first asks all servers it knows who they are, all at once. That tells the living from the hung (a stopped
//! process still accepts connections), finds the leader, and keeps a fresh server, which is a cluster of its own, from
//! taking a command that was meant for the cluster. A mount's control connection asks round until it is answered; a command
//! must not, for what it asks for is not always harmless to do twice.

use std::collections::BTreeMap;
use std::time::Duration;

use mortar_proto::wire::cluster::cluster_client::ClusterClient;
use mortar_proto::wire::cluster::{Empty, IdentifyReply};
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep, timeout, timeout_at};
use tonic::transport::{Channel, Endpoint};
use tonic::{Code, Response, Status};

use crate::address::Address;
use crate::contact::Contact;
use crate::failure::{Failure, Outcome};

/// The generated client.
pub type Client = ClusterClient<Channel>;

/// How long one server may take to say who it is.
const PROBE: Duration = Duration::from_secs(3);
/// How long a whole command may take.
const OVERALL: Duration = Duration::from_secs(10);
/// How long to wait for further servers once one has answered.
const OTHERS: Duration = Duration::from_millis(300);
/// The pause before asking again while there is no leader.
const PAUSE: Duration = Duration::from_millis(200);
/// Where a server that is not the leader says who is.
const LEADER_KEY: &str = "mortar-leader";

/// What a server said when it was asked who it is.
#[derive(Clone)]
pub struct Answer {
    /// A connection to it.
    pub client: Client,
    /// Who it is.
    pub identity: IdentifyReply,
}

/// The cluster, as far as this command knows it.
pub struct Cluster {
    contact: Contact,
    overall: Duration,
}

/// Whether a command may be sent again when its answer was lost.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Again {
    Harmless,
    No,
}

impl Cluster {
    /// Talks to these servers. Nothing is sent yet.
    pub fn new(contact: Contact) -> Self {
        Self { contact, overall: OVERALL }
    }

    /// Waits longer, where nobody is waiting at a terminal and the machine may be busy with starting the very servers.
    pub fn patient(contact: Contact) -> Self {
        Self { contact, overall: Duration::from_secs(60) }
    }

    /// The servers that were named, in order.
    pub fn servers(&self) -> &[Address] {
        &self.contact.servers
    }

    /// Asks the leader something that changes nothing.
    ///
    /// # Errors
    /// When no server answers, there is no leader, or it refuses.
    pub async fn ask<T>(&self, call: impl AsyncFn(Client) -> Result<Response<T>, Status>) -> Outcome<T> {
        self.call(Again::Harmless, call).await
    }

    /// Has the leader change something. Never sent twice unless the first one was surely not done.
    ///
    /// # Errors
    /// As [`Self::ask`], and when the answer was lost, so that it is not known whether it was done.
    pub async fn change<T>(&self, call: impl AsyncFn(Client) -> Result<Response<T>, Status>) -> Outcome<T> {
        self.call(Again::No, call).await
    }

    async fn call<T>(&self, again: Again, call: impl AsyncFn(Client) -> Result<Response<T>, Status>) -> Outcome<T> {
        let deadline = Instant::now() + self.overall;
        loop {
            let (address, client) = self.leader(deadline).await?;
            let lost = match timeout_at(deadline, call(client)).await {
                Ok(Ok(reply)) => return Ok(reply.into_inner()),
                Ok(Err(status)) if was_not_done(&status) => None,
                Ok(Err(status)) if is_broken(&status) => Some("the connection broke before it answered".to_owned()),
                Ok(Err(status)) => return Err(Failure::failed(sentence_of(&address, &status))),
                Err(_) => Some(format!("it did not answer within {} s", self.overall.as_secs())),
            };
            match lost {
                Some(why) if again == Again::No => {
                    return Err(Failure::failed(format!(
                        "The command was sent to {address}, but {why}. It may or may not have been done: look with \
                         'mortar volume info' or 'mortar server list' before trying again."
                    )));
                }
                Some(why) if Instant::now() >= deadline => {
                    return Err(Failure::failed(format!("Server {address} was asked, but {why}.")));
                }
                _ => sleep(PAUSE).await,
            }
        }
    }

    /// Finds the leader; waits for one to be elected while any server answers.
    async fn leader(&self, deadline: Instant) -> Outcome<(Address, Client)> {
        let mut told = None;
        loop {
            // One that had little time left and did not answer may live all the same: what was told before counts then.
            let had_time = Instant::now() + PROBE <= deadline;
            let (answers, silent) = self.probe_all(deadline).await;
            let Some(best) = choose(&self.contact.servers, &answers) else {
                let told = told.filter(|_| !had_time);
                return Err(Failure::failed(told.unwrap_or_else(|| self.nobody(&silent))));
            };
            let leader = best.identity.leader.clone();
            if let Ok(address) = Address::parse(&leader) {
                if leader == best.identity.address {
                    return Ok((address, best.client.clone()));
                }
                if let Some(known) = answers.values().find(|answer| answer.identity.address == leader) {
                    return Ok((address, known.client.clone()));
                }
                // The leader may have died just now; those that are left will name another soon.
                if let Ok(answer) = probe(address.clone(), PROBE.min(deadline - Instant::now())).await {
                    return Ok((address, answer.client));
                }
            }
            let living: Vec<_> = answers.keys().map(Address::as_str).collect();
            let mut sentence = format!(
                "{} answered, but the cluster has no leader that can be reached: more than half of its voting servers must \
                 be up and see each other.",
                living.join(", ")
            );
            if !leader.is_empty() {
                sentence.push_str(&format!(" The last known leader is {leader}."));
            }
            for (address, why) in &silent {
                sentence.push_str(&format!(" {address}: {why}."));
            }
            if Instant::now() + PAUSE >= deadline {
                return Err(Failure::failed(sentence));
            }
            told = Some(sentence);
            sleep(PAUSE).await;
        }
    }

    /// Asks all servers who they are; does not wait for stragglers once one has answered.
    async fn probe_all(&self, deadline: Instant) -> (BTreeMap<Address, Answer>, BTreeMap<Address, String>) {
        let budget = PROBE.min(deadline.saturating_duration_since(Instant::now()));
        let mut until = Instant::now() + budget + OTHERS;
        let mut asked = JoinSet::new();
        for address in self.contact.servers.clone() {
            asked.spawn(async move { (address.clone(), probe(address, budget).await) });
        }
        let mut answers = BTreeMap::new();
        let mut silent: BTreeMap<_, _> =
            self.contact.servers.iter().map(|address| (address.clone(), "has not answered yet".to_owned())).collect();
        while let Ok(Some(joined)) = timeout_at(until, asked.join_next()).await {
            match joined {
                Ok((address, Ok(answer))) => {
                    silent.remove(&address);
                    answers.insert(address, answer);
                    until = until.min(Instant::now() + OTHERS);
                }
                Ok((address, Err(why))) => {
                    silent.insert(address, why);
                }
                Err(_) => {}
            }
        }
        (answers, silent)
    }

    fn nobody(&self, silent: &BTreeMap<Address, String>) -> String {
        let mut sentence = format!("No server answered (named by {}):", self.contact.told_by);
        for (i, (address, why)) in silent.iter().enumerate() {
            sentence.push_str(&format!("{} {address}: {why}", if i == 0 { "" } else { ";" }));
        }
        sentence.push_str(". Is mortar-brickd running there, and is its port open?");
        sentence
    }
}

/// Asks one server who it is.
///
/// # Errors
/// Why it did not answer.
pub async fn probe(address: Address, budget: Duration) -> Result<Answer, String> {
    let ask = async {
        let endpoint = Endpoint::from_shared(format!("http://{address}"))
            .map_err(|error| format!("is no address ({error})"))?
            .connect_timeout(budget)
            .tcp_nodelay(true);
        let channel = endpoint.connect().await.map_err(|error| reason(&error))?;
        let mut client = Client::new(channel).max_decoding_message_size(64 << 20);
        let identity = client.identify(Empty {}).await.map_err(|status| {
            if is_broken(&status) {
                "closed the connection without saying who it is; is that a mortar-brickd?".to_owned()
            } else {
                format!("answered with an error: {}", status.message())
            }
        })?;
        Ok(Answer { client, identity: identity.into_inner() })
    };
    timeout(budget, ask).await.unwrap_or_else(|_| Err(format!("did not answer within {} s", budget.as_secs().max(1))))
}

/// The answer to go by: of the largest cluster, so that a fresh server that is named too is not taken for the cluster it
/// shall join; of several alike, of the server named first.
fn choose<'a>(order: &[Address], answers: &'a BTreeMap<Address, Answer>) -> Option<&'a Answer> {
    let mut best: Option<&Answer> = None;
    for answer in order.iter().filter_map(|address| answers.get(address)) {
        let weight = |a: &Answer| (a.identity.servers, a.identity.volumes, !a.identity.leader.is_empty());
        if best.is_none_or(|best| weight(answer) > weight(best)) {
            best = Some(answer);
        }
    }
    best
}

/// The server says that it did nothing: it is not the leader, or there is none just now.
fn was_not_done(status: &Status) -> bool {
    status.metadata().contains_key(LEADER_KEY) || (status.code() == Code::Unavailable && !is_broken(status))
}

/// The connection failed; what the server said, if anything, did not arrive.
fn is_broken(status: &Status) -> bool {
    std::error::Error::source(status).is_some()
}

fn sentence_of(address: &Address, status: &Status) -> String {
    match status.code() {
        Code::InvalidArgument | Code::FailedPrecondition | Code::NotFound | Code::AlreadyExists => {
            status.message().to_owned()
        }
        Code::Unimplemented => format!("Server {address} does not know this command: it runs an older version."),
        code => format!("Server {address} could not do it: {} ({code:?}).", status.message().trim_end_matches('.')),
    }
}

/// The innermost cause, which is the one that says something ("Connection refused").
fn reason(error: &tonic::transport::Error) -> String {
    let mut cause: &dyn std::error::Error = error;
    while let Some(inner) = cause.source() {
        cause = inner;
    }
    let text = cause.to_string();
    if text.contains("onnection refused") {
        "refused the connection".to_owned()
    } else {
        format!("cannot be reached ({text})")
    }
}
