"""Trials of an ablation: one recipe per arm and seed, and the stage runs that trials share.

Runs with the same seed and data section see the same samples in the same order.

    OUT/stages/STAGE-HASH/                 # a stage run; HASH covers its settings and parents
    OUT/runs/ARM/seed_0/                   # recipe.yaml, results.json, report.html, log.txt
"""

from __future__ import annotations

import copy
import dataclasses
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from stages import STAGES, stage_class
from xray.ablations.older import older_defaults, take_older
from xray.ablations.spec import AblationConfig, check_fixed, nest, read_ablation
from xray.artifacts.offers import VISION
from xray.config import RunConfig, nearest
from xray.config import loading as cfg
from xray.config.identity import hash_json, identity
from xray.config.run import text_section
from xray.errors import ConfigError
from xray.evaluation.config import EvalConfig
from xray.evaluation.suites import SUITES
from xray.files import write_text
from xray.recipes.recipe import Recipe, link, read_recipe, recipe_layers
from xray.records import read_record
from xray.urls import redact_all

RESULTS, DONE = "results.json", "done.json"  # in a trial's folder
MATCH = "match_samples"
STAGE_RUNS = "stages"  # folder of the stage runs
SUITE_NAMES = [suite.name for suite in SUITES]


@dataclass
class Trial:
    """One arm with one seed: a recipe whose stage runs may be shared with other trials."""

    arm: str
    seed: int
    folder: Path  # of recipe.yaml, results and log
    layer: dict[str, Any]  # settings of recipe.yaml, over the layers common to all arms
    recipe: Recipe

    @property
    def keys(self) -> dict[str, str]:
        """Folder name of each stage's run."""
        return {run.stage: Path(run.out).name for run in self.recipe.runs}

    @property
    def key(self) -> str:
        """Hash of everything that determines the results: stage runs and evaluation settings."""
        settings = identity(self.recipe.eval)
        return hash_json([list(self.keys.values()), settings, self.recipe.root])

    def missing(self) -> list[str]:
        """Return the folder names of the stage runs that are not finished."""
        folders = [Path(run.out) for run in self.recipe.runs]
        return [f.name for f in folders if not (f / "artifact/manifest.json").is_file()]

    def finished(self) -> bool:
        """Return True if the trial was trained and evaluated with its current settings."""
        done = self.folder / DONE
        if self.missing() or not done.is_file():
            return False
        facts = read_record(done, dict[str, str], advice="; delete it")
        results = facts.pop("results", "")  # older files do not have it
        return facts == {"key": self.key} and (not results or (self.folder / results).is_file())

    def finish(self) -> None:
        """Record that the trial was trained and evaluated, and if the evaluation had results."""
        facts = {"key": self.key}
        if (self.folder / RESULTS).is_file():
            facts["results"] = RESULTS
        write_text(self.folder / DONE, json.dumps(facts))


@dataclass
class Ablation:
    """Checked ablation and its trials; for the other fields see AblationFile."""

    config: AblationConfig
    out: Path
    arms: dict[str, dict[str, Any]]
    common: list[dict[str, Any]]
    trials: list[Trial]  # all arms of the first seed, then all arms of the next one, and so on

    def of(self, arm: str) -> list[Trial]:
        """Return an arm's trials, in the order of the seeds."""
        return [trial for trial in self.trials if trial.arm == arm]


def load_ablation(name: str, overrides: Sequence[str] = ()) -> Ablation:
    """Load an ablation by name or yaml file and resolve its trials.

    Raises ConfigError for unknown keys, arms or metrics, and for arms without a difference.
    """
    file = read_ablation(name, overrides)
    ablation = Ablation(file.config, Path(file.config.out), file.arms, file.common, [])
    ablation.trials = list(_trials(ablation))
    _check_differ(ablation)
    return ablation


