//! Kernels, and launches of them that follow one another: a graph, where the driver has graphs.

use super::driver::{Address, Device};
use super::params::Parameter;
use crate::error::{Error, Result};
use crate::memory::{Shared, try_push};
use cudarc::driver::sys;
use std::ffi::{CStr, c_int, c_uint, c_void};
use std::marker::PhantomData;
use std::mem::zeroed;
use std::ptr::{null, null_mut};

/// A loaded image of kernels.
pub(super) struct Module {
    device: Shared<Device>,
    handle: sys::CUmodule,
    waits: bool,
}

// SAFETY: a name that the driver gave out, good on any thread.
unsafe impl Send for Module {}
// SAFETY: as above.
unsafe impl Sync for Module {}

/// A kernel of a [`Module`] that is alive, and whose one parameter is a `P`.
pub(super) struct Function<P> {
    handle: sys::CUfunction,
    waits: bool,
    parameter: PhantomData<fn(P)>,
}

impl<P> Clone for Function<P> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<P> Copy for Function<P> {}

impl Module {
    /// `image` is a cubin, or PTX with a zero byte at its end. `waits`: its kernels wait for those before
    /// them (`wait_for_previous` in device.cuh), so that they may begin before these have ended.
    pub fn new(device: &Shared<Device>, image: &[u8], waits: bool) -> Result<Self> {
        let _entered = device.enter()?;
        let mut handle = null_mut();
        // SAFETY: an image of our own; the driver finds its end by its header or the zero byte.
        let status =
            unsafe { (device.functions.cuModuleLoadData)(&mut handle, image.as_ptr().cast()) };
        device.check("cuModuleLoadData", status)?;
        Ok(Module {
            device: device.clone(),
            handle,
            waits,
        })
    }

    /// The kernel of this name. Where the driver tells the size of a kernel's parameter it is compared.
    pub fn function<P: Parameter>(&self, name: &CStr) -> Result<Function<P>> {
        let _entered = self.device.enter()?;
        let f = &self.device.functions;
        let mut handle = null_mut();
        // SAFETY: the module is loaded.
        let status = unsafe { (f.cuModuleGetFunction)(&mut handle, self.handle, name.as_ptr()) };
        self.device.check("cuModuleGetFunction", status)?;
        if let Some(get) = f.cuFuncGetParamInfo {
            let (mut offset, mut bytes) = (0, 0);
            // SAFETY: places for the results; every kernel has a parameter 0.
            let status = unsafe { get(handle, 0, &mut offset, &mut bytes) };
            self.device.check("cuFuncGetParamInfo", status)?;
            if bytes != size_of::<P>() {
                return Err(Error::device(format_args!(
                    "the kernel {} takes {bytes} bytes, not {}: src/cuda/images is of other sources",
                    name.to_str().unwrap_or_default(),
                    size_of::<P>()
                )));
            }
        }
        Ok(Function {
            handle,
            waits: self.waits,
            parameter: PhantomData,
        })
    }

