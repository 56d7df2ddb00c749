//! NVIDIA's driver, as far as it is used: safe words around a table of functions that is loaded at run
//! time, so that a machine without the driver gets an error.
//!
//! Types are cudarc's. Its functions are not used: they end in a panic where the library or a symbol is
//! missing, and take a status that a newer driver may have added for an enum.

use crate::error::{Error, Result};
use crate::memory::Shared;
use cudarc::driver::sys;
use libloading::Library;
use std::ffi::{CStr, c_char, c_int, c_uchar, c_uint, c_void};
use std::mem::ManuallyDrop;
use std::ptr::{null, null_mut};

/// A place in the device's memory.
pub(super) type Address = sys::CUdeviceptr;

/// What functions answer: 0, or the number of an error.
pub(super) type Status = c_uint;

pub(super) const OUT_OF_MEMORY: Status = sys::CUresult::CUDA_ERROR_OUT_OF_MEMORY as Status;

/// Says which functions there are: those that every driver since CUDA 11.4 has, and those that may be
/// missing.
macro_rules! functions {
    ($(fn $name:ident($($argument:ty),*);)* optional: $(fn $late:ident($($late_argument:ty),*);)*) => {
        #[allow(non_snake_case)] // the driver's names
        pub(super) struct Functions {
            $(pub $name: unsafe extern "system" fn($($argument),*) -> Status,)*
            $(pub $late: Option<unsafe extern "system" fn($($late_argument),*) -> Status>,)*
        }

        impl Functions {
            fn load(library: &Library) -> Result<Self> {
                Ok(Functions {
                    // SAFETY: the driver's header gives these functions these arguments.
                    $($name: *unsafe { library.get(concat!(stringify!($name), "\0")) }
                        .map_err(|_| missing(stringify!($name)))?,)*
                    // SAFETY: as above.
                    $($late: unsafe { library.get(concat!(stringify!($late), "\0")) }.ok().map(|f| *f),)*
                })
            }
        }
    };
}

fn missing(name: &str) -> Error {
    Error::device(format_args!(
        "NVIDIA's driver on this machine lacks {name}; install a driver for CUDA 11.4 or later, or run on the CPU"
    ))
}

functions! {
    fn cuInit(c_uint);
    fn cuDriverGetVersion(*mut c_int);
    fn cuDeviceGetCount(*mut c_int);
    fn cuDeviceGet(*mut sys::CUdevice, c_int);
    fn cuDeviceGetAttribute(*mut c_int, sys::CUdevice_attribute, sys::CUdevice);
    fn cuDevicePrimaryCtxRetain(*mut sys::CUcontext, sys::CUdevice);
    fn cuDevicePrimaryCtxRelease_v2(sys::CUdevice);
    fn cuCtxPushCurrent_v2(sys::CUcontext);
    fn cuCtxPopCurrent_v2(*mut sys::CUcontext);
    fn cuMemGetInfo_v2(*mut usize, *mut usize);
    fn cuMemAlloc_v2(*mut Address, usize);
    fn cuMemFree_v2(Address);
    fn cuMemHostAlloc(*mut *mut c_void, usize, c_uint);
    fn cuMemFreeHost(*mut c_void);
    fn cuMemHostRegister_v2(*mut c_void, usize, c_uint);
    fn cuMemHostUnregister(*mut c_void);
    fn cuMemHostGetDevicePointer_v2(*mut Address, *mut c_void, c_uint);
    fn cuMemcpyHtoD_v2(Address, *const c_void, usize);
    fn cuMemcpyDtoH_v2(*mut c_void, Address, usize);
    fn cuMemcpyDtoD_v2(Address, Address, usize);
    fn cuMemsetD8_v2(Address, c_uchar, usize);
    fn cuMemcpyHtoDAsync_v2(Address, *const c_void, usize, sys::CUstream);
    fn cuMemcpyDtoHAsync_v2(*mut c_void, Address, usize, sys::CUstream);
    fn cuModuleLoadData(*mut sys::CUmodule, *const c_void);
    fn cuModuleUnload(sys::CUmodule);
    fn cuModuleGetFunction(*mut sys::CUfunction, sys::CUmodule, *const c_char);
    fn cuFuncSetAttribute(sys::CUfunction, sys::CUfunction_attribute, c_int);
    fn cuStreamCreate(*mut sys::CUstream, c_uint);
    fn cuStreamDestroy_v2(sys::CUstream);
    fn cuStreamSynchronize(sys::CUstream);
    fn cuLaunchKernel(
        sys::CUfunction, c_uint, c_uint, c_uint, c_uint, c_uint, c_uint, c_uint, sys::CUstream,
        *mut *mut c_void, *mut *mut c_void
    );
    fn cuGetErrorName(Status, *mut *const c_char);
    fn cuGetErrorString(Status, *mut *const c_char);
    optional:
    fn cuFuncGetParamInfo(sys::CUfunction, usize, *mut usize, *mut usize);
    fn cuGraphCreate(*mut sys::CUgraph, c_uint);
    fn cuGraphDestroy(sys::CUgraph);
    fn cuGraphAddKernelNode_v2(
        *mut sys::CUgraphNode, sys::CUgraph, *const sys::CUgraphNode, usize,
        *const sys::CUDA_KERNEL_NODE_PARAMS
    );
    fn cuGraphAddMemcpyNode(
        *mut sys::CUgraphNode, sys::CUgraph, *const sys::CUgraphNode, usize,
        *const sys::CUDA_MEMCPY3D, sys::CUcontext
    );
    fn cuGraphInstantiateWithFlags(*mut sys::CUgraphExec, sys::CUgraph, u64);
    fn cuGraphExecDestroy(sys::CUgraphExec);
    fn cuGraphUpload(sys::CUgraphExec, sys::CUstream);
    fn cuGraphLaunch(sys::CUgraphExec, sys::CUstream);
    fn cuGraphConditionalHandleCreate(*mut u64, sys::CUgraph, sys::CUcontext, c_uint, c_uint);
    fn cuGraphAddNode_v2(
        *mut sys::CUgraphNode, sys::CUgraph, *const sys::CUgraphNode,
        *const sys::CUgraphEdgeData, usize, *mut sys::CUgraphNodeParams
    );
}

