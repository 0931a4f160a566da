//! One layer over machine operations: embedding, attention, feed-forward, head (facts: OPTForCausalLM).
//! Every product is cut by where its rows live; the results do not depend on the cut.

use super::core::Core;
use super::product::Product;
use super::schedule::Task;
use super::step::{BatchStep, Step, overlap};
use crate::cost::footprint::{Buffer, HIDDEN_VALUE_BYTES};
use crate::machine::ops::{Affine, Attention, Compute, Copy2d, KvItem, Op, Table};
use crate::machine::{Fences, Machine};
use crate::model::{Activation, MatrixKind, SmallKind};
use crate::tier::{Lane, Tier};
use std::ops::Range;

impl Core<'_> {
    /// compute(i, j, k): all of the batch's rows through one stage.
    pub fn compute_task(&mut self, step: &Step, task: Task) {
        let batch = &step.batches[task.batch];
        if task.stage == 0 {
            self.begin_hidden_visit(batch, task);
        }
        self.await_hidden(task);
        if task.stage == self.facts.model.head_stage() {
            return self.head(step, task.batch);
        }
        for part in self.parts(step, task) {
            match task.stage {
                0 => self.embed(batch, &part),
                _ => {
                    self.begin_layer(batch, &part);
                    self.end_layer(&part);
                }
            }
        }
        self.visits.hidden_made(task.batch, self.made());
    }

    /// The first half of compute(i, j, k) on a layer, to the batch's attention, and the second.
    pub fn begin_task(&mut self, step: &Step, task: Task) {
        self.await_hidden(task);
        for part in self.parts(step, task) {
            self.begin_layer(&step.batches[task.batch], &part);
        }
    }

    pub fn end_task(&mut self, step: &Step, task: Task) {
        for part in self.parts(step, task) {
            self.end_layer(&part);
        }
        self.visits.hidden_made(task.batch, self.made());
    }

    fn await_hidden(&mut self, task: Task) {
        let ready = self.visits.take_hidden_ready(task.batch);
        self.join = self.join.join(&ready);
    }

    /// The batch's chunks; of a staggered pass, where two batches are under way, there is one.
    fn parts(&self, step: &Step, task: Task) -> Vec<Part> {
        let batch = &step.batches[task.batch];
        let hidden = &batch.tables.hidden[self.visits.part_of(task.batch)];
        let last_batch = self.is_last_batch(step, task.batch);
        let of_chunk = |(index, chunk): (usize, &Range<usize>)| Part {
            stage: task.stage,
            batch: task.batch,
            half: match step.staggered {
                true => self.visits.half(task.stage, task.batch),
                false => 0,
            },
            chunk: chunk.clone(),
            rows: hidden.part(chunk.start, chunk.len()),
            last: last_batch && index + 1 == batch.chunks.len(),
        };
        batch.chunks.iter().enumerate().map(of_chunk).collect()
    }

    /// True when no later batch of this pass has rows: its products are the last users of the stage's weights.
    fn is_last_batch(&self, step: &Step, batch: usize) -> bool {
        step.batches[batch + 1..].iter().all(|b| b.rows == 0)
    }

    fn embed(&mut self, batch: &BatchStep, part: &Part) {
        let ids = batch.tables.ids.part(part.chunk.start, part.chunk.len());
        let model = &self.facts.model;
        let (hidden, width) = (model.hidden, model.embed_width);
        let to = self.hidden_rows(part.rows.clone());
        if width == hidden {
            self.lookup(&ids, &to);
        } else {
            let embedded = self.buffer(Buffer::Embedded);
            let rows = self.plain_rows(embedded, ids.len, width);
            self.lookup(&ids, &rows);
            let product = self.buffer(Buffer::Product);
            self.product(&part.product(MatrixKind::ProjectIn, (embedded, product)));
            self.submit(Compute::Scatter {
                to: to.clone(),
                y: product,
            });
        }
        let model = &self.facts.model;
        let table_rows = model.positions + crate::model::POSITION_OFFSET;
        let format = model.dtype;
        let Some(table) = self.small(SmallKind::Positions, 0) else {
            return;
        };
        let positions = &batch.tables.positions;
        let indices = positions.part(part.chunk.start, part.chunk.len());
        self.submit(Compute::AddPositions {
            table,
            table_rows,
            format,
            indices,
            to,
        });
    }

    /// x += Attn(LN1(x)); x += W2·act(W1·LN2(x)), or with the norms after the sums: up to the attention.
    fn begin_layer(&mut self, batch: &BatchStep, part: &Part) {
        let normed = self.buffer(Buffer::Normed);
        let qkv = self.attended_buffer(self.compute, Buffer::Qkv, part);
        self.norm_before(part, self.attention_norm(part), normed);
        self.product(
            &part
                .product(MatrixKind::Qkv, (normed, qkv))
                .bias(SmallKind::QkvBias),
        );
        self.attention(batch, part);
    }

    /// And from there on.
    fn end_layer(&mut self, part: &Part) {
        let [normed, ffn, product] =
            [Buffer::Normed, Buffer::Ffn, Buffer::Product].map(|b| self.buffer(b));
        let attended = self.attended_buffer(self.compute, Buffer::Attended, part);
        let attention_norm = self.attention_norm(part);
        let ffn_norm = self.affine(SmallKind::FfnNormWeight, SmallKind::FfnNormBias, part.stage);
        let activation = Some(self.facts.model.activation);
        // Only now: the GPU attends, or has another batch, while the CPU attends, and what that batch needs from the
        // link does not queue behind these rows.
        if let Some((up, attended)) = self.attended[part.half].take() {
            let back = self.copy(Lane::CpuToGpu, up, &attended.into());
            self.join.add(back);
        }
        self.product(
            &part
                .product(MatrixKind::AttentionOut, (attended, product))
                .bias(SmallKind::AttentionOutBias),
        );
        self.add_back(part, attention_norm, product);
        self.norm_before(part, ffn_norm, normed);
        self.product(
            &part
                .product(MatrixKind::Fc1, (normed, ffn))
                .bias(SmallKind::Fc1Bias)
                .activation(activation),
        );
        self.product(
            &part
                .product(MatrixKind::Fc2, (ffn, product))
                .bias(SmallKind::Fc2Bias),
        );
        self.add_back(part, ffn_norm, product);
    }

    /// Queries, keys and values, or attended rows, of the half that the chunk's batch has.
    fn attended_buffer(&self, tier: Tier, buffer: Buffer, part: &Part) -> u64 {
        self.layout.buffer(tier, buffer).part(part.half, 2)
    }

    fn attention_norm(&self, part: &Part) -> Affine {
        self.affine(
            SmallKind::AttentionNormWeight,
            SmallKind::AttentionNormBias,
            part.stage,
        )
    }

    fn affine(&self, weight: SmallKind, bias: SmallKind, stage: usize) -> Affine {
        Affine {
            weight: self.small(weight, stage),
            bias: self.small(bias, stage),
        }
    }

    fn norm_before(&mut self, part: &Part, affine: Affine, out: u64) {
        let from = self.hidden_rows(part.rows.clone());
        let op = match self.facts.model.pre_norm {
            true => Compute::Norm { from, affine, out },
            false => Compute::Gather { from, out },
        };
        self.submit(op);
    }

    fn add_back(&mut self, part: &Part, affine: Affine, y: u64) {
        let to = self.hidden_rows(part.rows.clone());
        self.submit(Compute::AddRows { to: to.clone(), y });
        if !self.facts.model.pre_norm {
            self.submit(Compute::NormInPlace { rows: to, affine });
        }
    }

    /// Appends the chunk's keys and values and attends, each item where its cache is reachable.
    fn attention(&mut self, batch: &BatchStep, part: &Part) {
        let (mut here, mut beside) = (Attended::default(), Attended::default());
        for (index, item) in batch.items.iter().enumerate() {
            let Some((first_row, rows, done)) = overlap(item, &part.chunk) else {
                continue;
            };
            let at = (part.batch, index);
            let (tier, kv) = self.cache_place(item, part.stage, at);
            let by = if tier == self.compute {
                &mut here
            } else {
                &mut beside
            };
            by.items.push(KvItem {
                first_row,
                rows,
                past: item.past + done,
                decode: item.decode,
                kv,
            });
            by.visiting |= self.visits.visiting(part.stage, at);
        }
        if !beside.items.is_empty() {
            self.attend_beside(part, beside);
        }
        if !here.items.is_empty() {
            self.join = self.join.join(&self.ready_for(part, &here));
            let attention = self.attention_op(self.compute, part, here.items);
            self.submit(Compute::Append(attention.clone()));
            let done = self.submit(Compute::Attend(attention));
            if here.visiting {
                self.visits.cache_used(part.stage, part.batch, done);
            }
        }
    }

    /// When the cache is there: at once where all of it is at home.
    fn ready_for(&self, part: &Part, attended: &Attended) -> Fences {
        match attended.visiting {
            true => self.visits.cache_ready(part.stage, part.batch),
            false => Fences::none(),
        }
    }

    fn attention_op(&self, tier: Tier, part: &Part, items: Vec<KvItem>) -> Attention {
        Attention {
            qkv: self.attended_buffer(tier, Buffer::Qkv, part),
            heads: self.facts.model.heads,
            hidden: self.facts.model.hidden,
            format: self.facts.policy.kv_format(),
            items: items.into(),
            out: self.attended_buffer(tier, Buffer::Attended, part),
            wide: self.facts.policy.is_wide(),
        }
    }

    /// Attention on the CPU for a GPU: q, k, v rows down; attended rows come up when the next product asks for them.
    fn attend_beside(&mut self, part: &Part, attended: Attended) {
        let row = self.facts.model.hidden as u64 * HIDDEN_VALUE_BYTES;
        let (ready, visiting) = (self.ready_for(part, &attended), attended.visiting);
        let attention = self.attention_op(Tier::Cpu, part, attended.items);
        let rows_of = |width: u64, from: u64, to: u64| -> Vec<Copy2d> {
            let span = |i: &KvItem| (i.first_row as u64 * width, i.rows as u64 * width);
            attention
                .items
                .iter()
                .map(span)
                .map(|(at, bytes)| Copy2d::flat(from + at, to + at, bytes))
                .collect()
        };
        let here = |buffer| self.attended_buffer(self.compute, buffer, part);
        let down = rows_of(3 * row, here(Buffer::Qkv), attention.qkv);
        let up = rows_of(row, attention.out, here(Buffer::Attended));
        // The compute lane has waited for what the CPU made of the half's last batch, so that its buffers are
        // free when this is `made`.
        let arrived = self.copy(Lane::GpuToCpu, down, &self.made());
        let append = Op::Compute(Compute::Append(attention.clone()));
        self.machine
            .submit(Lane::CpuCompute, append, &ready.with(arrived));
        let attend = Op::Compute(Compute::Attend(attention));
        let attended = self
            .machine
            .submit(Lane::CpuCompute, attend, &Fences::none());
        if visiting {
            self.visits.cache_used(part.stage, part.batch, attended);
        }
        self.attended[part.half] = Some((up, attended));
    }

    /// Last rows normalised; after the last batch the logits of all sequences in one product.
    fn head(&mut self, step: &Step, batch_index: usize) {
        let batch = &step.batches[batch_index];
        let visiting = self.visits.part_of(batch_index);
        let row = self.facts.model.hidden as u64 * HIDDEN_VALUE_BYTES;
        let heads = self.buffer(Buffer::HeadRows);
        if !batch.items.is_empty() {
            let rows = batch.tables.hidden[visiting].as_slice();
            let last_row = |i: &super::step::StepItem| rows[i.first_row + i.rows - 1];
            let entries = batch.items.iter().map(last_row).collect();
            let from = self.hidden_rows(Table::whole(entries));
            let out = heads + batch.head_first as u64 * row;
            let stage = self.facts.model.head_stage();
            let affine = self.affine(SmallKind::FinalNormWeight, SmallKind::FinalNormBias, stage);
            self.submit(match self.facts.model.has_final_norm() {
                true => Compute::Norm { from, affine, out },
                false => Compute::Gather { from, out },
            });
        }
        self.visits.end_hidden_visit(batch_index, self.last);
        if batch_index + 1 == step.batches.len() {
            self.logits(step.active.len(), heads);
        }
    }

    fn logits(&mut self, m: usize, heads: u64) {
        let stage = self.facts.model.head_stage();
        let all = Part {
            stage,
            batch: 0,
            half: 0,
            chunk: 0..m,
            rows: Table::whole(self.identity.clone()).part(0, 0),
            last: true,
        };
        let mut x = heads;
        if self.matrix(MatrixKind::ProjectOut, stage).is_some() {
            let projected = self.buffer(Buffer::HeadProjected);
            self.product(&all.product(MatrixKind::ProjectOut, (x, projected)));
            x = projected;
        }
        let logits = self.buffer(Buffer::Logits);
        self.product(&all.product(MatrixKind::Head, (x, logits)));
        if self.compute == Tier::Gpu {
            let bytes = (m * self.facts.model.vocab) as u64 * HIDDEN_VALUE_BYTES;
            let to = self.layout.buffer(Tier::Cpu, Buffer::Logits).offset;
            let down = vec![Copy2d::flat(logits, to, bytes)];
            let down = self.copy(Lane::GpuToCpu, down, &self.made());
            self.join.add(down);
        }
    }
}

/// What one lane attends to of a chunk.
#[derive(Default)]
struct Attended {
    items: Vec<KvItem>,
    /// The cache of some is not at home where they are attended.
    visiting: bool,
}

/// A chunk of one batch on its way through one stage.
pub struct Part {
    pub stage: usize,
    pub batch: usize,
    /// Of what is attended: two batches of a staggered pass are under way.
    pub half: usize,
    pub chunk: Range<usize>,
    pub rows: Table,
    /// Nothing after this chunk uses the stage's weights in this pass.
    pub last: bool,
}

impl Part {
    fn product(&self, kind: MatrixKind, (x, out): (u64, u64)) -> Product {
        let (stage, m, last_use) = (self.stage, self.chunk.len(), self.last);
        Product {
            kind,
            stage,
            x,
            out,
            m,
            bias: None,
            activation: None::<Activation>,
            last_use,
        }
    }
}
