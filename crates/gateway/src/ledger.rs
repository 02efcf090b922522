//! What keys used, as one replica knows it: what the ConfigMap said last, and what was counted here since.
//!
//! **Invariant.** Whatever is counted is in one of three places: `told` (it stands in the ConfigMap), `sent` (a write of it is under
//! way) or `untold`. A write holds only for the version that was read (`resourceVersion`), so two replicas that write at once do not
//! undo each other, and it bears a number: where its answer was lost, the next reading shows whether it was done. Until that is known
//! it is sent again as it was, never more with it, since the lost one may still arrive. So every count is told once, and a replica
//! that goes leaves nothing behind that somebody would have to fold together; one that is killed takes with it what it had not told.
use std::collections::HashMap;
use std::sync::Arc;

use crate::counts::{Change, Counts, Months, Page, Told, is_entry};
use crate::month::Month;

/// One replica's knowledge of all keys.
#[derive(Debug)]
pub struct Ledger {
    /// A name that no other process has.
    instance: String,
    /// Of the last write.
    number: u64,
    /// Whether what was sent last may not be there yet.
    under_way: bool,
    has_read: bool,
    lines: HashMap<Arc<str>, Line>,
}

#[derive(Clone, Debug, Default)]
struct Line {
    told: Months<Counts>,
    sent: Months<Change>,
    untold: Months<Change>,
}

impl Ledger {
    /// Nothing counted yet, by the process of this name.
    pub fn new(instance: String) -> Self {
        Self { instance, number: 0, under_way: false, has_read: false, lines: HashMap::new() }
    }

    /// Counts what a key used in a month.
    pub fn add(&mut self, key: &Arc<str>, month: Month, change: Change) {
        let known = self.lines.get_mut(key);
        let line = match known {
            Some(line) => line,
            None => self.lines.entry(Arc::clone(key)).or_default(),
        };
        add(&mut line.untold, month, change);
    }

    /// What a key used in a month, as far as it is known here.
    pub fn used(&self, key: &str, month: Month) -> Counts {
        let Some(line) = self.lines.get(key) else { return Counts::default() };
        let own = [&line.sent, &line.untold].into_iter().filter_map(|changes| changes.get(&month));
        let own = own.fold(Change::default(), |all, change| all.plus(*change));
        line.told.get(&month).copied().unwrap_or_default().plus(own)
    }

    /// Takes in what the ConfigMap says, and gives back what others counted since last time: the first time, nothing.
    pub fn hear(&mut self, page: &Page) -> HashMap<Arc<str>, Change> {
        if self.under_way && page.last_write(&self.instance) == Some(self.number) {
            self.was_told();
        }
        let mut others = HashMap::new();
        for (key, line) in &mut self.lines {
            if !page.keys.contains_key(key) && !page.broken.contains_key(&**key) {
                line.told.clear();
            }
        }
        for (key, months) in &page.keys {
            let line = self.lines.entry(Arc::clone(key)).or_default();
            let before = std::mem::replace(&mut line.told, months.clone());
            let change = months.iter().fold(Change::default(), |all, (month, counts)| {
                all.plus(counts.since(before.get(month).copied().unwrap_or_default()))
            });
            if self.has_read && change != Change::default() {
                others.insert(Arc::clone(key), change);
            }
        }
        self.has_read = true;
        self.lines
            .retain(|_, line| !line.told.is_empty() || !line.sent.is_empty() || !line.untold.is_empty());
        others
    }

    /// Whether what was sent last may not be there yet: it is sent again.
    pub fn is_telling(&self) -> bool {
        self.under_way
    }

    /// What is to be written now; from here on it is under way. Asked for after [`Ledger::hear`] alone.
    pub fn tell(&mut self) -> Option<Told> {
        if !self.under_way {
            for (key, line) in &mut self.lines {
                line.untold.retain(|_, change| *change != Change::default());
                if is_entry(key) {
                    line.sent = std::mem::take(&mut line.untold);
                    self.under_way |= !line.sent.is_empty();
                }
            }
            self.number = self.number.saturating_add(u64::from(self.under_way));
        }
        let sent = self.lines.iter().filter(|(_, line)| !line.sent.is_empty());
        let keys = sent.map(|(key, line)| (Arc::clone(key), line.with_sent())).collect();
        self.under_way.then(|| Told { instance: self.instance.clone(), number: self.number, keys })
    }

