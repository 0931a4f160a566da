//! Talk while work goes on: on a terminal one line that updates itself, elsewhere one plain line per
//! stage and one every ten seconds. Results and documents never come here.

use crate::units::{show_bytes, show_rate, show_seconds};
use std::io::{IsTerminal, Write};
use std::time::Instant;

/// Between two updates of a terminal's line, and between two plain lines.
const TERMINAL_PAUSE_S: f64 = 0.1;
const PLAIN_PAUSE_S: f64 = 10.0;
/// Wrapped lines cannot be taken back: what does not fit is cut.
const DEFAULT_COLUMNS: usize = 80;

/// What is counted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Unit {
    Bytes,
    /// "tokens", "lines", "candidates".
    Things(&'static str),
}

impl Unit {
    fn amount(self, n: u64) -> String {
        match self {
            Unit::Bytes => show_bytes(n),
            Unit::Things(_) => n.to_string(),
        }
    }

    fn rate(self, per_s: f64) -> String {
        match self {
            Unit::Bytes => show_rate(per_s),
            Unit::Things(name) => format!("{per_s:.1} {name}/s"),
        }
    }

    /// "3/8 tokens", "1.00 GiB of 2.00 GiB", "3 tokens" where the total is not known.
    fn progress(self, done: u64, total: u64) -> String {
        match (self, total) {
            (Unit::Bytes, 0) => self.amount(done),
            (Unit::Bytes, _) => format!("{} of {}", self.amount(done), self.amount(total)),
            (Unit::Things(name), 0) => format!("{done} {name}"),
            (Unit::Things(name), _) => format!("{done}/{total} {name}"),
        }
    }
}

/// The program's voice on stderr.
pub struct Talk {
    out: Box<dyn Write + Send>,
    clock: Box<dyn Fn() -> f64 + Send>,
    /// Columns of the terminal; None = no terminal.
    columns: Option<usize>,
    stage: String,
    /// When the last step was shown, or the stage began.
    shown_s: f64,
    /// A terminal's line stands there and may be written over.
    open_line: bool,
}

impl Talk {
    /// On stderr, in the manner that fits it.
    pub fn stderr() -> Talk {
        let dumb = std::env::var_os("TERM").is_some_and(|term| term == "dumb");
        let terminal = std::io::stderr().is_terminal() && !dumb;
        let asked = std::env::var("COLUMNS").ok().and_then(|c| c.parse().ok());
        let start = Instant::now();
        Talk::new(
            Box::new(std::io::stderr()),
            Box::new(move || start.elapsed().as_secs_f64()),
            terminal.then(|| asked.unwrap_or(DEFAULT_COLUMNS)),
        )
    }

    /// To anything, with any clock (seconds, never running backwards).
    pub fn new(
        out: Box<dyn Write + Send>,
        clock: Box<dyn Fn() -> f64 + Send>,
        columns: Option<usize>,
    ) -> Talk {
        let shown_s = clock();
        Talk {
            out,
            clock,
            columns,
            stage: String::new(),
            shown_s,
            open_line: false,
        }
    }

    /// A new part of the work begins.
    pub fn stage(&mut self, text: &str) {
        text.clone_into(&mut self.stage);
        self.shown_s = (self.clock)();
        match self.columns {
            Some(_) => self.replace_line(text),
            None => self.write(&format!("{text}\n")),
        }
    }

    /// Something to be read, on a line of its own: a warning, a choice made.
    pub fn note(&mut self, text: &str) {
        self.end();
        self.write(&format!("{text}\n"));
    }

