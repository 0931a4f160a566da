//! Every byte that a run will hold, per tier, as a list of named buffers. The planner prices plans
//! with it and the engine allocates exactly this list, once; nothing else may allocate.

pub use crate::cost::block::BlockShape;
use crate::cost::cuda_buffers::cuda_buffers;
use crate::cost::ring::{RingUse, ring_bytes};
pub use crate::cost::ring::{chunk_panels, chunk_slot_bytes};
use crate::cost::spill::SpillBytes;
use crate::model::ModelSpec;
use crate::placement::{Placement, WeightHome};
use crate::policy::{DeviceKind, Policy};
use crate::profile::GpuFacts;
use crate::tier::{PerTier, Tier};
use crate::units::{MIB, PAGE_BYTES, round_up};
use std::collections::BTreeMap;

/// Prompts are read in pieces of at most this many tokens, so that workspace does not grow with them.
pub const CHUNK_ROWS_MAX: usize = 512;
/// A streamed piece of a matrix is at most this large (at least one panel).
pub const STREAM_CHUNK_BYTES: u64 = 16 * MIB;
/// How far reading may run ahead of computing, beyond what must be there at once.
pub const RUN_AHEAD_BYTES: u64 = 32 * MIB;
/// Buffers start at this alignment, for direct I/O and huge pages.
pub const BUFFER_ALIGN: u64 = PAGE_BYTES;
/// Bytes of one hidden value in a run.
pub const HIDDEN_VALUE_BYTES: u64 = 4;

/// What a buffer is for. One buffer of a kind per tier.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Buffer {
    /// Norms, biases, positions.
    Smalls,
    /// Weight panels at home.
    Weights,
    /// Keys and values at home.
    Cache,
    /// Hidden states at home.
    Hidden,
    /// Streamed weight panels on their way.
    Ring,
    /// Rows of the token table that are at home elsewhere.
    EmbeddingStage,
    /// Keys and values at home elsewhere, for two batches.
    CacheStage,
    /// Hidden states at home elsewhere, for two batches, or the rows of three in a staggered decode pass.
    HiddenStage,
    /// chunk × hidden: normalised input of a product.
    Normed,
    /// chunk × 3 hidden, or two batches' in a staggered decode pass.
    Qkv,
    /// chunk × hidden, or two batches'.
    Attended,
    /// chunk × ffn.
    Ffn,
    /// chunk × hidden: a product before it joins the residual.
    Product,
    /// chunk × embed_width, for models with projections.
    Embedded,
    /// slots × hidden: last positions, normalised, for the head.
    HeadRows,
    /// slots × embed_width, for models with projections.
    HeadProjected,
    /// slots × vocabulary.
    Logits,
    /// Inputs of products that the CPU computes for a GPU.
    SideRows,
    /// Their results.
    SideProducts,
    /// Of a CUDA machine: narrowed activations and widened weights of one product, attention's parts.
    Scratch,
    /// Of a CUDA machine: cuBLAS's workspace.
    BlasWorkspace,
    /// Of a CUDA machine, on both sides: rows, ids, token slots and items of operations under way.
    Tables,
    /// Of a CUDA machine: page-locked DRAM through which other DRAM travels.
    Relay,
}

impl Buffer {
    fn class(self) -> Class {
        match self {
            Buffer::Smalls | Buffer::Weights => Class::Weights,
            Buffer::Cache => Class::Cache,
            Buffer::Hidden => Class::Activations,
            _ => Class::Buffers,
        }
    }
}

#[derive(Clone, Copy, PartialEq)]
enum Class {
    Weights,
    Cache,
    Activations,
    Buffers,
}

/// What a run holds beside its arenas.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct HostBytes {
    /// Program text, heap, stacks, tokenizer, line window.
    pub process_bytes: u64,
    /// GPU context and libraries, on the device.
    pub gpu_context_bytes: u64,
    /// There is no store: the weights come straight from their source.
    pub unpacked: bool,
}

impl HostBytes {
    /// With what a GPU's context and libraries take, on both sides.
    pub fn with_gpu(self, device: DeviceKind, gpu: Option<&GpuFacts>) -> Self {
        let Some(gpu) = gpu.filter(|_| device == DeviceKind::Cuda) else {
            return self;
        };
        HostBytes {
            process_bytes: self.process_bytes + gpu.host_bytes,
            gpu_context_bytes: gpu.context_bytes,
            ..self
        }
    }
}

