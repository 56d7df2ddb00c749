//! The memory of a session or a batch, made ready.

use crate::cpu::team::Team;
use crate::error::{Error, Result};
use crate::model::{Model, anonymous};
use crate::plan::{ARENA_ALIGNMENT, Plan};
use memmap2::MmapMut;

/// The parts of a plan's memory.
pub(crate) struct Prepared {
    /// Started.
    pub team: Team,
    /// To be carved; what changes with the model's work is empty.
    pub arena: &'static mut [u8],
    pub locked: Option<Locked>,
}

impl Prepared {
    /// Makes `memory`, which may hold anything, ready for what `plan` was made for.
    pub fn prepare(model: &Model, plan: &Plan, memory: &'static mut [u8]) -> Result<Self> {
        model.check_file()?;
        if memory.len() < plan.bytes() {
            return Err(Error::BufferTooSmall {
                needed: plan.bytes(),
                capacity: memory.len(),
            });
        }
        if memory.as_ptr().align_offset(ARENA_ALIGNMENT) != 0 {
            return Err(Error::argument(format_args!(
                "the memory must begin at a multiple of {ARENA_ALIGNMENT}"
            )));
        }
        let params = plan.params();
        let locked = match params.lock {
            true => Some(Locked::new(&memory[..plan.bytes()])?),
            false => None,
        };
        if params.prefault {
            touch(&mut memory[..plan.bytes()]);
        }
        let (team, arena) = plan.split(memory);
        let team = Team::new(params.threads, &params.thread, team)?;
        let mut buffers = plan.carve(arena);
        buffers.kv.reset();
        if let Some(factors) = model.rope_factors() {
            let values = factors.values(model.bytes());
            for (to, from) in buffers.rope_factors.iter_mut().zip(values) {
                *to = from;
            }
        }
        Ok(Prepared {
            team,
            arena,
            locked,
        })
    }
}

/// Memory for a plan, and its bytes.
///
/// # Safety
/// The bytes are used only as long as the map lives, and the map's own access to them not at all.
pub(crate) unsafe fn own_memory(plan: &Plan) -> Result<(MmapMut, &'static mut [u8])> {
    let mut memory = anonymous(plan.bytes())?;
    // SAFETY: the bytes stay where they are when the map is moved; the caller keeps it.
    let bytes = unsafe { std::slice::from_raw_parts_mut(memory.as_mut_ptr(), memory.len()) };
    Ok((memory, bytes))
}

/// Writes to every page, for a page that was only read may still be the system's page of zeros.
fn touch(memory: &mut [u8]) {
    /// The smallest page of any system that this runs on.
    const PAGE: usize = 4096;
    for byte in memory.iter_mut().step_by(PAGE) {
        *std::hint::black_box(byte) = 0;
    }
    // The memory may begin within a page, so that its last one was stepped over.
    if let Some(byte) = memory.last_mut() {
        *std::hint::black_box(byte) = 0;
    }
}

/// Memory that is kept from being swapped out until this is dropped. Locks do not nest: a page that two of them share is
/// free when the first is dropped.
pub(crate) struct Locked {
    start: *const u8,
    bytes: usize,
}

// SAFETY: the address is only given back to the system.
unsafe impl Send for Locked {}
// SAFETY: as above.
unsafe impl Sync for Locked {}

impl Locked {
    #[cfg(unix)]
    fn new(memory: &[u8]) -> Result<Self> {
        let (start, bytes) = (memory.as_ptr(), memory.len());
        // SAFETY: a range of this process's memory, which locking does not change.
        if unsafe { libc::mlock(start.cast(), bytes) } != 0 {
            let system = std::io::Error::last_os_error();
            return Err(Error::Lock { bytes, system });
        }
        Ok(Locked { start, bytes })
    }

    #[cfg(not(unix))]
    fn new(_: &[u8]) -> Result<Self> {
        let what = "locking a session's memory on this system";
        Err(Error::unsupported(what))
    }
}

impl Drop for Locked {
    fn drop(&mut self) {
        // SAFETY: as in `new`. A failure leaves the pages locked, which harms nobody.
        #[cfg(unix)]
        unsafe {
            libc::munlock(self.start.cast(), self.bytes)
        };
    }
}
