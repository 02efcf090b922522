//! A request's body, in no more memory than it is long.
use std::time::Duration;

use axum::http::{HeaderMap, header};
use bytes::Bytes;
use http_body::Body;
use http_body_util::BodyExt as _;

/// Longest body of any request.
pub const MAX_BODY: usize = 16 << 20;
/// A body must be here by then.
const TIMEOUT: Duration = Duration::from_secs(60);
/// What is allocated for the first bytes of a body that does not say its length.
const FIRST: usize = 16 << 10;

/// Why a body was not read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BodyError {
    /// It is longer than allowed.
    TooLong,
    /// It did not arrive in time.
    TooSlow,
    /// It broke off.
    Broken,
}

/// What `Content-Length` says, in bytes.
fn told_length(headers: &HeaderMap) -> Option<usize> {
    headers.get(header::CONTENT_LENGTH)?.to_str().ok()?.parse().ok()
}

/// Reads a whole body of at most `limit` bytes. `grows` is told how many bytes of memory it is going to hold, before it does.
///
/// Frames are appended as they come: a list of them would take 32 bytes and more for a chunk of one.
///
/// # Errors
/// [`BodyError`], or what `grows` says.
pub async fn read_body<E: From<BodyError>>(
    headers: &HeaderMap,
    body: impl Body<Data = Bytes> + Unpin,
    limit: usize,
    grows: impl FnMut(usize) -> Result<(), E>,
) -> Result<Bytes, E> {
    let told = told_length(headers);
    if told.is_some_and(|bytes| bytes > limit) {
        return Err(BodyError::TooLong.into());
    }
    let read = collect(body, told.unwrap_or(limit), limit, grows);
    tokio::time::timeout(TIMEOUT, read).await.unwrap_or_else(|_| Err(BodyError::TooSlow.into()))
}

async fn collect<E: From<BodyError>>(
    mut body: impl Body<Data = Bytes> + Unpin,
    told: usize,
    limit: usize,
    mut grows: impl FnMut(usize) -> Result<(), E>,
) -> Result<Bytes, E> {
    let mut whole = Vec::new();
    while let Some(frame) = body.frame().await {
        let Ok(frame) = frame else { return Err(BodyError::Broken.into()) };
        // Trailers say nothing here.
        let Ok(data) = frame.into_data() else { continue };
        let length = whole.len() + data.len();
        if length > limit {
            return Err(BodyError::TooLong.into());
        }
        if length > whole.capacity() {
            // Twice as much each time, but not more than will come.
            let room = whole.capacity().saturating_mul(2).max(FIRST).min(told).max(length);
            grows(room)?;
            whole.reserve_exact(room - whole.len());
        }
        whole.extend_from_slice(&data);
    }
    Ok(whole.into())
}

#[cfg(test)]
mod tests {
    use axum::body::Body;
    use axum::http::HeaderValue;
    use futures::StreamExt as _;
    use futures::stream;

    use super::*;

    async fn read(pieces: Vec<Result<&'static [u8], &'static str>>, ends: bool) -> Result<Bytes, BodyError> {
        let pieces = stream::iter(pieces.into_iter().map(|piece| piece.map(Bytes::from_static)));
        let rest = if ends { stream::empty().boxed() } else { stream::pending().boxed() };
        let body = Body::from_stream(pieces.chain(rest));
        read_body(&HeaderMap::new(), body, 1 << 20, |_| Ok(())).await
    }

    #[tokio::test(start_paused = true)]
    async fn a_body_that_is_too_long_too_slow_or_breaks_off_is_refused() {
        assert_eq!(read(vec![Ok(b"{"), Ok(b"}")], true).await.unwrap(), "{}");
        assert_eq!(read(vec![Ok(b"{}")], true).await.unwrap(), "{}");
        assert_eq!(read(vec![], true).await.unwrap(), "");
        assert_eq!(read(vec![Ok(b"{}")], false).await, Err(BodyError::TooSlow));
        assert_eq!(read(vec![Ok(b"{}"), Err("gone")], true).await, Err(BodyError::Broken));
        assert_eq!(read(vec![Ok(&[b' '; 1 << 20]), Ok(b"x")], true).await, Err(BodyError::TooLong));
        let told = HeaderMap::from_iter([(header::CONTENT_LENGTH, HeaderValue::from(11))]);
        let body = Body::from_stream(stream::pending::<Result<Bytes, BoxError>>());
        let refused = read_body::<BodyError>(&told, body, 10, |_| Ok(())).await;
        assert_eq!(refused, Err(BodyError::TooLong));
    }

    type BoxError = Box<dyn std::error::Error + Send + Sync>;

    /// A list of the frames would hold 32 times as much.
    #[tokio::test]
    async fn a_body_of_single_bytes_takes_no_more_than_twice_its_length() {
        let bytes = 1 << 18;
        let pieces = stream::iter((0..bytes).map(|_| Ok::<_, BoxError>(Bytes::from_static(b"x"))));
        let mut held = Vec::new();
        let body = Body::from_stream(pieces);
        let whole = read_body::<BodyError>(&HeaderMap::new(), body, MAX_BODY, |room| {
            held.push(room);
            Ok(())
        })
        .await;
        assert_eq!(whole.unwrap().len(), bytes);
        assert!(held.is_sorted() && held.len() < 10 && held.last() == Some(&bytes), "{held:?}");
    }

    #[tokio::test]
    async fn who_may_hold_no_more_is_asked_for_no_more() {
        let told = HeaderMap::from_iter([(header::CONTENT_LENGTH, HeaderValue::from(100_000))]);
        let pieces = stream::iter((0..2).map(|_| Ok::<_, BoxError>(Bytes::from(vec![b'x'; 50_000]))));
        let mut asked = 0;
        let body = Body::from_stream(pieces);
        let whole = read_body(&told, body, MAX_BODY, |room| {
            asked = room;
            if room > 60_000 { Err(BodyError::Broken) } else { Ok(()) }
        });
        assert_eq!((whole.await, asked), (Err(BodyError::Broken), 100_000));
    }
}
