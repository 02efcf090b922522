//! The quick-start's files with one thing wrong each, in a volume's folder.
use std::{
    fs,
    os::unix::fs::PermissionsExt as _,
    path::{Path, PathBuf},
};

use anyhow::{Context, Result};
use lathe_e2e::repository;
use serde_json::{Value, json};

const WEIGHTS: &str = "model.safetensors";
const PICKLE: &[u8] = b"\x80\x02}q\x00.";
/// The row that is wrong.
const WRONG: &str =
    r#"{"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": 3}]}"#;

/// Writes all of them below `bad`.
pub fn write_all(volume: &Path) -> Result<()> {
    let bad = volume.join("bad");
    models(&bad)?;
    let mut lines = good_rows()?;
    lines[2] = WRONG.to_owned();
    write(&bad.join("row.jsonl"), lines.join("\n").as_bytes())?;
    write(&bad.join("empty.jsonl"), b"\n")?;
    write(&bad.join("latin.jsonl"), b"{\"text\": \"caf\xe9\"}\n")?;
    write(&bad.join("packed.jsonl"), b"\x1f\x8b\x08\0")?;
    write(&bad.join("locked.jsonl"), good_rows()?.join("\n").as_bytes())?;
    fs::set_permissions(bad.join("locked.jsonl"), fs::Permissions::from_mode(0o600))?;
    Ok(())
}

/// Puts the wrong row right; the new one is longer than what the job learns of a row.
pub fn put_row_right(volume: &Path) -> Result<()> {
    let mut lines = good_rows()?;
    let answer = "Thank you for asking! ".repeat(100);
    let messages = json!([{"role": "user", "content": "x"}, {"role": "assistant", "content": answer}]);
    lines[2] = json!({"messages": messages}).to_string();
    write(&volume.join("bad/row.jsonl"), lines.join("\n").as_bytes())
}

/// Writes more rows than a small pod holds: short ones, since each takes room beside its text.
pub fn write_many_rows(volume: &Path) -> Result<()> {
    const ROWS: usize = 2_500_000;
    write(&volume.join("many.jsonl"), "{\"text\": \"a\"}\n".repeat(ROWS).as_bytes())
}

fn models(bad: &Path) -> Result<()> {
    let copy = |name: &str| -> Result<PathBuf> {
        let to = bad.join(name);
        fs::create_dir_all(&to)?;
        for entry in fs::read_dir(quickstart().join("model")).context("the quick-start's model")? {
            let entry = entry?;
            fs::copy(entry.path(), to.join(entry.file_name()))?;
        }
        Ok(to)
    };
    fs::set_permissions(copy("locked")?, fs::Permissions::from_mode(0o700))?;

    fs::create_dir_all(bad.join("no-model"))?;
    write(&bad.join("no-model/notes.txt"), b"weights follow")?;
    write(&copy("garbled")?.join("config.json"), b"{")?;
    configured(&copy("mamba")?, "architectures", json!(["MambaForCausalLM"]))?;
    configured(&copy("misshapen")?, "num_hidden_layers", json!(5))?;

    let pickle = copy("pickle")?;
    fs::remove_file(pickle.join(WEIGHTS))?;
    write(&pickle.join("pytorch_model.bin"), PICKLE)?;
    write(&copy("disguised")?.join(WEIGHTS), PICKLE)?;

    let cut = copy("cut")?.join(WEIGHTS);
    let whole = fs::read(&cut)?;
    write(&cut, &whole[..whole.len() / 2])?;
    // A header that is said to be longer than any memory.
    let swollen = copy("swollen")?.join(WEIGHTS);
    write(&swollen, &[&(1_u64 << 60).to_le_bytes()[..], &whole[8..]].concat())?;
    // Its last number is none.
    let poisoned = copy("poisoned")?.join(WEIGHTS);
    write(&poisoned, &[&whole[..whole.len() - 4], &f32::NAN.to_le_bytes()].concat())?;
    // A tensor that is said to be larger than its bytes.
    let lying = copy("lying")?.join(WEIGHTS);
    write(&lying, &with_another_shape(&whole)?)
}

/// The same file with one more row in the shape of its first tensor.
fn with_another_shape(whole: &[u8]) -> Result<Vec<u8>> {
    let length = u64::from_le_bytes(whole[..8].try_into()?) as usize;
    let mut header: Value = serde_json::from_slice(&whole[8..8 + length])?;
    let tensors = header.as_object_mut().context("no header")?;
    let (_, first) = tensors.iter_mut().find(|(name, _)| *name != "__metadata__").context("no tensor")?;
    let rows = first["shape"][0].as_i64().context("no shape")?;
    first["shape"][0] = (rows + 1).into();
    let header = header.to_string();
    Ok([&(header.len() as u64).to_le_bytes()[..], header.as_bytes(), &whole[8 + length..]].concat())
}

fn configured(model: &Path, key: &str, value: Value) -> Result<()> {
    let path = model.join("config.json");
    let mut config: Value = serde_json::from_slice(&fs::read(&path)?)?;
    config[key] = value;
    write(&path, config.to_string().as_bytes())
}

fn good_rows() -> Result<Vec<String>> {
    let text = fs::read_to_string(quickstart().join("data/train.jsonl")).context("the quick-start's rows")?;
    Ok(text.lines().map(str::to_owned).collect())
}

fn quickstart() -> PathBuf {
    repository().join("examples/quickstart/volumes/quickstart")
}

fn write(path: &Path, bytes: &[u8]) -> Result<()> {
    fs::write(path, bytes).with_context(|| format!("cannot write {}", path.display()))
}
