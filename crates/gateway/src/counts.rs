//! What the ConfigMap of the gateway's counts holds: an entry a key, and `.writers`.
//!
//! ```yaml
//! alice: '{"2026-11":{"requests":12,"tokens":3456}}'
//! .writers: '[["5f1c...",7]]'
//! ```
//!
//! What stands there is the truth: whoever removes a key's entry gives it its month anew. No key is called `.writers`, since the
//! gateway reads no key whose name begins with a dot.
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use crate::month::Month;

/// The ConfigMap's `data`.
pub type Data = BTreeMap<String, String>;
/// Something of every month.
pub type Months<T> = BTreeMap<Month, T>;

/// Entry that names the last write of each replica.
const WRITERS: &str = ".writers";
/// Replicas whose last write is remembered: more than ever write in one pause.
const MAX_WRITERS: usize = 128;
/// Longest entry that is read: some months are a tenth of it.
const MAX_ENTRY: usize = 2 << 10;
/// Months of a key; a replica whose clock is wrong may count in one that is far away.
const MAX_MONTHS: usize = 4;
/// Of all entries; an object has at most 1 MiB.
const MAX_BYTES: usize = 700 << 10;
/// Longest name of an entry.
const MAX_NAME: usize = 253;

/// What a key used.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Counts {
    /// Requests that were let in.
    #[serde(default)]
    pub requests: u64,
    /// Tokens of prompts and answers; of open ones their estimate.
    #[serde(default)]
    pub tokens: u64,
}

impl Counts {
    /// With this change; never below zero.
    pub fn plus(self, change: Change) -> Self {
        Self {
            requests: self.requests.saturating_add_signed(change.requests),
            tokens: self.tokens.saturating_add_signed(change.tokens),
        }
    }

    /// What leads from `before` to this.
    pub fn since(self, before: Self) -> Change {
        let difference = |a: u64, b: u64| {
            let size = i64::try_from(a.abs_diff(b)).unwrap_or(i64::MAX);
            if a < b { -size } else { size }
        };
        Change {
            requests: difference(self.requests, before.requests),
            tokens: difference(self.tokens, before.tokens),
        }
    }
}

/// What a count changes by; what was taken as an estimate is given back in part.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Change {
    /// Requests.
    pub requests: i64,
    /// Tokens.
    pub tokens: i64,
}

impl Change {
    /// Both changes.
    pub fn plus(self, other: Self) -> Self {
        Self {
            requests: self.requests.saturating_add(other.requests),
            tokens: self.tokens.saturating_add(other.tokens),
        }
    }
}

/// What a replica has to tell.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Told {
    /// A name that no other process has.
    pub instance: String,
    /// Which of its writes this is.
    pub number: u64,
    /// What the keys used, that of this replica with it.
    pub keys: Vec<(Arc<str>, Months<Counts>)>,
}

/// The content, read.
#[derive(Clone, Debug, Default)]
pub struct Page {
    /// What the keys used.
    pub keys: HashMap<Arc<str>, Months<Counts>>,
    /// Entries that cannot be read, and why. Of these keys a replica goes on with what it knew.
    pub broken: BTreeMap<String, String>,
    /// The month in which it was written last, by the API server's clock, where that is known.
    pub written: Option<Month>,
    writers: Vec<(String, u64)>,
}

impl Page {
    /// Reads what stands there; what is broken is passed over.
    pub fn read(data: &Data) -> Self {
        let mut page = Self::default();
        for (name, text) in data {
            let read = match (name.as_str(), text.len() > MAX_ENTRY) {
                (WRITERS, _) => serde_json::from_str(text).map(|writers| page.writers = writers),
                (_, true) => {
                    page.broken.insert(name.clone(), format!("longer than {MAX_ENTRY} bytes"));
                    continue;
                }
                (key, false) => {
                    serde_json::from_str(text).map(|months| drop(page.keys.insert(key.into(), months)))
                }
            };
            if let Err(error) = read {
                page.broken.insert(name.clone(), error.to_string());
            }
        }
        page
    }

    /// Number of this process's last write that was done.
    pub fn last_write(&self, instance: &str) -> Option<u64> {
        self.writers.iter().find(|(known, _)| known == instance).map(|(_, number)| *number)
    }

