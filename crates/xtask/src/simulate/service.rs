//! A service under a scaler: its replicas, the gateway before them, and what came of it.
use std::collections::VecDeque;

use lathe_scaling::{Capacity, Report};

use super::replica::{Done, Replica, Server};
use super::scalers::Scaler;
use super::trace::{Request, Trace, WARM_UP};

/// Seconds to the first token beyond which a request is late.
pub const GOAL: f64 = 2.0;

/// What a scaler sees each second.
#[derive(Debug)]
pub struct Seen<'a> {
    /// The second that ended.
    pub now: i64,
    /// What the gateway counted in it.
    pub report: Report,
    /// Replicas that are asked for.
    pub asked: u32,
    /// Replicas that finish what they have.
    pub draining: u32,
    /// Seconds that a replica takes to be ready.
    pub start_up: i64,
    /// What each ready replica did.
    pub ready: &'a [Pod],
    /// What one can do.
    pub capacity: Capacity,
    /// Mean work of a request, in seconds of one replica.
    pub work: f64,
    /// What is expected to come, in replicas' worth: nobody knows this.
    pub load: f64,
}

/// What a ready replica did in a second.
#[derive(Clone, Copy, Debug)]
pub struct Pod {
    /// Which it is.
    pub id: u32,
    /// Share of its capacity that flowed.
    pub busy: f64,
    /// Requests in its queue.
    pub waiting: f64,
}

/// What came of a run, or of several.
#[derive(Clone, Debug, Default)]
pub struct Outcome {
    /// Hours of all replicas, from being asked for to being gone.
    pub replica_hours: f64,
    /// Requests whose first token came too late or never.
    pub late: u32,
    /// All requests.
    pub requests: u32,
    /// How often a rise followed a fall, or a fall a rise.
    pub turns: u32,
    /// Ready replicas, second by second after the warm-up.
    pub ready: Vec<u32>,
    /// Replicas asked for, likewise.
    pub asked: Vec<u32>,
}

impl Outcome {
    /// Both together; what happened second by second stays that of the first.
    pub fn and(self, other: Self) -> Self {
        Self {
            replica_hours: self.replica_hours + other.replica_hours,
            late: self.late + other.late,
            requests: self.requests + other.requests,
            turns: self.turns + other.turns,
            ..self
        }
    }

    /// Late requests as a share of all.
    pub fn late_share(&self) -> f64 {
        f64::from(self.late) / f64::from(self.requests.max(1))
    }
}

struct Service<'a> {
    server: &'a Server,
    start_up: i64,
    replicas: Vec<Member>,
    made: u32,
    held: VecDeque<Request>,
    /// Requests that got their first token in time.
    in_time: u32,
}

