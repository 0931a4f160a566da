//! Products as a layer has them, for whoever measures them: the compute lane's grid, bursts, and races with
//! the disk.

use super::ProbeError;
use super::bench::Bench;
use crate::dtype::{Arithmetic, Dtype, panels};
use crate::machine::arena::AlignedBuffer;
use crate::machine::cpu::kernels::{Activation, GemmArgs, Isa, gemm};
use crate::machine::cpu::pool::Pool;
use crate::machine::disk::DiskError;

/// Seconds of one product of so many rows with a weight matrix (inputs, outputs). Neither the weights nor
/// the rows are in a cache: in a layer, other products and their weights come between.
pub fn product_s(
    bench: &mut Bench,
    product: (Dtype, Arithmetic, usize),
    shape: (usize, usize),
) -> Result<f64, ProbeError> {
    met_again_s(bench, product, shape, 1)
}

/// Seconds of so many products with the same weights, one after the other: only the first does not find them in a
/// cache.
pub fn met_again_s(
    bench: &mut Bench,
    product: (Dtype, Arithmetic, usize),
    shape: (usize, usize),
    times: usize,
) -> Result<f64, ProbeError> {
    let bytes = matrix_bytes(product.0, shape);
    bench.time(|b| {
        let weights = b.rotate(bytes);
        (0..times).for_each(|_| once(b, (product, shape), weights));
    })
}

/// The same where the weights are still in the last cache from the product before.
pub fn near_product_s(
    bench: &mut Bench,
    product: (Dtype, Arithmetic, usize),
    shape: (usize, usize),
) -> Result<f64, ProbeError> {
    let begin = bench.rotate(matrix_bytes(product.0, shape));
    let again = |bench: &mut Bench| bench.time(|b| once(b, (product, shape), begin));
    // The first time brings them.
    again(bench)?;
    again(bench)
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

/// A step of the compute lane for races with the disk: fp16 weights times so many rows. Returns FLOP.
pub fn product_step<'a>(
    (pool, isa): (&'a Pool, Isa),
    memory: &'a [u8],
    (inputs, outputs): (&'a AlignedBuffer, &'a mut AlignedBuffer),
    (rows, shape): (usize, (usize, usize)),
) -> Box<dyn FnMut() -> Result<Option<f64>, DiskError> + Send + 'a> {
    let bytes = panels(shape.1) * Dtype::F16.panel_bytes(shape.0) as usize;
    let mut begin = 0;
    Box::new(move || {
        if begin + bytes > memory.len() {
            begin = 0;
        }
        let weights = &memory[begin..begin + bytes];
        let operands = (inputs.as_slice_of(), weights, outputs.as_mut_slice_of());
        let product = (Dtype::F16, Arithmetic::Fp32, rows);
        multiply((pool, isa), operands, product, shape);
        begin += bytes;
        Ok(Some(2.0 * (rows * shape.0 * shape.1) as f64))
    })
}
