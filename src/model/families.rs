//! The only place that knows a family's name: config.json keys, named sizes and tensor names.
//! Written against OPT as transformers has it; nothing here opens a file or touches tensor bytes.

use super::token_ids::{NO_TOKEN, TokenIds};
use super::{Activation, Matrix, MatrixKind, ModelSpec, POSITION_OFFSET, Small, SmallKind};
use crate::dtype::Dtype;
use serde::Deserialize;
use thiserror::Error;

/// Why a configuration describes no model that can be run.
#[derive(Debug, Error, PartialEq)]
pub enum ModelError {
    #[error("config.json is not a model's configuration ({0}): download the file again")]
    NotConfig(String),
    #[error(
        "architecture \"{0}\" is not supported: use an OPT, OPT-IML or Galactica checkpoint (OPTForCausalLM or OPTModel)"
    )]
    Architecture(String),
    #[error(
        "activation_function \"{0}\" is not supported: OPT checkpoints have \"relu\" or \"gelu\""
    )]
    Activation(String),
    #[error(
        "torch_dtype \"{0}\" is not supported: convert the checkpoint to float16, bfloat16 or float32"
    )]
    Dtype(String),
    #[error(
        "the checkpoint is quantised ({0}): use the float16 checkpoint, 4-bit is made from it with --compress weights"
    )]
    Quantised(String),
    #[error(
        "{key} = {value} is out of range (1 to {most}): the configuration is damaged, download it again"
    )]
    OutOfRange {
        key: &'static str,
        value: u64,
        most: u64,
    },
    #[error(
        "hidden_size {hidden} is not a multiple of num_attention_heads {heads}: the configuration is damaged, download it again"
    )]
    Heads { hidden: usize, heads: usize },
    #[error(
        "the configuration asks for {0} parameters, more than any OPT model has: it is damaged, download it again"
    )]
    TooLarge(u128),
}

/// Most that any key may say: far above every real model, low enough that no product overflows.
const MOST_PARAMETERS: u128 = 1 << 43;
const MOST_LAYERS: u64 = 1 << 12;
const MOST_WIDTH: u64 = 1 << 20;
const MOST_VOCAB: u64 = 1 << 24;

/// config.json as OPTConfig reads it, with its defaults. Keys without influence are ignored.
#[derive(Deserialize)]
struct RawConfig {
    model_type: Option<String>,
    architectures: Option<Vec<String>>,
    quantization_config: Option<serde_json::Value>,
    #[serde(default = "default_vocab")]
    vocab_size: u64,
    #[serde(default = "default_hidden")]
    hidden_size: u64,
    #[serde(default = "default_twelve")]
    num_hidden_layers: u64,
    #[serde(default = "default_ffn")]
    ffn_dim: u64,
    #[serde(default = "default_positions")]
    max_position_embeddings: u64,
    #[serde(default = "yes")]
    do_layer_norm_before: bool,
    #[serde(default, rename = "_remove_final_layer_norm")]
    remove_final_layer_norm: bool,
    word_embed_proj_dim: Option<u64>,
    #[serde(default = "default_twelve")]
    num_attention_heads: u64,
    #[serde(default = "default_activation")]
    activation_function: String,
    #[serde(default = "default_pad")]
    pad_token_id: TokenIds,
    #[serde(default = "default_bos_eos")]
    bos_token_id: TokenIds,
    #[serde(default = "default_bos_eos")]
    eos_token_id: TokenIds,
    #[serde(default = "yes")]
    enable_bias: bool,
    #[serde(default = "yes")]
    layer_norm_elementwise_affine: bool,
    #[serde(default = "yes")]
    tie_word_embeddings: bool,
    torch_dtype: Option<String>,
    dtype: Option<String>,
}

fn yes() -> bool {
    true
}
fn default_vocab() -> u64 {
    50272
}
fn default_hidden() -> u64 {
    768
}
fn default_twelve() -> u64 {
    12
}
fn default_ffn() -> u64 {
    3072
}
fn default_positions() -> u64 {
    2048
}
fn default_activation() -> String {
    "relu".to_owned()
}
fn default_pad() -> TokenIds {
    TokenIds::One(1)
}
fn default_bos_eos() -> TokenIds {
    TokenIds::One(2)
}

