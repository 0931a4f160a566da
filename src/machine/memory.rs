//! The two arenas of a machine, shared by its lanes. The Schedule's fences decide who touches which
//! bytes when; here offsets become slices, bounds-checked against the arena.

use super::MachineError;
use super::arena::{Arena, MemoryError, Region};
use crate::tier::{PerTier, Tier};
use bytemuck::Pod;
use std::sync::Arc;

/// Memory that the CPU cannot reach in place: a real GPU's.
pub trait RemoteArena: Send + Sync {
    /// Copies `bytes` to `offset` and returns when they are there.
    fn write(&self, offset: u64, bytes: &[u8]) -> Result<(), MachineError>;
}

/// Memory of the Gpu tier (played by DRAM on the host machine) and of the Cpu tier.
pub struct Memory {
    arenas: PerTier<Option<Arena>>,
    remote: Option<Arc<dyn RemoteArena>>,
}

impl Memory {
    pub fn new(gpu_bytes: u64, cpu_bytes: u64) -> Result<Self, MemoryError> {
        let arena = |bytes: u64| {
            if bytes > 0 {
                Arena::new(bytes).map(Some)
            } else {
                Ok(None)
            }
        };
        Ok(Memory {
            arenas: PerTier {
                gpu: arena(gpu_bytes)?,
                cpu: arena(cpu_bytes)?,
                disk: None,
            },
            remote: None,
        })
    }

    /// The Gpu tier is somewhere else: only `fill` reaches it.
    pub fn with_remote(remote: Arc<dyn RemoteArena>, cpu_bytes: u64) -> Result<Self, MemoryError> {
        let remote = Some(remote);
        Ok(Memory {
            remote,
            ..Memory::new(0, cpu_bytes)?
        })
    }

    /// Copies bytes to a tier, wherever it is.
    ///
    /// # Safety
    /// No running operation touches these bytes.
    pub unsafe fn fill(&self, tier: Tier, offset: u64, bytes: &[u8]) -> Result<(), MachineError> {
        match (&self.remote, tier) {
            (Some(remote), Tier::Gpu) => remote.write(offset, bytes),
            _ => {
                // SAFETY: passed on to the caller.
                unsafe { self.write::<u8>(tier, offset, bytes.len()) }.copy_from_slice(bytes);
                Ok(())
            }
        }
    }

    /// Address of a stretch of the Cpu arena, for a driver's calls. Panics when it sticks out.
    pub fn cpu_address(&self, offset: u64, bytes: u64) -> *mut u8 {
        self.arena(Tier::Cpu).pointer(Region { offset, bytes })
    }

    fn arena(&self, tier: Tier) -> &Arena {
        self.arenas[tier]
            .as_ref()
            .expect("operations only name tiers that the footprint has")
    }

    fn region(offset: u64, elements: usize, size: usize) -> Region {
        Region {
            offset,
            bytes: (elements * size) as u64,
        }
    }

    /// `elements` values from `offset`.
    ///
    /// # Safety
    /// No running operation writes these bytes: guaranteed by the fences of the Schedule.
    pub unsafe fn read<T: Pod>(&self, tier: Tier, offset: u64, elements: usize) -> &[T] {
        // SAFETY: passed on to the caller.
        unsafe {
            self.arena(tier)
                .slice_of(Self::region(offset, elements, size_of::<T>()))
        }
    }

    /// `elements` values from `offset`, to be written.
    ///
    /// # Safety
    /// No running operation reads or writes these elements. Two operations may hold ranges that overlap
    /// only where they write interleaved columns of one product: each touches its own columns alone.
    #[allow(clippy::mut_from_ref)]
    pub unsafe fn write<T: Pod>(&self, tier: Tier, offset: u64, elements: usize) -> &mut [T] {
        // SAFETY: passed on to the caller.
        unsafe {
            self.arena(tier)
                .slice_of_mut(Self::region(offset, elements, size_of::<T>()))
        }
    }
}
