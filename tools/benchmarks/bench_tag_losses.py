"""The tag losses in chunks of classes against all logits at once: memory and time.

Forward and backward in fp32 on the CPU, for features [B, D] and a head [V, D]. (a) Memory: how far
the resident set's high-water mark rises, in a process of its own per variant, above the features,
the head and their gradients. (b) Time, all variants taking turns in one process, best of each.

    python -m tools.benchmarks.bench_tag_losses [--tables ab] [--tags 1000000] [--timed-tags 100000]
        [--chunks 1024 4096 8192 16384] [--kinds softmax] [--rounds 3] [--json FILE]

The dense softmax over a million tags takes 12 GB in all, the dense asymmetric loss about 30 GB.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from tools.common.fresh_process import high_water, in_fresh_process
from tools.common.tables import Table
from tools.common.timing import hardware, interleaved, speedup
from xray.losses.tags import LOSSES, TagLoss

WIDTH, OWN = 768, 8  # of the features, and tags per sample


def inputs_of(batch: int, tags: int) -> tuple[Tensor, ...]:
    """Features, weight and bias, which are trained, then tags and targets."""
    torch.manual_seed(0)
    features = torch.randn(batch, WIDTH, requires_grad=True)
    weight = torch.randn(tags, WIDTH).mul_(0.02).requires_grad_()
    bias = torch.zeros(tags, requires_grad=True)
    return (
        features,
        weight,
        bias,
        torch.randint(tags, (batch, OWN)),
        torch.full((batch, OWN), 0.125),
    )


def train(loss: TagLoss, inputs: tuple[Tensor, ...]) -> None:
    features, weight, bias, tags, targets = inputs
    features.grad = weight.grad = bias.grad = None
    loss(features, weight, bias, tags, targets)[0].mean().backward()


def measure(kind: str, chunk: int, batch: int, tags: int) -> int:
    """Bytes above the inputs and their gradients; in a fresh process only."""
    loss = LOSSES[kind](chunk=chunk)
    train(loss, inputs_of(batch, 64))  # starts threads and loads libraries
    inputs = inputs_of(batch, tags)
    before = high_water()
    train(loss, inputs)
    return high_water() - before - sum(x.grad.nbytes for x in inputs if x.grad is not None)


def memory(options: argparse.Namespace) -> Table:
    """(a)"""
    rows = []
    for kind in options.kinds:
        dense = 0
        for chunk in (0, *options.chunks):
            peak = in_fresh_process(measure, kind, chunk, options.batch, options.tags)
            dense = dense or peak
            ratio = f"1/{dense / peak:.0f}" if chunk else ""
            name = f"{chunk:,}" if chunk else "dense"
            rows.append([kind, name, f"{peak / 1e6:,.0f}", ratio, "< 1/10" if chunk else ""])
    heads = ["loss", "chunk", "peak, MB", "of dense", "target"]
    sizes = f"{options.tags:,} tags x {WIDTH}, batch {options.batch}"
    return Table(f"(a) Memory above features, head and gradients, {sizes}", heads, rows)


def duration(options: argparse.Namespace) -> Table:
    """(b)"""
    inputs, rows = inputs_of(options.batch, options.timed_tags), []
    for kind in options.kinds:
        chunks = (0, *options.chunks)
        runs = {str(chunk): partial(train, LOSSES[kind](chunk=chunk), inputs) for chunk in chunks}
        seconds = interleaved(runs, options.rounds)
        for name, times in seconds.items():
            ratio = 1 / speedup(seconds, name, "0")
            cells = ["dense", ""] if name == "0" else [f"{int(name):,}", f"{ratio:.2f}"]
            rows.append([kind, cells[0], f"{min(times):.2f}", cells[1]])
    heads = ["loss", "chunk", "forward and backward, s", "of dense"]
    sizes = f"{options.timed_tags:,} tags x {WIDTH}, batch {options.batch}"
    return Table(f"(b) Time, {sizes}, best of {options.rounds}", heads, rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tables", default="ab", help="any of ab")
    parser.add_argument("--tags", type=int, default=1_000_000, help="of (a)")
    parser.add_argument("--timed-tags", type=int, default=100_000, help="of (b)")
    parser.add_argument("--batch", type=int, default=512)
    parser.add_argument("--chunks", type=int, nargs="+", default=[1024, 4096, 8192, 16384])
    parser.add_argument("--kinds", nargs="+", choices=list(LOSSES), default=["softmax"])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path, help="write the tables there, too")
    options = parser.parse_args()
    machine = hardware("cpu")
    print(machine, flush=True)
    tables = []
    for name, table in (("a", memory), ("b", duration)):
        if name in options.tables:
            tables.append(table(options))
            print(tables[-1], flush=True)
    if options.json:
        content = {"hardware": machine, "tables": [dataclasses.asdict(table) for table in tables]}
        options.json.write_text(json.dumps(content, indent=2) + "\n")


if __name__ == "__main__":
    main()
