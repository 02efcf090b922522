//! Libraries that read a stranger's file may panic or recurse deeply; neither may end the process.

use std::panic::{AssertUnwindSafe, catch_unwind};

/// Address space, of which only what is used takes memory. The deepest template of the largest size needs about a third.
const STACK: usize = 256 << 20;

/// Runs `work` and gives nothing if it panicked. `work` must leave nothing behind that a panic could have left half done.
pub(super) fn without_panic<T>(work: impl FnOnce() -> T) -> Option<T> {
    catch_unwind(AssertUnwindSafe(work)).ok()
}

/// As [`without_panic`], on a stack of [`STACK`] bytes; nothing too if the system gives no thread.
pub(super) fn with_deep_stack<T: Send>(work: impl FnOnce() -> T + Send) -> Option<T> {
    std::thread::scope(|scope| {
        let thread = std::thread::Builder::new().stack_size(STACK).spawn_scoped(scope, work).ok()?;
        thread.join().ok()
    })
}
