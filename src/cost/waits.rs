//! What the operations of one step wait for, as a graph, and the cycle in it that takes longest. The
//! schedule repeats itself step by step (a step is one batch's layer), so that no step can take less
//! than any cycle of waits that leads from an operation to the same one some steps later: its seconds
//! ÷ its steps. Which waits there are is engine/schedule.rs's and engine/visits.rs's doing.

use crate::tier::Lane;

/// How a layer's batches follow each other.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Order {
    /// There is one: its hidden state comes and goes in its own step.
    Alone,
    /// A step's visitors come while the batch before is computed, and hidden states leave while the next one is.
    InTurn,
    /// The same, with a batch's end in the next one's step, after that one's attention has begun.
    Staggered,
}

/// Operations of one step. Of a staggered one attended rows on their way up and the end are the batch before's.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Node {
    ReadWeights,
    ShipWeights,
    ReadCache,
    ShipCache,
    ReadHidden,
    ShipHidden,
    /// On the compute device: norm and first product; attention; everything after.
    Begin,
    Attend,
    /// Where a batch is cut into chunks: what comes between the first one's attention and the last one's end.
    Middle,
    End,
    /// The CPU's part of the first product beside a GPU: rows down, product, results up.
    BeginDown,
    BeginBeside,
    BeginUp,
    /// Its attention.
    AttendDown,
    AttendBeside,
    AttendUp,
    /// Its part of the other products.
    EndDown,
    EndBeside,
    EndUp,
    ReturnHidden,
    WriteHidden,
    ReturnCache,
    WriteCache,
}

pub const NODES: usize = Node::WriteCache as usize + 1;

impl Node {
    /// Where it runs; what lies in the middle of a batch is taken for the compute device's.
    fn lane(self) -> Lane {
        match self {
            ReadWeights | ReadCache | ReadHidden => Lane::DiskToCpu,
            WriteHidden | WriteCache => Lane::CpuToDisk,
            ShipWeights | ShipCache | ShipHidden | BeginUp | AttendUp | EndUp => Lane::CpuToGpu,
            ReturnHidden | ReturnCache | BeginDown | AttendDown | EndDown => Lane::GpuToCpu,
            BeginBeside | AttendBeside | EndBeside => Lane::CpuCompute,
            Begin | Attend | Middle | End => Lane::GpuCompute,
        }
    }
}

/// Seconds of every operation of one step; None where there is no such operation.
pub type Durations = [Option<f64>; NODES];

/// `to` begins when `from` of so many steps before is done.
#[derive(Clone, Copy)]
struct Wait {
    from: Node,
    to: Node,
    steps: f64,
    /// Until a lane that has waited for another begins.
    wake_s: f64,
}

/// The waits of a step.
pub struct Waits {
    durations: Durations,
    /// Until the compute lane wakes up, and any other.
    handovers_s: [f64; 2],
    waits: Vec<Wait>,
}

/// The slowest cycle: its operations, and the steps that it spans.
#[derive(Debug, PartialEq)]
pub struct Cycle {
    pub nodes: Vec<Node>,
    pub steps: f64,
    /// What its lanes take to begin, one after another.
    pub wakes_s: f64,
}

use Node::*;

impl Waits {
    pub fn new(durations: Durations, order: Order, handovers_s: [f64; 2]) -> Self {
        let mut all = Waits {
            durations,
            handovers_s,
            waits: Vec::new(),
        };
        all.lanes(order);
        all.computation(order);
        all.cache();
        all.hidden(order);
        all
    }

    fn there(&self, node: Node) -> bool {
        self.durations[node as usize].is_some()
    }

    fn wait(&mut self, from: &[Node], to: &[Node], steps: f64) {
        for &from in from {
            for &to in to {
                if self.there(from) && self.there(to) {
                    let other = from.lane() != to.lane();
                    let computes = matches!(to.lane(), Lane::CpuCompute | Lane::GpuCompute);
                    let wake_s = match other {
                        true => self.handovers_s[usize::from(!computes)],
                        false => 0.0,
                    };
                    self.waits.push(Wait {
                        from,
                        to,
                        steps,
                        wake_s,
                    });
                }
            }
        }
    }

    /// Each lane runs what it is given in order, a step's operations after those of the step before.
    fn lanes(&mut self, order: Order) {
        let down: &[Node] = match order {
            Order::Alone => &[BeginDown, AttendDown, EndDown, ReturnHidden, ReturnCache],
            Order::InTurn => &[ReturnHidden, BeginDown, AttendDown, EndDown, ReturnCache],
            Order::Staggered => &[ReturnHidden, BeginDown, AttendDown, ReturnCache, EndDown],
        };
        for order in [
            &[ReadWeights, ReadCache, ReadHidden][..],
            &[ShipWeights, ShipCache, ShipHidden, BeginUp, AttendUp, EndUp],
            &[Begin, Attend, Middle, End],
            &[BeginBeside, AttendBeside, EndBeside],
            down,
            &[WriteHidden, WriteCache],
        ] {
            let there: Vec<Node> = order.iter().copied().filter(|&n| self.there(n)).collect();
            for pair in there.windows(2) {
                self.wait(&pair[..1], &pair[1..], 0.0);
            }
            if let (Some(&first), Some(&last)) = (there.first(), there.last()) {
                self.wait(&[last], &[first], 1.0);
            }
        }
    }

