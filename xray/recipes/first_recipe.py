"""Rules for a first recipe: which recipe to start from, stages, blocks and lengths, and why.

`SCALES` chooses the recipe that the new one is based on, `LENGTHS` divides the time over stages.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

from xray.evaluation.suites.knn import KnnConfig
from xray.recipes.machine import Machine
from xray.recipes.survey import MOST_READ, Found, Survey

Settings = dict[str, Any]


@dataclass(frozen=True)
class Scale:
    """Recipe to start from, and the data and machine from which on it pays."""

    base: str
    samples: int  # training samples
    gpus: int
    batch: int  # samples of a step, at most; fewer if the data are few
    patch: int  # the resolution is a multiple of it
    side: int  # resolution in pixels, at most
    why: str


SCALES = (  # the first that fits the data, the machine and the time
    Scale("vit_h14_1024", 1_000_000_000, 256, 65_536, 14, 224, "a ViT-H/14"),
    Scale("many_nodes", 100_000_000, 16, 32_768, 14, 224, "a ViT-L/14"),
    Scale("one_node", 3_000_000, 2, 4096, 16, 224, "a ViT-B/16"),
    Scale("one_gpu", 50_000, 1, 1024, 16, 224, "a ViT-S/16 (22 M parameters)"),
    Scale("small", 0, 0, 72, 8, 64, "a ViT with 2.8 M parameters"),
)
ADAPT = Scale("adapt", 0, 0, 288, 16, 224, "the pretrained tower is adapted at a low rate")


@dataclass(frozen=True)
class Length:
    """Share of the time of a stage, and the epochs that are useful."""

    share: float
    least: float
    most: float


LENGTHS = {
    "mae": Length(1, 1, 200),
    "hashtag": Length(2, 1, 50),
    "text": Length(1, 1, 10),
    "clip": Length(6, 2, 100),
}
LENGTHS_ADAPTED = {"text": Length(1, 1, 10), "hashtag": Length(2, 1, 5), "clip": Length(6, 2, 20)}
# Stages that are left out if the time is not enough for the least epochs of all, in this order.
DISPENSABLE = ("mae", "hashtag")
FEWEST = 8  # samples of a source in a step
SOME = 0.05  # share of the samples of a source that must have captions or tags, to use them
MOST = 0.5  # share of the samples with captions from which on clip alone is best (docs/proof.md)


@dataclass
class Draft:
    """Settings of the new recipe, and the comments above them, by dotted key."""

    scale: Scale
    settings: Settings
    comments: dict[str, str] = field(default_factory=dict)

    @property
    def stages(self) -> list[str]:
        """Stages of the recipe."""
        stages: list[str] = self.settings["stages"]
        return stages


def scales_for(seen: Survey, machine: Machine, pretrained: str) -> list[Scale]:
    """List the scales that fit the data and the machine, the largest first."""
    if pretrained:
        return [ADAPT]
    samples = sum(found.samples for found in seen.training)
    return [one for one in SCALES if samples >= one.samples and machine.gpus >= one.gpus]


def draft(
    scale: Scale,
    seen: Survey,
    machine: Machine,
    pretrained: str = "",
    text_llm: str = "",
    without: Collection[str] = (),
) -> Draft:
    """Choose everything but the lengths; without: stages for which there is no time."""
    uses = {stage: own for stage, own in _uses(seen, scale).items() if stage not in without}
    result = Draft(scale, {"base": scale.base, "stages": list(uses)})
    total = sum(found.samples for found in seen.training)
    result.comments["base"] = f"{scale.why}: for {total:,} samples on this machine" + (
        "" if pretrained or scale.gpus else
        "; more would overfit from scratch.\nWith --pretrained, xray init adapts a trained tower, "
        "which is far better with few photos"
    )  # fmt: skip
    _add_data(result, seen, machine, uses)
    if pretrained:
        _add_pretrained(result, pretrained)
    if "clip" in uses:
        _add_text(result, uses, text_llm)
    result.comments["stages"] = _why_stages(uses, seen)
    if _is_clip_best(seen, scale):
        result.comments["stages"] += (
            ".\nmae and hashtag are for samples without captions: in the same time, a longer clip "
            "was better"
        )
    if without:
        left = " and ".join(without)
        result.comments["stages"] += f"\nThere is no time for {left}: give xray init more --hours"
    if "hashtag" in uses:
        _add_tags(result, uses["hashtag"])
    _add_evaluation(result, seen)
    return result


# stages -----------------------------------------------------------------------------------------


def _uses(seen: Survey, scale: Scale) -> dict[str, list[Found]]:
    """Return the sources that each stage can learn from, without stages that have none."""
    captioned = [found for found in seen.training if found.captioned >= SOME]
    tagged = [found for found in seen.training if _origin(found, seen)]
    adapted, alone = scale is ADAPT, _is_clip_best(seen, scale)
    uses = {
        "mae": [] if adapted or alone else seen.training,
        "hashtag": [] if (adapted and captioned) or alone else tagged,
        "text": [found for found in captioned if found.captions >= 1.5],
        "clip": captioned,
    }
    return {stage: sources for stage, sources in uses.items() if sources}


def _is_clip_best(seen: Survey, scale: Scale) -> bool:
    """Check if most samples have captions, at the scale at which clip alone was measured."""
    measured = scale is SCALES[-1]
    return measured and all(found.captioned >= MOST for found in seen.training)


def _origin(found: Found, seen: Survey) -> str:
    """Return where a source's tags are (data.sources.NAME.tags), "" if it has none."""
    if found.tagged >= SOME:
        return "hashtags"
    if found.captioned >= SOME:
        return "caption_words"
    with_tags = any(other.tagged >= SOME for other in seen.training)
    return "hashtags" if found.label and found.labelled >= SOME and not with_tags else ""


