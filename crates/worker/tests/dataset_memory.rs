//! A check of a dataset holds no file in memory: every allocation of this process is counted.
#![allow(clippy::unwrap_used)]
#![allow(unsafe_code)] // A counting allocator.

use std::alloc::{GlobalAlloc, Layout, System};
use std::io::Write as _;
use std::path::Path;
use std::sync::atomic::{AtomicUsize, Ordering};

use lathe_contract::DatasetFormat;
use lathe_engine::files::Tokenizer;
use lathe_worker::dataset::{Encoder, HoldOut, Source, check};

static NOW: AtomicUsize = AtomicUsize::new(0);
static MOST: AtomicUsize = AtomicUsize::new(0);

struct Counting;

// SAFETY: every call goes to the system's allocator as it came.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        MOST.fetch_max(NOW.fetch_add(layout.size(), Ordering::Relaxed) + layout.size(), Ordering::Relaxed);
        // SAFETY: as the caller promises.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, at: *mut u8, layout: Layout) {
        NOW.fetch_sub(layout.size(), Ordering::Relaxed);
        // SAFETY: as the caller promises.
        unsafe { System.dealloc(at, layout) }
    }
}

#[global_allocator]
static COUNTING: Counting = Counting;

#[test]
fn memory_does_not_grow_with_the_file() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../engine/tests/fixtures/hf/tokenizers");
    let tokenizer = Tokenizer::parse(&std::fs::read(folder.join("byte-level.json")).unwrap(), 400).unwrap();
    let encoder = Encoder {
        tokenizer: &tokenizer,
        template: None,
        eos: None,
        now: jiff::Timestamp::UNIX_EPOCH,
        max_tokens: 64,
    };
    let dir = tempfile::tempdir().unwrap();
    let peak = |rows: usize| {
        let path = dir.path().join("train.jsonl");
        let mut file = std::io::BufWriter::new(std::fs::File::create(&path).unwrap());
        for row in 0..rows {
            writeln!(file, "{{\"text\":\"the cat {row} {}\"}}", "sat ".repeat(250)).unwrap();
        }
        file.into_inner().unwrap();
        let hold_out = Some(HoldOut { share: 0.1, seed: 1 });
        let source = Source { train: &path, evaluation: None, hold_out, format: DatasetFormat::Auto };
        MOST.store(NOW.load(Ordering::Relaxed), Ordering::Relaxed);
        assert_eq!(check(&source, &encoder).unwrap().malformed, []);
        MOST.load(Ordering::Relaxed)
    };
    let (few, many) = (peak(200), peak(4000));
    // 3.8 MB more of rows.
    assert!(many < few + 500_000, "{few} bytes for 200 rows, {many} for 4000");
}
