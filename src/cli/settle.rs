//! What several commands settle first: the model and its tokenizer, the machine's profile, the device
//! and the budgets. Turns flags into facts; decides nothing about placement.

use super::args::{LimitArgs, WorkArgs};
use super::failure::Failure;
use super::gpu::LocalGpu;
use super::progress::Talk;
use super::prompts::lines_bytes;
use super::values::DeviceChoice;
use crate::checkpoint::{CheckpointError, ModelLocation, WeightSource, find_model};
use crate::cost::footprint::HostBytes;
use crate::machine::cpu::kernels::Isa;
use crate::machine::cpu::pool;
use crate::machine::os::MemoryNow;
use crate::machine::{disk, os};
use crate::model::ModelSpec;
use crate::model::families::named_size;
use crate::plan::{Plan, PlanBudget};
use crate::policy::DeviceKind;
use crate::probe::{self, GpuProbe, ProbeOptions, ProbeScale, ProfileKey};
use crate::profile::{COMPILED_IN, HardwareProfile};
use crate::tokenizer::Tokenizer;
use crate::units::MIB;
use crate::workload::Workload;
use std::path::Path;
use std::sync::atomic::AtomicBool;
use std::time::Instant;

/// What a run holds beside its arenas and the tokenizer: program text and libraries (10 MiB of file pages),
/// heap (2 MiB), stacks and scratch of two compute threads (3 MiB), the load's bounce buffer (8 MiB), and
/// room for what varies. A memory cgroup charges kernel objects and files in flight as well, and not the
/// file pages: the one is less than the other.
pub const PROCESS_BYTES: u64 = 26 * MIB;
/// What `PROCESS_BYTES` has room for.
const PROCESS_THREADS: usize = 2;
/// Scratch and touched stack of a further thread.
const THREAD_BYTES: u64 = pool::THREAD_BYTES + 64 * 1024;
/// A disk of another machine, where nothing else is said.
const FOREIGN_DISK_BYTES: u64 = 1 << 50;

/// A model, with weights where there are some.
pub struct Model {
    /// As the user called it.
    pub name: String,
    pub spec: ModelSpec,
    pub location: Option<ModelLocation>,
    pub source: Option<Box<dyn WeightSource>>,
    pub tokenizer: Option<Tokenizer>,
}

impl Model {
    /// Weights of `name`, or for planning the sizes alone where it is only a size's name, or has a config.json only.
    pub fn find(name: &str, seed: u64, sizes_do: bool) -> Result<Model, Failure> {
        let location = match find_model(name, None) {
            Ok(location) => location,
            Err(error) => match named_size(name).filter(|_| sizes_do) {
                Some(spec) => {
                    return Ok(Model {
                        name: name.into(),
                        spec,
                        location: None,
                        source: None,
                        tokenizer: None,
                    });
                }
                None => return Err(Failure::failed(error)),
            },
        };
        let source = match location.open(seed) {
            Ok(source) => Some(source),
            Err(CheckpointError::NoWeights(_) | CheckpointError::MissingShard { .. })
                if sizes_do =>
            {
                None
            }
            Err(error) => return Err(Failure::failed(error)),
        };
        let spec = match &source {
            Some(source) => source.spec().clone(),
            None => location.spec().map_err(Failure::failed)?,
        };
        let tokenizer = match &location {
            ModelLocation::Synth(_) => Some(Tokenizer::byte_level(spec.vocab)),
            ModelLocation::Directory { dir, .. } if has_tokenizer(dir) => {
                Some(Tokenizer::open(dir, spec.vocab).map_err(Failure::failed)?)
            }
            ModelLocation::Directory { .. } => None,
        };
        Ok(Model {
            name: name.into(),
            spec,
            location: Some(location),
            source,
            tokenizer,
        })
    }

    pub fn fingerprint(&self) -> Option<String> {
        self.source.as_ref().map(|source| source.fingerprint())
    }

