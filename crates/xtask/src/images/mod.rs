//! Container images without a container engine.

pub mod archive;
pub mod cli;
pub mod oci;
pub(crate) mod programs;
pub mod push;

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};

use crate::{paths, toolchain, ui};
use archive::Tree;
use oci::{Image, Recipe};

/// Where our images live, without `--registry`.
pub const REGISTRY: &str = "ghcr.io/lathe-dev";
/// The image of the process that holds a pod of the local cluster together.
pub const PAUSE_IMAGE: &str = "ghcr.io/lathe-dev/pause:1";
/// The image that tries the local cluster from inside.
pub const PROBE_IMAGE: &str = "ghcr.io/lathe-dev/probe:1";
/// The largest that a program's image may be, compressed.
const MOST_BYTES: usize = 40_000_000;
const CERTIFICATES: &str = "/etc/ssl/certs/ca-certificates.crt";

/// Builds all images of the product and of the quick-start.
///
/// # Errors
/// A program does not build, or a file cannot be read.
pub fn build(registry: &str) -> Result<Vec<Image>> {
    let packages = ["lathe-worker", "lathe-operator", "lathe-gateway"];
    toolchain::packages(&[(CERTIFICATES, "ca-certificates")])?;
    let step = ui::step(format!("build {}", packages.join(", ")));
    step.expect("up to 10 minutes from scratch on 2 cores");
    let built = programs::workspace(&packages)?;
    step.done("");
    let mut images = Vec::new();
    for (name, program) in packages.iter().zip(built) {
        let image = of_program(registry, name, &program)?;
        let bytes = image.layer.bytes.len();
        ensure!(
            bytes <= MOST_BYTES,
            "image {name} has {bytes} bytes; a node that wakes fetches it, so at most {MOST_BYTES}"
        );
        images.push(image);
    }
    images.push(quickstart(registry)?);
    Ok(images)
}

/// As [`build`], each as an archive in the cache.
///
/// # Errors
/// As [`build`], or the cache cannot be written.
pub fn archives() -> Result<Vec<PathBuf>> {
    build(REGISTRY)?.iter().map(cached).collect()
}

/// The image of a pod's first process.
///
/// # Errors
/// The program does not compile.
pub fn pause() -> Result<Image> {
    tool(PAUSE_IMAGE, "pause")
}

/// The image that tries a cluster from inside.
///
/// # Errors
/// The program does not compile.
pub fn probe(reference: &str) -> Result<Image> {
    tool(reference, "probe")
}

fn tool(reference: &str, name: &str) -> Result<Image> {
    let mut files = Tree::default();
    files.program(name, fs::read(programs::small(name)?)?);
    let recipe = Recipe {
        reference: reference.to_owned(),
        files,
        entrypoint: vec![format!("/{name}")],
        labels: Vec::new(),
    };
    recipe.build()
}

/// Writes an image's archive into the cache. Returns its path.
///
/// # Errors
/// The cache cannot be written.
pub fn cached(image: &Image) -> Result<PathBuf> {
    write(image, &paths::cache()?.join("images"))
}

/// Writes an image's archive into a folder, whole or not at all. Returns its path.
///
/// # Errors
/// The folder cannot be written.
pub fn write(image: &Image, folder: &Path) -> Result<PathBuf> {
    fs::create_dir_all(folder).with_context(|| format!("cannot make {}", folder.display()))?;
    let path = folder.join(format!("{}.tar", short_name(&image.reference)));
    // A place of its own: clusters that start side by side write the same images.
    let unfinished = tempfile::tempdir_in(folder)?;
    let archive = unfinished.path().join("archive");
    fs::write(&archive, image.archive()?)?;
    fs::rename(&archive, &path)?;
    Ok(path)
}

fn of_program(registry: &str, name: &str, program: &Path) -> Result<Image> {
    let mut files = base()?;
    files.program(name, fs::read(program)?);
    recipe(registry, name, files, vec![format!("/{name}")]).build()
}

/// The quick-start's model and data, with a program that copies them into a volume.
fn quickstart(registry: &str) -> Result<Image> {
    let mut files = base()?;
    files.program("copy", fs::read(programs::small("copy")?)?);
    files.folder("files", 0o755);
    let mut entrypoint = vec!["/copy".to_owned()];
    // The folder that `lathe run` takes for the claim `quickstart`.
    let volume = paths::quickstart_volume();
    for name in ["model", "data"] {
        files.copy(&volume.join(name), &format!("files/{name}"))?;
        entrypoint.push(format!("/files/{name}"));
    }
    recipe(registry, "lathe-quickstart", files, entrypoint).build()
}

fn recipe(registry: &str, name: &str, files: Tree, entrypoint: Vec<String>) -> Recipe {
    let version = env!("CARGO_PKG_VERSION").to_owned();
    let source = env!("CARGO_PKG_REPOSITORY").to_owned();
    Recipe {
        reference: format!("{registry}/{name}:{version}"),
        files,
        entrypoint,
        labels: vec![
            ("org.opencontainers.image.title", name.to_owned()),
            ("org.opencontainers.image.version", version),
            ("org.opencontainers.image.source", source),
            ("org.opencontainers.image.licenses", env!("CARGO_PKG_LICENSE").to_owned()),
        ],
    }
}

/// What a static program expects of a system: certificates, its user, how names are looked up.
fn base() -> Result<Tree> {
    let mut files = Tree::default();
    files.file("etc/passwd", "lathe:x:65532:65532:lathe:/tmp:/none\n");
    files.file("etc/group", "lathe:x:65532:\n");
    files.file("etc/nsswitch.conf", "hosts: files dns\n");
    let certificates = fs::read(CERTIFICATES).with_context(|| format!("cannot read {CERTIFICATES}"))?;
    files.file(CERTIFICATES.trim_start_matches('/'), certificates);
    files.folder("tmp", 0o1777);
    Ok(files)
}

/// `lathe-worker` of `ghcr.io/lathe-dev/lathe-worker:0.1.0`.
fn short_name(reference: &str) -> &str {
    let name = reference.rsplit('/').next().unwrap_or(reference);
    name.split(':').next().unwrap_or(name)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_same_image_is_written_from_many_sides_at_once() -> Result<()> {
        let folder = tempfile::tempdir()?;
        let image = recipe("registry", "some", one_file(), vec!["/some".to_owned()]).build()?;
        let write_often = || (0..50).try_for_each(|_| write(&image, folder.path()).map(drop));
        std::thread::scope(|scope| {
            let others = [scope.spawn(write_often), scope.spawn(write_often)];
            let ended = others.map(|other| other.join().map_err(|_| anyhow::anyhow!("it panicked")));
            ended.into_iter().try_for_each(|ended| ended?)
        })?;
        ensure!(fs::read(folder.path().join("some.tar"))? == image.archive()?);
        ensure!(fs::read_dir(folder.path())?.count() == 1, "something is left beside the archive");
        Ok(())
    }

    fn one_file() -> Tree {
        let mut files = Tree::default();
        files.file("some", vec![7; 1 << 16]);
        files
    }
}
