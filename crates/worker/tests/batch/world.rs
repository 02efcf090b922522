//! Folders for one test, contracts for them, and the worker's process.
use std::fs;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU64, Ordering};

use lathe_contract::{
    CONTRACT_VERSION, CheckDataReport, CheckpointPolicy, Contract, DatasetFormat, DatasetInput,
    EvaluationPolicy, LoraSettings, Metric, ModelInput, Mounts, ObjectRef, OptimizerState, Outcome,
    OutputTarget, Precision, Schedule, SourceRef, Summary, Task, TrainMethod, TrainProgress, TrainTask,
    TrainingSettings, Trust,
};
use tempfile::TempDir;

use crate::model;

static STARTED: AtomicU64 = AtomicU64::new(0);

/// A volume with a base model and rows, and somewhere for the results.
pub struct World {
    /// Removed at the end of the test.
    dir: TempDir,
}

/// What a worker left.
pub struct Ended {
    /// Exit code; none where it was killed.
    pub code: Option<i32>,
    /// Its last words.
    pub outcome: Option<Outcome>,
    /// Its log.
    pub log: String,
}

/// What a finished tuning says.
pub struct Trained {
    pub uri: String,
    pub digest: String,
    pub scores: Vec<lathe_contract::Score>,
    pub progress: TrainProgress,
    pub model: lathe_contract::InspectReport,
}

/// A worker at work.
pub struct Running {
    child: Child,
    lines: std::io::Lines<BufReader<std::process::ChildStderr>>,
    log: String,
    summary: PathBuf,
}

impl World {
    pub fn new() -> World {
        let dir = tempfile::tempdir().expect("folder");
        let world = World { dir };
        model::write(&world.path("base"), 1);
        fs::write(world.path("train.jsonl"), chats(0..60)).expect("rows");
        fs::write(world.path("test.jsonl"), chats(100..108)).expect("rows");
        world
    }

