//! Readers of single command-line values: sizes, counts, percentages, switches, devices.
//! What flags there are and which exclude each other lives in args.rs.

use crate::dtype::Dtype;
use crate::model::ModelSpec;
use crate::model::families::{named_size, size_names};
use crate::plan::{MOST_SEQUENCES, MOST_THREADS};
use crate::units::{MIB, parse_bytes, parse_rate, show_bytes};
use std::fmt;
use thiserror::Error;

/// Each has a length of its own in a plan's job, and nobody waits for so many.
const MOST_PROMPTS: usize = 10_000_000;

/// Why a value was refused; clap puts the flag's name in front.
#[derive(Clone, Debug, Error, PartialEq)]
pub enum ValueError {
    #[error("it must be at least {least}")]
    TooSmall { least: u64 },
    #[error("it must be at most {most}")]
    TooLarge { most: usize },
    #[error("it is not a whole number: write one like 32")]
    NotACount,
    #[error("it is not a percentage: write a number from 0 to 100")]
    NotAPercentage,
    #[error("it is not a time: write seconds like 20")]
    NotSeconds,
    #[error("{0}")]
    NotARate(String),
    #[error("write how many times as fast, from 0.001 to 1000, like 2")]
    NotAFactor,
    #[error("write 1 or 0 (true, false, yes and no do as well)")]
    NotASwitch,
    #[error("write auto, cpu, cuda:N or host:SIZE, like cuda:0 or host:4GiB ({0})")]
    NotADevice(String),
    #[error("known sizes: {0}")]
    UnknownSize(String),
    #[error("{0}")]
    NotOffered(&'static str),
}

/// What computes, as asked by `--device`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum DeviceChoice {
    /// The first GPU that can be used, else the CPU.
    #[default]
    Auto,
    Cpu,
    /// DRAM plays a GPU of this size.
    Host {
        gpu_bytes: u64,
    },
    Cuda {
        index: usize,
    },
}

impl fmt::Display for DeviceChoice {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        match self {
            DeviceChoice::Auto => f.write_str("auto"),
            DeviceChoice::Cpu => f.write_str("cpu"),
            DeviceChoice::Cuda { index } => write!(f, "cuda:{index}"),
            DeviceChoice::Host { gpu_bytes } => write!(f, "host:{}", exact_size(*gpu_bytes)),
        }
    }
}

/// "4GiB" where that is exact, else bytes, so that reading it again gives the same number.
fn exact_size(bytes: u64) -> String {
    let shown = show_bytes(bytes).replace(".00 ", "");
    match parse_bytes(&shown) {
        Ok(again) if again == bytes => shown.replace(' ', ""),
        _ => format!("{bytes}B"),
    }
}

pub fn device(text: &str) -> Result<DeviceChoice, ValueError> {
    let refuse = |why: String| ValueError::NotADevice(why);
    match text.split_once(':') {
        None if text == "auto" => Ok(DeviceChoice::Auto),
        None if text == "cpu" => Ok(DeviceChoice::Cpu),
        // "cuda" alone is what frameworks call the first one.
        None if text == "cuda" => Ok(DeviceChoice::Cuda { index: 0 }),
        None if text == "host" => Err(refuse("host needs the size to play".to_owned())),
        Some(("cuda", index)) => match index.parse() {
            Ok(index) => Ok(DeviceChoice::Cuda { index }),
            Err(_) => Err(refuse(format!("\"{index}\" is not a GPU's number"))),
        },
        Some(("host", size)) => match parse_bytes(size) {
            Ok(0) => Err(refuse("a GPU of no bytes holds nothing".to_owned())),
            Ok(gpu_bytes) => Ok(DeviceChoice::Host { gpu_bytes }),
            Err(e) => Err(refuse(e.to_string())),
        },
        _ => Err(refuse(format!("\"{text}\" is none of these"))),
    }
}

/// A whole number from 1 on.
pub fn count(text: &str) -> Result<usize, ValueError> {
    match text.parse::<i128>() {
        Ok(n) if n < 1 => Err(ValueError::TooSmall { least: 1 }),
        Ok(n) => usize::try_from(n).map_err(|_| ValueError::NotACount),
        Err(_) => Err(ValueError::NotACount),
    }
}

/// A number of threads that some machine may have; more would only take memory.
pub fn threads(text: &str) -> Result<usize, ValueError> {
    at_most(MOST_THREADS, text)
}

/// Sequences of a batch, or batches of a block.
pub fn sequences(text: &str) -> Result<usize, ValueError> {
    at_most(MOST_SEQUENCES, text)
}

/// Random prompts of a job.
pub fn prompts(text: &str) -> Result<usize, ValueError> {
    at_most(MOST_PROMPTS, text)
}

fn at_most(most: usize, text: &str) -> Result<usize, ValueError> {
    let refused = ValueError::TooLarge { most };
    count(text).and_then(|n| if n <= most { Ok(n) } else { Err(refused) })
}

/// A count of tokens from 1 on: lengths are 32-bit throughout.
pub fn tokens(text: &str) -> Result<u32, ValueError> {
    u32::try_from(count(text)?).map_err(|_| ValueError::NotACount)
}

/// A time limit in seconds: "20", "2.5", "20s".
pub fn seconds(text: &str) -> Result<f64, ValueError> {
    match text.trim_end_matches('s').parse::<f64>() {
        Ok(s) if s.is_finite() && s > 0.0 => Ok(s),
        _ => Err(ValueError::NotSeconds),
    }
}

pub fn percentage(text: &str) -> Result<f64, ValueError> {
    match text.trim_end_matches('%').parse::<f64>() {
        Ok(p) if (0.0..=100.0).contains(&p) => Ok(p),
        _ => Err(ValueError::NotAPercentage),
    }
}

