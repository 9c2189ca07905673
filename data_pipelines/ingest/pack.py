"""Packs a user's files into webdataset shards, in the layout of img2dataset and video2dataset.

The list of files is split into shards by position. A process writes each shard under a temporary
name and renames it when it is complete, so the same command continues an interrupted packing.
Skipped files are listed per shard, and in one file once all shards are written. Samples that are
held out (`val`) go to shards in the folder `val`, which is a packing like the one above it.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from collections.abc import Callable, Mapping
from concurrent.futures import as_completed
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from data_pipelines.ingest.endings import ending_of
from data_pipelines.ingest.held_out import VAL, Cut, ItemHasher, check_share, hold_out
from data_pipelines.ingest.listing import Item, unread_files
from data_pipelines.ingest.recode import TEMPORARY, pack_clip, pack_picture
from data_pipelines.ingest.row_captions import texts_in
from data_pipelines.ingest.table_columns import TableKeys
from data_pipelines.ingest.tables import is_table
from data_pipelines.ingest.tar_writer import new_tar
from data_pipelines.ingest.user_data import list_files
from data_pipelines.shards.process_pool import over_shards, reporting_killed_workers
from data_pipelines.shards.tar_index import IMAGE_EXTENSIONS, VIDEO_EXTENSIONS, index_shard
from data_pipelines.text.captions import is_by_language
from xray.config.identity import filled
from xray.errors import BadSample, ConfigError, DataError
from xray.files import sole_writer, write_text
from xray.processes import process_pool
from xray.progress import progress_of

Progress = Callable[[int, int], None]
Skipped = dict[str, str]  # key, file, cause, detail
Job = tuple[int, list[Item]]  # a shard's number and its samples

RECORD, SKIPPED = "pack.json", "pack_skipped.jsonl"
OF_SHARDS = "pack_skipped.*.jsonl"  # per shard, until all shards are written
LIMITS = {
    "per_shard": (1, 10_000),
    "short_side": (0, 16_384),
    "quality": (1, 100),
    "gop": (0, 10_000),
    "crf": (0, 51),
    "workers": (1, 1024),
}


@dataclass
class PackConfig(TableKeys):
    """Settings of a packing, and the columns and form of a table."""

    per_shard: int = 1000  # samples per tar, at most 10,000
    short_side: int = 0  # shrink to this short side; 0 = keep the bytes
    quality: int = 92  # JPEG quality of shrunk pictures; those with alpha become PNG
    gop: int = 0  # re-encode clips as H.264, a key frame every `gop` frames; 0 = keep them
    crf: int = 20  # H.264 quality of re-encoded clips, lower is better
    # share of the samples to hold out in OUT/val, 0 to 0.5; near-duplicates stay together
    val: float = 0.0
    modality: Literal["", "image", "video"] = ""  # pack only pictures, or only clips; "" = both
    workers: int = 2  # processes


@dataclass(frozen=True)
class PackReport:
    """Content of the packed folder; `shards` and `samples` are those to train on."""

    shards: int
    samples: int
    skipped: dict[str, int]  # cause -> files
    reused: int  # shards of an earlier run
    classes: int = 0  # number of class folders
    outside: tuple[str, ...] = ()  # files outside all class folders
    unread: tuple[str, ...] = ()  # files beside the media that are neither media nor read
    held_out: int = 0  # samples in OUT/val
    cut: Cut = field(default_factory=Cut)  # between training and validation
    empty: int = 0  # rows of a table whose caption is empty
    columns: tuple[str, ...] = ()  # of the tables, without that of the files


def pack(
    source: Path | str, out: Path, config: PackConfig, progress: Progress | None = None
) -> PackReport:
    """Write missing shards; progress gets (samples done, all). Raises ConfigError or DataError."""
    _check(Path(source), out, config)
    where = os.path.expanduser(source)
    items = files_to_pack(where, config)
    with sole_writer(out, "folder"):
        _claim(out, items, config)
        cut = _cut(out, items, config)
        trained, held = cut.sides(items)
        show = progress or (lambda done, total: None)
        reused = _write_shards(trained, out, config, lambda done, _: show(done, len(items)))
        skipped = _merge_skipped(out)
        if held:
            val, before = out / VAL, len(trained)
            val.mkdir(exist_ok=True)
            _claim(val, items, config)
            reused += _write_shards(held, val, config, lambda n, _: show(before + n, len(items)))
            skipped += _merge_skipped(val)
    if len(skipped) == len(items):
        first = skipped[0]
        elsewhere = first["cause"] == "missing file" and not config.root
        raise DataError(
            f"nothing in {source} can be used, e.g. {first['file']}: {first['cause']} "
            f"({first['detail']}); see {out / SKIPPED}"
            + "; if the files are in another folder, name it with root="
            * elsewhere
        )
    causes = Counter(record["cause"] for record in skipped)
    count = sum(len(index_shard(tar)) for tar in (out / VAL).glob("*.tar")) if held else 0
    classes = len({item.meta["label_name"] for item in items if "label_name" in item.meta})
    outside = tuple(i.name for i in items if classes and i.listed and "label_name" not in i.meta)
    return PackReport(
        shards=len([*out.glob("*.tar")]),
        samples=len(items) - len(skipped) - count,
        skipped=dict(causes),
        reused=reused,
        classes=classes,
        outside=outside,
        unread=tuple(unread_files(where, items)),
        held_out=count,
        cut=cut,
        empty=sum(item.empty for item in items),
        columns=tuple(dict.fromkeys(name for item in items if item.row for name in item.meta)),
    )


def files_to_pack(where: str, config: PackConfig) -> list[Item]:
    """List the files to pack; those that cannot be read count as pictures. Raises DataError."""
    items = list_files(where, user="xray data pack", keys=config)
    if not config.modality:
        return items
    clips = config.modality == "video"
    kept = [item for item in items if (ending_of(item.name) in VIDEO_EXTENSIONS) == clips]
    if not kept:
        raise DataError(f"{where} contains no {'clips' if clips else 'pictures'}")
    return kept


def _cut(out: Path, items: list[Item], config: PackConfig) -> Cut:
    """Choose the samples to hold out, once: the record of the folder keeps the choice."""
    if not config.val:
        return Cut()
    record = json.loads((out / RECORD).read_text("utf-8"))
    if "held_out" not in record:
        hasher = ItemHasher(items)
        blocks = progress_of("looking for near-duplicates")
        found = over_shards(hasher, len(hasher), config.workers, blocks)
        cut = hold_out([traits for block in found for traits in block], config.val)
        record["held_out"] = asdict(cut)
        _write(out / RECORD, json.dumps(record, indent=1) + "\n")
    return Cut(**record["held_out"])


def _write_shards(items: list[Item], out: Path, config: PackConfig, progress: Progress) -> int:
    """Write the missing shards; return the number of those that were there."""
    shards = [items[i : i + config.per_shard] for i in range(0, len(items), config.per_shard)]
    known = _read_skipped(out)
    there = [_tar(out, number).is_file() for number in range(len(shards))]
    todo = [
        (number, shard)
        for number, shard in enumerate(shards)
        if not there[number] and len(known.get(number, ())) < len(shard)
    ]
    _run(todo, out, config, len(items), progress)
    return sum(there)


def captioned(out: Path) -> int:
    """Count the samples of a packed folder that have captions, with those held out."""
    tars = sorted([*out.glob("*.tar"), *out.glob(f"{VAL}/*.tar")])
    return sum(len(index_shard(tar).members_with(("txt",))) for tar in tars)


def unread_table(where: str, report: PackReport) -> str:
    """Return the first table in a packed folder that was not read; "" if there is none."""
    unread = report.unread if os.path.isdir(where) else ()
    paths = (os.path.join(where, name) for name in unread if not name.endswith(".json"))
    return next(filter(is_table, paths), "")


def _check(source: Path, out: Path, config: PackConfig) -> None:
    for name, (least, most) in LIMITS.items():
        value = vars(config)[name]
        if not least <= value <= most:
            raise ConfigError(f"{name}={value}: use {least} to {most}")
    check_share(config.val, zero=True)
    if out.exists() and not out.is_dir():
        raise ConfigError(f"{out} is a file: choose a folder to write to")
    if source.is_dir() and out.resolve().is_relative_to(source.resolve()):
        raise ConfigError(f"{out} is inside {source}: choose a folder outside it")


def digest_of(items: list[Item]) -> str:
    """Return a sha256 that changes when a file, its sidecars or its metadata change."""
    digest = hashlib.sha256()
    for item in items:
        digest.update(item.stamp().encode() + b"\n")
    return digest.hexdigest()


def _claim(out: Path, items: list[Item], config: PackConfig) -> None:
    """Claim the folder for this packing; raise ConfigError if it has shards of another one."""
    settings = asdict(config)
    del settings["workers"]  # does not change the shards
    wanted = {"config": settings, "files": digest_of(items)}
    _remove(out, f"{TEMPORARY}*")
    if not any(out.glob("*.tar")):
        _remove(out, OF_SHARDS)
        (out / SKIPPED).unlink(missing_ok=True)
        _write(out / RECORD, json.dumps(wanted, indent=1) + "\n")
        return
    try:
        held = json.loads((out / RECORD).read_text("utf-8"))
        old = filled(held["config"], asdict(PackConfig()))  # older versions had fewer settings
        changes = [f"{k}: {old[k]} -> {v}" for k, v in settings.items() if old[k] != v]
        changes += ["other files or metadata"] * (held["files"] != wanted["files"])
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise ConfigError(
            f"{out} contains .tar files that xray data pack did not write: choose another folder"
        ) from error
    if changes:
        raise ConfigError(
            f"{out} contains another packing ({', '.join(changes)}): "
            "choose another folder or delete it"
        )


def _tar(out: Path, shard: int) -> Path:
    return out / f"{shard:05d}.tar"


def _remove(folder: Path, pattern: str) -> None:
    for path in folder.glob(pattern):
        path.unlink(missing_ok=True)


def _write(path: Path, text: str) -> None:
    write_text(path, text, _temporary(path))


def _temporary(path: Path) -> Path:
    return path.with_name(f"{TEMPORARY}{path.name}.{os.getpid()}")


def _read_skipped(out: Path) -> dict[int, list[Skipped]]:
    """Return the skipped files by shard; a shard's own list is newer than the merged one."""
    found: dict[int, list[Skipped]] = {}
    if (out / SKIPPED).is_file():
        for record in _read_lines(out / SKIPPED):
            found.setdefault(int(record["key"][:-4]), []).append(record)
    return found | {int(path.suffixes[0][1:]): _read_lines(path) for path in out.glob(OF_SHARDS)}


