//! Pods that go in the middle: killed, told to stop, out of disk.
use std::fs;
use std::io::{Read, Write};
use std::net::TcpListener;
use std::path::Path;
use std::process::Command;

use lathe_contract::{Outcome, Phase, Report, Task, TrainTask};
use rstest::rstest;

use crate::world::{World, chats, source, step};

fn train(task: &TrainTask) -> Task {
    Task::Train(Box::new(task.clone()))
}

/// What a run that nobody disturbs makes.
fn undisturbed() -> String {
    let world = World::new();
    world.trained(world.train_task()).digest
}

#[test]
fn a_killed_run_goes_on_and_makes_the_same_bytes() {
    let world = World::new();
    let task = world.train_task();
    let mut running = world.start(train(&task));
    running.wait_for("checkpoint written step=5");
    running.signal("KILL");
    let killed = running.end();
    assert_eq!((killed.code, killed.outcome), (None, None));
    let resumed = world.train(task);
    assert!(resumed.log.contains("going on from a checkpoint"), "{}", resumed.log);
    assert!(!resumed.log.contains("measuring the base"), "{}", resumed.log);
    let trained = resumed.trained();
    assert_eq!(trained.digest, undisturbed());
    assert_eq!(trained.progress.restarts, 1);
    let steps: Vec<i64> = trained.progress.curve.iter().map(|(step, _)| *step).collect();
    // Those before it was killed among them, each once.
    assert_eq!(steps, (1..=trained.progress.steps).collect::<Vec<_>>());
}

#[rstest]
#[case::loading("phase=Loading", false)]
#[case::measuring_the_base("EvaluatingBefore", false)]
#[case::training("checkpoint written step=3", false)]
#[case::measuring_the_result("EvaluatingAfter", true)]
#[case::saving("Saving", true)]
fn sigterm_in_any_phase_saves_and_the_next_pod_makes_the_same_bytes(
    #[case] moment: &str,
    #[case] may_be_done: bool,
) {
    let world = World::new();
    let task = world.train_task();
    let mut running = world.start(train(&task));
    running.wait_for(moment);
    running.signal("TERM");
    let ended = running.end();
    // With all steps behind it a tiny model may be done before the signal is heard.
    if !(may_be_done && ended.code == Some(0)) {
        ended.stopped();
        // Nothing that is not whole bears its final name; the signal may come when it is whole already.
        let names: Vec<String> = world.names("artefacts/tuned");
        let whole = undisturbed();
        assert!(
            names.iter().all(|name| name.starts_with('.') || whole.ends_with(name.as_str())),
            "{names:?}"
        );
    }
    assert_eq!(world.trained(task).digest, undisturbed());
}

/// Held-out rows that take a while to measure: the signal is heard among them.
fn long_exam(world: &World) {
    fs::write(world.path("test.jsonl"), chats(100..900)).expect("rows");
}

#[test]
fn sigterm_while_the_base_is_measured_ends_at_once_and_loses_nothing_of_the_training() {
    let world = World::new();
    long_exam(&world);
    let task = world.train_task();
    let mut running = world.start(train(&task));
    running.wait_for("phase=EvaluatingBefore");
    running.signal("TERM");
    let ended = running.end();
    ended.stopped();
    assert!(!ended.log.contains("phase=Training"), "{}", ended.log);
    world.trained(task);
}

#[test]
fn sigterm_while_the_result_is_measured_keeps_the_trained_weights() {
    let world = World::new();
    long_exam(&world);
    let task = world.train_task();
    let mut running = world.start(train(&task));
    running.wait_for("phase=EvaluatingAfter");
    running.signal("TERM");
    let ended = running.end();
    ended.stopped();
    let Some(Outcome::Stopped { progress: Some(progress) }) = &ended.outcome else { panic!("no progress") };
    assert_eq!((progress.step, progress.checkpoint_step), (12, 12));
    assert!(!ended.log.contains("phase=Saving"), "{}", ended.log);
    assert_eq!(world.names("artefacts"), Vec::<String>::new());
    let resumed = world.train(task);
    assert!(resumed.log.contains("going on from a checkpoint step=12"), "{}", resumed.log);
    assert!(!resumed.log.contains("checkpoint written"), "trained again: {}", resumed.log);
    assert_eq!(resumed.trained().progress.lost_steps, 0);
}

