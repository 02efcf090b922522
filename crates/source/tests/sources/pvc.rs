//! `pvc://`: folders that stand for mounted volumes.
use std::os::unix::fs::{MetadataExt as _, symlink};
use std::path::Path;
use std::sync::Mutex;

use lathe_source::{
    CancellationToken, Digest, Draft, Fetched, LocalCheck, Location, MANIFEST, Options, SourceError, Update,
    fetch, fingerprint, headers, publish, unchanged,
};
use rstest::rstest;

use crate::model::{Files, model, options, read, safetensors, write};

struct Volume {
    root: tempfile::TempDir,
    outside: tempfile::TempDir,
    options: Options,
}

fn volume() -> Volume {
    let (root, outside) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let mut options = options(outside.path());
    options.mounts.insert("data".into(), root.path().into());
    Volume { root, outside, options }
}

impl Volume {
    async fn get(&self, uri: &str) -> Result<Fetched, SourceError> {
        fetch(
            &Location::parse(uri, None, None)?,
            &self.options,
            &|_: Update<'_>| {},
            &CancellationToken::new(),
        )
        .await
    }

    async fn put(&self, from: &Path, uri: &str) -> Result<Digest, SourceError> {
        publish(
            from,
            &Location::parse(uri, None, None)?,
            &self.options,
            &|_: Update<'_>| {},
            &CancellationToken::new(),
        )
        .await
    }

    /// An artefact outside of the volume.
    fn artefact(&self, files: &Files) -> std::path::PathBuf {
        let dir = self.outside.path().join("artefact");
        write(&dir, files);
        dir
    }
}

#[tokio::test]
async fn a_folder_is_read_in_place() {
    let v = volume();
    write(&v.root.path().join("m"), &model());
    std::fs::write(v.root.path().join("m/notes.txt"), "mine").unwrap();
    let fetched = v.get("pvc://data/m").await.unwrap();
    assert_eq!(fetched.dir, v.root.path().canonicalize().unwrap().join("m"));
    assert_eq!(fetched.files.len(), 4);
    let headers =
        headers(&Location::parse("pvc://data/m", None, None).unwrap(), &v.options, &CancellationToken::new())
            .await
            .unwrap();
    assert_eq!((headers.parameters(), headers.digest), (3 << 20, None));
}

#[tokio::test]
async fn one_file_also_through_a_link_inside() {
    let v = volume();
    write(v.root.path(), &Files::from([("..data/train.jsonl".into(), b"{}\n".to_vec())]));
    symlink("..data/train.jsonl", v.root.path().join("train.jsonl")).unwrap();
    let fetched = v.get("pvc://data/train.jsonl").await.unwrap();
    assert_eq!(std::fs::read(fetched.file().unwrap()).unwrap(), b"{}\n");
}

#[tokio::test]
async fn no_link_leads_out() {
    let v = volume();
    write(v.outside.path(), &Files::from([("secret.jsonl".into(), b"hunter2".to_vec())]));
    symlink(v.outside.path(), v.root.path().join("out")).unwrap();
    symlink(v.outside.path().join("secret.jsonl"), v.root.path().join("train.jsonl")).unwrap();
    write(&v.root.path().join("m"), &model());
    symlink(v.outside.path().join("secret.jsonl"), v.root.path().join("m/x.jsonl")).unwrap();
    for uri in ["pvc://data/out", "pvc://data/out/secret.jsonl", "pvc://data/train.jsonl", "pvc://data/m"] {
        assert_eq!(v.get(uri).await.unwrap_err().reason(), "UnsafeName", "{uri}");
    }
    let artefact = v.artefact(&model());
    assert_eq!(v.put(&artefact, "pvc://data/out/a").await.unwrap_err().reason(), "UnsafeName");
    assert!(!v.outside.path().join("a").exists());
}

