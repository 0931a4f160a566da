//! Which bytes an operation reads and writes, from its operands alone: of either arena, or of a file.

use loadmaster::dtype::panels;
use loadmaster::machine::ops::{
    Attention, Compute, Copy2d, FileSpan, Gemm, HiddenRows, KvItem, KvSlots, Op, tier_of,
};
use loadmaster::tier::{Lane, Tier};
use std::ops::Range;

/// What offsets are counted in.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Space {
    Arena(Tier),
    File(usize),
}

/// Bytes that are read, or written.
#[derive(Clone, Debug)]
pub struct Touch {
    pub space: Space,
    pub bytes: Range<u64>,
    pub writes: bool,
}

const F32: u64 = 4;

/// In the order of the operands; neighbours that belong together are one.
pub fn touched(lane: Lane, op: &Op) -> Vec<Touch> {
    let mut all = Touches {
        arena: Space::Arena(tier_of(lane)),
        list: Vec::new(),
    };
    match op {
        Op::Read(spans) => spans.iter().for_each(|s| all.file(s, true)),
        Op::Write(spans) => spans.iter().for_each(|s| all.file(s, false)),
        Op::Load(_) => unreachable!("weights are brought home before a run"),
        Op::Copy { pieces, .. } => pieces.iter().for_each(|p| all.copy(lane, p)),
        Op::Compute(compute) => all.compute(compute),
    }
    all.list
}

struct Touches {
    arena: Space,
    list: Vec<Touch>,
}

impl Touches {
    fn add(&mut self, space: Space, (from, bytes): (u64, u64), writes: bool) {
        match self.list.last_mut() {
            Some(last) if (last.space, last.bytes.end, last.writes) == (space, from, writes) => {
                last.bytes.end += bytes;
            }
            _ => self.list.push(Touch {
                space,
                bytes: from..from + bytes,
                writes,
            }),
        }
    }

    fn read(&mut self, from: u64, bytes: u64) {
        self.add(self.arena, (from, bytes), false);
    }

    fn write(&mut self, from: u64, bytes: u64) {
        self.add(self.arena, (from, bytes), true);
    }

    fn file(&mut self, span: &FileSpan, reads: bool) {
        let (file, memory) = (Space::File(span.file.0), Space::Arena(Tier::Cpu));
        self.add(file, (span.offset, span.bytes), !reads);
        self.add(memory, (span.memory, span.bytes), reads);
    }

    fn copy(&mut self, lane: Lane, piece: &Copy2d) {
        let (from, to) = match lane {
            Lane::CpuToGpu => (Tier::Cpu, Tier::Gpu),
            _ => (Tier::Gpu, Tier::Cpu),
        };
        for row in 0..piece.rows {
            let source = piece.from + row * piece.from_stride;
            self.add(Space::Arena(from), (source, piece.row_bytes), false);
            let target = piece.to + row * piece.to_stride;
            self.add(Space::Arena(to), (target, piece.row_bytes), true);
        }
    }

    fn compute(&mut self, compute: &Compute) {
        match compute {
            Compute::Gemm(g) => self.product(g),
            Compute::Embed {
                table,
                panels,
                format,
                to,
                ..
            } => {
                self.read(*table, *panels as u64 * format.panel_bytes(to.width));
                self.rows(to, true);
            }
            Compute::AddPositions {
                table,
                table_rows,
                format,
                to,
                ..
            } => {
                self.read(*table, format.row_bytes(table_rows * to.width));
                self.rows(to, true);
            }
            Compute::Norm { from, out, .. } | Compute::Gather { from, out } => {
                self.rows(from, false);
                self.write(*out, contiguous(from));
            }
            Compute::NormInPlace { rows, .. } => self.rows(rows, true),
            Compute::Scatter { to, y } | Compute::AddRows { to, y } => {
                self.read(*y, contiguous(to));
                self.rows(to, true);
            }
            Compute::Append(a) => a.items.iter().for_each(|item| self.append(a, item)),
            Compute::Attend(a) => a.items.iter().for_each(|item| self.attend(a, item)),
            Compute::Widen(_) => unreachable!("a part of products, never by itself in a run"),
        }
    }

    fn product(&mut self, g: &Gemm) {
        for row in 0..g.m as u64 {
            let x = g.x + row * g.x_stride as u64 * F32;
            self.read(x, g.inputs as u64 * F32);
        }
        self.read(
            g.weights,
            panels(g.rows) as u64 * g.format.panel_bytes(g.inputs),
        );
        if let Some(bias) = g.bias {
            self.read(bias, g.rows as u64 * F32);
        }
        for row in 0..g.m as u64 {
            let out = g.out + row * g.out_stride as u64 * F32;
            self.write(out, g.rows as u64 * F32);
        }
    }

    fn rows(&mut self, rows: &HiddenRows, writes: bool) {
        let bytes = rows.width as u64 * F32;
        for &row in rows.rows.as_slice() {
            let at = rows.base + u64::from(row) * bytes;
            self.add(self.arena, (at, bytes), writes);
        }
    }

    fn append(&mut self, a: &Attention, item: &KvItem) {
        let hidden = a.hidden as u64 * F32;
        for row in item.first_row as u64..(item.first_row + item.rows) as u64 {
            self.read(a.qkv + row * 3 * hidden + hidden, 2 * hidden);
        }
        self.records(a, item, (item.past..item.past + item.rows, true));
    }

    fn attend(&mut self, a: &Attention, item: &KvItem) {
        let hidden = a.hidden as u64 * F32;
        let rows = item.first_row as u64..(item.first_row + item.rows) as u64;
        for row in rows.clone() {
            self.read(a.qkv + row * 3 * hidden, hidden);
        }
        self.records(a, item, (0..item.past + item.rows, false));
        self.write(
            a.out + rows.start * hidden,
            (rows.end - rows.start) * hidden,
        );
    }

    fn records(&mut self, a: &Attention, item: &KvItem, (tokens, writes): (Range<usize>, bool)) {
        let bytes = 2 * a.format.row_bytes(a.hidden);
        for token in tokens {
            let slot = match &item.kv.slots {
                KvSlots::Contiguous => token as u64,
                KvSlots::Table(slots) => u64::from(slots[token]),
            };
            assert!(slot < item.kv.capacity, "a record outside its place");
            self.add(self.arena, (item.kv.base + slot * bytes, bytes), writes);
        }
    }
}

fn contiguous(rows: &HiddenRows) -> u64 {
    rows.rows.len as u64 * rows.width as u64 * F32
}
