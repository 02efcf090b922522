//! Makes what the demo model is trained from: `demo_model <folder>` writes `<folder>/random` (a model
//! of random weights in Hugging Face layout), `<folder>/corpus.jsonl`, and the quick-start's
//! `<folder>/data/{train,test}.jsonl`. `cargo xtask demo-model` then runs `lathe-worker train` on them.
//! Everything is generated from the tables in `shop.rs`: the same bytes on every machine.

mod files;
mod shop;

use std::{fs, io::Write as _, path::Path};

type Result<T> = std::result::Result<T, Box<dyn std::error::Error>>;

fn main() -> Result<()> {
    let folder = std::env::args().nth(1).ok_or("usage: demo_model <folder>")?;
    let folder = Path::new(&folder);
    let corpus = shop::corpus();
    let (train, test) = shop::support();
    fs::create_dir_all(folder.join("data"))?;
    rows(&folder.join("corpus.jsonl"), &corpus)?;
    rows(&folder.join("data/train.jsonl"), &train)?;
    rows(&folder.join("data/test.jsonl"), &test)?;
    files::random_model(&folder.join("random"), corpus.iter().chain(&train))?;
    eprintln!("{} rows of corpus, {} to tune with, {} held out", corpus.len(), train.len(), test.len());
    Ok(())
}

fn rows(path: &Path, turns: &[shop::Turn]) -> Result<()> {
    let mut file = fs::File::create(path)?;
    for shop::Turn { question, answer } in turns {
        let messages = serde_json::json!([
            {"role": "user", "content": question}, {"role": "assistant", "content": answer}
        ]);
        writeln!(file, "{}", serde_json::json!({ "messages": messages }))?;
    }
    Ok(file.sync_all()?)
}
