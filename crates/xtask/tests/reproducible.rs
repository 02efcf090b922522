//! Two builds, one digest: the images of a copy of this checkout, in another place, are the same bytes.

use std::fs;
use std::path::Path;
use std::process::{Command, Stdio};

use anyhow::{Context, Result, ensure};
use xtask::{command, images, paths};

#[test]
#[ignore = "compiles Lathe's programs a second time"]
fn images_of_another_checkout_are_the_same_bytes() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let (copy, out) = (folder.path().join("elsewhere"), folder.path().join("images"));
    copy_checkout(&copy)?;
    let mut build = command::cargo();
    // In a folder that both share, its programs would take the place of this checkout's.
    build.env_remove("CARGO_TARGET_DIR");
    build.current_dir(&copy).args(["run", "--package", "xtask", "--", "images", "--out"]).arg(&out);
    let built = build.stdin(Stdio::null()).stdout(Stdio::null()).output()?;
    let said = String::from_utf8_lossy(&built.stderr);
    ensure!(built.status.success(), "the copy does not build:\n{said}");
    for program in ["lathe-worker", "lathe-operator", "lathe-gateway"] {
        let compiled = format!("Compiling {program} ");
        ensure!(said.contains(&compiled), "{program} was not compiled again, so nothing is shown:\n{said}");
    }
    for image in images::build(images::REGISTRY)? {
        let here = images::write(&image, &folder.path().join("here"))?;
        let there = out.join(here.file_name().context("an archive without a name")?);
        ensure!(fs::read(&here)? == fs::read(&there)?, "{} differs between two checkouts", image.reference);
    }
    Ok(())
}

/// Everything that belongs to the repository, nothing that was built.
fn copy_checkout(to: &Path) -> Result<()> {
    let root = paths::repository();
    let mut git = Command::new("git");
    git.current_dir(&root).args(["ls-files", "-z", "--cached", "--others", "--exclude-standard"]);
    let listed = git.output().context("cannot start git")?;
    ensure!(listed.status.success(), "this is no git checkout");
    for name in String::from_utf8(listed.stdout)?.split_terminator('\0') {
        let (from, to) = (root.join(name), to.join(name));
        // One that is deleted but not committed is listed too.
        if from.is_file() {
            fs::create_dir_all(to.parent().context("a file without a folder")?)?;
            fs::copy(from, to)?;
        }
    }
    Ok(())
}
