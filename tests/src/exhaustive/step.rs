//! One thing that can happen: which of them can happen now, and what each does.

use mortar_proto::coordinator::{Body, Event};

use super::scope::{Allowed, Kind};
use super::world::{BRICKS, CLIENTS, Origin, World};

/// Something that can happen. `c` is a client, `s` a brick, `i` a place in a queue.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[allow(missing_docs)]
pub enum Step {
    Write { c: usize },
    Read { c: usize },
    Flush { c: usize },
    Deliver { c: usize, s: usize, i: usize },
    Run { s: usize, i: usize },
    Answer { c: usize, s: usize, i: usize },
    DeliverStray { i: usize },
    Break { c: usize, s: usize },
    Kill { s: usize },
    Power { s: usize, version: usize, comes_back: bool },
    Start { s: usize },
    Fail { s: usize },
    Stop { s: usize },
    Stopped { s: usize },
    Apply { s: usize },
    Learn { c: usize },
    Beat { s: usize },
    Silence,
    Poll,
    Elect,
    Recall { c: usize },
    Grant { c: usize },
    Crash { c: usize },
    Lapse { c: usize },
    Told { c: usize },
    Adopt { c: usize },
    Permit { c: usize },
    Plan { s: usize, source: usize },
    TakeOver { s: usize },
    Repaired { s: usize },
    Tidy { s: usize },
    Tidied { s: usize },
    Tick { c: usize },
}

/// The request is about the block, and not about regions that have nothing.
#[must_use]
pub fn touches_block(body: &Body) -> bool {
    matches!(body, Body::Pull { range, size: false, .. } if range.start == 0)
}

/// How its three steps are called.
fn kinds(body: &Body) -> [Kind; 3] {
    match body {
        Body::Mutate(..) => [Kind::DeliverMutation, Kind::RunMutation, Kind::AnswerMutation],
        body if touches_block(body) => [Kind::DeliverPull, Kind::RunPull, Kind::AnswerPull],
        _ => [Kind::Deliver, Kind::Run, Kind::Answer],
    }
}

impl World {
    /// What happens by itself before anything else can.
    pub(super) fn next_at_once(&self) -> Option<Step> {
        let mut found = None;
        self.visit(&mut |step, kind| {
            let at_once = match self.allowed.get(&kind) {
                Some(Allowed::AtOnce) => true,
                // Only those that can be struck lag.
                Some(_) => matches!(step, Step::Apply { s } if !self.strikes.contains(&s)),
                None => false,
            };
            if at_once {
                found = Some(step);
            }
            at_once
        });
        found
    }

    /// Everything that can happen now.
    #[must_use]
    pub fn steps(&self) -> Vec<(Step, Kind)> {
        let mut steps = Vec::new();
        self.visit(&mut |step, kind| {
            match self.allowed.get(&kind) {
                _ if kind.is_fault() && self.faults == 0 => {}
                Some(Allowed::Any) => steps.push((step, kind)),
                Some(Allowed::Times(n)) if *n > 0 => steps.push((step, kind)),
                _ => {}
            }
            false
        });
        steps
    }

    /// Shows everything that is possible until one is taken.
    fn visit(&self, take: &mut dyn FnMut(Step, Kind) -> bool) {
        let _ = self.visit_messages(take)
            || self.visit_bricks(take)
            || self.visit_leader(take)
            || self.visit_applications(take)
            || self.visit_faults(take);
    }

    fn visit_messages(&self, take: &mut dyn FnMut(Step, Kind) -> bool) -> bool {
        for c in 0..CLIENTS {
            for s in 0..BRICKS {
                let pipe = &self.pipes[c][s];
                for (i, answer) in pipe.answers.iter().enumerate() {
                    if take(Step::Answer { c, s, i }, kinds(&answer.3)[2]) {
                        return true;
                    }
                }
                for (i, request) in pipe.requests.iter().enumerate() {
                    if take(Step::Deliver { c, s, i }, kinds(&request.body)[0]) {
                        return true;
                    }
                }
            }
        }
        for s in 0..BRICKS {
            for (i, job) in self.bricks[s].jobs.iter().enumerate() {
                if take(Step::Run { s, i }, kinds(&job.request.body)[1]) {
                    return true;
                }
            }
        }
        (0..self.strays.len()).any(|i| take(Step::DeliverStray { i }, Kind::DeliverStray))
    }

