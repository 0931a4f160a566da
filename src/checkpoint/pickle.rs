//! The few pickle opcodes that a state dict of tensors needs, run on plain data: nothing is
//! imported, nothing is called, every size is bounded, and whatever else comes is refused by name.

use super::extent::Element;
use crate::dtype::Dtype;
use std::collections::HashMap;

/// Opcodes run at most: a shard of opt-175b takes about 50 000.
const MOST_STEPS: usize = 1 << 21;
/// Dimensions of one tensor at most.
const MOST_DIMENSIONS: usize = 8;

/// A tensor as the pickle describes it: a view into a storage of the same archive.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct View {
    /// Name of the storage's entry in the archive.
    pub key: String,
    pub storage_bytes: u64,
    pub element: Element,
    /// In elements, as the strides.
    pub offset: u64,
    pub shape: Vec<u64>,
    pub strides: Vec<u64>,
}

/// Why a pickle is no state dict.
#[derive(Debug, PartialEq)]
pub(super) enum Fault {
    /// Cut off or inconsistent.
    Damaged(String),
    /// Asks for something that no plain checkpoint needs.
    Refused(String),
}

fn damaged<T>(why: &str) -> Result<T, Fault> {
    Err(Fault::Damaged(why.to_owned()))
}

fn refused<T>(why: impl Into<String>) -> Result<T, Fault> {
    Err(Fault::Refused(why.into()))
}

/// The callables and types that a state dict may name. They are marks here, never code.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Global {
    OrderedDict,
    RebuildTensor,
    RebuildTypedTensor,
    RebuildParameter,
    Size,
    UntypedStorage,
    /// A storage class or a dtype: both stand for an element type.
    Type(Element),
}

/// What the machine's stack holds: small values, and indices into the machine's tables. Tables
/// instead of pointers keep dropping flat, however deep a hostile pickle nests.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Value {
    /// None, floats and other things that nothing depends on.
    Opaque,
    Int(i64),
    Text(usize),
    Tuple(usize),
    List,
    Dict(usize),
    Global(Global),
    Storage(usize),
    Tensor(usize),
}

#[derive(Clone)]
struct Storage {
    key: usize,
    element: Option<Element>,
    bytes: u64,
}

struct Machine<'a> {
    data: &'a [u8],
    stack: Vec<Value>,
    marks: Vec<usize>,
    memo: HashMap<u32, Value>,
    texts: Vec<&'a str>,
    tuples: Vec<Vec<Value>>,
    dicts: Vec<Vec<(Value, Value)>>,
    storages: Vec<Storage>,
    tensors: Vec<View>,
}

/// The named tensors of a state dict.
pub(super) fn state_dict(data: &[u8]) -> Result<Vec<(String, View)>, Fault> {
    let mut machine = Machine {
        data,
        stack: Vec::new(),
        marks: Vec::new(),
        memo: HashMap::new(),
        texts: Vec::new(),
        tuples: Vec::new(),
        dicts: Vec::new(),
        storages: Vec::new(),
        tensors: Vec::new(),
    };
    for _ in 0..MOST_STEPS {
        if let Some(top) = machine.step()? {
            return machine.named_tensors(top);
        }
    }
    refused(format!("its pickle takes more than {MOST_STEPS} steps"))
}

