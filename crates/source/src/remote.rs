//! What all servers have in common: a listing, and bytes of a file from an offset on.
use bytes::Bytes;
use futures::StreamExt;
use futures::stream::BoxStream;
use reqwest::header::{self, HeaderMap};
use reqwest::{Response, StatusCode};

use crate::attempt;
use crate::credentials::Credentials;
use crate::digest::{Digest, FileEntry, FileHash};
use crate::error::SourceError;
use crate::http::{Answer, chain};
use crate::hub::Hub;
use crate::location::{Address, Location};
use crate::options::Options;
use crate::s3::S3;
use crate::web::Web;
use crate::{manifest, names};

/// A file on a server.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct RemoteFile {
    /// Name below the location's root, checked.
    pub path: String,
    pub size: Option<u64>,
    pub sha256: Option<FileHash>,
    /// Strong `ETag`, or `Last-Modified`: while it stays, the bytes stay.
    pub validator: Option<String>,
}

/// What a location holds, of what is read.
#[derive(Debug)]
pub(crate) struct Listing {
    pub files: Vec<RemoteFile>,
    /// Address and, for a hub, commit: what the cache is keyed by, with the files' validators.
    pub identity: String,
    /// The commit of a hub.
    pub revision: Option<String>,
    /// Equal identity and validators mean equal bytes.
    pub immutable: bool,
    /// From a manifest.
    pub digest: Option<Digest>,
    /// The address is one file.
    pub single: bool,
}

/// Bytes of a file.
pub(crate) struct Body {
    /// Offset of the first byte: 0 where the server ignores ranges.
    pub start: u64,
    /// Size of the whole file.
    pub total: Option<u64>,
    pub validator: Option<String>,
    pub stream: BoxStream<'static, Result<Bytes, SourceError>>,
}

/// A server that a location lives on.
pub(crate) enum Remote {
    Web(Web),
    Hub(Hub),
    S3(S3),
}

impl Remote {
    /// `None` for a mounted volume.
    pub fn of(location: &Location, options: &Options) -> Result<Option<Self>, SourceError> {
        let credentials: &Credentials = &options.credentials;
        Ok(match location.address() {
            Address::Pvc { .. } => None,
            Address::Http(url) => Some(Self::Web(Web::new(url, credentials, options)?)),
            Address::Hub(hub) => Some(Self::Hub(Hub::new(hub, credentials, options)?)),
            Address::S3 { bucket, prefix } => Some(Self::S3(S3::new(bucket, prefix, credentials, options)?)),
        })
    }

    pub async fn list(&self, options: &Options) -> Result<Listing, SourceError> {
        match self {
            Self::Web(web) => web.list(options).await,
            Self::Hub(hub) => attempt::retry(options, || hub.list(options)).await,
            Self::S3(s3) => attempt::retry(options, || s3.list(options)).await,
        }
    }

    /// Bytes from `from` on, up to and with `to` where given. A server may send more than that.
    pub async fn read(
        &self,
        listing: &Listing,
        file: &RemoteFile,
        from: u64,
        to: Option<u64>,
    ) -> Result<Body, SourceError> {
        match self {
            Self::Web(web) => web.read(file, from, to).await,
            Self::Hub(hub) => hub.read(listing, file, from, to).await,
            Self::S3(s3) => s3.read(listing.single, file, from, to).await,
        }
    }

    /// The bytes `from..to` in memory, tried again as the options say; fewer where the file ends before.
    pub async fn read_range(
        &self,
        listing: &Listing,
        file: &RemoteFile,
        from: u64,
        to: u64,
        options: &Options,
    ) -> Result<Vec<u8>, SourceError> {
        if from >= to || file.size.is_some_and(|size| from >= size) {
            return Ok(Vec::new());
        }
        attempt::retry(options, || async {
            let body = self.read(listing, file, from, Some(to - 1)).await?;
            collect(body, file, from, to, options).await
        })
        .await
    }

    /// A whole small file.
    pub async fn read_small(
        &self,
        listing: &Listing,
        file: &RemoteFile,
        options: &Options,
    ) -> Result<Vec<u8>, SourceError> {
        let limit = names::cap(&file.path, options.max_bytes);
        read_small(options, file, limit, |to| self.read(listing, file, 0, Some(to))).await
    }
}

/// A whole file of at most `limit` bytes through `read(last byte)`, tried again as the options say.
pub(crate) async fn read_small<W: Future<Output = Result<Body, SourceError>>>(
    options: &Options,
    file: &RemoteFile,
    limit: u64,
    read: impl Fn(u64) -> W,
) -> Result<Vec<u8>, SourceError> {
    if file.size == Some(0) {
        return Ok(Vec::new());
    }
    let bytes =
        attempt::retry(options, || async { collect(read(limit).await?, file, 0, limit + 1, options).await })
            .await?;
    if bytes.len() as u64 > limit {
        return Err(SourceError::TooLarge { what: file.path.clone(), bytes: bytes.len() as u64, limit });
    }
    Ok(bytes)
}

