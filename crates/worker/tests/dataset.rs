//! Datasets from files: formats, every way to be wrong, tokens and masks, counts.
#![allow(clippy::unwrap_used)]

use std::fs;
use std::path::Path;

use lathe_contract::DatasetFormat;
use lathe_engine::files::{ChatTemplate, Tokenizer};
use lathe_worker::dataset::{
    DataReport, Dataset, DatasetError, Encoder, Example, Format, HoldOut, MAX_ROW_BYTES, Source, check,
    hold_out, read,
};
use rstest::rstest;

fn write(dir: &Path, name: &str, bytes: impl AsRef<[u8]>) -> std::path::PathBuf {
    let path = dir.join(name);
    fs::write(&path, bytes).unwrap();
    path
}

fn parse(bytes: impl AsRef<[u8]>, format: DatasetFormat) -> Result<Dataset, DatasetError> {
    let dir = tempfile::tempdir().unwrap();
    read(&write(dir.path(), "train.jsonl", bytes), format)
}

/// Checks training rows, and rows to measure with.
fn checked(train: &str, evaluation: Option<&str>, encoder: &Encoder<'_>) -> Result<DataReport, DatasetError> {
    let dir = tempfile::tempdir().unwrap();
    let evaluation = evaluation.map(|rows| write(dir.path(), "test.jsonl", rows));
    let train = write(dir.path(), "train.jsonl", train);
    let format = DatasetFormat::Auto;
    check(&Source { train: &train, evaluation: evaluation.as_deref(), hold_out: None, format }, encoder)
}

const CHAT: &str = r#"{"messages":[{"role":"user","content":"hi"},{"role":"assistant","content":"hé"}]}"#;

#[rstest]
#[case(CHAT, Format::Chat)]
#[case(r#"{"prompt":"a","completion":"b","id":7}"#, Format::PromptCompletion)]
#[case(r#"{"text":"a"}"#, Format::Text)]
fn the_first_row_tells_the_format(#[case] row: &str, #[case] format: Format) {
    assert_eq!(parse(row, DatasetFormat::Auto).unwrap().format, format);
}

#[test]
fn a_byte_order_mark_crlf_blank_lines_and_a_missing_last_newline_are_fine() {
    let dataset = parse("\u{feff}{\"text\":\"a\"}\r\n\r\n  \n{\"text\":\"b\"}", DatasetFormat::Auto).unwrap();
    let rows: Vec<_> = dataset.rows.iter().map(|row| (row.line, row.example.clone())).collect();
    assert_eq!(rows, [(1, Example::Text("a".into())), (4, Example::Text("b".into()))]);
    assert_eq!(dataset.bad_rows, 0);
}

#[rstest]
#[case(
    r#"{"messages":[{"role":"user","content":"a"},{"role":"assistant","content":5}]}"#,
    "`messages[1].content` must be a string (found a number)"
)]
#[case(
    r#"{"messages":[{"role":"user","content":[{"type":"text"}]}]}"#,
    "`messages[0].content` must be a string (found a list)"
)]
#[case(
    r#"{"messages":[{"role":"robot","content":"a"}]}"#,
    "`messages[0].role` must be \"system\", \"user\" or \"assistant\" (found \"robot\")"
)]
#[case(r#"{"messages":[{"content":"a"}]}"#, "`messages[0].role` must be a string (found nothing)")]
#[case(r#"{"messages":["a"]}"#, "`messages[0]` must be an object with `role` and `content` (found a string)")]
#[case(r#"{"messages":{}}"#, "`messages` must be a list (found an object)")]
#[case(r#"{"messages":[]}"#, "`messages` must have at least one message")]
#[case(
    &format!("{{\"messages\":[{}]}}", vec![r#"{"role":"assistant","content":"a"}"#; 1025].join(",")),
    "`messages` must have at most 1024 messages (found 1025); split the conversation"
)]
#[case(r#"{"messages":[{"role":"user","content":"a"}]}"#, "must have a message of the assistant to learn")]
#[case(
    r#"{"messages":[{"role":"assistant","content":"","tool_calls":[{}]}]}"#,
    "`messages[0].tool_calls` is not supported"
)]
#[case(r#"{"text":"a"}"#, "`messages` must be a list (found nothing)")]
#[case("[1]", "a row must be a JSON object (found a list)")]
#[case("{\"messages\":", "a row must be a JSON object (EOF while parsing a value, column 12)")]
#[case("{'messages':[]}", "a row must be a JSON object (key must be a string, column 2)")]
fn a_wrong_row_is_named_by_line_and_field(#[case] row: &str, #[case] says: &str) {
    let dataset = parse(format!("{CHAT}\n{row}\n{CHAT}\n"), DatasetFormat::Auto).unwrap();
    assert_eq!((dataset.rows.len(), dataset.bad_rows), (2, 1));
    let error = dataset.refuse_bad_rows().unwrap_err().to_string();
    assert!(
        error.starts_with("train.jsonl line 2: ") && error.ends_with(". 1 of 3 rows of train.jsonl"),
        "{error}"
    );
    assert!(error.contains(says), "{error}");
}

