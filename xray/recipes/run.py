"""Run of a recipe: its plan, the data and language model it prepares, its checks and stages."""

from __future__ import annotations

import copy
import dataclasses
import json
import logging
import os
from collections.abc import Sequence
from contextlib import nullcontext, suppress
from functools import partial
from pathlib import Path
from typing import Any

import torch

from data_pipelines.curation.tables import keep_listed
from data_pipelines.ingest.demo import DemoConfig, make_demo
from data_pipelines.ingest.plain_files import Request
from data_pipelines.ingest.user_data import open_data, open_sources
from data_pipelines.shards.manifest import resolve
from data_pipelines.shards.tar_index import TEXT_FILES
from data_pipelines.text.captions import captions_of
from stages import stage_class
from stages.base import split_parents
from xray import dist
from xray.artifacts.artifact import Artifact, open_artifact
from xray.artifacts.language_model import Language
from xray.artifacts.offers import TAGS
from xray.config import RunConfig, SourceConfig, TextConfig
from xray.config import loading as cfg
from xray.config.model import LlmConfig
from xray.config.run import text_section
from xray.config.schedule import steps_of, value_at
from xray.errors import BadSample, DataError
from xray.evaluation.config import EvalConfig
from xray.evaluation.datasets import check_sets
from xray.evaluation.evaluator import Evaluator, Results
from xray.evaluation.held_out import TaggedSources, located, with_held_out
from xray.evaluation.keep_rates import KEEP_RATES, over_keep_rates
from xray.evaluation.overlap import OVERLAP, Overlap
from xray.evaluation.suite import Measures
from xray.evaluation.suites import result_table, suite_named
from xray.files import making, replacing, write_text
from xray.models.tiny_llm import build_tiny_llm
from xray.precompute.config import TextFeaturesConfig
from xray.precompute.text_features import write_text_features
from xray.progress import progress_bar
from xray.recipes.recipe import Recipe
from xray.reports.tables import ResultTable, figure, short
from xray.training.length import length_advice, sizes_of, sources_at_hand
from xray.training.run import check_decoding, holds_another_run

log = logging.getLogger("xray")
Sizes = dict[str, dict[str, int]]  # samples of the sources at hand, by stage and source


def sizes_at_hand(recipe: Recipe) -> Sizes:
    """Count the samples of each stage's sources that are on this computer; not collective."""
    known: dict[str, dict[str, int]] = {}  # by the sources, which most stages share
    sizes: Sizes = {}
    for run in recipe.runs:
        sources = [(block.source, run.data.sources[block.source]) for block in run.blocks]
        key = repr((run.data.root, sources))
        if key not in known:
            known[key] = sizes_of(sources_at_hand(run))
        sizes[run.stage] = known[key]
    return sizes


def with_lengths(recipe: Recipe) -> list[RunConfig]:
    """Return the runs with their lengths in samples; no source is opened if none is in epochs."""
    if all(run.train.epochs is None for run in recipe.runs):
        return recipe.runs
    sizes = sizes_at_hand(recipe)
    return [run.with_length(sizes[run.stage]) for run in recipe.runs]


def plan_table(recipe: Recipe, sizes: Sizes) -> ResultTable:
    """Make the table of a recipe's stages; raises ConfigError for one that cannot be built."""
    table = ResultTable(
        f"{recipe.name} -> {recipe.out}",
        ("stage", "starts from", "batch", "GMACs each", "length", "peak lr", "state"),
    )
    for given in recipe.runs:
        own = sizes.get(given.stage, {})
        config = given.with_length(own)
        parents = [Path(p).parent.name if p.endswith("artifact") else p for p in config.init_from]
        first = stage_class(config.stage)(config).first_weights()
        start = "\n+ ".join(parents) or os.path.basename(first)
        size, cost = _inputs(config)
        batch = f"{' + '.join(f'{b.samples} {b.source}' for b in config.blocks)}\n{size}"
        length = _length(config, own)
        lr = f"{config.optim.base_lr * config.global_batch / 256:.2g}"
        table.rows.append((config.stage, start, batch, cost, length, lr, _state(config)))
    return table


def _length(config: RunConfig, sizes: dict[str, int]) -> str:
    if config.train.epochs is not None:
        return f"{config.train.epochs:g} epochs"
    lines = [f"{short(config.steps * config.global_batch)} samples", f"{short(config.steps)} steps"]
    if passes := config.passes(sizes, config.steps):
        least, most = (figure(choose(passes.values())) for choose in (min, max))
        lines.append(f"{least} epochs" if least == most else f"{least} to {most} epochs")
    return "\n".join(lines)


def plan_notes(recipe: Recipe, sizes: Sizes) -> list[str]:
    """Return what is odd about the lengths of a recipe's stages, each with a setting to change."""
    notes = []
    for run in recipe.runs:
        own = sizes.get(run.stage, {})
        notes += length_advice(run.with_length(own), own, f"{run.stage}.")
    return notes


