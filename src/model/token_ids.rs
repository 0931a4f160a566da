//! Special token ids as configuration files write them: one, several, null or negative ones for none.

use super::families::ModelError;
use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// An id that no vocabulary has: what a model without an end token never generates.
pub const NO_TOKEN: u32 = u32::MAX;

/// What one key of a configuration says.
#[derive(Deserialize)]
#[serde(untagged)]
pub enum TokenIds {
    One(i64),
    Several(Vec<i64>),
    None(()),
}

impl TokenIds {
    pub fn all(&self) -> Vec<u32> {
        let ids = match self {
            TokenIds::One(id) => std::slice::from_ref(id),
            TokenIds::Several(ids) => ids,
            TokenIds::None(()) => &[],
        };
        ids.iter().filter_map(|&id| id.try_into().ok()).collect()
    }

    pub fn first(&self) -> u32 {
        self.all().first().copied().unwrap_or(NO_TOKEN)
    }
}

/// As manifests have it, which are compared by what they say: one id is a number.
pub fn serialize<S: Serializer>(ids: &[u32], to: S) -> Result<S::Ok, S::Error> {
    match ids {
        [one] => one.serialize(to),
        several => several.serialize(to),
    }
}

pub fn deserialize<'de, D: Deserializer<'de>>(from: D) -> Result<Vec<u32>, D::Error> {
    TokenIds::deserialize(from).map(|ids| ids.all())
}

/// generation_config.json, which transformers' `generate` obeys before config.json.
#[derive(Deserialize)]
struct GenerationConfig {
    eos_token_id: Option<TokenIds>,
}

/// Where generation ends, if generation_config.json says so.
pub fn eos_ids_of_generation(json: &str) -> Result<Option<Vec<u32>>, ModelError> {
    let raw: GenerationConfig =
        serde_json::from_str(json).map_err(|e| ModelError::NotConfig(e.to_string()))?;
    Ok(raw.eos_token_id.map(|ids| ids.all()))
}

#[cfg(test)]
mod tests {
    use super::super::ModelSpec;
    use super::super::families::{config_json, named_size, spec_from_config};
    use super::*;

    #[test]
    fn end_tokens_may_be_one_several_or_none() {
        let config = config_json(&named_size("opt-125m").expect("known"));
        let ends = |value: &str| {
            let text = config.replace("\"eos_token_id\": 2", &format!("\"eos_token_id\": {value}"));
            let text = text.replace("\"pad_token_id\": 1", "\"pad_token_id\": -1");
            let spec = spec_from_config(&text, "opt").expect("legal");
            assert_eq!(spec.pad_id, NO_TOKEN);
            let again = spec_from_config(&config_json(&spec), "opt").expect("legal");
            assert_eq!(again.eos_ids, spec.eos_ids);
            spec.eos_ids
        };
        assert_eq!(ends("2"), [2]);
        assert_eq!(ends("[2, 50118]"), [2, 50118]);
        assert_eq!(ends("null"), [0; 0]);
        assert_eq!(ends("-1"), [0; 0]);
        let spec = named_size("opt-125m").expect("known");
        let text = serde_json::to_string(&spec).expect("JSON");
        assert!(text.contains("\"eos_id\":2"), "{text}");
        assert_eq!(
            serde_json::from_str::<ModelSpec>(&text).expect("itself"),
            spec
        );
        let said = |json| eos_ids_of_generation(json).expect("legal");
        assert_eq!(said("{\"eos_token_id\": [7, 9]}"), Some(vec![7, 9]));
        assert_eq!(said("{\"eos_token_id\": null, \"top_k\": 3}"), None);
        assert!(eos_ids_of_generation("[").is_err());
    }
}