impl<'a> Machine<'a> {
    fn take(&mut self, count: usize) -> Result<&'a [u8], Fault> {
        match self.data.split_at_checked(count) {
            Some((front, rest)) => {
                self.data = rest;
                Ok(front)
            }
            None => damaged("its pickle is cut off"),
        }
    }

    fn number(&mut self, bytes: usize) -> Result<u64, Fault> {
        let bytes = self.take(bytes)?;
        Ok(bytes.iter().rev().fold(0, |n, b| n << 8 | u64::from(*b)))
    }

    fn line(&mut self) -> Result<&'a str, Fault> {
        let end = self.data.iter().take(256).position(|b| *b == b'\n');
        let Some(end) = end else {
            return damaged("a name in its pickle does not end");
        };
        let line = self.take(end + 1)?;
        std::str::from_utf8(&line[..end]).or_else(|_| damaged("a name in its pickle is not UTF-8"))
    }

    fn pop(&mut self) -> Result<Value, Fault> {
        // What lies under a mark belongs to the collection that is being built.
        let floor = self.marks.last().copied().unwrap_or(0);
        if self.stack.len() <= floor {
            return damaged("its pickle takes more than it put");
        }
        self.stack
            .pop()
            .map_or_else(|| damaged("its pickle's stack is empty"), Ok)
    }

    fn top(&self) -> Result<Value, Fault> {
        self.stack
            .last()
            .copied()
            .map_or_else(|| damaged("its pickle's stack is empty"), Ok)
    }

    fn pop_to_mark(&mut self) -> Result<Vec<Value>, Fault> {
        match self.marks.pop() {
            Some(mark) if mark <= self.stack.len() => Ok(self.stack.split_off(mark)),
            _ => damaged("its pickle closes what it did not open"),
        }
    }

    fn push(&mut self, value: Value) {
        self.stack.push(value);
    }

    fn push_tuple(&mut self, items: Vec<Value>) {
        self.push(Value::Tuple(self.tuples.len()));
        self.tuples.push(items);
    }

    fn push_text(&mut self, length: usize) -> Result<(), Fault> {
        let bytes = self.take(length)?;
        let Ok(text) = std::str::from_utf8(bytes) else {
            return damaged("a string in its pickle is not UTF-8");
        };
        self.push(Value::Text(self.texts.len()));
        self.texts.push(text);
        Ok(())
    }

    /// One opcode; the finished value at the end.
    fn step(&mut self) -> Result<Option<Value>, Fault> {
        let code = self.take(1)?[0];
        match code {
            b'.' => return self.pop().map(Some),
            // Protocol and frame say nothing that the opcodes do not.
            0x80 => drop(self.take(1)?),
            0x95 => drop(self.take(8)?),
            b'(' => self.marks.push(self.stack.len()),
            b'N' | 0x88 | 0x89 => self.push(Value::Opaque),
            b'G' => {
                self.take(8)?;
                self.push(Value::Opaque);
            }
            b'J' | b'K' | b'M' | 0x8A => self.integer(code)?,
            b'X' => {
                let length = self.number(4)? as usize;
                self.push_text(length)?;
            }
            0x8C => {
                let length = self.number(1)? as usize;
                self.push_text(length)?;
            }
            b'c' => {
                let (module, name) = (self.line()?, self.line()?);
                self.push(Value::Global(global(module, name)?));
            }
            0x93 => self.stack_global()?,
            b'}' | b']' | b')' | b't' | 0x85 | 0x86 | 0x87 => self.collect(code)?,
            b'q' | b'r' | 0x94 => self.remember(code)?,
            b'h' | b'j' => self.recall(code)?,
            b's' | b'u' | b'a' | b'e' => self.insert(code)?,
            b'b' => self.build()?,
            b'R' => self.reduce()?,
            b'Q' => self.persistent()?,
            other => return refused(format!("pickle opcode 0x{other:02x}")),
        }
        Ok(None)
    }

    fn integer(&mut self, code: u8) -> Result<(), Fault> {
        let value = match code {
            b'J' => self.number(4)? as u32 as i32 as i64,
            b'K' => self.number(1)? as i64,
            b'M' => self.number(2)? as i64,
            _ => {
                let length = self.number(1)? as u32;
                if length > 8 {
                    return refused("an integer of more than 64 bits");
                }
                let unused_bits = 64 - 8 * length;
                let raw = self.number(length as usize)?;
                if length == 0 {
                    0
                } else {
                    ((raw << unused_bits) as i64) >> unused_bits
                }
            }
        };
        self.push(Value::Int(value));
        Ok(())
    }

    fn stack_global(&mut self) -> Result<(), Fault> {
        let (name, module) = (self.pop()?, self.pop()?);
        let (Value::Text(name), Value::Text(module)) = (name, module) else {
            return damaged("a name in its pickle is no string");
        };
        let found = global(self.texts[module], self.texts[name])?;
        self.push(Value::Global(found));
        Ok(())
    }

    fn collect(&mut self, code: u8) -> Result<(), Fault> {
        let fixed = match code {
            b'}' => {
                self.push(Value::Dict(self.dicts.len()));
                self.dicts.push(Vec::new());
                return Ok(());
            }
            b']' => {
                self.push(Value::List);
                return Ok(());
            }
            b't' => {
                let items = self.pop_to_mark()?;
                self.push_tuple(items);
                return Ok(());
            }
            b')' => 0,
            code => usize::from(code - 0x84),
        };
        let mut items = (0..fixed)
            .map(|_| self.pop())
            .collect::<Result<Vec<_>, _>>()?;
        items.reverse();
        self.push_tuple(items);
        Ok(())
    }

    fn remember(&mut self, code: u8) -> Result<(), Fault> {
        let place = match code {
            b'q' => self.number(1)? as u32,
            b'r' => self.number(4)? as u32,
            _ => self.memo.len() as u32,
        };
        let top = self.top()?;
        self.memo.insert(place, top);
        Ok(())
    }

    fn recall(&mut self, code: u8) -> Result<(), Fault> {
        let place = self.number(if code == b'h' { 1 } else { 4 })? as u32;
        match self.memo.get(&place) {
            Some(value) => {
                self.stack.push(*value);
                Ok(())
            }
            None => damaged("its pickle recalls what it did not keep"),
        }
    }

    /// Items into a dict or a list. What lists hold matters to no tensor, so it is dropped.
    fn insert(&mut self, code: u8) -> Result<(), Fault> {
        let items = match code {
            b'u' | b'e' => self.pop_to_mark()?,
            b's' => {
                let (value, key) = (self.pop()?, self.pop()?);
                vec![key, value]
            }
            _ => vec![self.pop()?],
        };
        match (code, self.top()?) {
            (b's' | b'u', Value::Dict(dict)) if items.len() % 2 == 0 => {
                let pairs = items.chunks_exact(2).map(|pair| (pair[0], pair[1]));
                self.dicts[dict].extend(pairs);
                Ok(())
            }
            (b'a' | b'e', Value::List) => Ok(()),
            _ => damaged("its pickle puts items into something that holds none"),
        }
    }

    /// State of an object: an OrderedDict carries `_metadata`, which says nothing about tensors.
    fn build(&mut self) -> Result<(), Fault> {
        self.pop()?;
        match self.top()? {
            Value::Dict(_) => Ok(()),
            _ => refused("state for something that is no OrderedDict"),
        }
    }

    fn reduce(&mut self) -> Result<(), Fault> {
        let (arguments, callee) = (self.pop()?, self.pop()?);
        let (Value::Tuple(arguments), Value::Global(callee)) = (arguments, callee) else {
            return refused("a call of something that is no known function");
        };
        let arguments = few(&self.tuples[arguments])?;
        let made = match (callee, &arguments[..]) {
            (Global::OrderedDict, []) => {
                self.dicts.push(Vec::new());
                Value::Dict(self.dicts.len() - 1)
            }
            (Global::Size, [sizes @ Value::Tuple(_)]) => *sizes,
            (Global::RebuildParameter, [tensor @ Value::Tensor(_), ..]) => *tensor,
            (Global::RebuildTensor, [storage, offset, shape, strides, ..]) => {
                self.view([*storage, *offset, *shape, *strides], None)?
            }
            (Global::RebuildTypedTensor, [storage, offset, shape, strides, _, _, dtype, ..]) => {
                let Value::Global(Global::Type(element)) = dtype else {
                    return damaged("a tensor's dtype is none");
                };
                self.view([*storage, *offset, *shape, *strides], Some(*element))?
            }
            (callee, _) => return refused(format!("a call of {callee:?} with odd arguments")),
        };
        self.push(made);
        Ok(())
    }

    fn view(&mut self, parts: [Value; 4], element: Option<Element>) -> Result<Value, Fault> {
        let [Value::Storage(storage), Value::Int(offset), shape, strides] = parts else {
            return damaged("a tensor's parts are of the wrong kind");
        };
        let storage = self.storages[storage].clone();
        let Some(element) = element.or(storage.element) else {
            return damaged("a tensor has no element type");
        };
        let view = View {
            key: self.texts[storage.key].to_owned(),
            storage_bytes: storage.bytes,
            element,
            offset: natural(offset)?,
            shape: self.naturals(shape)?,
            strides: self.naturals(strides)?,
        };
        self.tensors.push(view);
        Ok(Value::Tensor(self.tensors.len() - 1))
    }

    fn naturals(&self, value: Value) -> Result<Vec<u64>, Fault> {
        let Value::Tuple(items) = value else {
            return damaged("a tensor's shape is no tuple");
        };
        let one = |item: &Value| match item {
            Value::Int(n) => natural(*n),
            _ => damaged("a tensor's shape holds no numbers"),
        };
        let items = &self.tuples[items];
        if items.len() > MOST_DIMENSIONS {
            return refused(format!("a tensor with {} dimensions", items.len()));
        }
        items.iter().map(one).collect()
    }

    /// A storage: ("storage", class, key, device, elements).
    fn persistent(&mut self) -> Result<(), Fault> {
        let Value::Tuple(parts) = self.pop()? else {
            return refused("a reference that is no storage");
        };
        let &[
            Value::Text(word),
            Value::Global(class),
            Value::Text(key),
            _,
            Value::Int(count),
        ] = &self.tuples[parts][..]
        else {
            return refused("a reference that is no storage");
        };
        if self.texts[word] != "storage" || self.texts[key].len() > 64 {
            return refused("a reference that is no storage");
        }
        let element = match class {
            Global::Type(element) => Some(element),
            Global::UntypedStorage => None,
            _ => return refused("a storage of unknown class"),
        };
        let size = element.map_or(1, Element::bytes);
        let Some(bytes) = natural(count)?.checked_mul(size) else {
            return damaged("a storage's size overflows");
        };
        self.push(Value::Storage(self.storages.len()));
        self.storages.push(Storage {
            key,
            element,
            bytes,
        });
        Ok(())
    }

    fn named_tensors(self, top: Value) -> Result<Vec<(String, View)>, Fault> {
        let Value::Dict(dict) = top else {
            return refused("its pickle is no state dict");
        };
        let mut list = Vec::new();
        for pair in &self.dicts[dict] {
            if let (Value::Text(name), Value::Tensor(tensor)) = *pair {
                list.push((self.texts[name].to_owned(), self.tensors[tensor].clone()));
            }
        }
        match list.is_empty() {
            true => refused("its state dict holds no tensors at the top"),
            false => Ok(list),
        }
    }
}

