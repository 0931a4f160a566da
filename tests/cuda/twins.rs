//! The CPU's side of the comparison: random values, formats, packing, and what is close.

use half::{bf16, f16};
use loadmaster::dtype::{Arithmetic, Dtype, PANEL_ROWS, Q4_GROUP, Q4_GROUP_BYTES, panels};
use loadmaster::machine::cpu::kernels as cpu;
use loadmaster::machine::cpu::pool::Pool;

pub struct Random(u64);

impl Random {
    pub fn new(seed: u64) -> Random {
        Random(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }

    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    /// Uniform in -size..size.
    pub fn values(&mut self, count: usize, size: f32) -> Vec<f32> {
        let one = |word: u64| ((word >> 40) as f32 / (1u64 << 23) as f32 - 1.0) * size;
        (0..count).map(|_| one(self.next())).collect()
    }

    pub fn below(&mut self, bound: usize) -> usize {
        (self.next() >> 20) as usize % bound
    }
}

pub struct Twins {
    pub pool: Pool,
    pub isa: cpu::Isa,
}

impl Twins {
    pub fn new() -> Twins {
        Twins {
            pool: Pool::new(1),
            isa: cpu::Isa::detect(),
        }
    }

    /// `cpu-panel64` of row-major values.
    pub fn pack(&self, values: &[f32], (rows, inputs): (usize, usize), format: Dtype) -> Vec<u8> {
        let dtype = if format == Dtype::Q4 {
            Dtype::F32
        } else {
            format
        };
        let bytes = encode(values, dtype);
        let mut out = vec![0; panels(rows) * format.panel_bytes(inputs) as usize];
        let source = cpu::PackSource {
            bytes: &bytes,
            dtype,
            rows,
            inputs,
        };
        cpu::pack_panels(&self.pool, self.isa, source, format, &mut out);
        out
    }

    /// Row-major values of `cpu-panel64`.
    pub fn unpack(&self, bytes: &[u8], (rows, inputs): (usize, usize), format: Dtype) -> Vec<f32> {
        let mut all = Vec::new();
        for panel in bytes.chunks_exact(format.panel_bytes(inputs) as usize) {
            let mut wide = vec![0.0; PANEL_ROWS * inputs];
            cpu::unpack_panel(format, panel, inputs, &mut wide);
            all.extend(wide);
        }
        all.truncate(rows * inputs);
        all
    }
}

pub fn encode(values: &[f32], format: Dtype) -> Vec<u8> {
    let bytes = |v: &f32| match format {
        Dtype::F32 => v.to_le_bytes().to_vec(),
        Dtype::F16 => f16::from_f32(*v).to_le_bytes().to_vec(),
        Dtype::Bf16 => bf16::from_f32(*v).to_le_bytes().to_vec(),
        Dtype::Q4 => panic!("4-bit values come in groups"),
    };
    values.iter().flat_map(bytes).collect()
}

pub fn decode(bytes: &[u8], format: Dtype) -> Vec<f32> {
    let pair = |b: &[u8]| [b[0], b[1]];
    match format {
        Dtype::F32 => floats(bytes),
        Dtype::F16 => bytes
            .chunks(2)
            .map(|b| f16::from_le_bytes(pair(b)).to_f32())
            .collect(),
        Dtype::Bf16 => bytes
            .chunks(2)
            .map(|b| bf16::from_le_bytes(pair(b)).to_f32())
            .collect(),
        Dtype::Q4 => panic!("4-bit values come in groups"),
    }
}

pub fn floats(bytes: &[u8]) -> Vec<f32> {
    let one = |b: &[u8]| f32::from_le_bytes([b[0], b[1], b[2], b[3]]);
    bytes.chunks_exact(4).map(one).collect()
}

pub fn activation(act: usize) -> cpu::Activation {
    [
        cpu::Activation::None,
        cpu::Activation::Relu,
        cpu::Activation::Gelu,
    ][act]
}

/// act(values + bias) by the CPU's product with one input of weight one.
pub fn finish(values: &mut [f32], bias: Option<&[f32]>, act: usize) {
    let twins = Twins::new();
    let weights = twins.pack(values, (values.len(), 1), Dtype::F32);
    cpu::gemm(
        &twins.pool,
        twins.isa,
        cpu::GemmArgs {
            x: &[1.0],
            ldx: 1,
            m: 1,
            inputs: 1,
            weights: &weights,
            format: Dtype::F32,
            arithmetic: Arithmetic::Fp32,
            rows: values.len(),
            bias,
            activation: activation(act),
            ldo: values.len(),
            out: values,
        },
    );
}

/// `gpu-rowmajor` (kernels/README.md) of `cpu-panel64` (cpu/kernels/panel.rs).
pub fn to_gpu_rows(bytes: &[u8], (rows, inputs): (usize, usize), format: Dtype) -> Vec<u8> {
    if format != Dtype::Q4 {
        let twins = Twins::new();
        let whole = panels(rows) * PANEL_ROWS;
        return encode(&twins.unpack(bytes, (whole, inputs), format), format);
    }
    let groups = inputs.div_ceil(Q4_GROUP);
    let panel_bytes = format.panel_bytes(inputs) as usize;
    bytes
        .chunks_exact(panel_bytes)
        .flat_map(|panel| codes_to_rows(panel, groups))
        .collect()
}

fn codes_to_rows(panel: &[u8], groups: usize) -> Vec<u8> {
    let mut to = vec![0u8; panel.len()];
    let ends_at = PANEL_ROWS * groups * Q4_GROUP / 2;
    for (row, group) in (0..PANEL_ROWS).flat_map(|row| (0..groups).map(move |group| (row, group))) {
        let from = &panel[group * PANEL_ROWS * Q4_GROUP_BYTES..];
        let index = row * groups + group;
        for k in 0..Q4_GROUP {
            let unit = k / 8 * 4 + row / 16;
            let byte = from[4 * PANEL_ROWS + unit * 64 + row % 16 * 4 + k % 4];
            let code = byte >> (k % 8 / 4 * 4) & 15;
            let there = k / 8 * 8 + k % 8 / 2 + 4 * (k % 2);
            to[index * 32 + there / 2] |= code << (there % 2 * 4);
        }
        let ends = &mut to[ends_at + 4 * index..][..4];
        ends[..2].copy_from_slice(&from[2 * row..][..2]);
        ends[2..].copy_from_slice(&from[2 * (PANEL_ROWS + row)..][..2]);
    }
    to
}

pub fn is_close(found: &[f32], wanted: &[f32], tolerance: f32) -> bool {
    let near = |(a, b): (&f32, &f32)| {
        a.to_bits() == b.to_bits() || (a - b).abs() <= tolerance * (1.0 + b.abs())
    };
    found.len() == wanted.len() && found.iter().zip(wanted).all(near)
}

/// # Panics
/// Names the first value that is not within the tolerance (0: not the same bits).
pub fn close(found: &[f32], wanted: &[f32], tolerance: f32, what: &str) {
    assert_eq!(found.len(), wanted.len(), "{what}: lengths");
    for (i, (a, b)) in found.iter().zip(wanted).enumerate() {
        assert!(
            is_close(&[*a], &[*b], tolerance),
            "{what}: value {i} is {a}, not {b}"
        );
    }
}
