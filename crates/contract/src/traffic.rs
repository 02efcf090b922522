//! What flows to the services of a cluster, as one replica of the gateway tells the operator's leader: second by second, so that a
//! leader that is new knows the last minutes as well as the one before.
use serde::{Deserialize, Serialize};

use crate::report::{ReplicaCapacity, ReportError};

/// Path on the gateway's port of probes and metrics. Asked for with [`TrafficQuery`], with a token of the operator for
/// [`TRAFFIC_AUDIENCE`] and [`crate::Scope::Report`].
///
/// It is a long poll: answered as soon as a whole second is there that the asker does not know, and at once when a request
/// begins to be held for a service that had none.
pub const TRAFFIC_PATH: &str = "/v1/traffic";
/// Whom the token is for: a gateway is no object with a UID.
pub const TRAFFIC_AUDIENCE: &str = "lathe-gateway";
/// Seconds that a gateway remembers.
pub const TRAFFIC_SECONDS: u64 = 120;
/// Revisions of a service that are told apart in one second: the stable one and its candidate, and as many more while those change.
pub const MAX_REVISIONS: usize = 4;
/// Longest name of a revision, in bytes.
pub const MAX_REVISION_BYTES: usize = 32;
/// Longest report: some thousand services in the first answer, tens of thousands in those after it.
pub const MAX_TRAFFIC_BYTES: usize = 32 << 20;

/// What the asker knows already, as the URL's query.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct TrafficQuery {
    /// [`Traffic::instance`] of the last answer; empty: none.
    #[serde(default)]
    pub instance: String,
    /// [`Traffic::second`] of the last answer; of another instance it counts for nothing.
    #[serde(default)]
    pub after: u64,
}

/// One replica's answer.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Traffic {
    /// A gateway process by a name that no other one has; a restarted one knows nothing of the time before.
    pub instance: String,
    /// Whole seconds since the process began, which is the number of the newest second that is told.
    pub second: u64,
    /// Services with anything to tell; of those not named every second that was asked for is zero.
    pub services: Vec<ServiceTraffic>,
}

/// What flowed to one service through this replica alone.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct ServiceTraffic {
    /// UID of the InferenceService.
    pub uid: String,
    /// Seconds that the asker does not know, at most [`TRAFFIC_SECONDS`]; the last one is [`Traffic::second`]. Empty where only `held`
    /// is new.
    pub seconds: Vec<Flow>,
    /// Requests that are held at this moment, since no replica is ready.
    pub held: u64,
    /// What a replica of it can do, as one said in the last seconds with an answer: an older figure may be of replicas that are gone.
    pub capacity: Option<ReplicaCapacity>,
    /// How requests ended, by revision, while a candidate has a share of them: in the seconds that are told, in their order, at most
    /// [`MAX_REVISIONS`] of each.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub outcomes: Vec<RevisionOutcome>,
}

/// How the requests ended that one revision answered in one second.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct RevisionOutcome {
    /// Seconds before [`Traffic::second`]; 0 is that second.
    pub back: u64,
    /// The revision's name.
    pub revision: String,
    /// The counts.
    #[serde(flatten)]
    pub ended: Ended,
}

/// Requests that ended. Those that were refused for want of room are not among them, nor those that no replica had.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Ended {
    /// Requests.
    pub requests: u64,
    /// Of them, those with an error of the server, and those whose replica was lost, also where another one answered then.
    pub errors: u64,
    /// Streamed answers that had a first token.
    pub streams: u64,
    /// Milliseconds from when the replica was asked to the first token, summed over `streams`.
    pub first_token_ms: u64,
    /// Tokens of `streams` after the first.
    pub tokens: u64,
    /// Milliseconds in which they came.
    pub decode_ms: u64,
}

impl Ended {
    /// The sum of both; nothing that anybody says goes beyond what can be counted.
    #[must_use]
    pub fn and(self, other: Self) -> Self {
        Self {
            requests: self.requests.saturating_add(other.requests),
            errors: self.errors.saturating_add(other.errors),
            streams: self.streams.saturating_add(other.streams),
            first_token_ms: self.first_token_ms.saturating_add(other.first_token_ms),
            tokens: self.tokens.saturating_add(other.tokens),
            decode_ms: self.decode_ms.saturating_add(other.decode_ms),
        }
    }
}

/// One second.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Flow {
    /// Requests that came, those that were refused for want of room with them.
    pub arrived: u64,
    /// Requests that ended and were worked for: one that was refused says nothing of the work of the others.
    pub finished: u64,
    /// Prompt tokens that replicas read, those from their caches not with them.
    pub prompt: u64,
    /// Tokens that replicas generated.
    pub generation: u64,
    /// Requests that are being answered at its end.
    pub running: f64,
    /// Of this gateway's requests, those that wait at a replica at its end.
    pub waiting: f64,
    /// Requests that are held at its end.
    pub held: u64,
}

impl Traffic {
    /// Reads a gateway's answer.
    ///
    /// # Errors
    /// Longer than [`MAX_TRAFFIC_BYTES`], or not what was agreed.
    pub fn parse(bytes: &[u8]) -> Result<Self, ReportError> {
        if bytes.len() > MAX_TRAFFIC_BYTES {
            return Err(ReportError::TooLong { limit: MAX_TRAFFIC_BYTES, found: bytes.len() });
        }
        let mut traffic: Self = serde_json::from_slice(bytes)?;
        for service in &mut traffic.services {
            let surplus = service.seconds.len().saturating_sub(TRAFFIC_SECONDS as usize);
            service.seconds.drain(..surplus);
            service.outcomes.retain(|outcome| outcome.revision.len() <= MAX_REVISION_BYTES);
            service.outcomes.truncate(TRAFFIC_SECONDS as usize * MAX_REVISIONS);
        }
        Ok(traffic)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_reads_back_and_no_more_seconds_than_are_kept() {
        let flow = Flow { arrived: 1, running: 0.5, ..Flow::default() };
        let mut seconds = vec![Flow::default(); TRAFFIC_SECONDS as usize + 3];
        seconds.push(flow);
        let ended = Ended { requests: 3, errors: 1, ..Ended::default() };
        let outcome = |revision: String| RevisionOutcome { back: 2, revision, ended };
        let outcomes = vec![outcome("x".repeat(33)), outcome("abc".into())];
        let service = ServiceTraffic { uid: "u".into(), seconds, held: 2, capacity: None, outcomes };
        let told = Traffic { instance: "i".into(), second: 500, services: vec![service] };
        let read = Traffic::parse(&serde_json::to_vec(&told).expect("json")).expect("agreed");
        assert_eq!(read.services[0].seconds.len(), TRAFFIC_SECONDS as usize);
        assert_eq!(read.services[0].seconds.last(), Some(&flow));
        assert_eq!((read.second, read.services[0].held), (500, 2));
        assert_eq!(read.services[0].outcomes, [outcome("abc".into())]);
        assert!(matches!(Traffic::parse(b"{}"), Err(ReportError::Malformed(_))));
        let long = vec![b' '; MAX_TRAFFIC_BYTES + 1];
        assert!(matches!(Traffic::parse(&long), Err(ReportError::TooLong { .. })));
    }
}
