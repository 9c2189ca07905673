"""Finds the tars of a folder or pattern."""

from __future__ import annotations

import functools
import glob
import logging
import os

from data_pipelines.shards.remote import expand, is_remote
from data_pipelines.shards.tar_contents import compressed, is_compressed_tar, is_system_file
from xray.errors import DataError
from xray.urls import conceal

log = logging.getLogger("xray")


def find_shards(pattern: str) -> list[str]:
    """List the tars of a folder, glob or {000..123} pattern; raises DataError if there are none.

    Files of systems, such as `._0.tar`, are skipped in folders and globs.
    """
    if is_compressed_tar(pattern.partition("?")[0] if is_remote(pattern) else pattern):
        raise DataError(compressed(pattern))
    if is_remote(pattern):
        return expand(conceal(pattern))
    if os.path.isdir(pattern):
        paths = tars_in(pattern)
        _warn_of_compressed(pattern, bool(paths))
    elif os.path.isfile(pattern):  # its name may have the characters of a pattern
        paths = [pattern]
    elif any(c in pattern for c in "*?["):
        paths = sorted(path for path in glob.glob(pattern) if not is_system_file(path))
    else:
        from webdataset.shardlists import expand_urls

        paths = expand_urls(pattern)
        if not pattern.endswith(".tar") and not os.path.exists(paths[0]):
            raise DataError(f"{pattern} is neither a folder of .tar shards nor a .tar file")
    if not paths:
        raise DataError(f"no .tar shards at {pattern}")
    return paths


def tars_in(folder: str) -> list[str]:
    """Return the paths of the tars of a folder, sorted; hidden files are skipped."""
    names = (name for name in os.listdir(folder) if not is_system_file(name))
    return sorted(os.path.join(folder, name) for name in names if name.endswith(".tar"))


@functools.cache
def _warn_of_compressed(folder: str, others: bool) -> None:
    """Tell once of the compressed tars of a folder; raises DataError if it has no others."""
    packed = sorted(filter(is_compressed_tar, os.listdir(folder)))
    if packed and not others:
        raise DataError(compressed(os.path.join(folder, packed[0])))
    if packed:
        first = packed[0]
        log.warning("%s: %d compressed tars are not read (first %s)", folder, len(packed), first)
