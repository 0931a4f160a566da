//! Keys and values into the cache, and attention over it: the operations' items as the kernels read them,
//! cut into parts, decode and prompt rows apart.

use super::compute::{ComputeWork, LaunchError};
use super::launch::Arg;
use crate::dtype::Dtype;
use crate::machine::ops::{Attention, KvItem, KvSlots};
use bytemuck::{Pod, Zeroable};

/// Cached tokens in one part of a decode row's attention.
const PART_TOKENS: usize = 256;
/// Query rows of one tile of a prompt: of the plain kernel, and of the one for tensor cores.
const TILE_ROWS: usize = 16;
const MMA_TILE_ROWS: usize = 64;
/// Head sizes that the tensor cores' kernel is compiled for; a smaller head takes the next larger one.
const MMA_HEAD_SIZES: [usize; 4] = [32, 64, 80, 128];
const THREADS: u32 = 128;

/// kernels/README.md, KvItem.
#[derive(Clone, Copy, Debug, Pod, Zeroable)]
#[repr(C)]
struct DeviceItem {
    records: u64,
    slots: u64,
    first_row: u32,
    rows: u32,
    past: u32,
    first_part: u32,
}

/// Floats that one part of one head leaves: weighted values, maximum, sum.
pub fn part_floats(head_size: usize) -> usize {
    head_size + 2
}

impl ComputeWork {
    pub fn append(&mut self, number: u64, a: &Attention) -> Result<(), LaunchError> {
        let all: Vec<&KvItem> = a.items.iter().collect();
        self.open_tables(number, a);
        let (items, rows) = self.items(a, &all, |item| item.rows);
        self.tables.copy()?;
        let args = [
            Arg::Address(self.qkv(a)),
            Arg::U32(3 * a.hidden as u32),
            Arg::Address(items),
            Arg::U32(all.len() as u32),
            Arg::U32(a.hidden as u32),
        ];
        let name = format!("append_{}", a.format.name());
        self.launch(&name, ((rows as u32, 2), 256), &args)
    }

    pub fn attend(&mut self, number: u64, a: &Attention) -> Result<(), LaunchError> {
        let (decode, prompts): (Vec<&KvItem>, Vec<&KvItem>) = a
            .items
            .iter()
            .partition(|item| item.decode && item.rows == 1);
        self.open_tables(number, a);
        self.prompt_rows(a, &prompts)?;
        // The parts of as many rows as the scratch holds, and on.
        let part_bytes = 4 * a.heads * part_floats(a.hidden / a.heads);
        let most = (self.scratch.bytes as usize / part_bytes).max(1);
        let mut rest = &decode[..];
        while !rest.is_empty() {
            let mut parts = 0;
            let fits = |item: &&&KvItem| {
                parts += decode_parts(item);
                parts <= most
            };
            let count = rest.iter().take_while(fits).count();
            assert!(
                count > 0,
                "the parts of one row do not fit {:?}",
                self.scratch
            );
            self.decode_rows(a, &rest[..count])?;
            rest = &rest[count..];
        }
        Ok(())
    }

    fn prompt_rows(&mut self, a: &Attention, items: &[&KvItem]) -> Result<(), LaunchError> {
        if items.is_empty() {
            return Ok(());
        }
        let (name, tile_rows) = prompt_kernel(a);
        let (at, tiles) = self.items(a, items, |item| item.rows.div_ceil(tile_rows));
        self.tables.copy()?;
        let args = self.attention_args(a, (at, items.len()));
        self.launch(&name, ((tiles as u32, a.heads as u32), THREADS), &args)
    }

