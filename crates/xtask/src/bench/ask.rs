//! Asking the endpoint as a user's program does, with a clock.

use std::io::{BufRead, BufReader};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, ensure};
use serde_json::{Value, json};

/// A streamed answer: when each piece of text came, and the tokens in all.
#[derive(Clone, Debug, PartialEq)]
pub struct Answer {
    /// Seconds after the question was asked.
    pub pieces: Vec<f64>,
    /// Tokens that were generated, by `usage`.
    pub tokens: u64,
}

/// A client that gives up after `patience`.
pub fn agent(patience: Duration) -> ureq::Agent {
    ureq::Agent::config_builder().timeout_global(Some(patience)).build().new_agent()
}

/// A document.
///
/// # Errors
/// No answer, or none in JSON.
pub fn get(agent: &ureq::Agent, url: &str) -> Result<Value> {
    let text = agent.get(url).call().with_context(|| url.to_owned())?.into_body().read_to_string()?;
    Ok(serde_json::from_str(&text)?)
}

/// Asks all prompts at the same time for `tokens` tokens each, streamed, the likeliest ones. Answers are timed from one
/// instant.
///
/// # Errors
/// One of them is refused or breaks off.
pub fn stream(address: &str, prompts: &[Vec<u32>], tokens: usize) -> Result<Vec<Answer>> {
    let begun = Instant::now();
    thread::scope(|scope| {
        let asked: Vec<_> =
            prompts.iter().map(|prompt| scope.spawn(move || one(address, prompt, tokens, begun))).collect();
        asked.into_iter().map(|answer| answer.join().map_err(|_| anyhow!("a client panicked"))?).collect()
    })
}

fn one(address: &str, prompt: &[u32], tokens: usize, begun: Instant) -> Result<Answer> {
    let body = json!({
        "model": "bench", "prompt": prompt, "max_tokens": tokens, "temperature": 0, "ignore_eos": true, "stream": true,
        "stream_options": {"include_usage": true},
    });
    let url = format!("http://{address}/v1/completions");
    let post =
        agent(Duration::from_secs(600)).post(&url).content_type("application/json").send(body.to_string());
    let response = post.context("the endpoint does not answer")?;
    let mut answer = Answer { pieces: Vec::new(), tokens: 0 };
    let mut ended = false;
    for line in BufReader::new(response.into_body().into_reader()).lines() {
        let line = line?;
        let Some(data) = line.strip_prefix("data: ") else { continue };
        let now = begun.elapsed().as_secs_f64();
        if data == "[DONE]" {
            ended = true;
            break;
        }
        let event: Value = serde_json::from_str(data)?;
        ensure!(event.get("error").is_none(), "the endpoint says {}", event["error"]);
        if event["choices"][0]["text"].as_str().is_some_and(|text| !text.is_empty()) {
            answer.pieces.push(now);
        }
        if let Some(tokens) = event["usage"]["completion_tokens"].as_u64() {
            answer.tokens = tokens;
        }
    }
    ensure!(ended && !answer.pieces.is_empty(), "an answer broke off");
    Ok(answer)
}

/// Tokens a second of all answers together while every one of them was being generated, from the last one's first piece
/// to the first one's last: the sum of each answer's own rate between its pieces of that time. (Pieces of one step come
/// one after the other; to count them by a common clock would lose those behind the first one's last.) A piece counts for
/// as many tokens as pieces of its answer have on average.
pub fn decode_rate(answers: &[Answer]) -> Option<f64> {
    let begin = answers.iter().filter_map(|answer| answer.pieces.first().copied()).reduce(f64::max)?;
    let end = answers.iter().filter_map(|answer| answer.pieces.last().copied()).reduce(f64::min)?;
    let rate = |Answer { pieces, tokens }: &Answer| {
        let within: Vec<f64> = pieces.iter().copied().filter(|at| (begin..=end).contains(at)).collect();
        let (first, last) = (within.first()?, within.last()?);
        let per_piece = *tokens as f64 / pieces.len() as f64;
        (last > first).then(|| (within.len() - 1) as f64 * per_piece / (last - first))
    };
    answers.iter().map(rate).sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_answer_is_as_fast_as_its_tokens_follow_each_other() {
        let answer = Answer { pieces: vec![3.0, 3.5, 4.0, 4.5, 5.0], tokens: 5 };
        assert_eq!(decode_rate(&[answer]), Some(2.0));
    }

    #[test]
    fn several_answers_count_while_all_of_them_are_generated() {
        let early = Answer { pieces: vec![1.0, 2.0, 3.0, 4.0], tokens: 8 };
        let late = Answer { pieces: vec![2.0, 3.0, 4.0, 5.0], tokens: 4 };
        // From 2 to 4: two pieces of two tokens each, two pieces of one.
        assert_eq!(decode_rate(&[early.clone(), late]), Some(3.0));
        let apart = Answer { pieces: vec![7.0, 8.0], tokens: 2 };
        assert_eq!(decode_rate(&[early, apart]), None);
    }

    #[test]
    fn pieces_of_a_step_that_come_one_after_the_other_are_not_lost() {
        let answer = |i: u32| Answer {
            pieces: (0..4).map(|k| f64::from(k) + f64::from(i) * 1e-4).collect(),
            tokens: 4,
        };
        let rate = decode_rate(&(0..32).map(answer).collect::<Vec<_>>()).expect("they overlap");
        assert!((rate - 32.0).abs() < 1e-6, "{rate}");
    }
}
