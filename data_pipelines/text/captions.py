"""Captions of samples, read from their JSON or txt files, with weights and languages."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, TypeGuard

import numpy as np

from data_pipelines.shards.source import Source
from data_pipelines.shards.tar_index import TEXT_FILES
from data_pipelines.text.hashtags import joined_hashtags
from data_pipelines.text.languages import is_language
from xray.errors import BadSample, DataError
from xray.files import decode_text

MOST_WEIGHT = 1e6
LANGUAGE_FIELDS = ("language", "lang")  # of a sample's captions: one, or a list beside theirs
FIELDS = ("curation.captions", "captions", "caption")  # default: the first that is not empty
NO_CAPTION = "no caption"  # cause of a BadSample
JOINED = re.compile(r"joined\((.+)\)")  # the tags in this field, as one caption


def leave_out_uncaptioned(source: str = "NAME") -> str:
    """Tell how a stage leaves out the samples without captions of a source."""
    return f"data.sources.{source}.keep=captioned leaves out the samples without captions"


@dataclass(frozen=True)
class Caption:
    """One caption of a sample, drawn with a probability proportional to its weight."""

    text: str
    weight: float = 1.0
    language: str = ""  # name of the language in the data
    number: int = 0  # position among the captions of the sample


def metadata_of(files: dict[str, bytes]) -> dict[str, Any]:
    """Parse the JSON file of a sample; {} if it has none. Raises BadSample for broken JSON."""
    if "json" not in files:
        return {}
    try:
        content = json.loads(files["json"])
        # JSON may hold unpaired surrogates, which UTF-8 cannot encode: replace them.
        if b"\\ud" in files["json"].lower():
            whole = json.dumps(content, ensure_ascii=False).encode("utf-8", "replace")
            content = json.loads(whole)
    except (ValueError, RecursionError) as error:
        raise BadSample("broken json", str(error)) from error
    return content if isinstance(content, dict) else {}


def read_captions(
    files: dict[str, bytes], fields: Mapping[str, float] | None = None
) -> list[Caption]:
    """Read all captions of a sample.

    fields: JSON field -> weight, for example {captions: 1, synthetic: 3}. Dots reach into nested
    objects, "txt" means the txt file, and "joined(hashtags)" the tags of a list as one caption. The
    texts of a field share its weight. Without `fields`, the first field of FIELDS that is not empty
    is used, else the txt file. A caption in the JSON is a string or {text, weight, language};
    captions may also be given by language, as {en: [...], de: [...]}. Raises BadSample for broken
    captions, or if there are none.
    """
    meta = metadata_of(files)
    language = language_of(meta)
    if not fields:
        own = (name for name in FIELDS if _captions_in(_field(meta, name), language))
        first = next(own, "txt")
        fields = {first: 1.0}
    result = []
    for name, weight in fields.items():
        value = _txt_of(files) if name == "txt" else _value(meta, name)
        captions = _captions_in(value, language)
        total = sum(caption.weight for caption in captions)
        result += [Caption(c.text, weight * c.weight / total, c.language) for c in captions]
    if not result:
        raise BadSample(NO_CAPTION)
    return [replace(caption, number=number) for number, caption in enumerate(result)]


def _txt_of(files: dict[str, bytes]) -> str:
    try:
        return decode_text(files.get("txt", b""))
    except ValueError as error:
        raise BadSample("not UTF-8", f"the txt file {error}") from error


def texts_of(files: dict[str, bytes], name: str) -> list[str]:
    """Read the texts of one JSON field; [] if it does not exist. Raises BadSample."""
    return [caption.text for caption in _captions_in(_field(metadata_of(files), name), "")]


def _value(meta: Mapping[str, Any], name: str) -> Any:
    """Return a field, or its tags joined to one caption."""
    joined = JOINED.fullmatch(name)
    return joined_hashtags(_field(meta, joined[1])) if joined else _field(meta, name)


def _field(meta: Mapping[str, Any], name: str) -> Any:
    """Return a field by its full name, or by its dots as a path; None if it does not exist."""
    first, _, rest = name.partition(".")
    if name in meta or not rest:
        return meta.get(name)
    nested = meta.get(first)
    return _field(nested, rest) if isinstance(nested, dict) else None


def language_of(meta: Mapping[str, Any]) -> Any:
    """Return the language of a sample's captions: a text, a list of the captions' own, or ""."""
    return next((meta[field] for field in LANGUAGE_FIELDS if meta.get(field)), "")


def is_by_language(value: Any) -> TypeGuard[dict[str, Any]]:
    """Return True for captions by language: {en: "a dog", de: [...]}."""
    return isinstance(value, dict) and bool(value) and all(map(is_language, value))


def languages_beside(language: Any, captions: int) -> list[str]:
    """Return the language of each caption; a list of another length says nothing about them."""
    if not isinstance(language, list):
        return [str(language)] * captions
    return [str(own or "") for own in language] if len(language) == captions else [""] * captions


def _captions_in(value: Any, language: Any) -> list[Caption]:
    if is_by_language(value):
        return [caption for own, inner in value.items() for caption in _captions_in(inner, own)]
    entries = value if isinstance(value, list) else [value]
    languages = languages_beside(language, len(entries))
    pairs = zip(entries, languages, strict=True)
    captions = [_caption(entry, own) for entry, own in pairs if entry]
    return [caption for caption in captions if caption.text]


def _caption(entry: Any, language: str) -> Caption:
    if isinstance(entry, str):
        return Caption(entry.strip(), 1.0, language)
    if isinstance(entry, dict) and isinstance(entry.get("text"), str):
        weight = entry.get("weight", 1.0)
        if isinstance(weight, (int, float)) and 0 < weight <= MOST_WEIGHT:
            language = str(entry.get("language") or language)
            return Caption(entry["text"].strip(), float(weight), language)
    raise BadSample("broken caption", "neither text nor {text, weight, language}")


def captions_of(files: dict[str, bytes], fields: Mapping[str, float] | None = None) -> list[str]:
    """Read the texts of all captions of a sample; raises BadSample."""
    return [caption.text for caption in read_captions(files, fields)]


def find_captions(
    source: Source, shard: int, member: int, fields: Mapping[str, float] | None = None
) -> list[str]:
    """Read the captions of a member of a source; [] if it has none that can be read."""
    try:
        return captions_of(source.read(shard, member, TEXT_FILES), fields)
    except BadSample:
        return []


def kept_captions(
    files: dict[str, bytes], fields: Mapping[str, float] | None, numbers: Sequence[int] | None
) -> list[Caption]:
    """Read the captions that a keep-list keeps, by number; None = all. Raises BadSample."""
    captions = read_captions(files, fields)
    if numbers is None:
        return captions
    if max(numbers) >= len(captions):
        raise BadSample(
            "fewer captions than curated",
            "data.sources.NAME.captions differs from the fields of the curation",
        )
    return [captions[number] for number in numbers]


def choose_captions(
    captions: Sequence[Caption], rng: np.random.Generator | None, count: int = 1
) -> list[Caption]:
    """Draw `count` captions by weight, each once before any twice; no `rng`: the first ones."""
    if rng is None or len(captions) == 1:
        return [captions[number % len(captions)] for number in range(count)]
    weights = np.array([caption.weight for caption in captions])
    shares, size = weights / weights.sum(), len(captions)
    drawn = [int(rng.choice(size, p=shares))] if count == 1 else []
    while len(drawn) < count:
        drawn += rng.choice(size, min(size, count - len(drawn)), replace=False, p=shares).tolist()
    return [captions[number] for number in drawn]


def check_fields(source: Source, fields: Mapping[str, float]) -> str:
    """Tell which setting to check of a source whose samples have no captions in these fields."""
    given = f"={dict(fields)}" if fields else ", a json field such as {synthetic: 1}"
    return f"check data.sources.{source.name}.captions{given}"


MAX_CAPTIONS = 256  # to read
MAX_SHARDS = 8  # to read of a local source


class CaptionSample(NamedTuple):
    """Captions of the first samples of a source."""

    captions: list[str]
    pairs: int  # samples with at least two captions
    negatives: int  # samples with hard negatives


def look_at(source: Source, fields: Mapping[str, float], negatives: str = "") -> CaptionSample:
    """Read the captions of the first samples of a source.

    fields: JSON fields of the captions with weights, as for `read_captions`. negatives: JSON field
    of hard negatives, "" = none. Raises DataError if none of these samples has a caption.
    """
    captions: list[str] = []
    pairs, with_negatives, causes = 0, 0, list[str]()
    # Each shard of a remote source must be downloaded first, so read only one.
    shards = MAX_SHARDS if source.cache is None else 1
    for shard in range(min(len(source.manifest), shards)):
        for member in source.members(shard)[:MAX_CAPTIONS].tolist():
            try:
                files = source.read(shard, member, TEXT_FILES)
                texts = captions_of(files, fields)
                captions += texts
                pairs += len(texts) > 1
                with_negatives += bool(negatives and texts_of(files, negatives))
            except BadSample as error:
                causes.append(error.cause)
            if len(captions) >= MAX_CAPTIONS:
                return CaptionSample(captions, pairs, with_negatives)
    if not captions:
        cause = Counter(causes).most_common(1)[0][0] if causes else "it has no samples"
        clips = source.modality == "video"
        leave = ", or leave the clips out with data.modalities=[image]" if clips else ""
        raise DataError(
            f"none of the first {len(causes)} samples of source {source.name!r} has a caption "
            f"({cause}): pack them again with captions (a.txt beside a.jpg or a.mp4), or "
            f"{check_fields(source, fields)}{leave}"
        )
    return CaptionSample(captions, pairs, with_negatives)
