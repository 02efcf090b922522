//! Pure: what flows to a service whose workers everybody asks themselves, from what the workers counted since their start.
use std::collections::BTreeMap;

use lathe_api::{CountedStatus, MAX_COUNTED};
use lathe_contract::{Load, Totals};
use lathe_scaling::{REPLAY, Report, Seconds, Window};

use super::{notes::MOST, traffic::SETTLES};

/// What the workers of one service said.
#[derive(Debug, Default)]
pub struct Workers {
    /// The counts of each pod when it last answered, and when that was.
    counted: BTreeMap<String, (Totals, Seconds)>,
    /// When they were asked last, and first.
    asked: Option<Seconds>,
    begun: Option<Seconds>,
    /// All that they had counted at moments of the last minute, the newest of which is that when each of them answered last.
    sums: Vec<CountedStatus>,
    /// As an earlier leader wrote them down, until they have told what came since.
    remembered: Vec<CountedStatus>,
    window: Window,
}

impl Workers {
    /// Goes on from what an earlier leader wrote down.
    pub fn remembered(remembered: Vec<CountedStatus>) -> Self {
        Self { remembered, ..Self::default() }
    }

    /// Whether some have yet to tell what they did since an earlier leader's sums; who does not is not waited for for long.
    pub fn wait(&self, now: Seconds) -> bool {
        !self.remembered.is_empty() && self.begun.is_none_or(|begun| now.saturating_sub(begun) < SETTLES)
    }

    /// What is to be written down, for a leader that starts anew.
    pub fn sums(&self) -> &[CountedStatus] {
        if self.sums.is_empty() { &self.remembered } else { &self.sums }
    }

    /// Whether they were not asked for as long as `pause`.
    pub fn are_due(&self, pause: Seconds, now: Seconds) -> bool {
        self.asked.is_none_or(|asked| now.saturating_sub(asked) >= pause || now < asked)
    }

    /// Takes what each ready pod said by `now`; `None`: it did not answer. What was counted since they were last asked is spread
    /// evenly over the seconds between; a pod that is new counts from now on. `replicas` is another word for other pods: only of
    /// the same ones an earlier leader's sum says what they did since.
    pub fn hear(&mut self, said: &BTreeMap<String, Option<Load>>, replicas: &str, now: Seconds) {
        if let Some(fresh) = sum_of(said, replicas, now) {
            let before = std::mem::take(&mut self.remembered);
            if !before.is_empty() {
                self.sums = before;
                self.sums.push(fresh);
                self.go_on(said);
            } else if let [.., before, last] = &mut self.sums[..]
                && now < before.at.saturating_add(APART)
            {
                *last = fresh;
            } else {
                self.sums.push(fresh);
            }
            let surplus = self.sums.len().saturating_sub(MAX_COUNTED);
            self.sums.drain(..surplus);
        }
        self.begun.get_or_insert(now);
        let asked = self.asked.replace(now);
        let mut sum = Report::default();
        let mut counted = BTreeMap::new();
        for (pod, load) in said {
            let before = self.counted.get(pod).copied();
            let Some(load) = load else {
                sum.missing += 1;
                counted.extend(before.map(|before| (pod.clone(), before)));
                continue;
            };
            counted.insert(pod.clone(), (load.totals, now));
            sum.running += load.running as f64;
            sum.waiting += load.waiting as f64;
            if let Some((before, then)) = before {
                // A second's share: a pod that was silent for long, or not asked, did not do it all in the last second.
                let seconds = now.saturating_sub(then).max(1) as f64;
                let since = |of: fn(&Totals) -> i64| difference(of(&before), of(&load.totals)) / seconds;
                sum.arrived += since(|totals| totals.arrived);
                sum.finished += since(|totals| totals.finished);
                sum.prompt += since(|totals| totals.prompt);
                sum.generation += since(|totals| totals.generation);
            }
        }
        self.counted = counted;
        let Some(asked) = asked.filter(|asked| *asked < now) else { return };
        // What lies further back is not known any more.
        let first = asked.max(now.saturating_sub(MOST_SECONDS));
        (first + 1..=now).for_each(|at| self.window.push(Report { at, ..sum }));
    }

