"""Memory and time of the tag losses, in chunks of classes and with all logits at once.

Forward and backward run in fp32 on the CPU, for features [B, D] and a head [V, D]. (a) Memory: the
peak of resident memory above features, head and their gradients, with a fresh process per variant.
(b) Time: all variants take turns in one process, and the best round of each counts.

    python -m tools.benchmarks.bench_tag_losses [--tables ab] [--tags 1000000] [--timed-tags 100000]
        [--chunks 1024 4096 8192 16384] [--kinds softmax] [--rounds 3] [--json FILE]

The dense softmax over a million tags needs 12 GB of memory, the dense asymmetric loss about 30 GB.
"""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from tools.common.fresh_process import high_water, in_fresh_process
from tools.common.tables import Table, print_tables
from tools.common.timing import hardware, interleaved, speedup
from xray.losses.named import TAG_LOSSES, tag_loss
from xray.losses.tags import TagLoss

WIDTH, SAMPLE_TAGS = 768, 8  # width of the features; tags per sample


def inputs_of(batch: int, tags: int) -> tuple[Tensor, ...]:
    """Return features, weight and bias, which are trained, then tag numbers and targets."""
    torch.manual_seed(0)
    features = torch.randn(batch, WIDTH, requires_grad=True)
    weight = torch.randn(tags, WIDTH).mul_(0.02).requires_grad_()
    bias = torch.zeros(tags, requires_grad=True)
    return (
        features,
        weight,
        bias,
        torch.randint(tags, (batch, SAMPLE_TAGS)),
        torch.full((batch, SAMPLE_TAGS), 0.125),
    )


def train(loss: TagLoss, inputs: tuple[Tensor, ...]) -> None:
    """Run forward and backward of a loss."""
    features, weight, bias, tags, targets = inputs
    features.grad = weight.grad = bias.grad = None
    loss(features, weight, bias, tags, targets)[0].mean().backward()


def measure(kind: str, chunk: int, batch: int, tags: int) -> int:
    """Return the peak memory above inputs and gradients in bytes; call it in a fresh process."""
    loss = tag_loss(kind)(chunk=chunk)
    train(loss, inputs_of(batch, 64))  # starts threads and loads libraries before the measurement
    inputs = inputs_of(batch, tags)
    before = high_water()
    train(loss, inputs)
    return high_water() - before - sum(x.grad.nbytes for x in inputs if x.grad is not None)


def memory(options: argparse.Namespace) -> Table:
    """Make table (a)."""
    rows = []
    for kind in options.kinds:
        dense = 0
        for chunk in (0, *options.chunks):
            peak = in_fresh_process(measure, kind, chunk, options.batch, options.tags)
            dense = dense or peak
            ratio = f"1/{dense / peak:.0f}" if chunk else ""
            name = f"{chunk:,}" if chunk else "dense"
            rows.append([kind, name, f"{peak / 1e6:,.0f}", ratio, "< 1/10" if chunk else ""])
    heads = ["loss", "chunk", "peak, MB", "share of dense", "target"]
    sizes = f"{options.tags:,} tags x {WIDTH}, batch {options.batch}"
    return Table(f"(a) Memory above features, head and gradients, {sizes}", heads, rows)


def duration(options: argparse.Namespace) -> Table:
    """Make table (b)."""
    inputs, rows = inputs_of(options.batch, options.timed_tags), []
    for kind in options.kinds:
        chunks = (0, *options.chunks)
        runs = {str(chunk): partial(train, tag_loss(kind)(chunk=chunk), inputs) for chunk in chunks}
        seconds = interleaved(runs, options.rounds)
        for name, times in seconds.items():
            ratio = 1 / speedup(seconds, name, "0")
            cells = ["dense", ""] if name == "0" else [f"{int(name):,}", f"{ratio:.2f}"]
            rows.append([kind, cells[0], f"{min(times):.2f}", cells[1]])
    heads = ["loss", "chunk", "forward and backward, s", "time / dense"]
    sizes = f"{options.timed_tags:,} tags x {WIDTH}, batch {options.batch}"
    return Table(f"(b) Time, {sizes}, best of {options.rounds}", heads, rows)


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tables", default="ab", help="any of ab")
    parser.add_argument("--tags", type=int, default=1_000_000, help="tags of table a")
    parser.add_argument("--timed-tags", type=int, default=100_000, help="tags of table b")
    parser.add_argument("--batch", type=int, default=512)
    parser.add_argument("--chunks", type=int, nargs="+", default=[1024, 4096, 8192, 16384])
    parser.add_argument("--kinds", nargs="+", choices=list(TAG_LOSSES), default=["softmax"])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path, help="also write the tables to this JSON file")
    options = parser.parse_args()
    machine = hardware("cpu")
    print(machine, flush=True)
    functions = {"a": memory, "b": duration}
    tables = (functions[name](options) for name in "ab" if name in options.tables)
    print_tables(tables, machine, options.json)


if __name__ == "__main__":
    main()
