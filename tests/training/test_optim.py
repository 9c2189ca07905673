from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tiny import settings
from torch import nn

from stages.base import Parents
from stages.clip import ClipStage
from stages.mae import MaeModule
from stages.tuning import set_trained
from xray.config import OptimConfig, TowerOptim, VisionOptim
from xray.optim import lr_at, make_optimizer, parameter_groups, set_lr


def test_lr_is_scaled_by_the_batch_and_warms_up_and_decays() -> None:
    config = OptimConfig(base_lr=1e-3, warmup=0.1, min_lr=0.01)
    assert lr_at(0.05, config, 512) == pytest.approx(1e-3)
    assert lr_at(0.1, config, 512) == pytest.approx(2e-3)
    assert lr_at(0.55, config, 512) == pytest.approx(2e-3 * (0.01 + 0.99 * 0.5))
    assert lr_at(1.0, config, 512) == pytest.approx(2e-5)
    assert lr_at(0.5, OptimConfig(base_lr=1e-3, warmup=0), 256) == pytest.approx(5e-4)


def test_parameters_are_grouped_by_decay_and_depth(demo: Path, tmp_path: Path) -> None:
    module = MaeModule(settings("mae", demo, tmp_path))
    config = OptimConfig(vision=VisionOptim(layer_decay=0.5), weight_decay=0.1)
    groups = parameter_groups(module, config)
    names = {id(p): n for n, p in module.named_parameters()}
    where = {names[id(p)]: (g["lr_scale"], g["weight_decay"]) for g in groups for p in g["params"]}
    assert where["towers.vision.patch_embed.proj.weight"] == (0.5**5, 0.1)
    assert where["towers.vision.cls_token"] == (0.5**5, 0.0)
    assert where["towers.vision.blocks.3.mlp.fc1.weight"] == (0.5, 0.1)
    assert where["towers.vision.blocks.0.norm1.weight"] == (0.5**4, 0.0)
    assert where["towers.vision.norm.weight"] == (1.0, 0.0)
    assert where["decoder.mask_token"] == (1.0, 0.0)
    assert len(where) == len(names)


def scales(module: nn.Module, config: OptimConfig) -> dict[str, float]:
    """Scale of each parameter's lr; every trained parameter must be in exactly one group."""
    names = {id(p): name for name, p in module.named_parameters()}
    groups = parameter_groups(module, config)
    scale_of = [(names[id(p)], g["lr_scale"]) for g in groups for p in g["params"]]
    assert len(dict(scale_of)) == len(scale_of)
    return dict(scale_of)


@pytest.mark.parametrize("tune", ["full", "lora"])
def test_each_tower_has_its_own_lr(demo: Path, tmp_path: Path, tune: str) -> None:
    stage = ClipStage(settings("clip", demo, tmp_path, f"text.tune={tune}", "text.lora_rank=2"))
    stage.prepare({}, Parents())
    vision, text = VisionOptim(lr=0.5, layer_decay=0.7), TowerOptim(lr=0.1, layer_decay=0.3)
    module = stage.build(Parents())
    where = scales(module, OptimConfig(vision=vision, text=text, logit_scale_lr=2.0))
    assert where.keys() == {n for n, p in module.named_parameters() if p.requires_grad}
    if tune == "lora":
        texts = {name for name in where if name.startswith("towers.text.")}
        assert texts and all(".lora_" in name for name in texts)
    else:
        assert where["towers.text.llm.embed_tokens.weight"] == pytest.approx(0.1 * 0.3**3)
        assert where["towers.text.llm.norm.weight"] == pytest.approx(0.1)
    assert where["towers.vision.patch_embed.proj.weight"] == pytest.approx(0.5 * 0.7**5)
    assert where["towers.vision.pos_temporal"] == pytest.approx(0.5 * 0.7**5)
    assert where["towers.vision.norm.weight"] == 0.5
    for name, scale in where.items():
        for start, lr, decay, depth in (
            ("towers.vision.blocks.", 0.5, 0.7, 4), ("towers.text.llm.layers.", 0.1, 0.3, 2),
        ):  # fmt: skip
            if name.startswith(start):
                block = int(name.removeprefix(start).split(".")[0])
                assert scale == pytest.approx(lr * decay ** (depth - block)), name
        if not name.startswith("towers."):  # the adapter has blocks too
            assert scale == (2.0 if name == "logit_scale" else 1.0), name
    frozen = OptimConfig(vision=vision, text=TowerOptim(freeze=1))
    set_trained(module, frozen)
    left = {id(p) for group in parameter_groups(module, frozen) for p in group["params"]}
    assert {id(p) for p in module.parameters() if p.requires_grad} == left
    assert not any(p.requires_grad for p in module.towers["text"].parameters())


