//! The body of `POST /v1/embeddings`.
use super::fields::{Fields, counted, integer, kind, string, wrong_type};
use super::{model, tokens};
use crate::serve::error::ApiError;
use serde_json::value::RawValue;

/// As OpenAI.
const MAX_INPUTS: usize = 2048;
/// Numbers of an answer, at most: in f32 as many bytes as the longest request has.
const MAX_NUMBERS: usize = lathe_http::MAX_BODY / size_of::<f32>();

/// A request for the embeddings of some inputs.
#[derive(Clone, Debug, PartialEq)]
pub struct Embeddings {
    /// The model id as the client wrote it.
    pub model: String,
    /// At least one.
    pub inputs: Vec<Input>,
    /// How the vectors are written.
    pub encoding: Encoding,
}

/// One input.
#[derive(Clone, Debug, PartialEq)]
pub struct Input {
    /// Where it stands in the request, e.g. `input[1]`.
    pub path: String,
    /// Never empty.
    pub content: Content,
}

/// What is to be embedded.
#[derive(Clone, Debug, PartialEq)]
pub enum Content {
    /// Plain text.
    Text(String),
    /// Tokens, checked against the vocabulary by the reader.
    Tokens(Vec<u32>),
}

/// OpenAI's `encoding_format`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Encoding {
    /// A list of numbers.
    Float,
    /// The bytes of little-endian f32, in base64.
    Base64,
}

/// Reads the body. An input has at most `context` tokens, a vector `hidden` numbers.
pub fn embeddings(body: &[u8], context: usize, hidden: usize) -> Result<Embeddings, ApiError> {
    let fields = Fields::parse(body)?;
    let model = model(&fields)?;
    let most = (MAX_NUMBERS / hidden.max(1)).clamp(1, MAX_INPUTS);
    let inputs = inputs(fields.required("input")?, context, most)?;
    dimensions(&fields, hidden)?;
    Ok(Embeddings { model, inputs, encoding: encoding(&fields)? })
}

/// A string, a list of tokens, or a list of at most `most` of either.
fn inputs(value: &RawValue, context: usize, most: usize) -> Result<Vec<Input>, ApiError> {
    const EXPECTED: &str = "a string, an array of tokens, or an array of either";
    match kind(value) {
        "a string" => Ok(vec![text("input".to_owned(), value)?]),
        "an array" => {
            let (items, total) = counted("input", value, context.max(most))?;
            if kind(items[0]) == "a number" {
                return Ok(vec![listed("input".to_owned(), &items, total, context)?]);
            }
            if total > most {
                let message = format!(
                    "Invalid 'input': array too long. Expected an array with at most {most} items, but got {total} \
                     items instead; send several requests."
                );
                return Err(ApiError::field("input", "array_above_max_length", message));
            }
            items
                .into_iter()
                .enumerate()
                .map(|(at, item)| one(format!("input[{at}]"), item, context))
                .collect()
        }
        _ => Err(wrong_type("input", EXPECTED, value)),
    }
}

fn one(path: String, value: &RawValue, context: usize) -> Result<Input, ApiError> {
    match kind(value) {
        "a string" => text(path, value),
        "an array" => {
            let (items, total) = counted(&path, value, context)?;
            listed(path, &items, total, context)
        }
        _ => Err(wrong_type(&path, "a string or an array of tokens", value)),
    }
}

fn text(path: String, value: &RawValue) -> Result<Input, ApiError> {
    let text = string(&path, value)?.into_owned();
    if text.is_empty() {
        let message = format!("Invalid '{path}': empty string. Expected text to embed.");
        return Err(ApiError::field(path, "empty_string", message));
    }
    Ok(Input { path, content: Content::Text(text) })
}

fn listed(path: String, items: &[&RawValue], total: usize, context: usize) -> Result<Input, ApiError> {
    if total > context {
        return Err(ApiError::input_too_long(&path, context, total));
    }
    let content = Content::Tokens(tokens(&path, items)?);
    Ok(Input { path, content })
}

/// A model's vectors have the length that they have: what of a shorter one would still be worth, the model's files do not say.
fn dimensions(fields: &Fields, hidden: usize) -> Result<(), ApiError> {
    let Some(value) = fields.raw("dimensions") else { return Ok(()) };
    let asked = integer("dimensions", value)?;
    if usize::try_from(asked) == Ok(hidden) {
        return Ok(());
    }
    let message = format!(
        "Invalid 'dimensions': this model's embeddings have {hidden} numbers, and no others are offered; leave it out."
    );
    Err(ApiError::field("dimensions", "unsupported_value", message))
}

