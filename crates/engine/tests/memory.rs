//! The plan's bytes are the bytes that are allocated.
#![allow(clippy::unwrap_used)]
#![allow(unsafe_code)] // A counting allocator.

mod common;

use std::alloc::{GlobalAlloc, Layout, System};
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};

use common::{hyper, lora, model, request, rows};
use lathe_engine::plan::{
    AdapterBudget, ModelShape, Precision, ServeRequest, Target, TrainMethod, TrainRequest, plan_serving,
    plan_training,
};
use lathe_engine::{Generator, Sampling, Trainer};

static LIVE: AtomicUsize = AtomicUsize::new(0);
static PEAK: AtomicUsize = AtomicUsize::new(0);

struct Counting;

fn add(bytes: usize) {
    let live = LIVE.fetch_add(bytes, Relaxed) + bytes;
    PEAK.fetch_max(live, Relaxed);
}

// SAFETY: passes everything on to the system's allocator.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        add(layout.size());
        // SAFETY: the caller's.
        unsafe { System.alloc(layout) }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        add(layout.size());
        // SAFETY: the caller's.
        unsafe { System.alloc_zeroed(layout) }
    }

    unsafe fn dealloc(&self, at: *mut u8, layout: Layout) {
        LIVE.fetch_sub(layout.size(), Relaxed);
        // SAFETY: the caller's.
        unsafe { System.dealloc(at, layout) }
    }
}

#[global_allocator]
static COUNTING: Counting = Counting;

fn shape() -> ModelShape {
    ModelShape {
        vocab: 600,
        hidden: 128,
        intermediate: 352,
        layers: 3,
        heads: 8,
        head_dim: 16,
        ..common::llama()
    }
}

/// Host-side lists, names and batches.
const CONSTANT: usize = 400 << 10;

fn compare(what: &str, planned: u64, measured: usize) {
    let allowed = planned as f64 * 0.05 + CONSTANT as f64;
    let difference = measured as f64 - planned as f64;
    assert!(difference.abs() < allowed, "{what}: planned {planned}, measured {measured}");
}

/// One test, since the counters are the process's.
#[test]
fn the_plan_is_what_is_allocated() {
    let shape = shape();
    for method in [TrainMethod::Full, lora(0.1)] {
        for precision in [Precision::F32, Precision::BF16] {
            let before = LIVE.load(Relaxed);
            let request = TrainRequest { batch_tokens: 300, ..request(&method, precision) };
            let plan = plan_training(&shape, &request).unwrap();
            let model = model(&shape, precision, 1);
            let rows = rows(&shape, &[40; 6]);
            PEAK.store(LIVE.load(Relaxed), Relaxed);
            let mut trainer = Trainer::new(model, &plan, hyper()).unwrap();
            trainer.step(&rows).unwrap();
            let measured = PEAK.load(Relaxed) - before;
            compare(&format!("{method:?} {precision:?}"), plan.totals.total(), measured);
        }
    }

    let before = LIVE.load(Relaxed);
    let request = ServeRequest {
        weights: Precision::BF16,
        context: 64,
        max_sequences: 8,
        max_batch_tokens: 128,
        cache_tokens: None,
        adapters: AdapterBudget { slots: 2, max_rank: 8, targets: Target::ALL.into() },
        threads: 1,
        memory_limit: None,
    };
    let plan = plan_serving(&shape, &request).unwrap();
    let model = model(&shape, Precision::BF16, 1);
    PEAK.store(LIVE.load(Relaxed), Relaxed);
    let mut generator = Generator::new(model, &plan).unwrap();
    for id in 0..8 {
        let sampling = Sampling { temperature: 0.7, top_p: 0.9, top_k: 0, seed: id };
        generator.add_sequence(id, &[1; 20], None, sampling, 30).unwrap();
    }
    while !generator.idle() {
        generator.step().unwrap();
    }
    compare("serving", plan.totals.total(), PEAK.load(Relaxed) - before);
}
