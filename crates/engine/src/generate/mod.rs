//! Generation: many sequences at a time, each with its own adapter, to be continued or to be embedded.

mod adapters;
mod batch;
mod blocks;
mod embedding;
mod sampling;
mod schedule;
mod settings;
mod slots;

use std::collections::BTreeMap;
use std::ops::Range;

use lathe_plan::{BLOCK, ModelShape, SAMPLE_CHUNK, ServePlan};

use crate::decoder::{
    Block, Kept, LayerCache, LayerLora, Planned, Work, last_logits, last_states, write_rope,
};
use crate::device::{Buf, DataMut, Op};
use crate::{Adapter, Error, Model, Result};
use batch::{Device as BatchBuffers, Host};
use blocks::{Before, Blocks};
pub use schedule::{Chunk, SequenceState, State, StepPlan, schedule};
pub use settings::{AdapterId, Capacity, Embedded, Emitted, Sampling, StepTokens};
use slots::Slots;

/// A sequence in flight.
#[derive(Debug)]
struct Sequence {
    id: u64,
    /// Prompt and answer so far.
    tokens: Vec<u32>,
    prompt: usize,
    /// Tokens in the cache.
    computed: usize,
    blocks: Vec<u32>,
    /// The slot of its adapter.
    adapter: Option<usize>,
    wanted: Wanted,
    /// How others find its blocks; `None`: they do not.
    shared: Option<Shared>,
    /// Tokens of the prompt that were in the cache when it began; `None`: it has not begun.
    cached: Option<usize>,
}

/// What a sequence is computed for.
#[derive(Debug, Clone, Copy)]
enum Wanted {
    /// Tokens that follow, so many at most.
    Tokens(Sampling, usize),
    /// The vector of its last token.
    Embedding,
}

/// Where a sequence stands among the beginnings that are kept.
#[derive(Debug, Clone, Copy)]
struct Shared {
    start: Before,
    /// Its blocks that can be found, and what comes after them.
    blocks: usize,
    after: Before,
}

/// Continues sequences with a model: owns it, the cache and the resident adapters. Not shared: one thread owns a
/// generator and is spoken to by commands.
pub struct Generator {
    model: Model,
    plan: ServePlan,
    planned: Planned,
    work: Work,
    /// The residual stream.
    x: Buf,
    kept: Kept,
    cache: Vec<LayerCache>,
    lora: Vec<LayerLora>,
    head: Head,
    batch: BatchBuffers,
    host: Host,
    blocks: Blocks,
    slots: Slots,
    /// By arrival.
    sequences: BTreeMap<u64, Sequence>,
    arrivals: u64,
    last: StepTokens,
    embedded: Vec<Embedded>,
    /// On the host one row of logits; of every row the largest, the sum of exponentials and one more; and sums to draw by.
    logits: Vec<f32>,
    stats: Vec<f32>,
    sums: Vec<f32>,
}

struct Head {
    inv: Buf,
    rows: Buf,
    logits: Buf,
    stats: Buf,
    sums: Buf,
    /// Zeros: nobody asks for the logit of a certain token.
    targets: Buf,
}

impl Generator {
    /// Allocates what the plan lists.
    ///
    /// # Errors
    /// The plan is another model's, no memory.
    pub fn new(mut model: Model, plan: &ServePlan) -> Result<Generator> {
        for (what, same) in [
            ("shape", plan.shape == model.shape),
            ("precision", plan.weights == model.precision),
            ("number of threads", plan.threads == model.device.threads()),
        ] {
            if !same {
                return Err(Error::OtherPlan { what });
            }
        }
        let (dev, shape) = (&mut *model.device, &model.shape);
        let planned = Planned::alloc(dev, shape, &plan.buffers)?;
        let rope = planned.get("rope")?;
        write_rope(dev, shape, rope);
        let mut kept = Kept::of(&planned, 0)?;
        kept.mid = adapters::mids(&plan.adapters, planned.find("lora.mid"));
        let cache = (0..shape.layers).map(|layer| {
            let part = |part: &str| planned.get(&format!("cache.{layer}.{part}"));
            Ok(LayerCache { k: part("k")?, v: part("v")? })
        });
        Ok(Generator {
            cache: cache.collect::<Result<_>>()?,
            lora: adapters::empty(shape, &plan.adapters, &planned),
            work: Work { n: planned.get("n")?, act: planned.get("act")?, rope, dropout: None },
            x: planned.get("x")?,
            kept,
            head: Head {
                inv: planned.get("head.inv")?,
                rows: planned.get("head.rows")?,
                logits: planned.get("head.logits")?,
                stats: planned.get("head.stats")?,
                sums: planned.get("head.sums")?,
                targets: planned.get("head.targets")?,
            },
            batch: BatchBuffers::of(&planned)?,
            host: Host::default(),
            blocks: Blocks::new(plan.cache_blocks),
            slots: Slots::new(plan.adapters.slots),
            sequences: BTreeMap::new(),
            arrivals: 0,
            last: StepTokens::default(),
            embedded: Vec::new(),
            logits: vec![0.0; shape.vocab],
            stats: Vec::new(),
            sums: Vec::new(),
            plan: plan.clone(),
            planned,
            model,
        })
    }

