//! Functions of cuBLAS and of the kernel compiler as the bindings declare them, in the libraries that presence.rs
//! has chosen: the bindings take the first ones that they find by name, which the driver may refuse.

macro_rules! functions {
    ($toolkit:expr, $($name:ident($($argument:ident: $of:ty),*) -> $result:ty;)*) => { $(
        /// # Safety
        /// As NVIDIA says of the function.
        #[allow(non_snake_case)] // its own name
        pub unsafe extern "C" fn $name($($argument: $of),*) -> $result {
            type Function = unsafe extern "C" fn($($of),*) -> $result;
            static FOUND: OnceLock<Function> = OnceLock::new();
            // SAFETY: so the bindings, made of NVIDIA's headers, declare it.
            let function = FOUND.get_or_init(|| unsafe { $toolkit.function(stringify!($name)) });
            // SAFETY: the caller's.
            unsafe { function($($argument),*) }
        }
    )* };
}

pub mod cublas {
    use super::super::presence::BLAS;
    pub use cudarc::cublas::sys::*;
    use std::ffi::{c_int, c_void};
    use std::sync::OnceLock;

    functions! {
        BLAS,
        cublasCreate_v2(handle: *mut cublasHandle_t) -> cublasStatus_t;
        cublasDestroy_v2(handle: cublasHandle_t) -> cublasStatus_t;
        cublasSetStream_v2(handle: cublasHandle_t, stream: cudaStream_t) -> cublasStatus_t;
        cublasSetWorkspace_v2(handle: cublasHandle_t, at: *mut c_void, bytes: usize) -> cublasStatus_t;
        cublasGemmEx(
            handle: cublasHandle_t, op_a: cublasOperation_t, op_b: cublasOperation_t, m: c_int, n: c_int, k: c_int,
            alpha: *const c_void, a: *const c_void, a_type: cudaDataType, lda: c_int,
            b: *const c_void, b_type: cudaDataType, ldb: c_int,
            beta: *const c_void, c: *mut c_void, c_type: cudaDataType, ldc: c_int,
            compute: cublasComputeType_t, algorithm: cublasGemmAlgo_t
        ) -> cublasStatus_t;
        cublasSgemm_v2(
            handle: cublasHandle_t, op_a: cublasOperation_t, op_b: cublasOperation_t, m: c_int, n: c_int, k: c_int,
            alpha: *const f32, a: *const f32, lda: c_int, b: *const f32, ldb: c_int,
            beta: *const f32, c: *mut f32, ldc: c_int
        ) -> cublasStatus_t;
    }
}

pub mod nvrtc {
    use super::super::presence::COMPILER;
    pub use cudarc::nvrtc::sys::*;
    use std::ffi::{c_char, c_int};
    use std::sync::OnceLock;

    functions! {
        COMPILER,
        nvrtcVersion(major: *mut c_int, minor: *mut c_int) -> nvrtcResult;
        nvrtcGetNumSupportedArchs(count: *mut c_int) -> nvrtcResult;
        nvrtcGetSupportedArchs(archs: *mut c_int) -> nvrtcResult;
        nvrtcCreateProgram(
            program: *mut nvrtcProgram, source: *const c_char, name: *const c_char, count: c_int,
            headers: *const *const c_char, names: *const *const c_char
        ) -> nvrtcResult;
        nvrtcCompileProgram(program: nvrtcProgram, count: c_int, options: *const *const c_char) -> nvrtcResult;
        nvrtcDestroyProgram(program: *mut nvrtcProgram) -> nvrtcResult;
        nvrtcGetProgramLogSize(program: nvrtcProgram, bytes: *mut usize) -> nvrtcResult;
        nvrtcGetProgramLog(program: nvrtcProgram, log: *mut c_char) -> nvrtcResult;
        nvrtcGetCUBINSize(program: nvrtcProgram, bytes: *mut usize) -> nvrtcResult;
        nvrtcGetCUBIN(program: nvrtcProgram, image: *mut c_char) -> nvrtcResult;
        nvrtcGetPTXSize(program: nvrtcProgram, bytes: *mut usize) -> nvrtcResult;
        nvrtcGetPTX(program: nvrtcProgram, image: *mut c_char) -> nvrtcResult;
    }
}
