"""CLIP training of xray against open_clip: image tower, text tower and whole step, equal weights.

xray runs the clip stage's module, including the normalisation of pixels, and its whole step runs
through DeepSpeed with ZeRO 0, as in training. The step of open_clip is that of its
`train_one_epoch`. Both use AdamW and clip the gradient norm at 1.

    python -m tools.benchmarks.bench_clip [--tables abcde] [--sizes b16] [--batch 8] [--rounds 5]
        [--device cuda] [--precision bf16] [--peak TFLOPS] [--out FILE.json]

(a) Both models have equal outputs. (b) Speed. (c) Keep rate .7 against the bound of its
multiply-adds. (d) Memory of InfoNCE over 32,768 samples, on a CPU. (e) A frozen LLM in every step
against sentence vectors stored before.

On CUDA the defaults are bf16, b16 and l14. If other work shares the cores, use one thread
(OMP_NUM_THREADS=1) and --processor-time, which does not count the time of other processes.
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
from xray.losses.contrastive import info_nce

PEAK = {"H100": 989, "H200": 989, "A100": 312}  # TFLOP/s in dense bf16
FORWARD, STEP = "forward, loss, backward", "whole step"
SAMPLES, WIDTH = 32_768, 512  # global batch and features of table (d)
RANK_ROWS = (512, 4096)  # rows per rank with 64 and with 8 ranks
MEASURED = 8192  # global batch at which ClipLoss over all rows is measured: all logits fit

Seconds = dict[str, dict[str, list[float]]]  # function -> implementation -> seconds per round


def same_model(pair: Pair) -> Table:
    """Make table (a): parameters, outputs and losses of both models."""
    count = {
        name: sum(p.numel() for p in model.parameters())
        for name, model in (("open_clip", pair.reference), ("xray", pair.model))
    }
    vision = pair.model.vision
    clips = vision.pos_temporal.numel() + vision.patch_embed.proj.weight[:, :, 0].numel()
    with torch.no_grad(), pair.autocast():
        out = pair.reference(pair.images, pair.ids)
        pairs = ((out["image_features"], pair.image()), (out["text_features"], pair.text()))
        image, text = (f"{float((a - b).abs().max()):.1e}" for a, b in pairs)
        losses = [float(pair.reference_loss()), float(pair.loss())]
    rows = [
        ["parameters", f"{count['open_clip']:,}", f"{count['xray']:,}"],
        ["parameters for clips only", "0", f"{clips:,}"],
        ["largest difference of image features", "", image],
        ["largest difference of text features", "", text],
        ["loss", *(f"{loss:.6f}" for loss in losses)],
    ]
    return Table(f"(a) {pair.size} with equal weights", ["measure", "open_clip", "xray"], rows)


def speeds(pair: Pair, options: argparse.Namespace) -> Iterator[Table]:
    """Time all functions and make tables (b) and (c)."""
    clock = time.process_time if options.processor_time else time.perf_counter
    timed = partial(interleaved, rounds=options.rounds, clock=clock)
    needed = {"b": ["open_clip", "xray"], "c": ["xray", "keep"]}
    wanted = {key for letter, keys in needed.items() if letter in options.tables for key in keys}
    forwards: dict[str, dict[str, Callable[[], Tensor]]] = {
        "image tower": {"open_clip": pair.reference_image, "xray": pair.image},
        "text tower": {"open_clip": pair.reference_text, "xray": pair.text},
        FORWARD: {"open_clip": pair.reference_loss, "xray": pair.loss},
    }
    forwards[FORWARD]["keep"] = partial(pair.loss, END)
    if "b" not in options.tables:
        forwards = {FORWARD: forwards[FORWARD]}
    all_seconds = {}
    for name, runs in forwards.items():
        all_seconds[name] = timed({key: pair.backward(runs[key]) for key in runs if key in wanted})
    steps = {"open_clip": pair.reference_step()} | pair.steps()
    all_seconds[STEP] = timed({key: run for key, run in steps.items() if key in wanted})
    if "b" in options.tables:
        yield against_open_clip(pair, options, all_seconds)
    if "c" in options.tables:
        yield against_bound(pair, all_seconds)


def against_open_clip(pair: Pair, options: argparse.Namespace, all_seconds: Seconds) -> Table:
    """Make table (b): speed of xray and open_clip."""
    targets = {FORWARD: ">= 1.0x", STEP: ">= 0.92x"}
    macs, peak, rows = pair.macs(1.0), options.peak, []
    for name, seconds in all_seconds.items():
        best = [min(seconds[key]) for key in ("open_clip", "xray")]
        count = macs.get(name.split()[0], sum(macs.values()))
        rate = 6 * count * pair.batch / best[1] / 1e12
        cells = [f"{1e3 * second:,.0f}" for second in best]
        cells += [f"{speedup(seconds, 'xray', 'open_clip'):.2f}x", targets.get(name, "")]
        share = [f"{rate / peak:.1%}"] if peak else []
        rows.append([name, *cells, f"{rate:.2f}", *share])
    heads = ["forward and backward of", "open_clip, ms", "xray, ms", "speed, xray / open_clip"]
    heads += ["target", "xray, TFLOP/s", *([f"share of {peak:g} TFLOP/s"] if peak else [])]
    precision = "bf16 autocast" if pair.bf16 else "fp32"
    title = f"(b) {pair.size} at 224 px, batch {pair.batch}, {precision}, best of {options.rounds}"
    title += ", processor time" * options.processor_time
    return Table(title, heads, rows)


def against_bound(pair: Pair, all_seconds: Seconds) -> Table:
    """Make table (c): speed-up by keep rate KEEP against the ratio of multiply-adds."""
    full, reduced = pair.macs(1.0), pair.macs(KEEP)
    bound, rows = sum(full.values()) / sum(reduced.values()), []
    for name in (FORWARD, STEP):
        gain = speedup(all_seconds[name], "keep", "xray")
        rows.append([name, f"{gain:.2f}x", f"{bound:.2f}x", f"{gain / bound:.0%}", ">= 90 %"])
    gmacs = [f"{1e-9 * 3 * pair.batch * sum(m.values()):,.0f}" for m in (full, reduced)]
    share = full["text"] / sum(full.values())
    heads = ["part", "speed-up", "bound", "share of bound", "target"]
    title = f"(c) {pair.size} at keep rate {KEEP} against keep rate 1, batch {pair.batch}: "
    title += f"{gmacs[1]} of {gmacs[0]} GMACs, of which the text tower has {share:.0%}"
    return Table(title, heads, rows)


# memory of the loss -------------------------------------------------------------------------------


def contrast(form: str, rows: int, samples: int) -> Callable[[], None]:
    """Return forward and backward of a rank's loss, as if all features were already gathered.

    Args:
        form: "xray", "local" (ClipLoss with local_loss) or "full" (ClipLoss over all rows).
        rows: samples of this rank.
        samples: samples of all ranks.
    """
    torch.manual_seed(0)
    images, texts = (F.normalize(torch.randn(samples, WIDTH), dim=-1) for _ in range(2))
    images.requires_grad_(), texts.requires_grad_()
    scale, local_rows = torch.tensor(14.3, requires_grad=True), (images[:rows], texts[:rows])

    def xray_loss() -> Tensor:
        def gathered(local: Tensor) -> Tensor:  # stands for the all-gather over ranks
            return images if local is local_rows[0] else texts

        with (
            patch("xray.losses.contrastive.gather_rows", gathered),
            patch("xray.losses.contrastive.dist.world_size", lambda: samples // rows),
        ):
            return info_nce(*local_rows, scale)

    def open_clip_loss() -> Tensor:
        loss = open_clip.ClipLoss(local_loss=form == "local", world_size=samples // rows)
        with patch("open_clip.loss.gather_features", lambda *_, **__: (images, texts)):
            return loss(*local_rows, scale)

    def run() -> None:
        (xray_loss if form == "xray" else open_clip_loss)().backward()

    return run


def measure(form: str, rows: int, samples: int) -> int:
    """Return the loss's peak memory above the features in bytes; call it in a fresh process."""
    contrast(form, 64, 128)()  # starts threads and loads libraries before the measurement
    run = contrast(form, rows, samples)
    Path("/proc/self/clear_refs").write_text("5", "utf-8")  # reset the peak (VmHWM)
    before = high_water()
    run()
    return high_water() - before