/// All buffers of a run and what lies on disk.
#[derive(Clone, Debug, PartialEq)]
pub struct Footprint {
    buffers: PerTier<BTreeMap<Buffer, u64>>,
    pub process: PerTier<u64>,
    /// Whole packed store on disk, and this run's own files.
    pub store_bytes: u64,
    pub spill: SpillBytes,
    /// Of the store, what this placement reads from disk in every pass.
    pub disk_weights_bytes: u64,
}

/// What a footprint is computed from.
#[derive(Clone, Copy)]
pub struct FootprintInput<'a> {
    pub model: &'a ModelSpec,
    pub policy: &'a Policy,
    pub placement: &'a Placement,
    pub block: &'a BlockShape,
    pub device: DeviceKind,
    pub host: HostBytes,
}

impl Footprint {
    pub fn new(input: &FootprintInput) -> Self {
        let (model, policy) = (input.model, input.policy);
        let record = model.kv_record_bytes(policy.kv_format());
        let mut footprint = Footprint {
            buffers: PerTier::default(),
            process: PerTier {
                gpu: input.host.gpu_context_bytes,
                cpu: input.host.process_bytes,
                disk: 0,
            },
            store_bytes: match input.host.unpacked {
                true => 0,
                false => store_bytes(model, policy.compress_weight),
            },
            spill: SpillBytes::new(input, record),
            disk_weights_bytes: input.placement.weight_bytes(WeightHome::DiskShip)
                + input.placement.weight_bytes(WeightHome::DiskCompute),
        };
        footprint.add_homes(input, record);
        footprint.add_rings(input);
        footprint.add_stages(input, record);
        footprint.add_workspace(input);
        if input.device.has_gpu() {
            footprint.add_cpu_side(input);
        }
        if input.device == DeviceKind::Cuda {
            let buffers = cuda_buffers(input);
            buffers
                .into_iter()
                .for_each(|(tier, buffer, bytes)| footprint.put(tier, buffer, bytes));
        }
        let arenas: u64 = footprint.buffers.cpu.values().sum();
        footprint.process.cpu += super::kernel_bytes(arenas);
        if input.device.has_gpu() {
            // Where the arenas of DRAM grow with the rows, their part for the kernel has room for these, too.
            let rows: u64 = Tier::ALL.map(|t| input.block.hidden_rows[t]).iter().sum();
            footprint.process.cpu += super::ROW_TABLE_BYTES * rows;
        }
        footprint.process.cpu +=
            u64::from(input.host.unpacked) * super::source_bytes(model, policy.threads);
        footprint
    }

    /// Bytes of one buffer; 0 where a run has none.
    pub fn buffer(&self, tier: Tier, buffer: Buffer) -> u64 {
        self.buffers[tier].get(&buffer).copied().unwrap_or(0)
    }

