//! What is behind the opaque pointers.

use super::params::{check_out, put};
use super::status::{Failure, LastError, mor_status};
use crate::error::Error;
use std::alloc::{Layout, alloc, dealloc};
use std::ffi::{CStr, c_char};
use std::sync::atomic::{AtomicBool, Ordering};

/// The first word of every object: tells the kinds apart, and a freed object as long as its memory
/// was not used again.
#[derive(Clone, Copy, PartialEq, Eq)]
#[repr(u64)]
pub(super) enum Mark {
    Freed = 0,
    Model = u64::from_le_bytes(*b"morMODEL"),
    Tokenizer = u64::from_le_bytes(*b"morTOKEN"),
    Session = u64::from_le_bytes(*b"morSESSN"),
    Batch = u64::from_le_bytes(*b"morBATCH"),
}

/// An object behind a pointer.
///
/// # Safety
/// `repr(C)`, beginning with the `u64` of its mark.
pub(super) unsafe trait Object: Sized {
    const MARK: Mark;
    const NAME: &'static str;
}

/// The object behind a caller's pointer.
pub(super) unsafe fn object<'a, T: Object>(pointer: *const T) -> Result<&'a T, Failure> {
    // SAFETY: passed on.
    unsafe { check(pointer) }?;
    // SAFETY: the mark says that it is a live object of this kind; the caller frees none that is
    // in use.
    Ok(unsafe { &*pointer })
}

/// Refuses what is no live object of the kind.
pub(super) unsafe fn check<T: Object>(pointer: *const T) -> Result<(), Failure> {
    const { assert!(align_of::<T>() == align_of::<u64>()) }
    // SAFETY: passed on.
    unsafe { check_mark(pointer.cast(), T::MARK, T::NAME) }
}

/// As [`check`], once for all kinds: the library is to stay small.
#[inline(never)]
unsafe fn check_mark(pointer: *const u64, mark: Mark, name: &str) -> Result<(), Failure> {
    if pointer.is_null() {
        return Err(super::params::null(name));
    }
    // SAFETY: the caller passes a pointer that it got from this library.
    if !pointer.is_aligned() || unsafe { pointer.read() } != mark as u64 {
        return Err(Failure::argument(format_args!(
            "{name} is no live object of its kind"
        )));
    }
    Ok(())
}

/// As [`check_mark`], where nobody has the sentence: the status of what is no live object.
#[inline(never)]
unsafe fn refusal(pointer: *const u64, mark: Mark, name: &str) -> Option<mor_status> {
    // SAFETY: passed on.
    let failure = unsafe { check_mark(pointer, mark, name) }.err()?;
    Some(failure.status())
}

/// Puts an object into memory of its own.
pub(super) fn allocate<T: Object>(object: T) -> Result<*mut T, Error> {
    let layout = Layout::new::<T>();
    // SAFETY: the size is not zero, for the mark is part of it.
    let memory = unsafe { alloc(layout) }.cast::<T>();
    if memory.is_null() {
        return Err(Error::OutOfMemory {
            bytes: layout.size(),
        });
    }
    // SAFETY: fresh memory of this layout.
    unsafe { memory.write(object) };
    Ok(memory)
}

/// Ends an object that [`allocate`] made.
pub(super) unsafe fn free<T: Object>(pointer: *mut T) {
    // SAFETY: the caller has checked it and uses it no more.
    unsafe {
        pointer.drop_in_place();
        pointer.cast::<u64>().write_volatile(Mark::Freed as u64);
        dealloc(pointer.cast(), Layout::new::<T>());
    }
}

/// The state of an object that one call at a time may use.
pub(super) struct Turn {
    taken: AtomicBool,
    /// Set when a call panicked: the object may be in any state.
    broken: AtomicBool,
}

impl Turn {
    pub const fn new() -> Self {
        Turn {
            taken: AtomicBool::new(false),
            broken: AtomicBool::new(false),
        }
    }

    /// Takes the turn, until the guard goes.
    pub fn take(&self) -> Result<Taken<'_>, Failure> {
        let free = self
            .taken
            .compare_exchange(false, true, Ordering::Acquire, Ordering::Relaxed);
        match free {
            Ok(_) => Ok(Taken(self)),
            Err(_) => Err(Failure::Status(mor_status::MOR_ERROR_BUSY)),
        }
    }

    /// Takes the turn for a call on an object that is in a state for it.
    #[inline(never)]
    fn begin(&self) -> Result<Taken<'_>, mor_status> {
        // The last error belongs to the call that is in progress.
        let taken = self.take().map_err(|_| mor_status::MOR_ERROR_BUSY)?;
        match self.broken.load(Ordering::Relaxed) {
            true => Err(mor_status::MOR_ERROR_INTERNAL),
            false => Ok(taken),
        }
    }
}

