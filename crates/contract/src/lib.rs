//! What operator, gateway and worker say to each other, and the signed tokens they say it with.
#![deny(missing_docs)]
