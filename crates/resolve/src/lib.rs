//! The one meaning of a manifest: a spec and observed facts to a resolved plan and the pods' contract.
#![deny(missing_docs)]
