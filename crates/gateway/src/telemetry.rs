//! The log on standard error, and the usage log on standard output.
use std::io::{IsTerminal as _, Write};
use std::sync::mpsc::{SyncSender, sync_channel};
use std::time::Duration;

use anyhow::Context as _;
use prometheus_client::metrics::counter::Counter;
use tracing::Subscriber;
use tracing_subscriber::filter::filter_fn;
use tracing_subscriber::fmt::MakeWriter;
use tracing_subscriber::layer::SubscriberExt as _;
use tracing_subscriber::registry::LookupSpan;
use tracing_subscriber::util::SubscriberInitExt as _;
use tracing_subscriber::{EnvFilter, Layer, fmt};

use crate::options::LogFormat;

/// Target of the events that are lines of the usage log.
const USAGE: &str = "usage";

/// Lines of the usage log that wait to be written.
const WAITING: usize = 8192;
/// How long the last of them have.
const LAST_LINES: Duration = Duration::from_secs(2);

/// Starts logging. `lost` counts the lines that the usage log could not take.
///
/// # Errors
/// The filter is malformed, or logging was started before.
pub fn start(format: LogFormat, lost: Counter) -> anyhow::Result<UsageLog> {
    let filter = EnvFilter::try_from_default_env().or_else(|_| EnvFilter::try_new("info"))?;
    let log = fmt::layer().with_ansi(std::io::stderr().is_terminal()).with_writer(std::io::stderr);
    let log = match format {
        LogFormat::Text => log.boxed(),
        LogFormat::Json => log.json().boxed(),
    };
    let log = log.with_filter(filter).with_filter(filter_fn(|metadata| metadata.target() != USAGE));
    let lines = UsageLog::start(std::io::stdout(), lost)?;
    let usage = usage(lines.clone());
    tracing_subscriber::registry().with(log).with(usage).try_init().context("logging was started twice")?;
    Ok(lines)
}

/// A thread that writes lines: whoever reads them too slowly loses some, and holds up no answer.
#[derive(Clone)]
pub struct UsageLog {
    lines: SyncSender<Message>,
    lost: Counter,
}

enum Message {
    Line(Vec<u8>),
    /// Everything before it was written.
    Finish(SyncSender<()>),
}

impl UsageLog {
    /// Writes to `output` from now on.
    ///
    /// # Errors
    /// No thread could be started.
    pub fn start(mut output: impl Write + Send + 'static, lost: Counter) -> std::io::Result<Self> {
        let (lines, messages) = sync_channel(WAITING);
        let failed = lost.clone();
        std::thread::Builder::new().name("usage-log".to_owned()).spawn(move || {
            for message in messages {
                match message {
                    Message::Line(line) => {
                        if output.write_all(&line).and_then(|()| output.flush()).is_err() {
                            failed.inc();
                        }
                    }
                    // Nobody may wait any more.
                    Message::Finish(done) => drop(done.try_send(())),
                }
            }
        })?;
        Ok(Self { lines, lost })
    }

    /// Waits a moment until every line was written.
    pub fn finish(&self) {
        let (done, finished) = sync_channel(1);
        // Where there is no room, nobody reads.
        if self.lines.try_send(Message::Finish(done)).is_ok() {
            let _ = finished.recv_timeout(LAST_LINES);
        }
    }
}

impl Write for UsageLog {
    /// `bytes` are a whole line, which is how they come from a layer.
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        if self.lines.try_send(Message::Line(bytes.to_vec())).is_err() {
            self.lost.inc();
        }
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

impl MakeWriter<'_> for UsageLog {
    type Writer = Self;

    fn make_writer(&self) -> Self {
        self.clone()
    }
}

/// One flat object of JSON a line, whatever the log's filter says.
pub fn usage<S>(lines: UsageLog) -> impl Layer<S>
where
    S: Subscriber + for<'a> LookupSpan<'a>,
{
    fmt::layer()
        .json()
        .flatten_event(true)
        .with_current_span(false)
        .with_span_list(false)
        .with_level(false)
        .with_writer(lines)
        .with_filter(filter_fn(|metadata| metadata.target() == USAGE))
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc::{Receiver, SyncSender};

    use super::*;

    /// Takes a byte string when it is told to.
    struct Slow {
        turns: Receiver<()>,
        written: SyncSender<Vec<u8>>,
    }

    impl Write for Slow {
        fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
            self.turns.recv().map_err(std::io::Error::other)?;
            self.written.send(bytes.to_vec()).map_err(std::io::Error::other)?;
            Ok(bytes.len())
        }

        fn flush(&mut self) -> std::io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn whoever_does_not_read_the_usage_log_loses_lines_and_holds_nobody_up() {
        let (go, turns) = sync_channel(2 * WAITING);
        let (written, lines) = sync_channel(2 * WAITING);
        let lost = Counter::default();
        let mut log = UsageLog::start(Slow { turns, written }, lost.clone()).unwrap();
        let all = WAITING + 10;
        for at in 0..all {
            log.write_all(at.to_string().as_bytes()).unwrap();
        }
        // The thread itself may hold one.
        let kept = all as u64 - lost.get();
        assert!(kept == WAITING as u64 || kept == WAITING as u64 + 1, "{kept}");
        for _ in 0..kept {
            go.send(()).unwrap();
        }
        let first: Vec<_> = lines.iter().take(kept as usize).collect();
        assert_eq!((first[0].as_slice(), first[1].as_slice()), (&b"0"[..], &b"1"[..]));
    }
}
