//! The worker as a process of this machine: started with a contract, asked how far it is, told to stop, heard at its end.
use std::collections::VecDeque;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::{ExitStatus, Stdio};
use std::time::Duration;

use lathe_api::PodOverrides;
use lathe_contract::{
    CONTRACT_VERSION, Contract, MAX_REPORT_BYTES, ObjectRef, Outcome, Report, Scope, Signer, Summary, Task,
    Trust,
};
use lathe_resolve::pod;
use rustix::process::{Pid, Signal, kill_process};
use tokio::process::{Child, ChildStdin, Command};

use super::place::Place;
use super::show::Show;
use crate::failure::{Done, Problem};
use crate::stop::Stop;

/// Between two questions to a worker.
const ASK: Duration = Duration::from_millis(250);
const PROGRAM: &str = "lathe-worker";
/// Lines of a log that are shown where the last words are missing.
const TAIL: usize = 5;

/// How workers are started and spoken to. Their control ports believe tokens of this run alone.
#[derive(Debug)]
pub struct Workers {
    program: PathBuf,
    http: reqwest::Client,
    signer: Signer,
    trust: Trust,
}

/// A worker at work. Dropped, it is killed.
#[derive(Debug)]
pub struct Running {
    child: Child,
    /// The worker's standard input, open as long as somebody waits for the worker.
    _open: Option<ChildStdin>,
    uid: String,
    addresses: PathBuf,
    summary: PathBuf,
    log: PathBuf,
    control: Option<SocketAddr>,
    /// The user wants it to stop.
    asked: bool,
    /// Where users are served.
    pub serve: Option<SocketAddr>,
}

impl Workers {
    /// Finds the program: `given`, else beside this one, else on PATH.
    ///
    /// # Errors
    /// It is not there.
    pub fn find(given: Option<&Path>) -> Done<Self> {
        let key: [u8; 32] = rand::random();
        let signer = Signer::from_seed(&key);
        let internal = |error: &dyn std::fmt::Display| Problem::transient("InternalError", error.to_string());
        let trust = Trust {
            operator_key: Some(signer.public_pem().map_err(|error| internal(&error))?),
            gateway_key: None,
        };
        // A second call is no error: both are ring.
        let _ = rustls::crypto::ring::default_provider().install_default();
        let http = reqwest::Client::builder()
            .no_proxy()
            .redirect(reqwest::redirect::Policy::none())
            .timeout(Duration::from_secs(5))
            .build()
            .map_err(|error| internal(&error))?;
        Ok(Self { program: program(given)?, http, signer, trust })
    }

    /// The keys that workers believe.
    pub fn trust(&self) -> &Trust {
        &self.trust
    }

    /// The contract of a task, before its folders are those of this machine.
    pub fn contract(&self, object: ObjectRef, mounts: &pod::Mounts, task: Task) -> Contract {
        Contract {
            version: CONTRACT_VERSION,
            object,
            trust: self.trust.clone(),
            mounts: mounts.contract(0),
            task,
        }
    }

    /// Starts a worker, with the environment that `pod` gives it over that of this process. `port`: where it serves.
    ///
    /// # Errors
    /// A folder is missing, or the program does not start.
    pub fn start(
        &self,
        place: &Place,
        show: &mut Show,
        contract: Contract,
        pod: Option<&PodOverrides>,
        port: Option<u16>,
    ) -> Done<Running> {
        let task = pod::task_name(&contract.task);
        let (object, uid) = (object_name(&contract.object), contract.object.uid.clone());
        let contract = place.localise(contract).map_err(|problem| problem.of(&object))?;
        let folder = place.task(&format!("{}/{task}", object.replace('/', "-")))?;
        let file = folder.join("contract.json");
        let json = serde_json::to_vec_pretty(&contract).map_err(|error| {
            Problem::transient("InternalError", format!("the contract cannot be written: {error}"))
        })?;
        std::fs::write(&file, json).map_err(|error| Problem::io("write", &file, &error))?;
        let (addresses, summary, log) =
            (folder.join("addresses.json"), folder.join("summary.json"), folder.join("log"));
        let stderr = std::fs::File::create(&log).map_err(|error| Problem::io("write", &log, &error))?;
        let mut command = Command::new(&self.program);
        command.arg(task).arg("--contract").arg(&file).arg("--summary").arg(&summary);
        command.args(["--control-addr", "127.0.0.1:0"]).arg("--addr-file").arg(&addresses);
        command.envs(pod.iter().flat_map(|pod| &pod.env).map(|variable| (&variable.name, &variable.value)));
        if let Some(port) = port {
            command.args(["--serve-addr", &format!("127.0.0.1:{port}")]);
        }
        // A group of its own: Ctrl-C comes to it through us, once.
        // And the worker ends where we are killed: its standard input closes then.
        command.arg("--stop-with-stdin").stdin(Stdio::piped());
        command.stdout(Stdio::null()).stderr(stderr).process_group(0).kill_on_drop(true);
        let mut child = command.spawn().map_err(|error| Problem::io("start", &self.program, &error))?;
        let open = child.stdin.take();
        show.begin(&object, task, &log);
        Ok(Running {
            child,
            _open: open,
            uid,
            addresses,
            summary,
            log,
            control: None,
            asked: false,
            serve: None,
        })
    }