SIZES = {
    "hidden_size": 8, "num_hidden_layers": 3, "num_attention_heads": 2, "vocab_size": 40,
    "intermediate_size": 8, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 1,
}  # fmt: skip
GPT2 = {"n_embd": 8, "n_layer": 3, "n_head": 2, "vocab_size": 40}
T5 = {"d_model": 8, "d_kv": 4, "d_ff": 8, "num_layers": 3, "num_heads": 2, "vocab_size": 40}
# class: sizes, its blocks, and the modules below the first block
FAMILIES: dict[str, tuple[dict[str, int], Callable[[Any], Any], Callable[[Any], Any]]] = {
    "Bert": (SIZES, lambda m: m.encoder.layer, lambda m: [m.embeddings]),
    "ModernBert": (
        {**SIZES, "cls_token_id": 1, "sep_token_id": 1}, lambda m: m.layers,
        lambda m: [m.embeddings],
    ),
    "Qwen3": (
        {**SIZES, "num_key_value_heads": 2, "head_dim": 4}, lambda m: m.layers,
        lambda m: [m.embed_tokens],
    ),
    "GPT2": (GPT2, lambda m: m.h, lambda m: [m.wte, m.wpe]),
    "T5": (T5, lambda m: m.encoder.block, lambda m: [m.shared]),
}  # fmt: skip


@pytest.mark.parametrize("family", FAMILIES)
def test_layer_decay_finds_the_blocks_of_each_model_family(family: str) -> None:
    sizes, blocks_of, below_of = FAMILIES[family]
    kind = f"{family}EncoderModel" if family == "T5" else f"{family}Model"
    llm = getattr(transformers, kind)(getattr(transformers, f"{family}Config")(**sizes))
    module = nn.Module()
    module.towers = nn.ModuleDict({"text": nn.ModuleDict({"llm": llm})})
    config = OptimConfig(text=TowerOptim(lr=3.0, layer_decay=0.5))
    scales_by_id = {
        id(p): g["lr_scale"] for g in parameter_groups(module, config) for p in g["params"]
    }

    def of(modules: Sequence[nn.Module]) -> set[int]:
        return {id(p) for m in modules for p in m.parameters()}

    blocks = list(blocks_of(llm))
    assert len(blocks) == 3
    expected = dict.fromkeys(scales_by_id, 3.0)  # modules after the last block
    expected |= dict.fromkeys(of(below_of(llm)), 3.0 * 0.5**4)
    for number, block in enumerate(blocks):
        expected |= dict.fromkeys(of([block]), 3.0 * 0.5 ** (3 - number))
    wrong = [n for n, p in llm.named_parameters() if scales_by_id[id(p)] != expected[id(p)]]
    assert not wrong and len(set(scales_by_id.values())) >= 4


def test_a_frozen_group_has_lr_0_until_its_freeze_ends() -> None:
    module = nn.Module()
    module.towers = nn.ModuleDict({"vision": nn.Linear(2, 2), "text": nn.Linear(2, 2)})
    module.head = nn.Linear(2, 2)
    config = OptimConfig(vision=VisionOptim(lr=0.5, freeze=0.4), text=TowerOptim(freeze=0.6))
    groups = parameter_groups(module, config)
    names = {id(p): name.split(".")[-2] for name, p in module.named_parameters()}

    def lrs(progress: float) -> dict[str, float]:
        set_lr(groups, 0.02, progress)
        return {names[id(p)]: group["lr"] for group in groups for p in group["params"]}

    assert lrs(0.0) == lrs(0.399) == {"vision": 0, "text": 0, "head": 0.02}
    assert lrs(0.4) == lrs(0.599) == {"vision": 0.01, "text": 0, "head": 0.02}
    assert lrs(0.6) == {"vision": 0.01, "text": 0.02, "head": 0.02}


def test_logit_scale_has_a_group_and_frozen_parameters_have_none() -> None:
    module = nn.Linear(3, 3)
    module.logit_scale = nn.Parameter(torch.ones(1))
    module.bias.requires_grad_(False)
    groups = parameter_groups(module, OptimConfig())
    assert sorted(len(g["params"]) for g in groups) == [1, 1]
    alone = next(g for g in groups if g["params"][0] is module.logit_scale)
    assert alone["weight_decay"] == 0


def test_lion_equals_its_formula() -> None:
    weight = nn.Parameter(torch.tensor([1.0, -2.0]))
    groups = [{"params": [weight], "lr_scale": 0.5, "freeze": 0.0, "weight_decay": 0.1}]
    config = OptimConfig(name="lion", betas=[0.9, 0.99])
    optimizer = make_optimizer(groups, config)
    w, m = [1.0, -2.0], [0.0, 0.0]
    for grad in ([0.3, -0.2], [-4.0, 0.1]):
        set_lr(optimizer.param_groups, 0.02)
        weight.grad = torch.tensor(grad)
        optimizer.step()
        for i, g in enumerate(grad):
            c = 0.9 * m[i] + 0.1 * g
            w[i] = w[i] * (1 - 0.01 * 0.1) - 0.01 * math.copysign(1, c)
            m[i] = 0.99 * m[i] + 0.01 * g
    assert torch.allclose(weight.detach(), torch.tensor(w), atol=1e-6)
