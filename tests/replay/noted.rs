//! A run of the schedule as it was asked for, and which of its accesses to the same bytes are in order: by their
//! lane, by what an operation comes after, or by what the host had waited for when it submitted it. Nothing here
//! depends on how long anything takes.

use crate::running::{Collected, requests};
use crate::touched::{Space, Touch, touched};
use loadmaster::cost::figures::LaneFigures;
use loadmaster::engine::{Engine, RunFacts, RunOptions};
use loadmaster::machine::ops::Op;
use loadmaster::machine::price::Pricer;
use loadmaster::machine::virtual_time::VirtualMachine;
use loadmaster::machine::{Fence, Fences, Machine, MachineError};
use loadmaster::tier::{Lane, PerLane, Phase, Tier};
use std::cell::RefCell;
use std::collections::HashMap;
use std::ops::Range;
use std::sync::atomic::AtomicBool;

/// What happened at the machine, in the order in which the host asked for it.
pub enum Event {
    Submitted(Submitted),
    Waited(Fences),
    Looked(Touch),
}

/// An operation as it was submitted.
pub struct Submitted {
    pub lane: Lane,
    pub number: u64,
    pub phase: Phase,
    pub op: Op,
    pub after: Fences,
}

/// A clock that notes what it is asked.
struct Noting {
    machine: VirtualMachine,
    phase: Phase,
    events: RefCell<Vec<Event>>,
}

impl Machine for Noting {
    fn submit(&mut self, lane: Lane, op: Op, after: &Fences) -> Fence {
        let fence = self.machine.submit(lane, op.clone(), after);
        self.events.get_mut().push(Event::Submitted(Submitted {
            lane,
            number: fence.number,
            phase: self.phase,
            op,
            after: *after,
        }));
        fence
    }
    fn wait(&mut self, fences: &Fences) -> Result<(), MachineError> {
        self.events.get_mut().push(Event::Waited(*fences));
        self.machine.wait(fences)
    }
    fn submitted(&self) -> Fences {
        self.machine.submitted()
    }
    fn put(&mut self, _: Tier, _: u64, _: &[u8]) -> Result<(), MachineError> {
        unreachable!("the host writes before a run only")
    }
    fn values(&self, tier: Tier, offset: u64, count: usize) -> Option<&[f32]> {
        self.events.borrow_mut().push(Event::Looked(Touch {
            space: Space::Arena(tier),
            bytes: offset..offset + 4 * count as u64,
            writes: false,
        }));
        self.machine.values(tier, offset, count)
    }
    fn set_phase(&mut self, phase: Phase) {
        self.phase = phase;
        self.machine.set_phase(phase);
    }
    fn lane_figures(&self) -> PerLane<LaneFigures> {
        self.machine.lane_figures()
    }
    fn now_s(&self) -> f64 {
        self.machine.now_s()
    }
}

/// Everything that a run of these lengths (prompt, generated) asks for.
pub fn events(facts: RunFacts, pricer: Pricer, lengths: &[(usize, usize)]) -> Vec<Event> {
    let mut machine = Noting {
        machine: VirtualMachine::new(pricer),
        phase: Phase::Prefill,
        events: RefCell::default(),
    };
    let lines = requests(&facts.model, lengths);
    let engine = Engine::new(&mut machine, facts, RunOptions { ignore_eos: true });
    engine
        .run(lines, &mut Collected::default(), &AtomicBool::new(false))
        .expect("the schedule ends");
    machine.events.into_inner()
}

/// Numbers of finished operations that are certain.
type Clock = PerLane<u64>;

fn join(clock: &mut Clock, other: &Clock) {
    for lane in Lane::ALL {
        clock[lane] = clock[lane].max(other[lane]);
    }
}

/// A fence that an operation has, or the host's wait.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Wait {
    event: usize,
    lane: Lane,
}

/// An operation, or the host's look: which cells it touches.
struct Access {
    event: usize,
    /// None for the host.
    by: Option<Fence>,
    touched: Vec<(Range<usize>, bool)>,
}

impl Access {
    /// Each cell, and whether it is written.
    fn cells(&self) -> impl Iterator<Item = (usize, bool)> {
        let each = |(cells, writes): &(Range<usize>, bool)| {
            let writes = *writes;
            cells.clone().map(move |cell| (cell, writes))
        };
        self.touched.iter().flat_map(each)
    }
}

/// Who has touched a cell: the newest number of each lane, of reads since the newest write.
#[derive(Clone, Default)]
struct Cell {
    written: Clock,
    read: Clock,
}

impl Cell {
    /// An earlier access that the next one does not come after.
    fn unordered(&self, writes: bool, after: &Clock) -> Option<Fence> {
        let late = |marks: &Clock| {
            let lane = Lane::ALL.into_iter().find(|&l| after[l] < marks[l])?;
            let number = marks[lane];
            Some(Fence { lane, number })
        };
        late(&self.written).or_else(|| late(&self.read).filter(|_| writes))
    }

    fn note(&mut self, by: Fence, writes: bool) {
        if writes {
            *self = Cell::default();
        }
        let marks = if writes {
            &mut self.written
        } else {
            &mut self.read
        };
        marks[by.lane] = by.number;
    }
}

/// A run's events, and its bytes cut into cells that operations touch whole.
pub struct Noted {
    events: Vec<Event>,
    accesses: Vec<Access>,
    cells: usize,
}

