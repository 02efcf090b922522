//! A real API server with its controllers, and no node: what is admitted, and how far the operator comes.
mod admission;
mod autoscaler;
mod kinds;

use anyhow::Result;
use k8s_openapi::apiextensions_apiserver::pkg::apis::apiextensions::v1::CustomResourceDefinition;
use kube::{
    Api, ResourceExt as _,
    api::{Patch, PatchParams},
    runtime::{conditions, wait::await_condition},
};
use lathe_e2e::Session;
use serde_json::Value;

const CASES: &str = include_str!("../../../crates/api/tests/admission.json");

/// Valid objects, and changes that are accepted or refused.
fn cases() -> Result<Value> {
    Ok(serde_json::from_str(CASES)?)
}

async fn install_crds(session: &Session) -> Result<()> {
    let api: Api<CustomResourceDefinition> = Api::all(session.client.clone());
    for crd in lathe_api::crds::all() {
        let name = crd.name_any();
        api.patch(&name, &PatchParams::apply("lathe-e2e").force(), &Patch::Apply(&crd)).await?;
        await_condition(api.clone(), &name, conditions::is_crd_established()).await?;
    }
    Ok(())
}
