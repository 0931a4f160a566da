//! The compute lane of the GPU: operations become kernel launches on its stream (kernels/README.md has
//! every kernel's arguments and shape). Products are in product.rs, attention in attend.rs.

use super::api::{CudaError, DeviceBuffer};
use super::blas::Blas;
use super::gpu_error;
use super::issue::Work;
use super::launch::Arg;
use super::modules::Kernels;
use super::tables::Tables;
use super::timeline::Timeline;
use crate::dtype::Dtype;
use crate::machine::MachineError;
use crate::machine::arena::Region;
use crate::machine::ops::{Affine, Compute, HiddenRows, Op, Table};
use crate::model::NORM_EPSILON;
use std::sync::Arc;

/// Elements of a row that one block of a row-wise kernel takes.
const ROW_BLOCK: usize = 1024;
const THREADS: u32 = 256;

/// What launches need.
pub struct ComputeWork {
    // First: cuBLAS's handle goes before its stream and its workspace.
    pub blas: Blas,
    pub device: Arc<DeviceBuffer>,
    pub timeline: Arc<Timeline>,
    pub kernels: Arc<Kernels>,
    pub tables: Tables,
    /// Narrowed activations and widened weights of one product, or attention's parts.
    pub scratch: Region,
}

/// Why an operation could not be queued.
pub enum LaunchError {
    Cuda(CudaError),
    Blas(String),
}

impl From<CudaError> for LaunchError {
    fn from(error: CudaError) -> Self {
        LaunchError::Cuda(error)
    }
}

impl Work for ComputeWork {
    fn queue(&mut self, number: u64, op: Op) -> Result<(), MachineError> {
        let Op::Compute(compute) = &op else {
            return Err(MachineError::Unsupported(format!(
                "another lane for {op:?}"
            )));
        };
        self.compute(number, compute).map_err(|error| match error {
            LaunchError::Cuda(error) => gpu_error(error),
            LaunchError::Blas(text) => MachineError::Gpu(text),
        })
    }
}

/// Launched over (rows, pieces of a row).
pub fn row_grid(count: usize, width: usize) -> (u32, u32) {
    (count as u32, width.div_ceil(ROW_BLOCK) as u32)
}

impl ComputeWork {
    fn compute(&mut self, number: u64, compute: &Compute) -> Result<(), LaunchError> {
        match compute {
            Compute::Gemm(gemm) => self.product(gemm),
            Compute::Append(a) => self.append(number, a),
            Compute::Attend(a) => self.attend(number, a),
            Compute::Widen(w) => self.widen(w),
            Compute::Embed {
                table,
                format,
                ids,
                to,
                ..
            } => self.table_rows(number, ("embed", *table, *format), (ids, to)),
            Compute::AddPositions {
                table,
                format,
                indices,
                to,
                ..
            } => self.table_rows(number, ("add_positions", *table, *format), (indices, to)),
            Compute::Norm { from, affine, out } => {
                let out = self.f32s(*out, from.rows.len * from.width);
                self.norm(number, from, affine, Some(out))
            }
            Compute::NormInPlace { rows, affine } => self.norm(number, rows, affine, None),
            Compute::Gather { from, out } => self.rows(number, "gather_rows", from, *out),
            Compute::Scatter { to, y } => self.rows(number, "scatter_rows", to, *y),
            Compute::AddRows { to, y } => self.rows(number, "add_rows", to, *y),
        }
    }

    /// Queues a launch of one block size over a grid; an empty grid is no launch.
    pub fn launch(
        &self,
        name: &str,
        (grid, block): ((u32, u32), u32),
        args: &[Arg],
    ) -> Result<(), LaunchError> {
        if grid.0 == 0 || grid.1 == 0 {
            return Ok(());
        }
        // SAFETY: arguments as kernels/README.md lists them; every address was checked against the arena,
        // and the fences of the operation keep its ranges to it.
        let launched = unsafe {
            self.kernels
                .get(name)
                .launch(self.timeline.stream(), grid, block, args)
        };
        Ok(launched?)
    }

