//! `https://`: one file by its URL, or a folder where the usual names are looked for.
use std::collections::{BTreeMap, BTreeSet};

use base64::Engine as _;
use base64::prelude::BASE64_STANDARD as BASE64;
use reqwest::Url;
use reqwest::header::HeaderValue;

use crate::attempt;
use crate::credentials::Credentials;
use crate::error::SourceError;
use crate::http::{Ask, Http, shown};
use crate::manifest::{self, MANIFEST};
use crate::names;
use crate::options::Options;
use crate::remote::{Body, Listing, RemoteFile, from_manifest, http_body, read_small};

/// Looked for in a folder that has no manifest. HTTP has no listing.
const USUAL: [&str; 11] = [
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "adapter_config.json",
    "adapter_model.safetensors",
    "model.safetensors",
    "README.md",
    "LICENSE",
];
const INDEX: &str = "model.safetensors.index.json";
const MAX_INDEX: u64 = 16 << 20;

pub(crate) struct Web {
    http: Http,
    url: Url,
    auth: Option<HeaderValue>,
    /// The name where the URL is one file.
    single: Option<String>,
}

impl Web {
    pub fn new(url: &Url, credentials: &Credentials, options: &Options) -> Result<Self, SourceError> {
        let name = names::last(url.path());
        let single = names::check_path(name).and_then(|()| names::check_single(&shown(url), name));
        let single = match single {
            Ok(()) => Some(name.to_string()),
            Err(refused @ SourceError::PickleRefused { .. }) => return Err(refused),
            Err(_) => None,
        };
        Ok(Self { http: Http::new(options)?, url: url.clone(), auth: authorization(credentials)?, single })
    }

    pub async fn list(&self, options: &Options) -> Result<Listing, SourceError> {
        if let Some(name) = &self.single {
            let file = attempt::retry(options, || self.probe(name)).await?;
            return Ok(self.listing(vec![file], None));
        }
        let mut refused = None;
        if let Some(file) = self.optional(MANIFEST, options, &mut refused).await? {
            let bytes = self.small(&file, manifest::MAX_BYTES, options).await?;
            let (files, digest) = from_manifest(&bytes)?;
            return Ok(self.listing(files, Some(digest)));
        }
        let mut files = Vec::new();
        let mut wanted: BTreeSet<String> = USUAL.into_iter().map(Into::into).collect();
        if let Some(index) = self.optional(INDEX, options, &mut refused).await? {
            wanted.extend(shards(&self.small(&index, MAX_INDEX, options).await?)?);
            files.push(index);
        }
        for name in wanted {
            files.extend(self.optional(&name, options, &mut refused).await?);
        }
        if files.is_empty() {
            return Err(refused.unwrap_or_else(|| SourceError::NotFound {
                what: format!("a model or adapter at {}", shown(&self.url)),
                next: "there is neither lathe-manifest.json nor config.json below it; the address of one file must end in .jsonl or .safetensors".into(),
            }));
        }
        Ok(self.listing(files, None))
    }

    pub async fn read(&self, file: &RemoteFile, from: u64, to: Option<u64>) -> Result<Body, SourceError> {
        let range = (from > 0 || to.is_some()).then_some((from, to));
        let if_range = file.validator.clone().filter(|_| from > 0);
        let ask = Ask { auth: self.auth.clone(), range, if_range };
        http_body(self.http.get(&self.at(&file.path), &ask).await?, &file.path)
    }

    fn listing(&self, files: Vec<RemoteFile>, digest: Option<crate::Digest>) -> Listing {
        let immutable = files.iter().all(|f| f.validator.is_some() || f.sha256.is_some());
        Listing {
            files,
            identity: self.url.to_string(),
            revision: None,
            immutable,
            digest,
            single: self.single.is_some(),
        }
    }

    fn at(&self, path: &str) -> Url {
        let mut url = self.url.clone();
        if self.single.is_none()
            && let Ok(mut parts) = url.path_segments_mut()
        {
            parts.pop_if_empty().extend(path.split('/'));
        }
        url
    }

    /// Size and validator by asking for one byte: unlike HEAD, a signed URL and every static server answers that.
    async fn probe(&self, path: &str) -> Result<RemoteFile, SourceError> {
        let file = RemoteFile { path: path.into(), size: None, sha256: None, validator: None };
        match self.read(&file, 0, Some(0)).await {
            Ok(body) => Ok(RemoteFile { size: body.total, validator: body.validator, ..file }),
            // No first byte: the file is empty.
            Err(SourceError::Changed { .. }) => Ok(RemoteFile { size: Some(0), ..file }),
            Err(error) => Err(error),
        }
    }

    /// A file that need not be there. Object stores say 403 for a missing name to those who may not list, so a refusal
    /// counts as absent, and is remembered for the case that nothing is there.
    async fn optional(
        &self,
        path: &str,
        options: &Options,
        refused: &mut Option<SourceError>,
    ) -> Result<Option<RemoteFile>, SourceError> {
        match attempt::retry(options, || self.probe(path)).await {
            Ok(file) => Ok(Some(file)),
            Err(SourceError::NotFound { .. }) => Ok(None),
            Err(error @ SourceError::Unauthorized { .. }) => {
                *refused = Some(error);
                Ok(None)
            }
            Err(error) => Err(error),
        }
    }

    async fn small(&self, file: &RemoteFile, limit: u64, options: &Options) -> Result<Vec<u8>, SourceError> {
        read_small(options, file, limit, |to| self.read(file, 0, Some(to))).await
    }
}

/// The files that an index names.
fn shards(index: &[u8]) -> Result<Vec<String>, SourceError> {
    #[derive(serde::Deserialize)]
    struct Index {
        weight_map: BTreeMap<String, String>,
    }
    let index: Index =
        serde_json::from_slice(index).map_err(|e| SourceError::malformed(INDEX, e.to_string()))?;
    let names: BTreeSet<String> = index.weight_map.into_values().collect();
    for name in &names {
        names::check_path(name)?;
        names::check_single(INDEX, name)?;
    }
    Ok(names.into_iter().collect())
}

/// `token`, or `username` and `password`.
fn authorization(credentials: &Credentials) -> Result<Option<HeaderValue>, SourceError> {
    let text = match (credentials.get("token"), credentials.get("username"), credentials.get("password")) {
        (Some(token), _, _) => format!("Bearer {token}"),
        (None, Some(user), Some(password)) => {
            format!("Basic {}", BASE64.encode(format!("{user}:{password}")))
        }
        _ => return Ok(None),
    };
    secret_header(&text).map(Some)
}

/// A header value that is never printed.
pub(crate) fn secret_header(text: &str) -> Result<HeaderValue, SourceError> {
    let mut value = HeaderValue::from_str(text).map_err(|_| SourceError::InvalidCredentials {
        path: "secretRef".into(),
        problem: "a token or password must be visible ASCII".into(),
    })?;
    value.set_sensitive(true);
    Ok(value)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_index_names_only_safe_weights() {
        assert_eq!(
            shards(br#"{"weight_map":{"a":"m-1.safetensors","b":"m-1.safetensors"}}"#).unwrap(),
            ["m-1.safetensors"]
        );
        for bad in [r#"{"weight_map":{"a":"../m.safetensors"}}"#, r#"{"weight_map":{"a":"m.bin"}}"#, "[]"] {
            assert!(shards(bad.as_bytes()).is_err(), "{bad}");
        }
    }
}