    /// What the worker says of itself; `None` while it cannot be asked.
    async fn report(&self, running: &mut Running) -> Option<Report> {
        let address = running.control()?;
        let now = jiff::Timestamp::now().as_second();
        let token = self.signer.sign(&running.uid, Scope::Report, now);
        let request = self.http.get(format!("http://{address}/v1/report")).bearer_auth(token);
        let mut answer = request.send().await.ok()?.error_for_status().ok()?;
        let mut bytes = Vec::new();
        while let Some(chunk) = answer.chunk().await.ok()? {
            if bytes.len() + chunk.len() > MAX_REPORT_BYTES {
                return None;
            }
            bytes.extend_from_slice(&chunk);
        }
        Report::parse(&bytes).ok()
    }

    /// Whether a serving worker has answered its own first request.
    async fn is_ready(&self, running: &mut Running) -> bool {
        let Some(address) = running.control() else { return false };
        let answer = self.http.get(format!("http://{address}/readyz")).send().await;
        answer.is_ok_and(|answer| answer.status().is_success())
    }

    /// Follows a worker to its end. `seen` is asked every quarter of a second, with a report where there is one, for what
    /// the worker must stop for: that is the error then.
    ///
    /// # Errors
    /// It failed, or was stopped.
    pub async fn finish(
        &self,
        running: &mut Running,
        show: &mut Show,
        stop: &mut Stop,
        mut seen: impl FnMut(Option<&Report>) -> Option<Problem>,
    ) -> Done<Outcome> {
        let mut ticks = tokio::time::interval(ASK);
        let mut stopped_for = None;
        let status = loop {
            tokio::select! {
                status = running.child.wait() => break status,
                number = stop.next() => running.pass_on(number, show),
                _ = ticks.tick() => {
                    let report = self.report(running).await;
                    if let Some(report) = &report {
                        show.report(report);
                    }
                    if let Some(problem) = seen(report.as_ref()).filter(|_| !running.asked) {
                        stopped_for = Some(problem);
                        running.pass_on(1, show);
                    }
                }
            }
        };
        let ended = status
            .map_err(|error| Problem::io("wait for", &self.program, &error))
            .and_then(|status| running.last_words(status))
            .map_err(|problem| match (stopped_for, problem.reason.as_str()) {
                (Some(cause), "Stopped") => cause,
                _ => problem,
            });
        ended.inspect_err(|problem| show.failed(&problem.reason, &problem.message))
    }

    /// Waits until a serving worker answers.
    ///
    /// # Errors
    /// It ended before.
    pub async fn until_ready(&self, running: &mut Running, show: &mut Show, stop: &mut Stop) -> Done<()> {
        let mut ticks = tokio::time::interval(ASK);
        loop {
            tokio::select! {
                status = running.child.wait() => {
                    let status = status.map_err(|error| Problem::io("wait for", &self.program, &error))?;
                    let problem = match running.last_words(status) {
                        Ok(_) => Problem::stopped("stopped before the service answered"),
                        Err(problem) => problem,
                    };
                    show.failed(&problem.reason, &problem.message);
                    return Err(problem);
                }
                number = stop.next() => running.pass_on(number, show),
                _ = ticks.tick() => {
                    if self.is_ready(running).await {
                        return Ok(());
                    }
                    if let Some(report) = self.report(running).await {
                        show.report(&report);
                    }
                }
            }
        }
    }
}

impl Running {
    /// Address of the control port, once it is open.
    fn control(&mut self) -> Option<SocketAddr> {
        if self.control.is_none() {
            let text = std::fs::read_to_string(&self.addresses).ok()?;
            let addresses: serde_json::Value = serde_json::from_str(&text).ok()?;
            let address = |name: &str| addresses[name].as_str().and_then(|text| text.parse().ok());
            (self.control, self.serve) = (address("controlAddr"), address("serveAddr"));
        }
        self.control
    }

