//! Threads for the team. The standard library's allocate when they start and end the process when
//! that fails, so on Unix the system's are used; they also take an affinity and a priority.

use super::team::MAX_THREADS;
use crate::error::{Error, Result};
use std::ffi::c_void;

/// Which CPUs helper threads may use, by the system's numbers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct CpuSet {
    bits: [u64; CpuSet::LIMIT / 64],
}

impl CpuSet {
    /// CPU numbers are below this.
    pub const LIMIT: usize = 1024;

    /// Adds a CPU.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] for a number that no CPU has.
    pub fn insert(&mut self, cpu: usize) -> Result<()> {
        let Some(word) = self.bits.get_mut(cpu / 64) else {
            return Err(Error::argument(format_args!(
                "CPU {cpu} was asked for; numbers below {} are possible",
                CpuSet::LIMIT
            )));
        };
        *word |= 1 << (cpu % 64);
        Ok(())
    }

    /// Whether no CPU was named, which means any.
    pub fn is_empty(&self) -> bool {
        self.bits == [0; CpuSet::LIMIT / 64]
    }

    /// The CPUs in order.
    pub fn iter(&self) -> impl Iterator<Item = usize> {
        let bits = self.bits;
        (0..CpuSet::LIMIT).filter(move |cpu| bits[cpu / 64] >> (cpu % 64) & 1 == 1)
    }
}

/// What a helper asks of the system before its first task.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct ThreadParams {
    /// CPUs that the helpers may use; empty means any. The caller's own thread is left alone.
    pub cpus: CpuSet,
    /// Niceness of the helpers, -20 (first) to 19 (last); 0 leaves it as it is inherited. Below
    /// the inherited one it needs a privilege.
    pub niceness: i32,
}

impl ThreadParams {
    /// Refuses what no system or not this one can do.
    pub(crate) fn check(&self) -> Result<()> {
        if !(-20..=19).contains(&self.niceness) {
            return Err(Error::argument(format_args!(
                "the niceness is {}; it must be between -20 and 19",
                self.niceness
            )));
        }
        let asks = !self.cpus.is_empty() || self.niceness != 0;
        if asks && !cfg!(any(target_os = "linux", target_os = "android")) {
            return Err(Error::unsupported(
                "the affinity and the niceness of threads on this system; set them from outside",
            ));
        }
        Ok(())
    }

    /// Applies them to the calling thread.
    #[cfg(any(target_os = "linux", target_os = "android"))]
    pub(super) fn apply(&self) -> std::io::Result<()> {
        if !self.cpus.is_empty() {
            let mut set = Affinity::default();
            for cpu in self.cpus.iter() {
                set[cpu / WORD] |= 1 << (cpu % WORD);
            }
            // SAFETY: the pointer is to a set of the size that is given; 0 is this thread.
            if unsafe { libc::sched_setaffinity(0, size_of_val(&set), set.as_ptr().cast()) } != 0 {
                return Err(std::io::Error::last_os_error());
            }
        }
        if self.niceness != 0 {
            // SAFETY: takes numbers only. On Linux a niceness is a thread's, and 0 is this one.
            if unsafe { libc::setpriority(libc::PRIO_PROCESS, 0, self.niceness) } != 0 {
                return Err(std::io::Error::last_os_error());
            }
        }
        Ok(())
    }

    #[cfg(not(any(target_os = "linux", target_os = "android")))]
    pub(super) fn apply(&self) -> std::io::Result<()> {
        Ok(())
    }
}

/// A set of CPUs as the system takes it, for all that a [`CpuSet`] has: libc's has 32 bits only on some systems.
#[cfg(any(target_os = "linux", target_os = "android"))]
type Affinity = [libc::c_ulong; CpuSet::LIMIT / WORD];
#[cfg(any(target_os = "linux", target_os = "android"))]
const WORD: usize = libc::c_ulong::BITS as usize;

/// How many threads can run at the same time, at most 256: the CPUs that this process may use, and in a
/// container the share that it was given. As [`std::thread::available_parallelism`], without its allocations.
pub fn cores() -> usize {
    let cpus = usable_cpus().clamp(1, MAX_THREADS);
    quota().map_or(cpus, |quota| quota.clamp(1, cpus))
}

#[cfg(any(target_os = "linux", target_os = "android"))]
fn usable_cpus() -> usize {
    let mut set = Affinity::default();
    // SAFETY: the pointer is to a set of the size that is given; 0 is this thread.
    if unsafe { libc::sched_getaffinity(0, size_of_val(&set), set.as_mut_ptr().cast()) } == 0 {
        return set.iter().map(|word| word.count_ones() as usize).sum();
    }
    online_cpus()
}

#[cfg(all(unix, not(any(target_os = "linux", target_os = "android"))))]
fn usable_cpus() -> usize {
    online_cpus()
}

#[cfg(unix)]
fn online_cpus() -> usize {
    // SAFETY: takes a number, answers with one.
    usize::try_from(unsafe { libc::sysconf(libc::_SC_NPROCESSORS_ONLN) }).unwrap_or(1)
}

