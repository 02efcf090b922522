//! OCI images of one layer, and the archive in which they travel.
//!
//! The archive is an OCI layout that also carries Docker's manifest.json: `ctr images import`,
//! `docker load` and `podman load` all take it.

use std::io::Write;

use anyhow::Result;
use flate2::{Compression, GzBuilder};
use serde_json::{Value, json};
use sha2::{Digest, Sha256};

use super::archive::Tree;

/// Whom programs in our images run as.
pub const USER: &str = "65532:65532";

/// What an image holds and how it starts.
pub struct Recipe {
    /// Full name with tag.
    pub reference: String,
    /// Its file system.
    pub files: Tree,
    /// The program and its first arguments.
    pub entrypoint: Vec<String>,
    /// `org.opencontainers.image.*` and the like.
    pub labels: Vec<(&'static str, String)>,
}

/// Bytes under their digest.
pub struct Blob {
    /// What they are.
    pub media_type: &'static str,
    /// `sha256:...`
    pub digest: String,
    /// The bytes.
    pub bytes: Vec<u8>,
}

/// An image ready to be written or pushed.
pub struct Image {
    /// Full name with tag.
    pub reference: String,
    /// Names the other two.
    pub manifest: Blob,
    /// How to run it.
    pub config: Blob,
    /// Its files.
    pub layer: Blob,
}

impl Recipe {
    /// Builds the image. The same recipe gives the same bytes.
    ///
    /// # Errors
    /// A path is too long for the archive format.
    pub fn build(&self) -> Result<Image> {
        let archive = self.files.archive()?;
        let layer = Blob::new("application/vnd.oci.image.layer.v1.tar+gzip", compressed(&archive)?);
        let labels: serde_json::Map<_, _> =
            self.labels.iter().map(|(key, text)| ((*key).to_owned(), json!(text))).collect();
        let config = json!({
            "architecture": architecture(),
            "os": "linux",
            "created": "1970-01-01T00:00:00Z",
            "config": {
                "User": USER,
                "Env": ["PATH=/", "SSL_CERT_FILE=/etc/ssl/certs/ca-certificates.crt"],
                "Entrypoint": self.entrypoint,
                "WorkingDir": "/",
                "Labels": labels,
            },
            "rootfs": {"type": "layers", "diff_ids": [digest(&archive)]},
            "history": [{"created": "1970-01-01T00:00:00Z", "created_by": "cargo xtask images"}],
        });
        let config = Blob::json("application/vnd.oci.image.config.v1+json", &config)?;
        let manifest = json!({
            "schemaVersion": 2,
            "mediaType": "application/vnd.oci.image.manifest.v1+json",
            "config": config.descriptor(),
            "layers": [layer.descriptor()],
        });
        let manifest = Blob::json("application/vnd.oci.image.manifest.v1+json", &manifest)?;
        Ok(Image { reference: self.reference.clone(), manifest, config, layer })
    }
}

impl Image {
    /// The archive's bytes.
    ///
    /// # Errors
    /// The image's parts cannot be written as JSON or tar.
    pub fn archive(&self) -> Result<Vec<u8>> {
        let tag = self.reference.rsplit_once(':').map_or("latest", |(_, tag)| tag);
        let mut entry = self.manifest.descriptor();
        entry["annotations"] = json!({
            "io.containerd.image.name": self.reference,
            "org.opencontainers.image.ref.name": tag,
        });
        let index = json!({
            "schemaVersion": 2,
            "mediaType": "application/vnd.oci.image.index.v1+json",
            "manifests": [entry],
        });
        let docker = json!([{
            "Config": self.config.path(),
            "RepoTags": [self.reference],
            "Layers": [self.layer.path()],
        }]);
        let mut tree = Tree::default();
        tree.file("oci-layout", r#"{"imageLayoutVersion":"1.0.0"}"#);
        tree.file("index.json", serde_json::to_vec(&index)?);
        tree.file("manifest.json", serde_json::to_vec(&docker)?);
        for blob in [&self.manifest, &self.config, &self.layer] {
            tree.file(&blob.path(), blob.bytes.as_slice());
        }
        tree.archive()
    }
}

impl Blob {
    fn new(media_type: &'static str, bytes: Vec<u8>) -> Self {
        Self { media_type, digest: digest(&bytes), bytes }
    }

    fn json(media_type: &'static str, value: &Value) -> Result<Self> {
        Ok(Self::new(media_type, serde_json::to_vec(value)?))
    }

    fn descriptor(&self) -> Value {
        json!({
            "mediaType": self.media_type,
            "digest": self.digest,
            "size": self.bytes.len(),
        })
    }

    fn path(&self) -> String {
        format!("blobs/{}", self.digest.replace(':', "/"))
    }
}

fn digest(bytes: &[u8]) -> String {
    let mut text = String::from("sha256:");
    for byte in Sha256::digest(bytes) {
        text.push_str(&format!("{byte:02x}"));
    }
    text
}

fn compressed(bytes: &[u8]) -> Result<Vec<u8>> {
    let mut encoder = GzBuilder::new().mtime(0).write(Vec::new(), Compression::default());
    encoder.write_all(bytes)?;
    Ok(encoder.finish()?)
}

/// This machine's architecture under Go's name.
fn architecture() -> &'static str {
    match std::env::consts::ARCH {
        "x86_64" => "amd64",
        "aarch64" => "arm64",
        other => other,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn recipe() -> Recipe {
        let mut files = Tree::default();
        files.program("pause", "elf");
        Recipe {
            reference: "example.com/a/pause:1".to_owned(),
            files,
            entrypoint: vec!["/pause".to_owned()],
            labels: vec![("org.opencontainers.image.version", "1".to_owned())],
        }
    }

    #[test]
    fn one_recipe_gives_one_digest() -> Result<()> {
        assert_eq!(recipe().build()?.manifest.digest, recipe().build()?.manifest.digest);
        assert_eq!(recipe().build()?.archive()?, recipe().build()?.archive()?);
        Ok(())
    }

    #[test]
    fn every_blob_lies_under_its_digest_and_both_indexes_point_at_them() -> Result<()> {
        let image = recipe().build()?;
        let bytes = image.archive()?;
        let mut archive = tar::Archive::new(bytes.as_slice());
        let mut found = std::collections::BTreeMap::new();
        for entry in archive.entries()? {
            let mut entry = entry?;
            let mut content = Vec::new();
            std::io::Read::read_to_end(&mut entry, &mut content)?;
            found.insert(entry.path()?.display().to_string(), content);
        }
        for (path, content) in found.iter().filter(|(path, _)| path.starts_with("blobs/sha256/")) {
            if !path.ends_with('/') {
                assert_eq!(digest(content).replace(':', "/"), path["blobs/".len()..]);
            }
        }
        let docker: Value = serde_json::from_slice(&found["manifest.json"])?;
        let index: Value = serde_json::from_slice(&found["index.json"])?;
        let layer = docker[0]["Layers"][0].as_str().unwrap_or_default();
        assert!(found.contains_key(layer));
        assert_eq!(index["manifests"][0]["digest"], image.manifest.digest);
        Ok(())
    }
}
