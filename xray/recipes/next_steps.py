"""Commands to try after a recipe's run, printed at its end and shown in its report."""

from __future__ import annotations

import os
import shlex
from collections.abc import Sequence
from typing import NamedTuple

from data_pipelines.shards.manifest import resolve
from data_pipelines.shards.remote import is_remote
from xray.artifacts.artifact import Artifact
from xray.artifacts.offers import JOINT, VISION
from xray.recipes.recipe import Recipe


class NextStep(NamedTuple):
    """A command and its purpose."""

    command: str
    purpose: str


def next_steps(recipe: Recipe, artifacts: Sequence[Artifact]) -> list[NextStep]:
    """Return commands that use the last artifact with a backbone; [] if there is none."""
    seeing = [artifact for artifact in artifacts if VISION in artifact.offers]
    if not seeing:
        return []
    last, data = seeing[-1], _data(recipe)
    path, steps = shlex.quote(str(last.path)), list[NextStep]()
    if data and JOINT in last.offers:
        search = f'xray search {shlex.quote(data)} "a dog" --artifact {path} --html found.html'
        steps.append(NextStep(search, "a page of the pictures that fit a text"))
    steps.append(NextStep(f"xray show {path} PICTURE", "the tokens that it keeps of a picture"))
    if JOINT in last.offers:
        other = f"xray eval {path} eval.retrieval.shards=DATA"
        steps.append(NextStep(other, "the same measures on other captioned pictures"))
    return steps


def _data(recipe: Recipe) -> str:
    """Return the data on this computer that a recipe's last stage trains on, "" for none."""
    run = recipe.runs[-1]
    places = [resolve(run.data.sources[b.source].shards, run.data.root) for b in run.blocks]
    local = [os.path.normpath(place) for place in places if not is_remote(place)]
    return next((place for place in local if os.path.exists(place)), "")
