//! One pass's rows: which sequences take part, which rows of each batch are theirs, how the batches are
//! cut into chunks, and where each row's hidden state is at home. Pure bookkeeping.

use super::cache::CacheHome;
use crate::machine::ops::Table;
use crate::tier::{PerTier, Phase, Tier};
use crate::units::{PAGE_BYTES, round_up};
use std::ops::Range;

/// A line while it is being generated.
#[derive(Clone, Debug)]
pub struct Sequence {
    /// Index of its input line.
    pub line: usize,
    /// Prompt and generated tokens.
    pub tokens: Vec<u32>,
    pub prompt_tokens: usize,
    pub max_tokens: usize,
    /// Tokens whose keys and values are in the cache.
    pub cached: usize,
    pub slot: usize,
    pub cache: CacheHome,
}

impl Sequence {
    pub fn generated(&self) -> usize {
        self.tokens.len() - self.prompt_tokens
    }

    /// Rows of the next pass: the whole prompt first, then the newest token.
    pub fn next_rows(&self) -> usize {
        self.tokens.len() - self.cached
    }
}

/// Rows of one sequence in a batch's step.
#[derive(Clone, Debug)]
pub struct StepItem {
    pub first_row: usize,
    pub rows: usize,
    pub past: usize,
    pub decode: bool,
    pub cache: CacheHome,
    pub hidden: HiddenHome,
}

/// Where an item's rows rest between layers.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct HiddenHome {
    pub tier: Tier,
    /// First row in the tier's buffer, or byte offset in the spill file.
    pub at: u64,
}

/// One batch's part of a step.
#[derive(Clone, Debug)]
pub struct BatchStep {
    pub items: Vec<StepItem>,
    pub rows: usize,
    pub tables: RowTables,
    pub chunks: Vec<Range<usize>>,
    /// Head rows of earlier batches.
    pub head_first: usize,
}

/// One entry a row of a batch.
#[derive(Clone, Debug)]
pub struct RowTables {
    pub ids: Table,
    pub positions: Table,
    /// Row on the compute device, for each part of the visiting rows' buffer.
    pub hidden: Vec<Table>,
}

/// One pass over the stages.
#[derive(Clone, Debug)]
pub struct Step {
    pub batches: Vec<BatchStep>,
    /// Slots in the order of their head rows.
    pub active: Vec<usize>,
    pub phase: Phase,
    /// A layer's end comes after the next batch's beginning (schedule.rs).
    pub staggered: bool,
}

/// What building a step needs to know of the run.
#[derive(Clone, Debug)]
pub struct StepRules {
    pub gpu_batch_size: usize,
    pub batches: usize,
    pub chunk_rows: usize,
    pub compute: Tier,
    pub hidden_tiers: Vec<Tier>,
    pub hidden_row_bytes: u64,
    /// First visiting row of each part, counted from the hidden base; also of a staggered pass, in a run that
    /// has some.
    pub stage_rows: Vec<u32>,
    pub staggered_rows: Option<Vec<u32>>,
    pub step_rows: u32,
    pub position_offset: usize,
    /// False where no row is ever read (replay.rs): of tables only the lengths count then.
    pub reads_rows: bool,
}

impl Step {
    /// All rows that the sequences in `slots` have next.
    pub fn new(rules: &StepRules, slots: &[Option<&Sequence>]) -> Step {
        let mut next_home = PerTier::<u64>::default();
        let mut active = Vec::new();
        let mut batches = Vec::new();
        let mut stand_in = Table::whole([].into());
        let staggered = rules.staggers(slots);
        let parts = match (&rules.staggered_rows, staggered) {
            (Some(rows), true) => rows,
            _ => &rules.stage_rows,
        };
        for batch in 0..rules.batches {
            // A block that is not full may have fewer slots than batches.
            let first = (batch * rules.gpu_batch_size).min(slots.len());
            let last = (first + rules.gpu_batch_size).min(slots.len());
            let members = slots[first..last].iter().flatten().copied();
            let head_first = active.len();
            let sequences: Vec<&Sequence> = members.collect();
            active.extend(sequences.iter().map(|s| s.slot));
            let items = step_items(rules, &sequences, &mut next_home);
            let tables = match rules.reads_rows {
                true => row_tables(rules, &sequences, (&items, parts)),
                false => stand_ins(&mut stand_in, &items, parts.len()),
            };
            batches.push(batch_step(rules, items, (tables, head_first)));
        }
        let prompt_rows: usize = items(&batches).filter(|i| !i.decode).map(|i| i.rows).sum();
        let decode_rows = items(&batches).filter(|i| i.decode).count();
        let phase = if prompt_rows > decode_rows {
            Phase::Prefill
        } else {
            Phase::Decode
        };
        Step {
            batches,
            active,
            phase,
            staggered,
        }
    }
}

