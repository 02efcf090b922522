//! Clients: so many connections, each a thread, that ask one thing again and again.
//!
//! Without a rate each asks as soon as it has its answer. With one, requests are due at fixed times, and latency counts from then.
//! With `hold` each opens one stream, and what is counted is counted while all of them are open.

use std::collections::HashMap;
use std::fs;
use std::io::Write;
use std::net::TcpStream;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering::Relaxed};
use std::thread;
use std::time::{Duration, Instant};

use crate::answer::{Events, check, shown};
use crate::latency::{due, percentile};
use crate::proc::{USER_HZ, kilobytes, ticks};
use crate::stub::STACK;
use crate::text;
use crate::wire::Wire;

/// Whoever waits longer has no answer.
const PATIENCE: Duration = Duration::from_secs(120);

/// What is to be done.
struct Task {
    address: String,
    request: Vec<u8>,
    /// Of each stream; `None`: whole answers.
    tokens: Option<usize>,
    connections: usize,
    /// What happens before is not counted.
    warm: Duration,
    counted: Duration,
    /// Requests a second, of all connections together.
    rate: Option<f64>,
    hold: bool,
    /// The proxy's processes.
    pids: Vec<u32>,
}

/// What all clients count together.
#[derive(Default)]
struct Counts {
    answers: AtomicUsize,
    tokens: AtomicUsize,
    /// Streams that have begun.
    begun: AtomicUsize,
    stop: AtomicBool,
}

/// One look at everything.
struct Look {
    at: Instant,
    answers: usize,
    tokens: usize,
    /// Seconds of a processor.
    processor: f64,
    /// Bytes.
    resident: u64,
}

/// Does what the arguments say and prints what was found.
///
/// # Errors
/// An answer is wrong or does not come.
pub fn run(arguments: &[String]) -> Result<(), String> {
    let task = Task::read(arguments)?;
    let counts = Counts::default();
    let began = Instant::now();
    let (first, second, mut latencies) = thread::scope(|scope| {
        let mut clients = Vec::new();
        for number in 0..task.connections {
            let (task, counts) = (&task, &counts);
            let ask = move || {
                let asked = Client::open(task, counts).and_then(|mut client| client.ask_on(number, began));
                // Nothing is counted any more.
                asked.inspect_err(|_| counts.stop.store(true, Relaxed))
            };
            let client = thread::Builder::new().stack_size(STACK).spawn_scoped(scope, ask);
            clients.push(client.map_err(|error| error.to_string())?);
        }
        if task.hold {
            while counts.begun.load(Relaxed) < task.connections && !counts.stop.load(Relaxed) {
                thread::sleep(Duration::from_millis(10));
            }
        }
        thread::sleep(task.warm);
        let first = Look::take(&task, &counts);
        thread::sleep(task.counted);
        let second = Look::take(&task, &counts);
        counts.stop.store(true, Relaxed);
        let mut latencies = Vec::new();
        for client in clients {
            latencies.extend(client.join().map_err(|_| "a client panicked")??);
        }
        Ok::<_, String>((first?, second?, latencies))
    })?;
    if task.hold && second.answers > 0 {
        return Err(
            "streams ended before all of them had been open long enough: ask for more tokens".to_owned()
        );
    }
    latencies.sort();
    let micros = |share| percentile(&latencies, share).map_or(0, |value| value.as_micros());
    println!(
        "{{\"seconds\":{},\"answers\":{},\"tokens\":{},\"processor\":{},\"resident\":{},\"p50\":{},\"p99\":{},\"timed\":{}}}",
        second.at.duration_since(first.at).as_secs_f64(),
        second.answers - first.answers,
        second.tokens - first.tokens,
        second.processor - first.processor,
        second.resident,
        micros(0.5),
        micros(0.99),
        latencies.len(),
    );
    Ok(())
}

