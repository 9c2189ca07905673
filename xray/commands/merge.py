"""`xray merge`: average the weights of artifacts, judge the mixtures, and write the chosen one."""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from xray import dist
from xray.commands.common import EvalRecipe, check_folder, checking, guarded, is_setting
from xray.commands.evaluate import eval_settings, filled_sets
from xray.commands.help import examples
from xray.errors import ArtifactError, ConfigError
from xray.files import sole_writer

if TYPE_CHECKING:
    from xray.artifacts.artifact import Artifact
    from xray.evaluation.config import EvalConfig
    from xray.merging.mixtures import Mixture
    from xray.merging.search import Search

log = logging.getLogger("xray")
SOUPS = ("", "uniform", "greedy")


@dataclass(frozen=True)
class Choice:
    """The options that say which mixtures are made and which one is written."""

    alphas: Sequence[float]  # of --alpha
    soup: str
    by: Sequence[str]  # measures of --choose

    @property
    def needs_data(self) -> bool:
        """True if mixtures must be evaluated."""
        return self.soup == "greedy" or len(self.alphas) > 1

    def rule(self, chosen: Mixture) -> str:
        """Say by which rule a mixture was chosen, for the manifest and the page."""
        measures = f"{'mean of ' * (len(self.by) > 1)}{' and '.join(self.by)}"
        if self.soup:
            return f"{self.soup} soup" + (f" by {measures}" if self.by else "")
        others = f", the highest {measures} of {len(self.alphas)} values"
        return f"alpha {chosen.name}" + (others if self.by else "")


@dataclass(frozen=True)
class Job:
    """Artifacts to merge, the folder to write, and the suites that judge the mixtures."""

    paths: Sequence[str]
    llm: str
    folder: Path
    suites: Sequence[str]  # none: nothing is evaluated
    config: EvalConfig
    root: str
    workers: int

    def search(self, artifacts: Sequence[Artifact], by: Sequence[str]) -> Search:
        """Prepare the evaluation of mixtures; by: measures whose mean chooses."""
        from xray.merging.frozen_text import share_text
        from xray.merging.search import Judge, Search

        vectors: dict[str, Any] | None = {} if share_text(artifacts) else None
        device = dist.choose_device("auto")
        judge = Judge(self.suites, self.config, self.root, self.workers, device, vectors)
        return Search(artifacts, judge, self.folder, by)


@examples(
    (
        "xray merge runs/base/clip runs/tuned/clip --alpha .5 --out merged",
        "merged/artifact, the mean of two artifacts; nothing is evaluated",
    ),
    (
        "xray merge runs/base/clip runs/tuned/clip --alpha 0:1:.1 --recipe mine.yaml",
        "eleven mixtures, evaluated with the suites of a recipe: a table, and merged/merge.html "
        "with the curve of two suites against each other",
    ),
    (
        "xray merge a b --alpha 0:1:.1 --choose knn.top1 --recipe mine.yaml",
        "the same, and merged/artifact is the mixture with the best kNN",
    ),
    (
        "xray merge a b c --soup greedy --choose knn.top1 --recipe mine.yaml",
        "the mean of those artifacts that improve it",
    ),
)
@guarded
def merge(
    given: Annotated[
        list[str],
        typer.Argument(
            metavar="ARTIFACT... [KEY=VALUE]...",
            help="Artifacts of one architecture, folders or URLs; settings as in xray eval",
        ),
    ],
    alpha: Annotated[
        str,
        typer.Option(
            metavar="VALUES",
            help="0:1:.1, 0,.3,1 or .5: from the first artifact (0) to the mean of the others (1)",
        ),
    ] = "",
    soup: Annotated[
        str,
        typer.Option(metavar="KIND", help="uniform: the mean of all; greedy: of those that help"),
    ] = "",
    choose: Annotated[
        str,
        typer.Option(
            metavar="SUITE.MEASURE,...",
            help="Write the mixture with the highest mean of these measures (several values of "
            "--alpha, --soup greedy)",
        ),
    ] = "",
    suite: Annotated[
        str,
        typer.Option(metavar="NAMES", help="Suites to run (default: all that have data)"),
    ] = "",
    recipe: EvalRecipe = "",
    out: Annotated[str, typer.Option(metavar="FOLDER", help="Folder to write")] = "merged",
) -> None:
    """Average the weights of artifacts that were trained from the same weights.

    Writes FOLDER/artifact. With data sets (eval.SUITE.KEY=, see xray eval), each mixture is
    evaluated, and FOLDER/merge.json and merge.html have the results with 95 % intervals. Several
    values of --alpha without --choose: only the results are written. After an interruption, run the
    same command again: it continues. Choose on other data than you report results on.
    """
    from xray.merging.mixtures import parse_alphas

    with checking():
        if dist.world_size() > 1:
            raise ConfigError("xray merge runs in one process: start it without a launcher")
        choice = Choice(parse_alphas(alpha) if alpha else (), soup, _names(choose))
        _check(choice)
        job = _checked(choice, given, _names(suite), recipe, out)
    artifacts = _opened(job.paths, job.llm)
    with sole_writer(job.folder, "--out"):
        if job.suites:
            _judged(choice, job.search(artifacts, choice.by))
        else:
            _write(job.folder, artifacts, choice, _mixtures(choice, len(artifacts))[-1])


