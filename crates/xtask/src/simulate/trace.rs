//! What is asked of a service: requests with their times and lengths.
use super::random::Random;
use super::replica::Server;

/// Seconds before anything is counted: every scaler finds its level.
pub const WARM_UP: usize = 600;

/// A request.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Request {
    /// When it comes, in seconds.
    pub at: f64,
    /// Tokens of its prompt.
    pub prompt: u32,
    /// Tokens of its answer.
    pub output: u32,
}

/// Requests of a while.
#[derive(Clone, Debug)]
pub struct Trace {
    /// Its name, also of its figure.
    pub name: &'static str,
    /// What it is, for the page.
    pub about: &'static str,
    /// In the order of their times.
    pub requests: Vec<Request>,
    /// What is expected to come in each second, in replicas' worth of work.
    pub load: Vec<f64>,
    /// Mean work of a request, in seconds of one replica.
    pub work: f64,
}

impl Trace {
    /// The load after the warm-up.
    pub fn counted(&self) -> &[f64] {
        &self.load[WARM_UP..]
    }
}

/// The traces, always the same for a seed.
pub fn all(server: &Server, seed: u64) -> Vec<Trace> {
    let mut random = Random::new(seed);
    // Nobody's clock is to be met at its best or worst moment by every draw.
    let calm = 1200 + 5 * seed as usize;
    let bursty = [bursts(&mut random), vec![0.0; 1800], bursts(&mut random)].concat();
    let wander = wander(&mut random, 7200, 4.0);
    let mut trace = |name, about, lengths: &[Lengths], clump, load| {
        trace(
            server,
            &mut random,
            Trace { name, about, requests: Vec::new(), load, work: 0.0 },
            lengths,
            clump,
        )
    };
    vec![
        trace(
            "steady",
            "five replicas' worth of requests, one hour; only chance moves them",
            &CHAT,
            1,
            flat(3600, 5.0),
        ),
        trace(
            "step",
            "0.7 replicas' worth, then ten times as much at once, for 40 minutes",
            &CHAT,
            1,
            [flat(calm, 0.7), flat(2400, 7.0)].concat(),
        ),
        trace(
            "diurnal",
            "a day in two hours: from one replica's worth to eight and back",
            &CHAT,
            1,
            wave(7200, 4.5, 3.5),
        ),
        trace(
            "bursty",
            "0.8 replicas' worth with bursts of five, 45 to 120 seconds long, some minutes apart; then half an hour of nothing, \
             and again",
            &CHAT,
            1,
            bursty,
        ),
        trace(
            "flash-crowd",
            "0.7 replicas' worth; within a minute it becomes twelve, then half of it leaves every five minutes",
            &CHAT,
            1,
            flash(calm),
        ),
        trace(
            "azure",
            "shaped like the public Azure LLM inference traces: long-tailed lengths of chats and of code, arrivals in clumps, a \
             level that wanders within minutes",
            &AZURE,
            3,
            wander,
        ),
    ]
}

/// Lengths: medians and spreads (of the logarithm) of prompt and answer, and the longest.
struct Lengths {
    prompt: (f64, f64),
    output: (f64, f64),
}

const CHAT: [Lengths; 1] = [Lengths { prompt: (600.0, 0.6), output: (180.0, 0.6) }];

/// The traces of 2023 (github.com/Azure/AzurePublicDataset, described in Patel et al., "Splitwise", ISCA 2024): chats with a median
/// prompt of 1020 tokens and answer of 129, code with 1500 and 13. The spreads are ours, chosen for tails as long as theirs.
const AZURE: [Lengths; 2] = [
    Lengths { prompt: (1020.0, 0.7), output: (129.0, 0.9) },
    Lengths { prompt: (1500.0, 0.8), output: (13.0, 1.1) },
];
const LONGEST: f64 = 7500.0;
const LONGEST_OUTPUT: f64 = 1500.0;

