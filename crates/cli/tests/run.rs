//! `lathe run` with the real worker: the quick-start's job, shortened, in a folder of its own.
#![allow(clippy::unwrap_used, reason = "a test may stop where it stands")]

use std::io::{BufRead, BufReader, Lines};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdout, Command, Output, Stdio};

use serde_json::Value;

const LATHE: &str = env!("CARGO_BIN_EXE_lathe");

/// The quick-start's manifests with changes to their text; its volume is the repository's.
struct World(tempfile::TempDir);

impl World {
    fn new(changes: &[(&str, &str)]) -> Self {
        let world = World(tempfile::tempdir().unwrap());
        let quickstart = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../examples/quickstart");
        let mut open: Vec<_> = changes.iter().map(|(from, _)| *from).collect();
        for entry in std::fs::read_dir(&quickstart).unwrap() {
            let file = entry.unwrap().path();
            if file.extension().is_none_or(|end| end != "yaml") {
                continue;
            }
            let mut text = std::fs::read_to_string(&file).unwrap();
            for (from, to) in changes {
                if text.contains(from) {
                    open.retain(|waiting| waiting != from);
                    text = text.replace(from, to);
                }
            }
            std::fs::write(world.path(&file.file_name().unwrap().to_string_lossy()), text).unwrap();
        }
        assert!(open.is_empty(), "the quick-start no longer says {open:?}: change the test too");
        std::fs::create_dir(world.path("volumes")).unwrap();
        let volume = quickstart.join("volumes/quickstart").canonicalize().unwrap();
        std::os::unix::fs::symlink(volume, world.path("volumes/quickstart")).unwrap();
        world
    }

    /// Its job would train for hours.
    fn endless() -> Self {
        World::new(&[
            ("epochs: 6", "steps: 100000"),
            ("metrics: [Perplexity, BLEU, ROUGEL]", "metrics: [Perplexity]"),
            ("metric: ROUGEL", "metric: Perplexity"),
            ("atLeast: \"0.7\"", "atMost: \"1\""),
        ])
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    fn command(&self, args: &[&str]) -> Command {
        let worker = Path::new(LATHE).with_file_name("lathe-worker");
        assert!(
            worker.is_file(),
            "{} is not built: run `cargo build -p lathe-worker`, or `cargo test --workspace`",
            worker.display()
        );
        let mut command = Command::new(LATHE);
        command.args(["run", "-o", "json", "-f"]).arg(self.0.path()).args(args);
        command.env_remove("LATHE_WORKER");
        command
    }

    /// Runs to the end. Returns the exit code and the events.
    fn run(&self, args: &[&str]) -> (Option<i32>, Vec<Value>) {
        let output = self.command(args).output().unwrap();
        (output.status.code(), events(&output))
    }

    fn start(&self, args: &[&str]) -> Running {
        let mut child = self.command(args).stdout(Stdio::piped()).spawn().unwrap();
        let lines = BufReader::new(child.stdout.take().unwrap()).lines();
        Running { child, lines, seen: Vec::new() }
    }
}

fn events(output: &Output) -> Vec<Value> {
    let text = String::from_utf8_lossy(&output.stdout);
    text.lines()
        .map(|line| serde_json::from_str(line).unwrap_or_else(|_| panic!("no JSON: {line}")))
        .collect()
}

/// A run under way; killed where the test fails.
struct Running {
    child: Child,
    lines: Lines<BufReader<ChildStdout>>,
    seen: Vec<Value>,
}

impl Running {
    /// Reads events until one fits.
    fn until(&mut self, what: &str, fits: impl Fn(&Value) -> bool) -> Value {
        for line in self.lines.by_ref() {
            let event: Value = serde_json::from_str(&line.unwrap()).unwrap();
            self.seen.push(event.clone());
            if fits(&event) {
                return event;
            }
        }
        panic!("the run ended without {what}: {:#?}", self.seen);
    }

    fn interrupt(&self) {
        let sent = Command::new("kill").arg("-INT").arg(self.child.id().to_string()).status().unwrap();
        assert!(sent.success());
    }