    /// A path on the volume.
    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join("volume").join(name).tap(|path| {
            fs::create_dir_all(path.parent().expect("a folder")).expect("folder");
        })
    }

    /// The folder for downloads, which a pod may lose and which is bounded.
    pub fn cache(&self) -> PathBuf {
        self.dir.path().join("cache")
    }

    pub fn train_task(&self) -> TrainTask {
        TrainTask {
            attempt: 1,
            inputs: None,
            base: input("base"),
            dataset: DatasetInput {
                train: source("train.jsonl"),
                evaluation: Some(source("test.jsonl")),
                holdout: None,
                format: DatasetFormat::Auto,
            },
            method: lora(),
            training: TrainingSettings {
                epochs: None,
                steps: Some(12),
                learning_rate: 1e-2,
                schedule: Schedule::Cosine,
                warmup: 0.1,
                batch_tokens: 400,
                micro_batch_tokens: 200,
                optimizer_state: OptimizerState::Float32,
                sequence_length: 64,
                weight_decay: 0.01,
                max_grad_norm: 1.0,
                seed: 42,
            },
            checkpoint: CheckpointPolicy { interval_seconds: 0, keep: 2, destination: source("checkpoints") },
            evaluation: EvaluationPolicy {
                metrics: vec![Metric::Perplexity, Metric::BLEU, Metric::ROUGEL],
                gates: Vec::new(),
            },
            output: OutputTarget { model_name: "tuned".into(), destination: source("artefacts") },
        }
    }

    pub fn run(&self, task: Task) -> Ended {
        self.start(task).end()
    }

    pub fn train(&self, task: TrainTask) -> Ended {
        self.run(Task::Train(Box::new(task)))
    }

    /// Tunes to the end.
    pub fn trained(&self, task: TrainTask) -> Trained {
        self.train(task).trained()
    }

    pub fn start(&self, task: Task) -> Running {
        self.start_in(task, &[])
    }

    /// Starts the worker with these variables in its environment.
    pub fn start_in(&self, task: Task, environment: &[(&str, &str)]) -> Running {
        self.start_under(&[], task, environment)
    }

    fn start_under(&self, before: &[&str], task: Task, environment: &[(&str, &str)]) -> Running {
        let name = match &task {
            Task::Train(_) => "train",
            Task::Serve(_) => "serve",
            Task::Evaluate(_) => "evaluate",
            Task::Inspect(_) => "inspect",
            Task::CheckData(_) => "check-data",
        };
        let volume = self.path("").display().to_string();
        let contract = Contract {
            version: CONTRACT_VERSION,
            object: ObjectRef {
                kind: "FineTuneJob".into(),
                namespace: "test".into(),
                name: "job".into(),
                uid: "11111111-2222-3333-4444-555555555555".into(),
            },
            trust: Trust::default(),
            mounts: Mounts {
                claims: [("data".to_owned(), volume)].into(),
                cache: self.cache().display().to_string(),
                cache_bytes: None,
            },
            task,
        };
        let path = self.dir.path().join("contract.json");
        fs::write(&path, serde_json::to_vec(&contract).expect("json")).expect("contract");
        self.launch(before, name, &path, environment)
    }

    /// Runs a task as a user whom the modes of files bind, as in a pod; a superuser gives up what he has beyond that.
    pub fn run_bound_by_modes(&self, task: Task) -> Ended {
        let root = fs::metadata("/proc/self").is_ok_and(|own| std::os::unix::fs::MetadataExt::uid(&own) == 0);
        let without = "-dac_override,-dac_read_search";
        let (bounding, inherited) = (format!("--bounding-set={without}"), format!("--inh-caps={without}"));
        let before: &[&str] = if root { &["setpriv", &bounding, &inherited] } else { &[] };
        self.start_under(before, task, &[]).end()
    }

    pub fn start_with(&self, name: &str, contract: &Path) -> Running {
        self.launch(&[], name, contract, &[])
    }

    fn launch(&self, before: &[&str], name: &str, contract: &Path, environment: &[(&str, &str)]) -> Running {
        // Two may run at a time.
        let number = STARTED.fetch_add(1, Ordering::Relaxed);
        let summary = self.dir.path().join(format!("summary-{number}.json"));
        let words = [before, &[env!("CARGO_BIN_EXE_lathe-worker"), name]].concat();
        let mut child = Command::new(words[0])
            .args(&words[1..])
            .args(["--control-port", "0", "--contract"])
            .arg(contract)
            .arg("--summary")
            .arg(&summary)
            .env_remove("RUST_LOG")
            .envs(environment.iter().copied())
            .stderr(Stdio::piped())
            .spawn()
            .expect("the worker starts");
        let lines = BufReader::new(child.stderr.take().expect("its log")).lines();
        Running { child, lines, log: String::new(), summary }
    }

    /// Names below a folder of the volume, sorted.
    pub fn names(&self, folder: &str) -> Vec<String> {
        let Ok(entries) = fs::read_dir(self.path(folder)) else { return Vec::new() };
        let mut names: Vec<String> =
            entries.flatten().map(|entry| entry.file_name().to_string_lossy().into_owned()).collect();
        names.sort();
        names
    }

    /// The folder of a checkpoint.
    pub fn checkpoint(&self, at: u64) -> PathBuf {
        let dir = self.run_dir();
        let names = fs::read_dir(&dir).expect("checkpoints").flatten();
        let name = names.map(|entry| entry.file_name().to_string_lossy().into_owned());
        dir.join(name.into_iter().find(|name| step(name) == Some(at)).expect("a checkpoint"))
    }

    /// The folder of the one run's checkpoints.
    pub fn run_dir(&self) -> PathBuf {
        let names = self.names("checkpoints");
        assert_eq!(names.len(), 1, "{names:?}");
        self.path("checkpoints").join(&names[0])
    }
}

