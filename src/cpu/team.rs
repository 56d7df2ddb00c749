//! The team: a few threads that share the work of each operation.
//!
//! A token is some hundred operations of a few microseconds each, so the helpers spin briefly for
//! the next one before they sleep, and nothing is allocated after [`Team::new`]. Which thread does
//! which task is left to chance; a task's result must not depend on it.

use crate::error::{Error, Result};
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering::*};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;

/// Looks at the flag this often before sleeping: about 20 µs, longer than the serial parts between
/// two operations of a token, far shorter than a pause between two tokens that anybody waits for.
const SPINS: usize = 4000;

/// Most threads of a team.
pub const MAX_THREADS: usize = 256;

/// What is to be done with task number `.0` on thread number `.1`.
type Work<'a> = &'a (dyn Fn(usize, usize) + Sync);

/// Threads that run one job at a time, the caller's among them.
pub struct Team {
    shared: Arc<Shared>,
    helpers: Vec<JoinHandle<()>>,
}

struct Shared {
    /// Grows by one with each job; a helper that sees a new value takes part.
    epoch: AtomicUsize,
    /// The job of this epoch.
    job: Mutex<Job>,
    /// The next task that nobody has taken.
    next: AtomicUsize,
    /// Helpers that have not finished this epoch.
    pending: AtomicUsize,
    /// Helpers asleep on `wake`, and the caller on `done`.
    sleeping: AtomicUsize,
    caller_sleeps: AtomicBool,
    lock: Mutex<()>,
    wake: Condvar,
    done: Condvar,
    stop: AtomicBool,
    panicked: AtomicBool,
    spins: usize,
}

#[derive(Clone, Copy)]
struct Job {
    work: Option<Work<'static>>,
    tasks: usize,
}

impl Team {
    /// Starts `threads - 1` helpers; the caller is the last member.
    pub fn new(threads: usize) -> Result<Self> {
        if threads == 0 || threads > MAX_THREADS {
            return Err(Error::argument(format_args!(
                "{threads} threads were asked for; 1 to {MAX_THREADS} are possible"
            )));
        }
        // Spinning with more threads than cores only keeps the others from working.
        let cores = std::thread::available_parallelism().map_or(1, |n| n.get());
        let shared = Arc::new(Shared {
            epoch: AtomicUsize::new(0),
            job: Mutex::new(Job {
                work: None,
                tasks: 0,
            }),
            next: AtomicUsize::new(0),
            pending: AtomicUsize::new(0),
            sleeping: AtomicUsize::new(0),
            caller_sleeps: AtomicBool::new(false),
            lock: Mutex::new(()),
            wake: Condvar::new(),
            done: Condvar::new(),
            stop: AtomicBool::new(false),
            panicked: AtomicBool::new(false),
            spins: if threads <= cores { SPINS } else { 0 },
        });
        // From here on, dropping `team` ends the helpers that were started.
        let mut team = Team {
            shared,
            helpers: Vec::with_capacity(threads - 1),
        };
        for index in 1..threads {
            let shared = Arc::clone(&team.shared);
            let helper = std::thread::Builder::new()
                .name(format!("mor-{index}"))
                .spawn(move || shared.help(index))
                .map_err(|e| {
                    Error::thread(format_args!(
                        "the system refused thread {index} ({e}); ask for fewer"
                    ))
                })?;
            team.helpers.push(helper);
        }
        Ok(team)
    }

    /// Members, the caller included.
    pub fn threads(&self) -> usize {
        self.helpers.len() + 1
    }

