//! Images as others take them: a real registry (Debian's docker-registry, open and behind a password), and container engines.

mod registry;

use std::fs;
use std::net::Ipv4Addr;
use std::process::Command;

use anyhow::{Result, ensure};
use registry::Server;
use serde_json::Value;
use xtask::images::oci::{Image, Recipe};
use xtask::images::push::Registry;
use xtask::images::{self, archive::Tree};

/// `user:secret`, as htpasswd -B makes it and as `docker login` keeps it.
const PASSWORD_LINE: &str = "user:$2y$05$/iC7NUHC49pf7.sOyIfAB.PSh7FQhvs317dDnmp1aPj9vcy5b8fUe";
const LOGIN: &str = "dXNlcjpzZWNyZXQ=";

fn image(host: &str, content: &str) -> Result<Image> {
    let mut files = Tree::default();
    files.file("etc/text", content);
    let reference = format!("{host}/team/probe:1");
    let entrypoint = vec!["/probe".to_owned()];
    Recipe { reference, files, entrypoint, labels: Vec::new() }.build()
}

fn stored_manifest(host: &str) -> Result<Vec<u8>> {
    let mut answer = ureq::get(format!("http://{host}/v2/team/probe/manifests/1"))
        .header("Accept", "application/vnd.oci.image.manifest.v1+json")
        .call()?;
    Ok(answer.body_mut().read_to_vec()?)
}

#[test]
#[ignore = "needs the program docker-registry"]
fn what_is_pushed_is_what_is_served_and_a_second_push_moves_the_tag() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let server = Server::start(folder.path(), Ipv4Addr::LOCALHOST, "")?;
    for content in ["one", "one", "two"] {
        let image = image(&server.host, content)?;
        Registry::of(&server.host).push(&image)?;
        assert_eq!(stored_manifest(&server.host)?, image.manifest.bytes);
    }
    Ok(())
}

#[test]
#[ignore = "needs the program docker-registry"]
fn a_registry_behind_a_password_takes_the_login_and_names_its_lack() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let passwords = folder.path().join("htpasswd");
    fs::write(&passwords, PASSWORD_LINE)?;
    let auth = format!("auth:\n  htpasswd:\n    realm: test\n    path: {}\n", passwords.display());
    let server = Server::start(folder.path(), Ipv4Addr::LOCALHOST, &auth)?;
    let image = image(&server.host, "one")?;
    let refused = Registry::with_login(&server.host, None).push(&image);
    let text = refused.map_err(|error| format!("{error:#}"));
    assert!(text.is_err_and(|text| text.contains("docker login")));
    Registry::with_login(&server.host, Some(LOGIN.to_owned())).push(&image)
}

/// Skopeo reads both forms with the library that podman loads archives with.
#[test]
#[ignore = "needs the program skopeo"]
fn an_archive_is_an_image_to_those_who_load_docker_archives_and_to_those_who_load_oci_layouts() -> Result<()>
{
    let folder = tempfile::tempdir()?;
    let image = image("registry.test", "one")?;
    let archive = images::write(&image, folder.path())?;
    for form in ["docker-archive", "oci-archive"] {
        let taken = folder.path().join(form);
        let (from, to) = (format!("{form}:{}", archive.display()), format!("dir:{}", taken.display()));
        let ended = Command::new("skopeo").args(["copy", "--quiet", &from, &to]).output()?;
        ensure!(ended.status.success(), "{form}: {}", String::from_utf8_lossy(&ended.stderr));
        let manifest: Value = serde_json::from_slice(&fs::read(taken.join("manifest.json"))?)?;
        assert_eq!(manifest["config"]["digest"], image.config.digest, "{form}");
    }
    Ok(())
}
