//! Element formats and their exact sizes, and the sizes of the packed panel layout.
//! What a format means in numbers of bytes; never how it is computed with (machine/).

use serde::{Deserialize, Serialize};

/// Elements in one 4-bit group: they share an fp16 scale and an fp16 minimum.
pub const Q4_GROUP: usize = 64;
/// Bytes of one 4-bit group: 64 nibbles, scale, minimum = 4.5 bits an element.
pub const Q4_GROUP_BYTES: usize = Q4_GROUP / 2 + 4;
/// Output rows in one panel of the packed layout.
pub const PANEL_ROWS: usize = 64;

/// How an element is kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Dtype {
    F32,
    F16,
    Bf16,
    Q4,
}

impl Dtype {
    /// Into how many rounded parts a GPU cuts `m` rows of activations that must stay whole, one product each: 11
    /// bits in fp16, 8 in bf16.
    pub fn activation_parts(self, m: f64) -> usize {
        match self {
            _ if m <= SMALL_ROWS as f64 => 1,
            Dtype::F32 => 1,
            Dtype::Bf16 => 3,
            Dtype::F16 | Dtype::Q4 => 2,
        }
    }

    pub const ALL: [Dtype; 4] = [Dtype::F32, Dtype::F16, Dtype::Bf16, Dtype::Q4];

    pub fn name(self) -> &'static str {
        ["f32", "f16", "bf16", "q4"][self as usize]
    }

    /// Bytes of `elements` consecutive elements of one row. A started 4-bit group counts whole.
    pub fn row_bytes(self, elements: usize) -> u64 {
        match self {
            Dtype::F32 => 4 * elements as u64,
            Dtype::F16 | Dtype::Bf16 => 2 * elements as u64,
            Dtype::Q4 => (elements.div_ceil(Q4_GROUP) * Q4_GROUP_BYTES) as u64,
        }
    }

    /// Bytes of one panel of 64 output rows over `inputs` inputs (rows beyond the matrix are zero).
    pub fn panel_bytes(self, inputs: usize) -> u64 {
        PANEL_ROWS as u64 * self.row_bytes(inputs)
    }
}

/// How weights and activations are multiplied: a decision that may change results. Sums are fp32 always.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Compute {
    /// Weights as stored times fp32 activations; 4-bit weights, lossy as they are, times 8-bit ones.
    #[default]
    Exact,
    /// Weights and activations rounded to bf16; 4-bit weights as in `Exact`.
    Bf16,
    /// As `Exact`, but 4-bit weights, too, times fp32 activations.
    Fp32,
}

/// Rows of activations that a GPU multiplies in fp32 as they are.
pub const SMALL_ROWS: usize = 16;

/// What one product works on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Arithmetic {
    Fp32,
    Bf16,
    /// Activations of 8 bits in groups of 64, for 4-bit weights.
    Int8,
}

impl Compute {
    pub const ALL: [Compute; 3] = [Compute::Exact, Compute::Bf16, Compute::Fp32];

    pub fn name(self) -> &'static str {
        ["exact", "bf16", "fp32"][self as usize]
    }

    /// How weights stored in `format` are multiplied.
    pub fn arithmetic(self, format: Dtype) -> Arithmetic {
        match (self, format) {
            (Compute::Fp32, _) => Arithmetic::Fp32,
            (_, Dtype::Q4) => Arithmetic::Int8,
            (Compute::Exact, _) => Arithmetic::Fp32,
            (Compute::Bf16, _) => Arithmetic::Bf16,
        }
    }
}

impl Arithmetic {
    /// What a profile calls the table of products of weights in `format`: the format's own name, and
    /// behind it what rounds the activations.
    pub fn table_name(self, format: Dtype) -> String {
        let suffix = ["", "-bf16", "-int8"][self as usize];
        format!("{}{suffix}", format.name())
    }
}

/// How the elements of a packed weight lie; panels have the same bytes in both.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum WeightLayout {
    /// 64 output rows beside each other for one input after the other: what the CPU multiplies.
    CpuPanel64,
    /// One output row after the other, so that any run of panels is one matrix: what a GPU multiplies.
    GpuRowMajor,
}

impl WeightLayout {
    pub fn name(self) -> &'static str {
        ["cpu-panel64", "gpu-rowmajor"][self as usize]
    }
}

/// Panels that hold `rows` output rows.
pub fn panels(rows: usize) -> usize {
    rows.div_ceil(PANEL_ROWS)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn four_bit_takes_four_and_a_half_bits() {
        assert_eq!(Dtype::Q4.row_bytes(768) * 8, 768 * 9 / 2);
        assert_eq!(Dtype::Q4.row_bytes(65), 72);
        assert_eq!(Dtype::F16.panel_bytes(768), 64 * 768 * 2);
    }
}
