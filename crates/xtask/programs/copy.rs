//! Copies folders of a data image into a volume: `copy SOURCE... DESTINATION`.
//!
//! Each source lands under its own name; a file appears under its final name only when it is whole.

use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::{env, fs, io};

fn main() -> ExitCode {
    let mut paths: Vec<PathBuf> = env::args_os().skip(1).map(PathBuf::from).collect();
    let destination = paths.pop();
    let (Some(destination), false) = (destination, paths.is_empty()) else {
        eprintln!("usage: copy SOURCE... DESTINATION");
        return ExitCode::from(2);
    };
    for source in paths {
        let target = destination.join(source.file_name().unwrap_or_default());
        if let Err(error) = copy(&source, &target) {
            eprintln!("cannot copy {} to {}: {error}", source.display(), target.display());
            return ExitCode::FAILURE;
        }
    }
    ExitCode::SUCCESS
}

fn copy(source: &Path, target: &Path) -> io::Result<()> {
    if source.is_dir() {
        fs::create_dir_all(target)?;
        for entry in fs::read_dir(source)? {
            let entry = entry?;
            copy(&entry.path(), &target.join(entry.file_name()))?;
        }
        return Ok(());
    }
    let mut name = target.file_name().unwrap_or_default().to_owned();
    name.push(".unfinished");
    let unfinished = target.with_file_name(name);
    let bytes = io::copy(&mut fs::File::open(source)?, &mut fs::File::create(&unfinished)?)?;
    fs::rename(&unfinished, target)?;
    println!("{} ({bytes} bytes)", target.display());
    Ok(())
}
