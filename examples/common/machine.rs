//! What the system says of the machine.

use std::fs::read_to_string;

/// Bytes that a program may take without pushing others out, where the system says so.
pub(crate) fn available_memory() -> Option<usize> {
    let kilobytes = field("/proc/meminfo", "MemAvailable")?;
    kilobytes.strip_suffix("kB")?.trim().parse::<usize>().ok()?.checked_mul(1024)
}

/// The name of the processor, where the system says so.
pub(crate) fn cpu_model() -> Option<String> {
    field("/proc/cpuinfo", "model name")
}

fn field(path: &str, name: &str) -> Option<String> {
    let text = read_to_string(path).ok()?;
    let mut fields = text.lines().filter_map(|line| line.split_once(':'));
    fields.find(|(key, _)| key.trim() == name).map(|(_, value)| value.trim().to_string())
}

/// What the first CUDA device calls itself.
#[cfg(feature = "cuda")]
pub(crate) fn cuda_device() -> String {
    use candle_core::cuda_backend::cudarc::driver::CudaContext;
    CudaContext::new(0).and_then(|context| context.name()).unwrap_or_else(|_| "cuda".into())
}

#[cfg(not(feature = "cuda"))]
pub(crate) fn cuda_device() -> String {
    "cuda".into()
}
