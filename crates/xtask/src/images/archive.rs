//! Tar archives whose bytes depend on their contents alone: sorted, no clock, no user of this machine.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use anyhow::{Context, Result, ensure};
use tar::{Builder, EntryType, Header};

/// The files of an archive by path, without a leading slash.
#[derive(Default)]
pub struct Tree(BTreeMap<String, Entry>);

struct Entry {
    /// None is a folder.
    content: Option<Vec<u8>>,
    mode: u32,
}

impl Tree {
    /// Adds a file of mode 0644, and the folders above it.
    pub fn file(&mut self, path: &str, content: impl Into<Vec<u8>>) {
        self.add(path, Some(content.into()), 0o644);
    }

    /// Adds a program of mode 0755, and the folders above it.
    pub fn program(&mut self, path: &str, content: impl Into<Vec<u8>>) {
        self.add(path, Some(content.into()), 0o755);
    }

    /// Adds an empty folder.
    pub fn folder(&mut self, path: &str, mode: u32) {
        self.add(path, None, mode);
    }

    /// Adds everything below `source` under `path`, keeping only whether a file is executable.
    ///
    /// # Errors
    /// Something cannot be read, or is neither file nor folder, or its name is not UTF-8.
    pub fn copy(&mut self, source: &Path, path: &str) -> Result<()> {
        let metadata =
            fs::symlink_metadata(source).with_context(|| format!("cannot read {}", source.display()))?;
        if metadata.is_file() {
            let executable = metadata.permissions().mode() & 0o100 != 0;
            let mode = if executable { 0o755 } else { 0o644 };
            self.add(path, Some(fs::read(source)?), mode);
            return Ok(());
        }
        ensure!(metadata.is_dir(), "{} is neither a file nor a folder", source.display());
        self.folder(path, 0o755);
        for entry in fs::read_dir(source)? {
            let entry = entry?;
            let name = entry.file_name();
            let name = name.to_str().context("a file name is not UTF-8")?;
            self.copy(&entry.path(), &format!("{path}/{name}"))?;
        }
        Ok(())
    }

    fn add(&mut self, path: &str, content: Option<Vec<u8>>, mode: u32) {
        for (end, _) in path.match_indices('/') {
            let folder = Entry { content: None, mode: 0o755 };
            self.0.entry(path[..end].to_owned()).or_insert(folder);
        }
        self.0.insert(path.to_owned(), Entry { content, mode });
    }

    /// The archive's bytes.
    ///
    /// # Errors
    /// A path is too long for the format.
    pub fn archive(&self) -> Result<Vec<u8>> {
        let mut builder = Builder::new(Vec::new());
        for (path, entry) in &self.0 {
            let mut header = Header::new_gnu();
            header.set_mode(entry.mode);
            header.set_uid(0);
            header.set_gid(0);
            header.set_mtime(0);
            let content = entry.content.as_deref().unwrap_or_default();
            header.set_size(content.len() as u64);
            let (kind, end) = match entry.content {
                Some(_) => (EntryType::Regular, ""),
                None => (EntryType::Directory, "/"),
            };
            header.set_entry_type(kind);
            builder.append_data(&mut header, format!("{path}{end}"), content)?;
        }
        Ok(builder.into_inner()?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(archive: &[u8]) -> Result<Vec<String>> {
        let mut archive = tar::Archive::new(archive);
        let entries = archive.entries()?;
        entries.map(|entry| Ok(entry?.path()?.display().to_string())).collect()
    }

    #[test]
    fn order_of_adding_and_file_times_do_not_show() -> Result<()> {
        let source = tempfile::tempdir()?;
        fs::write(source.path().join("x"), "1")?;
        let build = |order: [usize; 3]| -> Result<Vec<u8>> {
            let mut tree = Tree::default();
            for step in order {
                match step {
                    0 => tree.copy(source.path(), "files")?,
                    1 => tree.file("etc/passwd", "root"),
                    _ => tree.program("run", "elf"),
                }
            }
            tree.archive()
        };
        let first = build([0, 1, 2])?;
        fs::File::open(source.path().join("x"))?.set_modified(std::time::SystemTime::UNIX_EPOCH)?;
        assert_eq!(first, build([2, 1, 0])?);
        assert_eq!(names(&first)?, ["etc/", "etc/passwd", "files/", "files/x", "run"]);
        Ok(())
    }

    #[test]
    fn a_link_is_refused_by_name() -> Result<()> {
        let source = tempfile::tempdir()?;
        std::os::unix::fs::symlink("/etc/shadow", source.path().join("link"))?;
        let error = Tree::default().copy(source.path(), "files").map_err(|e| e.to_string());
        assert!(error.is_err_and(|text| text.contains("link is neither")));
        Ok(())
    }
}
