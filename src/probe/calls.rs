//! Calls to a disk as a job makes them: so many requests at once, far apart in a file. Which calls tell what of a job
//! is chosen in proof/bound.rs, what they should take is told by cost/.

use super::ProbeError;
use super::bench::Bench;
use super::disk::Way;
use crate::cost::requests::READ_THREADS;
use crate::machine::disk::{DiskError, DiskFile, IoPool, IoRequest};
use crate::machine::threaded::WRITE_THREADS;
use crate::units::{MIB, PAGE_BYTES};
use serde::{Deserialize, Serialize};
use std::path::Path;

/// The most that one call reads, and writes.
pub const CALL_BYTES: u64 = 32 * MIB;
pub const WRITE_CALL_BYTES: u64 = 4 * MIB;
/// A file of this size is written to be read as a job's own spill files are.
const SPILL_BYTES: u64 = 64 * MIB;

/// Requests of one call.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct CallSize {
    pub request_bytes: u64,
    pub requests: u64,
}

impl CallSize {
    pub fn bytes(self) -> u64 {
        self.request_bytes * self.requests
    }
}

/// A call that reads, from the store or from what was spilled just before.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Reads {
    pub spilled: bool,
    #[serde(flatten)]
    pub size: CallSize,
}

/// One call after the other.
pub struct Calls {
    file: DiskFile,
    pool: IoPool,
    way: Way,
    pub size: CallSize,
    /// Pages at which a request may begin.
    places: u64,
    asked: u64,
}

impl Calls {
    /// `store` is read from, with whole pages; a spill file is made in `spill`.
    pub fn reading(
        reads: Reads,
        bench: &Bench,
        (store, spill): (&Path, &Path),
    ) -> Result<Calls, ProbeError> {
        let file = match reads.spilled {
            true => spilled_file(bench, spill)?,
            false => DiskFile::open_read(store)?,
        };
        Calls::new(file, Way::Read, reads.size)
    }

    /// Writes to what is there already.
    pub fn writing(size: CallSize, bench: &Bench, spill: &Path) -> Result<Calls, ProbeError> {
        Calls::new(spilled_file(bench, spill)?, Way::Write, size)
    }

    fn new(file: DiskFile, way: Way, size: CallSize) -> Result<Calls, ProbeError> {
        let length = file.len_bytes()? / PAGE_BYTES * PAGE_BYTES;
        let request_bytes = size.request_bytes.min(length).max(PAGE_BYTES);
        let threads = match way {
            Way::Read => READ_THREADS,
            Way::Write => WRITE_THREADS,
        };
        Ok(Calls {
            file,
            pool: IoPool::new(threads)?,
            way,
            size: CallSize {
                request_bytes,
                ..size
            },
            places: length.saturating_sub(request_bytes) / PAGE_BYTES + 1,
            asked: 0,
        })
    }

    /// One call to or from the beginning of `memory`, whose length is a call's at least.
    pub fn call(&mut self, memory: &mut [u8]) -> Result<(), DiskError> {
        let CallSize {
            request_bytes,
            requests,
        } = self.size;
        // Far apart, so that nothing that looks ahead gets it right.
        let offset = |number: u64| number * 7919 % self.places * PAGE_BYTES;
        let parts = memory[..self.size.bytes() as usize].chunks_exact_mut(request_bytes as usize);
        let request = |(number, part)| match self.way {
            Way::Read => IoRequest::read(&self.file, offset(number), part),
            Way::Write => IoRequest::write(&self.file, offset(number), part),
        };
        let mut asked: Vec<IoRequest> = (self.asked..).zip(parts).map(request).collect();
        self.pool.run(&mut asked)?;
        self.asked += requests;
        Ok(())
    }
}

/// A file without a name, every byte of it written.
fn spilled_file(bench: &Bench, spill: &Path) -> Result<DiskFile, ProbeError> {
    let file = DiskFile::create_unlinked(spill, SPILL_BYTES)?;
    let pool = IoPool::new(WRITE_THREADS)?;
    let source = &bench.arena[..SPILL_BYTES as usize];
    pool.run(&mut [IoRequest::write(&file, 0, source)])?;
    Ok(file)
}
