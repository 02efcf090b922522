//! `tokenizer.json`: text to tokens and back, whole or piece by piece.

use std::ops::Range;
use std::path::Path;

use super::bpe;
use super::contain::without_panic;
use super::error::{FileError, read_bounded};

const MAX_BYTES: u64 = 128 << 20;
/// Tokens that a character can be spread over; more that make no text yet are printed as they are.
const MAX_PENDING: usize = 16;

/// A model's tokenizer.
#[derive(Debug, Clone)]
pub struct Tokenizer {
    inner: tokenizers::Tokenizer,
}

/// Tokens and where in the text each stands.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Encoded {
    /// Token ids.
    pub ids: Vec<u32>,
    /// Bytes of the text that each token covers; empty for tokens that the tokenizer added.
    pub offsets: Vec<Range<usize>>,
}

impl Tokenizer {
    /// Reads `tokenizer.json` of a model's folder. `vocab` is the size of the model's embedding table: a token beyond
    /// it could not be looked up.
    ///
    /// # Errors
    /// [`FileError::Tokenizer`] if the file is not a tokenizer or has a token that is not below `vocab`.
    pub fn read(dir: &Path, vocab: usize) -> Result<Self, FileError> {
        Self::parse(&read_bounded(&dir.join("tokenizer.json"), MAX_BYTES)?, vocab)
    }

    /// As [`Tokenizer::read`], from the file's text.
    ///
    /// # Errors
    /// As [`Tokenizer::read`].
    pub fn parse(json: &[u8], vocab: usize) -> Result<Self, FileError> {
        refuse_growth(json)?;
        let (mut inner, largest) = contained(|| match bpe::read(json) {
            Some(read) => Ok(read),
            None => {
                let inner = tokenizers::Tokenizer::from_bytes(json)?;
                let largest = inner.get_vocab(true).into_iter().max_by_key(|(_, id)| *id);
                Ok((inner, largest))
            }
        })?;
        // Cutting and padding belong to the caller; a file that asks for them would hide rows' true lengths.
        inner.with_truncation(None).map_err(failed)?;
        inner.with_padding(None);
        match largest {
            None => Err(FileError::Tokenizer("has no tokens".to_owned())),
            Some((token, id)) if id as usize >= vocab => Err(FileError::Tokenizer(format!(
                "token `{}` has id {id}, but config.json's `vocab_size` is {vocab}; the files belong to different models",
                token.escape_debug()
            ))),
            Some(_) => {
                let tokenizer = Tokenizer { inner };
                // What the tokenizer puts around a text has ids of its own.
                match tokenizer.encode("", true)?.ids.into_iter().find(|&id| id as usize >= vocab) {
                    None => Ok(tokenizer),
                    Some(id) => Err(FileError::Tokenizer(format!(
                        "`post_processor` adds id {id}, but config.json's `vocab_size` is {vocab}; correct tokenizer.json"
                    ))),
                }
            }
        }
    }

    /// Text to tokens. `special` adds what the tokenizer puts around a text (e.g. a token that begins it); a chat
    /// template has written that already. Special tokens inside the text are recognised either way.
    ///
    /// # Errors
    /// [`FileError::Tokenizer`] if the text has characters that the vocabulary cannot express and no unknown token.
    pub fn encode(&self, text: &str, special: bool) -> Result<Encoded, FileError> {
        let encoding = contained(|| self.inner.encode(text, special))?;
        let offsets = encoding.get_offsets().iter().map(|&(start, end)| start..end.max(start)).collect();
        Ok(Encoded { ids: encoding.get_ids().to_vec(), offsets })
    }

    /// Tokens to text. `skip_special` leaves out special tokens such as the end of a turn.
    ///
    /// # Errors
    /// [`FileError::Tokenizer`] if the decoder fails.
    pub fn decode(&self, ids: &[u32], skip_special: bool) -> Result<String, FileError> {
        contained(|| self.inner.decode(ids, skip_special))
    }

    /// The id of a token by its text, e.g. `<|im_end|>`.
    pub fn token_id(&self, token: &str) -> Option<u32> {
        self.inner.token_to_id(token)
    }

    /// The text of a token as the vocabulary writes it.
    pub fn token_text(&self, id: u32) -> Option<String> {
        self.inner.id_to_token(id)
    }

    /// Number of tokens, added ones included.
    pub fn vocab_size(&self) -> usize {
        self.inner.get_vocab_size(true)
    }