def _state(config: RunConfig) -> str:
    out = Path(config.out)
    if holds_another_run(config):
        return "other settings there"
    if (out / "artifact" / "manifest.json").is_file():
        return "finished"
    return "continues" if (out / "run.json").is_file() else "new"


def _inputs(config: RunConfig) -> tuple[str, str]:
    """Return (pixels and frames over the stage, GMACs of an image + of a clip at the end)."""
    data, stage = config.data, stage_class(config.stage)(config)
    modalities = {data.sources[block.source].modality for block in config.blocks}
    clip = value_at(data.frames, 1.0)
    frames = [n for n, kind in ((1, "image"), (clip, "video")) if kind in modalities]
    macs = [stage.macs(n) for n in frames]
    if not any(macs):
        return "text", ""
    size = f"{_over_time(data.resolution)} px"
    if "video" in modalities:
        size += f" x {_over_time(data.frames)}"
    return size, " + ".join(f"{n / 1e9:.3g}" for n in macs)


def _over_time(schedule: Any) -> str:
    return ">".join(str(value) for _, value in steps_of(schedule))


def prepare(recipe: Recipe) -> None:
    """Make the demo data and the tiny LLM that a recipe asks for, on rank 0."""
    wanted = recipe.prepare

    def make() -> None:
        if wanted.demo is not None:
            make_demo(Path(recipe.root), cfg.build(DemoConfig, wanted.demo))
        if wanted.llm is not None:
            make_llm(wanted.llm, recipe.root)

    dist.on_main(make, dist.PREPARATION, "making the demo data and the LLM")


def make_llm(config: LlmConfig, root: str) -> None:
    """Build the tiny LLM, unless it exists; a half-written folder is written again.

    Raises DataError if no sample has a caption.
    """
    folder = Path(config.path)
    if folder.is_dir():
        return
    source = open_data(resolve(config.captions, root), Request("captions", "text"))
    captions: list[str] = []
    for place in source.places():
        with suppress(BadSample):  # without a caption
            captions += captions_of(source.read(*place, TEXT_FILES))
    if not captions:
        raise DataError(f"{resolve(config.captions, root)} has no captions to build an LLM from")
    sizes = config.vocab_size, config.width, config.depth, config.heads
    with making(folder):
        if not folder.is_dir():
            with replacing(folder) as temporary:
                temporary.mkdir(parents=True)
                build_tiny_llm(captions, temporary, *sizes, config.family)


def store_captions(config: RunConfig, text: TextConfig, device: torch.device) -> None:
    """Write the text features that a run reads, unless they are there already; on all ranks."""
    parents = split_parents(
        stage_class(config.stage), [open_artifact(path) for path in config.init_from]
    )
    names = [block.source for block in [*config.blocks, *config.validation]]
    language = dist.main_first(lambda: Language(text, parents.text), "opening the LLM")
    for name, source in open_sources(config.data, names).items():
        given = dataclasses.asdict(text)
        captions = config.data.sources[name].captions
        job = TextFeaturesConfig(**given, captions=captions, workers=config.data.workers)
        shown = progress_bar(f"captions of {name}") if dist.is_main() else nullcontext()
        with shown as progress:
            write_text_features(source, language, job, device, progress)


def join_ranks(recipe: Recipe) -> torch.device:
    """Join the process group of a recipe's run, and return this rank's device."""
    device = dist.choose_device(recipe.runs[0].train.device)
    from xray.training.deepspeed_setup import init_distributed

    init_distributed(device)
    return device


def run_recipe(recipe: Recipe) -> list[Artifact]:
    """Train every stage that is not finished, in order, and return all artifacts."""
    from xray.training.trainer import train_stage

    device = join_ranks(recipe)
    for config in recipe.runs:
        if not (Path(config.out) / "artifact").exists():
            check_decoding(config, device)
    prepare(recipe)
    evaluation, lines = dist.main_first(partial(held_out_sets, recipe), "opening the data")
    for line in lines:
        log.info("%s", line)
    preflight(recipe.runs, evaluation, recipe.root)
    artifacts = []
    work = [work_of(run) for run in (with_lengths(recipe) if dist.is_main() else recipe.runs)]
    for number, config in enumerate(recipe.runs):
        text = text_section(config)
        if text is not None and text.features != "live":
            store_captions(config, text, device)
        following = sum(work[number + 1 :]) / work[number] if work[number] else 0.0
        artifacts.append(train_stage(stage_class(config.stage), config, device, following))
    return artifacts


