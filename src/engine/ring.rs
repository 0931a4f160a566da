//! A ring of bytes for what visits a tier: space is handed out in order and comes back when the
//! operations that used it are done. Nothing waits here: reuse is expressed as fences.

use super::layout::Place;
use crate::machine::{Fence, Fences};
use std::collections::VecDeque;

struct Visit {
    ticket: u64,
    offset: u64,
    bytes: u64,
    /// Set when the last operation that uses the bytes has been submitted.
    released: Option<Fences>,
}

/// First in, first out allocation of one buffer.
pub struct Ring {
    place: Place,
    head: u64,
    next_ticket: u64,
    visits: VecDeque<Visit>,
    /// Fences of grants that were taken back.
    owed: Fences,
}

/// Bytes handed out: where, after which fences they may be written, and the name to release them by.
#[derive(Clone, Copy, Debug)]
pub struct Grant {
    pub ticket: u64,
    pub offset: u64,
    pub after: Fences,
}

impl Ring {
    pub fn new(place: Place) -> Self {
        Ring {
            place,
            head: 0,
            next_ticket: 0,
            visits: VecDeque::new(),
            owed: Fences::none(),
        }
    }

    /// The next `bytes`, or None while operations that still need them have not all been submitted.
    pub fn grant(&mut self, bytes: u64) -> Option<Grant> {
        assert!(
            bytes <= self.place.bytes,
            "a visit of {bytes} bytes in a ring of {}",
            self.place.bytes
        );
        let wraps = self.head + bytes > self.place.bytes;
        let start = if wraps { 0 } else { self.head };
        let blocks = |v: &Visit| {
            (wraps && v.offset >= self.head)
                || (v.offset < start + bytes && start < v.offset + v.bytes)
        };
        let blocking = self.visits.iter().take_while(|v| blocks(v)).count();
        if self
            .visits
            .iter()
            .take(blocking)
            .any(|v| v.released.is_none())
        {
            return None;
        }
        let drained = self.visits.drain(..blocking).filter_map(|v| v.released);
        let after = drained.fold(self.owed, |all, fences| all.join(&fences));
        self.owed = Fences::none();
        let ticket = self.next_ticket;
        self.next_ticket += 1;
        self.head = start + bytes;
        self.visits.push_back(Visit {
            ticket,
            offset: start,
            bytes,
            released: None,
        });
        Some(Grant {
            ticket,
            offset: self.place.offset + start,
            after,
        })
    }

    /// Takes the newest grant back, unused.
    pub fn undo(&mut self, grant: &Grant) {
        let newest = self.visits.pop_back();
        debug_assert_eq!(newest.map(|v| v.ticket), Some(grant.ticket));
        self.head = grant.offset - self.place.offset;
        // What had to be waited for before these bytes could be written must still be waited for.
        self.owed = self.owed.join(&grant.after);
    }

    /// Says that `last` is the last operation to use a grant's bytes.
    pub fn release(&mut self, ticket: u64, last: Fence) {
        // Tickets only rise.
        let at = self.visits.partition_point(|v| v.ticket < ticket);
        if let Some(visit) = self.visits.get_mut(at).filter(|v| v.ticket == ticket) {
            visit.released = Some(last.into());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tier::Lane;
    use proptest::prelude::*;

    proptest! {
        /// Live visits never overlap, and a grant over old bytes carries the fence of their last use.
        #[test]
        fn bytes_are_never_shared(sizes in proptest::collection::vec(1u64..40, 1..60)) {
            let mut ring = Ring::new(Place { offset: 1000, bytes: 100 });
            let mut live: Vec<(Grant, u64)> = Vec::new();
            let mut number = 0;
            for bytes in sizes {
                let grant = loop {
                    if let Some(grant) = ring.grant(bytes) {
                        break grant;
                    }
                    let (oldest, _) = live.remove(0);
                    number += 1;
                    ring.release(oldest.ticket, Fence { lane: Lane::CpuCompute, number });
                };
                prop_assert!(grant.offset >= 1000 && grant.offset + bytes <= 1100);
                for (other, size) in &live {
                    prop_assert!(other.offset + size <= grant.offset || grant.offset + bytes <= other.offset);
                }
                prop_assert!(grant.after.mark(Lane::CpuCompute) <= number);
                live.push((grant, bytes));
            }
        }
    }

    #[test]
    fn reuse_waits_for_the_last_user() {
        let mut ring = Ring::new(Place {
            offset: 0,
            bytes: 10,
        });
        let first = ring.grant(6).expect("empty");
        assert!(ring.grant(6).is_none());
        ring.release(
            first.ticket,
            Fence {
                lane: Lane::GpuCompute,
                number: 7,
            },
        );
        assert_eq!(
            ring.grant(6)
                .expect("released")
                .after
                .mark(Lane::GpuCompute),
            7
        );
    }
}
