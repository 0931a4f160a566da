//! Whether a GPU can be computed on here: finds the driver's and CUDA's libraries and looks for every
//! function that is called later, so that nothing panics on the way. Opens no context.

use super::api::{self, DeviceFacts};
use std::ffi::CString;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;
use thiserror::Error;

/// CUDA 12.0: the oldest driver whose functions are all used here.
const LEAST_DRIVER: u32 = 12_000;
/// Turing: the oldest GPU that the kernels are compiled for.
const LEAST_CAPABILITY: u32 = 75;

/// Why a GPU that is there cannot be used, or that there is none.
#[derive(Clone, Debug, Error)]
pub enum GpuError {
    /// No driver or no device: nothing to mend, the CPU computes.
    #[error("{0}")]
    Absent(String),
    /// There is a GPU; this stands in the way.
    #[error("{cause}; {remedy}")]
    Unusable { cause: String, remedy: String },
}

/// A library and what is called in it.
struct Library {
    stem: &'static str,
    symbols: &'static [&'static str],
}

const DRIVER: Library = Library {
    stem: "cuda",
    symbols: &[
        "cuInit",
        "cuDriverGetVersion",
        "cuGetErrorName",
        "cuDeviceGetCount",
        "cuDeviceGet",
        "cuDeviceGetName",
        "cuDeviceGetPCIBusId",
        "cuDeviceGetAttribute",
        "cuDeviceTotalMem_v2",
        "cuDevicePrimaryCtxRetain",
        "cuDevicePrimaryCtxRelease_v2",
        "cuDevicePrimaryCtxSetFlags_v2",
        "cuCtxSetCurrent",
        "cuMemGetInfo_v2",
        "cuMemAlloc_v2",
        "cuMemFree_v2",
        "cuMemsetD8_v2",
        "cuMemHostRegister_v2",
        "cuMemHostUnregister",
        "cuMemHostGetDevicePointer_v2",
        "cuStreamCreate",
        "cuStreamDestroy_v2",
        "cuStreamWaitEvent",
        "cuStreamSynchronize",
        "cuEventCreate",
        "cuEventDestroy_v2",
        "cuEventRecord",
        "cuEventSynchronize",
        "cuEventElapsedTime",
        "cuMemcpyHtoDAsync_v2",
        "cuMemcpyDtoHAsync_v2",
        "cuMemcpyHtoD_v2",
        "cuMemcpy2DAsync_v2",
        "cuModuleLoadData",
        "cuModuleUnload",
        "cuModuleGetFunction",
        "cuLaunchKernel",
    ],
};

const CUBLAS: Library = Library {
    stem: "cublas",
    symbols: &[
        "cublasCreate_v2",
        "cublasDestroy_v2",
        "cublasSetStream_v2",
        "cublasSetWorkspace_v2",
        "cublasGetProperty",
        "cublasGemmEx",
        "cublasSgemm_v2",
    ],
};

const NVRTC: Library = Library {
    stem: "nvrtc",
    symbols: &[
        "nvrtcVersion",
        "nvrtcCreateProgram",
        "nvrtcCompileProgram",
        "nvrtcDestroyProgram",
        "nvrtcGetProgramLogSize",
        "nvrtcGetProgramLog",
        "nvrtcGetCUBINSize",
        "nvrtcGetCUBIN",
        "nvrtcGetPTXSize",
        "nvrtcGetPTX",
        "nvrtcGetNumSupportedArchs",
        "nvrtcGetSupportedArchs",
    ],
};

/// The GPU number `index`, once everything that computing on it needs has been found.
pub fn find_gpu(index: usize) -> Result<DeviceFacts, GpuError> {
    static FOUND: OnceLock<Result<usize, GpuError>> = OnceLock::new();
    let count = FOUND.get_or_init(look).clone()?;
    if index >= count {
        return Err(GpuError::Absent(format!(
            "there is no GPU number {index}: the driver shows {count}"
        )));
    }
    let facts = api::device_facts(index).map_err(|e| unusable(e.to_string(), DRIVER_REMEDY))?;
    if facts.capability < LEAST_CAPABILITY {
        let cause = format!(
            "{} has compute capability {}.{}, and the kernels need 7.5",
            facts.name,
            facts.capability / 10,
            facts.capability % 10
        );
        return Err(unusable(cause, "use another GPU (--device cuda:N)"));
    }
    Ok(facts)
}

const DRIVER_REMEDY: &str =
    "install a driver of CUDA 12.0 or later (Debian, Ubuntu: apt install nvidia-driver)";

