"""Blocks of the clip stage without captions, which train with the auxiliary losses only."""

from __future__ import annotations

import json
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from clip_runs import LORA, rows_of
from shards import write_tar
from tiny import ALL_TOKENS, QUICK, settings, train
from torch import Tensor, nn

from data_pipelines.ingest.user_data import open_sources
from stages.base import Facts, Parents
from stages.clip import ClipStage
from stages.clip_captions import has_captions
from xray.errors import ConfigError, DataError
from xray.planning.fake_step import rehearse
from xray.recipes.run import store_captions
from xray.training.accumulation import Accumulator
from xray.training.deepspeed_setup import init_distributed
from xray.training.run import Run
from xray.training.step_data import step_shape, training_stream

AUXILIARY = ("clip.mae_weight=0.5", "clip.hashtag_weight=0.25", "mae.decoder_dim=32",
             "mae.decoder_depth=1", "mae.decoder_heads=2", "hashtag.min_count=2")  # fmt: skip
UNCAPTIONED = "clip.uncaptioned=[tagged]"


@pytest.fixture(scope="module")
def tagged(demo: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, ...]:
    """Blocks of 8 photos with captions and 4 with tags only, and the auxiliary losses."""
    files: dict[str, bytes] = {}
    with tarfile.open(sorted((demo / "photos").glob("*.tar"))[0]) as tar:
        for member in tar:
            stream = tar.extractfile(member)
            assert stream is not None
            if member.name.endswith(".json"):
                tags = json.loads(stream.read())["hashtags"]
                files[member.name] = json.dumps({"hashtags": tags}).encode()
            elif member.name.endswith(".jpg"):
                files[member.name] = stream.read()
    folder = tmp_path_factory.mktemp("tagged")
    write_tar(folder / "0.tar", files)
    source = f"data.sources.tagged={{shards: {folder}, modality: image}}"
    blocks = "[{source: tagged, samples: 4}, {source: photos, samples: 8}]"
    return (*AUXILIARY, source, f"data.blocks={blocks}")


class PlainEngine:
    """Gradient accumulation without DeepSpeed."""

    def __init__(self, module: nn.Module) -> None:
        self.module, self.total = module, 1

    def train(self, mode: bool = True) -> None:
        self.module.train(mode)

    def begin(self, number: int, total: int) -> None:
        self.total = total

    def prepare_pass(self, *kind: str) -> None:
        pass

    def __call__(self, *args: Any) -> Any:
        return self.module(*args)

    def backward(self, loss: Tensor) -> None:
        (loss / self.total).backward()

    def step(self) -> None:
        pass


def by_hand(module: Any, batches: dict[str, dict[str, Tensor]]) -> Tensor:
    """Compute the loss of a step: a third of the tagged block's, and two of the photos'."""
    total = torch.zeros(())
    for name, share in (("tagged", 1 / 3), ("photos", 2 / 3)):
        batch = batches[name]
        pixels = module.normalize(batch["pixels"])
        cls = module.vision(pixels, 1.0).cls
        terms = module.auxiliary(module, batch, pixels, cls, 0.5)
        loss = 0.5 * terms["mae_loss"].mean() + 0.25 * terms["hashtag_loss"].mean()
        if name == "photos":
            tokens = (batch[key] for key in ("input_ids", "attention_mask", "pooled_mask"))
            text = module.text_adapter(module.towers["text"](*tokens))[:, 0]
            image = F.normalize(module.vision_projection(cls), dim=-1)
            logits = module.logit_scale.exp() * image @ F.normalize(text, dim=-1).t()
            own = torch.arange(len(logits))
            loss = loss + (F.cross_entropy(logits, own) + F.cross_entropy(logits.t(), own)) / 2
        total = total + share * loss
    return total


