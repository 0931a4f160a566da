//! The kernels' sources, compiled for one GPU and kept under the offload directory: found again while source,
//! architecture, compiler and driver stay. A GPU newer than the compiler gets code that its driver translates.
//! Launching them is not done here.

use super::api::{Context, CudaError};
use super::launch::{Kernel, Module};
use super::toolkit::nvrtc;
use crate::machine::disk::write_atomically;
use sha2::{Digest, Sha256};
use std::collections::HashMap;
use std::ffi::{CStr, CString, c_char};
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// One file of kernels: its source with the header in it, and its entry points.
struct Source {
    name: &'static str,
    text: &'static str,
}

impl Source {
    /// As the compiler gets it.
    fn text(&self) -> String {
        self.text.replace(INCLUDE, HEADER)
    }
}

macro_rules! source {
    ($name:literal) => {
        Source {
            name: $name,
            text: include_str!(concat!("../../../kernels/", $name)),
        }
    };
}

const HEADER: &str = include_str!("../../../kernels/device.cuh");
const INCLUDE: &str = "#include \"device.cuh\"";

const SOURCES: [Source; 9] = [
    source!("rows.cu"),
    source!("norm.cu"),
    source!("epilogue.cu"),
    source!("gemm_small.cu"),
    source!("append.cu"),
    source!("prefill.cu"),
    source!("prefill_mma.cu"),
    source!("decode.cu"),
    source!("tables.cu"),
];

/// Entry points by file; `{}` stands for each of the words behind.
const ENTRIES: [(&str, &[&str], &[&str]); 12] = [
    (
        "rows.cu",
        &["embed_{}", "add_positions_{}"],
        &["f32", "f16", "bf16"],
    ),
    (
        "rows.cu",
        &["gather_rows", "scatter_rows", "add_rows"],
        &[""],
    ),
    ("norm.cu", &["layer_norm"], &[""]),
    ("epilogue.cu", &["narrow_{}"], &["f16", "bf16"]),
    (
        "epilogue.cu",
        &["bias_activate", "dequantise_q4_f16"],
        &[""],
    ),
    (
        "gemm_small.cu",
        &[
            "gemm_small_{}_1",
            "gemm_small_{}_2",
            "gemm_small_{}_4",
            "gemm_small_{}_8",
            "gemm_small_{}_16",
        ],
        &["f32", "f16", "bf16", "q4"],
    ),
    ("append.cu", &["append_{}"], &["f32", "f16", "q4"]),
    ("prefill.cu", &["attend_prefill_{}"], &["f32", "f16", "q4"]),
    (
        "prefill_mma.cu",
        &[
            "attend_prefill_mma_{}_32",
            "attend_prefill_mma_{}_64",
            "attend_prefill_mma_{}_80",
            "attend_prefill_mma_{}_128",
        ],
        &["f16", "q4"],
    ),
    ("decode.cu", &["attend_decode_{}"], &["f32", "f16", "q4"]),
    ("decode.cu", &["attend_combine"], &[""]),
    ("tables.cu", &["copy_table"], &[""]),
];

/// Version of the compiler library; the library is loaded already.
pub fn compiler_version() -> Option<(u32, u32)> {
    let (mut major, mut minor) = (0, 0);
    // SAFETY: written to live integers.
    let result = unsafe { nvrtc::nvrtcVersion(&mut major, &mut minor) };
    (result == nvrtc::nvrtcResult::NVRTC_SUCCESS).then_some((major as u32, minor as u32))
}

/// GPUs that the compiler knows, 80 for sm_80; none where it does not say.
fn known_to_compiler() -> Vec<u32> {
    let mut count = 0;
    // SAFETY: written to a live integer.
    let counted = unsafe { nvrtc::nvrtcGetNumSupportedArchs(&mut count) };
    let mut known = vec![0; count.max(0) as usize];
    // SAFETY: there is room for as many as it has just said.
    let listed = unsafe { nvrtc::nvrtcGetSupportedArchs(known.as_mut_ptr()) };
    let good = nvrtc::nvrtcResult::NVRTC_SUCCESS;
    match counted == good && listed == good {
        true => known.into_iter().map(|arch| arch as u32).collect(),
        false => Vec::new(),
    }
}

/// What the compiler makes.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Code {
    /// Machine code of this very GPU.
    Cubin(u32),
    /// Of the newest GPU before it that the compiler knows: the driver translates it.
    Ptx(u32),
}

impl Code {
    fn of(capability: u32, known: &[u32]) -> Code {
        let before = known.iter().copied().filter(|&arch| arch < capability);
        match before.max() {
            Some(newest) if !known.contains(&capability) => Code::Ptx(newest),
            _ => Code::Cubin(capability),
        }
    }

    fn architecture(self) -> String {
        match self {
            Code::Cubin(arch) => format!("sm_{arch}"),
            Code::Ptx(arch) => format!("compute_{arch}"),
        }
    }
}

