//! Bytes, seconds and rates as people write them: "16GiB", "3.1 GB/s", "1.5 s".
//! Only parsing and printing lives here; no figure about any machine or model.

use thiserror::Error;

/// Why a size or a rate could not be read.
#[derive(Debug, Error, PartialEq)]
pub enum UnitError {
    #[error("\"{0}\" has no unit: write \"{0}GiB\" (or MiB, GB, ...)")]
    NoUnit(String),
    #[error("\"{0}\" is not a size: write a number and a unit, like \"16GiB\" or \"512MiB\"")]
    NotASize(String),
    #[error("\"{0}\" is larger than any memory")]
    TooLarge(String),
    #[error("\"{0}\" is not a rate: write a size and \"/s\", like \"3.5GB/s\"")]
    NotARate(String),
}

/// Bytes in one of each unit, longest names first so that "MiB" is not read as "B".
const UNITS: [(&str, f64); 13] = [
    ("TiB", 1024.0 * 1024.0 * 1024.0 * 1024.0),
    ("GiB", 1024.0 * 1024.0 * 1024.0),
    ("MiB", 1024.0 * 1024.0),
    ("KiB", 1024.0),
    ("TB", 1e12),
    ("GB", 1e9),
    ("MB", 1e6),
    ("kB", 1e3),
    ("KB", 1e3),
    ("T", 1024.0 * 1024.0 * 1024.0 * 1024.0),
    ("G", 1024.0 * 1024.0 * 1024.0),
    ("M", 1024.0 * 1024.0),
    ("B", 1.0),
];

/// One gibibyte and one mebibyte, in bytes.
pub const GIB: u64 = 1 << 30;
pub const MIB: u64 = 1 << 20;
/// Direct I/O and page granularity, in bytes.
pub const PAGE_BYTES: u64 = 4096;

/// Reads "16GiB", "512 MiB", "1.5GB". A bare number is an error that suggests the unit.
pub fn parse_bytes(text: &str) -> Result<u64, UnitError> {
    let text = text.trim();
    let ends_with = |name: &str| {
        let tail = text
            .len()
            .checked_sub(name.len())
            .and_then(|at| text.get(at..));
        tail.is_some_and(|tail| tail.eq_ignore_ascii_case(name))
    };
    let unit = UNITS.iter().find(|(name, _)| ends_with(name));
    let Some((name, scale)) = unit else {
        return Err(match text.parse::<f64>() {
            Ok(_) => UnitError::NoUnit(text.to_owned()),
            Err(_) => UnitError::NotASize(text.to_owned()),
        });
    };
    let number = text[..text.len() - name.len()].trim();
    let value: f64 = number
        .parse()
        .map_err(|_| UnitError::NotASize(text.to_owned()))?;
    if !value.is_finite() || value < 0.0 {
        return Err(UnitError::NotASize(text.to_owned()));
    }
    let bytes = value * scale;
    if bytes > 1e18 {
        return Err(UnitError::TooLarge(text.to_owned()));
    }
    Ok(bytes.round() as u64)
}

/// Reads "3.5GB/s" into bytes per second.
pub fn parse_rate(text: &str) -> Result<f64, UnitError> {
    let size = text
        .trim()
        .strip_suffix("/s")
        .ok_or_else(|| UnitError::NotARate(text.to_owned()))?;
    parse_bytes(size)
        .map(|bytes| bytes as f64)
        .map_err(|_| UnitError::NotARate(text.to_owned()))
}

/// "1.50 GiB", "12 KiB", "0 B".
pub fn show_bytes(bytes: u64) -> String {
    let value = bytes as f64;
    for (name, scale) in &UNITS[..4] {
        if value >= *scale {
            return format!("{:.2} {name}", value / scale);
        }
    }
    format!("{bytes} B")
}

/// "3.05 GB/s".
pub fn show_rate(bytes_per_s: f64) -> String {
    for (name, scale) in [("GB/s", 1e9), ("MB/s", 1e6), ("kB/s", 1e3)] {
        if bytes_per_s >= scale {
            return format!("{:.2} {name}", bytes_per_s / scale);
        }
    }
    format!("{bytes_per_s:.0} B/s")
}

/// "850 ms", "12.3 s", "4 min 10 s", "2 h 05 min".
pub fn show_seconds(seconds: f64) -> String {
    let whole = seconds.round() as u64;
    match seconds {
        s if !s.is_finite() => "unknown".to_owned(),
        s if s < 1.0 => format!("{:.0} ms", s * 1e3),
        s if s < 120.0 => format!("{s:.1} s"),
        s if s < 7200.0 => format!("{} min {:02} s", whole / 60, whole % 60),
        _ => format!("{} h {:02} min", whole / 3600, whole % 3600 / 60),
    }
}

/// Smallest multiple of `step` that holds `bytes`.
pub const fn round_up(bytes: u64, step: u64) -> u64 {
    bytes.div_ceil(step) * step
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_need_a_unit() {
        assert_eq!(parse_bytes("16GiB"), Ok(16 * GIB));
        assert_eq!(parse_bytes("1.5 gb"), Ok(1_500_000_000));
        assert_eq!(parse_bytes("4G"), Ok(4 * GIB));
        assert_eq!(parse_bytes("16"), Err(UnitError::NoUnit("16".into())));
        assert!(parse_bytes("16").unwrap_err().to_string().contains("16GiB"));
        for bad in ["", "GiB", "-1GiB", "naNGiB", "x", "1e30TiB", "é", "1 µB"] {
            assert!(parse_bytes(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn rates_are_sizes_per_second() {
        assert_eq!(parse_rate("7GB/s"), Ok(7e9));
        assert!(parse_rate("7GB").is_err());
    }

    #[test]
    fn figures_print_with_units() {
        assert_eq!(show_bytes(3 * GIB / 2), "1.50 GiB");
        assert_eq!(show_rate(3.05e9), "3.05 GB/s");
        assert_eq!(show_seconds(250.0), "4 min 10 s");
    }
}
