//! Operations on rows of hidden values as affine terms: norms, sums, embedded rows. Products and attention are
//! layer.rs's.

use crate::cost::layer::LayerBuilder;
use crate::cost::steps::Step;
use crate::cost::terms::Work;

/// Operations on rows: (how many for a chunk, how often each passes over its rows). A layer has two norms (its rows
/// read and written) and two residual adds (two read, one written).
const ROWWISE: [(f64, f64); 2] = [(2.0, 2.0), (2.0, 3.0)];
/// With norms after the sums, rows are gathered before a product as well.
const POST_NORM: [(f64, f64); 1] = [(2.0, 2.0)];
/// Rows are looked up (read, written) and get their positions added (two read, one written).
const EMBEDDING: [(f64, f64); 2] = [(1.0, 2.0), (1.0, 3.0)];
/// The final norm.
const HEAD: [(f64, f64); 1] = [(1.0, 2.0)];

impl LayerBuilder<'_> {
    /// Of one layer, all batches.
    pub(super) fn rowwise(&self, work: &mut Work, step: &Step) {
        let chunks = step.chunks();
        self.on_rows(work, &ROWWISE, &chunks);
        if !self.model.pre_norm {
            self.on_rows(work, &POST_NORM, &chunks);
        }
    }

    /// Embedded rows with their positions, and the last rows' norm.
    pub(super) fn end_rows(&self, work: &mut Work, step: &Step) {
        self.on_rows(work, &EMBEDDING, &step.chunks());
        self.on_rows(work, &HEAD, &step.batches);
    }

    /// Operations for each of so many chunks of so many rows.
    fn on_rows(&self, work: &mut Work, operations: &[(f64, f64)], chunks: &[(f64, f64)]) {
        let (tier, lane) = self.computer();
        for &(rows, count) in chunks {
            for &(each, passes) in operations {
                let bytes = each * count * passes * rows * self.hidden_row_bytes();
                let work_s = self.rates.rowwise_s(tier, bytes);
                let seconds = self.rates.operations_s(tier, each * count, work_s);
                work.lanes[lane].constant += seconds;
                work.rowwise.constant += seconds;
            }
        }
    }
}