/// Libraries, driver and number of GPUs.
fn look() -> Result<usize, GpuError> {
    match load(&DRIVER) {
        Loaded::Whole => {}
        Loaded::Missing => return Err(GpuError::Absent("no NVIDIA driver is installed".into())),
        Loaded::Lacks(path, symbol) => {
            let cause = format!("the NVIDIA driver ({path}) has no {symbol}: it is too old");
            return Err(unusable(cause, DRIVER_REMEDY));
        }
    }
    let count = api::device_count().map_err(|e| match e.text.as_str() {
        "CUDA_ERROR_NO_DEVICE" | "CUDA_ERROR_STUB_LIBRARY" => {
            GpuError::Absent("the NVIDIA driver shows no GPU".into())
        }
        _ => unusable(e.to_string(), DRIVER_REMEDY),
    })?;
    if count == 0 {
        return Err(GpuError::Absent("the NVIDIA driver shows no GPU".into()));
    }
    let driver = api::driver_version().map_err(|e| unusable(e.to_string(), DRIVER_REMEDY))?;
    if driver < LEAST_DRIVER {
        let cause = format!(
            "the NVIDIA driver knows CUDA {} only, and 12.0 is needed",
            show_version(driver)
        );
        return Err(unusable(cause, DRIVER_REMEDY));
    }
    let remedy = toolkit_remedy(driver);
    for library in [&CUBLAS, &NVRTC] {
        match load(library) {
            Loaded::Whole => {}
            Loaded::Missing => {
                let cause = format!("lib{} was not found", library.stem);
                return Err(unusable(cause, &remedy));
            }
            Loaded::Lacks(path, symbol) => {
                return Err(unusable(format!("{path} has no {symbol}"), &remedy));
            }
        }
    }
    let compiler = super::modules::compiler_version();
    let compiler = compiler.map(|(major, minor)| (major, format!("{major}.{minor}")));
    check_release(&NVRTC, compiler, (driver, &remedy))?;
    let blas = super::blas::major_version().map(|major| (major, major.to_string()));
    check_release(&CUBLAS, blas, (driver, &remedy))?;
    Ok(count)
}

/// A compiler of a newer CUDA than the driver's makes kernels that the driver refuses, and such a cuBLAS has no
/// others, and says no more than "not initialised". `release`: the library's CUDA by its first number, and in full.
fn check_release(
    library: &Library,
    release: Option<(u32, String)>,
    (driver, remedy): (u32, &str),
) -> Result<(), GpuError> {
    let stem = library.stem;
    match release {
        Some((major, shown)) if major > driver / 1000 => {
            let cause = format!(
                "lib{stem} is of CUDA {shown} and the driver of CUDA {}",
                show_version(driver)
            );
            Err(unusable(cause, remedy))
        }
        Some(_) => Ok(()),
        None => Err(unusable(
            format!("lib{stem} does not tell its version"),
            remedy,
        )),
    }
}

fn show_version(version: u32) -> String {
    format!("{}.{}", version / 1000, version % 1000 / 10)
}

/// The exact lines for this driver's CUDA.
fn toolkit_remedy(driver: u32) -> String {
    let packages = if driver >= 13_000 {
        "nvidia-cublas nvidia-cuda-nvrtc"
    } else {
        "nvidia-cublas-cu12 nvidia-cuda-nvrtc-cu12"
    };
    let major = driver / 1000;
    format!("pip install {packages} (or apt install libcublas-{major}-0 cuda-nvrtc-{major}-0)")
}

fn unusable(cause: String, remedy: &str) -> GpuError {
    GpuError::Unusable {
        cause,
        remedy: remedy.to_owned(),
    }
}

