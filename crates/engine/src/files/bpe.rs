//! `tokenizer.json` with a byte-pair model, in one pass.
//!
//! The library holds a model as a tree of values until it has seen its type. For 151,936 entries that is the larger part of
//! the time to read them. Here the fields of the one common model are read into what its builder takes. A file that has
//! anything else is the library's to read: it knows what is valid, and says what is not.

use std::fmt;

use serde::de::{Error, SeqAccess, Visitor};
use serde::{Deserialize, Deserializer};
use tokenizers::models::bpe::{BPE, Vocab};
use tokenizers::{
    AddedToken, DecoderWrapper, ModelWrapper, NormalizerWrapper, PaddingParams, PostProcessorWrapper,
    PreTokenizerWrapper, Tokenizer, TokenizerBuilder, TruncationParams,
};

/// The tokenizer, and a token with the largest id, if it has any; nothing where the library must read the file.
pub(super) fn read(json: &[u8]) -> Option<(Tokenizer, Option<(String, u32)>)> {
    let File { version, model, normalizer, pre_tokenizer, post_processor, decoder, added_tokens, .. } =
        serde_json::from_slice(json).ok()?;
    if version != "1.0" {
        return None;
    }
    let largest = model.vocab.iter().max_by_key(|(_, id)| **id);
    let largest = largest.map(|(token, id)| (token.clone(), *id));
    let built = TokenizerBuilder::new()
        .with_model(ModelWrapper::from(model.build()?))
        .with_normalizer(normalizer)
        .with_pre_tokenizer(pre_tokenizer)
        .with_post_processor(post_processor)
        .with_decoder(decoder)
        .build();
    let mut tokenizer = Tokenizer::from(built.ok()?);
    tokenizer.add_tokens(added_tokens.into_iter().map(|added| added.token)).ok()?;
    let added = tokenizer.get_added_vocabulary().get_added_tokens_decoder();
    let added = added.iter().map(|(id, token)| (token.content.clone(), *id));
    let largest = added.chain(largest).max_by_key(|(_, id)| *id);
    Some((tokenizer, largest))
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct File {
    version: String,
    model: Model,
    normalizer: Option<NormalizerWrapper>,
    pre_tokenizer: Option<PreTokenizerWrapper>,
    post_processor: Option<PostProcessorWrapper>,
    decoder: Option<DecoderWrapper>,
    #[serde(default)]
    added_tokens: Vec<Added>,
    #[serde(rename = "truncation")]
    _truncation: Option<TruncationParams>,
    #[serde(rename = "padding")]
    _padding: Option<PaddingParams>,
}

#[derive(Deserialize)]
struct Added {
    /// The vocabulary's, or the next free one: the library goes by order.
    #[serde(rename = "id")]
    _id: u32,
    #[serde(flatten)]
    token: AddedToken,
}

/// What makes a BPE model of no random choice.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Model {
    #[serde(rename = "type")]
    _kind: Kind,
    #[serde(rename = "dropout")]
    _dropout: Option<Nothing>,
    unk_token: Option<String>,
    continuing_subword_prefix: Option<String>,
    end_of_word_suffix: Option<String>,
    fuse_unk: Option<bool>,
    byte_fallback: Option<bool>,
    ignore_merges: Option<bool>,
    vocab: Vocab,
    merges: Merges,
}

#[derive(Deserialize)]
enum Kind {
    #[serde(rename = "BPE")]
    Bpe,
}

/// No value but null.
#[derive(Deserialize)]
enum Nothing {}

impl Model {
    fn build(self) -> Option<BPE> {
        let mut builder = BPE::builder()
            .vocab_and_merges(self.vocab, self.merges.0)
            .fuse_unk(self.fuse_unk.unwrap_or_default())
            .byte_fallback(self.byte_fallback.unwrap_or_default())
            .ignore_merges(self.ignore_merges.unwrap_or_default());
        if let Some(token) = self.unk_token {
            builder = builder.unk_token(token);
        }
        if let Some(prefix) = self.continuing_subword_prefix {
            builder = builder.continuing_subword_prefix(prefix);
        }
        if let Some(suffix) = self.end_of_word_suffix {
            builder = builder.end_of_word_suffix(suffix);
        }
        builder.build().ok()
    }
}

/// Pairs, in the order of their ranks: all as lists of two, or all as two words on a line.
struct Merges(Vec<(String, String)>);

impl<'de> Deserialize<'de> for Merges {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        struct All;
        impl<'de> Visitor<'de> for All {
            type Value = Merges;

            fn expecting(&self, to: &mut fmt::Formatter<'_>) -> fmt::Result {
                to.write_str("a list of merges")
            }

            fn visit_seq<S: SeqAccess<'de>>(self, mut from: S) -> Result<Merges, S::Error> {
                let (mut all, mut form) = (Vec::new(), None);
                while let Some(merge) = from.next_element::<Merge>()? {
                    if *form.get_or_insert(merge.form) != merge.form {
                        return Err(S::Error::custom("merges of two forms"));
                    }
                    all.push(merge.pair);
                }
                Ok(Merges(all))
            }
        }
        from.deserialize_seq(All)
    }
}

