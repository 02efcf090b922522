//! How many tokens an answer took: what a worker says beside it, in a header or, after a stream, a trailer.
use std::fmt;

/// Name of the header and the trailer.
pub const USAGE_HEADER: &str = "lathe-usage";
const MAX_VALUE_BYTES: usize = 256;

/// Tokens of one request.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Usage {
    /// Of the prompt.
    pub prompt: u64,
    /// Of the answer.
    pub completion: u64,
    /// Of the prompt, those that came from the replica's cache and were not read again.
    pub cached: u64,
}

impl fmt::Display for Usage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "prompt={},completion={},cached={}", self.prompt, self.completion, self.cached)
    }
}

impl Usage {
    /// Reads a header's value; names that are not known are passed over, so that a newer worker may say more, and an older one
    /// may not say `cached`. No more than the prompt can have been cached.
    #[must_use]
    pub fn parse(value: &str) -> Option<Self> {
        if value.len() > MAX_VALUE_BYTES {
            return None;
        }
        let (mut prompt, mut completion, mut cached) = (None, None, 0);
        for part in value.split(',') {
            let (name, number) = part.trim().split_once('=')?;
            match name {
                "prompt" => prompt = Some(number.parse::<u32>().ok()?),
                "completion" => completion = Some(number.parse::<u32>().ok()?),
                "cached" => cached = number.parse::<u32>().ok()?,
                _ => {}
            }
        }
        let prompt = u64::from(prompt?);
        Some(Self { prompt, completion: completion?.into(), cached: u64::from(cached).min(prompt) })
    }

    /// Of the prompt, those that the replica read.
    #[must_use]
    pub fn read(self) -> u64 {
        self.prompt.saturating_sub(self.cached)
    }

    /// All of them, however they came.
    #[must_use]
    pub fn total(self) -> u64 {
        self.prompt.saturating_add(self.completion)
    }
}

#[cfg(test)]
mod tests {
    use rstest::rstest;

    use super::*;

    #[rstest]
    #[case("prompt=7,completion=3", Some((7, 3, 0)))]
    #[case("completion=3, prompt=7, cached=5", Some((7, 3, 5)))]
    #[case("prompt=7,completion=3,cached=9,more=x", Some((7, 3, 7)))]
    #[case("prompt=7,completion=3,cached=-1", None)]
    #[case("prompt=7", None)]
    #[case("prompt=-7,completion=3", None)]
    #[case("prompt=99999999999,completion=3", None)]
    #[case("", None)]
    #[case("prompt", None)]
    fn what_a_worker_says_is_read_with_care(#[case] value: &str, #[case] expected: Option<(u64, u64, u64)>) {
        let usage = expected.map(|(prompt, completion, cached)| Usage { prompt, completion, cached });
        assert_eq!(Usage::parse(value), usage);
    }

    #[test]
    fn it_reads_back() {
        let usage = Usage { prompt: 12, completion: 0, cached: 8 };
        assert_eq!(Usage::parse(&usage.to_string()), Some(usage));
        assert_eq!((usage.total(), usage.read()), (12, 4));
    }
}
