//! Pure: one gateway's seconds, placed on the leader's clock.
//!
//! A gateway counts seconds since its process began. Which second of the leader its second is, is decided once for each process,
//! from when its first two answers came: an answer comes as soon as a second is over, so the earliest tells best when the process
//! began. From then on the number alone places a second, however late its answer comes: none counts twice, none is left out.
use std::collections::HashMap;

use lathe_contract::{TRAFFIC_SECONDS, Traffic};
use lathe_scaling::Seconds;

/// Thousandths of a second since the Unix epoch.
pub type Millis = i64;

/// Answers after which it is looked whether the two clocks have drifted apart.
const SPAN: u32 = 60;
/// A second that lies further from its answer than this, at every answer of a span, was misplaced by drift.
const APART: Seconds = 1;

/// What is known of one gateway's pod.
#[derive(Debug, Default)]
pub struct Gateway {
    /// The process that answered last.
    process: Option<Process>,
    /// Nothing flowed through the pod up to this second; `None`: it has told nothing yet.
    since: Option<Seconds>,
    told: Told,
    /// Requests that it holds at this moment, by the services' UIDs.
    pub held: HashMap<String, u64>,
}

/// A gateway's process.
#[derive(Debug)]
struct Process {
    instance: String,
    /// The newest second that it told.
    second: u64,
    place: Place,
}

#[derive(Debug)]
enum Place {
    /// The first answer, and when the process can have begun at the latest.
    Sought(Box<Traffic>, Millis),
    /// Its second 0 is this second of the leader.
    Found(Seconds, Drift),
}

/// How far behind their answers the seconds of a span lie at least.
#[derive(Debug, Default)]
struct Drift {
    answers: u32,
    nearest: Option<Seconds>,
}

/// Seconds that were told, of the last 128.
#[derive(Clone, Copy, Debug, Default)]
struct Told {
    newest: Seconds,
    /// The lowest bit is the newest second.
    bits: u128,
}

/// Seconds with the place that they have.
#[derive(Debug)]
pub struct Placed {
    /// What flowed in them.
    pub traffic: Traffic,
    /// The second of the leader that [`Traffic::second`] is.
    pub newest: Seconds,
    /// So many of the newest are new.
    pub new: u64,
}

impl Gateway {
    /// Takes an answer that came at `at`. `restarted`: the pod had processes before, of which somebody else may have been told.
    /// Gives back what is new, in its place.
    pub fn hear(&mut self, traffic: Traffic, at: Millis, restarted: bool) -> Vec<Placed> {
        self.held = traffic.services.iter().filter(|s| s.held > 0).map(|s| (s.uid.clone(), s.held)).collect();
        let begun = at.saturating_sub(i64::try_from(traffic.second).unwrap_or(i64::MAX).saturating_mul(1000));
        let known = self.process.take().filter(|process| process.instance == traffic.instance);
        let Some(Process { instance, second: before, place }) = known else {
            let (instance, second) = (traffic.instance.clone(), traffic.second);
            let place = Place::Sought(Box::new(traffic), begun);
            self.process = Some(Process { instance, second, place });
            return Vec::new();
        };
        // It counts up, or is not what it says.
        if traffic.second <= before {
            self.process = Some(Process { instance, second: before, place });
            return Vec::new();
        }
        let (second, mut placed) = (traffic.second, Vec::new());
        let (zero, drift) = match place {
            Place::Sought(first, latest) => {
                let zero = begun.min(latest).div_euclid(1000);
                self.since.get_or_insert(if restarted { Seconds::MIN } else { zero });
                let seconds = first.second;
                placed.extend(self.placed(*first, zero, seconds));
                (zero, Drift::default())
            }
            Place::Found(zero, drift) => self.corrected(zero, drift, before),
        };
        placed.extend(self.placed(traffic, zero, second - before));
        let drift = drift.seen(second_of(zero, second).saturating_sub(at.div_euclid(1000)));
        self.process = Some(Process { instance, second, place: Place::Found(zero, drift) });
        placed
    }

    /// It could not be asked: what it holds now is not known.
    pub fn fail(&mut self) {
        self.held.clear();
    }

    /// Whether it has told anything yet.
    pub fn has_told(&self) -> bool {
        self.since.is_some()
    }

