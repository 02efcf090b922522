//! The key pairs of operator and gateway: made once, kept in one Secret of the release namespace.
use std::collections::BTreeMap;

use k8s_openapi::{ByteString, api::core::v1::Secret, apimachinery::pkg::apis::meta::v1::ObjectMeta};
use kube::{Api, Client, api::PostParams};
use lathe_api::names;
use lathe_contract::{Signer, TokenError, Trust};

/// Name of the Secret. The chart grants reading to this name alone, and removes it before the release goes.
pub const SECRET: &str = "lathe-keys";

const OPERATOR: &str = "operator.key";
const GATEWAY: &str = "gateway.key";
const OPERATOR_PUBLIC: &str = "operator.pub";
const GATEWAY_PUBLIC: &str = "gateway.pub";

/// What the operator signs with, and what workers believe.
#[derive(Debug)]
pub struct Keys {
    /// The operator's own key.
    pub signer: Signer,
    /// The public halves, for contracts.
    pub trust: Trust,
}

/// Why there are no keys.
#[derive(Debug, thiserror::Error)]
pub enum KeysError {
    /// The Secret could not be read or made.
    #[error("failed to {verb} Secret {namespace}/{SECRET}: {source}")]
    Api {
        /// `read` or `create`.
        verb: &'static str,
        /// The release namespace.
        namespace: String,
        /// Why not.
        source: kube::Error,
    },
    /// The Secret is there and has no usable key.
    #[error(
        "Secret {SECRET} has no usable `{key}`: {problem}; delete the Secret, then restart the operator and the workers"
    )]
    Unusable {
        /// Key of the Secret's data.
        key: &'static str,
        /// What is wrong.
        problem: String,
    },
}

/// Reads the keys; the first to come makes them.
///
/// # Errors
/// [`KeysError`] where the Secret cannot be read, made or understood.
pub async fn ensure(client: &Client, namespace: &str) -> Result<Keys, KeysError> {
    let api: Api<Secret> = Api::namespaced(client.clone(), namespace);
    let failed = |verb| move |source| KeysError::Api { verb, namespace: namespace.to_owned(), source };
    if let Some(secret) = api.get_opt(SECRET).await.map_err(failed("read"))? {
        return read(&secret);
    }
    let fresh = make(&rand::random(), &rand::random())?;
    match api
        .create(&PostParams { field_manager: Some(names::FIELD_MANAGER.to_owned()), dry_run: false }, &fresh)
        .await
    {
        Ok(made) => read(&made),
        // Another replica was first: its keys count.
        Err(kube::Error::Api(status)) if status.is_already_exists() => {
            read(&api.get(SECRET).await.map_err(failed("read"))?)
        }
        Err(source) => Err(failed("create")(source)),
    }
}

/// The Secret for two seeds.
fn make(operator: &[u8; 32], gateway: &[u8; 32]) -> Result<Secret, KeysError> {
    let unusable = |key| move |error: TokenError| KeysError::Unusable { key, problem: error.to_string() };
    let mut data = BTreeMap::new();
    for (private, public, seed) in [(OPERATOR, OPERATOR_PUBLIC, operator), (GATEWAY, GATEWAY_PUBLIC, gateway)]
    {
        let signer = Signer::from_seed(seed);
        data.insert(private.to_owned(), signer.to_pem().map_err(unusable(private))?);
        data.insert(public.to_owned(), signer.public_pem().map_err(unusable(public))?);
    }
    let labels = BTreeMap::from([("app.kubernetes.io/managed-by".to_owned(), "lathe".to_owned())]);
    Ok(Secret {
        metadata: ObjectMeta { name: Some(SECRET.to_owned()), labels: Some(labels), ..ObjectMeta::default() },
        type_: Some("Opaque".to_owned()),
        data: Some(data.into_iter().map(|(key, pem)| (key, ByteString(pem.into_bytes()))).collect()),
        ..Secret::default()
    })
}

/// What a Secret holds. The public halves are computed, so that they cannot belong to other keys.
fn read(secret: &Secret) -> Result<Keys, KeysError> {
    let signer = |key: &'static str| {
        let unusable = |problem: String| KeysError::Unusable { key, problem };
        let bytes = secret.data.as_ref().and_then(|data| data.get(key));
        let bytes = bytes.ok_or_else(|| unusable("it is absent".to_owned()))?;
        let pem = std::str::from_utf8(&bytes.0).map_err(|e| unusable(e.to_string()))?;
        let signer = Signer::from_pem(pem).map_err(|e| unusable(e.to_string()))?;
        let public = signer.public_pem().map_err(|e| unusable(e.to_string()))?;
        Ok((signer, public))
    };
    let (operator, operator_public) = signer(OPERATOR)?;
    let (_, gateway_public) = signer(GATEWAY)?;
    let trust = Trust { operator_key: Some(operator_public), gateway_key: Some(gateway_public) };
    Ok(Keys { signer: operator, trust })
}

#[cfg(test)]
mod tests {
    use lathe_contract::{Scope, Verifier};

    use super::*;

    #[test]
    fn what_is_made_reads_back_and_signs_for_the_public_half() {
        let keys = read(&make(&[1; 32], &[2; 32]).unwrap()).unwrap();
        let token = keys.signer.sign("uid", Scope::Report, 1_000);
        let verifier = |key: &Option<String>| Verifier::from_pem(key.as_deref().unwrap()).unwrap();
        assert!(verifier(&keys.trust.operator_key).verify(&token, "uid", Scope::Report, 1_000).is_ok());
        assert!(verifier(&keys.trust.gateway_key).verify(&token, "uid", Scope::Report, 1_000).is_err());
    }

    #[test]
    fn a_broken_secret_is_told_and_never_replaced() {
        let mut secret = make(&[1; 32], &[2; 32]).unwrap();
        secret.data.as_mut().unwrap().insert(GATEWAY.to_owned(), ByteString(b"not a key".to_vec()));
        let error = read(&secret).unwrap_err().to_string();
        assert!(error.contains("`gateway.key`") && error.contains("delete the Secret"), "{error}");
    }
}