#[test]
fn sigterm_while_training_saves_the_step_it_was_at() {
    let world = World::new();
    let mut task = world.train_task();
    task.checkpoint.interval_seconds = 3600;
    task.training.steps = Some(100_000);
    let mut running = world.start(train(&task));
    running.wait_for("phase=Training");
    running.signal("TERM");
    let ended = running.end();
    ended.stopped();
    let Some(Outcome::Stopped { progress: Some(progress) }) = ended.outcome else { panic!("no progress") };
    if progress.step > 0 {
        assert_eq!(progress.checkpoint_step, progress.step);
        assert!(world.checkpoint(progress.step as u64).join("manifest").exists());
    }
}

#[test]
fn sigterm_while_fetching_ends_at_once_and_the_report_said_so() {
    let world = World::new();
    // A server that takes the request and never answers.
    let server = TcpListener::bind("127.0.0.1:0").expect("a port");
    let mut task = world.train_task();
    task.dataset.train = source("");
    task.dataset.train.uri = format!("http://{}/train.jsonl", server.local_addr().expect("address"));
    let mut running = world.start(train(&task));
    let port = running.control_port();
    let _held = server.accept().expect("asked");
    let mut stream = std::net::TcpStream::connect(("127.0.0.1", port)).expect("the control port");
    stream.write_all(b"GET /v1/report HTTP/1.0\r\n\r\n").expect("asks");
    let mut answer = String::new();
    stream.read_to_string(&mut answer).expect("answers");
    let body = answer.split_once("\r\n\r\n").expect("a body").1;
    let report = Report::parse(body.as_bytes()).expect("a report");
    assert_eq!(report.phase, Phase::Fetching);
    running.signal("TERM");
    running.end().stopped();
}

#[test]
fn a_damaged_checkpoint_is_passed_over_for_the_one_before() {
    let world = World::new();
    let task = world.train_task();
    let mut running = world.start(train(&task));
    running.wait_for("checkpoint written step=6");
    running.signal("KILL");
    running.end();
    let dir = world.run_dir();
    let mut steps: Vec<u64> = fs::read_dir(&dir)
        .expect("checkpoints")
        .flatten()
        .filter_map(|entry| step(&entry.file_name().to_string_lossy()))
        .collect();
    steps.sort_unstable();
    let newest = *steps.last().expect("one");
    let state = world.checkpoint(newest).join("state");
    let mut bytes = fs::read(&state).expect("state");
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    fs::write(&state, bytes).expect("damaged");
    let resumed = world.train(task);
    let expected = format!("going on from a checkpoint step={}", newest - 1);
    assert!(resumed.log.contains(&expected) && resumed.log.contains("is damaged"), "{}", resumed.log);
    let trained = resumed.trained();
    assert_eq!(trained.digest, undisturbed());
    assert!(trained.progress.lost_steps >= 1, "{:?}", trained.progress);
}

#[test]
fn a_full_disk_keeps_the_checkpoint_before_and_training_goes_on_from_it() {
    let world = World::new();
    let mut task = world.train_task();
    let disk = world.path("checkpoints");
    fs::create_dir_all(&disk).expect("folder");
    // Room for one checkpoint, not for two.
    let Some(_mounted) = Mounted::tmpfs(&disk, "48k") else {
        eprintln!("skipped: mounting a small disk needs root");
        return;
    };
    task.method = crate::world::lora();
    let full = world.train(task.clone());
    let log = full.log.clone();
    let message = full.refused("DiskFull");
    assert!(
        message.starts_with("`checkpoint.destination`: ") && message.contains("enlarge the volume"),
        "{message}"
    );
    let names: Vec<String> = world.names(&format!("checkpoints/{}", world.names("checkpoints")[0]));
    assert!(names.iter().all(|name| !name.ends_with(".partial")), "{names:?}");
    assert!(names.iter().any(|name| step(name) == Some(1)), "{names:?}\n{log}");
    assert!(Mounted::remount(&disk, "10m"));
    let resumed = world.train(task);
    assert!(resumed.log.contains("going on from a checkpoint step=1"), "{}", resumed.log);
    assert_eq!(resumed.trained().digest, undisturbed());
}

