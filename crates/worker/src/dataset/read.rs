//! A file of JSON Lines to examples.

use std::fs::File;
use std::io::{BufRead, BufReader};
use std::path::Path;

use lathe_contract::DatasetFormat;
use serde_json::Value;

use super::problem::{DatasetError, MAX_PROBLEMS, MalformedRows, Problem};
use super::row::{Example, Format, kind};

/// Bytes of one row, at most.
pub const MAX_ROW_BYTES: usize = 4 << 20;

/// The rows of a file.
#[derive(Debug, Clone)]
pub struct Dataset {
    /// The file's name.
    pub file: String,
    /// How the rows are written.
    pub format: Format,
    /// The rows that are well-formed.
    pub rows: Vec<Row>,
    /// Rows that are not.
    pub bad_rows: usize,
    /// The first of those, in words.
    pub problems: Vec<Problem>,
}

/// A row of a file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Row {
    /// The line, from 1.
    pub line: usize,
    /// What it says.
    pub example: Example,
}

impl Dataset {
    /// Refuses a dataset that has a malformed row.
    ///
    /// # Errors
    /// [`DatasetError::MalformedRows`].
    pub fn refuse_bad_rows(self) -> Result<Self, DatasetError> {
        match self.problems.first() {
            None => Ok(self),
            Some(first) => Err(DatasetError::MalformedRows(MalformedRows {
                first: first.clone(),
                bad: self.bad_rows,
                rows: self.rows.len() + self.bad_rows,
            })),
        }
    }

    fn problem(&mut self, line: usize, what: String) {
        self.bad_rows += 1;
        if self.problems.len() < MAX_PROBLEMS {
            self.problems.push(Problem { file: self.file.clone(), line, what });
        }
    }
}

/// The rows of a file, one after the other: no more than one is held.
#[derive(Debug)]
pub struct Reader {
    file: String,
    lines: BufReader<File>,
    line: usize,
    format: Option<Format>,
    bytes: Vec<u8>,
}

/// A row as it stands in the file: well-formed, or why not.
pub type Parsed = (usize, Result<Example, String>);

impl Reader {
    /// Opens a file. A byte order mark, CRLF and blank lines are allowed.
    ///
    /// # Errors
    /// The file cannot be read or is of another kind.
    pub fn open(path: &Path, format: DatasetFormat) -> Result<Self, DatasetError> {
        let file =
            path.file_name().map_or_else(|| path.display().to_string(), |n| n.to_string_lossy().into_owned());
        let failed = |source| DatasetError::Io { file: file.clone(), source };
        let mut lines = BufReader::with_capacity(1 << 18, File::open(path).map_err(failed)?);
        let start = lines.fill_buf().map_err(failed)?;
        if let Some(found) = other_kind(start) {
            return Err(DatasetError::NotJsonLines { file, found });
        }
        if start.starts_with(b"\xef\xbb\xbf") {
            lines.consume(3);
        }
        let format = match format {
            DatasetFormat::Auto => None,
            DatasetFormat::Chat => Some(Format::Chat),
            DatasetFormat::PromptCompletion => Some(Format::PromptCompletion),
            DatasetFormat::Text => Some(Format::Text),
        };
        Ok(Reader { file, lines, line: 0, format, bytes: Vec::new() })
    }

    /// The file's name.
    pub fn file(&self) -> &str {
        &self.file
    }

    /// How the rows are written, as soon as a row has told it.
    pub fn format(&self) -> Option<Format> {
        self.format
    }

    /// The next row, with its line; nothing at the end.
    ///
    /// # Errors
    /// The file cannot be read.
    pub fn next_row(&mut self) -> Result<Option<Parsed>, DatasetError> {
        loop {
            let next = next_line(&mut self.lines, &mut self.bytes);
            let Some(fits) = next.map_err(|source| DatasetError::Io { file: self.file.clone(), source })?
            else {
                return Ok(None);
            };
            self.line += 1;
            let row = if fits {
                parse_line(&self.bytes, &mut self.format)
            } else {
                Err(format!("a row must be at most {MAX_ROW_BYTES} bytes"))
            };
            match row {
                Ok(None) => {}
                Ok(Some(example)) => return Ok(Some((self.line, Ok(example)))),
                Err(what) => return Ok(Some((self.line, Err(what)))),
            }
        }
    }
}

