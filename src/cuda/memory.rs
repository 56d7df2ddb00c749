//! Memory of the device, and memory of the host that the device reaches.

use super::driver::{Address, Device, OUT_OF_MEMORY};
use crate::error::{Error, Result};
use crate::memory::Shared;
use std::ffi::c_uint;
use std::ptr::null_mut;

/// Memory of the device.
pub(super) struct Buffer {
    device: Shared<Device>,
    address: Address,
    bytes: usize,
}

impl Buffer {
    pub fn new(device: &Shared<Device>, bytes: usize) -> Result<Self> {
        let _entered = device.enter()?;
        let (free, _) = device.memory()?;
        let mut address = 0;
        // SAFETY: a place for the result; freed when this is dropped.
        let status = unsafe { (device.functions.cuMemAlloc_v2)(&mut address, bytes.max(1)) };
        if status == OUT_OF_MEMORY {
            return Err(Error::device(format_args!(
                "the GPU has {free} bytes free, but {bytes} are needed; plan a smaller context or fewer sequences, or run on the CPU"
            )));
        }
        device.check("cuMemAlloc", status)?;
        Ok(Buffer {
            device: device.clone(),
            address,
            bytes,
        })
    }

    pub fn bytes(&self) -> usize {
        self.bytes
    }

    /// Where byte `offset` lies.
    pub fn at(&self, offset: usize) -> Address {
        debug_assert!(offset <= self.bytes);
        self.address + offset as Address
    }

    /// Makes all of it zero and waits for it.
    pub fn clear(&mut self) -> Result<()> {
        let _entered = self.device.enter()?;
        // SAFETY: the range exists.
        let status = unsafe { (self.device.functions.cuMemsetD8_v2)(self.address, 0, self.bytes) };
        self.device.check("cuMemsetD8", status)?;
        self.wait()
    }

    /// Copies `bytes` to `offset` and waits for it.
    pub fn write(&mut self, offset: usize, bytes: &[u8]) -> Result<()> {
        self.check_range(offset, bytes.len())?;
        let _entered = self.device.enter()?;
        // SAFETY: both ranges exist.
        let status = unsafe {
            (self.device.functions.cuMemcpyHtoD_v2)(
                self.at(offset),
                bytes.as_ptr().cast(),
                bytes.len(),
            )
        };
        self.device.check("cuMemcpyHtoD", status)?;
        self.wait()
    }

    /// Copies the bytes from `offset` on out of the device.
    pub fn read(&self, offset: usize, bytes: &mut [u8]) -> Result<()> {
        self.check_range(offset, bytes.len())?;
        let _entered = self.device.enter()?;
        // SAFETY: both ranges exist.
        let status = unsafe {
            (self.device.functions.cuMemcpyDtoH_v2)(
                bytes.as_mut_ptr().cast(),
                self.at(offset),
                bytes.len(),
            )
        };
        self.device.check("cuMemcpyDtoH", status)
    }

    /// Copies within the buffer and waits for it; the ranges must not overlap.
    pub fn copy_within(&mut self, from: usize, to: usize, bytes: usize) -> Result<()> {
        self.check_range(from, bytes)?;
        self.check_range(to, bytes)?;
        let _entered = self.device.enter()?;
        // SAFETY: both ranges exist.
        let status =
            unsafe { (self.device.functions.cuMemcpyDtoD_v2)(self.at(to), self.at(from), bytes) };
        self.device.check("cuMemcpyDtoD", status)?;
        self.wait()
    }

    /// The driver may return before memory is set, a copy within the device, or the last piece of one to it,
    /// is made. They go by the default stream, for which programs do not wait: theirs are of the kind that waits for
    /// nobody.
    fn wait(&self) -> Result<()> {
        // SAFETY: the default stream of the context that the caller has entered.
        let status = unsafe { (self.device.functions.cuStreamSynchronize)(null_mut()) };
        self.device.check("cuStreamSynchronize", status)
    }

