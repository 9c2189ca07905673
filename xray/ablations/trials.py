"""An ablation: arms and seeds as recipes, and the stage runs that they share.

Every run of a seed has that seed, and so the same samples in the same order wherever its data
section is the same.

    OUT/stages/STAGE-HASH/                 # a stage run; the hash is of its settings and parents
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
from stages.base import text_section
from xray.ablations.spec import AblationConfig, check_own, nest, read_ablation
from xray.artifacts.offers import VISION
from xray.config import RunConfig, nearest
from xray.config import loading as cfg
from xray.config.identity import hash_json, identity, to_dict
from xray.errors import ConfigError
from xray.files import write_text
from xray.recipes.recipe import Recipe, recipe_layers, resolve_recipe

MATCH = "match_samples"


@dataclass
class Trial:
    """One arm with one seed: a recipe whose stages are trained in folders that arms share."""

    arm: str
    seed: int
    folder: Path
    layer: dict[str, Any]  # of the recipe, over those that all arms have
    recipe: Recipe

    @property
    def keys(self) -> dict[str, str]:
        """Each stage's folder name."""
        return {run.stage: Path(run.out).name for run in self.recipe.runs}

    @property
    def key(self) -> str:
        """What its results follow from: its stage runs, and how they are evaluated."""
        evaluated = to_dict(self.recipe.eval), self.recipe.root
        return hash_json([list(self.keys.values()), *evaluated])

    def missing(self) -> list[str]:
        """The stage runs that are not finished."""
        return [
            Path(run.out).name
            for run in self.recipe.runs
            if not (Path(run.out) / "artifact" / "manifest.json").is_file()
        ]

    def finished(self) -> bool:
        """Whether it was trained and evaluated to its end, as it is asked for now."""
        done = self.folder / "done.json"
        if self.missing() or not done.is_file():
            return False
        return bool(json.loads(done.read_text())["key"] == self.key)


@dataclass
class Ablation:
    """A checked ablation and its trials, of all arms for one seed after the other."""

    config: AblationConfig
    out: Path
    arms: dict[str, dict[str, Any]]  # settings by dotted key
    common: list[dict[str, Any]]  # the layers over the base recipe: the file's, the command line's
    trials: list[Trial]

    def of(self, arm: str) -> list[Trial]:
        """An arm's trials, in the order of the seeds."""
        return [trial for trial in self.trials if trial.arm == arm]


def load_ablation(name: str, overrides: Sequence[str] = ()) -> Ablation:
    """An ablation by name or yaml file, and its trials.

    Raises ConfigError for what is unknown, or cannot work together.
    """
    asked = read_ablation(name, overrides)
    ablation = Ablation(asked.config, Path(asked.config.out), asked.arms, asked.common, [])
    ablation.trials = list(_trials(ablation))
    _check_differ(ablation)
    _check_metrics(ablation)
    return ablation


def _trials(ablation: Ablation) -> Iterator[Trial]:
    base = [*recipe_layers(ablation.config.base, None), *ablation.common]
    layers: dict[str, dict[str, Any]] = {}
    recipes: dict[str, Recipe] = {}
    for arm, settings in ablation.arms.items():
        plain = {key: value for key, value in settings.items() if key != MATCH}
        for key in [key for key, value in plain.items() if value == "???"]:
            raise ConfigError(f"arms.{arm}.{key} is not set: give arms.{arm}.{key}=...")
        layers[arm] = nest(plain)
        check_own(layers[arm], f"arm {arm}: ")
        recipes[arm] = _resolve(ablation, base, arm, layers[arm])
    for arm, settings in ablation.arms.items():
        if MATCH in settings:
            longer = _matched(ablation, recipes, arm, str(settings[MATCH]))
            layers[arm] = cfg.merge(layers[arm], longer)
            recipes[arm] = _resolve(ablation, base, arm, layers[arm])
    for seed in ablation.config.seeds:
        for arm in ablation.arms:
            yield _trial(ablation, arm, layers[arm], recipes[arm], seed)


def _resolve(
    ablation: Ablation, base: Sequence[dict[str, Any]], arm: str, layer: dict[str, Any]
) -> Recipe:
    """An arm's recipe, as of the first seed."""
    own = {"name": arm, "out": str(_folder(ablation, arm, ablation.config.seeds[0]))}
    try:
        return resolve_recipe([*base, cfg.merge(layer, own)])
    except ConfigError as error:
        raise ConfigError(f"arm {arm}: {error}") from error


def _folder(ablation: Ablation, arm: str, seed: int) -> Path:
    return ablation.out / "runs" / arm / f"seed_{seed}"


