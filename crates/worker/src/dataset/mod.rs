//! A dataset: JSON Lines to examples, examples to tokens with the answers marked, and what is wrong with it.
//!
//! [`read`] parses a file and remembers every row that is wrong; [`Encoder`] makes tokens of an example; [`check`] counts
//! what a person wants to know before an accelerator is asked for, and holds no file in memory. All of it is pure but for
//! reading the file.

mod check;
mod encode;
mod problem;
mod read;
mod row;

pub use check::{DataReport, HoldOut, Source, check, hold_out};
pub use encode::{EncodedRow, Encoder, Question, Unencodable};
pub use problem::{DatasetError, MalformedRows, Problem};
pub use read::{Dataset, MAX_ROW_BYTES, Reader, Row, read};
pub use row::{Example, Format};