enum Loaded {
    Whole,
    Missing,
    /// Path and the function that it lacks.
    Lacks(String, &'static str),
}

/// Loads a library for good, in the order in which its caller will look for it, then from directories
/// that loaders do not search. What is loaded is found again by its name.
fn load(library: &Library) -> Loaded {
    let names = cudarc::get_lib_name_candidates(library.stem);
    let found = names
        .iter()
        .find_map(|name| Some((name.clone(), open(Path::new(name))?)));
    let found = found.or_else(|| in_directories(library.stem, &names));
    let Some((path, handle)) = found else {
        return Loaded::Missing;
    };
    let lacks = |symbol: &&&str| !has_symbol(handle, symbol);
    match library.symbols.iter().find(lacks) {
        Some(symbol) => Loaded::Lacks(path, symbol),
        None => Loaded::Whole,
    }
}

fn in_directories(stem: &str, names: &[String]) -> Option<(String, *mut libc::c_void)> {
    for dir in directories() {
        open_companions(stem, &dir);
        for name in names {
            if let Some(handle) = open(&dir.join(name)) {
                return Some((dir.join(name).display().to_string(), handle));
            }
        }
    }
    None
}

/// What a library asks its loader for by name alone lies beside it, where no loader would look: it is loaded
/// before.
fn open_companions(stem: &str, dir: &Path) {
    let companion = match stem {
        "cublas" => "libcublasLt.so",
        "nvrtc" => "libnvrtc-builtins.so",
        _ => return,
    };
    for file in entries(dir) {
        let name = file.file_name().unwrap_or_default().to_string_lossy();
        if name.starts_with(companion) {
            open(&file);
        }
    }
}

/// Windows' driver under WSL, toolkits, and the nvidia packages of the active Python environment, else of the
/// Python in the path: images often have them beside a Python that no environment names.
fn directories() -> Vec<PathBuf> {
    let mut dirs = vec![PathBuf::from("/usr/lib/wsl/lib")];
    for variable in ["CUDA_PATH", "CUDA_HOME"] {
        dirs.extend(std::env::var_os(variable).map(|home| PathBuf::from(home).join("lib64")));
    }
    dirs.push("/usr/local/cuda/lib64".into());
    dirs.push("/opt/cuda/lib64".into());
    for home in ["VIRTUAL_ENV", "CONDA_PREFIX"]
        .into_iter()
        .filter_map(std::env::var_os)
    {
        let lib = PathBuf::from(home).join("lib");
        dirs.push(lib.clone());
        dirs.extend(python_packages(&lib));
    }
    for lib in python_libs() {
        dirs.extend(python_packages(&lib));
    }
    dirs
}

/// Directories that hold pythonX.Y: of the Pythons in the path, also Debian's under local, and the user's.
fn python_libs() -> Vec<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let bins = std::env::split_paths(&path).filter(|bin| bin.join("python3").exists());
    let prefixes = bins.filter_map(|bin| Some(bin.parent()?.to_owned()));
    let of_prefix = |prefix: PathBuf| ["lib", "local/lib"].map(|lib| prefix.join(lib));
    let mut libs: Vec<PathBuf> = prefixes.flat_map(of_prefix).collect();
    libs.extend(std::env::var_os("HOME").map(|home| PathBuf::from(home).join(".local/lib")));
    libs
}

/// Libraries of the nvidia packages under `lib`: "cublas/lib" of those for CUDA 12, "cu13/lib" of those for 13.
fn python_packages(lib: &Path) -> Vec<PathBuf> {
    let pythons = subdirectories(lib).into_iter();
    let sites = pythons.flat_map(|python| {
        ["site-packages/nvidia", "dist-packages/nvidia"].map(|site| python.join(site))
    });
    let packages = sites.flat_map(|site| subdirectories(&site));
    packages.map(|package| package.join("lib")).collect()
}

fn subdirectories(dir: &Path) -> Vec<PathBuf> {
    let all = entries(dir).into_iter();
    all.filter(|path| path.is_dir()).collect()
}

fn entries(dir: &Path) -> Vec<PathBuf> {
    let entries = std::fs::read_dir(dir).into_iter().flatten().flatten();
    let mut paths: Vec<PathBuf> = entries.map(|e| e.path()).collect();
    paths.sort();
    paths
}

fn open(path: &Path) -> Option<*mut libc::c_void> {
    let path = CString::new(path.as_os_str().as_encoded_bytes()).ok()?;
    // SAFETY: the path ends with a zero; NVIDIA's libraries may be loaded at any time.
    let handle = unsafe { libc::dlopen(path.as_ptr(), libc::RTLD_NOW | libc::RTLD_GLOBAL) };
    (!handle.is_null()).then_some(handle)
}

fn has_symbol(handle: *mut libc::c_void, symbol: &str) -> bool {
    let symbol = CString::new(symbol).unwrap_or_default();
    // SAFETY: the handle is open for good, the name ends with a zero.
    unsafe { !libc::dlsym(handle, symbol.as_ptr()).is_null() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_remedy_fits_the_driver() {
        assert!(toolkit_remedy(12_080).contains("nvidia-cublas-cu12"));
        assert!(toolkit_remedy(13_000).contains("pip install nvidia-cublas nvidia-cuda-nvrtc "));
        assert_eq!(show_version(12_080), "12.8");
    }

    #[test]
    fn what_is_not_there_is_absent_and_no_panic() {
        let nothing = Library {
            stem: "loadmaster_no_such_library",
            symbols: &[],
        };
        assert!(matches!(load(&nothing), Loaded::Missing));
        let c = Library {
            stem: "c",
            symbols: &["no_such_function"],
        };
        // libc has another suffix on some systems; where it is found, the function is missed.
        assert!(!matches!(load(&c), Loaded::Whole));
    }
}
