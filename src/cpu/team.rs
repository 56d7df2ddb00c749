//! The team: a few threads that share the work of each operation.
//!
//! A token is some hundred operations of a few microseconds each, so the helpers spin briefly for
//! the next one before they sleep, and nothing is allocated after [`Team::new`]. Which thread does
//! which task is left to chance; a task's result must not depend on it.

use super::thread::{STACK_BYTES, Thread, ThreadParams, cores};
use crate::error::{Error, Result};
use std::ffi::c_void;
use std::io::ErrorKind;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::ptr::NonNull;
use std::sync::atomic::{AtomicBool, AtomicI32, AtomicUsize, Ordering::*};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};

/// Looks at the flag this often before sleeping: about 20 µs, longer than the serial parts between
/// two operations of a token, far shorter than a pause between two tokens that anybody waits for.
const SPINS: usize = 4000;

/// Most threads of a team.
pub const MAX_THREADS: usize = 256;

/// What is to be done with task number `.0` on thread number `.1`.
type Work<'a> = &'a (dyn Fn(usize, usize) + Sync);

/// Threads that run one job at a time, the caller's among them.
pub struct Team {
    /// What the members share, in the memory that was given; none for a team of one.
    shared: Option<NonNull<Shared>>,
    /// One for each helper that was started.
    helpers: NonNull<Helper>,
    started: usize,
}

// SAFETY: a team owns its memory, and its threads do not care on which thread it is used.
unsafe impl Send for Team {}
// SAFETY: `&Team` only tells the number of threads.
unsafe impl Sync for Team {}

struct Helper {
    /// What its thread is given.
    post: Post,
    thread: Option<Thread>,
}

struct Post {
    shared: NonNull<Shared>,
    /// Its thread number, from 1.
    index: usize,
    params: ThreadParams,
    /// [`WAITING`], [`READY`] or the system's number of an error.
    report: AtomicI32,
}

const WAITING: i32 = -1;
const READY: i32 = 0;

/// A bit of [`Shared::inside`]: the caller is asleep on `done`, or about to be.
const CALLER_SLEEPS: usize = 1 << 16;
const _: () = assert!(MAX_THREADS < CALLER_SLEEPS);

struct Shared {
    /// Grows by one when a job opens and by one when it closes: odd while there is one.
    epoch: AtomicUsize,
    /// The job of this epoch.
    job: Mutex<Job>,
    /// The next task that nobody has taken.
    next: AtomicUsize,
    /// Helpers that take part, or are about to see that they came too late; and [`CALLER_SLEEPS`],
    /// in one atomic, so that the last helper to leave cannot miss a caller who lies down.
    inside: AtomicUsize,
    /// Helpers asleep on `wake`.
    sleeping: AtomicUsize,
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
    /// What [`Team::new`] needs the memory to be aligned to.
    pub const ALIGNMENT: usize = 64;

    /// Bytes of memory that a team needs, besides its helpers' stacks.
    pub fn bytes(threads: usize) -> usize {
        const { assert!(align_of::<Shared>() <= 64 && align_of::<Helper>() <= 64) };
        match threads {
            0 | 1 => 0,
            n => Self::helpers_offset() + (n - 1) * size_of::<Helper>(),
        }
    }

    const fn helpers_offset() -> usize {
        size_of::<Shared>().next_multiple_of(Self::ALIGNMENT)
    }

    /// Starts `threads - 1` helpers; the caller is the last member. `memory` has [`Team::bytes`]
    /// bytes and is aligned to [`Team::ALIGNMENT`].
    pub fn new(threads: usize, params: &ThreadParams, memory: &'static mut [u8]) -> Result<Self> {
        if threads == 0 || threads > MAX_THREADS {
            return Err(Error::argument(format_args!(
                "{threads} threads were asked for; 1 to {MAX_THREADS} are possible"
            )));
        }
        params.check()?;
        let mut team = Team {
            shared: None,
            helpers: NonNull::dangling(),
            started: 0,
        };
        if threads == 1 {
            return Ok(team);
        }
        let start = memory.as_mut_ptr();
        if memory.len() < Self::bytes(threads) || start.align_offset(Self::ALIGNMENT) != 0 {
            return Err(Error::argument(
                "the team's memory is too small or not aligned",
            ));
        }
        // Spinning with more threads than cores only keeps the others from working.
        let spins = if threads <= cores() { SPINS } else { 0 };
        // SAFETY: the memory is exclusively borrowed for ever, aligned and large enough, by the
        // check above, for one `Shared` and, behind it, a `Helper` for each helper.
        let (shared, helpers) = unsafe {
            let shared = NonNull::new_unchecked(start.cast::<Shared>());
            shared.write(Shared::new(spins));
            let helpers = start.add(Self::helpers_offset()).cast::<Helper>();
            (shared, NonNull::new_unchecked(helpers))
        };
        // From here on, dropping `team` ends the helpers that were started.
        (team.shared, team.helpers) = (Some(shared), helpers);
        for index in 1..threads {
            team.start_helper(shared, index, *params)?;
        }
        team.muster()?;
        Ok(team)
    }

