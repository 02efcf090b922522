//! Files that appear whole or not at all.

use std::fs::{self, File};
use std::io::{BufWriter, Write};
use std::path::Path;

use super::error::FileError;

/// Writes a file under a temporary name in the same folder, syncs it, renames it, and syncs the folder: after a crash
/// the name holds the old content or the new one, never a part.
///
/// # Errors
/// What `fill` says, or [`FileError::Io`]; the temporary file is removed then.
pub fn write_atomically(
    path: &Path,
    fill: impl FnOnce(&mut BufWriter<File>) -> Result<(), FileError>,
) -> Result<(), FileError> {
    let folder = path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let mut name = std::ffi::OsString::from(".");
    name.push(path.file_name().unwrap_or_default());
    name.push(format!(".{}.partial", std::process::id()));
    let partial = folder.join(name);
    let done = write_synced(&partial, fill)
        .and_then(|()| fs::rename(&partial, path).map_err(FileError::io("rename to", path)))
        .and_then(|()| {
            File::open(folder).and_then(|folder| folder.sync_all()).map_err(FileError::io("sync", folder))
        });
    if done.is_err() {
        // Best effort: the error that is returned says more than a failure to clean up would.
        let _ = fs::remove_file(&partial);
    }
    done
}

fn write_synced(
    partial: &Path,
    fill: impl FnOnce(&mut BufWriter<File>) -> Result<(), FileError>,
) -> Result<(), FileError> {
    let mut writer =
        BufWriter::with_capacity(1 << 20, File::create(partial).map_err(FileError::io("create", partial))?);
    fill(&mut writer)?;
    writer.flush().map_err(FileError::io("write", partial))?;
    writer.get_ref().sync_all().map_err(FileError::io("sync", partial))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_failed_write_leaves_the_old_content_and_no_rest() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("weights");
        let write = |bytes: &'static [u8], fail: bool| {
            write_atomically(&path, |w| {
                w.write_all(bytes).map_err(FileError::io("write", Path::new("weights")))?;
                if fail { Err(FileError::malformed("weights", "broken")) } else { Ok(()) }
            })
        };
        write(b"old", false).unwrap();
        write(b"new", true).unwrap_err();
        assert_eq!(fs::read(&path).unwrap(), b"old");
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
        write(b"new", false).unwrap();
        assert_eq!(fs::read(&path).unwrap(), b"new");
    }
}
