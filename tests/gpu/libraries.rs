//! Where the driver's and CUDA's libraries are looked for, and what is said where one of them cannot be used.

use crate::SPLIT;
use crate::stand_in::{Gpu, HOST};
use std::os::unix::fs::symlink;
use std::path::Path;

/// Puts those libraries of a variant whose names begin so into a directory of the home: under their sonames
/// alone, as runtime packages have them.
fn lay(gpu: &Gpu, (variant, names): (&str, &[&str]), place: &str) {
    let to = gpu.home.path(place);
    std::fs::create_dir_all(&to).expect("made");
    for entry in std::fs::read_dir(gpu.over(variant).libraries()).expect("built") {
        let path = entry.expect("an entry").path();
        let file = path.file_name().expect("a name").to_string_lossy();
        if names.iter().any(|name| file.starts_with(name)) {
            symlink(&path, to.join(&*file)).expect("linked");
        }
    }
}

const CUBLAS: &[&str] = &["libcublas"];
const NVRTC: &[&str] = &["libnvrtc"];
const BOTH: &[&str] = &["libcublas", "libnvrtc"];

/// None of these directories is one of the loader's, nor do the libraries that lie there name it.
#[test]
fn libraries_are_found_where_no_loader_looks() {
    let Some(gpu) = Gpu::new() else { return };
    let on_host = gpu.tokens(HOST, SPLIT);
    let packages = |env: &str| format!("{env}/lib/python3.12/site-packages/nvidia");
    let (new, old) = (packages("new"), packages("old"));
    lay(&gpu, ("default", BOTH), &format!("{new}/cu13/lib"));
    lay(&gpu, ("cuda-12", CUBLAS), &format!("{old}/cublas/lib"));
    lay(&gpu, ("cuda-12", NVRTC), &format!("{old}/cuda_nvrtc/lib"));
    lay(&gpu, ("default", BOTH), "conda/lib");
    lay(&gpu, ("default", BOTH), "toolkit/lib64");
    let driver = gpu.over("driver-alone");
    let cause = "libcublas was not found";
    driver.run("auto", SPLIT).fails(1, &[cause]);
    for (variable, place, version) in [
        ("VIRTUAL_ENV", "new", "13000"),
        ("VIRTUAL_ENV", "old", "12080"),
        ("CONDA_PREFIX", "new", "13000"),
        ("CONDA_PREFIX", "conda", "13000"),
        ("CUDA_PATH", "toolkit", "13000"),
        ("CUDA_HOME", "toolkit", "13000"),
    ] {
        let place = gpu.home.path(place).display().to_string();
        let told = [(variable, place.as_str()), ("FAKE_CUDA_DRIVER", version)];
        // Compiled anew: the compiler, too, must find what belongs to it.
        let _ = std::fs::remove_dir_all(gpu.home.path("kernels"));
        let found = driver.with(&told).tokens("auto", SPLIT);
        assert_eq!(found, on_host, "{told:?}");
    }
    // A Python that no environment names: what is first in the path, and Debian's place for what pip installs.
    for site in ["lib", "local/lib"] {
        let image = format!("image-{}", site.len());
        let packages = format!("{image}/{site}/python3.12/dist-packages/nvidia");
        lay(&gpu, ("default", BOTH), &format!("{packages}/cu13/lib"));
        let bin = gpu.home.path(&image).join("bin");
        std::fs::create_dir_all(&bin).expect("made");
        std::fs::write(bin.join("python3"), "").expect("written");
        let path = bin.display().to_string();
        let found = driver.with(&[("PATH", &path)]).tokens("auto", SPLIT);
        assert_eq!(found, on_host, "{site}");
    }
}

#[test]
fn libraries_of_cuda_12_serve_both_drivers() {
    let Some(gpu) = Gpu::new() else { return };
    let on_host = gpu.tokens(HOST, SPLIT);
    let older = gpu.over("cuda-12");
    for driver in ["12000", "12080", "13000"] {
        let told = [("FAKE_CUDA_DRIVER", driver)];
        assert_eq!(older.with(&told).tokens("auto", SPLIT), on_host, "{driver}");
    }
}

