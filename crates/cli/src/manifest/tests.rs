//! What is read, and what is refused by name.
use rstest::rstest;

use super::*;

const MODEL: &str = "
apiVersion: lathe.dev/v1alpha1
kind: Model
metadata: {name: base}
spec: {source: {uri: pvc://data/model}}
";

fn read_text(text: &str) -> Done<Manifests> {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("m.yaml");
    std::fs::write(&file, text).unwrap();
    read(&[file])
}

#[test]
fn the_quick_start_is_read_and_what_is_not_ours_is_told() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../examples/quickstart");
    let all = read(&[folder]).unwrap();
    assert_eq!((all.models.len(), all.jobs.len(), all.services.len()), (1, 1, 1));
    assert_eq!(all.foreign, ["PersistentVolumeClaim quickstart", "Job quickstart-data"]);
    assert!(all.folder.ends_with("examples/quickstart"), "{}", all.folder.display());
}

#[test]
fn the_example_of_scaling_is_read() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../examples/autoscaling");
    let all = read(&[folder]).unwrap();
    let [service] = all.services.as_slice() else { panic!("one service") };
    let autoscaling = service.spec.autoscaling.as_ref().unwrap();
    assert_eq!((autoscaling.min_replicas, autoscaling.max_replicas), (0, 3));
    assert_eq!(autoscaling.sleeps_after(), Some(900));
}

/// Most clusters' default storage class gives volumes that one node can mount at a time, and nothing else.
#[test]
fn the_quick_start_asks_for_no_more_than_any_cluster_has() {
    let file = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../examples/quickstart/10-data.yaml");
    let documents: Vec<Value> = serde_saphyr::from_multiple(&std::fs::read_to_string(file).unwrap()).unwrap();
    let [claim, job] = documents.as_slice() else { panic!("a claim and a Job") };
    assert_eq!(claim["spec"]["accessModes"], serde_json::json!(["ReadWriteOnce"]));
    assert!(claim["spec"].get("storageClassName").is_none());
    let labels = job["spec"]["template"]["metadata"]["labels"].as_object().unwrap();
    let named: Vec<_> = labels.keys().filter_map(|label| lathe_resolve::pod::claim_of(label)).collect();
    assert_eq!(named, [claim["metadata"]["name"].as_str().unwrap()]);
}

#[test]
fn documents_that_are_empty_do_not_count() {
    let all = read_text(&format!("---\n# nothing\n---{MODEL}---\n")).unwrap();
    assert_eq!(all.models.len(), 1);
}

#[rstest]
#[case::no_yaml("a: [", "m.yaml: ")]
#[case::no_object("just text", "object 1: `apiVersion` and `kind` must be set")]
#[case::nothing_of_ours(
    "{apiVersion: v1, kind: Secret, metadata: {name: s}}",
    "no Model, FineTuneJob or InferenceService"
)]
#[case::other_version(
    "{apiVersion: lathe.dev/v9, kind: Model}",
    "`apiVersion` must be lathe.dev/v1alpha1 (found lathe.dev/v9)"
)]
#[case::other_kind("{apiVersion: lathe.dev/v1alpha1, kind: Modell}", "`kind` must be one of")]
#[case::a_number_for_text(
    "{apiVersion: lathe.dev/v1alpha1, kind: Model, metadata: {name: m}, spec: {source: {uri: 3}}}",
    "m.yaml, object 1: Model m: `spec.source.uri` must be of type string (found 3; put it in quotes)"
)]
#[case::a_rule(
    "{apiVersion: lathe.dev/v1alpha1, kind: Model, metadata: {name: m}, spec: {source: {uri: 'ftp://x/y'}}}",
    "`uri` must begin with hf://"
)]
#[case::misspelled(
    "{apiVersion: lathe.dev/v1alpha1, kind: Model, metadata: {name: m}, spec: {sauce: {uri: 'pvc://a/b'}}}",
    "`spec.sauce` is no field; allowed are"
)]
#[case::required(
    "{apiVersion: lathe.dev/v1alpha1, kind: Model, metadata: {name: m}, spec: {}}",
    "`spec.source` must be set"
)]
#[case::no_name(
    "{apiVersion: lathe.dev/v1alpha1, kind: Model, spec: {source: {uri: 'pvc://a/b'}}}",
    "`metadata.name` must be"
)]
#[case::a_bad_name(
    "{apiVersion: lathe.dev/v1alpha1, kind: Model, metadata: {name: ../x}, spec: {source: {uri: 'pvc://a/b'}}}",
    "`metadata.name` must be"
)]
fn what_is_wrong_is_named(#[case] text: &str, #[case] expected: &str) {
    let problem = read_text(text).unwrap_err();
    assert!(problem.message.contains(expected), "{problem}");
    assert_eq!(problem.code, 64);
}

#[test]
fn an_object_that_is_there_twice_is_refused() {
    let problem = read_text(&format!("{MODEL}---{MODEL}")).unwrap_err();
    assert!(problem.message.contains("object 2: Model base is there twice"), "{problem}");
}

/// As `kubectl get -o yaml` writes several objects.
#[test]
fn the_objects_of_a_list_are_objects() {
    let one = |name: &str, source: &str| {
        format!(
            "{{apiVersion: lathe.dev/v1alpha1, kind: Model, metadata: {{name: {name}}}, spec: {{{source}}}}}"
        )
    };
    let good = "source: {uri: 'pvc://data/model'}";
    let list = |second: &str| {
        let foreign = "{apiVersion: v1, kind: Secret, metadata: {name: key}}";
        format!("{{apiVersion: v1, kind: List, items: [{}, {foreign}, {second}]}}", one("a", good))
    };
    let all = read_text(&list(&one("b", good))).unwrap();
    let names: Vec<_> = all.models.iter().filter_map(|model| model.metadata.name.as_deref()).collect();
    assert_eq!((names, all.foreign), (vec!["a", "b"], vec!["Secret key".to_owned()]));
    let problem = read_text(&list(&one("b", "sauce: 1"))).unwrap_err();
    assert!(problem.message.contains("object 1: items[2]: Model b"), "{problem}");
    let problem = read_text("{apiVersion: v1, kind: List, items: 3}").unwrap_err();
    assert!(problem.message.contains("`items` must be a list"), "{problem}");
}

#[test]
fn a_file_that_is_not_there_is_named() {
    let problem = read(&["/nowhere/x.yaml".into()]).unwrap_err();
    assert!(problem.message.contains("/nowhere/x.yaml"), "{problem}");
}

/// The same cases that the API server is asked: what it refuses by a rule, a local run refuses too.
#[test]
fn the_objects_that_admission_refuses_are_refused_here() {
    let cases: Value = serde_json::from_str(include_str!("../../../api/tests/admission.json")).unwrap();
    for (kind, object) in cases["valid"].as_object().unwrap() {
        let checked = schema::check("lathe.dev/v1alpha1", kind, object);
        assert!(checked.is_ok(), "{kind}: {checked:?}");
    }
    let fresh = cases["refused"].as_array().unwrap().iter().filter(|case| case.get("old").is_none());
    for case in fresh {
        let kind = case["kind"].as_str().unwrap();
        let object = merged(&cases["valid"][kind], &case["change"]);
        let problem = schema::check("lathe.dev/v1alpha1", kind, &object).expect_err(&case.to_string());
        assert!(problem.message.contains(case["because"].as_str().unwrap()), "{case}\n{problem}");
    }
}

fn merged(target: &Value, patch: &Value) -> Value {
    let mut result = target.clone();
    json_patch::merge(&mut result, patch);
    result
}
