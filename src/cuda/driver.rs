//! NVIDIA's driver, as far as it is used: safe words around a table of functions that is loaded at run
//! time, so that a machine without the driver gets an error.
//!
//! Types are cudarc's. Its functions are not used: they end in a panic where the library or a symbol is
//! missing, and take a status that a newer driver may have added for an enum.

use crate::error::{Error, Result};
use crate::memory::Shared;
use cudarc::driver::sys;
use libloading::Library;
use std::ffi::{CStr, c_char, c_int, c_uint, c_void};
use std::mem::{ManuallyDrop, zeroed};
use std::ptr::{null, null_mut};

/// A place in the device's memory.
pub(super) type Address = sys::CUdeviceptr;

/// What functions answer: 0, or the number of an error.
type Status = c_uint;

const OUT_OF_MEMORY: Status = sys::CUresult::CUDA_ERROR_OUT_OF_MEMORY as Status;

/// Says which functions there are: those that every driver since CUDA 11.4 has, and those that may be
/// missing.
macro_rules! functions {
    ($(fn $name:ident($($argument:ty),*);)* optional: $(fn $late:ident($($late_argument:ty),*);)*) => {
        #[allow(non_snake_case)] // the driver's names
        struct Functions {
            $($name: unsafe extern "system" fn($($argument),*) -> Status,)*
            $($late: Option<unsafe extern "system" fn($($late_argument),*) -> Status>,)*
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
    functions: Functions,
    context: sys::CUcontext,
    device: sys::CUdevice,
    /// As CUDA numbers it: 12060 is 12.6.
    pub version: c_int,
    /// Compute capability, 90 for 9.0.
    pub architecture: u32,
    /// Whether it shares the host's memory.
    pub integrated: bool,
    /// Never unloaded: a driver leaves threads and handlers behind.
    _library: ManuallyDrop<Library>,
}

// SAFETY: the driver's functions may be called from any thread.
unsafe impl Send for Device {}
// SAFETY: as above.
unsafe impl Sync for Device {}

/// Names of the driver's library.
#[cfg(not(windows))]
const LIBRARIES: [&str; 2] = ["libcuda.so.1", "libcuda.so"];
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
        f.cuGraphCreate.is_some()
            && f.cuGraphDestroy.is_some()
            && f.cuGraphAddKernelNode_v2.is_some()
            && f.cuGraphAddMemcpyNode.is_some()
            && f.cuGraphInstantiateWithFlags.is_some()
            && f.cuGraphExecDestroy.is_some()
            && f.cuGraphUpload.is_some()
            && f.cuGraphLaunch.is_some()
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
    fn check(&self, call: &str, status: Status) -> Result<()> {
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
    fn enter(&self) -> Result<Entered<'_>> {
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
struct Entered<'a>(&'a Device);

impl Drop for Entered<'_> {
    fn drop(&mut self) {
        let mut context = null_mut();
        // SAFETY: takes back what `enter` pushed.
        unsafe { (self.0.functions.cuCtxPopCurrent_v2)(&mut context) };
    }
}

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
        self.device.check("cuMemcpyHtoD", status)
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

    /// Copies within the buffer; the ranges must not overlap.
    pub fn copy_within(&mut self, from: usize, to: usize, bytes: usize) -> Result<()> {
        self.check_range(from, bytes)?;
        self.check_range(to, bytes)?;
        let _entered = self.device.enter()?;
        // SAFETY: both ranges exist.
        let status =
            unsafe { (self.device.functions.cuMemcpyDtoD_v2)(self.at(to), self.at(from), bytes) };
        self.device.check("cuMemcpyDtoD", status)
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

/// A loaded image of kernels.
pub(super) struct Module {
    device: Shared<Device>,
    handle: sys::CUmodule,
}

// SAFETY: a name that the driver gave out, good on any thread.
unsafe impl Send for Module {}
// SAFETY: as above.
unsafe impl Sync for Module {}

/// A kernel of a [`Module`] that is alive.
#[derive(Clone, Copy)]
pub(super) struct Function(sys::CUfunction);

// SAFETY: a name that the driver gave out, good on any thread.
unsafe impl Send for Function {}
// SAFETY: as above.
unsafe impl Sync for Function {}

impl Module {
    /// `image` is a cubin, or PTX with a zero byte at its end.
    pub fn new(device: &Shared<Device>, image: &[u8]) -> Result<Self> {
        let _entered = device.enter()?;
        let mut handle = null_mut();
        // SAFETY: an image of our own; the driver finds its end by its header or the zero byte.
        let status =
            unsafe { (device.functions.cuModuleLoadData)(&mut handle, image.as_ptr().cast()) };
        device.check("cuModuleLoadData", status)?;
        Ok(Module {
            device: device.clone(),
            handle,
        })
    }

    pub fn function(&self, name: &CStr) -> Result<Function> {
        let _entered = self.device.enter()?;
        let mut function = null_mut();
        // SAFETY: the module is loaded.
        let status = unsafe {
            (self.device.functions.cuModuleGetFunction)(&mut function, self.handle, name.as_ptr())
        };
        self.device.check("cuModuleGetFunction", status)?;
        Ok(Function(function))
    }

    /// Lets a kernel have so many bytes of dynamic shared memory.
    pub fn allow_shared_memory(&self, function: Function, bytes: usize) -> Result<()> {
        use sys::CUfunction_attribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES as MOST;
        let _entered = self.device.enter()?;
        // SAFETY: a function of this module.
        let status =
            unsafe { (self.device.functions.cuFuncSetAttribute)(function.0, MOST, bytes as c_int) };
        self.device.check("cuFuncSetAttribute", status)
    }
}

impl Drop for Module {
    fn drop(&mut self) {
        if let Ok(_entered) = self.device.enter() {
            // SAFETY: loaded in `new`, and nothing of it runs.
            unsafe { (self.device.functions.cuModuleUnload)(self.handle) };
        }
    }
}

/// One launch of a kernel, with its parameter by value.
pub(super) struct Launch {
    pub function: Function,
    pub grid: [u32; 3],
    /// Threads of a block.
    pub block: u32,
    /// Bytes of dynamic shared memory.
    pub shared: u32,
    /// The bytes of the one parameter, in words so that they are aligned.
    pub parameter: Box<[u64]>,
}

/// A piece of work for the device.
pub(super) enum Work {
    Launch(Launch),
    /// Copies bytes of pinned memory to the device.
    Send {
        to: Address,
        from: *const u8,
        bytes: usize,
    },
    /// Copies bytes of the device to pinned memory.
    Receive {
        to: *mut u8,
        from: Address,
        bytes: usize,
    },
    /// Work that the device does when a kernel before it has set this condition; always where the driver
    /// has no such thing. The kernels then find nothing to do.
    When {
        condition: Condition,
        work: Vec<Work>,
    },
}

/// A condition that a kernel sets, by the number that it passes to `cudaGraphSetConditional`.
#[derive(Clone, Copy, Default)]
pub(super) struct Condition(pub u64);

/// Launches that follow one another, to be started as one: a graph, or where the driver has none, one by
/// one.
pub(super) struct Program {
    device: Shared<Device>,
    stream: sys::CUstream,
    graph: sys::CUgraph,
    exec: sys::CUgraphExec,
    work: Vec<Work>,
}

// SAFETY: names that the driver gave out, good on any thread; the pointers are to pinned memory that the
// owner keeps.
unsafe impl Send for Program {}
// SAFETY: `&Program` does nothing.
unsafe impl Sync for Program {}

impl Program {
    /// An empty one.
    pub fn new(device: &Shared<Device>) -> Result<Self> {
        let _entered = device.enter()?;
        let f = &device.functions;
        let mut program = Program {
            device: device.clone(),
            stream: null_mut(),
            graph: null_mut(),
            exec: null_mut(),
            work: Vec::new(),
        };
        /// CU_STREAM_NON_BLOCKING: other work of the host program is not waited for.
        const NON_BLOCKING: c_uint = 1;
        // SAFETY: a place for the result; destroyed when `program` is dropped.
        let status = unsafe { (f.cuStreamCreate)(&mut program.stream, NON_BLOCKING) };
        device.check("cuStreamCreate", status)?;
        if device.has_graphs()
            && let Some(create) = f.cuGraphCreate
        {
            // SAFETY: as above.
            let status = unsafe { create(&mut program.graph, 0) };
            device.check("cuGraphCreate", status)?;
        }
        Ok(program)
    }

    /// A new condition, false at each start; none where the driver has no conditional nodes.
    pub fn condition(&mut self) -> Result<Condition> {
        let create = self.device.functions.cuGraphConditionalHandleCreate;
        let (Some(create), true) = (create, self.device.has_conditionals()) else {
            return Ok(Condition::default());
        };
        /// CU_GRAPH_COND_ASSIGN_DEFAULT: set to the default at each start.
        const ASSIGN_DEFAULT: c_uint = 1;
        let _entered = self.device.enter()?;
        let mut handle = 0;
        // SAFETY: a place for the result.
        let status = unsafe {
            create(
                &mut handle,
                self.graph,
                self.device.context,
                0,
                ASSIGN_DEFAULT,
            )
        };
        self.device
            .check("cuGraphConditionalHandleCreate", status)?;
        Ok(Condition(handle))
    }

    /// What this program does from now on.
    ///
    /// # Safety
    /// The work's kernels stay within memory that lives as long as this program.
    pub unsafe fn set(&mut self, work: Vec<Work>) -> Result<()> {
        self.work = work;
        if self.graph.is_null() {
            return Ok(());
        }
        let _entered = self.device.enter()?;
        self.add(self.graph, &mut null_mut(), &self.work)?;
        let f = &self.device.functions;
        let (Some(instantiate), Some(upload)) = (f.cuGraphInstantiateWithFlags, f.cuGraphUpload)
        else {
            return Ok(());
        };
        // SAFETY: a whole graph; the result is destroyed when this is dropped.
        let status = unsafe { instantiate(&mut self.exec, self.graph, 0) };
        self.device.check("cuGraphInstantiate", status)?;
        // SAFETY: just made.
        let status = unsafe { upload(self.exec, self.stream) };
        self.device.check("cuGraphUpload", status)
    }

    /// Adds nodes to a graph, each after the one before, the first after `last`.
    fn add(&self, graph: sys::CUgraph, last: &mut sys::CUgraphNode, work: &[Work]) -> Result<()> {
        let f = &self.device.functions;
        let (Some(add_kernel), Some(add_copy)) =
            (f.cuGraphAddKernelNode_v2, f.cuGraphAddMemcpyNode)
        else {
            return Ok(());
        };
        for piece in work {
            let before = *last;
            let (dependencies, count) = match before.is_null() {
                true => (null(), 0),
                false => (&raw const before, 1),
            };
            match piece {
                Work::Launch(launch) => {
                    let mut parameters = [launch.parameter.as_ptr().cast_mut().cast::<c_void>()];
                    let [x, y, z] = launch.grid;
                    let params = sys::CUDA_KERNEL_NODE_PARAMS {
                        func: launch.function.0,
                        gridDimX: x,
                        gridDimY: y,
                        gridDimZ: z,
                        blockDimX: launch.block,
                        blockDimY: 1,
                        blockDimZ: 1,
                        sharedMemBytes: launch.shared,
                        kernelParams: parameters.as_mut_ptr(),
                        extra: null_mut(),
                        kern: null_mut(),
                        ctx: null_mut(),
                    };
                    // SAFETY: the parameter has the size that the kernel takes (a test compares them).
                    let status = unsafe { add_kernel(last, graph, dependencies, count, &params) };
                    self.device.check("cuGraphAddKernelNode", status)?;
                }
                Work::Send { .. } | Work::Receive { .. } => {
                    let copy = copy_params(piece);
                    // SAFETY: ranges that the caller of `set` vouches for.
                    let status = unsafe {
                        add_copy(last, graph, dependencies, count, &copy, self.device.context)
                    };
                    self.device.check("cuGraphAddMemcpyNode", status)?;
                }
                Work::When { condition, work } => {
                    let Some(add) = f.cuGraphAddNode_v2.filter(|_| condition.0 != 0) else {
                        // Always: the kernels look themselves.
                        self.add(graph, last, work)?;
                        continue;
                    };
                    // SAFETY: plain numbers and pointers.
                    let mut params: sys::CUgraphNodeParams = unsafe { zeroed() };
                    params.type_ = sys::CUgraphNodeType::CU_GRAPH_NODE_TYPE_CONDITIONAL;
                    params.__bindgen_anon_1.conditional = sys::CUDA_CONDITIONAL_NODE_PARAMS {
                        handle: condition.0,
                        type_: sys::CUgraphConditionalNodeType::CU_GRAPH_COND_TYPE_IF,
                        size: 1,
                        phGraph_out: null_mut(),
                        ctx: self.device.context,
                    };
                    // SAFETY: the driver writes the place of the body's graph.
                    let status =
                        unsafe { add(last, graph, dependencies, null(), count, &mut params) };
                    self.device.check("cuGraphAddNode", status)?;
                    // SAFETY: the variant that was just written, and filled in by the driver.
                    let body = unsafe { params.__bindgen_anon_1.conditional.phGraph_out };
                    if body.is_null() {
                        return Err(Error::device("the driver gave a conditional node no body"));
                    }
                    // SAFETY: an array of `size` graphs.
                    self.add(unsafe { *body }, &mut null_mut(), work)?;
                }
            }
        }
        Ok(())
    }

    /// Does the work and waits for its end.
    pub fn run(&mut self) -> Result<()> {
        let _entered = self.device.enter()?;
        let f = &self.device.functions;
        match f.cuGraphLaunch {
            Some(launch) if !self.exec.is_null() => {
                // SAFETY: instantiated, and what it uses is alive.
                let status = unsafe { launch(self.exec, self.stream) };
                self.device.check("cuGraphLaunch", status)?;
            }
            _ => self.start(&self.work)?,
        }
        // SAFETY: the program's stream.
        let status = unsafe { (f.cuStreamSynchronize)(self.stream) };
        self.device.check("cuStreamSynchronize", status)
    }

    /// Starts work piece by piece.
    fn start(&self, work: &[Work]) -> Result<()> {
        let f = &self.device.functions;
        for piece in work {
            // SAFETY: what the caller of `set` vouches for.
            let (call, status) = unsafe {
                match piece {
                    Work::Launch(launch) => {
                        let mut parameters =
                            [launch.parameter.as_ptr().cast_mut().cast::<c_void>()];
                        let [x, y, z] = launch.grid;
                        let status = (f.cuLaunchKernel)(
                            launch.function.0,
                            x,
                            y,
                            z,
                            launch.block,
                            1,
                            1,
                            launch.shared,
                            self.stream,
                            parameters.as_mut_ptr(),
                            null_mut(),
                        );
                        ("cuLaunchKernel", status)
                    }
                    Work::Send { to, from, bytes } => (
                        "cuMemcpyHtoDAsync",
                        (f.cuMemcpyHtoDAsync_v2)(*to, from.cast(), *bytes, self.stream),
                    ),
                    Work::Receive { to, from, bytes } => (
                        "cuMemcpyDtoHAsync",
                        (f.cuMemcpyDtoHAsync_v2)(to.cast(), *from, *bytes, self.stream),
                    ),
                    Work::When { work, .. } => {
                        self.start(work)?;
                        continue;
                    }
                }
            };
            self.device.check(call, status)?;
        }
        Ok(())
    }
}

/// A copy as graphs want it: one row of a cuboid.
fn copy_params(piece: &Work) -> sys::CUDA_MEMCPY3D {
    use sys::CUmemorytype::{CU_MEMORYTYPE_DEVICE, CU_MEMORYTYPE_HOST};
    // SAFETY: plain numbers and pointers; the two types are numbers that exist, set below.
    let mut copy: sys::CUDA_MEMCPY3D = unsafe {
        let mut copy = std::mem::MaybeUninit::<sys::CUDA_MEMCPY3D>::zeroed();
        (&raw mut (*copy.as_mut_ptr()).srcMemoryType).write(CU_MEMORYTYPE_HOST);
        (&raw mut (*copy.as_mut_ptr()).dstMemoryType).write(CU_MEMORYTYPE_DEVICE);
        copy.assume_init()
    };
    (copy.Height, copy.Depth) = (1, 1);
    match piece {
        Work::Send { to, from, bytes } => {
            copy.srcHost = from.cast();
            copy.dstDevice = *to;
            copy.WidthInBytes = *bytes;
        }
        Work::Receive { to, from, bytes } => {
            copy.srcMemoryType = CU_MEMORYTYPE_DEVICE;
            copy.srcDevice = *from;
            copy.dstMemoryType = CU_MEMORYTYPE_HOST;
            copy.dstHost = to.cast();
            copy.WidthInBytes = *bytes;
        }
        Work::Launch(_) | Work::When { .. } => {}
    }
    copy
}

impl Drop for Program {
    fn drop(&mut self) {
        let Ok(_entered) = self.device.enter() else {
            return;
        };
        let f = &self.device.functions;
        // SAFETY: made in `new` and `set`; the stream is empty, for `run` waits for it, but after an
        // error, where waiting is all that can be done.
        unsafe {
            if !self.stream.is_null() {
                (f.cuStreamSynchronize)(self.stream);
            }
            if let (Some(destroy), false) = (f.cuGraphExecDestroy, self.exec.is_null()) {
                destroy(self.exec);
            }
            if let (Some(destroy), false) = (f.cuGraphDestroy, self.graph.is_null()) {
                destroy(self.graph);
            }
            if !self.stream.is_null() {
                (f.cuStreamDestroy_v2)(self.stream);
            }
        }
    }
}
