//! Who may ask a worker for what.
use axum::Json;
use axum::http::{HeaderMap, StatusCode, header};
use axum::response::{IntoResponse, Response};
use lathe_contract::{ObjectRef, Scope, TokenError, Trust, Verifier};

/// The object that tokens must be made for, and the keys that they must be made with.
#[derive(Clone, Debug)]
pub struct Access {
    uid: String,
    operator: Option<Verifier>,
    gateway: Option<Verifier>,
}

/// A request that was not let through.
#[derive(Debug, PartialEq, Eq)]
pub struct Refusal(pub TokenError);

impl Access {
    /// Reads the contract's keys.
    ///
    /// # Errors
    /// A key that is no Ed25519 key in PEM.
    pub fn new(object: &ObjectRef, trust: &Trust) -> Result<Self, TokenError> {
        let read = |pem: &Option<String>| pem.as_deref().map(Verifier::from_pem).transpose();
        Ok(Self {
            uid: object.uid.clone(),
            operator: read(&trust.operator_key)?,
            gateway: read(&trust.gateway_key)?,
        })
    }

    /// Whether there are no keys, so that nobody can be told apart and only this machine may ask.
    pub fn is_open(&self) -> bool {
        self.operator.is_none() && self.gateway.is_none()
    }

    /// Checks the bearer token of a request at `now` (Unix seconds). Reports go to operator and gateway, adapters are the
    /// operator's, inference is the gateway's.
    ///
    /// # Errors
    /// No token, or one that is not good for this.
    pub fn check(&self, headers: &HeaderMap, scope: Scope, now: i64) -> Result<(), Refusal> {
        if self.is_open() {
            return Ok(());
        }
        let token = headers
            .get(header::AUTHORIZATION)
            .and_then(|value| value.to_str().ok())
            .and_then(|value| value.strip_prefix("Bearer "))
            .ok_or(Refusal(TokenError::Malformed))?;
        let keys = match scope {
            Scope::Report => [&self.operator, &self.gateway],
            Scope::Adapters => [&self.operator, &None],
            Scope::Inference => [&self.gateway, &None],
            // A worker takes none.
            Scope::Curves => [&None, &None],
        };
        let mut refusal = TokenError::Signature;
        for key in keys.into_iter().flatten() {
            match key.verify(token, &self.uid, scope, now) {
                Ok(()) => return Ok(()),
                // The other key may have made it.
                Err(TokenError::Signature) => {}
                Err(error) => refusal = error,
            }
        }
        Err(Refusal(refusal))
    }
}

impl IntoResponse for Refusal {
    fn into_response(self) -> Response {
        let code = match self.0 {
            TokenError::Audience | TokenError::Scope => StatusCode::FORBIDDEN,
            _ => StatusCode::UNAUTHORIZED,
        };
        let error = serde_json::json!({"message": self.0.to_string(), "type": "invalid_request_error"});
        (code, Json(serde_json::json!({"error": error}))).into_response()
    }
}

#[cfg(test)]
mod tests {
    use lathe_contract::Signer;
    use rstest::rstest;

    use super::*;

    #[rstest]
    #[case::operator_reads(1, Scope::Report, true)]
    #[case::gateway_reads(2, Scope::Report, true)]
    #[case::operator_changes_adapters(1, Scope::Adapters, true)]
    #[case::gateway_does_not(2, Scope::Adapters, false)]
    #[case::gateway_asks(2, Scope::Inference, true)]
    #[case::operator_does_not(1, Scope::Inference, false)]
    fn each_key_opens_its_own_doors(#[case] seed: u8, #[case] scope: Scope, #[case] open: bool) {
        let pem = |seed| Signer::from_seed(&[seed; 32]).public_pem().ok();
        let object = ObjectRef { kind: "K".into(), namespace: "n".into(), name: "o".into(), uid: "u".into() };
        let access = Access::new(&object, &Trust { operator_key: pem(1), gateway_key: pem(2) }).unwrap();
        let token = Signer::from_seed(&[seed; 32]).sign("u", scope, 0);
        let headers =
            HeaderMap::from_iter([(header::AUTHORIZATION, format!("Bearer {token}").parse().unwrap())]);
        assert_eq!(access.check(&headers, scope, 0).is_ok(), open);
    }
}