    /// The process id of the worker that runs now.
    fn worker(&self) -> String {
        // Whichever thread has started it.
        let threads = std::fs::read_dir(format!("/proc/{}/task", self.child.id())).unwrap();
        let children: String = threads
            .filter_map(|thread| std::fs::read_to_string(thread.ok()?.path().join("children")).ok())
            .collect();
        children.trim().to_owned()
    }

    /// The exit code and the last event.
    fn end(mut self) -> (Option<i32>, Option<Value>) {
        for line in self.lines.by_ref() {
            let event: Value = serde_json::from_str(&line.unwrap()).unwrap();
            // It would never end.
            assert!(event["event"] != "serving", "{event:#}");
            self.seen.push(event);
        }
        let last = self.seen.pop();
        (self.child.wait().unwrap().code(), last)
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.child.kill();
    }
}

fn find<'a>(events: &'a [Value], name: &str) -> &'a Value {
    events.iter().find(|event| event["event"] == name).unwrap_or_else(|| panic!("no {name} in {events:#?}"))
}

fn score(tuned: &Value, metric: &str, which: &str) -> f64 {
    let scores = tuned["scores"].as_array().unwrap();
    let score = scores.iter().find(|score| score["metric"] == metric).unwrap();
    score[which].as_str().unwrap().parse().unwrap()
}

#[test]
fn a_job_is_tuned_once_and_then_served() {
    let world = World::new(&[
        ("epochs: 6", "epochs: 3"),
        ("metrics: [Perplexity, BLEU, ROUGEL]", "metrics: [ROUGEL]"),
        ("\"0.7\"", "\"0.6\""),
    ]);
    let (code, events) = world.run(&["--no-serve"]);
    assert_eq!(code, Some(0), "{events:#?}");
    let tuned = find(&events, "tuned");
    assert!(score(tuned, "ROUGEL", "after") > score(tuned, "ROUGEL", "before") + 0.1, "{tuned:#}");
    assert_eq!((&tuned["adopted"], &tuned["model"]), (&false.into(), &"shop-support".into()));
    assert!(Path::new(tuned["folder"].as_str().unwrap()).join("adapter_config.json").is_file(), "{tuned:#}");
    let skipped: Vec<_> = events.iter().filter(|event| event["event"] == "skipped").collect();
    assert_eq!(skipped.len(), 3, "a claim, a Job and the service: {skipped:#?}");

    let mut run = world.start(&["--port", "0"]);
    let again = run.until("a tuned model", |event| event["event"] == "tuned");
    assert_eq!((&again["adopted"], &again["folder"]), (&true.into(), &tuned["folder"]));
    let serving = run.until("an endpoint", |event| event["event"] == "serving");
    assert_eq!(serving["models"], serde_json::json!(["shop", "shop-support"]));
    let ask = |model: &str| {
        let url = serving["url"].as_str().unwrap();
        let answer = Command::new(LATHE)
            .args(["chat", "--url", url, "--model", model, "--temperature", "0", "How much is the red lamp?"])
            .output()
            .unwrap();
        assert!(answer.status.success(), "{}", String::from_utf8_lossy(&answer.stderr));
        String::from_utf8(answer.stdout).unwrap()
    };
    let (plain, taught) = (ask("shop"), ask("shop-support"));
    assert!(taught.starts_with("Thank you") && !plain.starts_with("Thank you"), "{plain:?} {taught:?}");
    run.interrupt();
    let (code, last) = run.end();
    assert_eq!(code, Some(0), "{last:#?}");
}