/// Reads all rows of a file.
///
/// # Errors
/// As [`Reader`]; the file has no rows, or its first row tells no format. Malformed rows are no error here, see
/// [`Dataset::refuse_bad_rows`].
pub fn read(path: &Path, format: DatasetFormat) -> Result<Dataset, DatasetError> {
    let mut reader = Reader::open(path, format)?;
    let file = reader.file().to_owned();
    // Until a row has told the format, `Text` stands in; it is replaced before the dataset is returned.
    let mut dataset = Dataset {
        file: file.clone(),
        format: Format::Text,
        rows: Vec::new(),
        bad_rows: 0,
        problems: Vec::new(),
    };
    while let Some((line, row)) = reader.next_row()? {
        match row {
            Ok(example) => dataset.rows.push(Row { line, example }),
            Err(what) => dataset.problem(line, what),
        }
    }
    match (reader.format(), dataset.rows.len() + dataset.bad_rows) {
        (_, 0) => Err(DatasetError::Empty { file }),
        (Some(format), _) => Ok(Dataset { format, ..dataset }),
        (None, _) => Err(match dataset.refuse_bad_rows() {
            Err(error) => error,
            Ok(_) => DatasetError::Empty { file },
        }),
    }
}

/// A blank line is nothing. The first row that can tell the format sets it.
fn parse_line(bytes: &[u8], format: &mut Option<Format>) -> Result<Option<Example>, String> {
    let text = std::str::from_utf8(bytes).map_err(|error| {
        format!("a row must be UTF-8 (byte {} of the line is not)", error.valid_up_to() + 1)
    })?;
    if text.trim().is_empty() {
        return Ok(None);
    }
    let value: Value = serde_json::from_str(text).map_err(|error| {
        let place = format!(" at line 1 column {}", error.column());
        format!(
            "a row must be a JSON object ({}, column {})",
            error.to_string().replace(&place, ""),
            error.column()
        )
    })?;
    let row = value
        .as_object()
        .ok_or_else(|| format!("a row must be a JSON object (found {})", kind(Some(&value))))?;
    let format = match *format {
        Some(format) => format,
        None => *format.insert(Format::detect(row)?),
    };
    Example::parse(row, format).map(Some)
}

/// The next line without its end, or false in place of one that is too long; nothing at the end of the file.
fn next_line(reader: &mut impl BufRead, line: &mut Vec<u8>) -> std::io::Result<Option<bool>> {
    line.clear();
    let (mut fits, mut any) = (true, false);
    loop {
        let available = reader.fill_buf()?;
        if available.is_empty() {
            break;
        }
        any = true;
        let end = available.iter().position(|&byte| byte == b'\n');
        let part = &available[..end.unwrap_or(available.len())];
        fits = fits && line.len() + part.len() <= MAX_ROW_BYTES;
        if fits {
            line.extend_from_slice(part);
        }
        let used = part.len() + usize::from(end.is_some());
        reader.consume(used);
        if end.is_some() {
            break;
        }
    }
    if line.last() == Some(&b'\r') {
        line.pop();
    }
    Ok(any.then_some(fits))
}

/// Files that people give in place of JSON Lines, by their first bytes.
fn other_kind(start: &[u8]) -> Option<&'static str> {
    let kinds: [(&[u8], &str); 7] = [
        (b"\xff\xfe", "UTF-16"),
        (b"\xfe\xff", "UTF-16"),
        (b"PAR1", "Parquet"),
        (b"\x1f\x8b", "gzip"),
        (b"\x28\xb5\x2f\xfd", "zstd"),
        (b"PK\x03\x04", "a zip archive"),
        (b"ARROW1", "Arrow"),
    ];
    if let Some((_, found)) = kinds.into_iter().find(|(magic, _)| start.starts_with(magic)) {
        return Some(found);
    }
    let text = start.strip_prefix(b"\xef\xbb\xbf").unwrap_or(start);
    let first = text.iter().find(|byte| !byte.is_ascii_whitespace());
    (first == Some(&b'[')).then_some("a JSON list")
}
