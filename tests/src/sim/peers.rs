//! What bricks say to each other, and what a brick's process does by itself: planning, coming to the end of repair,
//! clearing intents, stopping cleanly.

use mortar_proto::BrickState;
use mortar_proto::Slot;
use mortar_proto::left_out::{Rule, left_out};
use mortar_proto::replica::{Admission, Purpose};

use super::brick::{Lists, Peer, Step, Task, TaskKind};
use super::world::{Happening, Node, World, slot};

/// Intents are cleared when nothing has touched them for this long.
const INTENT_IDLE_MS: u64 = 400;

/// How long a clean stop waits to be put out.
const STOP_WAIT_MS: u64 = 4000;
/// How long what is running may take to end.
const DRAIN_MS: u64 = 3000;

impl World {
    pub(super) fn say(&mut self, from: usize, to: usize, message: Peer) {
        let generation = self.bricks[from].generation;
        self.send(Node::Brick(from), Node::Brick(to), false, Happening::Peer { from, to, generation, message });
    }

    pub(super) fn peer(&mut self, from: usize, s: usize, message: Peer) {
        match message {
            Peer::Ask(number, wire) => {
                let now = self.brick_now(s);
                let stamp = Self::stamp(&wire);
                let content = match self.replica(s).admit(wire.ino, &stamp, Purpose::Source, now) {
                    Admission::Apply(ticket, _) => {
                        self.replica(s).finish(ticket, Purpose::Source, false, true, now);
                        Some(self.bricks[s].disk.content(wire.ino))
                    }
                    _ => None,
                };
                self.say(s, from, Peer::Data(number, content));
            }
            Peer::Data(number, content) => {
                let Some(job) = self.bricks[s].pulls.remove(&number) else { return };
                match content {
                    Some(content) => {
                        let delay = self.disk_delay(s);
                        self.later(s, delay, Step::Pulled(job, content));
                    }
                    None => self.pull_failed(s, job),
                }
            }
            Peer::AskLists(number, n) => {
                let data = self.bricks[s].disk.data();
                let replica = self.replica(s);
                let ready = replica.report().is_some_and(|r| r.n == n) && replica.state() == BrickState::InSync;
                let lists = ready.then(|| Lists {
                    data,
                    intents: replica.intents(),
                    missed: Slot::ALL
                        .into_iter()
                        .flat_map(|x| replica.missed(x).into_iter().map(move |(ino, set)| (x, ino, set)))
                        .collect(),
                });
                self.say(s, from, Peer::Lists(number, lists));
            }
            Peer::Lists(number, lists) => self.listed(s, from, number, lists),
        }
    }

    /// Makes the plan, or comes to the end of repair, whichever is due [S1], [S4].
    pub(super) fn plan(&mut self, s: usize) {
        if self.bricks[s].task.is_some() {
            return;
        }
        let replica = self.replica(s);
        let (kind, n, from) = match (replica.plan_due(), replica.finish_due()) {
            (Some((n, from)), _) => (TaskKind::Plan, n, from),
            (None, Some((n, from))) => (TaskKind::Finish, n, from),
            (None, None) => return,
        };
        let number = self.number();
        self.bricks[s].task = Some(Task { number, kind, n, left: from, lists: Vec::new() });
        self.later(s, 1000, Step::TaskLate(number));
        for source in from.iter() {
            self.say(s, source.index(), Peer::AskLists(number, n));
        }
        self.task_ready(s);
    }

    pub(super) fn listed(&mut self, s: usize, from: usize, number: u64, lists: Option<Lists>) {
        let Some(task) = self.bricks[s].task.as_mut().filter(|t| t.number == number) else { return };
        match lists {
            Some(lists) => {
                task.left.remove(slot(from));
                task.lists.push(lists);
                self.task_ready(s);
            }
            None => self.bricks[s].task = None,
        }
    }

    pub(super) fn task_ready(&mut self, s: usize) {
        let Some(task) = self.bricks[s].task.as_ref().filter(|t| t.left.is_empty()).cloned() else { return };
        match task.kind {
            TaskKind::Plan => {
                let in_full = self.replica(s).plans_in_full();
                let intents: Vec<_> = if in_full {
                    self.count("compared in full");
                    // One source is asked, and what this brick has itself is compared as well.
                    let source = task.lists.into_iter().next().map(|l| l.data).unwrap_or_default();
                    source.into_iter().chain(self.bricks[s].disk.data()).collect()
                } else {
                    task.lists.into_iter().flat_map(|l| l.intents).collect()
                };
                let planned = self.replica(s).plan(task.n, &intents);
                self.event(|| format!("b{s} plans under n={}: {planned} {intents:?}", task.n));
                self.bricks[s].task = None;
            }
            TaskKind::Finish => {
                let missed: Vec<_> = task.lists.into_iter().flat_map(|l| l.missed).collect();
                if missed.iter().any(|(x, _, _)| x.index() == s) && !left_out(Rule::S4Reports) {
                    self.bricks[s].task = None;
                    return;
                }
                let all = missed.iter().flat_map(|(x, ino, set)| set.iter().map(move |r| (*x, *ino, r))).collect();
                let delay = self.disk_delay(s);
                self.later(s, delay, Step::TakenOver(task.n, all));
                if let Some(task) = self.bricks[s].task.as_mut() {
                    // It is not late from here on.
                    task.number = 0;
                }
            }
        }
    }

    pub(super) fn clear_intents(&mut self, s: usize) {
        if self.bricks[s].clearing || !self.rng.chance(200) {
            return;
        }
        let now = self.brick_now(s);
        let files = self.replica(s).clearable_intents(now, INTENT_IDLE_MS);
        if !files.is_empty() {
            self.bricks[s].clearing = true;
            let upto = self.bricks[s].disk.written();
            let delay = self.disk_delay(s);
            self.later(s, delay, Step::Clear(files, now, upto));
        }
    }

    /// A clean stop [E5]: it asks to be put out, and for a while waits for that; then it takes nothing more, drains and flushes.
    pub(super) fn stop_cleanly(&mut self, s: usize) {
        let Some(since) = self.bricks[s].stopping.filter(|_| !self.bricks[s].stop_flushing) else { return };
        let replica = self.replica(s);
        replica.agree_to_out();
        let is_wanted = replica.is_live() && replica.state() != BrickState::Out && !replica.has_failed();
        if is_wanted && since + STOP_WAIT_MS > self.now {
            return;
        }
        self.bricks[s].closed = true;
        self.bricks[s].waiting.clear();
        let replica = self.replica(s);
        // It must have known all once, and have nothing left of what others told it.
        let is_whole = !replica.has_failed() && replica.planned_regions().is_empty();
        let is_drained = replica.is_drained();
        let knew_all = self.bricks[s].registration.clean || self.bricks[s].was_in_sync;
        if is_drained && is_whole && knew_all {
            self.lose(s);
            self.bricks[s].stop_flushing = true;
            let (upto, began) = (self.bricks[s].disk.written(), self.brick_now(s) + 1);
            let delay = self.disk_delay(s);
            self.later(s, delay, Step::Stop(upto, began));
        } else if is_drained || since + STOP_WAIT_MS + DRAIN_MS <= self.now {
            self.count("unclean stop");
            let down = self.rng.between(50, 2000);
            self.stop_brick(s, false, down);
        }
    }
}
