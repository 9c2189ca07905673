"""Arguments that the `xray data` commands share."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from xray.errors import ConfigError

if TYPE_CHECKING:
    from data_pipelines.shards.source import Source


Items = Annotated[
    list[str],
    typer.Argument(
        metavar="SHARDS... [KEY=VALUE]...",
        help="Folders, globs, {000..123} patterns or URLs of .tar shards, and settings",
    ),
]


Modality = Annotated[str, typer.Option(help="image or video (default: what there is)")]


SETTING = re.compile(r"[a-z_]+(\.[a-z_]+)*=")


def split_items(items: Sequence[str]) -> tuple[list[str], list[str]]:
    """(shards, settings); raises ConfigError where no shards are named."""
    settings = [item for item in items if SETTING.match(item)]
    shards = [item for item in items if item not in settings]
    if not shards:
        raise ConfigError("no shards are named")
    return shards, settings


def open_any(pattern: str, modality: str = "") -> Source:
    """The shards at a pattern as what they hold: pictures, else clips, else texts alone."""
    from data_pipelines.shards.manifest import open_manifest, resolve
    from data_pipelines.shards.source import make_cache, open_source
    from xray.config import DataConfig

    if modality not in ("", "image", "video", "text"):
        raise ConfigError(f"--modality {modality}: use image, video or text")
    cache = make_cache(DataConfig())
    manifest = open_manifest(resolve(pattern), cache)
    held = [kind for kind in ("image", "video", "text") if manifest.counts(kind, "image").sum()]
    kind: Any = modality or (held or ["image"])[0]
    # what was compared with the tars a moment ago is not compared again
    return open_source(Path(pattern).name, pattern, kind, cache=cache, verify=False)