#[rstest]
#[case(
    r#"{"prompt":"a","completion":""}"#,
    DatasetFormat::PromptCompletion,
    "`completion` must not be empty"
)]
#[case(
    r#"{"prompt":null,"completion":"b"}"#,
    DatasetFormat::PromptCompletion,
    "`prompt` must be a string (found null)"
)]
#[case(r#"{"text":""}"#, DatasetFormat::Text, "`text` must not be empty")]
#[case(
    r#"{"instruction":"a","output":"b"}"#,
    DatasetFormat::Auto,
    "must have `messages`, or `prompt` and `completion`, or `text` (found `instruction`, `output`)"
)]
#[case("{}", DatasetFormat::Auto, "(found no field)")]
fn a_wrong_only_row_is_an_error_in_every_format(
    #[case] row: &str,
    #[case] format: DatasetFormat,
    #[case] says: &str,
) {
    let error = parse(row, format).and_then(Dataset::refuse_bad_rows).unwrap_err().to_string();
    assert!(error.starts_with("train.jsonl line 1: ") && error.contains(says), "{error}");
}

#[rstest]
#[case(b"".to_vec(), "train.jsonl has no rows")]
#[case(b"\n\n \n".to_vec(), "train.jsonl has no rows")]
#[case(b"\xef\xbb\xbf".to_vec(), "train.jsonl has no rows")]
#[case(b"\xff\xfe{\0".to_vec(), "(found UTF-16)")]
#[case(b"PAR1\0\0".to_vec(), "(found Parquet)")]
#[case(b"\x1f\x8b\x08\0".to_vec(), "(found gzip)")]
#[case(b" [\n{\"text\":\"a\"}]".to_vec(), "(found a JSON list)")]
#[case(b"{\"text\":\"caf\xe9\"}".to_vec(), "line 1: a row must be UTF-8 (byte 13 of the line is not)")]
fn a_file_that_is_no_dataset_says_what_it_is(#[case] bytes: Vec<u8>, #[case] says: &str) {
    let error = parse(bytes, DatasetFormat::Auto).and_then(Dataset::refuse_bad_rows).unwrap_err().to_string();
    assert!(error.contains(says), "{error}");
}

#[test]
fn an_endless_row_is_refused_without_being_held() {
    let long = format!("{{\"text\":\"{}\"}}\n{{\"text\":\"b\"}}\n", "x".repeat(MAX_ROW_BYTES));
    let dataset = parse(long, DatasetFormat::Text).unwrap();
    assert_eq!((dataset.rows.len(), dataset.rows[0].line, dataset.bad_rows), (1, 2, 1));
    assert!(dataset.problems[0].to_string().contains("at most 4194304 bytes"));
}

#[test]
fn only_the_first_problems_are_kept_and_all_are_counted() {
    let dataset = parse("{\"text\":1}\n".repeat(100), DatasetFormat::Text).unwrap();
    assert_eq!((dataset.bad_rows, dataset.problems.len()), (100, 20));
}

const TEMPLATE: &str = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}\
    {% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}";

struct Model {
    tokenizer: Tokenizer,
    template: ChatTemplate,
}

impl Model {
    fn new(tokenizer: &str, template: &str) -> Self {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../engine/tests/fixtures/hf/tokenizers");
        let tokenizer = Tokenizer::parse(&fs::read(folder.join(tokenizer)).unwrap(), 400).unwrap();
        let template = ChatTemplate::parse(None, Some(template.as_bytes())).unwrap().unwrap();
        Model { tokenizer, template }
    }