#[cfg(not(unix))]
fn usable_cpus() -> usize {
    std::thread::available_parallelism().map_or(1, |n| n.get())
}

/// CPUs' worth of time that a container may use (cgroup v2: microseconds in each period, "max" for
/// all), rounded up.
fn quota() -> Option<usize> {
    use std::io::Read;
    if !cfg!(target_os = "linux") {
        return None;
    }
    let mut text = [0; 64];
    let mut file = std::fs::File::open("/sys/fs/cgroup/cpu.max").ok()?;
    let length = file.read(&mut text).ok()?;
    let mut numbers = std::str::from_utf8(&text[..length])
        .ok()?
        .split_whitespace();
    let mut number = || numbers.next()?.parse::<usize>().ok();
    let (time, period) = (number()?, number()?);
    (period > 0).then(|| time.div_ceil(period))
}

/// Stack of a helper. Its tasks keep a few kilobytes there; pages that are not touched cost nothing.
pub const STACK_BYTES: usize = 512 << 10;

/// What a thread runs, in the form that systems want. Must not unwind. The result means nothing.
pub(super) type Main = extern "C" fn(*mut c_void) -> *mut c_void;

/// A running thread.
pub(super) struct Thread(system::Handle);

impl Thread {
    /// Starts `main(argument)` on a new thread.
    ///
    /// # Safety
    /// What `main` does with `argument` must be sound on another thread until [`Thread::join`]
    /// returns.
    pub unsafe fn start(main: Main, argument: *mut c_void) -> std::io::Result<Self> {
        // SAFETY: passed on.
        unsafe { system::start(main, argument) }.map(Thread)
    }

    /// Waits for its end.
    pub fn join(self) {
        system::join(self.0);
    }
}

#[cfg(unix)]
mod system {
    use super::{Main, STACK_BYTES};
    use std::ffi::c_void;
    use std::io::Error;
    use std::mem::MaybeUninit;

    pub type Handle = libc::pthread_t;

    fn check(code: i32) -> std::io::Result<()> {
        match code {
            0 => Ok(()),
            code => Err(Error::from_raw_os_error(code)),
        }
    }

    /// # Safety
    /// As [`super::Thread::start`].
    pub unsafe fn start(main: Main, argument: *mut c_void) -> std::io::Result<Handle> {
        let mut attributes = MaybeUninit::<libc::pthread_attr_t>::uninit();
        // SAFETY: initialises the attributes; they are destroyed below on every path.
        check(unsafe { libc::pthread_attr_init(attributes.as_mut_ptr()) })?;
        let mut handle = MaybeUninit::<libc::pthread_t>::uninit();
        // SAFETY: the attributes are initialised; `main` and its argument are the caller's duty.
        let code = unsafe {
            match libc::pthread_attr_setstacksize(attributes.as_mut_ptr(), STACK_BYTES) {
                0 => {
                    let handle = handle.as_mut_ptr();
                    libc::pthread_create(handle, attributes.as_ptr(), main, argument)
                }
                code => code,
            }
        };
        // SAFETY: initialised above, used no more.
        unsafe { libc::pthread_attr_destroy(attributes.as_mut_ptr()) };
        // SAFETY: a thread that was started has written its handle.
        check(code).map(|()| unsafe { handle.assume_init() })
    }

    pub fn join(handle: Handle) {
        // SAFETY: a thread of ours that is joined once. Its result says nothing.
        unsafe { libc::pthread_join(handle, std::ptr::null_mut()) };
    }
}

/// Elsewhere the standard library's threads do; there a lack of memory at a thread's start is fatal.
#[cfg(not(unix))]
mod system {
    use super::{Main, STACK_BYTES};
    use std::ffi::c_void;
    use std::thread::{Builder, JoinHandle};

    pub type Handle = JoinHandle<()>;

    struct Argument(*mut c_void);
    // SAFETY: by the contract of `Thread::start`.
    unsafe impl Send for Argument {}

    /// # Safety
    /// As [`super::Thread::start`].
    pub unsafe fn start(main: Main, argument: *mut c_void) -> std::io::Result<Handle> {
        let argument = Argument(argument);
        Builder::new().stack_size(STACK_BYTES).spawn(move || {
            let Argument(argument) = { argument };
            main(argument);
        })
    }

    pub fn join(handle: Handle) {
        // `main` does not unwind, so there is nothing to learn from the result.
        let _ = handle.join();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cores_are_those_of_the_standard_library() {
        // It also knows older kinds of quotas, which only make its number smaller.
        let known = std::thread::available_parallelism().unwrap().get();
        assert!(cores() >= known.min(MAX_THREADS) && cores() <= MAX_THREADS);
    }

    #[test]
    fn cpu_sets_hold_what_was_put_in() {
        let mut set = CpuSet::default();
        assert!(set.is_empty());
        for cpu in [0, 63, 64, 1023] {
            set.insert(cpu).unwrap();
        }
        assert_eq!(set.iter().collect::<Vec<_>>(), [0, 63, 64, 1023]);
        assert!(set.insert(1024).is_err());
    }
}