/// The loaded driver and one device of it.
pub(super) struct Device {
    pub functions: Functions,
    pub context: sys::CUcontext,
    device: sys::CUdevice,
    /// As CUDA numbers it: 12060 is 12.6.
    pub version: c_int,
    /// Compute capability, 90 for 9.0.
    pub architecture: u32,
    pub multiprocessors: u32,
    /// Bytes of shared memory that a block may have.
    shared: usize,
    /// Whether it shares the host's memory.
    pub integrated: bool,
    /// Never unloaded: a driver leaves threads and handlers behind.
    _library: ManuallyDrop<Library>,
}

// SAFETY: the driver's functions may be called from any thread.
unsafe impl Send for Device {}
// SAFETY: as above.
unsafe impl Sync for Device {}

/// Names of the driver's library, which are not copied if they end with a zero byte.
#[cfg(not(windows))]
const LIBRARIES: [&str; 2] = ["libcuda.so.1\0", "libcuda.so\0"];
#[cfg(windows)]
const LIBRARIES: [&str; 1] = ["nvcuda.dll"];

impl Device {
    /// Loads the driver and takes the primary context of device number `index`.
    pub fn open(index: u32) -> Result<Shared<Self>> {
        // SAFETY: NVIDIA's driver may be loaded at any time, from any thread.
        let mut found = LIBRARIES.iter().map(|name| unsafe { Library::new(*name) });
        let library = found.find_map(|library| library.ok()).ok_or_else(|| {
            Error::device("this machine has no NVIDIA driver (libcuda.so.1); run on the CPU")
        })?;
        let functions = Functions::load(&library)?;
        let mut device = Device {
            functions,
            context: null_mut(),
            device: 0,
            version: 0,
            architecture: 0,
            multiprocessors: 0,
            shared: 0,
            integrated: false,
            _library: ManuallyDrop::new(library),
        };
        let f = &device.functions;
        // SAFETY: places for results, as in all calls below.
        unsafe {
            device.check("cuInit", (f.cuInit)(0))?;
            let mut version = 0;
            device.check("cuDriverGetVersion", (f.cuDriverGetVersion)(&mut version))?;
            let mut count = 0;
            device.check("cuDeviceGetCount", (f.cuDeviceGetCount)(&mut count))?;
            if index >= count.max(0).unsigned_abs() {
                return Err(Error::device(format_args!(
                    "there is no CUDA device {index}: the driver finds {count}"
                )));
            }
            let mut handle = 0;
            device.check("cuDeviceGet", (f.cuDeviceGet)(&mut handle, index as c_int))?;
            (device.version, device.device) = (version, handle);
        }
        use sys::CUdevice_attribute::*;
        let major = device.attribute(CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)?;
        let minor = device.attribute(CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)?;
        device.architecture = (10 * major + minor).unsigned_abs();
        let multiprocessors = device.attribute(CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)?;
        device.multiprocessors = multiprocessors.max(1).unsigned_abs();
        let shared = device.attribute(CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN)?;
        device.shared = shared.max(0).unsigned_abs() as usize;
        device.integrated = device.attribute(CU_DEVICE_ATTRIBUTE_INTEGRATED)? != 0;
        let mut context = null_mut();
        let f = &device.functions;
        // SAFETY: as above; a context that was retained is released when this is dropped.
        let status = unsafe { (f.cuDevicePrimaryCtxRetain)(&mut context, device.device) };
        device.check("cuDevicePrimaryCtxRetain", status)?;
        device.context = context;
        Shared::new(device)
    }

