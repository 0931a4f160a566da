//! How long a thread wants a processor at a time. No priorities, no rights needed.

/// The shortest that Linux allows.
#[cfg(target_os = "linux")]
const SHORT_TURN_NS: u64 = 100_000;

/// Tells the scheduler that the calling thread works a moment and then waits again: when it wakes up, it
/// comes before threads that compute without end, instead of after their turn (Linux 6.12; earlier kernels
/// take no notice). It gets no more of the processor in all. False where that cannot be said.
#[cfg(target_os = "linux")]
pub fn take_short_turns() -> bool {
    let mut attributes = Attributes::default();
    let size = size_of::<Attributes>() as u32;
    // SAFETY: the kernel writes at most `size` bytes of its own first version of this structure.
    let known = unsafe { libc::syscall(libc::SYS_sched_getattr, 0, &mut attributes, size, 0) };
    if known != 0 || attributes.policy != libc::SCHED_OTHER as u32 {
        return false;
    }
    attributes.size = size;
    attributes.runtime_ns = SHORT_TURN_NS;
    // SAFETY: the kernel reads `size` bytes; all else is as it was.
    unsafe { libc::syscall(libc::SYS_sched_setattr, 0, &attributes, 0) == 0 }
}

#[cfg(not(target_os = "linux"))]
pub fn take_short_turns() -> bool {
    false
}

/// `struct sched_attr`, first version (sched_setattr(2)).
#[cfg(target_os = "linux")]
#[derive(Default)]
#[repr(C)]
struct Attributes {
    size: u32,
    policy: u32,
    flags: u64,
    nice: i32,
    priority: u32,
    runtime_ns: u64,
    deadline_ns: u64,
    period_ns: u64,
}

#[cfg(all(test, target_os = "linux"))]
mod tests {
    use super::*;

    #[test]
    fn a_thread_can_ask_for_short_turns_and_keeps_its_rank() {
        // SAFETY: reads a number.
        let nice = || unsafe { libc::getpriority(libc::PRIO_PROCESS, 0) };
        let asked = std::thread::spawn(move || {
            let before = nice();
            (take_short_turns(), before == nice())
        });
        assert_eq!(asked.join().unwrap(), (true, true));
    }
}
