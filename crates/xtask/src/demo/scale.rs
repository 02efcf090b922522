//! Replicas that follow the load: up while many ask, to zero when nobody does, and back for one request.

use std::collections::BTreeSet;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::{self, sleep};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use serde_json::{Value, json};

use super::gateway::{Asked, Gateway};
use super::target::Target;
use crate::ui;

/// Clients that ask again and again: more than one replica takes.
const CLIENTS: usize = 24;
const PATIENCE: Duration = Duration::from_secs(300);
const PAUSE: Duration = Duration::from_millis(500);

/// A service whose scaling is looked at.
pub struct Scaled<'a> {
    target: &'a Target,
    namespace: &'a str,
    name: &'a str,
    /// Times of the decisions that were shown.
    shown: BTreeSet<String>,
}

/// What the clients got.
#[derive(Debug, Default)]
struct Got {
    answers: AtomicU64,
    tokens: AtomicU64,
    sent_away: AtomicU64,
}

impl<'a> Scaled<'a> {
    /// What was decided until now is not shown.
    ///
    /// # Errors
    /// kubectl's words.
    pub fn new(target: &'a Target, namespace: &'a str, name: &'a str) -> Result<Self> {
        let mut scaled = Self { target, namespace, name, shown: BTreeSet::new() };
        scaled.look(|_| {})?;
        Ok(scaled)
    }

    /// Asks by many clients at once until several replicas answer.
    ///
    /// # Errors
    /// A request is lost, or no second replica comes.
    pub fn up(&mut self, gateway: &Gateway, model: &str) -> Result<()> {
        let step = ui::step(format!("{CLIENTS} clients ask {model} again and again"));
        let (over, got) = (AtomicBool::new(false), Got::default());
        let began = Instant::now();
        let replicas = thread::scope(|scope| {
            let client = |number| load(gateway, model, number, &over, &got);
            let clients: Vec<_> = (0..CLIENTS).map(|number| scope.spawn(move || client(number))).collect();
            let replicas = self.until("a second replica", |ready, wanted| ready > 1 && ready == wanted);
            over.store(true, Ordering::Relaxed);
            for client in clients {
                client.join().map_err(|_| anyhow::anyhow!("a client ended in a bug"))??;
            }
            replicas
        })?;
        let [answers, tokens, sent_away] =
            [&got.answers, &got.tokens, &got.sent_away].map(|n| n.load(Ordering::Relaxed));
        step.done(&format!(
            "{replicas} replicas; {answers} answers, {:.0} tokens/s, {sent_away} times told to come again, none lost",
            tokens as f64 / began.elapsed().as_secs_f64()
        ));
        Ok(())
    }

    /// Waits until nobody serves, and asks once more.
    ///
    /// # Errors
    /// It does not fall asleep, or the request is not answered.
    pub fn wake(&mut self, gateway: &Gateway, model: &str, question: &str) -> Result<()> {
        let step = ui::step("nobody asks: the service goes to sleep");
        self.until("zero replicas", |ready, wanted| ready == 0 && wanted == 0)?;
        step.done("no replica runs");
        let step = ui::step("one request wakes it, and is held meanwhile");
        let body = json!({"model": model, "temperature": 0, "max_tokens": 64, "messages": [{"role": "user", "content": question}]});
        let Asked::Answered(answer) = gateway.ask(body)? else {
            bail!("the request that should wake it was sent away")
        };
        self.look(ui::note)?;
        step.done(&format!(
            "first token after {:.1} s, the whole answer after {:.1} s: {}",
            answer.first.as_secs_f64(),
            answer.whole.as_secs_f64(),
            answer.text.trim()
        ));
        Ok(())
    }

    /// Shows decisions until ready and wanted replicas are as `settled` says; returns how many are ready.
    fn until(&mut self, what: &str, settled: impl Fn(i64, i64) -> bool) -> Result<i64> {
        let began = Instant::now();
        while began.elapsed() < PATIENCE {
            let object = self.look(ui::note)?;
            let number = |field: &str| object["status"][field].as_i64().unwrap_or(0);
            let (ready, wanted) = (number("readyReplicas"), number("replicas"));
            if settled(ready, wanted) {
                return Ok(ready);
            }
            sleep(PAUSE);
        }
        bail!("waited {} minutes in vain for {what}", PATIENCE.as_secs() / 60)
    }

    /// Reads the service, and hands over each decision that is new.
    fn look(&mut self, mut show: impl FnMut(&str)) -> Result<Value> {
        let object = self.target.get(self.namespace, &format!("inferenceservice/{}", self.name))?;
        let object = object.with_context(|| format!("inferenceservice/{} is gone", self.name))?;
        for decision in object["status"]["decisions"].as_array().into_iter().flatten() {
            let text = |key: &str| decision[key].as_str().unwrap_or_default();
            if self.shown.insert(text("time").to_owned()) {
                show(&format!("{} -> {} replicas: {}", decision["from"], decision["to"], text("message")));
            }
        }
        Ok(object)
    }
}

/// One client's questions until they are enough.
fn load(gateway: &Gateway, model: &str, number: usize, over: &AtomicBool, got: &Got) -> Result<()> {
    let question = format!("I am customer {number}. How much is the red lamp?");
    let body = json!({"model": model, "max_tokens": 128, "ignore_eos": true,
        "messages": [{"role": "user", "content": question}]});
    while !over.load(Ordering::Relaxed) {
        match gateway.ask(body.clone()).context("a request was lost")? {
            Asked::Answered(answer) => {
                ensure!(answer.pieces > 0, "an answer without a word");
                got.answers.fetch_add(1, Ordering::Relaxed);
                got.tokens.fetch_add(answer.pieces, Ordering::Relaxed);
            }
            Asked::SentAway => {
                got.sent_away.fetch_add(1, Ordering::Relaxed);
                sleep(PAUSE);
            }
        }
    }
    Ok(())
}
