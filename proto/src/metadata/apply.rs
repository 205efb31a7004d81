//! The step from one state to the next: servers, volumes, sessions, leases. Names are in `names`, configurations in
//! `configurations`.
//!
//! `apply` never panics, whatever the command says: a command may come from a client.

use super::command::{BrickPlace, Command, Effect, Entry, NameError, Outcome};
use super::options;
use super::state::{
    Brick, Directory, Inode, Lease, Node, REMEMBERED_EVICTIONS, REMEMBERED_OUTCOMES, REMEMBERED_SESSIONS, ReplicaSet,
    Server, Session, State, Volume,
};
use crate::config::{BrickState, Configuration, Member};
use crate::left_out::{Rule, left_out};
use crate::types::{
    BootId, BrickId, ClusterId, ConfigNo, Epoch, Incarnation, Ino, LogIndex, SessionId, SetId, VolumeId,
};
use std::collections::{BTreeMap, BTreeSet, VecDeque};

/// The longest name of a volume.
const MAX_VOLUME_NAME: usize = 63;

impl State {
    /// The state of a cluster whose log is empty.
    #[must_use]
    pub fn new(cluster: ClusterId) -> Self {
        Self { cluster, next_id: 1, ..Self::default() }
    }

    /// Applies the entry at `index`. The same entries in the same order give the same state and the same outcomes on every
    /// server.
    pub fn apply(&mut self, index: LogIndex, entry: &Entry) -> (Outcome, Vec<Effect>) {
        self.applied = self.applied.max(index);
        let mut effects = Vec::new();
        let Some((session, number)) = entry.request else {
            let outcome = self.run(entry, &mut effects);
            return (outcome, effects);
        };
        // Also of a session that has ended: only so is what it does not know certain not to be done, and can be asked for anew.
        let ended = || self.ended.iter().find(|(id, _)| *id == session).map(|(_, outcomes)| outcomes);
        if let Some(outcomes) = self.sessions.get(&session).map(|known| &known.outcomes).or_else(ended)
            && let Some((_, outcome)) = outcomes.iter().find(|(n, _)| *n == number)
        {
            return (outcome.clone(), effects);
        }
        let outcome = self.run(entry, &mut effects);
        if let Some(known) = self.sessions.get_mut(&session) {
            if known.outcomes.len() == REMEMBERED_OUTCOMES {
                known.outcomes.pop_front();
            }
            known.outcomes.push_back((number, outcome.clone()));
        }
        (outcome, effects)
    }

    fn run(&mut self, entry: &Entry, effects: &mut Vec<Effect>) -> Outcome {
        match &entry.command {
            Command::ServerAdd { server, address } => {
                self.servers.insert(*server, Server { address: address.clone() });
                Outcome::Done
            }
            Command::ServerRemove { server } => {
                if let Some(brick) = self.bricks.values().find(|b| b.server == *server) {
                    let volume = self.volumes.get(&brick.volume).map_or("", |v| v.name.as_str());
                    return refused(format!(
                        "server {server:x} has brick {} of volume {volume}; a server can be removed when it has no bricks",
                        brick.path,
                        server = server.0
                    ));
                }
                match self.servers.remove(server) {
                    Some(_) => Outcome::Done,
                    None => refused(format!("server {:x} is not in this cluster", server.0)),
                }
            }
            Command::VolumeCreate { name, sets, force } => {
                self.volume_create(name, sets, *force, entry.time_ns, effects)
            }
            Command::VolumeStart { name } => self.volume_start(name, true, false, effects),
            Command::VolumeStop { name, force } => self.volume_start(name, false, *force, effects),
            Command::VolumeDelete { name } => self.volume_delete(name, effects),
            Command::VolumeSet { name, key, value } => self.volume_set(name, key, value.as_deref(), effects),
            Command::Register { brick, n, incarnation, boot, clean } => {
                let registration = super::Registration { incarnation: *incarnation, boot: *boot, clean: *clean };
                self.register(*brick, *n, registration, effects)
            }
            Command::ColdStart { set, n, source, registered } => {
                self.cold_start(*set, *n, *source, registered, effects)
            }
            Command::PutOut { set, n, slot } => self.put_out(*set, *n, *slot, effects),
            Command::Rejoin { set, n, slot } => self.rejoin(*set, *n, *slot, effects),
            Command::Promote { set, n, slot } => self.promote(*set, *n, *slot, effects),
            Command::ReplaceBrick { set, n, slot, place, force } => {
                self.replace_brick(*set, *n, *slot, place, *force, effects)
            }
            Command::AcceptLoss { set, n, source, registered } => {
                self.accept_loss(*set, *n, *source, registered, entry.time_ns, effects)
            }
            Command::CompareAll { set, n } => self.compare_all(*set, *n, effects),
            Command::SessionOpen { nonce, volume, client, address } => {
                self.session_open(*nonce, volume, client, address, entry.time_ns)
            }
            Command::SessionEnd { session } => {
                self.session_end(*session, entry.time_ns, effects);
                Outcome::Done
            }
            Command::SessionEvict { session } => self.session_evict(*session, entry.time_ns, effects),
            Command::LeaseGrant { ino, to, from } => self.lease_grant(*ino, *to, *from, effects),
            Command::LeaseRelease { ino, session, epoch, finished } => {
                self.lease_release(*ino, *session, *epoch, *finished, effects)
            }
            Command::Name { session, operation } => match self.sessions.get(session).map(|s| s.volume) {
                Some(Some(volume)) => self.name(*session, volume, operation, entry.time_ns, effects),
                _ => Outcome::Errno(NameError::SessionEnded),
            },
        }
    }