/// The first library that is found may be of a newer CUDA than the driver: one that can be used comes behind it.
#[test]
fn libraries_that_are_too_new_are_passed_over() {
    let Some(gpu) = Gpu::new() else { return };
    let on_host = gpu.tokens(HOST, SPLIT);
    let packages = "wheels/lib/python3.12/site-packages/nvidia";
    lay(&gpu, ("cuda-12", CUBLAS), &format!("{packages}/cublas/lib"));
    lay(
        &gpu,
        ("cuda-12", NVRTC),
        &format!("{packages}/cuda_nvrtc/lib"),
    );
    lay(&gpu, ("default", BOTH), "toolkit/lib64");
    let place = |name: &str| gpu.home.path(name).display().to_string();
    let (wheels, toolkit) = (place("wheels"), place("toolkit"));
    let told = [
        ("FAKE_CUDA_DRIVER", "12080"),
        ("VIRTUAL_ENV", wheels.as_str()),
        ("CUDA_HOME", toolkit.as_str()),
    ];
    // In a directory that is looked into before, and where the loader looks, under their sonames and without.
    let driver = gpu.over("driver-alone").with(&told);
    assert_eq!(driver.tokens("auto", SPLIT), on_host);
    let loader = gpu.over("default").with(&told);
    assert_eq!(loader.tokens("auto", SPLIT), on_host);
    for name in ["libcublas.so", "libnvrtc.so"] {
        let to = gpu.home.path("toolkit/lib64").join(format!("{name}.13"));
        symlink(to, gpu.home.path("toolkit/lib64").join(name)).expect("linked");
    }
    let alone = driver.libraries().display();
    let path = format!("{toolkit}/lib64:{alone}");
    let developing = driver.with(&[("LD_LIBRARY_PATH", &path)]);
    assert_eq!(developing.tokens("auto", SPLIT), on_host);
    // There is nothing else: what is in the way is named.
    let cause = format!("{toolkit}/lib64/libcublas.so is of CUDA 13 and the driver of CUDA 12.8");
    let nothing = driver.with(&[("VIRTUAL_ENV", "")]);
    nothing.run("auto", SPLIT).fails(1, &[&cause, FOR_12]);
    std::fs::remove_dir_all(gpu.home.path(&format!("{packages}/cuda_nvrtc"))).expect("removed");
    let cause = format!("{toolkit}/lib64/libnvrtc.so is of CUDA 13 and the driver of CUDA 12.8");
    driver.run("auto", SPLIT).fails(1, &[&cause, FOR_12]);
}

/// A link to a library may stand alone where it is found: what belongs to it lies beside the library.
#[test]
fn what_belongs_to_a_library_is_looked_for_beside_it() {
    let Some(gpu) = Gpu::new() else { return };
    let on_host = gpu.tokens(HOST, SPLIT);
    let alone = &["libcublas.so", "libnvrtc.so"];
    lay(&gpu, ("default", alone), "links/lib64");
    let links = gpu.home.path("links").display().to_string();
    let driver = gpu.over("driver-alone").with(&[("CUDA_HOME", &links)]);
    let _ = std::fs::remove_dir_all(gpu.home.path("kernels"));
    assert_eq!(driver.tokens("auto", SPLIT), on_host);
}

/// The stand-in compiler knows 9.0 at most, and its machine code runs on the same major version alone.
#[test]
fn a_gpu_newer_than_the_compiler_is_served_by_its_driver() {
    let Some(gpu) = Gpu::new() else { return };
    let on_host = gpu.tokens(HOST, SPLIT);
    let kept = |extension: &str| {
        let files = std::fs::read_dir(gpu.home.path("kernels")).expect("kept images");
        let names = files.map(|f| f.expect("an entry").file_name().into_string());
        let of = |name: &String| name.ends_with(extension);
        names.filter(|n| n.as_ref().is_ok_and(of)).count()
    };
    let newer = gpu.with(&[("FAKE_CUDA_CAPABILITY", "120")]);
    // The second time from what was kept.
    for _ in 0..2 {
        assert_eq!(newer.tokens("cuda:0", SPLIT), on_host);
        assert_eq!((kept(".ptx") > 0, kept(".cubin")), (true, 0));
    }
}

