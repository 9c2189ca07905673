"""Speed and memory of the backbone against timm, across keep rates, against explicit attention.

The alternatives of a table take turns in one run, and a ratio compares the best round of each. The
bound of a keep rate is the ratio of multiply-adds. On CUDA, everything runs in bf16 autocast, with
and without torch.compile. Table (e) compares TFLOP/s with those of a large matrix product.

    python -m tools.benchmarks.bench_backbone [--device cuda] [--rounds 5] [--sizes s16 b16] \
        [--tables a b]
"""

from __future__ import annotations

import argparse
import ctypes
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from unittest.mock import patch

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stages.mae import MaeModule
from stages.mae_config import MaeConfig
from tools.common.fresh_process import in_fresh_process
from tools.common.tables import Table
from tools.common.timing import hardware, interleaved, speedup
from xray.config.loading import load_config
from xray.losses.contrastive import info_nce
from xray.models import ModelConfig, VisionBackbone
from xray.models.flops import decoder_macs, vision_macs
from xray.models.heads import Projection

SIZES = {"s16": "vit_small_patch16_224", "b16": "vit_base_patch16_224"}
LARGE = "vit_large_patch16_224"
CLIP_FRAMES = 16
JOINT = 512  # width of CLIP's joint space
BATCH = {"cpu": {1: {"s16": 8, "b16": 4}, 16: {"s16": 1, "b16": 1}}}
BATCH["cuda"] = {1: {"s16": 256, "b16": 128}, 16: {"s16": 32, "b16": 16}}
PASSES = ("forward", "forward+backward")


class Bench:
    """Factory of models, inputs and timed calls on one device."""

    def __init__(self, device: str, rounds: int, compiled: bool) -> None:
        self.device, self.rounds, self.compiled = device, rounds, compiled

    def backbone(self, size: str) -> VisionBackbone:
        """Build the backbone of a size, or of a timm name, in evaluation mode."""
        torch.manual_seed(0)
        config = ModelConfig(name=SIZES.get(size, size))
        return VisionBackbone(config, 224, CLIP_FRAMES).to(self.device).eval()

    def pixels(self, size: str, frames: int) -> Tensor:
        """Return random pixels, [B, T, 3, 224, 224]."""
        batch = BATCH[self.device][frames][size]
        return torch.randn(batch, frames, 3, 224, 224, device=self.device)

    def call(self, module: nn.Module, pass_: str, *inputs: object) -> Callable[[], None]:
        """Return a function that runs module(*inputs), forward or forward and backward."""
        compiled = module
        if self.compiled:  # one graph per call and keep rate; raise instead of running eagerly
            torch._dynamo.config.fail_on_recompile_limit_hit = True
            compiled = torch.compile(module, dynamic=False, fullgraph=True)

        def forward() -> Tensor:
            with torch.autocast("cuda", torch.bfloat16, enabled=self.device == "cuda"):
                out = compiled(*inputs)
            return out if isinstance(out, Tensor) else out[0]

        def run() -> None:
            if pass_ == "forward":
                with torch.no_grad():
                    forward()
            else:
                forward().float().square().mean().backward()
                module.zero_grad(set_to_none=True)

        return run


def explicit_attention(q: Tensor, k: Tensor, v: Tensor, **_: object) -> Tensor:
    """Compute attention with its whole matrix in memory, as EViT's published code does."""
    return (q * q.shape[-1] ** -0.5 @ k.transpose(-2, -1)).softmax(dim=-1) @ v


def with_explicit_attention(run: Callable[[], None]) -> Callable[[], None]:
    """Return the same call with explicit attention in all blocks."""

    def patched() -> None:
        with patch.object(F, "scaled_dot_product_attention", explicit_attention):
            run()

    return patched