impl Running {
    /// Reads the log until a line has `text`.
    pub fn wait_for(&mut self, text: &str) {
        for line in self.lines.by_ref() {
            let line = line.expect("text");
            self.log += &line;
            self.log.push('\n');
            if line.contains(text) {
                return;
            }
        }
        panic!("the worker ended without `{text}`:\n{}", self.log);
    }

    /// Port of the control port, from the log.
    pub fn control_port(&mut self) -> u16 {
        self.wait_for("control port is open");
        let line = self.log.lines().last().expect("a line").to_owned();
        line.rsplit(':').next().and_then(|port| port.trim().parse().ok()).expect("a port")
    }

    pub fn signal(&self, name: &str) {
        let done = Command::new("kill").arg(format!("-{name}")).arg(self.child.id().to_string()).status();
        assert!(done.expect("kill").success());
    }

    /// Waits for the end.
    pub fn end(mut self) -> Ended {
        for line in self.lines.by_ref().map_while(Result::ok) {
            self.log += &line;
            self.log.push('\n');
        }
        let code = self.child.wait().expect("ends").code();
        let outcome =
            fs::read(&self.summary).ok().map(|bytes| Summary::parse(&bytes).expect("a summary").outcome);
        Ended { code, outcome, log: self.log }
    }
}

impl Ended {
    pub fn trained(self) -> Trained {
        match self.outcome {
            Some(Outcome::Trained { uri, digest, scores, progress, model, .. }) => {
                assert_eq!(self.code, Some(0));
                Trained { uri, digest, scores, progress, model }
            }
            other => panic!("not trained: {other:?}\n{}", self.log),
        }
    }

    pub fn report(self) -> CheckDataReport {
        match self.outcome {
            Some(Outcome::DataChecked(report)) => report,
            other => panic!("not checked: {other:?}\n{}", self.log),
        }
    }

    /// The message of a failure with this reason that only the user can cure.
    pub fn refused(self, reason: &str) -> String {
        match self.outcome {
            Some(Outcome::Failed(failure)) => {
                assert_eq!(failure.reason, reason, "{}\n{}", failure.message, self.log);
                assert_eq!((failure.user_error, self.code), (true, Some(64)), "{}", failure.message);
                assert!(failure.message.contains(". Next: "), "{}", failure.message);
                failure.message
            }
            other => panic!("not refused: {other:?}\n{}", self.log),
        }
    }

    pub fn stopped(&self) {
        assert!(matches!(self.outcome, Some(Outcome::Stopped { .. })), "{:?}\n{}", self.outcome, self.log);
        assert_eq!(self.code, Some(75));
    }
}

trait Tap: Sized {
    fn tap(self, look: impl FnOnce(&Self)) -> Self {
        look(&self);
        self
    }
}

impl Tap for PathBuf {}

/// The step in the name of a checkpoint's folder.
pub fn step(name: &str) -> Option<u64> {
    name.strip_prefix("step-")?.split_once('.')?.0.parse().ok()
}

pub fn source(path: &str) -> SourceRef {
    SourceRef { uri: format!("pvc://data/{path}"), revision: None, digest: None, secret_dir: None }
}

pub fn input(path: &str) -> ModelInput {
    ModelInput { name: "tiny".into(), source: source(path), inspected: None }
}

pub fn lora() -> TrainMethod {
    TrainMethod::Lora(LoraSettings {
        rank: 4,
        alpha: 8,
        dropout: 0.1,
        targets: ["q_proj", "v_proj", "down_proj"].map(String::from).to_vec(),
        base_precision: Precision::Float32,
    })
}

/// Rows of a skill that can be learned: to say a letter three times.
pub fn chats(numbers: std::ops::Range<u32>) -> String {
    let row = |number: u32| {
        let letter = char::from(b'a' + (number % 26) as u8);
        let ask = format!("{letter}{}?", number % 7);
        let answer = String::from_iter([letter; 3]);
        let messages =
            serde_json::json!([{"role": "user", "content": ask}, {"role": "assistant", "content": answer}]);
        serde_json::json!({ "messages": messages }).to_string() + "\n"
    };
    numbers.map(row).collect()
}
