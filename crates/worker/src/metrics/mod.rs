//! Measures of generated text and of predicted probabilities, equal to those of the public Python packages.

mod bleu;
mod perplexity;
mod rouge;

pub use bleu::{Bleu, corpus_bleu};
pub use perplexity::Perplexity;
pub use rouge::{Rouge, mean_rouge, rouge};

/// Python's `str.isspace`: Unicode's white space and the four separators of ASCII.
fn is_space(c: char) -> bool {
    c.is_whitespace() || ('\u{1c}'..='\u{1f}').contains(&c)
}
