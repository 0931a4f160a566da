//! Memory mapped once and carved into regions: arenas for tensors, aligned buffers for direct I/O.
//! Who may touch a region when is the schedule's business (its fences), not decided here.

use crate::machine::os;
use crate::units::{MIB, PAGE_BYTES, round_up, show_bytes};
use bytemuck::Pod;
use memmap2::{MmapOptions, MmapRaw};
use std::ops::{Deref, DerefMut};
use thiserror::Error;

/// Why memory could not be had.
#[derive(Debug, Error)]
pub enum MemoryError {
    #[error(
        "{} of memory are needed and {} are free ({} missing): lower --cpu-mem or end other programs",
        show_bytes(*needed_bytes), show_bytes(*free_bytes), show_bytes(needed_bytes - free_bytes)
    )]
    Short { needed_bytes: u64, free_bytes: u64 },
    #[error("{} of memory could not be mapped ({source}): lower --cpu-mem or raise `ulimit -v`", show_bytes(*bytes))]
    Map { bytes: u64, source: std::io::Error },
    #[error("a region of {} does not fit into the {} left of an arena: the footprint of the plan is too small",
        show_bytes(*needed_bytes), show_bytes(*left_bytes))]
    Region { needed_bytes: u64, left_bytes: u64 },
}

/// A piece of an arena: where it begins and how long it is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Region {
    pub offset: u64,
    pub bytes: u64,
}

impl Region {
    pub fn end(self) -> u64 {
        self.offset + self.bytes
    }

    /// The piece `[offset, offset + bytes)` of this region. Panics when it sticks out.
    pub fn part(self, offset: u64, bytes: u64) -> Region {
        let fits = offset
            .checked_add(bytes)
            .is_some_and(|end| end <= self.bytes);
        assert!(
            fits,
            "a part of {bytes} bytes at {offset} sticks out of {self:?}"
        );
        Region {
            offset: self.offset + offset,
            bytes,
        }
    }
}

/// Hands out regions one after another. Pure arithmetic: a footprint is counted with the same
/// carver that later lays out the arena, so that the two cannot disagree.
#[derive(Clone, Debug)]
pub struct Carver {
    capacity_bytes: u64,
    used_bytes: u64,
}

impl Carver {
    pub fn new(capacity_bytes: u64) -> Self {
        Carver {
            capacity_bytes,
            used_bytes: 0,
        }
    }

    /// The next `bytes`, beginning at a multiple of `align_bytes`.
    pub fn take(&mut self, bytes: u64, align_bytes: u64) -> Result<Region, MemoryError> {
        let offset = round_up(self.used_bytes, align_bytes.max(1));
        let left_bytes = self.capacity_bytes.saturating_sub(offset);
        if bytes > left_bytes {
            return Err(MemoryError::Region {
                needed_bytes: bytes,
                left_bytes,
            });
        }
        self.used_bytes = offset + bytes;
        Ok(Region { offset, bytes })
    }

    pub fn used_bytes(&self) -> u64 {
        self.used_bytes
    }
}

const HUGE_PAGE_BYTES: u64 = 2 * MIB;

/// Anonymous memory, huge-page advised, every page written before `new` returns; unmapped on drop.
pub struct Arena {
    map: Option<MmapRaw>,
    base_offset: u64,
    bytes: u64,
}

impl Arena {
    /// Maps and writes `bytes`. More than what is free now is an error, not a kill later.
    pub fn new(bytes: u64) -> Result<Arena, MemoryError> {
        // Where the free memory cannot be read, the mapping itself is the only check.
        let free_bytes = os::memory_now().map_or(u64::MAX, |now| now.free_bytes);
        if bytes > free_bytes {
            return Err(MemoryError::Short {
                needed_bytes: bytes,
                free_bytes,
            });
        }
        let arena = Self::map(bytes)?;
        arena.write_every_page();
        Ok(arena)
    }

    fn map(bytes: u64) -> Result<Arena, MemoryError> {
        if bytes == 0 {
            return Ok(Arena {
                map: None,
                base_offset: 0,
                bytes,
            });
        }
        let align_bytes = if bytes >= HUGE_PAGE_BYTES {
            HUGE_PAGE_BYTES
        } else {
            PAGE_BYTES
        };
        let failed = |source| MemoryError::Map { bytes, source };
        let mapped_bytes = round_up(bytes, PAGE_BYTES) + align_bytes - PAGE_BYTES;
        let map = MmapOptions::new().len(mapped_bytes as usize).map_anon();
        let map = MmapRaw::from(map.map_err(failed)?);
        let address = map.as_mut_ptr() as u64;
        let arena = Arena {
            base_offset: round_up(address, align_bytes) - address,
            map: Some(map),
            bytes,
        };
        arena.advise_huge_pages();
        Ok(arena)
    }

