//! Text to token ids and back: OPT's byte-level BPE from vocab.json and merges.txt, any
//! tokenizer.json, or plain bytes for models that were never trained. Knows nothing of models.

use serde::Deserialize;
use serde::de::DeserializeOwned;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use thiserror::Error;
use tokenizers::models::bpe::BPE;
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::processors::template::TemplateProcessing;
use tokenizers::{AddedToken, Tokenizer as Bpe};

/// Why text and ids do not go together.
#[derive(Debug, Error)]
pub enum TokenizerError {
    #[error("{}: no tokenizer here (tokenizer.json, or vocab.json and merges.txt): copy them from the model's repository or give prompts as token ids", .0.display())]
    None(PathBuf),
    #[error("{path}: not a tokenizer ({cause}): download the file again", path = path.display())]
    Damaged { path: PathBuf, cause: String },
    #[error(
        "text has token id {id} but the model's vocabulary has {vocab}: the tokenizer belongs to another model"
    )]
    Beyond { id: u32, vocab: usize },
    #[error(
        "a text of {bytes} bytes is longer than any prompt that fits a model: cut it or give several"
    )]
    TooLong { bytes: usize },
    #[error("text could not be tokenized ({0}): give the prompt as token ids")]
    Text(String),
}

/// Put in front of every text; also where generation ends.
const START: (&str, u32) = ("</s>", 2);
/// fairseq's numbering of the special tokens.
const SPECIALS: [&str; 4] = ["<s>", "<pad>", "</s>", "<unk>"];
/// Of these, what OPT's tokenizer recognises inside text.
const IN_TEXT: [(&str, u32); 2] = [("<pad>", 1), START];
/// Largest tokenizer file that is read; published ones stay below 20 MiB.
const MOST_FILE_BYTES: u64 = 64 << 20;

/// Longest text that is encoded: far above 2048 tokens, and what encoding takes beside it (about
/// 200 bytes a byte) stays bounded.
const MOST_TEXT_BYTES: usize = 256 << 10;

/// Encodes and decodes; ids stay below the model's vocabulary.
pub struct Tokenizer {
    kind: Kind,
    vocab: usize,
    held_bytes: u64,
}

enum Kind {
    Bpe(Box<Bpe>),
    Bytes(Box<ByteTable>),
}

impl Tokenizer {
    /// The tokenizer of a checkpoint directory for a model with `vocab` ids.
    pub fn open(dir: &Path, vocab: usize) -> Result<Tokenizer, TokenizerError> {
        let whole = dir.join("tokenizer.json");
        let (words, merges) = (dir.join("vocab.json"), dir.join("merges.txt"));
        let (bpe, files) = if whole.is_file() {
            check_size(&whole)?;
            let mut bpe = Bpe::from_file(&whole).map_err(|e| damaged(&whole, e))?;
            // What its last user had asked for: prompts are neither cut nor filled up.
            bpe.with_padding(None);
            bpe.with_truncation(None).map_err(|e| damaged(&whole, e))?;
            (bpe, vec![whole])
        } else if words.is_file() && merges.is_file() {
            check_size(&words)?;
            check_size(&merges)?;
            let more = MoreTokens::read(dir)?;
            (
                opt_tokenizer((&words, &merges), &more)?,
                vec![words, merges],
            )
        } else {
            return Err(TokenizerError::None(dir.to_owned()));
        };
        Ok(Tokenizer {
            held_bytes: estimate_held(&bpe, &files),
            kind: Kind::Bpe(Box::new(bpe)),
            vocab,
        })
    }

    /// Every byte is a token: for models with random weights.
    pub fn byte_level(vocab: usize) -> Tokenizer {
        Tokenizer {
            kind: Kind::Bytes(Box::new(ByteTable::new())),
            vocab,
            held_bytes: size_of::<ByteTable>() as u64,
        }
    }

    /// Ids of a text, with what the model expects in front.
    pub fn encode(&self, text: &str) -> Result<Vec<u32>, TokenizerError> {
        if text.len() > MOST_TEXT_BYTES {
            return Err(TokenizerError::TooLong { bytes: text.len() });
        }
        let ids = match &self.kind {
            Kind::Bytes(table) => table.encode(text),
            Kind::Bpe(bpe) => {
                let encoded = bpe.encode_fast(text, true);
                encoded
                    .map_err(|e| TokenizerError::Text(e.to_string()))?
                    .get_ids()
                    .to_vec()
            }
        };
        self.check(&ids)?;
        Ok(ids)
    }

