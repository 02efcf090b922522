//! Adapters that come and go while requests are answered.
use std::collections::BTreeMap;
use std::path::Path;

use lathe_contract::{AdapterEntry, AdapterState};
use lathe_source::FileEntry;
use lathe_worker::base::weights_digest;
use lathe_worker::train::artefact::BASE_WEIGHTS;
use serde_json::json;
use sha2::{Digest, Sha256};

use crate::model::{write_adapter, write_adapter_of, write_model};
use crate::server::{Server, adapter, joined, launch_in, source, start, until, volume};

async fn entry(server: &Server, id: &str) -> Option<AdapterEntry> {
    server.report().await.adapters.adapters.into_iter().find(|entry| entry.model_id == id)
}

async fn until_state(server: &Server, id: &str, state: AdapterState) -> AdapterEntry {
    until(&format!("{id} is {state:?}"), async || {
        entry(server, id).await.filter(|entry| entry.state == state)
    })
    .await
}

#[tokio::test]
async fn adapters_of_the_contract_answer_from_the_first_moment() {
    let folder = tempfile::tempdir().expect("a folder");
    write_model(&volume(folder.path()).join("base"), 1, &[]);
    write_adapter(&volume(folder.path()).join("a"), 1, 32);
    write_adapter(&volume(folder.path()).join("b"), 2, 32);
    let server = launch_in(folder, |_, task| {
        task.adapters = vec![adapter("a", "a"), adapter("b", "b"), adapter("gone", "gone")];
    })
    .await;
    server.until_ready().await;
    let texts = [
        server.greedy("base", "same", 30).await,
        server.greedy("a", "same", 30).await,
        server.greedy("b", "same", 30).await,
    ];
    assert!(texts[0] != texts[1] && texts[1] != texts[2] && texts[0] != texts[2], "{texts:?}");
    let list = server.client.get(format!("{}/v1/models", server.base)).send().await.expect("an answer");
    let list: serde_json::Value = list.json().await.expect("JSON");
    let ids: Vec<_> = list["data"]
        .as_array()
        .expect("a list")
        .iter()
        .map(|model| (&model["id"], &model["parent"]))
        .collect();
    assert_eq!(json!(ids), json!([["base", null], ["a", "base"], ["b", "base"]]));
    // One that could not be loaded is told, and takes nothing from the others.
    let failed = until_state(&server, "gone", AdapterState::Failed).await;
    assert!(failed.message.is_some_and(|message| message.contains("gone")));
    let (status, answer) = server.post("/v1/completions", &json!({"model": "gone", "prompt": "x"})).await;
    assert_eq!((status, &answer["error"]["code"]), (503, &json!("model_failed")));
}

#[tokio::test]
async fn an_adapter_whose_server_is_silent_keeps_neither_base_nor_others_from_answering() {
    // Takes the request and never answers.
    let silent = std::net::TcpListener::bind("127.0.0.1:0").expect("a port");
    let folder = tempfile::tempdir().expect("a folder");
    write_model(&volume(folder.path()).join("base"), 1, &[]);
    write_adapter(&volume(folder.path()).join("a"), 1, 32);
    let mut server = launch_in(folder, |_, task| {
        let mut slow = adapter("slow", "slow");
        slow.model.source.uri = format!("http://{}", silent.local_addr().expect("an address"));
        task.adapters = vec![slow, adapter("a", "a")];
    })
    .await;
    server.until_ready().await;
    assert_ne!(server.greedy("base", "same", 30).await, server.greedy("a", "same", 30).await);
    assert_eq!(entry(&server, "slow").await.expect("is told").state, AdapterState::Loading);
    let (status, answer) = server.post("/v1/completions", &json!({"model": "slow", "prompt": "x"})).await;
    assert_eq!((status, &answer["error"]["code"]), (503, &json!("model_not_ready")));
    server.stop.cancel();
    assert_eq!((&mut server.ended).await.expect("it ends"), 0);
}

