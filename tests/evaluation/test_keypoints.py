"""PCK of keypoints, against a plain loop over keypoints and patches."""

from __future__ import annotations

import csv
import json
import math
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from in_process import invoke
from shards import photo

from data_pipelines.decode.transforms import load_pixels
from data_pipelines.shards.source import Sample
from xray.artifacts.artifact import Artifact, open_artifact
from xray.artifacts.encoders import VisionEncoder
from xray.artifacts.manifest_config import data_config
from xray.config.loading import build
from xray.evaluation.config import EvalConfig
from xray.evaluation.evaluator import Evaluator

if TYPE_CHECKING:
    from conftest import Trained

SIZES = ((60, 40), (40, 40), (40, 70))  # width and height of the pictures 0, 1 and 2
HEAD = ("source", "target", "source_x", "source_y", "target_x", "target_y", "size")


@pytest.fixture(scope="module")
def artifact(trained: Trained) -> Artifact:
    return open_artifact(trained("hashtag", "train.samples=24"))


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A table of 60 keypoints of three pictures; every second one has a size."""
    root, rng = tmp_path_factory.mktemp("pairs"), np.random.default_rng(0)
    for number, size in enumerate(SIZES):
        (root / f"{number}.jpg").write_bytes(photo(number, size))
    with (root / "pairs.csv").open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(HEAD)
        for number in range(60):
            pair = rng.permutation(3)[:2].tolist()
            points = [round(x, 1) for n in pair for x in (rng.random(2) * SIZES[n]).tolist()]
            rows.writerow([*(f"{n}.jpg" for n in pair), *points, 30 if number % 2 else ""])
    return root / "pairs.csv"


def test_pck_is_that_of_a_plain_loop(artifact: Artifact, table: Path) -> None:
    config = build(EvalConfig, {"keypoints": {"pairs": table.name, "alpha": 0.3}})
    run = Evaluator(VisionEncoder(artifact), config, str(table.parent), 0)
    measures = run.run(["keypoints"])["keypoints"]
    encoder, data, maps = run.sets.vision, data_config(artifact), []
    for number in range(3):
        files = {"jpg": (table.parent / f"{number}.jpg").read_bytes()}
        pixels = load_pixels(Sample(files, "set", "image", "a", 32, 1), data, None)[None]
        with torch.no_grad():
            tokens = encoder.vision(
                encoder.normalize(pixels), encoder.keep_rate, track=True
            ).dense()
        rows = torch.nn.functional.normalize(tokens[0].half().float(), dim=-1)
        maps.append(rows.reshape(4, 4, -1).double().numpy())
    hits, chances, outside = [], [], 0
    with table.open(newline="") as file:
        for row in csv.DictReader(file):
            source, target = int(row["source"][0]), int(row["target"][0])
            points = []  # in patches of the square in the centre
            for name, number in (("source", source), ("target", target)):
                (width, height), side = SIZES[number], min(SIZES[number])
                corner = (width - side) // 2, (height - side) // 2
                x, y = (float(row[f"{name}_{axis}"]) for axis in "xy")
                points.append(((x - corner[0]) / side * 4, (y - corner[1]) / side * 4))
            if not all(0 <= c < 4 for point in points for c in point):
                outside += 1
                continue
            x, y = (min(max(c - 0.5, 0), 3) for c in points[0])
            left, top = min(int(x), 2), min(int(y), 2)
            asked = sum(
                (1 - abs(x - left - j)) * (1 - abs(y - top - i)) * maps[source][top + i, left + j]
                for i in (0, 1)
                for j in (0, 1)
            )
            side = min(SIZES[target])
            limit = 0.3 * float(row["size"] or max(SIZES[target]))
            scores = {(i, j): float(asked @ maps[target][i, j]) for i in range(4) for j in range(4)}
            near = {
                (i, j): math.dist((j + 0.5, i + 0.5), points[1]) * side / 4 <= limit
                for i, j in scores
            }
            highest = max(scores.values())
            best = [place for place, score in scores.items() if score > highest - 1e-6]
            hits.append(np.mean([near[place] for place in best]))
            chances.append(np.mean([*near.values()]))
    assert 0 < outside < 50 and measures["left_out"] == outside
    assert measures["keypoints"] == len(hits) and measures["pairs"] <= 6
    assert measures["PCK"] == pytest.approx(np.mean(hits), abs=1e-12)
    assert measures["chance_PCK"] == pytest.approx(np.mean(chances), abs=1e-12)
    assert 0 < measures["PCK_low"] <= measures["PCK"] <= measures["PCK_high"] <= 1


def test_the_table_of_results_and_each_mistake(
    artifact: Artifact, table: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    out = tmp_path / "r.json"
    given = "eval", artifact.path, "data.workers=0"
    done = invoke(*given, f"eval.keypoints.pairs={table}", "--out", out)
    assert done.exit_code == 0, done.stderr
    text = " ".join(done.stdout.split())
    assert "keypoints PCK@0.1" in text and "outside of the view, left out" in text
    assert json.loads(out.read_text())["keypoints"]["alpha"] == 0.1
    (tmp_path / "a.jpg").write_bytes(photo(0))
    cases = (
        ("a.jpg,a.jpg,1,2,3,x,4", "data row 1: target_y='x' is not a number"),
        ("a.jpg,b.jpg,1,2,3,4,", "data row 1: no file"),
        ("a.jpg,a.jpg,1,2,300,4,", "data row 1: a keypoint is outside of its picture"),
        ("a.jpg,a.jpg,0,0,3,4,", "all keypoints are outside of the pictures' views"),
    )
    for row, message in cases:
        (tmp_path / "wrong.csv").write_text(f"{','.join(HEAD)}\n{row}\n")
        done = invoke(*given, f"eval.keypoints.pairs={tmp_path / 'wrong.csv'}")
        assert done.exit_code == 2 and message in done.stderr, done.output
        assert len(done.stderr.strip().splitlines()) == 1, done.stderr
    (tmp_path / "wrong.csv").write_text("source,target\na.jpg,a.jpg\n")
    for settings, message in (
        (f"{{pairs: {tmp_path / 'wrong.csv'}}}", "has no column 'source_x'"),
        (f"{{pairs: {tmp_path}}}", "is not a table"),
        (f"{{pairs: {table}, alpha: 0}}", "eval.keypoints.alpha=0.0 must be above 0"),
    ):
        done = invoke(*given, f"eval.keypoints={settings}")
        assert done.exit_code == 2 and message in done.stderr, done.output