fn encoding(fields: &Fields) -> Result<Encoding, ApiError> {
    let Some(value) = fields.raw("encoding_format") else { return Ok(Encoding::Float) };
    match &*string("encoding_format", value)? {
        "float" => Ok(Encoding::Float),
        "base64" => Ok(Encoding::Base64),
        other => {
            let other: String = other.chars().take(40).collect();
            let message = format!("Invalid value: '{other}'. Supported values are: 'float' and 'base64'.");
            Err(ApiError::field("encoding_format", "invalid_value", message))
        }
    }
}

#[cfg(test)]
mod tests {
    use rstest::rstest;
    use serde_json::{Value, json};

    use super::*;

    const CONTEXT: usize = 4;

    fn read(extra: Value) -> Result<Embeddings, ApiError> {
        let mut body = json!({"model": "m"});
        for (name, value) in extra.as_object().expect("an object") {
            body[name] = value.clone();
        }
        embeddings(body.to_string().as_bytes(), CONTEXT, 8)
    }

    fn text(text: &str) -> Content {
        Content::Text(text.to_owned())
    }

    #[rstest]
    #[case::text(json!("ab"), vec![("input", text("ab"))])]
    #[case::texts(json!(["a", "b"]), vec![("input[0]", text("a")), ("input[1]", text("b"))])]
    #[case::tokens(json!([1, 2]), vec![("input", Content::Tokens(vec![1, 2]))])]
    #[case::as_many_as_fit(json!([1, 2, 3, 4]), vec![("input", Content::Tokens(vec![1, 2, 3, 4]))])]
    #[case::lists(json!([[1], [2, 3]]), vec![
        ("input[0]", Content::Tokens(vec![1])), ("input[1]", Content::Tokens(vec![2, 3])),
    ])]
    #[case::both(json!(["a", [7]]), vec![("input[0]", text("a")), ("input[1]", Content::Tokens(vec![7]))])]
    fn every_kind_of_input(#[case] input: Value, #[case] expected: Vec<(&str, Content)>) {
        let read = read(json!({"input": input, "user": 7, "dimensions": 8, "unknown": []})).expect("inputs");
        let found: Vec<(&str, Content)> =
            read.inputs.iter().map(|i| (i.path.as_str(), i.content.clone())).collect();
        assert_eq!((found, read.encoding), (expected, Encoding::Float));
    }

    #[rstest]
    #[case::absent(json!({}), "input", "missing_required_parameter")]
    #[case::null(json!({"input": null}), "input", "missing_required_parameter")]
    #[case::empty(json!({"input": ""}), "input", "empty_string")]
    #[case::an_empty_one(json!({"input": ["a", ""]}), "input[1]", "empty_string")]
    #[case::none(json!({"input": []}), "input", "empty_array")]
    #[case::no_tokens(json!({"input": [[1], []]}), "input[1]", "empty_array")]
    #[case::a_number(json!({"input": 7}), "input", "invalid_type")]
    #[case::an_object(json!({"input": ["a", {"text": "b"}]}), "input[1]", "invalid_type")]
    #[case::mixed(json!({"input": [1, "a"]}), "input[1]", "invalid_type")]
    #[case::no_token(json!({"input": [[1], [-1]]}), "input[1][0]", "invalid_value")]
    #[case::too_long(json!({"input": [1, 2, 3, 4, 5]}), "input", "context_length_exceeded")]
    #[case::a_long_one(json!({"input": [[1], [1, 2, 3, 4, 5]]}), "input[1]", "context_length_exceeded")]
    #[case::shorter(json!({"input": "a", "dimensions": 4}), "dimensions", "unsupported_value")]
    #[case::none_at_all(json!({"input": "a", "dimensions": 0}), "dimensions", "unsupported_value")]
    #[case::no_dimensions(json!({"input": "a", "dimensions": "8"}), "dimensions", "invalid_type")]
    #[case::no_format(json!({"input": "a", "encoding_format": "hex"}), "encoding_format", "invalid_value")]
    fn what_cannot_be_embedded_is_refused(#[case] body: Value, #[case] param: &str, #[case] code: &str) {
        let error = read(body).expect_err("it cannot be embedded");
        assert_eq!(
            (error.status.as_u16(), error.param.as_deref(), error.code),
            (400, Some(param), Some(code))
        );
    }

    #[test]
    fn the_number_of_inputs_is_bounded_by_what_their_vectors_take() {
        let ask = |inputs: usize, hidden: usize| {
            let body = json!({"model": "m", "input": vec!["a"; inputs]}).to_string();
            embeddings(body.as_bytes(), CONTEXT, hidden).map(|read| read.inputs.len())
        };
        assert_eq!(ask(2048, 8), Ok(2048));
        let error = ask(2049, 8).expect_err("too many");
        assert_eq!((error.param.as_deref(), error.code), (Some("input"), Some("array_above_max_length")));
        assert_eq!(ask(1024, 4096), Ok(1024));
        assert!(ask(1025, 4096).expect_err("too large").message.contains("at most 1024 items"));
    }
}
