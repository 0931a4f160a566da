//! The driver calls that the CUDA machine makes, each checked and each owned: context, streams, events,
//! device memory, copies. No kernel's name and no lane is known here.

use cudarc::driver::sys::{self, CUdevice_attribute_enum as Attribute, CUresult};
use std::ffi::{CStr, c_char, c_void};
use std::sync::{Arc, OnceLock};
use thiserror::Error;

/// A driver call that failed.
#[derive(Clone, Debug, Error)]
#[error("{call} failed: {text}")]
pub struct CudaError {
    pub call: &'static str,
    pub code: u32,
    pub text: String,
}

impl CudaError {
    pub fn is_out_of_memory(&self) -> bool {
        self.code == CUresult::CUDA_ERROR_OUT_OF_MEMORY as u32
    }

    /// A kernel or the device went wrong (bad addresses and instructions, time-out, assertion, failed launch;
    /// memory or links beyond repair): the process's context is lost with it, and every later call fails in the
    /// same way.
    pub fn is_fault(&self) -> bool {
        matches!(
            self.code,
            214 | 220 | 226 | 700 | 702 | 710 | 714..=719 | 721
        )
    }
}

static FAULT: OnceLock<CudaError> = OnceLock::new();

/// The first fault that this process has met, where it has: no machine can be opened on a GPU in it any more.
pub fn fault() -> Option<&'static CudaError> {
    FAULT.get()
}

pub fn check(call: &'static str, result: CUresult) -> Result<(), CudaError> {
    if result == CUresult::CUDA_SUCCESS {
        return Ok(());
    }
    let mut name = std::ptr::null();
    // SAFETY: the driver writes the address of a string of its own, or leaves null.
    let text = unsafe {
        let _ = sys::cuGetErrorName(result, &mut name);
        if name.is_null() {
            format!("error {}", result as u32)
        } else {
            CStr::from_ptr(name).to_string_lossy().into_owned()
        }
    };
    let error = CudaError {
        call,
        code: result as u32,
        text,
    };
    if error.is_fault() {
        FAULT.get_or_init(|| error.clone());
    }
    Err(error)
}

/// Starts the driver and counts its GPUs.
pub fn device_count() -> Result<usize, CudaError> {
    let mut count = 0;
    // SAFETY: plain calls; the count is written to a live integer.
    unsafe {
        check("cuInit", sys::cuInit(0))?;
        check("cuDeviceGetCount", sys::cuDeviceGetCount(&mut count))?;
    }
    Ok(count.max(0) as usize)
}

/// The newest CUDA that the driver knows: 12080 for 12.8.
pub fn driver_version() -> Result<u32, CudaError> {
    let mut version = 0;
    // SAFETY: written to a live integer.
    check("cuDriverGetVersion", unsafe {
        sys::cuDriverGetVersion(&mut version)
    })?;
    Ok(version as u32)
}

/// What a GPU is, as the driver tells it.
#[derive(Clone, Debug, PartialEq)]
pub struct DeviceFacts {
    pub name: String,
    pub total_bytes: u64,
    /// 80 for compute capability 8.0.
    pub capability: u32,
    /// Of the last cache before the device's memory.
    pub l2_bytes: u64,
    /// "0000:01:00.0", to find the same GPU through NVML.
    pub bus_id: String,
}

pub fn device_facts(index: usize) -> Result<DeviceFacts, CudaError> {
    let mut device = 0;
    let (mut name, mut bus) = ([0 as c_char; 128], [0 as c_char; 32]);
    let (mut total, mut major, mut minor, mut l2) = (0usize, 0, 0, 0);
    // SAFETY: every target is live and as long as the call is told; names end with a zero.
    unsafe {
        check("cuDeviceGet", sys::cuDeviceGet(&mut device, index as i32))?;
        let result = sys::cuDeviceGetName(name.as_mut_ptr(), 127, device);
        check("cuDeviceGetName", result)?;
        check(
            "cuDeviceTotalMem",
            sys::cuDeviceTotalMem_v2(&mut total, device),
        )?;
        let result = sys::cuDeviceGetPCIBusId(bus.as_mut_ptr(), 31, device);
        check("cuDeviceGetPCIBusId", result)?;
        for (value, what) in [
            (
                &mut major,
                Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR,
            ),
            (
                &mut minor,
                Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR,
            ),
            (&mut l2, Attribute::CU_DEVICE_ATTRIBUTE_L2_CACHE_SIZE),
        ] {
            check(
                "cuDeviceGetAttribute",
                sys::cuDeviceGetAttribute(value, what, device),
            )?;
        }
    }
    Ok(DeviceFacts {
        name: text(&name),
        total_bytes: total as u64,
        capability: (10 * major + minor) as u32,
        l2_bytes: l2.max(0) as u64,
        bus_id: text(&bus),
    })
}