    /// As [`Generator::add_sequence`], but what others have read of its beginning is not read again, and others find
    /// what it reads and writes. On the CPU to the same bits. Only for sequences that may know of each other: how long
    /// a first token takes tells what others have asked.
    ///
    /// # Errors
    /// As [`Generator::add_sequence`].
    pub fn add_shared(
        &mut self,
        id: u64,
        prompt: &[u32],
        adapter: Option<AdapterId>,
        sampling: Sampling,
        max_new_tokens: usize,
    ) -> Result<()> {
        self.add(id, prompt, adapter, Wanted::Tokens(sampling, max_new_tokens), true)
    }

    /// Queues a prompt that is read as that of [`Generator::add_shared`], and of which the embedding is wanted: its last
    /// token's hidden state behind the final norm, of length 1. A step that reads its end ends it, and
    /// [`Generator::take_embedded`] has the vector. It may fill the whole context.
    ///
    /// # Errors
    /// As [`Generator::add_sequence`].
    pub fn add_embedding(&mut self, id: u64, prompt: &[u32], adapter: Option<AdapterId>) -> Result<()> {
        self.add(id, prompt, adapter, Wanted::Embedding, true)
    }

    /// Queues a sequence. It produces at most `max_new_tokens` tokens, fewer when the context ends.
    ///
    /// # Errors
    /// [`Error::Sequence`]: the id is in use, the prompt is empty, leaves no room in the context, or has a
    /// token outside the vocabulary, a sampling value is outside its range; [`Error::Adapter`]: no such
    /// adapter.
    pub fn add_sequence(
        &mut self,
        id: u64,
        prompt: &[u32],
        adapter: Option<AdapterId>,
        sampling: Sampling,
        max_new_tokens: usize,
    ) -> Result<()> {
        self.add(id, prompt, adapter, Wanted::Tokens(sampling, max_new_tokens), false)
    }

    fn add(
        &mut self,
        id: u64,
        prompt: &[u32],
        adapter: Option<AdapterId>,
        wanted: Wanted,
        shared: bool,
    ) -> Result<()> {
        self.check(id, prompt, wanted)?;
        let start = Before::Start(adapter);
        let shared = shared.then_some(Shared { start, blocks: 0, after: start });
        let adapter = match adapter {
            None => None,
            Some(adapter) => {
                let gone = || Error::Adapter { what: format!("no adapter {} is resident", adapter.0) };
                Some(self.slots.lease(adapter).ok_or_else(gone)?)
            }
        };
        let sequence = Sequence {
            id,
            tokens: prompt.to_vec(),
            prompt: prompt.len(),
            computed: 0,
            blocks: Vec::new(),
            adapter,
            wanted,
            shared,
            cached: None,
        };
        self.sequences.insert(self.arrivals, sequence);
        self.arrivals += 1;
        Ok(())
    }

