//! A small model in the usual layout, and options that lose no time.
use std::collections::BTreeMap;
use std::path::Path;
use std::time::Duration;

use lathe_source::{Options, Retry};

pub type Files = BTreeMap<String, Vec<u8>>;

/// Tensor `w` of so many elements, with bytes that differ from place to place.
pub fn safetensors(elements: usize) -> Vec<u8> {
    let header = format!(r#"{{"w":{{"dtype":"I8","shape":[{elements}],"data_offsets":[0,{elements}]}}}}"#);
    let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
    bytes.extend(header.as_bytes());
    bytes.extend((0..elements as u32).map(|i| (i.wrapping_mul(2_654_435_761) >> 24) as u8));
    bytes
}

/// Config, tokenizer, card and 3 MiB of weights.
pub fn model() -> Files {
    Files::from([
        ("config.json".into(), br#"{"architectures":["LlamaForCausalLM"]}"#.to_vec()),
        ("tokenizer.json".into(), b"{}".to_vec()),
        ("README.md".into(), b"---\nlicense: apache-2.0\n---\n# Model\n".to_vec()),
        ("model.safetensors".into(), safetensors(3 << 20)),
    ])
}

pub fn write(dir: &Path, files: &Files) {
    for (name, bytes) in files {
        let path = dir.join(name);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(path, bytes).unwrap();
    }
}

/// All files below `dir` but the manifest.
pub fn read(dir: &Path) -> Files {
    let mut files = Files::new();
    for entry in std::fs::read_dir(dir).unwrap() {
        let entry = entry.unwrap();
        let name = entry.file_name().into_string().unwrap();
        if entry.file_type().unwrap().is_dir() {
            files.extend(
                read(&entry.path()).into_iter().map(|(below, bytes)| (format!("{name}/{below}"), bytes)),
            );
        } else if name != lathe_source::MANIFEST {
            files.insert(name, std::fs::read(entry.path()).unwrap());
        }
    }
    files
}

/// Retries without waiting.
pub fn options(cache: &Path) -> Options {
    let retry = Retry { retries: 4, first: Duration::from_millis(1), longest: Duration::from_millis(2) };
    Options { retry, stall_timeout: Duration::from_secs(60), ..Options::new(cache) }
}

/// Passes a future on that another thread may run: callers spawn these.
pub fn sendable<F: Future + Send>(future: F) -> F {
    future
}

/// Names in the cache that would be taken for complete content.
pub fn complete(cache: &Path) -> usize {
    let Ok(entries) = std::fs::read_dir(cache) else { return 0 };
    let names = entries.map(|e| e.unwrap().file_name().into_string().unwrap());
    names.filter(|name| ![".partial", ".lock", ".use"].iter().any(|mark| name.ends_with(mark))).count()
}