    /// The write is done.
    pub fn was_told(&mut self) {
        self.under_way = false;
        for line in self.lines.values_mut().filter(|line| !line.sent.is_empty()) {
            line.told = line.with_sent();
            line.sent.clear();
        }
    }
}

impl Line {
    /// What is told when the write is done.
    fn with_sent(&self) -> Months<Counts> {
        let mut months = self.told.clone();
        for (month, change) in &self.sent {
            let counts = months.entry(*month).or_default();
            *counts = counts.plus(*change);
        }
        months
    }
}

fn add(changes: &mut Months<Change>, month: Month, change: Change) {
    let all = changes.entry(month).or_default();
    *all = all.plus(change);
}

#[cfg(test)]
mod tests {
    use rand::rngs::StdRng;
    use rand::{Rng as _, SeedableRng as _};

    use super::*;
    use crate::counts::Data;

    fn month(text: &str) -> Month {
        Month::try_from(text.to_owned()).unwrap()
    }

    fn tokens(tokens: i64) -> Change {
        Change { requests: 1, tokens }
    }

    /// What stands in the cluster, with its version.
    #[derive(Default)]
    struct Stored {
        data: Data,
        version: u64,
    }

    /// How a write ends.
    #[derive(Clone, Copy, PartialEq)]
    enum End {
        Done,
        /// It was done, and nobody was told.
        Unheard,
        /// It was not done.
        Failed,
    }

    impl Stored {
        fn read(&self) -> (Data, u64) {
            (self.data.clone(), self.version)
        }

        fn write(&mut self, data: Data, version: u64) -> bool {
            let done = version == self.version;
            if done {
                (self.data, self.version) = (data, version + 1);
            }
            done
        }

        fn tokens(&self, key: &str, at: Month) -> u64 {
            Page::read(&self.data).keys.get(key).map_or(0, |months| months[&at].tokens)
        }
    }

    /// Reads, and prepares what is to be written.
    fn prepared(ledger: &mut Ledger, stored: &Stored, now: Month) -> Option<(Data, u64)> {
        let (data, version) = stored.read();
        let page = Page::read(&data);
        ledger.hear(&page);
        ledger.tell().map(|told| (page.with(&data, &told, now).0, version))
    }

    fn ends(ledger: &mut Ledger, stored: &mut Stored, (data, version): (Data, u64), end: End) {
        if end != End::Failed && stored.write(data, version) && end == End::Done {
            ledger.was_told();
        }
    }

    fn exchange(ledger: &mut Ledger, stored: &mut Stored, now: Month) {
        if let Some(write) = prepared(ledger, stored, now) {
            ends(ledger, stored, write, End::Done);
        }
    }

    #[test]
    fn what_was_told_is_known_after_a_restart() {
        let (now, key, mut stored) = (month("2026-11"), Arc::from("k"), Stored::default());
        let mut first = Ledger::new("first".to_owned());
        first.add(&key, now, tokens(700));
        exchange(&mut first, &mut stored, now);
        first.add(&key, now, tokens(50));
        assert_eq!(first.used("k", now).tokens, 750);
        // Killed: 50 were not told.
        let mut second = Ledger::new("second".to_owned());
        assert_eq!(second.used("k", now).tokens, 0);
        exchange(&mut second, &mut stored, now);
        assert_eq!(second.used("k", now), Counts { requests: 1, tokens: 700 });
        assert_eq!(second.used("k", month("2026-12")).tokens, 0);
        // With nothing to tell nothing is written.
        assert_eq!(stored.version, 1);
    }

    #[test]
    fn what_others_counted_is_told_apart_from_ones_own() {
        let (now, key, mut stored) = (month("2026-11"), Arc::from("k"), Stored::default());
        let [mut a, mut b] = ["a", "b"].map(|name| Ledger::new(name.to_owned()));
        b.add(&key, now, tokens(5));
        exchange(&mut b, &mut stored, now);
        let heard = |ledger: &mut Ledger, stored: &Stored| {
            ledger.hear(&Page::read(&stored.data)).get("k").map_or(0, |change| change.tokens)
        };
        // What was before its time is nobody's news.
        assert_eq!(heard(&mut a, &stored), 0);
        a.add(&key, now, tokens(7));
        exchange(&mut a, &mut stored, now);
        assert_eq!(heard(&mut a, &stored), 0);
        b.add(&key, now, tokens(100));
        exchange(&mut b, &mut stored, now);
        // An estimate that was settled.
        b.add(&key, now, Change { requests: 0, tokens: -30 });
        exchange(&mut b, &mut stored, now);
        assert_eq!(heard(&mut a, &stored), 70);
        assert_eq!(a.used("k", now).tokens, 82);
    }

