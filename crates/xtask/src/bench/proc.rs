//! What the kernel says of a process, in `/proc`.

/// The kernel tells processor time in hundredths of a second, on every architecture that we build for.
pub const USER_HZ: f64 = 100.0;

/// User and system time of `/proc/PID/stat`, in [`USER_HZ`]; its second field is a name that may hold anything.
pub fn ticks(stat: &str) -> Option<u64> {
    let mut fields = stat.rsplit_once(')')?.1.split_whitespace().skip(11);
    let mut next = || fields.next()?.parse::<u64>().ok();
    Some(next()? + next()?)
}

/// A figure of `/proc/PID/status`, e.g. `VmHWM:`.
pub fn kilobytes(status: &str, field: &str) -> Option<u64> {
    let line = status.lines().find_map(|line| line.strip_prefix(field))?;
    line.split_whitespace().next()?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_kernels_words_are_read() {
        let status = "Name:\tx\nVmHWM:\t  1234 kB\nRssAnon:\t     56 kB\n";
        assert_eq!((kilobytes(status, "VmHWM:"), kilobytes(status, "RssAnon:")), (Some(1234), Some(56)));
        assert_eq!(kilobytes(status, "VmSwap:"), None);
        assert_eq!(ticks("7 (a) b) S 1 7 7 0 -1 0 1 2 3 4 30 12 0 0 20 0"), Some(42));
    }
}
