//! Tests of the I/O pool: many odd requests, several callers at once, errors, small jobs spread out.

use super::*;
use crate::machine::arena::AlignedBuffer;
use crate::units::MIB;
use proptest::prelude::*;

const PAGE: u64 = PAGE_BYTES;

fn spill(bytes: u64) -> (tempfile::TempDir, DiskFile) {
    let dir = tempfile::tempdir().unwrap();
    let file = DiskFile::create_unlinked(dir.path(), bytes).unwrap();
    (dir, file)
}

fn filled(pages: u64) -> AlignedBuffer {
    let mut buffer = AlignedBuffer::new(pages * PAGE).unwrap();
    for (i, word) in buffer.as_mut_slice_of::<u32>().iter_mut().enumerate() {
        *word = (i as u32).wrapping_mul(2_654_435_761);
    }
    buffer
}

/// Cuts a buffer into slices of the given pages.
fn cut<'a>(mut rest: &'a mut [u8], pages: &[u64]) -> Vec<&'a mut [u8]> {
    let mut parts = Vec::new();
    for count in pages {
        let (part, after) = rest.split_at_mut((count * PAGE) as usize);
        parts.push(part);
        rest = after;
    }
    parts
}

/// Writes a buffer as one list of requests and reads it back as another.
fn write_then_read(threads: usize, written: &[u64], read: &[u64]) {
    let pages = written.iter().sum::<u64>().max(read.iter().sum());
    let (_dir, file) = spill(pages.max(1) * PAGE);
    let pool = IoPool::with_piece_bytes(threads, MIB).unwrap();
    let mut source = filled(pages);
    let expected = source.to_vec();
    let mut offset = 0;
    let mut writes = Vec::new();
    for part in cut(&mut source, written) {
        let bytes = part.len() as u64;
        writes.push(IoRequest::write(&file, offset, part));
        offset += bytes;
    }
    pool.run(&mut writes).unwrap();
    let mut target = AlignedBuffer::new(pages * PAGE).unwrap();
    let mut reads = Vec::new();
    offset = 0;
    for part in cut(&mut target, read) {
        let bytes = part.len() as u64;
        reads.push(IoRequest::read(&file, offset, part));
        offset += bytes;
    }
    pool.run(&mut reads).unwrap();
    let same = (written.iter().sum::<u64>().min(read.iter().sum()) * PAGE) as usize;
    assert!(target[..same] == expected[..same]);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(12))]
    #[test]
    fn any_cut_of_requests_moves_every_byte(
        threads in 1usize..5,
        written in prop::collection::vec(0u64..700, 1..6),
        read in prop::collection::vec(0u64..700, 1..6),
    ) {
        write_then_read(threads, &written, &read);
    }
}

#[test]
fn several_callers_share_a_pool() {
    let pool = IoPool::new(3).unwrap();
    let (_dir, file) = spill(32 * MIB);
    std::thread::scope(|scope| {
        for caller in 0..4u64 {
            let (pool, file) = (&pool, &file);
            scope.spawn(move || {
                let mut buffer = AlignedBuffer::new(8 * MIB).unwrap();
                buffer.fill(caller as u8 + 1);
                let at = caller * 8 * MIB;
                pool.run(&mut [IoRequest::write(file, at, &buffer)])
                    .unwrap();
                buffer.fill(0);
                pool.run(&mut [IoRequest::read(file, at, &mut buffer)])
                    .unwrap();
                assert!(buffer.iter().all(|b| *b == caller as u8 + 1));
            });
        }
    });
}

#[test]
fn an_error_ends_the_job_and_the_pool_lives_on() {
    let pool = IoPool::new(4).unwrap();
    let (_dir, file) = spill(4 * MIB);
    let mut buffer = AlignedBuffer::new(16 * MIB).unwrap();
    let error = pool
        .run(&mut [IoRequest::read(&file, 0, &mut buffer)])
        .unwrap_err();
    assert!(matches!(error, DiskError::Short { .. }), "{error}");
    pool.run(&mut [IoRequest::read(&file, 0, &mut buffer[..4 << 20])])
        .unwrap();
    let odd = pool
        .run(&mut [IoRequest::read(&file, 1, &mut buffer[..4096])])
        .unwrap_err();
    assert!(
        matches!(odd, DiskError::Unaligned { offset: 1, .. }),
        "{odd}"
    );
    pool.run(&mut []).unwrap();
}

#[test]
fn small_jobs_are_spread_and_large_ones_cut() {
    let pool = IoPool::new(4).unwrap();
    assert_eq!(pool.threads(), 4);
    let piece = |call_bytes| piece_bytes(call_bytes, pool.threads(), pool.piece_bytes);
    assert_eq!(piece(64 * MIB), 4 * MIB);
    assert_eq!(piece(32 * MIB), 2 * MIB);
    assert_eq!(piece(8 * MIB), MIB);
    assert_eq!(piece(4 * MIB), MIB);
    assert_eq!(piece(4096), MIB);
}
