//! `hf://`: the Hugging Face hub's protocol, pinned to a commit before the first byte is read.
use reqwest::Url;
use reqwest::header::{HeaderMap, HeaderValue};
use serde::Deserialize;

use crate::credentials::Credentials;
use crate::digest::parse_hash;
use crate::error::SourceError;
use crate::http::{Answer, Ask, Http, shown};
use crate::location::HubAddress;
use crate::names;
use crate::options::Options;
use crate::remote::{Body, Listing, RemoteFile, collect, http_body};
use crate::web::secret_header;

const MAX_LISTING: u64 = 32 << 20;
const DEFAULT_ENDPOINT: &str = "https://huggingface.co";

pub(crate) struct Hub {
    http: Http,
    address: HubAddress,
    endpoint: Url,
    auth: Option<HeaderValue>,
}

/// `GET /api/models/{repo}/revision/{rev}?blobs=true`, what is used of it.
#[derive(Deserialize)]
struct Repo {
    sha: String,
    #[serde(default)]
    siblings: Vec<Sibling>,
}

#[derive(Deserialize)]
struct Sibling {
    rfilename: String,
    size: Option<u64>,
    lfs: Option<Lfs>,
}

#[derive(Deserialize)]
struct Lfs {
    sha256: Option<String>,
    size: Option<u64>,
}

impl Hub {
    pub fn new(
        address: &HubAddress,
        credentials: &Credentials,
        options: &Options,
    ) -> Result<Self, SourceError> {
        let endpoint = credentials.get("HF_ENDPOINT").unwrap_or(DEFAULT_ENDPOINT);
        let endpoint = Url::parse(endpoint).ok().filter(|url| url.has_host()).ok_or_else(|| {
            SourceError::InvalidLocation {
                uri: crate::error::printable(endpoint),
                problem: "HF_ENDPOINT must be the hub's URL".into(),
            }
        })?;
        let token = credentials.get("HF_TOKEN").or(credentials.get("token"));
        let auth = token.map(|token| secret_header(&format!("Bearer {token}"))).transpose()?;
        Ok(Self { http: Http::new(options)?, address: address.clone(), endpoint, auth })
    }

    /// The commit of the revision, and the files at it.
    pub async fn list(&self, options: &Options) -> Result<Listing, SourceError> {
        let kind = if self.address.dataset { "datasets" } else { "models" };
        let mut url = self.below(&["api", kind], &self.address.repo);
        push(&mut url, ["revision", &self.address.revision]);
        url.set_query(Some("blobs=true"));
        let repo = self.describe(&url, options).await?;
        if !is_commit(&repo.sha) {
            return Err(SourceError::malformed(shown(&url), "`sha` must be a commit of 40 hex digits"));
        }
        let files = self.chosen(repo.siblings)?;
        let mut listed = Vec::with_capacity(files.len());
        for file in files {
            names::check_path(&file.rfilename)?;
            let lfs = file.lfs.as_ref();
            let found = RemoteFile {
                sha256: lfs.and_then(|l| parse_hash(l.sha256.as_deref()?)),
                size: lfs.and_then(|l| l.size).or(file.size),
                path: file.rfilename,
                validator: None,
            };
            listed.push(if found.size.is_some() { found } else { self.probe(&repo.sha, found).await? });
        }
        let identity = format!("{}{kind}/{}@{}", self.endpoint, self.address.repo, repo.sha);
        Ok(Listing {
            files: listed,
            identity,
            revision: Some(repo.sha),
            immutable: true,
            digest: None,
            single: self.address.file.is_some(),
        })
    }

    pub async fn read(
        &self,
        listing: &Listing,
        file: &RemoteFile,
        from: u64,
        to: Option<u64>,
    ) -> Result<Body, SourceError> {
        let commit = listing.revision.as_deref().unwrap_or(&self.address.revision);
        let range = (from > 0 || to.is_some()).then_some((from, to));
        let answer = self.get(&self.resolve(commit, &file.path), &Ask { range, ..Ask::default() }).await?;
        // Bytes are checked by sha256; the tag of the store behind the redirect is its own and may differ between tries.
        Ok(Body { validator: None, ..http_body(answer, &file.path)? })
    }

    async fn describe(&self, url: &Url, options: &Options) -> Result<Repo, SourceError> {
        let what = shown(url);
        let body = http_body(self.get(url, &Ask::default()).await?, &what)?;
        let file = RemoteFile { path: what.clone(), size: None, sha256: None, validator: None };
        let bytes = collect(body, &file, 0, MAX_LISTING, options).await?;
        serde_json::from_slice(&bytes).map_err(|e| SourceError::malformed(what, e.to_string()))
    }

