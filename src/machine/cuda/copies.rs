//! The two link lanes: copies between the host arena and the device, straight from page-locked DRAM, and
//! from other DRAM through a small page-locked relay in pieces, one filling while the other travels.

use super::api::{Context, CudaError, DeviceBuffer, Event, PinnedRange};
use super::gpu_error;
use super::issue::Work;
use super::timeline::Timeline;
use crate::machine::arena::Region;
use crate::machine::memory::Memory;
use crate::machine::ops::{Copy2d, Op};
use crate::machine::{Fences, MachineError};
use crate::tier::Lane;
use cudarc::driver::sys::{CUDA_MEMCPY2D, CUmemorytype_enum as MemoryType};
use std::sync::Arc;

/// What of the host arena is page-locked.
#[derive(Default)]
pub struct Pinned {
    pub ranges: Vec<PinnedRange>,
}

impl Pinned {
    pub fn contains(&self, address: *const u8, bytes: u64) -> bool {
        self.ranges.iter().any(|r| r.contains(address, bytes))
    }

    /// Where kernels read it; None where it is not page-locked, or the device cannot map it.
    pub fn device_address(&self, address: *const u8, bytes: u64) -> Option<u64> {
        let range = self.ranges.iter().find(|r| r.contains(address, bytes))?;
        range.device_address(address).ok()
    }
}

/// One direction.
pub struct Copies {
    pub memory: Arc<Memory>,
    pub device: Arc<DeviceBuffer>,
    pub timeline: Arc<Timeline>,
    pub pinned: Arc<Pinned>,
    pub up: bool,
    /// Of the lane that goes up.
    pub relay: Option<Relay>,
}

impl Work for Copies {
    fn comes_after(&mut self, after: &Fences) {
        if let Some(relay) = &mut self.relay {
            relay.after_down = after.mark(Lane::GpuToCpu);
        }
    }

    fn queue(&mut self, _: u64, op: Op) -> Result<(), MachineError> {
        let Op::Copy { pieces, .. } = &op else {
            return Err(MachineError::Unsupported(format!(
                "another lane for {op:?}"
            )));
        };
        self.copy_all(pieces).map_err(gpu_error)
    }
}

impl Copies {
    /// Neighbours as one: a call takes the driver as long as a link takes for some ten KiB, which is more than a
    /// sequence's rows.
    fn copy_all(&mut self, pieces: &[Copy2d]) -> Result<(), CudaError> {
        let mut pieces = pieces.iter().filter(|p| p.rows * p.row_bytes > 0);
        let Some(mut run) = pieces.next().copied() else {
            return Ok(());
        };
        for piece in pieces {
            match self.joined(&run, piece) {
                Some(both) => run = both,
                None => self.copy(&std::mem::replace(&mut run, *piece))?,
            }
        }
        self.copy(&run)
    }

    /// Not across the end of what is page-locked; rows apart are for memory that is.
    fn joined(&self, run: &Copy2d, piece: &Copy2d) -> Option<Copy2d> {
        let both = run.with(piece)?;
        let locked = |piece: &Copy2d| {
            let (host, _, stride, _) = self.ends(piece);
            self.pinned.contains(host, reach(piece, stride))
        };
        let apart = !locked(run) && !locked(piece) && both.is_flat();
        (locked(&both) || apart).then_some(both)
    }

    /// (host address, device address, host stride, device stride) of a piece.
    fn ends(&self, piece: &Copy2d) -> (*mut u8, u64, u64, u64) {
        let (host, device) = match self.up {
            true => ((piece.from, piece.from_stride), (piece.to, piece.to_stride)),
            false => ((piece.to, piece.to_stride), (piece.from, piece.from_stride)),
        };
        let address = self.memory.cpu_address(host.0, reach(piece, host.1));
        let there = self.device.at(device.0, reach(piece, device.1));
        (address, there, host.1, device.1)
    }