    /// Device address of f32 values.
    pub fn f32s(&self, offset: u64, count: usize) -> u64 {
        self.device.at(offset, 4 * count as u64)
    }

    /// Address of hidden row 0, once all rows of the table are known to be inside.
    fn hidden(&self, rows: &HiddenRows) -> u64 {
        let last = rows.rows.as_slice().iter().max();
        self.f32s(
            rows.base,
            last.map_or(0, |&r| (r as usize + 1) * rows.width),
        )
    }

    fn table_rows(
        &mut self,
        number: u64,
        (kernel, table, format): (&str, u64, Dtype),
        (indices, to): (&Table, &HiddenRows),
    ) -> Result<(), LaunchError> {
        let lengths = [table_bytes(indices), table_bytes(&to.rows)];
        self.tables.open(number, lengths.into_iter());
        let indices_at = self.tables.shared(&indices.entries, indices.first);
        let rows_at = self.tables.shared(&to.rows.entries, to.rows.first);
        self.tables.copy()?;
        let highest = indices
            .as_slice()
            .iter()
            .max()
            .map_or(0, |&i| i as usize + 1);
        let args = [
            Arg::Address(
                self.device
                    .at(table, highest as u64 * format.row_bytes(to.width)),
            ),
            Arg::Address(indices_at),
            Arg::Address(self.hidden(to)),
            Arg::Address(rows_at),
            Arg::U32(indices.len as u32),
            Arg::U32(to.width as u32),
        ];
        let name = format!("{kernel}_{}", format.name());
        self.launch(&name, (row_grid(indices.len, to.width), THREADS), &args)
    }

    /// Kernels of (x, rows, other, count, width).
    fn rows(
        &mut self,
        number: u64,
        kernel: &str,
        x: &HiddenRows,
        other: u64,
    ) -> Result<(), LaunchError> {
        let rows = self.row_table(number, x)?;
        let args = [
            Arg::Address(self.hidden(x)),
            Arg::Address(rows),
            Arg::Address(self.f32s(other, x.rows.len * x.width)),
            Arg::U32(x.rows.len as u32),
            Arg::U32(x.width as u32),
        ];
        self.launch(kernel, (row_grid(x.rows.len, x.width), THREADS), &args)
    }

    fn row_table(&mut self, number: u64, x: &HiddenRows) -> Result<u64, LaunchError> {
        self.tables.open(number, [table_bytes(&x.rows)].into_iter());
        let rows = self.tables.shared(&x.rows.entries, x.rows.first);
        self.tables.copy()?;
        Ok(rows)
    }

    /// Into contiguous rows at `out`, or in place.
    fn norm(
        &mut self,
        number: u64,
        x: &HiddenRows,
        affine: &Affine,
        out: Option<u64>,
    ) -> Result<(), LaunchError> {
        let rows = self.row_table(number, x)?;
        let from = self.hidden(x);
        let learned = |at: Option<u64>| at.map_or(0, |at| self.f32s(at, x.width));
        let (target, target_rows) = out.map_or((from, rows), |out| (out, 0));
        let args = [
            Arg::Address(from),
            Arg::Address(rows),
            Arg::Address(learned(affine.weight)),
            Arg::Address(learned(affine.bias)),
            Arg::Address(target),
            Arg::Address(target_rows),
            Arg::U32(x.rows.len as u32),
            Arg::U32(x.width as u32),
            Arg::F32(NORM_EPSILON),
        ];
        self.launch("layer_norm", ((x.rows.len as u32, 1), THREADS), &args)
    }
}

/// Bytes of the whole shared table: it is copied whole, once for all its parts.
pub fn table_bytes(table: &Table) -> u64 {
    4 * table.entries.len() as u64
}
