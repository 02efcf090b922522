//! `s3://`: objects below a prefix, through `object_store` with our own client.
use std::str::FromStr;
use std::sync::Arc;

use futures::StreamExt;
use object_store::aws::{AmazonS3, AmazonS3Builder, AmazonS3ConfigKey};
use object_store::client::{HttpClient, HttpConnector};
use object_store::path::Path;
use object_store::{
    BackoffConfig, ClientOptions, GetOptions, GetRange, ObjectStore, ObjectStoreExt, RetryConfig,
};
use reqwest::Url;

use crate::credentials::Credentials;
use crate::error::{SourceError, printable};
use crate::manifest::{self, MANIFEST};
use crate::names;
use crate::options::Options;
use crate::remote::{Body, Listing, RemoteFile, from_manifest, read_small};
use crate::{http, publish};

/// Any of these tells who asks.
const IDENTITIES: [&str; 5] = [
    "AWS_ACCESS_KEY_ID",
    "AWS_WEB_IDENTITY_TOKEN_FILE",
    "AWS_CONTAINER_CREDENTIALS_RELATIVE_URI",
    "AWS_CONTAINER_CREDENTIALS_FULL_URI",
    "AWS_SKIP_SIGNATURE",
];

/// A bucket and a prefix in it.
pub(crate) struct S3 {
    pub store: Arc<AmazonS3>,
    bucket: String,
    prefix: String,
    identity: String,
}

/// Gives `object_store` the client that has our TLS and time-outs and follows no redirects.
#[derive(Debug)]
struct OurClient(reqwest::Client);

impl HttpConnector for OurClient {
    fn connect(&self, _: &ClientOptions) -> object_store::Result<HttpClient> {
        Ok(HttpClient::new(self.0.clone()))
    }
}

