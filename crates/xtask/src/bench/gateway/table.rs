//! The table, with the goals in it.

use super::cores::Cores;
use super::measure::{Measured, STREAMS};
use super::proxy::Contestant;
use crate::bench::stats::{Figure, bytes};
use crate::bench::table::Table;

/// Of each round, each contestant's figures in the order of [`Contestant::ALL`].
pub fn table(rounds: &[Vec<Measured>], cores: &Cores) -> Table {
    let streams = format!("memory, {STREAMS} streams");
    let headings = [
        "Proxy",
        "requests/s",
        "requests a CPU-second",
        "x nginx",
        "x LiteLLM",
        "streamed tokens/s",
        "tokens a CPU-second, one by one",
        "added p50, ms",
        "added p99, ms",
        &streams,
    ];
    let mut table = Table::new("Gateway beside other proxies, on one core", &headings);
    table.rows.push(
        ["goal", "5000", "-", "0.5", "20", "100000", "-", "-", "1.00", &bytes(64 << 20)]
            .map(str::to_owned)
            .into(),
    );
    for contestant in Contestant::ALL {
        table.rows.push(row(rounds, contestant));
    }
    let rate = figure(rounds, |round| at(round, Contestant::Lathe).map(|measured| measured.rate));
    table.notes.push(format!(
        "{} {} rounds, in each of which all are asked one after the other. Requests: 64 clients, each with one short question after \
         the other, whole answers. Added: latency behind the proxy less that of the stub alone, at half of the requests a second that \
         lathe-gateway has done in the same round ({rate}), of LiteLLM at half of its own; counted from the time at which a request is \
         due, whether its connection is free or not. Streamed: 64 clients, 256 tokens an answer, as fast as they are taken, so that \
         many events come at a time. One by one: {STREAMS} open streams with a token each 50 ms, so that each token is read and \
         written by itself. nginx passes bytes on; lathe-gateway and LiteLLM also look who asks and for which model, and count \
         tokens. LiteLLM is not asked for {STREAMS} streams: it takes minutes to open them.",
        cores.words(),
        rounds.len(),
    ));
    table
}

fn at(round: &[Measured], contestant: Contestant) -> Option<&Measured> {
    Contestant::ALL.iter().zip(round).find_map(|(who, measured)| (*who == contestant).then_some(measured))
}

/// Of what each round says.
fn figure(rounds: &[Vec<Measured>], of: impl Fn(&[Measured]) -> Option<f64>) -> String {
    let all = rounds.iter().map(|round| of(round).filter(|value| value.is_finite())).collect::<Option<_>>();
    all.and_then(Figure::of).map_or("-".to_owned(), |figure| figure.shown())
}

fn row(rounds: &[Vec<Measured>], who: Contestant) -> Vec<String> {
    let own = |of: fn(&Measured) -> Option<f64>| figure(rounds, |round| of(at(round, who)?));
    let beside = |other: Contestant| {
        figure(rounds, |round| Some(at(round, who)?.per_processor / at(round, other)?.per_processor))
    };
    let added = |which: usize| match who {
        Contestant::Direct => "-".to_owned(),
        _ => figure(rounds, |round| {
            Some(at(round, who)?.latency[which] - at(round, Contestant::Direct)?.latency[which])
        }),
    };
    let held = rounds.iter().map(|round| Some(at(round, who)?.open?.resident as f64)).collect::<Option<_>>();
    vec![
        who.name().to_owned(),
        own(|measured| Some(measured.requests)),
        own(|measured| Some(measured.per_processor)),
        beside(Contestant::Nginx),
        beside(Contestant::LiteLlm),
        own(|measured| Some(measured.tokens)),
        own(|measured| Some(measured.open?.per_processor)),
        added(0),
        added(1),
        held.and_then(Figure::of).map_or("-".to_owned(), |figure| bytes(figure.median as u64)),
    ]
}

#[cfg(test)]
mod tests {
    use super::super::measure::Open;
    use super::*;

    fn measured(requests: f64, per_processor: f64, p99: f64) -> Measured {
        let open = Some(Open { resident: 30_000_000, per_processor: 90_000.0 });
        Measured { requests, per_processor, rate: requests / 2.0, latency: [0.2, p99], tokens: 2e5, open }
    }

    #[test]
    fn ratios_are_those_of_each_round_and_what_the_stub_takes_is_not_added() {
        let round = |factor: f64| {
            let direct = Measured { open: None, ..measured(90_000.0, f64::INFINITY, 0.1) };
            let litellm = Measured { open: None, ..measured(200.0, 200.0 * factor, 40.1) };
            vec![
                measured(9000.0 * factor, 10_000.0 * factor, 0.6),
                direct,
                measured(16_000.0, 20_000.0 * factor, 0.4),
                litellm,
            ]
        };
        let rounds = [round(1.0), round(0.8), round(1.2)];
        let cores = Cores { proxy: 0, others: vec![1] };
        let table = table(&rounds, &cores);
        assert_eq!(
            table.rows[1],
            [
                "lathe-gateway",
                "9000 (7200-10800)",
                "10000 (8000-12000)",
                "0.50 (0.50-0.50)",
                "50.0 (50.0-50.0)",
                "200000 (200000-200000)",
                "90000 (90000-90000)",
                "0.00 (0.00-0.00)",
                "0.50 (0.50-0.50)",
                "30 MB",
            ]
        );
        assert_eq!(table.rows[2][1..5], ["90000 (90000-90000)", "-", "-", "-"]);
        assert_eq!(table.rows[4][6..], ["-", "0.00 (0.00-0.00)", "40.0 (40.0-40.0)", "-"]);
        assert!(table.rows.iter().all(|row| row.len() == table.headings.len()));
        assert!(table.notes[0].contains("(4500 (3600-5400))"), "{}", table.notes[0]);
    }
}
