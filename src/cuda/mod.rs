//! The CUDA side of the rooms: the one registry of kernels, and launches.
//!
//! Kernels run on the current stream of the tensor's device; nothing here waits for the device or copies to the host.

mod buffer;
mod workspace;

pub(crate) use buffer::{Buffer, Section, Sections, allocate, allocate_plain};
pub(crate) use workspace::{signals, workspace};

use candle_core::cuda_backend::CudaDType;
use candle_core::cuda_backend::cudarc::driver::{CudaContext, CudaFunction, CudaModule, CudaSlice, DeviceRepr, sys};
use candle_core::cuda_backend::cudarc::nvrtc::Ptx;
use candle_core::{CudaDevice, Result, Storage, bail};
use std::collections::HashMap;
use std::ffi::c_void;
use std::sync::{Arc, LazyLock, Mutex, MutexGuard, PoisonError};

/// The fat binaries that the build made.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) enum Binary {
    Routing,
    RoutingBackward,
    Order,
    Routed,
    PerfectRouter,
    Experts,
    ExpertsResident,
    ExpertsSingle,
    ExpertsPack,
    ExpertsGather,
    ExpertsHome,
    ExpertsLinear,
    ExpertsTiled,
    Block,
    Peer,
}

impl Binary {
    fn bytes(self) -> &'static [u8] {
        macro_rules! built {
            ($name:literal) => {
                include_bytes!(concat!(env!("OUT_DIR"), "/", $name, ".fatbin"))
            };
        }
        match self {
            Self::Routing => built!("routing_topk"),
            Self::RoutingBackward => built!("routing_backward"),
            Self::Order => built!("order_order"),
            Self::Routed => built!("order_routed"),
            Self::PerfectRouter => built!("perfect_router_logits"),
            Self::Experts => built!("experts_general"),
            Self::ExpertsResident => built!("experts_resident"),
            Self::ExpertsSingle => built!("experts_single"),
            Self::ExpertsPack => built!("experts_pack"),
            Self::ExpertsGather => built!("experts_gather"),
            Self::ExpertsHome => built!("experts_home"),
            Self::ExpertsLinear => built!("experts_linear"),
            Self::ExpertsTiled => built!("experts_tiled"),
            Self::Block => built!("block_block"),
            Self::Peer => built!("ep_peer"),
        }
    }
}

/// What launches are sized by.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Properties {
    pub(crate) num_multiprocessors: usize,
    /// Bytes of shared memory that a block can have.
    pub(crate) max_shared: usize,
    /// Whether device and kernels know clusters of blocks, and kernels that start before the previous one has ended.
    pub(crate) has_clusters: bool,
    /// Whether device and kernels have what only compute capability 9.0 has: `wgmma`, and registers that change hands.
    pub(crate) is_hopper: bool,
}

/// A loaded kernel.
#[derive(Debug, Clone)]
struct Kernel {
    function: CudaFunction,
    /// Bytes of dynamic shared memory that it may use so far.
    shared: u32,
}

/// What was loaded, by device. It lives as long as the process: a context is never taken down before.
#[derive(Default)]
struct Registry {
    properties: HashMap<usize, Properties>,
    modules: HashMap<(usize, Binary), Arc<CudaModule>>,
    kernels: HashMap<(usize, Binary), HashMap<String, Kernel>>,
}

static REGISTRY: LazyLock<Mutex<Registry>> = LazyLock::new(Mutex::default);

fn registry() -> MutexGuard<'static, Registry> {
    // Every entry is whole before it is in.
    REGISTRY.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Dynamic shared memory that every kernel may use without asking.
const FREE_SHARED: u32 = 48 * 1024;
/// The first compute capability with clusters.
const CLUSTERS: i32 = 90;

/// How a kernel is launched.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Launch {
    pub(crate) blocks: usize,
    pub(crate) threads: u32,
    /// Bytes of dynamic shared memory.
    pub(crate) shared: usize,
    /// Blocks of a cluster; more than one only where [`Properties::has_clusters`].
    pub(crate) cluster: u32,
    /// Whether the kernel may start before the previous one of the stream has ended, for which it waits by itself. Without
    /// effect where there is no [`Properties::has_clusters`].
    pub(crate) starts_early: bool,
    /// Whether all blocks must be there at once, since they wait for each other.
    pub(crate) cooperative: bool,
}

