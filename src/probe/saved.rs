//! Profiles kept under the offload directory: what makes one fit this machine, finding and saving.
//! Nothing is measured here.

use super::ProbeError;
use crate::machine::{disk, os};
use crate::profile::{HardwareProfile, MachineKey};
use sha2::{Digest, Sha256};
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

/// What must match for a profile to be reused.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ProfileKey {
    pub cpu: String,
    pub threads: usize,
    pub kernels: String,
    pub disk: String,
    /// A GPU that the profile must have been taken of as well.
    pub gpu: Option<String>,
}

impl ProfileKey {
    /// The key of this machine for a directory and a number of threads.
    pub fn of_this_machine(offload_dir: &Path, threads: usize, isa: &str) -> ProfileKey {
        ProfileKey {
            cpu: os::cpu_info().describe(),
            threads,
            kernels: format!("{} {isa}", crate::machine::cpu::kernels::KERNEL_REVISION),
            disk: disk::filesystem_of(offload_dir).describe(),
            gpu: None,
        }
    }

    pub fn with_gpu(self, name: Option<&str>) -> ProfileKey {
        ProfileKey {
            gpu: name.map(str::to_owned),
            ..self
        }
    }

    /// A profile with a GPU serves the CPU alone as well.
    pub fn fits_profile(&self, profile: &HardwareProfile) -> bool {
        let gpu = profile.gpu.as_ref().map(|gpu| &gpu.name);
        self.fits(&profile.machine) && (self.gpu.is_none() || self.gpu.as_ref() == gpu)
    }

    pub fn fits(&self, machine: &MachineKey) -> bool {
        self.cpu == machine.cpu
            && self.threads == machine.threads
            && self.kernels == machine.kernels
            && self.disk == machine.disk
    }

    /// "amd-epyc-2-threads-1f0a9c3e": readable, and different for different keys.
    pub fn name(&self) -> String {
        let model = self.cpu.split(',').next().unwrap_or_default();
        let plain = |c: char| {
            if c.is_ascii_alphanumeric() {
                c.to_ascii_lowercase()
            } else {
                ' '
            }
        };
        let words: String = model.chars().map(plain).collect();
        let words: Vec<&str> = words.split_whitespace().take(6).collect();
        let mut whole = format!(
            "{}|{}|{}|{}",
            self.cpu, self.threads, self.kernels, self.disk
        );
        whole.extend(self.gpu.iter().map(|gpu| format!("|{gpu}")));
        let digest = Sha256::digest(whole.as_bytes());
        let tail: String = digest.iter().take(4).map(|b| format!("{b:02x}")).collect();
        format!("{}-{}-threads-{tail}", words.join("-"), self.threads)
    }
}

/// Where profiles live below an offload directory.
pub fn profiles_dir(offload_dir: &Path) -> PathBuf {
    offload_dir.join("profiles")
}

/// The newest saved profile whose key matches; files that cannot be read as profiles are no match.
pub fn find_profile(offload_dir: &Path, key: &ProfileKey) -> Option<HardwareProfile> {
    let entries = std::fs::read_dir(profiles_dir(offload_dir)).ok()?;
    let paths = entries.flatten().map(|entry| entry.path());
    let files = paths.filter(|path| path.extension().is_some_and(|e| e == "toml"));
    let read = |path: PathBuf| {
        let modified = path.metadata().and_then(|m| m.modified()).ok()?;
        let profile = HardwareProfile::from_toml(&std::fs::read_to_string(path).ok()?).ok()?;
        Some((modified, profile))
    };
    let fitting = files
        .filter_map(read)
        .filter(|(_, profile)| key.fits_profile(profile));
    let newest = fitting.max_by_key(|(modified, _)| *modified);
    newest.map(|(_, profile)| profile)
}

/// Saves a profile under its own name; returns the path. What `calibrate` has written there stays.
pub fn save_profile(offload_dir: &Path, profile: &HardwareProfile) -> Result<PathBuf, ProbeError> {
    let dir = profiles_dir(offload_dir);
    std::fs::create_dir_all(&dir).map_err(|source| ProbeError::Directory {
        path: dir.clone(),
        source,
    })?;
    let path = dir.join(format!("{}.toml", profile.machine.name));
    let old = std::fs::read_to_string(&path).ok();
    let old = old.and_then(|text| HardwareProfile::from_toml(&text).ok());
    let kept = HardwareProfile {
        calibration: old.map(|p| p.calibration).unwrap_or_default(),
        ..profile.clone()
    };
    disk::write_atomically(&path, kept.to_toml().as_bytes())?;
    Ok(path)
}

/// Today as "2026-11-23" (UTC).
pub fn today() -> String {
    let since = SystemTime::now().duration_since(UNIX_EPOCH);
    date_of_day(since.map_or(0, |d| d.as_secs() / 86_400))
}

/// Now as "2026-11-23T18:05:00Z".
pub fn timestamp() -> String {
    let since = SystemTime::now().duration_since(UNIX_EPOCH);
    let seconds = since.map_or(0, |d| d.as_secs());
    let (hour, minute, second) = (seconds / 3600 % 24, seconds / 60 % 60, seconds % 60);
    format!(
        "{}T{hour:02}:{minute:02}:{second:02}Z",
        date_of_day(seconds / 86_400)
    )
}

/// The civil date of a day counted from 1970-01-01 (Gregorian, eras of 400 years from March).
fn date_of_day(day: u64) -> String {
    let day = day + 719_468;
    let (era, day_of_era) = (day / 146_097, day % 146_097);
    let year_of_era =
        (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let month_from_march = (5 * day_of_year + 2) / 153;
    let day_of_month = day_of_year - (153 * month_from_march + 2) / 5 + 1;
    let month = (month_from_march + 2) % 12 + 1;
    let year = era * 400 + year_of_era + u64::from(month <= 2);
    format!("{year:04}-{month:02}-{day_of_month:02}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn days_are_dates() {
        assert_eq!(date_of_day(0), "1970-01-01");
        assert_eq!(date_of_day(19_782), "2024-02-29");
        assert_eq!(date_of_day(20_780), "2026-11-23");
        assert!(today().as_str() > "2024-01-01");
    }

    #[test]
    fn names_are_plain_and_differ_by_key() {
        let key = |threads| ProfileKey {
            cpu: "AMD EPYC(TM) 7/8, 2 cores, fma".to_owned(),
            threads,
            kernels: "1".to_owned(),
            disk: "ext4 on /dev/vda".to_owned(),
            gpu: None,
        };
        assert!(
            key(2).name().starts_with("amd-epyc-tm-7-8-2-threads-"),
            "{}",
            key(2).name()
        );
        assert_ne!(key(2).name()[..], key(4).name()[..]);
    }
}
