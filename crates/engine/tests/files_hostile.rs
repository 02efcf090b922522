//! Text files of a model as an attacker would write them: errors, never a panic or an exhausted stack.
#![allow(clippy::unwrap_used)]

use std::fs;
use std::path::Path;

use lathe_engine::files::{AdapterConfig, ChatTemplate, Message, ModelConfig, Tokenizer};
use rstest::rstest;
use serde_json::{Value, json};

fn fixture(name: &str) -> Vec<u8> {
    fs::read(Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/hf").join(name)).unwrap()
}

/// What stands in place of a value: each type, and numbers at the edges.
fn replacements() -> Vec<Value> {
    vec![
        Value::Null,
        json!(true),
        json!(-1),
        json!(0),
        json!(u64::MAX),
        json!(1e300),
        json!(""),
        json!("\u{0}é🦊"),
        json!([]),
        json!([[]]),
        json!({}),
        json!({"type": "nothing"}),
    ]
}

/// Every document that differs from `value` in one place, calling `check` with each. Of long lists and objects the first
/// entries are changed.
fn mutate(value: &mut Value, root: &dyn Fn(&Value) -> Value, check: &mut dyn FnMut(&Value)) {
    for replacement in replacements() {
        check(&root(&replacement));
    }
    match value {
        Value::Object(map) => {
            for (key, inner) in map.clone().into_iter().take(12) {
                let mut without = map.clone();
                without.remove(&key);
                check(&root(&Value::Object(without)));
                let map = map.clone();
                let place = |new: &Value| {
                    let mut map = map.clone();
                    map.insert(key.clone(), new.clone());
                    root(&Value::Object(map))
                };
                mutate(&mut inner.clone(), &place, check);
            }
        }
        Value::Array(list) => {
            for (at, inner) in list.clone().into_iter().enumerate().take(3) {
                let list = list.clone();
                let place = |new: &Value| {
                    let mut list = list.clone();
                    list[at] = new.clone();
                    root(&Value::Array(list))
                };
                mutate(&mut inner.clone(), &place, check);
            }
        }
        _ => {}
    }
}

fn mutations(document: &[u8], mut check: impl FnMut(&[u8])) -> usize {
    let mut count = 0;
    let mut value: Value = serde_json::from_slice(document).unwrap();
    mutate(&mut value, &Value::clone, &mut |changed| {
        count += 1;
        check(changed.to_string().as_bytes());
    });
    count
}

#[rstest]
fn a_config_with_any_value_of_another_type_is_an_answer(
    #[values("llama-gqa", "llama-tied", "qwen2", "mistral")] name: &str,
) {
    let count = mutations(&fixture(&format!("{name}/config.json")), |bytes| {
        if let Ok(config) = ModelConfig::parse(bytes, None) {
            config.shape.validate().unwrap();
        }
    });
    assert!(count > 100);
}

#[test]
fn an_adapter_config_with_any_value_of_another_type_is_an_answer() {
    mutations(&fixture("llama-gqa-adapter/adapter_config.json"), |bytes| {
        if let Ok(config) = AdapterConfig::parse(bytes) {
            config.lora.validate().unwrap();
        }
    });
}

#[rstest]
fn a_tokenizer_with_any_value_of_another_type_is_an_answer(
    #[values("byte-level", "byte-fallback")] name: &str,
) {
    mutations(&fixture(&format!("tokenizers/{name}.json")), |bytes| {
        if let Ok(tokenizer) = Tokenizer::parse(bytes, 400) {
            for text in ["", "the cat <|im_end|> é🦊\n"] {
                if let Ok(encoded) = tokenizer.encode(text, true) {
                    assert_eq!(encoded.ids.len(), encoded.offsets.len());
                    assert!(encoded.ids.iter().all(|&id| id < 400));
                    let _ = tokenizer.decode(&encoded.ids, true);
                }
            }
            let _ = tokenizer.decode(&[0, 399, u32::MAX], false);
        }
    });
}

/// A normalizer of three steps would make 262,144 bytes of one; named twice, the library would take the second.
#[rstest]
#[case::steps(true, "`normalizer` make a text too long")]
#[case::a_second_of_the_name(false, "duplicate field `normalizer`")]
fn a_normalizer_that_makes_texts_long_is_refused(#[case] alone: bool, #[case] says: &str) {
    let mut file: serde_json::Value = serde_json::from_slice(&fixture("tokenizers/byte-level.json")).unwrap();
    let step = serde_json::json!({"type": "Replace", "pattern": {"String": "a"}, "content": "a".repeat(64)});
    let long = serde_json::json!({"type": "Sequence", "normalizers": [&step, &step, &step]}).to_string();
    file["normalizer"] = serde_json::Value::Null;
    let file = file.to_string();
    let (once, twice) = (r#""normalizer":null"#, format!(r#""normalizer":null,"normalizer":{long}"#));
    assert!(file.contains(once) && Tokenizer::parse(file.as_bytes(), 400).is_ok());
    let hostile = file.replace(once, &if alone { format!(r#""normalizer":{long}"#) } else { twice });
    let error = Tokenizer::parse(hostile.as_bytes(), 400).expect_err("refused").to_string();
    assert!(error.contains(says), "{error}");
}

#[rstest]
#[case::parentheses("{{", "(", "}}")]
#[case::lists("{{", "[", "}}")]
#[case::calls("{{ x", "(x", "}}")]
#[case::negations("{{", "-", "1}}")]
#[case::nots("{{", "not ", "1}}")]
#[case::filters("{{ 1", "|abs", "}}")]
#[case::attributes("{{ x", ".x", "}}")]
#[case::conditions("", "{% if 1 %}", "")]
#[case::loops("", "{% for x in [1] %}", "")]
#[case::ternaries("{{ 1", " if 1 else 1", "}}")]
#[case::additions("{{ 1", "+1", "}}")]
#[case::powers("{{ 1", "**1", "}}")]
#[case::markers("", "{% generation %}", "")]
#[case::values(
    "{% set ns = namespace(x=[]) %}{% for i in range(20000) %}{% for j in range(20) %}",
    "{% set ns.x = [ns.x] %}",
    "{% endfor %}{% endfor %}"
)]
fn a_deeply_nested_template_does_not_exhaust_the_stack(
    #[case] start: &str,
    #[case] part: &str,
    #[case] end: &str,
) {
    let source = format!("{start}{}{end}", part.repeat(120_000 / part.len()));
    let run = move || {
        if let Ok(Some(template)) = ChatTemplate::parse(None, Some(source.as_bytes())) {
            let messages = [Message { role: "user".into(), content: "hi".into() }];
            let _ = template.render(&messages, true, jiff::Timestamp::UNIX_EPOCH);
        }
    };
    // The stack that a thread of the worker has.
    std::thread::Builder::new().stack_size(2 << 20).spawn(run).unwrap().join().unwrap();
}