/// Gathers `from..to` out of a body that may begin before and end after.
pub(crate) async fn collect(
    mut body: Body,
    file: &RemoteFile,
    from: u64,
    to: u64,
    options: &Options,
) -> Result<Vec<u8>, SourceError> {
    if body.start > from {
        return Err(SourceError::malformed(&file.path, "the server answered with another range"));
    }
    let (mut at, mut bytes) = (body.start, Vec::new());
    while at < to {
        let chunk = match tokio::time::timeout(options.stall_timeout, body.stream.next()).await {
            Err(_) => return Err(SourceError::unreachable(&file.path, "the server stopped sending")),
            Ok(None) => break,
            Ok(Some(chunk)) => chunk?,
        };
        let end = at + chunk.len() as u64;
        let keep = from.clamp(at, end)..to.clamp(at, end);
        bytes.extend_from_slice(&chunk[(keep.start - at) as usize..(keep.end - at) as usize]);
        at = end;
    }
    let expected = body.total.or(file.size).map(|total| total.min(to).saturating_sub(from));
    if expected.is_some_and(|n| n != bytes.len() as u64) {
        return Err(SourceError::unreachable(&file.path, "the answer ended early"));
    }
    Ok(bytes)
}

/// The files of a manifest as files on a server.
pub(crate) fn from_manifest(bytes: &[u8]) -> Result<(Vec<RemoteFile>, Digest), SourceError> {
    let (entries, digest) = manifest::read(bytes)?;
    let file = |e: FileEntry| RemoteFile {
        path: e.path,
        size: Some(e.size),
        sha256: Some(e.sha256),
        validator: None,
    };
    Ok((entries.into_iter().map(file).collect(), digest))
}

/// The body of an HTTP answer, its range read from the headers.
pub(crate) fn http_body(answer: Answer, what: &str) -> Result<Body, SourceError> {
    let response: Response = answer.response;
    let headers = response.headers();
    if headers.get(header::CONTENT_ENCODING).is_some_and(|e| e != "identity") {
        return Err(SourceError::malformed(
            what,
            "the server sends it compressed although that was not asked for",
        ));
    }
    let (start, total) = if response.status() == StatusCode::PARTIAL_CONTENT {
        let range = headers.get(header::CONTENT_RANGE).and_then(|v| v.to_str().ok()).and_then(content_range);
        range.ok_or_else(|| SourceError::malformed(what, "an answer 206 without a valid `Content-Range`"))?
    } else {
        (0, response.content_length())
    };
    let validator = validator(headers);
    let name = what.to_string();
    let stream = response.bytes_stream().map(move |chunk| {
        chunk.map_err(|e| {
            SourceError::unreachable(&name, format!("the connection broke: {}", chain(&e.without_url())))
        })
    });
    Ok(Body { start, total, validator, stream: stream.boxed() })
}

/// `bytes 5-9/10` is (5, 10), `bytes 5-9/*` is (5, unknown).
fn content_range(text: &str) -> Option<(u64, Option<u64>)> {
    let (range, total) = text.strip_prefix("bytes ")?.split_once('/')?;
    let (first, last) = range.split_once('-')?;
    let (first, last): (u64, u64) = (first.parse().ok()?, last.parse().ok()?);
    let total = match total {
        "*" => None,
        total => Some(total.parse().ok()?),
    };
    (first <= last && total.is_none_or(|t| last < t)).then_some((first, total))
}

/// A strong `ETag`, else `Last-Modified`. A weak tag does not promise equal bytes (RFC 9110, 8.8.1).
fn validator(headers: &HeaderMap) -> Option<String> {
    let text =
        |name| headers.get(name).and_then(|v: &header::HeaderValue| v.to_str().ok()).map(str::to_string);
    text(header::ETAG).filter(|tag| tag.starts_with('"')).or_else(|| text(header::LAST_MODIFIED))
}

#[cfg(test)]
mod tests {
    use super::*;
    use rstest::rstest;

    #[rstest]
    #[case("bytes 5-9/10", Some((5, Some(10))))]
    #[case("bytes 5-9/*", Some((5, None)))]
    #[case("bytes */10", None)]
    #[case("bytes 9-5/10", None)]
    #[case("bytes 5-10/10", None)]
    #[case("items 0-1/2", None)]
    fn ranges(#[case] text: &str, #[case] expected: Option<(u64, Option<u64>)>) {
        assert_eq!(content_range(text), expected);
    }
}
