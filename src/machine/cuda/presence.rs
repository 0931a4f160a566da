//! Whether a GPU can be computed on here: has the driver's and CUDA's libraries found, with every function that is
//! called later, so that nothing panics on the way. Opens no context; where libraries are is libraries.rs's.

use super::api::{self, CudaError, DeviceFacts};
use super::libraries::{Handle, Library, Release, Toolkit};
use cudarc::driver::sys::CUresult;
use std::path::Path;
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

pub(super) static BLAS: Toolkit = Toolkit::new(CUBLAS, "libcublasLt.so", cublas_release);
pub(super) static COMPILER: Toolkit = Toolkit::new(NVRTC, "libnvrtc-builtins.so", nvrtc_release);

/// The GPU number `index`, once everything that computing on it needs has been found.
pub fn find_gpu(index: usize) -> Result<DeviceFacts, GpuError> {
    static FOUND: OnceLock<Result<usize, GpuError>> = OnceLock::new();
    let count = FOUND.get_or_init(|| super::counted(look)).clone()?;
    if index >= count {
        return Err(GpuError::Absent(format!(
            "there is no GPU number {index}: the driver shows {count}"
        )));
    }
    let facts = api::device_facts(index).map_err(|e| unusable(e.to_string(), RESTART_REMEDY))?;
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

const DRIVER_REMEDY: &str = "install a driver of CUDA 12.0 or later (Debian: apt install nvidia-driver; Ubuntu: ubuntu-drivers install)";
/// For a driver that is there and does not start, as after it was updated.
const RESTART_REMEDY: &str = "restart the machine, or load the driver's kernel module anew; nvidia-smi says whether it works";

fn cublas_release(library: Handle) -> Option<Release> {
    // SAFETY: so it is declared: which number (0 is the first one), and where to write it.
    let (status, major) = unsafe {
        let get: unsafe extern "C" fn(i32, *mut i32) -> i32 =
            library.function("cublasGetProperty")?;
        let mut major = 0;
        (get(0, &mut major), major)
    };
    (status == 0).then(|| (major as u32, major.to_string()))
}

fn nvrtc_release(library: Handle) -> Option<Release> {
    // SAFETY: so it is declared: where to write both numbers.
    let (status, major, minor) = unsafe {
        let get: unsafe extern "C" fn(*mut i32, *mut i32) -> i32 =
            library.function("nvrtcVersion")?;
        let (mut major, mut minor) = (0, 0);
        (get(&mut major, &mut minor), major, minor)
    };
    (status == 0).then(|| (major as u32, format!("{major}.{minor}")))
}

/// The driver's library, by its path: the bindings load the same one.
fn driver_library() -> Result<String, GpuError> {
    let Some(driver) = DRIVER.open() else {
        return Err(GpuError::Absent("no NVIDIA driver is installed".into()));
    };
    let path = DRIVER.file(driver);
    match DRIVER.missing_in(driver) {
        Some(symbol) => {
            let cause = format!("the NVIDIA driver ({path}) has no {symbol}: it is too old");
            Err(unusable(cause, DRIVER_REMEDY))
        }
        None => Ok(path),
    }
}

/// Why the driver whose library this is tells of no devices.
fn no_devices(error: &CudaError, library: &str) -> GpuError {
    const NO_DEVICE: u32 = CUresult::CUDA_ERROR_NO_DEVICE as u32;
    // By its number: a stub has no names of errors either.
    const STUB: u32 = CUresult::CUDA_ERROR_STUB_LIBRARY as u32;
    match error.code {
        NO_DEVICE => GpuError::Absent("the NVIDIA driver shows no GPU".into()),
        STUB => {
            let cause = format!("LD_LIBRARY_PATH leads to CUDA's stub driver ({library})");
            let directory = Path::new(library).parent().unwrap_or(Path::new("…/stubs"));
            let remedy = format!("take {} out of it", directory.display());
            unusable(cause, &remedy)
        }
        _ => unusable(error.to_string(), RESTART_REMEDY),
    }
}

/// Libraries, driver and number of GPUs.
fn look() -> Result<usize, GpuError> {
    let library = driver_library()?;
    let count = api::device_count().map_err(|e| no_devices(&e, &library))?;
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
    for library in [&BLAS, &COMPILER] {
        let chosen = library.choose(driver);
        chosen.map_err(|cause| unusable(cause, &remedy))?;
    }
    Ok(count)
}

/// 12080 is 12.8.
pub(super) fn show_version(version: u32) -> String {
    format!("{}.{}", version / 1000, version % 1000 / 10)
}

/// The exact lines for this driver's CUDA.
pub(super) fn toolkit_remedy(driver: u32) -> String {
    let packages = if driver >= 13_000 {
        "nvidia-cublas nvidia-cuda-nvrtc"
    } else {
        "nvidia-cublas-cu12 nvidia-cuda-nvrtc-cu12"
    };
    let release = format!("{}-{}", driver / 1000, driver % 1000 / 10);
    format!(
        "pip install {packages} (or, from NVIDIA's repository, apt install libcublas-{release} cuda-nvrtc-{release})"
    )
}

fn unusable(cause: String, remedy: &str) -> GpuError {
    GpuError::Unusable {
        cause,
        remedy: remedy.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_remedy_fits_the_driver() {
        assert!(toolkit_remedy(12_080).contains("nvidia-cublas-cu12"));
        assert!(toolkit_remedy(12_080).ends_with("apt install libcublas-12-8 cuda-nvrtc-12-8)"));
        assert!(toolkit_remedy(13_000).contains("pip install nvidia-cublas nvidia-cuda-nvrtc "));
        assert_eq!(show_version(12_080), "12.8");
    }

    #[test]
    fn a_stub_is_told_from_a_machine_without_a_gpu() {
        let error = |code| CudaError {
            call: "cuInit",
            code,
            text: format!("error {code}"),
        };
        assert!(matches!(
            no_devices(&error(100), "/lib/libcuda.so.1"),
            GpuError::Absent(_)
        ));
        let said = no_devices(&error(34), "/cuda/stubs/libcuda.so").to_string();
        assert!(
            said.contains("stub driver (/cuda/stubs/libcuda.so); take /cuda/stubs out"),
            "{said}"
        );
    }
}