impl Task {
    fn read(arguments: &[String]) -> Result<Self, String> {
        let given: HashMap<&str, &str> = arguments.iter().filter_map(|word| word.split_once('=')).collect();
        let text = |name: &str| given.get(name).copied().ok_or(format!("load: no `{name}`"));
        let number = |name: &str| {
            let value = given.get(name).map(|value| value.parse::<f64>());
            value.transpose().map_err(|error| format!("load: `{name}`: {error}"))
        };
        let needed = |name: &str| number(name)?.ok_or(format!("load: no `{name}`"));
        let tokens = number("tokens")?.map(|tokens| tokens as usize);
        let pids = given.get("pids").map_or(Ok(Vec::new()), |pids| {
            pids.split(',').map(|pid| pid.parse().map_err(|error| format!("load: `pids`: {error}"))).collect()
        });
        Ok(Self {
            address: text("address")?.to_owned(),
            request: text::request(text("address")?, text("key")?, text("model")?, tokens),
            tokens,
            connections: needed("connections")? as usize,
            warm: Duration::from_secs_f64(needed("warm")?),
            counted: Duration::from_secs_f64(needed("seconds")?),
            rate: number("rate")?,
            hold: number("hold")?.is_some(),
            pids: pids?,
        })
    }
}

struct Client<'a> {
    task: &'a Task,
    counts: &'a Counts,
    wire: Wire<TcpStream>,
}

impl<'a> Client<'a> {
    fn open(task: &'a Task, counts: &'a Counts) -> Result<Self, String> {
        let open = || {
            let stream = TcpStream::connect(&task.address)?;
            stream.set_nodelay(true)?;
            stream.set_read_timeout(Some(PATIENCE))?;
            Ok(Wire::new(stream))
        };
        let wire = open().map_err(|error: std::io::Error| format!("{}: {error}", task.address))?;
        Ok(Self { task, counts, wire })
    }

    /// Asks until it is told to stop, at the due times where there is a rate. Returns the latencies of those that were due while
    /// it counts.
    fn ask_on(&mut self, connection: usize, began: Instant) -> Result<Vec<Duration>, String> {
        let Task { connections, rate, warm, counted, hold, .. } = *self.task;
        let mut latencies = Vec::new();
        for number in 0.. {
            let Some(rate) = rate else {
                self.ask()?;
                if hold || self.counts.stop.load(Relaxed) {
                    break;
                }
                continue;
            };
            let due = due(number, connection, connections, rate);
            if due >= warm + counted {
                break;
            }
            thread::sleep(due.saturating_sub(began.elapsed()));
            self.ask()?;
            if due >= warm {
                latencies.push(began.elapsed() - due);
            }
        }
        Ok(latencies)
    }

    fn ask(&mut self) -> Result<(), String> {
        self.wire.stream().write_all(&self.task.request).map_err(|error| error.to_string())?;
        let broken = |error| format!("an answer broke off: {error}");
        let (status, length) = self.wire.head(|_| {}).map_err(broken)?.ok_or("no answer: it was closed")?;
        let mut body = Vec::new();
        if status.split(' ').nth(1) != Some("200") {
            self.wire.body(length, |piece| body.extend_from_slice(piece)).map_err(broken)?;
            return Err(format!("{status}: {}", shown(&String::from_utf8_lossy(&body))));
        }
        match self.task.tokens {
            None => {
                self.wire.body(length, |piece| body.extend_from_slice(piece)).map_err(broken)?;
                check(&body)?;
            }
            Some(tokens) => {
                let mut events = Events::default();
                let streamed = self.wire.body(length, |piece| {
                    let before = events.tokens;
                    events.take(piece);
                    self.counts.tokens.fetch_add(events.tokens - before, Relaxed);
                    if before == 0 && events.tokens > 0 {
                        self.counts.begun.fetch_add(1, Relaxed);
                    }
                });
                streamed.map_err(broken)?;
                events.check(tokens)?;
            }
        }
        self.counts.answers.fetch_add(1, Relaxed);
        Ok(())
    }
}

impl Look {
    fn take(task: &Task, counts: &Counts) -> Result<Self, String> {
        let mut look = Self {
            at: Instant::now(),
            answers: counts.answers.load(Relaxed),
            tokens: counts.tokens.load(Relaxed),
            processor: 0.0,
            resident: 0,
        };
        for pid in &task.pids {
            let read = |name: &str| {
                fs::read_to_string(format!("/proc/{pid}/{name}")).map_err(|error| format!("{pid}: {error}"))
            };
            look.processor += ticks(&read("stat")?).ok_or("no processor time")? as f64 / USER_HZ;
            look.resident += kilobytes(&read("status")?, "VmRSS:").ok_or("no memory")? * 1024;
        }
        Ok(look)
    }
}
