"""Training steps of a stage on random data, through the engine as in the trainer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from data_pipelines.stream.loaded import Loaded
from stages import stage_class
from stages.base import Batch, Facts
from stages.tuning import set_trained
from xray.config import BlockConfig
from xray.config.loading import load_config, merge
from xray.models.tiny_llm import tiny_settings
from xray.training.accumulation import Accumulator
from xray.training.engine import Engine
from xray.training.step_data import step_shape
from xray.training.step_result import Events, ReducedStep

PROGRESS = 0.9  # token reduction and schedules have reached their final values
LR = 1e-4
TAGS = 100
VOCABULARY = 512
TOY: dict[str, Any] = {
    "model": {
        "name": "vit_tiny_patch16_224",
        "kwargs": {"patch_size": 8, "embed_dim": 64, "depth": 4, "num_heads": 2},
        "keep_rate_span": [0.0, 0.0],
    },
    "data": {
        "resolution": 32,
        "frames": 4,
        "sources": {
            "images": {"shards": "images", "modality": "image"},
            "clips": {"shards": "clips", "modality": "video"},
        },
        "blocks": [{"source": "images", "samples": 8}],
    },
    "optim": {"name": "adamw", "base_lr": 0.02, "betas": [0.9, 0.95], "warmup": 0.0},
    "train": {"precision": "fp32", "samples": 1000},
}
# Images and clips, instead of TOY's images alone.
BLOCKS = [{"source": "images", "samples": 8}, {"source": "clips", "samples": 4}]
# Sections of single stages beside TOY.
OWN: dict[str, dict[str, Any]] = {
    "mae": {"mae": {"decoder_dim": 64, "decoder_depth": 2, "decoder_heads": 4}},
    "hashtag": {},
    "text": {"text": {"max_length": 16, "lora_dropout": 0.0}},
    "clip": {
        "clip": {"embed_dim": 32, "adapter_blocks": 1},
        "text": {"max_length": 16, "lora_rank": 0, "tune": "none", "features": "fp32"},
        "mae": {"decoder_dim": 64, "decoder_depth": 2, "decoder_heads": 4},
    },
}


def tiny_llm(folder: Path) -> Path:
    """Write the config.json of a small language model, which is enough for random weights."""
    tiny_settings("qwen3", VOCABULARY, 32, 2, 2).save_pretrained(folder)
    return folder


def toy_settings(stage: str, *more: dict[str, Any]) -> dict[str, Any]:
    """Merge TOY, the stage's own settings and further ones."""
    settings = merge(TOY, OWN[stage])
    for each in more:
        settings = merge(settings, each)
    return settings


class StageSteps:
    """A stage's module with random weights, its engine, and a random batch.

    llm: folder with the config.json of the language model, for a stage that reads captions.
    Weights and batch depend on `seed` alone. build_on: device that draws the weights; on a GPU this
    is fast, and gives other weights than on a CPU.
    """

    def __init__(
        self,
        stage: str,
        settings: dict[str, Any],
        device: torch.device,
        llm: Path | None = None,
        seed: int = 0,
        build_on: torch.device | str = "cpu",
    ) -> None:
        self.config: Any = load_config(stage_class(stage).Config, stage, settings)
        self.config.validate()
        self.device, self.stage = device, stage_class(stage)(self.config)
        torch.manual_seed(seed)
        with torch.device(build_on):
            self.module: Any = self.stage.meta_module(Facts(TAGS, llm))
        set_trained(self.module, self.config.optim)
        self.engine = Engine(self.module.to(device), self.config)
        self.accumulator = Accumulator(self.engine, self.stage, device, seed)
        self.shape = step_shape(self.stage, self.config.blocks, PROGRESS)
        blocks = [self._batch(block, seed + n) for n, block in enumerate(self.config.blocks)]
        self.loaded = [
            Loaded(
                {key: rows[micro.start : micro.stop] for key, rows in blocks[micro.block].items()}
            )
            for micro in self.shape.micro
        ]
        if device.type == "cuda":
            self.loaded = [item.pin_memory() for item in self.loaded]

    def _batch(self, block: BlockConfig, seed: int) -> Batch:
        clip = self.config.data.sources[block.source].modality == "video"
        size = block.samples, self.shape.frames if clip else 1, self.shape.resolution
        example = self.stage.example_batch(self.module, *size, block.source)
        towers = self.module.towers
        return random_values(example, seed, towers["text"].vocabulary if "text" in towers else 0)

    @property
    def samples(self) -> int:
        """Number of samples in a step."""
        return sum(block.samples for block in self.config.blocks)

    def step(self, number: int = 0, progress: float = PROGRESS) -> float:
        """Train one step as the training loop does, and return its loss."""
        means = self.accumulator.train(number, progress, self.shape.micro, self.loaded)
        result = ReducedStep(Events(), means, self.device)
        self.engine.set_lr(LR, progress)
        self.engine.step(result["loss"])
        result.append("grad_norm", self.engine.norm)
        self.stage.after_step(self.engine, self.module)
        result.copy_to_host()
        _, values = result.read()
        self.engine.update_average(number + 1)
        return values["loss"]

    def macs(self) -> int:
        """Count the multiply-adds of a forward pass of the vision tower over the step's samples."""
        total = 0
        for block in self.config.blocks:
            clip = self.config.data.sources[block.source].modality == "video"
            total += block.samples * self.stage.macs(self.shape.frames if clip else 1, PROGRESS)
        return total


def random_values(example: Batch, seed: int, vocabulary: int) -> Batch:
    """Fill a stage's example batch with random values; captions get random lengths."""
    generator, batch = torch.Generator().manual_seed(seed), {}
    for name, value in example.items():
        shape = value.shape
        if name == "pixels":
            new = torch.randint(256, shape, generator=generator, dtype=torch.uint8)
        elif name == "tags":  # distinct, the last ones padded
            order = torch.rand(*shape[:-1], TAGS, generator=generator).argsort(-1)
            new = order[..., : shape[-1]].clone()
            new[..., -2:] = -1
        elif name == "weights":
            new = torch.ones(shape)
            new[..., -2:] = 0
        elif name == "input_ids":
            new = torch.randint(2, max(3, vocabulary), shape, generator=generator)
        elif name.endswith("_mask"):
            new = _within_lengths(shape, seed)  # equal for both masks
        else:
            new = torch.rand(shape, generator=generator)
        batch[name] = new.to(value.dtype)
    return batch


def _within_lengths(shape: torch.Size, seed: int) -> Tensor:
    """Make a mask [..., L] of captions of at least two tokens; the first one is complete."""
    generator = torch.Generator().manual_seed(seed)
    length = torch.randint(2, shape[-1] + 1, shape[:-1], generator=generator)
    length.view(-1)[0] = shape[-1]
    return torch.arange(shape[-1]) < length[..., None]