impl Launch {
    pub(crate) fn new(blocks: usize, threads: u32, shared: usize) -> Self {
        Self { blocks, threads, shared, cluster: 1, starts_early: false, cooperative: false }
    }
}

/// Launches kernel `name` of `binary` on the current stream of `device`, with one argument that is passed by value.
///
/// # Safety
/// `arguments` is laid out as the kernel's only parameter, and every pointer in it is memory of `device` that is large
/// enough for what the kernel does with it and stays alive until the stream has run it. A kernel that starts early waits for
/// the previous one before it reads what that one writes.
pub(crate) unsafe fn launch<A: DeviceRepr>(
    device: &CudaDevice,
    binary: Binary,
    name: &str,
    launch: Launch,
    mut arguments: A,
) -> Result<()> {
    let blocks = match u32::try_from(launch.blocks) {
        Ok(blocks) if blocks <= i32::MAX as u32 => blocks,
        _ => bail!("cuda: kernel {name} needs {} blocks, expected at most {}", launch.blocks, i32::MAX),
    };
    let stream = device.cuda_stream();
    let context = stream.context();
    bind(context)?;
    let has_clusters = properties(device)?.has_clusters;
    let Ok(shared) = u32::try_from(launch.shared) else { bail!("cuda: kernel {name} needs {launch:?}") };
    let function = registry().kernel(context, binary, name, shared)?.function;
    // SAFETY: a C structure that is valid when it is zero; so are the attributes.
    let zeroed = || unsafe { std::mem::zeroed::<sys::CUlaunchAttribute>() };
    let mut attributes = [zeroed(), zeroed(), zeroed()];
    let mut num_attributes = 0;
    if launch.cluster > 1 {
        let attribute = &mut attributes[num_attributes];
        attribute.id = sys::CUlaunchAttributeID::CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION;
        attribute.value.clusterDim.x = launch.cluster;
        attribute.value.clusterDim.y = 1;
        attribute.value.clusterDim.z = 1;
        num_attributes += 1;
    }
    if launch.starts_early && has_clusters {
        let attribute = &mut attributes[num_attributes];
        attribute.id = sys::CUlaunchAttributeID::CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION;
        attribute.value.programmaticStreamSerializationAllowed = 1;
        num_attributes += 1;
    }
    if launch.cooperative {
        let attribute = &mut attributes[num_attributes];
        attribute.id = sys::CUlaunchAttributeID::CU_LAUNCH_ATTRIBUTE_COOPERATIVE;
        attribute.value.cooperative = 1;
        num_attributes += 1;
    }
    let config = sys::CUlaunchConfig {
        gridDimX: blocks,
        gridDimY: 1,
        gridDimZ: 1,
        blockDimX: launch.threads,
        blockDimY: 1,
        blockDimZ: 1,
        sharedMemBytes: shared,
        hStream: stream.cu_stream(),
        attrs: attributes.as_mut_ptr(),
        numAttrs: num_attributes as u32,
    };
    let mut parameters: [*mut c_void; 1] = [(&raw mut arguments).cast()];
    // SAFETY: the handle belongs to the device's context, which is current; `config`, `attributes` and `parameters` outlive
    // the call, which copies them; what the kernel does with the arguments is the caller's promise.
    let status = unsafe {
        sys::cuLaunchKernelEx(&config, function.cu_function(), parameters.as_mut_ptr(), std::ptr::null_mut())
    };
    match status {
        sys::CUresult::CUDA_SUCCESS => Ok(()),
        status => bail!("cuda: kernel {name} was not launched: {status:?}"),
    }
}