def _checked(
    choice: Choice, given: Sequence[str], names: Sequence[str], recipe: str, out: str
) -> Job:
    """Check the artifacts' manifests and the data. given: artifacts and settings; names: suites."""
    from xray.evaluation.suites import suite_named

    settings = [item for item in given if is_setting(item)]
    paths = [item for item in given if item not in settings]
    asked = [suite_named(name).name for name in names]
    config, root, workers, llm = eval_settings(settings, recipe)
    if config.sets:
        raise ConfigError("xray merge takes eval.SUITE.KEY=, not eval.sets")
    folder = _folder(out, paths)
    described = _described(paths)
    for artifact in described:
        config = filled_sets(config, artifact, root)
    suites = _suites(choice, asked, config, root, described[0])
    return Job(paths, llm, folder, suites, config, root, workers)


def _names(text: str) -> list[str]:
    return [name for name in text.split(",") if name]


def _check(choice: Choice) -> None:
    """Raise ConfigError for options that contradict each other."""
    if choice.soup not in SOUPS:
        raise ConfigError(f"--soup {choice.soup}: use uniform or greedy")
    if bool(choice.alphas) == bool(choice.soup):
        raise ConfigError(
            "give one of --alpha, such as --alpha .5 or 0:1:.1, and --soup uniform or greedy"
        )
    if choice.soup == "greedy" and not choice.by:
        raise ConfigError("--soup greedy needs --choose SUITE.MEASURE, such as zero_shot.top1")
    if choice.by and not choice.needs_data:
        what = "--soup uniform" if choice.soup else f"--alpha {choice.alphas[0]:g}"
        raise ConfigError(f"{what} is one mixture: leave out --choose")


def _described(paths: Sequence[str]) -> list[Artifact]:
    """Read the manifests and compare them, before weights are read."""
    from xray.artifacts.artifact import Artifact, find_manifest
    from xray.merging.compatibility import check_mergeable

    artifacts = []
    for path in paths:
        place, content, manifest = find_manifest(path)
        digest = hashlib.sha256(content).hexdigest()
        artifacts.append(Artifact(place.folder, manifest, digest, place.where))
    check_mergeable(artifacts)
    return artifacts


def _opened(paths: Sequence[str], llm: str) -> list[Artifact]:
    """Open the artifacts; warn if they were not trained from the same weights."""
    from xray.artifacts.artifact import open_artifact
    from xray.merging.compatibility import unrelated

    artifacts = [open_artifact(path, llm) for path in paths]
    if warning := unrelated(artifacts):
        log.warning("%s", warning)
    return artifacts