    /// Text of generated ids, special tokens left out; ids that stand for nothing add nothing.
    pub fn decode(&self, ids: &[u32]) -> Result<String, TokenizerError> {
        self.check(ids)?;
        match &self.kind {
            Kind::Bytes(table) => Ok(table.decode(ids)),
            Kind::Bpe(bpe) => bpe
                .decode(ids, true)
                .map_err(|e| TokenizerError::Text(e.to_string())),
        }
    }

    fn check(&self, ids: &[u32]) -> Result<(), TokenizerError> {
        let vocab = self.vocab;
        match ids.iter().find(|&&id| id as usize >= vocab) {
            Some(&id) => Err(TokenizerError::Beyond { id, vocab }),
            None => Ok(()),
        }
    }

    /// Memory that it holds, an upper estimate.
    pub fn held_bytes(&self) -> u64 {
        self.held_bytes
    }
}

fn damaged(path: &Path, cause: impl std::fmt::Display) -> TokenizerError {
    TokenizerError::Damaged {
        path: path.to_owned(),
        cause: cause.to_string(),
    }
}

fn check_size(path: &Path) -> Result<(), TokenizerError> {
    match std::fs::metadata(path) {
        Ok(meta) if meta.len() <= MOST_FILE_BYTES => Ok(()),
        Ok(meta) => Err(damaged(path, format!("it has {} bytes", meta.len()))),
        Err(e) => Err(damaged(path, e)),
    }
}

/// What stands beside vocab.json and merges.txt where a model was trained further with more tokens or other settings.
struct MoreTokens {
    /// Tokens beyond vocab.json by id, and whether text leaves them out.
    tokens: BTreeMap<u32, (String, bool)>,
    starts: bool,
}

/// tokenizer_config.json; every other key is nothing to us.
#[derive(Default, Deserialize)]
struct TokenizerConfig {
    add_bos_token: Option<bool>,
    #[serde(default)]
    added_tokens_decoder: BTreeMap<u32, DecodedToken>,
}

#[derive(Deserialize)]
struct DecodedToken {
    content: String,
    #[serde(default)]
    special: bool,
}

impl MoreTokens {
    fn read(dir: &Path) -> Result<MoreTokens, TokenizerError> {
        let config: TokenizerConfig = read_if_there(&dir.join("tokenizer_config.json"))?;
        let added: BTreeMap<String, u32> = read_if_there(&dir.join("added_tokens.json"))?;
        let plain = added.into_iter().map(|(token, id)| (id, (token, false)));
        let decoded = config.added_tokens_decoder.into_iter();
        let named = decoded.map(|(id, token)| (id, (token.content, token.special)));
        Ok(MoreTokens {
            tokens: plain.chain(named).collect(),
            starts: config.add_bos_token.unwrap_or(true),
        })
    }

    /// Those that vocab.json has keep their ids, the others must come right behind it.
    fn add_to(&self, bpe: &mut Bpe, words: &Path) -> Result<(), TokenizerError> {
        for (&id, (token, special)) in &self.tokens {
            // OPT's own are what they are, whatever a file says of them.
            if SPECIALS.contains(&token.as_str()) {
                continue;
            }
            let added = AddedToken::from(token.as_str(), *special);
            let added = match special {
                true => bpe.add_special_tokens([added]),
                false => bpe.add_tokens([added]),
            };
            added.map_err(|e| damaged(words, e))?;
            if bpe.token_to_id(token) != Some(id) {
                let why = format!("the added token {token:?} has not the id {id} after it");
                return Err(damaged(words, why));
            }
        }
        Ok(())
    }
}

fn read_if_there<T: DeserializeOwned + Default>(path: &Path) -> Result<T, TokenizerError> {
    if !path.is_file() {
        return Ok(T::default());
    }
    check_size(path)?;
    let text = std::fs::read(path).map_err(|e| damaged(path, e))?;
    serde_json::from_slice(&text).map_err(|e| damaged(path, e))
}

/// What transformers' GPT2Tokenizer does with OPT's settings.
fn opt_tokenizer(
    (words, merges): (&Path, &Path),
    more: &MoreTokens,
) -> Result<Bpe, TokenizerError> {
    let name = |path: &Path| path.to_string_lossy().into_owned();
    let model = BPE::from_file(&name(words), &name(merges)).build();
    let mut bpe = Bpe::new(model.map_err(|e| damaged(words, e))?);
    for (token, id) in IN_TEXT {
        if bpe.token_to_id(token) != Some(id) {
            return Err(damaged(
                words,
                format!("it does not give {token} the id {id}"),
            ));
        }
    }
    bpe.with_pre_tokenizer(Some(ByteLevel::new(false, true, true)));
    bpe.with_decoder(Some(ByteLevel::default()));
    let added = bpe.add_special_tokens(IN_TEXT.map(|(token, _)| AddedToken::from(token, true)));
    added.map_err(|e| damaged(words, e))?;
    more.add_to(&mut bpe, words)?;
    if !more.starts {
        return Ok(bpe);
    }
    let (token, id) = START;
    let template = TemplateProcessing::builder()
        .try_single(format!("{token} $A"))
        .map_err(|e| damaged(words, e))?
        .special_tokens(vec![(token, id)])
        .build()
        .map_err(|e| damaged(words, e))?;
    bpe.with_post_processor(Some(template));
    Ok(bpe)
}