    /// The content with what is `told`, and without what is over; and how many keys had no room.
    pub fn with(&self, data: &Data, told: &Told, now: Month) -> (Data, usize) {
        // A month is over when this clock and the API server's say so: one that is far ahead ends none.
        let oldest = self.written.map_or(now, |written| now.min(written)).before();
        let told_keys: BTreeSet<&str> = told.keys.iter().map(|(key, _)| &**key).collect();
        let rest = self.keys.iter().filter(|(key, _)| !told_keys.contains(&***key));
        let all = rest.map(|(key, months)| (key, months.clone()));
        let all = all.chain(told.keys.iter().map(|(key, months)| (key, months.clone())));
        // What cannot be read stays for a person to look at, until there is something to say in its place.
        let kept = data.iter().filter(|(name, _)| self.broken.contains_key(*name) && *name != WRITERS);
        let mut written: Data = kept.map(|(name, text)| (name.clone(), text.clone())).collect();
        let mut sizes = Vec::new();
        for (key, mut months) in all {
            months.retain(|month, _| *month >= oldest);
            while months.len() > MAX_MONTHS {
                months.pop_last();
            }
            let Some(tokens) = months.values().map(|counts| counts.tokens).max() else { continue };
            sizes.push((Some(tokens), Arc::clone(key)));
            written.insert(key.to_string(), json(&months));
        }
        // Longer than any entry that is read: before a key's use is forgotten, these go.
        let long = written.iter().filter(|(_, text)| text.len() > MAX_ENTRY);
        sizes.extend(long.map(|(name, _)| (None, Arc::from(&**name))));
        let forgotten = shrink(&mut written, sizes);
        let others = self.writers.iter().filter(|(instance, _)| *instance != told.instance).cloned();
        let mut writers: Vec<_> = others.chain([(told.instance.clone(), told.number)]).collect();
        writers.drain(..writers.len().saturating_sub(MAX_WRITERS));
        written.insert(WRITERS.to_owned(), json(&writers));
        (written, forgotten)
    }
}

/// Whether a key's name can be an entry's. A Secret's entries can; a folder that is no Secret may hold others.
pub fn is_entry(name: &str) -> bool {
    let known = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
    !name.starts_with('.') && !name.is_empty() && name.len() <= MAX_NAME && name.chars().all(known)
}

/// Takes away those of whom nothing can be read, then those who used the least, until the rest has room.
fn shrink(data: &mut Data, mut sizes: Vec<(Option<u64>, Arc<str>)>) -> usize {
    let mut bytes: usize = data.iter().map(|(name, text)| name.len() + text.len()).sum();
    if bytes <= MAX_BYTES {
        return 0;
    }
    sizes.sort_unstable();
    let mut forgotten = 0;
    for (_, key) in sizes {
        if bytes <= MAX_BYTES {
            break;
        }
        let text = data.remove(&*key);
        bytes -= key.len() + text.map_or(0, |text| text.len());
        forgotten += 1;
    }
    forgotten
}