    /// Whether it told what flowed in this second.
    pub fn told(&self, at: Seconds) -> bool {
        self.told.has(at)
    }

    /// Whether something may have flowed through it in this second of which it told nothing.
    pub fn lacks(&self, at: Seconds) -> bool {
        !self.told(at) && self.since.is_none_or(|since| at > since)
    }

    fn placed(&mut self, traffic: Traffic, zero: Seconds, seconds: u64) -> Option<Placed> {
        let newest = second_of(zero, traffic.second);
        // The oldest are left out of an answer that would be too long.
        let told = traffic.services.iter().map(|service| service.seconds.len() as u64).max();
        let told = told.filter(|told| *told > 0).unwrap_or(TRAFFIC_SECONDS);
        let new = self.told.take(newest, seconds.min(told).min(TRAFFIC_SECONDS));
        (new > 0).then_some(Placed { traffic, newest, new })
    }

    /// Two clocks that run at different speeds: once the seconds of a whole span lay apart from their answers, those to come are
    /// moved. What lies between counts as told, and what was told already does not count again.
    fn corrected(&mut self, zero: Seconds, drift: Drift, before: u64) -> (Seconds, Drift) {
        let Some(apart) = drift.nearest.filter(|_| drift.answers >= SPAN) else { return (zero, drift) };
        if apart.abs() <= APART {
            return (zero, Drift::default());
        }
        let moved = zero.saturating_sub(apart);
        if apart < 0 {
            self.told.take(second_of(moved, before), apart.unsigned_abs());
        }
        (moved, Drift::default())
    }
}

fn second_of(zero: Seconds, second: u64) -> Seconds {
    zero.saturating_add(i64::try_from(second).unwrap_or(i64::MAX))
}

impl Drift {
    fn seen(self, apart: Seconds) -> Self {
        Self {
            answers: self.answers.saturating_add(1),
            nearest: Some(self.nearest.map_or(apart, |nearest| nearest.max(apart))),
        }
    }
}

impl Told {
    /// Takes the `seconds` that end with `newest`; gives back how many of them, counted from the newest, were not told before.
    fn take(&mut self, newest: Seconds, seconds: u64) -> u64 {
        let ahead = u32::try_from(newest.saturating_sub(self.newest)).unwrap_or(0);
        if self.bits == 0 {
            self.newest = newest;
        } else {
            if ahead == 0 {
                return 0;
            }
            self.bits = self.bits.checked_shl(ahead).unwrap_or(0);
            self.newest = newest;
        }
        let gap = if self.bits == 0 { u128::BITS } else { self.bits.trailing_zeros() };
        let new = seconds.min(gap.into());
        self.bits |= if new >= u128::BITS.into() { u128::MAX } else { (1u128 << new) - 1 };
        new
    }

    fn has(self, at: Seconds) -> bool {
        let back = self.newest.checked_sub(at).and_then(|back| u32::try_from(back).ok());
        back.and_then(|back| self.bits.checked_shr(back)).is_some_and(|bits| bits & 1 == 1)
    }
}

#[cfg(test)]
mod tests {
    use rstest::rstest;

    use super::*;

    const BEGUN: Millis = 1_700_000_000_400;
    const ZERO: Seconds = 1_700_000_000;

    fn answer(instance: &str, second: u64) -> Traffic {
        Traffic { instance: instance.to_owned(), second, services: Vec::new() }
    }

    /// Seconds that are new, as the leader numbers them.
    fn seconds(placed: &[Placed]) -> Vec<Seconds> {
        placed.iter().flat_map(|p| (0..p.new as Seconds).rev().map(|back| p.newest - back - ZERO)).collect()
    }

    /// Hears the second as soon as it is over, `late` milliseconds later.
    fn hear(gateway: &mut Gateway, second: u64, late: Millis) -> Vec<Seconds> {
        seconds(&gateway.hear(answer("a", second), BEGUN + second as Millis * 1000 + late, false))
    }

    #[rstest]
    #[case::at_once(0)]
    #[case::just_before_the_next(990)]
    fn the_place_of_a_second_does_not_depend_on_when_the_first_answer_comes(#[case] late: Millis) {
        let mut gateway = Gateway::default();
        assert!(hear(&mut gateway, 3, late).is_empty());
        assert!(gateway.lacks(ZERO + 3));
        assert_eq!(hear(&mut gateway, 4, 5), [1, 2, 3, 4]);
        assert!(!gateway.lacks(ZERO) && !gateway.lacks(ZERO - 9) && gateway.lacks(ZERO + 5));
    }

