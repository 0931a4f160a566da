//! The two arenas of a machine, shared by its lanes. The Schedule's fences decide who touches which
//! bytes when; here offsets become slices, bounds-checked against the arena.

use super::arena::{Arena, MemoryError, Region};
use crate::tier::{PerTier, Tier};
use bytemuck::Pod;

/// Memory of the Gpu tier (played by DRAM on the host machine) and of the Cpu tier.
pub struct Memory {
    arenas: PerTier<Option<Arena>>,
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
        })
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