    fn visit_bricks(&self, take: &mut dyn FnMut(Step, Kind) -> bool) -> bool {
        for s in (0..BRICKS).filter(|s| self.bricks[*s].is_up()) {
            let brick = &self.bricks[s];
            if brick.applied < self.leader.entries.len() && take(Step::Apply { s }, Kind::Apply) {
                return true;
            }
            for source in self.plan_sources(s) {
                if take(Step::Plan { s, source }, Kind::Plan) {
                    return true;
                }
            }
            if brick.taken_over.is_some() && take(Step::Repaired { s }, Kind::Repaired)
                || self.can_take_over(s) && take(Step::TakeOver { s }, Kind::TakeOver)
                || brick.is_tidying() && take(Step::Tidied { s }, Kind::Tidied)
                || brick.has_stopped() && take(Step::Stopped { s }, Kind::Stopped)
            {
                return true;
            }
        }
        false
    }

    fn visit_leader(&self, take: &mut dyn FnMut(Step, Kind) -> bool) -> bool {
        for c in (0..CLIENTS).filter(|c| self.clients[*c].is_up()) {
            let client = &self.clients[c];
            if client.knows < self.configuration().n && take(Step::Learn { c }, Kind::Learn)
                || !self.leader.has_session(client.session) && take(Step::Told { c }, Kind::Told)
                || self.can_grant(c) && take(Step::Grant { c }, Kind::Grant)
                || self.must_recall(c) && self.recall_is_news() && take(Step::Recall { c }, Kind::Recall)
            {
                return true;
            }
            if client.wants_permit {
                let data = client.next_repair_has_data(self.now_ms);
                let kind = if data { Kind::Repair } else { Kind::RepairNothing };
                if take(Step::Permit { c }, kind) {
                    return true;
                }
            }
        }
        (0..BRICKS).any(|s| self.can_beat(s) && take(Step::Beat { s }, Kind::Beat))
            || self.allowed.contains_key(&Kind::Poll)
                && self.leader.proposal().is_some()
                && take(Step::Poll, Kind::Poll)
            || take(Step::Silence, Kind::Silence)
            || take(Step::Elect, Kind::Elect)
    }

    fn visit_applications(&self, take: &mut dyn FnMut(Step, Kind) -> bool) -> bool {
        for c in (0..CLIENTS).filter(|c| self.clients[*c].is_up()) {
            if take(Step::Write { c }, Kind::Write)
                || take(Step::Read { c }, Kind::Read)
                || take(Step::Flush { c }, Kind::Flush)
            {
                return true;
            }
            let holder = self.leader.lease().holder;
            if holder.is_none() && !self.clients[c].wants_lease && take(Step::Adopt { c }, Kind::Adopt) {
                return true;
            }
            if self.allowed.contains_key(&Kind::Tick)
                && self.clients[c].can_tick(self.now_ms)
                && take(Step::Tick { c }, Kind::Tick)
            {
                return true;
            }
        }
        false
    }

    fn visit_faults(&self, take: &mut dyn FnMut(Step, Kind) -> bool) -> bool {
        for s in self.strikes.iter().copied() {
            let brick = &self.bricks[s];
            if !brick.is_up() {
                if take(Step::Start { s }, Kind::Start) {
                    return true;
                }
                continue;
            }
            for version in 0..brick.disk.versions().len() {
                for comes_back in [false, true].into_iter().filter(|back| !back || brick.disk.has_removed()) {
                    if take(Step::Power { s, version, comes_back }, Kind::Power) {
                        return true;
                    }
                }
            }
            let failed = brick.replica.as_ref().is_some_and(|r| r.has_failed());
            if take(Step::Kill { s }, Kind::Kill)
                || !failed && take(Step::Fail { s }, Kind::Fail)
                || !failed && !brick.stopping && take(Step::Stop { s }, Kind::Stop)
                || brick.can_tidy() && take(Step::Tidy { s }, Kind::Tidy)
            {
                return true;
            }
            for c in 0..CLIENTS {
                let pipe = &self.pipes[c][s];
                let busy = pipe.number != 0 && !(pipe.requests.is_empty() && pipe.answers.is_empty());
                let waited_for = brick.jobs.iter().any(|j| j.origin.number == pipe.number);
                if (busy || waited_for) && take(Step::Break { c, s }, Kind::Break) {
                    return true;
                }
            }
        }
        let holder = self.leader.lease().holder;
        (0..CLIENTS).any(|c| {
            let client = &self.clients[c];
            client.is_up()
                && (client.waits() > 0 || holder == Some(client.session))
                && take(Step::Crash { c }, Kind::Crash)
                || holder == Some(client.session) && take(Step::Lapse { c }, Kind::Lapse)
        })
    }

