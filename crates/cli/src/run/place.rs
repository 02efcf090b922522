//! Where a local run reads and writes: folders in place of a cluster's volumes and Secrets.
use std::collections::BTreeMap;
use std::fs::{File, TryLockError};
use std::path::{Path, PathBuf};

use lathe_contract::{Contract, SourceRef, Task};
use lathe_resolve::pod;

use super::Args;
use crate::failure::{Done, Problem};

/// The folders of one run.
#[derive(Debug)]
pub struct Place {
    /// Contracts, last words and logs.
    work: PathBuf,
    /// Downloads.
    cache: PathBuf,
    /// Of the manifests.
    folder: PathBuf,
    volumes: BTreeMap<String, PathBuf>,
    secrets: BTreeMap<String, PathBuf>,
    /// Held as long as the run lasts.
    _lock: File,
}

impl Place {
    /// Makes the work folder, and sees to it that no other run works there.
    ///
    /// # Errors
    /// A folder cannot be made, or another run is there.
    pub fn open(args: &Args, folder: &Path) -> Done<Self> {
        let folder = std::path::absolute(folder).map_err(|error| Problem::io("find", folder, &error))?;
        let within = |given: &Option<PathBuf>, default: PathBuf| match given {
            Some(given) => std::path::absolute(given).map_err(|error| Problem::io("find", given, &error)),
            None => Ok(default),
        };
        let work = within(&args.work, folder.join(".lathe"))?;
        let cache = within(&args.cache, work.join("cache"))?;
        make(&work, "--work DIR")?;
        let lock = work.join("lock");
        let file = File::create(&lock).map_err(|error| Problem::io("write", &lock, &error))?;
        match file.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => {
                let message = format!(
                    "another `lathe run` works in {}. Next: end it, or give this one --work with another folder.",
                    work.display()
                );
                return Err(Problem::transient("Busy", message));
            }
            Err(TryLockError::Error(error)) => return Err(Problem::io("lock", &lock, &error)),
        }
        let absolute = |(name, dir): &(String, PathBuf)| match std::path::absolute(dir) {
            Ok(dir) => Ok((name.clone(), dir)),
            Err(error) => Err(Problem::io("find", dir, &error)),
        };
        Ok(Self {
            work,
            cache,
            folder,
            volumes: args.volume.iter().map(absolute).collect::<Done<_>>()?,
            secrets: args.secret.iter().map(absolute).collect::<Done<_>>()?,
            _lock: file,
        })
    }

    /// An empty folder for one task's files.
    ///
    /// # Errors
    /// It cannot be made.
    pub fn task(&self, name: &str) -> Done<PathBuf> {
        let folder = self.work.join(name);
        match std::fs::remove_dir_all(&folder) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                return Err(Problem::io("empty", &folder, &error));
            }
            _ => make(&folder, "--work DIR")?,
        }
        Ok(folder)
    }

    /// A file of an object that stays from run to run.
    ///
    /// # Errors
    /// Its folder cannot be made.
    pub fn kept(&self, object: &str, name: &str) -> Done<PathBuf> {
        let folder = self.work.join(object.replace('/', "-"));
        make(&folder, "--work DIR")?;
        Ok(folder.join(name))
    }

    /// The folder that stands for a claim.
    pub fn volume(&self, claim: &str) -> PathBuf {
        self.volumes.get(claim).cloned().unwrap_or_else(|| self.folder.join("volumes").join(claim))
    }

    /// The file or folder of a `pvc://` address; `None` for other schemes.
    pub fn path(&self, uri: &str) -> Option<PathBuf> {
        let (claim, path) = uri.strip_prefix("pvc://")?.split_once('/')?;
        Some(self.volume(claim).join(path))
    }

    /// The contract for a process of this machine: claims and Secrets are the folders that stand for them.
    ///
    /// # Errors
    /// A folder is missing: the text says which option names another.
    pub fn localise(&self, mut contract: Contract) -> Done<Contract> {
        let written = written(&contract.task);
        for (claim, at) in &mut contract.mounts.claims {
            let folder = self.volume(claim);
            if written.contains(&claim.as_str()) {
                make(&folder, &format!("--volume {claim}=DIR"))?;
            } else if !folder.is_dir() {
                let message = format!(
                    "pvc://{claim}/ stands for {}, and there is no such folder. Next: put the files there, or name another folder by --volume {claim}=DIR.",
                    folder.display()
                );
                return Err(Problem::user("VolumeMissing", message));
            }
            *at = text(&folder)?;
        }
        make(&self.cache, "--cache DIR")?;
        contract.mounts.cache = text(&self.cache)?;
        // The folder is shared by runs and bounded by the disk.
        contract.mounts.cache_bytes = None;
        for source in sources(&mut contract.task) {
            let Some(dir) = &mut source.secret_dir else { continue };
            let name = dir.strip_prefix(pod::SECRETS).unwrap_or(dir).trim_start_matches('/').to_owned();
            let Some(folder) = self.secrets.get(&name) else {
                let message = format!(
                    "{} is read with Secret {name}, which a local run does not have. Next: --secret {name}=DIR, a folder with a file for each key (such as `token`).",
                    source.uri
                );
                return Err(Problem::user("SecretMissing", message));
            };
            *dir = text(folder)?;
        }
        Ok(contract)
    }
}

