"""What this computer has, and what it lacks for what: every check is tried, and none stops another.

A check is a function that yields findings; what it raises is a finding too.
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

from xray import dist
from xray.doctor.libraries import PACKAGES, Finding, imports
from xray.errors import brief
from xray.version import __version__

GB = 1e9
LEAST_FREE, LEAST_SHARED, LEAST_FILES = 10 * GB, 1 * GB, 4096


def examine(out: Path) -> list[Finding]:
    """Everything; out: the folder that runs are to be written to."""
    found = imports(PACKAGES)
    checks: list[tuple[str, Callable[[], Iterator[Finding]]]] = [
        ("versions", versions),
        ("processor", processor),
        ("devices", devices),
        ("process groups", process_groups),
        ("pictures", pictures),
        ("clips", clips),
        ("decode process", decode_process),
        ("disk", lambda: disk(out)),
        ("shared memory", lambda: shared_memory(Path("/dev/shm"))),
        ("open files", open_files),
        ("network", network),
        ("launcher", launchers),
        ("compiler", compiler),
    ]
    first = [f for name, check in checks[:1] for f in guarded(name, check)]
    return [*first, *found, *(f for name, check in checks[1:] for f in guarded(name, check))]


def guarded(name: str, check: Callable[[], Iterator[Finding]]) -> list[Finding]:
    """What a check finds, with what it raised as the last finding."""
    found: list[Finding] = []
    try:
        found += check()
    except Exception as error:  # whatever is wrong with this computer is what is asked for
        found.append(Finding(name, f"{type(error).__name__}: {brief(error)}", "", "broken"))
    return found


def versions() -> Iterator[Finding]:
    yield Finding("xray", f"{__version__} ({Path(__file__).resolve().parents[1]})")
    old = sys.version_info < (3, 10)
    yield Finding(
        "python",
        f"{platform.python_version()} on {platform.platform(terse=True)}",
        "3.10 is needed" if old else "",
        "broken" if old else "ok",
    )


# what it computes with ------------------------------------------------------------------------


def processor() -> Iterator[Finding]:
    cores = len(os.sched_getaffinity(0))
    quota = cgroup_cores(Path("/sys/fs/cgroup/cpu.max"))
    found = f"{cores} cores" + (f", {quota:g} of them by cgroup" if quota else "")
    threads = os.environ.get("OMP_NUM_THREADS")
    lacks = ""
    if quota and quota < cores and not threads:
        lacks = f"a thread for each core is too many: set OMP_NUM_THREADS={max(1, int(quota))}"
    found += f", OMP_NUM_THREADS={threads}" if threads else ""
    yield Finding("processor", found, lacks, "missing" if lacks else "ok")
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = _number(Path("/sys/fs/cgroup/memory.max"))
    yield Finding(
        "memory",
        f"{memory / GB:.0f} GB"
        + (f", limited to {limit / GB:.0f} GB by cgroup" if limit and limit < memory else ""),
    )


def cgroup_cores(path: Path) -> float | None:
    """The cores' worth of time that a cgroup's cpu.max allows, None for all there is."""
    try:
        quota, period = path.read_text().split()
        return None if quota == "max" else int(quota) / int(period)
    except (OSError, ValueError):
        return None


def _number(path: Path) -> int | None:
    try:
        return int(path.read_text())
    except (OSError, ValueError):
        return None


def devices() -> Iterator[Finding]:
    import torch

    if not torch.cuda.is_available():
        built = torch.version.cuda or "none"
        lacks = "runs on the CPU: fit for tests and small models (no CUDA device is seen"
        yield Finding("devices", "cpu", f"{lacks}; torch is built for CUDA {built})", "missing")
    for number in range(torch.cuda.device_count()):
        facts = torch.cuda.get_device_properties(number)
        free, total = torch.cuda.mem_get_info(number)
        torch.ones(8, 8, device=f"cuda:{number}").sum().item()  # a driver may see it, and fail
        yield Finding(
            f"cuda:{number}",
            f"{facts.name}, {total / GB:.0f} GB, {free / GB:.0f} free, "
            f"compute {facts.major}.{facts.minor}",
        )
    if torch.cuda.is_available():
        native = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        flags = Path("/proc/cpuinfo").read_text()
        native = "avx512_bf16" in flags or "amx_bf16" in flags
    lacks = "" if native else "train.precision=bf16 brings no speed: set fp32"
    found = "in hardware" if native else "not in hardware"
    yield Finding("bf16", found, lacks, "ok" if native else "missing")


def process_groups() -> Iterator[Finding]:
    """The backends that are there, each tried on a group of one."""
    import torch
    import torch.distributed as group

    backends = {"gloo": group.is_gloo_available(), "nccl": group.is_nccl_available()}
    for name, there in backends.items():
        if name == "nccl" and not torch.cuda.is_available():
            continue
        if not there:
            yield Finding(name, "not in this torch", "no training on several", "broken")
            continue
        device = "cuda" if name == "nccl" else "cpu"
        if dist.world_size() > 1:
            yield Finding(name, "there; not tried in a process of several")
            continue
        group.init_process_group(name, store=group.HashStore(), rank=0, world_size=1)
        try:
            group.all_reduce(torch.ones(1, device=device))
        finally:
            group.destroy_process_group()
        yield Finding(name, "works")


# what it reads with ---------------------------------------------------------------------------


def pictures() -> Iterator[Finding]:
    from data_pipelines.decode.decoders import decode_image
    from data_pipelines.ingest.demo import example

    yield Finding("pictures", f"a JPEG of {len(example())} bytes: {decode_image(example()).size}")


def clips() -> Iterator[Finding]:
    """Each reader on a clip that is made here."""
    import numpy as np

    from data_pipelines.decode.decoders import AvClip, DecordClip
    from data_pipelines.ingest.demo import example

    data = example("left")
    for what, reader, needed in (("PyAV", AvClip, True), ("decord", DecordClip, False)):
        try:
            clip = reader(data)
            shape = clip.read(np.array([0, clip.total - 1]), 0)[-1].shape
            yield Finding(f"clips by {what}", f"an mp4 of {clip.total} frames: {shape}")
        except Exception as error:  # each library raises types of its own
            lacks = "no clips can be read" if needed else "PyAV reads them"
            yield Finding(
                f"clips by {what}", brief(error), lacks, "broken" if needed else "missing"
            )


def decode_process() -> Iterator[Finding]:
    """The process that clips are decoded in, as in training."""
    from data_pipelines.decode.decoders import FrameChoice
    from data_pipelines.decode.sandbox import ClipDecoder
    from data_pipelines.ingest.demo import example

    decoder = ClipDecoder(60.0, 2.0)
    try:
        frames = decoder.decode(example("left"), FrameChoice(4))
        yield Finding("decode process", f"works: {frames.pixels.shape}")
    finally:
        decoder.close()


# where it puts things -------------------------------------------------------------------------


def disk(out: Path) -> Iterator[Finding]:
    """Really write to where runs go."""
    place = next(p for p in (out, *out.absolute().parents) if p.is_dir())
    what = f"disk at {place}"
    try:
        with tempfile.TemporaryFile(dir=place) as file:
            file.write(bytes(1 << 20))
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        why = "it is full" if error.errno == errno.ENOSPC else brief(error)
        yield Finding(what, why, "runs cannot be saved here: choose another out=", "broken")
        return
    free = shutil.disk_usage(place).free
    lacks = "" if free >= LEAST_FREE else "checkpoints of a ViT-L take 4 GB each; out= elsewhere"
    yield Finding(what, f"{free / GB:.0f} GB free, writable", lacks, "missing" if lacks else "ok")


def shared_memory(place: Path) -> Iterator[Finding]:
    """What loader processes hand batches over in."""
    cure = "data.workers=0, or give the container more (docker run --shm-size=8g)"
    try:
        with tempfile.TemporaryFile(dir=place) as file:
            file.write(b"x")
        total = shutil.disk_usage(place).total
    except OSError as error:
        yield Finding(f"{place}", brief(error), f"no loader processes: {cure}", "missing")
        return
    lacks = "" if total >= LEAST_SHARED else f"little for loader processes: {cure}"
    yield Finding(f"{place}", f"{total / GB:.2g} GB", lacks, "missing" if lacks else "ok")


def open_files() -> Iterator[Finding]:
    limit, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    most_text = "no limit" if most == resource.RLIM_INFINITY else str(most)
    few = limit != resource.RLIM_INFINITY and limit < LEAST_FILES
    lacks = f"many shards or loader processes may need more: ulimit -n {LEAST_FILES}" if few else ""
    found = f"{limit} (hard limit {most_text})"
    yield Finding("open files", found, lacks, "missing" if lacks else "ok")


# how it is started ----------------------------------------------------------------------------


def network() -> Iterator[Finding]:
    """A port to meet at, and a name that gloo can find."""
    with socket.socket() as probe:
        probe.bind(("", 0))
        yield Finding("ports", f"{probe.getsockname()[1]} is free")
    name = socket.gethostname()
    try:
        yield Finding("host name", f"{name} is {socket.gethostbyname(name)}")
    except OSError as error:
        cards = ", ".join(card for _, card in socket.if_nameindex())
        lacks = f"processes may not find each other: set GLOO_SOCKET_IFNAME to one of {cards}"
        yield Finding("host name", f"{name}: {brief(error)}", lacks, "missing")


def launchers() -> Iterator[Finding]:
    started = f"{dist.launcher()}, process {dist.rank()} of {dist.world_size()}"
    yield Finding("started by", started)
    tools = [name for name in ("torchrun", "deepspeed", "srun", "sbatch", "pdsh") if _tool(name)]
    lacks = "" if "pdsh" in tools else "deepspeed on several hosts needs pdsh"
    yield Finding("launchers", ", ".join(["python", *tools]), lacks, "missing" if lacks else "ok")


def _tool(name: str) -> bool:
    """On the PATH, or beside this Python."""
    return bool(shutil.which(name) or (Path(sys.executable).parent / name).is_file())


def compiler() -> Iterator[Finding]:
    found = next((path for name in ("g++", "clang++", "c++") if (path := shutil.which(name))), "")
    lacks = "" if found else "no torch.compile, no zero.offload: install a C++ compiler"
    yield Finding("compiler", found or "none", lacks, "ok" if found else "missing")
