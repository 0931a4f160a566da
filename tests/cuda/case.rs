//! One launch of a kernel as data, and running it under the emulation (tests/cuda/runner.cpp has the format).
//! Builds the runner when it is out of date. No knowledge of any kernel.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicUsize, Ordering};

/// How the threads of a block take turns (tests/cuda/emulator.h).
pub const ORDERS: [&str; 5] = ["0", "1", "2", "3", "4"];
/// Of these, the ones in which correct kernels run: turn by turn, and warp by warp backwards.
const CHECKED: [&str; 2] = ["0", "4"];

/// Where what build.sh makes is.
pub fn directory() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("target/cuda")
}

/// Builds with `what` appended (nothing: the libraries), once a process.
pub fn build(what: &str) {
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/cuda/build.sh");
    let mut command = Command::new(script);
    command.arg(directory());
    if !what.is_empty() {
        command.arg(what);
    }
    let done = command.output().expect("bash and g++ are installed");
    let said = String::from_utf8_lossy(&done.stderr);
    assert!(done.status.success(), "tests/cuda/build.sh failed:\n{said}");
    assert!(
        !said.contains("warning:"),
        "tests/cuda/build.sh warns:\n{said}"
    );
}

pub fn runner() -> &'static Path {
    static RUNNER: OnceLock<PathBuf> = OnceLock::new();
    RUNNER.get_or_init(|| {
        build("runner");
        directory().join("runner")
    })
}

/// An argument: a number of four bytes, or a buffer's address.
#[derive(Clone, Copy)]
enum Argument {
    Word(u32),
    Buffer(usize),
    Null,
}

/// A launch. Buffers keep the order in which they were added.
#[derive(Clone, Default)]
pub struct Case {
    name: String,
    grid: [u32; 3],
    block: u32,
    buffers: Vec<Vec<u8>>,
    pointers: Vec<[u32; 4]>,
    arguments: Vec<Argument>,
}

impl Case {
    pub fn new(name: &str, grid: (usize, usize), block: u32) -> Case {
        Case {
            name: name.to_owned(),
            grid: [grid.0 as u32, grid.1 as u32, 1],
            block,
            ..Case::default()
        }
    }

    /// A buffer that is no argument itself; returns its number.
    pub fn hold(&mut self, bytes: &[u8]) -> usize {
        self.buffers.push(bytes.to_vec());
        self.buffers.len() - 1
    }

    /// Writes the address of `target` into buffer `at.0` at byte `at.1`.
    pub fn point(&mut self, at: (usize, usize), target: usize) {
        self.pointers
            .push([at.0 as u32, at.1 as u32, target as u32, 0]);
    }

    pub fn buffer<T: bytemuck::Pod>(mut self, values: &[T]) -> Case {
        let held = self.hold(bytemuck::cast_slice(values));
        self.held(held)
    }

    pub fn held(mut self, buffer: usize) -> Case {
        self.arguments.push(Argument::Buffer(buffer));
        self
    }

    pub fn optional<T: bytemuck::Pod>(mut self, values: Option<&[T]>) -> Case {
        match values {
            Some(values) => self.buffer(values),
            None => {
                self.arguments.push(Argument::Null);
                self
            }
        }
    }

    pub fn word(mut self, value: usize) -> Case {
        self.arguments.push(Argument::Word(value as u32));
        self
    }

    pub fn words<const N: usize>(self, values: [usize; N]) -> Case {
        values.into_iter().fold(self, Case::word)
    }

    pub fn float(mut self, value: f32) -> Case {
        self.arguments.push(Argument::Word(value.to_bits()));
        self
    }

    fn write(&self, to: &mut Vec<u8>) {
        let word = |to: &mut Vec<u8>, value: u32| to.extend(value.to_le_bytes());
        word(to, self.name.len() as u32);
        to.extend(self.name.as_bytes());
        for value in self.grid.into_iter().chain([self.block, 1, 1]) {
            word(to, value);
        }
        word(to, self.buffers.len() as u32);
        for buffer in &self.buffers {
            to.extend((buffer.len() as u64).to_le_bytes());
            to.extend(buffer);
        }
        word(to, self.pointers.len() as u32);
        for value in self.pointers.iter().flatten() {
            word(to, *value);
        }
        word(to, self.arguments.len() as u32);
        for argument in &self.arguments {
            let (kind, value) = match *argument {
                Argument::Word(value) => (0, value as u64),
                Argument::Buffer(value) => (1, value as u64),
                Argument::Null => (1, u64::MAX),
            };
            word(to, kind);
            to.extend(value.to_le_bytes());
        }
    }
}

/// How the emulation runs.
#[derive(Clone, Copy)]
pub struct Emulation<'a> {
    pub order: &'a str,
    /// Which barrier of each block every thread leaves out.
    pub dropped_barrier: Option<usize>,
}

/// All buffers of all cases after the launches; the error is what the runner said.
pub fn run(cases: &[Case], emulation: Emulation) -> Result<Vec<Vec<Vec<u8>>>, String> {
    static NUMBER: AtomicUsize = AtomicUsize::new(0);
    let number = NUMBER.fetch_add(1, Ordering::Relaxed);
    let stem = directory().join(format!("case-{}-{number}", std::process::id()));
    let (asked, answered) = (stem.with_extension("in"), stem.with_extension("out"));
    let mut bytes = (cases.len() as u32).to_le_bytes().to_vec();
    cases.iter().for_each(|case| case.write(&mut bytes));
    let runner = runner();
    std::fs::write(&asked, bytes).expect("target is writable");
    let mut command = Command::new(runner);
    command.arg(&asked).arg(&answered);
    command.env("EMULATOR_ORDER", emulation.order);
    if let Some(barrier) = emulation.dropped_barrier {
        command.env("EMULATOR_DROP_BARRIER", barrier.to_string());
    }
    let done = command.output().expect("the runner was built");
    let found = std::fs::read(&answered).unwrap_or_default();
    let _ = std::fs::remove_file(&asked);
    let _ = std::fs::remove_file(&answered);
    if !done.status.success() {
        return Err(String::from_utf8_lossy(&done.stderr).into_owned());
    }
    let mut rest = found.as_slice();
    let mut take = |buffer: &Vec<u8>| {
        let (own, others) = rest.split_at(buffer.len());
        rest = others;
        own.to_vec()
    };
    Ok(cases
        .iter()
        .map(|case| case.buffers.iter().map(&mut take).collect())
        .collect())
}

/// One case in every order; the buffers of each.
pub fn in_every_order(cases: &[Case]) -> Vec<Vec<Vec<Vec<u8>>>> {
    let one = |order| {
        let emulation = Emulation {
            order,
            dropped_barrier: None,
        };
        run(cases, emulation).unwrap_or_else(|said| panic!("order {order}: {said}"))
    };
    CHECKED.into_iter().map(one).collect()
}
