//! Result lines: written whole, one at a time, as sequences finish. What a line of input is lives in
//! prompts.rs; reports and documents are not written here.

use super::progress::{Talk, Unit};
use super::prompt_lines::{DOES_NOT_FIT, LineError};
use crate::engine::{EngineError, FinishReason, Finished, Progress, Sink};
use crate::report::LineCounts;
use crate::tokenizer::Tokenizer;
use serde::Serialize;
use std::fs::{File, OpenOptions};
use std::io::{ErrorKind, Write};
use std::path::{Path, PathBuf};
use thiserror::Error;

/// Why results cannot be written.
#[derive(Debug, Error)]
pub enum ResultError {
    #[error("{} exists: add --overwrite to replace it, or name another file", .0.display())]
    Exists(PathBuf),
    #[error("{} cannot be written ({cause}): check the path, its permissions and the free space", path.display())]
    Open {
        path: PathBuf,
        cause: std::io::Error,
    },
    #[error(
        "{name}: a result could not be written ({cause}) after {lines} whole lines: make room and run the other lines again"
    )]
    Write {
        name: String,
        cause: std::io::Error,
        lines: u64,
    },
    /// Whoever read the results wants no more: no failure.
    #[error("standard output was closed by its reader")]
    Closed,
}

/// Something lines are appended to.
trait Target: Write + Send {
    /// Takes back what was written beyond `bytes`, where that can be done.
    fn cut(&mut self, _bytes: u64) {}
}

impl Target for File {
    fn cut(&mut self, bytes: u64) {
        // A pipe or a device cannot be cut; the error that led here is told anyway.
        let _ = self.set_len(bytes);
    }
}

impl Target for std::io::Stdout {}
impl Target for std::io::Sink {}

#[derive(Serialize)]
struct GoodLine<'a> {
    index: usize,
    text: &'a str,
    token_ids: &'a [u32],
    finish_reason: &'static str,
    prompt_tokens: usize,
}

#[derive(Serialize)]
struct BadLine<'a> {
    index: usize,
    finish_reason: &'static str,
    error: BadLineError<'a>,
}

#[derive(Serialize)]
struct BadLineError<'a> {
    message: &'a str,
    code: &'a str,
}

/// Where result lines go, and how many went there.
pub struct Results<'a> {
    target: Box<dyn Target>,
    name: String,
    tokenizer: Option<&'a Tokenizer>,
    /// Bytes of whole lines.
    whole_bytes: u64,
    ok: u64,
    failed: u64,
    closed: bool,
}

impl<'a> Results<'a> {
    /// To a file that must not be there yet unless `overwrite`, or to stdout without one.
    pub fn open(
        file: Option<&Path>,
        overwrite: bool,
        tokenizer: Option<&'a Tokenizer>,
    ) -> Result<Results<'a>, ResultError> {
        let (target, name): (Box<dyn Target>, String) = match file {
            None => (Box::new(std::io::stdout()), "standard output".to_owned()),
            Some(path) => (
                Box::new(open_file(path, overwrite)?),
                path.display().to_string(),
            ),
        };
        Ok(Results::new(target, name, tokenizer))
    }

    /// Of a run that could not start: lines are counted and what stands in the file is left alone.
    pub fn nowhere() -> Results<'a> {
        Results::new(Box::new(std::io::sink()), String::new(), None)
    }

    fn new(target: Box<dyn Target>, name: String, tokenizer: Option<&'a Tokenizer>) -> Self {
        Results {
            target,
            name,
            tokenizer,
            whole_bytes: 0,
            ok: 0,
            failed: 0,
            closed: false,
        }
    }

    /// A line that was generated. Without a tokenizer its text is empty.
    pub fn finished(&mut self, line: &Finished) -> Result<(), ResultError> {
        let decode = |t: &Tokenizer| t.decode(&line.token_ids).unwrap_or_default();
        let text = self.tokenizer.map(decode).unwrap_or_default();
        self.append(&GoodLine {
            index: line.line,
            text: &text,
            token_ids: &line.token_ids,
            finish_reason: match line.reason {
                FinishReason::Stop => "stop",
                FinishReason::Length => "length",
            },
            prompt_tokens: line.prompt_tokens,
        })?;
        self.ok += 1;
        Ok(())
    }

    /// A line that was not.
    pub fn failed(&mut self, index: usize, error: &LineError) -> Result<(), ResultError> {
        let (message, code) = (error.message.as_str(), error.code);
        self.append(&BadLine {
            index,
            finish_reason: "error",
            error: BadLineError { message, code },
        })?;
        self.failed += 1;
        Ok(())
    }

    /// Lines written so far, of so many.
    pub fn counts_of(&self, lines: usize) -> LineCounts {
        LineCounts {
            total: lines as u64,
            ok: self.ok,
            failed: self.failed,
        }
    }

    /// The reader of stdout is gone: the run may end, and did not fail.
    pub fn is_closed(&self) -> bool {
        self.closed
    }

    /// Text cannot be given: say so once.
    pub fn lacks_text(&self) -> bool {
        self.tokenizer.is_none()
    }

    fn append(&mut self, line: &impl Serialize) -> Result<(), ResultError> {
        let mut bytes = serde_json::to_vec(line).expect("a result is plain data");
        bytes.push(b'\n');
        let written = self.target.write_all(&bytes);
        match written.and_then(|()| self.target.flush()) {
            Ok(()) => {
                self.whole_bytes += bytes.len() as u64;
                Ok(())
            }
            Err(cause) if cause.kind() == ErrorKind::BrokenPipe => {
                self.closed = true;
                Err(ResultError::Closed)
            }
            Err(cause) => {
                self.target.cut(self.whole_bytes);
                let (name, lines) = (self.name.clone(), self.ok + self.failed);
                Err(ResultError::Write { name, cause, lines })
            }
        }
    }
}

