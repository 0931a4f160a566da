//! A model as data: the switches and sizes that change OPT's arithmetic, and the list of its weight
//! matrices in the order in which a pass meets them. Family names and tensor names live in families.rs.

pub mod families;
pub mod token_ids;

use crate::dtype::{Dtype, panels};
use serde::{Deserialize, Serialize};

/// The function between fc1 and fc2.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Activation {
    Relu,
    Gelu,
}

/// Everything that decides the arithmetic and the sizes of one model.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ModelSpec {
    /// "opt-1.3b", or the directory's name.
    pub name: String,
    pub layers: usize,
    pub hidden: usize,
    pub heads: usize,
    pub ffn: usize,
    pub vocab: usize,
    /// Longest sequence; the position table has `positions + 2` rows.
    pub positions: usize,
    /// Width of the token embedding; ≠ hidden brings project_in and project_out.
    pub embed_width: usize,
    pub pre_norm: bool,
    pub final_norm: bool,
    pub bias: bool,
    pub norm_affine: bool,
    pub activation: Activation,
    pub tied_head: bool,
    /// Format of the checkpoint's weights: F32, F16 or Bf16.
    pub dtype: Dtype,
    pub pad_id: u32,
    pub bos_id: u32,
    /// Where generation ends; several where a model was trained further.
    #[serde(rename = "eos_id", with = "token_ids")]
    pub eos_ids: Vec<u32>,
}

/// OPT's position table starts with two unused rows.
pub const POSITION_OFFSET: usize = 2;
/// Epsilon of every layer norm.
pub const NORM_EPSILON: f32 = 1e-5;

/// Which weight matrix. `Qkv` is query, key and value stacked along the outputs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum MatrixKind {
    /// Token embedding of an untied model; a tied one looks its rows up in `Head`.
    Embedding,
    ProjectIn,
    Qkv,
    AttentionOut,
    Fc1,
    Fc2,
    ProjectOut,
    /// Vocabulary × embed_width.
    Head,
}

/// One weight matrix: `rows` outputs × `inputs`, row-major in the checkpoint.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Matrix {
    pub kind: MatrixKind,
    /// The pass's stage: 0 = embedding, 1..=layers = decoder layers, layers + 1 = head.
    pub stage: usize,
    pub rows: usize,
    pub inputs: usize,
}

impl Matrix {
    pub fn panels(&self) -> usize {
        panels(self.rows)
    }

    /// True where 4-bit is allowed: the decoder layers' own matrices and the two projections.
    pub fn may_be_q4(&self) -> bool {
        !matches!(self.kind, MatrixKind::Embedding | MatrixKind::Head)
    }

    /// Format in a store whose model has `native` weights.
    pub fn format(&self, native: Dtype, compress: bool) -> Dtype {
        if compress && self.may_be_q4() {
            Dtype::Q4
        } else {
            native
        }
    }

    /// Bytes of all its panels there.
    pub fn packed_bytes(&self, native: Dtype, compress: bool) -> u64 {
        let panel_bytes = self.format(native, compress).panel_bytes(self.inputs);
        self.panels() as u64 * panel_bytes
    }
}

/// Small tensors: always on the compute device, in f32, never placed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum SmallKind {
    /// (positions + 2, hidden), kept in the checkpoint's format.
    Positions,
    QkvBias,
    AttentionOutBias,
    Fc1Bias,
    Fc2Bias,
    AttentionNormWeight,
    AttentionNormBias,
    FfnNormWeight,
    FfnNormBias,
    FinalNormWeight,
    FinalNormBias,
}

/// One small tensor: `elements` values in `format` (F32, but positions native).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Small {
    pub kind: SmallKind,
    pub stage: usize,
    pub elements: usize,
    pub format: Dtype,
}

impl Small {
    pub fn bytes(&self) -> u64 {
        self.format.row_bytes(self.elements)
    }
}

impl ModelSpec {
    pub fn head_size(&self) -> usize {
        self.hidden / self.heads
    }

    /// Stages of one pass: embedding, decoder layers, head.
    pub fn stages(&self) -> usize {
        self.layers + 2
    }

    pub fn head_stage(&self) -> usize {
        self.layers + 1
    }