fn text(bytes: &[c_char]) -> String {
    let until = bytes.iter().take_while(|&&b| b != 0);
    let bytes: Vec<u8> = until.map(|&b| b as u8).collect();
    String::from_utf8_lossy(&bytes).into_owned()
}

/// A GPU's primary context, kept for as long as anything of it lives.
#[derive(Debug)]
pub struct Context {
    device: i32,
    raw: sys::CUcontext,
}

// SAFETY: a context may be used from every thread that has made it current.
unsafe impl Send for Context {}
// SAFETY: as above.
unsafe impl Sync for Context {}

impl Context {
    /// Retains the context and makes it current here. Threads that wait for the GPU sleep.
    pub fn new(index: usize) -> Result<Arc<Context>, CudaError> {
        let (mut device, mut raw) = (0, std::ptr::null_mut());
        // SAFETY: plain calls with live targets.
        unsafe {
            check("cuDeviceGet", sys::cuDeviceGet(&mut device, index as i32))?;
            let sleep = sys::CUctx_flags_enum::CU_CTX_SCHED_BLOCKING_SYNC as u32;
            let result = sys::cuDevicePrimaryCtxSetFlags_v2(device, sleep);
            // cuBLAS may have kept the context of an earlier machine, which was opened with these flags.
            if result != CUresult::CUDA_ERROR_PRIMARY_CONTEXT_ACTIVE {
                check("cuDevicePrimaryCtxSetFlags", result)?;
            }
            let result = sys::cuDevicePrimaryCtxRetain(&mut raw, device);
            check("cuDevicePrimaryCtxRetain", result)?;
        }
        let context = Arc::new(Context { device, raw });
        context.use_here()?;
        Ok(context)
    }

    /// Makes the context current on this thread.
    pub fn use_here(&self) -> Result<(), CudaError> {
        // SAFETY: the context is retained while `self` lives.
        check("cuCtxSetCurrent", unsafe { sys::cuCtxSetCurrent(self.raw) })
    }

    /// Sleeps until the driver's own stream is done: fills, and copies from DRAM that is not page-locked, go on
    /// there after their calls have returned, and no other stream waits for them.
    fn settle(&self) -> Result<(), CudaError> {
        // SAFETY: the context is current on this thread; null is its own stream.
        check("cuStreamSynchronize", unsafe {
            sys::cuStreamSynchronize(std::ptr::null_mut())
        })
    }

    /// (free, total) bytes of device memory.
    pub fn memory(&self) -> Result<(u64, u64), CudaError> {
        self.use_here()?;
        let (mut free, mut total) = (0usize, 0usize);
        // SAFETY: written to live integers.
        check("cuMemGetInfo", unsafe {
            sys::cuMemGetInfo_v2(&mut free, &mut total)
        })?;
        Ok((free as u64, total as u64))
    }
}

impl Drop for Context {
    fn drop(&mut self) {
        // SAFETY: retained once by `new`; every other object of it holds an Arc and is gone.
        let _ = unsafe { sys::cuDevicePrimaryCtxRelease_v2(self.device) };
    }
}

/// A queue of the GPU.
pub struct Stream {
    raw: sys::CUstream,
    context: Arc<Context>,
}

// SAFETY: streams may be used from any thread.
unsafe impl Send for Stream {}
// SAFETY: as above; the driver locks.
unsafe impl Sync for Stream {}

impl Stream {
    /// A stream that no other stream waits for by itself. Lower numbers go first.
    pub fn new(context: &Arc<Context>) -> Result<Stream, CudaError> {
        let mut raw = std::ptr::null_mut();
        let flags = sys::CUstream_flags_enum::CU_STREAM_NON_BLOCKING as u32;
        context.use_here()?;
        // SAFETY: the context is current; the handle is written to a live pointer.
        check("cuStreamCreate", unsafe {
            sys::cuStreamCreate(&mut raw, flags)
        })?;
        Ok(Stream {
            raw,
            context: context.clone(),
        })
    }

    pub fn raw(&self) -> sys::CUstream {
        self.raw
    }

    /// What is queued from now on waits for `event`, which must have been recorded.
    pub fn wait(&self, event: &Event) -> Result<(), CudaError> {
        // SAFETY: both handles are alive.
        check("cuStreamWaitEvent", unsafe {
            sys::cuStreamWaitEvent(self.raw, event.raw, 0)
        })
    }

