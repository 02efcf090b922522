//! The model server protocol of the Gateway API Inference Extension, by which an endpoint picker chooses among replicas:
//! <https://gateway-api-inference-extension.sigs.k8s.io/> (proposal 003). Names are vLLM's, a picker's defaults.
use std::collections::BTreeMap;

use serde_json::json;

use crate::model;
use crate::server::{adapter, launch_in, until, volume};

/// A metric of an exposition in the text format.
#[derive(Debug, Default)]
struct Metric {
    kind: String,
    samples: Vec<(BTreeMap<String, String>, f64)>,
}

fn parse(text: &str) -> BTreeMap<String, Metric> {
    let mut all = BTreeMap::<String, Metric>::new();
    for line in text.lines() {
        if let Some((name, kind)) = line.strip_prefix("# TYPE ").and_then(|it| it.split_once(' ')) {
            all.entry(name.to_owned()).or_default().kind = kind.to_owned();
        } else if !line.starts_with('#') {
            let (series, value) = line.rsplit_once(' ').expect("a value");
            let (name, labels) = series.split_once('{').unwrap_or((series, "}"));
            let pairs = labels.trim_end_matches('}').split("\",").filter_map(|pair| pair.split_once("=\""));
            let labels =
                pairs.map(|(key, value)| (key.to_owned(), value.trim_end_matches('"').to_owned())).collect();
            all.entry(name.to_owned()).or_default().samples.push((labels, value.parse().expect("a number")));
        }
    }
    all
}

#[tokio::test]
async fn an_endpoint_picker_finds_what_it_chooses_by() {
    let folder = tempfile::tempdir().expect("a folder");
    model::write_model(&volume(folder.path()).join("base"), 1, &[]);
    model::write_adapter(&volume(folder.path()).join("a"), 1, 32);
    let server = launch_in(folder, |_, task| {
        (task.max_sequences, task.max_waiting) = (1, 8);
        task.adapters = vec![adapter("tuned", "a")];
    })
    .await;
    server.until_ready().await;
    // At the port of users, without a token: that is what a pool names, and all that a picker knows of a pod.
    let metrics = async || {
        let answer = server.client.get(format!("{}/metrics", server.base)).send().await.expect("an answer");
        assert_eq!(answer.status().as_u16(), 200);
        parse(&answer.text().await.expect("text"))
    };
    let one = |all: &BTreeMap<String, Metric>, name: &str| {
        let metric = all.get(name).unwrap_or_else(|| panic!("{name} is not among {:?}", all.keys()));
        assert_eq!((metric.kind.as_str(), metric.samples.len()), ("gauge", 1), "{name}: {metric:?}");
        metric.samples[0].clone()
    };
    let all = metrics().await;
    for (name, idle) in [
        ("vllm:num_requests_waiting", 0.0),
        ("vllm:num_requests_running", 0.0),
        ("vllm:kv_cache_usage_perc", 0.0),
    ] {
        assert_eq!(one(&all, name).1, idle, "{name}");
    }
    let (labels, value) = one(&all, "vllm:cache_config_info");
    let tokens = |label: &str| labels[label].parse::<usize>().expect("a number");
    assert_eq!((tokens("block_size"), value), (16, 1.0));
    assert!(tokens("num_gpu_blocks") * tokens("block_size") >= model::CONTEXT, "{labels:?}");
    let (labels, first) = one(&all, "vllm:lora_requests_info");
    let names = |labels: &BTreeMap<String, String>| {
        ["running_lora_adapters", "waiting_lora_adapters"].map(|label| labels[label].clone())
    };
    assert!(labels["max_lora"].parse::<u32>().is_ok_and(|most| most >= 1), "{labels:?}");
    assert_eq!(names(&labels), ["", ""]);
    let now =
        std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).expect("after 1970").as_secs_f64();
    assert!(first > 1.7e9 && first <= now, "{first} is no time of the past");

    // One that answers for long with the adapter, and one that waits for its place.
    let body = json!({"model": "tuned", "prompt": "x", "max_tokens": model::CONTEXT - 1, "ignore_eos": true});
    let asking: Vec<_> = (0..8)
        .map(|_| {
            let request = server.client.post(format!("{}/v1/completions", server.base)).json(&body);
            tokio::spawn(request.send())
        })
        .collect();
    until("one runs and others wait", async || {
        let all = metrics().await;
        let (labels, told) = one(&all, "vllm:lora_requests_info");
        let busy = one(&all, "vllm:num_requests_running").1 == 1.0
            && one(&all, "vllm:num_requests_waiting").1 >= 1.0
            && one(&all, "vllm:kv_cache_usage_perc").1 > 0.0
            && names(&labels) == ["tuned", "tuned"];
        assert!(one(&all, "vllm:kv_cache_usage_perc").1 <= 1.0 && told >= first);
        busy.then_some(())
    })
    .await;
    asking.iter().for_each(|asking| asking.abort());
}
