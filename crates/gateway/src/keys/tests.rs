use lathe_contract::new_key;
use rstest::rstest;
use serde_json::{Value, json};

use std::time::Duration;

use super::*;
use crate::account::By;
use crate::metrics::Times;
use crate::testing::{service, slice};

/// Two tenants who use the same names, and one name each that the other has not.
fn two_tenants() -> Table {
    let services = [
        service("team-a", "support", &["tone"], &["support", "tone"]),
        service("team-a", "private", &[], &["private"]),
        service("team-b", "support", &["secret"], &["support", "secret"]),
    ];
    Table::build(8080, &services, &[slice("team-b", "support", &[("10.0.0.1", json!({}))])])
}

fn entry(seed: u8, more: Value) -> Vec<u8> {
    let mut entry = json!({"hash": new_key([seed; 32]).1, "namespace": "team-a"});
    for (field, value) in more.as_object().unwrap() {
        entry[field] = value.clone();
    }
    entry.to_string().into_bytes()
}

fn keyring(entries: &[(&str, Vec<u8>)]) -> Keyring {
    Keyring::read(&entries.iter().map(|(name, json)| ((*name).to_owned(), json.clone())).collect())
}

fn bearer(key: &str) -> HeaderMap {
    HeaderMap::from_iter([(header::AUTHORIZATION, format!("Bearer {key}").parse().unwrap())])
}

fn caller(more: Value) -> Arc<Caller> {
    keyring(&[("k", entry(1, more))]).admit(&bearer(&new_key([1; 32]).0)).unwrap()
}

#[rstest]
#[case::exact("team-b/support")]
#[case::exact_adapter("team-b/secret")]
#[case::bare("secret")]
#[case::encoded("team-b%2Fsecret")]
#[case::encoded_twice("team-b%252Fsecret")]
#[case::upper_case("TEAM-B/secret")]
#[case::upper_case_name("team-b/SECRET")]
#[case::up("../team-b/secret")]
#[case::up_from_within("team-a/../team-b/secret")]
#[case::nested("team-a/team-b/secret")]
#[case::doubled("team-b//secret")]
#[case::leading("/team-b/secret")]
#[case::backslash("team-b\\secret")]
#[case::full_width_slash("team-b\u{ff0f}secret")]
#[case::division_slash("team-b\u{2215}secret")]
#[case::full_width_letter("team-\u{ff42}/secret")]
#[case::zero_width("team-b\u{200b}/secret")]
#[case::nul("team-b/secret\0")]
#[case::spaces(" team-b/secret")]
#[case::colon("team-b:secret")]
#[case::empty("")]
#[case::slash("/")]
fn nobody_reaches_another_namespace_by_any_spelling(#[case] name: &str) {
    let table = two_tenants();
    for more in [json!({}), json!({"models": ["support", "secret"]})] {
        let refused = caller(more).resolve(&table, name).unwrap_err();
        assert_eq!((refused.status.as_u16(), refused.code), (404, "model_not_found"));
        // Nor is told of it: what follows the name that was asked are names of its own.
        let told = refused.message.rsplit(" You can use: ").next().unwrap();
        assert!(!told.contains("team-b") && !told.contains("secret"), "{told}");
    }
}

#[test]
fn a_name_means_the_model_of_the_keys_own_namespace() {
    let table = two_tenants();
    let caller = caller(json!({}));
    for name in ["support", "team-a/support"] {
        assert_eq!(caller.resolve(&table, name).unwrap().service.uid, "uid-team-a-support");
    }
    assert!(caller.resolve(&table, "tone").unwrap().adapter);
    let ids: Vec<_> = caller.models(&table).map(|model| model.id()).collect();
    assert_eq!(ids, ["team-a/private", "team-a/support", "team-a/tone"]);
}

#[test]
fn a_key_of_some_models_neither_uses_nor_sees_the_others() {
    let table = two_tenants();
    let caller = caller(json!({"models": ["support"]}));
    assert!(caller.resolve(&table, "support").is_ok());
    let refused = caller.resolve(&table, "privat").unwrap_err();
    assert!(refused.message.ends_with("You can use: `team-a/support`."), "{}", refused.message);
    assert!(caller.resolve(&table, "team-a/private").is_err());
    assert_eq!(caller.models(&table).count(), 1);
}

#[test]
fn near_names_come_first() {
    let refused = caller(json!({})).resolve(&two_tenants(), "suport").unwrap_err();
    assert!(refused.message.contains("You can use: `team-a/support`, "), "{}", refused.message);
    let long = "x".repeat(1 << 20);
    assert!(caller(json!({})).resolve(&two_tenants(), &long).unwrap_err().message.len() < 400);
}

#[test]
fn without_keys_in_words_everybody_asks_by_full_ids_alone() {
    let table = two_tenants();
    let anybody = Auth::Open.admit(&HeaderMap::new()).unwrap();
    assert_eq!(anybody.resolve(&table, "team-b/secret").unwrap().id(), "team-b/secret");
    let refused = anybody.resolve(&table, "secret").unwrap_err();
    assert!(refused.message.contains("Name it as `namespace/name`."), "{}", refused.message);
    assert_eq!(anybody.models(&table).count(), 5);
}

