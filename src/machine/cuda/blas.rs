//! Large products through cuBLAS: fp16 or bf16 operands with fp32 sums and results, fp32 without TF32.
//! Row-major matrices here, column-major words there.

use super::api::{Context, Stream};
use super::toolkit::cublas::{
    self as sys, cublasOperation_t as Operation, cublasStatus_t as Status,
};
use crate::dtype::Dtype;
use std::ffi::c_void;
use std::sync::Arc;

/// A handle on one stream, with a workspace of ours.
pub struct Blas {
    raw: sys::cublasHandle_t,
    /// For old GPUs cuBLAS has no products in bf16.
    refuses_bf16: bool,
    context: Arc<Context>,
}

// SAFETY: used by one thread at a time: the compute lane's.
unsafe impl Send for Blas {}

/// out (m × rows, f32) = x (m × inputs) · w (rows × inputs)ᵀ; strides in elements, addresses on the device.
#[derive(Clone, Copy, Debug)]
pub struct LargeProduct {
    /// Of both `x` and `w`: F32, F16 or BF16.
    pub format: Dtype,
    pub x: u64,
    pub x_stride: usize,
    pub w: u64,
    pub m: usize,
    pub rows: usize,
    pub inputs: usize,
    pub out: u64,
    pub out_stride: usize,
    /// out = scale · x wᵀ, added to what is there where `adds` says so; 1 and false for fp32.
    pub scale: f32,
    pub adds: bool,
}

fn check(call: &str, status: Status) -> Result<(), String> {
    match status {
        Status::CUBLAS_STATUS_SUCCESS => Ok(()),
        other => Err(format!("{call} failed: {other:?}")),
    }
}

/// That the GPU is too old for what was asked for.
fn is_refusal(status: Status) -> bool {
    use Status::{CUBLAS_STATUS_ARCH_MISMATCH, CUBLAS_STATUS_NOT_SUPPORTED};
    matches!(
        status,
        CUBLAS_STATUS_ARCH_MISMATCH | CUBLAS_STATUS_NOT_SUPPORTED
    )
}

pub const NO_BF16: &str =
    "this GPU multiplies no bf16; take a checkpoint in fp16 or fp32, or --device cpu";

/// Rows of activations that cuBLAS is warmed up with, and the square of weights.
const WARM_ROWS: [usize; 2] = [32, 256];
const WARM_WIDTH: usize = 256;

/// Operands and result one behind the other.
fn warm_product(memory: u64, format: Dtype, m: usize) -> LargeProduct {
    let w = memory + m as u64 * format.row_bytes(WARM_WIDTH);
    LargeProduct {
        format,
        x: memory,
        x_stride: WARM_WIDTH,
        w,
        m,
        rows: WARM_WIDTH,
        inputs: WARM_WIDTH,
        out: w + WARM_WIDTH as u64 * format.row_bytes(WARM_WIDTH),
        out_stride: WARM_WIDTH,
        scale: 1.0,
        adds: false,
    }
}

impl Blas {
    pub fn new(
        context: &Arc<Context>,
        stream: &Stream,
        (workspace, bytes): (u64, u64),
    ) -> Result<Blas, String> {
        context.use_here().map_err(|e| e.to_string())?;
        let mut raw = std::ptr::null_mut();
        // SAFETY: the context is current; the handle is written to a live pointer.
        check("cublasCreate", unsafe { sys::cublasCreate_v2(&mut raw) })?;
        let blas = Blas {
            raw,
            refuses_bf16: false,
            context: context.clone(),
        };
        // SAFETY: handle and stream are alive; the workspace is device memory of that length, used by
        // this stream alone.
        unsafe {
            check(
                "cublasSetStream",
                sys::cublasSetStream_v2(raw, stream.raw().cast()),
            )?;
            check(
                "cublasSetWorkspace",
                sys::cublasSetWorkspace_v2(raw, workspace as *mut c_void, bytes as usize),
            )?;
        }
        Ok(blas)
    }

