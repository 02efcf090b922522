//! A few threads that share short loops.
//!
//! [`Pool::run`] hands out task numbers; whoever is free claims the next one. A thread without work spins for
//! 50 us, since the next loop usually follows at once, and then sleeps. The caller works too and never waits for
//! a sleeper: a job that the others slept through is simply done by the caller alone.
#![allow(unsafe_code)] // A job borrows the caller's stack; `run` does not return before all threads left the job.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering::*};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

const SPIN: Duration = Duration::from_micros(50);

/// `state` is a job's number in the upper half, `OPEN` while threads may enter, and how many are inside.
const OPEN: u64 = 1 << 31;
const INSIDE: u64 = OPEN - 1;
const STOP: u64 = u64::MAX;

type Job<'a> = dyn Fn(usize, usize) + Sync + 'a;

struct Shared {
    state: AtomicU64,
    /// Written only while no thread is inside and the job is closed.
    job: std::cell::UnsafeCell<Option<*const Job<'static>>>,
    tasks: AtomicUsize,
    next: AtomicUsize,
    panicked: AtomicBool,
    sleeping: AtomicUsize,
    lock: Mutex<()>,
    wake: Condvar,
}

// SAFETY: `job` is written by the one owner of the pool while no thread is inside (see `state`), and read inside.
unsafe impl Sync for Shared {}
// SAFETY: as above; the pointer in `job` is only followed while its closure (which is Sync) is borrowed by `run`.
unsafe impl Send for Shared {}

/// The threads. One owner at a time calls [`Pool::run`].
pub(super) struct Pool {
    shared: Arc<Shared>,
    workers: Vec<JoinHandle<()>>,
}

impl Pool {
    /// A pool of `threads` threads, the caller's included.
    pub(super) fn new(threads: usize) -> Pool {
        let shared = Arc::new(Shared {
            state: AtomicU64::new(0),
            job: std::cell::UnsafeCell::new(None),
            tasks: AtomicUsize::new(0),
            next: AtomicUsize::new(0),
            panicked: AtomicBool::new(false),
            sleeping: AtomicUsize::new(0),
            lock: Mutex::new(()),
            wake: Condvar::new(),
        });
        // A thread that cannot be started is done without: the others claim its tasks.
        let workers = (1..threads)
            .filter_map(|index| {
                let shared = Arc::clone(&shared);
                let thread = std::thread::Builder::new().name(format!("lathe-cpu-{index}"));
                thread.spawn(move || work(&shared, index)).ok()
            })
            .collect();
        Pool { shared, workers }
    }

    /// Calls `task(number, thread)` for each number below `tasks`, in any order, and returns when all are done.
    pub(super) fn run(&mut self, tasks: usize, task: &Job<'_>) {
        if self.workers.is_empty() || tasks <= 1 {
            (0..tasks).for_each(|number| task(number, 0));
            return;
        }
        let shared = &*self.shared;
        let number = (shared.state.load(Relaxed) >> 32).wrapping_add(1) & 0x7fff_ffff;
        // SAFETY: the job before is closed and left by all (the guard below waited), so nobody reads the cell. The
        // lifetime is hidden from the type; the guard keeps `task` borrowed until all threads have left this job.
        unsafe {
            *shared.job.get() = Some(std::mem::transmute::<&Job<'_>, &'static Job<'static>>(task));
        }
        shared.tasks.store(tasks, Relaxed);
        shared.next.store(0, Relaxed);
        shared.state.store(number << 32 | OPEN, SeqCst);
        let guard = Close(shared);
        if shared.sleeping.load(SeqCst) > 0 {
            let _lock = shared.lock.lock().unwrap_or_else(PoisonError::into_inner);
            shared.wake.notify_all();
        }
        claim(shared, task, 0);
        drop(guard);
        assert!(!shared.panicked.swap(false, AcqRel), "a kernel panicked on another thread");
    }
}

/// Closes the job and waits until all threads have left it, also while unwinding.
struct Close<'a>(&'a Shared);