    /// All buffers of one tier's arena in layout order.
    pub fn arena(&self, tier: Tier) -> impl Iterator<Item = (Buffer, u64)> + '_ {
        self.buffers[tier].iter().map(|(&b, &bytes)| (b, bytes))
    }

    pub fn arena_bytes(&self, tier: Tier) -> u64 {
        self.buffers[tier].values().sum()
    }

    /// All that a tier must hold: arena and process for memory, store and spill for the disk.
    pub fn total(&self, tier: Tier) -> u64 {
        let on_disk = match tier {
            Tier::Disk => self.store_bytes + self.spill.total(),
            _ => 0,
        };
        self.arena_bytes(tier) + self.process[tier] + on_disk
    }

    fn class_bytes(&self, tier: Tier, class: Class) -> u64 {
        self.buffers[tier]
            .iter()
            .filter(|(b, _)| b.class() == class)
            .map(|(_, bytes)| bytes)
            .sum()
    }

    pub fn weights_bytes(&self, tier: Tier) -> u64 {
        if tier == Tier::Disk {
            self.disk_weights_bytes
        } else {
            self.class_bytes(tier, Class::Weights)
        }
    }

    pub fn cache_bytes(&self, tier: Tier) -> u64 {
        if tier == Tier::Disk {
            self.spill.cache
        } else {
            self.class_bytes(tier, Class::Cache)
        }
    }

    pub fn activations_bytes(&self, tier: Tier) -> u64 {
        if tier == Tier::Disk {
            self.spill.hidden
        } else {
            self.class_bytes(tier, Class::Activations)
        }
    }

    pub fn buffers_bytes(&self, tier: Tier) -> u64 {
        self.class_bytes(tier, Class::Buffers)
    }

    fn put(&mut self, tier: Tier, buffer: Buffer, bytes: u64) {
        if bytes > 0 {
            *self.buffers[tier].entry(buffer).or_default() += round_up(bytes, BUFFER_ALIGN);
        }
    }

    fn add_homes(&mut self, input: &FootprintInput, record_bytes: u64) {
        let layers = input.model.layers as u64;
        let row = input.model.hidden as u64 * HIDDEN_VALUE_BYTES;
        self.put(
            compute_tier(input.device),
            Buffer::Smalls,
            input.placement.smalls_bytes + 64 * 16 * (layers + 2),
        );
        for home in WeightHome::RESIDENT {
            self.put(
                home.tier(),
                Buffer::Weights,
                input.placement.weight_bytes(home),
            );
        }
        for tier in [Tier::Gpu, Tier::Cpu] {
            self.put(
                tier,
                Buffer::Cache,
                layers * input.block.kv_tokens[tier] * record_bytes,
            );
            self.put(tier, Buffer::Hidden, input.block.hidden_rows[tier] * row);
        }
    }

    fn add_rings(&mut self, input: &FootprintInput) {
        let plain = RingUse {
            reused: input.block.weights_reused(input.policy),
            staggered: input.block.staggers(input.policy, input.device),
            doubled: false,
        };
        let from_disk = [WeightHome::DiskShip, WeightHome::DiskCompute];
        let shipped = [WeightHome::CpuShip, WeightHome::DiskShip];
        for (tier, homes) in [(Tier::Cpu, from_disk), (Tier::Gpu, shipped)] {
            let doubled = tier == Tier::Gpu && input.policy.double_buffer;
            let bytes = ring_bytes(input.placement, &homes, RingUse { doubled, ..plain });
            self.put(tier, Buffer::Ring, bytes);
        }
        let stage = embedding_stage_bytes(input.placement, input.device);
        self.put(compute_tier(input.device), Buffer::EmbeddingStage, stage);
        if input.device.has_gpu() {
            self.put(Tier::Cpu, Buffer::EmbeddingStage, stage);
        }
    }

    fn add_stages(&mut self, input: &FootprintInput, record_bytes: u64) {
        let (block, gpu) = (input.block, input.device.has_gpu());
        let on_cpu = !gpu || input.policy.cpu_cache_compute;
        let slack = 2 * PAGE_BYTES * input.policy.gpu_batch_size as u64;
        let disk_tokens = block.batch_kv_tokens.disk;
        if disk_tokens > 0 {
            self.put(
                Tier::Cpu,
                Buffer::CacheStage,
                2 * (disk_tokens * record_bytes + slack),
            );
        }
        let visiting = disk_tokens + block.batch_kv_tokens.cpu;
        if gpu && !on_cpu && visiting > 0 {
            self.put(
                Tier::Gpu,
                Buffer::CacheStage,
                2 * (visiting * record_bytes + slack),
            );
        }
        let row = input.model.hidden as u64 * HIDDEN_VALUE_BYTES;
        let disk_rows = block.batch_hidden_rows.disk;
        let items = input.policy.gpu_batch_size as u64;
        let staggered = u64::from(block.staggers(input.policy, input.device));
        if disk_rows > 0 && gpu {
            let decoded = staggered * 3 * items.min(disk_rows) * round_up(row, PAGE_BYTES);
            let bytes = 2 * (disk_rows * row + slack);
            self.put(Tier::Cpu, Buffer::HiddenStage, bytes.max(decoded));
        } else if disk_rows > 0 {
            let step = page_step_bytes(row);
            self.put(
                Tier::Cpu,
                Buffer::HiddenStage,
                2 * (disk_rows * row + (items + 2) * step),
            );
        }
        let rows = disk_rows + block.batch_hidden_rows.cpu;
        if gpu && rows > 0 {
            let decoded = staggered * (3 * items.min(rows) + 4);
            let rows = (2 * (rows + 2)).max(decoded);
            self.put(Tier::Gpu, Buffer::HiddenStage, rows * row);
        }
    }

    fn add_workspace(&mut self, input: &FootprintInput) {
        let (m, block, tier) = (input.model, input.block, compute_tier(input.device));
        let rows = |count: u64, width: usize| count * width as u64 * HIDDEN_VALUE_BYTES;
        let chunk = block.chunk_rows;
        let [qkv, attended] = attended_bytes(input);
        self.put(tier, Buffer::Normed, rows(chunk, m.hidden));
        self.put(tier, Buffer::Qkv, qkv);
        self.put(tier, Buffer::Attended, attended);
        self.put(tier, Buffer::Ffn, rows(chunk, m.ffn));
        self.put(tier, Buffer::Product, rows(chunk, m.hidden));
        self.put(tier, Buffer::HeadRows, rows(block.slots, m.hidden));
        self.put(tier, Buffer::Logits, rows(block.slots, m.vocab));
        if m.embed_width != m.hidden {
            self.put(tier, Buffer::Embedded, rows(chunk, m.embed_width));
            self.put(
                tier,
                Buffer::HeadProjected,
                rows(block.slots, m.embed_width),
            );
        }
    }

    /// DRAM buffers beside a GPU: rows that the CPU multiplies or attends for it, logits for sampling.
    fn add_cpu_side(&mut self, input: &FootprintInput) {
        let (m, block, policy) = (input.model, input.block, input.policy);
        let rows = |count: u64, width: usize| count * width as u64 * HIDDEN_VALUE_BYTES;
        let w = &policy.shares.weights;
        if w.cpu_compute > 0.0 || w.disk_compute > 0.0 {
            self.put(
                Tier::Cpu,
                Buffer::Smalls,
                input.placement.smalls_bytes + 64 * 16 * (m.layers as u64 + 2),
            );
            let widest = m.ffn.max(m.hidden);
            let head = rows(block.slots, m.hidden.max(m.embed_width));
            self.put(
                Tier::Cpu,
                Buffer::SideRows,
                rows(block.chunk_rows, widest).max(head),
            );
            let products = rows(block.chunk_rows, m.ffn.max(3 * m.hidden));
            self.put(
                Tier::Cpu,
                Buffer::SideProducts,
                products.max(rows(block.slots, m.vocab)),
            );
        }
        let away = block.kv_tokens.cpu + block.kv_tokens.disk > 0;
        if policy.cpu_cache_compute && away {
            let [qkv, attended] = attended_bytes(input);
            self.put(Tier::Cpu, Buffer::Qkv, qkv);
            self.put(Tier::Cpu, Buffer::Attended, attended);
        }
        self.put(Tier::Cpu, Buffer::Logits, rows(block.slots, m.vocab));
    }
}