    /// Huge pages for the whole ones, small pages for the tail: a huge page there would make more
    /// memory resident than was asked for. Advice may be refused; then pages are small.
    #[cfg(target_os = "linux")]
    fn advise_huge_pages(&self) {
        use memmap2::Advice;
        let Some(map) = &self.map else { return };
        let whole = (self.bytes / HUGE_PAGE_BYTES * HUGE_PAGE_BYTES) as usize;
        let base = self.base_offset as usize;
        if whole > 0 {
            let _ = map.advise_range(Advice::HugePage, base, whole);
        }
        let _ = map.advise_range(Advice::NoHugePage, base + whole, map.len() - base - whole);
    }

    #[cfg(not(target_os = "linux"))]
    fn advise_huge_pages(&self) {}

    /// Several threads, because the kernel zeroes pages at a few GB/s a core.
    fn write_every_page(&self) {
        const STRIPE_BYTES: u64 = 64 * MIB;
        let cores = std::thread::available_parallelism().map_or(1, |n| n.get() as u64);
        let threads = self.bytes.div_ceil(STRIPE_BYTES).clamp(1, cores);
        let share = round_up(self.bytes.div_ceil(threads), HUGE_PAGE_BYTES);
        let stripes = (0..threads).map(|t| (t * share, ((t + 1) * share).min(self.bytes)));
        if threads == 1 {
            return self.write_pages(0, self.bytes);
        }
        std::thread::scope(|scope| {
            for (begin, end) in stripes.filter(|(begin, end)| begin < end) {
                scope.spawn(move || self.write_pages(begin, end));
            }
        });
    }

    fn write_pages(&self, begin: u64, end: u64) {
        for offset in (begin..end).step_by(PAGE_BYTES as usize) {
            // SAFETY: offset < self.bytes, so the byte lies inside the mapping, and nobody else
            // holds a view yet: the arena is still being built.
            unsafe { self.base().add(offset as usize).write_volatile(0) };
        }
    }

    fn base(&self) -> *mut u8 {
        match &self.map {
            // SAFETY: base_offset is below the mapped length by construction.
            Some(map) => unsafe { map.as_mut_ptr().add(self.base_offset as usize) },
            None => std::ptr::without_provenance_mut(PAGE_BYTES as usize),
        }
    }

    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// A carver over the whole arena.
    pub fn carver(&self) -> Carver {
        Carver::new(self.bytes)
    }

    /// Address of a region's first byte, for registering memory with a driver or a kernel call.
    /// Panics when the region sticks out of the arena.
    pub fn pointer(&self, region: Region) -> *mut u8 {
        let end = region.offset.checked_add(region.bytes);
        assert!(
            end.is_some_and(|end| end <= self.bytes),
            "{region:?} sticks out of an arena of {} bytes",
            self.bytes
        );
        // SAFETY: offset <= self.bytes was just checked, so the address stays in the mapping.
        unsafe { self.base().add(region.offset as usize) }
    }

    /// # Safety
    /// While the slice lives, nobody writes any byte of `region` (lanes guarantee it by fences).
    pub unsafe fn slice(&self, region: Region) -> &[u8] {
        let pointer = self.pointer(region);
        // SAFETY: in bounds (checked by `pointer`), initialised (every page was written or is
        // zero-filled by the kernel), not written meanwhile (the caller's promise).
        unsafe { std::slice::from_raw_parts(pointer, region.bytes as usize) }
    }

    /// # Safety
    /// While the slice lives, nobody else reads or writes any byte of `region`.
    #[allow(clippy::mut_from_ref)] // one arena is shared by lanes that own disjoint regions of it
    pub unsafe fn slice_mut(&self, region: Region) -> &mut [u8] {
        let pointer = self.pointer(region);
        // SAFETY: in bounds and initialised as in `slice`, exclusive by the caller's promise.
        unsafe { std::slice::from_raw_parts_mut(pointer, region.bytes as usize) }
    }

    /// A typed view; panics where the region is not aligned to or not a multiple of `T`.
    ///
    /// # Safety
    /// As for [`Arena::slice`].
    pub unsafe fn slice_of<T: Pod>(&self, region: Region) -> &[T] {
        // SAFETY: the caller's promise is that of `slice`.
        bytemuck::cast_slice(unsafe { self.slice(region) })
    }

    /// A typed view to write; panics as `slice_of` does.
    ///
    /// # Safety
    /// As for [`Arena::slice_mut`].
    #[allow(clippy::mut_from_ref)] // as in `slice_mut`
    pub unsafe fn slice_of_mut<T: Pod>(&self, region: Region) -> &mut [T] {
        // SAFETY: the caller's promise is that of `slice_mut`.
        bytemuck::cast_slice_mut(unsafe { self.slice_mut(region) })
    }
}

