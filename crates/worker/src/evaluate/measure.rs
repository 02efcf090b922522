//! A model's scores on held-out rows: by the probabilities it gives the true answers, and by the answers it writes.
use lathe_contract::Metric;
use lathe_engine::files::Tokenizer;
use lathe_engine::{Adapter, Generator, Model, Row, Sampling};
use lathe_plan::{AdapterBudget, ServeRequest, plan_serving};
use serde::{Deserialize, Serialize};

use crate::base::{Base, memory_limit};
use crate::context::Context;
use crate::data::Held;
use crate::dataset::Question;
use crate::failure::{Done, Halt};
use crate::metrics::{Perplexity, corpus_bleu, mean_rouge};

/// Rows that are measured at most, the first ones of the file.
const MOST_ROWS: usize = 1000;
/// Questions that are asked at most, the first ones of the file.
const MOST_QUESTIONS: usize = 64;
/// Tokens of an answer at most.
const MOST_ANSWER_TOKENS: usize = 256;
/// Tokens between two looks at whether to stop.
const CHUNK_TOKENS: usize = 4096;
/// Questions that are answered at the same time.
const BATCH: usize = 16;

/// What was measured of one model.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Measured {
    /// Values by metric; a metric that these rows cannot tell is absent.
    pub values: Vec<(Metric, f64)>,
    /// The answers, one for each question.
    pub answers: Vec<String>,
}

impl Measured {
    /// The value of a metric.
    pub fn value(&self, metric: Metric) -> Option<f64> {
        self.values.iter().find(|(found, _)| *found == metric).map(|(_, value)| *value)
    }
}

/// The rows and questions that a model is measured with: the same before and after.
#[derive(Clone, Debug)]
pub struct Exam<'a> {
    rows: Vec<Row>,
    questions: Vec<&'a Question>,
    metrics: &'a [Metric],
}

impl<'a> Exam<'a> {
    /// An exam of held-out rows for these metrics.
    pub fn new(held: &'a [Held], metrics: &'a [Metric]) -> Self {
        let held = &held[..held.len().min(MOST_ROWS)];
        let asks = metrics.iter().any(|metric| *metric != Metric::Perplexity);
        let questions = held.iter().filter_map(|held| held.question.as_ref()).filter(|_| asks);
        Exam {
            rows: held.iter().map(|held| held.row.clone()).collect(),
            questions: questions.take(MOST_QUESTIONS).collect(),
            metrics,
        }
    }

    /// The questions, in the order of the answers.
    pub fn questions(&self) -> &[&'a Question] {
        &self.questions
    }

    /// Number of rows that are measured.
    pub fn rows(&self) -> usize {
        self.rows.len()
    }

    /// Whether a metric can be told from these rows.
    pub fn tells(&self, metric: Metric) -> bool {
        match metric {
            Metric::Perplexity => !self.rows.is_empty(),
            _ => !self.questions.is_empty(),
        }
    }

    /// exp of the mean negative log-likelihood of the answers' tokens; none where it is not asked for or not finite.
    ///
    /// # Errors
    /// Told to stop; the engine fails.
    pub fn perplexity(
        &self,
        context: &Context,
        mut log_probs: impl FnMut(&[Row]) -> lathe_engine::Result<Vec<Vec<f32>>>,
    ) -> Done<Option<f64>> {
        if !self.metrics.contains(&Metric::Perplexity) {
            return Ok(None);
        }
        let mut perplexity = Perplexity::default();
        let mut rest = self.rows.as_slice();
        while !rest.is_empty() {
            context.go_on()?;
            let mut tokens = 0;
            let fits = |row: &&Row| {
                tokens += row.tokens.len();
                tokens <= CHUNK_TOKENS
            };
            let (chunk, after) = rest.split_at(rest.iter().take_while(fits).count().max(1));
            for (row, logs) in chunk.iter().zip(log_probs(chunk)?) {
                for (&log, &weight) in logs.iter().zip(&row.weights).skip(1) {
                    perplexity.add(log, weight);
                }
            }
            rest = after;
            let done = self.rows.len() - rest.len();
            context.status.say(format!("measured {done} of {} rows", self.rows.len()));
        }
        Ok(perplexity.value().filter(|value| value.is_finite()))
    }

