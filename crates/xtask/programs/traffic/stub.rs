//! A worker that has every answer ready: what a proxy can do is not bounded by what is behind it.

use std::io::{self, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use crate::text::{self, PACE_MILLIS, PACED};
use crate::wire::Wire;

/// A connection's thread needs no more.
pub const STACK: usize = 128 << 10;

/// What is said, made once.
struct Said {
    whole: Vec<u8>,
    opening: Vec<u8>,
    tokens: [Vec<u8>; 10],
}

/// Serves at the address until it is killed.
///
/// # Errors
/// The address is taken.
pub fn run(arguments: &[String]) -> Result<(), String> {
    let address = arguments.first().ok_or("stub: no address")?;
    let listener = TcpListener::bind(address).map_err(|error| format!("{address}: {error}"))?;
    let said = Arc::new(Said { whole: text::whole(), opening: text::opening(), tokens: text::tokens() });
    println!("ready");
    loop {
        let (stream, _) = listener.accept().map_err(|error| error.to_string())?;
        let said = Arc::clone(&said);
        let serving = thread::Builder::new().stack_size(STACK).spawn(move || {
            // A proxy may close when it likes.
            let _ = serve(&stream, &said);
        });
        serving.map_err(|error| error.to_string())?;
    }
}

fn serve(mut stream: &TcpStream, said: &Said) -> io::Result<()> {
    stream.set_nodelay(true)?;
    let mut wire = Wire::new(stream);
    let mut body = Vec::new();
    loop {
        let mut trailers = false;
        let head = wire.head(|line| trailers |= line == "te: trailers")?;
        let Some((_, length)) = head else { return Ok(()) };
        body.clear();
        wire.body(length, |piece| body.extend_from_slice(piece))?;
        let asked = String::from_utf8_lossy(&body);
        if field(&asked, "stream") != Some("true") {
            stream.write_all(&said.whole)?;
            continue;
        }
        let tokens = field(&asked, "max_tokens").and_then(|value| value.parse().ok()).unwrap_or(1);
        let paced = field(&asked, "model").map(|name| name.trim_matches('"')) == Some(PACED);
        stream.write_all(&said.opening)?;
        let begun = Instant::now();
        for number in 1..=tokens {
            if paced {
                let due = Duration::from_millis(PACE_MILLIS * number as u64);
                thread::sleep(due.saturating_sub(begun.elapsed()));
            }
            // Each by itself, as an engine's steps make them.
            stream.write_all(&said.tokens[number % said.tokens.len()])?;
        }
        stream.write_all(&text::closing(tokens, trailers))?;
    }
}

/// The value of a plain field of a JSON object, wherever in it; enough for requests that are known.
fn field<'a>(json: &'a str, name: &str) -> Option<&'a str> {
    let (_, rest) = json.split_once(&format!("\"{name}\""))?;
    let value = rest.trim_start().strip_prefix(':')?.trim_start();
    value.split([',', '}']).next().map(str::trim_end)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fields_are_found_however_they_are_spaced() {
        let json =
            r#"{"model": "paced","stream_options":{"include_usage":true}, "stream" :true ,"max_tokens":7}"#;
        assert_eq!(field(json, "model"), Some("\"paced\""));
        assert_eq!((field(json, "stream"), field(json, "max_tokens")), (Some("true"), Some("7")));
        assert_eq!(field(json, "n"), None);
    }
}