/// Copies a call's arguments; no known function takes many, so a hostile call costs nothing.
fn few(arguments: &[Value]) -> Result<Vec<Value>, Fault> {
    match arguments.len() {
        0..=16 => Ok(arguments.to_vec()),
        count => refused(format!("a call with {count} arguments")),
    }
}

fn natural(value: i64) -> Result<u64, Fault> {
    u64::try_from(value).or_else(|_| damaged("a negative size or stride"))
}

/// The whitelist.
fn global(module: &str, name: &str) -> Result<Global, Fault> {
    match (module, name) {
        ("collections", "OrderedDict") => Ok(Global::OrderedDict),
        ("torch._utils", "_rebuild_tensor_v2") => Ok(Global::RebuildTensor),
        ("torch._utils", "_rebuild_tensor_v3") => Ok(Global::RebuildTypedTensor),
        ("torch._utils", "_rebuild_parameter") => Ok(Global::RebuildParameter),
        ("torch", "Size") => Ok(Global::Size),
        ("torch" | "torch.storage", "UntypedStorage" | "_UntypedStorage") => {
            Ok(Global::UntypedStorage)
        }
        ("torch" | "torch.cuda" | "torch.storage", name) => match element(name) {
            Some(element) => Ok(Global::Type(element)),
            None => refused(format!("it names {module}.{name}")),
        },
        _ => refused(format!("it names {module}.{name}")),
    }
}

/// Storage classes and dtypes.
fn element(name: &str) -> Option<Element> {
    let other = |name, bytes| Some(Element::Other { name, bytes });
    match name {
        "FloatStorage" | "float32" => Some(Element::Float(Dtype::F32)),
        "HalfStorage" | "float16" => Some(Element::Float(Dtype::F16)),
        "BFloat16Storage" | "bfloat16" => Some(Element::Float(Dtype::Bf16)),
        "DoubleStorage" | "float64" => other("float64", 8),
        "LongStorage" | "int64" => other("64-bit integers", 8),
        "IntStorage" | "int32" => other("32-bit integers", 4),
        "ShortStorage" | "int16" => other("16-bit integers", 2),
        "CharStorage" | "int8" | "ByteStorage" | "uint8" => other("8-bit integers", 1),
        "BoolStorage" | "bool" => other("booleans", 1),
        _ => None,
    }
}

#[cfg(test)]
#[path = "pickle_tests.rs"]
mod tests;
