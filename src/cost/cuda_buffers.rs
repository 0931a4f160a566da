//! Buffers that a CUDA machine needs beside the schedule's: workspaces of its libraries and kernels, small
//! tables, the relay. Sizes only.

use crate::cost::footprint::{Buffer, FootprintInput, HIDDEN_VALUE_BYTES};
use crate::dtype::Dtype;
use crate::tier::Tier;
use crate::units::{MIB, PAGE_BYTES, round_up};

/// Two halves of 4 MiB: large enough for the link's full rate, small enough to start early.
const RELAY_BYTES: u64 = 8 * MIB;
/// What NVIDIA recommends lies between 4 and 32 MiB.
const BLAS_WORKSPACE_BYTES: u64 = 16 * MIB;
/// Widened 4-bit weights at once, where a matrix is larger.
const WIDENED_BYTES: u64 = 64 * MIB;
/// Cached tokens whose attention is one part of a decode row's.
const PART_TOKENS: u64 = 256;

/// Tier, buffer and bytes of what a CUDA machine keeps for itself.
pub fn cuda_buffers(input: &FootprintInput) -> [(Tier, Buffer, u64); 5] {
    let scratch = product_scratch(input).max(attention_scratch(input));
    let tables = tables_bytes(input);
    [
        (Tier::Gpu, Buffer::Scratch, scratch),
        (Tier::Gpu, Buffer::BlasWorkspace, BLAS_WORKSPACE_BYTES),
        (Tier::Gpu, Buffer::Tables, tables),
        (Tier::Cpu, Buffer::Tables, tables),
        (Tier::Cpu, Buffer::Relay, RELAY_BYTES),
    ]
}

/// fp16 copies of one product's activations, and of 4-bit weights.
fn product_scratch(input: &FootprintInput) -> u64 {
    let (m, block) = (input.model, input.block);
    let narrowed = block.chunk_rows * m.ffn.max(m.hidden) as u64;
    let head = block.slots * m.hidden.max(m.embed_width) as u64;
    let widened = |matrix: &crate::model::Matrix| {
        let wide = Dtype::F16.panel_bytes(matrix.inputs);
        let whole = matrix.panels() as u64 * wide;
        let quantised = matrix.format(m.dtype, input.policy.compress_weight) == Dtype::Q4;
        u64::from(quantised) * whole.min(WIDENED_BYTES.max(wide))
    };
    let matrices = input.placement.matrices.iter().map(widened);
    2 * narrowed.max(head) + matrices.max().unwrap_or(0) + PAGE_BYTES
}

/// Weighted values, maximum and sum of every part of every head.
fn attention_scratch(input: &FootprintInput) -> u64 {
    let (m, block) = (input.model, input.block);
    let tokens: u64 = Tier::ALL.iter().map(|&t| block.batch_kv_tokens[t]).sum();
    let parts = tokens / PART_TOKENS + 2 * input.policy.gpu_batch_size as u64;
    parts * (m.heads * (m.head_size() + 2)) as u64 * HIDDEN_VALUE_BYTES
}

/// Two halves, each with room for the largest operation's tables: the items and token slots of a batch, or
/// the rows of one.
fn tables_bytes(input: &FootprintInput) -> u64 {
    let block = input.block;
    let slots = 4 * (block.batch_kv_tokens.gpu + block.batch_kv_tokens.cpu);
    let items = 64 * input.policy.gpu_batch_size as u64;
    let rows = 16 * (block.batch_rows + block.chunk_rows + block.slots);
    2 * round_up(slots + items + rows + 64 * 1024, PAGE_BYTES)
}
