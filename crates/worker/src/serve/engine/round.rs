//! The rounds of the engine's thread.
use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::mpsc::{RecvTimeoutError, TryRecvError};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use lathe_engine::{Adapter, AdapterId, Embedded, Emitted, Generator, Model};

use super::capacity::{Measurement, PAUSE, Pieces};
use super::learning::Learner;
use super::queue::{Running, Waiting};
use super::sequence::Surroundings;
use super::warm_up::warm_up;
use super::{Command, Commands, Setup};
use crate::failure::{Done, Halt};
use crate::serve::error::ApiError;

/// Everything that the thread owns.
pub struct Round {
    generator: Generator,
    setup: Setup,
    /// Those that wait, the oldest first.
    queue: VecDeque<Waiting>,
    running: BTreeMap<u64, Running>,
    /// Adapters by key, kept beside the engine so that it can be built anew.
    adapters: BTreeMap<u64, (AdapterId, Box<Adapter>)>,
    next: u64,
    /// Of the replica's capacity, until it is known.
    measurement: Option<Measurement>,
    pieces: Pieces,
    learner: Learner,
    /// Nobody has asked for anything for a while.
    quiet: bool,
    /// What the metrics say of adapters in use.
    told: Option<(String, String)>,
    #[cfg(test)]
    panic: bool,
}

impl Round {
    /// Takes the model, allocates what the plan lists, and produces a token with it.
    ///
    /// # Errors
    /// No memory, a plan of another model, no token.
    pub fn new(model: Model, setup: Setup) -> Done<Self> {
        let mut generator = Generator::new(model, &setup.plan)?;
        warm_up(&mut generator)?;
        let measurement = Some(Measurement::new(&setup.plan));
        let learner = Learner::new(setup.plan.max_sequences);
        let capacity = generator.capacity();
        setup.metrics.cache_has(capacity.total_blocks, capacity.block_tokens);
        Ok(Round {
            generator,
            setup,
            queue: VecDeque::new(),
            running: BTreeMap::new(),
            adapters: BTreeMap::new(),
            next: 1,
            measurement,
            pieces: Pieces::new(Instant::now()),
            learner,
            quiet: false,
            told: None,
            #[cfg(test)]
            panic: false,
        })
    }

    /// Rounds until it is told to stop.
    ///
    /// # Errors
    /// The engine panicked and could not be built anew.
    pub fn run(mut self, commands: &Commands) -> Done<()> {
        // Also before the first request: an endpoint picker learns how many adapters fit.
        self.tell();
        while self.take_commands(commands) {
            self.forget_gone();
            // What waits goes to the engine only once that is known to be whole.
            if !self.measure_a_piece() {
                self = self.rebuild()?;
            }
            self.fill();
            if !self.step() {
                self = self.rebuild()?;
            }
            self.tell();
        }
        self.abort(&ApiError::unavailable("shutting_down", "This replica is shutting down; ask again."));
        Ok(())
    }

    /// Takes what has come; waits where there is nothing else to do. False: stop.
    fn take_commands(&mut self, commands: &Commands) -> bool {
        let mut idle = self.running.is_empty() && self.queue.is_empty();
        self.quiet = false;
        if idle {
            self.learner.idle();
        }
        loop {
            let command = match &self.measurement {
                _ if !idle => commands.try_recv(),
                None => commands.recv().map_err(|_| TryRecvError::Disconnected),
                Some(measurement) => {
                    let pause = if measurement.is_under_way() { Duration::ZERO } else { PAUSE };
                    commands.recv_timeout(pause).map_err(|error| {
                        self.quiet = error == RecvTimeoutError::Timeout;
                        if self.quiet { TryRecvError::Empty } else { TryRecvError::Disconnected }
                    })
                }
            };
            idle = false;
            match command {
                Ok(Command::Stop) | Err(TryRecvError::Disconnected) => return false,
                Ok(command) => self.obey(command),
                Err(TryRecvError::Empty) => return true,
            }
        }
    }

    fn obey(&mut self, command: Command) {
        if let Some(measurement) = &mut self.measurement {
            measurement.pause(&mut self.generator);
        }
        match command {
            Command::Generate(job) => self.queue.push_back(Waiting::Answer(job)),
            Command::Embed(job) => self.queue.push_back(Waiting::Embeddings(job)),
            Command::AddAdapter { key, adapter, reply } => {
                let added = self.generator.add_adapter(&adapter);
                drop(reply.send(added.map(|id| drop(self.adapters.insert(key, (id, adapter))))));
            }
            Command::RemoveAdapter(key) => {
                if let Some((id, _)) = self.adapters.remove(&key)
                    && let Err(error) = self.generator.remove_adapter(id)
                {
                    tracing::error!(%error, "an adapter could not be removed");
                }
            }
            Command::Abort(why) => self.abort(&why),
            #[cfg(test)]
            Command::Panic => self.panic = true,
            Command::Stop => {}
        }
    }

