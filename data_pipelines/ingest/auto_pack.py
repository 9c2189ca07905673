"""Packs the plain files that a run's sources name, so that it trains on the shards instead.

The shards of `photos/`, and of `photos.csv`, are in `photos_shards` beside it; if that cannot be
written, in the user's cache. A later run finds them there, and refuses them if the files changed.
"""

from __future__ import annotations

import json
import logging
import os
import shlex
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from data_pipelines.ingest.endings import by_ending, ending_of
from data_pipelines.ingest.listing import Item
from data_pipelines.ingest.pack import (
    OF_SHARDS,
    RECORD,
    SKIPPED,
    VAL,
    PackConfig,
    PackReport,
    captioned,
    digest_of,
    files_to_pack,
    pack,
    unread_table,
)
from data_pipelines.ingest.split_names import is_held_out
from data_pipelines.ingest.user_data import (
    KINDS,
    is_pattern,
    list_files,
    shards_beside,
)
from data_pipelines.shards.manifest import open_manifest, resolve
from data_pipelines.shards.remote import is_remote
from data_pipelines.shards.shard_list import tars_in
from data_pipelines.shards.tar_index import Modality, media_extensions
from xray.config import DataConfig, SourceConfig
from xray.config.loading import build
from xray.errors import ConfigError, DataError
from xray.files import making, nearest_path
from xray.progress import progress_bar
from xray.words import count, counted

log = logging.getLogger("xray")
# Share of the samples that are held out for validation, and their least number, for intervals that
# are not too wide; of few samples, at most MOST_HELD_OUT.
HELD_OUT, LEAST_HELD_OUT, MOST_HELD_OUT = 0.05, 100, 0.2
ROOT = "."  # as `shards` of a source: data.root itself
Kind = Literal["", "image", "video"]  # modality to pack; "" = both
WORDS: Mapping[str, str] = {"image": "pictures", "video": "clips", "text": "captions"}


@dataclass
class _Plan:
    """Sources to change: those of data.root itself, and those of files and folders of their own."""

    at_root: list[str]
    own: dict[str, str]  # source -> path of its files
    absent: list[str]  # sources without a path, beside plain folders of the others
    nothing: bool = False  # data.root has neither files, shards nor the paths of the sources


def pack_sources(
    data: DataConfig, names: Collection[str], use_root: bool = True, write: bool = True
) -> list[str]:
    """Pack the plain files of sources, and return the settings `key=value` that replace them.

    data.root may itself be plain files, or shards, for sources whose path does not exist in it. A
    modality of which it has no samples is left out. use_root: False if data.root is yet to be
    made. write: False to pack nothing, as for a plan: files that are not packed yet stay the data
    of their source. Raises ConfigError or DataError.
    """
    sources = {n: data.sources[n] for n in names if data.sources[n].modality in data.modalities}
    plan, settings = _plan(data, sources, use_root), dict[str, str]()
    if write and plan.nothing:
        raise ConfigError(_nothing_in(data.root))
    counted: dict[str, int] = {name: 0 for name in plan.absent}
    if plan.at_root:
        given = {name: sources[name] for name in plan.at_root}
        _check_single(data.root, given)
        settings |= _at_root(data.root, given, write, counted)
    for name, where in plan.own.items():
        folder = shards_beside(where)
        if _packed(f"data.sources.{name}", where, folder, write):
            settings[f"data.sources.{name}.shards"] = _below(folder, data.root)
        counted |= _counts(where, folder, {name: sources[name]})
    return [f"{key}={value}" for key, value in settings.items()] + _left_out(data, sources, counted)


def _at_root(
    root: str, sources: Mapping[str, SourceConfig], write: bool, counted: dict[str, int]
) -> dict[str, str]:
    """Pack the files of data.root, and return the settings of the sources that read them.

    Pictures and clips are packed apart, because each shard of a source must have samples of it.
    counted: gets the number of samples of each source.
    """
    where = os.path.expanduser(root)
    keys = {name: f"data.sources.{name}.shards" for name in sources}
    if _has_shards(where):
        counted |= _counts(where, where, sources)
        return dict.fromkeys(keys.values(), ROOT)
    folder = shards_beside(where)
    files = _counts(where, "", sources)
    apart = {n: own for n, own in sources.items() if own.modality != "text" and files[n]}
    whole = dict.fromkeys(keys.values(), ROOT)
    if len(apart) < 2 or _settings(folder) is not None:  # packed by hand: as it is
        packed = _packed("data.root", where, folder, write)
        counted |= _counts(where, folder, sources)
        return whole | {"data.root": folder if packed else where}
    settings = {"data.root": folder}
    for name, own in apart.items():
        part = os.path.join(folder, name)
        kind: Kind = "video" if own.modality == "video" else "image"
        if not _packed("data.root", where, part, write, kind):
            counted |= files
            return whole | {"data.root": where}
        counted |= _counts(where, part, {name: own})
        settings[keys[name]] = name
    texts = {name: own for name, own in sources.items() if own.modality == "text"}
    counted |= dict.fromkeys(texts, 1)
    return settings | {keys[name]: next(iter(apart)) for name in texts}