impl S3 {
    pub fn new(
        bucket: &str,
        prefix: &str,
        credentials: &Credentials,
        options: &Options,
    ) -> Result<Self, SourceError> {
        let endpoint = ["AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "AWS_ENDPOINT"]
            .iter()
            .find_map(|key| credentials.get(key));
        let plain = check_endpoint(endpoint, options, credentials)?;
        if endpoint.is_some() && !IDENTITIES.iter().any(|key| credentials.get(key).is_some()) {
            // Else the node's metadata service would be asked, which knows AWS alone, for minutes.
            return Err(SourceError::Unauthorized {
                what: format!("s3://{bucket}/{prefix}"),
                next: "there are no credentials: name a Secret in `secretRef` with AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY (or AWS_SKIP_SIGNATURE=true for a public bucket)".into(),
            });
        }
        let retry = RetryConfig {
            backoff: BackoffConfig {
                init_backoff: options.retry.first,
                max_backoff: options.retry.longest,
                base: 2.0,
            },
            max_retries: options.retry.retries as usize,
            ..RetryConfig::default()
        };
        let mut builder = AmazonS3Builder::new().with_retry(retry);
        for (key, value) in credentials.aws() {
            // Keys that only other SDKs know are no error: a Secret is often shared.
            if let Ok(key) = AmazonS3ConfigKey::from_str(&key.to_ascii_lowercase()) {
                builder = builder.with_config(key, value);
            }
        }
        // The answer to a part comes only when the part is sent, so silence lasts longer than in a download.
        let silence = options.stall_timeout.saturating_mul(4);
        let store = builder
            .with_bucket_name(bucket)
            .with_allow_http(plain)
            .with_http_connector(OurClient(http::client(options, Some(silence))?))
            .build()
            .map_err(|e| explain(e, bucket))?;
        let identity = format!("s3://{bucket}/{prefix} at {}", endpoint.unwrap_or("aws"));
        Ok(Self { store: Arc::new(store), bucket: bucket.into(), prefix: prefix.into(), identity })
    }

    /// The objects of a manifest, or those directly below the prefix; or the one object that the address names.
    pub async fn list(&self, options: &Options) -> Result<Listing, SourceError> {
        let name = names::last(&self.prefix);
        let single = names::check_single(&self.shown(), name);
        if let Err(refused @ SourceError::PickleRefused { .. }) = single {
            return Err(refused);
        }
        if single.is_ok() {
            let head = self.store.head(&self.key("")?).await;
            match head.map_err(|e| explain(e, &self.shown())) {
                Ok(meta) => {
                    let file = found(name.into(), meta.size, meta.e_tag);
                    return Ok(Listing { single: true, ..self.listing(vec![file], None) });
                }
                Err(SourceError::NotFound { .. }) => {}
                Err(error) => return Err(error),
            }
        }
        let prefix = self.key("")?;
        let listed =
            self.store.list_with_delimiter(Some(&prefix)).await.map_err(|e| explain(e, &self.shown()))?;
        let objects: Vec<_> = listed
            .objects
            .into_iter()
            .filter_map(|meta| Some((meta.location.filename()?.to_string(), meta.size, meta.e_tag)))
            .collect();
        let has = |name: &str| objects.iter().any(|o| o.0 == name);
        let mark = if has(publish::UNFINISHED) { self.mark().await? } else { None };
        if mark.is_some() && !has(MANIFEST) {
            return Err(SourceError::Incomplete { what: self.shown() });
        }
        if has(MANIFEST) {
            let file = RemoteFile { path: MANIFEST.into(), size: None, sha256: None, validator: None };
            let bytes =
                read_small(options, &file, manifest::MAX_BYTES, |to| self.read(false, &file, 0, Some(to)))
                    .await?;
            let (files, digest) = from_manifest(&bytes)?;
            // The mark of a writer with the same content: what is there is whole, and only replaced by its equal.
            if mark.is_some_and(|mark| mark != digest.to_string()) {
                return Err(SourceError::Incomplete { what: self.shown() });
            }
            return Ok(self.listing(files, Some(digest)));
        }
        if objects.is_empty() {
            return Err(SourceError::NotFound {
                what: self.shown(),
                next: "no object is below this prefix: check the bucket, the prefix and the endpoint".into(),
            });
        }
        let chosen = names::select(&self.shown(), objects, |o| &o.0)?;
        let files: Vec<RemoteFile> =
            chosen.into_iter().map(|(name, size, tag)| found(name, size, tag)).collect();
        for file in &files {
            names::check_path(&file.path)?;
        }
        Ok(self.listing(files, None))
    }

    /// What the mark of an unfinished upload says: the digest of what is being written.
    pub async fn mark(&self) -> Result<Option<String>, SourceError> {
        match self.store.get(&self.key(publish::UNFINISHED)?).await {
            Ok(got) if got.meta.size > 1024 => Ok(Some(String::new())),
            Ok(got) => {
                let bytes = got.bytes().await.map_err(|e| explain(e, &self.shown()))?;
                Ok(Some(String::from_utf8_lossy(&bytes).into_owned()))
            }
            Err(object_store::Error::NotFound { .. }) => Ok(None),
            Err(error) => Err(explain(error, &self.shown())),
        }
    }

    /// Bytes of an object; `single` where the address is the object itself.
    pub async fn read(
        &self,
        single: bool,
        file: &RemoteFile,
        from: u64,
        to: Option<u64>,
    ) -> Result<Body, SourceError> {
        let key = if single { self.key("")? } else { self.key(&file.path)? };
        let range = match to {
            Some(to) => Some(GetRange::Bounded(from..to.saturating_add(1))),
            None if from > 0 => Some(GetRange::Offset(from)),
            None => None,
        };
        let ask = GetOptions { range, if_match: file.validator.clone(), ..GetOptions::default() };
        let what = format!("s3://{}/{key}", self.bucket);
        let got = self.store.get_opts(&key, ask).await.map_err(|e| explain(e, &what))?;
        let (start, total, validator) = (got.range.start, Some(got.meta.size), got.meta.e_tag.clone());
        let stream = got.into_stream().map(move |chunk| chunk.map_err(|e| explain(e, &what)));
        Ok(Body { start, total, validator, stream: stream.boxed() })
    }

    /// The object `name` below the prefix, or the prefix itself.
    pub fn key(&self, name: &str) -> Result<Path, SourceError> {
        let text = if name.is_empty() { self.prefix.clone() } else { format!("{}/{name}", self.prefix) };
        Path::parse(&text)
            .map_err(|e| SourceError::InvalidLocation { uri: self.shown(), problem: e.to_string() })
    }

    /// The address for messages.
    pub fn shown(&self) -> String {
        format!("s3://{}/{}", self.bucket, self.prefix)
    }

    fn listing(&self, files: Vec<RemoteFile>, digest: Option<crate::Digest>) -> Listing {
        let immutable = files.iter().all(|f| f.validator.is_some() || f.sha256.is_some());
        Listing { files, identity: self.identity.clone(), revision: None, immutable, digest, single: false }
    }
}

/// An object as a file. Its tag is a validator only where it is strong.
fn found(path: String, size: u64, tag: Option<String>) -> RemoteFile {
    RemoteFile { path, size: Some(size), sha256: None, validator: tag.filter(|t| !t.starts_with("W/")) }
}

/// Whether plain http is right for this endpoint.
fn check_endpoint(
    endpoint: Option<&str>,
    options: &Options,
    credentials: &Credentials,
) -> Result<bool, SourceError> {
    let Some(endpoint) = endpoint else { return Ok(false) };
    let invalid =
        |problem: &str| SourceError::InvalidLocation { uri: printable(endpoint), problem: problem.into() };
    let url = Url::parse(endpoint).map_err(|_| invalid("AWS_ENDPOINT_URL must be a URL"))?;
    match url.scheme() {
        "https" => Ok(false),
        "http"
            if http::is_loopback(&url)
                || options.allow_http
                || credentials.get("AWS_ALLOW_HTTP") == Some("true") =>
        {
            Ok(true)
        }
        _ => Err(invalid(
            "AWS_ENDPOINT_URL must be https:// (http:// only to this machine, or with AWS_ALLOW_HTTP=true)",
        )),
    }
}

/// The store's error with its next step.
pub(crate) fn explain(error: object_store::Error, what: &str) -> SourceError {
    use object_store::Error;
    let what = what.to_string();
    let credentials =
        "check AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_REGION and that they may read (and write) it";
    match &error {
        Error::NotFound { .. } => {
            SourceError::NotFound { what, next: "check the bucket, the name and AWS_ENDPOINT_URL".into() }
        }
        Error::PermissionDenied { .. } | Error::Unauthenticated { .. } => {
            SourceError::Unauthorized { what, next: credentials.into() }
        }
        Error::Precondition { .. } | Error::NotModified { .. } => SourceError::Changed { what },
        Error::AlreadyExists { .. } => {
            SourceError::AlreadyExists { what, problem: "somebody else writes there".into() }
        }
        Error::InvalidPath { .. } => SourceError::InvalidLocation { uri: what, problem: error.to_string() },
        _ => {
            // The crate keeps the status of other answers, and of listings, only in its text.
            let cause = printable(&http::chain(&error));
            match status(&cause) {
                Some(404) => {
                    SourceError::NotFound { what, next: "check the bucket and AWS_ENDPOINT_URL".into() }
                }
                Some(401 | 403) => SourceError::Unauthorized { what, next: credentials.into() },
                Some(412) => SourceError::Changed { what },
                Some(400..=407 | 409..=424 | 426..=428 | 430..=499 | 501) => {
                    SourceError::Refused { what, cause }
                }
                _ if cause.contains("redirect without LOCATION") => SourceError::Refused {
                    what,
                    cause: "the bucket is in another region: set AWS_REGION".into(),
                },
                _ => SourceError::unreachable(what, cause),
            }
        }
    }
}

/// `... status code: 404 Not Found ...`
fn status(cause: &str) -> Option<u16> {
    cause.split_once("status code: ")?.1.get(..3)?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use rstest::rstest;

    #[rstest]
    #[case(None, Some(false))]
    #[case(Some("https://s3.example"), Some(false))]
    #[case(Some("http://127.0.0.1:9000"), Some(true))]
    #[case(Some("http://minio:9000"), None)]
    #[case(Some("minio:9000"), None)]
    fn plain_http_only_to_this_machine(#[case] endpoint: Option<&str>, #[case] plain: Option<bool>) {
        let options = Options::new("cache");
        assert_eq!(check_endpoint(endpoint, &options, &Credentials::default()).ok(), plain);
    }

    #[test]
    fn plain_http_where_the_secret_allows_it() {
        let credentials = Credentials::default().with("AWS_ALLOW_HTTP", "true");
        assert!(check_endpoint(Some("http://minio:9000"), &Options::new("cache"), &credentials).unwrap());
    }
}