struct Member {
    id: u32,
    state: State,
    replica: Replica,
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum State {
    Starting { ready_at: i64 },
    Ready,
    Draining,
}

/// Replays a trace under a scaler, where a replica takes `start_up` seconds from being asked for to being ready.
pub fn run(trace: &Trace, server: &Server, start_up: i64, scaler: &mut dyn Scaler) -> Outcome {
    let mut service =
        Service { server, start_up, replicas: Vec::new(), made: 0, held: VecDeque::new(), in_time: 0 };
    let first = (trace.load.first().copied().unwrap_or_default() / 0.7).ceil().max(1.0) as u32;
    service.scale(first, -start_up);
    let mut outcome = Outcome::default();
    let (mut asked, mut rising) = (first, None);
    let mut requests = trace.requests.iter().peekable();
    for (second, load) in trace.load.iter().enumerate() {
        let (begin, now) = (second as i64, second as i64 + 1);
        let counts = second >= WARM_UP;
        service.start(begin);
        let mut arrived = 0;
        while let Some(request) = requests.next_if(|request| request.at < now as f64) {
            arrived += 1;
            service.advance(request.at);
            service.offer(*request);
        }
        service.advance(now as f64);
        let (report, ready) = service.report(now, arrived);
        let draining =
            service.replicas.iter().filter(|member| member.state == State::Draining).count() as u32;
        let seen = Seen {
            now,
            report,
            asked,
            draining,
            start_up,
            ready: &ready,
            capacity: server.capacity(),
            work: trace.work,
            load: *load,
        };
        let wanted = scaler.second(&seen);
        if counts {
            outcome.requests += arrived;
            outcome.replica_hours += service.replicas.len() as f64 / 3600.0;
            outcome.ready.push(ready.len() as u32);
            outcome.asked.push(wanted);
            if wanted != asked {
                outcome.turns += u32::from(rising.is_some_and(|rising| rising != (wanted > asked)));
                rising = Some(wanted > asked);
            }
        }
        asked = wanted;
        service.scale(asked, now);
    }
    // What is still there may yet be in time.
    service.advance(trace.load.len() as f64 + GOAL);
    outcome.late = outcome.requests.saturating_sub(service.in_time);
    outcome
}

impl Service<'_> {
    /// What is ready by `now` takes requests, at first those that are held.
    fn start(&mut self, now: i64) {
        for member in &mut self.replicas {
            if matches!(member.state, State::Starting { ready_at } if ready_at <= now) {
                (member.state, member.replica) = (State::Ready, Replica::new(now as f64));
            }
        }
        self.replicas.retain(|member| {
            member.state != State::Draining || member.replica.running() + member.replica.waiting() > 0
        });
        if self.replicas.iter().any(|member| member.state == State::Ready) {
            for request in std::mem::take(&mut self.held) {
                self.offer(request);
            }
        }
    }

    /// To the replica with the fewest tokens outstanding; refused where every queue is full, held where no replica is.
    fn offer(&mut self, request: Request) {
        let full = self.server.waiting;
        let mut ready = self.replicas.iter_mut().filter(|member| member.state == State::Ready).peekable();
        if ready.peek().is_none() {
            self.held.push_back(request);
            return;
        }
        let open = ready.filter(|member| member.replica.waiting() < full);
        if let Some(member) = open.min_by_key(|member| member.replica.outstanding()) {
            member.replica.push(request);
        }
    }

    fn advance(&mut self, now: f64) {
        let in_time = &mut self.in_time;
        for member in &mut self.replicas {
            if !matches!(member.state, State::Starting { .. }) {
                member.replica.advance(self.server, now, |request, at| {
                    *in_time += u32::from(at - request.at <= GOAL && request.at >= WARM_UP as f64);
                });
            }
        }
    }

    fn report(&mut self, now: i64, arrived: u32) -> (Report, Vec<Pod>) {
        let capacity = self.server.capacity();
        let mut report =
            Report { at: now, arrived: arrived.into(), held: self.held.len() as f64, ..Report::default() };
        let mut pods = Vec::new();
        for Member { id, state, replica } in &mut self.replicas {
            let Done { prompt, generation, finished } = replica.take();
            let (running, waiting) = (replica.running() as f64, replica.waiting() as f64);
            report.prompt += prompt;
            report.generation += generation;
            report.finished += finished;
            report.running += running;
            report.waiting += waiting;
            if *state == State::Ready {
                let busy = prompt / capacity.prompt + generation / capacity.generation;
                pods.push(Pod { id: *id, busy, waiting });
            }
        }
        (report, pods)
    }

    /// As a Deployment does: new ones start; of too many, those that are not ready go first, then the youngest.
    fn scale(&mut self, asked: u32, now: i64) {
        let is_member = |member: &Member| member.state != State::Draining;
        let have = self.replicas.iter().filter(|member| is_member(member)).count();
        for _ in have..asked as usize {
            let state = State::Starting { ready_at: now + self.start_up };
            self.replicas.push(Member { id: self.made, state, replica: Replica::default() });
            self.made += 1;
        }
        for _ in asked as usize..have {
            let starting = |member: &Member| matches!(member.state, State::Starting { .. });
            if let Some(at) = self.replicas.iter().rposition(starting) {
                self.replicas.remove(at);
            } else if let Some(member) = self.replicas.iter_mut().rev().find(|member| is_member(member)) {
                member.state = State::Draining;
            }
        }
    }
}
