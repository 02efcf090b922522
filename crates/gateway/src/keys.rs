//! Who may ask for what: one file a key, in a mounted Secret.
use std::collections::hash_map::Entry;
use std::collections::{BTreeMap, HashMap, HashSet};
use std::io::Read as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use axum::http::{HeaderMap, header};
use lathe_contract::{KeyEntry, KeyHash};
use tokio::sync::watch;

use crate::error::ApiError;
use crate::files;
use crate::limits::{Limits, Quotas};
use crate::metrics::Metrics;
use crate::month::Month;
use crate::table::{Model, Table};
use crate::tasks::Tasks;

/// Longer ones are refused by their parser, which need not see all of them.
const MAX_FILE: u64 = 1 << 17;
const MAX_KEY: usize = 256;
/// Names that are told where one does not exist.
const NEAR: usize = 5;
/// Names that are looked at for it.
const COMPARED: usize = 100;
/// Longest name that is compared with others.
const MAX_NAME: usize = 128;

/// Somebody who was let in.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Caller {
    /// The key's name; `anonymous` without keys.
    pub key: Arc<str>,
    /// What may be used in a minute and in a month.
    pub limits: Limits,
    reach: Reach,
}

/// Which models a caller can name.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Reach {
    /// All of them, by their full ids (`--auth none`).
    Everything,
    /// Those of one namespace, perhaps only some.
    Namespace { namespace: String, models: Option<Vec<String>> },
}

impl Caller {
    fn of(name: &str, entry: &KeyEntry) -> Self {
        let KeyEntry { hash: _, namespace, models, requests_per_minute, tokens_per_minute, tokens_per_month } =
            entry;
        Self {
            key: name.into(),
            limits: Limits {
                requests: *requests_per_minute,
                tokens: *tokens_per_minute,
                month: *tokens_per_month,
            },
            reach: Reach::Namespace { namespace: namespace.clone(), models: models.clone() },
        }
    }

    /// The one namespace that it may look into; `None`: all of them.
    pub fn namespace(&self) -> Option<&str> {
        match &self.reach {
            Reach::Everything => None,
            Reach::Namespace { namespace, .. } => Some(namespace),
        }
    }

    /// Whether nothing of its namespace is kept from it. To others no text is told that may name what is.
    pub fn sees_all(&self) -> bool {
        !matches!(self.reach, Reach::Namespace { models: Some(_), .. })
    }

    /// Whose share of the gateway its requests are; without keys nobody has one.
    pub fn shares_as(&self) -> Option<&Arc<str>> {
        matches!(self.reach, Reach::Namespace { .. }).then_some(&self.key)
    }

    /// The model that this caller means. The namespace that is looked into is the key's, whatever the name says.
    ///
    /// # Errors
    /// 404 with near names among those that the caller may use, and no others.
    pub fn resolve<'a>(&self, table: &'a Table, name: &str) -> Result<&'a Arc<Model>, ApiError> {
        let found = match (&self.reach, name.split_once('/')) {
            (Reach::Everything, Some((namespace, name))) => table.get(namespace, name),
            (Reach::Everything, None) => None,
            (Reach::Namespace { namespace, .. }, None) => table.get(namespace, name),
            (Reach::Namespace { namespace, .. }, Some((named, name))) => {
                (named == namespace).then(|| table.get(namespace, name)).flatten()
            }
        };
        found.filter(|model| self.may_use(model)).ok_or_else(|| {
            let hint = match self.reach {
                Reach::Everything if !name.contains('/') => " Name it as `namespace/name`.",
                _ => "",
            };
            ApiError::model_not_found(name, hint, &self.near(table, name))
        })
    }

    /// What this caller may use, by id.
    pub fn models<'a>(&'a self, table: &'a Table) -> impl Iterator<Item = &'a Arc<Model>> {
        table.models(self.namespace()).filter(|model| self.may_use(model))
    }

    fn may_use(&self, model: &Model) -> bool {
        self.may_name(&model.service.namespace, &model.name)
    }

    /// Whether it may use a model of this name, should there be one.
    pub fn may_name(&self, namespace: &str, model: &str) -> bool {
        match &self.reach {
            Reach::Everything => true,
            Reach::Namespace { namespace: own, models } => {
                let listed = models.as_ref().is_none_or(|models| models.iter().any(|name| name == model));
                own == namespace && listed
            }
        }
    }

    fn near(&self, table: &Table, name: &str) -> Vec<String> {
        let mut ids: Vec<String> = self.models(table).take(COMPARED).map(|model| model.id()).collect();
        // A client's text is bounded before it is compared with anything.
        if name.len() <= MAX_NAME {
            let last = name.rsplit('/').next().unwrap_or_default();
            ids.sort_by_cached_key(|id| {
                strsim::damerau_levenshtein(last, id.rsplit('/').next().unwrap_or_default())
            });
        }
        ids.truncate(NEAR);
        ids
    }
}

