//! What the CPU computes: products over a grid, attention, 4-bit coding, row-wise work, plain memory.
//! Every operation is the engine's own kernel on data that rotates through the probe's memory.

use super::ProbeError;
use super::bench::Bench;
use super::cached::CacheArea;
use super::products::product_s;
use super::samples::{Series, median, tidy};
use super::scale::Extent;
use crate::dtype::{Arithmetic, Dtype, panels};
use crate::engine::sampling::{Draw, Sampling, sample};
use crate::machine::arena::AlignedBuffer;
use crate::machine::cpu::kernels::{
    AppendArgs, AttendArgs, AttendItem, Isa, KvView, NormArgs, PackSource, Slots, append_kv,
    attend, copy_bytes, layer_norm, memory_read_sum, pack_panels,
};
use crate::machine::cpu::pool::Pool;
use crate::profile::{AttentionRates, CpuFacts, GemmCurve, QuantiseRates};
use std::collections::BTreeMap;

/// Attention is measured at the width of opt-1.3b.
pub const HIDDEN: usize = 2048;
const HEAD_SIZE: usize = 64;
/// Tokens over which it is measured at other widths.
const WIDTH_TOKENS: usize = 64;
const KV_FORMATS: [Dtype; 3] = [Dtype::F32, Dtype::F16, Dtype::Q4];
/// Logits of one position.
const VOCABULARY: usize = 50272;
/// New rows of a few sequences that decode.
const FEW_ROWS: usize = 4;
/// Sequences of one decode step: as many as fill a good part of the memory, at most these.
pub const MAX_SEQUENCES: usize = 40;
/// A product that takes longer than this is not measured with more rows: its time grows evenly.
const LONG_S: f64 = 0.5;
/// Nor are products of bf16 with more, where no instruction makes them: they would take most of the probe.
const EMULATED_ROWS: usize = 64;

/// Formats and ways to multiply that are measured; what is not, is priced by what stands in for it.
pub fn products() -> impl Iterator<Item = (Dtype, Arithmetic)> {
    let wide = Dtype::ALL.map(|format| (format, Arithmetic::Fp32));
    let narrow = [Dtype::F16, Dtype::Bf16].map(|format| (format, Arithmetic::Bf16));
    let codes = (Dtype::Q4, Arithmetic::Int8);
    wide.into_iter().chain(narrow).chain([codes])
}

/// One product and its seconds so far.
struct GemmPoint {
    format: Dtype,
    arithmetic: Arithmetic,
    rows: usize,
    inputs: usize,
    outputs: usize,
    seconds: Series,
}

/// Attention over one format and so many tokens of so many values.
struct KvPoint {
    format: Dtype,
    kind: KvKind,
    tokens: usize,
    hidden: usize,
    /// Bytes or FLOP per second.
    rate: Series,
    /// Of decoding: what a call of one sequence takes more than its bytes at that rate.
    call_s: Series,
}

#[derive(Clone, Copy, PartialEq)]
enum KvKind {
    Decode,
    /// Decoding, for what the width of the keys makes of it.
    Width,
    Prefill,
}

/// The CPU's measurements.
pub struct ComputeArea {
    gemm: Vec<GemmPoint>,
    cache: CacheArea,
    attention: Vec<KvPoint>,
    read_bytes_per_s: Series,
    copy_bytes_per_s: Series,
    rowwise_bytes_per_s: Series,
    pack_bytes_per_s: Series,
    append_q4_bytes_per_s: Series,
    append_bytes_per_s: Series,
    append_call_s: Series,
    sampling_bytes_per_s: Series,
}