/// Fills in the requests: the trace's load is what is to be expected of them, after the warm-up. They come in clumps of `clump` on
/// average within a second.
fn trace(server: &Server, random: &mut Random, trace: Trace, lengths: &[Lengths], clump: u32) -> Trace {
    // Rounded, so that a last bit that machines' logarithms differ in makes no other trace.
    let load: Vec<f64> = trace.load.iter().map(|load| millionths(*load)).collect();
    let start = load.first().copied().unwrap_or_default();
    let load = [vec![start; WARM_UP], load].concat();
    let work = (0..20_000).map(|_| server.work(&request(random, lengths, 0.0))).sum::<f64>() / 20_000.0;
    let mut requests = Vec::new();
    for (second, load) in load.iter().enumerate() {
        let rate = load / work / f64::from(clump);
        let mut at = random.exponential() / rate;
        while at < 1.0 {
            // A geometric number of them, spread over the next second.
            let mut offset = 0.0;
            loop {
                requests.push(request(random, lengths, second as f64 + at + offset));
                if random.uniform() * f64::from(clump) < 1.0 {
                    break;
                }
                offset += random.exponential() / f64::from(clump);
            }
            at += random.exponential() / rate;
        }
    }
    requests.retain(|request| request.at < load.len() as f64);
    requests.sort_by(|a, b| a.at.total_cmp(&b.at));
    Trace { requests, load, work, ..trace }
}

fn request(random: &mut Random, lengths: &[Lengths], at: f64) -> Request {
    let kind = (random.uniform() * lengths.len() as f64) as usize;
    let Lengths { prompt, output } = &lengths[kind.min(lengths.len() - 1)];
    let mut length = |(median, spread): (f64, f64), longest: f64| {
        (median * (spread * random.normal()).exp()).clamp(1.0, longest) as u32
    };
    Request { at: millionths(at), prompt: length(*prompt, LONGEST), output: length(*output, LONGEST_OUTPUT) }
}

fn millionths(number: f64) -> f64 {
    (number * 1e6).round() / 1e6
}

fn flat(seconds: usize, load: f64) -> Vec<f64> {
    vec![load; seconds]
}

/// One period that begins at its lowest.
fn wave(seconds: usize, middle: f64, height: f64) -> Vec<f64> {
    let phase = |second: usize| std::f64::consts::TAU * second as f64 / seconds as f64;
    (0..seconds).map(|second| middle - height * phase(second).cos()).collect()
}

fn bursts(random: &mut Random) -> Vec<f64> {
    let mut load = Vec::new();
    while load.len() < 2400 {
        load.extend(flat(120 + (300.0 * random.uniform()) as usize, 0.8));
        load.extend(flat(45 + (75.0 * random.uniform()) as usize, 5.0));
    }
    load.truncate(2400);
    load
}

fn flash(calm: usize) -> Vec<f64> {
    let rise = (0..60).map(|second| 0.7 + 11.3 * f64::from(second) / 60.0);
    let fall = (0..2340).map(|second| 0.7 + 11.3 * 0.5_f64.powf(f64::from(second) / 300.0));
    flat(calm, 0.7).into_iter().chain(rise).chain(fall).collect()
}

/// An hourly wave times a level that forgets itself in two minutes.
fn wander(random: &mut Random, seconds: usize, middle: f64) -> Vec<f64> {
    const FORGETS: f64 = 120.0;
    const SPREAD: f64 = 0.35;
    let keep = (-1.0 / FORGETS).exp();
    let mut level = 0.0;
    let wave = [wave(seconds / 2, 1.0, 0.4), wave(seconds / 2, 1.0, 0.4)].concat();
    wave.iter()
        .map(|wave| {
            level = keep * level + SPREAD * (1.0 - keep * keep).sqrt() * random.normal();
            middle * wave * (level - SPREAD * SPREAD / 2.0).exp()
        })
        .collect()
}
