//! x · Wᵀ on the GPU: few rows of activations by our own kernels, which read the weights once as they
//! are; many rows by cuBLAS on operands of the weights' format, then bias and activation.

use super::blas::LargeProduct;
use super::compute::{ComputeWork, LaunchError, row_grid};
use super::launch::Arg;
use crate::dtype::{Dtype, PANEL_ROWS, panels};
use crate::machine::ops::Gemm;
use crate::model::Activation;

/// Rows of activations that the small kernels take.
pub const SMALL_ROWS: usize = 16;
/// Widths of the small kernels.
const SMALL_WIDTHS: [usize; 5] = [1, 2, 4, 8, 16];
const THREADS: u32 = 256;

fn activation_code(activation: Option<Activation>) -> u32 {
    match activation {
        None => 0,
        Some(Activation::Relu) => 1,
        Some(Activation::Gelu) => 2,
    }
}

impl ComputeWork {
    pub fn product(&mut self, g: &Gemm) -> Result<(), LaunchError> {
        match g.m {
            0 => Ok(()),
            1..=SMALL_ROWS => self.small_product(g),
            _ => self.large_product(g),
        }
    }

    /// (x, weights, bias or 0, out): checked to lie inside the arena.
    fn operands(&self, g: &Gemm) -> (u64, u64, u64, u64) {
        let strided = |stride: usize, width: usize| (g.m - 1) * stride + width;
        let weight_bytes = panels(g.rows) as u64 * g.format.panel_bytes(g.inputs);
        (
            self.f32s(g.x, strided(g.x_stride, g.inputs)),
            self.device.at(g.weights, weight_bytes),
            g.bias.map_or(0, |at| self.f32s(at, g.rows)),
            self.f32s(g.out, strided(g.out_stride, g.rows)),
        )
    }

    fn small_product(&self, g: &Gemm) -> Result<(), LaunchError> {
        let (x, weights, bias, out) = self.operands(g);
        let width = SMALL_WIDTHS.into_iter().find(|&n| n >= g.m);
        let width = width.unwrap_or(SMALL_ROWS);
        let args = [
            Arg::Address(x),
            Arg::U32(g.x_stride as u32),
            Arg::U32(g.m as u32),
            Arg::U32(g.inputs as u32),
            Arg::Address(weights),
            Arg::U32(g.rows as u32),
            Arg::Address(bias),
            Arg::U32(activation_code(g.activation)),
            Arg::Address(out),
            Arg::U32(g.out_stride as u32),
        ];
        let (rows_a_block, threads) = if width <= 4 { (4, 128) } else { (32, 256) };
        let grid = (g.rows.div_ceil(rows_a_block) as u32, 1);
        let name = format!("gemm_small_{}_{width}", g.format.name());
        self.launch(&name, (grid, threads), &args)
    }

    fn large_product(&self, g: &Gemm) -> Result<(), LaunchError> {
        let (x, weights, bias, out) = self.operands(g);
        let (x, x_stride, narrowed_bytes) = match g.format {
            Dtype::F32 => (x, g.x_stride, 0),
            _ => self.narrow(g, x)?,
        };
        let product = LargeProduct {
            format: if g.format == Dtype::Q4 {
                Dtype::F16
            } else {
                g.format
            },
            x,
            x_stride,
            w: weights,
            m: g.m,
            rows: g.rows,
            inputs: g.inputs,
            out,
            out_stride: g.out_stride,
        };
        match g.format {
            Dtype::Q4 => self.widen_and_multiply(g, product, narrowed_bytes)?,
            _ => self.multiply(&product)?,
        }
        if bias == 0 && g.activation.is_none() {
            return Ok(());
        }
        let args = [
            Arg::Address(out),
            Arg::U32(g.out_stride as u32),
            Arg::U32(g.m as u32),
            Arg::U32(g.rows as u32),
            Arg::Address(bias),
            Arg::U32(activation_code(g.activation)),
        ];
        self.launch("bias_activate", (row_grid(g.m, g.rows), THREADS), &args)
    }

    fn multiply(&self, product: &LargeProduct) -> Result<(), LaunchError> {
        // SAFETY: every address was checked against the arena for these shapes.
        unsafe { self.blas.multiply(product) }.map_err(LaunchError::Blas)
    }

    /// Activations in the format that the product takes: (address, stride, bytes of scratch).
    fn narrow(&self, g: &Gemm, x: u64) -> Result<(u64, usize, u64), LaunchError> {
        let bytes = (2 * g.m * g.inputs) as u64;
        let bytes = bytes.next_multiple_of(256);
        assert!(
            bytes <= self.scratch.bytes,
            "{bytes} of activations in {:?}",
            self.scratch
        );
        let to = self.device.at(self.scratch.offset, bytes);
        let name = match g.format {
            Dtype::Bf16 => "narrow_bf16",
            _ => "narrow_f16",
        };
        let args = [
            Arg::Address(x),
            Arg::U32(g.x_stride as u32),
            Arg::Address(to),
            Arg::U32(g.inputs as u32),
            Arg::U32(g.m as u32),
            Arg::U32(g.inputs as u32),
        ];
        self.launch(name, (row_grid(g.m, g.inputs), THREADS), &args)?;
        Ok((to, g.inputs, bytes))
    }

    /// 4-bit weights, as many panels at a time as the rest of the scratch holds in fp16.
    fn widen_and_multiply(
        &self,
        g: &Gemm,
        product: LargeProduct,
        used_bytes: u64,
    ) -> Result<(), LaunchError> {
        let wide_panel = Dtype::F16.panel_bytes(g.inputs);
        let room = self.scratch.bytes - used_bytes;
        let at_once = (room / wide_panel) as usize * PANEL_ROWS;
        assert!(
            at_once > 0,
            "no room for one panel of {wide_panel} bytes in {room}"
        );
        let wide = self.device.at(self.scratch.offset + used_bytes, room);
        for first in (0..g.rows).step_by(at_once) {
            let rows = at_once.min(g.rows - first);
            let panel_bytes = g.format.panel_bytes(g.inputs);
            let args = [
                Arg::Address(product.w + (first / PANEL_ROWS) as u64 * panel_bytes),
                Arg::Address(wide),
                Arg::U32(rows as u32),
                Arg::U32(g.inputs as u32),
            ];
            let grid = (rows as u32, g.inputs.div_ceil(2048) as u32);
            self.launch("dequantise_q4_f16", (grid, THREADS), &args)?;
            self.multiply(&LargeProduct {
                w: wide,
                rows,
                out: product.out + 4 * first as u64,
                ..product
            })?;
        }
        Ok(())
    }
}