    fn decode_rows(&mut self, a: &Attention, items: &[&KvItem]) -> Result<(), LaunchError> {
        let (at, parts) = self.items(a, items, decode_parts);
        self.tables.copy()?;
        let head_size = a.hidden / a.heads;
        let bytes = 4 * parts * a.heads * part_floats(head_size);
        let partial = Arg::Address(self.device.at(self.scratch.offset, bytes as u64));
        let mut args = self.attention_args(a, (at, items.len())).to_vec();
        args.push(partial);
        let name = format!("attend_decode_{}", a.format.name());
        self.launch(&name, ((parts as u32, a.heads as u32), THREADS), &args)?;
        if parts == items.len() {
            return Ok(());
        }
        let args = [
            partial,
            Arg::Address(at),
            Arg::U32(items.len() as u32),
            Arg::U32(a.heads as u32),
            Arg::U32(head_size as u32),
            Arg::Address(self.f32s(a.out, rows_end(a) * a.hidden)),
            Arg::U32(a.hidden as u32),
        ];
        let grid = (items.len() as u32, a.heads as u32);
        self.launch("attend_combine", (grid, THREADS), &args)
    }

    fn attention_args(&self, a: &Attention, (items, count): (u64, usize)) -> [Arg; 8] {
        [
            Arg::Address(self.qkv(a)),
            Arg::U32(3 * a.hidden as u32),
            Arg::Address(items),
            Arg::U32(count as u32),
            Arg::U32(a.heads as u32),
            Arg::U32((a.hidden / a.heads) as u32),
            Arg::Address(self.f32s(a.out, rows_end(a) * a.hidden)),
            Arg::U32(a.hidden as u32),
        ]
    }

    fn qkv(&self, a: &Attention) -> u64 {
        self.f32s(a.qkv, rows_end(a) * 3 * a.hidden)
    }

    /// Room for the items twice (decode and prompt rows apart are no more than all) and every slot table.
    fn open_tables(&mut self, number: u64, a: &Attention) {
        let item = size_of::<DeviceItem>() as u64;
        let of_item = |i: &KvItem| match &i.kv.slots {
            KvSlots::Contiguous => [item + 16, 0],
            KvSlots::Table(slots) => [item + 16, 4 * slots.len() as u64],
        };
        self.tables.open(number, a.items.iter().flat_map(of_item));
    }

    /// Items on the device, and the parts of all of them.
    fn items(
        &mut self,
        a: &Attention,
        items: &[&KvItem],
        parts: impl Fn(&KvItem) -> usize,
    ) -> (u64, usize) {
        let record = 2 * a.format.row_bytes(a.hidden);
        let mut first_part = 0;
        let mut list = Vec::with_capacity(items.len());
        for item in items {
            let slots = match &item.kv.slots {
                KvSlots::Contiguous => 0,
                KvSlots::Table(slots) => self.tables.shared(slots, 0),
            };
            list.push(DeviceItem {
                records: self.device.at(item.kv.base, item.kv.capacity * record),
                slots,
                first_row: item.first_row as u32,
                rows: item.rows as u32,
                past: item.past as u32,
                first_part: first_part as u32,
            });
            first_part += parts(item);
        }
        (self.tables.place(bytemuck::cast_slice(&list)), first_part)
    }
}

/// Its name and the rows of its tiles. Tensor cores take fp16, so they are left out where the cache is fp32 or
/// activations must stay so.
fn prompt_kernel(a: &Attention) -> (String, usize) {
    let format = a.format.name();
    let fits = |&size: &usize| size >= a.hidden / a.heads;
    let wide = a.wide || a.format == Dtype::F32;
    match MMA_HEAD_SIZES.into_iter().find(fits).filter(|_| !wide) {
        Some(size) => (format!("attend_prefill_mma_{format}_{size}"), MMA_TILE_ROWS),
        None => (format!("attend_prefill_{format}"), TILE_ROWS),
    }
}

fn decode_parts(item: &KvItem) -> usize {
    (item.past + 1).div_ceil(PART_TOKENS)
}

/// One past the last row that the items use.
fn rows_end(a: &Attention) -> usize {
    let ends = a.items.iter().map(|i| i.first_row + i.rows);
    ends.max().unwrap_or(0)
}
