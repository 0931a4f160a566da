//! Compiled kernels as the driver keeps them, and their launches. Which kernels there are is modules.rs.

use super::api::{Context, CudaError, Stream, check};
use cudarc::driver::sys;
use std::ffi::c_void;
use std::sync::Arc;

/// Compiled kernels on the device.
pub struct Module {
    raw: sys::CUmodule,
    context: Arc<Context>,
}

// SAFETY: modules may be used from any thread.
unsafe impl Send for Module {}
// SAFETY: as above.
unsafe impl Sync for Module {}

/// A kernel of a module that is kept alive elsewhere.
#[derive(Clone, Copy)]
pub struct Kernel {
    raw: sys::CUfunction,
}

// SAFETY: a handle that the driver locks.
unsafe impl Send for Kernel {}
// SAFETY: as above.
unsafe impl Sync for Kernel {}

impl Module {
    /// Loads a cubin, or PTX with a zero at its end.
    pub fn load(context: &Arc<Context>, image: &[u8]) -> Result<Module, CudaError> {
        context.use_here()?;
        let mut raw = std::ptr::null_mut();
        // SAFETY: the image is whole (it was made here or its digest was checked) and read during the call.
        check("cuModuleLoadData", unsafe {
            sys::cuModuleLoadData(&mut raw, image.as_ptr().cast())
        })?;
        Ok(Module {
            raw,
            context: context.clone(),
        })
    }

    pub fn kernel(&self, name: &str) -> Result<Kernel, CudaError> {
        let name = std::ffi::CString::new(name).unwrap_or_default();
        let mut raw = std::ptr::null_mut();
        // SAFETY: the module is alive, the name ends with a zero.
        let result = unsafe { sys::cuModuleGetFunction(&mut raw, self.raw, name.as_ptr()) };
        check("cuModuleGetFunction", result)?;
        Ok(Kernel { raw })
    }
}

impl Drop for Module {
    fn drop(&mut self) {
        let _ = self.context.use_here();
        // SAFETY: no kernel of it runs any more: lanes run dry before modules go.
        let _ = unsafe { sys::cuModuleUnload(self.raw) };
    }
}

/// One argument of a kernel; the driver copies it during the launch.
#[derive(Clone, Copy, Debug)]
pub enum Arg {
    Address(u64),
    U32(u32),
    F32(f32),
}

impl Kernel {
    /// Queues a launch over `grid` blocks of `block` threads.
    /// # Safety
    /// The arguments are those of the kernel, and every address is good for what the kernel does with it.
    pub unsafe fn launch(
        &self,
        stream: &Stream,
        grid: (u32, u32),
        block: u32,
        args: &[Arg],
    ) -> Result<(), CudaError> {
        let pointer = |arg: &Arg| -> *mut c_void {
            let at: *const c_void = match arg {
                Arg::Address(value) => std::ptr::from_ref(value).cast(),
                Arg::U32(value) => std::ptr::from_ref(value).cast(),
                Arg::F32(value) => std::ptr::from_ref(value).cast(),
            };
            at.cast_mut()
        };
        let mut pointers: Vec<*mut c_void> = args.iter().map(pointer).collect();
        // SAFETY: handles are alive; the pointers outlive the call, which copies what they point to.
        let result = unsafe {
            sys::cuLaunchKernel(
                self.raw,
                grid.0,
                grid.1,
                1,
                block,
                1,
                1,
                0,
                stream.raw(),
                pointers.as_mut_ptr(),
                std::ptr::null_mut(),
            )
        };
        check("cuLaunchKernel", result)
    }
}