const FOR_13: &str = "pip install nvidia-cublas nvidia-cuda-nvrtc (or, from NVIDIA's repository, apt install libcublas-13-0";
const FOR_12: &str = "pip install nvidia-cublas-cu12 nvidia-cuda-nvrtc-cu12 (or, from NVIDIA's repository, apt install libcublas-12-";
const DRIVER: &str = "apt install nvidia-driver";

#[test]
fn a_gpu_that_cannot_be_used_is_an_error_with_the_way_out() {
    let Some(gpu) = Gpu::new() else { return };
    let plain = ("", "");
    for (libraries, told, cause, remedy) in [
        ("no-cublas", plain, "libcublas was not found", FOR_13),
        ("no-nvrtc", plain, "libnvrtc was not found", FOR_13),
        (
            "no-cublas",
            ("FAKE_CUDA_DRIVER", "12040"),
            "libcublas was not found",
            FOR_12,
        ),
        ("no-gemm-ex", plain, "has no cublasGemmEx", FOR_13),
        (
            "no-host-register",
            plain,
            "has no cuMemHostRegister_v2: it is too old",
            DRIVER,
        ),
        (
            "default",
            ("FAKE_CUDA_DRIVER", "11080"),
            "knows CUDA 11.8 only",
            DRIVER,
        ),
        (
            "default",
            ("FAKE_CUDA_DRIVER", "12080"),
            "default/libcublas.so.13 is of CUDA 13 and the driver of CUDA 12.8",
            FOR_12,
        ),
        (
            "new-cublas",
            ("FAKE_CUDA_DRIVER", "12080"),
            "new-cublas/libcublas.so.13 is of CUDA 13 and the driver of CUDA 12.8",
            FOR_12,
        ),
        (
            "default",
            ("FAKE_CUDA_CAPABILITY", "70"),
            "compute capability 7.0, and the kernels need 7.5",
            "another GPU",
        ),
        (
            "default",
            ("FAKE_CUDA_INIT", "803"),
            "CUDA_ERROR_SYSTEM_DRIVER_MISMATCH",
            "restart the machine",
        ),
        (
            "default",
            ("FAKE_CUDA_INIT", "34"),
            "LD_LIBRARY_PATH leads to CUDA's stub driver",
            "cuda/default out of it",
        ),
    ] {
        for device in ["cuda:0", "auto"] {
            let unusable = gpu.over(libraries).with(&[told]);
            let said = unusable
                .run(device, SPLIT)
                .fails(1, &[cause, remedy, "--device cpu"]);
            assert_eq!(said.matches("--device cpu").count(), 1, "{said}");
        }
    }
}

#[test]
fn kernels_that_cannot_be_compiled_or_hold_no_context_are_told() {
    let Some(gpu) = Gpu::new() else { return };
    let failing = |told: (&str, &str), parts: &[&str]| {
        gpu.with(&[told]).run("cuda:0", SPLIT).fails(1, parts);
    };
    failing(("FAKE_NVRTC_FAIL", "1"), &["cannot be compiled"]);
    // Less than the context takes.
    failing(("FAKE_CUDA_VRAM", "33554432"), &["gpu memory missing"]);
}

/// Driver, cuBLAS and compiler, and no management library, as in a container that has been given CUDA's part alone.
fn unmanaged(gpu: &Gpu) -> Gpu {
    lay(gpu, ("default", BOTH), "toolkit/lib64");
    let toolkit = gpu.home.path("toolkit").display().to_string();
    gpu.over("driver-alone").with(&[("CUDA_HOME", &toolkit)])
}