/// Bytes per second that some link or disk may have.
pub fn rate(text: &str) -> Result<f64, ValueError> {
    let rate = parse_rate(text).map_err(|e| ValueError::NotARate(e.to_string()))?;
    if (MIB as f64..=1e14).contains(&rate) {
        return Ok(rate);
    }
    let why = "it must be from 1MiB/s to 100000GB/s".to_owned();
    Err(ValueError::NotARate(why))
}

/// How many times as fast: from a thousandth to a thousand.
pub fn factor(text: &str) -> Result<f64, ValueError> {
    match text.trim_end_matches(['x', 'X']).parse::<f64>() {
        Ok(factor) if (1e-3..=1e3).contains(&factor) => Ok(factor),
        _ => Err(ValueError::NotAFactor),
    }
}

/// The spellings that FlexLLMGen's flags take.
pub fn switch(text: &str) -> Result<bool, ValueError> {
    match text.to_ascii_lowercase().as_str() {
        "1" | "true" | "yes" | "t" | "y" => Ok(true),
        "0" | "false" | "no" | "f" | "n" => Ok(false),
        _ => Err(ValueError::NotASwitch),
    }
}

pub fn weight_format(text: &str) -> Result<Dtype, ValueError> {
    let formats = [Dtype::F16, Dtype::Bf16, Dtype::F32];
    let named = formats.into_iter().find(|d| d.name() == text);
    named.ok_or(ValueError::NotOffered("write f16, bf16 or f32"))
}

/// A size's name, with or without "synth:" in front.
pub fn model_size(text: &str) -> Result<ModelSpec, ValueError> {
    let name = text.strip_prefix("synth:").unwrap_or(text);
    named_size(name).ok_or_else(|| ValueError::UnknownSize(size_names().join(", ")))
}

/// No value at all: what a flag has that exists only to say what to use instead.
#[derive(Clone, Copy, Debug)]
pub enum NotOffered {}

pub fn path_hint(_: &str) -> Result<NotOffered, ValueError> {
    let hint = "name the model's directory with --model DIR instead";
    Err(ValueError::NotOffered(hint))
}

pub fn sep_layer_hint(_: &str) -> Result<NotOffered, ValueError> {
    let hint = "leave it out: layers are always split as the plan needs";
    Err(ValueError::NotOffered(hint))
}

pub fn attn_sparsity_hint(_: &str) -> Result<NotOffered, ValueError> {
    let hint = "leave it out: sparse attention is not offered because it changes results";
    Err(ValueError::NotOffered(hint))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::units::GIB;

    #[test]
    fn devices_are_read_and_shown_alike() {
        for text in ["auto", "cpu", "cuda:1", "host:4GiB", "host:1000001B"] {
            assert_eq!(device(text).expect(text).to_string(), text);
        }
        let four = DeviceChoice::Host { gpu_bytes: 4 * GIB };
        assert_eq!(device("host:4096MiB"), Ok(four));
        assert_eq!(device("cuda"), Ok(DeviceChoice::Cuda { index: 0 }));
        for bad in ["gpu", "host", "host:4", "host:0B", "cuda:x", "cuda:-1", ""] {
            let message = device(bad).expect_err(bad).to_string();
            assert!(message.contains("cuda:0"), "{message}");
        }
        let message = device("host:4").expect_err("no unit").to_string();
        assert!(message.contains("4GiB"), "{message}");
    }

    #[test]
    fn numbers_stay_in_their_ranges() {
        assert_eq!(count("12"), Ok(12));
        assert_eq!(count("0"), Err(ValueError::TooSmall { least: 1 }));
        assert_eq!(count("-3"), Err(ValueError::TooSmall { least: 1 }));
        assert_eq!(count("1.5"), Err(ValueError::NotACount));
        assert_eq!(threads("1024"), Ok(1024));
        assert_eq!(threads("1025"), Err(ValueError::TooLarge { most: 1024 }));
        assert_eq!(prompts("10000000"), Ok(10_000_000));
        let most = MOST_PROMPTS;
        assert_eq!(prompts("1000000000000"), Err(ValueError::TooLarge { most }));
        assert_eq!(tokens("4294967296"), Err(ValueError::NotACount));
        assert_eq!(percentage("12.5"), Ok(12.5));
        assert_eq!(percentage("100%"), Ok(100.0));
        for bad in ["-1", "100.1", "nan", "inf", "x", ""] {
            assert_eq!(percentage(bad), Err(ValueError::NotAPercentage), "{bad}");
        }
    }

    #[test]
    fn what_ifs_are_rates_and_factors() {
        assert_eq!(rate("7GB/s"), Ok(7e9));
        assert_eq!(factor("2x"), Ok(2.0));
        for bad in ["7GB", "7", "0GB/s", "-1GB/s", "1B/s", "1e30GB/s", ""] {
            assert!(rate(bad).is_err(), "{bad}");
        }
        for bad in ["0", "-2", "nan", "inf", "x", "2000"] {
            assert_eq!(factor(bad), Err(ValueError::NotAFactor), "{bad}");
        }
    }

    #[test]
    fn switches_take_the_predecessors_spellings() {
        assert_eq!(switch("Yes"), Ok(true));
        assert_eq!(switch("0"), Ok(false));
        assert_eq!(switch("2"), Err(ValueError::NotASwitch));
    }

    #[test]
    fn sizes_are_named() {
        assert_eq!(model_size("synth:opt-125m"), model_size("opt-125m"));
        let message = model_size("opt-2b").expect_err("unknown").to_string();
        assert!(message.contains("opt-2.7b"), "{message}");
        assert_eq!(weight_format("bf16"), Ok(Dtype::Bf16));
        assert!(weight_format("q4").is_err());
    }
}