impl Drop for Close<'_> {
    fn drop(&mut self) {
        self.0.state.fetch_and(!OPEN, AcqRel);
        let mut spins = 0u32;
        while self.0.state.load(Acquire) & INSIDE != 0 {
            spins += 1;
            if spins < 10_000 { std::hint::spin_loop() } else { std::thread::yield_now() }
        }
    }
}

fn claim(shared: &Shared, task: &Job<'_>, thread: usize) {
    let tasks = shared.tasks.load(Relaxed);
    loop {
        let number = shared.next.fetch_add(1, Relaxed);
        if number >= tasks {
            return;
        }
        task(number, thread);
    }
}

fn work(shared: &Shared, thread: usize) {
    let mut done = 0;
    let mut idle = Instant::now();
    let mut spins = 0u32;
    loop {
        let state = shared.state.load(SeqCst);
        if state == STOP {
            return;
        }
        let fresh = state & OPEN != 0 && state >> 32 != done;
        if fresh && shared.state.compare_exchange(state, state + 1, AcqRel, Relaxed).is_ok() {
            // SAFETY: this thread is inside an open job, so `run` keeps the closure borrowed until it has left.
            let job = unsafe { (*shared.job.get()).map(|job| &*job) };
            if let Some(job) = job
                && catch_unwind(AssertUnwindSafe(|| claim(shared, job, thread))).is_err()
            {
                shared.panicked.store(true, Release);
            }
            done = state >> 32;
            shared.state.fetch_sub(1, AcqRel);
            idle = Instant::now();
            continue;
        }
        spins = spins.wrapping_add(1);
        std::hint::spin_loop();
        if !fresh && spins.is_multiple_of(64) && idle.elapsed() > SPIN {
            sleep(shared, done);
            idle = Instant::now();
        }
    }
}

fn sleep(shared: &Shared, done: u64) {
    let mut lock = shared.lock.lock().unwrap_or_else(PoisonError::into_inner);
    shared.sleeping.fetch_add(1, SeqCst);
    loop {
        let state = shared.state.load(SeqCst);
        if state == STOP || (state & OPEN != 0 && state >> 32 != done) {
            break;
        }
        lock = shared.wake.wait(lock).unwrap_or_else(PoisonError::into_inner);
    }
    shared.sleeping.fetch_sub(1, SeqCst);
}

impl Drop for Pool {
    fn drop(&mut self) {
        self.shared.state.store(STOP, SeqCst);
        {
            let _lock = self.shared.lock.lock().unwrap_or_else(PoisonError::into_inner);
            self.shared.wake.notify_all();
        }
        for worker in self.workers.drain(..) {
            // A worker catches panics, so it ends in order.
            let _ = worker.join();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_task_runs_once_over_many_jobs_and_sleeps() {
        let mut pool = Pool::new(3);
        for round in 0..2000usize {
            let counts: Vec<AtomicUsize> = (0..round % 17).map(|_| AtomicUsize::new(0)).collect();
            pool.run(counts.len(), &|task, thread| {
                assert!(thread < 3);
                counts[task].fetch_add(1, Relaxed);
            });
            assert!(counts.iter().all(|c| c.load(Relaxed) == 1));
            if round % 500 == 0 {
                // Longer than the spin, so that the next job finds sleepers.
                std::thread::sleep(SPIN * 4);
            }
        }
    }

    #[test]
    fn a_panic_in_a_task_reaches_the_caller_and_the_pool_lives_on() {
        let mut pool = Pool::new(2);
        let result = catch_unwind(AssertUnwindSafe(|| {
            pool.run(64, &|task, _| assert_ne!(task, 13, "expected in this test"));
        }));
        assert!(result.is_err());
        let sum = AtomicUsize::new(0);
        pool.run(10, &|task, _| {
            sum.fetch_add(task, Relaxed);
        });
        assert_eq!(sum.into_inner(), 45);
    }
}
