//! Where `accuracy` keeps its profile, plans and rows, and whether rows that are there may be gone on with. What
//! is in them is proof/record.rs's.

use super::args::AccuracyArgs;
use super::execute::host_facts;
use super::failure::Failure;
use crate::machine::cpu::kernels::KERNEL_REVISION;
use crate::machine::disk::write_atomically;
use crate::plan::Plan;
use crate::proof::record::{RowRecord, Rows};
use std::path::{Path, PathBuf};

/// Where a measurement keeps its files.
pub(super) struct Folder(PathBuf);

impl Folder {
    pub(super) fn of(args: &AccuracyArgs) -> Result<Folder, Failure> {
        let named = |dir: PathBuf| dir.join("accuracy").join(format!("seed-{}", args.seed));
        let dir = args
            .out
            .clone()
            .unwrap_or_else(|| named(args.limits.place.offload_dir()));
        let failed = |e| Failure::failed(format!("{}: cannot be made ({e})", dir.display()));
        std::fs::create_dir_all(&dir).map_err(failed)?;
        Ok(Folder(dir))
    }

    pub(super) fn path(&self) -> &Path {
        &self.0
    }

    pub(super) fn rows(&self) -> PathBuf {
        self.0.join("rows.json")
    }

    pub(super) fn save(&self, name: &str, text: &str) -> Result<(), Failure> {
        write_atomically(&self.0.join(name), text.as_bytes()).map_err(Failure::failed)
    }
}

pub(super) fn read_rows(path: &Path) -> Result<Rows, Failure> {
    let text = std::fs::read_to_string(path).map_err(|e| {
        Failure::failed(format!("{}: cannot be read ({e})", path.display()))
            .with_hint("name the rows.json that `loadmaster accuracy` has written")
    })?;
    Rows::from_json(&text).map_err(|e| Failure::failed(format!("{}: {e}", path.display())))
}

/// A measurement is gone on with only by the same flags.
pub(super) fn begun(args: &AccuracyArgs, rows: &Rows) -> Result<Rows, Failure> {
    let same = rows.seed == args.seed && rows.max_row_s == args.max_row_s;
    if !same || rows.rows.len() != args.rows {
        return Err(Failure::usage(format!(
            "rows of another measurement are there (seed {}, {} rows of at most {} s)",
            rows.seed,
            rows.rows.len(),
            rows.max_row_s
        ))
        .with_hint("give another --out DIR, or the same --seed, --rows and --max-row-seconds"));
    }
    let of_model = |plan: &Plan| plan.model.name.trim_start_matches("synth:").to_owned();
    let asked = |row: &RowRecord| args.sizes.iter().any(|s| s.name == of_model(&row.plan));
    let kernels = &rows.profile.machine.kernels;
    let ours = kernels.is_empty() || kernels.split(' ').next() == Some(KERNEL_REVISION);
    if rows.host != host_facts(None) || !ours || !rows.rows.iter().all(asked) {
        return Err(Failure::usage(format!(
            "rows begun at {} on another machine, by another version or for other --sizes are there",
            rows.started_at
        ))
        .with_hint("give another --out DIR; --judge rows.json shows what they said"));
    }
    Ok(rows.clone())
}
