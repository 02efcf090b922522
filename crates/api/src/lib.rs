//! Custom resource types of lathe.dev/v1alpha1, their CEL rules, condition helpers and names.
#![deny(missing_docs)]
