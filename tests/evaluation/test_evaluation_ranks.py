"""Evaluations of two processes: equal to those of one, and ended on both by an error of one."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from child_process import RECIPE, SUPPORT, torchrun
from masked import write_masked
from shards import photo, write_tar

from xray.artifacts.artifact import open_artifact
from xray.commands.evaluate import evaluate
from xray.recipes.recipe import load_recipe
from xray.recipes.run import evaluate as evaluate_recipe

if TYPE_CHECKING:
    from conftest import Trained

# 24 held-out photos and 24 clips: the last batch is short, and a process has one batch less.
BATCH = "eval.batch_size=5"
MASKS = "eval.segmentation={train: shards, test: plain, steps: 3}"
PROBES = "eval.knn={train: gallery, test: heldout, k: 5}"
SETS = (
    "eval.zero_shot={shards: heldout, classes: classes.txt}",
    "eval.retrieval.shards=heldout",
    "eval.video_retrieval.shards=clips",
    "eval.linear_probe={train: gallery, test: heldout}",
    "eval.attentive_probe.epochs=1",
    "eval.finetune.epochs=1",
    "eval.few_shot={shots: [1], draws: 2}",
    "eval.views={clips: 2, crops: 3}",
    "eval.robustness={corruptions: [gaussian_noise], severities: [2], resolutions: [0.5], "
    "aspects: [2.0], attacks: [pgd], eps: [1], steps: 2, attacked: 7}",
)
SUITES = (
    "zero_shot,retrieval,video_retrieval,compression,knn,linear_probe,few_shot,attentive_probe,"
    "finetune,robustness"
)
TIMED = ("samples_per_s", "speed")
TOLD = {
    "bad_sample": r"DataError sample '\S+' of .+ cannot be used: broken picture",
    "not_finite": r"DataError eval\.linear_probe\.train: the model's features are NaN or infinite",
    "no_fit": "DataError no space left on device",
}


@pytest.fixture(scope="module")
def jobs(
    demo: Path,
    media: Path,
    trained: Trained,
    tagger: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> dict[str, Any]:
    """The jobs of evaluation_ranks.py."""
    files = tmp_path_factory.mktemp("list") / "list.csv"
    files.write_text(f"path,label\n{media / 'photo.jpg'},a\n{media / 'other.jpg'},b\n")
    masked = write_masked(tmp_path_factory.mktemp("masked"), 12)
    tables = write_tables(tmp_path_factory.mktemp("tables"))
    shards = {"shards": str(demo / "heldout"), "classes": str(demo / "classes.txt")}
    own = {"suite": ["zero_shot", "retrieval"], **shards}
    (tables / "sets.yaml").write_text(json.dumps({"a": own, "b": own}))
    clip, data = trained("clip", "train.samples=24"), [f"data.root={demo}", "data.workers=0", BATCH]
    text = trained("text", "train.samples=24", "data.blocks=[{source: photos, samples: 8}]")
    commands = {
        "clip": {"artifact": clip, "overrides": [*data, PROBES, *SETS], "suite": SUITES},
        "masks": {
            "artifact": clip,
            "overrides": [*data[1:], f"data.root={masked}", MASKS],
            "suite": "segmentation,correspondence",
            "keep_rates": "1,.5",
            "reduce": "tome,random",
        },
        "rates": {"artifact": clip, "overrides": [*data, PROBES], "keep_rates": "1,.5"},
        "text": {"artifact": text, "overrides": [*data, "eval.captions.shards=heldout"]},
        "tags": {
            "artifact": tagger,
            "overrides": [*data, "eval.tags={own: {shards: heldout, crops: 3}}"],
        },
        "tables": {
            "artifact": clip,
            "overrides": [
                f"data.root={tables}",
                "data.workers=0",
                "eval.batch_size=3",
                "eval.compositional.pairs=pairs.csv",
                "eval.keypoints.pairs=points.csv",
                "eval.token_selection.shards=boxed",
            ],
        },
        "sets": {
            "artifact": clip,
            "overrides": [*data, f"eval.sets={tables / 'sets.yaml'}"],
        },
        "one_batch": {
            "artifact": clip,
            "overrides": [f"eval.knn={{train: {files}, test: {files}, k: 1}}"],
        },
    }
    overrides = [f"data.root={demo}", "stages=[hashtag,clip]", BATCH]
    jobs = {
        "commands": commands,
        "recipe": [RECIPE, overrides],
        "artifacts": [tagger, clip],
        "sets": [*data, SETS[3]],
    }
    return json.loads(json.dumps(jobs, default=str))


def write_tables(root: Path) -> Path:
    """Write the data of suites that read tables, and pictures with the box of their object."""
    pictures = {f"{i}.jpg": photo(i, (32, 32)) for i in range(5)}
    boxes = {f"{i}.json": b'{"object_box": [0, 0, 0.5, 0.5]}' for i in range(5)}
    write_tar(root / "boxed" / "0.tar", dict(sorted((pictures | boxes).items())))
    pairs = ["path,caption,negative_caption"]
    points = ["source,target,source_x,source_y,target_x,target_y"]
    for number, (name, content) in enumerate(pictures.items()):
        (root / name).write_bytes(content)
        pairs.append(f"{name},a red circle {number},a blue star {number}")
        points.append(f"{name},{(number + 1) % 5}.jpg,{5 * number + 1},4,{4 * number + 3},9")
    (root / "pairs.csv").write_text("\n".join(pairs))
    (root / "points.csv").write_text("\n".join(points))
    return root


def end_of_recipe(jobs: dict[str, Any], out: Path) -> list[Any]:
    """Arguments of load_recipe, with an output folder."""
    name, overrides = jobs["recipe"]
    (out / "recipe").mkdir()
    return [name, [*overrides, f"out={out / 'recipe'}"]]


@pytest.fixture(scope="module")
def one(jobs: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The results of one process, with as many threads as each of two."""
    out, threads = tmp_path_factory.mktemp("one"), torch.get_num_threads()
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // 2))
    for name, arguments in jobs["commands"].items():
        evaluate.__wrapped__(**arguments, out=str(out / f"{name}.json"))
    recipe = load_recipe(*end_of_recipe(jobs, out))
    assert evaluate_recipe(recipe, [open_artifact(path) for path in jobs["artifacts"]])
    yield out
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def two(jobs: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The results and errors of two processes, and what they print to stderr."""
    out = tmp_path_factory.mktemp("two")
    whole = {**jobs, "recipe": end_of_recipe(jobs, out), "out": str(out)}
    (out / "jobs").write_text(json.dumps(whole))
    return out, torchrun(str(SUPPORT / "evaluation_ranks.py"), str(out / "jobs"))


def _untimed(section: dict[str, Any]) -> dict[str, Any]:
    own = {key: value for key, value in section.items() if key not in TIMED}
    return {k: _untimed(v) if isinstance(v, dict) else v for k, v in own.items()}


def measures(path: Path) -> dict[str, Any]:
    """Return the results in a file, without those of timing."""
    sections = json.loads(path.read_text()).items()
    return {name: _untimed(own) if isinstance(own, dict) else own for name, own in sections}


@pytest.mark.parametrize(
    "name",
    ("clip", "masks", "rates", "text", "tags", "tables", "sets", "one_batch", "recipe/results"),
)
def test_two_processes_have_the_results_of_one(one: Path, two: tuple[Path, str], name: str) -> None:
    found = measures(two[0] / f"{name}.json")
    assert found == measures(one / f"{name}.json") and found


def seen(out: Path, name: str, model: str) -> list[int]:
    """Return the number of samples that each rank encoded."""
    return [json.loads((out / f"{name}.{rank}.seen").read_text()).get(model, 0) for rank in (0, 1)]


def test_each_process_encodes_every_second_batch(two: tuple[Path, str]) -> None:
    """For 24 photos in batches of 5, rank 0 has 5 + 5 + 4 and rank 1 has 5 + 5."""
    out, _ = two
    assert seen(out, "tags", "VisionBackbone") == [3 * 14, 3 * 10]
    assert seen(out, "sets", "VisionBackbone") == [14, 10]  # two sets of the same pictures
    assert seen(out, "one_batch", "VisionBackbone") == [2, 2]  # nobody reads that of rank 1


@pytest.mark.parametrize("name", TOLD)
def test_an_error_of_one_process_ends_both(two: tuple[Path, str], name: str) -> None:
    """Both raise it, marked as agreed, so that rank 0 prints it once."""
    first, second = ((two[0] / f"{name}.{rank}").read_text() for rank in (0, 1))
    assert first == second and re.fullmatch(f"True {TOLD[name]}", first), first
    assert not (two[0] / f"{name}.json").exists()


def test_a_process_waits_for_hours_for_a_fit_on_rank_0(two: tuple[Path, str]) -> None:
    out, told = two
    assert (out / "waited").exists() and not list(out.glob("long_fit.[01]"))
    assert measures(out / "long_fit.json")["linear_probe"]
    assert re.search(r"xray, rank 1: waiting for rank 0 .+ s so far: evaluating", told)


def test_a_mistake_is_printed_once(two: tuple[Path, str]) -> None:
    lines = [line for line in two[1].splitlines() if "unknown suite" in line]
    assert len(lines) == 1 and lines[0].startswith("xray: unknown suite 'knm'"), lines