def against_timm(bench: Bench, sizes: list[str]) -> Table:
    """Make table (a): keep rate 1 against timm's model on images."""
    rows = []
    for size in sizes:
        model = bench.backbone(size)
        reference = timm.create_model(SIZES[size], num_classes=0).to(bench.device).eval()
        pixels = bench.pixels(size, 1)
        for pass_ in PASSES:
            runs = {
                "timm": bench.call(reference, pass_, pixels[:, 0]),
                "xray": bench.call(model, pass_, pixels),
            }
            ratio = speedup(interleaved(runs, 2 * bench.rounds), "xray", "timm")
            rows.append([size, pass_, f"{ratio:.2f}x"])
    heads = ["model", "pass", "speed, xray / timm"]
    return Table("(a) Keep rate 1 against timm, 224 px image", heads, rows)


def keep_rates(bench: Bench, sizes: list[str]) -> Table:
    """Make table (b): keep rates .7 and .5 against keep rate 1 and against their bound."""
    rows = []
    for size in sizes:
        model = bench.backbone(size)
        for frames in (1, CLIP_FRAMES):
            pixels = bench.pixels(size, frames)
            full = vision_macs(model, frames)
            for pass_ in PASSES:
                torch._dynamo.reset()  # the limit on recompilations counts all calls together
                runs = {str(r): bench.call(model, pass_, pixels, r) for r in (1.0, 0.7, 0.5)}
                seconds = interleaved(runs, bench.rounds)
                passes = 1 if pass_ == "forward" else 3
                rate = 2 * passes * full * len(pixels) / min(seconds["1.0"])
                for keep in (0.7, 0.5):
                    bound = full / vision_macs(model, frames, keep_rate=keep)
                    ratio = speedup(seconds, str(keep), "1.0")
                    input_ = f"{frames}x224" if frames > 1 else "224"
                    ratios = [f"{ratio:.2f}x", f"{bound:.2f}x", f"{ratio / bound:.0%}"]
                    rows.append([size, input_, pass_, str(keep), *ratios, f"{rate / 1e12:.2f}"])
    heads = ["model", "input", "pass", "keep", "speed-up", "bound", "share of bound"]
    title = "(b) Keep rates against keep rate 1, reduced at blocks 3, 6, 9"
    return Table(title, [*heads, "TFLOP/s at keep 1"], rows)


def against_explicit(bench: Bench, sizes: list[str]) -> Table:
    """Make table (c): SDPA against explicit attention in every block, on 1,568 tokens."""
    rows = []
    for size in sizes:
        model = bench.backbone(size)
        pixels = bench.pixels(size, CLIP_FRAMES)
        for keep in (1.0, 0.7):
            runs = {
                "explicit": with_explicit_attention(bench.call(model, "forward", pixels, keep)),
                "xray": bench.call(model, "forward", pixels, keep),
            }
            ratio = speedup(interleaved(runs, bench.rounds), "xray", "explicit")
            rows.append([size, str(keep), f"{ratio:.2f}x"])
    title = "(c) Against explicit attention, 16x224 clip (1,568 tokens), forward"
    return Table(title, ["model", "keep", "speed, xray / explicit"], rows)


def peak(device: str, size: str, frames: int, pass_: str, keep: float, explicit: bool) -> float:
    """Return the peak memory above model and input in MiB; on a CPU, call it in a fresh process."""
    bench = Bench(device, 1, compiled=False)
    run = bench.call(bench.backbone(size), pass_, bench.pixels(size, frames), keep)
    if explicit:
        run = with_explicit_attention(run)
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    # allocate the libraries' buffers before the measurement
    bench.call(bench.backbone(size), pass_, bench.pixels(size, 1)[:1], keep)()
    ctypes.CDLL(None).malloc_trim(0)  # return free memory, which the call would use again
    Path("/proc/self/clear_refs").write_text("5", "utf-8")  # reset the peak (VmHWM)
    before = _resident("VmRSS")
    run()
    return _resident("VmHWM") - before


def _resident(kind: str) -> float:
    """Return the memory of this process in MiB: VmRSS is the current value, VmHWM the peak."""
    lines = Path("/proc/self/status").read_text("utf-8").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(kind)) / 1024


def _short(number: float) -> str:
    return f"{number:,.0f}" if number >= 100 else f"{number:.3g}"