    /// Whether warming up has met no refusal of products in this format.
    pub fn multiplies(&self, format: Dtype) -> bool {
        format != Dtype::Bf16 || !self.refuses_bf16
    }

    /// Multiplies once in each format, few rows and many, and waits: cuBLAS loads kernels when they are first used,
    /// which no run should count. The memory holds zeros and does so afterwards, since that is what comes out;
    /// where it is too small for a product, none takes long. A refusal of bf16 is kept for whom it concerns.
    /// # Safety
    /// The memory is nobody else's until this returns.
    pub unsafe fn warm_up(
        &mut self,
        stream: &Stream,
        (memory, bytes): (u64, u64),
    ) -> Result<(), String> {
        for format in [Dtype::F16, Dtype::Bf16, Dtype::F32] {
            for m in WARM_ROWS {
                let product = warm_product(memory, format, m);
                if product.out + 4 * (m * product.out_stride) as u64 <= memory + bytes {
                    // SAFETY: the operands and the result lie in the memory, one behind the other.
                    match unsafe { self.queue(&product) } {
                        (_, status) if format == Dtype::Bf16 && is_refusal(status) => {
                            self.refuses_bf16 = true;
                        }
                        (call, status) => check(call, status)?,
                    }
                }
            }
        }
        stream.synchronise().map_err(|e| e.to_string())
    }

    /// Queues one product.
    /// # Safety
    /// The addresses are device memory as large as the shapes say, until the stream has passed this.
    pub unsafe fn multiply(&self, p: &LargeProduct) -> Result<(), String> {
        // SAFETY: the caller's.
        let (call, status) = unsafe { self.queue(p) };
        check(call, status).map_err(|why| match p.format {
            Dtype::Bf16 if is_refusal(status) => format!("{why}: {NO_BF16}"),
            _ => why,
        })
    }

    /// The call and what became of it.
    /// # Safety
    /// As for `multiply`.
    unsafe fn queue(&self, p: &LargeProduct) -> (&'static str, Status) {
        let (one, zero) = (1.0f32, 0.0f32);
        let (scale, kept) = (p.scale, p.adds as u8 as f32);
        let size = |n: usize| n as i32;
        let data = match p.format {
            Dtype::Bf16 => sys::cudaDataType_t::CUDA_R_16BF,
            _ => sys::cudaDataType_t::CUDA_R_16F,
        };
        let (t, n) = (Operation::CUBLAS_OP_T, Operation::CUBLAS_OP_N);
        if p.format == Dtype::F32 {
            // SAFETY: the caller's; scalars are read on the host before the call returns.
            let status = unsafe {
                sys::cublasSgemm_v2(
                    self.raw,
                    t,
                    n,
                    size(p.rows),
                    size(p.m),
                    size(p.inputs),
                    &one,
                    p.w as *const f32,
                    size(p.inputs),
                    p.x as *const f32,
                    size(p.x_stride),
                    &zero,
                    p.out as *mut f32,
                    size(p.out_stride),
                )
            };
            return ("cublasSgemm", status);
        }
        // SAFETY: as above.
        let status = unsafe {
            sys::cublasGemmEx(
                self.raw,
                t,
                n,
                size(p.rows),
                size(p.m),
                size(p.inputs),
                std::ptr::from_ref(&scale).cast(),
                p.w as *const c_void,
                data,
                size(p.inputs),
                p.x as *const c_void,
                data,
                size(p.x_stride),
                std::ptr::from_ref(&kept).cast(),
                p.out as *mut c_void,
                sys::cudaDataType_t::CUDA_R_32F,
                size(p.out_stride),
                sys::cublasComputeType_t::CUBLAS_COMPUTE_32F,
                sys::cublasGemmAlgo_t::CUBLAS_GEMM_DFALT,
            )
        };
        ("cublasGemmEx", status)
    }
}

impl Drop for Blas {
    fn drop(&mut self) {
        let _ = self.context.use_here();
        // SAFETY: created by `new`; its stream is idle.
        let _ = unsafe { sys::cublasDestroy_v2(self.raw) };
    }
}