/// Who is let in.
#[derive(Clone, Debug)]
pub enum Auth {
    /// Whoever has a key.
    Keys(watch::Receiver<Arc<Keyring>>),
    /// Everybody.
    Open,
}

impl Auth {
    /// Who asks.
    ///
    /// # Errors
    /// 401 that says what to do.
    pub fn admit(&self, headers: &HeaderMap) -> Result<Arc<Caller>, ApiError> {
        match self {
            Auth::Keys(keyring) => keyring.borrow().admit(headers),
            Auth::Open => Ok(Arc::new(Caller {
                key: "anonymous".into(),
                limits: Limits::default(),
                reach: Reach::Everything,
            })),
        }
    }
}

/// The keys that there are, and the entries that are none.
#[derive(Debug, Default)]
pub struct Keyring {
    keys: HashMap<KeyHash, Arc<Caller>>,
    /// Name of an entry and what is wrong with it.
    pub broken: BTreeMap<String, String>,
}

impl Keyring {
    /// Reads entries by their names. One that is broken disables itself alone.
    pub fn read(entries: &BTreeMap<String, Vec<u8>>) -> Self {
        let mut keyring = Self::default();
        for (name, json) in entries {
            match KeyEntry::parse(json) {
                Ok(entry) => match keyring.keys.entry(entry.hash.clone()) {
                    Entry::Vacant(place) => drop(place.insert(Arc::new(Caller::of(name, &entry)))),
                    Entry::Occupied(other) => {
                        let problem = format!("`hash` is that of `{}` as well", other.get().key);
                        keyring.broken.insert(name.clone(), problem);
                    }
                },
                Err(error) => drop(keyring.broken.insert(name.clone(), error.to_string())),
            }
        }
        keyring
    }

    /// How many keys there are.
    pub fn len(&self) -> usize {
        self.keys.len()
    }

    fn admit(&self, headers: &HeaderMap) -> Result<Arc<Caller>, ApiError> {
        if self.keys.is_empty() {
            return Err(ApiError::unauthorized(
                "This gateway has no keys, so it answers nobody. Its administrator makes one with `lathe keys create`.",
            ));
        }
        let given = headers.get(header::AUTHORIZATION).and_then(|value| value.to_str().ok());
        let scheme = |text: &str| text.eq_ignore_ascii_case("bearer");
        let key = given.and_then(|v| v.split_once(' ')).filter(|(s, _)| scheme(s)).map(|(_, key)| key.trim());
        let Some(key) = key else {
            return Err(ApiError::unauthorized(
                "You gave no API key. Send it as `Authorization: Bearer lathe-...`.",
            ));
        };
        // The time of a look-up tells nothing: it depends on the hash, and whoever can make keys of a chosen hash needs no clock.
        let known = (key.len() <= MAX_KEY).then(|| self.keys.get(&KeyHash::of(key))).flatten();
        known.cloned().ok_or_else(|| {
            ApiError::unauthorized("The API key is not known here; ask the gateway's administrator for one.")
        })
    }
}