    #[test]
    fn late_answers_leave_no_hole_and_count_nothing_twice() {
        let mut gateway = Gateway::default();
        hear(&mut gateway, 1, 0);
        hear(&mut gateway, 2, 0);
        assert_eq!(hear(&mut gateway, 3, 4_700), [3]);
        assert_eq!(hear(&mut gateway, 3, 4_800), [0; 0]);
        assert_eq!(hear(&mut gateway, 8, 20), [4, 5, 6, 7, 8]);
        // Longer than it remembers: what it cannot tell is lacking.
        assert_eq!(hear(&mut gateway, 138, 0).len(), 120);
        assert!(gateway.lacks(ZERO + 18) && gateway.told(ZERO + 19) && gateway.told(ZERO + 138));
    }

    #[test]
    fn what_was_left_out_of_a_long_answer_is_lacking() {
        let mut gateway = Gateway::default();
        hear(&mut gateway, 1, 0);
        let seconds = vec![lathe_contract::Flow::default(); 2];
        let service = lathe_contract::ServiceTraffic { seconds, ..Default::default() };
        let long = Traffic { services: vec![service], ..answer("a", 9) };
        gateway.hear(long, BEGUN + 9000, false);
        assert!(gateway.told(ZERO + 1) && gateway.lacks(ZERO + 7) && gateway.told(ZERO + 8));
    }

    #[test]
    fn a_restarted_process_lacks_what_the_one_before_had_not_told() {
        let mut gateway = Gateway::default();
        hear(&mut gateway, 1, 0);
        hear(&mut gateway, 2, 0);
        let again = |gateway: &mut Gateway, second: u64| {
            seconds(&gateway.hear(answer("b", second), BEGUN + (4 + second as Millis) * 1000, false))
        };
        assert!(again(&mut gateway, 1).is_empty());
        assert_eq!(again(&mut gateway, 2), [5, 6]);
        let lacking: Vec<Seconds> = (-3..=6).filter(|at| gateway.lacks(ZERO + at)).collect();
        assert_eq!(lacking, [3, 4]);
    }

    #[test]
    fn seconds_of_two_processes_that_meet_in_one_count_once() {
        let mut gateway = Gateway::default();
        (1..=4).for_each(|second| _ = hear(&mut gateway, second, 0));
        let again = |gateway: &mut Gateway, second: u64| {
            seconds(&gateway.hear(answer("b", second), BEGUN + (2 + second as Millis) * 1000, false))
        };
        assert!(again(&mut gateway, 3).is_empty());
        assert_eq!(again(&mut gateway, 4), [5, 6]);
    }

    #[test]
    fn a_process_that_is_not_its_pods_first_lacks_what_was_before_it() {
        let mut gateway = Gateway::default();
        for second in 1..=2 {
            gateway.hear(answer("a", second), BEGUN + second as Millis * 1000, true);
        }
        assert!(gateway.lacks(ZERO) && gateway.told(ZERO + 1));
    }

    #[test]
    fn a_second_that_ends_before_the_last_one_is_no_news() {
        let mut gateway = Gateway::default();
        hear(&mut gateway, 5, 0);
        hear(&mut gateway, 6, 0);
        assert!(hear(&mut gateway, 2, 0).is_empty() && hear(&mut gateway, u64::MAX, 0).is_empty());
        assert!(gateway.hear(answer("a", u64::MAX), Millis::MIN, true).is_empty());
    }

    #[rstest]
    #[case::ours_is_faster(1_010)]
    #[case::ours_is_slower(990)]
    fn clocks_that_drift_apart_stay_together(#[case] thousandths: Millis) {
        let mut gateway = Gateway::default();
        for second in 1..=3000 {
            let at = BEGUN + second * thousandths;
            gateway.hear(answer("a", second as u64), at, false);
            if second > 2 {
                let newest = (-4..=2).map(|far| at / 1000 + far).rfind(|at| gateway.told(*at));
                assert!(newest.is_some(), "{second}");
                // Whatever is told in between is told without a hole.
                assert!((1..100).all(|back| !gateway.lacks(newest.unwrap() - back)), "{second}");
            }
        }
    }
}