    /// The user's wish to stop: the first saves or drains, the second does not, the third kills.
    fn pass_on(&mut self, number: u32, show: &Show) {
        self.asked = true;
        if number == 1 {
            show.note("stopping: what is done is being saved or answered; once more ends at once");
        }
        if number <= 2 {
            let pid = self.child.id().and_then(|id| i32::try_from(id).ok()).and_then(Pid::from_raw);
            // It may have ended by itself.
            let _ = pid.map(|pid| kill_process(pid, Signal::TERM));
        } else {
            let _ = self.child.start_kill();
        }
    }

    /// Waits for the end of a worker that was asked to stop.
    pub async fn end(&mut self, show: &Show, stop: &mut Stop) -> Done<()> {
        self.pass_on(1, show);
        let status = loop {
            tokio::select! {
                status = self.child.wait() => break status,
                number = stop.next() => self.pass_on(number, show),
            }
        };
        status.map(drop).map_err(|error| Problem::transient("InputOutput", error.to_string()))
    }

    /// Waits until the worker ends by itself, which is not what it is for.
    pub async fn ended(&mut self) -> Problem {
        match self.child.wait().await {
            Ok(status) => match self.last_words(status) {
                Ok(_) => Problem::stopped("the worker was stopped by somebody else"),
                Err(problem) => problem,
            },
            Err(error) => Problem::transient("InputOutput", error.to_string()),
        }
    }

    fn last_words(&self, status: ExitStatus) -> Done<Outcome> {
        let summary = std::fs::read(&self.summary).ok().and_then(|bytes| Summary::parse(&bytes).ok());
        match summary.map(|summary| summary.outcome) {
            Some(Outcome::Failed(failure)) => Err(failure.into()),
            Some(Outcome::Stopped { progress }) => {
                let at = progress.filter(|progress| progress.step > 0).map_or(String::new(), |progress| {
                    format!(" at step {} of {}", progress.step, progress.steps)
                });
                Err(Problem::stopped(format!("stopped{at}. Next: the same command goes on from there.")))
            }
            Some(outcome) => Ok(outcome),
            // It was stopped before it could say so, or not waited for.
            None if self.asked => {
                Err(Problem::stopped("stopped. Next: the same command goes on from what was saved."))
            }
            None => {
                let next = match std::os::unix::process::ExitStatusExt::signal(&status) {
                    Some(9) => {
                        "Next: the kernel kills where memory runs out (`dmesg` says so then): free some, or lower `training.batchTokens` or `serving.maxSequences`; the same command goes on from what was saved."
                    }
                    _ => {
                        "Next: the same command goes on from what was saved; if it ends so again, report it to Lathe's maintainers."
                    }
                };
                let message = format!(
                    "the worker ended ({status}) without last words. {next} Its log {} ends with:\n{}",
                    self.log.display(),
                    tail(&self.log)
                );
                Err(Problem::transient("WorkerFailed", message))
            }
        }
    }
}

/// `kind/name`, the kind in lower case.
pub fn object_name(object: &ObjectRef) -> String {
    format!("{}/{}", object.kind.to_lowercase(), object.name)
}

fn tail(log: &Path) -> String {
    let text = std::fs::read(log).unwrap_or_default();
    let text = String::from_utf8_lossy(&text);
    let mut last = VecDeque::new();
    for line in text.lines() {
        last.push_back(format!("  {line}"));
        if last.len() > TAIL {
            last.pop_front();
        }
    }
    Vec::from(last).join("\n")
}

fn program(given: Option<&Path>) -> Done<PathBuf> {
    let missing = |found: String| {
        let next = "Next: build it (`cargo build --release -p lathe-worker`) and put it beside `lathe`, or name it by --worker PATH or LATHE_WORKER.";
        Problem::user("WorkerMissing", format!("{found}. {next}"))
    };
    if let Some(given) = given {
        let found = given.is_file().then(|| given.to_owned());
        return found.ok_or_else(|| missing(format!("there is no worker at {}", given.display())));
    }
    // Where this one really is: `kubectl-lathe` may be a link to it.
    let own = std::env::current_exe().and_then(|path| path.canonicalize()).ok();
    let beside = own.as_deref().and_then(Path::parent).map(Path::to_owned);
    let path = std::env::var_os("PATH").unwrap_or_default();
    let mut folders = beside.into_iter().chain(std::env::split_paths(&path));
    let found = folders.find_map(|folder| Some(folder.join(PROGRAM)).filter(|file| file.is_file()));
    found.ok_or_else(|| missing(format!("{PROGRAM} is neither beside `lathe` nor on PATH")))
}