    fn chosen(&self, all: Vec<Sibling>) -> Result<Vec<Sibling>, SourceError> {
        let what = format!("hf://{}", self.address.repo);
        let Some(name) = &self.address.file else {
            return names::select(&what, all, |f| &f.rfilename);
        };
        names::check_single(&what, names::last(name))?;
        let file = all.into_iter().find(|f| &f.rfilename == name);
        file.map(|f| vec![f]).ok_or_else(|| SourceError::NotFound {
            what: format!("{what}/{name}"),
            next: "check the file's name and the revision".into(),
        })
    }

    /// Size and sha256 from the headers of the file, for hubs whose listing has none.
    async fn probe(&self, commit: &str, file: RemoteFile) -> Result<RemoteFile, SourceError> {
        let ask = Ask { range: Some((0, Some(0))), ..Ask::default() };
        let answer = match self.get(&self.resolve(commit, &file.path), &ask).await {
            Err(SourceError::Changed { .. }) => return Ok(RemoteFile { size: Some(0), ..file }),
            answer => answer?,
        };
        let linked = linked(&answer);
        if linked.commit.is_some_and(|c| c != commit) {
            return Err(SourceError::Changed { what: file.path });
        }
        let total = http_body(answer, &file.path)?.total;
        Ok(RemoteFile { size: linked.size.or(total), sha256: linked.sha256, ..file })
    }

    async fn get(&self, url: &Url, ask: &Ask) -> Result<Answer, SourceError> {
        let ask = Ask { auth: self.auth.clone(), ..ask.clone() };
        self.http.get(url, &ask).await.map_err(|error| self.explain(error))
    }

    fn resolve(&self, commit: &str, path: &str) -> Url {
        let kind: &[&str] = if self.address.dataset { &["datasets"] } else { &[] };
        let mut url = self.below(kind, &self.address.repo);
        push(&mut url, ["resolve", commit]);
        push(&mut url, path.split('/'));
        url
    }

    fn below(&self, first: &[&str], repo: &str) -> Url {
        let mut url = self.endpoint.clone();
        push(&mut url, first.iter().copied().chain(repo.split('/')));
        url
    }

    /// The same error with the next step of somebody who uses a hub.
    fn explain(&self, error: SourceError) -> SourceError {
        let repo = format!("hf://{}", self.address.repo);
        let page = shown(&self.below(&[], &self.address.repo));
        match error {
            SourceError::Gated { .. } if self.auth.is_some() => SourceError::Gated {
                repo,
                next: format!("accept its terms at {page} with the account that the token belongs to, then try again"),
            },
            SourceError::Gated { .. } => SourceError::Gated {
                repo,
                next: format!("accept its terms at {page}, then name a Secret in `secretRef` whose key HF_TOKEN holds a token of that account"),
            },
            SourceError::Unauthorized { .. } if self.auth.is_some() => SourceError::Unauthorized {
                what: repo,
                next: format!("the token is invalid or may not read it: check HF_TOKEN and that {page} opens for its account"),
            },
            SourceError::Unauthorized { .. } => SourceError::Unauthorized {
                what: repo,
                next: "it is private or does not exist: check the name, or name a Secret in `secretRef` whose key HF_TOKEN holds a token".into(),
            },
            SourceError::NotFound { .. } => SourceError::NotFound {
                what: format!("{repo} at revision `{}`", self.address.revision),
                next: "check the name and the revision".into(),
            },
            other => other,
        }
    }
}

struct Linked {
    commit: Option<String>,
    size: Option<u64>,
    sha256: Option<crate::digest::FileHash>,
}

/// The hub's own headers; on the answer before a redirect to its store, or on the last one where there is none.
fn linked(answer: &Answer) -> Linked {
    let both = [&answer.origin, answer.response.headers()];
    let find =
        |name: &str| both.iter().find_map(|h: &&HeaderMap| h.get(name)?.to_str().ok().map(str::to_string));
    Linked {
        commit: find("x-repo-commit"),
        size: find("x-linked-size").and_then(|s| s.parse().ok()),
        sha256: find("x-linked-etag").and_then(|tag| parse_hash(tag.trim_matches('"'))),
    }
}

fn is_commit(text: &str) -> bool {
    text.len() == 40 && text.bytes().all(|b| b.is_ascii_hexdigit())
}

/// Adds path parts, each percent-encoded (`refs/pr/1` is one part).
fn push<'a>(url: &mut Url, parts: impl IntoIterator<Item = &'a str>) {
    if let Ok(mut path) = url.path_segments_mut() {
        path.pop_if_empty().extend(parts);
    }
}
