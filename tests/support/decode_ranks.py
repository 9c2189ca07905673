"""Runs of two processes with data.decode, where both can decode on their device, or one can.

usage: torchrun --nproc_per_node 2 decode_ranks.py DEMO OUT
The device is the CPU, which decodes as a GPU does.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import pytest
import torch
from tiny import ALL_TOKENS, train

from xray import dist
from xray.errors import ConfigError
from xray.training import run

SETTINGS = (ALL_TOKENS, "data.decode=gpu", "data.workers=1", "train.micro_batch=2")


def main() -> None:
    """Train a run in which both decode, and one with `auto` and one with `gpu` in which one can.

    The one with `auto` then continues from its mirror, which rank 0 alone reads; now both can.
    """
    demo, out = Path(sys.argv[1]), Path(sys.argv[2])
    auto = ("data.decode=auto", "train.samples=24", f"train.mirror=file://{out}/bucket")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, "cannot_decode", lambda device: "")
        train("mae", demo, out / "two", *SETTINGS)

    def reason(device: torch.device) -> str:
        return "" if dist.is_main() else "it has no decoder"

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, "cannot_decode", reason)
        train("mae", demo, out / "auto", *auto)
        with pytest.raises(ConfigError) as raised:
            train("mae", demo, out / "refused", *SETTINGS)
    (out / f"refused.{dist.rank()}").write_text(str(raised.value))

    def lose() -> None:
        shutil.rmtree(out / "auto")
        shutil.rmtree(out / "bucket" / "mae" / "artifact")

    dist.on_main(lose)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, "cannot_decode", lambda device: "")
        train("mae", demo, out / "auto", *auto)
    dist.leave()


if __name__ == "__main__":
    main()
