"""Model cards, written only from manifests: the README.md of an artifact and of an export."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from xray.artifacts.artifact import Artifact
from xray.artifacts.lineage import Link, lineage, made_with, mixed_of
from xray.artifacts.manifest_config import (
    data_config,
    license_of,
    model_config,
    text_config,
    training_blocks,
)
from xray.artifacts.offers import (
    DECODER,
    IMPORTED,
    JOINT,
    SENTENCES,
    TAGS,
    VISION,
    offers_of,
    slot_of,
)
from xray.config.schedule import value_at
from xray.hub import is_hub, parse_address
from xray.urls import redact

T = TypeVar("T")
# Summary and usage by capability; an artifact takes the first one that it offers.
PURPOSES = {
    JOINT: "A vision backbone and a text tower in one space: images, clips and texts compared.",
    TAGS: "A vision backbone with a head that tells the hashtags of images and clips.",
    DECODER: "A vision backbone pretrained by masked auto-encoding of images and clips.",
    VISION: "A vision backbone for images and clips.",
    SENTENCES: "A language model tuned so that its vectors tell captions apart.",
}
USES = {
    JOINT: [
        'likeness = model.encode_image("photo.jpg") @ model.encode_text(["a dog", "a cat"]).T',
        'clips = model.encode_video("clip.mp4")  # [1, E], of unit length',
    ],
    TAGS: ['print(model.tag("photo.jpg"))  # [[("beach", 0.41), ...]]'],
    VISION: ['features = model.encode_image("photo.jpg")  # [1, D], of unit length'],
    SENTENCES: ['vectors = model.encode_text(["a dog on a beach"])  # [1, D], of unit length'],
}
TASKS = {  # names that model hubs search by
    JOINT: "zero-shot-image-classification",
    TAGS: "image-classification",
    VISION: "image-feature-extraction",
    SENTENCES: "feature-extraction",
}
HF_HUB = "hf-hub:"  # prefix that timm defines
HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")
IMAGES_ONLY = ("timm", "onnx")  # libraries whose exports have no text tower
# Metrics of the machine or the schedule, not of the model.
LEFT_OUT = ("lr", "grad_norm", "keep_rate", "samples/s", "tokens/s", "mfu")
UNKNOWN = (
    "Unknown: nobody has stated it. Set `license=` in the run's config (an SPDX identifier such as "
    "apache-2.0), or write it here: no hash covers this file."
)


def artifact_card(folder: Path) -> str:
    """Write the card of an artifact as Markdown."""
    chain = lineage(folder)
    stage = chain[0].stage
    code = [
        "import xray",
        "",
        'model = xray.load("FOLDER")  # this folder, or its URL',
        *_first(USES, offers_of(chain[0].manifest or {}), []),
    ]
    return card(chain, "xray", f"{stage} model", code, [])


def card(
    chain: Sequence[Link], library: str, title: str, code: Sequence[str], more: Sequence[str]
) -> str:
    """Write a card as Markdown with the front matter that model hubs read.

    chain: the artifact's lineage. code: lines that load it. more: sections before the lineage.
    """
    artifact = chain[0].artifact
    assert artifact is not None  # only an ancestor's manifest may be unknown
    manifest = artifact.manifest
    licence, offers = license_of(manifest), offers_of(manifest)
    summary = manifest.get("summary") or _first(PURPOSES, offers, "")
    front = ["---", f"license: {licence or 'unknown'}", f"library_name: {library}"]
    front += [f"tags: [xray, {slot_of(offers)}, {manifest['stage']}]"]
    front += [f"pipeline_tag: {task}" for task in [_first(TASKS, offers, "")] if task]
    bases = base_models(chain, texts=library not in IMAGES_ONLY)
    front += [f"base_model: [{', '.join(bases)}]"] if bases else []
    front += ["---", ""]
    body = [f"# {title}", "", summary, *_shape(artifact), ""]
    body += ["## How to load it", "", "```python", *code, "```", "", *more]
    body += ["## Lineage", "", *_lineage(chain), ""]
    body += ["## Data", "", *_data(chain), ""]
    body += ["## Metrics", "", *_metrics(manifest), ""]
    body += ["## Licence", "", f"{licence}." if licence else UNKNOWN]
    return "\n".join([*front, *body]) + "\n"


def base_models(chain: Sequence[Link], texts: bool = True) -> list[str]:
    """List the models on the hub that a lineage began with, as ORG/NAME.

    texts: also the language models.
    """
    manifests = [link.manifest for link in chain if link.manifest]
    names = [name for manifest in manifests for name in _bases(manifest)]
    if texts:
        found = [str(manifest["config"].get("text", {}).get("llm", "")) for manifest in manifests]
        names += filter(_is_from_hub, found)
    return list(dict.fromkeys(names))


def _bases(manifest: Mapping[str, Any]) -> Iterator[str]:
    for parent in manifest["parents"].values():
        if is_hub(str(parent["path"])):
            yield parse_address(str(parent["path"])).name
    source, model = manifest.get(IMPORTED, {}).get("source"), manifest["config"].get("model", {})
    for name in (str(source), str(model.get("pretrained"))):
        if is_hub(name):
            yield parse_address(name).name
        if name.startswith(HF_HUB):
            yield name.removeprefix(HF_HUB).partition("@")[0]
    if model.get("pretrained") == "timm" and "." in model["name"]:  # with the tag of its weights
        yield f"timm/{model['name']}"


def _is_from_hub(llm: str) -> bool:
    """Return True if a language model is in the hub's cache; older runs name folders like this."""
    from huggingface_hub import try_to_load_from_cache

    if not HUB_NAME.fullmatch(llm) or Path(llm).exists():
        return False
    try:
        return isinstance(try_to_load_from_cache(llm, "config.json"), str)
    except ValueError:  # a path that cannot be a name of the hub
        return False