/// Refuses a place for a file before the work rather than after it. Devices and pipes are taken as they are.
pub fn check_place(path: &Path, overwrite: bool) -> Result<(), ResultError> {
    match std::fs::metadata(path) {
        Ok(meta) if meta.is_file() && !overwrite => Err(ResultError::Exists(path.to_owned())),
        Ok(meta) if meta.is_file() || meta.is_dir() => {
            let opened = OpenOptions::new().write(true).open(path);
            opened.map(drop).map_err(|cause| ResultError::Open {
                path: path.to_owned(),
                cause,
            })
        }
        Ok(_) => Ok(()),
        Err(_) => {
            // Made and removed: permissions alone do not tell whether a file can be written.
            let made = open_file(path, false)?;
            drop(made);
            std::fs::remove_file(path).map_err(|cause| ResultError::Open {
                path: path.to_owned(),
                cause,
            })
        }
    }
}

fn open_file(path: &Path, overwrite: bool) -> Result<File, ResultError> {
    let mut options = OpenOptions::new();
    options.write(true);
    // Devices and pipes are there already, and nothing in them can be lost.
    let special = std::fs::metadata(path).is_ok_and(|meta| !meta.is_file() && !meta.is_dir());
    match (special, overwrite) {
        (true, _) => &mut options,
        (false, true) => options.create(true).truncate(true),
        (false, false) => options.create_new(true),
    };
    options.open(path).map_err(|cause| match cause.kind() {
        ErrorKind::AlreadyExists => ResultError::Exists(path.to_owned()),
        _ => ResultError::Open {
            path: path.to_owned(),
            cause,
        },
    })
}

/// The engine's sink: results to their file, progress to stderr.
pub struct ResultSink<'s, 'a> {
    results: &'s mut Results<'a>,
    talk: &'s mut Talk,
    /// Tokens to generate if no line stops early.
    most_tokens: u64,
}

impl<'s, 'a> ResultSink<'s, 'a> {
    pub fn new(results: &'s mut Results<'a>, talk: &'s mut Talk, most_tokens: u64) -> Self {
        if results.lacks_text() {
            talk.note("the model has no tokenizer: \"text\" of every result is empty, token_ids are there");
        }
        ResultSink {
            results,
            talk,
            most_tokens,
        }
    }
}

fn ends_run(error: ResultError) -> EngineError {
    EngineError::Output(error.to_string())
}

impl Sink for ResultSink<'_, '_> {
    fn finished(&mut self, line: Finished) -> Result<(), EngineError> {
        self.results.finished(&line).map_err(ends_run)
    }

    fn refused(&mut self, line: usize, why: String) -> Result<(), EngineError> {
        let message = format!("line {}: {why}", line + 1);
        self.talk.note(&message);
        let code = DOES_NOT_FIT;
        let error = LineError { message, code };
        self.results.failed(line, &error).map_err(ends_run)
    }

    fn progress(&mut self, progress: &Progress) {
        let spent_s = progress.prefill_s + progress.decode_s;
        let done = progress.generated_tokens;
        let rate_per_s = if spent_s > 0.0 {
            done as f64 / spent_s
        } else {
            0.0
        };
        self.talk
            .step(done, self.most_tokens, Unit::Things("tokens"), rate_per_s);
    }
}

#[cfg(test)]
#[path = "results_tests.rs"]
mod tests;