    /// What the process holds beside its arenas.
    pub fn host_bytes(&self, input: Input, threads: usize) -> HostBytes {
        let more_threads = threads.saturating_sub(PROCESS_THREADS) as u64;
        let tokenizer = self.tokenizer.as_ref().map_or(0, Tokenizer::held_bytes);
        HostBytes {
            process_bytes: PROCESS_BYTES + more_threads * THREAD_BYTES + tokenizer + input.bytes(),
            gpu_context_bytes: 0,
            unpacked: false,
        }
    }
}

/// What is held of the lines that are generated from.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Input {
    pub lines: u64,
    pub prompt_tokens: u64,
}

impl Input {
    pub fn of(workload: &Workload) -> Input {
        Input {
            lines: workload.prompts() as u64,
            prompt_tokens: workload.prompt_tokens(),
        }
    }

    /// What a plan counts on.
    pub fn planned(plan: &Plan) -> Input {
        Input {
            lines: plan.workload.prompts,
            prompt_tokens: plan.workload.prompt_tokens,
        }
    }

    /// At least what is planned, and what really came.
    pub fn at_least(self, other: Input) -> Input {
        Input {
            lines: self.lines.max(other.lines),
            prompt_tokens: self.prompt_tokens.max(other.prompt_tokens),
        }
    }

    /// What a run holds of it.
    fn bytes(self) -> u64 {
        lines_bytes(self.lines, self.prompt_tokens)
    }
}

fn has_tokenizer(dir: &Path) -> bool {
    dir.join("tokenizer.json").is_file() || dir.join("vocab.json").is_file()
}

/// The machine that is planned for.
#[derive(Clone)]
pub struct Target {
    pub profile: HardwareProfile,
    pub device: DeviceKind,
    pub device_name: String,
    pub budget: PlanBudget,
    pub threads: usize,
    /// Seconds spent probing just now.
    pub probe_s: f64,
}

impl Target {
    /// Profile, device and budgets from the flags; probes where this machine has no profile yet.
    pub fn settle(
        limits: &LimitArgs,
        talk: &mut Talk,
        stop: &AtomicBool,
    ) -> Result<Target, Failure> {
        let threads = limits.threads.unwrap_or_else(os::default_threads);
        let offload_dir = limits.place.offload_dir();
        let started = Instant::now();
        let mut gpu = None;
        let (profile, foreign, probed) = match &limits.profile {
            Some(name) => {
                let profile = named_profile(name, &offload_dir)?;
                let key = ProfileKey::of_this_machine(&offload_dir, threads, Isa::detect().name());
                let mut foreign = profile.machine.cpu != key.cpu;
                if !foreign && profile.gpu.is_some() {
                    gpu = LocalGpu::asked(&limits.device)?;
                    // The same CPU without the profile's GPU is another machine.
                    foreign = gpu.is_none() && matches!(limits.device, DeviceChoice::Auto);
                }
                (profile, foreign, false)
            }
            None => {
                gpu = LocalGpu::asked(&limits.device)?;
                let how = (threads, limits.cpu_mem_bytes, gpu.as_ref());
                let (profile, probed) = own_profile(&offload_dir, how, talk, stop)?;
                (profile, false, probed)
            }
        };
        let profile = if limits.no_calibration {
            profile.without_calibration()
        } else {
            profile
        };
        let probe_s = if probed {
            started.elapsed().as_secs_f64()
        } else {
            0.0
        };
        let (device, device_name) =
            choose_device(&limits.device, gpu.as_ref(), foreign.then_some(&profile))?;
        let threads = if foreign {
            limits.threads.unwrap_or(profile.machine.threads)
        } else {
            threads
        };
        let gpu_bytes = gpu_budget(limits, device, gpu.as_ref(), &profile)?;
        let budget = budgets(limits, (gpu_bytes, foreign), &profile, &offload_dir)?;
        Ok(Target {
            profile,
            device,
            device_name,
            budget,
            threads,
            probe_s,
        })
    }
}

/// Threads, the memory that probing may take, and the GPU to probe as well.
pub type Probing<'a> = (usize, Option<u64>, Option<&'a LocalGpu>);