/// Reads config.json. `name` becomes the spec's name; a missing dtype counts as f16 until the
/// checkpoint's tensors say otherwise.
pub fn spec_from_config(json: &str, name: &str) -> Result<ModelSpec, ModelError> {
    let raw: RawConfig =
        serde_json::from_str(json).map_err(|e| ModelError::NotConfig(e.to_string()))?;
    check_architecture(&raw)?;
    let spec = ModelSpec {
        name: name.to_owned(),
        layers: raw.num_hidden_layers as usize,
        hidden: raw.hidden_size as usize,
        heads: raw.num_attention_heads as usize,
        ffn: raw.ffn_dim as usize,
        vocab: raw.vocab_size as usize,
        positions: raw.max_position_embeddings as usize,
        embed_width: raw.word_embed_proj_dim.unwrap_or(raw.hidden_size) as usize,
        pre_norm: raw.do_layer_norm_before,
        final_norm: raw.do_layer_norm_before && !raw.remove_final_layer_norm,
        bias: raw.enable_bias,
        norm_affine: raw.layer_norm_elementwise_affine,
        activation: activation_named(&raw.activation_function)?,
        tied_head: raw.tie_word_embeddings,
        dtype: dtype_named(raw.torch_dtype.as_deref().or(raw.dtype.as_deref()))?,
        pad_id: raw.pad_token_id.first(),
        bos_id: raw.bos_token_id.first(),
        eos_ids: raw.eos_token_id.all(),
    };
    check_spec(&spec)?;
    Ok(spec)
}

/// A quantised or differently headed OPT has other tensors: better refused here than half read.
fn check_architecture(raw: &RawConfig) -> Result<(), ModelError> {
    let known = |name: &String| matches!(name.as_str(), "OPTForCausalLM" | "OPTModel");
    let heads = raw.architectures.as_deref().unwrap_or(&[]);
    if let Some(other) = heads.iter().find(|name| !known(name)) {
        return Err(ModelError::Architecture(other.clone()));
    }
    match raw.model_type.as_deref() {
        Some("opt") => {}
        None if !heads.is_empty() => {}
        other => {
            return Err(ModelError::Architecture(
                other.unwrap_or("none named").to_owned(),
            ));
        }
    }
    let Some(quantised) = &raw.quantization_config else {
        return Ok(());
    };
    let method = quantised.get("quant_method").and_then(|m| m.as_str());
    Err(ModelError::Quantised(
        method.unwrap_or("quantization_config").to_owned(),
    ))
}

fn activation_named(name: &str) -> Result<Activation, ModelError> {
    match name {
        "relu" => Ok(Activation::Relu),
        "gelu" => Ok(Activation::Gelu),
        _ => Err(ModelError::Activation(name.to_owned())),
    }
}

fn dtype_named(name: Option<&str>) -> Result<Dtype, ModelError> {
    match name.map(|n| n.trim_start_matches("torch.")) {
        None | Some("float16" | "half" | "auto") => Ok(Dtype::F16),
        Some("bfloat16") => Ok(Dtype::Bf16),
        Some("float32" | "float") => Ok(Dtype::F32),
        Some(other) => Err(ModelError::Dtype(other.to_owned())),
    }
}

/// Checks that a spec's sizes are usable: bounded, not zero, consistent, no product that overflows.
pub fn check_spec(spec: &ModelSpec) -> Result<(), ModelError> {
    let bounds = [
        ("num_hidden_layers", spec.layers, MOST_LAYERS),
        ("hidden_size", spec.hidden, MOST_WIDTH),
        ("num_attention_heads", spec.heads, MOST_WIDTH),
        ("ffn_dim", spec.ffn, MOST_WIDTH),
        ("vocab_size", spec.vocab, MOST_VOCAB),
        ("max_position_embeddings", spec.positions, MOST_WIDTH),
        ("word_embed_proj_dim", spec.embed_width, MOST_WIDTH),
    ];
    for (key, value, most) in bounds {
        let value = value as u64;
        if value == 0 || value > most {
            return Err(ModelError::OutOfRange { key, value, most });
        }
    }
    if !spec.hidden.is_multiple_of(spec.heads) {
        let (hidden, heads) = (spec.hidden, spec.heads);
        return Err(ModelError::Heads { hidden, heads });
    }
    if spec.dtype == Dtype::Q4 {
        return Err(ModelError::Dtype("q4".to_owned()));
    }
    let wide = |n: usize| n as u128;
    let layer = 4 * wide(spec.hidden).pow(2) + 2 * wide(spec.hidden) * wide(spec.ffn);
    let tables = (2 * wide(spec.vocab) + 2 * wide(spec.hidden)) * wide(spec.embed_width)
        + wide(spec.positions) * wide(spec.hidden);
    match wide(spec.layers) * layer + tables {
        total if total > MOST_PARAMETERS => Err(ModelError::TooLarge(total)),
        _ => Ok(()),
    }
}