    fn check_range(&self, offset: usize, length: usize) -> Result<()> {
        match offset <= self.bytes && length <= self.bytes - offset {
            true => Ok(()),
            false => Err(Error::device("a copy outside of the GPU's memory")),
        }
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        if let Ok(_entered) = self.device.enter() {
            // SAFETY: allocated in `new`, and nothing runs that uses it.
            unsafe { (self.device.functions.cuMemFree_v2)(self.address) };
        }
    }
}

/// Memory of the host that the device copies from and to without the processor.
pub(super) struct Pinned {
    device: Shared<Device>,
    start: *mut u8,
    bytes: usize,
}

// SAFETY: plain memory.
unsafe impl Send for Pinned {}
// SAFETY: as above.
unsafe impl Sync for Pinned {}

impl Pinned {
    /// Zeroed.
    pub fn new(device: &Shared<Device>, bytes: usize) -> Result<Self> {
        let _entered = device.enter()?;
        let mut start = null_mut();
        // SAFETY: a place for the result; freed when this is dropped.
        let status = unsafe { (device.functions.cuMemHostAlloc)(&mut start, bytes.max(1), 0) };
        if status == OUT_OF_MEMORY {
            return Err(Error::OutOfMemory { bytes });
        }
        device.check("cuMemHostAlloc", status)?;
        let start = start.cast::<u8>();
        // SAFETY: allocated with this size.
        unsafe { start.write_bytes(0, bytes) };
        Ok(Pinned {
            device: device.clone(),
            start,
            bytes,
        })
    }

    pub fn bytes(&self) -> &[u8] {
        // SAFETY: this much was allocated, and written; the device writes only during a launch, which
        // needs `&mut`.
        unsafe { std::slice::from_raw_parts(self.start, self.bytes) }
    }

    pub fn bytes_mut(&mut self) -> &mut [u8] {
        // SAFETY: as above.
        unsafe { std::slice::from_raw_parts_mut(self.start, self.bytes) }
    }
}

impl Drop for Pinned {
    fn drop(&mut self) {
        if let Ok(_entered) = self.device.enter() {
            // SAFETY: allocated in `new`, and nothing runs that uses it.
            unsafe { (self.device.functions.cuMemFreeHost)(self.start.cast()) };
        }
    }
}

/// Memory of the host that the device reads where it lies.
pub(super) struct Registered {
    device: Shared<Device>,
    start: *const u8,
    address: Address,
}

// SAFETY: only the driver uses the address.
unsafe impl Send for Registered {}
// SAFETY: as above.
unsafe impl Sync for Registered {}

impl Registered {
    /// # Safety
    /// The bytes stay where they are as long as this lives.
    pub unsafe fn new(device: &Shared<Device>, bytes: &[u8]) -> Result<Self> {
        /// CU_MEMHOSTREGISTER_DEVICEMAP and CU_MEMHOSTREGISTER_READ_ONLY.
        const FLAGS: c_uint = 2 | 8;
        let _entered = device.enter()?;
        let start = bytes.as_ptr();
        let f = &device.functions;
        // SAFETY: the driver is told to read only.
        let status =
            unsafe { (f.cuMemHostRegister_v2)(start.cast_mut().cast(), bytes.len(), FLAGS) };
        device.check("cuMemHostRegister", status)?;
        let mut registered = Registered {
            device: device.clone(),
            start,
            address: 0,
        };
        let mut address = 0;
        // SAFETY: a place for the result.
        let status =
            unsafe { (f.cuMemHostGetDevicePointer_v2)(&mut address, start.cast_mut().cast(), 0) };
        device.check("cuMemHostGetDevicePointer", status)?;
        registered.address = address;
        Ok(registered)
    }

    pub fn at(&self, offset: usize) -> Address {
        self.address + offset as Address
    }
}

impl Drop for Registered {
    fn drop(&mut self) {
        if let Ok(_entered) = self.device.enter() {
            // SAFETY: registered in `new`.
            unsafe { (self.device.functions.cuMemHostUnregister)(self.start.cast_mut().cast()) };
        }
    }
}
