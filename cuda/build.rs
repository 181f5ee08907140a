//! Compiles the CUDA kernels of the feature `cuda`: one fat binary for each entry of the table.
//!
//! * `CANDLE_MOE_CUDA_ARCHS`: compute capabilities, separated by commas; else `CUDA_COMPUTE_CAP`, which Candle's own
//!   kernels use; else 80 and 90. Each gets machine code, 9.0 with the instructions that only it has; the highest gets PTX
//!   too, which newer devices compile for themselves.
//! * `NVCC`, `CUDA_HOME`, `CUDA_PATH`, `PATH`: where the compiler is sought, in this order.
//! * `CANDLE_MOE_CUDA_VERBOSE=1`: shows what the compiler says of registers and spills; it is always in `OUT_DIR`.

use std::env;
use std::fs;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::io;
use std::path::{Path, PathBuf};
use std::process::{Command, exit};
use std::thread;

/// The kernels: room and file.
const KERNELS: [(&str, &str); 15] = [
    ("routing", "topk"),
    ("routing", "backward"),
    ("order", "order"),
    ("order", "routed"),
    ("perfect_router", "logits"),
    ("experts", "general"),
    ("experts", "resident"),
    ("experts", "single"),
    ("experts", "pack"),
    ("experts", "gather"),
    ("experts", "home"),
    ("experts", "linear"),
    ("experts", "tiled"),
    ("block", "block"),
    ("ep", "peer"),
];

/// Least compute capability that the kernels are written for.
const LEAST: u32 = 80;

fn main() {
    println!("cargo:rerun-if-changed=cuda");
    for variable in
        ["CANDLE_MOE_CUDA_ARCHS", "CUDA_COMPUTE_CAP", "CANDLE_MOE_CUDA_VERBOSE", "NVCC", "CUDA_HOME", "CUDA_PATH"]
    {
        println!("cargo:rerun-if-env-changed={variable}");
    }
    if env::var_os("CARGO_FEATURE_CUDA").is_none() {
        return;
    }
    let nvcc = nvcc();
    let targets = targets(&capabilities());
    let out = PathBuf::from(env::var_os("OUT_DIR").unwrap_or_default());
    let compiled: Vec<_> = thread::scope(|scope| {
        let compile = |(room, name)| {
            let (nvcc, targets, out) = (&nvcc, &targets, &out);
            scope.spawn(move || compile(nvcc, targets, out, room, name))
        };
        let threads: Vec<_> = KERNELS.map(compile).into_iter().collect();
        threads
            .into_iter()
            .map(|thread| thread.join().unwrap_or_else(|_| Err("the compiler's thread panicked".into())))
            .collect()
    });
    for result in compiled {
        if let Err(error) = result {
            fail(&error);
        }
    }
}

/// Compiles `cuda/ROOM/NAME.cu` to `OUT_DIR/ROOM_NAME.fatbin`, unless it was compiled from the same text in the same way.
fn compile(nvcc: &Path, targets: &[String], out: &Path, room: &str, name: &str) -> Result<(), String> {
    let source = format!("cuda/{room}/{name}.cu");
    let compiled_from = out.join(format!("{room}_{name}.from"));
    let fingerprint = fingerprint(nvcc, targets, Path::new(&source)).map_err(|error| error.to_string())?;
    if fs::read_to_string(&compiled_from).is_ok_and(|old| old == fingerprint) {
        return Ok(());
    }
    let output = Command::new(nvcc)
        .args(["-O3", "--std=c++17", "-fatbin", "-lineinfo", "-Xptxas", "-v", "-I", "cuda"])
        // Routing must give the bits of the CPU.
        .args(["-fmad=false", "-prec-div=true", "-prec-sqrt=true", "-ftz=false"])
        .args(targets)
        .arg("-o")
        .arg(out.join(format!("{room}_{name}.fatbin")))
        .arg(&source)
        .output()
        .map_err(|error| format!("{}: {error}", nvcc.display()))?;
    let report = String::from_utf8_lossy(&output.stderr);
    if !output.status.success() {
        return Err(format!("{source} does not compile:\n{report}{}", String::from_utf8_lossy(&output.stdout)));
    }
    if env::var_os("CANDLE_MOE_CUDA_VERBOSE").is_some_and(|value| value == "1") {
        report.lines().for_each(|line| println!("cargo:warning={line}"));
    }
    fs::write(out.join(format!("{room}_{name}.txt")), report.as_bytes())
        .and_then(|()| fs::write(compiled_from, fingerprint))
        .map_err(|error| error.to_string())
}