/// Every kernel by name.
pub struct Kernels {
    kernels: HashMap<String, Kernel>,
    /// Kept alive: kernels are handles into these.
    _modules: Vec<Module>,
}

/// For which GPU to compile, and where to keep the result.
#[derive(Clone, Copy, Debug)]
pub struct Target<'a> {
    /// 80 for sm_80.
    pub capability: u32,
    pub driver: u32,
    pub cache: &'a Path,
}

impl Kernels {
    /// Loads all kernels, compiling what is not kept yet.
    pub fn load(context: &Arc<Context>, target: &Target) -> Result<Kernels, String> {
        let mut kernels = HashMap::new();
        let mut modules = Vec::new();
        let code = Code::of(target.capability, &known_to_compiler());
        for source in &SOURCES {
            let module = load_or_compile(context, source, (target, code))?;
            for (_, patterns, words) in ENTRIES.iter().filter(|(file, ..)| *file == source.name) {
                for name in names(patterns, words) {
                    let kernel = module
                        .kernel(&name)
                        .map_err(|e| format!("kernel {name}: {e}"))?;
                    kernels.insert(name, kernel);
                }
            }
            modules.push(module);
        }
        Ok(Kernels {
            kernels,
            _modules: modules,
        })
    }

    /// Panics on a name that no source has: names are written in this crate alone.
    pub fn get(&self, name: &str) -> Kernel {
        let kernel = self.kernels.get(name).copied();
        kernel.unwrap_or_else(|| panic!("no kernel is called {name}"))
    }
}

fn names<'a>(patterns: &'a [&str], words: &'a [&str]) -> impl Iterator<Item = String> + 'a {
    let of_pattern = |pattern: &'a &str| words.iter().map(move |word| pattern.replace("{}", word));
    patterns.iter().flat_map(of_pattern)
}

/// Keeps an image of every source of which there is none; a damaged one is found when it is loaded.
pub fn compile_missing(target: &Target) -> Result<(), String> {
    let code = Code::of(target.capability, &known_to_compiler());
    for source in &SOURCES {
        let text = source.text();
        let path = image_path((source, &text), target, code);
        if !path.exists() {
            keep((&path, target), &compile(source.name, &text, code)?);
        }
    }
    Ok(())
}

/// A kept image that the driver takes, else a fresh one. A damaged file is made anew.
fn load_or_compile(
    context: &Arc<Context>,
    source: &Source,
    (target, code): (&Target, Code),
) -> Result<Module, String> {
    let text = source.text();
    let path = image_path((source, &text), target, code);
    let load = |image: &[u8]| -> Result<Module, CudaError> { Module::load(context, image) };
    let kept = std::fs::read(&path).ok().and_then(|file| whole(&file));
    if let Some(module) = kept.and_then(|image| load(&image).ok()) {
        return Ok(module);
    }
    let image = compile(source.name, &text, code)?;
    let module = load(&image).map_err(|e| format!("{}: {e}", source.name))?;
    keep((&path, target), &image);
    Ok(module)
}

/// A full or read-only disk costs a second next time, nothing else.
fn keep((path, target): (&Path, &Target), image: &[u8]) {
    let _ = std::fs::create_dir_all(target.cache);
    let _ = write_atomically(path, &sealed(image));
}

fn image_path((source, text): (&Source, &str), target: &Target, code: Code) -> PathBuf {
    let compiler = compiler_version().unwrap_or_default();
    let key = format!("{text}|{compiler:?}|{}|{:?}", target.driver, OPTIONS);
    let stem = source.name.trim_end_matches(".cu");
    let extension = match code {
        Code::Cubin(_) => "cubin",
        Code::Ptx(_) => "ptx",
    };
    let (made_for, digest) = (code.architecture().replace('_', ""), hex(key.as_bytes()));
    target
        .cache
        .join(format!("{stem}-{made_for}-{digest}.{extension}"))
}

fn hex(bytes: &[u8]) -> String {
    let digest = Sha256::digest(bytes);
    digest.iter().take(8).map(|b| format!("{b:02x}")).collect()
}

/// An image with its digest behind it, so that a torn file is not handed to the driver.
fn sealed(image: &[u8]) -> Vec<u8> {
    let mut file = image.to_vec();
    file.extend_from_slice(&Sha256::digest(image));
    file
}

fn whole(file: &[u8]) -> Option<Vec<u8>> {
    let (image, digest) = file.split_at_checked(file.len().checked_sub(32)?)?;
    (Sha256::digest(image).as_slice() == digest).then(|| image.to_vec())
}

/// The kernels write their contractions out: without this they would round differently from their twins.
const OPTIONS: [&str; 2] = ["--std=c++17", "--fmad=false"];

