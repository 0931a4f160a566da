//! Disks as they are met: full, nearly full, and without direct I/O. Where this machine cannot make such
//! a disk (no root, no loop device, no C compiler), a test says so and checks nothing.

use crate::harness::{Ended, Home, RAGGED, in_order};
use std::path::{Path, PathBuf};
use std::process::Command;

/// A small ext4 of its own in a file, mounted over a loop device; gone at the end.
struct SmallDisk {
    dir: PathBuf,
}

impl SmallDisk {
    fn new(home: &Home, mebibytes: u64) -> Option<SmallDisk> {
        let (image, dir) = (home.path("disk.img"), home.path("disk"));
        std::fs::create_dir(&dir).expect("made");
        let file = std::fs::File::create(&image).expect("made");
        file.set_len(mebibytes << 20).expect("sparse");
        let made = succeeds(
            Command::new("mkfs.ext4")
                .args(["-q", "-m", "0"])
                .arg(&image),
        ) && succeeds(
            Command::new("mount")
                .args(["-o", "loop"])
                .arg(&image)
                .arg(&dir),
        );
        if !made {
            eprintln!(
                "skipped: a file cannot be mounted as a disk here (it takes root and mkfs.ext4)"
            );
            return None;
        }
        home.save_profiles_in(&dir);
        Some(SmallDisk { dir })
    }

    /// Leaves about this much room.
    fn fill_up_to(&self, free_bytes: u64) {
        let free = loadmaster::machine::disk::free_bytes(&self.dir).expect("asked");
        let file = std::fs::File::create(self.dir.join("filler")).expect("made");
        let fill = free.saturating_sub(free_bytes) as i64;
        // SAFETY: a plain call on an open descriptor.
        let rc = unsafe { libc::fallocate(std::os::fd::AsRawFd::as_raw_fd(&file), 0, 0, fill) };
        assert_eq!(rc, 0, "{}", std::io::Error::last_os_error());
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        succeeds(Command::new("umount").arg(&self.dir));
    }
}

fn succeeds(command: &mut Command) -> bool {
    command.output().is_ok_and(|ended| ended.status.success())
}

/// What is left under a directory's name there, "lost+found" and locks of stores aside.
fn left(dir: &Path) -> Vec<String> {
    let entries = std::fs::read_dir(dir).into_iter().flatten().flatten();
    let names = entries.map(|e| e.file_name().to_string_lossy().into_owned());
    names.filter(|name| !name.ends_with(".lock")).collect()
}

#[test]
fn a_disk_too_small_for_the_weights_is_told_before_packing() {
    let home = Home::new();
    let Some(disk) = SmallDisk::new(&home, 64) else {
        return;
    };
    let words =
        "run --model synth:opt-125m --prompt-len 4 --gen-len 2 --num-prompts 2 --offload-dir disk";
    // Planned against what is free, and against more than there is.
    home.run(words)
        .fails(1, &["of disk memory", "--disk-space"]);
    home.run(&format!("{words} --disk-space 1GiB"))
        .fails(1, &["missing", "--offload-dir"]);
    assert_eq!(left(&disk.dir.join("store")), [""; 0], "no half store");
}

#[test]
fn a_disk_that_filled_up_since_the_plan_is_told() {
    let home = Home::new();
    let Some(disk) = SmallDisk::new(&home, 64) else {
        return;
    };
    home.write("in.jsonl", RAGGED);
    let shares = "--percent 0 50 0 0 0 0";
    home.run(&format!(
        "plan --model GOLDEN --input in.jsonl {shares} --offload-dir disk -o plan.toml"
    ))
    .good();
    disk.fill_up_to(16 << 10);
    let exec = "exec plan.toml --input in.jsonl --offload-dir disk --output out.jsonl";
    let ended = home.run(exec);
    ended.fails(1, &["missing", "--offload-dir"]);
    assert!(!home.path("out.jsonl").exists(), "nothing was begun");
    assert_eq!(left(&disk.dir.join("store")), [""; 0]);
    std::fs::remove_file(disk.dir.join("filler")).expect("removed");
    home.run(exec).good();
}