/// The keys of config.json that `spec_from_config` reads back to the same spec.
pub fn config_json(spec: &ModelSpec) -> String {
    let id = |id: u32| (id != NO_TOKEN).then_some(id);
    let dtype = match spec.dtype {
        Dtype::F32 => "float32",
        Dtype::Bf16 => "bfloat16",
        Dtype::F16 | Dtype::Q4 => "float16",
    };
    let json = serde_json::json!({
        "_name_or_path": spec.name, "architectures": ["OPTForCausalLM"], "model_type": "opt",
        "vocab_size": spec.vocab, "hidden_size": spec.hidden, "num_hidden_layers": spec.layers,
        "num_attention_heads": spec.heads, "ffn_dim": spec.ffn,
        "max_position_embeddings": spec.positions, "word_embed_proj_dim": spec.embed_width,
        "do_layer_norm_before": spec.pre_norm,
        "_remove_final_layer_norm": spec.pre_norm && !spec.final_norm,
        "enable_bias": spec.bias, "layer_norm_elementwise_affine": spec.norm_affine,
        "activation_function": match spec.activation { Activation::Relu => "relu", Activation::Gelu => "gelu" },
        "tie_word_embeddings": spec.tied_head, "torch_dtype": dtype,
        "pad_token_id": id(spec.pad_id), "bos_token_id": id(spec.bos_id), "eos_token_id": match &spec.eos_ids[..] {
            [] => serde_json::Value::Null,
            [one] => (*one).into(),
            several => several.into(),
        },
        "dropout": 0.1, "attention_dropout": 0.0, "init_std": 0.02, "layerdrop": 0.0, "use_cache": true,
    });
    format!("{json:#}\n")
}

/// Published sizes: layers, hidden, heads; ffn is four times hidden.
const SIZES: [(&str, usize, usize, usize); 10] = [
    ("125m", 12, 768, 12),
    ("350m", 24, 1024, 16),
    ("1.3b", 24, 2048, 32),
    ("2.7b", 32, 2560, 32),
    ("6.7b", 32, 4096, 32),
    ("13b", 40, 5120, 40),
    ("30b", 48, 7168, 56),
    ("66b", 64, 9216, 72),
    ("120b", 96, 10240, 80),
    ("175b", 96, 12288, 96),
];

/// Families and the sizes that each was published in.
const FAMILIES: [(&str, &[&str]); 4] = [
    ("opt-iml-max-", &["1.3b", "30b"]),
    ("opt-iml-", &["1.3b", "30b"]),
    ("galactica-", &["125m", "1.3b", "6.7b", "30b", "120b"]),
    (
        "opt-",
        &[
            "125m", "350m", "1.3b", "2.7b", "6.7b", "13b", "30b", "66b", "175b",
        ],
    ),
];

/// Every name that `named_size` knows.
pub fn size_names() -> Vec<String> {
    let named = |(family, sizes): &(&str, &[&str])| -> Vec<String> {
        sizes.iter().map(|size| format!("{family}{size}")).collect()
    };
    FAMILIES.iter().rev().flat_map(named).collect()
}

