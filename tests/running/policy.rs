//! The plain policy that tests change: all native, overlapped, an fp32 cache.

use loadmaster::dtype::{Compute, Dtype};
use loadmaster::policy::{Policy, Shares};

pub fn policy(percent: [f64; 6], cpu_compute_share: f64, (gbs, ngb): (usize, usize)) -> Policy {
    Policy {
        shares: Shares::from_percent(percent, cpu_compute_share).expect("percentages"),
        gpu_batch_size: gbs,
        num_gpu_batches: ngb,
        pin_weight: true,
        compress_weight: false,
        compress_cache: false,
        cpu_cache_compute: false,
        double_buffer: false,
        overlap: true,
        compute: Compute::Exact,
        kv: Dtype::F32,
        threads: 2,
    }
}