    fn start_helper(
        &mut self,
        shared: NonNull<Shared>,
        index: usize,
        params: ThreadParams,
    ) -> Result<()> {
        // SAFETY: the place of helper `index` lies in the team's memory, see `new`.
        let helper = unsafe { self.helpers.add(index - 1) };
        let post = Post {
            shared,
            index,
            params,
            report: AtomicI32::new(WAITING),
        };
        // SAFETY: nobody uses this place yet.
        unsafe { helper.write(Helper { post, thread: None }) };
        // SAFETY: the field lies inside the helper.
        let post = unsafe { &raw const (*helper.as_ptr()).post };
        // SAFETY: `stand` only reads the post and what it points to, both of which stay in place
        // until `drop` has joined the thread.
        let thread = unsafe { Thread::start(stand, post.cast_mut().cast()) };
        match thread {
            Ok(thread) => {
                // SAFETY: the new thread does not look at this field.
                unsafe { (&raw mut (*helper.as_ptr()).thread).write(Some(thread)) };
                self.started = index;
                Ok(())
            }
            // What POSIX says when there is no memory for a thread, or one too many.
            Err(e) if matches!(e.kind(), ErrorKind::WouldBlock | ErrorKind::OutOfMemory) => {
                Err(Error::NoThread {
                    index,
                    bytes: STACK_BYTES,
                })
            }
            Err(e) => Err(Error::thread(format_args!(
                "the system refused thread {index} ({e}); ask for fewer"
            ))),
        }
    }

    /// Waits until every helper has set itself up.
    fn muster(&self) -> Result<()> {
        for index in 0..self.started {
            // SAFETY: a started helper; only its thread writes the report, which is atomic.
            let report = unsafe { &(*self.helpers.as_ptr().add(index)).post.report };
            while report.load(Acquire) == WAITING {
                std::thread::yield_now();
            }
            let code = report.load(Acquire);
            if code != READY {
                return Err(Error::thread(format_args!(
                    "the system refused the affinity or the niceness that was asked for ({})",
                    std::io::Error::from_raw_os_error(code)
                )));
            }
        }
        Ok(())
    }

    /// Members, the caller included.
    pub fn threads(&self) -> usize {
        self.started + 1
    }

    /// Calls `work(task, thread)` once for each task in `0..tasks`, spread over the team, and
    /// returns when all are done. A panic in a task is passed on to the caller, after all
    /// members have stopped.
    pub fn run(&mut self, tasks: usize, work: Work<'_>) {
        let shared = match self.shared {
            // SAFETY: alive until `drop`; all that changes in it is atomic or behind a lock.
            Some(shared) if tasks > 1 => unsafe { shared.as_ref() },
            _ => return (0..tasks).for_each(|task| work(task, 0)),
        };
        // SAFETY: only the lifetime changes. A helper uses the reference only after it has counted
        // itself in (`inside`) and then still seen the job open. Here the job is closed before
        // `wait`, which returns, on every path out of this function, only when nobody is inside:
        // a helper either sees the closed job or is waited for, so `work` outlives each use.
        let work: Work<'static> = unsafe { std::mem::transmute::<Work<'_>, Work<'static>>(work) };
        let job = Job {
            work: Some(work),
            tasks,
        };
        *lock(&shared.job) = job;
        shared.next.store(0, Relaxed);
        shared.epoch.fetch_add(1, SeqCst);
        if shared.sleeping.load(SeqCst) > 0 {
            // Without the lock, which a helper without a core may hold: one that misses this call
            // misses this job, and the others do its part.
            shared.wake.notify_all();
        }
        let own = catch_unwind(AssertUnwindSafe(|| shared.take_tasks(job, 0)));
        shared.epoch.fetch_add(1, SeqCst);
        // Helpers that are at work, not those that never came: on a busy machine one may be
        // without a core for as long as this whole token takes.
        shared.wait();
        lock(&shared.job).work = None;
        // Over with this job in any case.
        let others_panicked = shared.panicked.swap(false, SeqCst);
        if let Err(panic) = own {
            resume_unwind(panic);
        }
        if others_panicked {
            resume_unwind(Box::new("a task panicked on another thread"));
        }
    }
}