#[rstest]
#[case("pvc://data/none", "NotFound")]
#[case("pvc://other/m", "ClaimNotMounted")]
#[case("pvc://data/bad", "PickleRefused")]
#[case("pvc://data/disguised", "PickleRefused")]
#[case("pvc://data/disguised/model.safetensors", "PickleRefused")]
#[case("pvc://data/empty", "NothingToFetch")]
#[tokio::test]
async fn what_cannot_be_read_is_named(#[case] uri: &str, #[case] reason: &str) {
    let v = volume();
    let files = [
        ("bad/pytorch_model.bin", &b"x"[..]),
        ("disguised/model.safetensors", b"\x80\x02}q\0"),
        ("empty/x.txt", b""),
    ];
    write(v.root.path(), &files.map(|(name, bytes)| (name.to_string(), bytes.to_vec())).into());
    let error = v.get(uri).await.unwrap_err();
    assert_eq!((error.reason(), error.is_transient()), (reason, false), "{error}");
}

#[tokio::test]
async fn an_artefact_is_there_whole_with_the_digest_that_was_told() {
    let v = volume();
    let mut files = model();
    files.insert("adapters/a/adapter_model.safetensors".into(), safetensors(10));
    files.insert("report.json".into(), b"{}".to_vec());
    let artefact = v.artefact(&files);
    let told = v.put(&artefact, "pvc://data/jobs/one").await.unwrap();
    let fetched = v.get("pvc://data/jobs/one").await.unwrap();
    assert_eq!((fetched.digest, read(&fetched.dir)), (told, files));
    // Again the same: nothing to do. Something else: refused, and the first stays.
    assert_eq!(v.put(&artefact, "pvc://data/jobs/one").await.unwrap(), told);
    std::fs::write(artefact.join("config.json"), "{}").unwrap();
    assert_eq!(v.put(&artefact, "pvc://data/jobs/one").await.unwrap_err().reason(), "AlreadyExists");
    assert_eq!(v.get("pvc://data/jobs/one").await.unwrap().digest, told);
    let left: Vec<_> =
        std::fs::read_dir(v.root.path().join("jobs")).unwrap().map(|e| e.unwrap().file_name()).collect();
    assert_eq!(left, ["one"]);
}

fn draft(v: &Volume) -> Draft {
    Draft::open(&Location::parse("pvc://data/models/tuned", None, None).unwrap(), &v.options).unwrap()
}

