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
    /// What a replica of it can do, as one said with its last answer.
    pub capacity: Option<ReplicaCapacity>,
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
        let service = ServiceTraffic { uid: "u".into(), seconds, held: 2, capacity: None };
        let told = Traffic { instance: "i".into(), second: 500, services: vec![service] };
        let read = Traffic::parse(&serde_json::to_vec(&told).expect("json")).expect("agreed");
        assert_eq!(read.services[0].seconds.len(), TRAFFIC_SECONDS as usize);
        assert_eq!(read.services[0].seconds.last(), Some(&flow));
        assert_eq!((read.second, read.services[0].held), (500, 2));
        assert!(matches!(Traffic::parse(b"{}"), Err(ReportError::Malformed(_))));
        let long = vec![b' '; MAX_TRAFFIC_BYTES + 1];
        assert!(matches!(Traffic::parse(&long), Err(ReportError::TooLong { .. })));
    }
}
