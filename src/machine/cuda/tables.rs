//! Small tables that kernels read (rows, ids, token slots, attention items), on their way to the device:
//! written into page-locked DRAM, copied on the compute stream, and kept there while there is room. A kernel
//! copies them: one direction's copies are one queue of the hardware, whatever their streams, and there a table,
//! and with it the compute stream, would wait for the weights that are on their way.

use super::api::{CudaError, DeviceBuffer};
use super::launch::{Arg, Kernel};
use super::timeline::Timeline;
use crate::machine::arena::Region;
use crate::machine::memory::Memory;
use crate::tier::Tier;
use crate::units::round_up;
use std::collections::HashMap;
use std::sync::Arc;

/// Tables start at this alignment: an item holds addresses, and a thread copies so much.
const ALIGN: u64 = 16;
/// Of a block that copies.
const THREADS: u32 = 256;

/// A ring of two halves, mirrored in DRAM and on the device. A half is written anew when the operation
/// that used it last is done.
pub struct Tables {
    memory: Arc<Memory>,
    host: Region,
    mapped: Option<Mapped>,
    device: Arc<DeviceBuffer>,
    device_offset: u64,
    timeline: Arc<Timeline>,
    /// The operation that is being made ready.
    number: u64,
    half: usize,
    used: u64,
    /// Of the current half, what has been copied.
    copied: u64,
    last_user: [u64; 2],
    /// Tables on the device, by their address here. The Arc keeps that address from being used again.
    kept: HashMap<usize, (usize, Arc<[u32]>, u64)>,
}

/// Where a machine's tables are.
pub struct TablePlaces {
    pub host: Region,
    /// None where kernels cannot read it there: the copy engine has to.
    pub mapped: Option<Mapped>,
    pub device_offset: u64,
}

/// The ring in DRAM as kernels see it, and the one that copies out of it; its module is kept alive elsewhere.
#[derive(Clone, Copy)]
pub struct Mapped {
    pub address: u64,
    pub kernel: Kernel,
}

impl Tables {
    pub fn new(
        memory: Arc<Memory>,
        device: Arc<DeviceBuffer>,
        timeline: Arc<Timeline>,
        places: TablePlaces,
    ) -> Self {
        Tables {
            memory,
            host: places.host,
            mapped: places.mapped,
            device,
            device_offset: places.device_offset,
            timeline,
            number: 0,
            half: 0,
            used: 0,
            copied: 0,
            last_user: [0; 2],
            kept: HashMap::new(),
        }
    }

    fn half_bytes(&self) -> u64 {
        self.host.bytes / 2 / ALIGN * ALIGN
    }

    /// Makes room for one operation's tables, `lengths` bytes each. Where there is none left, the other
    /// half is next: what was kept there is forgotten.
    pub fn open(&mut self, number: u64, lengths: impl Iterator<Item = u64>) {
        let bytes: u64 = lengths.map(|l| round_up(l.max(1), ALIGN)).sum();
        assert!(
            bytes <= self.half_bytes(),
            "tables of {bytes} bytes in a ring of {}: the footprint is too small",
            self.host.bytes
        );
        if self.used + bytes > self.half_bytes() {
            self.half = 1 - self.half;
            self.timeline.wait_done(self.last_user[self.half]);
            let half = self.half;
            self.kept.retain(|_, (of, _, _)| *of != half);
            (self.used, self.copied) = (0, 0);
        }
        self.number = number;
    }

    /// Device address of a shared table's entry `first`; copied once for all operations that share it.
    pub fn shared(&mut self, entries: &Arc<[u32]>, first: usize) -> u64 {
        let name = entries.as_ptr() as usize;
        if let Some((half, _, address)) = self.kept.get(&name) {
            self.last_user[*half] = self.number;
            return address + 4 * first as u64;
        }
        let address = self.place(bytemuck::cast_slice(entries));
        let half = self.half;
        self.kept.insert(name, (half, entries.clone(), address));
        address + 4 * first as u64
    }

    /// Device address of bytes that the operation alone needs.
    pub fn place(&mut self, bytes: &[u8]) -> u64 {
        let length = round_up(bytes.len().max(1) as u64, ALIGN);
        assert!(
            self.used + length <= self.half_bytes(),
            "an operation has more tables than it said"
        );
        let at = self.half as u64 * self.half_bytes() + self.used;
        self.used += length;
        self.last_user[self.half] = self.number;
        // SAFETY: the operations that used this half before are done (`open`), so nothing reads it.
        let target = unsafe {
            self.memory
                .write::<u8>(Tier::Cpu, self.host.offset + at, bytes.len())
        };
        target.copy_from_slice(bytes);
        self.device.at(self.device_offset + at, length)
    }

    /// Queues the copy of everything that was placed since the last one: before the operation's own kernels, so that
    /// when the operation is done the bytes in DRAM have been read, too.
    pub fn copy(&mut self) -> Result<(), CudaError> {
        let bytes = self.used - self.copied;
        if bytes == 0 {
            return Ok(());
        }
        let at = self.half as u64 * self.half_bytes() + self.copied;
        self.copied = self.used;
        let to = self.device.at(self.device_offset + at, bytes);
        let stream = self.timeline.stream();
        let Some(mapped) = self.mapped else {
            let from = self.memory.cpu_address(self.host.offset + at, bytes);
            // SAFETY: both ranges are the ring's; they are written anew only after their last user is done.
            return unsafe { stream.upload(to, from, bytes) };
        };
        let count = (bytes / ALIGN) as u32;
        let args = [
            Arg::Address(mapped.address + at),
            Arg::Address(to),
            Arg::U32(count),
        ];
        let grid = (count.div_ceil(THREADS), 1);
        // SAFETY: arguments as kernels/README.md lists them; both ranges are the ring's, in units of ALIGN since
        // every table is, and are written anew only after their last user is done.
        unsafe { mapped.kernel.launch(stream, grid, THREADS, &args) }
    }
}
