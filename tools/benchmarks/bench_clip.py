"""CLIP's training step against open_clip's: its image and text tower, with the same weights.

Ours is the clip stage's own module, in which pixels are normalised. A whole step goes through
DeepSpeed as the trainer's does, with ZeRO 0; open_clip's is that of its `train_one_epoch`. Both
have AdamW and clip the gradient's norm at 1.

    python -m tools.benchmarks.bench_clip [--tables abcde] [--sizes b16] [--batch 8] [--rounds 5]
        [--device cuda] [--precision bf16] [--peak TFLOPS] [--out FILE.json]

(a) the two models compared, (b) speed, (c) keep rate .7 against the bound of multiply-adds,
(d) memory of InfoNCE over 32,768 samples, on a CPU, (e) a frozen LLM in every step against its
sentence vectors stored before. On CUDA the default is bf16, b16 and l14.
Where other work shares the cores: one thread (OMP_NUM_THREADS=1), and --processor-time instead of
the wall's, from which the time that others have is missing.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from unittest.mock import patch

import open_clip
import torch
import torch.nn.functional as F
from torch import Tensor

from tools.common.clip_pair import BATCH, END, KEEP, SIZES, Pair, frozen_steps
from tools.common.fresh_process import high_water, in_fresh_process
from tools.common.tables import Table, print_tables
from tools.common.timing import hardware, interleaved, speedup
from xray.dist import choose_device
from xray.losses import info_nce

PEAK = {"H100": 989, "H200": 989, "A100": 312}  # TFLOP/s in dense bf16
FORWARD, STEP = "forward, loss, backward", "whole step"
ALL, WIDTH = 32_768, 512  # samples of a contrast, and their features
OWN = (512, 4096)  # rows of a rank, of 64 and of 8
MEASURED = 8192  # samples for which all logits are held

Found = dict[str, dict[str, list[float]]]  # what was timed: seconds of each alternative


def same_model(pair: Pair) -> Table:
    """(a)"""
    count = {
        name: sum(p.numel() for p in model.parameters())
        for name, model in (("theirs", pair.theirs), ("ours", pair.ours))
    }
    vision = pair.ours.vision
    clips = vision.pos_temporal.numel() + vision.patch_embed.proj.weight[:, :, 0].numel()
    with torch.no_grad(), pair.autocast():
        out = pair.theirs(pair.images, pair.ids)
        pairs = ((out["image_features"], pair.image()), (out["text_features"], pair.text()))
        image, text = (f"{float((a - b).abs().max()):.1e}" for a, b in pairs)
        losses = [float(pair.loss_of_theirs()), float(pair.our_loss())]
    rows = [
        ["parameters", f"{count['theirs']:,}", f"{count['ours']:,}"],
        ["of these for clips only", "0", f"{clips:,}"],
        ["greatest difference of image features", "", image],
        ["greatest difference of text features", "", text],
        ["loss", *(f"{loss:.6f}" for loss in losses)],
    ]
    return Table(f"(a) {pair.size}: the same weights", ["measure", "open_clip", "ours"], rows)


def speeds(pair: Pair, options: argparse.Namespace) -> Iterator[Table]:
    """(b) and (c)"""
    clock = time.process_time if options.processor_time else time.perf_counter
    timed = partial(interleaved, rounds=options.rounds, clock=clock)
    needed = {"b": ["theirs", "ours"], "c": ["ours", "keep"]}
    wanted = {key for letter, keys in needed.items() if letter in options.tables for key in keys}
    forwards: dict[str, dict[str, Callable[[], Tensor]]] = {
        "image tower": {"theirs": pair.image_of_theirs, "ours": pair.image},
        "text tower": {"theirs": pair.text_of_theirs, "ours": pair.text},
        FORWARD: {"theirs": pair.loss_of_theirs, "ours": pair.our_loss},
    }
    forwards[FORWARD]["keep"] = partial(pair.our_loss, END)
    if "b" not in options.tables:
        forwards = {FORWARD: forwards[FORWARD]}
    found = {}
    for name, ways in forwards.items():
        found[name] = timed({key: pair.backward(ways[key]) for key in ways if key in wanted})
    steps = {"theirs": pair.their_step()} | pair.our_steps()
    found[STEP] = timed({key: run for key, run in steps.items() if key in wanted})
    if "b" in options.tables:
        yield against_open_clip(pair, options, found)
    if "c" in options.tables:
        yield against_bound(pair, found)


def against_open_clip(pair: Pair, options: argparse.Namespace, found: Found) -> Table:
    """(b)"""
    goals = {FORWARD: ">= 1.0x", STEP: ">= 0.92x"}
    macs, peak, rows = pair.macs(1.0), options.peak, []
    for name, seconds in found.items():
        best = [min(seconds[key]) for key in ("theirs", "ours")]
        count = macs.get(name.split()[0], sum(macs.values()))
        rate = 6 * count * pair.batch / best[1] / 1e12
        cells = [f"{1e3 * second:,.0f}" for second in best]
        cells += [f"{speedup(seconds, 'ours', 'theirs'):.2f}x", goals.get(name, "")]
        share = [f"{rate / peak:.1%}"] if peak else []
        rows.append([name, *cells, f"{rate:.2f}", *share])
    heads = ["forward and backward of", "open_clip, ms", "ours, ms", "ours / open_clip", "target"]
    heads += ["ours, TFLOP/s", *([f"of {peak:g}"] if peak else [])]
    precision = "bf16 autocast" if pair.bf16 else "fp32"
    title = f"(b) {pair.size} at 224 px, batch {pair.batch}, {precision}, best of {options.rounds}"
    title += ", processor time" * options.processor_time
    return Table(title, heads, rows)


def against_bound(pair: Pair, found: Found) -> Table:
    """(c)"""
    full, less = pair.macs(1.0), pair.macs(KEEP)
    bound, rows = sum(full.values()) / sum(less.values()), []
    for name in (FORWARD, STEP):
        gain = speedup(found[name], "keep", "ours")
        rows.append([name, f"{gain:.2f}x", f"{bound:.2f}x", f"{gain / bound:.0%}", ">= 90 %"])
    gmacs = [f"{1e-9 * 3 * pair.batch * sum(m.values()):,.0f}" for m in (full, less)]
    share = full["text"] / sum(full.values())
    heads = ["", "speed-up", "bound", "of bound", "target"]
    title = f"(c) {pair.size} at keep rate {KEEP} against keep rate 1, batch {pair.batch}: "
    title += f"{gmacs[1]} of {gmacs[0]} GMACs, of which the text tower has {share:.0%}"
    return Table(title, heads, rows)


# memory of the loss -------------------------------------------------------------------------------


def contrast(form: str, rows: int, samples: int) -> Callable[[], Tensor]:
    """Forward and backward of a rank's loss: own rows of all samples, whose features are there."""
    torch.manual_seed(0)
    images, texts = (F.normalize(torch.randn(samples, WIDTH), dim=-1) for _ in range(2))
    images.requires_grad_(), texts.requires_grad_()
    scale, own = torch.tensor(14.3, requires_grad=True), (images[:rows], texts[:rows])

    def ours() -> Tensor:
        def gathered(mine: Tensor) -> Tensor:  # as if the other ranks had sent theirs
            return images if mine is own[0] else texts

        with (
            patch("xray.losses.contrastive.gather_rows", gathered),
            patch("xray.losses.contrastive.dist.world_size", lambda: samples // rows),
        ):
            return info_nce(*own, scale)

    def theirs() -> Tensor:
        local = form == "local"
        loss = open_clip.ClipLoss(local_loss=local, world_size=samples // rows)
        with patch("open_clip.loss.gather_features", lambda *_, **__: (images, texts)):
            return loss(*own, scale)

    def run() -> None:
        (ours if form == "ours" else theirs)().backward()

    return run


def measure(form: str, rows: int, samples: int) -> int:
    """Bytes above the features of all samples; in a fresh process only."""
    contrast(form, 64, 128)()  # starts threads and loads libraries
    run = contrast(form, rows, samples)
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts again
    before = high_water()
    run()
    return high_water() - before


def loss_memory() -> Table:
    """(d)"""
    matrix = 4 * ALL**2
    held = in_fresh_process(measure, "full", MEASURED, MEASURED) / (4 * MEASURED**2)
    full, rows = held * matrix, []

    def add(form: str, own: int, peak: float) -> None:
        cells = [f"{own:,}", f"{peak / 1e6:,.0f}", f"{peak / matrix:.2f}", f"{peak / full:.3f}"]
        rows.append([form, *cells])

    add(f"ClipLoss: {held:.1f} matrices, as measured at N = {MEASURED:,}; computed", ALL, full)
    for form, name in (("local", "ClipLoss(local_loss=True)"), ("ours", "ours")):
        for own in OWN:
            add(name, own, in_fresh_process(measure, form, own, ALL))
    add("ours", ALL, in_fresh_process(measure, "ours", ALL, ALL))
    heads = ["loss", "own rows", "peak, MB", f"of one matrix ({matrix / 1e6:,.0f} MB)"]
    sizes = f"N = {ALL:,}, {WIDTH} features in fp32, forward and backward"
    title = f"(d) Memory of the contrast above the features of all, {sizes}"
    return Table(title, [*heads, "of ClipLoss (<= 0.125)"], rows)


def stored_text(options: argparse.Namespace) -> Table:
    """(e)"""
    clock = time.process_time if options.processor_time else time.perf_counter
    batch, rows = options.batch or BATCH[options.device]["b16"], []
    for length in (32, 77):
        seconds = interleaved(frozen_steps(options, length), rounds=options.rounds, clock=clock)
        cells = [f"{1e3 * min(seconds[key]):,.0f}" for key in ("live", "stored")]
        rows.append([str(length), *cells, f"{speedup(seconds, 'stored', 'live'):.2f}x"])
    title = f"(e) b16 at 224 px beside a frozen LLM of Qwen3-0.6B's shape, batch {batch}, best of "
    heads = ["tokens of a caption", "in every step, ms", "stored, ms", "steps/s, stored / live"]
    return Table(f"{title}{options.rounds}", heads, rows)


def tables(options: argparse.Namespace) -> Iterator[Table]:
    for size in options.sizes if set("abc") & set(options.tables) else []:
        pair = Pair(size, options)
        if "a" in options.tables:
            yield same_model(pair)
        if set("bc") & set(options.tables):
            yield from speeds(pair, options)
        del pair  # its memory is for the next
    if "d" in options.tables:
        yield loss_memory()
    if "e" in options.tables:
        yield stored_text(options)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tables", default="abcde", help="any of abcde")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--sizes", nargs="+", choices=list(SIZES))
    parser.add_argument("--batch", type=int, help="instead of the device's own")
    parser.add_argument("--precision", choices=("fp32", "bf16"))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--processor-time", action="store_true", help="see above")
    parser.add_argument("--peak", type=float, help="TFLOP/s of the device, for MFU")
    parser.add_argument("--out", type=Path, help="write the tables there, too")
    options = parser.parse_args()
    cuda = choose_device(options.device).type == "cuda"
    options.sizes = options.sizes or (list(SIZES) if cuda else ["b16"])
    options.precision = options.precision or ("bf16" if cuda else "fp32")
    machine = hardware(options.device)
    if not options.peak:
        options.peak = next((float(PEAK[name]) for name in PEAK if name in machine), None)
    print(machine, flush=True)
    print_tables(tables(options), machine, options.out)


if __name__ == "__main__":
    main()
