//! Pushing to a registry by the OCI distribution protocol.

use std::net::Ipv4Addr;
use std::time::Duration;
use std::{env, fs};

use anyhow::{Context, Result, bail, ensure};
use serde_json::Value;
use ureq::http::{Method, Request, Response, StatusCode, header};
use ureq::{Agent, Body};

use super::oci::{Blob, Image};

/// A registry, and how this user is known to it.
pub struct Registry {
    host: String,
    agent: Agent,
    /// `Basic` credentials of `docker login`, if there are any.
    login: Option<String>,
    /// The `Authorization` that the registry took last.
    authorization: Option<String>,
}

impl Registry {
    /// The registry of `HOST[:PORT]/PATH`, with the login that `docker login` left. Plain HTTP is spoken
    /// to this machine and to private IPv4 addresses, TLS to all others.
    pub fn of(destination: &str) -> Self {
        let host = destination.split('/').next().unwrap_or(destination);
        Self::with_login(host, login(host))
    }

    /// The registry of `HOST[:PORT]`, with base64 of `user:password`.
    pub fn with_login(host: &str, login: Option<String>) -> Self {
        let config = Agent::config_builder()
            .http_status_as_error(false)
            .timeout_connect(Some(Duration::from_secs(20)))
            .timeout_global(Some(Duration::from_secs(600)));
        Self { host: host.to_owned(), agent: config.build().new_agent(), login, authorization: None }
    }

    /// Uploads what the registry lacks of the image and tags it.
    ///
    /// # Errors
    /// The registry cannot be reached or refuses; the text has its words.
    pub fn push(&mut self, image: &Image) -> Result<()> {
        let (repository, tag) = image
            .reference
            .strip_prefix(&self.host)
            .and_then(|rest| rest.strip_prefix('/')?.rsplit_once(':'))
            .with_context(|| format!("{} is no image of {}", image.reference, self.host))?;
        for blob in [&image.config, &image.layer] {
            self.upload(repository, blob)
                .with_context(|| format!("cannot upload {} to {}", blob.digest, self.host))?;
        }
        let url = format!("{}/v2/{repository}/manifests/{tag}", self.base());
        let manifest = &image.manifest;
        let answer = self.send(&Method::PUT, &url, manifest.media_type, &manifest.bytes)?;
        expect(answer, StatusCode::CREATED, &url)?;
        Ok(())
    }

    fn upload(&mut self, repository: &str, blob: &Blob) -> Result<()> {
        let url = format!("{}/v2/{repository}/blobs/{}", self.base(), blob.digest);
        if self.send(&Method::HEAD, &url, "", &[])?.status() == StatusCode::OK {
            return Ok(());
        }
        let url = format!("{}/v2/{repository}/blobs/uploads/", self.base());
        let answer = self.send(&Method::POST, &url, "", &[])?;
        let answer = expect(answer, StatusCode::ACCEPTED, &url)?;
        let location = answer.headers().get(header::LOCATION).and_then(|text| text.to_str().ok());
        let location = location.context("the registry names no place to upload to")?;
        let url = upload_url(&self.base(), location, &blob.digest);
        let answer = self.send(&Method::PUT, &url, "application/octet-stream", &blob.bytes)?;
        expect(answer, StatusCode::CREATED, &url)?;
        Ok(())
    }

    /// Sends a request; once more with credentials if the registry asks for them.
    fn send(&mut self, method: &Method, url: &str, media_type: &str, body: &[u8]) -> Result<Response<Body>> {
        let answer = self.send_once(method, url, media_type, body)?;
        if answer.status() != StatusCode::UNAUTHORIZED {
            return Ok(answer);
        }
        let challenge = answer.headers().get(header::WWW_AUTHENTICATE);
        let challenge = challenge.and_then(|text| text.to_str().ok()).unwrap_or_default().to_owned();
        self.authorization = Some(self.answer_to(&challenge)?);
        self.send_once(method, url, media_type, body)
    }

    fn send_once(&self, method: &Method, url: &str, media_type: &str, body: &[u8]) -> Result<Response<Body>> {
        let mut request = Request::builder().method(method.clone()).uri(url);
        if !media_type.is_empty() {
            request = request.header(header::CONTENT_TYPE, media_type);
        }
        if let Some(authorization) = &self.authorization {
            request = request.header(header::AUTHORIZATION, authorization);
        }
        let answer = if *method == Method::HEAD {
            self.agent.run(request.body(())?)
        } else {
            self.agent.run(request.body(body)?)
        };
        answer.with_context(|| format!("cannot reach {}", self.host))
    }