def _trials(ablation: Ablation) -> Iterator[Trial]:
    base = [*recipe_layers(ablation.config.base, None), *ablation.common]
    layers: dict[str, dict[str, Any]] = {}
    recipes: dict[str, Recipe] = {}
    for arm, settings in ablation.arms.items():
        recipe_settings = {key: value for key, value in settings.items() if key != MATCH}
        for key, value in recipe_settings.items():
            if value == "???":
                path = f"arms.{arm}.{key}"
                raise ConfigError(f"{path} is not set: add {path}=... to the command")
        layers[arm] = nest(recipe_settings)
        check_fixed(layers[arm], f"arm {arm}: ")
        recipes[arm] = _resolve(ablation, base, arm, layers[arm])
    _check_metrics(ablation, list(recipes.values()))
    for arm, settings in ablation.arms.items():  # from here on with the stages, which need torch
        if MATCH in settings:
            length = _matched_length(ablation, recipes, arm, str(settings[MATCH]))
            layers[arm] = cfg.merge(layers[arm], length)
            recipes[arm] = _resolve(ablation, base, arm, layers[arm])
    for recipe in recipes.values():
        link(recipe)
    older = older_defaults(ablation.out / STAGE_RUNS)
    for seed in ablation.config.seeds:
        for arm in ablation.arms:
            yield _trial(ablation, arm, layers[arm], recipes[arm], seed, older)


def _resolve(
    ablation: Ablation, base: Sequence[dict[str, Any]], arm: str, layer: dict[str, Any]
) -> Recipe:
    """Read an arm's recipe for the first seed."""
    fixed = {"name": arm, "out": str(_folder(ablation, arm, ablation.config.seeds[0]))}
    try:
        recipe = read_recipe([*base, cfg.merge(layer, fixed)])
        if any(run.train.epochs is not None for run in recipe.runs):
            from xray.recipes.run import with_lengths  # imports torch

            recipe.runs = with_lengths(recipe)
        return recipe
    except ConfigError as error:
        raise ConfigError(f"arm {arm}: {error}") from error


def _folder(ablation: Ablation, arm: str, seed: int) -> Path:
    return ablation.out / "runs" / arm / f"seed_{seed}"


def _trial(
    ablation: Ablation,
    arm: str,
    settings: dict[str, Any],
    resolved: Recipe,
    seed: int,
    older: Mapping[str, Any],
) -> Trial:
    """Make a trial whose stage runs are in folders named by a hash of their settings.

    older: defaults of runs that begin now, which do not change the hash.
    """
    folder = _folder(ablation, arm, seed)
    name = f"{ablation.config.name}: {arm}, seed {seed}"
    recipe = dataclasses.replace(copy.deepcopy(resolved), name=name, out=folder)
    fixed = {"name": name, "out": str(folder), "seed": seed}
    layer = cfg.merge(settings, fixed, _share_llm(recipe, ablation.out))
    moved: dict[str, str] = {}  # an artifact's path in the recipe -> its path in OUT/stages
    for number, run in enumerate(recipe.runs):
        run.seed = seed
        run.init_from = [moved.get(path, path) for path in run.init_from]
        parents = [Path(path).parent.name if path in moved.values() else path
                   for path in run.init_from]  # fmt: skip
        key = f"{run.stage}-{hash_json([identity(run), _inputs(run), parents])[:12]}"
        before, run.out = run.out, str(ablation.out / STAGE_RUNS / key)
        moved[str(Path(before) / "artifact")] = str(Path(run.out) / "artifact")
        recipe.runs[number], changed = take_older(run, older)
        layer = cfg.merge(layer, {run.stage: {"out": run.out, **changed}})
    return Trial(arm, seed, folder, layer, recipe)


def _inputs(run: RunConfig) -> dict[str, str]:
    """Return a stage's input paths: its identity leaves them out, but arms may differ in one.

    So may a mean that is given and one that is left to the weights, which the identity does not
    tell apart before the run begins.
    """
    models = stage_class(run.stage)(run).models()
    given = {name: getattr(run.data, name) for name in ("mean", "std")}
    found = run.model.pretrained or run.init_from  # where a mean that is left open comes from
    own = {name: str(value) for name, value in given.items() if found and value is not None}
    return {"data": run.data.root, "weights": run.model.pretrained, **models, **own}


def _share_llm(recipe: Recipe, out: Path) -> dict[str, Any]:
    """Move the LLM that a recipe prepares to a folder that all arms with equal settings share.

    Changes the recipe and returns the change as a layer.
    """
    prepared = recipe.prepare.llm
    if prepared is None:
        return {}
    settings = {**dataclasses.asdict(prepared), "path": "", "root": recipe.root}
    before, prepared.path = prepared.path, str(out / "llms" / hash_json(settings)[:12])
    layer: dict[str, Any] = {"prepare": {"llm": {"path": prepared.path}}}
    for run in recipe.runs:
        text = text_section(run)
        if text is not None and text.llm == before:
            text.llm = prepared.path
            own = {"llm": prepared.path}
            layer[run.stage] = own if getattr(run, run.stage, None) is text else {"text": own}
    return layer


