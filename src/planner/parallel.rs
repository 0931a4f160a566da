//! Independent questions on all cores, answered in their own order: the same answer whatever their
//! number. Nothing is known here of what is asked.

use std::sync::atomic::{AtomicUsize, Ordering};

/// More threads than this bring nothing to a plan.
const MOST_THREADS: usize = 16;

/// Maps in order, dropping what gives nothing; each thread takes the next item as it comes free.
pub fn in_parallel<T: Sync, R: Send>(items: &[T], one: impl Fn(&T) -> Option<R> + Sync) -> Vec<R> {
    let cores = std::thread::available_parallelism().map_or(1, |n| n.get());
    let threads = cores.min(MOST_THREADS).min(items.len());
    let next = AtomicUsize::new(0);
    let (one, next) = (&one, &next);
    let work = move || {
        let mut found = Vec::new();
        loop {
            let at = next.fetch_add(1, Ordering::Relaxed);
            let Some(item) = items.get(at) else {
                return found;
            };
            found.extend(one(item).map(|result| (at, result)));
        }
    };
    let mut all: Vec<(usize, R)> = std::thread::scope(|scope| {
        let others: Vec<_> = (1..threads).map(|_| scope.spawn(work)).collect();
        let mut all = work();
        for other in others {
            match other.join() {
                Ok(found) => all.extend(found),
                Err(panic) => std::panic::resume_unwind(panic),
            }
        }
        all
    });
    all.sort_by_key(|(at, _)| *at);
    all.into_iter().map(|(_, result)| result).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn answers_come_in_the_order_of_the_questions() {
        let items: Vec<usize> = (0..1000).collect();
        let odd = in_parallel(&items, |&n| (n % 2 == 1).then_some(n * n));
        let one_by_one: Vec<usize> = items
            .iter()
            .filter(|n| *n % 2 == 1)
            .map(|n| n * n)
            .collect();
        assert_eq!(odd, one_by_one);
        assert!(in_parallel(&[] as &[u8], |_| Some(1)).is_empty());
    }
}