impl ComputeArea {
    pub fn new(extent: &Extent) -> ComputeArea {
        let mut grid = Vec::new();
        for (format, arithmetic) in products() {
            for (inputs, outputs) in extent.gemm_shapes {
                grid.extend(extent.gemm_rows.iter().map(|rows| GemmPoint {
                    format,
                    arithmetic,
                    rows: *rows,
                    inputs: *inputs,
                    outputs: *outputs,
                    seconds: Series::default(),
                }));
            }
        }
        ComputeArea {
            gemm: grid,
            cache: CacheArea::new(extent),
            attention: kv_points(extent),
            read_bytes_per_s: Series::default(),
            copy_bytes_per_s: Series::default(),
            rowwise_bytes_per_s: Series::default(),
            pack_bytes_per_s: Series::default(),
            append_q4_bytes_per_s: Series::default(),
            append_bytes_per_s: Series::default(),
            append_call_s: Series::default(),
            sampling_bytes_per_s: Series::default(),
        }
    }

    /// One sample of everything. Returns the bytes per second that DRAM gave before it and after it.
    pub fn round(&mut self, bench: &mut Bench) -> Result<[f64; 2], ProbeError> {
        let before = read_bytes_per_s(bench)?;
        self.copy_bytes_per_s.push(copy_bytes_per_s(bench)?);
        self.products(bench)?;
        self.cache.round(bench)?;
        self.attention(bench)?;
        self.small_work(bench)?;
        let after = read_bytes_per_s(bench)?;
        self.read_bytes_per_s.push((before + after) / 2.0);
        Ok([before, after])
    }

    /// Takes over what another round has measured of the same extent.
    pub fn join(&mut self, mut other: ComputeArea) {
        for (mine, others) in self.series().zip(other.series()) {
            mine.append(others);
        }
    }

    /// Every figure's samples, always in the same order.
    fn series(&mut self) -> impl Iterator<Item = &mut Series> {
        let gemm = self.gemm.iter_mut().map(|point| &mut point.seconds);
        let attention = self.attention.iter_mut();
        let attention = attention.flat_map(|point| [&mut point.rate, &mut point.call_s]);
        let single = [
            &mut self.read_bytes_per_s,
            &mut self.copy_bytes_per_s,
            &mut self.rowwise_bytes_per_s,
            &mut self.pack_bytes_per_s,
            &mut self.append_q4_bytes_per_s,
            &mut self.append_bytes_per_s,
            &mut self.append_call_s,
            &mut self.sampling_bytes_per_s,
        ];
        gemm.chain(self.cache.series())
            .chain(attention)
            .chain(single)
    }

    fn attention(&mut self, bench: &mut Bench) -> Result<(), ProbeError> {
        for point in &mut self.attention {
            match point.kind {
                KvKind::Prefill => point.rate.push(prefill(bench, point.format, point.tokens)?),
                KvKind::Width => {
                    let (bytes, seconds) = decode(bench, point, MAX_SEQUENCES)?;
                    point.rate.push(bytes / seconds);
                }
                KvKind::Decode => {
                    let (bytes, seconds) = decode(bench, point, MAX_SEQUENCES)?;
                    let rate = bytes / seconds;
                    point.rate.push(rate);
                    let (bytes, seconds) = decode(bench, point, 1)?;
                    point.call_s.push((seconds - bytes / rate).max(0.0));
                }
            }
        }
        Ok(())
    }

    fn products(&mut self, bench: &mut Bench) -> Result<(), ProbeError> {
        let mut long = None;
        for point in &mut self.gemm {
            let matrix = (point.format, point.arithmetic, point.inputs, point.outputs);
            let emulated = point.arithmetic == Arithmetic::Bf16 && !bench.isa.has_bf16();
            if long == Some(matrix) || (emulated && point.rows > EMULATED_ROWS) {
                continue;
            }
            let seconds = product(bench, point)?;
            point.seconds.push(seconds);
            if seconds > LONG_S {
                long = Some(matrix);
            }
        }
        Ok(())
    }