    /// Products and attention in their order, each on both computers at once.
    fn computation(&mut self, order: Order) {
        let (ahead, later) = match order {
            Order::Alone => (0.0, 0.0),
            Order::InTurn => (1.0, 0.0),
            Order::Staggered => (1.0, 1.0),
        };
        let hidden = self.last(&[ReadHidden, ShipHidden]);
        self.wait(&hidden, &[Begin, BeginDown], ahead);
        self.wait(&[End, EndUp], &[Begin, BeginDown], 1.0);
        for [down, beside, up] in [
            [BeginDown, BeginBeside, BeginUp],
            [AttendDown, AttendBeside, AttendUp],
            [EndDown, EndBeside, EndUp],
        ] {
            let up_later = if beside == AttendBeside { later } else { 0.0 };
            self.wait(&[down], &[beside], 0.0);
            self.wait(&[beside], &[up], up_later);
        }
        self.wait(&[Begin, BeginUp], &[Attend, AttendDown], 0.0);
        self.wait(&[Attend, AttendUp], &[Middle], 0.0);
        self.wait(
            &[Begin, BeginUp, Attend, AttendUp, Middle],
            &[End, EndDown],
            0.0,
        );
    }

    /// A visit's half of the staging buffer is free again when the visit two steps before is stored.
    fn cache(&mut self) {
        let begun = [Attend, AttendBeside];
        let middle = self.first(&[Middle]);
        let attended = if middle.is_empty() {
            &begun[..]
        } else {
            &middle
        };
        let brought = self.last(&[ReadCache, ShipCache]);
        let stored = self.last(&[ReturnCache, WriteCache]);
        self.wait(&[ReadCache], &[ShipCache], 0.0);
        self.wait(&brought, &begun, 1.0);
        self.wait(&[ReadCache], &[AttendBeside], 1.0);
        self.wait(attended, &self.first(&[ReturnCache, WriteCache]), 0.0);
        self.wait(attended, &[WriteCache], 0.0);
        self.wait(&[ReturnCache], &[WriteCache], 0.0);
        if brought.is_empty() {
            self.wait(&stored, &begun, 2.0);
        }
        self.wait(&stored, &self.first(&[ReadCache, ShipCache]), 1.0);
    }

    /// A hidden state comes into the half, or the place, that the one before has left.
    fn hidden(&mut self, order: Order) {
        let (leaves, comes) = match order {
            Order::Alone => (0.0, 1.0),
            Order::InTurn | Order::Staggered => (1.0, 0.0),
        };
        self.wait(&[ReadHidden], &[ShipHidden], 0.0);
        self.wait(&[ReturnHidden], &[WriteHidden], 0.0);
        let left = self.last(&[ReturnHidden, WriteHidden]);
        self.wait(
            &[End, EndUp],
            &self.first(&[ReturnHidden, WriteHidden]),
            leaves,
        );
        self.wait(&left, &self.first(&[ReadHidden, ShipHidden]), comes);
    }

    fn first(&self, of: &[Node]) -> Vec<Node> {
        of.iter()
            .copied()
            .find(|&n| self.there(n))
            .into_iter()
            .collect()
    }

    fn last(&self, of: &[Node]) -> Vec<Node> {
        of.iter()
            .copied()
            .rfind(|&n| self.there(n))
            .into_iter()
            .collect()
    }

    fn seconds(&self, node: Node) -> f64 {
        self.durations[node as usize].unwrap_or(0.0)
    }

    /// The cycle with most seconds a step, where that is more than `floor_s`.
    pub fn slowest(&self, floor_s: f64) -> Option<Cycle> {
        let (mut slowest, mut limit_s) = (None, floor_s);
        while let Some(cycle) = self.slower_than(limit_s) {
            limit_s = self.seconds_of(&cycle) / cycle.steps;
            slowest = Some(cycle);
        }
        slowest
    }

    fn seconds_of(&self, cycle: &Cycle) -> f64 {
        let own_s: f64 = cycle.nodes.iter().map(|&n| self.seconds(n)).sum();
        own_s + cycle.wakes_s
    }