    pub(super) fn take_id(&mut self) -> u64 {
        let id = self.next_id;
        self.next_id += 1;
        id
    }

    /// A volume by its name.
    #[must_use]
    pub fn volume_named(&self, name: &str) -> Option<(VolumeId, &Volume)> {
        self.volumes.iter().find(|(_, v)| v.name == name).map(|(id, v)| (*id, v))
    }

    /// The sentence for a volume that is not there: names those that are.
    #[must_use]
    pub fn no_such_volume(&self, name: &str) -> String {
        let names: Vec<&str> = self.volumes.values().map(|v| v.name.as_str()).collect();
        if names.is_empty() {
            format!("there is no volume {name:?}; there is none at all yet")
        } else {
            format!("there is no volume {name:?}; there are: {}", names.join(", "))
        }
    }

    // -- volumes ----------------------------------------------------------------------------------------------------

    /// Why a volume of this name with these bricks cannot be made, if it cannot. What only a server can know of a directory
    /// is checked there.
    ///
    /// # Errors
    /// The sentence for the administrator.
    pub fn check_new_volume(&self, name: &str, sets: &[[BrickPlace; 3]], force: bool) -> Result<(), String> {
        check_volume_name(name)?;
        if self.volume_named(name).is_some() {
            return Err(format!("there is a volume {name:?} already; choose another name or delete that one first"));
        }
        if sets.is_empty() {
            return Err("a volume needs bricks: three for each replica set".into());
        }
        let mut seen: Vec<&BrickPlace> = Vec::new();
        for set in sets {
            for (i, place) in set.iter().enumerate() {
                if !self.servers.contains_key(&place.server) {
                    return Err(format!(
                        "server {:x} is not in this cluster; add it with `mortar server add`",
                        place.server.0
                    ));
                }
                if !place.path.starts_with('/') {
                    return Err(format!(
                        "brick path {:?} is not absolute; write it from the root, like /bricks/b1",
                        place.path
                    ));
                }
                let on = |server| self.servers.get(server).map_or(String::new(), |s| s.address.clone());
                if !force && let Some(other) = set[..i].iter().find(|o| o.server == place.server) {
                    return Err(format!(
                        "bricks {} and {} of one replica set are both on server {}, whose failure would take both; use three servers, or --force",
                        other.path,
                        place.path,
                        on(&place.server)
                    ));
                }
                let known = self
                    .bricks
                    .values()
                    .map(|b| (b.server, b.path.as_str(), self.volumes.get(&b.volume).map(|v| v.name.as_str())));
                let new = seen.iter().map(|b| (b.server, b.path.as_str(), None));
                for (server, path, volume) in known.chain(new) {
                    if server != place.server {
                        continue;
                    }
                    let of = volume.map_or("named twice".to_owned(), |v| format!("a brick of volume {v} already"));
                    if same_path(path, &place.path) {
                        return Err(format!(
                            "{} on server {} is {of}; use an empty directory of its own for each brick",
                            place.path,
                            on(&server)
                        ));
                    }
                    // One that contains a brick is not empty, which its own server says better.
                    let contains = volume.is_none() && is_inside(path, &place.path);
                    if contains || is_inside(&place.path, path) {
                        return Err(format!(
                            "{} and {} on server {} lie within each other; bricks must not",
                            place.path,
                            path,
                            on(&server)
                        ));
                    }
                }
                seen.push(place);
            }
        }
        Ok(())
    }

