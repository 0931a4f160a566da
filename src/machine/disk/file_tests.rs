//! Tests of one disk file: round trips, refusals, ends of files, spill files without a name.

use super::*;
use crate::units::MIB;
use std::os::unix::fs::{MetadataExt, PermissionsExt};

fn pattern(bytes: u64, seed: u8) -> AlignedBuffer {
    let mut buffer = AlignedBuffer::new(bytes).unwrap();
    for (i, b) in buffer.iter_mut().enumerate() {
        *b = (i as u8).wrapping_mul(31) ^ (i >> 12) as u8 ^ seed;
    }
    buffer
}

fn round_trip(file: &DiskFile) {
    let source = pattern(3 * MIB, 1);
    file.write_at(&source, 8192).unwrap();
    let mut back = AlignedBuffer::new(3 * MIB).unwrap();
    file.read_at(&mut back, 8192).unwrap();
    assert!(*source == *back);
    file.read_at(&mut back[..8192], 0).unwrap();
    assert!(back[..8192].iter().all(|b| *b == 0));
}

#[test]
fn what_is_written_is_read_directly_and_buffered() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("data");
    round_trip(&DiskFile::create(&path).unwrap());
    let mut buffered = DiskFile::open_write(&path).unwrap();
    buffered.clear_direct().unwrap();
    assert!(!buffered.is_direct());
    round_trip(&buffered);
    let mut page = AlignedBuffer::new(4096).unwrap();
    let reader = DiskFile::open_read(&path).unwrap();
    reader.read_at(&mut page, 8192).unwrap();
    assert!(*page == pattern(3 * MIB, 1)[..4096]);
    assert_eq!(reader.len_bytes().unwrap(), 3 * MIB + 8192);
}

#[test]
fn created_files_begin_empty() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("data");
    std::fs::write(&path, "old").unwrap();
    assert_eq!(DiskFile::create(&path).unwrap().len_bytes().unwrap(), 0);
}

#[test]
fn the_last_page_is_filled_with_zeros_and_no_page_comes_after_it() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("odd");
    std::fs::write(&path, vec![9u8; 5000]).unwrap();
    let mut direct = DiskFile::open_read(&path).unwrap();
    for _ in 0..2 {
        let mut pages = pattern(12288, 3);
        direct.read_at(&mut pages[..8192], 0).unwrap();
        assert!(pages[..5000].iter().all(|b| *b == 9));
        assert!(pages[5000..8192].iter().all(|b| *b == 0));
        let error = direct.read_at(&mut pages, 0).unwrap_err();
        assert!(
            matches!(
                error,
                DiskError::Short {
                    missing_bytes: 4096,
                    ..
                }
            ),
            "{error}"
        );
        direct.clear_direct().unwrap();
    }
}

#[test]
fn odd_offsets_lengths_and_addresses_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let file = DiskFile::create(&dir.path().join("data")).unwrap();
    let mut buffer = AlignedBuffer::new(16384).unwrap();
    for (range, offset) in [(0..4096, 100), (0..4000, 0), (512..4608, 0)] {
        let error = file
            .read_at(&mut buffer[range.clone()], offset)
            .unwrap_err();
        assert!(matches!(error, DiskError::Unaligned { .. }), "{error}");
        assert!(file.write_at(&buffer[range], offset).is_err());
    }
}

#[test]
fn errors_name_the_path() {
    let missing = DiskFile::open_read(Path::new("/no/such/file"))
        .unwrap_err()
        .to_string();
    assert!(
        missing.contains("/no/such/file") && missing.contains("open"),
        "{missing}"
    );
    let error = DiskFile::create_unlinked(Path::new("/proc"), 4096)
        .unwrap_err()
        .to_string();
    assert!(
        error.contains("/proc") && error.contains("--offload-dir"),
        "{error}"
    );
}

#[test]
fn a_read_only_handle_cannot_write() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("data");
    std::fs::write(&path, [1u8; 4096]).unwrap();
    let page = AlignedBuffer::new(4096).unwrap();
    let error = DiskFile::open_read(&path)
        .unwrap()
        .write_at(&page, 0)
        .unwrap_err();
    assert!(
        matches!(
            error,
            DiskError::Transfer {
                action: "write",
                ..
            }
        ),
        "{error}"
    );
}

#[cfg(target_os = "linux")]
#[test]
fn memory_is_no_disk() {
    let error = DiskFile::create_unlinked(Path::new("/dev/shm"), 4096).unwrap_err();
    assert!(error.to_string().contains("tmpfs"), "{error}");
}

#[test]
fn spill_files_have_no_name_an_owner_and_their_space() {
    let dir = tempfile::tempdir().unwrap();
    let spill = DiskFile::create_unlinked(dir.path(), 5 * MIB).unwrap();
    assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0);
    let metadata = spill.file.metadata().unwrap();
    assert_eq!(metadata.permissions().mode() & 0o777, 0o600);
    assert_eq!(metadata.nlink(), 0);
    assert_eq!(metadata.len(), 5 * MIB);
    assert!(metadata.blocks() * 512 >= 5 * MIB);
    round_trip(&spill);
}

/// Where the first hole begins at or after `from`: what is reserved only is one.
#[cfg(target_os = "linux")]
fn first_hole(file: &DiskFile, from: u64) -> u64 {
    use std::os::fd::AsRawFd;
    // SAFETY: an open descriptor and two numbers.
    let hole = unsafe { libc::lseek(file.file.as_raw_fd(), from as i64, libc::SEEK_HOLE) };
    hole as u64
}

#[cfg(target_os = "linux")]
#[test]
fn what_is_written_out_is_reserved_no_more_but_written() {
    let dir = tempfile::tempdir().unwrap();
    let bytes = 3 * MIB + PAGE_BYTES;
    let spill = DiskFile::create_unlinked(dir.path(), bytes + MIB).unwrap();
    let before = first_hole(&spill, 0);
    spill.write_out(0..MIB).unwrap();
    spill.write_out(MIB..bytes).unwrap();
    let after = first_hole(&spill, 0);
    assert!(before < bytes && after >= bytes, "{before} {after}");
    let mut read = AlignedBuffer::new(bytes).unwrap();
    read.fill(1);
    spill.read_at(&mut read, 0).unwrap();
    assert!(read.iter().all(|&byte| byte == 0));
}

#[test]
fn a_full_disk_is_an_error_at_the_start() {
    let dir = tempfile::tempdir().unwrap();
    let free = free_bytes(dir.path()).unwrap();
    let error = DiskFile::create_unlinked(dir.path(), free + (1 << 40)).unwrap_err();
    let DiskError::Full { missing_bytes, .. } = error else {
        panic!("{error}");
    };
    // Other tests fill and free the same disk meanwhile.
    assert!(
        missing_bytes.abs_diff(1 << 40) < 64 << 30,
        "{missing_bytes}"
    );
    assert!(error.to_string().contains("missing"));
}

#[test]
fn small_files_are_replaced_as_a_whole() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("profile.toml");
    write_atomically(&path, b"one").unwrap();
    write_atomically(&path, b"two").unwrap();
    assert_eq!(std::fs::read(&path).unwrap(), b"two");
    assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 1);
    let error = write_atomically(&dir.path().join("no/dir"), b"x").unwrap_err();
    assert!(error.to_string().contains("no/dir"), "{error}");
}
