"""CLIP of open_clip and the clip stage's module with equal weights, for `bench_clip.py`.

The stage's module has timm's ViT of the same shape, and transformers' CLIPTextModel instead of the
LLM. Captions fill the context, and the hidden state at the EOS token is projected.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import open_clip
import torch
import torch.nn.functional as F
from timm.models.vision_transformer import _convert_openai_clip
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, Qwen3Config, Qwen3Model

from data_pipelines.stream.loaded import Loaded
from data_pipelines.stream.sampling import MicroBatch
from stages.clip import ClipModule, ClipStage
from stages.clip_config import ClipConfig
from xray.config.loading import load_config, merge
from xray.models.flops import linear_macs, vision_macs
from xray.models.heads import Projection
from xray.models.tokenizer import TOKENS
from xray.models.weight_loading import load_adapted

# name in open_clip, name of the timm model of the same shape
SIZES = {
    "b16": ("ViT-B-16", "vit_base_patch16_clip_224"),
    "l14": ("ViT-L-14", "vit_large_patch14_clip_224"),
}
BATCH = {"cpu": {"b16": 8, "l14": 2}, "cuda": {"b16": 256, "l14": 64}}
# Changes that make a toy of a model of open_clip, and the same ones in timm's names.
TOY = {
    "embed_dim": 32,
    "vision_cfg": {"width": 64, "layers": 2, "head_width": 32},
    "text_cfg": {"width": 64, "layers": 2, "heads": 2, "vocab_size": 512},
}
TOY_VISION = {"embed_dim": 64, "depth": 2, "num_heads": 2}
KEEP, START, END = 0.7, 0.0, 1.0  # the keep rate is 1 at progress START and KEEP at END
LR, BETAS, DECAY = 1e-6, (0.9, 0.98), 0.2

# Qwen3-0.6B's shape with a smaller vocabulary, which does not change the multiply-adds
LLM = {"hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28, "head_dim": 128}
LLM |= {"num_attention_heads": 16, "num_key_value_heads": 8, "vocab_size": 1000}


def image_data(batch: int) -> dict[str, Any]:
    """Return the settings of a block of images; nothing is read from its source."""
    return {
        "resolution": 224,
        "sources": {"images": {"shards": "images", "modality": "image"}},
        "blocks": [{"source": "images", "samples": batch}],
    }


class MeanLlm(nn.Module):
    """Bidirectional language model with random weights and mean pooling."""

    def __init__(self) -> None:
        super().__init__()
        self.width = LLM["hidden_size"]
        self.llm = Qwen3Model(Qwen3Config(**LLM, use_cache=False, is_causal=False))
        self.requires_grad_(False)

    def forward(self, input_ids: Tensor, attention_mask: Tensor, pooled_mask: Tensor) -> Tensor:
        """Encode captions, [B, 1, L] -> [B, 1, width]."""
        return self.llm(input_ids=input_ids[:, 0]).last_hidden_state.mean(dim=1, keepdim=True)


class EosText(nn.Module):
    """Text tower of transformers in open_clip's shape, used instead of the LLM."""

    def __init__(self, shape: dict[str, int]) -> None:
        super().__init__()
        self.width = shape["width"]
        self.llm = CLIPTextModel(
            CLIPTextConfig(
                vocab_size=shape["vocab_size"],
                hidden_size=self.width,
                intermediate_size=4 * self.width,
                num_hidden_layers=shape["layers"],
                num_attention_heads=shape["heads"],
                max_position_embeddings=shape["context_length"],
                hidden_act="gelu",
                eos_token_id=shape["vocab_size"] - 1,
            )
        )

    def forward(self, input_ids: Tensor, attention_mask: Tensor, pooled_mask: Tensor) -> Tensor:
        """Encode captions, [B, 1, L] -> [B, 1, width]; tokens after EOS have no effect."""
        return self.llm(input_ids=input_ids[:, 0]).pooler_output[:, None]