    fn check(&self, id: u64, prompt: &[u32], wanted: Wanted) -> Result<()> {
        let refuse = |what: String| Err(Error::Sequence { what });
        let (context, vocab) = (self.plan.context, self.model.shape.vocab);
        if self.find(id).is_some() {
            return refuse(format!("id {id} is in use"));
        }
        let most = context - usize::from(wanted.is_answer());
        if prompt.is_empty() || prompt.len() > most {
            return refuse(format!("a prompt must have 1 to {most} tokens (found {})", prompt.len()));
        }
        if let Some(token) = prompt.iter().find(|&&t| t as usize >= vocab) {
            return refuse(format!("token {token} is outside the vocabulary of {vocab}"));
        }
        let Wanted::Tokens(sampling, max_new_tokens) = wanted else { return Ok(()) };
        if max_new_tokens == 0 {
            return refuse("max_new_tokens must be at least 1 (found 0)".to_owned());
        }
        if !sampling.temperature.is_finite() || sampling.temperature < 0.0 {
            return refuse(format!("temperature must be at least 0 (found {})", sampling.temperature));
        }
        if !(sampling.top_p > 0.0 && sampling.top_p <= 1.0) {
            return refuse(format!("top_p must be above 0 and at most 1 (found {})", sampling.top_p));
        }
        Ok(())
    }

    /// One batched forward pass over what the scheduler chose: chunks of prompts and one token of each running
    /// sequence. Returns at most one token a sequence; empty when there is nothing to do (or only a part of a
    /// long prompt was read, or what is embedded: see [`Generator::idle`]).
    ///
    /// # Errors
    /// Reading back from the device failed.
    pub fn step(&mut self) -> Result<Vec<Emitted>> {
        let mut found = self.find_beginnings();
        let plan = schedule(&self.state(&found));
        for id in &plan.preempt {
            if let Some(sequence) = self.find(*id).and_then(|at| self.sequences.get_mut(&at)) {
                self.blocks.give_back(&mut sequence.blocks);
                sequence.computed = 0;
            }
        }
        let chosen: Vec<(u64, Chunk)> =
            plan.run.into_iter().filter_map(|chunk| Some((self.find(chunk.id)?, chunk))).collect();
        // Before anybody takes a free block: it could be one of these.
        for (at, _) in &chosen {
            if let (Some(sequence), Some((blocks, after))) = (self.sequences.get_mut(at), found.remove(at)) {
                self.blocks.hold(&blocks);
                sequence.begin(blocks, after);
            }
        }
        self.last = StepTokens::default();
        self.embedded.clear();
        let mut run: Vec<(u64, usize)> = Vec::with_capacity(chosen.len());
        for (at, Chunk { rows, new_blocks, .. }) in chosen {
            if let Some(sequence) = self.sequences.get_mut(&at) {
                self.blocks.take(new_blocks, &mut sequence.blocks);
                let answers = sequence.computed >= sequence.prompt && rows == 1;
                *(if answers { &mut self.last.generation } else { &mut self.last.prompt }) += rows;
                run.push((at, rows));
            }
        }
        if run.is_empty() {
            return Ok(Vec::new());
        }
        // Rows of one adapter side by side, so that each adapter's product runs once.
        run.sort_by_key(|&(at, _)| (self.sequences[&at].adapter, at));
        self.host.fill(run.iter().map(|&(at, rows)| (&self.sequences[&at], rows)), self.plan.context);
        self.forward();
        self.emit(&run)
    }

    fn forward(&mut self) {
        let Model { device, shape, weights, .. } = &mut self.model;
        let batch = self.host.write(&mut **device, &self.batch);
        let (table, width) = (weights.embedding, shape.hidden);
        let (rows, tokens, out) = (batch.rows, batch.tokens, self.x.first(batch.rows * width));
        device.enqueue(Op::Embed { table, tokens, out, rows, vocab: shape.vocab, width });
        for layer in 0..shape.layers {
            let (weights, lora, cache) = (&weights.layers[layer], &self.lora[layer], self.cache[layer]);
            let block = Block { shape, layer, weights, lora, batch: &batch, work: &self.work };
            block.forward(&mut **device, self.x, self.x, &self.kept, Some(cache));
        }
        let Head { inv, rows, logits, stats, sums, targets } = self.head;
        let (count, vectors) = self.host.chosen();
        let n = self.work.n;
        if count + vectors > 0 {
            let chosen = self.batch.rows.first(count + vectors);
            last_states(&mut **device, shape, weights, self.x, chosen, rows, inv, n);
        }
        if count > 0 {
            last_logits(&mut **device, shape, weights, n, count, logits);
            let logits = logits.first(count * shape.vocab);
            let (rows, vocab, temperatures) = (count, shape.vocab, self.batch.temperatures);
            device.enqueue(Op::LogitStats { logits, targets, stats, rows, vocab, first: 0 });
            device.enqueue(Op::SampleSums { logits, stats, temperatures, sums, rows, vocab });
        }
    }

