//! The gateway on a real node: installed by the chart, keys of two tenants, every service behind one address and none beside it.
use std::process::Command;

use anyhow::{Context, Result, ensure};
use k8s_openapi::api::core::v1::ConfigMap;
use kube::Api;
use lathe_e2e::{
    RELEASE_NAMESPACE, Session,
    gateway::{Gateway, forget_keys, key, question},
    install, poll,
    programs::program,
    repository,
    serve::{post_as, service, whole},
    tune::prepare,
};
use serde_json::{Value, json};

#[tokio::test]
async fn a_key_reaches_the_services_of_its_own_namespace_and_no_others() -> Result<()> {
    install(&[])?;
    let session = Session::begin("lathe-gateway-a").await?;
    session.run(two_tenants(&session)).await?;
    // Without the flags the gateway goes with the upgrade.
    install(&[])?;
    forget_keys(&session.client).await?;
    session.end().await
}

async fn two_tenants(session: &Session) -> Result<()> {
    prepare(session).await?;
    let mut shop = service("shop", &[])?;
    shop["spec"]["access"] = "GatewayOnly".into();
    session.apply(&shop).await?;
    // Nobody could ask it yet: it waits, and says for what.
    session.reason("InferenceService", "shop", "Ready", "False", "GatewayDisabled").await?;
    let ours = key(&session.client, "ours", &session.namespace).await?;
    let theirs = key(&session.client, "theirs", "lathe-gateway-b").await?;
    install(&["--set", "gateway.enabled=true", "--set", "gateway.usageLog=true"])?;
    let ready = session.wait("InferenceService", "shop", "Ready", "True").await?;
    let url = &ready["status"]["url"];
    ensure!(*url == format!("http://lathe-gateway.{RELEASE_NAMESPACE}.svc/v1"), "{url}");

    let gateway = Gateway::find(&session.client).await?;
    let full = format!("{}/shop", session.namespace);
    // A replica that started before the service was ready hears of it a moment later.
    let listed = || async {
        let (status, models) = gateway.get("/v1/models", Some(&ours)).await?;
        ensure!(status == 200, "{status}: {models}");
        Ok((models["data"][0]["id"] == *full).then_some(()))
    };
    poll("the gateway lists the service", listed).await?;

    // The worker answers by either name, streamed or not.
    let mut said = Vec::new();
    for model in ["shop", full.as_str()] {
        let (status, answer) = gateway.ask(&question(model, false), Some(&ours)).await?;
        ensure!(status == 200, "{status}: {answer}");
        let answer: Value = serde_json::from_str(&answer)?;
        let text = answer["choices"][0]["message"]["content"].as_str().context("no answer")?;
        said.push(text.to_owned());
        let (status, stream) = gateway.ask(&question(model, true), Some(&ours)).await?;
        ensure!(status == 200 && stream.trim_end().ends_with("data: [DONE]"), "{status}: {stream}");
    }

    ensure!(!said[0].is_empty() && said[0] == said[1], "{said:?}");

    // Past the gateway nobody is served: not without a key, and not with one, which is nothing to a worker. Nothing in this
    // cluster enforces the NetworkPolicy, so it is the worker that refuses.
    for key in [None, Some(ours.as_str())] {
        let (status, answer) = post_as(session, "shop", &question("shop", false), key).await?;
        ensure!(status == 401, "{status}: {answer}");
    }
    chat(session, &ours).await?;
    clients_of_others(&gateway, &ours, &full)?;

    // Whoever has another namespace's key, or none, gets nothing by any name.
    for model in ["shop", full.as_str()] {
        let (status, answer) = gateway.ask(&question(model, false), Some(&theirs)).await?;
        ensure!(status == 404 && answer.contains("model_not_found"), "{status}: {answer}");
        ensure!(!answer.contains("You can use"), "{answer}");
    }
    let (status, models) = gateway.get("/v1/models", Some(&theirs)).await?;
    ensure!(status == 200 && models["data"] == json!([]), "{status}: {models}");
    for key in [None, Some("lathe-AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA")] {
        let (status, answer) = gateway.ask(&question(&full, false), key).await?;
        ensure!(status == 401 && answer.contains("invalid_api_key"), "{status}: {answer}");
    }

    // What the key used is written down where the next replica finds it, by the rights that the chart gives.
    let maps: Api<ConfigMap> = Api::namespaced(session.client.clone(), RELEASE_NAMESPACE);
    let counted = || async {
        let data = maps.get_opt("lathe-gateway-usage").await?.and_then(|map| map.data).unwrap_or_default();
        let months: Value =
            data.get("ours").map_or(Ok(Value::Null), |months| serde_json::from_str(months))?;
        let used = |counts: &Value| counts["tokens"].as_u64() > Some(0);
        Ok(months.as_object().is_some_and(|months| months.values().any(used)).then_some(()))
    };
    poll("the gateway tells what its keys used", counted).await
}

/// The command asks through the gateway, where the user has a key.
async fn chat(session: &Session, key: &str) -> Result<()> {
    let lathe = |key: &str| {
        let mut command = Command::new(program("lathe")?);
        command.args(["chat", "shop", "How much is the red lamp?", "--temperature", "0"]);
        command.args(["--namespace", &session.namespace]).env("LATHE_API_KEY", key);
        Ok::<_, anyhow::Error>(command.output()?)
    };
    let answer = lathe(key)?;
    let (out, err) = (String::from_utf8_lossy(&answer.stdout), String::from_utf8_lossy(&answer.stderr));
    ensure!(answer.status.success() && out.contains("euros"), "{out} {err}");
    let keyless = lathe("")?;
    let err = String::from_utf8_lossy(&keyless.stderr);
    ensure!(keyless.status.code() == Some(64) && err.contains("lathe keys create"), "{err}");
    Ok(())
}

/// curl and OpenAI's own Python client (`tests/python/openai_gateway.py`), as they are.
fn clients_of_others(gateway: &Gateway, key: &str, model: &str) -> Result<()> {
    let url = gateway.url("/v1");
    let python =
        std::env::var("LATHE_PYTHON").context("set LATHE_PYTHON to the Python of tests/python/setup.py")?;
    let script = repository().join("tests/python/openai_gateway.py");
    let said = output(Command::new(python).arg(script).args([&url, key, model]))?;
    ensure!(said.contains("all is well"), "{said}");

    for stream in [false, true] {
        let mut curl = Command::new("curl");
        curl.args(["--silent", "--show-error", "--fail-with-body", "--no-buffer"]);
        curl.args(["--header", &format!("Authorization: Bearer {key}")]);
        curl.args(["--json", &question(model, stream).to_string(), &format!("{url}/chat/completions")]);
        let said = output(&mut curl)?;
        let text = match stream {
            true => whole(&said)?,
            false => serde_json::from_str::<Value>(&said)?["choices"][0]["message"]["content"].to_string(),
        };
        ensure!(text.contains("euros"), "{said}");
    }
    Ok(())
}

/// What a program prints that ends well.
fn output(command: &mut Command) -> Result<String> {
    // What is meant for the world outside does not lead into the cluster.
    command.env_remove("HTTP_PROXY").env_remove("http_proxy").env_remove("ALL_PROXY").env_remove("all_proxy");
    let output = command.output().with_context(|| format!("cannot start {command:?}"))?;
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    ensure!(output.status.success(), "{command:?}: {said}{}", String::from_utf8_lossy(&output.stderr));
    Ok(said)
}