def frozen_steps(options: argparse.Namespace, length: int) -> dict[str, Callable[[], None]]:
    """Return steps with a frozen LLM, and with its sentence vectors stored before.

    The model has ViT-B/16 and an adapter of 2 blocks; length: tokens per caption.
    """
    torch.manual_seed(0)
    device = torch.device(options.device)
    batch = options.batch or BATCH[options.device]["b16"]
    settings = {
        "model": {"name": SIZES["b16"][1], "reduce": "none"},
        "data": image_data(batch),
        "clip": {"embed_dim": 512, "adapter_blocks": 2},
        "train": {"precision": options.precision},
    }
    config: Any = load_config(ClipConfig, "clip", settings)
    live, stored = (
        ClipModule(config, tower, LLM["hidden_size"]).to(device) for tower in (MeanLlm(), None)
    )
    pixels = torch.randint(256, (batch, 1, 3, 224, 224), dtype=torch.uint8)
    ids = torch.randint(LLM["vocab_size"], (batch, 1, length))
    tokens = dict.fromkeys(TOKENS, torch.ones_like(ids)) | {"input_ids": ids}
    vectors = {"sentences": torch.randn(batch, 1, LLM["hidden_size"])}

    def step_of(module: nn.Module, text: dict[str, Tensor]) -> Callable[[], None]:
        rows = {k: v.to(device) for k, v in {"pixels": pixels, **text}.items()}
        trained = [p for p in module.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=LR)

        def run() -> None:
            with torch.autocast(device.type, torch.bfloat16, options.precision == "bf16"):
                loss = module(rows, START).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()

        return run

    return {"live": step_of(live, tokens), "stored": step_of(stored, vectors)}


