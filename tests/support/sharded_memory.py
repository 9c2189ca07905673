"""Measured and planned memory of a step whose tag head is divided over two processes.

usage: torchrun --nproc_per_node 2 sharded_memory.py FILE OVERRIDE...
Rank 0 writes the result of bench_memory to FILE.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch

from tools.benchmarks.bench_memory import compare
from xray import dist
from xray.training.deepspeed_setup import init_distributed


def main() -> None:
    init_distributed(torch.device("cpu"))
    result = compare("hashtag", tuple(sys.argv[2:]))
    dist.on_main(lambda: Path(sys.argv[1]).write_text(json.dumps(result)))
    dist.leave()


if __name__ == "__main__":
    main()
