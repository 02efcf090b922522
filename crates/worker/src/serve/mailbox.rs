//! From the engine's thread to one client: a slow client gets larger pieces, and never holds up the others.
//!
//! What has not been taken yet is one growing text, so it is bounded by the answer's own length (`max_tokens`, at most
//! the context), and the engine never waits for anybody.
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::sync::Notify;

use super::error::ApiError;

/// Why an answer ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Finish {
    /// The model ended it, or a stop string appeared.
    Stop,
    /// `max_tokens` or the end of the context.
    Length,
}

impl Finish {
    /// OpenAI's `finish_reason`.
    pub fn name(self) -> &'static str {
        match self {
            Finish::Stop => "stop",
            Finish::Length => "length",
        }
    }
}

/// What came since the last look.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Delivery {
    /// Text, often of one token.
    pub text: String,
    /// Tokens generated so far, from the first.
    pub tokens: usize,
    /// Tokens of the prompt that came from the cache; known with the first token.
    pub cached: usize,
    /// Nothing follows.
    pub end: Option<Result<Finish, ApiError>>,
}

#[derive(Debug, Default)]
struct Shared {
    delivery: Mutex<Delivery>,
    wake: Notify,
    gone: AtomicBool,
}

impl Shared {
    /// A delivery is whole after every change.
    fn lock(&self) -> MutexGuard<'_, Delivery> {
        self.delivery.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The engine's end.
#[derive(Debug)]
pub struct Poster(Arc<Shared>);

/// The client's end; dropping it frees the sequence's slot at the next step.
#[derive(Debug)]
pub struct Mailbox(Arc<Shared>);

/// A pair of ends.
pub fn mailbox() -> (Poster, Mailbox) {
    let shared = Arc::new(Shared::default());
    (Poster(Arc::clone(&shared)), Mailbox(shared))
}

impl Poster {
    /// The answer begins; so many tokens of its prompt came from the cache.
    pub fn begin(&self, cached: usize) {
        self.0.lock().cached = cached;
    }

    /// Text of one more token (may be empty) and how many there are now.
    pub fn post(&self, text: &str, tokens: usize) {
        let mut delivery = self.0.lock();
        delivery.text.push_str(text);
        delivery.tokens = tokens;
        drop(delivery);
        if !text.is_empty() {
            self.0.wake.notify_one();
        }
    }

    /// The last word; later ones are ignored.
    pub fn end(&self, end: Result<Finish, ApiError>) {
        self.0.lock().end.get_or_insert(end);
        self.0.wake.notify_one();
    }

    /// Whether nobody waits for the answer any more.
    pub fn is_gone(&self) -> bool {
        self.0.gone.load(Ordering::Acquire)
    }
}

impl Drop for Poster {
    /// An answer that is dropped unfinished is an error for its client, never a silence.
    fn drop(&mut self) {
        self.end(Err(ApiError::internal()));
    }
}

impl Mailbox {
    /// Waits for text or the end. May be dropped while it waits: nothing is lost.
    pub async fn next(&mut self) -> Delivery {
        loop {
            {
                let mut delivery = self.0.lock();
                if !delivery.text.is_empty() || delivery.end.is_some() {
                    return Delivery {
                        text: std::mem::take(&mut delivery.text),
                        tokens: delivery.tokens,
                        cached: delivery.cached,
                        end: delivery.end.clone(),
                    };
                }
            }
            self.0.wake.notified().await;
        }
    }
}

impl Drop for Mailbox {
    fn drop(&mut self) {
        self.0.gone.store(true, Ordering::Release);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_slow_client_gets_all_text_in_one_piece_with_the_end() {
        let (poster, mut mailbox) = mailbox();
        poster.begin(16);
        poster.post("a", 1);
        poster.post("", 2);
        poster.post("b", 3);
        poster.end(Ok(Finish::Length));
        poster.end(Err(ApiError::internal()));
        let expected = Delivery { text: "ab".into(), tokens: 3, cached: 16, end: Some(Ok(Finish::Length)) };
        assert_eq!(mailbox.next().await, expected);
    }

    #[tokio::test]
    async fn a_lost_engine_ends_the_answer_with_an_error() {
        let (poster, mut mailbox) = mailbox();
        let waiting = tokio::spawn(async move { mailbox.next().await.end });
        drop(poster);
        assert_eq!(waiting.await.expect("no panic"), Some(Err(ApiError::internal())));
    }

    #[test]
    fn a_client_that_left_is_seen() {
        let (poster, mailbox) = mailbox();
        assert!(!poster.is_gone());
        drop(mailbox);
        assert!(poster.is_gone());
    }
}
