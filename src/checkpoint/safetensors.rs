//! The header of a safetensors file: an 8-byte length, then JSON that names every tensor's type,
//! shape and place. Only the header is read here; other formats have their own modules.

use super::CheckpointError;
use super::extent::{Element, Extent};
use super::file::WeightFile;
use crate::dtype::Dtype;
use serde::Deserialize;
use serde::de::{Deserializer, IgnoredAny, MapAccess, Visitor};
use std::fmt;

/// Longest header that is read. Real ones stay below 1 MiB.
const MOST_HEADER_BYTES: u64 = 32 << 20;
/// Most tensors of one file. Real models stay below 10 000.
const MOST_TENSORS: usize = 1 << 18;
/// Most dimensions of one tensor.
const MOST_DIMENSIONS: usize = 8;

#[derive(Deserialize)]
struct RawTensor {
    dtype: String,
    shape: Vec<u64>,
    data_offsets: (u64, u64),
}

/// Name → tensor, in file order, metadata left out.
struct RawHeader(Vec<(String, RawTensor)>);

impl<'de> Deserialize<'de> for RawHeader {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<RawHeader, D::Error> {
        from.deserialize_map(HeaderVisitor)
    }
}

struct HeaderVisitor;

impl<'de> Visitor<'de> for HeaderVisitor {
    type Value = RawHeader;

    fn expecting(&self, f: &mut fmt::Formatter) -> fmt::Result {
        f.write_str("a safetensors header")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<RawHeader, A::Error> {
        let mut list = Vec::new();
        while let Some(name) = map.next_key::<String>()? {
            if name == "__metadata__" {
                map.next_value::<IgnoredAny>()?;
                continue;
            }
            if list.len() == MOST_TENSORS {
                return Err(serde::de::Error::custom("too many tensors"));
            }
            list.push((name, map.next_value()?));
        }
        Ok(RawHeader(list))
    }
}

/// The tensors of a file and the hash that stands for its header in the fingerprint.
pub(super) fn read_header(
    file: &WeightFile,
) -> Result<(Vec<(String, Extent)>, String), CheckpointError> {
    let mut length = [0; 8];
    file.read(0, &mut length)?;
    let header_bytes = u64::from_le_bytes(length);
    if header_bytes > MOST_HEADER_BYTES {
        let why = format!("its header claims {header_bytes} bytes");
        return Err(CheckpointError::damaged(&file.path, why));
    }
    let header = file.read_vec(8, header_bytes as usize)?;
    let raw: RawHeader = serde_json::from_slice(&header)
        .map_err(|e| CheckpointError::damaged(&file.path, format!("its header: {e}")))?;
    let mut list = Vec::with_capacity(raw.0.len());
    for (name, tensor) in raw.0 {
        let found = extent_of(&tensor, 8 + header_bytes, file.bytes);
        let extent = found
            .map_err(|why| CheckpointError::damaged(&file.path, format!("tensor {name}: {why}")))?;
        list.push((name, extent));
    }
    Ok((list, super::file::hash_hex(&[&header])))
}

fn extent_of(tensor: &RawTensor, data: u64, end: u64) -> Result<Extent, String> {
    let element = element_named(&tensor.dtype)?;
    if tensor.shape.len() > MOST_DIMENSIONS {
        return Err(format!("{} dimensions", tensor.shape.len()));
    }
    let (first, last) = tensor.data_offsets;
    let offset = data.checked_add(first).ok_or("its offset overflows")?;
    let shape = tensor.shape.clone();
    let extent = Extent::contiguous(offset, element, shape).ok_or("its shape overflows")?;
    let bytes = extent
        .elements()
        .and_then(|n| n.checked_mul(element.bytes()));
    if bytes.is_none() || last.checked_sub(first) != bytes {
        return Err(format!(
            "offsets {first}..{last} do not fit {:?}",
            extent.shape
        ));
    }
    match extent.lies_within(data, end) {
        true => Ok(extent),
        false => Err(format!(
            "it ends at {last} but the file is shorter (truncated download?)"
        )),
    }
}

fn element_named(name: &str) -> Result<Element, String> {
    let other = |name, bytes| Ok(Element::Other { name, bytes });
    match name {
        "F32" => Ok(Element::Float(Dtype::F32)),
        "F16" => Ok(Element::Float(Dtype::F16)),
        "BF16" => Ok(Element::Float(Dtype::Bf16)),
        "F64" => other("float64", 8),
        "I64" | "U64" => other("64-bit integers", 8),
        "I32" | "U32" => other("32-bit integers", 4),
        "I16" | "U16" => other("16-bit integers", 2),
        "I8" | "U8" | "BOOL" => other("8-bit integers", 1),
        "F8_E4M3" | "F8_E5M2" | "F8_E8M0" => other("float8", 1),
        _ => Err(format!("unknown dtype {name:?}")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(header: &str, data_bytes: usize) -> Result<Vec<(String, Extent)>, String> {
        let dir = tempfile::tempdir().expect("temporary directory");
        let path = dir.path().join("model.safetensors");
        let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
        bytes.extend(header.as_bytes());
        bytes.resize(bytes.len() + data_bytes, 0);
        std::fs::write(&path, bytes).expect("written");
        let file = WeightFile::open(&path).expect("open");
        read_header(&file).map(|h| h.0).map_err(|e| e.to_string())
    }

    #[test]
    fn tensors_are_placed_behind_the_header() {
        let header = r#"{"__metadata__":{"format":"pt"},"a":{"dtype":"BF16","shape":[2,3],"data_offsets":[4,16]}}"#;
        let list = read(header, 16).expect("valid");
        assert_eq!(list[0].0, "a");
        assert_eq!(list[0].1.offset, 8 + header.len() as u64 + 4);
        assert_eq!(list[0].1.strides, [3, 1]);
        assert!(read(header, 15).expect_err("short").contains("truncated"));
    }

    #[test]
    fn damage_is_named() {
        let one = |dtype: &str, shape: &str, offsets: &str| {
            let entry =
                format!(r#"{{"dtype":"{dtype}","shape":{shape},"data_offsets":{offsets}}}"#);
            read(&format!(r#"{{"w":{entry}}}"#), 64).expect_err("damaged")
        };
        assert!(one("F16", "[4]", "[0,4]").contains("do not fit"));
        assert!(one("F16", "[4]", "[8,0]").contains("do not fit"));
        assert!(one("F16", "[9223372036854775807,3]", "[0,8]").contains("fit"));
        assert!(
            one("F16", "[4]", "[18446744073709551608,18446744073709551615]").contains("overflow")
        );
        assert!(one("Q9", "[4]", "[0,8]").contains("Q9"));
        assert!(one("F16", "[-1]", "[0,8]").contains("header"));
        assert!(read("{", 0).expect_err("no JSON").contains("header"));
    }
}
