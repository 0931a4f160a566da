//! The CPU kernels against f64 references, and every instruction set and thread count against its
//! scalar twin on one thread, bit for bit. No speed here: benches/kernels.rs measures.

mod attention;
mod gemm;
mod rows;

use half::{bf16, f16};
use loadmaster::dtype::Dtype;
use loadmaster::machine::cpu::kernels::Isa;
use loadmaster::machine::cpu::pool::Pool;

/// A small counter-based generator: the same values on every machine.
pub struct Random(pub u64);

impl Random {
    pub fn word(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// Uniform in [-1, 1).
    pub fn value(&mut self) -> f32 {
        (self.word() >> 40) as f32 / (1u64 << 23) as f32 - 1.0
    }

    pub fn values(&mut self, count: usize) -> Vec<f32> {
        (0..count).map(|_| self.value()).collect()
    }

    pub fn below(&mut self, bound: usize) -> usize {
        (self.word() % bound as u64) as usize
    }
}

/// Row-major bytes of values in a checkpoint's format.
pub fn encode(values: &[f32], dtype: Dtype) -> Vec<u8> {
    match dtype {
        Dtype::F32 => values.iter().flat_map(|v| v.to_le_bytes()).collect(),
        Dtype::F16 => values
            .iter()
            .flat_map(|&v| f16::from_f32(v).to_le_bytes())
            .collect(),
        Dtype::Bf16 => values
            .iter()
            .flat_map(|&v| bf16::from_f32(v).to_le_bytes())
            .collect(),
        Dtype::Q4 => panic!("a checkpoint has no q4"),
    }
}

/// What the values are once stored in the format.
pub fn rounded(values: &[f32], dtype: Dtype) -> Vec<f32> {
    let through = |v: &f32| match dtype {
        Dtype::F16 => f16::from_f32(*v).to_f32(),
        Dtype::Bf16 => bf16::from_f32(*v).to_f32(),
        _ => *v,
    };
    values.iter().map(through).collect()
}

/// Runs the kernel on every path and thread count; all must equal their scalar twin on one thread. Returns
/// what it gives without a matrix unit, and with one.
pub fn same_as_twins<T: PartialEq + std::fmt::Debug>(
    kernel: impl Fn(&Pool, Isa) -> Vec<T>,
) -> [Vec<T>; 2] {
    let expected = [Isa::SCALAR, Isa::SCALAR_UNIT].map(|twin| kernel(&Pool::new(1), twin));
    for threads in [1, 2, 3, 5] {
        let pool = Pool::new(threads);
        for isa in Isa::available() {
            let found = kernel(&pool, isa);
            let expected = &expected[(isa.twin() == Isa::SCALAR_UNIT) as usize];
            let differs = found.iter().zip(expected).position(|(a, b)| a != b);
            assert!(
                differs.is_none() && found.len() == expected.len(),
                "{} on {threads} threads differs from the twin at {differs:?}",
                isa.name()
            );
        }
    }
    expected
}

/// The same where a matrix unit makes no difference.
pub fn same_everywhere<T: PartialEq + std::fmt::Debug>(
    kernel: impl Fn(&Pool, Isa) -> Vec<T>,
) -> Vec<T> {
    let [without, with] = same_as_twins(kernel);
    assert!(without == with, "a matrix unit gives something else");
    without
}

/// As bits, so that -0 and 0 differ and not-a-numbers compare.
pub fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|v| v.to_bits()).collect()
}

pub fn floats(bits: &[u32]) -> Vec<f32> {
    bits.iter().map(|&b| f32::from_bits(b)).collect()
}