def _plan(data: DataConfig, sources: Mapping[str, SourceConfig], use_root: bool) -> _Plan:
    root = os.path.expanduser(data.root)
    local = bool(data.root) and not is_remote(data.root) and use_root
    plan, missing, there = _Plan([], {}, []), list[str](), list[str]()
    for name, source in sources.items():
        where = resolve(source.shards, data.root)
        if not source.shards or is_remote(where):
            continue
        if local and os.path.abspath(where) == os.path.abspath(root):
            plan.at_root += [name] * _is_plain(root)
        elif _is_plain(where):
            plan.own[name] = where
        elif not os.path.exists(where) and not is_pattern(where):
            missing += [name] * (local and not os.path.isabs(os.path.expanduser(source.shards)))
        else:
            there.append(name)
    if missing and not there and not plan.own and (_is_plain(root) or _has_shards(root)):
        plan.at_root += missing
    elif missing and not there and plan.own:
        plan.absent = missing
    elif missing and not there:
        plan.nothing = True
    return plan


def _nothing_in(root: str) -> str:
    """Say that data.root is not there, or that there is nothing in it."""
    if not os.path.exists(os.path.expanduser(root)):
        return f"data.root={root} does not exist{nearest_path(os.path.expanduser(root))}"
    return f"data.root={root} contains neither .tar shards nor pictures or clips"


def _has_shards(where: str) -> bool:
    return os.path.isdir(where) and bool(tars_in(where))


def _is_plain(where: str) -> bool:
    """Return True for a table of files, and for a folder of pictures and clips."""
    if not os.path.exists(where) or is_pattern(where):
        return False
    kind = next((name for name, own in KINDS.items() if own.fits(where)), "")
    if kind != "folder":
        return kind == "list"
    try:
        return bool(list_files(where))
    except DataError:  # no pictures: perhaps a folder of folders of shards
        return False


def _check_single(root: str, sources: Mapping[str, SourceConfig]) -> None:
    """Raise ConfigError if two sources would read the same files of data.root."""
    first: dict[str, str] = {}
    for name, source in sources.items():
        other = first.setdefault(source.modality, name)
        if other != name:
            raise ConfigError(
                f"data.root={root} has files, and both {other} and {name} would read its "
                f"{WORDS[source.modality]}: give data.sources.{other}.shards= and "
                f"data.sources.{name}.shards="
            )


def _below(folder: str, root: str) -> str:
    """Return a folder relative to data.root, if it is below it."""
    start = os.path.expanduser(root).rstrip("/") + "/"
    return os.path.relpath(folder, start) if root and folder.startswith(start) else folder


def _counts(where: str, folder: str, sources: Mapping[str, SourceConfig]) -> dict[str, int]:
    """Count the samples of each source in shards; in the files, if they are not packed yet."""
    if folder and _has_shards(folder):
        manifest = open_manifest(folder)
        kinds = {name: (own.modality, own.animations) for name, own in sources.items()}
        return {name: int(manifest.counts(*kind).sum()) for name, kind in kinds.items()}
    endings = [ending_of(item.name) for item in list_files(where)]

    def fitting(modality: Modality, animations: Modality) -> int:
        known = media_extensions(modality, animations)
        return sum(modality == "text" or ending in known for ending in endings)

    return {name: fitting(own.modality, own.animations) for name, own in sources.items()}


def _left_out(
    data: DataConfig, sources: Mapping[str, SourceConfig], counted: Mapping[str, int]
) -> list[str]:
    """Return the setting that leaves out modalities without samples; raises DataError if all are.

    A modality of which another source may have samples stays.
    """
    held = {own.modality for name, own in sources.items() if counted.get(name, 1)}
    empty = [name for name in sources if sources[name].modality not in held]
    if not empty:
        return []
    words = " or ".join(dict.fromkeys(WORDS[sources[name].modality] for name in empty))
    if not held:
        raise DataError(f"there are no {words} for the sources {', '.join(sources)}")
    setting = f"data.modalities=[{','.join(kind for kind in data.modalities if kind in held)}]"
    log.info("no %s: source %s is left out (%s)", words, ", ".join(empty), setting)
    return [setting]


