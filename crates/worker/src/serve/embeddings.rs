//! `POST /v1/embeddings`: the vector of each input, all of them in one answer.
use std::convert::Infallible;
use std::fmt::Write as _;
use std::sync::Arc;
use std::time::Instant;

use axum::body::Body;
use axum::extract::{Request, State};
use axum::http::{HeaderValue, header};
use axum::response::{IntoResponse as _, Response};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use futures::stream;
use lathe_telemetry::{Operation, RequestTrace};
use serde_json::json;
use tokio::sync::OwnedSemaphorePermit;

use super::answer::told;
use super::engine::EmbedJob;
use super::error::ApiError;
use super::http::{App, Asked, Front, judge, let_in, traced};
use super::request::{self, Encoding};
use super::vectors::{self, Embeddings};

/// The route's handler.
pub async fn embeddings(State(front): State<Arc<Front>>, request: Request) -> Result<Response, ApiError> {
    let trace = front.begins(request.headers(), Operation::EMBEDDINGS);
    traced(trace.clone(), answered(front, request, trace)).await
}

async fn answered(
    front: Arc<Front>,
    request: Request,
    trace: Option<RequestTrace>,
) -> Result<Response, ApiError> {
    let arrived = Instant::now();
    let app = front.app()?;
    let (parts, body, place) = let_in(app, request).await?;
    let work = move |app: &App| {
        let request = request::embeddings(&body, app.prompter.context, app.hidden)?;
        let adapter = app.adapters.resolve(&request.model)?;
        let kib = (request.inputs.len() * app.hidden * size_of::<f32>()).div_ceil(1024);
        // No request is larger than all of the room.
        let kib = u32::try_from(kib).map_err(|_| ApiError::internal())?;
        let room =
            Arc::clone(&app.vectors).try_acquire_many_owned(kib).map_err(|_| ApiError::vectors_full())?;
        let inputs = app.prompter.read_inputs(&request.inputs)?;
        Ok((request.model, request.encoding, adapter, inputs, place, room))
    };
    let (model, encoding, adapter, inputs, place, room) = judge(&front, work).await?;
    let id = format!("embd-{:032x}", rand::random::<u128>());
    let tokens = inputs.iter().map(Vec::len).sum();
    let operation = Operation::EMBEDDINGS;
    Asked { operation, id: &id, model: &model, prompt_tokens: tokens, stream: false }
        .tell(&parts.headers, trace.as_ref());
    let (poster, awaited) = vectors::awaited(inputs.len(), tokens, arrived, place, trace);
    app.engine.embed(EmbedJob::new(inputs, adapter, poster, arrived));
    let mut response = answer(&model, encoding, awaited.all().await?, room);
    let id = HeaderValue::from_str(&id).map_err(|_| ApiError::internal())?;
    response.headers_mut().insert("x-request-id", id);
    Ok(response)
}

/// OpenAI's list, written vector by vector as the client takes it: so no second form of all of them is held. Their room is given back
/// with the last of them.
fn answer(
    model: &str,
    encoding: Encoding,
    (vectors, usage): Embeddings,
    room: OwnedSemaphorePermit,
) -> Response {
    let end = json!({
        "model": model,
        "usage": {"prompt_tokens": usage.prompt, "total_tokens": usage.total()},
    });
    // Its members follow those of the list.
    let end = format!("],{}", &end.to_string()[1..]);
    let item = move |(index, vector): (usize, Vec<f32>)| {
        let _held = &room;
        let comma = if index == 0 { "" } else { "," };
        let embedding = written(&vector, encoding);
        format!("{comma}{{\"object\":\"embedding\",\"index\":{index},\"embedding\":{embedding}}}")
    };
    let start = std::iter::once("{\"object\":\"list\",\"data\":[".to_owned());
    let pieces = start.chain(vectors.into_iter().enumerate().map(item)).chain([end]);
    let body = Body::from_stream(stream::iter(pieces.map(Ok::<_, Infallible>)));
    let mut response = body.into_response();
    response.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static("application/json"));
    response.headers_mut().extend(told(usage));
    response
}

/// A finite vector as JSON: the shortest decimals that read back as the same f32, or the base64 of its bytes.
fn written(vector: &[f32], encoding: Encoding) -> String {
    let mut text = String::new();
    match encoding {
        Encoding::Base64 => {
            let bytes: Vec<u8> = vector.iter().flat_map(|x| x.to_le_bytes()).collect();
            text.push('"');
            STANDARD.encode_string(bytes, &mut text);
            text.push('"');
        }
        Encoding::Float => {
            text.push('[');
            for (at, x) in vector.iter().enumerate() {
                let comma = if at == 0 { "" } else { "," };
                // Writing to a string cannot fail.
                let _ = write!(text, "{comma}{x:?}");
            }
            text.push(']');
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn the_room_of_vectors_is_given_back_once_they_are_read() {
        let all = Arc::new(tokio::sync::Semaphore::new(2));
        let room = Arc::clone(&all).try_acquire_many_owned(2).expect("free");
        let usage = lathe_contract::Usage { prompt: 3, completion: 0, cached: 0 };
        let vectors = vec![vec![1.0], vec![2.0]];
        let mut body = answer("m", Encoding::Float, (vectors, usage), room).into_body().into_data_stream();
        let mut text = String::new();
        while let Some(piece) = futures::StreamExt::next(&mut body).await {
            text.push_str(&String::from_utf8_lossy(&piece.expect("no error")));
            let over = text.contains("usage");
            assert_eq!(all.available_permits(), if over { 2 } else { 0 }, "{text}");
        }
        assert!(text.ends_with(r#""usage":{"prompt_tokens":3,"total_tokens":3}}"#), "{text}");
    }

    #[test]
    fn numbers_read_back_to_the_same_bits() {
        let vector = [0.1f32, -1.0, 1e-30, -0.0, f32::MIN_POSITIVE, 1.0 / 3.0, 123_456.79];
        let read: Vec<f32> = serde_json::from_str(&written(&vector, Encoding::Float)).expect("numbers");
        let bits = |vector: &[f32]| vector.iter().map(|x| x.to_bits()).collect::<Vec<_>>();
        assert_eq!(bits(&read), bits(&vector));
        assert_eq!(written(&[1.0, -2.0], Encoding::Base64), "\"AACAPwAAAMA=\"");
    }
}