    /// How far the stage is; shown when it is time. `total` 0 = not known; `rate_per_s` 0 = not yet.
    pub fn step(&mut self, done: u64, total: u64, unit: Unit, rate_per_s: f64) {
        let now_s = (self.clock)();
        let pause_s = self.columns.map_or(PLAIN_PAUSE_S, |_| TERMINAL_PAUSE_S);
        if now_s - self.shown_s < pause_s {
            return;
        }
        self.shown_s = now_s;
        let mut text = format!("{}: {}", self.stage, unit.progress(done, total));
        if rate_per_s > 0.0 {
            text += &format!(", {}", unit.rate(rate_per_s));
            if total > done {
                let left_s = (total - done) as f64 / rate_per_s;
                text += &format!(", {} left", show_seconds(left_s));
            }
        }
        match self.columns {
            Some(_) => self.replace_line(&text),
            None => self.write(&format!("{text}\n")),
        }
    }

    /// Leaves the line that updates itself, if there is one.
    pub fn end(&mut self) {
        if std::mem::take(&mut self.open_line) {
            self.write("\n");
        }
    }

    fn replace_line(&mut self, text: &str) {
        let room = self.columns.unwrap_or(DEFAULT_COLUMNS).saturating_sub(1);
        let visible: String = text.chars().take(room.max(1)).collect();
        // Back to the line's start, and nothing left of what stood there.
        self.write(&format!("\r{visible}\x1b[K"));
        self.open_line = true;
    }

    /// Talk that nobody can hear is no reason to stop working.
    fn write(&mut self, text: &str) {
        let _ = self.out.write_all(text.as_bytes());
        let _ = self.out.flush();
    }
}

impl Drop for Talk {
    fn drop(&mut self) {
        self.end();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::{Arc, Mutex};

    #[derive(Clone, Default)]
    struct Page(Arc<Mutex<Vec<u8>>>);

    impl Write for Page {
        fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
            self.0.lock().expect("whole").extend(bytes);
            Ok(bytes.len())
        }
        fn flush(&mut self) -> std::io::Result<()> {
            Ok(())
        }
    }

    /// What is said when each step comes a second after the last one.
    fn said(columns: Option<usize>, talk: impl Fn(&mut Talk, &dyn Fn(f64))) -> String {
        let (page, time) = (Page::default(), Arc::new(Mutex::new(0.0)));
        let clock = Arc::clone(&time);
        let read = Box::new(move || *clock.lock().expect("whole"));
        let mut voice = Talk::new(Box::new(page.clone()), read, columns);
        talk(&mut voice, &|s| *time.lock().expect("whole") += s);
        drop(voice);
        String::from_utf8(page.0.lock().expect("whole").clone()).expect("text")
    }

    #[test]
    fn without_a_terminal_a_line_per_stage_and_ten_seconds() {
        let text = said(None, |talk, pass| {
            talk.stage("generate");
            for second in 1..=25 {
                pass(1.0);
                talk.step(second, 100, Unit::Things("tokens"), 1.0);
            }
            talk.stage("done");
        });
        let expected = "generate\ngenerate: 10/100 tokens, 1.0 tokens/s, 90.0 s left\n\
                        generate: 20/100 tokens, 1.0 tokens/s, 80.0 s left\ndone\n";
        assert_eq!(text, expected);
    }

    #[test]
    fn a_terminal_has_one_line_that_is_left_before_a_note() {
        let text = said(Some(20), |talk, pass| {
            talk.stage("pack");
            talk.step(0, 9, Unit::Bytes, 0.0);
            pass(1.0);
            talk.step(1 << 30, 4 << 30, Unit::Bytes, 1e9);
            talk.note("4-bit would be faster");
        });
        assert_eq!(
            text,
            "\rpack\x1b[K\rpack: 1.00 GiB of 4\x1b[K\n4-bit would be faster\n"
        );
    }

    #[test]
    fn what_is_unknown_is_not_made_up() {
        let text = said(None, |talk, pass| {
            talk.stage("read");
            pass(10.0);
            talk.step(5, 0, Unit::Things("lines"), 2.0);
            pass(10.0);
            talk.step(6, 7, Unit::Things("lines"), 0.0);
        });
        assert_eq!(text, "read\nread: 5 lines, 2.0 lines/s\nread: 6/7 lines\n");
    }
}
