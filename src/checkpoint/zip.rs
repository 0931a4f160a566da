//! The directory of a zip archive as torch.save writes it: stored entries only, zip64 too.
//! Gives every entry's place in the file; what the entries hold is not known here.

use super::CheckpointError;
use super::file::WeightFile;
use std::collections::HashMap;

/// Largest directory that is read; opt-175b's shards stay below 1 MiB.
const MOST_DIRECTORY_BYTES: u64 = 32 << 20;
/// The end record with the longest comment that it may carry.
const END_SEARCH_BYTES: u64 = 22 + 65535;

/// One stored entry.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Entry {
    header_offset: u64,
    pub bytes: u64,
}

/// Entries by name.
pub(super) struct Directory {
    pub entries: HashMap<String, Entry>,
}

impl Directory {
    pub fn read(file: &WeightFile) -> Result<Directory, CheckpointError> {
        let fault = |why: &str| CheckpointError::damaged(&file.path, why);
        let (offset, bytes) = find_directory(file)?;
        if bytes > MOST_DIRECTORY_BYTES {
            return Err(fault("its zip directory is larger than any checkpoint's"));
        }
        let data = file.read_vec(offset, bytes as usize)?;
        let mut rest = Bytes(&data);
        let mut entries = HashMap::new();
        while !rest.0.is_empty() {
            let (name, entry) = parse_entry(&mut rest, file)?;
            if entries.insert(name, entry).is_some() {
                return Err(fault("an entry is there twice"));
            }
        }
        Ok(Directory { entries })
    }
}

impl Entry {
    /// Where the entry's bytes start: behind its local header, whose length is only there.
    pub fn data_offset(&self, file: &WeightFile) -> Result<u64, CheckpointError> {
        let mut header = [0; 30];
        file.read(self.header_offset, &mut header)?;
        let fault = |why: &str| CheckpointError::damaged(&file.path, why);
        let mut rest = Bytes(&header);
        if rest.u32() != Some(0x0403_4B50) {
            return Err(fault("an entry's header is not where the directory says"));
        }
        rest.skip(22);
        let lengths = rest.u16().zip(rest.u16());
        let (name, extra) = lengths.ok_or_else(|| fault("an entry's header is cut off"))?;
        let start = self.header_offset + 30 + u64::from(name) + u64::from(extra);
        match start.checked_add(self.bytes) {
            Some(end) if end <= file.bytes => Ok(start),
            _ => Err(fault(
                "an entry reaches beyond the file (truncated download?)",
            )),
        }
    }
}

/// Offset and length of the central directory, from the end record or its 64-bit twin.
fn find_directory(file: &WeightFile) -> Result<(u64, u64), CheckpointError> {
    let fault = |why: &str| CheckpointError::damaged(&file.path, why);
    let tail_bytes = END_SEARCH_BYTES.min(file.bytes);
    let tail_start = file.bytes - tail_bytes;
    let tail = file.read_vec(tail_start, tail_bytes as usize)?;
    // The record's own comment reaches to the file's end, or what was found is something else.
    let is_end = |at: &usize| {
        let comment = tail
            .get(at + 20..at + 22)
            .map(|b| usize::from(u16::from_le_bytes([b[0], b[1]])));
        tail[*at..].starts_with(b"PK\x05\x06") && comment.is_some_and(|c| at + 22 + c == tail.len())
    };
    let at = (0..tail.len()).rev().find(is_end);
    let at = at.ok_or_else(|| fault("no zip directory at its end (truncated download?)"))?;
    let mut end = Bytes(&tail[at..]);
    end.skip(12);
    let (bytes, offset) = end
        .u32()
        .zip(end.u32())
        .ok_or_else(|| fault("its end is cut off"))?;
    if bytes != u32::MAX && offset != u32::MAX {
        return Ok((offset.into(), bytes.into()));
    }
    let locator = at
        .checked_sub(20)
        .ok_or_else(|| fault("no zip64 locator"))?;
    let mut locator = Bytes(&tail[locator..]);
    if locator.u32() != Some(0x0706_4B50) {
        return Err(fault("no zip64 locator"));
    }
    locator.skip(4);
    let record_offset = locator.u64().ok_or_else(|| fault("no zip64 record"))?;
    let record = file.read_vec(record_offset, 56)?;
    let mut record = Bytes(&record);
    if record.u32() != Some(0x0606_4B50) {
        return Err(fault("no zip64 record"));
    }
    record.skip(36);
    let place = record.u64().zip(record.u64());
    let (bytes, offset) = place.ok_or_else(|| fault("no zip64 record"))?;
    Ok((offset, bytes))
}

