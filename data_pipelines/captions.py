"""Captions of a sample, from its json or its txt file."""

from __future__ import annotations

import json
from typing import Any

from data_pipelines.decode import BadSample

TEXT_FILES = ("json", "txt")


def metadata_of(files: dict[str, bytes]) -> dict[str, Any]:
    """The sample's json, or {} where it has none."""
    if "json" not in files:
        return {}
    try:
        content = json.loads(files["json"])
    except ValueError as error:
        raise BadSample("broken json", str(error)) from error
    return content if isinstance(content, dict) else {}


def captions_of(files: dict[str, bytes]) -> list[str]:
    """All captions of a sample: json `captions`, else json `caption`, else the txt file."""
    meta = metadata_of(files)
    found = meta.get("captions") or meta.get("caption") or files.get("txt", b"")
    if isinstance(found, bytes):
        found = found.decode("utf-8", errors="replace")
    lines = [found] if isinstance(found, str) else found
    if not (isinstance(lines, list) and all(isinstance(line, str) for line in lines)):
        raise BadSample("broken caption", "neither text nor a list of texts")
    captions = [line.strip() for line in lines if line.strip()]
    if not captions:
        raise BadSample("no caption")
    return captions