#[tokio::test]
async fn a_draft_lies_on_its_volume_and_is_moved_and_never_copied() {
    let v = volume();
    let (never, quiet) = (CancellationToken::new(), |_: Update<'_>| {});
    let first = draft(&v);
    write(first.dir(), &model());
    assert!(first.dir().starts_with(v.root.path()));
    let written = std::fs::metadata(first.dir().join("config.json")).unwrap().ino();
    let (place, digest) = first.publish(&v.options, &quiet, &never).await.unwrap();
    assert_eq!(place.uri(), format!("pvc://data/models/tuned/{}", digest.hex()));
    let fetched = v.get(place.uri()).await.unwrap();
    assert_eq!((fetched.digest, read(&fetched.dir)), (digest, model()));
    let moved = std::fs::metadata(fetched.dir.join("config.json")).unwrap().ino();
    assert_eq!((moved, std::fs::read_dir(v.outside.path()).unwrap().count()), (written, 0));
    // The same once more is no error, and nothing is left of it.
    let again = draft(&v);
    write(again.dir(), &model());
    assert_eq!(again.publish(&v.options, &quiet, &never).await.unwrap().1, digest);
    let entries = std::fs::read_dir(v.root.path().join("models/tuned")).unwrap();
    let names: Vec<_> = entries.map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
    assert_eq!(names, [digest.hex()]);
}

#[tokio::test]
async fn a_draft_that_is_given_up_or_left_by_a_killed_process_goes() {
    let v = volume();
    let (stop, quiet) = (CancellationToken::new(), |_: Update<'_>| {});
    let first = draft(&v);
    write(first.dir(), &model());
    let second = draft(&v);
    // The later one has the place; the earlier one is told so.
    assert_eq!(first.is_there().unwrap_err().reason(), "IncompleteUpload");
    assert!(first.publish(&v.options, &quiet, &stop).await.is_err());
    second.is_there().unwrap();
    write(second.dir(), &model());
    stop.cancel();
    assert_eq!(second.publish(&v.options, &quiet, &stop).await.unwrap_err().reason(), "Cancelled");
    assert_eq!(std::fs::read_dir(v.root.path().join("models/tuned")).unwrap().count(), 0);
}

#[tokio::test]
async fn a_broken_write_leaves_no_final_name_and_the_next_one_succeeds() {
    let v = volume();
    let artefact = v.artefact(&model());
    let location = Location::parse("pvc://data/a", None, None).unwrap();
    let stop = CancellationToken::new();
    let progress = |_: Update<'_>| stop.cancel();
    let error = publish(&artefact, &location, &v.options, &progress, &stop).await.unwrap_err();
    assert_eq!(error.reason(), "Cancelled");
    assert_eq!(std::fs::read_dir(v.root.path()).unwrap().count(), 0);
    // A killed process leaves more than that.
    write(
        &v.root.path().join(".a.0123456789abcdef.partial"),
        &Files::from([("stale/x".into(), vec![1]), ("y".into(), vec![1])]),
    );
    // Another artefact's is not touched.
    let other = v.root.path().join(".ab.0123456789abcdef.partial");
    std::fs::create_dir(&other).unwrap();
    v.put(&artefact, "pvc://data/a").await.unwrap();
    assert_eq!(read(&v.root.path().join("a")), model());
    assert_eq!(std::fs::read_dir(v.root.path()).unwrap().count(), 2);
    assert!(other.exists());
}

/// Publishes `first`, and `second` to the same place as the first is half done.
async fn both(v: &Volume, first: &Path, second: &Path) -> [Result<Digest, SourceError>; 2] {
    let location = Location::parse("pvc://data/a", None, None).unwrap();
    let (between, never) = (Mutex::new(None), CancellationToken::new());
    let progress = |_: Update<'_>| {
        between.lock().unwrap().get_or_insert_with(|| {
            let put = || publish(second, &location, &v.options, &|_: Update<'_>| {}, &never);
            tokio::task::block_in_place(|| tokio::runtime::Handle::current().block_on(put()))
        });
    };
    let done = publish(first, &location, &v.options, &progress, &never).await;
    [done, between.lock().unwrap().take().unwrap()]
}

#[tokio::test(flavor = "multi_thread")]
async fn two_writers_of_the_same_are_both_done() {
    let v = volume();
    let artefact = v.artefact(&model());
    let [first, second] = both(&v, &artefact, &artefact).await;
    assert_eq!(first.unwrap(), second.unwrap());
    assert_eq!(read(&v.root.path().join("a")), model());
    assert_eq!(std::fs::read_dir(v.root.path()).unwrap().count(), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn of_two_writers_of_different_things_the_later_one_is_done() {
    let v = volume();
    let artefact = v.artefact(&model());
    let other = v.outside.path().join("other");
    let mut files = model();
    files.insert("config.json".into(), b"{}".to_vec());
    write(&other, &files);
    let [first, second] = both(&v, &artefact, &other).await;
    assert_eq!(first.unwrap_err().reason(), "AlreadyExists");
    assert_eq!(v.get("pvc://data/a").await.unwrap().digest, second.unwrap());
    assert_eq!(read(&v.root.path().join("a")), files);
    assert_eq!(std::fs::read_dir(v.root.path()).unwrap().count(), 1);
}

#[tokio::test]
async fn half_of_a_copy_that_was_taken_away_never_gets_the_final_name() {
    let v = volume();
    let artefact = v.artefact(&model());
    let location = Location::parse("pvc://data/a", None, None).unwrap();
    let taken = std::sync::Once::new();
    let progress = |_: Update<'_>| {
        taken.call_once(|| {
            let copy = std::fs::read_dir(v.root.path()).unwrap().next().unwrap().unwrap().path();
            std::fs::remove_dir_all(copy).unwrap();
        });
    };
    let error =
        publish(&artefact, &location, &v.options, &progress, &CancellationToken::new()).await.unwrap_err();
    assert_eq!((error.reason(), error.is_transient()), ("IncompleteUpload", true), "{error}");
    assert_eq!(std::fs::read_dir(v.root.path()).unwrap().count(), 0);
}

#[tokio::test]
async fn what_stands_at_the_place_is_not_overwritten() {
    let v = volume();
    let artefact = v.artefact(&model());
    write(v.root.path(), &Files::from([("mine/x".into(), vec![1]), ("file".into(), vec![1])]));
    for uri in ["pvc://data/mine", "pvc://data/file"] {
        assert_eq!(v.put(&artefact, uri).await.unwrap_err().reason(), "AlreadyExists");
    }
    std::fs::create_dir(v.root.path().join("vacant")).unwrap();
    v.put(&artefact, "pvc://data/vacant").await.unwrap();
    assert_eq!(v.put(&artefact, "hf://o/n").await.unwrap_err().reason(), "ReadOnlyLocation");
}

#[tokio::test]
async fn an_artefact_holds_no_pickle_and_no_link() {
    let v = volume();
    let artefact = v.artefact(&Files::from([("optimizer.pt".into(), vec![1])]));
    assert_eq!(v.put(&artefact, "pvc://data/a").await.unwrap_err().reason(), "PickleRefused");
    std::fs::remove_file(artefact.join("optimizer.pt")).unwrap();
    symlink("/etc/passwd", artefact.join("config.json")).unwrap();
    assert_eq!(v.put(&artefact, "pvc://data/a").await.unwrap_err().reason(), "UnsafeName");
}

/// What was hashed once need not be hashed at every start; what changed is.
#[tokio::test]
async fn files_that_did_not_change_are_known_by_samples_of_them() {
    let v = volume();
    let mut files = model();
    files.insert("model.safetensors".into(), safetensors(3 << 20));
    write(&v.root.path().join("m"), &files);
    let never = CancellationToken::new();
    let digest = v.get("pvc://data/m").await.unwrap().digest;
    let pinned = Location::parse("pvc://data/m", None, Some(&digest.to_string())).unwrap();
    let mark = fingerprint(&pinned, &v.options, &never).await.unwrap().unwrap().to_string();
    let known = unchanged(&pinned, &mark, &v.options, &never).await.unwrap().unwrap();
    assert_eq!((known.digest, known.files.len()), (digest, 0));
    // Without a digest there is nothing that it could stand for.
    let free = Location::parse("pvc://data/m", None, None).unwrap();
    assert!(unchanged(&free, &mark, &v.options, &never).await.unwrap().is_none());
    let hub = Location::parse("hf://o/n", None, Some(&digest.to_string())).unwrap();
    assert!(unchanged(&hub, &mark, &v.options, &never).await.unwrap().is_none());
    std::fs::write(v.root.path().join("m/config.json"), "{}").unwrap();
    assert!(unchanged(&pinned, &mark, &v.options, &never).await.unwrap().is_none());
}

#[tokio::test]
async fn damage_after_writing_is_found_as_deeply_as_is_asked_for() {
    let mut v = volume();
    let artefact = v.artefact(&model());
    let digest = v.put(&artefact, "pvc://data/a").await.unwrap();
    let weights = v.root.path().join("a/model.safetensors");
    let mut bytes = std::fs::read(&weights).unwrap();
    *bytes.last_mut().unwrap() ^= 1;
    std::fs::write(&weights, &bytes).unwrap();
    assert_eq!(v.get("pvc://data/a").await.unwrap_err().reason(), "DigestMismatch");
    v.options.local_check = LocalCheck::Sizes;
    assert_eq!(v.get("pvc://data/a").await.unwrap().digest, digest);
    std::fs::write(&weights, &bytes[..bytes.len() - 1]).unwrap();
    assert_eq!(v.get("pvc://data/a").await.unwrap_err().reason(), "Malformed");
    std::fs::write(v.root.path().join("a").join(MANIFEST), "{").unwrap();
    assert_eq!(v.get("pvc://data/a").await.unwrap_err().reason(), "Malformed");
}
