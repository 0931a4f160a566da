//! Products as a layer has them, for whoever measures them: the compute lane's grid, bursts, and races with
//! the disk.

use super::ProbeError;
use super::bench::Bench;
use crate::dtype::{Arithmetic, Dtype, panels};
use crate::machine::arena::AlignedBuffer;
use crate::machine::cpu::kernels::{Activation, GemmArgs, Isa, gemm};
use crate::machine::cpu::pool::Pool;
use crate::machine::disk::DiskError;

/// So many matrices, met one after the other so many times.
#[derive(Clone, Copy)]
pub struct Meeting {
    pub matrices: usize,
    pub times: usize,
}

impl Meeting {
    pub const ONCE: Meeting = Meeting {
        matrices: 1,
        times: 1,
    };
}

/// Seconds of one product of so many rows with a weight matrix (inputs, outputs). Neither the weights nor
/// the rows are in a cache: in a layer, other products and their weights come between.
pub fn product_s(
    bench: &mut Bench,
    product: (Dtype, Arithmetic, usize),
    shape: (usize, usize),
) -> Result<f64, ProbeError> {
    meeting_s(bench, (product, shape), Meeting::ONCE, None)
}

/// The same where the weights are still in the last cache from the product before.
pub fn near_product_s(
    bench: &mut Bench,
    product: (Dtype, Arithmetic, usize),
    shape: (usize, usize),
) -> Result<f64, ProbeError> {
    let begin = bench.rotate(matrix_bytes(product.0, shape));
    // The first time brings them.
    meeting_s(bench, (product, shape), Meeting::ONCE, Some(begin))?;
    meeting_s(bench, (product, shape), Meeting::ONCE, Some(begin))
}

/// Seconds of products with all matrices, all of them so many times. They begin there in the arena, or each
/// time where nothing is in a cache.
pub fn meeting_s(
    bench: &mut Bench,
    (product, shape): ((Dtype, Arithmetic, usize), (usize, usize)),
    meeting: Meeting,
    begin: Option<usize>,
) -> Result<f64, ProbeError> {
    let bytes = matrix_bytes(product.0, shape);
    bench.time(|b| {
        let first = begin.unwrap_or_else(|| b.rotate(meeting.matrices * bytes));
        for _ in 0..meeting.times {
            for place in 0..meeting.matrices {
                once(b, (product, shape), first + place * bytes);
            }
        }
    })
}

/// Bytes of a packed matrix (inputs, outputs).
pub fn matrix_bytes(format: Dtype, (inputs, outputs): (usize, usize)) -> usize {
    panels(outputs) * format.panel_bytes(inputs) as usize
}

/// One product with the weights that begin there.
fn once(
    b: &mut Bench,
    (product, shape): ((Dtype, Arithmetic, usize), (usize, usize)),
    begin: usize,
) {
    let x_bytes = 4 * product.2 * shape.0;
    let x = b.rotate(x_bytes);
    let x = bytemuck::cast_slice(&b.arena[x..x + x_bytes]);
    let weights = &b.arena[begin..begin + matrix_bytes(product.0, shape)];
    let operands = (x, weights, b.outputs.as_mut_slice_of());
    multiply((&b.pool, b.isa), operands, product, shape);
}

fn multiply(
    (pool, isa): (&Pool, Isa),
    (x, weights, out): (&[f32], &[u8], &mut [f32]),
    (format, arithmetic, m): (Dtype, Arithmetic, usize),
    (inputs, outputs): (usize, usize),
) {
    let args = GemmArgs {
        x,
        ldx: inputs,
        m,
        inputs,
        weights,
        format,
        arithmetic,
        rows: outputs,
        bias: None,
        activation: Activation::None,
        out,
        ldo: outputs,
    };
    gemm(pool, isa, args);
}

/// A step of the compute lane for races with the disk: one meeting, each time with other weights.
pub fn product_step<'a>(
    task: (&'a Pool, Isa),
    memory: &'a [u8],
    outputs: &'a mut AlignedBuffer,
    (product, shape): ((Dtype, Arithmetic, usize), (usize, usize)),
    meeting: Meeting,
) -> Box<dyn FnMut() -> Result<(), DiskError> + Send + 'a> {
    let x_bytes = 4 * product.2 * shape.0;
    let (x, memory) = memory.split_at(x_bytes.next_multiple_of(64));
    let x: &[f32] = bytemuck::cast_slice(&x[..x_bytes]);
    let each = matrix_bytes(product.0, shape);
    let bytes = meeting.matrices * each;
    let mut begin = 0;
    Box::new(move || {
        if begin + bytes > memory.len() {
            begin = 0;
        }
        for _ in 0..meeting.times {
            for weights in memory[begin..begin + bytes].chunks_exact(each) {
                multiply(
                    task,
                    (x, weights, outputs.as_mut_slice_of()),
                    product,
                    shape,
                );
            }
        }
        begin += bytes;
        Ok(())
    })
}
