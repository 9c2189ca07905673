from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from tiny import settings
from torch import nn

from stages.mae import MaeModule
from xray.config import OptimConfig, TowerOptim
from xray.optim import lr_at, make_optimizer, parameter_groups, set_lr


def test_lr_is_scaled_by_the_batch_and_warms_up_and_decays() -> None:
    config = OptimConfig(base_lr=1e-3, warmup=0.1, min_lr=0.01)
    assert lr_at(0.05, config, 512) == pytest.approx(1e-3)
    assert lr_at(0.1, config, 512) == pytest.approx(2e-3)
    assert lr_at(0.55, config, 512) == pytest.approx(2e-3 * (0.01 + 0.99 * 0.5))
    assert lr_at(1.0, config, 512) == pytest.approx(2e-5)
    assert lr_at(0.5, OptimConfig(base_lr=1e-3, warmup=0), 256) == pytest.approx(5e-4)


def test_groups_by_decay_and_depth(demo: Path, tmp_path: Path) -> None:
    module = MaeModule(settings("mae", demo, tmp_path))
    config = OptimConfig(vision=TowerOptim(layer_decay=0.5), weight_decay=0.1)
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


def test_logit_scale_is_alone_and_frozen_parameters_are_left_out() -> None:
    module = nn.Linear(3, 3)
    module.logit_scale = nn.Parameter(torch.ones(1))
    module.bias.requires_grad_(False)
    groups = parameter_groups(module, OptimConfig())
    assert sorted(len(g["params"]) for g in groups) == [1, 1]
    alone = next(g for g in groups if g["params"][0] is module.logit_scale)
    assert alone["weight_decay"] == 0


def test_lion_by_hand() -> None:
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
