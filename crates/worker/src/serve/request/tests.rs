use rstest::rstest;
use serde_json::{Value, json};

use super::*;

const CONTEXT: usize = 64;

fn chat_with(extra: Value) -> Result<Request, ApiError> {
    let mut body = json!({"model": "m", "messages": [{"role": "user", "content": "hi"}]});
    for (name, value) in extra.as_object().expect("an object") {
        body[name] = value.clone();
    }
    chat(body.to_string().as_bytes(), CONTEXT)
}

fn completion_with(extra: Value) -> Result<Request, ApiError> {
    let mut body = json!({"model": "m", "prompt": "hi"});
    for (name, value) in extra.as_object().expect("an object") {
        body[name] = value.clone();
    }
    completion(body.to_string().as_bytes(), CONTEXT)
}

#[test]
fn defaults_are_openais() {
    let chat = chat_with(json!({})).expect("valid");
    let Settings { max_tokens, default_tokens, temperature, top_p, top_k, seed, stop, ignore_eos } =
        chat.settings;
    assert_eq!((max_tokens.or(default_tokens), temperature, top_p, top_k, seed), (None, 1.0, 1.0, 0, None));
    assert_eq!((stop.len(), ignore_eos, chat.stream, chat.include_usage), (0, false, false, false));
    assert_eq!(completion_with(json!({})).expect("valid").settings.default_tokens, Some(16));
}

#[test]
fn everything_that_is_supported_is_read() {
    let request = chat_with(json!({
        "messages": [
            {"role": "developer", "content": "be\nkind", "name": "x"},
            {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
            {"role": "assistant", "content": ""},
        ],
        "max_completion_tokens": 5, "temperature": 0, "top_p": 0.5, "top_k": 3, "seed": -1, "stop": ["x", "y"],
        "stream": true, "stream_options": {"include_usage": true}, "user": "u", "metadata": {"a": [1]}, "n": 1,
        "logprobs": false, "tools": [], "tool_choice": "none", "response_format": {"type": "text"},
        "presence_penalty": 0, "frequency_penalty": 0.0, "logit_bias": {}, "service_tier": null, "store": false,
    }))
    .expect("valid");
    let say = |role: &str, content: &str| Message { role: role.into(), content: content.into() };
    let expected = vec![say("system", "be\nkind"), say("user", "a\nb"), say("assistant", "")];
    assert_eq!(request.prompt, Prompt::Chat(expected));
    assert_eq!((request.stream, request.include_usage), (true, true));
    let settings = request.settings;
    assert_eq!((settings.max_tokens, settings.temperature, settings.top_p), (Some(5), 0.0, 0.5));
    assert_eq!(
        (settings.top_k, settings.seed, settings.stop),
        (3, Some(u64::MAX), vec!["x".into(), "y".into()])
    );
}

#[rstest]
#[case(json!("hi"), Prompt::Text("hi".into()))]
#[case(json!(["hi"]), Prompt::Text("hi".into()))]
#[case(json!([1, 2]), Prompt::Tokens(vec![1, 2]))]
#[case(json!([[1, 2]]), Prompt::Tokens(vec![1, 2]))]
#[case(json!(""), Prompt::Text(String::new()))]
fn prompts_of_each_form(#[case] prompt: Value, #[case] expected: Prompt) {
    assert_eq!(completion_with(json!({"prompt": prompt})).expect("valid").prompt, expected);
}

#[rstest]
#[case(json!({"model": null}), "model", "missing_required_parameter")]
#[case(json!({"model": 3}), "model", "invalid_type")]
#[case(json!({"model": ""}), "model", "empty_string")]
#[case(json!({"messages": null}), "messages", "missing_required_parameter")]
#[case(json!({"messages": []}), "messages", "empty_array")]
#[case(json!({"messages": "hi"}), "messages", "invalid_type")]
#[case(json!({"messages": ["hi"]}), "messages[0]", "invalid_type")]
#[case(json!({"messages": [{"role": "user"}]}), "messages[0].content", "missing_required_parameter")]
#[case(json!({"messages": [{"content": "x"}]}), "messages[0].role", "missing_required_parameter")]
#[case(json!({"messages": [{"role": "tool", "content": "x"}]}), "messages[0].role", "invalid_value")]
#[case(json!({"messages": [{"role": "user", "content": 3}]}), "messages[0].content", "invalid_type")]
#[case(json!({"messages": [{"role": "user", "content": []}]}), "messages[0].content", "empty_array")]
#[case(json!({"messages": [{"role": "user", "content": ["x"]}]}), "messages[0].content[0]", "invalid_type")]
#[case(json!({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]}),
       "messages[0].content[0].type", "invalid_value")]
#[case(json!({"messages": [{"role": "assistant", "content": null, "tool_calls": [1]}]}),
       "messages[0].tool_calls", "unsupported_parameter")]
