//! Is the planner's choice the best of what was tried? Ratios of alternating pairs, their median and
//! its 95 % interval. Arithmetic only.

use crate::probe::median;
use serde::{Deserialize, Serialize};

/// The planner's choice against one rival: throughput of the choice ÷ the rival's, pair by pair.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Duel {
    pub rival: String,
    pub pairs: usize,
    pub median_ratio: f64,
    /// 95 % interval of the median.
    pub interval: [f64; 2],
    /// The interval reaches what is asked for.
    pub holds: bool,
}

/// What the interval's upper end must reach.
pub const HOLDS_FROM: f64 = 0.97;

/// Judges the ratios of alternating pairs. None of no pairs.
pub fn duel(rival: &str, ratios: &[f64]) -> Option<Duel> {
    let median_ratio = median(ratios)?;
    let interval = median_interval(ratios);
    Some(Duel {
        rival: rival.to_owned(),
        pairs: ratios.len(),
        median_ratio,
        interval,
        holds: interval[1] >= HOLDS_FROM,
    })
}

/// 95 % interval of a median by order statistics: the ranks between which the median lies but for 2.5 %
/// on either side, by the binomial distribution. Below six values that is the whole range.
fn median_interval(values: &[f64]) -> [f64; 2] {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    let n = sorted.len();
    // Largest k with P(X < k) ≤ 2.5 %, X ~ Binomial(n, 1/2).
    let (mut below, mut term, mut rank) = (0.0, 0.5f64.powi(n as i32), 0);
    for k in 0..n {
        below += term;
        if below > 0.025 {
            break;
        }
        rank = k + 1;
        term *= (n - k) as f64 / (k + 1) as f64;
    }
    let rank = rank.min((n - 1) / 2);
    let low = rank.saturating_sub(1);
    match rank {
        0 => [sorted[0], sorted[n - 1]],
        _ => [sorted[low], sorted[n - 1 - low]],
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_interval_has_the_ranks_of_the_sign_test() {
        // n = 20: the 6th and 15th values (two-sided 95.9 %).
        let values: Vec<f64> = (1..=20).map(f64::from).collect();
        assert_eq!(median_interval(&values), [6.0, 15.0]);
        let few: Vec<f64> = (1..=5).map(f64::from).collect();
        assert_eq!(median_interval(&few), [1.0, 5.0]);
    }

    #[test]
    fn a_choice_that_loses_by_four_percent_does_not_hold() {
        let ratios = |around: f64| -> Vec<f64> {
            (0..20).map(|n| around + 0.001 * f64::from(n % 5)).collect()
        };
        assert!(!duel("a", &ratios(0.95)).is_some_and(|d| d.holds));
        assert!(duel("a", &ratios(1.0)).is_some_and(|d| d.holds));
        assert_eq!(duel("a", &[]), None);
    }
}
