//! Which adapters answer: the set that is wanted, brought here one by one, swapped and taken away under load.
//!
//! An adapter in the engine is an immutable generation ([`Resident`]) that each of its requests holds, so that a request
//! ends on the weights it began with; the last holder's drop frees the slot.
use std::collections::{BTreeMap, BTreeSet};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use lathe_contract::{AdapterEntry, AdapterState, AdapterStatus, ModelInput, Phase, ServedAdapter};
use lathe_engine::plan::ModelShape;
use tokio::sync::watch;

use super::engine::{Engine, Resident};
use super::error::ApiError;
use crate::context::Context;
use crate::failure::{Done, Halt};
use crate::train::artefact::read_lora;

/// Most adapters that a replica is asked to hold.
pub const MAX_ADAPTERS: usize = 64;
const MAX_NAME: usize = 253;

/// The base and the adapters on it, by model id.
#[derive(Debug)]
pub struct Adapters {
    /// The base's id.
    base: String,
    shape: ModelShape,
    /// [`crate::base::weights_digest`] of the base.
    weights_digest: String,
    context: Context,
    engine: Engine,
    /// Folders of Secrets that the contract names; a request can name no other.
    secret_dirs: BTreeSet<String>,
    state: Mutex<State>,
    /// Adapters are read one at a time. They are fetched side by side: one whose server is slow holds up no other.
    reading: Mutex<()>,
    changed: watch::Sender<()>,
    next: AtomicU64,
}

#[derive(Debug, Default)]
struct State {
    wanted: BTreeMap<String, Entry>,
    /// Taken away, but perhaps still held by requests.
    leaving: Vec<(String, Weak<Resident>)>,
}

#[derive(Debug)]
struct Entry {
    model: ModelInput,
    /// Of the newest load.
    key: u64,
    progress: Progress,
    /// What answers now; while a new source is brought, the old one's.
    current: Option<Arc<Resident>>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum Progress {
    Loading,
    Ready,
    Failed(String),
}

impl Adapters {
    /// No adapters yet. `secret_dirs` are the folders that the contract names.
    pub fn new(
        base: &str,
        shape: &ModelShape,
        weights_digest: String,
        context: Context,
        engine: Engine,
        secret_dirs: BTreeSet<String>,
    ) -> Arc<Self> {
        Arc::new(Adapters {
            base: base.to_owned(),
            shape: shape.clone(),
            weights_digest,
            context,
            engine,
            secret_dirs,
            state: Mutex::default(),
            reading: Mutex::default(),
            changed: watch::channel(()).0,
            next: AtomicU64::new(1),
        })
    }

    /// Sets the whole set that is wanted: what is new, changed or failed is brought, what is surplus goes once its
    /// requests are answered. Returns at once.
    ///
    /// # Errors
    /// The set is not valid; then nothing changes.
    pub fn set(self: &Arc<Self>, wanted: &[ServedAdapter]) -> Result<AdapterStatus, String> {
        self.validate(wanted)?;
        let mut fresh = Vec::new();
        {
            let mut state = self.lock();
            let keep: BTreeSet<&str> = wanted.iter().map(|a| a.model_id.as_str()).collect();
            let State { wanted: entries, leaving } = &mut *state;
            entries.retain(|id, entry| {
                let kept = keep.contains(id.as_str());
                if !kept && let Some(resident) = entry.current.take() {
                    leaving.push((id.clone(), Arc::downgrade(&resident)));
                }
                kept
            });
            for adapter in wanted {
                let settled = entries.get(&adapter.model_id).is_some_and(|entry| {
                    entry.model.source == adapter.model.source
                        && !matches!(entry.progress, Progress::Failed(_))
                });
                if settled {
                    continue;
                }
                let key = self.next.fetch_add(1, Ordering::Relaxed);
                let current = entries.remove(&adapter.model_id).and_then(|entry| entry.current);
                let entry = Entry { model: adapter.model.clone(), key, progress: Progress::Loading, current };
                entries.insert(adapter.model_id.clone(), entry);
                fresh.push((key, adapter.clone()));
            }
        }
        for (key, adapter) in fresh {
            let adapters = Arc::clone(self);
            // Its end is told through the state.
            drop(self.context.runtime.spawn_blocking(move || adapters.bring(key, &adapter)));
        }
        self.tell();
        Ok(self.status())
    }

    /// What answers under a model id: `None` is the base itself.
    ///
    /// # Errors
    /// 404 for an id that is not wanted here, 503 for one that is not here yet or could not be loaded.
    pub fn resolve(&self, id: &str) -> Result<Option<Arc<Resident>>, ApiError> {
        if id == self.base {
            return Ok(None);
        }
        let state = self.lock();
        let Some(entry) = state.wanted.get(id) else {
            drop(state);
            return Err(ApiError::model_not_found(id, &self.near(id)));
        };
        match (&entry.current, &entry.progress) {
            (Some(resident), _) => Ok(Some(Arc::clone(resident))),
            (None, Progress::Failed(_)) => {
                let message = format!("The model `{id}` could not be loaded; the service's status says why.");
                Err(ApiError::unavailable("model_failed", message))
            }
            (None, _) => {
                let message = format!("The model `{id}` is being loaded; ask again.");
                Err(ApiError::unavailable("model_not_ready", message))
            }
        }
    }

    /// Ids that answer: the base first, then the adapters by name.
    pub fn ids(&self) -> Vec<String> {
        let state = self.lock();
        let ready = state.wanted.iter().filter(|(_, entry)| entry.current.is_some());
        std::iter::once(self.base.clone()).chain(ready.map(|(id, _)| id.clone())).collect()
    }

