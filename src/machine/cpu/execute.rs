//! Compute operations on the CPU: offsets become slices, slices go to the kernels. Serves the CPU
//! machine, and both compute lanes of the host machine.

use super::kernels::{
    Activation as KernelActivation, AppendArgs, AttendArgs, AttendItem, EmbedArgs, GemmArgs, Isa,
    KvView, NormArgs, NormInPlace, Slots, Table as TypedTable, add_rows, add_rows_typed, append_kv,
    attend, copy_rows, embed_rows, gemm, layer_norm, layer_norm_in_place,
};
use super::pool::Pool;
use crate::dtype::panels;
use crate::machine::MachineError;
use crate::machine::lanes::Executor;
use crate::machine::memory::Memory;
use crate::machine::ops::{
    Affine, Attention, Compute, Gemm, HiddenRows, KvItem, KvSlots, Op, tier_of,
};
use crate::model::{Activation, NORM_EPSILON};
use crate::tier::{Lane, Tier};
use std::sync::Arc;

/// One compute lane on a pool of threads.
pub struct ComputeExecutor {
    memory: Arc<Memory>,
    tier: Tier,
    pool: Pool,
    isa: Isa,
}

impl Executor for ComputeExecutor {
    fn run(&mut self, op: Op) -> Result<(), MachineError> {
        match op {
            Op::Compute(compute) if !matches!(compute, Compute::Widen(_)) => self.compute(&compute),
            other => {
                return Err(MachineError::Unsupported(format!(
                    "another lane for {other:?}"
                )));
            }
        }
        Ok(())
    }

    fn begin(&mut self) {
        self.pool.bind_caller();
    }

    fn cores(&self) -> usize {
        self.pool.threads()
    }
}

impl ComputeExecutor {
    pub fn new(memory: Arc<Memory>, lane: Lane, threads: usize) -> Self {
        ComputeExecutor {
            memory,
            tier: tier_of(lane),
            pool: Pool::new(threads),
            isa: Isa::detect(),
        }
    }

    fn compute(&self, compute: &Compute) {
        match compute {
            Compute::Gemm(g) => self.gemm(g),
            Compute::Embed {
                table,
                panels,
                format,
                ids,
                to,
            } => {
                let bytes = *panels as u64 * format.panel_bytes(to.width);
                let table = self.bytes(*table, bytes);
                let (ids, out_rows) = (ids.as_slice(), to.rows.as_slice());
                let out = self.rows_mut(to);
                let width = to.width;
                embed_rows(
                    &self.pool,
                    EmbedArgs {
                        table,
                        format: *format,
                        width,
                        ids,
                        out,
                        ldo: width,
                        out_rows,
                    },
                );
            }
            Compute::AddPositions {
                table,
                table_rows,
                format,
                indices,
                to,
            } => {
                let bytes = self.bytes(*table, format.row_bytes(table_rows * to.width));
                let table = TypedTable {
                    bytes,
                    format: *format,
                    width: to.width,
                };
                add_rows_typed(
                    &self.pool,
                    self.rows_mut(to),
                    to.rows.as_slice(),
                    table,
                    indices.as_slice(),
                );
            }
            Compute::Norm { from, affine, out } => self.norm(from, affine, *out),
            Compute::NormInPlace { rows, affine } => self.norm_in_place(rows, affine),
            Compute::Gather { from, out } => {
                let table = from.rows.as_slice();
                let out = self.f32_mut(*out, table.len() * from.width);
                copy_rows(&self.pool, self.rows_ref(from), table, from.width, out);
            }
            Compute::Scatter { to, y } => self.scatter(to, *y),
            Compute::AddRows { to, y } => {
                let table = to.rows.as_slice();
                let y = self.f32(*y, table.len() * to.width);
                add_rows(&self.pool, self.rows_mut(to), Some(table), y, to.width);
            }
            Compute::Append(a) => a.items.iter().for_each(|item| self.append(a, item)),
            Compute::Attend(a) => self.attend(a),
            Compute::Widen(_) => {
                unreachable!("refused by `run`: the CPU multiplies 4-bit weights as they are")
            }
        }
    }

    fn gemm(&self, g: &Gemm) {
        let weight_bytes = panels(g.rows) as u64 * g.format.panel_bytes(g.inputs);
        let activation = match g.activation {
            None => KernelActivation::None,
            Some(Activation::Relu) => KernelActivation::Relu,
            Some(Activation::Gelu) => KernelActivation::Gelu,
        };
        let strided = |stride: usize, width: usize| (g.m - 1) * stride + width;
        gemm(
            &self.pool,
            self.isa,
            GemmArgs {
                x: self.f32(g.x, strided(g.x_stride, g.inputs)),
                ldx: g.x_stride,
                m: g.m,
                inputs: g.inputs,
                weights: self.bytes(g.weights, weight_bytes),
                format: g.format,
                arithmetic: g.arithmetic,
                rows: g.rows,
                bias: g.bias.map(|at| self.f32(at, g.rows)),
                activation,
                out: self.f32_mut(g.out, strided(g.out_stride, g.rows)),
                ldo: g.out_stride,
            },
        );
    }

