//! End-to-end tests against a real Kubernetes; the tests are in `tests/`.
