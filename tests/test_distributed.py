"""Two gloo processes against one: same losses, same gradients, same files."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from test_resume import HERE, RECIPE, clean_environment, xray
from tiny import train
from two_process import CHANGES, GO_ON, JOINED, STAGES, ZERO, halfway

from xray.artifact import open_artifact
from xray.report import read_metrics

# Sums in another order: fp32 losses of the same step agree to this, relatively.
TOLERANCE = 1e-4


def torchrun(*arguments: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", *arguments],
        capture_output=True,
        text=True,
        timeout=600,
        env=clean_environment(PYTHONPATH=f"{HERE}{os.pathsep}{HERE.parent}"),
    )
    assert done.returncode == 0, done.stderr[-3000:]


WAITING = """
import pathlib, sys, time
from datetime import timedelta
import torch.distributed
from xray import dist
torch.distributed.init_process_group("gloo")
torch.distributed.barrier()  # both are there: from here on nobody has to wait for long
torch.distributed.destroy_process_group()
torch.distributed.init_process_group("gloo", timeout=timedelta(seconds=6))
done = dist.main_first(lambda: dist.is_main() and time.sleep(12) or time.monotonic())
first = dist.broadcast_object(done)
assert first <= done, "rank 0 is first"
over = pathlib.Path(sys.argv[1])
if dist.is_main():
    over.touch()
while not over.exists():  # rank 0 is still sending: a socket that is closed would cut it off
    time.sleep(0.1)
"""


def test_ranks_wait_for_what_rank_0_prepares(tmp_path: Path) -> None:
    script = tmp_path / "waiting.py"
    script.write_text(WAITING)
    torchrun(str(script), str(tmp_path / "over"))


def assert_same_losses(one: Path, two: Path, expected: int) -> None:
    a, b = (read_metrics(folder / "metrics.jsonl") for folder in (one, two))
    assert len(a) == len(b) == expected
    for x, y in zip(a, b, strict=True):
        assert x["loss"] == pytest.approx(y["loss"], rel=TOLERANCE)
        assert x["grad_norm"] == pytest.approx(y["grad_norm"], rel=100 * TOLERANCE)


def test_a_recipe_gives_the_same_on_one_and_two_processes(demo: Path, tmp_path: Path) -> None:
    settings = [f"data.root={demo}", "train.samples=48"]
    one = xray("run", RECIPE, *settings, f"out={tmp_path / 'one'}")
    assert one.returncode == 0, one.stderr
    torchrun("-m", "xray", "run", RECIPE, *settings, f"out={tmp_path / 'two'}")
    for stage in ("mae", "hashtag", "text", "clip"):
        assert_same_losses(tmp_path / "one" / stage, tmp_path / "two" / stage, 4)
    a, b = (json.loads((tmp_path / n / "results.json").read_text()) for n in ("one", "two"))
    assert a.keys() == b.keys() == {"zero_shot", "retrieval", "knn", "tags"}


@pytest.fixture(scope="module")
def cells(demo: Path, plain: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("cells")
    for stage, zero in JOINED:
        halfway(plain / stage, out / f"{stage}-joined-{zero}")
    torchrun(str(HERE / "two_process.py"), str(demo), str(out))
    return out


@pytest.fixture(scope="module")
def plain(demo: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("plain")
    for stage, changes in CHANGES.items():
        train(STAGES.get(stage, stage), demo, out / stage, *changes)
    return out


@pytest.mark.parametrize(("stage", "zero"), ZERO)
def test_zero_stages_agree_with_one_plain_process(
    cells: Path, plain: Path, stage: str, zero: int
) -> None:
    assert_same_losses(plain / stage, cells / f"{stage}-{zero}", 6)


@pytest.mark.parametrize(("stage", "first", "second"), GO_ON)
def test_two_processes_go_on_in_any_zero_stage(
    cells: Path, stage: str, first: int, second: int
) -> None:
    begun, done = cells / f"{stage}-{first}", cells / f"{stage}-{first}-to-{second}"
    assert_same_losses(begun, done, 6)
    parts = [open_artifact(folder / "artifact").load("backbone") for folder in (begun, done)]
    if first == second:
        assert all(torch.equal(value, parts[1][name]) for name, value in parts[0].items())


@pytest.mark.parametrize(("stage", "zero"), JOINED)
def test_two_processes_go_on_where_one_was(cells: Path, plain: Path, stage: str, zero: int) -> None:
    assert_same_losses(plain / stage, cells / f"{stage}-joined-{zero}", 6)


@pytest.mark.parametrize(
    ("stage", "first", "second"), [("mae", 1, 0), ("mae", 3, 2), ("clip", 3, 1)]
)
def test_one_process_goes_on_where_two_were(
    demo: Path, cells: Path, plain: Path, tmp_path: Path, stage: str, first: int, second: int
) -> None:
    out = halfway(cells / f"{stage}-{first}", tmp_path / "run")
    train(stage, demo, out, f"zero.stage={second}", *CHANGES[stage])
    assert_same_losses(plain / stage, out, 6)


def test_contrastive_gradients_are_those_of_the_whole_batch(cells: Path) -> None:
    torch.manual_seed(0)
    images, texts = torch.randn(2, 6, 5, dtype=torch.float64)
    weight = torch.randn(5, 5, dtype=torch.float64, requires_grad=True)
    scale = torch.tensor([2.0], dtype=torch.float64, requires_grad=True)
    a, b = F.normalize(images @ weight, dim=-1), F.normalize(texts @ weight.t(), dim=-1)
    logits = scale.exp() * a @ b.t()
    labels = torch.arange(6)
    loss = (F.cross_entropy(logits, labels) + F.cross_entropy(logits.t(), labels)) / 2
    whole = [loss, *torch.autograd.grad(loss, [weight, scale])]
    found = json.loads((cells / "gradients.json").read_text())
    for expected, value in zip(whole, found, strict=True):
        assert torch.allclose(expected, torch.tensor(value, dtype=torch.float64), atol=1e-9)
