//! Where input lines come from: files, standard input, the command line, or a seeded counter.
//! What one line means is prompt_lines.rs.

use super::args::DASH;
use super::failure::Failure;
use super::prompt_lines::TOKENIZER_REMEDY;
pub use super::prompt_lines::{Line, LineError, Rules};
use crate::engine::Request;
use crate::machine::os;
use crate::units::show_bytes;
use crate::workload::{LineLength, Workload};
use std::fs::File;
use std::io::{BufRead, BufReader, ErrorKind, Read};
use std::path::{Path, PathBuf};
use thiserror::Error;

/// Longest input line that is read; no model's positions need more text.
const MOST_LINE_BYTES: u64 = 2 << 20;
/// A line, its request, its lengths and what is counted of it, beside its ids (350 bytes with 300,000 lines).
const LINE_BYTES: u64 = 384;
/// A token id of a prompt is held with its line, and again with its sequence.
const PROMPT_TOKEN_BYTES: u64 = 8;
/// Ids below this are special tokens in every OPT vocabulary.
const FIRST_TEXT_ID: u32 = 4;

/// Why there is no work at all.
#[derive(Debug, Error)]
pub enum PromptError {
    #[error("{}: no such file: name the prompts with --input FILE", .0.display())]
    Missing(PathBuf),
    #[error("{} cannot be read ({cause}): check the path and its permissions", path.display())]
    Io {
        path: PathBuf,
        cause: std::io::Error,
    },
    #[error("{} is empty: write one prompt a line", .0.display())]
    Empty(PathBuf),
    #[error("{}: line {line} is not UTF-8: convert the file, for example with iconv -t UTF-8", path.display())]
    NotUtf8 { path: PathBuf, line: usize },
    #[error("{}: line {line} is longer than {} MiB: one prompt a line", path.display(), MOST_LINE_BYTES >> 20)]
    LongLine { path: PathBuf, line: usize },
    #[error("{}: prompts are read from .txt (one a line) or .jsonl files: rename it", .0.display())]
    Format(PathBuf),
    #[error("the prompts are text, but the model has no tokenizer: {TOKENIZER_REMEDY}")]
    NoTokenizer,
    #[error("--prompt - reads standard input, which can be read only once: write - only once")]
    DashTwice,
    #[error(
        "--prompt-len {asked} is more than the {positions} positions of {model}: ask for at most {positions}"
    )]
    TooLong {
        asked: u32,
        positions: usize,
        model: String,
    },
    #[error(
        "{prompts} random prompts of {tokens} tokens take {} of memory and {} are free: lower --num-prompts or --prompt-len",
        show_bytes(*needed_bytes), show_bytes(*free_bytes)
    )]
    TooMany {
        prompts: usize,
        tokens: u32,
        needed_bytes: u64,
        free_bytes: u64,
    },
    #[error(
        "the vocabulary of {model} has {vocab} ids, none of which can be in a random prompt: give prompts with --input"
    )]
    NoIds { model: String, vocab: usize },
}

impl From<PromptError> for Failure {
    fn from(error: PromptError) -> Failure {
        match error {
            PromptError::Format(_) | PromptError::DashTwice | PromptError::TooLong { .. } => {
                Failure::usage(error)
            }
            _ => Failure::failed(error),
        }
    }
}