    /// The likeliest answers, and the model back.
    ///
    /// # Errors
    /// Told to stop; the engine fails.
    pub fn answers(
        &self,
        context: &Context,
        base: &Base,
        model: Model,
        adapter: Option<&Adapter>,
    ) -> Done<(Vec<String>, Model)> {
        if self.questions.is_empty() {
            return Ok((Vec::new(), model));
        }
        let room = self.answer_tokens(base.tokenizer())?;
        let longest = self.questions.iter().map(|question| question.prompt.len()).max().unwrap_or_default();
        let slots = adapter.map_or_else(AdapterBudget::default, |adapter| AdapterBudget {
            slots: 1,
            max_rank: adapter.spec().rank,
            targets: adapter.spec().targets.clone(),
        });
        let request = ServeRequest {
            weights: model.precision(),
            context: (longest + room).min(base.config.shape.max_position),
            max_sequences: BATCH,
            max_batch_tokens: 512,
            cache_tokens: None,
            adapters: slots,
            threads: model.threads(),
            memory_limit: memory_limit(),
        };
        let plan = plan_serving(&base.config.shape, &request).map_err(lathe_engine::Error::from)?;
        let mut generator = Generator::new(model, &plan)?;
        let adapter = adapter.map(|adapter| generator.add_adapter(adapter)).transpose()?;
        let greedy = Sampling { temperature: 0.0, top_p: 1.0, top_k: 0, seed: 0 };
        for (id, question) in self.questions.iter().enumerate() {
            generator.add_sequence(id as u64, &question.prompt, adapter, greedy, room)?;
        }
        let mut tokens = vec![Vec::new(); self.questions.len()];
        let mut open = self.questions.len();
        while !generator.idle() {
            context.go_on()?;
            for emitted in generator.step()? {
                let ends = base.config.eos.contains(&emitted.token);
                if ends && !emitted.finished {
                    generator.remove(emitted.sequence);
                }
                if let Some(answer) = tokens.get_mut(emitted.sequence as usize).filter(|_| !ends) {
                    answer.push(emitted.token);
                }
                if ends || emitted.finished {
                    open -= 1;
                    let done = self.questions.len() - open;
                    context.status.say(format!("answered {done} of {} questions", self.questions.len()));
                }
            }
        }
        let text = |ids: &Vec<u32>| base.tokenizer().decode(ids, true).map_err(Halt::from);
        Ok((tokens.iter().map(text).collect::<Done<_>>()?, generator.into_model()))
    }

    /// Room for an answer: twice the longest reference, within bounds.
    fn answer_tokens(&self, tokenizer: &Tokenizer) -> Done<usize> {
        let mut longest = 0;
        for question in &self.questions {
            longest = longest.max(tokenizer.encode(&question.reference, false)?.ids.len());
        }
        Ok((2 * longest).clamp(8, MOST_ANSWER_TOKENS))
    }

    /// Everything that was measured, in the order that was asked for.
    pub fn measured(&self, perplexity: Option<f64>, answers: Vec<String>) -> Measured {
        let trimmed = |answer: &'a str| answer.trim();
        let pairs: Vec<(&str, &str)> = answers
            .iter()
            .zip(&self.questions)
            .map(|(answer, question)| (answer.trim(), trimmed(&question.reference)))
            .collect();
        let rouge = mean_rouge(pairs.iter().copied());
        let value = |metric: Metric| match metric {
            Metric::Perplexity => perplexity,
            Metric::BLEU => (!pairs.is_empty()).then(|| corpus_bleu(pairs.iter().copied()).score),
            Metric::ROUGE1 => rouge.map(|rouge| rouge.rouge1),
            Metric::ROUGE2 => rouge.map(|rouge| rouge.rouge2),
            Metric::ROUGEL => rouge.map(|rouge| rouge.rouge_l),
        };
        let values = self.metrics.iter().filter_map(|&metric| Some((metric, value(metric)?))).collect();
        Measured { values, answers }
    }
}