    /// Frees the sequences of clients that left.
    fn forget_gone(&mut self) {
        let metrics = &self.setup.metrics;
        let now = Instant::now();
        self.queue.retain(|job| {
            let stays = !job.is_gone();
            if !stays {
                job.forget(metrics);
            }
            stays
        });
        // Looked at once: whoever leaves meanwhile is forgotten next time, in the engine too.
        for (id, mut sequence) in self.running.extract_if(.., |_, sequence| sequence.is_gone()) {
            sequence.fail(ApiError::internal(), "abort", metrics, now);
            self.generator.remove(id);
        }
    }

    /// Gives the engine as many sequences as it decodes at a time; it finds room in its cache for them itself.
    fn fill(&mut self) {
        while self.running.len() < self.setup.plan.max_sequences {
            let Some(job) = self.queue.pop_front() else { return };
            let id = self.next;
            self.next += 1;
            let adapter = match job.adapter() {
                None => Ok(None),
                Some(resident) => match self.adapters.get(&resident.key) {
                    Some((id, _)) => Ok(Some(*id)),
                    None => Err("its adapter is not resident".to_owned()),
                },
            };
            let generator = &mut self.generator;
            let added = adapter.and_then(|adapter| {
                let add = || job.add(generator, id, adapter);
                match catch_unwind(AssertUnwindSafe(add)) {
                    Ok(added) => added.map_err(|error| error.to_string()),
                    Err(_) => Err("the engine panicked over it".to_owned()),
                }
            });
            match added {
                Ok(()) => {
                    let (begun, rest) = job.begin(&self.setup.metrics, Instant::now());
                    self.running.extend(begun.map(|sequence| (id, sequence)));
                    match rest {
                        Some(rest) if rest.has_turn() => self.queue.push_front(rest),
                        rest => self.queue.extend(rest.map(Waiting::next_turn)),
                    }
                }
                // What clients can do wrong was refused before; this is ours.
                Err(error) => {
                    tracing::error!(error, "the engine did not take a request");
                    job.refuse(ApiError::internal(), "error", &self.setup.metrics);
                }
            }
        }
    }

    /// One forward pass. Its failure is everybody's who is in it, and nobody's who comes after. False: it panicked, and
    /// what the generator holds cannot be believed.
    fn step(&mut self) -> bool {
        if self.running.is_empty() {
            return !self.quiet || self.measure();
        }
        let sequences = self.running.len();
        let stepped = catch_unwind(AssertUnwindSafe(|| {
            #[cfg(test)]
            assert!(!std::mem::take(&mut self.panic), "asked to");
            self.generator.step()
        }));
        match stepped {
            Ok(Ok(emitted)) => {
                let embedded = self.generator.take_embedded();
                self.deliver(&emitted, embedded);
                if let Some(capacity) =
                    self.learner.step(Instant::now(), sequences, self.generator.last_step())
                {
                    self.setup.load.can(capacity);
                }
            }
            Ok(Err(error)) => {
                tracing::error!(%error, "a forward pass failed");
                for &id in self.running.keys() {
                    self.generator.remove(id);
                }
                self.fail_running();
            }
            Err(_) => {
                self.fail_running();
                return false;
            }
        }
        true
    }

    /// One step of the measurement. False: as [`Round::step`].
    fn measure(&mut self) -> bool {
        let Some(measurement) = &mut self.measurement else { return true };
        let generator = &mut self.generator;
        let measured = catch_unwind(AssertUnwindSafe(|| measurement.step(generator)));
        let alive = measured.is_ok();
        match measured {
            Ok(Ok(None)) => return true,
            Ok(Ok(Some(capacity))) => self.setup.load.can(self.learner.measured(capacity)),
            Ok(Err(error)) => {
                tracing::error!(?error, "the capacity could not be measured");
                measurement.pause(generator);
            }
            Err(_) => {}
        }
        self.measurement = None;
        alive
    }