/// Claims that the task writes to.
fn written(task: &Task) -> Vec<&str> {
    let Task::Train(train) = task else { return Vec::new() };
    let destinations = [&train.checkpoint.destination.uri, &train.output.destination.uri];
    destinations.into_iter().filter_map(|uri| uri.strip_prefix("pvc://")?.split('/').next()).collect()
}

/// Every location of a task.
fn sources(task: &mut Task) -> Vec<&mut SourceRef> {
    match task {
        Task::Inspect(inspect) => vec![&mut inspect.source],
        Task::CheckData(check) => {
            let dataset = &mut check.dataset;
            [&mut check.model.source, &mut dataset.train].into_iter().chain(&mut dataset.evaluation).collect()
        }
        Task::Train(train) => {
            let dataset = &mut train.dataset;
            [&mut train.base.source, &mut train.checkpoint.destination, &mut train.output.destination]
                .into_iter()
                .chain([&mut dataset.train])
                .chain(&mut dataset.evaluation)
                .collect()
        }
        Task::Serve(serve) => {
            let adapters = serve.adapters.iter_mut().map(|adapter| &mut adapter.model.source);
            std::iter::once(&mut serve.model.source).chain(adapters).collect()
        }
        Task::Evaluate(evaluate) => {
            let adapter = evaluate.adapter.iter_mut().map(|model| &mut model.source);
            let dataset = &mut evaluate.dataset;
            [&mut evaluate.base.source, &mut dataset.train]
                .into_iter()
                .chain(&mut dataset.evaluation)
                .chain(adapter)
                .collect()
        }
    }
}

/// Makes a folder, which `option` can put elsewhere.
fn make(folder: &Path, option: &str) -> Done<()> {
    std::fs::create_dir_all(folder).map_err(|error| {
        let message =
            format!("cannot make {}: {error}. Next: name another folder by {option}.", folder.display());
        Problem::user("InputOutput", message)
    })
}

fn text(path: &Path) -> Done<String> {
    path.to_str().map(str::to_owned).ok_or_else(|| {
        Problem::user("InvalidPath", format!("{} is not UTF-8. Next: use another folder.", path.display()))
    })
}

