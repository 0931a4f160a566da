//! What `--model` may say: a directory, an id in the local hub cache, or `synth:SIZE`.
//! Looks only at this machine's files; nothing is downloaded.

use super::open::read_config;
use super::{Checkpoint, CheckpointError, SynthSource, WeightSource};
use crate::model::ModelSpec;
use crate::model::families::{named_size, size_names};
use std::path::{Path, PathBuf};

/// Where a model's weights are.
#[derive(Clone, Debug, PartialEq)]
pub enum ModelLocation {
    /// A directory in Hugging Face layout, and the name to call the model by.
    Directory { dir: PathBuf, name: String },
    /// Random weights of a named size.
    Synth(ModelSpec),
}

impl ModelLocation {
    /// The weights; `seed` is that of random ones.
    pub fn open(&self, seed: u64) -> Result<Box<dyn WeightSource>, CheckpointError> {
        Ok(match self {
            ModelLocation::Directory { dir, name } => Box::new(Checkpoint::open_as(dir, name)?),
            ModelLocation::Synth(spec) => Box::new(SynthSource::new(spec.clone(), seed)),
        })
    }

    /// The sizes alone, from config.json: enough to plan with where weights are not there yet.
    pub fn spec(&self) -> Result<ModelSpec, CheckpointError> {
        match self {
            ModelLocation::Directory { dir, name } => Ok(read_config(dir, name)?.0),
            ModelLocation::Synth(spec) => Ok(spec.clone()),
        }
    }
}

/// Finds a model by what the user called it. `hf_home` overrides `HF_HOME` and the default cache.
pub fn find_model(arg: &str, hf_home: Option<&Path>) -> Result<ModelLocation, CheckpointError> {
    if let Some(size) = arg.strip_prefix("synth:") {
        let spec = named_size(size).ok_or_else(|| CheckpointError::UnknownSize {
            name: size.to_owned(),
            known: size_names().join(", "),
        })?;
        return Ok(ModelLocation::Synth(spec));
    }
    let dir = Path::new(arg);
    if dir.is_dir() {
        let named = dir.canonicalize().ok();
        let name = named.as_deref().unwrap_or(dir).file_name();
        let name = name.map_or("model".to_owned(), |n| n.to_string_lossy().into_owned());
        let dir = dir.to_owned();
        return Ok(ModelLocation::Directory { dir, name });
    }
    if dir.is_file() {
        return Err(CheckpointError::NotADirectory(dir.to_owned()));
    }
    let hub = hub_dir(hf_home);
    let not_found = |name: &str| CheckpointError::NotFound {
        name: name.to_owned(),
        looked: hub.display().to_string(),
        size: size_of_name(name).to_owned(),
    };
    // "opt-1.3b" alone means the one that facebook published.
    let id = match named_size(arg) {
        Some(_) if !arg.contains('/') => format!("facebook/{arg}"),
        _ => arg.to_owned(),
    };
    if !is_hub_id(&id) {
        return Err(CheckpointError::NoDirectory(dir.to_owned()));
    }
    let dir = snapshot(&hub, &id).ok_or_else(|| not_found(&id))?;
    let name = id.rsplit('/').next().unwrap_or(&id).to_owned();
    Ok(ModelLocation::Directory { dir, name })
}

/// The size that an id names, or one to try instead.
fn size_of_name(id: &str) -> &str {
    let name = id.rsplit('/').next().unwrap_or(id);
    named_size(name).map_or("opt-1.3b", |_| name)
}

fn hub_dir(hf_home: Option<&Path>) -> PathBuf {
    let var = |name| {
        std::env::var_os(name)
            .filter(|v| !v.is_empty())
            .map(PathBuf::from)
    };
    if let Some(home) = hf_home {
        return home.join("hub");
    }
    let home = var("HOME").unwrap_or_default();
    // As huggingface_hub does.
    let expanded = |path: PathBuf| match path.strip_prefix("~") {
        Ok(rest) => home.join(rest),
        Err(_) => path,
    };
    let cache = || var("XDG_CACHE_HOME").map_or_else(|| home.join(".cache"), expanded);
    let own = || var("HF_HOME").map_or_else(|| cache().join("huggingface"), expanded);
    var("HF_HUB_CACHE").map_or_else(|| own().join("hub"), expanded)
}

/// "owner/name" of the characters that the hub allows: nothing that could leave the cache.
fn is_hub_id(id: &str) -> bool {
    let word = |w: &str| {
        let allowed = |c: char| c.is_ascii_alphanumeric() || "._-".contains(c);
        !w.is_empty() && !w.starts_with('.') && w.chars().all(allowed)
    };
    id.split_once('/')
        .is_some_and(|(owner, name)| word(owner) && word(name))
}

/// The snapshot that `refs/main` names, else the only one there is.
fn snapshot(hub: &Path, id: &str) -> Option<PathBuf> {
    let repo = hub.join(format!("models--{}", id.replace('/', "--")));
    let snapshots = repo.join("snapshots");
    let usable = |dir: PathBuf| dir.join("config.json").is_file().then_some(dir);
    if let Ok(revision) = std::fs::read_to_string(repo.join("refs/main")) {
        let revision = revision.trim();
        let plain = !revision.is_empty() && revision.chars().all(|c| c.is_ascii_alphanumeric());
        if let Some(dir) = plain.then(|| usable(snapshots.join(revision))).flatten() {
            return Some(dir);
        }
    }
    let mut found = std::fs::read_dir(snapshots).ok()?.flatten();
    match (found.next(), found.next()) {
        (Some(only), None) => usable(only.path()),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn models_are_found_where_the_hub_keeps_them() {
        let home = tempfile::tempdir().expect("temporary directory");
        let repo = home.path().join("hub/models--facebook--opt-1.3b");
        let dir = repo.join("snapshots/3f5c25d0");
        std::fs::create_dir_all(&dir).expect("made");
        std::fs::create_dir_all(repo.join("refs")).expect("made");
        let find = |name: &str| find_model(name, Some(home.path()));
        let message = find("facebook/opt-1.3b")
            .expect_err("no config")
            .to_string();
        assert!(
            message.contains("hf download facebook/opt-1.3b"),
            "{message}"
        );
        std::fs::write(dir.join("config.json"), "{}").expect("written");
        std::fs::write(repo.join("refs/main"), "3f5c25d0\n").expect("written");
        let name = "opt-1.3b".to_owned();
        let expected = ModelLocation::Directory {
            dir: dir.clone(),
            name,
        };
        assert_eq!(find("facebook/opt-1.3b").expect("cached"), expected);
        assert_eq!(find("opt-1.3b").expect("cached"), expected);
        let local = find(dir.to_str().expect("a name")).expect("a directory");
        assert!(matches!(local, ModelLocation::Directory { name, .. } if name == "3f5c25d0"));
    }

    #[test]
    fn synth_needs_a_known_size() {
        let found = find_model("synth:opt-125m", None).expect("known");
        assert_eq!(
            found,
            ModelLocation::Synth(named_size("opt-125m").expect("known"))
        );
        let message = find_model("synth:opt-2b", None)
            .expect_err("unknown")
            .to_string();
        assert!(message.contains("opt-2.7b"), "{message}");
    }

    #[test]
    fn names_cannot_leave_the_cache() {
        for name in ["../x", "a/../b", "/nowhere/at/all", "a/b/c", "x"] {
            let error = find_model(name, Some(Path::new("/nowhere")));
            assert!(
                matches!(error, Err(CheckpointError::NoDirectory(_))),
                "{name}"
            );
        }
    }
}