#[case(json!({"messages": vec![json!({"role": "user", "content": "x"}); 4097]}), "messages", "array_above_max_length")]
#[case(json!({"temperature": "hot"}), "temperature", "invalid_type")]
#[case(json!({"temperature": true}), "temperature", "invalid_type")]
#[case(json!({"temperature": 2.1}), "temperature", "decimal_above_max_value")]
#[case(json!({"temperature": -0.1}), "temperature", "decimal_below_min_value")]
#[case(json!({"top_p": 1.01}), "top_p", "decimal_above_max_value")]
#[case(json!({"top_k": -2}), "top_k", "integer_below_min_value")]
#[case(json!({"top_k": 1.5}), "top_k", "invalid_type")]
#[case(json!({"max_tokens": 0}), "max_tokens", "integer_below_min_value")]
#[case(json!({"max_tokens": 65}), "max_tokens", "integer_above_max_value")]
#[case(json!({"max_completion_tokens": "5"}), "max_completion_tokens", "invalid_type")]
#[case(json!({"max_tokens": 3, "max_completion_tokens": 4}), "max_tokens", "invalid_parameter_combination")]
#[case(json!({"seed": 1.5}), "seed", "invalid_type")]
#[case(json!({"seed": 18446744073709551615u64}), "seed", "invalid_type")]
#[case(json!({"n": 2}), "n", "unsupported_value")]
#[case(json!({"n": 0}), "n", "integer_below_min_value")]
#[case(json!({"n": 1000000}), "n", "integer_above_max_value")]
#[case(json!({"stop": ""}), "stop", "invalid_value")]
#[case(json!({"stop": ["a", ""]}), "stop[1]", "invalid_value")]
#[case(json!({"stop": ["a", 3]}), "stop[1]", "invalid_type")]
#[case(json!({"stop": 3}), "stop", "invalid_type")]
#[case(json!({"stop": ["a", "b", "c", "d", "e"]}), "stop", "array_above_max_length")]
#[case(json!({"stop": "x".repeat(1025)}), "stop", "invalid_value")]
#[case(json!({"stream": "yes"}), "stream", "invalid_type")]
#[case(json!({"stream_options": {"include_usage": true}}), "stream_options", "invalid_value")]
#[case(json!({"stream": true, "stream_options": 1}), "stream_options", "invalid_type")]
#[case(json!({"stream": true, "stream_options": {"include_usage": 1}}), "stream_options.include_usage", "invalid_type")]
#[case(json!({"logprobs": true}), "logprobs", "unsupported_parameter")]
#[case(json!({"top_logprobs": 2}), "top_logprobs", "unsupported_parameter")]
#[case(json!({"tools": [{"type": "function"}]}), "tools", "unsupported_parameter")]
#[case(json!({"tool_choice": "required"}), "tool_choice", "unsupported_parameter")]
#[case(json!({"response_format": {"type": "json_object"}}), "response_format", "unsupported_parameter")]
#[case(json!({"logit_bias": {"5": 1}}), "logit_bias", "unsupported_parameter")]
#[case(json!({"presence_penalty": 1}), "presence_penalty", "unsupported_parameter")]
#[case(json!({"presence_penalty": 3}), "presence_penalty", "decimal_above_max_value")]
#[case(json!({"modalities": ["audio"]}), "modalities", "unsupported_parameter")]
fn what_is_wrong_is_named(#[case] extra: Value, #[case] param: &str, #[case] code: &str) {
    let error = chat_with(extra).expect_err("refused");
    assert_eq!((error.param.as_deref(), error.code), (Some(param), Some(code)), "{error:?}");
    assert!(error.message.contains(param) || code == "invalid_value", "{}", error.message);
    assert_eq!(error.status.as_u16(), 400);
}

#[rstest]
#[case(json!({"prompt": null}), "prompt", "missing_required_parameter")]
#[case(json!({"prompt": 3}), "prompt", "invalid_type")]
#[case(json!({"prompt": ["a", "b"]}), "prompt", "unsupported_value")]
#[case(json!({"prompt": []}), "prompt", "empty_array")]
#[case(json!({"prompt": [[]]}), "prompt[0]", "empty_array")]
#[case(json!({"prompt": [1, "a"]}), "prompt[1]", "invalid_type")]
#[case(json!({"prompt": [1, -1]}), "prompt[1]", "invalid_value")]
#[case(json!({"prompt": [1, 4294967296u64]}), "prompt[1]", "invalid_value")]
#[case(json!({"prompt": [true]}), "prompt[0]", "invalid_type")]
#[case(json!({"prompt": vec![1; 65]}), "prompt", "context_length_exceeded")]
#[case(json!({"prompt": [vec![1; 65]]}), "prompt", "context_length_exceeded")]
#[case(json!({"logprobs": 0}), "logprobs", "unsupported_parameter")]
#[case(json!({"best_of": 2}), "best_of", "unsupported_parameter")]
#[case(json!({"echo": true}), "echo", "unsupported_parameter")]
#[case(json!({"suffix": "x"}), "suffix", "unsupported_parameter")]
fn what_is_wrong_with_a_completion_is_named(#[case] extra: Value, #[case] param: &str, #[case] code: &str) {
    let error = completion_with(extra).expect_err("refused");
    assert_eq!((error.param.as_deref(), error.code), (Some(param), Some(code)), "{error:?}");
}

