"""Run of a recipe: its plan, the data and language model it prepares, its checks and stages."""

from __future__ import annotations

import copy
import dataclasses
import json
import logging
from collections.abc import Sequence
from contextlib import nullcontext, suppress
from functools import partial
from pathlib import Path

import torch

from data_pipelines.curation.tables import kept_sources
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
from xray.artifacts.offers import TAGS, VISION
from xray.config import RunConfig, SourceConfig, TextConfig
from xray.config import loading as cfg
from xray.config.model import LlmConfig
from xray.config.run import text_section
from xray.errors import BadSample, DataError
from xray.evaluation.checks import check_before_training
from xray.evaluation.config import EvalConfig
from xray.evaluation.datasets import check_sets
from xray.evaluation.evaluator import Evaluator
from xray.evaluation.held_out import TaggedSources, located, with_held_out
from xray.evaluation.keep_rates import KEEP_RATES, over_keep_rates
from xray.evaluation.named_sets import named_sets, naming
from xray.evaluation.overlap import OVERLAP
from xray.evaluation.suite import Measures
from xray.evaluation.suites import result_table, suite_named
from xray.files import making, replacing, write_text
from xray.models.tiny_llm import build_tiny_llm
from xray.precompute.config import TextFeaturesConfig
from xray.precompute.text_features import write_text_features
from xray.progress import progress_bar
from xray.recipes.named_results import NamedResults, suites_by_stage
from xray.recipes.plan_table import Sizes, work_of
from xray.recipes.recipe import Recipe
from xray.reports.tables import ResultTable
from xray.training.length import sizes_of, sources_at_hand
from xray.training.open_settings import normalisation
from xray.training.run import check_decoding
from xray.training.run_record import as_begun

log = logging.getLogger("xray")


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


def prepare(recipe: Recipe) -> None:
    """Make the demo data and the tiny LLM that a recipe asks for, on rank 0."""
    wanted = recipe.prepare

    def make() -> None:
        if wanted.demo is not None:
            make_demo(Path(resolve(recipe.root)), cfg.build(DemoConfig, wanted.demo))
        if wanted.llm is not None:
            make_llm(wanted.llm, recipe.root)

    dist.on_main(make, dist.PREPARATION, "making the demo data and the LLM")


def make_llm(config: LlmConfig, root: str) -> None:
    """Build the tiny LLM, unless it exists; a half-written folder is written again.

    Raises DataError if no sample has a caption.
    """
    folder = Path(resolve(config.path))
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
    kind = stage_class(config.stage)
    parents = split_parents(kind, [open_artifact(path) for path in config.init_from])
    stage = kind(config)
    names = [block.source for block in [*config.blocks, *config.validation]]
    names = [name for name in names if stage.contrasts(name)]
    parent = stage.text_parent(parents)
    language = dist.main_first(lambda: Language(text, parent), "opening the LLM")
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
        text = text_section(as_begun(config))
        if text is not None and text.features != "live":
            store_captions(config, text, device)
        following = sum(work[number + 1 :]) / work[number] if work[number] else 0.0
        artifacts.append(train_stage(stage_class(config.stage), config, device, following))
    return artifacts


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
        keep = partial(kept_sources, opened, config.data)
        kept = dist.main_first(keep, f"finding the kept samples of {config.stage}")
        pending = frozenset[str]().union(*(results[path] for path in coming))
        if VISION in kind.offers and VISION not in pending and not Path(config.out).exists():
            check = partial(normalisation, config.data, parents.vision, config.model)
            dist.main_first(check, f"checking the weights of {config.stage}")
        foresee = partial(stage.foresee, kept, parents, pending)
        dist.main_first(foresee, f"checking the data of {config.stage}")


def check_evaluation(runs: list[RunConfig], evaluation: EvalConfig, root: str) -> None:
    """Check a recipe's evaluation before training: its data sets, and their labels and captions.

    Raises ConfigError or DataError.
    """
    offers = {run.stage: stage_class(run.stage).offers for run in runs}
    asked = [suite for suites in evaluation.in_recipe(offers).values() for suite in suites]
    check_sets(evaluation, asked, root)
    opening = partial(named_sets, evaluation, root, ())
    named = dist.main_first(opening, "opening the data sets of eval.sets")
    for own in named:
        with naming(own.name):
            check_sets(own.config, own.suites, root)

    able = {suite for suites in suites_by_stage(offers).values() for suite in suites}

    def check_contents() -> None:
        check_before_training(asked, evaluation, root)
        for own in named:
            with naming(own.name):
                check_before_training(able.intersection(own.suites), own.config, root)

    dist.on_main(check_contents, dist.PREPARATION, "checking the data of the evaluation")


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
    measured = Measured(recipe.out)
    (recipe.out / KEEP_RATES).unlink(missing_ok=True)
    evaluation, _ = held_out_sets(recipe)
    by_stage = suites_by_stage({artifact.stage: artifact.offers for artifact in artifacts})
    named = NamedResults(recipe.out)
    asked = evaluation.in_recipe({artifact.stage: artifact.offers for artifact in artifacts})
    for artifact in artifacts:
        suites = asked[artifact.stage]
        own = by_stage[artifact.stage] if evaluation.sets else []
        if not suites and not own:
            continue
        given = artifact, evaluation, recipe.root, recipe.workers, device
        evaluator = dist.main_first(partial(Evaluator.open, *given), "opening the artifact")
        if own:
            evaluator.lead(partial(named.evaluate, evaluator, own))
        if suites:
            evaluator.lead(partial(measured.add, evaluator, suites))
            evaluator.lead(partial(_compare_keep_rates, evaluator, recipe, suites))
    named.finish()
    return measured.table()


@dataclasses.dataclass
class Measured:
    """Results of a recipe's artifacts so far, on rank 0."""

    out: Path
    results: dict[str, Measures] = dataclasses.field(default_factory=dict)
    overlap: dict[str, float] = dataclasses.field(default_factory=dict)
    unknown: list[str] = dataclasses.field(default_factory=list)

    def add(self, evaluator: Evaluator, suites: Sequence[str]) -> None:
        """Run suites of an artifact, and write all results: what follows may fail."""
        self.results |= evaluator.run(suites)
        found = evaluator.overlap(suites)
        self.overlap |= found.shares
        self.unknown.append(found.unknown)
        write_text(self.out / "results.json", json.dumps(self.all(), indent=1))

    def all(self) -> dict[str, Measures]:
        """Return the results and the shares of samples that were trained on."""
        return self.results | ({OVERLAP: self.overlap} if self.overlap else {})

    def table(self) -> ResultTable | None:
        """Make the table of the results; None if there are none."""
        if not self.results:
            return None
        table = result_table(self.all())
        table.notes += dict.fromkeys(filter(None, self.unknown))
        return table


def _compare_keep_rates(evaluator: Evaluator, recipe: Recipe, suites: Sequence[str]) -> None:
    """Write the comparison that eval.keep_rates asks for; a model with all tokens has none."""
    rates, chosen = recipe.eval.keep_rates.rates, recipe.eval.keep_rates.suites
    names = [name for name in suites if suite_named(name).compared and name in (chosen or suites)]
    if rates and names and evaluator.sets.vision.vision.reduction != "none":
        by_rate = over_keep_rates(evaluator, rates, names)
        write_text(recipe.out / KEEP_RATES, json.dumps(by_rate, indent=1))
