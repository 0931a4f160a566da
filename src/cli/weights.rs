//! Where a plan's weights come from: their source, or a store that is reused or packed now. Also how far that is.

use super::execute::Execution;
use super::failure::Failure;
use super::progress::{Talk, Unit};
use super::settle::Model;
use crate::checkpoint::WeightSource;
use crate::engine::loading::Loading;
use crate::engine::open::Packed;
use crate::machine::cpu::pool::Pool;
use crate::machine::disk;
use crate::plan::Plan;
use crate::policy::Policy;
use crate::report::SetupFigures;
use crate::store::{self, PackJob, Packing, Store};
use crate::units::{MIB, show_bytes};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

/// Packing keeps its buffers within this.
const PACK_MEMORY_BYTES: u64 = 192 * MIB;

/// Where the model's weights come from.
pub fn source_of(model: &Model) -> Result<&dyn WeightSource, Failure> {
    let only_named = || {
        let name = &model.name;
        Failure::failed(format!("{name} is only a size's name")).with_hint(format!(
            "give a model's directory, or synth:{name} for random weights"
        ))
    };
    model.source.as_deref().ok_or_else(only_named)
}

/// The store of the plan's weights, where there is to be one.
pub fn store_of(
    job: &Execution,
    policy: &Policy,
    told: (&mut SetupFigures, &mut Talk),
    stop: &AtomicBool,
) -> Result<Option<Store>, Failure> {
    match job.unpacked {
        true => Ok(None),
        false => packed_store(job, policy, told, stop).map(Some),
    }
}

fn packing(plan: &Plan, policy: &Policy) -> Result<Packing, Failure> {
    let device = plan.device_kind().map_err(Failure::failed)?;
    Ok(Packing {
        compress: policy.compress_weight,
        layout: device.weight_layout(),
    })
}

fn find_store(job: &Execution, source: &dyn WeightSource, packing: Packing) -> Option<Store> {
    let fingerprint = source.fingerprint();
    store::find(job.offload_dir, source.spec(), &fingerprint, packing)
}

/// Bytes of weights that are to be packed before the run.
pub fn to_pack_bytes(job: &Execution, policy: &Policy) -> Result<u64, Failure> {
    if job.unpacked {
        return Ok(0);
    }
    let (source, packing) = (source_of(job.model)?, packing(job.plan, policy)?);
    Ok(match find_store(job, source, packing) {
        Some(_) => 0,
        None => {
            store::clear_leftover(job.offload_dir, source, packing).map_err(Failure::failed)?;
            source.spec().weights_bytes(packing.compress)
        }
    })
}

/// The store of the plan's weights: reused, or packed now.
pub fn packed_store(
    job: &Execution,
    policy: &Policy,
    (setup, talk): (&mut SetupFigures, &mut Talk),
    stop: &AtomicBool,
) -> Result<Store, Failure> {
    let source = source_of(job.model)?;
    let packing = packing(job.plan, policy)?;
    if let Some(store) = find_store(job, source, packing) {
        return Ok(store);
    }
    let bytes = source.spec().weights_bytes(packing.compress);
    let room = disk::free_bytes(job.offload_dir).map_err(Failure::failed)?;
    let limit = job.plan.budget.disk_bytes.min(room);
    if bytes > limit {
        return Err(Failure::failed(format!(
            "the packed weights take {} on disk and {} may be used: {} are missing",
            show_bytes(bytes), show_bytes(limit), show_bytes(bytes - limit)
        ))
        .with_hint("make room (loadmaster store list), raise --disk-space, or name another disk with --offload-dir"));
    }
    talk.stage(&format!("packing the weights once ({})", show_bytes(bytes)));
    let began = Instant::now();
    let pool = Pool::new(policy.threads);
    let mut waiting = Waiting { talk, stop, began };
    let mut progress = |done: u64, total: u64| waiting.progress(done, total);
    let store = store::pack(PackJob {
        source,
        offload_dir: job.offload_dir,
        packing,
        pool: &pool,
        memory_bytes: PACK_MEMORY_BYTES.min(job.plan.budget.cpu_bytes / 2),
        progress: &mut progress,
        stop,
    });
    let store = store.map_err(Failure::failed)?;
    setup.pack_s = began.elapsed().as_secs_f64();
    setup.written_bytes = store.file_bytes();
    talk.end();
    Ok(store)
}

/// The store as the engine reads it.
pub fn packed(store: &Store) -> Packed {
    let spec = store.spec();
    let matrices = 0..spec.matrices().len();
    let smalls = 0..spec.smalls().len();
    Packed {
        file: store.file_path(),
        matrix_offsets: matrices.map(|i| store.matrix_offset(i)).collect(),
        small_offsets: smalls.map(|i| store.small_range(i).start as u64).collect(),
    }
}

/// Says how far a stage of the set-up is, and hears who wants it ended.
pub struct Waiting<'a> {
    pub talk: &'a mut Talk,
    pub stop: &'a AtomicBool,
    pub began: Instant,
}

impl Loading for Waiting<'_> {
    fn progress(&mut self, done_bytes: u64, total_bytes: u64) {
        let rate = done_bytes as f64 / self.began.elapsed().as_secs_f64().max(1e-9);
        self.talk.step(done_bytes, total_bytes, Unit::Bytes, rate);
    }
    fn is_stopped(&self) -> bool {
        self.stop.load(Ordering::Relaxed)
    }
}