/// Owned memory whose base is a multiple of 4096, rounded up to whole pages: what direct I/O needs.
pub struct AlignedBuffer(Arena);

impl AlignedBuffer {
    pub fn new(bytes: u64) -> Result<AlignedBuffer, MemoryError> {
        Arena::new(round_up(bytes, PAGE_BYTES)).map(AlignedBuffer)
    }

    /// The buffer as numbers.
    pub fn as_slice_of<T: Pod>(&self) -> &[T] {
        bytemuck::cast_slice(self)
    }

    pub fn as_mut_slice_of<T: Pod>(&mut self) -> &mut [T] {
        bytemuck::cast_slice_mut(self)
    }

    fn whole(&self) -> Region {
        Region {
            offset: 0,
            bytes: self.0.bytes,
        }
    }
}

impl Deref for AlignedBuffer {
    type Target = [u8];
    fn deref(&self) -> &[u8] {
        // SAFETY: the arena is owned, and `&self` excludes writers for as long as the slice lives.
        unsafe { self.0.slice(self.whole()) }
    }
}

impl DerefMut for AlignedBuffer {
    fn deref_mut(&mut self) -> &mut [u8] {
        // SAFETY: the arena is owned, and `&mut self` excludes everyone else.
        unsafe { self.0.slice_mut(self.whole()) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::units::GIB;

    #[test]
    fn arenas_are_aligned_zeroed_and_writable_to_the_last_byte() {
        for bytes in [1, 4095, 4096, 3 * MIB + 5, 130 * MIB + 1] {
            let arena = Arena::new(bytes).unwrap();
            let all = Region { offset: 0, bytes };
            let align = if bytes >= HUGE_PAGE_BYTES {
                HUGE_PAGE_BYTES
            } else {
                PAGE_BYTES
            };
            assert_eq!(arena.pointer(all) as u64 % align, 0, "{bytes}");
            // SAFETY: the only view of this arena.
            let slice = unsafe { arena.slice_mut(all) };
            assert!(slice.iter().all(|b| *b == 0));
            slice[bytes as usize - 1] = 7;
            // SAFETY: no writer is left.
            assert_eq!(unsafe { arena.slice(all.part(bytes - 1, 1)) }, [7]);
        }
    }

    #[cfg(target_os = "linux")]
    #[test]
    fn every_page_is_resident_and_none_beyond() {
        let arena = Arena::new(5 * MIB + 4096).unwrap();
        let map = arena.map.as_ref().unwrap();
        let mut resident = vec![0u8; map.len() / 4096];
        // SAFETY: the range is the whole mapping and the vector has a byte for each of its pages.
        let rc =
            unsafe { libc::mincore(map.as_mut_ptr().cast(), map.len(), resident.as_mut_ptr()) };
        assert_eq!(rc, 0);
        let first = arena.base_offset as usize / 4096;
        let ours = first..first + arena.bytes as usize / 4096;
        for (page, state) in resident.iter().enumerate() {
            assert_eq!(
                *state & 1 == 1,
                ours.contains(&page),
                "page {page} of {ours:?}"
            );
        }
    }

    #[test]
    fn what_is_not_free_is_an_error_at_the_start() {
        let error = Arena::new(1 << 60).err().unwrap();
        assert!(matches!(error, MemoryError::Short { .. }), "{error}");
        assert!(error.to_string().contains("missing"));
        assert!(Arena::new(0).unwrap().bytes() == 0);
    }

    #[test]
    fn carving_aligns_and_ends() {
        let mut carver = Carver::new(GIB);
        assert_eq!(
            carver.take(10, 64).unwrap(),
            Region {
                offset: 0,
                bytes: 10
            }
        );
        let second = carver.take(100, 4096).unwrap();
        assert_eq!(second.offset, 4096);
        assert_eq!(second.part(50, 50).end(), second.end());
        assert_eq!(carver.used_bytes(), 4196);
        assert!(carver.take(GIB, 1).is_err());
        assert_eq!(carver.used_bytes(), 4196, "a refusal takes nothing");
    }

    #[test]
    #[should_panic(expected = "sticks out")]
    fn a_region_beyond_the_arena_panics() {
        let region = Region {
            offset: 4000,
            bytes: 200,
        };
        Arena::new(4096).unwrap().pointer(region);
    }

    #[test]
    fn buffers_are_pages_and_numbers() {
        let mut buffer = AlignedBuffer::new(5000).unwrap();
        assert_eq!(buffer.len(), 8192);
        buffer.as_mut_slice_of::<f32>()[2047] = 1.5;
        assert_eq!(buffer.as_slice_of::<u32>()[2047], 1.5f32.to_bits());
    }
}
