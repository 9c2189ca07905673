"""Limits of this machine on loader workers: shared memory and open files.

Workers send batches through /dev/shm, and need open files for shards, indexes and batches on their
way. Beyond a limit, batches are lost.
"""

from __future__ import annotations

import errno
import os
import resource
import shutil
from collections.abc import Sequence
from pathlib import Path

from data_pipelines.shards.source import OPEN_INDEXES
from data_pipelines.shards.tar_index import OPEN_TARS
from xray.errors import ConfigError, brief

SHARED_MEMORY = Path("/dev/shm")
MORE_MEMORY = "give the container more (docker run --shm-size=8g)"
ENOUGH_FILES = 4096
MORE_FILES = f"run ulimit -n {ENOUGH_FILES}"
PER_BATCH = 4  # open files of a batch on its way: at least two tensors, twice each


def check_limits(
    workers: int, batch: int, ahead: int, shards: Sequence[int], processes: int = 1
) -> None:
    """Check that batches which are read ahead fit, and raise the limit of open files if they don't.

    batch: bytes. ahead: number of batches. shards: of each source. processes: number of those on
    this machine that load as much. Raises ConfigError naming what to change.
    """
    if not workers:
        return
    needed, free = batch * ahead * processes, shutil.disk_usage(SHARED_MEMORY).free
    if needed > free:
        raise ConfigError(
            f"data.workers={workers} needs {needed / 1e6:,.1f} MB in {SHARED_MEMORY}, which has "
            f"{free / 1e6:,.1f} MB left: lower data.workers (0 needs none), or {MORE_MEMORY}"
        )
    files = len(os.listdir("/proc/self/fd")) + PER_BATCH * -(-ahead // workers) + 8 * workers
    files += min(sum(shards), OPEN_TARS) + sum(min(count, OPEN_INDEXES) for count in shards)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or files <= soft:
        return
    if hard != resource.RLIM_INFINITY and files > hard:
        raise ConfigError(
            f"data.workers={workers} may need {files} open files, but only {hard} are allowed: "
            f"lower data.workers, or {MORE_FILES} (as root, or in the container's settings)"
        )
    enough = max(files, ENOUGH_FILES)
    soft = enough if hard == resource.RLIM_INFINITY else min(enough, hard)
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def remedy(error: BaseException) -> str:
    """Return an error of a loader worker's limits with what to change, else the error's text."""
    text = " ".join(str(error).split())
    files = getattr(error, "errno", None) == errno.EMFILE
    if files or any(sign in text for sign in ("Too many open files", "items of ancdata")):
        return f"too many open files: {MORE_FILES}, or lower data.workers"
    if any(sign in text for sign in ("shared memory", "</torch_", "Bus error")):
        return (
            f"{SHARED_MEMORY} is full: lower data.workers (0 needs none), or {MORE_MEMORY} "
            f"({brief(error)})"
        )
    return text