/// The keys of a folder, read again and again until nobody listens.
pub fn follow(
    tasks: &mut Tasks,
    path: PathBuf,
    metrics: Arc<Metrics>,
    quotas: Arc<Quotas>,
) -> watch::Receiver<Arc<Keyring>> {
    let mut folder = Folder { path, entries: Entries::new(), readable: None };
    folder.look(&metrics);
    let (sender, receiver) = watch::channel(Arc::new(Keyring::read(&folder.entries)));
    tell(&receiver.borrow(), &metrics);
    tasks.spawn(async move {
        while !sender.is_closed() {
            tokio::time::sleep(files::PAUSE).await;
            let counters = Arc::clone(&metrics);
            // Files may be slow.
            let looking = tokio::task::spawn_blocking(move || (folder.look(&counters), folder));
            let Ok((changed, looked)) = looking.await else { break };
            folder = looked;
            if !changed {
                // A request that ends after its key has counted it once more.
                let known = known(&sender.borrow());
                metrics.keep(|series| known.contains(series.key));
                budgets(&sender.borrow(), &metrics, &quotas);
                continue;
            }
            let keyring = Keyring::read(&folder.entries);
            tell(&keyring, &metrics);
            let known = known(&keyring);
            quotas.keep(&known);
            metrics.keep(|series| known.contains(series.key));
            metrics.forget_budgets();
            budgets(&keyring, &metrics, &quotas);
            sender.send_replace(Arc::new(keyring));
        }
        "the keys"
    });
    receiver
}

/// The names of all keys.
fn known(keyring: &Keyring) -> HashSet<Arc<str>> {
    keyring.keys.values().map(|caller| Arc::clone(&caller.key)).collect()
}

type Entries = BTreeMap<String, Vec<u8>>;

/// The mounted Secret.
#[derive(Debug)]
struct Folder {
    path: PathBuf,
    /// As last seen: a folder that cannot be read keeps the keys that there are.
    entries: Entries,
    /// Last time; `None`: not looked at yet.
    readable: Option<bool>,
}

impl Folder {
    /// Whether it holds something else than before.
    fn look(&mut self, metrics: &Metrics) -> bool {
        let looked = entries(&self.path);
        let readable = Some(looked.is_ok());
        metrics.keys_readable.set(i64::from(looked.is_ok()));
        let news = std::mem::replace(&mut self.readable, readable) != readable;
        match looked {
            Ok(entries) => {
                let before = std::mem::replace(&mut self.entries, entries);
                before != self.entries
            }
            Err(error) => {
                if news {
                    let folder = self.path.display();
                    tracing::error!(%error, "the keys in {folder} cannot be read; those known before stay");
                }
                false
            }
        }
    }
}

/// Every file of a folder by its name. A Secret has at most 1 MiB: reading it is cheaper than being wrong about its times.
fn entries(folder: &Path) -> std::io::Result<Entries> {
    let mut entries = Entries::new();
    for entry in std::fs::read_dir(folder)? {
        let entry = entry?;
        // `..data` and what it points to: how the kubelet swaps all files at once.
        let Ok(name) = entry.file_name().into_string() else { continue };
        if name.starts_with('.') || !entry.path().is_file() {
            continue;
        }
        let mut content = Vec::new();
        std::fs::File::open(entry.path())?.take(MAX_FILE).read_to_end(&mut content)?;
        entries.insert(name, content);
    }
    Ok(entries)
}

fn budgets(keyring: &Keyring, metrics: &Metrics, quotas: &Quotas) {
    let month = Month::of(jiff::Timestamp::now());
    for caller in keyring.keys.values() {
        if let Some(budget) = caller.limits.month {
            metrics.of_budget(&caller.key, quotas.used(&caller.key, month), budget);
        }
    }
}

fn tell(keyring: &Keyring, metrics: &Metrics) {
    metrics.keys.set(keyring.len() as i64);
    metrics.keys_broken.set(keyring.broken.len() as i64);
    tracing::info!(keys = keyring.len(), broken = keyring.broken.len(), "keys were read");
    for (name, problem) in &keyring.broken {
        tracing::error!(key = name, "this key is not used: {problem}");
    }
}

#[cfg(test)]
mod tests;
