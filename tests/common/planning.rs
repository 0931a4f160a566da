//! Planning requests that several tests share.

use super::*;
use loadmaster::cost::footprint::HostBytes;
use loadmaster::plan::{Plan, PlanBudget};
use loadmaster::planner::changes::Changes;
use loadmaster::planner::{CompressMode, Fixed, Job, PlanRequest};
use loadmaster::policy::DeviceKind;
use loadmaster::units::{GIB, MIB};
use loadmaster::workload::Workload;

pub const HOST: HostBytes = HostBytes {
    process_bytes: 64 * MIB,
    gpu_context_bytes: 0,
    unpacked: false,
};

pub const NO_CHANGES: Changes = Changes {
    disk_speed: None,
    link_speed: None,
    disk_read_bytes_per_s: None,
    disk_write_bytes_per_s: None,
    link_bytes_per_s: None,
    cpu_speed: None,
    gpu_speed: None,
};

pub struct Setting {
    pub model: ModelSpec,
    pub profile: HardwareProfile,
    pub workload: Workload,
    pub device: DeviceKind,
    pub budget: PlanBudget,
}

impl Setting {
    pub fn request(&self) -> PlanRequest<'_> {
        PlanRequest {
            model: &self.model,
            fingerprint: None,
            job: Job::Given(&self.workload),
            device: self.device,
            device_name: match self.device {
                DeviceKind::Cpu => "cpu",
                DeviceKind::Host => "host:4GiB",
                DeviceKind::Cuda => "cuda:0",
            },
            profile: &self.profile,
            calibrated: true,
            explain: true,
            changes: &NO_CHANGES,
            budget: self.budget,
            fixed: Fixed::default(),
            compress: CompressMode::Auto,
            kv: Dtype::F16,
            threads: self.profile.machine.threads,
            host: HOST,
            stored_bytes: [0, 0],
            repricer: None,
        }
    }
}

pub fn cpu(model: ModelSpec, cpu_bytes: u64, workload: Workload) -> Setting {
    Setting {
        model,
        profile: two_cores(),
        workload,
        device: DeviceKind::Cpu,
        budget: PlanBudget {
            gpu_bytes: None,
            cpu_bytes,
            disk_bytes: 400 * GIB,
        },
    }
}

pub fn on_t4(model: ModelSpec, cpu_bytes: u64, workload: Workload) -> Setting {
    Setting {
        model,
        profile: t4(),
        workload,
        device: DeviceKind::Cuda,
        budget: PlanBudget {
            gpu_bytes: Some(15 * GIB),
            cpu_bytes,
            disk_bytes: 1500 * GIB,
        },
    }
}

pub fn settings() -> Vec<Setting> {
    vec![
        cpu(opt_1_3b(), 2 * GIB, Workload::uniform(8, 128, 16)),
        cpu(opt_6_7b(), 6 * GIB, Workload::uniform(6, 256, 32)),
        cpu(opt_125m(), GIB, Workload::uniform(3, 64, 8)),
        on_t4(opt_30b(), 100 * GIB, Workload::uniform(96, 512, 32)),
    ]
}

pub fn throughput(plan: &Plan) -> f64 {
    plan.estimate
        .as_ref()
        .expect("a feasible plan has an estimate")
        .throughput_tok_s
}

/// A deterministic stream of numbers in 0..1.
pub fn random(seed: u64) -> impl FnMut() -> f64 {
    let mut state = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
    move || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 11) as f64 / (1u64 << 53) as f64
    }
}
