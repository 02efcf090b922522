//! Examples to tokens, with the answers marked.

use lathe_engine::Row;
use lathe_engine::files::{ChatTemplate, Encoded, FileError, Message, Tokenizer};

use super::problem::DatasetError;
use super::row::{Example, Format};

/// Makes tokens of examples for one model.
#[derive(Debug, Clone, Copy)]
pub struct Encoder<'a> {
    /// The model's tokenizer.
    pub tokenizer: &'a Tokenizer,
    /// The model's chat template, where it has one.
    pub template: Option<&'a ChatTemplate>,
    /// The token that ends a text that no template ends.
    pub eos: Option<u32>,
    /// What a template prints as today's date.
    pub now: jiff::Timestamp,
    /// Tokens of a row, at most. A longer text goes on in further rows; the end of a longer conversation is cut.
    pub max_tokens: usize,
}

/// An example as the engine learns it.
#[derive(Debug, Clone, PartialEq)]
pub struct EncodedRow {
    /// Tokens and their weights: 1 in an answer, 0 elsewhere. A long text has several rows, each of which begins with the
    /// last token of the one before, so that every token but the first is predicted exactly once.
    pub rows: Vec<Row>,
    /// Tokens of the example.
    pub whole: usize,
    /// Whether its end is left out.
    pub cut: bool,
    /// Tokens that are learned. An example with none teaches nothing.
    pub learned: usize,
    /// Answers that are not learned because the template writes them differently once the conversation goes on.
    pub lost_answers: usize,
}

/// What the model is asked in an evaluation, and the answer that was hoped for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Question {
    /// Tokens to continue.
    pub prompt: Vec<u32>,
    /// The answer's text.
    pub reference: String,
}

/// Why an example makes no tokens.
#[derive(Debug)]
pub enum Unencodable {
    /// The row is to blame; in words that fit behind a line's number.
    Row(String),
    /// The model's template or tokenizer is.
    Model(FileError),
}

impl From<FileError> for Unencodable {
    fn from(error: FileError) -> Self {
        match error {
            FileError::Refused(_) => Unencodable::Row(error.to_string()),
            _ => Unencodable::Model(error),
        }
    }
}

impl Encoder<'_> {
    /// Refuses a format that this model cannot read.
    ///
    /// # Errors
    /// [`DatasetError::NoChatTemplate`].
    pub fn accepts(&self, format: Format) -> Result<(), DatasetError> {
        if format == Format::Chat && self.template.is_none() {
            Err(DatasetError::NoChatTemplate)
        } else {
            Ok(())
        }
    }

    /// Tokens and weights of an example: a chat by the model's template, a prompt and its completion one after the other
    /// with the end of text, a text with the end of text.
    ///
    /// # Errors
    /// The template refuses the conversation, or template or tokenizer fail.
    pub fn encode(&self, example: &Example) -> Result<EncodedRow, Unencodable> {
        match example {
            Example::Chat(messages) => {
                let template = self.template()?;
                let rendered = template.render_with_answers(messages, self.now)?;
                let encoded = self.tokenizer.encode(&rendered.text, false)?;
                let learned = |start: usize, end: usize| {
                    rendered.answers.iter().any(|answer| start < answer.end && end > answer.start)
                };
                let marked = self.mark(encoded, learned, false);
                Ok(EncodedRow { lost_answers: rendered.lost_answers, ..self.first(marked) })
            }
            Example::PromptCompletion { prompt, completion } => {
                let encoded = self.tokenizer.encode(&format!("{prompt}{completion}"), true)?;
                Ok(self.first(self.mark(encoded, |_, end| end > prompt.len(), true)))
            }
            Example::Text(text) => {
                let encoded = self.tokenizer.encode(text, true)?;
                Ok(self.windows(self.mark(encoded, |_, _| true, true)))
            }
        }
    }

    /// What to ask a model so that its answer can be compared: the last answer of a chat, or a completion. A text asks
    /// nothing, and neither does a prompt that leaves no room for an answer: one that was cut asks something else.
    ///
    /// # Errors
    /// As [`Encoder::encode`].
    pub fn question(&self, example: &Example) -> Result<Option<Question>, Unencodable> {
        let question = match example {
            Example::Chat(messages) => {
                let template = self.template()?;
                let Some((turn, answer)) = last_answer(messages) else { return Ok(None) };
                let prompt = template.render(&messages[..turn], true, self.now)?;
                let prompt = self.tokenizer.encode(&prompt, false)?.ids;
                Question { prompt, reference: answer.content.clone() }
            }
            Example::PromptCompletion { prompt, completion } => {
                let Encoded { mut ids, mut offsets } = self.tokenizer.encode(prompt, true)?;
                // Some tokenizers end a text; this one is to go on. One token must stay to go on from.
                while ids.len() > 1 && offsets.last().is_some_and(|range| range.is_empty()) {
                    ids.pop();
                    offsets.pop();
                }
                Question { prompt: ids, reference: completion.clone() }
            }
            Example::Text(_) => return Ok(None),
        };
        Ok(Some(question).filter(|question| question.prompt.len() < self.max_tokens))
    }

    fn template(&self) -> Result<&ChatTemplate, Unencodable> {
        self.template.ok_or_else(|| Unencodable::Row("the model has no chat template".to_owned()))
    }

    /// The whole example as one row, with the end of text where `ends`.
    fn mark(&self, encoded: Encoded, learned: impl Fn(usize, usize) -> bool, ends: bool) -> Row {
        let Encoded { ids: mut tokens, offsets } = encoded;
        // What the tokenizer added covers no text and is no part of an answer.
        let weight =
            |at: &std::ops::Range<usize>| if !at.is_empty() && learned(at.start, at.end) { 1.0 } else { 0.0 };
        let mut weights: Vec<f32> = offsets.iter().map(weight).collect();
        if let Some(eos) = self.eos.filter(|_| ends) {
            if tokens.last() == Some(&eos) {
                weights.pop();
            } else {
                tokens.push(eos);
            }
            weights.push(1.0);
        }
        Row { tokens, weights }
    }

    /// The beginning, as much of it as fits: the middle of a conversation makes no sense without it.
    fn first(&self, Row { mut tokens, mut weights }: Row) -> EncodedRow {
        let whole = tokens.len();
        tokens.truncate(self.max_tokens);
        weights.truncate(self.max_tokens);
        let row = Row { tokens, weights };
        let learned = learned(&row);
        EncodedRow { rows: vec![row], whole, cut: whole > self.max_tokens, learned, lost_answers: 0 }
    }

    /// All of it, in rows that fit.
    fn windows(&self, whole: Row) -> EncodedRow {
        let tokens = whole.tokens.len();
        let (size, mut start, mut rows) = (self.max_tokens.max(2), 0, Vec::new());
        loop {
            let end = tokens.min(start + size);
            let part = start..end;
            rows.push(Row {
                tokens: whole.tokens[part.clone()].to_vec(),
                weights: whole.weights[part].to_vec(),
            });
            if end == tokens {
                break;
            }
            start = end - 1;
        }
        EncodedRow { rows, whole: tokens, cut: false, learned: learned(&whole), lost_answers: 0 }
    }
}

/// Tokens that are learned: nothing predicts the first one.
fn learned(row: &Row) -> usize {
    row.weights.iter().skip(1).filter(|&&weight| weight > 0.0).count()
}

fn last_answer(messages: &[Message]) -> Option<(usize, &Message)> {
    messages.iter().enumerate().rev().find(|(_, message)| message.role == "assistant")
}
