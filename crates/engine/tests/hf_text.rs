//! Tokens and prompts against the Python packages: the same tokens, the same text, the same refusals.
#![allow(clippy::unwrap_used)]

use std::fs;
use std::path::PathBuf;

use lathe_engine::files::{ChatTemplate, Message, Tokenizer};
use rstest::rstest;
use serde_json::Value;

fn fixture(name: &str) -> Vec<u8> {
    fs::read(PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/hf").join(name)).unwrap()
}

fn json(name: &str) -> Value {
    serde_json::from_slice(&fixture(name)).unwrap()
}

fn tokenizer(name: &str) -> Tokenizer {
    Tokenizer::parse(&fixture(&format!("tokenizers/{name}.json")), 400).unwrap()
}

#[rstest]
fn tokens_and_text_are_those_of_python(#[values("byte-level", "byte-fallback")] name: &str) {
    let tokenizer = tokenizer(name);
    for case in json("tokenizers/expected.json")[name].as_array().unwrap() {
        let text = case["text"].as_str().unwrap();
        let encoded = tokenizer.encode(text, true).unwrap();
        let expected: Vec<u32> = serde_json::from_value(case["ids"].clone()).unwrap();
        assert_eq!(encoded.ids, expected, "{text:?}");
        assert_eq!(tokenizer.decode(&encoded.ids, true).unwrap(), case["decoded"], "{text:?}");
    }
}

#[rstest]
fn streamed_pieces_are_whole_characters_and_join_to_the_whole_text(
    #[values("byte-level", "byte-fallback")] name: &str,
) {
    let tokenizer = tokenizer(name);
    for case in json("tokenizers/expected.json")[name].as_array().unwrap() {
        let ids: Vec<u32> = serde_json::from_value(case["ids"].clone()).unwrap();
        let mut stream = tokenizer.stream();
        let mut joined = String::new();
        for id in ids {
            let piece = stream.push(&tokenizer, id).unwrap();
            assert!(!piece.contains('\u{FFFD}'), "{case}");
            joined += &piece;
        }
        joined += &stream.finish(&tokenizer).unwrap();
        assert_eq!(joined, case["decoded"], "{name}");
    }
}

#[test]
fn a_character_cut_short_does_not_stop_the_stream() {
    let tokenizer = tokenizer("byte-level");
    let fox = tokenizer.encode("🦊", false).unwrap().ids;
    let mut stream = tokenizer.stream();
    let text: String = (0..40).map(|_| stream.push(&tokenizer, fox[0]).unwrap()).collect();
    let text = text + &stream.finish(&tokenizer).unwrap();
    assert_eq!(text.chars().filter(|&c| c == '\u{FFFD}').count(), 40);
}

#[test]
fn offsets_cover_the_text_in_bytes() {
    let text = "naïve 🦊 <|im_end|>";
    let encoded = tokenizer("byte-level").encode(text, false).unwrap();
    let mut end = 0;
    for range in &encoded.offsets {
        assert!(range.start <= end && text.is_char_boundary(range.start) && text.is_char_boundary(range.end));
        end = end.max(range.end);
    }
    assert_eq!(end, text.len());
}

#[test]
fn a_special_token_in_a_text_is_one_token_and_is_left_out_of_text() {
    let tokenizer = tokenizer("byte-level");
    let ids = tokenizer.encode("a<|im_end|>", false).unwrap().ids;
    assert_eq!(ids.last().copied(), tokenizer.token_id("<|im_end|>"));
    assert_eq!(tokenizer.decode(&ids, true).unwrap(), "a");
    assert_eq!(tokenizer.decode(&ids, false).unwrap(), "a<|im_end|>");
}

#[test]
fn a_tokenizer_of_another_model_is_refused() {
    let bytes = fixture("tokenizers/byte-level.json");
    let size = Tokenizer::parse(&bytes, 400).unwrap().vocab_size();
    Tokenizer::parse(&bytes, size).unwrap();
    let error = Tokenizer::parse(&bytes, size - 1).unwrap_err().to_string();
    assert!(error.contains("config.json's `vocab_size` is"), "{error}");
}

#[test]
fn what_is_no_tokenizer_is_an_error() {
    let whole = fixture("tokenizers/byte-fallback.json");
    for bytes in [&b""[..], b"{}", b"[]", b"\x80\x02", &whole[..whole.len() / 2]] {
        Tokenizer::parse(bytes, 400).unwrap_err();
    }
}

#[test]
fn prompts_are_those_of_transformers() {
    let fixture = json("templates.json");
    let config = br#"{"bos_token": "<s>", "eos_token": "</s>"}"#;
    let now = "2024-07-26T12:30:00Z".parse().unwrap();
    let cases = fixture["cases"].as_array().unwrap();
    assert!(cases.len() >= 40);
    for case in cases {
        let source = fixture["templates"][case["template"].as_str().unwrap()].as_str().unwrap();
        let template = ChatTemplate::parse(Some(config), Some(source.as_bytes())).unwrap().unwrap();
        let messages: Vec<Message> = serde_json::from_value(case["messages"].clone()).unwrap();
        let prompt = case["add_generation_prompt"].as_bool().unwrap();
        match (template.render(&messages, prompt, now), case["text"].as_str()) {
            (Ok(text), Some(expected)) => assert_eq!(text, expected, "{case}"),
            (Err(error), None) => {
                assert!(error.to_string().contains(case["error"].as_str().unwrap()), "{error}")
            }
            (ours, _) => panic!("{ours:?} for {case}"),
        }
    }
}