    fn small_work(&mut self, bench: &mut Bench) -> Result<(), ProbeError> {
        self.pack_bytes_per_s.push(pack(bench)?);
        let rows = bench.extent.rows();
        let coded_s = append(bench, Dtype::Q4, rows)?;
        self.append_q4_bytes_per_s
            .push(kv_value_bytes(rows) / coded_s);
        let (many_s, few_s) = (
            append(bench, Dtype::F16, rows)?,
            append(bench, Dtype::F16, FEW_ROWS)?,
        );
        self.append_bytes_per_s.push(kv_value_bytes(rows) / many_s);
        self.append_call_s
            .push((few_s - many_s * FEW_ROWS as f64 / rows as f64).max(0.0));
        self.rowwise_bytes_per_s.push(rowwise(bench)?);
        self.sampling_bytes_per_s.push(sampling(bench)?);
        Ok(())
    }

    /// What a profile says of the CPU.
    pub fn facts(&self) -> CpuFacts {
        let median = |series: &Series| tidy(series.median().unwrap_or(0.0));
        let attention = KV_FORMATS.map(|f| (f.name().to_owned(), self.attention_rates(f)));
        CpuFacts {
            dram_read_bytes_per_s: median(&self.read_bytes_per_s),
            dram_copy_bytes_per_s: median(&self.copy_bytes_per_s),
            // Measured last, through a machine's own lanes (launch.rs).
            launch_s: 0.0,
            handover_s: 0.0,
            handover_busy_s: None,
            wake_takes_s: 0.0,
            sampling_bytes_per_s: self.sampling_bytes_per_s.median().map(tidy),
            rowwise_bytes_per_s: self.rowwise_bytes_per_s.median().map(tidy),
            append_bytes_per_s: self.append_bytes_per_s.median().map(tidy),
            append_call_s: median(&self.append_call_s),
            cache_bytes: self.cache.cache_bytes(),
            cache_keeps: self.cache.keeps(),
            gemm: self.curves(),
            gemm_cached: self.cache.near_parts(),
            attention: attention.into(),
            quantise: Some(QuantiseRates {
                pack_bytes_per_s: median(&self.pack_bytes_per_s),
                append_bytes_per_s: median(&self.append_q4_bytes_per_s),
            }),
        }
    }

    fn attention_rates(&self, format: Dtype) -> AttentionRates {
        let curve = |kind, over: fn(&KvPoint) -> usize| -> Vec<(usize, f64)> {
            let of_kind = |p: &&KvPoint| p.format == format && p.kind == kind;
            let rate = |p: &KvPoint| Some((over(p), tidy(p.rate.median()?)));
            let points = self.attention.iter().filter(of_kind);
            points.filter_map(rate).collect()
        };
        let decode = curve(KvKind::Decode, |p| p.tokens);
        let prefill = curve(KvKind::Prefill, |p| p.tokens);
        let calls = self.attention.iter().filter(|p| p.format == format);
        let calls: Vec<f64> = calls.filter_map(|p| p.call_s.median()).collect();
        let long = |points: &[(usize, f64)]| points.last().map_or(0.0, |p| p.1);
        AttentionRates {
            decode_bytes_per_s: long(&decode),
            prefill_flop_per_s: long(&prefill),
            decode_by_tokens: decode,
            prefill_by_tokens: prefill,
            decode_by_hidden: curve(KvKind::Width, |p| p.hidden),
            decode_call_s: tidy(median(&calls).unwrap_or(0.0)),
        }
    }

    fn curves(&self) -> BTreeMap<String, GemmCurve> {
        let mut curves: BTreeMap<String, GemmCurve> = BTreeMap::new();
        for point in &self.gemm {
            if let Some(seconds) = point.seconds.median() {
                let curve = curves.entry(point.arithmetic.table_name(point.format));
                let points = &mut curve.or_insert(GemmCurve { points: Vec::new() }).points;
                points.push((point.rows, point.inputs, point.outputs, tidy(seconds)));
            }
        }
        curves
    }
}

/// What all threads read together.
fn read_bytes_per_s(bench: &mut Bench) -> Result<f64, ProbeError> {
    let seconds = bench.time(|b| {
        std::hint::black_box(memory_read_sum(&b.pool, b.isa, &b.arena));
    })?;
    Ok(bench.arena.len() as f64 / seconds)
}