/// The turn is taken.
pub(super) struct Taken<'a>(&'a Turn);

impl Drop for Taken<'_> {
    fn drop(&mut self) {
        self.0.taken.store(false, Ordering::Release);
    }
}

/// A call on an exclusive object: takes its turn, works, and keeps the sentence of a failure.
pub(super) unsafe fn call<C: Kind>(
    pointer: *mut Owned<C>,
    work: impl FnOnce(&mut C) -> Result<(), Failure>,
) -> mor_status {
    // SAFETY: the caller passes NULL or an object of ours that nobody frees meanwhile.
    if let Some(status) = unsafe { refusal(pointer.cast(), C::MARK, C::NAME) } {
        return status;
    }
    // SAFETY: a field of a live object; it is only changed through its atomics.
    let turn = unsafe { &(*pointer).turn };
    let _taken = match turn.begin() {
        Ok(taken) => taken,
        Err(status) => return status,
    };
    // SAFETY: the turn is ours, so nobody else uses these fields.
    let (content, last) = unsafe { (&mut (*pointer).content, &mut (*pointer).last_error) };
    conclude(super::boundary::catch(|| work(content)), turn, last)
}

/// Takes an object's turn for good, before it ends: nobody gets another. Without a look at the other fields, which
/// a call in progress may be using.
pub(super) unsafe fn last_turn<C: Kind>(pointer: *mut Owned<C>) -> Result<(), Failure> {
    // SAFETY: passed on; a field of a live object, which is only changed through its atomics.
    let taken = unsafe {
        check(pointer)?;
        let turn = &(*pointer).turn;
        turn.take()?
    };
    std::mem::forget(taken);
    Ok(())
}

/// Keeps what came of a call, or that it panicked: once for all calls, as [`check_mark`].
#[inline(never)]
fn conclude(outcome: Option<Result<(), Failure>>, turn: &Turn, last: &mut LastError) -> mor_status {
    let outcome = outcome.unwrap_or_else(|| {
        turn.broken.store(true, Ordering::Relaxed);
        Err(Failure::Status(mor_status::MOR_ERROR_INTERNAL))
    });
    match outcome {
        Ok(()) => {
            last.set("");
            mor_status::MOR_OK
        }
        Err(failure) => {
            last.set(&failure.text());
            failure.status()
        }
    }
}

/// A call on an exclusive object that writes one value.
pub(super) unsafe fn tell<C: Kind, V>(
    pointer: *mut Owned<C>,
    out: *mut V,
    name: &str,
    value: impl FnOnce(&mut C) -> Result<V, Failure>,
) -> mor_status {
    let work = |content: &mut C| {
        check_out(out, name)?;
        let value = value(content)?;
        // SAFETY: checked above.
        unsafe { put(out, value) };
        Ok(())
    };
    // SAFETY: passed on.
    unsafe { call(pointer, work) }
}

/// The sentence about an exclusive object's last call; `gone` for what is no live object.
pub(super) unsafe fn last_error<C: Kind>(
    pointer: *mut Owned<C>,
    gone: &'static CStr,
) -> *const c_char {
    // SAFETY: passed on.
    match unsafe { check(pointer) } {
        // SAFETY: a field of a live object, and by the manual no call on it is in progress.
        Ok(()) => unsafe { &(*pointer).last_error }.as_ptr(),
        Err(_) => gone.as_ptr(),
    }
}

/// What an [`Owned`] object may hold.
pub(super) trait Kind {
    const MARK: Mark;
    const NAME: &'static str;
}

/// An exclusive object in memory of its own.
#[repr(C)]
pub(super) struct Owned<C> {
    mark: u64,
    turn: Turn,
    last_error: LastError,
    pub content: C,
}

// SAFETY: `repr(C)` with the mark first.
unsafe impl<C: Kind> Object for Owned<C> {
    const MARK: Mark = C::MARK;
    const NAME: &'static str = C::NAME;
}

impl<C: Kind> Owned<C> {
    pub fn new(content: C) -> Self {
        Owned {
            mark: C::MARK as u64,
            turn: Turn::new(),
            last_error: LastError::EMPTY,
            content,
        }
    }

    pub fn create(content: C) -> Result<*mut Self, Error> {
        allocate(Self::new(content))
    }

    /// Ends an object, unless a call on it is in progress. NULL is allowed.
    pub unsafe fn end(pointer: *mut Self) -> Result<(), Failure> {
        if pointer.is_null() {
            return Ok(());
        }
        // SAFETY: passed on.
        unsafe {
            last_turn(pointer)?;
            free(pointer);
        }
        Ok(())
    }
}