#[test]
fn ctrl_c_saves_and_the_next_run_goes_on_and_a_failed_gate_is_not_served() {
    let world = World::new(&[
        ("epochs: 6", "steps: 120"),
        ("metrics: [Perplexity, BLEU, ROUGEL]", "metrics: [Perplexity]"),
        ("metric: ROUGEL", "metric: Perplexity"),
        ("atLeast: \"0.7\"", "atMost: \"1\""),
    ]);
    let at_least = |step: i64| {
        move |event: &Value| event["phase"] == "Training" && event["progress"]["step"].as_i64() >= Some(step)
    };
    let mut first = world.start(&["--no-serve"]);
    first.until("three steps", at_least(3));
    first.interrupt();
    let (code, last) = first.end();
    let last = last.unwrap();
    assert_eq!(code, Some(75), "{last:#}");
    let words = last["message"].as_str().unwrap();
    let step: i64 = words.split(' ').find_map(|word| word.parse().ok()).unwrap_or_else(|| panic!("{words}"));
    assert!(step >= 3, "{words}");

    let mut second = world.start(&["--port", "0"]);
    let resumed = second.until("training", at_least(1));
    assert!(resumed["progress"]["step"].as_i64() >= Some(step), "{resumed:#}");
    assert_eq!(resumed["progress"]["lostSteps"], 0);
    let (code, last) = second.end();
    let last = last.unwrap();
    assert_eq!((code, &last["reason"]), (Some(64), &"GateFailed".into()), "{last:#}");
}

#[test]
fn a_spent_budget_stops_and_a_raised_one_lets_the_job_go_on() {
    let world = World::new(&[
        ("epochs: 6", "steps: 100000"),
        ("metrics: [Perplexity, BLEU, ROUGEL]", "metrics: [Perplexity]"),
        ("metric: ROUGEL", "metric: Perplexity"),
        ("atLeast: \"0.7\"", "atMost: \"1\""),
        ("  output:\n", "  budget:\n    maxCost: \"0.01\"\n  output:\n"),
    ]);
    // Every core costs a cent in five seconds.
    let price = "apiVersion: lathe.dev/v1alpha1\nkind: AcceleratorProfile\nmetadata: {name: cpu}\nspec: {resource: cpu, runtime: CPU, devicesPerNode: 1, price: {perHour: \"7.2\", currency: EUR}}\n";
    std::fs::write(world.path("00-profile.yaml"), price).unwrap();
    let exceeded = |(code, events): (Option<i32>, Vec<Value>)| {
        let ended = find(&events, "ended").clone();
        assert_eq!((code, &ended["reason"]), (Some(64), &"BudgetExceeded".into()), "{events:#?}");
        let words = ended["message"].as_str().unwrap().to_owned();
        assert!(words.ends_with("checkpoint kept. Next: raise `spec.budget.maxCost`."), "{words}");
        (words, events.iter().any(|event| event["event"] == "started" && event["task"] == "train"))
    };
    let (words, started) = exceeded(world.run(&["--no-serve"]));
    assert!(started && words.contains("after 0.01 EUR; "), "{words}");
    let (_, started) = exceeded(world.run(&["--no-serve"]));
    assert!(!started, "what is spent is spent");

    let manifest = world.path("30-tune.yaml");
    let text = std::fs::read_to_string(&manifest).unwrap().replace("\"0.01\"", "\"100\"");
    std::fs::write(&manifest, text).unwrap();
    let mut run = world.start(&["--no-serve"]);
    run.until("training", |event| event["progress"]["step"].as_i64() >= Some(1));
    run.interrupt();
    assert_eq!(run.end().0, Some(75));
}

#[test]
fn a_bad_row_is_named_by_file_line_and_field() {
    let world = World::new(&[("pvc://quickstart/data/train.jsonl", "pvc://rows/train.jsonl")]);
    let rows = "{\"messages\": [{\"role\": \"user\", \"content\": \"a\"}, {\"role\": \"assistant\", \"content\": \"b\"}]}\n{\"messages\": [{\"role\": \"user\", \"content\": 7}]}\n";
    std::fs::create_dir(world.path("mine")).unwrap();
    std::fs::write(world.path("mine/train.jsonl"), rows).unwrap();
    let mine = format!("rows={}", world.path("mine").display());
    let (code, events) = world.run(&["--volume", &mine]);
    let ended = find(&events, "ended");
    assert_eq!((code, &ended["reason"]), (Some(64), &"MalformedRow".into()), "{events:#?}");
    let message = ended["message"].as_str().unwrap();
    assert!(
        message.contains("train.jsonl") && message.contains("line 2") && message.contains("content"),
        "{message}"
    );
}