/// The model that a name stands for: "opt-1.3b", "facebook/galactica-30b", "OPT-IML-max-1.3B".
pub fn named_size(name: &str) -> Option<ModelSpec> {
    let lower = name.to_ascii_lowercase();
    let lower = lower.strip_prefix("facebook/").unwrap_or(&lower);
    let (family, size) = FAMILIES.iter().find_map(|(family, sizes)| {
        let size = lower.strip_prefix(family)?;
        sizes.contains(&size).then_some((*family, size))
    })?;
    let (_, layers, hidden, heads) = SIZES.iter().find(|entry| entry.0 == size)?;
    let galactica = family == "galactica-";
    // The one post-norm model of the family, and the one with a narrower embedding.
    let odd = family == "opt-" && size == "350m";
    Some(ModelSpec {
        name: lower.to_owned(),
        layers: *layers,
        hidden: *hidden,
        heads: *heads,
        ffn: 4 * hidden,
        vocab: if galactica { 50000 } else { 50272 },
        positions: 2048,
        embed_width: if odd { 512 } else { *hidden },
        pre_norm: !odd,
        final_norm: !odd,
        bias: !galactica,
        norm_affine: true,
        activation: if galactica {
            Activation::Gelu
        } else {
            Activation::Relu
        },
        tied_head: true,
        dtype: Dtype::F16,
        pad_id: 1,
        bos_id: if galactica { 0 } else { 2 },
        eos_ids: vec![2],
    })
}

/// One tensor of a checkpoint: the names it may have, best first, and the shape it must have.
#[derive(Clone, Debug, PartialEq)]
pub struct TensorChoice {
    pub names: Vec<String>,
    pub shape: Vec<usize>,
}

/// Where the decoder's tensors may hang: OPTForCausalLM, OPTModel, a bare decoder.
const PREFIXES: [&str; 3] = ["model.decoder.", "decoder.", ""];

fn choice(tail: &str, shape: &[usize]) -> TensorChoice {
    let names = PREFIXES.iter().map(|p| format!("{p}{tail}")).collect();
    let shape = shape.to_vec();
    TensorChoice { names, shape }
}

/// The tensors that make up a matrix, stacked along its rows.
pub fn matrix_tensors(spec: &ModelSpec, matrix: &Matrix) -> Vec<TensorChoice> {
    let shape = [matrix.rows, matrix.inputs];
    let layer = |tail: &str| format!("layers.{}.{tail}.weight", matrix.stage.saturating_sub(1));
    match matrix.kind {
        MatrixKind::Embedding => vec![choice("embed_tokens.weight", &shape)],
        MatrixKind::ProjectIn => vec![choice("project_in.weight", &shape)],
        MatrixKind::ProjectOut => vec![choice("project_out.weight", &shape)],
        MatrixKind::AttentionOut => vec![choice(&layer("self_attn.out_proj"), &shape)],
        MatrixKind::Fc1 => vec![choice(&layer("fc1"), &shape)],
        MatrixKind::Fc2 => vec![choice(&layer("fc2"), &shape)],
        MatrixKind::Qkv => ["q", "k", "v"]
            .map(|part| {
                let tail = layer(&format!("self_attn.{part}_proj"));
                choice(&tail, &[matrix.rows / 3, matrix.inputs])
            })
            .to_vec(),
        MatrixKind::Head => vec![head_choice(spec, &shape)],
    }
}

/// A tied head is the embedding; its own name counts only where the embedding's is absent.
fn head_choice(spec: &ModelSpec, shape: &[usize]) -> TensorChoice {
    let mut head = choice("embed_tokens.weight", shape);
    if !spec.tied_head {
        head.names.clear();
    }
    head.names.push("lm_head.weight".to_owned());
    head
}