def text_state(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Rename the weights of open_clip's text tower to transformers' names."""
    replacements = {
        "transformer.resblocks.": "encoder.layers.",
        "ln_final": "final_layer_norm",
        "ln_": "layer_norm",
        "attn.": "self_attn.",
        "c_fc": "fc1",
        "c_proj": "fc2",
        "token_embedding": "embeddings.token_embedding",
        "positional_embedding": "embeddings.position_embedding.weight",
    }
    renamed = {}
    for key, value in state.items():
        for old, new in replacements.items():
            key = key.replace(old, new)
        parts = zip("qkv", value.chunk(3), strict=True) if "in_proj_" in key else [("", value)]
        for part, piece in parts:
            renamed[key.replace("in_proj_", f"{part}_proj.")] = piece
    return renamed


class Pair:
    """Reference model of open_clip, the clip stage's module with its weights, and a batch.

    toy: narrower towers of two blocks.
    """

    def __init__(self, size: str, options: argparse.Namespace, toy: bool = False) -> None:
        torch.manual_seed(0)
        self.size, self.device = size, torch.device(options.device)
        self.batch = options.batch or BATCH[options.device][size]
        self.bf16 = options.precision == "bf16"
        name, vit = SIZES[size]
        shape = merge(open_clip.get_model_config(name), TOY if toy else {})
        self.context: int = shape["text_cfg"]["context_length"]
        self.reference = open_clip.CLIP(**shape, output_dict=True).to(self.device)
        self.reference_criterion = open_clip.ClipLoss()
        settings = {
            "model": {
                "name": vit,
                "kwargs": TOY_VISION if toy else {},
                "reduce": "evit",
                "keep_rate": KEEP,
                "keep_rate_span": [1, 1],
            },
            "data": {"frames": 16, **image_data(self.batch)},
            "text": {"tune": "full"},
            "clip": {"embed_dim": shape["embed_dim"], "adapter_blocks": 0},
            "optim": {"name": "adamw", "betas": list(BETAS), "weight_decay": DECAY},
            "train": {"precision": options.precision},
        }
        self.config: Any = load_config(ClipConfig, "clip", settings)
        tower = EosText(shape["text_cfg"])
        self.model = ClipModule(self.config, tower, tower.width)
        self.model.text_adapter = Projection(shape["text_cfg"]["width"], shape["embed_dim"])
        self._copy()
        self.model.to(self.device)
        pixels = torch.randint(256, (self.batch, 1, 3, 224, 224), dtype=torch.uint8)
        last = shape["text_cfg"]["vocab_size"] - 1
        ids = torch.randint(1, last, (self.batch, 1, self.context))
        ids[..., -1] = last
        mask = torch.ones_like(ids)
        rows = {"pixels": pixels, "input_ids": ids, "attention_mask": mask, "pooled_mask": mask}
        self.rows = {key: value.to(self.device) for key, value in rows.items()}
        self.images = self.model.normalize(self.rows["pixels"])[:, 0]
        self.ids = self.rows["input_ids"][:, 0]

    @torch.no_grad()
    def _copy(self) -> None:
        state, model = self.reference.state_dict(), self.model
        vision = _convert_openai_clip(state, self.reference)  # renamed to timm's names
        vision = {k: v for k, v in vision.items() if not k.startswith("head.")}
        load_adapted(model.vision, vision, "open_clip")
        single = ("logit_scale", "text_projection")
        text = {k: v for k, v in state.items() if not k.startswith(("visual.", *single))}
        model.towers["text"].llm.load_state_dict(text_state(text))
        model.vision_projection.weight.copy_(self.reference.visual.proj.t())
        model.text_adapter.weight.copy_(self.reference.text_projection.t())
        model.logit_scale.fill_(float(self.reference.logit_scale))

    def autocast(self) -> Any:
        """Return the context of bf16 autocast, disabled for fp32."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16)

    def macs(self, keep: float) -> dict[str, int]:
        """Return the multiply-adds of one sample's forward pass, by tower."""
        model, joint = self.model, self.config.clip.embed_dim
        text: Any = model.towers["text"]
        layers = text.llm.encoder.layers
        length, width = self.context, text.width
        attention = 2 * length**2 * width * len(layers)
        return {
            "image": vision_macs(model.vision, 1, 224, keep) + model.vision.embed_dim * joint,
            "text": length * linear_macs(layers) + attention + width * joint,
        }

    # timed functions --------------------------------------------------------------------------

    def reference_image(self) -> Tensor:
        """Encode the images with the reference."""
        return self.reference.encode_image(self.images, normalize=True)

    def reference_text(self) -> Tensor:
        """Encode the captions with the reference."""
        return self.reference.encode_text(self.ids, normalize=True)

    def reference_loss(self) -> Tensor:
        """Compute the reference's loss."""
        return self.reference_criterion(**self.reference(self.images, self.ids))

    def image(self) -> Tensor:
        """Encode the images with xray's model."""
        vision = self.model.vision(self.model.normalize(self.rows["pixels"])).cls
        return F.normalize(self.model.vision_projection(vision).float(), dim=-1)

    def text(self) -> Tensor:
        """Encode the captions with xray's model."""
        pooled = self.model.towers["text"](*(self.rows[key] for key in TOKENS))
        return F.normalize(self.model.text_adapter(pooled[:, 0]).float(), dim=-1)

    def loss(self, progress: float = START) -> Tensor:
        """Compute the loss of xray's model."""
        return self.model(self.rows, progress).loss

    def backward(self, forward: Callable[[], Tensor]) -> Callable[[], None]:
        """Return a function that runs forward and backward and removes the gradients."""

        def run() -> None:
            with self.autocast():
                out = forward()
            out.float().mean().backward()
            self.reference.zero_grad(set_to_none=True)
            self.model.zero_grad(set_to_none=True)

        return run

    def reference_step(self) -> Callable[[], None]:
        """Return a step as in open_clip's train_one_epoch, with its parameter groups."""
        model, groups = self.reference, ([], [])
        for parameter in model.parameters():
            groups[parameter.ndim < 2].append(parameter)
        decayed, plain = groups
        parameter_groups = [
            {"params": plain, "weight_decay": 0.0},
            {"params": decayed, "weight_decay": DECAY},
        ]
        optimizer = torch.optim.AdamW(parameter_groups, lr=LR, betas=BETAS, eps=1e-6)

        def run() -> None:
            optimizer.zero_grad()
            with self.autocast():
                loss = self.reference_loss()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            with torch.no_grad():
                model.logit_scale.clamp_(0, math.log(100))

        return run

    def steps(self) -> dict[str, Callable[[], None]]:
        """Return steps as in the trainer: "xray" with keep rate 1, "keep" with keep rate KEEP."""
        # import late: deepspeed chooses its device when it is imported
        from xray.training.accumulation import Accumulator
        from xray.training.deepspeed_setup import init_distributed
        from xray.training.engine import Engine

        init_distributed(self.device)
        stage, engine = ClipStage(self.config), Engine(self.model, self.config)
        accumulator = Accumulator(engine, stage, self.device, seed=0)
        micro_batches, loaded = [MicroBatch(0, "images", 0, self.batch, 1.0)], [Loaded(self.rows)]

        def run(progress: float) -> None:
            accumulator.train(0, progress, micro_batches, loaded)
            engine.set_lr(LR, progress)
            engine.step()
            stage.after_step(engine, self.model)

        return {"xray": partial(run, START), "keep": partial(run, END)}