def _first(table: Mapping[str, T], offers: frozenset[str], usual: T) -> T:
    return next((value for key, value in table.items() if key in offers), usual)


def _shape(artifact: Artifact) -> list[str]:
    manifest, lines = artifact.manifest, []
    if "backbone" in manifest["tensors"]:
        model, data = model_config(artifact), data_config(artifact)
        own = ", ".join(f"{key}={value}" for key, value in model.kwargs.items())
        side, frames = value_at(data.resolution, 1.0), value_at(data.frames, 1.0)
        lines.append(
            f"The backbone is timm's `{model.name}`{f' with {own}' if own else ''}, for images "
            f"of {side} px and clips of {frames} frames, tubelets of {model.tubelet}; token "
            f"reduction {model.reduce} at keep rate {manifest['keep_rate']}."
        )
        own = manifest.get("parameters", {}).get("vision")
        if own and own["trained"] < own["all"]:
            lines.append(
                f"This stage trained {100 * own['trained'] / own['all']:.3g} % of the backbone's "
                "parameters (`optim.vision`)."
            )
    if "text" in manifest["tensors"]:
        text = text_config(artifact)
        length = "padded to" if text.padding == "full" else "up to"
        lines.append(
            f"Captions are read {text.attention}, pooled by `{text.pooling}`, {length} "
            f"{text.max_length} tokens; the base model's files hash to "
            f"`{manifest['inputs']['llm'][:12]}`."
        )
    return lines


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    lines = [head, ["---"] * len(head), *rows]
    return [f"| {' | '.join(line)} |" for line in lines]


def _lineage(chain: Sequence[Link]) -> list[str]:
    rows = []
    for link in chain:
        told = link.manifest or {}
        name = f"{'from ' * bool(link.depth)}{link.stage}{f' ({link.slot})' * bool(link.slot)}"
        name += ", imported" * (IMPORTED in told)
        hashes = [str(told.get(key, ""))[:12] for key in ("data_digest", "config_hash")]
        rows.append((name, f"{told.get('samples', 0):,}", *hashes, link.digest[:12]))
    table = _table(("stage", "samples seen", "data", "config", "manifest"), rows)
    made = f"Made with {made_with(chain[0].manifest or {})}."
    return [*table, "", f"{made} `xray lineage` prints all of it, `--verify` re-hashes the files."]


def _data(chain: Sequence[Link]) -> list[str]:
    artifacts = [link.artifact for link in chain]
    rows = [row for artifact in artifacts if artifact for row in _sources(artifact)]
    head = ("stage", "source", "modality", "shards", "samples seen", "digest")
    return _table(head, list(dict.fromkeys(rows)))


def _sources(artifact: Artifact) -> Iterator[tuple[str, ...]]:
    """Yield a row for each source that a stage was trained on."""
    manifest = artifact.manifest
    digests = manifest.get("sources", {})
    blocks = [b for b in training_blocks(artifact) if not digests or b[0].source in digests]
    step = sum(block.samples for block, _ in blocks)
    for block, source in blocks:
        seen = round(manifest["samples"] * block.samples / step)
        digest = str(digests.get(block.source, ""))[:12]
        shards = f"`{redact(source.shards)}`"
        yield artifact.stage, block.source, source.modality, shards, f"{seen:,}", digest


def _metrics(manifest: Mapping[str, Any]) -> list[str]:
    if mixed := mixed_of(manifest):
        return [f"Not trained itself: a {mixed}."]
    metrics = {
        name: value
        for name, value in manifest.get("metrics", {}).items()
        if name not in LEFT_OUT
        and not name.startswith(("data/", "save/", "memory/"))
        and not name.endswith("/epochs")
    }
    which = "averaged over steps" if manifest.get("weights") == "ema" else "of the last step"
    if IMPORTED in manifest:
        return ["None: the weights were imported, not trained here."]
    told = f"In training at step {manifest['step']:,}; the weights are those {which}."
    rows = [(name, f"{value:.4g}") for name, value in sorted(metrics.items())]
    return [told, "", *_table(("metric", "value"), rows)]