#[tokio::test]
async fn an_adapter_is_added_swapped_and_removed_under_load() {
    let server = start(|_, _| {}).await;
    let volume = volume(server.folder.path());
    write_adapter(&volume.join("one"), 1, 32);
    write_adapter(&volume.join("two"), 2, 32);
    let base = server.greedy("base", "same", 30).await;
    let _busy = server.long_stream("base").await;

    let (status, answer) = server.post("/v1/completions", &json!({"model": "a", "prompt": "x"})).await;
    assert_eq!((status, &answer["error"]["code"]), (404, &json!("model_not_found")));
    assert_eq!(server.put_adapters(&[adapter("a", "one")]).await.0, 202);
    until_state(&server, "a", AdapterState::Ready).await;
    let one = server.greedy("a", "same", 30).await;
    assert_ne!(one, base);
    assert_eq!(server.greedy("base", "same", 30).await, base);

    // What runs on the first generation ends on it, while the second answers already.
    let body = json!({"model": "a", "prompt": "long", "max_tokens": 600, "ignore_eos": true, "seed": 3});
    let alone = server.complete(body.clone()).await["choices"][0]["text"].clone();
    let mut held = body.clone();
    held["max_tokens"] = json!(4000);
    let holder = server.stream("/v1/completions", held).await;
    let mut running = server.stream("/v1/completions", body.clone()).await;
    running.next().await.expect("an event");
    server.put_adapters(&[adapter("a", "two")]).await;
    let two = until("the second generation answers", async || {
        let text = server.greedy("a", "same", 30).await;
        (text != one).then_some(text)
    })
    .await;
    assert_ne!(two, base);
    until_state(&server, "a", AdapterState::Ready).await;
    let events = running.rest().await;
    let (rest, _) = joined(&events);
    assert!(alone.as_str().expect("text").ends_with(&rest) && rest.len() > 300, "{rest}");
    assert_ne!(server.complete(body).await["choices"][0]["text"], alone);

    // Removed: nothing new, and gone once the last request has left.
    drop(holder);
    let holder = server.long_stream("a").await;
    let (_, status) = server.put_adapters(&[]).await;
    assert_eq!(status["adapters"], json!([{"modelId": "a", "state": "Draining"}]));
    let (status, _) = server.post("/v1/completions", &json!({"model": "a", "prompt": "x"})).await;
    assert_eq!(status, 404);
    until_state(&server, "a", AdapterState::Draining).await;
    drop(holder);
    until("it is gone", async || entry(&server, "a").await.is_none().then_some(())).await;
    assert_eq!(server.greedy("base", "same", 30).await, base);
}

#[tokio::test]
async fn slots_are_freed_and_used_again() {
    let server = start(|_, _| {}).await;
    let volume = volume(server.folder.path());
    for n in 0..12 {
        write_adapter(&volume.join(format!("a{n}")), n, 32);
    }
    // More in turn than there are slots at a time.
    for n in 0..12 {
        let id = format!("a{n}");
        until("there is a slot", async || {
            server.put_adapters(&[adapter(&id, &id)]).await;
            until("it is settled", async || {
                entry(&server, &id).await.filter(|entry| entry.state != AdapterState::Loading)
            })
            .await
            .state
            .eq(&AdapterState::Ready)
            .then_some(())
        })
        .await;
        assert_eq!(server.greedy(&id, "same", 5).await.len(), 5);
    }
    // More at a time than there are slots: the surplus says so.
    let many: Vec<_> = (0..12).map(|n| adapter(&format!("a{n}"), &format!("a{n}"))).collect();
    server.put_adapters(&many).await;
    let failed = until("one finds no slot", async || {
        server.report().await.adapters.adapters.into_iter().find(|entry| entry.state == AdapterState::Failed)
    })
    .await;
    assert!(failed.message.as_ref().is_some_and(|text| text.contains("slots")), "{failed:?}");
}

#[tokio::test]
async fn what_does_not_fit_is_refused_with_names_and_shapes() {
    let server = start(|_, _| {}).await;
    let volume = volume(server.folder.path());
    write_adapter(&volume.join("wide"), 1, 64);
    std::fs::create_dir_all(volume.join("pickled")).expect("a folder");
    std::fs::write(volume.join("pickled/adapter_model.bin"), b"\x80\x02}q\x00.").expect("a file");
    std::fs::create_dir_all(server.folder.path().join("outside")).expect("a folder");
    write_adapter(&server.folder.path().join("outside"), 1, 32);
    std::os::unix::fs::symlink(server.folder.path().join("outside"), volume.join("link")).expect("a link");
    let mut digest = adapter("digest", "wide");
    digest.model.source.digest = Some(format!("sha256:{}", "0".repeat(64)));
    let mut elsewhere = adapter("elsewhere", "wide");
    elsewhere.model.source.uri = "pvc://other/wide".into();
    let mut file = adapter("file", "wide");
    file.model.source.uri = format!("file://{}", volume.join("wide").display());
    let wanted = [
        adapter("wide", "wide"),
        adapter("pickled", "pickled"),
        adapter("up", "../outside"),
        adapter("link", "link"),
        digest,
        elsewhere,
        file,
    ];
    assert_eq!(server.put_adapters(&wanted).await.0, 202);
    for (id, words) in [
        ("wide", vec!["adapter `wide`", "base model `base`", "[4, 32]", "[4, 64]"]),
        ("pickled", vec!["adapter `pickled`"]),
        ("up", vec!["adapter `up`"]),
        ("link", vec!["adapter `link`"]),
        ("digest", vec!["sha256:00"]),
        ("elsewhere", vec!["`other`", "models"]),
        ("file", vec!["file"]),
    ] {
        let message = until_state(&server, id, AdapterState::Failed).await.message.expect("a message");
        for word in words {
            assert!(message.contains(word), "{id}: {message}");
        }
    }
    assert_eq!(server.greedy("base", "same", 5).await.len(), 5);
}

