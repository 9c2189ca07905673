"""What a curation keeps, as new shards: one for each of the pool's shards that any is kept of.

A shard is written under another name and renamed when it is whole, so the same call goes on where
it was stopped.
"""

from __future__ import annotations

import io
import json
import os
import tarfile
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from data_pipelines.curation.curate import Curated
from data_pipelines.curation.tables import KeptSlots
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
    """Write the kept samples; returns their number.

    Keys and files are those of the pool, but that the json gets "curation":
    {"captions": [{text, weight, language}], "numbers": their numbers among the sample's}; its
    captions are read before the sample's own. Raises ConfigError for a folder with other shards.
    """
    _claim(out, curated)
    work = _Writer(curated.source, curated.slots, curated.config.captions, out)
    shards = len(curated.source.manifest)
    done = over_shards(work, shards, workers)
    return sum(progress(done, shards) if progress else done)


def check_folder(out: Path, source: Source) -> None:
    """Raise ConfigError for a folder that no curation of a source can be written to."""
    if out.exists() and not out.is_dir():
        raise ConfigError(f"{out} is a file: choose a folder to write to")
    if out.resolve() == Path(source.manifest.folder).resolve():
        raise ConfigError(f"{out} is the pool itself: choose another folder to write to")
    if any(out.glob("*.tar")) and not (out / RECORD).is_file():
        raise ConfigError(f"{out} holds other shards: choose another folder")


def _claim(out: Path, curated: Curated) -> None:
    """Make the folder one of this curation; refuse one that has other shards."""
    check_folder(out, curated.source)
    out.mkdir(parents=True, exist_ok=True)
    for path in out.glob(f"{TEMPORARY}*"):
        path.unlink(missing_ok=True)
    wanted = {"kept": curated.kept.digest, "manifest": curated.source.manifest.digest}
    if any(out.glob("*.tar")):
        try:
            held = json.loads((out / RECORD).read_text())
        except (OSError, ValueError):
            held = None
        if held != wanted:
            raise ConfigError(f"{out} holds another curation: choose another folder or delete it")
    (out / RECORD).write_text(json.dumps(wanted, indent=1) + "\n")


@dataclass(frozen=True)
class _Writer:
    """Writes one shard; sent to the processes that do it."""

    source: Source
    slots: KeptSlots
    captions: dict[str, float]
    out: Path

    def __call__(self, shard: int) -> int:
        """How many samples of a shard are kept."""
        members, _ = self.slots.of(shard)
        target = self.out / self.source.manifest.name(shard).replace("/", "_")
        if not len(members) or target.is_file():
            return len(members)  # a tar without samples cannot be read
        temporary = target.with_name(f"{TEMPORARY}{target.name}.{os.getpid()}")
        with replacing(target, temporary), temporary.open("wb") as file:
            with tarfile.open(fileobj=file, mode="w") as archive:
                for slot, member in enumerate(members.tolist()):
                    key = self.source.index(shard).key(member)
                    if not is_inside(key):
                        raise DataError(
                            f"shard {self.source.manifest.path(shard)} has a sample {key!r}, which "
                            "would be unpacked outside of any folder: rename it"
                        )
                    files = self._curated(shard, member, self.slots.texts(shard, slot))
                    for ending, content in files.items():
                        info = tarfile.TarInfo(f"{key}.{ending}")  # its time is 0
                        info.size, info.mode = len(content), 0o444
                        archive.addfile(info, io.BytesIO(content))
            file.flush()
            os.fsync(file.fileno())
        return len(members)

    def _curated(self, shard: int, member: int, numbers: np.ndarray) -> dict[str, bytes]:
        files = self.source.read(shard, member)
        captions = read_captions(files, self.captions)
        kept = [asdict(captions[number]) for number in numbers.tolist()]
        record = {"captions": kept, "numbers": numbers.tolist()}
        content = json.dumps({**metadata_of(files), "curation": record}).encode()
        return dict(sorted({**files, "json": content}.items()))