def _read_lines(path: Path) -> list[Skipped]:
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def _write_lines(path: Path, records: list[Skipped]) -> None:
    _write(path, "".join(json.dumps(record) + "\n" for record in records))


def _merge_skipped(out: Path) -> list[Skipped]:
    """Merge the lists of all shards, in order. If a run is killed here, the next run repeats it."""
    records = [record for _, shard in sorted(_read_skipped(out).items()) for record in shard]
    _write_lines(out / SKIPPED, records)
    _remove(out, OF_SHARDS)
    return records


def _run(jobs: list[Job], out: Path, config: PackConfig, total: int, progress: Progress) -> None:
    """Write shards in worker processes. Even after an error, only complete shards are left."""
    done = total - sum(len(items) for _, items in jobs)
    progress(done, total)
    if not jobs:
        return
    try:
        with reporting_killed_workers(), process_pool(min(config.workers, len(jobs))) as pool:
            futures = [pool.submit(_write_shard, *job, out, config) for job in jobs]
            for future in as_completed(futures):
                done += future.result()
                progress(done, total)
    finally:
        _remove(out, f"{TEMPORARY}*")


def _write_shard(shard: int, items: list[Item], out: Path, config: PackConfig) -> int:
    """Write one tar; the list of its skipped files is complete before the tar."""
    target = _tar(out, shard)
    temporary = _temporary(target)
    skipped: list[Skipped] = []
    with new_tar(temporary) as add:
        for number, item in enumerate(items):
            key = f"{shard:05d}{number:04d}"
            try:
                add(key, _sample(key, item, out, config))
            except BadSample as error:
                named = {"key": key, "file": item.name, "cause": error.cause}
                skipped.append({**named, "detail": error.detail})
    _write_lines(out / OF_SHARDS.replace("*", f"{shard:05d}"), skipped)
    if len(skipped) < len(items):
        os.replace(temporary, target)
    else:
        temporary.unlink()  # a tar without samples is not readable
    return len(items)