/// What training writes into an adapter, for the base whose weights lie in this file.
fn made_for(weights: &Path) -> BTreeMap<String, String> {
    let bytes = std::fs::read(weights).expect("weights");
    let sha256 = Sha256::digest(&bytes).into();
    let file = FileEntry { path: "model.safetensors".into(), size: bytes.len() as u64, sha256 };
    [(BASE_WEIGHTS.to_owned(), weights_digest(&[file]))].into()
}

#[tokio::test]
async fn an_adapter_of_another_base_of_the_same_shape_is_refused() {
    let folder = tempfile::tempdir().expect("a folder");
    let volume = volume(folder.path());
    write_model(&volume.join("base"), 1, &[]);
    write_model(&volume.join("other"), 2, &[]);
    let [ours, foreign] =
        ["base", "other"].map(|base| made_for(&volume.join(base).join("model.safetensors")));
    write_adapter_of(&volume.join("ours"), 1, 32, ours);
    write_adapter_of(&volume.join("foreign"), 1, 32, foreign);
    // From the start: told, while base and others answer.
    let server = launch_in(folder, |_, task| {
        task.adapters = vec![adapter("first", "foreign"), adapter("ours", "ours")];
    })
    .await;
    server.until_ready().await;
    until_state(&server, "ours", AdapterState::Ready).await;
    let failed = until_state(&server, "first", AdapterState::Failed).await.message.expect("a message");
    // Added later.
    server.put_adapters(&[adapter("ours", "ours"), adapter("later", "foreign")]).await;
    let later = until_state(&server, "later", AdapterState::Failed).await.message.expect("a message");
    for (id, message) in [("first", failed), ("later", later)] {
        assert!(
            message.starts_with(&format!("adapter `{id}` on base model `base`: it was made for")),
            "{message}"
        );
        assert!(message.ends_with("Next: use the adapter with the base that it was made for."), "{message}");
    }
    assert_eq!(server.greedy("ours", "same", 5).await.len(), 5);
}

#[tokio::test]
async fn a_set_that_is_not_valid_changes_nothing() {
    let server = start(|_, _| {}).await;
    write_adapter(&volume(server.folder.path()).join("a"), 1, 32);
    server.put_adapters(&[adapter("a", "a")]).await;
    until_state(&server, "a", AdapterState::Ready).await;
    let mut secret = adapter("b", "a");
    secret.model.source.secret_dir = Some("/etc".into());
    let mut named = adapter("", "a");
    named.model.source = source("a");
    for (wanted, words) in [
        (vec![adapter("base", "a")], "`base` is taken"),
        (vec![adapter("b", "a"), adapter("b", "a")], "`b` is taken"),
        (vec![secret], "adapters[0].model.source.secretDir"),
        (vec![named], "adapters[0].modelId"),
        ((0..65).map(|n| adapter(&format!("a{n}"), "a")).collect(), "at most 64"),
    ] {
        let (status, answer) = server.put_adapters(&wanted).await;
        assert_eq!(status, 400, "{answer}");
        assert!(answer["error"]["message"].as_str().is_some_and(|text| text.contains(words)), "{answer}");
    }
    let put = server.client.put(format!("{}/v1/adapters", server.control)).body("{\"adapters\": [{}]}");
    assert_eq!(put.send().await.expect("an answer").status().as_u16(), 400);
    assert_eq!(server.greedy("a", "same", 5).await.len(), 5);
}