    /// A piece of the measurement between two requests, where one is due. False: as [`Round::step`].
    fn measure_a_piece(&mut self) -> bool {
        if self.quiet || self.measurement.is_none() || !self.running.is_empty() {
            return true;
        }
        let Some(end) = self.pieces.end(Instant::now()) else { return true };
        while self.measurement.is_some() && Instant::now() < end {
            if !self.measure() {
                return false;
            }
        }
        if let Some(measurement) = &mut self.measurement {
            measurement.pause(&mut self.generator);
        }
        self.learner.idle();
        self.pieces.ended(Instant::now());
        true
    }

    fn deliver(&mut self, emitted: &[Emitted], embedded: Vec<Embedded>) {
        let setup = &self.setup;
        let around =
            Surroundings { eos: &setup.eos, load: &setup.load, metrics: &setup.metrics, now: Instant::now() };
        for token in emitted {
            let Some(Running::Answer(sequence)) = self.running.get_mut(&token.sequence) else { continue };
            let take = || sequence.take(token, &around);
            let over = catch_unwind(AssertUnwindSafe(take)).unwrap_or_else(|_| {
                // Its poster's drop tells the client.
                around.metrics.finished("error");
                true
            });
            if over {
                self.running.remove(&token.sequence);
            }
            if over && !token.finished {
                self.generator.remove(token.sequence);
            }
        }
        for embedded in embedded {
            if let Some(Running::Embedding(part)) = self.running.remove(&embedded.sequence) {
                part.take(embedded, &around);
            }
        }
    }

    fn fail_running(&mut self) {
        let now = Instant::now();
        for sequence in std::mem::take(&mut self.running).values_mut() {
            sequence.fail(ApiError::internal(), "error", &self.setup.metrics, now);
        }
    }

    /// A new generator takes the model and the adapters; those who wait go on waiting.
    fn rebuild(self) -> Done<Self> {
        tracing::error!("the engine panicked; what was in flight is lost, the engine is built anew");
        let again = move || -> Done<Self> {
            let Round {
                generator,
                setup,
                mut adapters,
                queue,
                running,
                next,
                measurement,
                pieces,
                mut learner,
                told,
                ..
            } = self;
            learner.idle();
            let mut generator = Generator::new(generator.into_model(), &setup.plan)?;
            warm_up(&mut generator)?;
            for (id, adapter) in adapters.values_mut() {
                *id = generator.add_adapter(adapter)?;
            }
            Ok(Round {
                generator,
                setup,
                queue,
                running,
                adapters,
                next,
                measurement,
                pieces,
                learner,
                quiet: false,
                told,
                #[cfg(test)]
                panic: false,
            })
        };
        catch_unwind(AssertUnwindSafe(again)).unwrap_or_else(|_| {
            let cause = "the engine panicked, and again as it was built anew";
            Err(Halt::transient("EngineFailed", cause, "nothing: the pod is restarted; the log says more"))
        })
    }

    fn abort(&mut self, why: &ApiError) {
        let now = Instant::now();
        for job in std::mem::take(&mut self.queue) {
            job.refuse(why.clone(), "abort", &self.setup.metrics);
        }
        for (id, mut sequence) in std::mem::take(&mut self.running) {
            self.generator.remove(id);
            sequence.fail(why.clone(), "abort", &self.setup.metrics, now);
        }
    }

    /// Tells load and metrics what is held now.
    fn tell(&mut self) {
        if self.measurement.as_ref().is_some_and(Measurement::is_under_way) {
            return;
        }
        let Setup { load, metrics, plan, .. } = &self.setup;
        let capacity = self.generator.capacity();
        let inputs = self.queue.iter().map(Waiting::count).sum::<usize>() + capacity.waiting;
        let used = capacity.total_blocks.saturating_sub(capacity.free_blocks);
        let usage = used as f64 / capacity.total_blocks.max(1) as f64;
        // Who balances and scales counts requests, of which another replica could have had one; vLLM's metrics count inputs.
        load.holds(capacity.running, self.queue.len() + capacity.waiting, usage);
        metrics.running.set(capacity.running as i64);
        metrics.waiting.set(inputs as i64);
        metrics.cache_usage.set(usage);
        let running = names(self.running.values().map(Running::adapter));
        let queued = names(self.queue.iter().map(Waiting::adapter));
        let names = (running, queued);
        if self.told.as_ref() != Some(&names) {
            let unix = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
            metrics.loras(plan.adapters.slots, names.0.clone(), names.1.clone(), unix);
            self.told = Some(names);
        }
    }
}

fn names<'a>(adapters: impl Iterator<Item = Option<&'a Arc<super::Resident>>>) -> String {
    let names: BTreeSet<&str> = adapters.flatten().map(|resident| resident.name.as_str()).collect();
    names.into_iter().collect::<Vec<_>>().join(",")
}
