//! Stop strings: an answer ends where one begins, and no part of one is ever shown.

/// Passes text through until a stop string appears, also one that is spread over several pieces.
#[derive(Clone, Debug, Default)]
pub struct StopFilter {
    stops: Vec<String>,
    /// Text that may be the beginning of a stop string.
    held: String,
}

/// What one more piece of text leads to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Passed {
    /// Text that can be shown.
    pub text: String,
    /// A stop string has appeared: nothing follows.
    pub stopped: bool,
}

impl StopFilter {
    /// `stops` must not hold an empty string.
    pub fn new(stops: Vec<String>) -> Self {
        Self { stops, held: String::new() }
    }

    /// Takes the next piece.
    pub fn push(&mut self, piece: &str) -> Passed {
        if self.stops.is_empty() {
            return Passed { text: piece.to_owned(), stopped: false };
        }
        self.held.push_str(piece);
        let first = self.stops.iter().filter_map(|stop| self.held.find(stop.as_str())).min();
        if let Some(at) = first {
            self.held.truncate(at);
            return Passed { text: std::mem::take(&mut self.held), stopped: true };
        }
        let kept = self.held.split_off(self.held.len() - self.pending());
        Passed { text: std::mem::replace(&mut self.held, kept), stopped: false }
    }

    /// What is left when the answer ends for another reason.
    pub fn finish(self) -> String {
        self.held
    }

    /// Bytes at the end that are the beginning of a stop string.
    fn pending(&self) -> usize {
        let longest = |stop: &String| {
            let most = self.held.len().min(stop.len() - 1);
            (1..=most)
                .rev()
                .find(|&n| stop.is_char_boundary(n) && self.held.as_bytes().ends_with(&stop.as_bytes()[..n]))
        };
        self.stops.iter().filter_map(longest).max().unwrap_or(0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rstest::rstest;

    #[rstest]
    #[case::none(&[], &["a", "b"], "ab", false)]
    #[case::inside(&["END"], &["one END two"], "one ", true)]
    #[case::spread(&["END"], &["one E", "N", "D two"], "one ", true)]
    #[case::only_a_beginning(&["END"], &["one E", "N", "x"], "one ENx", false)]
    #[case::left_at_the_end(&["END"], &["one EN"], "one EN", false)]
    #[case::repeated_beginning(&["aab"], &["aa", "a", "b"], "a", true)]
    #[case::earliest_wins(&["two", "one"], &["zero one two"], "zero ", true)]
    #[case::one_within_another(&["ab", "b"], &["xa", "b"], "x", true)]
    #[case::characters_of_several_bytes(&["é!"], &["caf", "é", "!"], "caf", true)]
    #[case::same_first_bytes(&["é!"], &["è", "é"], "èé", false)]
    #[case::at_once(&["x"], &["x"], "", true)]
    fn nothing_of_a_stop_string_is_shown(
        #[case] stops: &[&str],
        #[case] pieces: &[&str],
        #[case] shown: &str,
        #[case] stopped: bool,
    ) {
        let mut filter = StopFilter::new(stops.iter().map(|s| (*s).to_owned()).collect());
        let mut text = String::new();
        let mut over = false;
        for piece in pieces {
            let passed = filter.push(piece);
            text.push_str(&passed.text);
            if passed.stopped {
                over = true;
                break;
            }
        }
        if !over {
            text.push_str(&filter.finish());
        }
        assert_eq!((text.as_str(), over), (shown, stopped));
    }

    #[test]
    fn text_that_cannot_be_a_stop_string_is_not_held_back() {
        let mut filter = StopFilter::new(vec!["\n\n".into()]);
        assert_eq!(filter.push("word").text, "word");
        assert_eq!(filter.push(" x\n").text, " x");
        assert_eq!(filter.push("y").text, "\ny");
    }
}