    fn copy(&mut self, piece: &Copy2d) -> Result<(), CudaError> {
        let (host, device, host_stride, device_stride) = self.ends(piece);
        let (length, flat) = (reach(piece, host_stride), piece.is_flat());
        let timeline = self.timeline.clone();
        let stream = timeline.stream();
        let rows = self.rows(piece, (host, host_stride), (device, device_stride));
        let through_relay = self.up && flat && !self.pinned.contains(host, length);
        match &mut self.relay {
            // SAFETY: the ranges were checked by `ends`; the fences of a copy come after its source was
            // written and its target was last used, and whoever comes next waits for the copy.
            Some(relay) if through_relay => unsafe {
                relay.upload(&timeline, device, (host, length))
            },
            // SAFETY: as above.
            _ if flat && self.up => unsafe { stream.upload(device, host, length) },
            // SAFETY: as above.
            _ if flat => unsafe { stream.download(host, device, length) },
            // SAFETY: as above, for every row.
            _ => unsafe { stream.copy_rows(&rows) },
        }
    }

    fn rows(
        &self,
        piece: &Copy2d,
        (host, host_stride): (*mut u8, u64),
        (device, device_stride): (u64, u64),
    ) -> CUDA_MEMCPY2D {
        let (here, there) = (
            MemoryType::CU_MEMORYTYPE_HOST,
            MemoryType::CU_MEMORYTYPE_DEVICE,
        );
        let (from, to) = if self.up {
            (here, there)
        } else {
            (there, here)
        };
        let (from_stride, to_stride) = match self.up {
            true => (host_stride, device_stride),
            false => (device_stride, host_stride),
        };
        CUDA_MEMCPY2D {
            srcXInBytes: 0,
            srcY: 0,
            srcMemoryType: from,
            srcHost: host.cast_const().cast(),
            srcDevice: device,
            srcArray: std::ptr::null_mut(),
            srcPitch: from_stride as usize,
            dstXInBytes: 0,
            dstY: 0,
            dstMemoryType: to,
            dstHost: host.cast(),
            dstDevice: device,
            dstArray: std::ptr::null_mut(),
            dstPitch: to_stride as usize,
            WidthInBytes: piece.row_bytes as usize,
            Height: piece.rows as usize,
        }
    }
}

/// From a piece's first byte to its last, where rows are so far apart.
fn reach(piece: &Copy2d, stride: u64) -> u64 {
    (piece.rows.max(1) - 1) * stride + piece.row_bytes
}

/// Page-locked DRAM for what is not: two halves, each with the event of its last copy.
pub struct Relay {
    memory: Arc<Memory>,
    place: Region,
    free: [Event; 2],
    used: [bool; 2],
    next: usize,
    /// The lane that goes down, and which of its copies has to be over before the relay is filled.
    down: Arc<Timeline>,
    after_down: u64,
}

impl Relay {
    pub fn new(
        context: &Arc<Context>,
        memory: Arc<Memory>,
        place: Region,
        down: Arc<Timeline>,
    ) -> Result<Relay, CudaError> {
        Ok(Relay {
            memory,
            place,
            free: [Event::new(context)?, Event::new(context)?],
            used: [false; 2],
            next: 0,
            down,
            after_down: 0,
        })
    }

    /// Queues a copy of DRAM that is not page-locked, piece by piece.
    /// # Safety
    /// `from` is readable once the copy down `after_down` is over; `to` is the device's until the stream has passed this.
    unsafe fn upload(
        &mut self,
        timeline: &Timeline,
        to: u64,
        (from, bytes): (*const u8, u64),
    ) -> Result<(), CudaError> {
        // The stream waits for what was written on the device, but the relay is filled now, by this thread. A copy
        // down to such memory is mostly over when its call returns; no driver promises that.
        self.down.wait_done(self.after_down);
        let half_bytes = self.place.bytes / 2;
        let mut done = 0;
        while done < bytes {
            let piece = half_bytes.min(bytes - done);
            let half = self.next;
            self.next = 1 - half;
            if self.used[half] {
                self.free[half].synchronise()?;
            }
            let at = self.place.offset + half as u64 * half_bytes;
            let relay = self.memory.cpu_address(at, piece);
            // SAFETY: the caller's for the source; the half is this lane's alone, and its last copy is over.
            unsafe {
                std::ptr::copy_nonoverlapping(from.add(done as usize), relay, piece as usize);
                timeline.stream().upload(to + done, relay, piece)?;
            }
            self.free[half].record(timeline.stream())?;
            self.used[half] = true;
            done += piece;
        }
        Ok(())
    }
}
