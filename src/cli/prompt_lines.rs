//! One input line to one request: JSON keys, defaults, and what makes a single line fail alone.
//! Where lines come from is prompts.rs.

use crate::engine::Request;
use crate::engine::sampling::Sampling;
use crate::model::ModelSpec;
use crate::tokenizer::Tokenizer;
use serde::Deserialize;
use serde_json::Value;

/// What every line is read by.
#[derive(Clone, Copy)]
pub struct Rules<'a> {
    pub model: &'a ModelSpec,
    /// None where the model has none: prompts must be token ids then.
    pub tokenizer: Option<&'a Tokenizer>,
    /// For lines without `max_tokens`.
    pub gen_tokens: u32,
    /// For lines without `seed`, and for random prompts.
    pub seed: u64,
}

/// A line of input, good or bad.
#[derive(Clone, Debug)]
pub struct Line {
    /// 0-based input line.
    pub index: usize,
    pub result: Result<Request, LineError>,
}

/// Why a line cannot be generated from; the run goes on without it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LineError {
    pub message: String,
    pub code: &'static str,
}

/// `code` of lines that are not the JSON that is asked for.
pub const BAD_LINE: &str = "bad_line";
pub const BAD_VALUE: &str = "bad_value";
pub const EMPTY_PROMPT: &str = "empty_prompt";
pub const NO_TOKENIZER: &str = "no_tokenizer";
pub const BAD_TEXT: &str = "bad_text";
pub const UNKNOWN_TOKEN: &str = "unknown_token";
pub const TOO_LONG: &str = "prompt_too_long";
/// Good in itself, but more than the plan holds.
pub const DOES_NOT_FIT: &str = "does_not_fit";

/// How to get a tokenizer, wherever one is missed.
pub const TOKENIZER_REMEDY: &str = "copy vocab.json and merges.txt (or tokenizer.json) from the model's repository into its directory, or give token ids in a .jsonl file";

/// A line of a .jsonl file. Values are checked one by one, so that a message can name the key.
#[derive(Default, Deserialize)]
#[serde(deny_unknown_fields)]
struct JsonLine {
    prompt: Option<Value>,
    max_tokens: Option<Value>,
    temperature: Option<Value>,
    top_p: Option<Value>,
    top_k: Option<Value>,
    seed: Option<Value>,
}

