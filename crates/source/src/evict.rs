//! Room in the download folder: entries that nobody uses go, those used longest ago first.
use std::collections::BTreeMap;
use std::fs::File;
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use crate::cache::{KEY_DIGITS, remove};
use crate::error::SourceError;
use crate::names::PARTIAL;

/// An entry, complete or not.
#[derive(Debug)]
struct Entry {
    bytes: u64,
    used: SystemTime,
}

/// Removes entries until what stays takes at most `most` bytes. Stays in any case: what a process fills or uses.
///
/// # Errors
/// The folder cannot be read.
pub(crate) fn evict(cache: &Path, most: u64) -> Result<(), SourceError> {
    let entries = entries(cache)?;
    let mut total: u64 = entries.values().map(|entry| entry.bytes).fold(0, u64::saturating_add);
    let mut oldest: Vec<(&String, &Entry)> = entries.iter().collect();
    oldest.sort_by_key(|(key, entry)| (entry.used, *key));
    for (key, entry) in oldest {
        if total <= most {
            return Ok(());
        }
        if remove_unused(cache, key)? {
            tracing::info!(key, bytes = entry.bytes, "a download that nobody uses is removed from the cache");
            total = total.saturating_sub(entry.bytes);
        }
    }
    Ok(())
}

/// All bytes of the cache's entries.
pub(crate) fn size(cache: &Path) -> Result<u64, SourceError> {
    Ok(entries(cache)?.values().map(|entry| entry.bytes).fold(0, u64::saturating_add))
}

/// Takes an entry away where this process alone can lock it.
fn remove_unused(cache: &Path, key: &str) -> Result<bool, SourceError> {
    let mut locks = Vec::new();
    for name in [format!("{key}.lock"), format!("{key}.use")] {
        let path = cache.join(name);
        let lock =
            File::options().create(true).append(true).open(&path).map_err(|e| SourceError::io(&path, e))?;
        if lock.try_lock().is_err() {
            return Ok(false);
        }
        locks.push(lock);
    }
    let (whole, partial) = (cache.join(key), cache.join(format!("{key}{PARTIAL}")));
    remove(&partial)?;
    // Half of it must not lie under its final name, should this process end here.
    match std::fs::rename(&whole, &partial) {
        Err(e) if e.kind() != std::io::ErrorKind::NotFound => return Err(SourceError::io(&whole, e)),
        _ => remove(&partial)?,
    }
    Ok(true)
}

fn entries(cache: &Path) -> Result<BTreeMap<String, Entry>, SourceError> {
    let mut entries: BTreeMap<String, Entry> = BTreeMap::new();
    for found in std::fs::read_dir(cache).map_err(|e| SourceError::io(cache, e))? {
        let found = found.map_err(|e| SourceError::io(cache, e))?;
        let Ok(name) = found.file_name().into_string() else { continue };
        let key = name.strip_suffix(PARTIAL).unwrap_or(&name);
        let ours = key.len() == KEY_DIGITS && key.bytes().all(|b| b.is_ascii_hexdigit());
        if !ours || !found.file_type().is_ok_and(|kind| kind.is_dir()) {
            continue;
        }
        let used = std::fs::metadata(cache.join(format!("{key}.use"))).and_then(|m| m.modified());
        // Never used: it is unfinished, and somebody may come back for it as long as for any other.
        let used = used.or_else(|_| found.metadata().and_then(|m| m.modified()));
        let entry = Entry { bytes: bytes_in(&found.path()), used: used.unwrap_or(SystemTime::UNIX_EPOCH) };
        let known = entries.entry(key.to_owned()).or_insert(Entry { bytes: 0, used: entry.used });
        known.bytes = known.bytes.saturating_add(entry.bytes);
        known.used = known.used.max(entry.used);
    }
    Ok(entries)
}

/// Bytes of the files below a folder.
pub(crate) fn bytes_in(dir: &Path) -> u64 {
    let (mut total, mut folders): (u64, Vec<PathBuf>) = (0, vec![dir.to_owned()]);
    while let Some(folder) = folders.pop() {
        for entry in std::fs::read_dir(folder).into_iter().flatten().flatten() {
            match entry.metadata() {
                Ok(m) if m.is_dir() => folders.push(entry.path()),
                Ok(m) => total = total.saturating_add(m.len()),
                Err(_) => {}
            }
        }
    }
    total
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    /// An entry of 100 bytes, used so many seconds after the epoch.
    fn entry(cache: &Path, digit: char, suffix: &str, used: u64) -> String {
        let key = String::from_iter(std::iter::repeat_n(digit, KEY_DIGITS));
        let dir = cache.join(format!("{key}{suffix}"));
        std::fs::create_dir_all(dir.join("below")).unwrap();
        std::fs::write(dir.join("below/model.safetensors"), [0; 100]).unwrap();
        let use_file = File::create(cache.join(format!("{key}.use"))).unwrap();
        use_file.set_modified(SystemTime::UNIX_EPOCH + Duration::from_secs(used)).unwrap();
        key
    }

    fn folders(cache: &Path) -> Vec<char> {
        let entries = std::fs::read_dir(cache).unwrap().flatten();
        let folders = entries.filter(|entry| entry.file_type().unwrap().is_dir());
        let mut first: Vec<char> =
            folders.filter_map(|entry| entry.file_name().to_str()?.chars().next()).collect();
        first.sort_unstable();
        first
    }

    #[test]
    fn what_was_used_longest_ago_goes_first_and_what_is_in_use_stays() {
        let dir = tempfile::tempdir().unwrap();
        let cache = dir.path();
        let held = entry(cache, 'a', "", 1);
        entry(cache, 'b', "", 3);
        entry(cache, 'c', "", 2);
        let filled = entry(cache, 'd', PARTIAL, 0);
        entry(cache, 'e', PARTIAL, 4);
        std::fs::create_dir(cache.join("scratch-x")).unwrap();
        std::fs::write(cache.join("scratch-x/file"), [0; 1000]).unwrap();
        let used = File::open(cache.join(format!("{held}.use"))).unwrap();
        used.try_lock_shared().unwrap();
        let lock = File::create(cache.join(format!("{filled}.lock"))).unwrap();
        lock.try_lock().unwrap();
        assert_eq!(size(cache).unwrap(), 500);
        evict(cache, 500).unwrap();
        assert_eq!(folders(cache), ['a', 'b', 'c', 'd', 'e', 's']);
        evict(cache, 400).unwrap();
        assert_eq!(folders(cache), ['a', 'b', 'd', 'e', 's']);
        evict(cache, 0).unwrap();
        assert_eq!(folders(cache), ['a', 'd', 's']);
        drop((used, lock));
        evict(cache, 0).unwrap();
        assert_eq!(folders(cache), ['s']);
    }
}