#[test]
fn results_that_no_longer_fit_leave_whole_lines() {
    let home = Home::new();
    let Some(disk) = SmallDisk::new(&home, 64) else {
        return;
    };
    let line = |n: usize| format!("{{\"prompt\": [{}, 7], \"max_tokens\": 9}}\n", 4 + n % 90);
    home.write("in.jsonl", &(0..1500).map(line).collect::<String>());
    let run = "run --model GOLDEN --input in.jsonl --gpu-batch-size 50 --output disk/out.jsonl";
    disk.fill_up_to(48 << 10);
    let ended = home.run(run);
    let text = ended.fails(1, &["out.jsonl", "whole lines", "make room"]);
    let lines = in_order(&home.read("disk/out.jsonl"));
    assert!((1..1500).contains(&lines.len()), "{}", lines.len());
    assert!(
        text.contains(&format!("after {} whole lines", lines.len())),
        "{text}"
    );
}

/// Open and transfer calls of the C library that know no direct I/O, as on a filesystem without it.
const NO_DIRECT: &str = r#"
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>
static int refuses(const char *when) {
  const char *asked = getenv("NO_DIRECT");
  return asked && !strcmp(asked, when);
}
int open64(const char *path, int flags, ...) {
  va_list rest; va_start(rest, flags); int mode = va_arg(rest, int); va_end(rest);
  int (*real)(const char *, int, ...) = dlsym(RTLD_NEXT, "open64");
  if ((flags & O_DIRECT) && refuses("open")) { errno = EINVAL; return -1; }
  return real(path, flags, mode);
}
static int direct(int fd) { return refuses("transfer") && (fcntl(fd, F_GETFL) & O_DIRECT); }
ssize_t pread64(int fd, void *to, size_t bytes, off_t at) {
  ssize_t (*real)(int, void *, size_t, off_t) = dlsym(RTLD_NEXT, "pread64");
  if (direct(fd)) { errno = EINVAL; return -1; }
  return real(fd, to, bytes, at);
}
ssize_t pwrite64(int fd, const void *from, size_t bytes, off_t at) {
  ssize_t (*real)(int, const void *, size_t, off_t) = dlsym(RTLD_NEXT, "pwrite64");
  if (direct(fd)) { errno = EINVAL; return -1; }
  return real(fd, from, bytes, at);
}
"#;

#[test]
fn without_direct_io_everything_still_works() {
    let home = Home::new();
    home.write("refuse.c", NO_DIRECT);
    let library = home.path("refuse.so");
    let mut compiler = Command::new("cc");
    compiler
        .args(["-shared", "-fPIC", "-o"])
        .arg(&library)
        .arg(home.path("refuse.c"));
    if !succeeds(compiler.arg("-ldl")) {
        eprintln!("skipped: no C compiler to make a library that refuses direct I/O");
        return;
    }
    home.write("in.jsonl", RAGGED);
    let shares = "--percent 0 40 0 40 0 40 --gpu-batch-size 2";
    let run = format!("run --model GOLDEN --input in.jsonl --ignore-eos {shares}");
    let direct = home.run(&run).good().lines();
    home.run("store prune").good();
    for when in ["open", "transfer"] {
        for store in home
            .run("store list")
            .good()
            .stdout
            .lines()
            .filter(|l| l.contains("MiB"))
        {
            let name = store.split_whitespace().next().expect("a name");
            home.run(&format!("store rm {name}")).good();
        }
        let mut command = home.command(&run);
        let ended = command
            .env("LD_PRELOAD", &library)
            .env("NO_DIRECT", when)
            .output();
        let ended = Ended::new(&run, ended.expect("started")).good();
        assert_eq!(ended.lines(), direct, "refused at the {when}");
    }
}