impl Drop for Team {
    fn drop(&mut self) {
        let Some(shared) = self.shared else { return };
        {
            // SAFETY: alive until the end of this function.
            let shared = unsafe { shared.as_ref() };
            shared.stop.store(true, SeqCst);
            shared.epoch.fetch_add(1, SeqCst);
            let _guard = lock(&shared.lock);
            shared.wake.notify_all();
        }
        for index in 0..self.started {
            // SAFETY: a started helper, whose thread does not look at this field.
            let thread = unsafe { (*self.helpers.as_ptr().add(index)).thread.take() };
            if let Some(thread) = thread {
                thread.join();
            }
        }
        // SAFETY: written by `new`, and no thread uses it any more.
        unsafe { shared.drop_in_place() };
    }
}

/// A helper's life.
extern "C" fn stand(post: *mut c_void) -> *mut c_void {
    // SAFETY: `Team::start_helper` passed a post that lives until this thread is joined and that
    // nobody changes but through its atomic.
    let post = unsafe { &*post.cast::<Post>() };
    let outcome = post.params.apply();
    let code = outcome
        .err()
        .map_or(READY, |e| e.raw_os_error().unwrap_or(1));
    post.report.store(code, Release);
    // SAFETY: as the post.
    unsafe { post.shared.as_ref() }.help(post.index);
    std::ptr::null_mut()
}