def work_of(config: RunConfig) -> float:
    """Count the multiply-adds of a stage on images and clips, in its forward passes; 0 for texts,
    and for a length in epochs of data that are not at hand.

    The time of a recipe's later stages is estimated from it and the time of the present one.
    """
    if config.train.epochs is not None:
        return 0.0
    stage, frames = stage_class(config.stage)(config), value_at(config.data.frames, 1.0)
    each = {"image": 1, "video": frames}
    kinds = [(block.samples, config.data.sources[block.source].modality) for block in config.blocks]
    step = sum(samples * stage.macs(each[kind]) for samples, kind in kinds if kind in each)
    return float(config.steps * step)


def preflight(runs: list[RunConfig], evaluation: EvalConfig, root: str) -> None:
    """Check the data, LLM and parents of every stage after the first; that one checks its own.

    Sidecars that this writes are the ones that the stage reads later. Raises ConfigError,
    ArtifactError or DataError.
    """
    check_evaluation(runs, evaluation, root)
    offers = {run.stage: stage_class(run.stage).offers for run in runs}
    results = {str(Path(run.out) / "artifact"): offers[run.stage] for run in runs}
    todo = [run for run in runs if not (Path(run.out) / "artifact").exists()]
    for config in todo:
        names = [block.source for block in [*config.blocks, *config.validation]]
        opened = open_sources(config.data, names)
        if config is todo[0]:
            continue
        coming = [path for path in config.init_from if path in results and not Path(path).exists()]
        there = [open_artifact(path) for path in config.init_from if path not in coming]
        kind = stage_class(config.stage)
        stage, parents = kind(copy.deepcopy(config)), split_parents(kind, there)
        kept = {n: keep_listed(s, config.data.sources[n]) for n, s in opened.items()}
        pending = frozenset[str]().union(*(results[path] for path in coming))
        foresee = partial(stage.foresee, kept, parents, pending)
        dist.main_first(foresee, f"checking the data of {config.stage}")


def check_evaluation(runs: list[RunConfig], evaluation: EvalConfig, root: str) -> None:
    """Check that the data sets of a recipe's evaluation exist; raises ConfigError or DataError."""
    offers = {run.stage: stage_class(run.stage).offers for run in runs}
    for suites in evaluation.in_recipe(offers).values():
        check_sets(evaluation, suites, root)


def held_out_sets(recipe: Recipe) -> tuple[EvalConfig, list[str]]:
    """Return a recipe's evaluation with the sets that its sources hold out, and lines about it."""
    sources: dict[str, SourceConfig] = {}
    tagged = TaggedSources()
    for run in recipe.runs:
        names = [block.source for block in run.blocks]
        own = {name: located(run.data, name) for name in names}
        sources |= own
        if TAGS in stage_class(run.stage).offers:
            tagged = TaggedSources(frozenset(own), getattr(run, run.stage).field)
    return with_held_out(recipe.eval, sources, tagged)


def evaluate(recipe: Recipe, artifacts: Sequence[Artifact]) -> ResultTable | None:
    """Evaluate a recipe's artifacts on all ranks; rank 0 writes results.json.

    Returns None if no suite has data, and on the other ranks.
    """
    device = None  # the fastest; several ranks share that of their process group
    if dist.world_size() > 1:
        device = dist.choose_device(recipe.runs[0].train.device)
    results: dict[str, Measures] = {}
    shares, unknown = dict[str, float](), list[str]()
    (recipe.out / KEEP_RATES).unlink(missing_ok=True)
    evaluation, _ = held_out_sets(recipe)
    asked = evaluation.in_recipe({artifact.stage: artifact.offers for artifact in artifacts})
    for artifact in artifacts:
        if suites := asked[artifact.stage]:
            given = artifact, evaluation, recipe.root, recipe.workers, device
            evaluator = dist.main_first(partial(Evaluator.open, *given), "opening the artifact")
            measured = evaluator.lead(partial(_measured, evaluator, suites))
            if measured is not None:
                results |= measured[0]
                shares |= measured[1].shares
                unknown.append(measured[1].unknown)
            evaluator.lead(partial(_compare_keep_rates, evaluator, recipe, suites))
    if not results:
        return None
    results |= {OVERLAP: shares} if shares else {}
    write_text(recipe.out / "results.json", json.dumps(results, indent=1))
    table = result_table(results)
    table.notes += dict.fromkeys(filter(None, unknown))
    return table


def _measured(evaluator: Evaluator, suites: list[str]) -> tuple[Results, Overlap]:
    return evaluator.run(suites), evaluator.overlap(suites)


def _compare_keep_rates(evaluator: Evaluator, recipe: Recipe, suites: Sequence[str]) -> None:
    """Write the comparison that eval.keep_rates asks for; a model with all tokens has none."""
    rates, chosen = recipe.eval.keep_rates.rates, recipe.eval.keep_rates.suites
    names = [name for name in suites if suite_named(name).compared and name in (chosen or suites)]
    if rates and names and evaluator.sets.vision.vision.reduction != "none":
        by_rate = over_keep_rates(evaluator, rates, names)
        write_text(recipe.out / KEEP_RATES, json.dumps(by_rate, indent=1))