def loss_memory() -> Table:
    """Make table (d): peak memory of ClipLoss and of xray's loss."""
    matrix = 4 * SAMPLES**2
    matrices = in_fresh_process(measure, "full", MEASURED, MEASURED) / (4 * MEASURED**2)
    full, rows = matrices * matrix, []

    def add(loss: str, local: int, peak: float) -> None:
        cells = [f"{local:,}", f"{peak / 1e6:,.0f}", f"{peak / matrix:.2f}", f"{peak / full:.3f}"]
        rows.append([loss, *cells])

    computed = f"computed: {matrices:.1f} matrices, as measured at N = {MEASURED:,}"
    add(f"ClipLoss ({computed})", SAMPLES, full)
    for form, name in (("local", "ClipLoss(local_loss=True)"), ("xray", "xray")):
        for local in RANK_ROWS:
            add(name, local, in_fresh_process(measure, form, local, SAMPLES))
    add("xray", SAMPLES, in_fresh_process(measure, "xray", SAMPLES, SAMPLES))
    heads = [
        "loss",
        "rows of this rank",
        "peak, MB",
        f"share of one matrix ({matrix / 1e6:,.0f} MB)",
    ]
    sizes = f"N = {SAMPLES:,}, {WIDTH} features in fp32, forward and backward"
    title = f"(d) Memory of the contrastive loss, above the features of all samples; {sizes}"
    return Table(title, [*heads, "share of ClipLoss (target <= 0.125)"], rows)


