"""Arguments that the `xray data` commands share."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from data_pipelines.shards.source import Source

SHARDS = "Folders, globs, {000..123} patterns or URLs of .tar shards"
DATA = f"{SHARDS}; folders or lists (.csv, .tsv, .jsonl, .parquet) of pictures and clips"
Shards = Annotated[list[str], typer.Argument(help=SHARDS)]
ShardsAndSettings = Annotated[
    list[str],
    typer.Argument(metavar="SHARDS... [KEY=VALUE]...", help=f"{SHARDS}, and settings"),
]
Data = Annotated[list[str], typer.Argument(metavar="DATA...", help=DATA)]
DataAndSettings = Annotated[
    list[str],
    typer.Argument(
        metavar="DATA... [KEY=VALUE]...", help=f"{DATA}; .txt files of captions; and settings"
    ),
]
Modality = Annotated[str, typer.Option(help="image or video (default: what there is)")]
Workers = Annotated[int, typer.Option(min=1, help="Processes")]
Cache = Annotated[str, typer.Option(help="Folder for remote shards (default: the user's cache)")]


def open_shards(pattern: str, modality: str, user: str) -> Source:
    """Open shards for a command that writes a sidecar beside them."""
    return _open(pattern, modality, ("shards",), user)


def open_any(pattern: str, modality: str, user: str) -> Source:
    """Open any kind of data for a command that only reads it."""
    from data_pipelines.ingest.user_data import ALL

    return _open(pattern, modality, ALL, user)


def _open(pattern: str, modality: Any, accept: tuple[str, ...], user: str) -> Source:
    from data_pipelines.ingest.plain_files import Request
    from data_pipelines.ingest.user_data import open_data

    return open_data(pattern, Request(Path(pattern).name, modality), accept, user)