#[test]
fn a_checkpoint_folder_that_cannot_be_made_is_named_by_its_field() {
    let world = World::new();
    // A file where the folder should be.
    fs::write(world.path("checkpoints"), "").expect("a file");
    let ended = world.train(world.train_task());
    let Some(Outcome::Failed(failure)) = ended.outcome else { panic!("{}", ended.log) };
    assert!(failure.message.starts_with("`checkpoint.destination`: cannot create "), "{}", failure.message);
}

#[test]
fn a_second_worker_takes_over_and_the_first_ends_with_the_reason() {
    let world = World::new();
    let mut task = world.train_task();
    task.training.steps = Some(100_000);
    task.checkpoint.interval_seconds = 3600;
    let mut first = world.start(train(&task));
    first.wait_for("phase=Training");
    // It is known by its folder, not by its process: this one runs on as long as nobody tells it.
    let mut second = world.start(train(&task));
    second.wait_for("phase=Training");
    let ended = first.end();
    let Some(Outcome::Failed(failure)) = &ended.outcome else { panic!("{:?}", ended.outcome) };
    assert_eq!(
        (failure.reason.as_str(), failure.user_error, ended.code),
        ("CheckpointsTaken", false, Some(1))
    );
    assert!(
        failure.message.starts_with("`checkpoint.destination`: FineTuneJob test/job (on "),
        "{}",
        failure.message
    );
    second.signal("TERM");
    second.end().stopped();
}

#[test]
fn a_full_disk_takes_no_half_result() {
    let world = World::new();
    fs::create_dir_all(world.path("artefacts")).expect("folder");
    let Some(_mounted) = Mounted::tmpfs(&world.path("artefacts"), "8k") else {
        eprintln!("skipped: mounting a small disk needs root");
        return;
    };
    let message = world.train(world.train_task()).refused("DiskFull");
    assert!(message.starts_with("`output.destination`: cannot "), "{message}");
    assert!(message.contains("No space left on device"), "{message}");
    assert_eq!(world.names("artefacts/tuned"), Vec::<String>::new());
}

#[test]
fn whole_weights_never_pass_through_the_folder_for_downloads() {
    let world = World::new();
    let mut task = world.train_task();
    task.method = lathe_contract::TrainMethod::Full {};
    fs::create_dir_all(world.cache()).expect("folder");
    // Room for the report, not for the weights.
    let Some(_mounted) = Mounted::tmpfs(&world.cache(), "64k") else {
        eprintln!("skipped: mounting a small disk needs root");
        return;
    };
    let trained = world.trained(task);
    let weights = world.path("artefacts/tuned").join(trained.digest.trim_start_matches("sha256:"));
    let bytes = fs::metadata(weights.join("model.safetensors")).expect("weights").len();
    assert!(bytes > 64 << 10, "{bytes} bytes prove nothing");
    assert!(world.names("artefacts/tuned").iter().all(|name| !name.starts_with('.')));
}

struct Mounted(std::path::PathBuf);

impl Mounted {
    fn tmpfs(at: &Path, size: &str) -> Option<Self> {
        let options = format!("size={size}");
        let mount = Command::new("mount").args(["-t", "tmpfs", "-o", &options, "none"]).arg(at).output();
        mount.is_ok_and(|done| done.status.success()).then(|| Mounted(at.to_owned()))
    }

    fn remount(at: &Path, size: &str) -> bool {
        let options = format!("remount,size={size}");
        Command::new("mount").args(["-o", &options]).arg(at).status().is_ok_and(|status| status.success())
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg(&self.0).status();
    }
}