#[test]
fn without_keys_nobody_is_let_in_and_is_told_what_to_do() {
    let key = new_key([1; 32]).0;
    let refused = keyring(&[]).admit(&bearer(&key)).unwrap_err();
    assert!(refused.status.as_u16() == 401 && refused.message.contains("`lathe keys create`"));
}

#[rstest]
#[case::none(HeaderMap::new(), "You gave no API key")]
#[case::other_scheme(HeaderMap::from_iter([(header::AUTHORIZATION, "Basic YTpi".parse().unwrap())]), "You gave no API key")]
#[case::unknown(bearer(&new_key([9; 32]).0), "is not known here")]
#[case::the_hash_is_no_key(bearer(&String::from(new_key([1; 32]).1)), "is not known here")]
#[case::empty(bearer(""), "is not known here")]
#[case::very_long(bearer(&"a".repeat(10_000)), "is not known here")]
fn whoever_has_no_key_is_not_let_in(#[case] headers: HeaderMap, #[case] said: &str) {
    let refused = keyring(&[("k", entry(1, json!({})))]).admit(&headers).unwrap_err();
    assert!(refused.status.as_u16() == 401 && refused.message.contains(said), "{}", refused.message);
}

#[test]
fn a_broken_entry_disables_itself_alone() {
    let entries = [
        ("a", entry(1, json!({"requestsPerMinute": 5}))),
        ("b", b"{".to_vec()),
        ("c", entry(2, json!({"budget": 1}))),
        ("d", entry(1, json!({"namespace": "team-b"}))),
    ];
    let keyring = keyring(&entries);
    let caller = keyring.admit(&bearer(&new_key([1; 32]).0)).unwrap();
    assert_eq!((&*caller.key, caller.limits.requests), ("a", Some(5)));
    assert!(keyring.admit(&bearer(&new_key([2; 32]).0)).is_err());
    assert_eq!(keyring.broken.keys().collect::<Vec<_>>(), ["b", "c", "d"]);
    assert!(keyring.broken["c"].contains("unknown field `budget`"));
    assert_eq!(keyring.broken["d"], "`hash` is that of `a` as well");
}

/// As the kubelet does it: the files are links into `..data`, which is a link that is swapped.
#[cfg(unix)]
fn mount(folder: &Path, version: &str, name: &str, content: &[u8]) {
    use std::os::unix::fs::symlink;
    let place = folder.join(version);
    std::fs::create_dir(&place).unwrap();
    std::fs::write(place.join(name), content).unwrap();
    symlink(version, folder.join("..data_tmp")).unwrap();
    std::fs::rename(folder.join("..data_tmp"), folder.join("..data")).unwrap();
    let _ = symlink(format!("..data/{name}"), folder.join(name));
}

#[tokio::test(start_paused = true)]
async fn keys_are_read_again_when_the_secret_changes() {
    let folder = tempfile::tempdir().unwrap();
    mount(folder.path(), "..1", "k", &entry(1, json!({})));
    let metrics = Arc::new(Metrics::default());
    let mut tasks = Tasks::default();
    let mut keys = follow(&mut tasks, folder.path().to_owned(), Arc::clone(&metrics), Arc::default());
    let auth = Auth::Keys(keys.clone());
    let let_in = |seed| auth.admit(&bearer(&new_key([seed; 32]).0)).is_ok();
    assert!(let_in(1) && !let_in(2));
    mount(folder.path(), "..2", "k", &entry(2, json!({})));
    keys.changed().await.unwrap();
    assert!(!let_in(1) && let_in(2));
    mount(folder.path(), "..3", "k", b"nothing");
    keys.changed().await.unwrap();
    assert!(!let_in(2));
    assert_eq!((metrics.keys.get(), metrics.keys_broken.get()), (0, 1));
    // An answer to one of them was still on its way.
    let models = Table::build(8080, &[service("a", "s", &[], &["s"])], &[]);
    let times = Times { first_byte: None, total: Duration::from_secs(9) };
    metrics.answered("k", models.get("a", "s").unwrap(), (200, By::Replica), None, times);
    let is_told = || metrics.text().unwrap().contains(r#"key="k""#);
    assert!(is_told());
    tokio::time::sleep(2 * files::PAUSE).await;
    assert!(!is_told());
}

#[test]
fn a_folder_that_cannot_be_read_keeps_the_keys_that_there_are() {
    let metrics = Metrics::default();
    let entries = Entries::from([("k".to_owned(), entry(1, json!({})))]);
    let mut folder = Folder { path: "/nowhere/at/all".into(), entries, readable: Some(true) };
    assert!(!folder.look(&metrics));
    assert_eq!((folder.entries.len(), metrics.keys_readable.get()), (1, 0));
}
