//! The plan's bytes are the bytes that are allocated: buffers of the device, and the heap of the host.
#![allow(clippy::unwrap_used)]
#![allow(unsafe_code)] // A counting allocator.

mod common;

use std::alloc::{GlobalAlloc, Layout, System};
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};

use common::{hyper, lora, request, rows};
use lathe_engine::device::cpu::{Cpu, Level};
use lathe_engine::device::{Buf, Data, DataMut, Device, Element, Op};
use lathe_engine::files::Mapped;
use lathe_engine::plan::{
    AdapterBudget, ModelShape, OptimizerState, Precision, ServeRequest, Target, TrainMethod, TrainRequest,
    plan_serving, plan_training,
};
use lathe_engine::{Generator, Model, Result, Sampling, Trainer};

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

/// Counts a device's buffers beside what the heap holds, until it goes.
struct Counted {
    cpu: Cpu,
    held: usize,
}

impl Counted {
    fn model(shape: &ModelShape, precision: Precision) -> Model {
        let device = Counted { cpu: Cpu::new(1, Level::detect().unwrap()), held: 0 };
        Model::load_on(Box::new(device), shape, precision, &common::Noise(shape.clone())).unwrap()
    }
}

impl Drop for Counted {
    fn drop(&mut self) {
        LIVE.fetch_sub(self.held, Relaxed);
    }
}

impl Device for Counted {
    fn alloc(&mut self, name: &str, element: Element, len: usize) -> Result<Buf> {
        let bytes = len * element.bytes();
        add(bytes);
        self.held += bytes;
        self.cpu.alloc(name, element, len)
    }

    fn adopt(&mut self, element: Element, bytes: &Mapped) -> Option<Buf> {
        self.cpu.adopt(element, bytes)
    }

    fn free(&mut self, buf: Buf) {
        let bytes = buf.len() * buf.element().bytes();
        LIVE.fetch_sub(bytes, Relaxed);
        self.held -= bytes;
        self.cpu.free(buf);
    }

    fn set_scratch(&mut self, scratch: Buf) {
        self.cpu.set_scratch(scratch);
    }

    fn write(&mut self, to: Buf, data: Data<'_>) {
        self.cpu.write(to, data);
    }

    fn enqueue(&mut self, op: Op) {
        self.cpu.enqueue(op);
    }

    fn read(&mut self, from: Buf, into: DataMut<'_>) {
        self.cpu.read(from, into);
    }

    fn level(&self) -> Level {
        self.cpu.level()
    }

    fn threads(&self) -> usize {
        self.cpu.threads()
    }
}

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
    for (method, state) in [
        (TrainMethod::Full, OptimizerState::F32),
        (TrainMethod::Full, OptimizerState::Int8),
        (lora(0.1), OptimizerState::F32),
    ] {
        for precision in [Precision::F32, Precision::BF16] {
            let before = LIVE.load(Relaxed);
            let request = TrainRequest {
                batch_tokens: 300,
                optimizer_state: Some(state),
                ..request(&method, precision)
            };
            let plan = plan_training(&shape, &request).unwrap();
            let model = Counted::model(&shape, precision);
            let rows = rows(&shape, &[40; 6]);
            PEAK.store(LIVE.load(Relaxed), Relaxed);
            let mut trainer = Trainer::new(model, &plan, hyper()).unwrap();
            trainer.step(&rows).unwrap();
            let measured = PEAK.load(Relaxed) - before;
            compare(&format!("{method:?} {precision:?} {state:?}"), plan.totals.total(), measured);
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
    let model = Counted::model(&shape, Precision::BF16);
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