/// Vocabulary both ways, merges, cache and patterns.
fn estimate_held(bpe: &Bpe, files: &[PathBuf]) -> u64 {
    let length = |path: &PathBuf| std::fs::metadata(path).map_or(0, |meta| meta.len());
    let files_bytes: u64 = files.iter().map(length).sum();
    // Measured with 50 265 tokens: 13 MiB resident after loading, 15 at its peak; the cache of
    // words comes with use.
    const PER_TOKEN_BYTES: u64 = 200;
    const CACHE_BYTES: u64 = 4 << 20;
    bpe.get_vocab_size(true) as u64 * PER_TOKEN_BYTES + 2 * files_bytes + CACHE_BYTES
}

/// Bytes to ids in the order in which byte-level vocabularies list them.
struct ByteTable {
    id_of: [u32; 256],
    byte_of: [u8; 256],
}

impl ByteTable {
    fn new() -> ByteTable {
        let mut table = ByteTable {
            id_of: [0; 256],
            byte_of: [0; 256],
        };
        for (index, byte) in byte_order().enumerate() {
            table.id_of[usize::from(byte)] = (SPECIALS.len() + index) as u32;
            table.byte_of[index] = byte;
        }
        table
    }

    fn encode(&self, text: &str) -> Vec<u32> {
        let mut ids = vec![START.1];
        let mut rest = text;
        while !rest.is_empty() {
            let special = IN_TEXT.iter().find(|(token, _)| rest.starts_with(token));
            match special {
                Some((token, id)) => {
                    ids.push(*id);
                    rest = &rest[token.len()..];
                }
                None => {
                    let end = rest.ceil_char_boundary(1);
                    let bytes = rest.as_bytes()[..end].iter();
                    ids.extend(bytes.map(|b| self.id_of[usize::from(*b)]));
                    rest = &rest[end..];
                }
            }
        }
        ids
    }

    fn decode(&self, ids: &[u32]) -> String {
        let mut bytes = Vec::with_capacity(ids.len());
        for &id in ids {
            match (id as usize).checked_sub(SPECIALS.len()) {
                Some(index) if index < 256 => bytes.push(self.byte_of[index]),
                Some(_) => bytes.extend(filler(id).as_bytes()),
                None if SPECIALS[id as usize] == "<s>" || SPECIALS[id as usize] == "<unk>" => {
                    bytes.extend(SPECIALS[id as usize].as_bytes());
                }
                None => {}
            }
        }
        String::from_utf8_lossy(&bytes).into_owned()
    }
}

/// GPT-2's order of bytes: first those that are visible characters in Latin-1, then the others.
fn byte_order() -> impl Iterator<Item = u8> {
    let visible = |b: &u8| matches!(b, 33..=126 | 161..=172 | 174..=255);
    let hidden = move |b: &u8| !visible(b);
    (0..=255).filter(visible).chain((0..=255).filter(hidden))
}

/// Text of an id that no byte has: never met in text, readable in output.
fn filler(id: u32) -> String {
    format!(" w{id}")
}

/// vocab.json and merges.txt of the byte-level tokenizer for a vocabulary of `vocab` ids.
pub fn byte_level_files(vocab: usize) -> (String, String) {
    let mut names: Vec<String> = SPECIALS.map(str::to_owned).to_vec();
    let mut hidden = 256;
    for byte in byte_order() {
        let visible = matches!(byte, 33..=126 | 161..=172 | 174..=255);
        // Bytes without a character of their own are written as those from 256 on.
        let code = if visible { u32::from(byte) } else { hidden };
        hidden += u32::from(!visible);
        names.extend(char::from_u32(code).map(String::from));
    }
    let fillers = (names.len()..vocab).map(|id| filler(id as u32).replace(' ', "\u{120}"));
    names.extend(fillers.collect::<Vec<_>>());
    let ids = names.into_iter().take(vocab).enumerate();
    let map = ids.map(|(id, name)| (name, id.into())).collect();
    let json = serde_json::Value::Object(map).to_string();
    (json, "#version: 0.2\n".to_owned())
}
