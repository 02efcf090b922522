//! Prints the CustomResourceDefinitions as a JSON list, for `cargo xtask generate`.
use std::io::Write as _;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let mut json = serde_json::to_string_pretty(&lathe_api::crds::all())?;
    json.push('\n');
    std::io::stdout().write_all(json.as_bytes())?;
    Ok(())
}