/// The profile of this machine: saved, or measured now and saved. True when measured now.
pub fn own_profile(
    offload_dir: &Path,
    (threads, cpu_mem_bytes, gpu): Probing,
    talk: &mut Talk,
    stop: &AtomicBool,
) -> Result<(HardwareProfile, bool), Failure> {
    make_offload_dir(offload_dir)?;
    let key = ProfileKey::of_this_machine(offload_dir, threads, Isa::detect().name())
        .with_gpu(gpu.map(|gpu| gpu.facts.name.as_str()));
    if let Some(profile) = probe::find_profile(offload_dir, &key) {
        return Ok((profile, false));
    }
    talk.note("No profile of this machine yet: measuring it once (about a minute, at most 2 GiB written and removed).");
    let profile = measure(offload_dir, (threads, cpu_mem_bytes, gpu), talk, stop)?;
    Ok((profile, true))
}

/// Probes this machine and saves the profile.
pub fn measure(
    offload_dir: &Path,
    (threads, cpu_mem_bytes, gpu): Probing,
    talk: &mut Talk,
    stop: &AtomicBool,
) -> Result<HardwareProfile, Failure> {
    make_offload_dir(offload_dir)?;
    let enough = probe::default_budget_bytes(threads);
    let free = os::default_cpu_budget().unwrap_or(enough);
    // What was asked for holds: should the default ever be too little, --cpu-mem must be able to mend it.
    let budget_bytes = cpu_mem_bytes.unwrap_or(free.min(enough));
    let profile = probe::probe(ProbeOptions {
        offload_dir,
        threads,
        budget_bytes,
        isa: Isa::detect(),
        scale: ProbeScale::Full,
        command: "loadmaster probe",
        gpu: gpu.map(|gpu| GpuProbe {
            facts: gpu.facts.clone(),
            choice: gpu.choice(offload_dir),
        }),
        progress: &mut |text| talk.stage(text),
        stop,
    });
    talk.end();
    let profile = profile.map_err(Failure::failed)?;
    probe::save_profile(offload_dir, &profile).map_err(Failure::failed)?;
    Ok(profile)
}

pub fn make_offload_dir(offload_dir: &Path) -> Result<(), Failure> {
    let failed = |e: std::io::Error| {
        Failure::failed(format!("{}: cannot be made ({e})", offload_dir.display()))
            .with_hint("give a writable directory with --offload-dir, or set LOADMASTER_HOME")
    };
    // First, so that nothing is left in memory that only looks like a disk.
    disk::check_disk_tier(offload_dir).map_err(Failure::failed)?;
    std::fs::create_dir_all(offload_dir).map_err(failed)
}

/// A profile by file, by a name saved here, or by a name compiled in.
pub fn named_profile(name: &str, offload_dir: &Path) -> Result<HardwareProfile, Failure> {
    let saved = probe::profiles_dir(offload_dir).join(format!("{name}.toml"));
    let compiled = COMPILED_IN
        .iter()
        .find(|(n, _)| *n == name)
        .map(|(_, text)| (*text).to_owned());
    let from_file = |path: &Path| std::fs::read_to_string(path).ok();
    let text = from_file(Path::new(name))
        .or_else(|| from_file(&saved))
        .or(compiled);
    let names = COMPILED_IN.map(|(n, _)| n).join(", ");
    let text = text.ok_or_else(|| {
        Failure::usage(format!(
            "--profile {name}: no such file, and no profile of that name"
        ))
        .with_hint(format!(
            "compiled in: {names}; `loadmaster probe` measures this machine"
        ))
    })?;
    HardwareProfile::from_toml(&text).map_err(|e| {
        Failure::failed(format!("{name}: {e}"))
            .with_hint("`loadmaster probe -o FILE` measures this machine into a profile")
    })
}