    fn volume_create(
        &mut self,
        name: &str,
        sets: &[[BrickPlace; 3]],
        force: bool,
        time_ns: u64,
        effects: &mut Vec<Effect>,
    ) -> Outcome {
        if let Err(why) = self.check_new_volume(name, sets, force) {
            return refused(why);
        }
        let volume = VolumeId(self.take_id());
        let root = Ino(self.take_id());
        let mut set_ids = Vec::new();
        for places in sets {
            let set = SetId(self.take_id());
            set_ids.push(set);
            let mut member = |place: &BrickPlace| {
                let brick = BrickId(self.take_id());
                let row = Brick { server: place.server, path: place.path.clone(), volume, set };
                self.bricks.insert(brick, row);
                Member {
                    brick,
                    state: BrickState::InSync,
                    incarnation: Incarnation(0),
                    boot: BootId(0),
                    syncing_since: ConfigNo(0),
                    clean: false,
                    full: false,
                }
            };
            let members = [member(&places[0]), member(&places[1]), member(&places[2])];
            let configuration = Configuration { n: ConfigNo(1), members, unflushed_lost: ConfigNo(0) };
            self.sets.insert(set, ReplicaSet { volume, configuration, cold_starts: VecDeque::new() });
            effects.push(Effect::Configured { set, configuration, cold_start: None });
        }
        let time = i64::try_from(time_ns).unwrap_or(i64::MAX);
        let directory = Directory { parent: root, next_cookie: 3, ..Directory::default() };
        self.inodes.insert(
            root,
            Inode {
                volume,
                mode: 0o755,
                uid: 0,
                gid: 0,
                links: 2,
                atime_ns: time,
                mtime_ns: time,
                ctime_ns: time,
                xattrs: BTreeMap::new(),
                opens: 0,
                node: Node::Directory(directory),
            },
        );
        let row = Volume { name: name.to_owned(), started: false, options: BTreeMap::new(), sets: set_ids, root };
        self.volumes.insert(volume, row);
        effects.push(Effect::VolumeChanged { volume });
        Outcome::Volume(volume)
    }

    fn volume_start(&mut self, name: &str, start: bool, force: bool, effects: &mut Vec<Effect>) -> Outcome {
        let Some((id, volume)) = self.volume_named(name) else { return refused(self.no_such_volume(name)) };
        if volume.started == start {
            return refused(format!("volume {name} is {} already", if start { "started" } else { "stopped" }));
        }
        let sessions: Vec<SessionId> =
            self.sessions.iter().filter(|(_, s)| s.volume == Some(id)).map(|(s, _)| *s).collect();
        if !start && !sessions.is_empty() {
            if !force {
                let clients: Vec<&str> =
                    sessions.iter().filter_map(|s| self.sessions.get(s)).map(|s| s.client.as_str()).collect();
                return refused(format!(
                    "volume {name} is mounted by {} client{} ({}); unmount it there first, or use --force, which cuts them off",
                    clients.len(),
                    if clients.len() == 1 { "" } else { "s" },
                    clients.join(", ")
                ));
            }
            for session in sessions {
                self.session_end(session, 0, effects);
            }
        }
        if let Some(volume) = self.volumes.get_mut(&id) {
            volume.started = start;
        }
        effects.push(Effect::VolumeChanged { volume: id });
        Outcome::Done
    }

