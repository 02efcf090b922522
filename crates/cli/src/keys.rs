//! `lathe keys`: keys for the gateway.
use clap::Subcommand;
use k8s_openapi::ByteString;
use k8s_openapi::api::core::v1::Secret;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use lathe_contract::{KeyEntry, new_key};
use serde_json::{Value, json};

use crate::failure::{Done, Problem};
use crate::output::{Output, note, say};

/// Make keys for the gateway.
#[derive(clap::Args, Debug)]
pub struct Args {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand, Debug)]
enum Command {
    Create(Create),
}

/// Make a key, and the entry by which the gateway knows it.
///
/// The key is shown this once, on standard error; the entry, which holds its hash alone, is a Secret's manifest on standard
/// output. No cluster is asked.
#[derive(clap::Args, Debug)]
#[command(verbatim_doc_comment, after_long_help = HELP)]
struct Create {
    /// Name of the key, as the gateway's metrics and usage log tell it: letters, digits, `-`, `_` and `.`.
    name: String,
    /// The one namespace whose models it may ask.
    #[arg(short, long)]
    namespace: String,
    /// Services and adapters of that namespace that it may ask; none: all of them.
    #[arg(long, value_delimiter = ',')]
    models: Vec<String>,
    /// Requests a minute; absent: no limit.
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..))]
    requests_per_minute: Option<u32>,
    /// Tokens a minute, of prompts and answers together; absent: no limit.
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..))]
    tokens_per_minute: Option<u32>,
    /// Tokens a calendar month (UTC), of prompts and answers together; absent: no limit.
    #[arg(long, value_parser = clap::value_parser!(u64).range(1..))]
    tokens_per_month: Option<u64>,
    /// The gateway's Secret, as `NAMESPACE/NAME`.
    #[arg(long, default_value = "lathe-system/lathe-gateway-keys")]
    secret: String,
    /// Form of the answer.
    #[arg(short, long, value_enum, default_value_t)]
    output: Output,
}

const HELP: &str = "Examples:
  lathe keys create ci --namespace team-a | kubectl apply --server-side --field-manager lathe-key-ci -f -
  lathe keys create web --namespace team-a --models support --tokens-per-minute 100000 --tokens-per-month 50000000

A field manager for each key: so keys of one Secret come and go apart from each other.

Next: the gateway knows the key within about a minute; ask it with `Authorization: Bearer KEY`.";

/// Runs the command.
///
/// # Errors
/// A name is none.
pub fn run(args: &Args) -> Done<()> {
    let Command::Create(create) = &args.command;
    let Made { key, entry, secret } = made(create, rand::random())?;
    match create.output {
        Output::Json => {
            let all = json!({"key": key, "name": create.name, "entry": entry, "secret": secret});
            say(&all.to_string());
        }
        Output::Text => {
            note(&format!("The key `{}`, shown this once:\n  {key}\n", create.name));
            say(&serde_saphyr::to_string(&secret).map_err(|error| unwritten(&error))?);
        }
    }
    Ok(())
}

struct Made {
    key: String,
    entry: KeyEntry,
    secret: Value,
}

fn made(create: &Create, seed: [u8; 32]) -> Done<Made> {
    let invalid = |message: String| Problem::user("InvalidArgument", message);
    let named = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
    // Files that begin with dots are the kubelet's own.
    let ours = !create.name.is_empty() && create.name.len() <= 253 && !create.name.starts_with('.');
    if !ours || !create.name.chars().all(named) {
        return Err(invalid(format!(
            "`{}` must be at most 253 letters, digits, `-`, `_` and `.`, not beginning with `.`, since it is an entry of a Secret",
            create.name.escape_debug()
        )));
    }
    let place = create
        .secret
        .split_once('/')
        .filter(|(namespace, name)| !namespace.is_empty() && !name.is_empty() && !name.contains('/'));
    let (namespace, secret) = place.ok_or_else(|| {
        invalid("`--secret` must be NAMESPACE/NAME, e.g. lathe-system/lathe-gateway-keys".to_owned())
    })?;
    let (key, hash) = new_key(seed);
    let entry = KeyEntry {
        hash,
        namespace: create.namespace.clone(),
        models: (!create.models.is_empty()).then(|| create.models.clone()),
        requests_per_minute: create.requests_per_minute,
        tokens_per_minute: create.tokens_per_minute,
        tokens_per_month: create.tokens_per_month,
    };
    let json = serde_json::to_vec(&entry).map_err(|error| unwritten(&error))?;
    // The gateway's own reader judges.
    let entry = KeyEntry::parse(&json).map_err(|error| invalid(error.to_string()))?;
    let secret = Secret {
        metadata: ObjectMeta {
            name: Some(secret.to_owned()),
            namespace: Some(namespace.to_owned()),
            ..ObjectMeta::default()
        },
        data: Some([(create.name.clone(), ByteString(json))].into()),
        ..Secret::default()
    };
    Ok(Made { key, entry, secret: serde_json::to_value(secret).map_err(|error| unwritten(&error))? })
}

fn unwritten(error: &impl std::fmt::Display) -> Problem {
    Problem::transient("InternalError", format!("the entry cannot be written: {error}"))
}

#[cfg(test)]
mod tests {
    use lathe_contract::KeyHash;
    use rstest::rstest;

    use super::*;

    fn create() -> Create {
        Create {
            name: "ci".to_owned(),
            namespace: "team-a".to_owned(),
            models: vec!["support".to_owned()],
            requests_per_minute: Some(600),
            tokens_per_minute: None,
            tokens_per_month: Some(1_000_000),
            secret: "lathe-system/lathe-gateway-keys".to_owned(),
            output: Output::Text,
        }
    }

    #[test]
    fn the_secret_holds_what_the_gateway_reads_and_no_key() {
        let Made { key, entry, secret } = made(&create(), [7; 32]).unwrap();
        let manifest = serde_saphyr::to_string(&secret).unwrap();
        assert!(!manifest.contains(&key) && !format!("{entry:?}").contains(&key));
        let read: Secret = serde_saphyr::from_str(&manifest).unwrap();
        assert_eq!(read.metadata.namespace.as_deref(), Some("lathe-system"));
        let found = KeyEntry::parse(&read.data.unwrap()["ci"].0).unwrap();
        assert!(found.hash.matches(&KeyHash::of(&key)));
        assert_eq!(found, entry);
        assert_eq!((found.requests_per_minute, found.tokens_per_minute), (Some(600), None));
        assert_eq!(found.tokens_per_month, Some(1_000_000));
        assert_ne!(made(&create(), [8; 32]).unwrap().key, key);
    }

    #[rstest]
    #[case::a_path(|c: &mut Create| c.name = "../x".to_owned(), "not beginning with `.`")]
    #[case::no_name(|c: &mut Create| c.name = String::new(), "an entry of a Secret")]
    #[case::no_namespace(|c: &mut Create| c.namespace = "Team A".to_owned(), "`namespace` must be the name of a namespace")]
    #[case::a_model_of_another(|c: &mut Create| c.models = vec!["b/x".to_owned()], "`models[0]` must be the name of a service or adapter")]
    #[case::a_bare_secret(|c: &mut Create| c.secret = "keys".to_owned(), "`--secret` must be NAMESPACE/NAME")]
    fn what_is_no_key_is_told(#[case] change: fn(&mut Create), #[case] says: &str) {
        let mut create = create();
        change(&mut create);
        let problem = made(&create, [7; 32]).err().unwrap();
        assert!(problem.message.contains(says), "{}", problem.message);
        assert_eq!(problem.code, lathe_contract::exit::USER);
    }
}