fn parse_entry(rest: &mut Bytes, file: &WeightFile) -> Result<(String, Entry), CheckpointError> {
    let fault = |why: &str| CheckpointError::damaged(&file.path, why);
    let fixed = rest
        .take(46)
        .ok_or_else(|| fault("its zip directory is cut off"))?;
    let mut fixed = Bytes(fixed);
    let head = (fixed.u32(), fixed.u32(), fixed.u16(), fixed.u16());
    let (Some(0x0201_4B50), Some(_), Some(flags), Some(method)) = head else {
        return Err(fault("its zip directory is damaged"));
    };
    fixed.skip(8);
    let sizes = (
        fixed.u32(),
        fixed.u32(),
        fixed.u16(),
        fixed.u16(),
        fixed.u16(),
    );
    let (Some(packed), Some(whole), Some(name), Some(extra), Some(comment)) = sizes else {
        return Err(fault("its zip directory is damaged"));
    };
    fixed.skip(8);
    let header_offset = fixed
        .u32()
        .ok_or_else(|| fault("its zip directory is damaged"))?;
    let texts = (
        rest.take(name.into()),
        rest.take(extra.into()),
        rest.take(comment.into()),
    );
    let (Some(name), Some(extra), Some(_)) = texts else {
        return Err(fault("its zip directory is cut off"));
    };
    let name = String::from_utf8(name.to_vec()).map_err(|_| fault("an entry has no UTF-8 name"))?;
    let wide = |value: u32| (value != u32::MAX).then_some(u64::from(value));
    let large = Zip64::read(extra, [wide(whole), wide(packed), wide(header_offset)]);
    let [whole, packed, header_offset] = large.ok_or_else(|| fault("a zip64 size is missing"))?;
    if flags & 1 != 0 {
        return Err(CheckpointError::refused(
            &file.path,
            format!("entry {name} is encrypted"),
        ));
    }
    if method != 0 || packed != whole {
        let why = format!("entry {name} is compressed, which torch.save never does");
        return Err(CheckpointError::refused(&file.path, why));
    }
    if header_offset > file.bytes || whole > file.bytes {
        return Err(fault(
            "an entry reaches beyond the file (truncated download?)",
        ));
    }
    let bytes = whole;
    Ok((
        name,
        Entry {
            header_offset,
            bytes,
        },
    ))
}

/// The extra field that carries what does not fit 32 bits, in a fixed order.
struct Zip64;

impl Zip64 {
    fn read(extra: &[u8], fields: [Option<u64>; 3]) -> Option<[u64; 3]> {
        let mut rest = Bytes(extra);
        let mut wide: &[u8] = &[];
        while let (Some(id), Some(length)) = (rest.u16(), rest.u16()) {
            let body = rest.take(length.into())?;
            if id == 1 {
                wide = body;
            }
        }
        let mut wide = Bytes(wide);
        let mut out = [0; 3];
        for (value, field) in out.iter_mut().zip(fields) {
            *value = field.or_else(|| wide.u64())?;
        }
        Some(out)
    }
}

/// Little-endian numbers off the front of a slice; None at its end.
struct Bytes<'a>(&'a [u8]);

impl<'a> Bytes<'a> {
    fn take(&mut self, count: usize) -> Option<&'a [u8]> {
        let (front, rest) = self.0.split_at_checked(count)?;
        self.0 = rest;
        Some(front)
    }

    fn skip(&mut self, count: usize) {
        self.0 = self.0.get(count..).unwrap_or(&[]);
    }

    fn number(&mut self, count: usize) -> Option<u64> {
        let bytes = self.take(count)?;
        Some(bytes.iter().rev().fold(0, |n, b| n << 8 | u64::from(*b)))
    }

    fn u16(&mut self) -> Option<u16> {
        self.number(2).map(|n| n as u16)
    }

    fn u32(&mut self) -> Option<u32> {
        self.number(4).map(|n| n as u32)
    }

    fn u64(&mut self) -> Option<u64> {
        self.number(8)
    }
}
