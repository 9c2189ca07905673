"""Captions of a sample, from its json or its txt file, with weights and languages."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from data_pipelines.shards.bad_sample import BadSample

MOST_WEIGHT = 1e6
FIELDS = ("curation.captions", "captions", "caption")  # where captions are, the first that is there


@dataclass(frozen=True)
class Caption:
    """One text about a sample; it is drawn in proportion to its weight."""

    text: str
    weight: float = 1.0
    language: str = ""  # as the data calls it
    number: int = 0  # among the captions of its sample


def metadata_of(files: dict[str, bytes]) -> dict[str, Any]:
    """The sample's json, or {} where it has none."""
    if "json" not in files:
        return {}
    try:
        content = json.loads(files["json"])
        if b"\\ud" in files["json"].lower():  # json can hold halves of characters, UTF-8 cannot
            whole = json.dumps(content, ensure_ascii=False).encode("utf-8", "replace")
            content = json.loads(whole)
    except (ValueError, RecursionError) as error:
        raise BadSample("broken json", str(error)) from error
    return content if isinstance(content, dict) else {}


def read_captions(
    files: dict[str, bytes], fields: Mapping[str, float] | None = None
) -> list[Caption]:
    """All captions of a sample.

    fields: json fields, within others by dots, and their weights, e.g. {captions: 1, synthetic: 3};
    "txt" is the txt file. A field's weight is shared by its texts. Without fields: the first of
    FIELDS, else the txt file. A text is a string or {text, weight, language}. Raises BadSample.
    """
    meta = metadata_of(files)
    language = str(meta.get("language") or meta.get("lang") or "")
    if not fields:
        first = next((name for name in FIELDS if _field(meta, name)), "txt")
        fields = {first: 1.0}
    found = []
    for name, weight in fields.items():
        value = (
            files.get("txt", b"").decode("utf-8", "replace")
            if name == "txt"
            else _field(meta, name)
        )
        entries = value if isinstance(value, list) else [value]
        captions = [_caption(entry, language) for entry in entries if entry]
        captions = [caption for caption in captions if caption.text]
        whole = sum(caption.weight for caption in captions)
        found += [Caption(c.text, weight * c.weight / whole, c.language) for c in captions]
    if not found:
        raise BadSample("no caption")
    return [replace(caption, number=number) for number, caption in enumerate(found)]


def texts_of(files: dict[str, bytes], name: str) -> list[str]:
    """The texts of one json field, none where it is not there; raises BadSample."""
    value = _field(metadata_of(files), name)
    entries = value if isinstance(value, list) else [value]
    found = [_caption(entry, "").text for entry in entries if entry]
    return [text for text in found if text]


def _field(meta: Mapping[str, Any], name: str) -> Any:
    """A field of that name, or what its dots lead to; None where there is none."""
    first, _, rest = name.partition(".")
    if name in meta or not rest:
        return meta.get(name)
    within = meta.get(first)
    return _field(within, rest) if isinstance(within, dict) else None


def _caption(entry: Any, language: str) -> Caption:
    if isinstance(entry, str):
        return Caption(entry.strip(), 1.0, language)
    if isinstance(entry, dict) and isinstance(entry.get("text"), str):
        weight = entry.get("weight", 1.0)
        if isinstance(weight, (int, float)) and 0 < weight <= MOST_WEIGHT:
            own = str(entry.get("language") or language)
            return Caption(entry["text"].strip(), float(weight), own)
    raise BadSample("broken caption", "neither text nor {text, weight, language}")


def captions_of(files: dict[str, bytes], fields: Mapping[str, float] | None = None) -> list[str]:
    """The texts of all captions of a sample."""
    return [caption.text for caption in read_captions(files, fields)]


def kept_captions(
    files: dict[str, bytes], fields: Mapping[str, float] | None, numbers: Sequence[int] | None
) -> list[Caption]:
    """The captions of a sample that a keep-list leaves; raises BadSample."""
    captions = read_captions(files, fields)
    if numbers is None:
        return captions
    if max(numbers) >= len(captions):
        raise BadSample("fewer captions than curated", "data.sources.NAME.captions differ")
    return [captions[number] for number in numbers]


def choose_captions(
    captions: Sequence[Caption], rng: np.random.Generator | None, count: int = 1
) -> list[Caption]:
    """So many captions drawn by weight, none twice before all were; without `rng` the first."""
    if rng is None or len(captions) == 1:
        return [captions[number % len(captions)] for number in range(count)]
    weights = np.array([caption.weight for caption in captions])
    shares, size = weights / weights.sum(), len(captions)
    drawn = [int(rng.choice(size, p=shares))] if count == 1 else []
    while len(drawn) < count:
        drawn += rng.choice(size, min(size, count - len(drawn)), replace=False, p=shares).tolist()
    return [captions[number] for number in drawn]