/// What is generated from.
#[derive(Clone, Copy, Debug)]
pub enum Source<'a> {
    /// A file, or standard input for "-".
    Input(&'a Path),
    /// `--prompt`; "-" stands for all of standard input.
    Texts(&'a [String]),
    /// Seeded random tokens.
    Random { prompts: usize, prompt_tokens: u32 },
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum Format {
    Text,
    Json,
    /// JSON if the first line begins with a brace: there is no name to go by.
    Guess,
}

/// All lines in input order. A line that is wrong in itself is a `LineError` in its place.
pub fn read_lines(source: Source, rules: &Rules) -> Result<Vec<Line>, PromptError> {
    match source {
        Source::Texts(texts) => read_texts(texts, rules),
        Source::Random {
            prompts,
            prompt_tokens,
        } => random_lines(prompts, prompt_tokens, rules),
        Source::Input(path) if path == Path::new(DASH) => {
            let name = Path::new("standard input");
            read_from(std::io::stdin().lock(), (name, Format::Guess), rules)
        }
        Source::Input(path) => {
            let file = File::open(path).map_err(|e| open_error(path, e))?;
            let format = format_of(path, &file)?;
            read_from(BufReader::new(file), (path, format), rules)
        }
    }
}

/// Lengths of the lines that can be generated from.
pub fn workload(lines: &[Line]) -> Workload {
    let lengths = lines.iter().filter_map(|line| line.result.as_ref().ok());
    let length = |r: &Request| LineLength {
        prompt_tokens: r.prompt.len() as u32,
        gen_tokens: r.max_tokens as u32,
    };
    Workload {
        lines: lengths.map(length).collect(),
    }
}

/// Requests for the engine, and the lines that failed before it.
pub fn split(lines: &[Line]) -> (Vec<Request>, Vec<(usize, LineError)>) {
    let (mut requests, mut failed) = (Vec::with_capacity(lines.len()), Vec::new());
    for line in lines {
        match &line.result {
            Ok(request) => requests.push(request.clone()),
            Err(error) => failed.push((line.index, error.clone())),
        }
    }
    (requests, failed)
}

fn open_error(path: &Path, cause: std::io::Error) -> PromptError {
    match cause.kind() {
        ErrorKind::NotFound => PromptError::Missing(path.to_owned()),
        _ => PromptError::Io {
            path: path.to_owned(),
            cause,
        },
    }
}

fn format_of(path: &Path, file: &File) -> Result<Format, PromptError> {
    let extension = path.extension().unwrap_or_default().to_ascii_lowercase();
    let regular = file
        .metadata()
        .is_ok_and(|meta| meta.is_file() || meta.is_dir());
    match extension.to_str() {
        Some("txt") => Ok(Format::Text),
        Some("jsonl") => Ok(Format::Json),
        // A pipe such as /dev/fd/63 has no name of its own.
        _ if !regular => Ok(Format::Guess),
        _ => Err(PromptError::Format(path.to_owned())),
    }
}

fn read_texts(texts: &[String], rules: &Rules) -> Result<Vec<Line>, PromptError> {
    let name = Path::new("standard input");
    if rules.tokenizer.is_none() {
        return Err(PromptError::NoTokenizer);
    }
    if texts.iter().filter(|text| *text == DASH).count() > 1 {
        return Err(PromptError::DashTwice);
    }
    let mut lines = Vec::with_capacity(texts.len());
    for (index, text) in texts.iter().enumerate() {
        let line = match text.as_str() {
            DASH => rules.text_line(index, &read_whole(std::io::stdin().lock(), name)?),
            text => rules.text_line(index, text),
        };
        lines.push(line);
    }
    Ok(lines)
}

/// One prompt of several lines; the last line's end is not part of it.
fn read_whole(reader: impl Read, name: &Path) -> Result<String, PromptError> {
    let mut bytes = Vec::new();
    let read = reader.take(MOST_LINE_BYTES + 1).read_to_end(&mut bytes);
    read.map_err(|e| open_error(name, e))?;
    let path = || name.to_owned();
    if bytes.len() as u64 > MOST_LINE_BYTES {
        return Err(PromptError::LongLine {
            path: path(),
            line: 1,
        });
    }
    let text = String::from_utf8(bytes).map_err(|_| PromptError::NotUtf8 {
        path: path(),
        line: 1,
    })?;
    let text = text.strip_prefix('\u{feff}').unwrap_or(&text);
    let text = text.strip_suffix('\n').unwrap_or(text);
    Ok(text.strip_suffix('\r').unwrap_or(text).to_owned())
}

fn read_from(
    mut reader: impl BufRead,
    (path, mut format): (&Path, Format),
    rules: &Rules,
) -> Result<Vec<Line>, PromptError> {
    let (mut lines, mut bytes) = (Vec::new(), Vec::new());
    while let Some(text) = next_line(&mut reader, &mut bytes, (path, lines.len()))? {
        if format == Format::Guess {
            let braced = text.trim_start().starts_with('{');
            format = if braced { Format::Json } else { Format::Text };
        }
        if format == Format::Text && rules.tokenizer.is_none() {
            return Err(PromptError::NoTokenizer);
        }
        lines.push(match format {
            Format::Json => rules.json_line(lines.len(), text),
            _ => rules.text_line(lines.len(), text),
        });
    }
    if lines.is_empty() {
        return Err(PromptError::Empty(path.to_owned()));
    }
    Ok(lines)
}

/// The next line without its end; None after the last one.
fn next_line<'b>(
    reader: &mut impl BufRead,
    bytes: &'b mut Vec<u8>,
    (path, index): (&Path, usize),
) -> Result<Option<&'b str>, PromptError> {
    bytes.clear();
    let mut limited = reader.take(MOST_LINE_BYTES + 1);
    let read = limited.read_until(b'\n', bytes);
    if read.map_err(|e| open_error(path, e))? == 0 {
        return Ok(None);
    }
    let (path, line) = (path.to_owned(), index + 1);
    if bytes.len() as u64 > MOST_LINE_BYTES {
        return Err(PromptError::LongLine { path, line });
    }
    let Ok(text) = std::str::from_utf8(bytes) else {
        return Err(PromptError::NotUtf8 { path, line });
    };
    let text = text.strip_suffix('\n').unwrap_or(text);
    let text = text.strip_suffix('\r').unwrap_or(text);
    // Some editors mark UTF-8 files at their very start.
    let marked = text.strip_prefix('\u{feff}').filter(|_| index == 0);
    Ok(Some(marked.unwrap_or(text)))
}

