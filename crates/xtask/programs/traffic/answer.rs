//! Whether an answer is the right one: an error, or half an answer, is never counted.

use crate::text::{ANSWER, TOKEN};

/// A whole answer.
///
/// # Errors
/// It is another one; the text has its beginning.
pub fn check(body: &[u8]) -> Result<(), String> {
    let text = String::from_utf8_lossy(body);
    let braces = |brace| text.matches(brace).count();
    match text.contains(&format!("\"content\":\"{ANSWER}\"")) && braces('{') == braces('}') {
        true => Ok(()),
        false => Err(format!("a wrong answer: {}", shown(&text))),
    }
}

/// The events of a stream, as they come.
#[derive(Default)]
pub struct Events {
    /// The beginning of a line whose end has not come.
    begun: Vec<u8>,
    /// Tokens until now.
    pub tokens: usize,
    done: bool,
    wrong: Option<String>,
}

impl Events {
    /// More bytes of the stream.
    pub fn take(&mut self, piece: &[u8]) {
        for part in piece.split_inclusive(|byte| *byte == b'\n') {
            self.begun.extend_from_slice(part);
            if self.begun.ends_with(b"\n") {
                let line = std::mem::take(&mut self.begun);
                self.line(line.trim_ascii_end());
                self.begun = line;
                self.begun.clear();
            }
        }
    }

    fn line(&mut self, line: &[u8]) {
        let Some(data) = line.strip_prefix(b"data: ") else { return };
        let data = std::str::from_utf8(data).unwrap_or("no UTF-8");
        if self.done || data.starts_with("{\"error\"") {
            self.wrong.get_or_insert_with(|| shown(data));
        }
        self.done |= data == "[DONE]";
        self.tokens += usize::from(data.contains(TOKEN));
    }

    /// At the end.
    ///
    /// # Errors
    /// There was an error, no `[DONE]`, something after it, or another number of tokens.
    pub fn check(&self, tokens: usize) -> Result<(), String> {
        match &self.wrong {
            Some(event) => Err(format!("a stream has a wrong event: {event}")),
            None if !self.done => Err(format!("a stream ends after {} tokens without [DONE]", self.tokens)),
            None if self.tokens != tokens => Err(format!("a stream has {} of {tokens} tokens", self.tokens)),
            None => Ok(()),
        }
    }
}

/// The beginning of what was said.
pub fn shown(text: &str) -> String {
    text.chars().take(300).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::text;

    fn check_stream(text: &str, tokens: usize) -> Result<(), String> {
        let mut whole = Events::default();
        whole.take(text.as_bytes());
        let mut split = Events::default();
        text.as_bytes().chunks(7).for_each(|piece| split.take(piece));
        assert_eq!(whole.check(tokens), split.check(tokens));
        whole.check(tokens)
    }

    #[test]
    fn only_the_whole_of_the_right_answer_counts() {
        let said = text::whole();
        let body = said.split(|byte| *byte == b'\n').next_back().unwrap_or_default();
        assert_eq!(check(body), Ok(()));
        assert!(check(&body[..body.len() - 1]).is_err());
        assert!(check(br#"{"error":{"message":"no"}}"#).is_err());
    }

    #[test]
    fn a_stream_counts_with_every_token_and_its_end() {
        let event = format!("data: {{\"choices\":[{{\"delta\":{{{TOKEN}1\"}}}}]}}\n\n");
        let done = "data: [DONE]\n\n";
        assert_eq!(check_stream(&format!("{event}: comment\n\n{event}{done}"), 2), Ok(()));
        for wrong in [
            format!("{event}{event}"),
            format!("{event}{done}"),
            format!("{event}{event}{event}{done}"),
            format!("{event}{done}{event}"),
            format!("{event}{event}data: {{\"error\":{{}}}}\n\n{done}"),
        ] {
            assert!(check_stream(&wrong, 2).is_err(), "{wrong}");
        }
    }
}
