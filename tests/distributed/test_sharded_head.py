"""Hashtag runs whose tag head is divided over two processes (`hashtag.shard_classes`)."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from child_process import SUPPORT, torchrun, xray
from run_comparison import assert_same, assert_same_losses
from sharded_runs import CASES, SHARDED
from tiny import ALL_TOKENS, settings, train
from two_process import halfway

from xray.artifacts.artifact import open_artifact
from xray.errors import ConfigError
from xray.recipes.recipe import load_recipe
from xray.training.metrics import read_metrics
from xray.training.portable_state import read_weights


@pytest.fixture(scope="module")
def plain(demo: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of one process with the whole head."""
    out = tmp_path_factory.mktemp("plain") / "run"
    train("hashtag", demo, out, ALL_TOKENS)
    return out


@pytest.fixture(scope="module")
def runs(demo: Path, plain: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs of two processes; compares steps of their engine, too."""
    out = tmp_path_factory.mktemp("runs")
    halfway(plain, out / "joined")
    torchrun(str(SUPPORT / "sharded_runs.py"), str(demo), str(out))
    return out


def weights_of(run: Path) -> dict[str, torch.Tensor]:
    artifact = open_artifact(run / "artifact")
    parts = {part: artifact.load(part) for part in artifact.manifest["tensors"]}
    return {f"{part}.{name}": value for part, own in parts.items() for name, value in own.items()}


def without_keys(bias: torch.Tensor) -> torch.Tensor:
    query, _, value = bias.chunk(3)
    return torch.cat([query, value])


@pytest.mark.parametrize("case", CASES)
def test_a_sharded_head_equals_a_whole_one(runs: Path, case: str) -> None:
    """Losses, gradient norms and all weights, with averages, clipping, mixing and truncation."""
    one, two = runs / f"{case}-whole", runs / f"{case}-sharded"
    if case == "bf16":  # sums over the classes of a rank are rounded to bf16
        rows = [read_metrics(run / "metrics.jsonl") for run in (one, two)]
        for a, b in zip(*rows, strict=True):
            assert a["loss"] == pytest.approx(b["loss"], rel=1e-2)
    else:
        assert_same_losses(one, two, 6)
    wanted, found = weights_of(one), weights_of(two)
    assert wanted.keys() == found.keys()
    tolerance = 5e-2 if case == "bf16" else 1e-4
    for name, value in wanted.items():
        assert value.shape == found[name].shape
        if case == "lion" and name.endswith("qkv.bias"):
            # The true gradient of a key's bias is 0: Lion steps by the sign of its rounding.
            value, found[name] = without_keys(value), without_keys(found[name])
        error = (found[name] - value).norm() / (1e-3 + value.norm())
        assert error < tolerance, (name, error)


def test_checkpoints_hold_the_whole_head(runs: Path) -> None:
    (one, two) = (runs / f"softmax-{kind}" / "checkpoints" for kind in ("whole", "sharded"))
    for slot in (None, "exp_avg", "exp_avg_sq", "ema"):
        wanted, found = (read_weights(path / "step_00000006", slot) for path in (one, two))
        assert {n: v.shape for n, v in wanted.items()} == {n: v.shape for n, v in found.items()}
        for name in ("head.weight", "head.bias"):
            scale = wanted[name].abs().max()
            assert (wanted[name] - found[name]).abs().max() < 1e-3 * scale, (slot, name)


def test_a_resumed_run_is_bit_equal(runs: Path) -> None:
    assert_same(runs / "left", runs / "again", exact=True)


def test_two_processes_resume_a_run_of_one(runs: Path, plain: Path) -> None:
    assert_same_losses(plain, runs / "joined", 6)


@pytest.mark.parametrize("settings_of", [(), (SHARDED,)])
def test_one_process_resumes_a_run_of_two(
    demo: Path, runs: Path, plain: Path, tmp_path: Path, settings_of: tuple[str, ...]
) -> None:
    out = halfway(runs / "left", tmp_path / "run")
    train("hashtag", demo, out, ALL_TOKENS, *settings_of)
    assert_same_losses(plain, out, 6)


def test_a_run_may_go_on_with_zero_and_the_whole_head(
    demo: Path, runs: Path, plain: Path, tmp_path: Path
) -> None:
    out = halfway(runs / "left", tmp_path / "run")
    train("hashtag", demo, out, ALL_TOKENS, "zero.stage=3")
    assert_same_losses(plain, out, 6)


def test_one_process_has_the_whole_head(demo: Path, plain: Path, tmp_path: Path) -> None:
    train("hashtag", demo, tmp_path / "run", ALL_TOKENS, SHARDED)
    assert_same(plain, tmp_path / "run", exact=True)


def test_the_plan_counts_the_rows_of_one_rank() -> None:
    """100,001 rows over 4 ranks: rank 0 has 25,000 of them."""
    plans = []
    for override in ("hashtag.chunk=4096", SHARDED):
        done = xray(
            *("plan", "quickstart", "stages=[hashtag]", "hashtag.chunk=4096", override),
            "data.resolution=160",  # so that memory is largest at the same place of the step
            *("--tags", "100001", "--devices", "4", "--json"),
        )
        assert done.returncode == 0, done.stdout + done.stderr
        plans += json.loads(done.stdout)["stages"]
    whole, divided = plans
    assert whole["trained"] == divided["trained"]
    assert whole["checkpoint_bytes"] == divided["checkpoint_bytes"]
    width = load_recipe("quickstart", ["data.root=x"]).runs[1].model.kwargs["embed_dim"]
    elsewhere = 4 * 75_001 * (width + 1)
    for kind, copies in (("weights", 1), ("gradients", 1), ("optimizer", 2)):
        assert whole["memory"][kind] - divided["memory"][kind] == copies * elsewhere, kind


def test_the_planned_memory_is_close_to_that_of_a_real_step(tmp_path: Path) -> None:
    options = SHARDED, "hashtag.chunk=4096", "model.kwargs={embed_dim: 192, depth: 1, num_heads: 3}"
    torchrun(str(SUPPORT / "sharded_memory.py"), str(tmp_path / "memory.json"), *options)
    memory = json.loads((tmp_path / "memory.json").read_text())
    head = 50_000 * 193 * 4
    assert 4 * head > memory["measured"] > 2 * head  # half of weights, gradients and two moments
    assert abs(memory["planned"] / memory["measured"] - 1) < 0.1, memory


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["zero.stage=1"], r"hashtag\.shard_classes=true.*zero\.stage=1.*set zero\.stage=0"),
        (["hashtag.sampled=8"], r"hashtag\.shard_classes=true.*set hashtag\.sampled=0"),
        (
            ["zero.deepspeed.prescale_gradients=true"],
            r"hashtag\.shard_classes=true does not know zero\.deepspeed\.prescale_gradients",
        ),
    ],
)
def test_settings_that_do_not_work_together_are_refused(
    demo: Path, tmp_path: Path, overrides: list[str], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        settings("hashtag", demo, tmp_path, SHARDED, *overrides)