    fn attribute(&self, attribute: sys::CUdevice_attribute) -> Result<c_int> {
        let mut value = 0;
        // SAFETY: a place for the result.
        let status =
            unsafe { (self.functions.cuDeviceGetAttribute)(&mut value, attribute, self.device) };
        self.check("cuDeviceGetAttribute", status)?;
        Ok(value)
    }

    /// Whether the driver runs graphs, and graphs whose nodes the device may leave out.
    pub fn has_graphs(&self) -> bool {
        let f = &self.functions;
        // `cuGraphAddKernelNode_v2` came with 12.0.
        self.version >= 12000
            && f.cuGraphCreate.is_some()
            && f.cuGraphDestroy.is_some()
            && f.cuGraphAddKernelNode_v2.is_some()
            && f.cuGraphAddMemcpyNode.is_some()
            && f.cuGraphInstantiateWithFlags.is_some()
            && f.cuGraphExecDestroy.is_some()
            && f.cuGraphUpload.is_some()
            && f.cuGraphLaunch.is_some()
    }

    /// Whether there are tensor cores for halves with sums in single precision.
    pub fn has_tensor_cores(&self) -> bool {
        self.architecture >= 80
    }

    /// Bytes of dynamic shared memory that a product may have, beside what it declares.
    pub fn product_shared(&self) -> usize {
        /// The most that one declares, and what the driver takes.
        const DECLARED: usize = 2 << 10;
        self.shared.saturating_sub(DECLARED)
    }

    /// Whether a multiprocessor has room for two blocks of so many bytes of dynamic shared memory. Of each block it has a
    /// KiB, and one more than a block can have.
    pub fn fits_twice(&self, shared: usize) -> bool {
        2 * (shared + 1024) <= self.shared + 1024
    }

    /// Whether a kernel can begin before the one before it has ended. The images for 9.0 are made for it.
    pub fn can_overlap(&self) -> bool {
        self.has_graphs()
            && self.version >= 12030
            && self.architecture == 90
            && self.functions.cuGraphAddNode_v2.is_some()
    }

    pub fn has_conditionals(&self) -> bool {
        let f = &self.functions;
        // `cuGraphAddNode_v2` came with 12.3, conditional nodes work as documented since 12.4.
        self.has_graphs()
            && self.version >= 12040
            && f.cuGraphAddNode_v2.is_some()
            && f.cuGraphConditionalHandleCreate.is_some()
    }

    /// An error for a status other than 0.
    pub fn check(&self, call: &str, status: Status) -> Result<()> {
        match status {
            0 => Ok(()),
            OUT_OF_MEMORY => Err(Error::device(format_args!(
                "the GPU is out of memory ({call}); plan a smaller context or fewer sequences"
            ))),
            _ => Err(Error::device(format_args!(
                "{call} failed: {} ({status}: {})",
                self.text(self.functions.cuGetErrorString, status),
                self.text(self.functions.cuGetErrorName, status),
            ))),
        }
    }

    fn text(
        &self,
        function: unsafe extern "system" fn(Status, *mut *const c_char) -> Status,
        status: Status,
    ) -> &str {
        let mut text: *const c_char = null();
        // SAFETY: a place for the result, which is a text that lives as long as the driver.
        let known = unsafe { function(status, &mut text) } == 0 && !text.is_null();
        match known {
            // SAFETY: a C string by the driver's word.
            true => unsafe { CStr::from_ptr(text) }.to_str().unwrap_or(""),
            false => "unknown",
        }
    }

    /// Makes the device's context the current one until the result is dropped; the caller's own comes
    /// back then.
    pub fn enter(&self) -> Result<Entered<'_>> {
        // SAFETY: the context is retained.
        let status = unsafe { (self.functions.cuCtxPushCurrent_v2)(self.context) };
        self.check("cuCtxPushCurrent", status)?;
        Ok(Entered(self))
    }

    /// Free and all bytes of the device's memory.
    pub fn memory(&self) -> Result<(usize, usize)> {
        let entered = self.enter()?;
        let (mut free, mut total) = (0, 0);
        // SAFETY: places for the results.
        let status = unsafe { (entered.0.functions.cuMemGetInfo_v2)(&mut free, &mut total) };
        self.check("cuMemGetInfo", status)?;
        Ok((free, total))
    }
}

impl Drop for Device {
    fn drop(&mut self) {
        if !self.context.is_null() {
            // SAFETY: retained in `open`, and all that lived in it is gone: it held a `Shared`.
            unsafe { (self.functions.cuDevicePrimaryCtxRelease_v2)(self.device) };
        }
    }
}

/// The device's context is the current one.
pub(super) struct Entered<'a>(&'a Device);

impl Drop for Entered<'_> {
    fn drop(&mut self) {
        let mut context = null_mut();
        // SAFETY: takes back what `enter` pushed.
        unsafe { (self.0.functions.cuCtxPopCurrent_v2)(&mut context) };
    }
}
