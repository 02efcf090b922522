//! What a task reads and writes, as volumes of its pod.
use std::collections::{BTreeMap, BTreeSet};

use k8s_openapi::api::core::v1::{
    PersistentVolumeClaimVolumeSource, SecretVolumeSource, Volume, VolumeMount,
};
use lathe_api::Location;
use lathe_contract::SourceRef;

/// Folder under which PersistentVolumeClaims are mounted, each under its name.
pub const VOLUMES: &str = "/lathe/volumes";
/// Folder under which Secrets are mounted, each under its name.
pub const SECRETS: &str = "/lathe/secrets";
/// Folder for downloads.
pub const CACHE: &str = "/lathe/cache";

/// How a pod uses a location.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Use {
    /// It reads: the claim is mounted read-only.
    Read,
    /// It writes.
    Write,
}

/// Claims and Secrets of a pod, collected from the locations of its task.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Mounts {
    /// Name of each claim, and whether it is written.
    claims: BTreeMap<String, bool>,
    secrets: Vec<String>,
    /// Claims that only one node can mount at a time.
    one_node: BTreeSet<String>,
}

/// Why a location cannot be mounted.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum LocationError {
    /// `pvc://` without a usable claim.
    #[error(
        "`uri` must be pvc://<claim>/<path>, where <claim> is the name of a PersistentVolumeClaim of this namespace (found {0})"
    )]
    Claim(String),
    /// A Secret's name that is none.
    #[error("`secretRef.name` must be the name of a Secret of this namespace (found {0})")]
    Secret(String),
}

impl Mounts {
    /// The location as the pod will see it; remembers what must be mounted for it.
    ///
    /// # Errors
    /// [`LocationError`] where the claim or the Secret has no valid name.
    pub fn source(&mut self, location: &Location, used: Use) -> Result<SourceRef, LocationError> {
        if let Some(claim) = claim(location)? {
            *self.claims.entry(claim.to_owned()).or_default() |= used == Use::Write;
        }
        let secret_dir = match &location.secret_ref {
            None => None,
            Some(secret) if !is_object_name(&secret.name) => {
                return Err(LocationError::Secret(secret.name.clone()));
            }
            Some(secret) => {
                if let Err(place) = self.secrets.binary_search(&secret.name) {
                    self.secrets.insert(place, secret.name.clone());
                }
                Some(format!("{SECRETS}/{}", secret.name))
            }
        };
        Ok(SourceRef {
            uri: location.uri.clone(),
            revision: location.revision.clone(),
            digest: location.digest.clone(),
            secret_dir,
        })
    }

    /// True where a pod with these mounts can read `location` as it is: nothing more would be mounted.
    #[must_use]
    pub fn cover(&self, location: &Location) -> bool {
        let mut more = self.clone();
        more.source(location, Use::Read).is_ok() && more == *self
    }

    /// Says which claims only one node can mount at a time (ReadWriteOnce): pods that share one are placed on one node.
    pub fn on_one_node(&mut self, claims: &BTreeSet<String>) {
        self.one_node = self.claims.keys().filter(|claim| claims.contains(*claim)).cloned().collect();
    }

    /// The claims that only one node can mount at a time.
    pub fn one_node(&self) -> impl Iterator<Item = &str> {
        self.one_node.iter().map(String::as_str)
    }

    /// Names of the claims.
    pub fn claims(&self) -> impl Iterator<Item = &str> {
        self.claims.keys().map(String::as_str)
    }

    /// Names of the Secrets.
    pub fn secrets(&self) -> impl Iterator<Item = &str> {
        self.secrets.iter().map(String::as_str)
    }

    /// The folders, for the contract. `cache`: bytes that the folder for downloads may hold.
    #[must_use]
    pub fn contract(&self, cache: i64) -> lathe_contract::Mounts {
        let folder = |claim: &String| (claim.clone(), format!("{VOLUMES}/{claim}"));
        lathe_contract::Mounts {
            claims: self.claims.keys().map(folder).collect(),
            cache: CACHE.to_owned(),
            cache_bytes: Some(cache),
        }
    }

