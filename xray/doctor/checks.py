"""Checks of this machine: hardware, libraries, and the features that each missing one disables.

A check is a generator of findings. An exception in a check becomes a finding, and the other checks
still run.
"""

from __future__ import annotations

import errno
import os
import platform
import resource
import shutil
import socket
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from data_pipelines.stream.limits import ENOUGH_FILES, MORE_FILES, MORE_MEMORY, SHARED_MEMORY
from xray import dist
from xray.doctor.libraries import PACKAGES, Finding, State, imports
from xray.errors import brief
from xray.version import __version__

GB = 1e9
MIN_DISK, MIN_SHARED_MEMORY = 10 * GB, 1 * GB


def examine(out: Path) -> list[Finding]:
    """Run all checks and return their findings; out: the folder for runs."""
    checks: list[tuple[str, Callable[[], Iterator[Finding]]]] = [
        ("processor", processor),
        ("devices", devices),
        ("process groups", process_groups),
        ("pictures", pictures),
        ("clips", clips),
        ("decode process", decode_process),
        ("disk", lambda: disk(out)),
        ("shared memory", lambda: shared_memory(SHARED_MEMORY)),
        ("open files", open_files),
        ("network", network),
        ("launcher", launchers),
        ("compiler", compiler),
    ]
    first = [*guarded("versions", versions), *imports(PACKAGES)]
    return [*first, *(finding for name, check in checks for finding in guarded(name, check))]


def guarded(name: str, check: Callable[[], Iterator[Finding]]) -> list[Finding]:
    """Run a check and return its findings; an exception becomes the last finding."""
    findings: list[Finding] = []
    try:
        findings += check()
    except Exception as error:  # a driver or library can raise any type
        findings.append(Finding(name, f"{type(error).__name__}: {brief(error)}", "", "broken"))
    return findings


def versions() -> Iterator[Finding]:
    """Check the versions of xray and Python."""
    yield Finding("xray", f"{__version__} ({Path(__file__).resolve().parents[1]})")
    found = f"{platform.python_version()} on {platform.platform(terse=True)}"
    yield Finding("python", found)


def processor() -> Iterator[Finding]:
    """Check cores and memory, and their limits in a container."""
    cores = len(os.sched_getaffinity(0))
    quota = cgroup_cores(Path("/sys/fs/cgroup/cpu.max"))
    found = f"{cores} cores" + (f", limited to {quota:g} by cgroup" if quota else "")
    threads = os.environ.get("OMP_NUM_THREADS")
    lacks = ""
    if quota and quota < cores and not threads:
        lacks = f"one thread per core is too many: set OMP_NUM_THREADS={max(1, int(quota))}"
    found += f", OMP_NUM_THREADS={threads}" if threads else ""
    yield Finding.of("processor", found, lacks)
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = _number(Path("/sys/fs/cgroup/memory.max"))
    less = f", limited to {limit / GB:.0f} GB by cgroup" if limit and limit < memory else ""
    yield Finding("memory", f"{memory / GB:.0f} GB{less}")


def cgroup_cores(path: Path) -> float | None:
    """Read the CPU limit of a cgroup's cpu.max in cores; None without a limit."""
    try:
        quota, period = path.read_text("utf-8").split()
        return None if quota == "max" else int(quota) / int(period)
    except (OSError, ValueError):
        return None


def _number(path: Path) -> int | None:
    try:
        return int(path.read_text("utf-8"))
    except (OSError, ValueError):
        return None


def devices() -> Iterator[Finding]:
    """Check the GPUs, with a small computation on each, and the support of bf16."""
    import torch

    if not torch.cuda.is_available():
        built = torch.version.cuda or "none"
        lacks = "no CUDA device: the CPU suits only tests and small models"
        yield Finding("devices", "cpu", f"{lacks} (torch is built for CUDA {built})", "missing")
    for number in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(number)
        free, total = torch.cuda.mem_get_info(number)
        # a driver may list a device on which every computation fails
        torch.ones(8, 8, device=f"cuda:{number}").sum().item()
        yield Finding(
            f"cuda:{number}",
            f"{properties.name}, {total / GB:.0f} GB, {free / GB:.0f} GB free, "
            f"compute capability {properties.major}.{properties.minor}",
        )
    if torch.cuda.is_available():
        native = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        flags = Path("/proc/cpuinfo").read_text("utf-8")
        native = "avx512_bf16" in flags or "amx_bf16" in flags
    lacks = "" if native else "bf16 is not faster here: set train.precision=fp32"
    yield Finding.of("bf16", "in hardware" if native else "not in hardware", lacks)


def process_groups() -> Iterator[Finding]:
    """Check torch's communication backends, each with an all-reduce in a group of one process."""
    import torch
    import torch.distributed as group

    backends = {"gloo": group.is_gloo_available(), "nccl": group.is_nccl_available()}
    for name, available in backends.items():
        if name == "nccl" and not torch.cuda.is_available():
            continue
        if not available:
            lacks = "no training on several processes"
            yield Finding(name, "not built into torch", lacks, "broken")
            continue
        device = "cuda" if name == "nccl" else "cpu"
        if dist.world_size() > 1:
            yield Finding(name, "available; not tested with several processes")
            continue
        group.init_process_group(name, store=group.HashStore(), rank=0, world_size=1)
        try:
            group.all_reduce(torch.ones(1, device=device))
        finally:
            group.destroy_process_group()
        yield Finding(name, "works")