    #[test]
    fn a_removed_entry_begins_anew_and_a_broken_one_does_not() {
        let (now, key, mut stored) = (month("2026-11"), Arc::from("k"), Stored::default());
        let mut ledger = Ledger::new("a".to_owned());
        ledger.add(&key, now, tokens(700));
        exchange(&mut ledger, &mut stored, now);
        stored.data.insert("k".to_owned(), "{".to_owned());
        stored.version += 1;
        exchange(&mut ledger, &mut stored, now);
        assert_eq!(ledger.used("k", now).tokens, 700);
        ledger.add(&key, now, tokens(1));
        exchange(&mut ledger, &mut stored, now);
        assert_eq!(stored.tokens("k", now), 701);
        stored.data.remove("k");
        stored.version += 1;
        exchange(&mut ledger, &mut stored, now);
        assert_eq!(ledger.used("k", now).tokens, 0);
    }

    #[test]
    fn a_request_of_last_month_is_settled_there() {
        let (old, new, key, mut stored) =
            (month("2026-11"), month("2026-12"), Arc::from("k"), Stored::default());
        let mut ledger = Ledger::new("a".to_owned());
        ledger.add(&key, old, tokens(1000));
        exchange(&mut ledger, &mut stored, old);
        ledger.add(&key, new, tokens(10));
        ledger.add(&key, old, Change { requests: 0, tokens: -900 });
        exchange(&mut ledger, &mut stored, new);
        assert_eq!((stored.tokens("k", old), stored.tokens("k", new)), (100, 10));
    }

    #[test]
    fn a_name_that_is_no_entry_is_counted_here_alone() {
        let (now, key, mut stored) = (month("2026-11"), Arc::from("two words"), Stored::default());
        let mut ledger = Ledger::new("a".to_owned());
        ledger.add(&key, now, tokens(3));
        exchange(&mut ledger, &mut stored, now);
        assert_eq!((ledger.used("two words", now).tokens, stored.version), (3, 0));
    }

    /// Replicas count, read and write in any order, writes fail, are done unheard, meet another's or arrive late, months turn: at last
    /// every count stands there once.
    #[test]
    fn nothing_is_lost_or_counted_twice_whatever_becomes_of_writes() {
        for seed in 0..200 {
            let mut random = StdRng::seed_from_u64(seed);
            let months = [month("2026-11"), month("2026-12")];
            let keys: [Arc<str>; 2] = ["k".into(), "l".into()];
            let mut replicas: Vec<_> = (0..3).map(|n| (Ledger::new(n.to_string()), Vec::new())).collect();
            let (mut stored, mut expected) = (Stored::default(), HashMap::new());
            for step in 0..300 {
                let now = months[step / 150];
                let (ledger, under_way) = &mut replicas[random.random_range(0..3)];
                match random.random_range(0..4) {
                    0 | 1 => {
                        let (key, amount) = (random.random_range(0..2), random.random_range(0..100));
                        ledger.add(&keys[key], now, tokens(amount));
                        *expected.entry((key, now)).or_insert(0) += amount as u64;
                    }
                    2 => {
                        let last = under_way.len().saturating_sub(1);
                        let at = random.random_range(0..=last);
                        if at < under_way.len() {
                            let end = [End::Done, End::Done, End::Unheard, End::Failed];
                            // Nobody waits for the answer of an earlier one any more.
                            let end = if at == last { end[random.random_range(0..4)] } else { End::Unheard };
                            ends(ledger, &mut stored, under_way.remove(at), end);
                        }
                    }
                    _ => under_way.extend(prepared(ledger, &stored, now)),
                }
            }
            for (ledger, _) in &mut replicas {
                // What is under way, and what was counted since.
                exchange(ledger, &mut stored, months[1]);
                exchange(ledger, &mut stored, months[1]);
            }
            for ((key, at), tokens) in expected {
                assert_eq!(stored.tokens(&keys[key], at), tokens, "seed {seed}");
            }
        }
    }
}