    /// Makes a step happen, and what happens at once after it; then looks whether all is well.
    pub fn play(&mut self, step: Step, kind: Kind) {
        if kind.is_fault() {
            self.faults = self.faults.saturating_sub(1);
        }
        if let Some(Allowed::Times(n)) = self.allowed.get_mut(&kind) {
            *n = n.saturating_sub(1);
        }
        if let Some(trace) = &mut self.trace {
            trace.push(format!("{step:?}"));
        }
        self.take(step);
        self.at_once();
        if self.failure.is_none() {
            self.check_step();
        }
    }

    /// Makes a step happen.
    pub(super) fn take(&mut self, step: Step) {
        match step {
            Step::Write { c } => self.write(c),
            Step::Read { c } => self.read(c),
            Step::Flush { c } => self.flush(c),
            Step::Deliver { c, s, i } => {
                let pipe = &mut *self.pipes[c][s];
                let (request, number) = (pipe.requests.remove(i), pipe.number);
                let origin = Origin { client: c, session: self.clients[c].session, number };
                self.request(s, origin, request);
            }
            Step::Run { s, i } => self.run(s, i),
            Step::Answer { c, s, i } => {
                let (id, answer, value, _) = self.pipes[c][s].answers.remove(i);
                self.answer_arrives(c, id, answer, value);
            }
            Step::DeliverStray { i } => {
                let (s, origin, request) = self.strays.remove(i);
                self.request(s, origin, request);
            }
            Step::Break { c, s } => {
                self.disconnect(c, s, false);
                self.connect(c, s);
            }
            Step::Kill { s } => self.stop_process(s),
            Step::Power { s, version, comes_back } => self.lose_power(s, version, comes_back),
            Step::Start { s } => self.start_process(s),
            Step::Fail { s } => self.change_replica(s, |r| r.fail()),
            Step::Stop { s } => {
                self.bricks[s].stopping = true;
                self.change_replica(s, |r| r.agree_to_out());
            }
            Step::Stopped { s } => self.end_cleanly(s),
            Step::Apply { s } => self.apply(s),
            Step::Learn { c } => self.learn(c),
            Step::Beat { s } => self.beat(s),
            Step::Silence => self.silence(),
            Step::Poll => self.poll(),
            Step::Elect => self.leader.elect(),
            Step::Recall { .. } => self.recall(),
            Step::Grant { c } => self.grant(c),
            Step::Crash { c } => self.crash(c),
            Step::Lapse { c } => self.end_session(self.clients[c].session),
            Step::Told { c } => self.told(c),
            Step::Adopt { c } => self.tell(c, Event::Adopt, None),
            Step::Permit { c } => self.permit(c),
            Step::Plan { s, source } => self.plan(s, source),
            Step::TakeOver { s } => self.take_over(s),
            Step::Repaired { s } => self.repaired(s),
            Step::Tidy { s } => self.begin_tidying(s),
            Step::Tidied { s } => self.end_tidying(s),
            Step::Tick { c } => self.tick(c),
        }
    }

    fn change_replica(&mut self, s: usize, change: impl FnOnce(&mut mortar_proto::replica::Replica)) {
        if let Some(replica) = &mut self.bricks[s].replica {
            change(replica);
        }
    }
}