def _folder(out: str, paths: Sequence[str]) -> Path:
    """Return the folder to write; raises ConfigError for one that holds something else."""
    check_folder(out)
    folder = Path(out)
    inside = {Path(os.path.expanduser(path)).resolve() for path in paths}
    if (folder / "manifest.json").is_file() or (folder / "config.yaml").is_file():
        raise ConfigError(f"--out {out} is an artifact or a run: choose another --out")
    if folder.resolve() in inside or (folder / "artifact").resolve() in inside:
        raise ConfigError(f"--out {out} holds one of the artifacts to merge: choose another --out")
    return folder


def _suites(
    choice: Choice, asked: Sequence[str], config: EvalConfig, root: str, artifact: Artifact
) -> list[str]:
    """Return the suites to run; raises ConfigError if mixtures cannot be compared."""
    from xray.merging.measures import check_chosen

    config.validate()
    suites = [*asked] or config.possible(artifact.offers)
    if choice.needs_data and not suites:
        raise ConfigError(
            "several mixtures are compared by evaluation, and there are no data: set "
            "eval.SUITE.KEY= or --recipe (xray config eval lists the keys), or give one --alpha"
        )
    check_chosen(choice.by, suites)
    if suites:
        from xray.evaluation.checks import check_suites  # imports torch

        what = f"{artifact.origin} is of stage {artifact.stage}"
        check_suites(suites, config.filled(), artifact.offers, what, root)
    return suites


def _mixtures(choice: Choice, artifacts: int) -> list[Mixture]:
    """Return the mixtures that are known before any is evaluated; of a soup, the mean is last."""
    from xray.merging.mixtures import line, soup

    if choice.alphas:
        return line(choice.alphas, artifacts)
    return [*(soup([i], artifacts) for i in range(artifacts)), soup(range(artifacts), artifacts)]


def _judged(choice: Choice, search: Search) -> None:
    """Evaluate the mixtures, print and write the results, and write the chosen artifact."""
    from xray.merging.measures import shown_measures
    from xray.merging.report import mixture_table, panels_of, write_page

    if choice.soup == "greedy":
        chosen, mixtures = search.greedy()
    else:
        mixtures = _mixtures(choice, len(search.artifacts))
        search.measure(mixtures)
        chosen = search.best(mixtures) if choice.by else mixtures[-1]
    picked = chosen if choice.by or not choice.needs_data else None
    measured = [(mixture, search.of(mixture)) for mixture in mixtures]
    how = shown_measures(measured[0][1], choice.by), picked, bool(choice.alphas)
    table = mixture_table(measured, *how)
    table.print()
    facts: dict[str, Any] | None = None
    if picked is not None:
        facts = {"name": picked.name, "weights": picked.weights, "by": choice.rule(picked)}
    search.save(search.stored.mixtures, facts)
    rule = "No mixture was chosen." if facts is None else f"Chosen (*): {facts['by']}."
    path = write_page(search.out, search.artifacts, table, panels_of(measured, *how), rule)
    print(f"report: {path}")
    if picked is None:
        print(
            "no artifact is written: add --choose SUITE.MEASURE, or give one value of --alpha; "
            "finished evaluations are not repeated"
        )
        return
    _write(search.out, search.artifacts, choice, picked)


def _write(out: Path, artifacts: Sequence[Artifact], choice: Choice, mixture: Mixture) -> None:
    """Write the artifact of a mixture, unless it is there."""
    from xray.artifacts.artifact import open_artifact
    from xray.artifacts.lineage import mixed_of
    from xray.artifacts.offers import MIXTURE
    from xray.merging.artifact import write_mixture

    path = out / "artifact"
    facts = {"by": choice.rule(mixture)}
    if path.exists():
        written = open_artifact(path)
        parents = {parent["manifest"] for parent in written.manifest["parents"].values()}
        weights = list(written.manifest.get(MIXTURE, {}).get("weights", {}).values())
        own = {artifacts[position].digest for position in mixture.members}
        if parents != own or weights != [mixture.weights[p] for p in mixture.members]:
            raise ArtifactError(f"{path} is another artifact: choose another --out, or delete it")
    else:
        written = write_mixture(path, artifacts, mixture, facts)
    print(f"artifact: {path}, {mixed_of(written.manifest)}")