def _captions(captions: list[str], meta: Mapping[str, Any]) -> dict[str, Any]:
    """Return metadata from which readers of shards take these captions."""
    if not captions:
        return dict(meta)
    every = {"captions": captions}
    record = {"caption": captions[0], **(every if len(captions) > 1 else {}), **meta}
    listed = record.get("captions")
    read = is_by_language(listed) or texts_in(listed or record["caption"]) == captions
    return record if read else record | every


def _sample(key: str, item: Item, out: Path, config: PackConfig) -> dict[str, bytes]:
    """Return the files of one sample by ending; raises BadSample for a file to skip."""
    ending = ending_of(item.name)
    if not item.listed:
        raise BadSample("not in metadata", "no row for this file")
    if ending not in IMAGE_EXTENSIONS + VIDEO_EXTENSIONS:
        raise BadSample("unsupported ending", f"convert it to {IMAGE_EXTENSIONS[0]} or mp4")
    data = item.read()
    if ending in IMAGE_EXTENSIONS:
        data, ending, facts = pack_picture(data, ending, config.short_side, config.quality)
    else:
        sizes = (config.short_side, config.gop, config.crf)
        data, ending, facts = pack_clip(data, ending, *sizes, folder=out)
    captions, meta = item.describe()
    facts["sha256"] = hashlib.sha256(data).hexdigest()
    ours = {"original_name": item.name, **facts}
    record = {**ours, **_captions(captions, meta), **facts, "key": key}  # what is measured wins
    files = {ending: data, "json": json.dumps(record, default=str).encode()}
    return files | ({"txt": captions[0].encode("utf-8", "replace")} if captions else {})
