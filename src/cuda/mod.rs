//! The CUDA side of the rooms: the one registry of kernels, and launches.
//!
//! Kernels run on the current stream of the tensor's device; nothing here waits for the device or copies to the host.

use candle_core::cuda_backend::cudarc::driver::{CudaContext, CudaFunction, CudaModule, DeviceRepr, sys};
use candle_core::cuda_backend::cudarc::nvrtc::Ptx;
use candle_core::{CudaDevice, Result, bail};
use std::collections::HashMap;
use std::ffi::c_void;
use std::sync::{Arc, LazyLock, Mutex, PoisonError};

/// The fat binaries that the build made.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) enum Binary {
    Routing,
}

impl Binary {
    fn bytes(self) -> &'static [u8] {
        match self {
            Self::Routing => include_bytes!(concat!(env!("OUT_DIR"), "/routing_topk.fatbin")),
        }
    }
}

/// Loaded kernels by device. They live as long as the process: a context is never taken down before.
#[derive(Default)]
struct Registry {
    modules: HashMap<(usize, Binary), Arc<CudaModule>>,
    functions: HashMap<(usize, Binary), HashMap<String, CudaFunction>>,
}

static REGISTRY: LazyLock<Mutex<Registry>> = LazyLock::new(Mutex::default);

/// Dynamic shared memory that every kernel may use without asking.
const FREE_SHARED: u32 = 48 * 1024;

/// How a kernel is launched.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Launch {
    pub(crate) blocks: usize,
    pub(crate) threads: u32,
    /// Bytes of dynamic shared memory.
    pub(crate) shared: u32,
}

/// Launches kernel `name` of `binary` on the current stream of `device`, with one argument that is passed by value.
///
/// # Safety
/// `arguments` is laid out as the kernel's only parameter, and every pointer in it is memory of `device` that is large
/// enough for what the kernel does with it and stays alive until the stream has run it.
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
    let function = function(device, binary, name, launch.shared)?;
    let config = sys::CUlaunchConfig {
        gridDimX: blocks,
        gridDimY: 1,
        gridDimZ: 1,
        blockDimX: launch.threads,
        blockDimY: 1,
        blockDimZ: 1,
        sharedMemBytes: launch.shared,
        hStream: stream.cu_stream(),
        attrs: std::ptr::null_mut(),
        numAttrs: 0,
    };
    let mut parameters: [*mut c_void; 1] = [(&raw mut arguments).cast()];
    // SAFETY: the handle belongs to the device's context, which `function` has made current; `config` and `parameters`
    // outlive the call, which copies them; what the kernel does with the arguments is the caller's promise.
    let status = unsafe {
        sys::cuLaunchKernelEx(&config, function.cu_function(), parameters.as_mut_ptr(), std::ptr::null_mut())
    };
    match status {
        sys::CUresult::CUDA_SUCCESS => Ok(()),
        status => bail!("cuda: kernel {name} was not launched: {status:?}"),
    }
}

/// The handle of a kernel, loaded at its first use on a device.
fn function(device: &CudaDevice, binary: Binary, name: &str, shared: u32) -> Result<CudaFunction> {
    let stream = device.cuda_stream();
    let context = stream.context();
    if let Err(error) = context.bind_to_thread() {
        bail!("cuda: the device cannot be used: {error}")
    }
    let place = (context.ordinal(), binary);
    let mut registry = REGISTRY.lock().unwrap_or_else(PoisonError::into_inner);
    let Registry { modules, functions } = &mut *registry;
    let functions = functions.entry(place).or_default();
    let function = match functions.get(name) {
        Some(function) => function.clone(),
        None => {
            let module = match modules.get(&place) {
                Some(module) => module.clone(),
                None => modules.entry(place).or_insert(load(context, binary)?).clone(),
            };
            match module.load_function(name) {
                Ok(function) => functions.entry(name.into()).or_insert(function).clone(),
                Err(error) => bail!("cuda: kernel {name} is not in {binary:?}: {error}"),
            }
        }
    };
    if shared > FREE_SHARED {
        let attribute = sys::CUfunction_attribute_enum::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
        if let Err(error) = function.set_attribute(attribute, shared as i32) {
            bail!("cuda: kernel {name} needs {shared} bytes of shared memory: {error}")
        }
    }
    Ok(function)
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