def memory(bench: Bench, sizes: list[str]) -> Table:
    """Make table (d): peak memory of the variants of (b) and (c) on a clip."""
    rows = []
    for size in sizes:
        for pass_ in PASSES:
            cells = []
            for keep, explicit in ((1.0, True), (1.0, False), (0.7, False), (0.5, False)):
                arguments = [bench.device, size, CLIP_FRAMES, pass_, keep, explicit]
                cells.append(f"{in_fresh_process(peak, *arguments):,.0f}")
            rows.append([size, pass_, *cells])
    heads = ["model", "pass", "explicit attention", "keep 1", "keep .7", "keep .5"]
    return Table("(d) Peak memory above weights and input, MiB, 16x224 clip", heads, rows)


class ClipVision(nn.Module):
    """Vision side of CLIP: tower, projection, and InfoNCE with fixed text features."""

    def __init__(self, vision: VisionBackbone) -> None:
        super().__init__()
        self.vision, self.projection = vision, Projection(vision.embed_dim, JOINT)

    def forward(self, pixels: Tensor, texts: Tensor, keep: float) -> Tensor:
        """Return the loss of pixels [B, T, 3, H, W] and texts [B, JOINT]."""
        image = F.normalize(self.projection(self.vision(pixels, keep).cls).float(), dim=-1)
        return info_nce(image, texts, torch.full((1,), 14.3, device=texts.device))


def steps(bench: Bench, large: str) -> Table:
    """Make table (e): TFLOP/s of forward and backward of the mae stage and CLIP's vision side."""
    ceiling, device = _ceiling(bench), bench.device
    batch = 256 if device == "cuda" else 2
    settings = {"model": {"name": large}, "mae": {"decoder_dim": 512, "decoder_depth": 8}}
    mae = MaeModule(load_config(MaeConfig, "mae", settings)).to(device).eval()
    clip = ClipVision(bench.backbone(large)).to(device)
    images = torch.randint(0, 255, (batch, 1, 3, 224, 224), dtype=torch.uint8, device=device)
    inputs = {"pixels": images, "mask_noise": torch.rand(batch, 196, device=device)}
    macs = vision_macs(mae.vision, visible=49) + decoder_macs(mae.decoder, 196, 49)
    cases: list[tuple[str, Callable[[], None], int]] = [
        ("mae stage, decoder of 8 x 512", bench.call(mae, PASSES[1], inputs, 0.0), macs)
    ]
    pixels = mae.normalize(images)
    texts = F.normalize(torch.randn(batch, JOINT, device=device), dim=-1)
    for keep in (1.0, 0.7):
        run = bench.call(clip, PASSES[1], pixels, texts, keep)
        macs = vision_macs(clip.vision, 1, 224, keep)
        cases.append((f"CLIP, vision side at keep {keep}", run, macs))
    rows = []
    for name, run, macs in cases:
        seconds = min(interleaved({name: run}, bench.rounds)[name])
        rate = 6 * macs * batch / seconds / 1e12
        rows.append([name, _short(batch / seconds), f"{rate:.2f}", f"{rate / ceiling:.0%}"])
    heads = [large, "images/s", "TFLOP/s", f"share of {ceiling:.2f} TFLOP/s"]
    title = "(e) Forward and backward, without the optimizer, against a large matrix product"
    return Table(title, heads, rows)


def multiply_adds(bench: Bench, _: str) -> Table:
    """Make table (f): computed tokens and multiply-adds of DeiT-S at 224 px."""
    rows = []
    with torch.device("meta"):
        fused, dropped = (
            VisionBackbone(ModelConfig(name=SIZES["s16"], fuse=fuse)) for fuse in (True, False)
        )
    for keep in (1.0, 0.9, 0.8, 0.7, 0.6, 0.5):
        counts = fused.token_counts(196, keep)
        tokens = " / ".join(str(counts[at]) for at in fused.reduce_at)
        macs = [f"{vision_macs(m, 1, 224, keep) / 1e9:.2f}" for m in (fused, dropped)]
        rows.append([str(keep), tokens, *macs])
    heads = ["keep rate", "patch tokens after 3 / 6 / 9", "GMACs"]
    title = "(f) Multiply-adds of DeiT-S, 224 px, reduced at blocks 3, 6 and 9"
    return Table(title, [*heads, "GMACs, removed tokens not fused"], rows)