    /// Calls `work(task, thread)` once for each task in `0..tasks`, spread over the team, and
    /// returns when all are done. A panic in a task is passed on to the caller, after all
    /// members have stopped.
    pub fn run(&mut self, tasks: usize, work: Work<'_>) {
        if tasks <= 1 || self.helpers.is_empty() {
            (0..tasks).for_each(|task| work(task, 0));
            return;
        }
        let shared = &*self.shared;
        // SAFETY: only the lifetime changes. Helpers use the reference between the change of
        // `epoch` below and their decrement of `pending`; `wait` returns, on every path out of
        // this function, only after `pending` is zero, so `work` outlives each use.
        let work: Work<'static> = unsafe { std::mem::transmute::<Work<'_>, Work<'static>>(work) };
        let job = Job {
            work: Some(work),
            tasks,
        };
        *lock(&shared.job) = job;
        shared.next.store(0, Relaxed);
        shared.pending.store(self.helpers.len(), Relaxed);
        shared.epoch.fetch_add(1, SeqCst);
        if shared.sleeping.load(SeqCst) > 0 {
            let _guard = lock(&shared.lock);
            shared.wake.notify_all();
        }
        let own = catch_unwind(AssertUnwindSafe(|| shared.take_tasks(job, 0)));
        shared.wait();
        lock(&shared.job).work = None;
        if let Err(panic) = own {
            resume_unwind(panic);
        }
        if shared.panicked.swap(false, SeqCst) {
            resume_unwind(Box::new("a task panicked on another thread"));
        }
    }

    /// Splits `items` into pieces of `length` (the last may be shorter) and calls
    /// `work(index, piece)` for each, spread over the team.
    pub fn for_each_piece<T: Send>(
        &mut self,
        items: &mut [T],
        length: usize,
        work: impl Fn(usize, &mut [T]) + Sync,
    ) {
        let total = items.len();
        let shared = Disjoint::new(items);
        self.run(total.div_ceil(length), &|index, _| {
            let start = index * length;
            // SAFETY: pieces of different indices do not overlap, and each index runs once.
            work(index, unsafe {
                shared.slice(start, length.min(total - start))
            });
        });
    }
}

impl Drop for Team {
    fn drop(&mut self) {
        self.shared.stop.store(true, SeqCst);
        self.shared.epoch.fetch_add(1, SeqCst);
        {
            let _guard = lock(&self.shared.lock);
            self.shared.wake.notify_all();
        }
        for helper in self.helpers.drain(..) {
            // A helper catches its tasks' panics, so there is nothing to learn from the result.
            let _ = helper.join();
        }
    }
}

impl Shared {
    fn take_tasks(&self, job: Job, thread: usize) {
        let Some(work) = job.work else { return };
        loop {
            let task = self.next.fetch_add(1, Relaxed);
            if task >= job.tasks {
                return;
            }
            work(task, thread);
        }
    }

    fn help(&self, thread: usize) {
        let mut seen = 0;
        loop {
            self.wait_for_epoch_after(seen);
            seen += 1;
            if self.stop.load(SeqCst) {
                return;
            }
            let job = *lock(&self.job);
            if catch_unwind(AssertUnwindSafe(|| self.take_tasks(job, thread))).is_err() {
                self.panicked.store(true, SeqCst);
            }
            if self.pending.fetch_sub(1, SeqCst) == 1 && self.caller_sleeps.load(SeqCst) {
                let _guard = lock(&self.lock);
                self.done.notify_one();
            }
        }
    }

    fn wait_for_epoch_after(&self, seen: usize) {
        for _ in 0..self.spins {
            if self.epoch.load(Acquire) != seen {
                return;
            }
            std::hint::spin_loop();
        }
        let mut guard = lock(&self.lock);
        self.sleeping.fetch_add(1, SeqCst);
        while self.epoch.load(SeqCst) == seen {
            guard = self
                .wake
                .wait(guard)
                .unwrap_or_else(PoisonError::into_inner);
        }
        self.sleeping.fetch_sub(1, SeqCst);
    }