    /// Sleeps until everything queued is done.
    pub fn synchronise(&self) -> Result<(), CudaError> {
        // SAFETY: the handle is alive.
        check("cuStreamSynchronize", unsafe {
            sys::cuStreamSynchronize(self.raw)
        })
    }

    /// Queues a copy of DRAM to the device.
    /// # Safety
    /// `from` stays readable and `to` the device's until the stream has passed this.
    pub unsafe fn upload(&self, to: u64, from: *const u8, bytes: u64) -> Result<(), CudaError> {
        // SAFETY: the caller's.
        let result = unsafe {
            sys::cuMemcpyHtoDAsync_v2(to, from.cast::<c_void>(), bytes as usize, self.raw)
        };
        check("cuMemcpyHtoDAsync", result)
    }

    /// Queues a copy of device memory to DRAM.
    /// # Safety
    /// As for `upload`, the other way.
    pub unsafe fn download(&self, to: *mut u8, from: u64, bytes: u64) -> Result<(), CudaError> {
        // SAFETY: the caller's.
        let result = unsafe {
            sys::cuMemcpyDtoHAsync_v2(to.cast::<c_void>(), from, bytes as usize, self.raw)
        };
        check("cuMemcpyDtoHAsync", result)
    }

    /// Queues a copy of rows at two strides.
    /// # Safety
    /// As for `upload`, for every row.
    pub unsafe fn copy_rows(&self, rows: &sys::CUDA_MEMCPY2D) -> Result<(), CudaError> {
        // SAFETY: the caller's; the descriptor is read before the call returns.
        check("cuMemcpy2DAsync", unsafe {
            sys::cuMemcpy2DAsync_v2(rows, self.raw)
        })
    }
}

impl Drop for Stream {
    /// What is queued runs on without its stream. After a failure there may be some, and the memory that it uses is
    /// given back next: so it is waited for, however it ends.
    fn drop(&mut self) {
        let _ = self.context.use_here();
        let _ = self.synchronise();
        // SAFETY: the handle is alive and nobody else has it.
        let _ = unsafe { sys::cuStreamDestroy_v2(self.raw) };
    }
}

/// A point in a stream, with its time.
pub struct Event {
    raw: sys::CUevent,
    context: Arc<Context>,
}

// SAFETY: events may be used from any thread.
unsafe impl Send for Event {}
// SAFETY: as above.
unsafe impl Sync for Event {}

impl Event {
    pub fn new(context: &Arc<Context>) -> Result<Event, CudaError> {
        let mut raw = std::ptr::null_mut();
        let flags = sys::CUevent_flags_enum::CU_EVENT_BLOCKING_SYNC as u32;
        context.use_here()?;
        // SAFETY: the context is current; the handle is written to a live pointer.
        check("cuEventCreate", unsafe {
            sys::cuEventCreate(&mut raw, flags)
        })?;
        Ok(Event {
            raw,
            context: context.clone(),
        })
    }

    pub fn record(&self, stream: &Stream) -> Result<(), CudaError> {
        // SAFETY: both handles are alive.
        check("cuEventRecord", unsafe {
            sys::cuEventRecord(self.raw, stream.raw)
        })
    }

    /// Sleeps until the stream has passed the event.
    pub fn synchronise(&self) -> Result<(), CudaError> {
        // SAFETY: the handle is alive.
        check("cuEventSynchronize", unsafe {
            sys::cuEventSynchronize(self.raw)
        })
    }

    /// Seconds from `earlier` to this one; both have been passed. The call that every driver has: the
    /// newer one of the same meaning came with CUDA 12.8.
    pub fn seconds_since(&self, earlier: &Event) -> Result<f64, CudaError> {
        let mut ms = 0.0f32;
        let elapsed = elapsed_time();
        // SAFETY: both handles are alive, the target is a live float.
        check("cuEventElapsedTime", unsafe {
            elapsed(&mut ms, earlier.raw, self.raw)
        })?;
        Ok(f64::from(ms).max(0.0) / 1e3)
    }
}

impl Drop for Event {
    fn drop(&mut self) {
        let _ = self.context.use_here();
        // SAFETY: the handle is alive and nobody else has it.
        let _ = unsafe { sys::cuEventDestroy_v2(self.raw) };
    }
}

type ElapsedTime = unsafe extern "C" fn(*mut f32, sys::CUevent, sys::CUevent) -> CUresult;

