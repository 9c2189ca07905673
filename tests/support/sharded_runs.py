"""Hashtag runs and an engine of two processes whose tag head is divided over them.

usage: torchrun --nproc_per_node 2 sharded_runs.py DEMO OUT
OUT must contain the run of one process that was stopped halfway, `joined`.
"""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import Any

import torch
from tiny import ALL_TOKENS, settings, train
from torch import Tensor
from two_process import halfway

from stages.hashtag import HashtagModule
from xray import dist
from xray.training.engine import Engine

SHARDED = "hashtag.shard_classes=true"
# Settings that are compared with and without shards. Plain Adam turns rounding of small gradients
# into steps of the lr, so its eps is large.
CASES: dict[str, list[str]] = {
    "softmax": [
        *("hashtag.smoothing=0.1", "hashtag.mixup=0.4", "hashtag.chunk=3", "train.micro_batch=2"),
        *("train.ema=0.9", "train.export=ema", "optim.clip_grad=0.05", "train.spikes=skip"),
        *("optim.eps=0.001", "optim.vision.layer_decay=0.8", "hashtag.truncate=0.3"),
    ],
    "bce": ["hashtag.loss=bce", "optim.eps=0.001", "optim.clip_grad=0.5", "zero.overlap=true"],
    "lion": ["hashtag.loss=asymmetric", "optim.name=lion", "optim.base_lr=0.002"],
    "bf16": ["train.precision=bf16", "hashtag.chunk=3", "optim.eps=0.001"],
}
TAGS = 7


def run_settings(case: str) -> list[str]:
    """Return the overrides of a case, without shards."""
    return [ALL_TOKENS, *CASES[case]]


def steps(demo: Path, out: Path, *overrides: str) -> tuple[dict[str, Tensor], list[float]]:
    """Return weights and gradient norms of steps, of which some change nothing.

    The loss of the second step is not finite on one rank; in the third, the weights of one sample
    make a gradient of the shards infinite; the fourth is left out as a spike is.
    """
    config = settings("hashtag", demo, out, "optim.eps=0.001", *overrides)
    torch.manual_seed(0)
    engine = Engine(HashtagModule(config, range(1, TAGS + 1)), config)
    norms: list[float] = []
    for step in range(5):
        torch.manual_seed(10 * step + dist.rank())
        batch: dict[str, Any] = {
            "pixels": torch.randint(256, (2, 1, 3, 32, 32), dtype=torch.uint8),
            "tags": torch.randint(TAGS, (2, 2)),
            "weights": torch.ones(2, 2),
        }
        before = engine.state_dict()
        engine.set_lr(0.01, 1.0)
        engine.begin(0, 1)
        loss = engine(batch, 1.0).loss
        if step == 1 and dist.rank() == 1:
            loss = loss * math.nan
        engine.backward(loss)
        own = engine.module.head.weight  # type: ignore[union-attr,operator]
        if step == 2 and dist.rank() == 1:
            own.grad[-1, 0] = math.inf
        if step == 2 and not overrides:  # the whole head has this gradient on every rank
            own.grad[-1, 0] = math.inf
        if step == 3:
            engine.skip()
        else:
            engine.step()
            norms.append(engine.grad_norm)
        after = engine.state_dict()
        same = all(torch.equal(before[name], value) for name, value in after.items())
        assert same == (step in (1, 2, 3)), step
    assert engine.steps == 2
    engine.destroy()
    return after, norms


def check_steps(demo: Path, out: Path) -> None:
    """Compare steps of an engine with and without shards."""
    plain, norms = steps(demo, out)
    sharded, sharded_norms = steps(demo, out, SHARDED)
    assert plain.keys() == sharded.keys()
    for name, value in plain.items():
        assert torch.allclose(sharded[name], value, rtol=1e-4, atol=1e-6), name
    for a, b in zip(norms, sharded_norms, strict=True):
        assert math.isfinite(a) == math.isfinite(b), (norms, sharded_norms)
        assert not math.isfinite(a) or math.isclose(a, b, rel_tol=1e-4), (norms, sharded_norms)
    assert [math.isfinite(norm) for norm in norms] == [True, False, False, True]


def main() -> None:
    demo, out = Path(sys.argv[1]), Path(sys.argv[2])
    for case in CASES:
        train("hashtag", demo, out / f"{case}-whole", *run_settings(case))
        train("hashtag", demo, out / f"{case}-sharded", *run_settings(case), SHARDED)
    train("hashtag", demo, out / "joined", ALL_TOKENS, SHARDED)
    train("hashtag", demo, out / "left", ALL_TOKENS, SHARDED)
    dist.on_main(lambda: halfway(out / "left", out / "again"))
    train("hashtag", demo, out / "again", ALL_TOKENS, SHARDED)
    check_steps(demo, out / "steps")
    dist.leave()


if __name__ == "__main__":
    main()