    /// Begins to turn an answer's tokens into text as they come, special tokens left out.
    pub fn stream(&self) -> TextStream {
        TextStream::default()
    }
}

/// The text of an answer that grows token by token: only whole characters come out, and the pieces joined are the text
/// of all tokens decoded at once.
///
/// The tokens that may still change how the next one is written (a leading space, a character spread over tokens) are
/// decoded again with each token; those before are forgotten, so a step costs the same however long the answer is.
#[derive(Debug, Clone, Default)]
pub struct TextStream {
    ids: Vec<u32>,
    /// Tokens of `ids` whose text is out already.
    printed: usize,
}

impl TextStream {
    /// Takes the next token and returns the text that is now certain, often empty.
    ///
    /// # Errors
    /// [`FileError::Tokenizer`] if the decoder fails.
    pub fn push(&mut self, tokenizer: &Tokenizer, id: u32) -> Result<String, FileError> {
        self.ids.push(id);
        let pending = self.ids.len() - self.printed;
        let text = self.rest(tokenizer)?;
        if (text.is_empty() || text.ends_with('\u{FFFD}')) && pending < MAX_PENDING {
            return Ok(String::new());
        }
        self.ids.drain(..self.printed);
        self.printed = self.ids.len();
        Ok(text)
    }

    /// What is left when the answer ends, e.g. of a character that was cut short.
    ///
    /// # Errors
    /// [`FileError::Tokenizer`] if the decoder fails.
    pub fn finish(self, tokenizer: &Tokenizer) -> Result<String, FileError> {
        self.rest(tokenizer)
    }

    /// The text of the tokens that are not out, as it stands behind those that are.
    fn rest(&self, tokenizer: &Tokenizer) -> Result<String, FileError> {
        let before = tokenizer.decode(&self.ids[..self.printed], true)?;
        let all = tokenizer.decode(&self.ids, true)?;
        match all.strip_prefix(before.as_str()) {
            Some(rest) => Ok(rest.to_owned()),
            // Bytes that were given up as no character became one; what is out cannot be called back.
            None => tokenizer.decode(&self.ids[self.printed..], true),
        }
    }
}

/// The most that normalizers or decoders may lengthen a text; published ones replace a space by a mark of three bytes.
const MOST_GROWTH: usize = 64;
/// The most bytes that they may put before a text, and steps that they may have.
const MOST_PREPENDED: usize = 4096;
const MOST_STEPS: usize = 64;

/// Refuses a file whose steps make a short text longer than any memory, each a few times longer.
fn refuse_growth(json: &[u8]) -> Result<(), FileError> {
    #[derive(serde::Deserialize)]
    struct Steps {
        #[serde(default)]
        normalizer: serde_json::Value,
        #[serde(default)]
        decoder: serde_json::Value,
    }
    // What cannot be judged is not read: the library takes the last of two fields of one name.
    let steps = serde_json::from_slice(json);
    let Steps { normalizer, decoder } = steps.map_err(|error| FileError::Tokenizer(error.to_string()))?;
    for (field, steps) in [("normalizer", normalizer), ("decoder", decoder)] {
        let (mut growth, mut prepended, mut count, mut next) = (1usize, 0usize, 0, vec![&steps]);
        while let Some(step) = next.pop() {
            count += 1;
            next.extend(
                ["normalizers", "decoders"].iter().filter_map(|list| step[*list].as_array()).flatten(),
            );
            let len = |field: &str| step[field].as_str().map_or(0, str::len);
            match step["type"].as_str() {
                Some("Replace") => growth = growth.saturating_mul(1.max(len("content"))),
                Some("Prepend") => prepended += len("prepend"),
                _ => {}
            }
            if growth > MOST_GROWTH || prepended > MOST_PREPENDED || count > MOST_STEPS {
                return Err(FileError::Tokenizer(format!(
                    "the steps of `{field}` make a text too long; allowed are {MOST_STEPS} steps that together make it at \
                     most {MOST_GROWTH} times as long and put {MOST_PREPENDED} bytes before it"
                )));
            }
        }
    }
    Ok(())
}

/// The library panics on some files that contradict themselves, e.g. merges shorter than the prefix of subwords.
fn contained<T>(work: impl FnOnce() -> tokenizers::Result<T>) -> Result<T, FileError> {
    let result = without_panic(work);
    result.ok_or_else(|| FileError::Tokenizer("contradicts itself".to_owned()))?.map_err(failed)
}

fn failed(error: tokenizers::Error) -> FileError {
    FileError::Tokenizer(error.to_string())
}