    /// The `Authorization` that a challenge asks for.
    fn answer_to(&self, challenge: &str) -> Result<String> {
        let no_login = || format!("{0} wants a login: run docker login {0}", self.host);
        if challenge.starts_with("Basic") {
            return Ok(format!("Basic {}", self.login.as_ref().with_context(no_login)?));
        }
        let realm = parameter(challenge, "realm").with_context(no_login)?;
        let mut request = self.agent.get(realm);
        for name in ["service", "scope"] {
            if let Some(value) = parameter(challenge, name) {
                request = request.query(name, value);
            }
        }
        if let Some(login) = &self.login {
            request = request.header(header::AUTHORIZATION, format!("Basic {login}"));
        }
        let answer = request.call().with_context(|| format!("cannot reach {realm}"))?;
        let text = expect(answer, StatusCode::OK, realm)?.body_mut().read_to_string()?;
        let answer: Value = serde_json::from_str(&text)?;
        let token = answer["token"].as_str().or(answer["access_token"].as_str());
        Ok(format!("Bearer {}", token.with_context(|| format!("{realm} gives no token"))?))
    }

    fn base(&self) -> String {
        let scheme = if is_near(&self.host) { "http" } else { "https" };
        format!("{scheme}://{}", self.host)
    }
}

/// Whether plain HTTP will do.
fn is_near(host: &str) -> bool {
    let name = host.split(':').next().unwrap_or(host);
    let address: Option<Ipv4Addr> = name.parse().ok();
    name == "localhost" || address.is_some_and(|it| it.is_loopback() || it.is_private())
}

fn upload_url(base: &str, location: &str, digest: &str) -> String {
    let host = if location.starts_with('/') { base } else { "" };
    let joint = if location.contains('?') { '&' } else { '?' };
    format!("{host}{location}{joint}digest={digest}")
}

/// The value of `name="value"` in a challenge.
fn parameter<'a>(challenge: &'a str, name: &str) -> Option<&'a str> {
    let key = format!("{name}=\"");
    let at = challenge.match_indices(&key).find(|(at, _)| {
        // Not the end of a longer name.
        matches!(challenge[..*at].chars().next_back(), Some(' ' | ','))
    });
    let rest = &challenge[at?.0 + key.len()..];
    Some(&rest[..rest.find('"')?])
}

fn expect(mut answer: Response<Body>, status: StatusCode, url: &str) -> Result<Response<Body>> {
    if answer.status() == status {
        return Ok(answer);
    }
    let said = answer.body_mut().read_to_string().unwrap_or_default();
    bail!("{url} answers {}: {}", answer.status(), said.chars().take(500).collect::<String>())
}

/// What `docker login` left for a host: base64 of `user:password`.
fn login(host: &str) -> Option<String> {
    let folder = env::var_os("DOCKER_CONFIG").map(Into::into);
    let folder = folder.or_else(|| Some(env::home_dir()?.join(".docker")))?;
    let config: Value = serde_json::from_slice(&fs::read(folder.join("config.json")).ok()?).ok()?;
    config["auths"][host]["auth"].as_str().map(str::to_owned)
}

/// # Errors
/// `destination` is not `HOST/PATH` in lower case, without tag or scheme.
pub fn checked(destination: &str) -> Result<&str> {
    let path = destination.split_once('/').map(|(_, path)| path).unwrap_or_default();
    let allowed = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || "._-/".contains(c);
    ensure!(
        !path.is_empty() && !path.starts_with('/') && !path.ends_with('/') && path.chars().all(allowed),
        "--registry is HOST/PATH or HOST:PORT/PATH in lower case, such as ghcr.io/me; \
         {destination:?} is not"
    );
    Ok(destination)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn uploads_go_where_the_registry_says() {
        let url = |location| upload_url("https://r.example", location, "sha256:ab");
        assert_eq!(url("/v2/a/u/1"), "https://r.example/v2/a/u/1?digest=sha256:ab");
        assert_eq!(url("https://s.example/u?x=1"), "https://s.example/u?x=1&digest=sha256:ab");
    }

    #[test]
    fn a_challenge_is_read_by_whole_names() {
        let challenge = r#"Bearer realm="https://a.example/t",service="r, s",xscope="no",scope="s:p""#;
        assert_eq!(parameter(challenge, "realm"), Some("https://a.example/t"));
        assert_eq!(parameter(challenge, "service"), Some("r, s"));
        assert_eq!(parameter(challenge, "scope"), Some("s:p"));
        assert_eq!(parameter("Bearer realm=\"x", "realm"), None);
    }

    #[test]
    fn plain_http_stays_near() {
        for near in ["localhost:5000", "127.0.0.1:5000", "10.201.0.1:5000"] {
            assert!(is_near(near), "{near}");
        }
        for far in ["ghcr.io", "8.8.8.8", "localhost.example.com"] {
            assert!(!is_near(far), "{far}");
        }
    }

    #[test]
    fn destinations_that_name_no_folder_are_refused() {
        for bad in ["ghcr.io", "ghcr.io/", "https://ghcr.io/a", "ghcr.io/a:1", "ghcr.io/A", ""] {
            assert!(checked(bad).is_err(), "{bad:?}");
        }
        assert!(checked("10.0.0.1:5000/a/b").is_ok());
    }
}