    /// Fills in the seconds between the sums, as far as they are of the same replicas.
    fn go_on(&mut self, said: &BTreeMap<String, Option<Load>>) {
        let loads = || said.values().flatten();
        let still = Report {
            running: loads().map(|load| load.running as f64).sum(),
            waiting: loads().map(|load| load.waiting as f64).sum(),
            ..Report::default()
        };
        for pair in self.sums.windows(2) {
            let [before, after] = pair else { continue };
            let seconds = after.at.saturating_sub(before.at);
            if before.replicas != after.replicas || !(1..=REPLAY).contains(&seconds) {
                continue;
            }
            let since = |of: fn(&CountedStatus) -> i64| difference(of(before), of(after)) / seconds as f64;
            let flow = Report {
                arrived: since(|sum| sum.arrived),
                finished: since(|sum| sum.finished),
                prompt: since(|sum| sum.prompt),
                generation: since(|sum| sum.generation),
                ..still
            };
            (before.at + 1..=after.at).for_each(|at| self.window.push(Report { at, ..flow }));
        }
    }

    /// What flowed in the last two minutes.
    pub fn window(&self) -> &Window {
        &self.window
    }
}

/// What they counted all together; `None` where one of them did not answer.
fn sum_of(said: &BTreeMap<String, Option<Load>>, replicas: &str, now: Seconds) -> Option<CountedStatus> {
    let loads: Vec<&Load> = said.values().map(Option::as_ref).collect::<Option<_>>()?;
    // As the schema allows it.
    let sum = |of: fn(&Totals) -> i64| {
        loads.iter().fold(0_i64, |sum, load| sum.saturating_add(of(&load.totals).max(0))).min(MOST)
    };
    (!loads.is_empty()).then(|| CountedStatus {
        replicas: replicas.to_owned(),
        at: now.clamp(0, MOST),
        arrived: sum(|totals| totals.arrived),
        finished: sum(|totals| totals.finished),
        prompt: sum(|totals| totals.prompt),
        generation: sum(|totals| totals.generation),
    })
}

/// Seconds between two sums that are kept.
const APART: Seconds = 15;
/// Seconds that one answer is spread over at most.
const MOST_SECONDS: Seconds = 10;

/// What was counted since; a worker that started again counts from 0.
fn difference(before: i64, now: i64) -> f64 {
    let since = if now < before { now } else { now.saturating_sub(before) };
    since.max(0) as f64
}

#[cfg(test)]
mod tests {
    use super::*;

    const ZERO: Seconds = 1_700_000_000;

    fn load(arrived: i64, running: i64) -> Option<Load> {
        let totals = Totals { arrived, finished: arrived, ..Totals::default() };
        Some(Load { running, totals, ..Load::default() })
    }

    fn said(all: &[(&str, Option<Load>)]) -> BTreeMap<String, Option<Load>> {
        all.iter().map(|(pod, load)| ((*pod).to_owned(), load.clone())).collect()
    }

    fn report(at: Seconds, arrived: f64, running: f64, missing: u32) -> Report {
        Report { at: ZERO + at, arrived, finished: arrived, running, missing, ..Report::default() }
    }

    #[test]
    fn what_was_counted_is_spread_over_the_seconds_between() {
        let mut workers = Workers::default();
        assert!(workers.are_due(2, ZERO));
        workers.hear(&said(&[("a", load(100, 1))]), "ab", ZERO);
        assert_eq!(*workers.window(), Window::default(), "nothing is known yet");
        assert!(!workers.are_due(2, ZERO + 1) && workers.are_due(2, ZERO + 2));
        // A new pod counts from now on.
        workers.hear(&said(&[("a", load(106, 2)), ("b", load(50, 1))]), "ab", ZERO + 2);
        // One started again, one is gone for a moment.
        workers.hear(&said(&[("a", load(4, 0)), ("b", None)]), "ab", ZERO + 4);
        workers.hear(&said(&[("a", load(4, 0)), ("b", load(58, 0))]), "ab", ZERO + 6);
        workers.hear(&said(&[]), "ab", ZERO + 7);
        let expected = [
            report(1, 3.0, 3.0, 0),
            report(2, 3.0, 3.0, 0),
            report(3, 2.0, 0.0, 1),
            report(4, 2.0, 0.0, 1),
            // Eight in the four seconds since it last answered.
            report(5, 2.0, 0.0, 0),
            report(6, 2.0, 0.0, 0),
            report(7, 0.0, 0.0, 0),
        ];
        assert_eq!(*workers.window(), expected.into_iter().collect());
    }