    fn volume_delete(&mut self, name: &str, effects: &mut Vec<Effect>) -> Outcome {
        let Some((id, volume)) = self.volume_named(name) else { return refused(self.no_such_volume(name)) };
        if volume.started {
            return refused(format!("volume {name} is started; stop it first with `mortar volume stop {name}`"));
        }
        self.volumes.remove(&id);
        self.sets.retain(|_, s| s.volume != id);
        self.bricks.retain(|_, b| b.volume != id);
        let gone: BTreeSet<Ino> = self.inodes.iter().filter(|(_, i)| i.volume == id).map(|(ino, _)| *ino).collect();
        self.inodes.retain(|_, i| i.volume != id);
        for session in self.sessions.values_mut() {
            session.leases.retain(|ino| !gone.contains(ino));
            session.open.retain(|ino| !gone.contains(ino));
        }
        effects.push(Effect::VolumeChanged { volume: id });
        Outcome::Done
    }

    fn volume_set(&mut self, name: &str, key: &str, value: Option<&str>, effects: &mut Vec<Effect>) -> Outcome {
        let Some((id, volume)) = self.volume_named(name) else { return refused(self.no_such_volume(name)) };
        let root = volume.root;
        if let Err(why) = options::check(key, value) {
            return refused(why);
        }
        let Some(volume) = self.volumes.get_mut(&id) else { return Outcome::Superseded };
        match value {
            Some(value) => volume.options.insert(key.to_owned(), value.trim().to_owned()),
            None => volume.options.remove(key),
        };
        let parsed = options::Options::of(volume);
        if (key == options::OWNER_UID || key == options::OWNER_GID)
            && let Some(inode) = self.inodes.get_mut(&root)
        {
            inode.uid = parsed.owner_uid;
            inode.gid = parsed.owner_gid;
            effects.push(Effect::Owned { volume: id, ino: root });
        }
        effects.push(Effect::VolumeChanged { volume: id });
        Outcome::Done
    }

    // -- sessions and leases ----------------------------------------------------------------------------------------

    fn session_open(&mut self, nonce: u128, volume: &str, client: &str, address: &str, opened_ns: u64) -> Outcome {
        let (volume, root) = if volume.is_empty() {
            (None, Ino(0))
        } else {
            let Some((id, row)) = self.volume_named(volume) else { return refused(self.no_such_volume(volume)) };
            if !row.started {
                return refused(format!(
                    "volume {volume} is not started; start it with `mortar volume start {volume}`"
                ));
            }
            (Some(id), row.root)
        };
        let answer = |session| Outcome::Session { session, volume: volume.unwrap_or(VolumeId(0)), root };
        if let Some((session, _)) = self.sessions.iter().find(|(_, s)| s.nonce == nonce && s.volume == volume) {
            return answer(*session);
        }
        let session = SessionId(self.take_id());
        self.sessions.insert(
            session,
            Session {
                nonce,
                volume,
                client: client.chars().take(200).collect(),
                address: address.to_owned(),
                opened_ns,
                open: BTreeSet::new(),
                leases: BTreeSet::new(),
                outcomes: VecDeque::new(),
            },
        );
        answer(session)
    }

    fn session_end(&mut self, session: SessionId, time_ns: u64, effects: &mut Vec<Effect>) {
        let Some(ended) = self.sessions.remove(&session) else { return };
        for ino in ended.leases {
            if let Some((set, lease)) = self.lease_mut(ino)
                && lease.holder == Some(session)
            {
                // What it had in flight is anybody's guess: the next grant recovers [W2].
                lease.holder = None;
                lease.unsettled = !left_out(Rule::W1Lapsed);
                let epoch = lease.epoch;
                effects.push(Effect::Leased { set, ino, epoch, holder: SessionId(0) });
            }
        }
        for ino in ended.open {
            self.closed(ino, time_ns, effects);
        }
        if !ended.outcomes.is_empty() {
            if self.ended.len() == REMEMBERED_SESSIONS {
                self.ended.pop_front();
            }
            self.ended.push_back((session, ended.outcomes));
        }
        effects.push(Effect::SessionEnded { session });
    }

    pub(super) fn session_evict(&mut self, session: SessionId, time_ns: u64, effects: &mut Vec<Effect>) -> Outcome {
        match self.sessions.get(&session) {
            None => refused(format!("there is no session {:x}; `mortar client list` shows those there are", session.0)),
            Some(Session { volume: None, .. }) => refused(format!(
                "session {:x} is the cluster's own janitor, which repairs files that nobody has open; it is no client",
                session.0
            )),
            Some(_) => {
                if self.evicted.len() == REMEMBERED_EVICTIONS {
                    self.evicted.pop_front();
                }
                self.evicted.push_back(session);
                self.session_end(session, time_ns, effects);
                Outcome::Done
            }
        }
    }