/// Queries, keys and values of a chunk, and its attended rows. The halves that two batches of a staggered pass
/// have begin at pages.
fn attended_bytes(input: &FootprintInput) -> [u64; 2] {
    let (block, policy) = (input.block, input.policy);
    let staggered = u64::from(block.staggers(policy, input.device));
    [3, 1].map(|widths| {
        let row = widths * input.model.hidden as u64 * HIDDEN_VALUE_BYTES;
        let half = round_up(policy.gpu_batch_size as u64 * row, PAGE_BYTES);
        (block.chunk_rows * row).max(staggered * 2 * half)
    })
}

fn store_bytes(model: &ModelSpec, compress: bool) -> u64 {
    model.weights_bytes(compress) + PAGE_BYTES * model.matrices().len() as u64
}

/// Bytes after which hidden rows start at a page again: visiting rows that are read from disk in place
/// begin at such a step.
pub fn page_step_bytes(row_bytes: u64) -> u64 {
    let (mut a, mut b) = (row_bytes, PAGE_BYTES);
    while b > 0 {
        (a, b) = (b, a % b);
    }
    row_bytes / a * PAGE_BYTES
}

/// The tier whose memory the computing device works in.
pub fn compute_tier(device: DeviceKind) -> Tier {
    if device.has_gpu() {
        Tier::Gpu
    } else {
        Tier::Cpu
    }
}

/// Room for the token table's rows that are not on the compute device: two pieces of a few panels.
fn embedding_stage_bytes(placement: &Placement, device: DeviceKind) -> u64 {
    let index = placement.table();
    let resident = if device.has_gpu() {
        placement.splits[index].count(WeightHome::Gpu)
    } else {
        placement.splits[index].count(WeightHome::CpuCompute)
    };
    let away = placement.matrices[index].panels() - resident;
    if away == 0 {
        0
    } else {
        2 * embedding_piece_bytes(placement.panel_bytes[index])
    }
}

/// Half of the embedding stage: whole panels up to 4 MiB, at least one.
pub fn embedding_piece_bytes(panel_bytes: u64) -> u64 {
    chunk_slot_bytes((4 * MIB / panel_bytes).max(1) as usize, panel_bytes)
}