    /// A leader that asks each two seconds, and one that takes over after it and knows what it wrote down.
    #[test]
    fn a_new_leader_knows_what_the_same_workers_did_since_the_last_notes() {
        let mut first = Workers::default();
        for at in (0..=20).step_by(2) {
            first.hear(&said(&[("a", load(3 * at, 1)), ("b", load(100 + at, 1))]), "ab", ZERO + at);
        }
        let notes = first.sums().to_vec();
        let told: Vec<_> = notes.iter().map(|sum| (sum.at - ZERO, sum.arrived)).collect();
        assert_eq!(told, [(0, 100), (14, 156), (20, 180)]);
        let now = [("a", load(3 * 40, 2)), ("b", load(200, 0))];
        let later = ZERO + 40;
        // Not each of them answers: it is not known yet what they did.
        let mut next = Workers::remembered(notes.clone());
        next.hear(&said(&[now[0].clone(), ("b", None)]), "ab", later - 2);
        assert!(next.wait(later - 2) && next.wait(later + 2) && !next.wait(later + 3));
        assert_eq!((next.window(), next.sums()), (&Window::default(), &notes[..]));
        next.hear(&said(&now), "ab", later);
        assert_eq!((next.sums().len(), next.wait(later)), (4, false));
        let mut other = Workers::remembered(notes.clone());
        other.hear(&said(&now), "ab", later);
        // Four a second, then seven; and those that are there run two requests.
        let rate = |at: Seconds| if at <= 20 { 4.0 } else { 7.0 };
        assert_eq!(*other.window(), (1..=40).map(|at| report(at, rate(at), 2.0, 0)).collect());
        // Of other replicas, or of one that was started again, and after too long, nothing is known but what came before.
        let before: Window = (1..=20).map(|at| report(at, 4.0, 2.0, 0)).collect();
        for (replicas, at) in [("abc", later), ("ab", ZERO + 20 + REPLAY + 1), ("ab", ZERO + 20)] {
            let mut other = Workers::remembered(notes.clone());
            other.hear(&said(&now), replicas, at);
            assert_eq!(*other.window(), before, "{replicas} {at}");
        }
    }

    #[test]
    fn what_is_written_down_has_bounded_room() {
        let mut workers = Workers::default();
        (0..600).for_each(|at| workers.hear(&said(&[("a", load(at, 1))]), "a", ZERO + at));
        let sums = workers.sums();
        assert_eq!(sums.len(), MAX_COUNTED);
        assert_eq!(sums[5].at, ZERO + 599);
        assert!((60..90).contains(&(sums[5].at - sums[0].at)), "{sums:?}");
    }

    #[test]
    fn whatever_a_worker_says_is_a_number_of_requests() {
        let mut workers = Workers::default();
        for (at, arrived) in [i64::MIN, i64::MAX, -1, 0, i64::MIN].into_iter().enumerate() {
            workers.hear(&said(&[("a", load(arrived, i64::MIN))]), "ab", ZERO + at as Seconds * 1000);
        }
        let policy = lathe_scaling::Policy {
            min_replicas: 1,
            max_replicas: 9,
            target_throughput_percent: 70,
            scale_down_after: 10,
            scale_to_zero_after: None,
        };
        let replicas =
            lathe_scaling::Replicas { asked: 1, ready: 1, draining: 0, start_up: 0, capacity: None };
        let memory = lathe_scaling::Memory::default();
        let decision = lathe_scaling::decide(&policy, workers.window(), &memory, &replicas, ZERO + 4000);
        assert_eq!(decision.replicas, 1);
    }
}