    /// Reads logits and vectors back, chooses tokens, and ends sequences that are done.
    fn emit(&mut self, run: &[(u64, usize)]) -> Result<Vec<Emitted>> {
        let ModelShape { vocab, hidden, .. } = self.model.shape;
        let (count, vectors) = self.host.chosen();
        // Those of tokens come first.
        let mut states = vec![0.0; vectors * hidden];
        if vectors > 0 {
            let from = self.work.n.part(count * hidden, states.len());
            self.model.device.read(from, DataMut::F32(&mut states));
        }
        let mut states = states.chunks_exact(hidden);
        self.stats.resize(3 * count, 0.0);
        self.model.device.read(self.head.stats.first(3 * count), DataMut::F32(&mut self.stats));
        let chunks = vocab.div_ceil(SAMPLE_CHUNK);
        self.sums.resize(count * chunks, 0.0);
        self.model.device.read(self.head.sums.first(count * chunks), DataMut::F32(&mut self.sums));
        let mut rows_of = self.stats.chunks_exact(3).zip(self.sums.chunks_exact(chunks)).enumerate();
        let mut emitted = Vec::with_capacity(count);
        let mut done = Vec::new();
        for &(at, rows) in run {
            let Some(sequence) = self.sequences.get_mut(&at) else { continue };
            sequence.computed += rows;
            sequence.tell(&mut self.blocks);
            if sequence.computed < sequence.tokens.len() {
                continue;
            }
            let cached = sequence.cached.unwrap_or(0);
            let Wanted::Tokens(sampling, max_new_tokens) = sequence.wanted else {
                let Some(state) = states.next() else { continue };
                self.embedded.push(Embedded {
                    sequence: sequence.id,
                    vector: embedding::unit(state),
                    cached,
                });
                done.push(sequence.id);
                continue;
            };
            let Some((row, (stats, sums))) = rows_of.next() else { continue };
            let (device, logits) = (&mut self.model.device, self.head.logits.part(row * vocab, vocab));
            let mut read = |range: Range<usize>, into: &mut [f32]| {
                device.read(logits.part(range.start, range.len()), DataMut::F32(into));
            };
            let place = sequence.tokens.len() as u64;
            let known = sampling::Known { max: stats[0], sum: stats[1], sums };
            let (token, log_prob) = sampling::sample(&mut read, &mut self.logits, known, &sampling, place);
            sequence.tokens.push(token);
            let finished = sequence.tokens.len() - sequence.prompt >= max_new_tokens
                || sequence.tokens.len() >= self.plan.context;
            emitted.push(Emitted { sequence: sequence.id, token, log_prob, finished, cached });
            if finished {
                done.push(sequence.id);
            }
        }
        done.into_iter().for_each(|id| self.remove(id));
        emitted.sort_by_key(|e| e.sequence);
        Ok(emitted)
    }

    /// What the last step embedded; the sequences are gone.
    pub fn take_embedded(&mut self) -> Vec<Embedded> {
        std::mem::take(&mut self.embedded)
    }

    /// What the last step computed.
    pub fn last_step(&self) -> StepTokens {
        self.last
    }

    /// Whether no sequence is queued or running.
    pub fn idle(&self) -> bool {
        self.sequences.is_empty()
    }

    /// Ends a sequence and frees its blocks; nothing happens when it is gone already.
    pub fn remove(&mut self, id: u64) {
        let Some(mut sequence) = self.find(id).and_then(|at| self.sequences.remove(&at)) else { return };
        self.blocks.give_back(&mut sequence.blocks);
        if let Some(slot) = sequence.adapter {
            self.slots.release(slot);
        }
    }

    /// Makes an adapter resident.
    ///
    /// # Errors
    /// [`Error::Adapter`]: no free slot, or larger than the plan's budget, or of another base.
    pub fn add_adapter(&mut self, adapter: &Adapter) -> Result<AdapterId> {
        adapters::check(adapter, &self.model.shape, &self.plan.adapters)?;
        let full = || Error::Adapter {
            what: format!("all {} slots for adapters are in use; remove one first", self.plan.adapters.slots),
        };
        let (id, slot) = self.slots.add().ok_or_else(full)?;
        adapters::write(&mut *self.model.device, &self.planned, slot, adapter, &mut self.lora)?;
        Ok(id)
    }

