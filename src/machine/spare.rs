//! Cores that nobody needs at the moment: whether who waits may look again and again, which is quicker than
//! waking up, or has to sleep at once. What is waited for is the lanes'.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

/// How long a waiter looks before it sleeps. Who slept for milliseconds, on a core that had nothing else to do, begins
/// 50 to 100 µs late; a large request to a disk takes about as long as this.
const LOOKS_FOR: Duration = Duration::from_millis(5);
/// Looks between two looks at the clock: a µs or so.
const LOOKS: u32 = 64;

/// All cores of this process, and how many have something to do.
pub struct Cores {
    all: usize,
    busy: AtomicUsize,
}

/// Cores that are busy for as long as this lives.
pub struct Busy<'a> {
    cores: &'a Cores,
    count: usize,
}

impl Drop for Busy<'_> {
    fn drop(&mut self) {
        self.cores.busy.fetch_sub(self.count, Ordering::Relaxed);
    }
}

impl Cores {
    /// The cores that this process may run on.
    pub fn here() -> Cores {
        Cores::of(std::thread::available_parallelism().map_or(1, |n| n.get()))
    }

    fn of(all: usize) -> Cores {
        Cores {
            all,
            busy: AtomicUsize::new(0),
        }
    }

    /// Somebody computes with so many threads.
    pub fn computing(&self, threads: usize) -> Busy<'_> {
        self.busy.fetch_add(threads, Ordering::Relaxed);
        Busy {
            cores: self,
            count: threads,
        }
    }

    /// One core, if there is one to spare besides one for whom is waited for.
    fn spare(&self) -> Option<Busy<'_>> {
        let one_more = |busy: usize| (busy + 1 < self.all).then_some(busy + 1);
        let order = Ordering::Relaxed;
        self.busy.fetch_update(order, order, one_more).ok()?;
        Some(Busy {
            cores: self,
            count: 1,
        })
    }

    /// Looks for `reached` a while, but only on a core that nobody computes on: there, who looks would take from
    /// the others the time that he hopes to gain for them. False when it is better to sleep.
    pub fn look_for(&self, reached: impl Fn() -> bool) -> bool {
        if reached() {
            return true;
        }
        let Some(_core) = self.spare() else {
            return false;
        };
        let begin = Instant::now();
        while begin.elapsed() < LOOKS_FOR {
            for _ in 0..LOOKS {
                if reached() {
                    return true;
                }
                if self.busy.load(Ordering::Relaxed) > self.all {
                    return false;
                }
                std::hint::spin_loop();
            }
            // Whoever is waited for may be bound to this very core.
            std::thread::yield_now();
        }
        false
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::cell::Cell;

    fn looks(cores: &Cores) -> u32 {
        let looks = Cell::new(0);
        let never = || {
            looks.set(looks.get() + 1);
            false
        };
        assert!(!cores.look_for(never));
        looks.get()
    }

    #[test]
    fn who_waits_looks_on_a_spare_core_only() {
        let cores = Cores::of(3);
        assert!(looks(&cores) > LOOKS);
        let one = cores.computing(1);
        assert!(looks(&cores) > LOOKS);
        let other = cores.computing(1);
        assert_eq!(looks(&cores), 1);
        drop((one, other));
        assert!(looks(&cores) > LOOKS);
        assert_eq!(cores.busy.load(Ordering::Relaxed), 0);
    }

    #[test]
    fn who_looks_sleeps_when_all_cores_begin_to_compute() {
        let cores = Cores::of(2);
        let (looks, begun) = (Cell::new(0), Cell::new(None));
        assert!(!cores.look_for(|| {
            looks.set(looks.get() + 1);
            if looks.get() == 10 {
                begun.set(Some(cores.computing(2)));
            }
            false
        }));
        assert_eq!(looks.get(), 10);
    }

    #[test]
    fn what_is_there_needs_no_core() {
        let cores = Cores::of(1);
        let _all = cores.computing(1);
        assert!(cores.look_for(|| true));
    }
}