    /// Volumes and their mounts. Volumes are numbered, since a claim's name may be longer than a volume's.
    pub(super) fn volumes(&self) -> (Vec<Volume>, Vec<VolumeMount>) {
        let claims = self.claims.iter().enumerate().map(|(i, (claim, &written))| {
            let source = PersistentVolumeClaimVolumeSource { claim_name: claim.clone(), read_only: None };
            let volume = Volume {
                name: format!("claim-{i}"),
                persistent_volume_claim: Some(source),
                ..Volume::default()
            };
            (volume, format!("{VOLUMES}/{claim}"), written)
        });
        let secrets = self.secrets.iter().enumerate().map(|(i, secret)| {
            // Readable by the pod's group alone.
            let source = SecretVolumeSource {
                secret_name: Some(secret.clone()),
                default_mode: Some(0o440),
                ..SecretVolumeSource::default()
            };
            let volume = Volume { name: format!("secret-{i}"), secret: Some(source), ..Volume::default() };
            (volume, format!("{SECRETS}/{secret}"), false)
        });
        claims
            .chain(secrets)
            .map(|(volume, mount_path, written)| {
                let mount = VolumeMount {
                    name: volume.name.clone(),
                    mount_path,
                    read_only: (!written).then_some(true),
                    ..VolumeMount::default()
                };
                (volume, mount)
            })
            .unzip()
    }
}

/// The claim of a `pvc://` location; `None` for another scheme.
///
/// # Errors
/// [`LocationError::Claim`] where there is none, or no valid name.
pub fn claim(location: &Location) -> Result<Option<&str>, LocationError> {
    let Some(rest) = location.uri.strip_prefix("pvc://") else { return Ok(None) };
    let claim = rest.split('/').next().unwrap_or_default();
    if is_object_name(claim) { Ok(Some(claim)) } else { Err(LocationError::Claim(location.uri.clone())) }
}

/// A DNS subdomain (RFC 1123), as Kubernetes names most objects; never `..` and never with a slash.
fn is_object_name(name: &str) -> bool {
    let label = |part: &str| {
        !part.is_empty()
            && !part.starts_with('-')
            && !part.ends_with('-')
            && part.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-')
    };
    name.len() <= 253 && name.split('.').all(label)
}

#[cfg(test)]
mod tests {
    use lathe_api::NameRef;
    use rstest::rstest;

    use super::*;

    fn location(uri: &str, secret: Option<&str>) -> Location {
        let secret_ref = secret.map(|name| NameRef { name: name.to_owned() });
        Location { uri: uri.to_owned(), revision: None, secret_ref, digest: None }
    }

    #[test]
    fn claims_and_secrets_are_mounted_once_and_only_what_is_written_is_writable() {
        let mut mounts = Mounts::default();
        mounts.source(&location("pvc://data/a", None), Use::Read).expect("claim");
        mounts.source(&location("pvc://out/b", None), Use::Read).expect("claim");
        mounts.source(&location("pvc://out/c", None), Use::Write).expect("claim");
        let hub = mounts.source(&location("hf://org/name", Some("token")), Use::Read).expect("secret");
        mounts.source(&location("hf://org/other", Some("token")), Use::Read).expect("secret");
        assert_eq!(hub.secret_dir.as_deref(), Some("/lathe/secrets/token"));
        let (volumes, paths) = mounts.volumes();
        let seen: Vec<_> =
            paths.iter().map(|m| (m.name.as_str(), m.mount_path.as_str(), m.read_only)).collect();
        assert_eq!(
            seen,
            [
                ("claim-0", "/lathe/volumes/data", Some(true)),
                ("claim-1", "/lathe/volumes/out", None),
                ("secret-0", "/lathe/secrets/token", Some(true)),
            ]
        );
        assert_eq!(volumes.len(), 3);
        assert_eq!(mounts.contract(1 << 30).claims["out"], "/lathe/volumes/out");
    }

    #[rstest]
    #[case::same_claim("pvc://data/other", None, true)]
    #[case::other_claim("pvc://more/x", None, false)]
    #[case::no_volume("https://host/x", None, true)]
    #[case::other_secret("https://host/x", Some("s"), false)]
    #[case::no_claim("pvc://../x", None, false)]
    fn covered_is_what_needs_no_other_mount(
        #[case] uri: &str,
        #[case] secret: Option<&str>,
        #[case] covered: bool,
    ) {
        let mut mounts = Mounts::default();
        mounts.source(&location("pvc://data/a", None), Use::Read).expect("claim");
        assert_eq!(mounts.cover(&location(uri, secret)), covered);
    }

    #[rstest]
    #[case("pvc://../x")]
    #[case("pvc:///x")]
    #[case("pvc://A/x")]
    #[case("pvc://a..b/x")]
    #[case("pvc://-a/x")]
    fn names_that_would_leave_the_folder_are_refused(#[case] uri: &str) {
        assert!(Mounts::default().source(&location(uri, None), Use::Read).is_err());
    }
}