    fn lease_mut(&mut self, ino: Ino) -> Option<(SetId, &mut Lease)> {
        match &mut self.inodes.get_mut(&ino)?.node {
            Node::File { set, lease } => Some((*set, lease)),
            _ => None,
        }
    }

    fn lease_grant(
        &mut self,
        ino: Ino,
        to: SessionId,
        from: Option<(SessionId, Epoch, bool)>,
        effects: &mut Vec<Effect>,
    ) -> Outcome {
        let Some(volume) = self.inodes.get(&ino).map(|i| i.volume) else { return Outcome::Errno(NameError::NotFound) };
        match self.sessions.get(&to) {
            None => return Outcome::Errno(NameError::SessionEnded),
            Some(s) if s.volume.is_some_and(|v| v != volume) => return Outcome::Errno(NameError::NotFound),
            Some(_) => {}
        }
        if let Some((holder, epoch, finished)) = from {
            self.lease_release(ino, holder, epoch, finished, effects);
        }
        let Some((set, lease)) = self.lease_mut(ino) else { return Outcome::Errno(NameError::Invalid) };
        match lease.holder {
            Some(holder) if holder == to => {
                return Outcome::Lease { epoch: lease.epoch, recover: lease.recover, previous: None };
            }
            Some(_) => return Outcome::Superseded,
            None => {}
        }
        let previous = (lease.last != SessionId(0) && lease.last != to).then_some(lease.last);
        lease.epoch = lease.epoch.next();
        lease.recover = lease.unsettled;
        lease.unsettled = true;
        lease.holder = Some(to);
        lease.last = to;
        let (epoch, recover) = (lease.epoch, lease.recover);
        // A release that was part of this entry is no news of its own: bricks hear of the new holder.
        effects.retain(|e| !matches!(e, Effect::Leased { ino: i, .. } if *i == ino));
        effects.push(Effect::Leased { set, ino, epoch, holder: to });
        if let Some(session) = self.sessions.get_mut(&to) {
            session.leases.insert(ino);
        }
        Outcome::Lease { epoch, recover, previous }
    }

    fn lease_release(
        &mut self,
        ino: Ino,
        session: SessionId,
        epoch: Epoch,
        finished: bool,
        effects: &mut Vec<Effect>,
    ) -> Outcome {
        let Some((set, lease)) = self.lease_mut(ino) else { return Outcome::Superseded };
        if lease.holder != Some(session) || lease.epoch != epoch {
            return Outcome::Superseded;
        }
        // [W1] A holder that has not finished [W2] leaves it to the next.
        lease.holder = None;
        lease.unsettled = !finished;
        effects.push(Effect::Leased { set, ino, epoch, holder: SessionId(0) });
        if let Some(session) = self.sessions.get_mut(&session) {
            session.leases.remove(&ino);
        }
        Outcome::Done
    }
}

pub(super) fn refused(why: impl Into<String>) -> Outcome {
    Outcome::Refused(why.into())
}

/// Is this a name for a volume?
///
/// # Errors
/// The sentence for the administrator.
pub fn check_volume_name(name: &str) -> Result<(), String> {
    let good = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '-');
    if name.is_empty()
        || name.len() > MAX_VOLUME_NAME
        || !name.chars().all(good)
        || !name.starts_with(|c: char| c.is_ascii_alphanumeric())
    {
        return Err(format!(
            "{name:?} is no name for a volume; use 1 to {MAX_VOLUME_NAME} letters, digits, dots, dashes and underscores, beginning with a letter or digit"
        ));
    }
    Ok(())
}

fn parts(path: &str) -> impl Iterator<Item = &str> {
    path.split('/').filter(|p| !p.is_empty() && *p != ".")
}

pub(super) fn same_path(a: &str, b: &str) -> bool {
    parts(a).eq(parts(b))
}

/// `inner` lies below `outer`.
pub(super) fn is_inside(inner: &str, outer: &str) -> bool {
    let mut inner = parts(inner);
    parts(outer).all(|p| inner.next() == Some(p)) && inner.next().is_some()
}
