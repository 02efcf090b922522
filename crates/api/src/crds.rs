//! The CustomResourceDefinitions as they are installed.
use k8s_openapi::apiextensions_apiserver::pkg::apis::apiextensions::v1::{
    CustomResourceDefinition, JSON, JSONSchemaProps, JSONSchemaPropsOrArray, JSONSchemaPropsOrBool,
};
use kube::CustomResourceExt;

use crate::{AcceleratorProfile, FineTuneJob, InferenceService, Model};

/// All four, in the order of their names.
#[must_use]
pub fn all() -> Vec<CustomResourceDefinition> {
    let mut crds = vec![AcceleratorProfile::crd(), FineTuneJob::crd(), InferenceService::crd(), Model::crd()];
    for crd in &mut crds {
        mark_unvisited(crd);
        for version in &mut crd.spec.versions {
            version.schema.iter_mut().filter_map(|s| s.open_api_v3_schema.as_mut()).for_each(refuse_null);
        }
    }
    crds
}

/// An optional field is absent or has a value: `null` is a third thing that nobody needs.
fn refuse_null(schema: &mut JSONSchemaProps) {
    schema.nullable = None;
    schema.properties.iter_mut().flat_map(|map| map.values_mut()).for_each(refuse_null);
    if let Some(JSONSchemaPropsOrArray::Schema(items)) = &mut schema.items {
        refuse_null(items);
    }
    if let Some(JSONSchemaPropsOrBool::Schema(values)) = &mut schema.additional_properties {
        refuse_null(values);
    }
}

/// Gives new objects `status: {observedGeneration: -1}`, so that one nobody has visited is never Current to kstatus.
fn mark_unvisited(crd: &mut CustomResourceDefinition) {
    for version in &mut crd.spec.versions {
        let root = version.schema.as_mut().and_then(|s| s.open_api_v3_schema.as_mut());
        let status = root.and_then(|r| r.properties.as_mut()).and_then(|p| p.get_mut("status"));
        if let Some(status) = status {
            status.default = Some(JSON(serde_json::json!({"observedGeneration": -1})));
        }
    }
}