    /// Takes an adapter away: new sequences cannot name it, sequences in flight keep it to their end, then its
    /// slot is free.
    ///
    /// # Errors
    /// [`Error::Adapter`]: no such adapter.
    pub fn remove_adapter(&mut self, id: AdapterId) -> Result<()> {
        if self.slots.remove(id) {
            return Ok(());
        }
        Err(Error::Adapter { what: format!("no adapter {} is resident", id.0) })
    }

    /// What is free and what is in use.
    pub fn capacity(&self) -> Capacity {
        let running = self.sequences.values().filter(|s| !s.blocks.is_empty()).count();
        Capacity {
            total_blocks: self.blocks.total(),
            free_blocks: self.blocks.free(),
            block_tokens: BLOCK,
            running,
            waiting: self.sequences.len() - running,
            max_sequences: self.plan.max_sequences,
            free_adapter_slots: self.slots.free(),
        }
    }

    /// The model; everything else is freed.
    pub fn into_model(mut self) -> Model {
        self.planned.free(&mut *self.model.device);
        self.model
    }

    fn find(&self, id: u64) -> Option<u64> {
        self.sequences.iter().find(|(_, s)| s.id == id).map(|(&at, _)| at)
    }

    /// Of each sequence that waits and may share: the blocks that keep its beginning, and what comes after them. At
    /// least one token is left to be read: its row gives the next one.
    fn find_beginnings(&self) -> BTreeMap<u64, (Vec<u32>, Before)> {
        let waiting = self.sequences.iter().filter(|(_, s)| s.blocks.is_empty());
        let found = waiting.filter_map(|(&at, s)| {
            let Shared { start, .. } = s.shared?;
            Some((at, self.blocks.find(start, &s.tokens[..s.tokens.len() - 1])))
        });
        found.collect()
    }

    fn state(&self, found: &BTreeMap<u64, (Vec<u32>, Before)>) -> State {
        let (mut running, mut waiting) = (Vec::new(), Vec::new());
        for (at, s) in &self.sequences {
            let seen = SequenceState {
                id: s.id,
                total: s.tokens.len(),
                answers: s.wanted.is_answer(),
                computed: s.computed,
                blocks: s.blocks.len(),
                alone: self.blocks.held_by(1, &s.blocks),
            };
            match found.get(at) {
                _ if !s.blocks.is_empty() => running.push(seen),
                None => waiting.push(seen),
                Some((kept, _)) => {
                    let alone = self.blocks.held_by(0, kept);
                    let (computed, blocks) = (kept.len() * BLOCK, kept.len());
                    waiting.push(SequenceState { computed, blocks, alone, ..seen });
                }
            }
        }
        State {
            running,
            waiting,
            free_blocks: self.blocks.free(),
            max_sequences: self.plan.max_sequences,
            max_batch_tokens: self.plan.max_batch_tokens,
        }
    }
}

impl Wanted {
    /// Whether tokens follow.
    fn is_answer(self) -> bool {
        matches!(self, Wanted::Tokens(..))
    }
}

impl Sequence {
    /// Takes blocks that keep its beginning, maybe none.
    fn begin(&mut self, blocks: Vec<u32>, after: Before) {
        self.computed = blocks.len() * BLOCK;
        // Begun again, its own answer may be kept too.
        self.cached.get_or_insert(self.computed);
        if let Some(shared) = &mut self.shared {
            (shared.blocks, shared.after) = (blocks.len(), after);
        }
        self.blocks = blocks;
    }

    /// Lets others find the blocks that are full now.
    fn tell(&mut self, blocks: &mut Blocks) {
        let Some(shared) = &mut self.shared else { return };
        let full = self.tokens[..self.computed].as_chunks::<BLOCK>().0;
        for (&block, &tokens) in self.blocks.iter().zip(full).skip(shared.blocks) {
            shared.after = blocks.keep(block, shared.after, tokens);
            shared.blocks += 1;
        }
    }
}