    /// The weight matrices in the order of a pass.
    pub fn matrices(&self) -> Vec<Matrix> {
        let (h, e) = (self.hidden, self.embed_width);
        let at = |kind, stage, rows, inputs| Matrix {
            kind,
            stage,
            rows,
            inputs,
        };
        let mut list = Vec::with_capacity(4 * self.layers + 4);
        if !self.tied_head {
            list.push(at(MatrixKind::Embedding, 0, self.vocab, e));
        }
        if e != h {
            list.push(at(MatrixKind::ProjectIn, 0, h, e));
        }
        for stage in 1..=self.layers {
            list.push(at(MatrixKind::Qkv, stage, 3 * h, h));
            list.push(at(MatrixKind::AttentionOut, stage, h, h));
            list.push(at(MatrixKind::Fc1, stage, self.ffn, h));
            list.push(at(MatrixKind::Fc2, stage, h, self.ffn));
        }
        let head = self.head_stage();
        if e != h {
            list.push(at(MatrixKind::ProjectOut, head, e, h));
        }
        list.push(at(MatrixKind::Head, head, self.vocab, e));
        list
    }

    /// The small tensors in the order of a pass.
    pub fn smalls(&self) -> Vec<Small> {
        let h = self.hidden;
        let at = |kind, stage, elements| Small {
            kind,
            stage,
            elements,
            format: Dtype::F32,
        };
        let positions = (self.positions + POSITION_OFFSET) * h;
        let mut list = vec![Small {
            format: self.dtype,
            ..at(SmallKind::Positions, 0, positions)
        }];
        for stage in 1..=self.layers {
            if self.bias {
                list.push(at(SmallKind::QkvBias, stage, 3 * h));
                list.push(at(SmallKind::AttentionOutBias, stage, h));
                list.push(at(SmallKind::Fc1Bias, stage, self.ffn));
                list.push(at(SmallKind::Fc2Bias, stage, h));
            }
            if self.norm_affine {
                list.push(at(SmallKind::AttentionNormWeight, stage, h));
                list.push(at(SmallKind::AttentionNormBias, stage, h));
                list.push(at(SmallKind::FfnNormWeight, stage, h));
                list.push(at(SmallKind::FfnNormBias, stage, h));
            }
        }
        if self.has_final_norm() && self.norm_affine {
            list.push(at(SmallKind::FinalNormWeight, self.head_stage(), h));
            list.push(at(SmallKind::FinalNormBias, self.head_stage(), h));
        }
        list
    }

    /// Post-norm models never have a final norm; pre-norm ones may have had it removed.
    pub fn has_final_norm(&self) -> bool {
        self.pre_norm && self.final_norm
    }

    /// Learned values: matrices and small tensors.
    pub fn parameters(&self) -> u64 {
        let matrices: usize = self.matrices().iter().map(|m| m.rows * m.inputs).sum();
        let smalls: usize = self.smalls().iter().map(|s| s.elements).sum();
        (matrices + smalls) as u64
    }

    /// Bytes of all weights in a packed store (panels padded to 64 rows), native or 4-bit.
    pub fn weights_bytes(&self, compress: bool) -> u64 {
        let of = |m: &Matrix| m.packed_bytes(self.dtype, compress);
        let matrices: u64 = self.matrices().iter().map(of).sum();
        matrices + self.smalls().iter().map(Small::bytes).sum::<u64>()
    }

    /// Bytes of one decoder layer's matrices there.
    pub fn layer_bytes(&self, compress: bool) -> u64 {
        let matrices = self.matrices();
        let of_layer = matrices.iter().filter(|m| m.stage == 1);
        of_layer.map(|m| m.packed_bytes(self.dtype, compress)).sum()
    }

    /// Most tokens that can follow a prompt. The last one is never attended to: a prompt that fills all positions
    /// still gets one.
    pub fn room_after(&self, prompt_tokens: usize) -> usize {
        (self.positions + 1).saturating_sub(prompt_tokens)
    }

    /// Bytes of one token's keys and values in one layer: a K row and a V row.
    pub fn kv_record_bytes(&self, format: Dtype) -> u64 {
        2 * format.row_bytes(self.hidden)
    }
}