    fn norm(&self, from: &HiddenRows, affine: &Affine, out: u64) {
        let rows = from.rows.as_slice();
        layer_norm(
            &self.pool,
            self.isa,
            NormArgs {
                x: self.rows_ref(from),
                rows: Some(rows),
                m: rows.len(),
                width: from.width,
                weight: affine.weight.map(|at| self.f32(at, from.width)),
                bias: affine.bias.map(|at| self.f32(at, from.width)),
                eps: NORM_EPSILON,
                out: self.f32_mut(out, rows.len() * from.width),
            },
        );
    }

    fn norm_in_place(&self, at: &HiddenRows, affine: &Affine) {
        let rows = at.rows.as_slice();
        layer_norm_in_place(
            &self.pool,
            self.isa,
            NormInPlace {
                x: self.rows_mut(at),
                rows: Some(rows),
                m: rows.len(),
                width: at.width,
                weight: affine.weight.map(|w| self.f32(w, at.width)),
                bias: affine.bias.map(|b| self.f32(b, at.width)),
                eps: NORM_EPSILON,
            },
        );
    }

    fn scatter(&self, to: &HiddenRows, y: u64) {
        let (table, width) = (to.rows.as_slice(), to.width);
        let y = self.f32(y, table.len() * width);
        let x = self.rows_mut(to);
        for (row, values) in table.iter().zip(y.chunks_exact(width)) {
            x[*row as usize * width..][..width].copy_from_slice(values);
        }
    }

    fn append(&self, a: &Attention, item: &KvItem) {
        let record = 2 * a.format.row_bytes(a.hidden);
        append_kv(
            &self.pool,
            self.isa,
            AppendArgs {
                qkv: self.qkv(a),
                ld: 3 * a.hidden,
                first_row: item.first_row,
                count: item.rows,
                hidden: a.hidden,
                format: a.format,
                bytes: self.bytes_mut(item.kv.base, item.kv.capacity * record),
                slots: match &item.kv.slots {
                    KvSlots::Contiguous => Slots::Contiguous { first: item.past },
                    KvSlots::Table(table) => Slots::Table(&table[item.past..item.past + item.rows]),
                },
            },
        );
    }

    fn view<'a>(&'a self, a: &Attention, item: &'a KvItem) -> AttendItem<'a> {
        let record = 2 * a.format.row_bytes(a.hidden);
        AttendItem {
            first_row: item.first_row,
            q_rows: item.rows,
            past: item.past,
            decode: item.decode,
            kv: KvView {
                bytes: self.bytes(item.kv.base, item.kv.capacity * record),
                slots: match &item.kv.slots {
                    KvSlots::Contiguous => Slots::Contiguous { first: 0 },
                    KvSlots::Table(table) => Slots::Table(table),
                },
            },
        }
    }

    fn attend(&self, a: &Attention) {
        let items: Vec<AttendItem> = a.items.iter().map(|item| self.view(a, item)).collect();
        attend(
            &self.pool,
            self.isa,
            AttendArgs {
                qkv: self.qkv(a),
                ld: 3 * a.hidden,
                heads: a.heads,
                head_size: a.hidden / a.heads,
                format: a.format,
                items: &items,
                out: self.f32_mut(a.out, rows_end(a) * a.hidden),
                ldo: a.hidden,
            },
        );
    }

    fn qkv(&self, a: &Attention) -> &[f32] {
        self.f32(a.qkv, rows_end(a) * 3 * a.hidden)
    }

    /// All rows up to the largest that the table names.
    fn rows_ref(&self, rows: &HiddenRows) -> &[f32] {
        self.f32(rows.base, reach(rows))
    }

    fn rows_mut(&self, rows: &HiddenRows) -> &mut [f32] {
        self.f32_mut(rows.base, reach(rows))
    }

    fn f32(&self, offset: u64, count: usize) -> &[f32] {
        // SAFETY: operations that write these values are behind this one's fences or in this lane.
        unsafe { self.memory.read(self.tier, offset, count) }
    }

    #[allow(clippy::mut_from_ref)]
    fn f32_mut(&self, offset: u64, count: usize) -> &mut [f32] {
        // SAFETY: operations that use these values are behind this one's fences or in this lane; other
        // lanes write only other columns or rows of the range.
        unsafe { self.memory.write(self.tier, offset, count) }
    }

    fn bytes(&self, offset: u64, count: u64) -> &[u8] {
        // SAFETY: as for f32.
        unsafe { self.memory.read(self.tier, offset, count as usize) }
    }

    #[allow(clippy::mut_from_ref)]
    fn bytes_mut(&self, offset: u64, count: u64) -> &mut [u8] {
        // SAFETY: as for f32_mut.
        unsafe { self.memory.write(self.tier, offset, count as usize) }
    }
}

fn reach(rows: &HiddenRows) -> usize {
    let last = rows
        .rows
        .as_slice()
        .iter()
        .max()
        .map_or(0, |&row| row as usize + 1);
    last * rows.width
}

/// One past the last row that the items use.
fn rows_end(a: &Attention) -> usize {
    a.items
        .iter()
        .map(|i| i.first_row + i.rows)
        .max()
        .unwrap_or(0)
}