def held_out_share(samples: int) -> float:
    """Return the share of the samples that is held out, with 2 decimals."""
    return min(MOST_HELD_OUT, max(HELD_OUT, round(LEAST_HELD_OUT / max(1, samples), 2)))


# packing ----------------------------------------------------------------------------------------


def _packed(key: str, where: str, folder: str, write: bool, modality: Kind = "") -> bool:
    """Pack files into a folder, unless it has them; raises ConfigError if they have changed.

    Returns True if the folder has them: always, if it may write.
    """
    try:
        if _is_current(key, where, folder):
            return True
        if not write:
            return False
        with making(Path(folder)):
            if not _is_current(key, where, folder):
                items = list_files(where)
                _check_divided(key, where, items)
                log.info("%s: packing its files once, to %s", where, folder)
                with progress_bar("packing") as progress:
                    share = held_out_share(len(items))
                    config = _settings(folder) or PackConfig(val=share, modality=modality)
                    report = pack(where, Path(folder), config, progress)
                log.info("%s", _told(where, folder, report))
        return True
    except DataError as error:
        raise DataError(f"{key}: {error}") from error


def _check_divided(key: str, where: str, items: Sequence[Item]) -> None:
    """Raise ConfigError for files of which some are in a folder for evaluation, such as val/."""
    if not os.path.isdir(where):  # a list names the files to train on
        return
    first = {item.name.rpartition("/")[0].split("/")[0] for item in items}
    held = sorted(filter(is_held_out, first))
    if held and len(held) < len(first):
        raise ConfigError(
            f"{key}: {where} contains {held[0]}/, which is for evaluation, beside files to train "
            f"on: set {_key(key)} to the folder of the latter; xray init mine.yaml "
            f"{shlex.quote(where)} writes a recipe for both"
        )


def _is_current(key: str, where: str, folder: str) -> bool:
    """Return True if a folder has all shards of these files; raises ConfigError for other files."""
    config = _settings(folder)
    if config is None:
        return False
    record = json.loads((Path(folder) / RECORD).read_text("utf-8"))
    items = files_to_pack(where, config)
    if record["files"] != digest_of(items):
        whole = shlex.quote(os.path.dirname(folder) if config.modality else folder)
        raise ConfigError(
            f"{key}: the files of {where} have changed since {folder} was packed from them: delete "
            f"{folder} to pack them again, or train on it as it is with {_key(key)}={whole}"
        )
    held = record.get("held_out", {}).get("held")
    folders = [Path(folder), *([Path(folder) / VAL] if held else [])]
    if config.val and held is None:
        return False
    if not all((own / SKIPPED).is_file() and not any(own.glob(OF_SHARDS)) for own in folders):
        return False
    log.info("%s: training on its shards in %s", where, folder)
    return True


def _key(name: str) -> str:
    """Return the setting that names the data of `data.root` or of `data.sources.NAME`."""
    return name if name == "data.root" else f"{name}.shards"


def _settings(folder: str) -> PackConfig | None:
    """Return the recorded settings of a packing, None if there is none; raises ConfigError."""
    path = Path(folder) / RECORD
    if not path.is_file():
        return None
    try:
        return build(PackConfig, json.loads(path.read_text("utf-8"))["config"])
    except (ValueError, LookupError, TypeError) as error:
        raise ConfigError(f"{path} is damaged: delete {folder}") from error


def _told(where: str, folder: str, report: PackReport) -> str:
    """Say what was packed, and what was left out."""
    shards = count(report.shards, "shard")
    total, captions = report.samples + report.held_out, captioned(Path(folder))
    parts = [f"{where}: packed {count(total, 'sample')} in {shards} in {folder}"]
    if report.held_out:
        parts.append(f"{report.held_out:,} of them held out in {folder}/{VAL}")
    parts.append(f"{captions:,} have captions")
    if report.empty:
        parts.append(f"{report.empty:,} rows have an empty one")
    if causes := report.skipped:
        parts.append(f"left out: {counted(causes)} ({folder}/{SKIPPED})")
    if report.unread:
        parts.append(f"not read: {by_ending(report.unread)}")
    if not captions and (table := unread_table(where, report)):
        parts.append(f"if {table} has the captions, give it instead of {where}")
    return "; ".join(parts)
