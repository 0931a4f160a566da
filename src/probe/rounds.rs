//! Which rounds of a probe belong together. On a shared machine DRAM can be half as fast again in one minute as in
//! the next (the host moves the guest's cores); a profile of both would be of a machine that never is. No clock and no
//! machine here.

use super::compute::ComputeArea;

/// DRAM's speed is the same as far as it differs by no more than this factor.
const SAME: f64 = 1.2;
/// So many rounds of one speed are enough where the time is up.
const FEW: usize = 3;

/// The compute lane's measurements, each round for itself.
#[derive(Default)]
pub struct Rounds(Vec<Round>);

struct Round {
    /// Bytes per second that DRAM gave before the round and after it.
    reads: [f64; 2],
    area: ComputeArea,
}

impl Rounds {
    pub fn push(&mut self, reads: [f64; 2], area: ComputeArea) {
        self.0.push(Round { reads, area });
    }

    fn reads(&self) -> Vec<[f64; 2]> {
        self.0.iter().map(|round| round.reads).collect()
    }

    /// Whether as many rounds as are wanted are of one speed, or some where the time is up.
    pub fn are_enough(&self, wanted: usize, time_is_up: bool) -> bool {
        let steady = steady(&self.reads()).len();
        steady >= wanted || time_is_up && steady >= FEW.min(wanted)
    }

    /// A sentence for who will read the profile, where some rounds do not count.
    pub fn left_out(&self) -> Option<String> {
        let reads = self.reads();
        let kept = steady(&reads);
        let all = reads.len();
        let gb = |rate: f64| rate / 1e9;
        let mean = kept.iter().map(|&at| middle(reads[at])).sum::<f64>() / kept.len().max(1) as f64;
        let span =
            |pick: fn(f64, f64) -> f64, from| reads.as_flattened().iter().copied().fold(from, pick);
        let (least, most) = (span(f64::min, f64::MAX), span(f64::max, 0.0));
        (kept.len() < all).then(|| {
            format!(
                "DRAM gave {:.0} to {:.0} GB/s: the {} of {all} rounds with about {:.0} count",
                gb(least),
                gb(most),
                kept.len(),
                gb(mean)
            )
        })
    }

    /// All that was measured while DRAM had one speed.
    pub fn joined(self) -> Option<ComputeArea> {
        let kept = steady(&self.reads());
        let rounds = self.0.into_iter().enumerate();
        let counted = rounds.filter(|(at, _)| kept.contains(at));
        counted
            .map(|(_, round)| round.area)
            .reduce(|mut all, area| {
                all.join(area);
                all
            })
    }
}

fn middle([before, after]: [f64; 2]) -> f64 {
    (before + after) / 2.0
}

fn is_same(a: f64, b: f64) -> bool {
    a.max(b) <= SAME * a.min(b)
}

/// The most rounds in which DRAM kept one speed, the later ones of as many; all of them where it never did.
fn steady(reads: &[[f64; 2]]) -> Vec<usize> {
    let like = |centre: f64| -> Vec<usize> {
        let is_like = |at: &usize| reads[*at].iter().all(|&read| is_same(read, centre));
        (0..reads.len()).filter(is_like).collect()
    };
    let groups = reads.iter().map(|&read| like(middle(read)));
    match groups.max_by_key(Vec::len) {
        Some(group) if !group.is_empty() => group,
        _ => (0..reads.len()).collect(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SLOW: [f64; 2] = [50e9, 52e9];
    const QUICK: [f64; 2] = [83e9, 80e9];
    const MIXED: [f64; 2] = [51e9, 82e9];

    #[test]
    fn rounds_of_one_speed_of_memory_count() {
        assert_eq!(steady(&[SLOW, SLOW, SLOW]), [0, 1, 2]);
        assert_eq!(steady(&[SLOW, MIXED, QUICK, QUICK]), [2, 3]);
        assert_eq!(
            steady(&[SLOW, SLOW, MIXED, QUICK, QUICK]),
            [3, 4],
            "the later ones"
        );
        assert_eq!(steady(&[QUICK, SLOW, SLOW]), [1, 2]);
        assert_eq!(steady(&[MIXED, MIXED]), [0, 1], "it never keeps one");
        assert_eq!(steady(&[MIXED, SLOW]), [1]);
        assert_eq!(steady(&[]), [0; 0]);
    }

    fn rounds(reads: &[[f64; 2]]) -> Rounds {
        let extent = crate::probe::ProbeScale::Quick.extent();
        let mut rounds = Rounds::default();
        for read in reads {
            rounds.push(*read, ComputeArea::new(extent));
        }
        rounds
    }

    #[test]
    fn a_change_of_speed_asks_for_more_rounds_and_is_told() {
        let steady = rounds(&[SLOW; 6]);
        assert!(steady.are_enough(6, false) && !steady.are_enough(7, false));
        assert_eq!(steady.left_out(), None);
        let changed = rounds(&[SLOW, SLOW, SLOW, MIXED, QUICK, QUICK]);
        assert!(!changed.are_enough(6, false) && changed.are_enough(6, true));
        let told = changed.left_out().expect("some do not count");
        assert_eq!(
            told,
            "DRAM gave 50 to 83 GB/s: the 3 of 6 rounds with about 51 count"
        );
        assert!(rounds(&[SLOW]).are_enough(1, true) && !rounds(&[SLOW]).are_enough(6, true));
        assert!(changed.joined().is_some() && rounds(&[]).joined().is_none());
    }
}
