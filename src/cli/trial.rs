//! A plan made ready to be run again and again in this process: what `accuracy` and `rivals` measure.

use super::args::ResultArgs;
use super::execute::{Execution, gpu_of, planned_lengths, spill_dir};
use super::failure::Failure;
use super::gpu::LocalGpu;
use super::progress::Talk;
use super::prompt_lines::Rules;
use super::prompts::{self, Source};
use super::settle::{Input, Model};
use super::weights::{packed, packed_store};
use crate::cost::figures::Figures;
use crate::cost::rates::Rates;
use crate::engine::Request;
use crate::engine::open::{Packed, RunJob};
use crate::machine::cuda::GpuChoice;
use crate::machine::price::Pricer;
use crate::plan::Plan;
use crate::policy::Policy;
use crate::probe::{Burst, BurstPlace};
use crate::profile::{GpuFacts, HardwareProfile};
use crate::proof::bound::{Bound, bursts_of};
use crate::proof::record::RunRecord;
use crate::proof::visit::{VisitJob, visit};
use crate::report::SetupFigures;
use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicBool;

/// What trials of one plan have in common.
pub struct Trial<'a> {
    pub model: &'a Model,
    pub plan: &'a Plan,
    policy: Policy,
    rates: Rates,
    packed: Packed,
    spill: PathBuf,
    requests: Vec<Request>,
    gpu: GpuChoice,
    gpu_facts: Option<GpuFacts>,
}

impl<'a> Trial<'a> {
    /// Packs the weights where they are not yet; seeded random prompts of the planned lengths.
    pub fn new(
        (model, plan): (&'a Model, &'a Plan),
        profile: &HardwareProfile,
        offload_dir: &Path,
        (talk, stop): (&mut Talk, &AtomicBool),
    ) -> Result<Trial<'a>, Failure> {
        let policy = plan.to_policy().map_err(Failure::failed)?;
        let device = plan.device_kind().map_err(Failure::failed)?;
        let gpu = gpu_of(plan, device)?;
        let rates = Rates::new(profile, device, policy.threads).map_err(Failure::failed)?;
        let nowhere = ResultArgs {
            output: None,
            overwrite: false,
            report: None,
        };
        let execution = Execution {
            plan,
            model,
            profile,
            lines: &[],
            results: &nowhere,
            offload_dir,
            ignore_eos: true,
            setup: SetupFigures::default(),
            may_replan: false,
            unpacked: false,
        };
        let mut setup = SetupFigures::default();
        let store = packed_store(&execution, &policy, (&mut setup, talk), stop)?;
        Ok(Trial {
            model,
            plan,
            policy,
            rates,
            packed: packed(&store),
            spill: spill_dir(offload_dir)?,
            requests: random_requests(model, plan)?,
            gpu: LocalGpu::choice_of(gpu.as_ref(), offload_dir),
            gpu_facts: profile.gpu.clone(),
        })
    }

    /// Loads, runs and measures between bursts.
    pub fn run_between_bursts(&self, stop: &AtomicBool) -> Result<RunRecord, Failure> {
        let predicted = self.predicted();
        let bound = Bound {
            model: &self.model.spec,
            plan: self.plan,
            policy: &self.policy,
            rates: &self.rates,
        };
        self.visit(&predicted, (&bursts_of(bound, &predicted), 0), stop)
    }

    /// Loads, runs and measures, in a series whose jobs take so much memory.
    pub fn run(&self, series_bytes: u64, stop: &AtomicBool) -> Result<RunRecord, Failure> {
        self.visit(&self.predicted(), (&[], series_bytes), stop)
    }

    fn predicted(&self) -> Figures {
        self.plan.estimate.clone().unwrap_or_default()
    }

    fn visit(
        &self,
        predicted: &Figures,
        (bursts, series_bytes): (&[Burst], u64),
        stop: &AtomicBool,
    ) -> Result<RunRecord, Failure> {
        let run = RunJob {
            model: &self.model.spec,
            policy: &self.policy,
            device: self.rates.device,
            lengths: planned_lengths(self.plan),
            host: self
                .model
                .host_bytes(Input::planned(self.plan), self.policy.threads)
                .with_gpu(self.rates.device, self.gpu_facts.as_ref()),
            packed: &self.packed,
            source: None,
            spill: &self.spill,
            pricer: Pricer::new(self.rates.clone()),
            gpu: self.gpu.clone(),
        };
        let job = VisitJob {
            run: &run,
            budget: self.plan.budget,
            predicted,
            requests: &self.requests,
            bursts,
            series_bytes,
            place: &BurstPlace {
                threads: self.policy.threads,
                store: &self.packed.file,
                spill: &self.spill,
                rates: &self.rates,
                stop,
            },
        };
        visit(&job, stop).map_err(Failure::failed)
    }
}

fn random_requests(model: &Model, plan: &Plan) -> Result<Vec<Request>, Failure> {
    let w = &plan.workload;
    let random = Source::Random {
        prompts: w.prompts as usize,
        prompt_tokens: w.prompt_tokens_max as u32,
    };
    let rules = Rules {
        model: &model.spec,
        tokenizer: model.tokenizer.as_ref(),
        gen_tokens: w.gen_tokens_max as u32,
        seed: 0,
    };
    let lines = prompts::read_lines(random, &rules).map_err(Failure::from)?;
    Ok(prompts::split(&lines).0)
}