impl Noted {
    pub fn new(events: Vec<Event>) -> Noted {
        let mut borders: HashMap<Space, Vec<u64>> = HashMap::new();
        let touches = |event: &Event| match event {
            Event::Submitted(s) => touched(s.lane, &s.op),
            Event::Looked(touch) => vec![touch.clone()],
            Event::Waited(_) => Vec::new(),
        };
        let touches: Vec<Vec<Touch>> = events.iter().map(touches).collect();
        for touch in touches.iter().flatten() {
            let of = borders.entry(touch.space).or_default();
            of.extend([touch.bytes.start, touch.bytes.end]);
        }
        let mut cells = 0;
        let mut first_cell = HashMap::new();
        for (space, of) in &mut borders {
            of.sort_unstable();
            of.dedup();
            first_cell.insert(*space, cells);
            cells += of.len();
        }
        let cell = |space: Space, at: u64| {
            first_cell[&space] + borders[&space].partition_point(|&border| border < at)
        };
        let range = |t: &Touch| cell(t.space, t.bytes.start)..cell(t.space, t.bytes.end);
        let by = |event: &Event| match event {
            Event::Submitted(Submitted { lane, number, .. }) => Some(Fence {
                lane: *lane,
                number: *number,
            }),
            _ => None,
        };
        let access = |(event, touches): (usize, &Vec<Touch>)| Access {
            event,
            by: by(&events[event]),
            touched: touches.iter().map(|t| (range(t), t.writes)).collect(),
        };
        let accesses = touches.iter().enumerate().map(access).collect();
        Noted {
            events,
            accesses,
            cells,
        }
    }

    /// What each event comes after; `without` one wait.
    fn clocks(&self, without: Option<Wait>) -> Vec<Clock> {
        let mut host = Clock::default();
        let mut newest: PerLane<Clock> = PerLane::default();
        let mut of_operation: PerLane<Vec<Clock>> = PerLane::default();
        let mut clocks = Vec::with_capacity(self.events.len());
        for (event, noted) in self.events.iter().enumerate() {
            let after = |fences: &Fences, done: &PerLane<Vec<Clock>>| {
                let mut clock = Clock::default();
                for lane in Lane::ALL {
                    let mark = fences.mark(lane);
                    if mark > 0 && without != Some(Wait { event, lane }) {
                        join(&mut clock, &done[lane][mark as usize - 1]);
                    }
                }
                clock
            };
            match noted {
                Event::Submitted(Submitted {
                    lane,
                    after: fences,
                    ..
                }) => {
                    let mut clock = after(fences, &of_operation);
                    join(&mut clock, &host);
                    join(&mut clock, &newest[*lane]);
                    clocks.push(clock);
                    clock[*lane] = of_operation[*lane].len() as u64 + 1;
                    newest[*lane] = clock;
                    of_operation[*lane].push(clock);
                }
                Event::Waited(fences) => {
                    join(&mut host, &after(fences, &of_operation));
                    clocks.push(host);
                }
                Event::Looked(_) => clocks.push(host),
            }
        }
        clocks
    }

    /// Two accesses that are not in order, said in words.
    pub fn race(&self, without: Option<Wait>) -> Option<String> {
        let clocks = self.clocks(without);
        let mut cells = vec![Cell::default(); self.cells];
        for access in &self.accesses {
            let clock = &clocks[access.event];
            let first = |(cell, writes): (usize, bool)| cells[cell].unordered(writes, clock);
            if let Some(first) = access.cells().find_map(first) {
                return Some(self.both(self.event_of(first), access.event));
            }
            if let Some(by) = access.by {
                let each = access.cells();
                each.for_each(|(cell, writes)| cells[cell].note(by, writes));
            }
        }
        None
    }

    fn event_of(&self, by: Fence) -> usize {
        let found = self.accesses.iter().find(|access| access.by == Some(by));
        found.expect("it was submitted").event
    }

    fn both(&self, first: usize, second: usize) -> String {
        format!("{}\n  and {}", self.said(first), self.said(second))
    }

    fn said(&self, event: usize) -> String {
        match &self.events[event] {
            Event::Submitted(s) => {
                let what: String = format!("{:?}", s.op).chars().take(160).collect();
                format!("{event} {}: {what}", s.lane.name())
            }
            _ => format!("{event} the host"),
        }
    }

    /// The event, and what it waits for.
    pub fn words(&self, wait: Wait) -> String {
        let awaited = self.said(self.awaited(wait));
        format!("{}\n  after {awaited}", self.said(wait.event))
    }

    /// The same without operands.
    pub fn kind(&self, wait: Wait) -> String {
        let name = |event: usize| match &self.events[event] {
            Event::Submitted(s) => {
                let what = format!("{:?}", s.op);
                let what = what.strip_prefix("Compute(").unwrap_or(&what);
                let end = what.find(['(', ' ', '{']).unwrap_or(what.len());
                format!("{} {}", s.lane.name(), &what[..end])
            }
            _ => "host".to_owned(),
        };
        format!("{} > {}", name(wait.event), name(self.awaited(wait)))
    }

    fn fences(&self, event: usize) -> Fences {
        match &self.events[event] {
            Event::Submitted(s) => s.after,
            Event::Waited(fences) => *fences,
            Event::Looked(_) => Fences::none(),
        }
    }

    fn awaited(&self, wait: Wait) -> usize {
        let (lane, number) = (wait.lane, self.fences(wait.event).mark(wait.lane));
        self.event_of(Fence { lane, number })
    }

    /// All waits that no other order makes superfluous.
    pub fn waits(&self) -> Vec<Wait> {
        let mut waits = Vec::new();
        for event in 0..self.events.len() {
            for lane in Lane::ALL {
                let (wait, mark) = (Wait { event, lane }, self.fences(event).mark(lane));
                if mark > 0 && self.clocks(Some(wait))[event][lane] < mark {
                    waits.push(wait);
                }
            }
        }
        waits
    }
}
