//! A connection's bytes on their way in: lines, stretches of known length, chunks.

use std::io::{self, Read};

/// Longest line of a head.
const MAX_LINE: usize = 16 << 10;

/// What was read and not looked at yet.
pub struct Wire<S> {
    stream: S,
    buffer: Box<[u8]>,
    from: usize,
    to: usize,
}

/// How long a body is.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Length {
    /// In bytes.
    Known(usize),
    /// In chunks, to the last of them.
    Chunked,
}

impl<S: Read> Wire<S> {
    /// With nothing read.
    pub fn new(stream: S) -> Self {
        Self { stream, buffer: vec![0; MAX_LINE].into(), from: 0, to: 0 }
    }

    /// The connection, to write to it.
    pub fn stream(&mut self) -> &mut S {
        &mut self.stream
    }

    /// The first line of a head, in lower case, and the length of its body; `seen` gets each other line. `None`: the connection
    /// was closed before.
    ///
    /// # Errors
    /// The connection breaks off, or what comes is no head.
    pub fn head(&mut self, mut seen: impl FnMut(&str)) -> io::Result<Option<(String, Length)>> {
        if self.from == self.to && !self.fill()? {
            return Ok(None);
        }
        let first = self.line()?;
        let mut length = Length::Known(0);
        loop {
            let line = self.line()?;
            if line.is_empty() {
                return Ok(Some((first, length)));
            }
            match line.split_once(':') {
                Some(("content-length", value)) => {
                    length = Length::Known(value.trim().parse().map_err(io::Error::other)?);
                }
                Some(("transfer-encoding", value)) if value.trim() == "chunked" => length = Length::Chunked,
                _ => {}
            }
            seen(&line);
        }
    }

    /// A whole body, piece by piece.
    ///
    /// # Errors
    /// The connection breaks off, or a chunk is none.
    pub fn body(&mut self, length: Length, mut piece: impl FnMut(&[u8])) -> io::Result<()> {
        if let Length::Known(bytes) = length {
            return self.take(bytes, &mut piece);
        }
        loop {
            let line = self.line()?;
            let digits = line.split(';').next().unwrap_or_default().trim();
            let bytes = usize::from_str_radix(digits, 16).map_err(io::Error::other)?;
            if bytes == 0 {
                // Trailers.
                while !self.line()?.is_empty() {}
                return Ok(());
            }
            self.take(bytes, &mut piece)?;
            if !self.line()?.is_empty() {
                return Err(io::Error::other("a chunk is longer than it says"));
            }
        }
    }

    fn take(&mut self, mut bytes: usize, piece: &mut impl FnMut(&[u8])) -> io::Result<()> {
        while bytes > 0 {
            self.need()?;
            let end = self.to.min(self.from + bytes);
            piece(&self.buffer[self.from..end]);
            bytes -= end - self.from;
            self.from = end;
        }
        Ok(())
    }

    /// Up to the end of a line, without it, in lower case.
    fn line(&mut self) -> io::Result<String> {
        let mut line = Vec::new();
        loop {
            self.need()?;
            let read = &self.buffer[self.from..self.to];
            let end = read.iter().position(|byte| *byte == b'\n');
            line.extend_from_slice(&read[..end.unwrap_or(read.len())]);
            self.from += end.map_or(read.len(), |end| end + 1);
            if line.len() > MAX_LINE {
                return Err(io::Error::other("a line has no end"));
            }
            if end.is_some() {
                let text = String::from_utf8(line).map_err(io::Error::other)?;
                return Ok(text.trim_end_matches('\r').to_ascii_lowercase());
            }
        }
    }

    fn need(&mut self) -> io::Result<()> {
        match self.from < self.to || self.fill()? {
            true => Ok(()),
            false => Err(io::ErrorKind::UnexpectedEof.into()),
        }
    }

    /// Whether there was more.
    fn fill(&mut self) -> io::Result<bool> {
        (self.from, self.to) = (0, self.stream.read(&mut self.buffer)?);
        Ok(self.to > 0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// One byte a time, as no network is so kind not to.
    struct Slow<'a>(&'a [u8]);

    impl Read for Slow<'_> {
        fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
            let bytes = self.0.len().min(1);
            buffer[..bytes].copy_from_slice(&self.0[..bytes]);
            self.0 = &self.0[bytes..];
            Ok(bytes)
        }
    }

    fn read(text: &str) -> io::Result<Vec<(String, String)>> {
        let mut wire = Wire::new(Slow(text.as_bytes()));
        let mut all = Vec::new();
        while let Some((first, length)) = wire.head(|_| {})? {
            let mut body = Vec::new();
            wire.body(length, |piece| body.extend_from_slice(piece))?;
            all.push((first, String::from_utf8(body).map_err(io::Error::other)?));
        }
        Ok(all)
    }

    #[test]
    fn answers_follow_each_other_whatever_says_their_length() -> io::Result<()> {
        let text = "HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\nabc\
                    HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2;x=1\r\nde\r\nA\r\n0123456789\r\n0\r\nt: 1\r\n\r\n";
        let expected = [("http/1.1 200 ok", "abc"), ("http/1.1 200 ok", "de0123456789")];
        assert_eq!(read(text)?, expected.map(|(first, body)| (first.to_owned(), body.to_owned())));
        Ok(())
    }

    #[test]
    fn what_breaks_off_is_no_answer() {
        for text in [
            "HTTP/1.1 200 OK\r\ncontent-length: 3\r\n\r\nab",
            "HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n3\r\nabc\r\n",
            "HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n3\r\nabcd\r\n0\r\n\r\n",
            "HTTP/1.1 200 OK\r\ncontent",
        ] {
            assert!(read(text).is_err(), "{text}");
        }
    }
}