fn compile(name: &str, text: &str, code: Code) -> Result<Vec<u8>, String> {
    let c_string = |text: &str| CString::new(text).map_err(|e| format!("{name}: {e}"));
    let (text, file) = (c_string(text)?, c_string(name)?);
    let architecture = code.architecture();
    let mut options = vec![c_string(&format!("--gpu-architecture={architecture}"))?];
    for option in OPTIONS {
        options.push(c_string(option)?);
    }
    let options: Vec<*const c_char> = options.iter().map(|o| o.as_ptr()).collect();
    let program = Program::new(&text, &file)?;
    // SAFETY: the program is alive; the strings behind the options outlive the call.
    let result =
        unsafe { nvrtc::nvrtcCompileProgram(program.0, options.len() as i32, options.as_ptr()) };
    if result != nvrtc::nvrtcResult::NVRTC_SUCCESS {
        return Err(format!(
            "kernels/{name} cannot be compiled for {architecture}: {}",
            program.log()
        ));
    }
    let image = program.image(code);
    image.ok_or_else(|| format!("kernels/{name}: the compiler gave no code for {architecture}"))
}

/// A program of the compiler, destroyed on drop.
struct Program(nvrtc::nvrtcProgram);

impl Program {
    fn new(text: &CStr, name: &CStr) -> Result<Program, String> {
        let mut raw = std::ptr::null_mut();
        // SAFETY: both strings end with a zero; there are no headers.
        let result = unsafe {
            nvrtc::nvrtcCreateProgram(
                &mut raw,
                text.as_ptr(),
                name.as_ptr(),
                0,
                std::ptr::null(),
                std::ptr::null(),
            )
        };
        match result {
            nvrtc::nvrtcResult::NVRTC_SUCCESS => Ok(Program(raw)),
            other => Err(format!("the kernel compiler does not start ({other:?})")),
        }
    }

    fn log(&self) -> String {
        let mut bytes = 0;
        // SAFETY: the program is alive; the log is as long as the compiler says.
        unsafe {
            let _ = nvrtc::nvrtcGetProgramLogSize(self.0, &mut bytes);
            let mut log = vec![0u8; bytes];
            if bytes > 0 {
                let _ = nvrtc::nvrtcGetProgramLog(self.0, log.as_mut_ptr().cast());
            }
            String::from_utf8_lossy(&log)
                .trim_end_matches('\0')
                .trim()
                .to_owned()
        }
    }

    /// What was compiled; PTX with a zero at its end, as the driver wants it.
    fn image(&self, code: Code) -> Option<Vec<u8>> {
        let mut bytes = 0;
        // SAFETY: the program is alive and compiled; the image is as long as the compiler says.
        unsafe {
            let sized = match code {
                Code::Cubin(_) => nvrtc::nvrtcGetCUBINSize(self.0, &mut bytes),
                Code::Ptx(_) => nvrtc::nvrtcGetPTXSize(self.0, &mut bytes),
            };
            let mut image = vec![0u8; bytes];
            let to = image.as_mut_ptr().cast();
            let taken = match code {
                Code::Cubin(_) => nvrtc::nvrtcGetCUBIN(self.0, to),
                Code::Ptx(_) => nvrtc::nvrtcGetPTX(self.0, to),
            };
            let good = nvrtc::nvrtcResult::NVRTC_SUCCESS;
            (bytes > 0 && sized == good && taken == good).then_some(image)
        }
    }
}

impl Drop for Program {
    fn drop(&mut self) {
        // SAFETY: created by `new` and destroyed once.
        let _ = unsafe { nvrtc::nvrtcDestroyProgram(&mut self.0) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_entry_stands_in_its_file() {
        for (file, patterns, words) in ENTRIES {
            let source = SOURCES.iter().find(|s| s.name == file).expect("a source");
            assert!(source.text.contains(INCLUDE), "{file}");
            assert!(names(patterns, words).count() >= 1);
        }
    }

    #[test]
    fn a_gpu_newer_than_the_compiler_gets_code_to_translate() {
        let known = [75, 80, 86, 89, 90];
        assert_eq!(Code::of(86, &known), Code::Cubin(86));
        assert_eq!(Code::of(120, &known), Code::Ptx(90));
        assert_eq!(Code::of(87, &known), Code::Ptx(86));
        // Nothing that it knows would run there: the compiler says so.
        assert_eq!(Code::of(70, &known), Code::Cubin(70));
        assert_eq!(Code::of(90, &[]), Code::Cubin(90));
        assert_eq!(Code::Ptx(90).architecture(), "compute_90");
    }

    #[test]
    fn a_torn_image_is_not_taken() {
        let file = sealed(b"an image");
        assert_eq!(whole(&file), Some(b"an image".to_vec()));
        assert_eq!(whole(&file[..file.len() - 1]), None);
        assert_eq!(whole(b""), None);
    }
}