def stored_text(options: argparse.Namespace) -> Table:
    """Make table (e): steps with the LLM and with stored sentence vectors."""
    clock = time.process_time if options.processor_time else time.perf_counter
    batch, rows = options.batch or BATCH[options.device]["b16"], []
    for length in (32, 77):
        seconds = interleaved(frozen_steps(options, length), rounds=options.rounds, clock=clock)
        cells = [f"{1e3 * min(seconds[key]):,.0f}" for key in ("live", "stored")]
        rows.append([str(length), *cells, f"{speedup(seconds, 'stored', 'live'):.2f}x"])
    title = f"(e) b16 at 224 px with a frozen LLM of Qwen3-0.6B's shape, batch {batch}, best of "
    heads = ["tokens per caption", "LLM in every step, ms", "stored vectors, ms"]
    return Table(f"{title}{options.rounds}", [*heads, "steps/s, stored / live"], rows)


def tables(options: argparse.Namespace) -> Iterator[Table]:
    """Make the chosen tables, one after the other."""
    for size in options.sizes if set("abc") & set(options.tables) else []:
        pair = Pair(size, options)
        if "a" in options.tables:
            yield same_model(pair)
        if set("bc") & set(options.tables):
            yield from speeds(pair, options)
        del pair  # frees its memory before the next size
    if "d" in options.tables:
        yield loss_memory()
    if "e" in options.tables:
        yield stored_text(options)


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tables", default="abcde", help="any of abcde")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--sizes", nargs="+", choices=list(SIZES))
    parser.add_argument("--batch", type=int, help="batch size; default: depends on the device")
    parser.add_argument("--precision", choices=("fp32", "bf16"))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--processor-time", action="store_true", help="measure CPU time, on a shared machine"
    )
    parser.add_argument("--peak", type=float, help="peak TFLOP/s of the device, for MFU")
    parser.add_argument("--out", type=Path, help="also write the tables to this JSON file")
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