#[test]
fn a_worker_that_is_killed_says_what_may_have_done_it_and_loses_nothing() {
    let world = World::endless();
    let mut run = world.start(&["--no-serve"]);
    run.until("a step", |event| event["progress"]["step"].as_i64() >= Some(1));
    let sent = Command::new("kill").arg("-KILL").arg(run.worker()).status().unwrap();
    assert!(sent.success());
    let (code, last) = run.end();
    let last = last.unwrap();
    assert_eq!((code, &last["reason"]), (Some(1), &"WorkerFailed".into()), "{last:#}");
    let words = last["message"].as_str().unwrap();
    assert!(words.contains("memory") && words.contains("Next: "), "{words}");
}

#[test]
fn a_run_that_is_killed_takes_its_worker_with_it() {
    let world = World::endless();
    let mut run = world.start(&["--no-serve"]);
    run.until("a step", |event| event["progress"]["step"].as_i64() >= Some(1));
    let worker = run.worker();
    run.child.kill().unwrap();
    run.child.wait().unwrap();
    // Nobody is told when a process that is not one's own ends, so it is looked at; a worker that stays fails the test.
    let there =
        || std::fs::read_to_string(format!("/proc/{worker}/stat")).is_ok_and(|stat| !stat.contains(") Z "));
    let started = std::time::Instant::now();
    while there() {
        assert!(started.elapsed() < std::time::Duration::from_secs(60), "worker {worker} runs on");
        std::thread::sleep(std::time::Duration::from_millis(50));
    }
}

#[test]
fn a_worker_has_the_environment_that_its_pod_would_have() {
    let pod = "  pod: {env: [{name: LATHE_CPU, value: abacus}]}\n  output:";
    let world = World::new(&[("  output:", pod)]);
    let output = world.command(&["--no-serve"]).env("LATHE_CPU", "portable").output().unwrap();
    let events = events(&output);
    let ended = find(&events, "ended");
    assert_ne!(output.status.code(), Some(0), "{events:#?}");
    let words = ended["message"].as_str().unwrap();
    assert!(words.contains("`LATHE_CPU`") && words.contains("found `abacus`"), "{words}");
}

#[test]
fn a_taken_name_is_told() {
    let world = World::new(&[("modelName: shop-support", "modelName: shop-base")]);
    let (code, events) = world.run(&["--no-serve"]);
    let ended = find(&events, "ended");
    assert_eq!((code, &ended["reason"]), (Some(64), &"OutputExists".into()), "{events:#?}");
    let words = ended["message"].as_str().unwrap();
    assert!(words.contains("Model shop-base") && words.contains("`output.modelName`"), "{words}");
}

#[test]
fn what_is_missing_is_named_before_anything_runs() {
    let world = World::new(&[]);
    for (args, reason, words) in [
        (["--worker", "/nowhere/worker"], "WorkerMissing", "/nowhere/worker"),
        (["-f", "/nowhere/x.yaml"], "NotFound", "/nowhere/x.yaml"),
        (["--volume", "quickstart=/nowhere"], "VolumeMissing", "--volume quickstart=DIR"),
    ] {
        let (code, events) = world.run(&args);
        let ended = find(&events, "ended");
        assert_eq!((code, &ended["reason"]), (Some(64), &reason.into()), "{events:#?}");
        assert!(ended["message"].as_str().unwrap().contains(words), "{ended:#}");
    }
}

#[test]
fn a_wrong_manifest_is_refused_by_file_object_and_field() {
    let world = World::new(&[("rank: 16", "rank: sixteen")]);
    let output = Command::new(LATHE).args(["run", "-f"]).arg(world.path("30-tune.yaml")).output().unwrap();
    let told = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(64), "{told}");
    assert!(
        told.contains("30-tune.yaml, object 1: FineTuneJob support-tone: `spec.trainable.lora.rank` must be of type integer (found \"sixteen\")"),
        "{told}"
    );
}

#[test]
fn help_says_what_comes_next() {
    for command in ["run", "status", "logs", "chat"] {
        let output = Command::new(LATHE).args([command, "--help"]).output().unwrap();
        let help = String::from_utf8_lossy(&output.stdout);
        assert!(output.status.success() && help.contains("Examples:"), "{command}: {help}");
    }
    let wrong = Command::new(LATHE).args(["run"]).output().unwrap();
    assert_eq!(wrong.status.code(), Some(2));
}