impl Rules<'_> {
    /// A line that is the prompt itself.
    pub fn text_line(&self, index: usize, text: &str) -> Line {
        self.line(index, |rules| {
            if text.trim().is_empty() {
                let why = "the prompt is empty: write a text, or take the line out";
                return Err((EMPTY_PROMPT, why.to_owned()));
            }
            rules.request(rules.encode(text)?, &JsonLine::default())
        })
    }

    /// A line that is a JSON object.
    pub fn json_line(&self, index: usize, json: &str) -> Line {
        self.line(index, |rules| {
            if json.trim().is_empty() {
                let why = "it is empty: write {\"prompt\": …}, or take the line out";
                return Err((EMPTY_PROMPT, why.to_owned()));
            }
            // serde would take a list too, as the values in order.
            if !json.trim_start().starts_with('{') {
                return Err(bad_line("it is no JSON object"));
            }
            let line = serde_json::from_str::<JsonLine>(json).map_err(json_fault)?;
            let prompt = rules.prompt(line.prompt.as_ref())?;
            rules.request(prompt, &line)
        })
    }

    /// A line of token ids with every other value at its default.
    pub fn ids_line(&self, index: usize, prompt: Vec<u32>) -> Line {
        self.line(index, |rules| rules.request(prompt, &JsonLine::default()))
    }

    fn line(&self, index: usize, read: impl FnOnce(&Self) -> Result<Request, Fault>) -> Line {
        let numbered = |(code, why): Fault| LineError {
            message: format!("line {}: {why}", index + 1),
            code,
        };
        let result = read(self).map(|request| Request {
            line: index,
            ..request
        });
        Line {
            index,
            result: result.map_err(numbered),
        }
    }

    fn prompt(&self, value: Option<&Value>) -> Result<Vec<u32>, Fault> {
        match value {
            Some(Value::String(text)) => self.encode(text),
            Some(Value::Array(ids)) => ids.iter().map(|id| self.token_id(id)).collect(),
            Some(other) => Err((
                BAD_VALUE,
                format!(
                    "\"prompt\" is {}: write a text or a list of token ids",
                    short(other)
                ),
            )),
            None => Err((
                BAD_LINE,
                "it has no \"prompt\": write {\"prompt\": …}".to_owned(),
            )),
        }
    }

    fn encode(&self, text: &str) -> Result<Vec<u32>, Fault> {
        let Some(tokenizer) = self.tokenizer else {
            let why =
                format!("the prompt is text, but the model has no tokenizer: {TOKENIZER_REMEDY}");
            return Err((NO_TOKENIZER, why));
        };
        tokenizer
            .encode(text)
            .map_err(|e| (BAD_TEXT, e.to_string()))
    }

    fn token_id(&self, value: &Value) -> Result<u32, Fault> {
        let id = value.as_u64().and_then(|id| u32::try_from(id).ok());
        id.filter(|id| (*id as usize) < self.model.vocab)
            .ok_or_else(|| {
                let (name, last) = (&self.model.name, self.model.vocab.saturating_sub(1));
                let why = format!(
                    "{} is no token id of {name}: they go from 0 to {last}",
                    short(value)
                );
                (UNKNOWN_TOKEN, why)
            })
    }

    /// Limits and defaults. `line` and the engine agree on the last position: a prompt that fills all
    /// of them still gets one token.
    fn request(&self, prompt: Vec<u32>, line: &JsonLine) -> Result<Request, Fault> {
        let positions = self.model.positions;
        if prompt.is_empty() {
            let why = "the prompt has no tokens: give at least one";
            return Err((EMPTY_PROMPT, why.to_owned()));
        }
        if prompt.len() > positions {
            let (name, tokens) = (&self.model.name, prompt.len());
            let why = format!(
                "the prompt has {tokens} tokens, but {name} has {positions} positions: shorten it"
            );
            return Err((TOO_LONG, why));
        }
        let asked = whole("max_tokens", line.max_tokens.as_ref())?;
        let asked = asked.unwrap_or(self.gen_tokens.into());
        let room = self.model.room_after(prompt.len());
        Ok(Request {
            line: 0,
            max_tokens: usize::try_from(asked).map_or(room, |asked| asked.min(room)),
            sampling: self.sampling(line)?,
            prompt,
        })
    }

    fn sampling(&self, line: &JsonLine) -> Result<Sampling, Fault> {
        let temperature = number("temperature", line.temperature.as_ref())?;
        let top_p = number("top_p", line.top_p.as_ref())?;
        if temperature.is_some_and(|t| t < 0.0) {
            return Err(out_of_range(
                "temperature",
                line.temperature.as_ref(),
                "0 (greedy) or more",
            ));
        }
        if top_p.is_some_and(|p| p <= 0.0 || p > 1.0) {
            return Err(out_of_range(
                "top_p",
                line.top_p.as_ref(),
                "above 0 and at most 1",
            ));
        }
        let top_k = whole("top_k", line.top_k.as_ref())?.unwrap_or(0);
        Ok(Sampling {
            temperature: temperature.unwrap_or(0.0),
            top_k: usize::try_from(top_k).unwrap_or(usize::MAX),
            top_p: top_p.unwrap_or(1.0),
            seed: whole("seed", line.seed.as_ref())?.unwrap_or(self.seed),
        })
    }
}

/// A code and a reason that does not yet name the line.
type Fault = (&'static str, String);

fn json_fault(error: serde_json::Error) -> Fault {
    // A line of the file is the parser's only line: its own line number would mislead.
    // What it expects are names of this program's own, or the keys that are listed anyway.
    let text = error.to_string();
    let why = text.split(" at line ").next().unwrap_or(&text);
    let why = why.split(", expected").next().unwrap_or(why);
    bad_line(&format!("{why} (column {})", error.column()))
}

fn bad_line(why: &str) -> Fault {
    let known = "prompt, max_tokens, temperature, top_p, top_k, seed";
    (
        BAD_LINE,
        format!("{why}; a line is an object with these keys: {known}"),
    )
}

fn whole(key: &str, value: Option<&Value>) -> Result<Option<u64>, Fault> {
    let Some(value) = value else { return Ok(None) };
    let number = value.as_u64();
    number
        .map(Some)
        .ok_or_else(|| out_of_range(key, Some(value), "a whole number from 0 on"))
}

fn number(key: &str, value: Option<&Value>) -> Result<Option<f32>, Fault> {
    let Some(value) = value else { return Ok(None) };
    let number = value.as_f64().map(|n| n as f32).filter(|n| n.is_finite());
    number
        .map(Some)
        .ok_or_else(|| out_of_range(key, Some(value), "a number"))
}

fn out_of_range(key: &str, value: Option<&Value>, rule: &str) -> Fault {
    let shown = value.map_or(String::new(), short);
    (
        BAD_VALUE,
        format!("\"{key}\" is {shown}, but must be {rule}"),
    )
}

/// A value as far as a message can show it.
fn short(value: &Value) -> String {
    const MOST_CHARS: usize = 40;
    let text = value.to_string();
    match text.char_indices().nth(MOST_CHARS) {
        Some((end, _)) => format!("{}…", &text[..end]),
        None => text,
    }
}
