//! From a decided policy to a machine that is ready to run: files opened, arenas mapped once from the
//! footprint, weights brought home. After this, memory does not grow.

use super::bring::bring;
use super::core::RunFacts;
use super::layout::Layout;
use super::load::load;
use super::loading::{Counted, Loading};
use super::run::EngineError;
use crate::checkpoint::WeightSource;
use crate::cost::footprint::{BlockShape, Buffer, Footprint, FootprintInput, HostBytes};
use crate::cost::locks::Unlocked;
use crate::cost::spill::OwnRows;
use crate::machine::MachineError;
use crate::machine::arena::Region;
use crate::machine::cpu::kernels::MAX_HEAD_SIZE;
use crate::machine::cuda::{GpuChoice, GpuPlaces, NO_BF16};
use crate::machine::disk::DiskFile;
use crate::machine::ops::FileId;
use crate::machine::price::Pricer;
use crate::machine::threaded::{OpenRequest, ThreadedMachine};
use crate::model::ModelSpec;
use crate::placement::{Placement, WeightHome};
use crate::policy::{DeviceKind, Policy};
use crate::tier::Tier;
use crate::units::{MIB, PAGE_BYTES};
use crate::workload::Lengths;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// Between two looks at whether to end the writing.
const WRITTEN_AT_ONCE_BYTES: u64 = 64 * MIB;

/// A packed store as the engine sees it: one file, and where everything lies in it.
#[derive(Default)]
pub struct Packed {
    pub file: PathBuf,
    /// Per matrix of `ModelSpec::matrices`.
    pub matrix_offsets: Vec<u64>,
    /// Per tensor of `ModelSpec::smalls`.
    pub small_offsets: Vec<u64>,
}

/// What to run, decided.
pub struct RunJob<'a> {
    pub model: &'a ModelSpec,
    pub policy: &'a Policy,
    pub device: DeviceKind,
    pub lengths: Lengths,
    pub host: HostBytes,
    /// Not looked at where there is a source.
    pub packed: &'a Packed,
    /// Set where `host` is unpacked: the weights come straight from here.
    pub source: Option<&'a dyn WeightSource>,
    /// Where spill files go.
    pub spill: &'a Path,
    pub pricer: Pricer,
    /// Of a CUDA device.
    pub gpu: GpuChoice,
}

/// The bytes of a job, before anything is opened.
pub fn footprint(job: &RunJob) -> Footprint {
    facts(job).footprint
}

fn facts(job: &RunJob) -> RunFacts {
    let placement = Placement::new(job.model, job.policy);
    let block = BlockShape::from_lengths(&job.lengths, job.policy, &placement);
    let footprint = Footprint::new(&FootprintInput {
        model: job.model,
        policy: job.policy,
        placement: &placement,
        block: &block,
        device: job.device,
        host: job.host,
    });
    RunFacts {
        own: OwnRows::new(&placement, job.device, job.host.unpacked),
        model: job.model.clone(),
        policy: job.policy.clone(),
        placement,
        block,
        footprint,
        device: job.device,
        matrix_offsets: job.packed.matrix_offsets.clone(),
        fetches_tokens: true,
        unlocked: Unlocked::default(),
    }
}

/// A machine with its arenas mapped, before the weights are home.
pub struct Started {
    machine: ThreadedMachine,
    facts: RunFacts,
    layout: Layout,
    rows: Arc<DiskFile>,
}

impl Started {
    /// Why the weights in DRAM are not page-locked although the policy wants them so.
    pub fn unpinned(&self) -> Option<&str> {
        let notice = self.machine.notice();
        notice.filter(|_| self.facts.unlocked.has(Buffer::Weights))
    }

    /// What of the DRAM could not be page-locked, and why.
    pub fn unlocked(&self) -> Option<(&Unlocked, &str)> {
        Some((&self.facts.unlocked, self.machine.notice()?))
    }

    /// Brings the weights home; `EngineError::Interrupted` where `loading` ends it.
    pub fn load(
        self,
        job: &RunJob,
        loading: &mut dyn Loading,
    ) -> Result<(ThreadedMachine, RunFacts), EngineError> {
        let Started {
            mut machine,
            facts,
            layout,
            rows,
        } = self;
        let bytes = |home| facts.placement.weight_bytes(home);
        let resident: u64 = WeightHome::RESIDENT.map(bytes).iter().sum();
        let mut counted = Counted::new(loading, resident + facts.own.bytes);
        let counted = &mut counted;
        match job.source {
            Some(source) => bring(source, &mut machine, (&facts, &layout, &rows), counted)?,
            None => load(&mut machine, job.packed, (&facts, &layout), counted)?,
        }
        machine.forget_log();
        Ok((machine, facts))
    }
}

/// Opens the machine and brings the weights home.
pub fn open(job: &RunJob) -> Result<(ThreadedMachine, RunFacts), EngineError> {
    start(job, &mut ())?.load(job, &mut ())
}

