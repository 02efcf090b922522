use std::sync::Mutex;
use std::time::Instant;

use axum::http::HeaderMap;
use lathe_engine::plan::{AdapterBudget, ModelShape, Precision, RopeScaling, ServeRequest, plan_serving};
use lathe_engine::{Generator, RandomWeights};
use lathe_telemetry::opentelemetry::KeyValue;
use lathe_telemetry::opentelemetry::trace::{Status, TracerProvider as _};
use lathe_telemetry::{Operation, genai};
use opentelemetry_sdk::error::OTelSdkResult;
use opentelemetry_sdk::trace::{SdkTracerProvider, SpanData, SpanExporter};
use prometheus_client::registry::Registry;
use rstest::rstest;

use super::*;
use crate::serve::door::Door;
use crate::serve::mailbox::{Delivery, Finish, Mailbox, mailbox};

const CONTEXT: usize = 64;

/// Sixteen letters, one a token.
fn tokenizer() -> Arc<Tokenizer> {
    let vocab: serde_json::Map<String, serde_json::Value> =
        ('a'..='p').enumerate().map(|(id, letter)| (letter.to_string(), id.into())).collect();
    let json = serde_json::json!({
        "version": "1.0", "truncation": null, "padding": null, "added_tokens": [], "normalizer": null,
        "pre_tokenizer": null, "post_processor": null, "decoder": {"type": "Fuse"},
        "model": {"type": "BPE", "vocab": vocab, "merges": []},
    });
    Arc::new(Tokenizer::parse(json.to_string().as_bytes(), 16).expect("a tokenizer"))
}

struct Served {
    thread: EngineThread,
    door: Arc<Door>,
}

fn shape() -> ModelShape {
    ModelShape {
        vocab: 16,
        hidden: 16,
        layers: 1,
        heads: 2,
        kv_heads: 1,
        head_dim: 8,
        intermediate: 16,
        max_position: CONTEXT,
        rope_theta: 10_000.0,
        rope_scaling: RopeScaling::None,
        rms_eps: 1e-5,
        sliding_window: None,
        qkv_bias: false,
        tie_embeddings: false,
    }
}

fn setup(eos: Vec<u32>) -> Setup {
    let request = ServeRequest {
        weights: Precision::F32,
        context: CONTEXT,
        max_sequences: 2,
        max_batch_tokens: 64,
        cache_tokens: Some(256),
        adapters: AdapterBudget::default(),
        threads: 1,
        memory_limit: None,
    };
    let plan = plan_serving(&shape(), &request).expect("a plan");
    let metrics = Arc::new(Metrics::register(&mut Registry::default(), "m"));
    Setup { plan, eos, load: Arc::new(LoadMeter::new(Instant::now())), metrics }
}

async fn start(eos: Vec<u32>) -> Served {
    let setup = setup(eos);
    let door = Door::new(8, 0, Arc::clone(&setup.load));
    let model = || Ok(Model::load(&shape(), Precision::F32, &RandomWeights::new(&shape(), 7), 1)?);
    Served { thread: EngineThread::start(model, setup).await.expect("starts"), door }
}

impl Served {
    fn ask(&self, max_tokens: usize, stops: &[&str], ignore_eos: bool) -> Mailbox {
        let (job, mailbox) = self.job(max_tokens, stops, ignore_eos);
        self.thread.engine().generate(job);
        mailbox
    }

    fn job(&self, max_tokens: usize, stops: &[&str], ignore_eos: bool) -> (Job, Mailbox) {
        let (poster, mailbox) = mailbox();
        let job = Job {
            prompt: vec![1, 2, 3],
            adapter: None,
            sampling: Sampling { temperature: 1.0, top_p: 1.0, top_k: 0, seed: 5 },
            max_tokens,
            tokenizer: tokenizer(),
            stops: StopFilter::new(stops.iter().map(|s| (*s).to_owned()).collect()),
            ignore_eos,
            poster,
            place: self.door.enter().expect("free"),
            arrived: Instant::now(),
            trace: None,
        };
        (job, mailbox)
    }
}

/// The whole answer.
async fn read(mut mailbox: Mailbox) -> Delivery {
    let mut whole = Delivery::default();
    while whole.end.is_none() {
        let Delivery { text, tokens, cached, end } = mailbox.next().await;
        whole.text.push_str(&text);
        (whole.tokens, whole.cached, whole.end) = (tokens, cached, end);
    }
    whole
}

#[tokio::test]
async fn an_answer_ends_at_its_length_and_gives_its_place_back() {
    let served = start(vec![]).await;
    let answer = read(served.ask(9, &[], false)).await;
    assert_eq!((answer.text.len(), answer.tokens, answer.end), (9, 9, Some(Ok(Finish::Length))));
    served.door.empty().await;
}

#[tokio::test]
async fn an_answer_ends_at_the_models_own_end_or_goes_on_where_it_is_ignored() {
    let free = read(start(vec![]).await.ask(20, &[], false)).await.text;
    let (at, letter) = free.char_indices().nth(3).expect("text");
    let first = free.find(letter).unwrap_or(at);
    let served = start(vec![letter as u32 - 'a' as u32]).await;
    let ended = read(served.ask(20, &[], false)).await;
    assert_eq!((ended.text.as_str(), ended.tokens), (&free[..first], first + 1));
    assert_eq!(ended.end, Some(Ok(Finish::Stop)));
    assert_eq!(read(served.ask(20, &[], true)).await.text, free);
}