#[rstest]
#[case(b"")]
#[case(b"{")]
#[case(b"[]")]
#[case(b"3")]
#[case(b"null")]
#[case(b"{\"model\": \"m\"} x")]
#[case(b"{\"model\": \"m\", \"model\": \"m\"}")]
#[case(b"{\"model\": \"\xff\"}")]
#[case(b"{\"model\": \"\\ud800\"}")]
#[case(b"{\"model\": NaN}")]
fn what_is_not_a_json_object_is_refused(#[case] body: &[u8]) {
    let error = chat(body, CONTEXT).expect_err("refused");
    assert!(matches!(error.code, Some("invalid_json" | "invalid_value")), "{error:?}");
}

#[rstest]
#[case("unknown", "missing_required_parameter")]
#[case("messages", "invalid_type")]
#[case("tools", "missing_required_parameter")]
#[case("stop", "missing_required_parameter")]
fn depth_costs_no_stack(#[case] field: &str, #[case] code: &str) {
    let deep = format!("{}1{}", "[".repeat(1 << 20), "]".repeat(1 << 20));
    let body = format!("{{\"model\": \"m\", \"{field}\": {deep}}}");
    assert_eq!(chat(body.as_bytes(), CONTEXT).expect_err("refused").code, Some(code));
}

#[test]
fn long_lists_are_refused_by_their_length() {
    for (field, length) in [("stop", 1_000_000), ("messages", 1_000_000)] {
        let list = vec!["\"x\""; length].join(",");
        let body = format!(
            "{{\"model\": \"m\", \"messages\": [{{\"role\": \"user\", \"content\": \"x\"}}], \"{field}\": [{list}]}}"
        );
        // Of two fields of one name the second is refused, so the list stands alone.
        let body =
            if field == "messages" { format!("{{\"model\": \"m\", \"messages\": [{list}]}}") } else { body };
        let error = chat(body.as_bytes(), CONTEXT).expect_err("refused");
        assert_eq!((error.param.as_deref(), error.code), (Some(field), Some("array_above_max_length")));
    }
}

/// Whatever bytes come: an answer within bounds, or a refusal that is the client's fault. Seeded, so that a failure can
/// be repeated.
#[test]
fn changed_bytes_are_an_answer_or_a_refusal() {
    let bodies = [
        json!({"model": "m", "messages": [{"role": "user", "content": [{"type": "text", "text": "h\u{e9}\n"}]}],
            "temperature": 0.5, "top_p": 0.9, "top_k": -1, "seed": -3, "stop": ["a", "b"], "max_completion_tokens": 9,
            "stream": true, "stream_options": {"include_usage": true}, "n": 1, "logit_bias": {}}),
        json!({"model": "m", "prompt": [[1, 2, 3]], "max_tokens": 4, "stop": "x", "ignore_eos": true, "echo": false}),
    ];
    let pieces: [&[u8]; 12] =
        [b"\"", b"{", b"}", b"[", b"]", b",", b":", b"null", b"1e999", b"-0", b"\\ud800", b"\xff\xfe"];
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    let mut below = |most: usize| {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 33) as usize % most.max(1)
    };
    let mut answered = 0;
    for round in 0..20_000 {
        let mut body = bodies[round % 2].to_string().into_bytes();
        for _ in 0..=below(3) {
            let (at, piece) = (below(body.len()), pieces[below(pieces.len())]);
            match below(4) {
                0 => body.iter_mut().skip(at).take(1).for_each(|byte| *byte = below(256) as u8),
                1 => drop(body.splice(at..at, piece.iter().copied())),
                2 => drop(body.splice(at..(at + 1 + below(8)).min(body.len()), [])),
                _ => body.truncate(at.max(1)),
            }
        }
        let read = if round % 2 == 0 { chat(&body, CONTEXT) } else { completion(&body, CONTEXT) };
        match read {
            Ok(Request { settings, .. }) => {
                answered += 1;
                assert!(
                    (0.0..=2.0).contains(&settings.temperature)
                        && settings.top_p > 0.0
                        && settings.top_p <= 1.0
                );
                assert!(settings.max_tokens.is_none_or(|tokens| (1..=CONTEXT).contains(&tokens)));
                assert!(settings.stop.len() <= 4 && settings.stop.iter().all(|stop| !stop.is_empty()));
            }
            Err(error) => {
                assert_eq!(error.status.as_u16(), 400, "{}: {error:?}", String::from_utf8_lossy(&body))
            }
        }
    }
    // Changes inside of texts and numbers are answered, the others are not: both are tried.
    assert!((1_000..19_000).contains(&answered), "{answered}");
}