fn copy_bytes_per_s(bench: &mut Bench) -> Result<f64, ProbeError> {
    let half = bench.arena.len() / 2;
    let seconds = bench.time(|b| {
        let (source, target) = b.arena.split_at_mut(half);
        copy_bytes(&b.pool, source, &mut target[..half]);
    })?;
    Ok(half as f64 / seconds)
}

fn product(bench: &mut Bench, point: &GemmPoint) -> Result<f64, ProbeError> {
    let shape = (point.inputs, point.outputs);
    product_s(bench, (point.format, point.arithmetic, point.rows), shape)
}

/// Tokens at the usual width, other widths at the same tokens.
fn kv_points(extent: &Extent) -> Vec<KvPoint> {
    let decode = extent
        .decode_tokens
        .iter()
        .map(|&t| (KvKind::Decode, t, HIDDEN));
    let width = |&h: &usize| (KvKind::Width, WIDTH_TOKENS, h);
    let prefill = extent
        .prompt_tokens
        .iter()
        .map(|&t| (KvKind::Prefill, t, HIDDEN));
    let all = decode
        .chain(extent.decode_hidden.iter().map(width))
        .chain(prefill);
    let all: Vec<_> = all.collect();
    let of_format = |format| {
        all.iter().map(move |&(kind, tokens, hidden)| KvPoint {
            format,
            kind,
            tokens,
            hidden,
            rate: Series::default(),
            call_s: Series::default(),
        })
    };
    KV_FORMATS.into_iter().flat_map(of_format).collect()
}

/// KV bytes and seconds of one new token for at most `most` sequences of the point's tokens.
fn decode(bench: &mut Bench, point: &KvPoint, most: usize) -> Result<(f64, f64), ProbeError> {
    let (format, tokens, hidden) = (point.format, point.tokens, point.hidden);
    let sequence_bytes = tokens * 2 * format.row_bytes(hidden) as usize;
    let sequences = (bench.arena.len() / 2 / sequence_bytes).clamp(1, most);
    let bytes = sequences * sequence_bytes;
    let seconds = bench.time(|b| {
        let begin = b.rotate(bytes);
        let cache = b.arena[begin..begin + bytes].chunks_exact(sequence_bytes);
        let items: Vec<AttendItem> = cache
            .enumerate()
            .map(|(place, bytes)| item(place, (1, tokens - 1), bytes))
            .collect();
        let rows = (&b.inputs, &mut b.outputs);
        run_attention((&b.pool, b.isa), (format, hidden), &items, rows);
    })?;
    Ok((bytes as f64, seconds))
}

/// FLOP per second of the attention of as many prompts as make a chunk of rows.
fn prefill(bench: &mut Bench, format: Dtype, tokens: usize) -> Result<f64, ProbeError> {
    let prompts = (bench.extent.rows() / tokens).max(1);
    let prompt_bytes = tokens * 2 * format.row_bytes(HIDDEN) as usize;
    let bytes = prompts * prompt_bytes;
    let seconds = bench.time(|b| {
        let begin = b.rotate(bytes);
        let cache = b.arena[begin..begin + bytes].chunks_exact(prompt_bytes);
        let prompt = |(place, bytes)| item(place * tokens, (tokens, 0), bytes);
        let items: Vec<AttendItem> = cache.enumerate().map(prompt).collect();
        let rows = (&b.inputs, &mut b.outputs);
        run_attention((&b.pool, b.isa), (format, HIDDEN), &items, rows);
    })?;
    let pairs = prompts * tokens * (tokens + 1) / 2;
    Ok(4.0 * (pairs * HIDDEN) as f64 / seconds)
}

fn item(first_row: usize, (q_rows, past): (usize, usize), bytes: &[u8]) -> AttendItem<'_> {
    AttendItem {
        first_row,
        q_rows,
        past,
        decode: q_rows == 1,
        kv: KvView {
            bytes,
            slots: Slots::Contiguous { first: 0 },
        },
    }
}