impl Shared {
    fn new(spins: usize) -> Self {
        Shared {
            epoch: AtomicUsize::new(0),
            job: Mutex::new(Job {
                work: None,
                tasks: 0,
            }),
            next: AtomicUsize::new(0),
            inside: AtomicUsize::new(0),
            sleeping: AtomicUsize::new(0),
            lock: Mutex::new(()),
            wake: Condvar::new(),
            done: Condvar::new(),
            stop: AtomicBool::new(false),
            panicked: AtomicBool::new(false),
            spins,
        }
    }

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
            seen = self.wait_for_job_after(seen);
            if self.stop.load(SeqCst) {
                return;
            }
            self.inside.fetch_add(1, SeqCst);
            if self.epoch.load(SeqCst) == seen {
                let job = *lock(&self.job);
                if catch_unwind(AssertUnwindSafe(|| self.take_tasks(job, thread))).is_err() {
                    self.panicked.store(true, SeqCst);
                }
            }
            if self.inside.fetch_sub(1, SeqCst) == 1 | CALLER_SLEEPS {
                let _guard = lock(&self.lock);
                self.done.notify_one();
            }
        }
    }

    /// The epoch of an open job other than `seen`; any when the team ends.
    fn wait_for_job_after(&self, seen: usize) -> usize {
        let news = |epoch: usize| epoch != seen && epoch % 2 == 1 || self.stop.load(SeqCst);
        for _ in 0..self.spins {
            let epoch = self.epoch.load(Acquire);
            if epoch != seen && news(epoch) {
                return epoch;
            }
            std::hint::spin_loop();
        }
        let mut guard = lock(&self.lock);
        self.sleeping.fetch_add(1, SeqCst);
        let epoch = loop {
            let epoch = self.epoch.load(SeqCst);
            if news(epoch) {
                break epoch;
            }
            guard = self
                .wake
                .wait(guard)
                .unwrap_or_else(PoisonError::into_inner);
        };
        self.sleeping.fetch_sub(1, SeqCst);
        epoch
    }

    /// Returns when no helper is at work any more.
    fn wait(&self) {
        for _ in 0..self.spins {
            if self.inside.load(SeqCst) == 0 {
                return;
            }
            std::hint::spin_loop();
        }
        let mut guard = lock(&self.lock);
        self.inside.fetch_or(CALLER_SLEEPS, SeqCst);
        while self.inside.load(SeqCst) != CALLER_SLEEPS {
            guard = self
                .done
                .wait(guard)
                .unwrap_or_else(PoisonError::into_inner);
        }
        self.inside.fetch_and(!CALLER_SLEEPS, SeqCst);
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

    /// How many items there are.
    pub fn len(&self) -> usize {
        self.length
    }

    /// Where `length` items from `start` lie. Panics when they are not all inside.
    pub fn pointer(&self, start: usize, length: usize) -> *mut T {
        assert!(start <= self.length && length <= self.length - start);
        self.start.wrapping_add(start)
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

/// Memory for any team of a test.
#[cfg(test)]
fn room() -> &'static mut [u8] {
    #[repr(align(64))]
    struct Room([u8; 4096]);
    &mut Box::leak(Box::new(Room([0; 4096]))).0
}

#[cfg(test)]
impl Team {
    /// A team for a test.
    pub fn of(threads: usize) -> Self {
        Team::new(threads, &ThreadParams::default(), room()).unwrap()
    }
}

#[cfg(test)]
mod tests {
    use super::super::thread::CpuSet;
    use super::*;

    #[test]
    fn every_task_runs_once_whatever_the_number_of_threads() {
        for threads in [1, 2, 3, 8] {
            let mut team = Team::of(threads);
            for tasks in [0, 1, 2, 7, 100] {
                let counts: Vec<AtomicUsize> = (0..tasks).map(|_| AtomicUsize::new(0)).collect();
                for _ in 0..2000 {
                    team.run(tasks, &|task, thread| {
                        assert!(thread < threads);
                        counts[task].fetch_add(1, Relaxed);
                    });
                }
                assert!(counts.iter().all(|c| c.load(Relaxed) == 2000));
            }
        }
    }

    #[test]
    fn a_team_that_slept_wakes() {
        let mut team = Team::of(2);
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
        let mut team = Team::of(3);
        // One, or the caller's and others'.
        for bad in [0..1, 49..50, 0..50] {
            let outcome = catch_unwind(AssertUnwindSafe(|| {
                team.run(50, &|task, _| {
                    if bad.contains(&task) {
                        resume_unwind(Box::new("on purpose"));
                    }
                })
            }));
            assert!(outcome.is_err());
            let sum = AtomicUsize::new(0);
            team.run(50, &|task, _| {
                sum.fetch_add(task, Relaxed);
            });
            assert_eq!(sum.load(Relaxed), 1225);
        }
    }

    #[test]
    fn impossible_sizes_are_refused() {
        let params = ThreadParams::default();
        for threads in [0, MAX_THREADS + 1] {
            assert!(Team::new(threads, &params, room()).is_err());
        }
        assert!(Team::new(2, &params, &mut room()[..100]).is_err());
        assert!(Team::new(2, &params, &mut room()[1..]).is_err());
    }

    /// Every CPU that this process may use is one that helpers may be bound to, and what the system
    /// refuses is an error.
    #[test]
    #[cfg(target_os = "linux")]
    fn helpers_take_an_affinity_and_a_niceness() {
        let mut params = ThreadParams {
            niceness: 3,
            ..Default::default()
        };
        // SAFETY: plain bits, filled in by the system.
        let mut allowed: libc::cpu_set_t = unsafe { std::mem::zeroed() };
        // SAFETY: a set of the size that is given.
        unsafe { libc::sched_getaffinity(0, size_of_val(&allowed), &mut allowed) };
        // SAFETY: reads a bit of the set.
        let cpu = (0..CpuSet::LIMIT).find(|cpu| unsafe { libc::CPU_ISSET(*cpu, &allowed) });
        params.cpus.insert(cpu.unwrap()).unwrap();
        let mut team = Team::new(3, &params, room()).unwrap();
        let seen = Mutex::new(Vec::new());
        let here = std::thread::current().id();
        while lock(&seen).is_empty() {
            team.run(100, &|_, thread| {
                if std::thread::current().id() != here {
                    // SAFETY: takes numbers, answers with one.
                    let niceness = unsafe { libc::getpriority(libc::PRIO_PROCESS, 0) };
                    // SAFETY: takes nothing.
                    let on = unsafe { libc::sched_getcpu() };
                    assert!(thread > 0);
                    lock(&seen).push((niceness, on));
                }
                std::thread::yield_now();
            });
        }
        drop(team);
        assert!(lock(&seen).iter().all(|s| *s == (3, cpu.unwrap() as i32)));
        params.cpus = CpuSet::default();
        params.cpus.insert(1023).unwrap();
        assert!(Team::new(2, &params, room()).is_err());
        params.niceness = 20;
        assert!(Team::new(2, &params, room()).is_err());
    }
}