fn choose_device(
    asked: &DeviceChoice,
    local: Option<&LocalGpu>,
    foreign: Option<&HardwareProfile>,
) -> Result<(DeviceKind, String), Failure> {
    let other_gpu = foreign.is_some_and(|p| p.gpu.is_some());
    let kind = match (asked, local) {
        (DeviceChoice::Cpu, _) => DeviceKind::Cpu,
        (DeviceChoice::Host { .. }, _) => DeviceKind::Host,
        (_, Some(gpu)) => return Ok((DeviceKind::Cuda, format!("cuda:{}", gpu.index))),
        (DeviceChoice::Auto, _) if other_gpu => return Ok((DeviceKind::Cuda, "cuda:0".into())),
        (DeviceChoice::Auto, _) => return Ok((DeviceKind::Cpu, "cpu".into())),
        (DeviceChoice::Cuda { .. }, _) if other_gpu => DeviceKind::Cuda,
        (DeviceChoice::Cuda { .. }, _) => {
            return Err(Failure::usage("--device cuda: the profile has no [gpu]")
                .with_hint("leave --profile out, so that this machine's GPU is probed"));
        }
    };
    Ok((kind, asked.to_string()))
}

/// All device memory that a run may take; None without a GPU.
fn gpu_budget(
    limits: &LimitArgs,
    device: DeviceKind,
    local: Option<&LocalGpu>,
    profile: &HardwareProfile,
) -> Result<Option<u64>, Failure> {
    let spare = |bytes: u64| bytes.saturating_sub((512 * MIB).min(bytes / 8));
    let own = match (&limits.device, device) {
        (DeviceChoice::Host { gpu_bytes }, _) => Some(*gpu_bytes),
        (_, DeviceKind::Cuda) => {
            let total = profile.gpu.as_ref().map_or(0, |g| g.total_bytes);
            let free = local.and_then(LocalGpu::free_bytes);
            Some(spare(free.unwrap_or(total)))
        }
        _ if limits.gpu_mem_bytes.is_some() => {
            return Err(
                Failure::usage("--gpu-mem says nothing here: no GPU takes part")
                    .with_hint("leave it out, or name a machine with a GPU by --profile"),
            );
        }
        _ => None,
    };
    // A GPU that DRAM plays has no more than it was given; for a real one, more may be asked what if.
    let most = match limits.device {
        DeviceChoice::Host { gpu_bytes } => gpu_bytes,
        _ => u64::MAX,
    };
    Ok(own.map(|own| limits.gpu_mem_bytes.unwrap_or(own).min(most)))
}

/// DRAM where --cpu-mem does not say: of a machine elsewhere nothing is taken, and the GPU that DRAM plays is given up.
fn default_cpu_bytes(
    limits: &LimitArgs,
    (gpu_bytes, foreign): (Option<u64>, bool),
    profile: &HardwareProfile,
) -> Result<u64, Failure> {
    let total_bytes = profile.memory.cpu_total_bytes;
    let all = match foreign {
        true => os::budget_within(&MemoryNow {
            total_bytes,
            free_bytes: total_bytes,
            bound_by: profile.machine.name.clone(),
        }),
        false => os::default_cpu_budget().map_err(Failure::failed)?,
    };
    let played = match limits.device {
        DeviceChoice::Host { .. } => gpu_bytes.unwrap_or(0),
        _ => 0,
    };
    Ok(all.saturating_sub(played))
}

fn budgets(
    limits: &LimitArgs,
    (gpu_bytes, foreign): (Option<u64>, bool),
    profile: &HardwareProfile,
    offload_dir: &Path,
) -> Result<PlanBudget, Failure> {
    let cpu_bytes = match limits.cpu_mem_bytes {
        Some(bytes) => bytes,
        None => default_cpu_bytes(limits, (gpu_bytes, foreign), profile)?,
    };
    let disk_bytes = match (limits.disk_space_bytes, foreign) {
        (Some(bytes), _) => bytes,
        (None, true) => FOREIGN_DISK_BYTES,
        (None, false) => {
            make_offload_dir(offload_dir)?;
            let free = disk::free_bytes(offload_dir).map_err(Failure::failed)?;
            free - free / 20
        }
    };
    Ok(PlanBudget {
        gpu_bytes,
        cpu_bytes,
        disk_bytes,
    })
}

/// Whether the flags say what to generate from.
pub fn has_work(work: &WorkArgs) -> bool {
    !work.is_random() || work.num_prompts.is_some()
}
