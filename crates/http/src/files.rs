//! How many files a program may have open, sockets with them.
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

/// As many as the system allows at all. What a program is started with is often 1024, for those that use `select`; a thousand
/// clients and their connections onward are more.
pub fn allow_open_files() {
    let limit = getrlimit(Resource::Nofile);
    if limit.current == limit.maximum {
        return;
    }
    if let Err(error) = setrlimit(Resource::Nofile, Rlimit { current: limit.maximum, ..limit }) {
        tracing::warn!(%error, limit = limit.current, "the limit of open files stays as it was");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_limit_is_what_the_system_allows() {
        let limit = getrlimit(Resource::Nofile);
        let lower = limit.current.map(|files| files - 1);
        setrlimit(Resource::Nofile, Rlimit { current: lower, ..limit }).unwrap();
        allow_open_files();
        assert_eq!(getrlimit(Resource::Nofile).current, limit.maximum);
    }
}
