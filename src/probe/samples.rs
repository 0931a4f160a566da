//! Repeated figures and what is said of them: the median, and how far they lie apart.
//! No clock and no machine here.

/// What one thing measured again and again.
#[derive(Clone, Debug, Default)]
pub struct Series(Vec<f64>);

impl Series {
    pub fn push(&mut self, value: f64) {
        self.0.push(value);
    }

    /// Takes over another's values.
    pub fn append(&mut self, other: &mut Series) {
        self.0.append(&mut other.0);
    }

    /// The middle value (of an even number the mean of the middle two); `None` before the first.
    pub fn median(&self) -> Option<f64> {
        median(&self.0)
    }

    /// What all of them took on average, interruptions and all; `None` before the first.
    pub fn mean(&self) -> Option<f64> {
        (!self.0.is_empty()).then(|| self.0.iter().sum::<f64>() / self.0.len() as f64)
    }

    /// Largest less smallest, in percent of the median.
    pub fn spread_pct(&self) -> f64 {
        let largest = self.0.iter().copied().fold(f64::MIN, f64::max);
        let smallest = self.0.iter().copied().fold(f64::MAX, f64::min);
        match self.median() {
            Some(median) if median > 0.0 => 100.0 * (largest - smallest) / median,
            _ => 0.0,
        }
    }
}

/// The middle value (of an even number the mean of the middle two); `None` of nothing.
pub fn median(values: &[f64]) -> Option<f64> {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    let (count, middle) = (sorted.len(), sorted.len() / 2);
    match count {
        0 => None,
        _ if count % 2 == 1 => Some(sorted[middle]),
        _ => Some((sorted[middle - 1] + sorted[middle]) / 2.0),
    }
}

/// A figure to five digits: more would be noise, and files stay readable.
pub fn tidy(value: f64) -> f64 {
    format!("{value:.4e}").parse().unwrap_or(value)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn medians_and_spreads() {
        let mut series = Series::default();
        assert_eq!((series.median(), series.mean()), (None, None));
        [10.0, 30.0, 20.0].into_iter().for_each(|v| series.push(v));
        assert_eq!(series.median(), Some(20.0));
        assert_eq!(series.spread_pct(), 100.0);
        series.push(40.0);
        assert_eq!(series.median(), Some(25.0));
        series.push(400.0);
        assert_eq!(series.mean(), Some(100.0));
    }

    #[test]
    fn figures_are_written_to_five_digits() {
        assert_eq!(tidy(0.000123456789), 0.00012346);
        assert_eq!(tidy(3_123_456_789.0), 3_123_500_000.0);
        assert_eq!((tidy(0.0), tidy(1.0)), (0.0, 1.0));
    }
}