    /// Where each adapter stands.
    pub fn status(&self) -> AdapterStatus {
        let mut state = self.lock();
        state.leaving.retain(|(_, resident)| resident.strong_count() > 0);
        let wanted = state.wanted.iter().map(|(id, entry)| {
            let (at, message) = match &entry.progress {
                Progress::Loading => (AdapterState::Loading, None),
                Progress::Ready => (AdapterState::Ready, None),
                Progress::Failed(why) => (AdapterState::Failed, Some(why.clone())),
            };
            AdapterEntry { model_id: id.clone(), state: at, message }
        });
        let leaving: BTreeSet<&String> =
            state.leaving.iter().map(|(id, _)| id).filter(|id| !state.wanted.contains_key(*id)).collect();
        let leaving = leaving.into_iter().map(|id| AdapterEntry {
            model_id: id.clone(),
            state: AdapterState::Draining,
            message: None,
        });
        AdapterStatus { adapters: wanted.chain(leaving).collect() }
    }

    /// Writes the status into the report.
    pub fn tell(&self) {
        let status = self.status();
        self.context.status.update(|report| report.adapters = status);
    }

    /// Waits until nothing is being loaded.
    pub async fn settled(&self) {
        let loading = |_: &()| !self.lock().wanted.values().any(|entry| entry.progress == Progress::Loading);
        // The sender lives as long as `self`, so the wait cannot fail.
        let _ = self.changed.subscribe().wait_for(loading).await;
    }

    fn validate(&self, wanted: &[ServedAdapter]) -> Result<(), String> {
        if wanted.len() > MAX_ADAPTERS {
            return Err(format!(
                "`adapters` must have at most {MAX_ADAPTERS} items (found {})",
                wanted.len()
            ));
        }
        let mut seen = BTreeSet::from([self.base.as_str()]);
        for (at, ServedAdapter { model_id, model }) in wanted.iter().enumerate() {
            if model_id.is_empty() || model_id.len() > MAX_NAME || model_id.chars().any(char::is_control) {
                return Err(format!(
                    "`adapters[{at}].modelId` must have 1 to {MAX_NAME} bytes and no control characters"
                ));
            }
            if !seen.insert(model_id) {
                return Err(format!("`adapters[{at}].modelId` must be unique: `{model_id}` is taken"));
            }
            if let Some(dir) = &model.source.secret_dir
                && !self.secret_dirs.contains(dir)
            {
                return Err(format!(
                    "`adapters[{at}].model.source.secretDir` must be a folder that this pod's contract names; a new Secret \
                     needs a new pod"
                ));
            }
        }
        Ok(())
    }

    /// On a thread of its own: fetch, read, make resident, and put it into place if it is still wanted.
    fn bring(&self, key: u64, adapter: &ServedAdapter) {
        let loaded = self.load(key, adapter);
        let mut state = self.lock();
        let State { wanted, leaving } = &mut *state;
        // Where it is not wanted any more its drop, behind the lock, takes it out of the engine.
        let mut unwanted = None;
        match (wanted.get_mut(&adapter.model_id).filter(|entry| entry.key == key), loaded) {
            (Some(entry), Ok(resident)) => {
                if let Some(old) = entry.current.replace(Arc::new(resident)) {
                    leaving.push((adapter.model_id.clone(), Arc::downgrade(&old)));
                    unwanted = Some(old);
                }
                entry.progress = Progress::Ready;
            }
            (Some(entry), Err(halt)) => {
                let why = match halt {
                    Halt::Failed(trouble) => lathe_contract::Failure::from(trouble).message,
                    Halt::Stopped => "the worker is stopping".to_owned(),
                };
                tracing::warn!(adapter = adapter.model_id, "{why}");
                entry.progress = Progress::Failed(why);
            }
            (None, Ok(resident)) => unwanted = Some(Arc::new(resident)),
            (None, Err(_)) => {}
        }
        drop(state);
        drop(unwanted);
        self.context.status.update(|report| {
            if report.phase == Phase::Serving {
                report.message = super::serving(&self.base);
            }
        });
        self.tell();
        self.changed.send_replace(());
    }

    fn load(&self, key: u64, adapter: &ServedAdapter) -> Done<Resident> {
        let ServedAdapter { model_id, model } = adapter;
        let (fetched, _) = self.context.fetch_model(&format!("adapter `{model_id}`"), model)?;
        let _one_at_a_time = self.reading.lock().unwrap_or_else(PoisonError::into_inner);
        if !self.is_wanted(key, model_id) {
            return Err(Halt::Stopped);
        }
        let on_base = |halt: Halt| halt.of(&format!("adapter `{model_id}` on base model `{}`", self.base));
        let weights = read_lora(&fetched.dir, &self.shape, &self.weights_digest).map_err(on_base)?;
        self.engine.add_adapter(key, model_id.clone(), weights).map_err(on_base)
    }

    fn is_wanted(&self, key: u64, id: &str) -> bool {
        self.lock().wanted.get(id).is_some_and(|entry| entry.key == key)
    }

    /// The ids that answer, the closest first.
    fn near(&self, id: &str) -> Vec<String> {
        let mut ids = self.ids();
        let distance = |known: &String| strsim::damerau_levenshtein(id, known);
        // The client's text is bounded before it is compared with anything.
        if id.len() <= MAX_NAME {
            ids.sort_by_cached_key(distance);
        }
        ids.truncate(5);
        ids
    }

    /// Every change is whole.
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