def pictures() -> Iterator[Finding]:
    """Decode a JPEG."""
    from data_pipelines.decode.images import decode_image
    from data_pipelines.ingest.demo import example

    yield Finding("pictures", f"a JPEG of {len(example())} bytes: {decode_image(example()).size}")


def clips() -> Iterator[Finding]:
    """Decode a small generated clip with each library."""
    import numpy as np

    from data_pipelines.decode.decoders import AvClip, DecordClip
    from data_pipelines.ingest.demo import example

    data = example("left")
    for name, reader, required in (("PyAV", AvClip, True), ("decord", DecordClip, False)):
        try:
            clip = reader(data)
            shape = clip.read(np.array([0, clip.total - 1]), 0)[-1].shape
            yield Finding(f"clips by {name}", f"an mp4 of {clip.total} frames: {shape}")
        except Exception as error:  # each library raises its own types
            lacks = "no clips can be read" if required else "PyAV reads all clips"
            state: State = "broken" if required else "missing"
            yield Finding(f"clips by {name}", brief(error), lacks, state)


def decode_process() -> Iterator[Finding]:
    """Decode a clip in the separate process that training uses."""
    from data_pipelines.decode.decoders import FrameChoice
    from data_pipelines.decode.sandbox import ClipDecoder
    from data_pipelines.ingest.demo import example

    decoder = ClipDecoder(60.0, 2.0)
    try:
        frames = decoder.decode(example("left"), FrameChoice(4))
        yield Finding("decode process", f"works: {frames.pixels.shape}")
    finally:
        decoder.close()


def disk(out: Path) -> Iterator[Finding]:
    """Check free space at `out`, or its nearest existing parent, and write a file there."""
    folder = next(p for p in (out, *out.absolute().parents) if p.is_dir())
    name = f"disk at {folder}"
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(bytes(1 << 20))
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        reason = "it is full" if error.errno == errno.ENOSPC else brief(error)
        yield Finding(name, reason, "runs cannot be saved here: choose another out=", "broken")
        return
    free = shutil.disk_usage(folder).free
    advice = "a checkpoint of a ViT-L takes 4 GB: choose another out= or free space"
    found = f"{free / GB:.0f} GB free, writable"
    yield Finding.of(name, found, advice if free < MIN_DISK else "")


def shared_memory(folder: Path) -> Iterator[Finding]:
    """Check shared memory, through which loader processes send batches."""
    fix = f"set data.workers=0, or {MORE_MEMORY}"
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b"x")
        total = shutil.disk_usage(folder).total
    except OSError as error:
        yield Finding(f"{folder}", brief(error), f"loader processes do not work: {fix}", "missing")
        return
    lacks = "" if total >= MIN_SHARED_MEMORY else f"too little for many loader processes: {fix}"
    yield Finding.of(f"{folder}", f"{total / GB:.2g} GB", lacks)


def open_files() -> Iterator[Finding]:
    """Check the limit of open files."""
    limit, hard_limit = resource.getrlimit(resource.RLIMIT_NOFILE)
    hard = "none" if hard_limit == resource.RLIM_INFINITY else str(hard_limit)
    lacks = ""
    if limit != resource.RLIM_INFINITY and limit < ENOUGH_FILES:
        lacks = f"many shards or loader processes may need more: {MORE_FILES}"
    yield Finding.of("open files", f"{limit} (hard limit {hard})", lacks)


def network() -> Iterator[Finding]:
    """Check that a port is free and that the host name has an address, which gloo needs."""
    with socket.socket() as probe:
        probe.bind(("", 0))
        yield Finding("ports", f"{probe.getsockname()[1]} is free")
    name = socket.gethostname()
    try:
        yield Finding("host name", f"{name} is {socket.gethostbyname(name)}")
    except OSError as error:
        interfaces = ", ".join(name for _, name in socket.if_nameindex())
        lacks = f"processes may not find each other: set GLOO_SOCKET_IFNAME to one of {interfaces}"
        yield Finding("host name", f"{name}: {brief(error)}", lacks, "missing")


def launchers() -> Iterator[Finding]:
    """Report the launcher of this process and the launchers that are installed."""
    started = f"{dist.launcher()}, process {dist.rank()} of {dist.world_size()}"
    yield Finding("started by", started)
    tools = [name for name in ("torchrun", "deepspeed", "srun", "sbatch", "pdsh") if _tool(name)]
    lacks = "" if "pdsh" in tools else "the deepspeed launcher needs pdsh for several hosts"
    yield Finding.of("launchers", ", ".join(["python", *tools]), lacks)


def _tool(name: str) -> bool:
    """Return True if a program is on the PATH or beside this Python."""
    return bool(shutil.which(name) or (Path(sys.executable).parent / name).is_file())


def compiler() -> Iterator[Finding]:
    """Check for a C++ compiler."""
    found = next((path for name in ("g++", "clang++", "c++") if (path := shutil.which(name))), "")
    lacks = "" if found else "no torch.compile, no zero.offload: install a C++ compiler"
    yield Finding.of("compiler", found or "none", lacks)