/// What `device` has, asked for once.
pub(crate) fn properties(device: &CudaDevice) -> Result<Properties> {
    use sys::CUdevice_attribute::*;
    let stream = device.cuda_stream();
    let context = stream.context();
    let mut registry = registry();
    if let Some(properties) = registry.properties.get(&context.ordinal()) {
        return Ok(*properties);
    }
    bind(context)?;
    let attribute = |which| match context.attribute(which) {
        Ok(value) => Ok(value),
        Err(error) => bail!("cuda: device {} does not say {which:?}: {error}", context.ordinal()),
    };
    let major = attribute(CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)?;
    let compiled_for = match registry.kernel(context, Binary::Order, "place", 0)?.function.ptx_version() {
        Ok(version) => version,
        Err(error) => bail!("cuda: a kernel does not say what it was compiled for: {error}"),
    };
    let properties = Properties {
        num_multiprocessors: attribute(CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)?.max(1) as usize,
        max_shared: attribute(CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN)?.max(0) as usize,
        has_clusters: major * 10 >= CLUSTERS && compiled_for >= CLUSTERS,
        is_hopper: major * 10 == CLUSTERS && compiled_for == CLUSTERS,
    };
    registry.properties.insert(context.ordinal(), properties);
    Ok(properties)
}

/// Bytes of shared memory, or an error that says what needs them.
pub(crate) fn checked_shared(device: &CudaDevice, op: &str, what: &str, bytes: usize) -> Result<usize> {
    let limit = properties(device)?.max_shared;
    if bytes > limit {
        bail!("{op}: {what} takes {bytes} bytes of shared memory on CUDA, expected at most {limit}")
    }
    Ok(bytes)
}

/// The elements of a tensor's storage on CUDA.
pub(crate) fn slice_of<'a, T: CudaDType>(storage: &'a Storage, op: &str, argument: &str) -> Result<&'a CudaSlice<T>> {
    match storage {
        Storage::Cuda(storage) => storage.as_cuda_slice::<T>(),
        _ => bail!("{op}: {argument} is not on a CUDA device"),
    }
}

fn bind(context: &Arc<CudaContext>) -> Result<()> {
    match context.bind_to_thread() {
        Ok(()) => Ok(()),
        Err(error) => bail!("cuda: device {} cannot be used: {error}", context.ordinal()),
    }
}

impl Registry {
    /// The kernel, loaded at its first use on a device, with room for `shared` bytes. The context is current.
    fn kernel(&mut self, context: &Arc<CudaContext>, binary: Binary, name: &str, shared: u32) -> Result<Kernel> {
        let place = (context.ordinal(), binary);
        if !self.kernels.get(&place).is_some_and(|kernels| kernels.contains_key(name)) {
            let module = match self.modules.get(&place) {
                Some(module) => module.clone(),
                None => self.modules.entry(place).or_insert(load(context, binary)?).clone(),
            };
            let function = match module.load_function(name) {
                Ok(function) => function,
                Err(error) => bail!("cuda: kernel {name} is not in {binary:?}: {error}"),
            };
            let kernel = Kernel { function, shared: FREE_SHARED };
            self.kernels.entry(place).or_default().insert(name.into(), kernel);
        }
        let Some(kernel) = self.kernels.get_mut(&place).and_then(|kernels| kernels.get_mut(name)) else {
            bail!("cuda: kernel {name} is not in {binary:?}")
        };
        if shared > kernel.shared {
            let attribute = sys::CUfunction_attribute_enum::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
            if let Err(error) = kernel.function.set_attribute(attribute, shared as i32) {
                bail!("cuda: kernel {name} needs {shared} bytes of shared memory: {error}")
            }
            kernel.shared = shared;
        }
        Ok(kernel.clone())
    }
}

fn load(context: &Arc<CudaContext>, binary: Binary) -> Result<Arc<CudaModule>> {
    match context.load_module(Ptx::from_binary(binary.bytes().to_vec())) {
        Ok(module) => Ok(module),
        Err(error) => bail!(
            "cuda: the kernels of {binary:?} cannot be loaded on device {}: {error}; build with its compute capability in \
             CANDLE_MOE_CUDA_ARCHS",
            context.ordinal()
        ),
    }
}
