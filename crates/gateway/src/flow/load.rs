//! What a replica says of itself with each answer: ORCA's header `endpoint-load-metrics`, under vLLM's names. Untrusted.
use axum::http::HeaderMap;
use lathe_contract::ReplicaCapacity;

use crate::headers::LOAD;

/// Longest value that is read.
const MAX_BYTES: usize = 4 << 10;
/// More than any replica can do.
const MOST: f64 = 1e12;

/// One replica's load.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct ReplicaLoad {
    /// Requests that it decodes.
    pub running: u32,
    /// Requests that wait for a slot there.
    pub waiting: u32,
    /// What it measured for itself.
    pub capacity: Option<ReplicaCapacity>,
}

impl ReplicaLoad {
    /// What the header says; `None`: nothing that can be used. Names that are not known are passed over.
    pub fn read(headers: &HeaderMap) -> Option<Self> {
        let text = headers.get(LOAD)?.to_str().ok().filter(|text| text.len() <= MAX_BYTES)?;
        let [mut running, mut waiting, mut prompt, mut generation, mut sequences] = [None; 5];
        for (name, value) in
            text.strip_prefix("TEXT ")?.split(',').filter_map(|pair| pair.trim().split_once('='))
        {
            let place = match name.strip_prefix("named_metrics.") {
                Some("num_requests_running") => &mut running,
                Some("num_requests_waiting") => &mut waiting,
                Some("capacity_prompt_tokens_per_second") => &mut prompt,
                Some("capacity_generation_tokens_per_second") => &mut generation,
                Some("capacity_sequences") => &mut sequences,
                _ => continue,
            };
            place.get_or_insert(value);
        }
        let count = |value: Option<&str>| value?.parse::<u32>().ok();
        let speed = |value: Option<&str>| value?.parse::<f64>().ok().filter(|s| *s > 0.0 && *s <= MOST);
        let capacity = || {
            Some(ReplicaCapacity {
                prompt: speed(prompt)?,
                generation: speed(generation)?,
                sequences: count(sequences).filter(|sequences| *sequences > 0)?,
            })
        };
        Some(Self { running: count(running)?, waiting: count(waiting)?, capacity: capacity() })
    }
}

#[cfg(test)]
mod tests {
    use rstest::rstest;

    use super::*;

    /// Running, waiting and what it can do.
    type Said = (u32, u32, Option<(f64, f64, u32)>);

    #[rstest]
    #[case::as_a_worker_says_it(
        "TEXT named_metrics.kv_cache_usage_perc=0.2500, named_metrics.num_requests_running=2, named_metrics.num_requests_waiting=3, \
         named_metrics.capacity_prompt_tokens_per_second=90.0, named_metrics.capacity_generation_tokens_per_second=70.5, \
         named_metrics.capacity_sequences=4",
        Some((2, 3, Some((90.0, 70.5, 4))))
    )]
    #[case::before_it_has_measured(
        "TEXT named_metrics.num_requests_running=0, named_metrics.num_requests_waiting=0",
        Some((0, 0, None))
    )]
    #[case::a_capacity_that_cannot_be(
        "TEXT named_metrics.num_requests_running=0, named_metrics.num_requests_waiting=0, \
         named_metrics.capacity_prompt_tokens_per_second=NaN, named_metrics.capacity_generation_tokens_per_second=1, \
         named_metrics.capacity_sequences=4",
        Some((0, 0, None))
    )]
    #[case::fewer_than_none(
        "TEXT named_metrics.num_requests_running=-1, named_metrics.num_requests_waiting=0",
        None
    )]
    #[case::another_form("JSON {\"named_metrics\": {}}", None)]
    #[case::nothing("", None)]
    fn what_a_replica_says_is_read_with_care(#[case] text: &str, #[case] expected: Option<Said>) {
        let headers = HeaderMap::from_iter([(LOAD, text.parse().unwrap())]);
        let expected = expected.map(|(running, waiting, capacity)| ReplicaLoad {
            running,
            waiting,
            capacity: capacity.map(|(prompt, generation, sequences)| ReplicaCapacity {
                prompt,
                generation,
                sequences,
            }),
        });
        assert_eq!(ReplicaLoad::read(&headers), expected);
        let long =
            HeaderMap::from_iter([(LOAD, format!("{text}{}", " ".repeat(MAX_BYTES)).parse().unwrap())]);
        assert_eq!(ReplicaLoad::read(&long), None);
    }
}