struct Merge {
    pair: (String, String),
    form: Form,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Form {
    Pair,
    Line,
}

impl<'de> Deserialize<'de> for Merge {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        struct One;
        impl<'de> Visitor<'de> for One {
            type Value = Merge;

            fn expecting(&self, to: &mut fmt::Formatter<'_>) -> fmt::Result {
                to.write_str("a list of two words, or a line of two")
            }

            fn visit_str<E: Error>(self, line: &str) -> Result<Merge, E> {
                // A file of lines may begin with its version.
                match line.split_once(' ') {
                    Some((a, b)) if !b.contains(' ') && !line.starts_with("#version") => {
                        Ok(Merge { pair: (a.to_owned(), b.to_owned()), form: Form::Line })
                    }
                    _ => Err(E::custom("a line of other than two words")),
                }
            }

            fn visit_seq<S: SeqAccess<'de>>(self, mut from: S) -> Result<Merge, S::Error> {
                let mut word =
                    || from.next_element::<String>()?.ok_or_else(|| S::Error::custom("too few words"));
                let pair = (word()?, word()?);
                Ok(Merge { pair, form: Form::Pair })
            }
        }
        from.deserialize_any(One)
    }
}

#[cfg(test)]
mod tests {
    use rstest::rstest;
    use serde_json::{Value, json};

    use super::*;

    fn file(name: &str) -> Value {
        let folder = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/hf/tokenizers");
        serde_json::from_slice(&std::fs::read(folder.join(name)).unwrap()).unwrap()
    }

    /// Merges as lines, as files of older versions have them.
    fn lines(mut file: Value) -> Value {
        for merge in file["model"]["merges"].as_array_mut().unwrap() {
            if let Some([a, b]) = merge.as_array().map(Vec::as_slice) {
                *merge = format!("{} {}", a.as_str().unwrap(), b.as_str().unwrap()).into();
            }
        }
        file
    }

    /// As many entries as models of today have, each of two that were there before.
    fn of_real_size(mut file: Value) -> Value {
        const ENTRIES: usize = 151_936;
        let vocab = file["model"]["vocab"].as_object_mut().unwrap();
        let mut all: Vec<String> = vocab.keys().cloned().collect();
        let mut merges = Vec::new();
        for (i, j) in (0..ENTRIES).flat_map(|i| (0..=i).map(move |j| (i, j))) {
            let (entry, id) = (format!("{}{}", all[i], all[j]), vocab.len());
            if id == ENTRIES {
                break;
            }
            if !vocab.contains_key(&entry) {
                vocab.insert(entry.clone(), id.into());
                merges.push(json!([all[i], all[j]]));
                all.push(entry);
            }
        }
        file["model"]["merges"].as_array_mut().unwrap().extend(merges);
        file
    }

    #[rstest]
    fn what_is_read_is_what_the_library_reads(
        #[values("byte-level.json", "byte-fallback.json")] name: &str,
        #[values(false, true)] older: bool,
    ) {
        reads_as_the_library(&if older { lines(file(name)) } else { file(name) });
    }

    #[test]
    fn a_vocabulary_of_real_size_is_what_the_library_reads() {
        reads_as_the_library(&of_real_size(file("byte-level.json")));
    }

    fn reads_as_the_library(file: &Value) {
        let json = serde_json::to_vec(file).unwrap();
        let (read, largest) = read(&json).unwrap();
        // Cutting and padding are not taken over: `Tokenizer::parse` clears both.
        let mut expected = Tokenizer::from_bytes(&json).unwrap();
        expected.with_truncation(None).unwrap().with_padding(None);
        assert_eq!(serde_json::to_value(&read).unwrap(), serde_json::to_value(&expected).unwrap());
        assert_eq!(largest.map(|(_, id)| id), expected.get_vocab(true).into_values().max());
        for text in ["", "Hello, world!", "naïve 🦊 <|im_end|> x", "a  b\n\n\tc 12345", "日本語のテキスト"]
        {
            let ids = |tokenizer: &Tokenizer| tokenizer.encode(text, true).unwrap().get_ids().to_vec();
            assert_eq!(ids(&read), ids(&expected), "{text:?}");
        }
    }

    #[rstest]
    #[case::another_version("/version", json!("2.0"))]
    #[case::another_model("/model/type", json!("WordPiece"))]
    #[case::chance("/model/dropout", json!(0.5))]
    #[case::two_forms("/model/merges", json!(["a b", ["a", "b"]]))]
    #[case::a_header("/model/merges", json!(["#version: 0.2"]))]
    #[case::three_words("/model/merges", json!(["a b c"]))]
    #[case::unknown_tokens("/model/merges", json!([["no such", "token"]]))]
    fn what_is_not_plain_is_left_to_the_library(#[case] at: &str, #[case] value: Value) {
        let mut file = file("byte-level.json");
        assert!(read(&serde_json::to_vec(&file).unwrap()).is_some());
        *file.pointer_mut(at).unwrap() = value;
        assert!(read(&serde_json::to_vec(&file).unwrap()).is_none());
    }
}
