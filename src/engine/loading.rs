//! How far a run's set-up is: bytes that are where they will be used, told to whoever waits, who may end it.

use super::run::EngineError;

/// Who waits while a file is written out and weights come home.
pub trait Loading {
    /// So many bytes of so many are done.
    fn progress(&mut self, done_bytes: u64, total_bytes: u64);
    /// True ends it soon, with `EngineError::Interrupted`.
    fn is_stopped(&self) -> bool;
}

/// Nobody waits.
impl Loading for () {
    fn progress(&mut self, _done_bytes: u64, _total_bytes: u64) {}
    fn is_stopped(&self) -> bool {
        false
    }
}

/// Counts one stage of it.
pub(super) struct Counted<'a> {
    loading: &'a mut dyn Loading,
    done_bytes: u64,
    total_bytes: u64,
}

impl<'a> Counted<'a> {
    pub fn new(loading: &'a mut dyn Loading, total_bytes: u64) -> Self {
        Counted {
            loading,
            done_bytes: 0,
            total_bytes,
        }
    }

    /// So many more are done.
    pub fn add(&mut self, bytes: u64) -> Result<(), EngineError> {
        self.done_bytes += bytes;
        self.loading.progress(self.done_bytes, self.total_bytes);
        match self.loading.is_stopped() {
            true => Err(EngineError::Interrupted),
            false => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Hears everything and ends it after so many bytes.
    struct Until(u64, Vec<(u64, u64)>);

    impl Loading for Until {
        fn progress(&mut self, done_bytes: u64, total_bytes: u64) {
            self.1.push((done_bytes, total_bytes));
        }
        fn is_stopped(&self) -> bool {
            self.1.last().is_some_and(|heard| heard.0 >= self.0)
        }
    }

    #[test]
    fn whoever_waits_hears_of_all_and_may_end_it() {
        let mut until = Until(7, Vec::new());
        let mut counted = Counted::new(&mut until, 20);
        assert!(counted.add(3).is_ok());
        assert!(matches!(counted.add(4), Err(EngineError::Interrupted)));
        assert_eq!(until.1, [(3, 20), (7, 20)]);
    }
}
