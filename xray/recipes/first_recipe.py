"""Rules for a first recipe: which recipe to start from, stages, blocks and lengths, and why.

`SCALES` chooses the recipe that the new one is based on, `LENGTHS` divides the time over stages.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from data_pipelines.curation.captioned import CAPTIONED
from xray.evaluation.suites.knn import KnnConfig
from xray.recipes.machine import Machine
from xray.recipes.step_blocks import Settings, blocks
from xray.recipes.survey import MOST_READ, Found, Survey, described


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
SOME = 0.05  # share of the samples of a source that must have captions or tags, to use them
MOST = 0.5  # share of the samples with captions from which on clip alone is best (docs/proof.md)
FEW = 0.2  # share of all samples with captions up to which hashtags as texts help (docs/proof.md)


@dataclass
class Draft:
    """Settings of the new recipe, and the comments above them, by dotted key."""

    scale: Scale
    settings: Settings
    comments: dict[str, str] = field(default_factory=dict)
    sizes: dict[str, int] = field(default_factory=dict)  # samples of data.sources
    kept: dict[str, dict[str, int]] = field(default_factory=dict)  # those that a stage keeps

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
    if tagged := _tag_texts(seen, uses, scale):
        _add_tag_texts(result, uses["clip"], tagged, machine)
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


def _tag_texts(seen: Survey, uses: dict[str, list[Found]], scale: Scale) -> list[Found]:
    """Return the sources whose hashtags the clip stage also reads as texts."""
    total = sum(found.samples for found in seen.training)
    captioned = sum(found.samples * found.captioned for found in seen.training)
    if "clip" not in uses or scale is ADAPT or captioned >= FEW * total:
        return []
    return [own for own in seen.training if own.tagged >= SOME and own.captioned < MOST]


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
        made.sizes[found.name] = found.samples
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
        _leave_out_uncaptioned(made, stage, uses.get(stage, ()))


def _leave_out_uncaptioned(made: Draft, stage: str, sources: Sequence[Found]) -> None:
    """Restrict the sources of a stage to the samples with captions."""
    some = [found for found in sources if found.captioned < 0.99]
    if some:
        section = made.settings.setdefault(stage, {}).setdefault("data", {})
        section["sources"] = {found.name: {"keep": CAPTIONED} for found in some}
        made.comments[f"{stage}.data"] = "samples without captions are left out of this stage"
        made.kept[stage] = {found.name: _part(found, found.captioned).samples for found in some}


def _add_tag_texts(
    made: Draft, captioned: list[Found], tagged: list[Found], machine: Machine
) -> None:
    """Give half of a step of the clip stage to captions, and half to hashtags as texts."""
    sources, readers = made.settings["data"]["sources"], list[Found]()
    for found in tagged:
        name = f"{found.name}_tags"
        while name in sources:
            name += "_"
        own = {"shards": found.shards, "modality": found.modality}
        sources[name] = own | {"captions": {"joined(hashtags)": 1}, "keep": CAPTIONED}
        made.comments[f"data.sources.{name}"] = (
            "hashtags as texts, because few samples have captions"
        )
        readers.append(_part(replace(found, name=name), found.tagged))
        made.sizes[name] = readers[-1].samples
    with_captions = [_part(own, own.captioned) for own in captioned]
    step = [
        block
        for half in (with_captions, readers)
        for block in blocks(half, made.scale.batch // 2, machine.devices)
    ]
    made.settings.setdefault("clip", {}).setdefault("data", {})["blocks"] = step


def _part(found: Found, share: float) -> Found:
    return replace(found, samples=max(1, round(share * found.samples)))


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
