//! A real Chromium without a window, driven by its own DevTools protocol over the pipe that it offers for that: messages of JSON, a
//! zero byte after each. A crate for it would bring types of the whole protocol, which take minutes to compile, for these few calls.
use std::collections::HashMap;
use std::process::Stdio;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use base64::Engine as _;
use base64::prelude::BASE64_STANDARD;
use serde_json::{Value, json};
use tempfile::TempDir;
use tokio::io::{AsyncBufReadExt as _, AsyncWriteExt as _, BufReader};
use tokio::process::{Child, ChildStdin, Command};
use tokio::sync::oneshot;

use super::rig::soon;

/// The program; it reads commands from file descriptor 3 and writes to 4.
const START: &str = r#"exec chromium "$@" 3<&0 4>&1 </dev/null >&2"#;

/// One page in a browser of its own, which ends with it.
pub struct Browser {
    input: tokio::sync::Mutex<ChildStdin>,
    next: AtomicU64,
    open: Arc<Mutex<HashMap<u64, oneshot::Sender<Value>>>>,
    events: Arc<Mutex<Vec<Value>>>,
    session: Option<String>,
    _process: Child,
    _profile: TempDir,
}

impl Browser {
    /// A browser with an empty page, of a desktop's size.
    pub async fn start() -> Self {
        let profile = tempfile::tempdir().unwrap();
        let mut command = Command::new("sh");
        command.args(["-c", START, "sh", "--headless", "--remote-debugging-pipe", "--no-first-run"]);
        // Tests run as root and in containers, where neither a sandbox nor much shared memory is to be had; no address but ours is.
        command.args([
            "--no-sandbox",
            "--disable-dev-shm-usage",
            "--disable-gpu",
            "--disable-background-networking",
        ]);
        command.arg("--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1");
        command.arg(format!("--user-data-dir={}", profile.path().display()));
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::null()).kill_on_drop(true);
        let mut process = command.spawn().unwrap();
        let (open, events) = (Arc::<Mutex<HashMap<u64, oneshot::Sender<Value>>>>::default(), Arc::default());
        let (answers, seen) = (Arc::clone(&open), Arc::clone(&events));
        let mut output = BufReader::new(process.stdout.take().unwrap());
        tokio::spawn(async move {
            let mut message = Vec::new();
            while output.read_until(0, &mut message).await.is_ok_and(|bytes| bytes > 1) {
                message.pop();
                let mut told: Value = serde_json::from_slice(&message).unwrap();
                message.clear();
                match told["id"].as_u64() {
                    Some(id) => {
                        drop(answers.lock().unwrap().remove(&id).map(|asker| asker.send(told.take())))
                    }
                    None => Mutex::<Vec<Value>>::lock(&seen).unwrap().push(told),
                }
            }
            // Whoever waits for it is told that it is gone.
            answers.lock().unwrap().clear();
        });
        let mut browser = Self {
            input: process.stdin.take().unwrap().into(),
            next: AtomicU64::new(1),
            open,
            events,
            session: None,
            _process: process,
            _profile: profile,
        };
        let target = browser.call("Target.createTarget", json!({"url": "about:blank"})).await;
        let attached = json!({"targetId": target["targetId"], "flatten": true});
        let session = browser.call("Target.attachToTarget", attached).await;
        browser.session = session["sessionId"].as_str().map(str::to_owned);
        for domain in ["Page", "Runtime", "Network", "Log"] {
            browser.call(&format!("{domain}.enable"), json!({})).await;
        }
        browser.size(1100, 900, false).await;
        browser
    }

    /// A method of the protocol, and its result.
    pub async fn call(&self, method: &str, params: Value) -> Value {
        let id = self.next.fetch_add(1, Ordering::Relaxed);
        let (sender, answer) = oneshot::channel();
        self.open.lock().unwrap().insert(id, sender);
        let mut message = json!({"id": id, "method": method, "params": params});
        if let Some(session) = &self.session {
            message["sessionId"] = json!(session);
        }
        let text = message.to_string() + "\0";
        // One that could not be started says nothing.
        let sent = self.input.lock().await.write_all(text.as_bytes()).await;
        let told = "Chromium did not start or has ended; `cargo xtask test --only page` installs it";
        sent.unwrap_or_else(|error| panic!("{told}: {error}"));
        let mut answer = soon(answer).await.expect(told);
        assert!(answer["error"].is_null(), "{method}: {}", answer["error"]);
        answer["result"].take()
    }

    pub async fn open(&self, url: &str) {
        self.call("Page.navigate", json!({"url": url})).await;
    }

    /// Width and height in CSS pixels.
    pub async fn size(&self, width: u32, height: u32, mobile: bool) {
        let size = json!({"width": width, "height": height, "deviceScaleFactor": 1, "mobile": mobile});
        self.call("Emulation.setDeviceMetricsOverride", size).await;
    }

    /// The value of an expression of JavaScript.
    pub async fn value(&self, expression: &str) -> Value {
        let asked = json!({"expression": expression, "returnByValue": true, "awaitPromise": true});
        let mut answer = self.call("Runtime.evaluate", asked).await;
        assert!(answer["exceptionDetails"].is_null(), "{expression}: {}", answer["exceptionDetails"]);
        answer["result"]["value"].take()
    }

    /// Waits until an expression is true.
    pub async fn until(&self, expression: &str) {
        let guarded =
            format!("(() => {{ try {{ return Boolean({expression}); }} catch {{ return false; }} }})()");
        let waiting = async {
            while self.value(&guarded).await != json!(true) {
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        };
        if tokio::time::timeout(Duration::from_secs(60), waiting).await.is_err() {
            panic!("never: {expression}; the page says {}", self.text().await);
        }
    }

    /// Everything that a person can read.
    pub async fn text(&self) -> String {
        self.value("document.body.innerText").await.as_str().unwrap().to_owned()
    }

    /// Types as a keyboard does, into what has the focus.
    pub async fn types(&self, text: &str) {
        self.call("Input.insertText", json!({"text": text})).await;
    }

    /// Presses and lets go a key: `Tab`, `Enter`, `ArrowDown`, ` `; with `Shift` or `Control` before a `+`.
    pub async fn press(&self, keys: &str) {
        let (held, key) = keys.rsplit_once('+').unwrap_or(("", keys));
        let modifiers = match held {
            "Control" => 2,
            "Shift" => 8,
            _ => 0,
        };
        let code = match key {
            "Tab" => 9,
            "Enter" => 13,
            " " => 32,
            "ArrowDown" => 40,
            _ => panic!("no code for {key}"),
        };
        let mut event = json!({"key": key, "code": if key == " " { "Space" } else { key }, "windowsVirtualKeyCode": code,
            "modifiers": modifiers, "type": "keyDown"});
        match key {
            "Enter" if modifiers == 0 => event["text"] = json!("\r"),
            " " => event["text"] = json!(" "),
            _ => {}
        }
        self.call("Input.dispatchKeyEvent", event.clone()).await;
        event["type"] = json!("keyUp");
        event.as_object_mut().unwrap().remove("text");
        self.call("Input.dispatchKeyEvent", event).await;
    }

    /// Everything that was wrong with the page: what the console says, and what was asked of anybody but `url`.
    pub fn troubles(&self, url: &str) -> Vec<String> {
        let events = self.events.lock().unwrap();
        let trouble = |event: &Value| {
            let params = &event["params"];
            let asked = params["request"]["url"].as_str().unwrap_or_default();
            let wrong = match event["method"].as_str().unwrap_or_default() {
                "Runtime.exceptionThrown" => true,
                "Runtime.consoleAPICalled" => {
                    ["error", "warning", "assert"].iter().any(|kind| params["type"] == *kind)
                }
                "Log.entryAdded" => {
                    ["error", "warning"].iter().any(|level| params["entry"]["level"] == *level)
                }
                "Network.requestWillBeSent" => !asked.starts_with(url),
                _ => false,
            };
            wrong.then(|| params.to_string())
        };
        events.iter().filter_map(trouble).collect()
    }

    /// Paths of all requests, in order.
    pub fn asked(&self, url: &str) -> Vec<String> {
        let events = self.events.lock().unwrap();
        let sent = events.iter().filter(|event| event["method"] == "Network.requestWillBeSent");
        sent.filter_map(|event| {
            event["params"]["request"]["url"].as_str()?.strip_prefix(url).map(str::to_owned)
        })
        .collect()
    }

    /// Writes the whole page as a picture into the folder that `LATHE_SCREENSHOTS` names, to be looked at.
    pub async fn picture(&self, name: &str) {
        let Some(folder) = std::env::var_os("LATHE_SCREENSHOTS") else { return };
        self.call("Emulation.setScrollbarsHidden", json!({"hidden": true})).await;
        let mut clip = self.call("Page.getLayoutMetrics", json!({})).await["cssContentSize"].take();
        clip["scale"] = json!(1);
        let asked = json!({"format": "png", "captureBeyondViewport": true, "clip": clip});
        let taken = self.call("Page.captureScreenshot", asked).await;
        let picture = BASE64_STANDARD.decode(taken["data"].as_str().unwrap()).unwrap();
        std::fs::write(std::path::Path::new(&folder).join(format!("{name}.png")), picture).unwrap();
    }
}