/// Maps with names for keys, and lists of them, are always written.
fn json(value: &impl Serialize) -> String {
    serde_json::to_string(value).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use rstest::rstest;
    use serde_json::json;

    use super::*;

    pub fn month(text: &str) -> Month {
        Month::try_from(text.to_owned()).unwrap()
    }

    fn tokens(tokens: u64) -> Counts {
        Counts { requests: 1, tokens }
    }

    fn told(number: u64, keys: &[(&str, &str, u64)]) -> Told {
        let line = |(key, at, used): &(&str, &str, u64)| {
            (Arc::from(*key), Months::from([(month(at), tokens(*used))]))
        };
        Told { instance: "me".to_owned(), number, keys: keys.iter().map(line).collect() }
    }

    fn after(data: &Data, told: &Told, now: &str) -> Data {
        Page::read(data).with(data, told, month(now)).0
    }

    #[test]
    fn what_is_told_reads_back_beside_what_stood_there() {
        let data = after(&Data::new(), &told(1, &[("a", "2026-11", 5), ("b", "2026-11", 6)]), "2026-11");
        assert_eq!(data["a"], r#"{"2026-11":{"requests":1,"tokens":5}}"#);
        assert_eq!(data[".writers"], r#"[["me",1]]"#);
        let other = Told { instance: "other".to_owned(), ..told(9, &[("b", "2026-11", 8)]) };
        let page = Page::read(&after(&data, &other, "2026-11"));
        assert_eq!(page.keys["a"][&month("2026-11")], tokens(5));
        assert_eq!(page.keys["b"][&month("2026-11")], tokens(8));
        assert_eq!(["me", "other", "nobody"].map(|who| page.last_write(who)), [Some(1), Some(9), None]);
    }

    #[rstest]
    #[case::no_json("{")]
    #[case::a_list("[]")]
    #[case::no_month(r#"{"November":{"tokens":1}}"#)]
    #[case::negative(r#"{"2026-11":{"tokens":-1}}"#)]
    #[case::a_fraction(r#"{"2026-11":{"tokens":1.5}}"#)]
    #[case::text(r#"{"2026-11":{"tokens":"1"}}"#)]
    #[case::too_large(r#"{"2026-11":{"tokens":18446744073709551616}}"#)]
    #[case::empty("")]
    fn a_broken_entry_is_told_of_and_takes_no_other_with_it(#[case] text: &str) {
        let good = r#"{"2026-11":{"requests":1,"tokens":7}}"#;
        let data = Data::from([("bad".to_owned(), text.to_owned()), ("good".to_owned(), good.to_owned())]);
        let page = Page::read(&data);
        assert_eq!(page.broken.keys().collect::<Vec<_>>(), ["bad"]);
        assert_eq!(page.keys[&Arc::from("good")][&month("2026-11")].tokens, 7);
        // It stays until there is something to say in its place.
        assert_eq!(after(&data, &told(1, &[]), "2026-11")["bad"], text);
        let healed = after(&data, &told(1, &[("bad", "2026-11", 3)]), "2026-11");
        assert!(Page::read(&healed).broken.is_empty());
    }

    #[test]
    fn long_entries_and_broken_writers_are_broken() {
        let long = format!("{{{}}}", " ".repeat(MAX_ENTRY));
        let data = Data::from([("a".to_owned(), long), (WRITERS.to_owned(), "7".to_owned())]);
        assert_eq!(Page::read(&data).broken.len(), 2);
        assert_eq!(after(&data, &told(1, &[]), "2026-11")[WRITERS], r#"[["me",1]]"#);
    }

    #[test]
    fn months_that_are_over_go_and_a_clock_that_is_wrong_ends_none() {
        let by = |data: &Data, told: &Told, now: &str, written: &str| {
            let mut page = Page::read(data);
            page.written = Some(month(written));
            page.with(data, told, month(now)).0
        };
        let names = |data: &Data| data.keys().cloned().collect::<Vec<_>>().join(" ");
        let first = told(1, &[("gone", "2026-10", 1), ("a", "2026-11", 1)]);
        let mut data = by(&Data::new(), &first, "2026-11", "2026-11");
        // Far ahead, however often it counts; and far behind.
        for number in 2..9 {
            data = by(&data, &told(number, &[("b", "2099-01", number)]), "2099-01", "2026-11");
        }
        data = by(&data, &told(9, &[("b", "2020-01", 1)]), "2020-01", "2026-12");
        assert_eq!(names(&data), ".writers a b gone");
        // In December nobody needs October.
        data = by(&data, &told(10, &[("c", "2026-12", 1)]), "2026-12", "2026-12");
        assert_eq!(names(&data), ".writers a c");
    }

    #[test]
    fn a_key_has_few_months_and_there_are_few_writers() {
        let far = ["2026-11", "2030-01", "2031-01", "2032-01", "2033-01"];
        let keys = vec![(Arc::from("a"), far.map(|at| (month(at), tokens(1))).into())];
        let mut data = after(&Data::new(), &Told { keys, ..told(1, &[]) }, "2026-11");
        assert_eq!(
            Page::read(&data).keys["a"].keys().copied().collect::<Vec<_>>(),
            far[..4].iter().map(|m| month(m)).collect::<Vec<_>>()
        );
        for number in 0..2 * MAX_WRITERS as u64 {
            data = after(&data, &Told { instance: number.to_string(), ..told(number, &[]) }, "2026-11");
        }
        let page = Page::read(&data);
        assert_eq!((page.writers.len(), page.last_write("255")), (MAX_WRITERS, Some(255)));
    }

    #[test]
    fn with_too_many_keys_the_smallest_are_forgotten() {
        let names: Vec<String> = (0..20_000).map(|n| format!("key-{n:05}")).collect();
        let keys: Vec<_> =
            names.iter().zip(0..).map(|(name, used)| (name.as_str(), "2026-11", used)).collect();
        let data = Data::new();
        let (written, forgotten) = Page::read(&data).with(&data, &told(1, &keys), month("2026-11"));
        let bytes: usize = written.iter().map(|(name, text)| name.len() + text.len()).sum();
        assert!(bytes < MAX_BYTES + 100 && forgotten > 0, "{bytes} {forgotten}");
        assert_eq!(written.len(), 20_001 - forgotten);
        assert!(written.contains_key("key-19999") && !written.contains_key("key-00000"));
    }

    #[test]
    fn what_cannot_be_read_and_is_long_goes_before_any_key() {
        let long = "x".repeat(MAX_BYTES);
        let data = Data::from([("long".to_owned(), long), ("short".to_owned(), "x".to_owned())]);
        let (written, forgotten) =
            Page::read(&data).with(&data, &told(1, &[("a", "2026-11", 1)]), month("2026-11"));
        assert_eq!(written.keys().collect::<Vec<_>>(), [".writers", "a", "short"]);
        assert_eq!(forgotten, 1);
    }

    #[test]
    fn numbers_have_ends() {
        let most = Counts { requests: u64::MAX, tokens: u64::MAX };
        assert_eq!(most.plus(Change { requests: 1, tokens: i64::MAX }), most);
        assert_eq!(Counts::default().plus(Change { requests: i64::MIN, tokens: -1 }), Counts::default());
        assert_eq!(Counts::default().since(most), Change { requests: -i64::MAX, tokens: -i64::MAX });
        assert_eq!(json!(tokens(7).since(tokens(5)).tokens), json!(2));
    }

    #[rstest]
    #[case("alice_1.test-x", true)]
    #[case(".writers", false)]
    #[case("two words", false)]
    #[case("", false)]
    #[case("\u{e9}", false)]
    fn names_of_entries(#[case] name: &str, #[case] good: bool) {
        assert_eq!(is_entry(name), good);
    }
}
