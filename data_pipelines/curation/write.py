"""Writer of the kept samples of a curation as new shards, one per shard of the pool.

Shards without kept samples are left out. A shard is written under a temporary name and renamed when
it is complete. So an interrupted call can be repeated; it writes only the missing shards.
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from data_pipelines.curation.curate import Curated
from data_pipelines.curation.tables import KeptSlots
from data_pipelines.ingest.pack import new_tar
from data_pipelines.ingest.recode import TEMPORARY
from data_pipelines.shards.process_pool import Progress, over_shards
from data_pipelines.shards.source import Source
from data_pipelines.text.captions import metadata_of, read_captions
from xray.errors import ConfigError, DataError
from xray.files import is_inside, replacing

RECORD = "curation.json"


def write_shards(
    curated: Curated, out: Path, workers: int = 1, progress: Progress | None = None
) -> int:
    """Write the kept samples to a folder, and return their number.

    Keys and files are the same as in the pool, except that the JSON gets a field "curation":
    {"captions": [{text, weight, language}], "numbers": [positions in the captions of the sample]}.
    Readers prefer these captions to the original ones. Raises ConfigError for a folder with other
    shards.
    """
    _claim(out, curated)
    work = _Writer(curated.source, curated.slots, curated.config.captions, out)
    return sum(over_shards(work, len(curated.source.manifest), workers, progress))


def check_folder(out: Path, source: Source) -> None:
    """Check that a curation of a source can be written to a folder; raises ConfigError."""
    if out.exists() and not out.is_dir():
        raise ConfigError(f"{out} is a file: choose a folder to write to")
    if out.resolve() == Path(source.manifest.folder).resolve():
        raise ConfigError(f"{out} is the pool itself: choose another folder to write to")
    if any(out.glob("*.tar")) and not (out / RECORD).is_file():
        raise ConfigError(f"{out} contains other shards: choose another folder")


def _claim(out: Path, curated: Curated) -> None:
    """Create the folder and record the curation in it; raises ConfigError if it has another."""
    check_folder(out, curated.source)
    out.mkdir(parents=True, exist_ok=True)
    for path in out.glob(f"{TEMPORARY}*"):
        path.unlink(missing_ok=True)
    wanted = {"kept": curated.kept.digest, "manifest": curated.source.manifest.digest}
    if any(out.glob("*.tar")):
        try:
            recorded = json.loads((out / RECORD).read_text())
        except (OSError, ValueError):
            recorded = None
        if recorded != wanted:
            raise ConfigError(
                f"{out} contains another curation: choose another folder or delete it"
            )
    (out / RECORD).write_text(json.dumps(wanted, indent=1) + "\n")


@dataclass(frozen=True)
class _Writer:
    """Function that writes one shard; pickled to the worker processes."""

    source: Source
    slots: KeptSlots
    captions: dict[str, float]
    out: Path

    def __call__(self, shard: int) -> int:
        """Write the kept samples of a shard, and return their number."""
        members, _ = self.slots.of(shard)
        target = self.out / self.source.manifest.name(shard).replace("/", "_")
        if not len(members) or target.is_file():
            return len(members)  # readers refuse a tar without samples, so write none
        temporary = target.with_name(f"{TEMPORARY}{target.name}.{os.getpid()}")
        with replacing(target, temporary), new_tar(temporary) as add:
            for slot, member in enumerate(members.tolist()):
                key = self.source.index(shard).key(member)
                if not is_inside(key):
                    raise DataError(
                        f"shard {self.source.manifest.path(shard)} has a sample {key!r}, which "
                        "would be unpacked outside of the folder: rename it"
                    )
                add(key, self._curated(shard, member, self.slots.texts(shard, slot)))
        return len(members)

    def _curated(self, shard: int, member: int, numbers: np.ndarray) -> dict[str, bytes]:
        """Read a sample and add the kept captions to its JSON."""
        files = self.source.read(shard, member)
        captions = read_captions(files, self.captions)
        kept = [asdict(captions[number]) for number in numbers.tolist()]
        record = {"captions": kept, "numbers": numbers.tolist()}
        content = json.dumps({**metadata_of(files), "curation": record}).encode()
        return {**files, "json": content}