impl StepRules {
    /// Only where every sequence has one row, so that two batches find room where else one has.
    fn staggers(&self, slots: &[Option<&Sequence>]) -> bool {
        let decodes = |s: &&Sequence| is_decode(s) && s.next_rows() == 1;
        self.staggered_rows.is_some() && slots.iter().flatten().all(decodes)
    }
}

fn is_decode(sequence: &Sequence) -> bool {
    sequence.cached > 0 && sequence.generated() > 0
}

fn items(batches: &[BatchStep]) -> impl Iterator<Item = &StepItem> {
    batches.iter().flat_map(|b| &b.items)
}

fn step_items(
    rules: &StepRules,
    members: &[&Sequence],
    next_home: &mut PerTier<u64>,
) -> Vec<StepItem> {
    let mut first_row = 0;
    let item = |sequence: &&Sequence| {
        let (past, rows) = (sequence.cached, sequence.next_rows());
        let tier = rules.hidden_tiers[sequence.slot];
        first_row += rows;
        StepItem {
            first_row: first_row - rows,
            rows,
            past,
            decode: is_decode(sequence),
            cache: sequence.cache.clone(),
            hidden: HiddenHome {
                tier,
                at: take_home(rules, next_home, (tier, rows as u64)),
            },
        }
    };
    members.iter().map(item).collect()
}

fn batch_step(
    rules: &StepRules,
    items: Vec<StepItem>,
    (tables, head_first): (RowTables, usize),
) -> BatchStep {
    let rows = rows_of(&items);
    let chunks = (0..rows)
        .step_by(rules.chunk_rows.max(1))
        .map(|r| r..(r + rules.chunk_rows).min(rows))
        .collect();
    BatchStep {
        items,
        rows,
        tables,
        chunks,
        head_first,
    }
}

fn rows_of(items: &[StepItem]) -> usize {
    items.last().map_or(0, |last| last.first_row + last.rows)
}

fn row_tables(
    rules: &StepRules,
    members: &[&Sequence],
    (items, parts): (&[StepItem], &[u32]),
) -> RowTables {
    let rows = rows_of(items);
    let (mut ids, mut positions) = (Vec::with_capacity(rows), Vec::with_capacity(rows));
    for (sequence, item) in members.iter().zip(items) {
        ids.extend_from_slice(&sequence.tokens[item.past..]);
        let new = item.past..item.past + item.rows;
        positions.extend(new.map(|p| (p + rules.position_offset) as u32));
    }
    RowTables {
        ids: Table::whole(ids.into()),
        positions: Table::whole(positions.into()),
        hidden: parts
            .iter()
            .map(|&first| hidden_table(rules, items, first))
            .collect(),
    }
}

/// Tables of the right lengths, all cut from one.
fn stand_ins(stand_in: &mut Table, items: &[StepItem], parts: usize) -> RowTables {
    let rows = rows_of(items);
    if stand_in.len < rows {
        *stand_in = Table::whole(vec![0; rows].into());
    }
    let table = stand_in.part(0, rows);
    RowTables {
        ids: table.clone(),
        positions: table.clone(),
        hidden: vec![table; parts],
    }
}

/// Homes are handed out anew in every step. On disk each item starts at a page.
fn take_home(rules: &StepRules, next: &mut PerTier<u64>, (tier, rows): (Tier, u64)) -> u64 {
    let at = next[tier];
    next[tier] += match tier {
        Tier::Disk => round_up(rows * rules.hidden_row_bytes, PAGE_BYTES),
        _ => rows,
    };
    at
}

/// Row of each of the batch's rows on the compute device: at home there, or in its part of the visiting rows, items
/// one after the other, each at a row step that keeps direct reads page-aligned.
fn hidden_table(rules: &StepRules, items: &[StepItem], first: u32) -> Table {
    let mut visiting = first;
    let mut entries = Vec::with_capacity(rows_of(items));
    for item in items {
        let rows = item.rows as u32;
        let first = if item.hidden.tier == rules.compute {
            item.hidden.at as u32
        } else {
            visiting
        };
        if item.hidden.tier != rules.compute {
            visiting += rows.next_multiple_of(rules.step_rows);
        }
        entries.extend(first..first + rows);
    }
    Table::whole(entries.into())
}

/// An item's rows inside a chunk: (row of the chunk, rows, row of the item).
pub fn overlap(item: &StepItem, chunk: &Range<usize>) -> Option<(usize, usize, usize)> {
    let first = item.first_row.max(chunk.start);
    let last = (item.first_row + item.rows).min(chunk.end);
    (first < last).then(|| (first - chunk.start, last - first, first - item.first_row))
}