fn run_attention(
    (pool, isa): (&Pool, Isa),
    (format, hidden): (Dtype, usize),
    items: &[AttendItem],
    (inputs, outputs): (&AlignedBuffer, &mut AlignedBuffer),
) {
    attend(
        pool,
        isa,
        AttendArgs {
            qkv: inputs.as_slice_of(),
            ld: 3 * hidden,
            heads: hidden / HEAD_SIZE,
            head_size: HEAD_SIZE,
            format,
            items,
            out: outputs.as_mut_slice_of(),
            ldo: hidden,
        },
    );
}

/// fp16 weight bytes turned into 4 bits per second.
fn pack(bench: &mut Bench) -> Result<f64, ProbeError> {
    let (inputs, rows) = bench.extent.gemm_shapes[0];
    let source_bytes = rows * Dtype::F16.row_bytes(inputs) as usize;
    let target_bytes = panels(rows) * Dtype::Q4.panel_bytes(inputs) as usize;
    let seconds = bench.time(|b| {
        let begin = b.rotate(source_bytes);
        let source = PackSource {
            bytes: &b.arena[begin..begin + source_bytes],
            dtype: Dtype::F16,
            rows,
            inputs,
        };
        // Codes are no numbers: in the arena they would be multiplied as some, NaN among them.
        let target = &mut b.outputs[..target_bytes];
        pack_panels(&b.pool, b.isa, source, Dtype::Q4, target);
    })?;
    Ok(source_bytes as f64 / seconds)
}

/// Seconds in which the keys and values of so many rows, one after another, are put into a cache.
fn append(bench: &mut Bench, format: Dtype, count: usize) -> Result<f64, ProbeError> {
    let bytes = count * 2 * format.row_bytes(HIDDEN) as usize;
    let mut at = 0;
    bench.time(|b| {
        // A cache's records are in no cache of the processor's.
        at = if at + 2 * bytes <= b.outputs.len() {
            at + bytes
        } else {
            0
        };
        append_kv(
            &b.pool,
            b.isa,
            AppendArgs {
                qkv: b.inputs.as_slice_of(),
                ld: 3 * HIDDEN,
                first_row: 0,
                count,
                hidden: HIDDEN,
                format,
                bytes: &mut b.outputs[at..at + bytes],
                slots: Slots::Contiguous { first: 0 },
            },
        );
    })
}

/// Bytes of fp32 keys and values of so many rows.
fn kv_value_bytes(count: usize) -> f64 {
    (count * 2 * HIDDEN * 4) as f64
}

/// Bytes of logits that a token is drawn from per second, greedily, by the host's one thread.
fn sampling(bench: &mut Bench) -> Result<f64, ProbeError> {
    let draw = Draw {
        line: 0,
        position: 0,
    };
    let bytes = (4 * VOCABULARY).min(bench.arena.len());
    let seconds = bench.time(|b| {
        // Fresh from a product, logits lie in no cache that is near: they rotate.
        let begin = b.rotate_pages(bytes);
        let logits = bytemuck::cast_slice(&b.arena[begin..begin + bytes]);
        std::hint::black_box(sample(logits, &Sampling::GREEDY, draw));
    })?;
    Ok(bytes as f64 / seconds)
}

/// Bytes of activations normalised per second, read and written together. Between two such passes a layer's
/// products go through the caches: the rows come from memory.
fn rowwise(bench: &mut Bench) -> Result<f64, ProbeError> {
    let rows = bench.extent.rows();
    let bytes = rows * HIDDEN * 4;
    let mut out = 0;
    let seconds = bench.time(|b| {
        let begin = b.rotate(bytes);
        out = if out + 2 * bytes <= b.outputs.len() {
            out + bytes
        } else {
            0
        };
        let args = NormArgs {
            x: bytemuck::cast_slice(&b.arena[begin..begin + bytes]),
            rows: None,
            m: rows,
            width: HIDDEN,
            weight: None,
            bias: None,
            eps: 1e-5,
            out: bytemuck::cast_slice_mut(&mut b.outputs[out..out + bytes]),
        };
        layer_norm(&b.pool, b.isa, args);
    })?;
    Ok((2 * bytes) as f64 / seconds)
}