/// Bindings for CUDA 13 know the newer call alone.
fn elapsed_time() -> ElapsedTime {
    static CALL: OnceLock<ElapsedTime> = OnceLock::new();
    // SAFETY: the driver has this function (presence.rs looked), with these arguments since CUDA 1.
    *CALL.get_or_init(|| unsafe {
        let found = sys::culib().get::<ElapsedTime>(b"cuEventElapsedTime\0");
        *found.expect("looked for before anything was opened")
    })
}

/// One allocation of device memory.
pub struct DeviceBuffer {
    address: u64,
    bytes: u64,
    context: Arc<Context>,
}

impl DeviceBuffer {
    /// Allocates and zeroes `bytes` (at least one).
    pub fn new(context: &Arc<Context>, bytes: u64) -> Result<DeviceBuffer, CudaError> {
        context.use_here()?;
        let mut address = 0;
        let length = bytes.max(1) as usize;
        // SAFETY: the context is current; the range set to zero is the one just allocated.
        unsafe {
            check("cuMemAlloc", sys::cuMemAlloc_v2(&mut address, length))?;
        }
        let buffer = DeviceBuffer {
            address,
            bytes,
            context: context.clone(),
        };
        // SAFETY: the range is the allocation.
        check("cuMemsetD8", unsafe {
            sys::cuMemsetD8_v2(address, 0, length)
        })?;
        context.settle()?;
        Ok(buffer)
    }

    /// Device address of `[offset, offset + bytes)`. Panics when that sticks out.
    pub fn at(&self, offset: u64, bytes: u64) -> u64 {
        let fits = offset
            .checked_add(bytes)
            .is_some_and(|end| end <= self.bytes);
        assert!(
            fits,
            "{bytes} bytes at {offset} stick out of {} bytes of device memory",
            self.bytes
        );
        self.address + offset
    }

    /// Copies to the device and waits for it: for what is loaded once.
    pub fn write(&self, offset: u64, from: &[u8]) -> Result<(), CudaError> {
        self.context.use_here()?;
        let to = self.at(offset, from.len() as u64);
        // SAFETY: both ranges are as long as said, and the call returns when it has read the source.
        check("cuMemcpyHtoD", unsafe {
            sys::cuMemcpyHtoD_v2(to, from.as_ptr().cast(), from.len())
        })?;
        self.context.settle()
    }
}

impl Drop for DeviceBuffer {
    fn drop(&mut self) {
        let _ = self.context.use_here();
        // SAFETY: allocated by `new`; the streams that used it are idle by now (lanes run dry first).
        let _ = unsafe { sys::cuMemFree_v2(self.address) };
    }
}

/// DRAM that the driver holds in place, so that copies run on their own.
pub struct PinnedRange {
    address: *mut u8,
    bytes: u64,
    context: Arc<Context>,
}

// SAFETY: only the address is kept, to give the pages back.
unsafe impl Send for PinnedRange {}
// SAFETY: as above.
unsafe impl Sync for PinnedRange {}

impl PinnedRange {
    /// # Safety
    /// The range stays mapped for as long as this lives.
    pub unsafe fn new(
        context: &Arc<Context>,
        address: *mut u8,
        bytes: u64,
    ) -> Result<PinnedRange, CudaError> {
        context.use_here()?;
        // As a GPU with one address space has it without being asked; where it cannot, `device_address` fails.
        let mapped = sys::CU_MEMHOSTREGISTER_DEVICEMAP;
        // SAFETY: the caller's.
        check("cuMemHostRegister", unsafe {
            sys::cuMemHostRegister_v2(address.cast(), bytes as usize, mapped)
        })?;
        Ok(PinnedRange {
            address,
            bytes,
            context: context.clone(),
        })
    }

    pub fn contains(&self, address: *const u8, bytes: u64) -> bool {
        let (start, wanted) = (self.address as u64, address as u64);
        start <= wanted && wanted + bytes <= start + self.bytes
    }

    /// Where kernels read what this process has at `address`, inside the range.
    pub fn device_address(&self, address: *const u8) -> Result<u64, CudaError> {
        self.context.use_here()?;
        let mut start = 0;
        // SAFETY: the range is registered while `self` lives; its address there is written to a live integer.
        check("cuMemHostGetDevicePointer", unsafe {
            sys::cuMemHostGetDevicePointer_v2(&mut start, self.address.cast(), 0)
        })?;
        Ok(start + (address as u64 - self.address as u64))
    }
}

impl Drop for PinnedRange {
    fn drop(&mut self) {
        let _ = self.context.use_here();
        // SAFETY: registered by `new`, and the range is still mapped.
        let _ = unsafe { sys::cuMemHostUnregister(self.address.cast()) };
    }
}
