//! The cluster's own certificate authority and what it signs.
//!
//! Keys never leave the cluster's folder, and `down` removes them; so they need no expiry.

use std::fs;
use std::net::IpAddr;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use anyhow::Result;
use rcgen::{
    BasicConstraints, CertificateParams, DistinguishedName, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer,
    KeyPair, KeyUsagePurpose,
};
use serde_json::json;

/// The certificate authority in a folder.
pub struct Authority {
    folder: PathBuf,
    issuer: Issuer<'static, KeyPair>,
}

/// What a certificate says about its holder.
pub struct Subject<'a> {
    /// The user, or the server.
    pub common_name: &'a str,
    /// The group, for clients.
    pub organization: Option<&'a str>,
    /// Names and addresses a server answers under.
    pub names: Vec<String>,
}

impl Authority {
    /// Opens the authority of `folder`, making it first when there is none.
    ///
    /// # Errors
    /// The folder cannot be read or written.
    pub fn open(folder: PathBuf) -> Result<Self> {
        fs::create_dir_all(&folder)?;
        let mut params = CertificateParams::default();
        params.distinguished_name = name("lathe-cluster", None);
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.key_usages =
            vec![KeyUsagePurpose::DigitalSignature, KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        let key_file = folder.join("ca.key");
        let key = if key_file.is_file() {
            KeyPair::from_pem(&fs::read_to_string(&key_file)?)?
        } else {
            let key = KeyPair::generate()?;
            fs::write(folder.join("ca.crt"), params.self_signed(&key)?.pem())?;
            write_secret(&key_file, &key.serialize_pem())?;
            key
        };
        Ok(Self { folder, issuer: Issuer::new(params, key) })
    }

    /// Path of `<name>.crt` or `<name>.key`.
    pub fn file(&self, name: &str) -> PathBuf {
        self.folder.join(name)
    }

    /// Makes `<file>.crt` and `<file>.key` unless they are there.
    ///
    /// # Errors
    /// The folder cannot be written, or a name is no DNS name.
    pub fn issue(&self, file: &str, subject: &Subject<'_>) -> Result<()> {
        let key_file = self.file(&format!("{file}.key"));
        if key_file.is_file() {
            return Ok(());
        }
        let mut params = CertificateParams::new(subject.names.clone())?;
        params.distinguished_name = name(subject.common_name, subject.organization);
        params.use_authority_key_identifier_extension = true;
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.extended_key_usages =
            vec![ExtendedKeyUsagePurpose::ClientAuth, ExtendedKeyUsagePurpose::ServerAuth];
        let key = KeyPair::generate()?;
        let certificate = params.signed_by(&key, &self.issuer)?;
        fs::write(self.file(&format!("{file}.crt")), certificate.pem())?;
        write_secret(&key_file, &key.serialize_pem())
    }

    /// Makes the key pair `<file>.key` and `<file>.pub`, by which tokens are signed and checked.
    ///
    /// # Errors
    /// The folder cannot be written.
    pub fn signing_pair(&self, file: &str) -> Result<()> {
        let key_file = self.file(&format!("{file}.key"));
        if key_file.is_file() {
            return Ok(());
        }
        let key = KeyPair::generate()?;
        fs::write(self.file(&format!("{file}.pub")), key.public_key_pem())?;
        write_secret(&key_file, &key.serialize_pem())
    }

    /// Writes a kubeconfig for the client certificate `file`, with everything inlined.
    ///
    /// # Errors
    /// The certificate is not there or the path cannot be written.
    pub fn kubeconfig(&self, file: &str, server: &str, context: &str, path: &Path) -> Result<()> {
        let inline = |name: String| -> Result<String> { Ok(base64(&fs::read(self.file(&name))?)) };
        let config = json!({
            "apiVersion": "v1",
            "kind": "Config",
            "clusters": [{"name": context, "cluster": {
                "server": server,
                "certificate-authority-data": inline("ca.crt".into())?,
            }}],
            "users": [{"name": context, "user": {
                "client-certificate-data": inline(format!("{file}.crt"))?,
                "client-key-data": inline(format!("{file}.key"))?,
            }}],
            "contexts": [{"name": context, "context": {"cluster": context, "user": context}}],
            "current-context": context,
        });
        write_secret(path, &serde_json::to_string_pretty(&config)?)
    }
}

/// Names and addresses as a server certificate's list.
pub fn names<const N: usize>(dns: &[&str], addresses: [IpAddr; N]) -> Vec<String> {
    let addresses = addresses.iter().map(IpAddr::to_string);
    dns.iter().map(|name| (*name).to_owned()).chain(addresses).collect()
}

fn name(common_name: &str, organization: Option<&str>) -> DistinguishedName {
    let mut name = DistinguishedName::new();
    if let Some(organization) = organization {
        name.push(DnType::OrganizationName, organization);
    }
    name.push(DnType::CommonName, common_name);
    name
}

fn write_secret(path: &Path, text: &str) -> Result<()> {
    fs::write(path, text)?;
    fs::set_permissions(path, fs::Permissions::from_mode(0o600))?;
    Ok(())
}

fn base64(bytes: &[u8]) -> String {
    use base64::Engine;
    base64::engine::general_purpose::STANDARD.encode(bytes)
}