/// All that the machine code follows from: this script, the compiler, the targets, the source and the headers that it includes.
fn fingerprint(nvcc: &Path, targets: &[String], source: &Path) -> io::Result<String> {
    let mut files = vec![PathBuf::from("cuda/build.rs"), source.to_path_buf()];
    let mut hasher = DefaultHasher::new();
    (nvcc, fs::metadata(nvcc)?.modified()?, targets).hash(&mut hasher);
    let mut next = 0;
    while let Some(file) = files.get(next).cloned() {
        let text = fs::read_to_string(&file)?;
        (&file, &text).hash(&mut hasher);
        let included = text.lines().filter_map(|line| line.trim_start().strip_prefix("#include \""));
        for header in included.filter_map(|rest| rest.split('"').next()).map(|header| Path::new("cuda").join(header)) {
            // Those of the emulator are no files of a device's code.
            if header.is_file() && !files.contains(&header) {
                files.push(header);
            }
        }
        next += 1;
    }
    Ok(format!("{:016x}", hasher.finish()))
}

/// The requested compute capabilities, ascending.
fn capabilities() -> Vec<u32> {
    let requested = env::var("CANDLE_MOE_CUDA_ARCHS").or_else(|_| env::var("CUDA_COMPUTE_CAP"));
    let requested = requested.unwrap_or_else(|_| "80,90".into());
    let parse = |text: &str| match text.trim().replace('.', "").trim_end_matches('a').parse::<u32>() {
        Ok(capability) if capability >= LEAST => capability,
        _ => fail(&format!("compute capability {text:?}: expected {LEAST} or more, as in CANDLE_MOE_CUDA_ARCHS=80,90")),
    };
    let mut capabilities: Vec<_> = requested.split(',').map(parse).collect();
    capabilities.sort_unstable();
    capabilities.dedup();
    capabilities
}

fn targets(capabilities: &[u32]) -> Vec<String> {
    let machine_code = |capability: &u32| {
        // Instructions of 9.0 alone need the architecture that promises no successor.
        let name = if *capability == 90 { "90a".to_string() } else { capability.to_string() };
        format!("-gencode=arch=compute_{name},code=sm_{name}")
    };
    let highest = capabilities.last().copied().unwrap_or(LEAST);
    let ptx = format!("-gencode=arch=compute_{highest},code=compute_{highest}");
    capabilities.iter().map(machine_code).chain([ptx]).collect()
}

fn nvcc() -> PathBuf {
    let in_folder = |variable| env::var_os(variable).map(|folder| PathBuf::from(folder).join("bin").join("nvcc"));
    let on_path = env::split_paths(&env::var_os("PATH").unwrap_or_default())
        .map(|folder| folder.join("nvcc"))
        .collect::<Vec<_>>();
    let places = [env::var_os("NVCC").map(PathBuf::from), in_folder("CUDA_HOME"), in_folder("CUDA_PATH")];
    let places = places.into_iter().flatten().chain(on_path).chain([PathBuf::from("/usr/local/cuda/bin/nvcc")]);
    places.into_iter().find(|place| place.is_file()).unwrap_or_else(|| {
        fail(
            "the feature `cuda` needs nvcc, which is not in NVCC, CUDA_HOME/bin, CUDA_PATH/bin, PATH or /usr/local/cuda/bin; \
             install the CUDA toolkit (12 or newer), or on a machine without a GPU run: eval \"$(scripts/cuda-toolchain DIR)\"",
        )
    })
}

fn fail(message: &str) -> ! {
    eprintln!("error: {message}");
    exit(1)
}