@pytest.mark.parametrize("micro", [0, 2])
def test_a_step_has_the_gradient_of_the_losses_written_by_hand(
    demo: Path, tmp_path: Path, tagged: tuple[str, ...], micro: int
) -> None:
    """For whole and for split blocks. The second ones without a second forward pass."""
    device, plain = torch.device("cpu"), (ALL_TOKENS, "model.drop_path=0.0", *LORA)
    init_distributed(device)
    more = (*plain, "text.lora_dropout=0.0", *tagged, UNCAPTIONED)
    run = Run.open(ClipStage, settings("clip", demo, tmp_path, *more))
    module = run.build().train()

    def stream() -> Any:
        return next(training_stream(run.stage, run.config, run.plans, range(1), device))

    batches = {item.batch["pixels"].shape[0]: item.batch for item in stream()}
    assert not has_captions(batches[4]) and has_captions(batches[8])
    expected = by_hand(module, {"tagged": batches[4], "photos": batches[8]})
    expected.backward()
    gradients = {name: p.grad for name, p in module.named_parameters() if p.requires_grad}
    module.zero_grad()
    run.config.train.micro_batch = micro
    micros = step_shape(run.stage, run.config.blocks, 0.5).micro
    accumulator = Accumulator(PlainEngine(module), run.stage, device, 0)  # type: ignore[arg-type]
    means = accumulator.train(0, 0.5, micros, stream())
    assert float(means["loss"]) == pytest.approx(float(expected), rel=1e-5)
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(parameter.grad, gradients[name], atol=1e-5, rtol=1e-3)
    assert {n for n in means if n.startswith("tagged/")} == {
        "tagged/loss", "tagged/mae_loss", "tagged/hashtag_loss"}  # fmt: skip
    assert "photos/contrast" in means
    run.stage.guard.check({k: float(v) for k, v in means.items()}, 0.5)  # type: ignore[attr-defined]
    assert run.stage.chance(run.config.blocks[0]) == 0 < run.stage.chance(run.config.blocks[1])


def test_captions_and_stored_vectors_are_not_looked_for(
    demo: Path, tmp_path: Path, tagged: tuple[str, ...], trained: Callable[..., Path]
) -> None:
    teacher = trained("clip", *QUICK)
    more = (*QUICK, *tagged, "text.tune=none", f"clip.teacher={teacher}", "clip.mask_ratio=0.5")
    config = settings("clip", demo, tmp_path / "x", *more, UNCAPTIONED)
    sources = open_sources(config.data, ["photos", "tagged"])
    ClipStage(config).foresee(sources, Parents(), frozenset())
    with pytest.raises(DataError, match="source 'tagged' has a caption"):
        ClipStage(settings("clip", demo, tmp_path, *more)).foresee(sources, Parents(), frozenset())
    stored = settings("clip", demo, tmp_path, *more, UNCAPTIONED, "text.features=bf16")
    store_captions(stored, stored.text, torch.device("cpu"))
    made = train("clip", demo, tmp_path / "run", *more, UNCAPTIONED, "text.features=bf16")
    assert "text_features/photos" in made.manifest["inputs"]
    assert "text_features/tagged" not in made.manifest["inputs"]
    last = rows_of(tmp_path / "run")[-1]
    assert "photos/distill" in last and "tagged/distill" not in last


def test_a_plan_counts_no_captions_and_no_unread_features(
    demo: Path, tmp_path: Path, tagged: tuple[str, ...]
) -> None:
    facts = Facts(tags=10, llm=demo / "llm")
    flops = [
        rehearse(settings("clip", demo, tmp_path, *tagged, *more), facts, 0.5).flops
        for more in ((), (UNCAPTIONED,), (UNCAPTIONED, "clip.hashtag_weight=0"))
    ]
    assert flops[0] > flops[1] > flops[2]


def test_settings_are_checked(demo: Path, tmp_path: Path, tagged: tuple[str, ...]) -> None:
    for more, message in (
        (("clip.uncaptioned=[taged]",), r"'taged' is not a source of data.blocks.*tagged"),
        (("clip.uncaptioned=[tagged,photos]",), "leaves no block with captions"),
        ((UNCAPTIONED, "clip.mae_weight=0", "clip.hashtag_weight=0"), "hashtag_weight or clip.mae"),
    ):
        with pytest.raises(ConfigError, match=message):
            settings("clip", demo, tmp_path, *tagged, *more)