def _matched_length(
    ablation: Ablation, recipes: Mapping[str, Recipe], arm: str, target: str
) -> dict[str, Any]:
    """Return the layer that lengthens an arm's last stage to the target arm's total samples."""
    where = f"arm {arm}: {MATCH}={target}"
    if target not in recipes or target == arm:
        raise ConfigError(f"{where} is not another arm{nearest(target, recipes)}")
    if MATCH in ablation.arms[target]:
        raise ConfigError(f"{where} names an arm that has {MATCH} too: name another arm")
    runs, target_runs = ([run for run in recipes[name].runs if trains_vision(run.stage)]
                         for name in (arm, target))  # fmt: skip
    if not runs:
        raise ConfigError(
            f"arm {arm}: {MATCH} needs a stage that trains on images or clips: add one to stages, "
            f"or remove {MATCH}"
        )
    last = runs[-1]
    samples = samples_of(last) + sum(map(samples_of, target_runs)) - sum(map(samples_of, runs))
    if samples < last.global_batch:
        raise ConfigError(
            f"{where} leaves {samples} samples for {last.stage}: the other "
            f"stages of {arm} see more samples than all stages of {target}; reduce their "
            f"train.samples, or remove {MATCH}"
        )
    return {last.stage: {"train": {"samples": samples}}}


def trains_vision(stage: str) -> bool:
    """Return True if a stage trains on images and clips, False if on captions only."""
    return VISION in stage_class(stage).offers


def samples_of(run: RunConfig) -> int:
    """Return the number of training samples of a stage run."""
    return int(run.steps * run.global_batch)


def _check_differ(ablation: Ablation) -> None:
    arm_by_key: dict[str, str] = {}
    for arm in ablation.arms:
        first = arm_by_key.setdefault(ablation.of(arm)[0].key, arm)
        if first != arm:
            raise ConfigError(
                f"arms {first} and {arm} are the same: none of their different settings "
                "changes a result; remove one of them"
            )


def _evaluation(recipe: Recipe) -> EvalConfig:
    """Return a recipe's evaluation, with the samples that its sources hold out."""
    if not recipe.eval.held_out:
        return recipe.eval
    from xray.recipes.run import held_out_sets  # imports torch

    return held_out_sets(recipe)[0]


def _packs_held_out(recipe: Recipe) -> bool:
    """Return True if a recipe evaluates samples of plain files, which are packed before it runs."""
    if not recipe.eval.held_out:
        return False
    from xray.recipes.own_data import recipe_settings

    return bool(recipe_settings(recipe, write=False))


def _check_metrics(ablation: Ablation, recipes: Sequence[Recipe]) -> None:
    """Raise ConfigError for a metric of a suite or stage that no arm has."""
    suites = {name for recipe in recipes for name in _evaluation(recipe).configured()}
    sections = sorted(suites | {run.stage for recipe in recipes for run in recipe.runs})
    for metric in ablation.config.metrics:
        section, dot, _ = metric.partition(".")
        if dot and section in SUITE_NAMES and any(map(_packs_held_out, recipes)):
            continue  # the suites follow from the samples that packing holds out
        if section not in sections or not dot:
            raise ConfigError(
                f"metrics: {metric!r} is not a metric: write SUITE.MEASURE or STAGE.METRIC with "
                f"one of {', '.join(sections)}{nearest(section, sections)}"
            )


def write_recipes(ablation: Ablation) -> None:
    """Write every trial's recipe.yaml, which `xray run` runs."""
    base = ablation.config.base
    for name, layer in zip(("common", "command_line"), ablation.common, strict=True):
        path = ablation.out / f"{name}.yaml"
        _write(path, {"base": base, **layer})
        base = str(path)
    for trial in ablation.trials:
        _write(trial.folder / "recipe.yaml", {"base": base, **trial.layer})


def _write(path: Path, layer: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, OmegaConf.to_yaml(OmegaConf.create(redact_all(layer))))


def stage_runs(ablation: Ablation) -> dict[str, list[tuple[Trial, RunConfig]]]:
    """Return each distinct stage run's uses, (trial, stage config), by its folder's name."""
    uses: dict[str, list[tuple[Trial, RunConfig]]] = {}
    for stage in STAGES:
        for trial in ablation.trials:
            for run in trial.recipe.runs:
                if run.stage == stage:
                    uses.setdefault(Path(run.out).name, []).append((trial, run))
    return uses
