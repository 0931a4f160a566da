//! x · Wᵀ on the GPU: few rows of activations by our own kernels, which read the weights once as they
//! are; many rows by cuBLAS on operands of the weights' format, then bias and activation.

use super::blas::LargeProduct;
use super::compute::{ComputeWork, LaunchError, row_grid};
use super::launch::Arg;
use crate::dtype::{Dtype, PANEL_ROWS, SMALL_ROWS, panels};
use crate::machine::ops::{Gemm, Widen};
use crate::model::Activation;
use std::ops::Range;

/// What is left of a value rounded to fp16 is smaller than it by this.
const F16_REST: f32 = 2048.0;
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

/// Addresses of a product's operands, checked to lie inside the arena; no bias is 0.
struct Operands {
    x: u64,
    weights: u64,
    bias: u64,
    out: u64,
}

impl Operands {
    /// What is done to the sums.
    fn finish(&self, g: &Gemm) -> [Arg; 2] {
        [
            Arg::Address(self.bias),
            Arg::U32(activation_code(g.activation)),
        ]
    }

    /// Where they go.
    fn result(&self, g: &Gemm) -> [Arg; 2] {
        [Arg::Address(self.out), Arg::U32(g.out_stride as u32)]
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

    fn operands(&self, g: &Gemm) -> Operands {
        let strided = |stride: usize, width: usize| (g.m - 1) * stride + width;
        let weight_bytes = panels(g.rows) as u64 * g.format.panel_bytes(g.inputs);
        Operands {
            x: self.f32s(g.x, strided(g.x_stride, g.inputs)),
            weights: self.device.at(g.weights, weight_bytes),
            bias: g.bias.map_or(0, |at| self.f32s(at, g.rows)),
            out: self.f32s(g.out, strided(g.out_stride, g.rows)),
        }
    }

    fn small_product(&self, g: &Gemm) -> Result<(), LaunchError> {
        let at = self.operands(g);
        let width = SMALL_WIDTHS.into_iter().find(|&n| n >= g.m);
        let width = width.unwrap_or(SMALL_ROWS);
        let taken = [
            Arg::Address(at.x),
            Arg::U32(g.x_stride as u32),
            Arg::U32(g.m as u32),
            Arg::U32(g.inputs as u32),
            Arg::Address(at.weights),
            Arg::U32(g.rows as u32),
        ];
        let args: Vec<Arg> = taken
            .into_iter()
            .chain(at.finish(g))
            .chain(at.result(g))
            .collect();
        let (rows_a_block, threads) = if width <= 4 { (4, 128) } else { (32, 256) };
        let grid = (g.rows.div_ceil(rows_a_block) as u32, 1);
        let name = format!("gemm_small_{}_{width}", g.format.name());
        self.launch(&name, (grid, threads), &args)
    }

    /// fp32 as it is; otherwise one product for each part of the activations, smaller and smaller ones added.
    fn large_product(&self, g: &Gemm) -> Result<(), LaunchError> {
        let at = self.operands(g);
        let whole = LargeProduct {
            format: if g.format == Dtype::Q4 {
                Dtype::F16
            } else {
                g.format
            },
            x: at.x,
            x_stride: g.x_stride,
            w: at.weights,
            m: g.m,
            rows: g.rows,
            inputs: g.inputs,
            out: at.out,
            out_stride: g.out_stride,
            scale: 1.0,
            adds: false,
        };
        let parts = if g.wide {
            g.format.activation_parts(g.m as f64)
        } else {
            1
        };
        for part in 0..parts {
            let (product, used_bytes) = match g.format {
                Dtype::F32 => (whole, 0),
                _ => self.narrow(g, whole, part)?,
            };
            match g.format {
                Dtype::Q4 => self.widen_and_multiply(g, product, used_bytes)?,
                _ => self.multiply(&product)?,
            }
        }
        self.finish_large(g, &at)
    }

    fn finish_large(&self, g: &Gemm, at: &Operands) -> Result<(), LaunchError> {
        if at.bias == 0 && g.activation.is_none() {
            return Ok(());
        }
        let shape = [Arg::U32(g.m as u32), Arg::U32(g.rows as u32)];
        let args: Vec<Arg> = at
            .result(g)
            .into_iter()
            .chain(shape)
            .chain(at.finish(g))
            .collect();
        self.launch("bias_activate", (row_grid(g.m, g.rows), THREADS), &args)
    }

    fn multiply(&self, product: &LargeProduct) -> Result<(), LaunchError> {
        // SAFETY: every address was checked against the arena for these shapes.
        unsafe { self.blas.multiply(product) }.map_err(LaunchError::Blas)
    }

    /// One part of the activations in the format that the product takes, and the bytes of scratch that it fills.
    /// What remains of fp16 is brought back to fp16's best range and the product scaled down for it.
    fn narrow(
        &self,
        g: &Gemm,
        whole: LargeProduct,
        part: usize,
    ) -> Result<(LargeProduct, u64), LaunchError> {
        let bytes = (2 * g.m * g.inputs) as u64;
        let bytes = bytes.next_multiple_of(256);
        assert!(
            bytes <= self.scratch.bytes,
            "{bytes} of activations in {:?}",
            self.scratch
        );
        let to = self.device.at(self.scratch.offset, bytes);
        let enlarged = match whole.format {
            Dtype::F16 => F16_REST.powi(part as i32),
            _ => 1.0,
        };
        let args = [
            Arg::Address(whole.x),
            Arg::U32(g.x_stride as u32),
            Arg::Address(to),
            Arg::U32(g.inputs as u32),
            Arg::U32(g.m as u32),
            Arg::U32(g.inputs as u32),
            Arg::U32(part as u32),
            Arg::F32(enlarged),
        ];
        let name = format!("narrow_{}", whole.format.name());
        self.launch(&name, (row_grid(g.m, g.inputs), THREADS), &args)?;
        let product = LargeProduct {
            x: to,
            x_stride: g.inputs,
            scale: 1.0 / enlarged,
            adds: part > 0,
            ..whole
        };
        Ok((product, bytes))
    }

    /// 4-bit weights, as many panels at a time as the rest of the scratch holds in fp16.
    fn widen_and_multiply(
        &self,
        g: &Gemm,
        product: LargeProduct,
        used_bytes: u64,
    ) -> Result<(), LaunchError> {
        self.widened((product.w, g.inputs, g.rows), used_bytes, |wide, part| {
            self.multiply(&LargeProduct {
                w: wide,
                rows: part.len(),
                out: product.out + 4 * part.start as u64,
                ..product
            })
        })
    }

    /// As a large product does it, without the product.
    pub fn widen(&self, w: &Widen) -> Result<(), LaunchError> {
        let weights = self.device.at(w.weights, w.bytes());
        self.widened((weights, w.inputs, w.rows), 0, |_, _| Ok(()))
    }

    /// 4-bit weights (address, inputs, rows) as fp16 behind what of the scratch is used, part by part; `then` gets
    /// each part's address and rows.
    fn widened(
        &self,
        (weights, inputs, rows): (u64, usize, usize),
        used_bytes: u64,
        then: impl Fn(u64, Range<usize>) -> Result<(), LaunchError>,
    ) -> Result<(), LaunchError> {
        let wide_panel = Dtype::F16.panel_bytes(inputs);
        let room = self.scratch.bytes - used_bytes;
        let at_once = (room / wide_panel) as usize * PANEL_ROWS;
        assert!(
            at_once > 0,
            "no room for one panel of {wide_panel} bytes in {room}"
        );
        let wide = self.device.at(self.scratch.offset + used_bytes, room);
        for first in (0..rows).step_by(at_once) {
            let part = first..rows.min(first + at_once);
            let panel_bytes = Dtype::Q4.panel_bytes(inputs);
            let args = [
                Arg::Address(weights + (first / PANEL_ROWS) as u64 * panel_bytes),
                Arg::Address(wide),
                Arg::U32(part.len() as u32),
                Arg::U32(inputs as u32),
            ];
            let grid = (part.len() as u32, inputs.div_ceil(2048) as u32);
            self.launch("dequantise_q4_f16", (grid, THREADS), &args)?;
            then(wide, part)?;
        }
        Ok(())
    }
}
