//! Pushing to a real registry: Debian's docker-registry, open and behind a password.

use std::fs;
use std::net::{Ipv4Addr, TcpListener, TcpStream};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use xtask::images::archive::Tree;
use xtask::images::oci::{Image, Recipe};
use xtask::images::push::Registry;

/// `user:secret`, as htpasswd -B makes it and as `docker login` keeps it.
const PASSWORD_LINE: &str = "user:$2y$05$/iC7NUHC49pf7.sOyIfAB.PSh7FQhvs317dDnmp1aPj9vcy5b8fUe";
const LOGIN: &str = "dXNlcjpzZWNyZXQ=";

struct Server {
    child: Child,
    host: String,
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn serve(folder: &Path, extra: &str) -> Result<Server> {
    let port = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?.local_addr()?.port();
    let host = format!("127.0.0.1:{port}");
    let config = folder.join("config.yml");
    let text = format!(
        "version: 0.1\nstorage:\n  filesystem:\n    rootdirectory: {}\nhttp:\n  addr: {host}\n{extra}",
        folder.join("data").display()
    );
    fs::write(&config, text)?;
    let mut command = Command::new("docker-registry");
    command.arg("serve").arg(&config).stdout(Stdio::null()).stderr(Stdio::null());
    let server = Server { child: command.spawn()?, host };
    let started = Instant::now();
    while TcpStream::connect(&server.host).is_err() {
        ensure!(started.elapsed() < Duration::from_secs(30), "the registry does not start");
        std::thread::sleep(Duration::from_millis(50));
    }
    Ok(server)
}

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
    let server = serve(folder.path(), "")?;
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
    let server = serve(folder.path(), &auth)?;
    let image = image(&server.host, "one")?;
    let refused = Registry::with_login(&server.host, None).push(&image);
    let text = refused.map_err(|error| format!("{error:#}"));
    assert!(text.is_err_and(|text| text.contains("docker login")));
    Registry::with_login(&server.host, Some(LOGIN.to_owned())).push(&image)
}