    /// Returns when no helper is at work any more.
    fn wait(&self) {
        for _ in 0..self.spins {
            if self.pending.load(Acquire) == 0 {
                return;
            }
            std::hint::spin_loop();
        }
        let mut guard = lock(&self.lock);
        self.caller_sleeps.store(true, SeqCst);
        while self.pending.load(SeqCst) != 0 {
            guard = self
                .done
                .wait(guard)
                .unwrap_or_else(PoisonError::into_inner);
        }
        self.caller_sleeps.store(false, SeqCst);
    }
}

/// No code of ours panics while it holds one of these locks, so poison means nothing.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A slice of which several threads write different parts at once.
pub(crate) struct Disjoint<'a, T> {
    start: *mut T,
    length: usize,
    _borrow: std::marker::PhantomData<&'a mut [T]>,
}

// SAFETY: the only access is `slice`, whose caller promises that no two live parts overlap; parts
// of a `Send` type may be used on other threads.
unsafe impl<T: Send> Sync for Disjoint<'_, T> {}

impl<'a, T> Disjoint<'a, T> {
    pub fn new(items: &'a mut [T]) -> Self {
        Disjoint {
            start: items.as_mut_ptr(),
            length: items.len(),
            _borrow: std::marker::PhantomData,
        }
    }

    /// `length` items from `start`. Panics when they are not all inside.
    ///
    /// # Safety
    /// While the result lives, no other part that overlaps it may exist.
    #[allow(clippy::mut_from_ref)]
    pub unsafe fn slice(&self, start: usize, length: usize) -> &mut [T] {
        assert!(start <= self.length && length <= self.length - start);
        // SAFETY: in bounds by the line above, exclusively borrowed for 'a by `new`, and by this
        // function's contract not overlapped by another part.
        unsafe { std::slice::from_raw_parts_mut(self.start.add(start), length) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_task_runs_once_whatever_the_number_of_threads() {
        for threads in [1, 2, 3, 8] {
            let mut team = Team::new(threads).unwrap();
            for tasks in [0, 1, 2, 7, 100] {
                let counts: Vec<AtomicUsize> = (0..tasks).map(|_| AtomicUsize::new(0)).collect();
                for _ in 0..200 {
                    team.run(tasks, &|task, thread| {
                        assert!(thread < threads);
                        counts[task].fetch_add(1, Relaxed);
                    });
                }
                assert!(counts.iter().all(|c| c.load(Relaxed) == 200));
            }
        }
    }

    #[test]
    fn pieces_cover_the_slice() {
        let mut team = Team::new(2).unwrap();
        let mut items = vec![0usize; 103];
        team.for_each_piece(&mut items, 10, |index, piece| {
            assert_eq!(piece.len(), if index == 10 { 3 } else { 10 });
            piece.fill(index + 1);
        });
        assert!(items.iter().enumerate().all(|(i, v)| *v == i / 10 + 1));
    }

    #[test]
    fn a_team_that_slept_wakes() {
        let mut team = Team::new(2).unwrap();
        for _ in 0..3 {
            std::thread::sleep(std::time::Duration::from_millis(20));
            let sum = AtomicUsize::new(0);
            team.run(50, &|task, _| {
                sum.fetch_add(task, Relaxed);
            });
            assert_eq!(sum.load(Relaxed), 1225);
        }
    }

    #[test]
    fn a_panic_in_a_task_reaches_the_caller_and_the_team_lives_on() {
        let mut team = Team::new(3).unwrap();
        for bad in [0, 49] {
            let outcome = catch_unwind(AssertUnwindSafe(|| {
                team.run(50, &|task, _| {
                    if task == bad {
                        resume_unwind(Box::new("on purpose"));
                    }
                })
            }));
            assert!(outcome.is_err());
        }
        let sum = AtomicUsize::new(0);
        team.run(50, &|task, _| {
            sum.fetch_add(task, Relaxed);
        });
        assert_eq!(sum.load(Relaxed), 1225);
    }

    #[test]
    fn impossible_sizes_are_refused() {
        assert!(Team::new(0).is_err());
        assert!(Team::new(MAX_THREADS + 1).is_err());
    }
}