#[rstest]
#[case(2)]
#[case(1)]
#[tokio::test]
async fn an_answer_ends_before_a_stop_string(#[case] length: usize) {
    let served = start(vec![]).await;
    let free = read(served.ask(20, &[], false)).await.text;
    let stop = &free[6..6 + length];
    let at = free.find(stop).expect("it is there");
    let answer = read(served.ask(20, &[stop], false)).await;
    assert_eq!((answer.text.as_str(), answer.tokens), (&free[..at], at + length));
    assert_eq!(answer.end, Some(Ok(Finish::Stop)));
}

#[tokio::test]
async fn a_panic_in_a_step_costs_what_is_in_flight_and_nothing_after() {
    let served = start(vec![]).await;
    let before = read(served.ask(9, &[], false)).await;
    served.thread.engine().panic();
    let hit = read(served.ask(60, &[], false)).await;
    assert_eq!(hit.end, Some(Err(ApiError::internal())));
    assert_eq!(read(served.ask(9, &[], false)).await, before);
    served.door.empty().await;
}

#[tokio::test]
async fn abort_tells_those_in_flight_and_those_that_wait() {
    let served = start(vec![]).await;
    let why = ApiError::unavailable("shutting_down", "x");
    let asked: Vec<Mailbox> = (0..5).map(|_| served.ask(61, &[], true)).collect();
    served.thread.engine().abort(why.clone());
    for mailbox in asked {
        let end = read(mailbox).await.end;
        assert!(end == Some(Err(why.clone())) || end == Some(Ok(Finish::Length)), "{end:?}");
    }
    served.door.empty().await;
}

/// Keeps spans that have ended.
#[derive(Clone, Debug, Default)]
struct Ended(Arc<Mutex<Vec<SpanData>>>);

impl SpanExporter for Ended {
    async fn export(&self, batch: Vec<SpanData>) -> OTelSdkResult {
        self.0.lock().expect("no panic").extend(batch);
        Ok(())
    }
}

#[tokio::test]
async fn a_client_that_left_before_its_turn_is_told_in_its_span() {
    let ended = Ended::default();
    let provider = SdkTracerProvider::builder().with_simple_exporter(ended.clone()).build();
    let served = start(vec![]).await;
    let (mut job, mailbox) = served.job(9, &[], false);
    job.trace = RequestTrace::begin(Some(&provider.tracer("test")), &HeaderMap::new(), Some(Operation::CHAT));
    drop(mailbox);
    served.thread.engine().generate(job);
    served.door.empty().await;
    let ended = ended.0.lock().expect("no panic");
    let span = ended.first().expect("a span");
    assert_eq!(span.status, Status::error("abort"));
    assert!(span.attributes.contains(&KeyValue::new(genai::ERROR_TYPE, "abort")), "{span:?}");
}

#[test]
fn a_measurement_that_is_broken_off_leaves_nothing_behind() {
    let setup = setup(vec![]);
    let model = Model::load(&shape(), Precision::F32, &RandomWeights::new(&shape(), 7), 1).expect("a model");
    let mut generator = Generator::new(model, &setup.plan).expect("a generator");
    let mut measurement = capacity::Measurement::new(&setup.plan);
    for steps in [1, 5] {
        for _ in 0..steps {
            assert_eq!(measurement.step(&mut generator).expect("a step"), None);
        }
        assert!(measurement.is_under_way());
        measurement.pause(&mut generator);
        let left = generator.capacity();
        assert_eq!((left.free_blocks, generator.idle()), (left.total_blocks, true));
    }
    // The same prompt is not found by somebody who asks it.
    let prompt = measurement.prompt(CONTEXT - 1);
    generator.add_shared(1, &prompt, None, warm_up::GREEDY, 1).expect("taken");
    assert_eq!(generator.step().expect("a step")[0].cached, 0);
}

#[test]
fn a_measurement_in_pieces_comes_to_an_end_and_is_nobodys_trouble() {
    let setup = setup(vec![]);
    let model = Model::load(&shape(), Precision::F32, &RandomWeights::new(&shape(), 7), 1).expect("a model");
    let mut generator = Generator::new(model, &setup.plan).expect("a generator");
    let answer = |generator: &mut Generator| -> Vec<u32> {
        generator.add_sequence(1, &[1, 2, 3], None, warm_up::GREEDY, 4).expect("taken");
        std::iter::from_fn(|| (!generator.idle()).then(|| generator.step().expect("a step")))
            .flatten()
            .map(|one| one.token)
            .collect()
    };
    let alone = answer(&mut generator);
    let mut measurement = capacity::Measurement::new(&setup.plan);
    let figures = loop {
        // Far fewer steps than the two seconds that it needs.
        if let Some(figures) = (0..100).find_map(|_| measurement.step(&mut generator).expect("a step")) {
            break figures;
        }
        measurement.pause(&mut generator);
        let left = generator.capacity();
        assert_eq!((left.free_blocks, generator.idle()), (left.total_blocks, true));
        assert_eq!(answer(&mut generator), alone);
    };
    assert!(figures.prompt > 0.0 && figures.generation > 0.0, "{figures:?}");
}

#[tokio::test]
async fn a_model_that_cannot_be_loaded_is_told() {
    let halt = EngineThread::start(|| Err(Halt::user("MalformedModel", "x", "y")), setup(vec![])).await;
    assert_eq!(halt.err(), Some(Halt::user("MalformedModel", "x", "y")));
}