    /// Lets a kernel have so many bytes of dynamic shared memory.
    pub fn allow_shared_memory<P>(&self, function: Function<P>, bytes: usize) -> Result<()> {
        use sys::CUfunction_attribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES as MOST;
        let _entered = self.device.enter()?;
        // SAFETY: a function of this module.
        let status = unsafe {
            (self.device.functions.cuFuncSetAttribute)(function.handle, MOST, bytes as c_int)
        };
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

/// One launch of a kernel.
pub(super) struct Launch {
    function: sys::CUfunction,
    waits: bool,
    grid: [u32; 3],
    block: u32,
    shared: u32,
    /// Where its one parameter begins, of a list's words.
    parameter: usize,
}

impl Launch {
    /// As a graph takes it; `parameters` points to the parameter's place.
    fn node(&self, parameters: *mut *mut c_void) -> sys::CUDA_KERNEL_NODE_PARAMS_v3 {
        let old = self.old_node(parameters);
        sys::CUDA_KERNEL_NODE_PARAMS_v3 {
            func: old.func,
            gridDimX: old.gridDimX,
            gridDimY: old.gridDimY,
            gridDimZ: old.gridDimZ,
            blockDimX: old.blockDimX,
            blockDimY: old.blockDimY,
            blockDimZ: old.blockDimZ,
            sharedMemBytes: old.sharedMemBytes,
            kernelParams: old.kernelParams,
            extra: old.extra,
            kern: old.kern,
            ctx: old.ctx,
        }
    }

    /// The same for drivers before 12.3.
    fn old_node(&self, parameters: *mut *mut c_void) -> sys::CUDA_KERNEL_NODE_PARAMS {
        let [x, y, z] = self.grid;
        sys::CUDA_KERNEL_NODE_PARAMS {
            func: self.function,
            gridDimX: x,
            gridDimY: y,
            gridDimZ: z,
            blockDimX: self.block,
            blockDimY: 1,
            blockDimZ: 1,
            sharedMemBytes: self.shared,
            kernelParams: parameters,
            extra: null_mut(),
            kern: null_mut(),
            ctx: null_mut(),
        }
    }
}

/// An edge between two kernels of which the second begins as soon as all blocks of the first let it, and
/// itself waits for the first to end.
const OVERLAPPING: sys::CUgraphEdgeData = sys::CUgraphEdgeData_st {
    from_port: 1, // CU_GRAPH_KERNEL_NODE_PORT_PROGRAMMATIC
    to_port: 0,
    type_: sys::CUgraphDependencyType::CU_GRAPH_DEPENDENCY_TYPE_PROGRAMMATIC as u8,
    reserved: [0; 5],
};

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

/// Pieces of work in their order, and the parameters of their launches, in words so that they are aligned.
#[derive(Default)]
pub(super) struct WorkList {
    pub work: Vec<Work>,
    parameters: Vec<u64>,
}

impl WorkList {
    pub fn push(&mut self, piece: Work) -> Result<()> {
        try_push(&mut self.work, piece)
    }

    /// `grid` blocks of `block` threads, each block with `shared` bytes of dynamic shared memory.
    pub fn launch<P: Parameter>(
        &mut self,
        function: Function<P>,
        grid: [u32; 3],
        block: u32,
        shared: u32,
        parameter: &P,
    ) -> Result<()> {
        let start = self.parameters.len();
        let words = size_of::<P>().div_ceil(8);
        let refused = |_| Error::OutOfMemory { bytes: 8 * words };
        self.parameters.try_reserve(words).map_err(refused)?;
        self.parameters.resize(start + words, 0);
        let to = self.parameters[start..].as_mut_ptr().cast::<P>();
        // SAFETY: `Parameter`s are plain numbers without padding, and there is room for one.
        unsafe { to.write(*parameter) };
        self.push(Work::Launch(Launch {
            function: function.handle,
            waits: function.waits,
            grid,
            block,
            shared,
            parameter: start,
        }))
    }

    /// Where a launch's parameter is, as the driver takes it.
    fn parameter(&self, launch: &Launch) -> *mut c_void {
        let words = &self.parameters[launch.parameter..];
        words.as_ptr().cast_mut().cast()
    }
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
    list: WorkList,
    /// [`Program::began`].
    began: bool,
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
            list: WorkList::default(),
            began: false,
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

    /// A new condition, false at each start, for a driver that has conditional nodes.
    pub fn condition(&mut self) -> Result<Condition> {
        let Some(create) = self.device.functions.cuGraphConditionalHandleCreate else {
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
    pub unsafe fn set(&mut self, list: WorkList) -> Result<()> {
        self.list = list;
        if self.graph.is_null() {
            return Ok(());
        }
        let _entered = self.device.enter()?;
        self.add(self.graph, &mut null_mut(), &self.list.work)?;
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
        // Whether the piece before is a kernel that lets the next begin.
        let mut lets_begin = false;
        for piece in work {
            let before = *last;
            let (dependencies, count) = match before.is_null() {
                true => (null(), 0),
                false => (&raw const before, 1),
            };
            let overlaps = std::mem::take(&mut lets_begin);
            match piece {
                Work::Launch(launch) => {
                    lets_begin = launch.waits && self.device.can_overlap();
                    let mut parameters = [self.list.parameter(launch)];
                    match f.cuGraphAddNode_v2.filter(|_| overlaps && launch.waits) {
                        Some(add) => {
                            // SAFETY: plain numbers and pointers.
                            let mut params: sys::CUgraphNodeParams = unsafe { zeroed() };
                            params.type_ = sys::CUgraphNodeType::CU_GRAPH_NODE_TYPE_KERNEL;
                            params.__bindgen_anon_1.kernel = launch.node(parameters.as_mut_ptr());
                            // SAFETY: the parameter is of the kernel's type; one edge.
                            let status = unsafe {
                                add(last, graph, dependencies, &OVERLAPPING, count, &mut params)
                            };
                            self.device.check("cuGraphAddNode", status)?;
                        }
                        None => {
                            let params = launch.old_node(parameters.as_mut_ptr());
                            // SAFETY: as above.
                            let status =
                                unsafe { add_kernel(last, graph, dependencies, count, &params) };
                            self.device.check("cuGraphAddKernelNode", status)?;
                        }
                    }
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

    /// Does the work and waits for its end, or after an error for the end of what had begun.
    pub fn run(&mut self) -> Result<()> {
        self.began = false;
        let _entered = self.device.enter()?;
        let f = &self.device.functions;
        let mut began = false;
        let started = match f.cuGraphLaunch {
            Some(launch) if !self.exec.is_null() => {
                // SAFETY: instantiated, and what it uses is alive.
                let status = unsafe { launch(self.exec, self.stream) };
                began = status == 0;
                self.device.check("cuGraphLaunch", status)
            }
            _ => self.start(&self.list.work, &mut began),
        };
        self.began = began;
        // SAFETY: the program's stream.
        let status = unsafe { (f.cuStreamSynchronize)(self.stream) };
        started.and(self.device.check("cuStreamSynchronize", status))
    }

    /// Whether the last run's first kernel was started, even if one after it was not.
    pub fn began(&self) -> bool {
        self.began
    }

    /// Starts work piece by piece; `began`: a kernel was.
    fn start(&self, work: &[Work], began: &mut bool) -> Result<()> {
        let f = &self.device.functions;
        for piece in work {
            // SAFETY: what the caller of `set` vouches for.
            let (call, status) = unsafe {
                match piece {
                    Work::Launch(launch) => {
                        let mut parameters = [self.list.parameter(launch)];
                        let [x, y, z] = launch.grid;
                        let status = (f.cuLaunchKernel)(
                            launch.function,
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
                        *began |= status == 0;
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
                        self.start(work, began)?;
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