def stem(bench: Bench, sizes: list[str]) -> Table:
    """Make table (g): the stem against torch's convolution of all patches."""
    rows = []
    for size in sizes:
        convolution = bench.backbone(size).patch_embed.proj
        for frames, kept in ((1, 1.0), (1, 0.25), (CLIP_FRAMES, 1.0), (CLIP_FRAMES, 0.1)):
            if kept == 1 and bench.device == "cpu":
                continue  # the stem is the convolution itself
            pixels = bench.pixels(size, frames)
            n = (frames + 1) // 2 * 196
            shuffled = torch.rand(len(pixels), n, device=bench.device).argsort(dim=1)
            index = None if kept == 1 else shuffled[:, : int(kept * n)]
            for pass_ in PASSES:
                runs = {
                    "conv": bench.call(_Convolved(convolution), pass_, pixels, index),
                    "xray": bench.call(convolution, pass_, pixels, index),
                }
                ratio = speedup(interleaved(runs, 4 * bench.rounds), "xray", "conv")
                input_ = f"{frames}x224" if frames > 1 else "224"
                rows.append([size, input_, f"{kept:.0%}", pass_, f"{ratio:.2f}x"])
    heads = ["model", "input", "visible", "pass", "speed, xray / convolution"]
    return Table("(g) Stem against torch's convolution of all patches", heads, rows)


class _Convolved(nn.Module):
    """Stem by torch's convolution, from whose tokens the visible ones are taken."""

    def __init__(self, proj: nn.Conv3d) -> None:
        super().__init__()
        self.proj = proj

    def forward(self, pixels: Tensor, index: Tensor | None) -> Tensor:
        weight, bias, stride = self.proj.weight, self.proj.bias, self.proj.stride
        if pixels.shape[1] == 1:
            x = F.conv2d(pixels[:, 0], weight.sum(dim=2), bias, stride[1:])
        else:
            x = F.conv3d(pixels.transpose(1, 2), weight, bias, stride)
        x = x.flatten(2).transpose(1, 2)
        return x if index is None else x.gather(1, index[..., None].expand(-1, -1, x.shape[-1]))


def _ceiling(bench: Bench) -> float:
    """Measure the TFLOP/s of a large matrix product, in bf16 on CUDA."""
    size, dtype = (8192, torch.bfloat16) if bench.device == "cuda" else (2048, torch.float32)
    a, b = torch.randn(2, size, size, device=bench.device, dtype=dtype)
    seconds = interleaved({"product": partial(torch.mm, a, b)}, 10)["product"]
    return 2 * size**3 / min(seconds) / 1e12


TABLES = {"a": against_timm, "b": keep_rates, "c": against_explicit, "d": memory, "g": stem}
ONE_MODEL = {"e": steps, "f": multiply_adds}  # tables that do not depend on --sizes


def main() -> None:
    """Print the tables; run each one in a separate process."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--sizes", nargs="+", choices=list(SIZES), default=list(SIZES))
    parser.add_argument(
        "--tables", nargs="+", choices=[*TABLES, *ONE_MODEL], default=[*TABLES, *ONE_MODEL]
    )
    parser.add_argument("--large", default=LARGE, help="model of table e, a timm name")
    options = parser.parse_args()
    if len(options.tables) > 1:  # separate processes, so that no table inherits another's heap
        for name in options.tables:
            command = [
                sys.executable,
                "-m",
                "tools.benchmarks.bench_backbone",
                *sys.argv[1:],
                "--tables",
                name,
            ]
            subprocess.run(command, check=True)
        return
    print(hardware(options.device), flush=True)
    for compiled in (False, True) if options.device == "cuda" else (False,):
        if options.device == "cuda":
            print(f"\n## bf16, {'torch.compile' if compiled else 'eager'}")
        bench = Bench(options.device, options.rounds, compiled)
        for name in options.tables:
            if compiled and name in "cdf":  # compilation does not matter here
                continue
            if name in ONE_MODEL:
                print(ONE_MODEL[name](bench, options.large), flush=True)
            else:
                print(TABLES[name](bench, options.sizes), flush=True)


if __name__ == "__main__":
    main()
