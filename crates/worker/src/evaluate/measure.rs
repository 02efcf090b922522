//! A model's scores on held-out rows: by the probabilities it gives the true answers, and by the answers it writes.
use lathe_contract::{Measured as Size, Metric};
use lathe_engine::files::Tokenizer;
use lathe_engine::{Adapter, Generator, Model, Row, Sampling};
use lathe_plan::{AdapterBudget, ServeRequest, plan_serving};
use serde::{Deserialize, Serialize};

use super::tells::HeldOut;
use crate::base::{Base, memory_limit};
use crate::context::Context;
use crate::data::Held;
use crate::dataset::Question;
use crate::failure::{Done, Halt};
use crate::metrics::{Perplexity, corpus_bleu, mean_rouge};

/// Rows that are measured at most.
const MOST_ROWS: usize = 1000;
/// Questions that are asked at most.
const MOST_QUESTIONS: usize = 64;
/// Of the choice of both: like the choice of the rows that are held out, the same for every seed of training, so that runs
/// can be compared.
const CHOICE_SEED: u64 = 0;
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
    held_out: usize,
    metrics: &'a [Metric],
}

impl<'a> Exam<'a> {
    /// An exam of held-out rows for these metrics.
    pub fn new(held: &'a [Held], metrics: &'a [Metric]) -> Self {
        let asks = metrics.iter().any(|metric| *metric != Metric::Perplexity);
        let questions: Vec<&Question> =
            held.iter().filter_map(|held| held.question.as_ref()).filter(|_| asks).collect();
        let of = |held: &[Held], at: usize| held.get(at).map(|held| held.row.clone());
        let chosen = choice(held.len(), MOST_ROWS).into_iter();
        let asked = choice(questions.len(), MOST_QUESTIONS).into_iter();
        Exam {
            rows: chosen.filter_map(|at| of(held, at)).collect(),
            questions: asked.filter_map(|at| questions.get(at).copied()).collect(),
            held_out: held.len(),
            metrics,
        }
    }

    /// The questions, in the order of the answers.
    pub fn questions(&self) -> &[&'a Question] {
        &self.questions
    }

    /// How much is measured.
    pub fn size(&self) -> Size {
        Size {
            held_out: self.held_out as i64,
            rows: self.rows.len() as i64,
            questions: self.questions.len() as i64,
        }
    }

    /// What there is to measure with.
    pub fn held_out(&self) -> HeldOut {
        HeldOut { rows: !self.rows.is_empty(), questions: !self.questions.is_empty() }
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

/// `most` of `all` indices, spread over all of them, in their order.
fn choice(all: usize, most: usize) -> Vec<usize> {
    let mut chosen: Vec<usize> = (0..all).collect();
    if all > most {
        // A fixed shuffle: the rank of an index is its SplitMix64.
        chosen.sort_by_cached_key(|&at| (mixed(CHOICE_SEED.wrapping_add(at as u64)), at));
        chosen.truncate(most);
        chosen.sort_unstable();
    }
    chosen
}

/// <https://prng.di.unimi.it/splitmix64.c>
fn mixed(state: u64) -> u64 {
    let mut z = state.wrapping_add(1).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn few_rows_are_all_measured_and_many_are_chosen_from_the_whole_file() {
        assert_eq!(choice(3, 4), [0, 1, 2]);
        let chosen = choice(10_000, 100);
        assert_eq!(chosen, choice(10_000, 100));
        assert_eq!(chosen.len(), 100);
        assert!(chosen.is_sorted() && chosen.windows(2).all(|pair| pair[0] != pair[1]));
        for tenth in 0..10 {
            let here = chosen.iter().filter(|&&at| at / 1000 == tenth).count();
            assert!((3..=25).contains(&here), "{here} of part {tenth}");
        }
    }

    #[test]
    fn an_exam_says_how_much_of_the_rows_it_is() {
        let question = |prompt| Some(Question { prompt: vec![prompt], reference: "a".to_owned() });
        let row = |n: u32| Row { tokens: vec![n, 1], weights: vec![0.0, 1.0] };
        let held: Vec<Held> = (0..3000).map(|n| Held { row: row(n), question: question(n) }).collect();
        let exam = Exam::new(&held, &[Metric::Perplexity, Metric::BLEU]);
        assert_eq!(exam.size(), Size { held_out: 3000, rows: 1000, questions: 64 });
        assert!(exam.questions().iter().any(|question| question.prompt[0] > 2000));
        assert_eq!(
            Exam::new(&held[..10], &[Metric::Perplexity]).size(),
            Size { held_out: 10, rows: 10, questions: 0 }
        );
    }
}