/// Opens the machine: everything that can be missing is missing now. `EngineError::Interrupted` where `loading` ends it
/// while a file is written out.
pub fn start(job: &RunJob, loading: &mut dyn Loading) -> Result<Started, EngineError> {
    if job.model.head_size() > MAX_HEAD_SIZE {
        let what = format!(
            "attention heads of at most {MAX_HEAD_SIZE} values (the model has {})",
            job.model.head_size()
        );
        return Err(MachineError::Unsupported(what).into());
    }
    let mut facts = facts(job);
    let layout = Layout::new(&facts.model, &facts.placement, &facts.footprint);
    let files = open_files(job, &facts)?;
    write_out(&files[FileId::CACHE.0], facts.cache_file_bytes(), loading)?;
    let rows = files[FileId::ROWS.0].clone();
    let places = || (job.gpu.clone(), gpu_places(&facts, &layout));
    let machine = ThreadedMachine::open(OpenRequest {
        device: job.device,
        gpu_bytes: facts.footprint.arena_bytes(Tier::Gpu),
        cpu_bytes: facts.footprint.arena_bytes(Tier::Cpu),
        threads: job.policy.threads,
        files,
        pricer: job.pricer.clone(),
        gpu: (job.device == DeviceKind::Cuda).then(places),
    })?;
    if !job.policy.compress_weight && !machine.multiplies(job.model.dtype) {
        return Err(MachineError::Gpu(NO_BF16.into()).into());
    }
    // A relay is made smaller instead.
    let refused = |buffer: &Buffer| {
        let place = region(&layout, (Tier::Cpu, *buffer));
        *buffer != Buffer::Relay && machine.could_not_lock(place)
    };
    let unlocked = lockable(&facts, &layout).into_iter().filter(refused);
    facts.unlocked = Unlocked(unlocked.collect());
    Ok(Started {
        machine,
        facts,
        layout,
        rows,
    })
}

fn region(layout: &Layout, (tier, buffer): (Tier, Buffer)) -> Region {
    let place = layout.buffer(tier, buffer);
    Region {
        offset: place.offset,
        bytes: place.bytes,
    }
}

/// What of the DRAM is to be page-locked: all that copies touch, except weights where the policy does not pin them.
/// First what serves all copies, then small buffers before large ones, so that a limit meets few, and weights last,
/// since they can do without.
fn lockable(facts: &RunFacts, layout: &Layout) -> Vec<Buffer> {
    let bytes = |buffer: Buffer| layout.buffer(Tier::Cpu, buffer).bytes;
    let mut buffers = layout.buffers(Tier::Cpu);
    buffers.retain(|&b| bytes(b) > 0 && (b != Buffer::Weights || facts.policy.pin_weight));
    let serves = |b| matches!(b, Buffer::Tables | Buffer::Relay);
    buffers.sort_by_key(|&b| (!serves(b), b == Buffer::Weights, bytes(b)));
    buffers
}

/// Where a CUDA machine's own buffers are.
fn gpu_places(facts: &RunFacts, layout: &Layout) -> GpuPlaces {
    let region = |tier, buffer| region(layout, (tier, buffer));
    let pinned = lockable(facts, layout).into_iter();
    GpuPlaces {
        arena_bytes: facts.footprint.arena_bytes(Tier::Gpu),
        scratch: region(Tier::Gpu, Buffer::Scratch),
        blas: region(Tier::Gpu, Buffer::BlasWorkspace),
        tables: region(Tier::Gpu, Buffer::Tables),
        host_tables: region(Tier::Cpu, Buffer::Tables),
        relay: region(Tier::Cpu, Buffer::Relay),
        pinned: pinned.map(|buffer| region(Tier::Cpu, buffer)).collect(),
    }
}

/// In the order of `FileId`; one that nothing is in is the store again (without a store, a page), so that ids stay
/// fixed.
fn open_files(job: &RunJob, facts: &RunFacts) -> Result<Vec<Arc<DiskFile>>, MachineError> {
    let failed = |e: crate::machine::disk::DiskError| MachineError::Disk(e.to_string());
    let store = match job.source {
        Some(_) => DiskFile::create_unlinked(job.spill, PAGE_BYTES),
        None => DiskFile::open_read(&job.packed.file),
    };
    let store = Arc::new(store.map_err(failed)?);
    let spill = |bytes: u64| match bytes {
        0 => Ok(store.clone()),
        _ => DiskFile::create_unlinked(job.spill, bytes)
            .map(Arc::new)
            .map_err(failed),
    };
    let bytes = facts.footprint.spill;
    let block = &facts.block;
    let cache = facts.cache_file_bytes();
    let hidden = bytes.hidden * u64::from(block.hidden_rows.disk > 0);
    Ok(vec![
        store.clone(),
        spill(cache)?,
        spill(hidden)?,
        spill(bytes.rows)?,
    ])
}

/// The cache's file once from end to end: new tokens are few bytes in many places.
fn write_out(file: &DiskFile, bytes: u64, loading: &mut dyn Loading) -> Result<(), EngineError> {
    let mut counted = Counted::new(loading, bytes);
    for from in (0..bytes).step_by(WRITTEN_AT_ONCE_BYTES as usize) {
        let range = from..bytes.min(from + WRITTEN_AT_ONCE_BYTES);
        let part = range.end - range.start;
        let written = file.write_out(range);
        written.map_err(|e| MachineError::Disk(e.to_string()))?;
        counted.add(part)?;
    }
    Ok(())
}