def _trial(
    ablation: Ablation, arm: str, settings: dict[str, Any], resolved: Recipe, seed: int
) -> Trial:
    """An arm's recipe with its stages in folders named by what makes their results."""
    folder = _folder(ablation, arm, seed)
    name = f"{ablation.config.name}: {arm}, seed {seed}"
    recipe = dataclasses.replace(copy.deepcopy(resolved), name=name, out=folder)
    own = {"name": name, "out": str(folder), "seed": seed}
    layer = cfg.merge(settings, own, _share_llm(recipe, ablation.out))
    moved: dict[str, str] = {}  # artifacts to where they will be
    for run in recipe.runs:
        run.seed = seed
        run.init_from = [moved.get(path, path) for path in run.init_from]
        parents = [Path(path).parent.name if path in moved.values() else path
                   for path in run.init_from]  # fmt: skip
        key = f"{run.stage}-{hash_json([identity(run), _inputs(run), parents])[:12]}"
        before, run.out = run.out, str(ablation.out / "stages" / key)
        moved[str(Path(before) / "artifact")] = str(Path(run.out) / "artifact")
        layer = cfg.merge(layer, {run.stage: {"out": run.out}})
    return Trial(arm, seed, folder, layer, recipe)


def _inputs(run: RunConfig) -> dict[str, str]:
    """What a stage reads that its identity does not name: where it lies may be another's place."""
    models = stage_class(run.stage)(run).models()
    return {"data": run.data.root, "weights": run.model.pretrained, **models}


def _share_llm(recipe: Recipe, out: Path) -> dict[str, Any]:
    """Let a recipe make its LLM where all arms that make the same one share it; as a layer."""
    made = recipe.prepare.llm
    if made is None:
        return {}
    settings = {**to_dict(made), "path": "", "root": recipe.root}
    before, made.path = made.path, str(out / "llms" / hash_json(settings)[:12])
    layer: dict[str, Any] = {"prepare": {"llm": {"path": made.path}}}
    for run in recipe.runs:
        text = text_section(run)
        if text is not None and text.llm == before:
            text.llm = made.path
            own = {"llm": made.path}
            layer[run.stage] = own if getattr(run, run.stage, None) is text else {"text": own}
    return layer


def _matched(
    ablation: Ablation, recipes: Mapping[str, Recipe], arm: str, like: str
) -> dict[str, Any]:
    """The layer that lengthens an arm's last stage until it sees as much as another arm."""
    if like not in recipes or like == arm:
        raise ConfigError(f"arm {arm}: {MATCH}={like} is no other arm{nearest(like, recipes)}")
    if MATCH in ablation.arms[like]:
        raise ConfigError(f"arm {arm}: {MATCH}={like}, which is matched itself: name another arm")
    own, other = ([run for run in recipes[name].runs if sees_pictures(run.stage)]
                  for name in (arm, like))  # fmt: skip
    if not own:
        raise ConfigError(f"arm {arm}: {MATCH} lengthens a stage that sees pictures: it has none")
    last = own[-1]
    samples = samples_of(last) + sum(map(samples_of, other)) - sum(map(samples_of, own))
    if samples < last.global_batch:
        raise ConfigError(
            f"arm {arm}: {MATCH}={like} leaves {samples} samples for {last.stage}: its other "
            "stages see more than all of that arm"
        )
    return {last.stage: {"train": {"samples": samples}}}


def sees_pictures(stage: str) -> bool:
    """Tell whether a stage trains a backbone, and does not read captions alone."""
    return VISION in stage_class(stage).offers


def samples_of(run: RunConfig) -> int:
    """Samples that a stage sees, all blocks together."""
    return int(run.steps * run.global_batch)


def _check_differ(ablation: Ablation) -> None:
    """Raise ConfigError where two arms are the same runs."""
    seen: dict[str, str] = {}
    for arm in ablation.arms:
        key = ablation.of(arm)[0].key
        if key in seen:
            raise ConfigError(
                f"arms {seen[key]} and {arm} are the same: no setting in which they differ changes "
                "a result; leave one of them out"
            )
        seen[key] = arm


def _check_metrics(ablation: Ablation) -> None:
    """Raise ConfigError for a metric of a suite or stage that no arm has."""
    recipes = [trial.recipe for trial in ablation.trials]
    suites = {name for recipe in recipes for name in recipe.eval.configured()}
    there = sorted(suites | {run.stage for recipe in recipes for run in recipe.runs})
    for metric in ablation.config.metrics:
        section, dot, _ = metric.partition(".")
        if section not in there or not dot:
            raise ConfigError(
                f"metrics: {metric!r} is none: write SUITE.MEASURE or STAGE.METRIC, of "
                f"{', '.join(there)}{nearest(section, there)}"
            )


def write_recipes(ablation: Ablation) -> None:
    """Write every trial's recipe.yaml, to be run by `xray run`."""
    below = ablation.config.base
    for name, layer in zip(("common", "command_line"), ablation.common, strict=True):
        path = ablation.out / f"{name}.yaml"
        _write(path, {"base": below, **layer})
        below = str(path)
    for trial in ablation.trials:
        _write(trial.folder / "recipe.yaml", {"base": below, **trial.layer})


def _write(path: Path, layer: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, OmegaConf.to_yaml(OmegaConf.create(layer)))


def stage_runs(ablation: Ablation) -> dict[str, list[tuple[Trial, RunConfig]]]:
    """The trials that use each different stage run, by its folder's name, and its config."""
    found: dict[str, list[tuple[Trial, RunConfig]]] = {}
    for stage in STAGES:
        for trial in ablation.trials:
            for run in trial.recipe.runs:
                if run.stage == stage:
                    found.setdefault(Path(run.out).name, []).append((trial, run))
    return found