fn random_lines(prompts: usize, tokens: u32, rules: &Rules) -> Result<Vec<Line>, PromptError> {
    let model = rules.model;
    let name = || model.name.clone();
    if tokens as usize > model.positions {
        let positions = model.positions;
        return Err(PromptError::TooLong {
            asked: tokens,
            positions,
            model: name(),
        });
    }
    let vocab = model.vocab;
    let ids = TextIds::new(
        vocab as u32,
        &[&model.eos_ids[..], &[model.pad_id, model.bos_id]].concat(),
    );
    if ids.count == 0 {
        return Err(PromptError::NoIds {
            model: name(),
            vocab,
        });
    }
    check_memory(prompts, tokens)?;
    let prompt = |line: usize| {
        let token = |position: u32| ids.draw(hash([rules.seed, line as u64, position.into()]));
        (0..tokens).map(token).collect()
    };
    Ok((0..prompts)
        .map(|line| rules.ids_line(line, prompt(line)))
        .collect())
}

/// What a run holds of so many lines with so many prompt tokens in all.
pub fn lines_bytes(lines: u64, prompt_tokens: u64) -> u64 {
    let tokens_bytes = PROMPT_TOKEN_BYTES.saturating_mul(prompt_tokens);
    LINE_BYTES
        .saturating_mul(lines)
        .saturating_add(tokens_bytes)
}

/// Before any is drawn: an allocation that fails would end the program without a word.
fn check_memory(prompts: usize, tokens: u32) -> Result<(), PromptError> {
    let lines = prompts as u64;
    let needed_bytes = lines_bytes(lines, lines.saturating_mul(tokens.into()));
    let free_bytes = os::memory_now().map_or(u64::MAX, |now| now.free_bytes);
    if needed_bytes <= free_bytes {
        return Ok(());
    }
    Err(PromptError::TooMany {
        prompts,
        tokens,
        needed_bytes,
        free_bytes,
    })
}

/// The ids that text is made of: all but the special ones.
struct TextIds {
    /// Special ids among those from `FIRST_TEXT_ID` on, ascending.
    special: Vec<u32>,
    count: u32,
}

impl TextIds {
    fn new(vocab: u32, special: &[u32]) -> TextIds {
        let mut special: Vec<u32> = special
            .iter()
            .copied()
            .filter(|id| (FIRST_TEXT_ID..vocab).contains(id))
            .collect();
        special.sort_unstable();
        special.dedup();
        let count = vocab.saturating_sub(FIRST_TEXT_ID + special.len() as u32);
        TextIds { special, count }
    }

    fn draw(&self, bits: u64) -> u32 {
        let drawn = (u128::from(bits) * u128::from(self.count)) >> 64;
        let skip = |id: u32, special: &u32| id + u32::from(id >= *special);
        self.special.iter().fold(FIRST_TEXT_ID + drawn as u32, skip)
    }
}

/// 64 random bits from a key (splitmix64 over its words), on another stream than sampling's.
fn hash(key: [u64; 3]) -> u64 {
    const STREAM: u64 = 0x7072_6f6d_7074_7321;
    key.into_iter().fold(STREAM, |state, word| {
        let mut z = (state ^ word).wrapping_add(0x9e37_79b9_7f4a_7c15);
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    })
}

#[cfg(test)]
#[path = "prompts_tests.rs"]
mod tests;
