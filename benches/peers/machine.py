"""What this machine lets a process have: CPUs within affinity and quotas, counted as src/machine/os counts them,
and DRAM, page cache included, by a control group of either version."""

import contextlib
import os
import pathlib
import re
import subprocess
import sys
import time

ROOT = pathlib.Path("/")
NAME = "loadmaster-peers"


class Failed(Exception):
    """What was asked for cannot be had; says why."""


def cores(root=ROOT):
    """CPUs that this process may use. Half a CPU more would only be throttled, so that a quota is rounded down."""
    quota = min(quotas(root), default=float("inf"))
    return int(min(len(os.sched_getaffinity(0)), max(quota, 1)))


def quotas(root=ROOT):
    """CPUs' worth of time that each enclosing group allows, where it says so: "-1" and "max" say that it does not."""
    for group in groups("cpu", root):
        with contextlib.suppress(OSError, ValueError):
            quota, period = (int((group / f"cpu.cfs_{what}_us").read_text()) for what in ("quota", "period"))
            if quota > 0:
                yield quota / max(period, 1)
    for group in groups(None, root):
        with contextlib.suppress(OSError, ValueError):
            quota, period = map(float, (group / "cpu.max").read_text().split())
            yield quota / max(period, 1)


def groups(controller, root=ROOT):
    """Directories of the control groups around this process, innermost first, up to the mount: of the v1 hierarchy
    that has `controller`, or of v2 (None)."""
    own, mount = own_group(controller, root), mounted(controller, root)
    if own is None or mount is None:
        return []
    (top, point), below = mount, pathlib.PurePosixPath()
    # A path from outside (another namespace) cannot be followed: then the mount is the nearest group.
    with contextlib.suppress(ValueError):
        below = pathlib.PurePosixPath(own).relative_to(top)
    if ".." in below.parts:
        below = pathlib.PurePosixPath()
    return [root / point.lstrip("/") / path for path in (below, *below.parents)]


def own_group(controller, root):
    for line in lines(root / "proc/self/cgroup"):
        _, names, path = line.split(":", 2)
        if controller in names.split(",") if controller else not names:
            return path
    return None


def mounted(controller, root):
    """Which group is mounted there and where, of the wanted hierarchy."""
    for line in lines(root / "proc/self/mountinfo"):
        left, right = line.split(" - ", 1)
        kind, *_, options = right.split(" ")
        if kind == "cgroup" and controller in options.split(",") if controller else kind == "cgroup2":
            return [unescaped(field) for field in left.split(" ")[3:5]]
    return None


def lines(file):
    try:
        return file.read_text().splitlines()
    except OSError:
        return []


def unescaped(field):
    """mountinfo writes blanks and backslashes as "\\040"."""
    return re.sub(r"\\([0-7]{3})", lambda code: chr(int(code[1], 8)), field)


@contextlib.contextmanager
def confined(limit):
    """What moves a child into a memory group of `limit` bytes, page cache included, which goes with this block."""
    group = memory_group(limit)
    try:
        yield lambda: (group / "cgroup.procs").write_text(str(os.getpid()))
    finally:
        remove(group)


def remove(group):
    """Once who was killed in it has left, which may take a moment."""
    for _ in range(100):
        try:
            return group.rmdir()
        except OSError as now:
            why = now
            time.sleep(0.02)
    print(f"{group} stays: {why}", file=sys.stderr)


def memory_group(limit):
    """In v1 at the top. In v2 as near as it can be, so that what encloses this process still holds: not in its own
    group as a rule, since one that holds processes gives its children no controller."""
    causes = []
    for parent in groups("memory")[-1:] or groups(None):
        try:
            return made(parent, limit)
        except OSError as why:
            causes.append(f"  in {parent}: {why}")
    raise Failed(
        "no control group can be made that bounds what a row takes of DRAM with the files it reads:\n"
        + ("\n".join(causes) or "  no hierarchy of control groups is mounted")
        + "\nStart this as root, or, where systemd has v2, by `systemd-run --user --scope -p Delegate=yes`; "
        "with --unconfined it runs without, and says so above the table."
    )


def made(parent, limit):
    """A group within `parent` that bounds memory and takes processes."""
    enable(parent)
    group = parent / NAME
    with contextlib.suppress(FileNotFoundError):
        group.rmdir()  # left by a run that was killed
    group.mkdir()
    try:
        bound(group, limit)
        try_out(group)
    except OSError:
        group.rmdir()
        raise
    return group


def enable(parent):
    """In v2 a group decides which controllers those within it have."""
    control = parent / "cgroup.subtree_control"
    if not control.exists() or "memory" in control.read_text().split():
        return
    if "memory" not in (parent / "cgroup.controllers").read_text().split():
        raise OSError("it has no memory controller")
    try:
        control.write_text("+memory")
    except OSError as why:
        raise OSError(f"memory cannot be enabled for groups within it: {why.strerror}") from why


def bound(group, limit):
    """So much memory, and no swap instead of it where the kernel counts swap."""
    if (group / "memory.limit_in_bytes").exists():
        most, swap = ("memory.limit_in_bytes", limit), ("memory.memsw.limit_in_bytes", limit)
    else:
        most, swap = ("memory.max", limit), ("memory.swap.max", 0)
    (group / most[0]).write_text(str(most[1]))
    if (group / swap[0]).exists():
        (group / swap[0]).write_text(str(swap[1]))


def try_out(group):
    """Moving a process may be refused where making the group was not."""
    child = subprocess.Popen(["sleep", "60"])
    try:
        (group / "cgroup.procs").write_text(str(child.pid))
    finally:
        child.kill()
        child.wait()