/// Nobody says what is free: the driver finds out, and what is told names the way out.
#[test]
fn memory_that_runs_out_in_the_driver_is_told() {
    let Some(gpu) = Gpu::new() else { return };
    let alone = unmanaged(&gpu);
    let words = format!("{SPLIT} --gpu-mem 900MiB");
    for (vram, parts) in [
        (
            "33554432",
            ["no memory left for a context", "end other programs"],
        ),
        (
            "68157440",
            ["of GPU memory are needed in one piece", "--gpu-mem"],
        ),
    ] {
        let small = alone.with(&[("FAKE_CUDA_VRAM", vram)]);
        small.run("cuda:0", &words).fails(1, &parts);
    }
}

#[test]
fn device_memory_that_nobody_counts_is_not_called_measured() {
    let Some(gpu) = Gpu::new() else { return };
    let on_host = gpu.tokens(HOST, SPLIT);
    assert_eq!(unmanaged(&gpu).tokens("cuda:0", SPLIT), on_host);
    let report = gpu.home.json("report.json");
    assert_eq!(report["measured"]["tiers"]["gpu"]["peak_bytes"], 0);
    let compared = gpu.output("compare report.json --json");
    let compared: serde_json::Value = serde_json::from_slice(&compared.stdout).expect("JSON");
    let error = &compared["runs"][0]["error_percent"]["bytes"];
    assert!(
        error["gpu"].is_null() && error["cpu"].is_number(),
        "{error}"
    );
}

/// The management library sees it, as in a container whose device files are missing.
#[test]
fn a_gpu_that_cuda_does_not_see_is_no_reason_to_compute_on_the_cpu() {
    let Some(gpu) = Gpu::new() else { return };
    let words = "--percent 0 50 0 50 0 50 --gpu-batch-size 2";
    let seen = gpu.with(&[("FAKE_CUDA_INIT", "100")]);
    let remedy = "NVIDIA_DRIVER_CAPABILITIES=compute,utility";
    let cause = "is there, and CUDA says that the NVIDIA driver shows no GPU";
    let said = [cause, remedy, "--device cpu"];
    seen.run("auto", words).fails(1, &said);
    seen.run("cpu", words).good();
    let visible = |devices: &str| seen.with(&[("CUDA_VISIBLE_DEVICES", devices)]);
    let remedy = "name a device that is there";
    visible("7").run("auto", words).fails(1, &[cause, remedy]);
    visible("").run("auto", words).good();
}

/// Functions of the three libraries that a source calls.
fn called(source: &str) -> Vec<&str> {
    let of = |rest: &str| -> Option<usize> {
        let end = rest.find(|c: char| !c.is_ascii_alphanumeric() && c != '_')?;
        let known = ["cu", "nvrtc", "cublas"].iter().any(|stem| {
            let after = rest[..end].strip_prefix(stem);
            after.is_some_and(|a| a.starts_with(|c: char| c.is_ascii_uppercase()))
        });
        (known && rest[end..].starts_with('(')).then_some(end)
    };
    let calls = source.match_indices("::").map(|(at, _)| &source[at + 2..]);
    calls.filter_map(|rest| Some(&rest[..of(rest)?])).collect()
}

/// cudarc panics on a function that is not there.
#[test]
fn every_function_that_is_called_is_looked_for_before() {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("src/machine/cuda");
    let read = |path: &Path| std::fs::read_to_string(path).expect("a source");
    let listed = read(&dir.join("presence.rs"));
    let mut count = 0;
    for entry in std::fs::read_dir(&dir).expect("sources") {
        let path = entry.expect("an entry").path();
        for function in called(&read(&path)) {
            let quoted = format!("\"{function}\"");
            assert!(listed.contains(&quoted), "{}: {function}", path.display());
            count += 1;
        }
    }
    assert!(count > 40, "{count} calls");
}
