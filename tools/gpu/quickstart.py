"""The commands a user starts with: `xray run quickstart`, a resumed run, `xray embed`."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from tools.common.host_reads import ROOT
from tools.gpu.findings import Check, Finding, Note, Number, Scale

STAGES = ("mae", "hashtag", "text", "clip")
STEPS, SAVED = 4, 2  # steps of each stage, and between checkpoints
SAME = 1e-3  # largest relative difference of a loss after the resume


def run(device: torch.device, scale: Scale) -> Iterator[Finding]:
    """Run the recipe with a few steps per stage, resume its last stage, and embed pictures."""
    stages = STAGES[:1] if scale.toy else STAGES
    last = stages[-1]
    with TemporaryDirectory() as folder:
        data, out = Path(folder) / "data", Path(folder) / "run"
        recipe = ["run", "quickstart", *_settings(data, out, device, scale, stages)]
        yield from _command("xray run quickstart", recipe)
        finished = [stage for stage in stages if (out / stage / "artifact").is_dir()]
        yield Check("stages with an artifact", finished == list(stages), finished, str(stages))
        if last not in finished:
            return
        before = _last(out / last)
        yield Number(f"{last}, last loss", before["loss"])
        if scale.toy:
            yield Note("resume and xray embed: left out of the toy scale")
            return
        shutil.rmtree(out / last / "artifact")
        shutil.rmtree(max((out / last / "checkpoints").glob("step_*")))
        yield from _command("xray run quickstart, again", recipe)
        after = _last(out / last)
        near = abs(after["loss"] / before["loss"] - 1)
        ok = near <= SAME and after["step"] == before["step"] and after != before
        yield Check(f"{last}, loss after a resume", ok, near, f"<= {SAME} from the first run's")
        target = Path(folder) / "embeddings.npy"
        given = ["embed", str(out / last / "artifact"), str(data / "heldout")]
        yield from _command("xray embed", [*given, "--out", str(target)])
        yield Check("embeddings", target.is_file(), target.is_file(), "a file")


def _settings(
    data: Path, out: Path, device: torch.device, scale: Scale, stages: tuple[str, ...]
) -> list[str]:
    """Return overrides of the recipe: few samples, a checkpoint in the middle of each stage."""
    photos, clips = (64, 16) if scale.toy else (256, 64)
    samples = 16 if scale.toy else 128
    settings = [
        f"data.root={data}",
        f"out={out}",
        f"train.device={device.type}",
        f"prepare.demo={{photos: {photos}, clips: {clips}, heldout: 16, per_shard: 16}}",
        f"data.blocks=[{{source: photos, samples: {samples // 2}}}, "
        f"{{source: clips, samples: {samples // 2}}}]",
        f"train.save_every={SAVED}",
        "train.log_every=1",
        "train.tensorboard=false",
        f"stages=[{','.join(stages)}]",
    ]
    if "text" in stages:
        settings.append(f"text.data.blocks=[{{source: photos, samples: {samples}}}]")
        settings.append("hashtag.min_count=1")
    settings += [f"{stage}.train.samples={samples * STEPS}" for stage in stages]
    return settings


def _last(run: Path) -> dict[str, float]:
    """Return the last line of a run's metrics."""
    return json.loads((run / "metrics.jsonl").read_text("utf-8").splitlines()[-1])


def _command(name: str, arguments: list[str]) -> Iterator[Finding]:
    """Run a command of xray and check that it succeeds; its output goes to the log."""
    start = time.monotonic()
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    done = subprocess.run(
        [sys.executable, "-m", "xray", *arguments],
        env={**os.environ, "PYTHONPATH": path},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    print(done.stdout, flush=True)
    lines = done.stdout.strip().splitlines()
    found = "0" if done.returncode == 0 else f"{done.returncode}: {' '.join(lines[-2:])[-300:]}"
    yield Check(f"{name}, exit status", done.returncode == 0, found, "0")
    yield Number(f"{name}, s", round(time.monotonic() - start, 1))