    fn encoder(&self, max_tokens: usize) -> Encoder<'_> {
        Encoder {
            tokenizer: &self.tokenizer,
            template: Some(&self.template),
            eos: self.tokenizer.token_id("<|endoftext|>").or(self.tokenizer.token_id("</s>")),
            now: jiff::Timestamp::UNIX_EPOCH,
            max_tokens,
        }
    }

    /// The text of the tokens that are learned.
    fn learned(&self, row: &str) -> String {
        let dataset = parse(row, DatasetFormat::Auto).unwrap();
        let encoded = self.encoder(1000).encode(&dataset.rows[0].example).unwrap();
        assert_eq!(encoded.rows[0].tokens.len(), encoded.rows[0].weights.len());
        let learned =
            encoded.rows[0].tokens.iter().zip(&encoded.rows[0].weights).filter(|(_, weight)| **weight == 1.0);
        let ids: Vec<u32> = learned.map(|(id, _)| *id).collect();
        self.tokenizer.decode(&ids, false).unwrap()
    }
}

#[test]
fn answers_alone_are_learned_with_the_end_of_their_turn() {
    let model = Model::new("byte-level.json", TEMPLATE);
    assert_eq!(model.learned(CHAT), "hé<|im_end|>\n");
    let turns = r#"{"messages":[{"role":"system","content":"s"},{"role":"assistant","content":"1"},
        {"role":"user","content":"u"},{"role":"assistant","content":"2"}]}"#;
    assert_eq!(model.learned(&turns.replace('\n', "")), "1<|im_end|>\n2<|im_end|>\n");
    assert_eq!(model.learned(r#"{"prompt":"the cat","completion":" sät"}"#), " sät<|endoftext|>");
    assert_eq!(model.learned(r#"{"prompt":"","completion":"sat"}"#), "sat<|endoftext|>");
    assert_eq!(model.learned(r#"{"text":"the cat"}"#), "the cat<|endoftext|>");
}

#[test]
fn a_token_that_begins_every_text_is_no_answer_and_is_there_once() {
    let model = Model::new("byte-fallback.json", TEMPLATE);
    let dataset = parse(r#"{"prompt":"the cat","completion":" on"}"#, DatasetFormat::Auto).unwrap();
    let encoded = model.encoder(1000).encode(&dataset.rows[0].example).unwrap();
    assert_eq!(encoded.rows[0].tokens.first(), Some(&1));
    assert_eq!(encoded.rows[0].weights.first(), Some(&0.0));
    assert_eq!(model.learned(r#"{"prompt":"the cat","completion":" on"}"#).trim(), "on</s>");
    let question = model.encoder(1000).question(&dataset.rows[0].example).unwrap().unwrap();
    assert_eq!(question.prompt, encoded.rows[0].tokens[..question.prompt.len()]);
}

#[test]
fn a_question_is_what_stands_before_the_last_answer() {
    let model = Model::new("byte-level.json", TEMPLATE);
    let encoder = model.encoder(1000);
    let question =
        |row: &str| encoder.question(&parse(row, DatasetFormat::Auto).unwrap().rows[0].example).unwrap();
    let chat = question(CHAT).unwrap();
    let prompt = "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n";
    assert_eq!(model.tokenizer.decode(&chat.prompt, false).unwrap(), prompt);
    assert_eq!(chat.reference, "hé");
    assert_eq!(question(r#"{"prompt":"a","completion":"b"}"#).unwrap().reference, "b");
    assert_eq!(question(r#"{"text":"a"}"#), None);
}

/// A text of 20 words is 20 tokens or more; with its end none may be lost and none learned twice.
#[rstest]
#[case::fits(1000, 1)]
#[case::two_rows(21, 2)]
#[case::many(4, 14)]
#[case::smallest(2, 40)]
fn a_long_text_goes_on_in_further_rows_and_loses_nothing(#[case] max_tokens: usize, #[case] rows: usize) {
    let model = Model::new("byte-level.json", TEMPLATE);
    let text = "x ".repeat(20);
    let row = format!("{{\"text\":\"{text}\"}}");
    let dataset = parse(&row, DatasetFormat::Auto).unwrap();
    let encoded = model.encoder(max_tokens).encode(&dataset.rows[0].example).unwrap();
    assert_eq!((encoded.rows.len(), encoded.cut), (rows, false));
    assert!(encoded.rows.iter().all(|row| row.tokens.len() <= max_tokens));
    let predicted = encoded.rows.iter().flat_map(|row| {
        assert_eq!(row.tokens.len(), row.weights.len());
        row.tokens
            .iter()
            .zip(&row.weights)
            .skip(1)
            .filter(|(_, weight)| **weight > 0.0)
            .map(|(token, _)| *token)
    });
    let all: Vec<u32> = encoded.rows[0].tokens[..1].iter().copied().chain(predicted).collect();
    assert_eq!(all.len(), encoded.whole);
    assert_eq!(encoded.learned, encoded.whole - 1);
    assert_eq!(model.tokenizer.decode(&all, false).unwrap(), format!("{text}<|endoftext|>"));
    let report = checked(&row, None, &model.encoder(max_tokens)).unwrap();
    assert_eq!((report.rows, report.over_long_rows, report.learned_tokens), (1, 0, encoded.learned));
}

#[test]
fn counts_tell_cut_empty_duplicate_and_leaked_rows() {
    let model = Model::new("byte-level.json", TEMPLATE);
    let row = |prompt: &str| format!("{{\"prompt\":\"{prompt}\",\"completion\":\" cat\"}}\n");
    let cut = format!("{{\"prompt\":\"the\",\"completion\":\"{}\"}}\n", "x ".repeat(40));
    let behind = row(&"x ".repeat(40));
    let train = [row("the"), row("a"), row("the"), cut, behind].concat();
    // The same row as `the`, written differently.
    let test = r#"{ "completion": " \u0063at", "prompt": "the" }"#.to_owned() + "\n" + &row("new");
    let report = checked(&train, Some(&test), &model.encoder(16)).unwrap();
    assert_eq!((report.rows, report.over_long_rows, report.empty_rows), (5, 2, 1));
    assert_eq!((report.duplicate_rows, report.evaluation_rows, report.leaked_rows), (1, 2, 1));
    assert!(report.longest_row > 40 && report.tokens <= 5 * 16 && report.learned_tokens < report.tokens);
    assert_eq!(report.malformed, []);
}

#[test]
fn a_row_that_the_template_refuses_is_named_by_its_line() {
    let refusing = "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system role') }}{% endif %}\
        {{ m.content }}{% endfor %}";
    let model = Model::new("byte-level.json", refusing);
    let system = r#"{"messages":[{"role":"system","content":"s"},{"role":"assistant","content":"a"}]}"#;
    let train = format!("{CHAT}\n{system}\n");
    let report = checked(&train, Some(&train), &model.encoder(100)).unwrap();
    assert_eq!(report.rows, 1);
    let told: Vec<String> = report.malformed.iter().map(ToString::to_string).collect();
    for (told, file) in told.iter().zip(["train.jsonl", "test.jsonl"]) {
        assert!(told.starts_with(&format!("{file} line 2: chat template: ")), "{told}");
        assert!(told.contains("no system role"), "{told}");
        assert!(told.ends_with(&format!(". 1 of 2 rows of {file}")), "{told}");
    }
    assert_eq!(told.len(), 2);
}

#[rstest]
#[case::over_its_budget(
    "{% for i in range(9000) %}{% for j in range(9000) %}x{% endfor %}{% endfor %}",
    false,
    "budget"
)]
#[case::of_an_unknown_filter("{{ messages|nothing }}", false, "nothing")]
#[case::without_an_unknown_token(TEMPLATE, true, "tokenizer.json: ")]
fn what_fails_in_the_model_is_not_blamed_on_a_row(
    #[case] template: &str,
    #[case] of_one_word: bool,
    #[case] says: &str,
) {
    let mut model = Model::new("byte-level.json", template);
    if of_one_word {
        let json = r#"{"version": "1.0", "truncation": null, "padding": null, "added_tokens": [], "normalizer": null,
            "pre_tokenizer": null, "post_processor": null, "decoder": null,
            "model": {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "[UNK]"}}"#;
        model.tokenizer = Tokenizer::parse(json.as_bytes(), 400).unwrap();
    }
    let error = checked(&format!("{CHAT}\n{CHAT}\n"), None, &model.encoder(100)).unwrap_err();
    assert!(matches!(error, DatasetError::Model { .. }), "{error:?}");
    let error = error.to_string();
    assert!(
        error.starts_with("the model's files fail at train.jsonl line 1: ") && error.contains(says),
        "{error}"
    );
}

#[test]
fn a_dataset_that_cannot_teach_this_model_is_refused() {
    let model = Model::new("byte-level.json", TEMPLATE);
    let without = Encoder { template: None, ..model.encoder(100) };
    assert!(matches!(checked(CHAT, None, &without), Err(DatasetError::NoChatTemplate)));
    let error = checked(CHAT, None, &model.encoder(3)).unwrap_err().to_string();
    assert!(error.contains("no row has an answer within the first 3 tokens"), "{error}");
}

#[test]
fn held_out_rows_are_chosen_by_content_and_never_leak() {
    let rows = |texts: &[usize]| {
        let lines: String =
            texts.iter().map(|text| format!("{{\"text\":\"row {}\"}}\n", text % 40)).collect();
        parse(lines, DatasetFormat::Text).unwrap().rows
    };
    let forward: Vec<usize> = (0..50).collect();
    let backward: Vec<usize> = (0..50).rev().collect();
    let texts = |rows: &[lathe_worker::dataset::Row]| {
        let mut all: Vec<_> = rows.iter().map(|row| format!("{:?}", row.example)).collect();
        all.sort();
        all
    };
    let (train, test) = hold_out(rows(&forward), 0.25, 1);
    assert_eq!(train.len() + test.len(), 50);
    let (a, b) = (texts(&train), texts(&test));
    assert!(a.iter().all(|text| !b.contains(text)));
    let mut distinct = b.clone();
    distinct.dedup();
    assert_eq!(distinct.len(), 10);
    assert_eq!(texts(&hold_out(rows(&backward), 0.25, 1).1), b);
    assert_ne!(texts(&hold_out(rows(&forward), 0.25, 2).1), b);
    assert_eq!(hold_out(rows(&[1, 2, 3]), 0.0001, 1).1.len(), 1);
    assert_eq!(hold_out(rows(&[1, 1]), 0.5, 1).1.len(), 0);
}

#[test]
fn a_check_counts_the_rows_that_are_held_out() {
    let model = Model::new("byte-level.json", TEMPLATE);
    let lines: String = (0..50).map(|text| format!("{{\"text\":\"row {}\"}}\n", text % 40)).collect();
    let (kept, held) = hold_out(parse(&lines, DatasetFormat::Auto).unwrap().rows, 0.25, 7);
    let dir = tempfile::tempdir().unwrap();
    let train = write(dir.path(), "train.jsonl", &lines);
    let source = Source {
        train: &train,
        evaluation: None,
        hold_out: Some(HoldOut { share: 0.25, seed: 7 }),
        format: DatasetFormat::Auto,
    };
    let report = check(&source, &model.encoder(16)).unwrap();
    assert_eq!((report.rows, report.evaluation_rows), (kept.len(), held.len()));
    assert_eq!((report.leaked_rows, report.format), (0, Some(Format::Text)));
}

/// Whatever bytes a file has: rows, problems with their lines, or one cause. Seeded, so that a failure can be repeated.
#[test]
fn changed_bytes_are_rows_or_problems() {
    let model = Model::new("byte-level.json", TEMPLATE);
    let rows = [CHAT, r#"{"prompt":"the \u00e9","completion":" cat"}"#, r#"{"text":"the cat\n"}"#];
    let pieces: [&[u8]; 10] =
        [b"\"", b"{", b"}", b"[", b"]", b"\n", b"null", b"\\ud800", b"\xff", b"\xef\xbb\xbf"];
    let mut state = 0x2545_f491_4f6c_dd1d_u64;
    let mut below = |most: usize| {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 33) as usize % most.max(1)
    };
    let (mut fine, mut wrong) = (0, 0);
    for round in 0..3_000 {
        let mut bytes = [rows[round % 3], rows[round % 3], ""].join("\n").into_bytes();
        for _ in 0..=below(3) {
            let (at, piece) = (below(bytes.len()), pieces[below(pieces.len())]);
            match below(4) {
                0 => bytes.iter_mut().skip(at).take(1).for_each(|byte| *byte = below(256) as u8),
                1 => drop(bytes.splice(at..at, piece.iter().copied())),
                2 => drop(bytes.splice(at..(at + 1 + below(8)).min(bytes.len()), [])),
                _ => bytes.truncate(at.max(1)),
            }
        }
        let Ok(dataset) = parse(&bytes, DatasetFormat::Auto) else { continue };
        assert_eq!(dataset.problems.len(), dataset.bad_rows.min(20));
        fine += dataset.rows.len();
        wrong += dataset.bad_rows;
        for row in &dataset.rows {
            let encoder = model.encoder(16);
            if let Ok(encoded) = encoder.encode(&row.example) {
                assert!(
                    encoded
                        .rows
                        .iter()
                        .all(|row| row.tokens.len() <= 16 && row.tokens.len() == row.weights.len())
                );
            }
            let _ = encoder.question(&row.example);
        }
    }
    assert!(fine > 1_000 && wrong > 500, "{fine} rows, {wrong} problems");
}
