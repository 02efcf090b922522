//! Which files are read, by name. No name from outside becomes a path without [`check_path`].
use crate::error::SourceError;

/// The allow-list, in words.
pub(crate) const READS: &str = "config.json, generation_config.json, tokenizer*.json, special_tokens_map.json, chat_template.jinja, *.safetensors, *.safetensors.index.json, adapter_config.json, LICENSE, README.md and *.jsonl";

/// Ending of a file that is not whole yet.
pub(crate) const PARTIAL: &str = ".partial";

/// Largest file that is not weights or a dataset: tokenizers of large vocabularies reach 35 MB.
const MAX_SMALL: u64 = 128 << 20;

/// Allows `a/b.json`; refuses what is absolute, steps up or sideways, or is no plain name.
pub(crate) fn check_path(path: &str) -> Result<(), SourceError> {
    let refuse = |problem| Err(SourceError::UnsafeName { name: path.chars().take(200).collect(), problem });
    if path.is_empty() || path.len() > 1024 {
        return refuse("it must have 1 to 1024 bytes");
    }
    if path.chars().any(|c| c.is_control() || c == '\\') {
        return refuse("it must not have control characters or backslashes");
    }
    for part in path.split('/') {
        match part {
            "" | "." | ".." => return refuse("it must have no empty, `.` or `..` part"),
            part if part.len() > 255 => return refuse("a part must have at most 255 bytes"),
            part if part.ends_with(PARTIAL) => {
                return refuse("names ending in .partial are for unfinished files");
            }
            _ => {}
        }
    }
    Ok(())
}

/// Whether a file of this name is read where no manifest lists the files. Only names without a folder are.
pub(crate) fn allowed(name: &str) -> bool {
    let exact = [
        "config.json",
        "generation_config.json",
        "special_tokens_map.json",
        "chat_template.jinja",
        "adapter_config.json",
        "LICENSE",
        "LICENSE.txt",
        "LICENSE.md",
        "README.md",
    ];
    !name.contains('/')
        && !name.starts_with('.')
        && (exact.contains(&name)
            || (name.starts_with("tokenizer") && name.ends_with(".json"))
            || name.ends_with(".safetensors")
            || name.ends_with(".safetensors.index.json")
            || name.ends_with(".jsonl"))
}

/// Whether the name is one of PyTorch's pickle formats, in whatever case and folder.
pub(crate) fn is_pickle(path: &str) -> bool {
    let name = path.to_ascii_lowercase();
    [".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".joblib"].iter().any(|end| name.ends_with(end))
}

/// Whether these are weights.
pub(crate) fn is_weights(path: &str) -> bool {
    path.ends_with(".safetensors")
}

/// Largest size that is believed for a file of this name, below the limit for the whole.
pub(crate) fn cap(path: &str, whole: u64) -> u64 {
    if is_weights(path) || path.ends_with(".jsonl") { whole } else { whole.min(MAX_SMALL) }
}

/// The files to read out of everything that a location holds.
///
/// Weights in the usual layout (`model*.safetensors`) win over a second copy of them (`consolidated*.safetensors`).
///
/// # Errors
/// `PickleRefused` where only pickles hold the weights, `NothingToFetch` where nothing is on the list.
pub(crate) fn select<T>(what: &str, all: Vec<T>, path: impl Fn(&T) -> &str) -> Result<Vec<T>, SourceError> {
    let pickles: Vec<String> =
        all.iter().map(&path).filter(|p| is_pickle(p)).take(5).map(crate::error::printable).collect();
    let usual = all.iter().map(&path).any(|p| p.starts_with("model") && is_weights(p));
    let keep = |p: &str| allowed(p) && !(usual && p.starts_with("consolidated"));
    let chosen: Vec<T> = all.into_iter().filter(|f| keep(path(f))).collect();
    let holds_data = chosen.iter().map(&path).any(|p| is_weights(p) || p.ends_with(".jsonl"));
    if !holds_data && !pickles.is_empty() {
        return Err(SourceError::PickleRefused { what: what.into(), files: pickles.join(", ") });
    }
    if chosen.is_empty() {
        return Err(SourceError::NothingToFetch { what: what.into(), reads: READS });
    }
    Ok(chosen)
}

/// A single file that an address names: allowed by its ending, never a pickle.
pub(crate) fn check_single(what: &str, name: &str) -> Result<(), SourceError> {
    if is_pickle(name) {
        return Err(SourceError::PickleRefused { what: what.into(), files: crate::error::printable(name) });
    }
    if !allowed(name) {
        return Err(SourceError::NothingToFetch { what: what.into(), reads: READS });
    }
    Ok(())
}

/// The last part of a path.
pub(crate) fn last(path: &str) -> &str {
    path.rsplit('/').next().unwrap_or(path)
}

#[cfg(test)]
mod tests {
    use super::*;
    use rstest::rstest;

    #[rstest]
    #[case("config.json", true)]
    #[case("tokenizer_config.json", true)]
    #[case("model-00001-of-00002.safetensors", true)]
    #[case("model.safetensors.index.json", true)]
    #[case("train.jsonl", true)]
    #[case("pytorch_model.bin", false)]
    #[case("modeling_custom.py", false)]
    #[case("onnx/config.json", false)]
    #[case(".gitattributes", false)]
    fn list(#[case] name: &str, #[case] expected: bool) {
        assert_eq!(allowed(name), expected);
    }

    #[rstest]
    #[case("../x")]
    #[case("/etc/passwd")]
    #[case("a/../../b")]
    #[case("a//b")]
    #[case("a\\b")]
    #[case("a\nb")]
    #[case("")]
    #[case("model.safetensors.partial")]
    fn unsafe_names(#[case] name: &str) {
        assert!(check_path(name).is_err());
    }

    fn chosen(files: &[&str]) -> Result<Vec<String>, &'static str> {
        let all = files.iter().map(ToString::to_string).collect();
        select("m", all, |f: &String| f).map_err(|e| e.reason())
    }

    #[test]
    fn pickles_are_left_out_or_refused() {
        let files = ["config.json", "model.safetensors", "pytorch_model.bin", "optimizer.pt"];
        assert_eq!(chosen(&files).unwrap(), ["config.json", "model.safetensors"]);
        assert_eq!(chosen(&["config.json", "pytorch_model.bin"]), Err("PickleRefused"));
        assert_eq!(chosen(&["a.gguf", "x.py"]), Err("NothingToFetch"));
    }

    #[test]
    fn a_second_copy_of_the_weights_is_left_out() {
        let files = ["consolidated.safetensors", "model-00001-of-00001.safetensors"];
        assert_eq!(chosen(&files).unwrap(), ["model-00001-of-00001.safetensors"]);
        assert_eq!(chosen(&files[..1]).unwrap(), ["consolidated.safetensors"]);
    }
}