    /// Any cycle with more than `limit_s` a step: longest paths that still grow after as many rounds as
    /// there are operations go round in one.
    fn slower_than(&self, limit_s: f64) -> Option<Cycle> {
        let mut late_s = [0.0f64; NODES];
        let mut through: [Option<Wait>; NODES] = [None; NODES];
        let mut grown = None;
        for _ in 0..=NODES {
            grown = None;
            for wait in &self.waits {
                let (from, to) = (wait.from as usize, wait.to as usize);
                let at_s =
                    late_s[from] + self.seconds(wait.from) + wait.wake_s - limit_s * wait.steps;
                if at_s > late_s[to] + 1e-9 * limit_s.max(1e-9) {
                    late_s[to] = at_s;
                    through[to] = Some(*wait);
                    grown = Some(wait.to);
                }
            }
            grown?;
        }
        let mut at = grown?;
        for _ in 0..NODES {
            at = through[at as usize]?.from;
        }
        let start = at;
        let (mut nodes, mut steps, mut wakes_s) = (Vec::new(), 0.0, 0.0);
        loop {
            let wait = through[at as usize]?;
            nodes.push(wait.from);
            steps += wait.steps;
            wakes_s += wait.wake_s;
            at = wait.from;
            if at == start {
                break;
            }
        }
        (steps > 0.0).then_some(Cycle {
            nodes,
            steps,
            wakes_s,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn step(of: &[(Node, f64)]) -> Durations {
        let mut durations = [None; NODES];
        of.iter()
            .for_each(|&(node, s)| durations[node as usize] = Some(s));
        durations
    }

    fn slowest(of: &[(Node, f64)], order: Order) -> (f64, Cycle) {
        let waits = Waits::new(step(of), order, [0.0; 2]);
        let cycle = waits.slowest(0.0).expect("a lane is a cycle");
        (waits.seconds_of(&cycle) / cycle.steps, cycle)
    }

    const COMPUTED: [(Node, f64); 3] = [(Begin, 1.0), (Attend, 1.0), (End, 2.0)];

    #[test]
    fn what_is_at_home_takes_as_long_as_it_is_computed() {
        assert_eq!(slowest(&COMPUTED, Order::InTurn).0, 4.0);
        assert_eq!(slowest(&COMPUTED, Order::Alone).0, 4.0);
        assert_eq!(slowest(&COMPUTED, Order::Staggered).0, 4.0);
    }

    #[test]
    fn hidden_states_on_disk_wait_for_themselves() {
        let with = [&COMPUTED[..], &[(ReadHidden, 3.0), (WriteHidden, 3.0)]].concat();
        // The only batch goes through everything; of several, every second one has the same half.
        assert_eq!(slowest(&with, Order::Alone).0, 10.0);
        let (seconds, cycle) = slowest(&with, Order::InTurn);
        assert_eq!((seconds, cycle.steps), (5.0, 2.0));
        assert!(cycle.nodes.contains(&ReadHidden) && cycle.nodes.contains(&WriteHidden));
    }

    #[test]
    fn what_the_cpu_attends_to_comes_up_behind_the_next_hidden_state() {
        let attended = [(AttendDown, 0.5), (AttendBeside, 1.0), (AttendUp, 0.5)];
        let hidden = [(ShipHidden, 1.0), (ReturnHidden, 1.0)];
        let with = [&[(Begin, 1.0), (End, 2.0)][..], &attended, &hidden].concat();
        // Back, up, then this batch's attended rows, then its end: one step after the other.
        let in_turn = Order::InTurn;
        assert_eq!(
            slowest(&with, in_turn).0,
            5.0_f64.max(1.0 + 1.0 + 0.5 + 2.0)
        );
        let slow = [&with[..], &[(ReadHidden, 4.0), (WriteHidden, 4.0)]].concat();
        assert_eq!(slowest(&slow, in_turn).0, 12.5);
    }

    #[test]
    fn staggered_batches_are_computed_while_others_are_attended() {
        let with = |beside_s: f64| {
            let attended = [(AttendDown, 0.5), (AttendBeside, beside_s), (AttendUp, 0.5)];
            [&[(Begin, 1.0), (End, 2.0)][..], &attended].concat()
        };
        let staggered = Order::Staggered;
        assert_eq!(slowest(&with(2.5), Order::InTurn).0, 6.5);
        // The GPU has most to do; the half of what is attended is waited for; the CPU has most to do.
        assert_eq!(slowest(&with(1.0), staggered).0, 3.0);
        assert_eq!(slowest(&with(2.5), staggered).0, 6.5 / 2.0);
        assert_eq!(slowest(&with(7.0), staggered).0, 7.0);
        // Back, up, then the last batch's attended rows, then its end: as where batches come in turn.
        let hidden = [(ShipHidden, 1.5), (ReturnHidden, 1.5)];
        let travels = [&with(2.5)[..], &hidden].concat();
        assert_eq!(slowest(&travels, staggered).0, 5.5);
    }

    #[test]
    fn a_lane_that_waited_takes_a_moment_to_begin() {
        let with = [&COMPUTED[..], &[(ReadHidden, 3.0), (WriteHidden, 3.0)]].concat();
        // The compute lane for what was read, the writer for what was computed, the reader for what was written.
        let cycle = Waits::new(step(&with), Order::Alone, [0.25; 2]).slowest(0.0);
        assert_eq!(cycle.map(|c| c.wakes_s), Some(0.75));
    }
}