/// `CLAIM=DIR`, as `--volume` and `--secret` take it.
///
/// # Errors
/// What is wrong with it, for the command line.
pub fn pair(text: &str) -> Result<(String, PathBuf), String> {
    match text.split_once('=') {
        Some((name, dir)) if !name.is_empty() && !dir.is_empty() => Ok((name.to_owned(), dir.into())),
        _ => Err("must be NAME=DIR".to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use rstest::rstest;

    use super::*;

    fn place(folder: &Path, volumes: &[&str]) -> Place {
        let volume = volumes.iter().map(|text| pair(text).unwrap()).collect();
        Place::open(&Args { volume, ..Args::default() }, folder).unwrap()
    }

    fn contract(task: serde_json::Value, claim: &str) -> Contract {
        let object = serde_json::json!({"kind": "k", "namespace": "n", "name": "o", "uid": "u"});
        let mounts = serde_json::json!({"claims": {claim: "/lathe/volumes/x"}, "cache": "/lathe/cache", "cacheBytes": 1});
        let contract =
            serde_json::json!({"version": 1, "object": object, "trust": {}, "mounts": mounts, "task": task});
        serde_json::from_value(contract).unwrap()
    }

    #[rstest]
    #[case("data=/x", Some(("data", "/x")))]
    #[case("data=a=b", Some(("data", "a=b")))]
    #[case("data", None)]
    #[case("=x", None)]
    #[case("data=", None)]
    fn pairs(#[case] given: &str, #[case] expected: Option<(&str, &str)>) {
        let expected = expected.map(|(name, dir)| (name.to_owned(), PathBuf::from(dir)));
        assert_eq!(pair(given).ok(), expected);
    }

    #[test]
    fn a_claim_is_the_folder_beside_the_manifest_or_the_one_that_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let place = place(dir.path(), &["named=/somewhere"]);
        assert_eq!(place.volume("data"), dir.path().join("volumes/data"));
        assert_eq!(place.path("pvc://named/a/b"), Some(PathBuf::from("/somewhere/a/b")));
        assert_eq!(place.path("hf://org/name"), None);
    }

    #[test]
    fn what_is_read_must_be_there_and_what_is_written_is_made() {
        let dir = tempfile::tempdir().unwrap();
        let place = place(dir.path(), &[]);
        let inspect = serde_json::json!({"inspect": {"source": {"uri": "pvc://data/m"}}});
        let missing = place.localise(contract(inspect.clone(), "data")).unwrap_err();
        assert_eq!(missing.reason, "VolumeMissing");
        assert!(missing.message.contains("--volume data=DIR"), "{missing}");
        std::fs::create_dir_all(dir.path().join("volumes/data")).unwrap();
        let local = place.localise(contract(inspect, "data")).unwrap();
        assert_eq!(local.mounts.claims["data"], dir.path().join("volumes/data").to_str().unwrap());
        assert!(local.mounts.cache.ends_with(".lathe/cache"), "{}", local.mounts.cache);
        assert_eq!(local.mounts.cache_bytes, None);
    }

    #[test]
    fn a_secret_is_asked_for_by_name() {
        let dir = tempfile::tempdir().unwrap();
        let place = place(dir.path(), &[]);
        let source = serde_json::json!({"uri": "hf://org/name", "secretDir": "/lathe/secrets/hub"});
        let refused = place.localise(contract(serde_json::json!({"inspect": {"source": source}}), "x"));
        std::fs::create_dir_all(dir.path().join("volumes/x")).unwrap();
        assert!(refused.is_err());
        let source = serde_json::json!({"uri": "hf://org/name", "secretDir": "/lathe/secrets/hub"});
        let refused =
            place.localise(contract(serde_json::json!({"inspect": {"source": source}}), "x")).unwrap_err();
        assert!(refused.message.contains("--secret hub=DIR"), "{refused}");
    }

    #[test]
    fn two_runs_never_share_a_work_folder() {
        let dir = tempfile::tempdir().unwrap();
        let _first = place(dir.path(), &[]);
        let second = Place::open(&Args::default(), dir.path()).unwrap_err();
        assert_eq!(second.reason, "Busy");
    }
}