def _why_stages(uses: dict[str, list[Found]], seen: Survey) -> str:
    words = {"hashtags": "tags", "caption_words": "the words of captions"}
    tags = dict.fromkeys(words[_origin(own, seen)] for own in uses.get("hashtag", ()))
    reasons = {
        "mae": "mae needs only pixels",
        "hashtag": f"hashtag reads {' and '.join(tags)}",
        "text": "text compares captions of the same sample",
        "clip": "clip needs captions",
    }
    told = "; ".join(reasons[stage] for stage in uses)
    return told if "clip" in uses else f"{told}. Without captions there is no search by text"


# data -------------------------------------------------------------------------------------------


def _add_data(made: Draft, seen: Survey, machine: Machine, uses: dict[str, list[Found]]) -> None:
    scale, data = made.scale, dict[str, Any]()
    made.settings["data"] = data
    data["root"] = seen.root
    sides = [found.side for found in seen.training if found.side]
    smallest = min(sides, default=scale.side)
    side = min(scale.side, max(2, round(smallest / scale.patch)) * scale.patch)
    data["resolution"] = side
    made.comments["data.resolution"] = f"pixels; the pictures have {smallest} on their shorter side"
    data["modalities"] = list(dict.fromkeys(found.modality for found in seen.training))
    data["workers"] = max(1, min(8, machine.cores // machine.devices - 1))
    made.comments["data.workers"] = f"processes that decode, of {machine.cores} cores"
    data["sources"] = {}
    for found in seen.training:
        own = {"shards": found.shards, "modality": found.modality}
        if origin := _origin(found, seen):
            own["tags"] = origin
        data["sources"][found.name] = own
        made.comments[f"data.sources.{found.name}"] = described(found)
    data["blocks"] = blocks(seen.training, scale.batch, machine.devices)
    made.comments["data.blocks"] = (
        "samples of a step; the learning rate of each stage is its optim.base_lr x their sum / 256"
    )
    for stage, sources in uses.items():
        if sources != seen.training or stage == "text":
            own_blocks = blocks(sources, scale.batch, machine.devices)
            made.settings[stage] = {"data": {"blocks": own_blocks}}
    for stage in ("text", "clip"):
        worst = min((found.captioned for found in uses.get(stage, ())), default=1.0)
        if worst < 0.99:
            section = made.settings.setdefault(stage, {}).setdefault("data", {})
            section["max_bad_fraction"] = round(min(0.99, 1.05 - worst), 2)
            made.comments[f"{stage}.data"] = "samples without captions are left out of this stage"


def described(found: Found) -> str:
    """Describe a source in a line."""
    words = "pictures" if found.modality == "image" else "clips"
    parts = [f"{found.samples:,} {words}"]
    if found.side:
        parts.append(f"{found.side} px on the shorter side")
    if found.captioned:
        parts.append(f"{found.captions:.1f} captions each ({found.captioned:.0%} have some)")
    if found.tagged:
        parts.append(f"{found.tagged:.0%} have hashtags")
    if found.labelled:
        parts.append(f"{found.labelled:.0%} have a class")
    return ", ".join(parts)


def blocks(sources: Sequence[Found], most: int, devices: int) -> list[Settings]:
    """Divide a step over sources: pictures by their numbers, and about 1 clip for 8 pictures.

    A clip costs as much as several pictures. A step has at most a tenth of the samples, but
    enough that each is contrasted with some others.
    """
    images = sum(found.samples for found in sources if found.modality == "image")
    clips = sum(found.samples for found in sources) - images
    most_images = most * 8 // 9 if clips else most
    most_clips = most // 9 if images else most // 2
    step = {
        "image": min(most_images, max(4 * FEWEST, images // 10)),
        "video": min(most_clips, max(2 * FEWEST, clips // 10)),
    }
    totals = {"image": images, "video": clips}
    made = []
    for found in sources:
        share = int(step[found.modality] * found.samples / totals[found.modality])
        own = min(max(FEWEST, share), max(devices, found.samples))
        made.append({"source": found.name, "samples": max(1, own // devices) * devices})
    return made


# models -----------------------------------------------------------------------------------------


def _add_pretrained(made: Draft, pretrained: str) -> None:
    if pretrained.endswith((".safetensors", ".pth", ".pt", ".bin")):
        made.settings["model"] = {"pretrained": pretrained}
        made.comments["model"] = "set name, if the file is not of a vit_small_patch16_224"
        return
    name, _, tag = pretrained.partition(".")
    weights = f"hf-hub:timm/{pretrained}" if tag else "timm"
    made.settings["model"] = {"name": name, "pretrained": weights}


TUNED = {"tune": "full", "lora_rank": 0}  # of a model whose weights are random
OWN_LLM = {"vocab_size": 4096, "width": 192, "depth": 2, "heads": 4}


def _add_text(made: Draft, uses: dict[str, list[Found]], text_llm: str) -> None:
    settings, scale = made.settings, made.scale
    from_scratch = not text_llm and scale.gpus == 0
    if scale.gpus < 2 and not from_scratch:  # a sentence encoder, which stays frozen
        _drop_stage(made, uses, "text")
    text, clip = (settings.setdefault(stage, {}) for stage in ("text", "clip"))
    if not from_scratch:
        text["llm"] = text_llm or "???"
        if not text_llm:
            made.comments["text"] = (
                "the model that reads the captions: a folder or hub name, such as\n"
                "sentence-transformers/all-MiniLM-L6-v2; give text.llm=NAME to xray run"
            )
        return
    text["llm"] = "${out}/llm"
    clip["text"] = {"llm": "${text.llm}"}
    first = max(uses["clip"], key=lambda found: found.samples * found.captions)
    settings["prepare"] = {"llm": {"path": "${out}/llm", "captions": first.shards, **OWN_LLM}}
    made.comments["prepare"] = (
        "a small language model, trained here from scratch on your captions. A pretrained\n"
        "sentence encoder knows far more words: xray init ... --text-llm NAME, such as\n"
        "sentence-transformers/all-MiniLM-L6-v2"
    )
    if "text" in uses:
        text |= TUNED | {"optim": {"base_lr": 1e-3, "weight_decay": 0.05}}
    else:  # without pairs of captions it learns beside the backbone
        clip["text"] |= {"features": "live"} | TUNED


def _drop_stage(made: Draft, uses: dict[str, list[Found]], stage: str) -> None:
    if uses.pop(stage, None):
        made.settings["stages"] = list(uses)
        del made.settings[stage]


def _add_tags(made: Draft, sources: list[Found]) -> None:
    samples = sum(found.samples for found in sources)
    own: Settings = {"min_count": max(2, min(20, samples // 300))}
    label = next((found.label for found in sources if found.label), "")
    if label and not any(max(found.tagged, found.captioned) >= SOME for found in sources):
        own["field"] = label
    made.settings["hashtag"] = {**made.settings.get("hashtag", {}), **own}
    made.comments["hashtag.min_count"] = f"samples that a tag needs, of {samples:,}"


def _same_classes(train: Found, test: Found) -> bool:
    """Check if kNN can be measured: on all samples, with classes that the training set has.

    Of many classes, the survey read some of the names only.
    """
    enough = train.samples >= KnnConfig.k and min(train.labelled, test.labelled) == 1.0
    if not enough or min(len(train.classes), len(test.classes)) < 2:
        return False
    few = len(train.classes) <= MOST_READ // 10
    return test.classes <= train.classes if few else bool(test.classes & train.classes)


def _add_evaluation(made: Draft, seen: Survey) -> None:
    own: Settings = {}
    pictures = [found for found in seen.held_out if found.modality == "image"]
    for suite, modality in (("retrieval", "image"), ("video_retrieval", "video")):
        for found in seen.held_out:
            captioned = found.captioned >= SOME and found.captioned * found.samples >= 2
            if found.modality == modality and captioned and "clip" in made.stages:
                own.setdefault(suite, {"shards": found.shards})
    pairs = ((train, test) for test in pictures for train in seen.training)
    for train, test in pairs:
        if train.modality == "image" and _same_classes(train, test):
            own.setdefault("knn", {"train": train.shards, "test": test.shards})
    made.settings["eval"] = {"held_out": True, **own}
    made.comments["eval"] = (
        "measured at the end, on samples that are not trained on" if own else
        "measured at the end, on samples that are held out: 5 to 20 % of files that xray packs\n"
        "of shards, xray data split SHARDS OUT val=0.05 holds some out"
    )  # fmt: skip
