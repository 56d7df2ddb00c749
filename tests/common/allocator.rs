//! An allocator that counts and, when asked, refuses.
//!
//! A test names it as its global allocator:
//! `#[global_allocator] static ALLOCATOR: Allocator = Allocator;`.

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};

/// The system's allocator under watch.
pub struct Allocator;

/// What was taken and given back since the program began. A reallocation is one allocation of the
/// same block.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    /// Calls that asked for memory, refused ones included.
    pub allocations: usize,
    /// Bytes that these calls asked for.
    pub asked: usize,
    /// Calls that gave memory back.
    pub frees: usize,
    /// What is alive, modulo 2^n: a thread may free what another one took.
    pub live: Live,
}

/// Memory that was taken and not given back.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Live {
    pub blocks: usize,
    pub bytes: usize,
}

/// Which allocations of a thread are refused, counted from 1.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Refuse {
    /// This one only.
    Nth(usize),
    /// This one and all after it.
    From(usize),
}

static ALLOCATIONS: AtomicUsize = AtomicUsize::new(0);
static ASKED: AtomicUsize = AtomicUsize::new(0);
static FREES: AtomicUsize = AtomicUsize::new(0);
static BLOCKS: AtomicUsize = AtomicUsize::new(0);
static BYTES: AtomicUsize = AtomicUsize::new(0);

/// A thread's own numbers. Nothing in it is ever dropped, so it may be used until the thread ends.
struct Here {
    counts: Cell<Counts>,
    /// Which are refused, and how many there were since that was said.
    refuse: Cell<Option<Refuse>>,
    seen: Cell<usize>,
    refused: Cell<usize>,
}

thread_local! {
    static HERE: Here = const {
        Here {
            counts: Cell::new(Counts {
                allocations: 0,
                asked: 0,
                frees: 0,
                live: Live { blocks: 0, bytes: 0 },
            }),
            refuse: Cell::new(None),
            seen: Cell::new(0),
            refused: Cell::new(0),
        }
    };
}

/// The numbers of all threads together.
pub fn everywhere() -> Counts {
    Counts {
        allocations: ALLOCATIONS.load(Relaxed),
        asked: ASKED.load(Relaxed),
        frees: FREES.load(Relaxed),
        live: live(),
    }
}

/// What all threads together have alive.
pub fn live() -> Live {
    Live {
        blocks: BLOCKS.load(Relaxed),
        bytes: BYTES.load(Relaxed),
    }
}

/// The numbers of this thread.
pub fn here() -> Counts {
    HERE.with(|here| here.counts.get())
}

/// How often `work` asks for memory on this thread.
pub fn allocations(work: impl FnOnce()) -> usize {
    let before = here().allocations;
    work();
    here().allocations - before
}

/// Runs `work` with some of this thread's allocations refused. Returns its result and how many
/// were.
pub fn refusing<T>(refuse: Refuse, work: impl FnOnce() -> T) -> (T, usize) {
    /// Ends the refusals also when `work` panics.
    struct End;
    impl Drop for End {
        fn drop(&mut self) {
            HERE.with(|here| here.refuse.set(None));
        }
    }
    HERE.with(|here| {
        here.seen.set(0);
        here.refused.set(0);
        here.refuse.set(Some(refuse));
    });
    let end = End;
    let result = work();
    drop(end);
    (result, HERE.with(|here| here.refused.get()))
}

/// Counts a request for memory; whether it is granted.
fn ask(bytes: usize) -> bool {
    ALLOCATIONS.fetch_add(1, Relaxed);
    ASKED.fetch_add(bytes, Relaxed);
    HERE.with(|here| {
        let mut counts = here.counts.get();
        counts.allocations += 1;
        counts.asked = counts.asked.wrapping_add(bytes);
        here.counts.set(counts);
        let Some(refuse) = here.refuse.get() else {
            return true;
        };
        let seen = here.seen.get() + 1;
        here.seen.set(seen);
        let refused = match refuse {
            Refuse::Nth(n) => seen == n,
            Refuse::From(n) => seen >= n,
        };
        here.refused.set(here.refused.get() + usize::from(refused));
        !refused
    })
}

/// Counts what has come or gone.
fn settle(frees: usize, blocks: usize, bytes: usize) {
    FREES.fetch_add(frees, Relaxed);
    BLOCKS.fetch_add(blocks, Relaxed);
    BYTES.fetch_add(bytes, Relaxed);
    HERE.with(|here| {
        let mut counts = here.counts.get();
        counts.frees += frees;
        counts.live.blocks = counts.live.blocks.wrapping_add(blocks);
        counts.live.bytes = counts.live.bytes.wrapping_add(bytes);
        here.counts.set(counts);
    });
}

fn take(layout: Layout, from: impl FnOnce() -> *mut u8) -> *mut u8 {
    if !ask(layout.size()) {
        return std::ptr::null_mut();
    }
    let memory = from();
    if !memory.is_null() {
        settle(0, 1, layout.size());
    }
    memory
}

// SAFETY: what is granted comes from the system's allocator and goes back to it; a refusal is a null
// pointer, as it may be. Counting needs no memory.
unsafe impl GlobalAlloc for Allocator {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        // SAFETY: the caller's promises are the system allocator's demands.
        take(layout, || unsafe { System.alloc(layout) })
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        // SAFETY: as in `alloc`.
        take(layout, || unsafe { System.alloc_zeroed(layout) })
    }

    unsafe fn dealloc(&self, memory: *mut u8, layout: Layout) {
        settle(1, usize::MAX, layout.size().wrapping_neg());
        // SAFETY: as in `alloc`; all memory comes from there.
        unsafe { System.dealloc(memory, layout) }
    }

    unsafe fn realloc(&self, memory: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        if !ask(size) {
            return std::ptr::null_mut();
        }
        // SAFETY: as in `dealloc`.
        let moved = unsafe { System.realloc(memory, layout, size) };
        if !moved.is_null() {
            settle(0, 0, size.wrapping_sub(layout.size()));
        }
        moved
    }
}