/// The tensors that make up a small tensor, one after the other.
pub fn small_tensors(spec: &ModelSpec, small: &Small) -> Vec<TensorChoice> {
    let layer = |tail: &str| {
        let name = format!("layers.{}.{tail}", small.stage.saturating_sub(1));
        vec![choice(&name, &[small.elements])]
    };
    match small.kind {
        SmallKind::Positions => {
            let shape = [spec.positions + POSITION_OFFSET, spec.hidden];
            vec![choice("embed_positions.weight", &shape)]
        }
        SmallKind::QkvBias => ["q", "k", "v"]
            .iter()
            .flat_map(|part| layer(&format!("self_attn.{part}_proj.bias")))
            .map(|part| TensorChoice {
                shape: vec![small.elements / 3],
                ..part
            })
            .collect(),
        SmallKind::AttentionOutBias => layer("self_attn.out_proj.bias"),
        SmallKind::Fc1Bias => layer("fc1.bias"),
        SmallKind::Fc2Bias => layer("fc2.bias"),
        SmallKind::AttentionNormWeight => layer("self_attn_layer_norm.weight"),
        SmallKind::AttentionNormBias => layer("self_attn_layer_norm.bias"),
        SmallKind::FfnNormWeight => layer("final_layer_norm.weight"),
        SmallKind::FfnNormBias => layer("final_layer_norm.bias"),
        SmallKind::FinalNormWeight => vec![choice("final_layer_norm.weight", &[small.elements])],
        SmallKind::FinalNormBias => vec![choice("final_layer_norm.bias", &[small.elements])],
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn named_sizes_have_the_published_parameters() {
        // Embedding, positions and decoder of the published checkpoints, in parameters.
        for (name, parameters) in [
            ("opt-125m", 125_239_296),
            ("opt-350m", 331_196_416),
            ("facebook/opt-1.3b", 1_315_758_080),
            ("opt-2.7b", 2_651_596_800),
            ("OPT-6.7B", 6_658_473_984),
        ] {
            assert_eq!(
                named_size(name).map(|s| s.parameters()),
                Some(parameters),
                "{name}"
            );
        }
        assert_eq!(named_size("galactica-120b").map(|s| s.heads), Some(80));
        assert_eq!(named_size("opt-iml-max-30b").map(|s| s.layers), Some(48));
        assert_eq!(named_size("opt-120b"), None);
        assert_eq!(named_size("gpt2"), None);
        assert_eq!(size_names().len(), 18);
    }

    #[test]
    fn configurations_round_trip() {
        for name in size_names() {
            let spec = named_size(&name).expect("a listed name");
            assert_eq!(check_spec(&spec), Ok(()));
            assert_eq!(spec_from_config(&config_json(&spec), &name), Ok(spec));
        }
    }

    #[test]
    fn defaults_are_those_of_opt_config() {
        let spec = spec_from_config(r#"{"model_type": "opt"}"#, "opt-125m").expect("defaults");
        assert_eq!(Some(spec), named_size("opt-125m"));
        let removed = r#"{"architectures": ["OPTModel"], "_remove_final_layer_norm": true, "torch_dtype": "bfloat16"}"#;
        let spec = spec_from_config(removed, "x").expect("valid");
        assert!(!spec.has_final_norm() && spec.dtype == Dtype::Bf16);
    }

    #[test]
    fn what_is_not_opt_is_refused_by_name() {
        let message = |json: &str| spec_from_config(json, "x").expect_err(json).to_string();
        let opt = |keys: &str| message(&format!(r#"{{"model_type": "opt", {keys}}}"#));
        assert!(message(r#"{"model_type": "llama"}"#).contains("\"llama\""));
        assert!(message("{}").contains("none named"));
        assert!(message("[").contains("download"));
        assert!(opt(r#""architectures": ["OPTForSequenceClassification"]"#).contains("Sequence"));
        assert!(opt(r#""activation_function": "gelu_new""#).contains("gelu_new"));
        assert!(opt(r#""torch_dtype": "float64""#).contains("float64"));
        assert!(opt(r#""quantization_config": {"quant_method": "gptq"}"#).contains("gptq"));
        assert!(opt(r#""num_attention_heads": 7"#).contains("multiple"));
        assert!(opt(r#""num_hidden_layers": 0"#).contains("num_hidden_layers = 0"));
        assert!(opt(r#""hidden_size": 18446744073709551615"#).contains("hidden_size"));
        assert!(opt(r#""hidden_size": -1"#).contains("-1"));
        let large =
            r#""hidden_size": 1048576, "num_attention_heads": 1, "num_hidden_layers": 4096"#;
        assert!(opt(large).contains("parameters"));
    }

    #[test]
    fn tied_heads_prefer_the_embedding() {
        let mut spec = named_size("opt-125m").expect("known");
        let head = |spec: &ModelSpec| {
            let matrix = *spec.matrices().last().expect("a head");
            matrix_tensors(spec, &matrix).remove(0).names
        };
        assert_eq!(head(&spec)[0], "model.decoder.embed_tokens.weight");
        assert_eq!(head(&spec)[3], "lm_head.weight");
        spec.tied_head = false;
        assert_eq!(head(&spec), ["lm_head.weight"]);
    }
}
