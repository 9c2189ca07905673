"""Tests of compiled blocks: few graphs for all their inputs, and equal results."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from unittest.mock import patch

import pytest
import timm.layers
import torch
import torch._dynamo
from timm.layers.drop import drop_path
from torch import Tensor, nn
from torch._dynamo.utils import counters

from xray.config import ModelConfig, TextConfig
from xray.errors import ConfigError
from xray.models import VisionBackbone, timm_vit
from xray.models.compilation import compile_blocks, explained_limit
from xray.models.drop_path import DropPath
from xray.models.lora import add_lora
from xray.models.mae_decoder import MaeDecoder
from xray.models.text_tower import TextTower

LEVELS = (0.96, 0.92, 0.88, 0.85, 0.81, 0.77, 0.74, 0.7)
DEEP = {"depth": 12, "embed_dim": 64, "num_heads": 2}


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    """Forget compiled code, and the settings that compile_blocks changes."""
    limits = "recompile_limit", "fail_on_recompile_limit_hit"
    before = {name: getattr(torch._dynamo.config, name) for name in limits}
    torch._dynamo.reset()
    counters.clear()
    yield
    for name, value in before.items():
        setattr(torch._dynamo.config, name, value)
    torch._dynamo.reset()


def graphs() -> int:
    return counters["stats"]["unique_graphs"]


def backbone(reduce: str = "evit", drop_path: float = 0.1) -> VisionBackbone:
    torch.manual_seed(0)
    kwargs = dict(DEEP) if reduce == "evit" else {**DEEP, "depth": 6}
    config = ModelConfig(kwargs=kwargs, drop_path=drop_path, reduce=reduce)  # type: ignore[arg-type]
    return VisionBackbone(config, 64, 4)


def run(model: VisionBackbone, frames: int = 1, rate: float = 1.0, batch: int = 4) -> Tensor:
    """Run a forward pass, with a backward pass if gradients are on; return the output."""
    torch.manual_seed(batch + frames)
    tokens = model(torch.randn(batch, frames, 3, 64, 64), rate)
    if torch.is_grad_enabled():
        tokens.cls.square().sum().backward()
    return torch.cat([tokens.cls[:, None], tokens.patches], dim=1).detach()


def run_everything(model: VisionBackbone, levels: tuple[float, ...]) -> list[Tensor]:
    """Run what a run does: images and clips, the gradient cache's first pass, keep rates,
    another micro-batch, and validation."""
    outputs = []
    for frames in (1, 4):
        outputs.append(run(model.train(), frames))
        with torch.no_grad():
            outputs.append(run(model, frames))
        outputs += [run(model, frames, rate) for rate in levels]
        outputs.append(run(model, frames, batch=3))
        with torch.no_grad():
            outputs.append(run(model.eval(), frames))
    return outputs


@pytest.mark.parametrize(
    ("reduce", "levels", "most"),
    [("evit", LEVELS, 12), ("random", LEVELS[1::4], 12), ("tome", LEVELS[1::4], 24)],
)
def test_few_graphs_serve_all_inputs(reduce: str, levels: tuple[float, ...], most: int) -> None:
    with patch.object(torch.compiler, "is_compiling", lambda: True):  # draws as compiled code does
        expected = run_everything(backbone(reduce), levels)
    model = backbone(reduce)
    compile_blocks(model, "eager")
    for one, other in zip(run_everything(model, levels), expected, strict=True):
        assert torch.allclose(one, other, atol=1e-5)
    assert not counters["graph_break"] and not counters["unimplemented"]
    assert 0 < graphs() <= most


def test_blocks_with_recomputed_mlps_share_graphs() -> None:
    outputs = []
    for compiled in (False, True):
        model = backbone(drop_path=0.0).train()
        model.set_grad_checkpointing("mlp")
        if compiled:
            compile_blocks(model, "aot_eager")
        outputs.append([run(model), run(model, rate=0.7), model.cls_token.grad])
    for one, other in zip(*outputs, strict=True):
        assert torch.allclose(one, other, atol=1e-5)
    assert 0 < graphs() <= 5 and not counters["graph_break"]


def test_blocks_with_lora_share_graphs() -> None:
    outputs = []
    for compiled in (False, True):
        model = backbone(drop_path=0.0).train()
        add_lora(model, 2, 4)
        if compiled:
            compile_blocks(model, "eager")
        last = model.get_parameter("blocks.11.attn.qkv.lora_b")
        outputs.append([run(model), run(model, rate=0.7), last.grad])
    for one, other in zip(*outputs, strict=True):
        assert one.any() and torch.allclose(one, other, atol=1e-5)
    assert 0 < graphs() <= 5 and not counters["graph_break"]


def test_timms_drop_path_would_be_compiled_for_each_block() -> None:
    """The count above depends on the probability being no constant."""
    with patch.object(timm_vit, "replace_drop_path", lambda vit: None):
        model = backbone()
    compile_blocks(model, "eager")
    run(model.train())
    assert graphs() >= DEEP["depth"]


def test_too_many_compilations_are_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    with patch.object(timm_vit, "replace_drop_path", lambda vit: None):
        model = backbone()
    compile_blocks(model, "eager")
    monkeypatch.setattr(torch._dynamo.config, "recompile_limit", 8)
    with (
        pytest.raises(ConfigError, match=r"compiled 64 times.*Set train.compile=false"),
        explained_limit(),
    ):
        run(model.train())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("drop_prob", [0.0, 1 / 110, 0.1, 0.3])
def test_drop_path_draws_timms_numbers(drop_prob: float, dtype: torch.dtype) -> None:
    """In eager mode, and as compiled code without the compiler's own random numbers."""
    module, x = DropPath(drop_prob), torch.randn(37, 5, 4).to(dtype)
    compiled = torch.compile(module, backend="eager")
    for training in (True, False):
        module.train(training)
        torch.manual_seed(1)
        expected = drop_path(x, drop_prob, training)
        for call in (module, compiled):
            torch.manual_seed(1)
            assert torch.equal(call(x), expected)


def test_drop_path_keeps_its_probability_when_weights_are_loaded_later() -> None:
    with torch.device("meta"):
        module = DropPath(0.1)
    assert module.to_empty(device="cpu").keep_prob.item() == 0.9


def test_drop_path_is_no_weight() -> None:
    model = backbone()
    ours = [m for m in model.modules() if isinstance(m, timm.layers.DropPath)]
    assert len(ours) == 24 and all(isinstance(m, DropPath) for m in ours)
    assert model.state_dict().keys() == backbone(drop_path=0.0).state_dict().keys()


def test_decoder_shares_graphs_for_images_and_clips() -> None:
    torch.manual_seed(0)
    decoder = MaeDecoder(8, 24, 32, 4, 2)
    inputs = [
        (torch.randn(2, 8), torch.randn(2, 4, 8), torch.arange(n).expand(2, -1), (n // 16, 4, 4))
        for n in (16, 32, 48)
    ]
    expected = [decoder(*one) for one in inputs]
    compile_blocks(decoder, "eager")
    for one, other in zip(inputs, expected, strict=True):
        assert torch.allclose(decoder(*one), other, atol=1e-5)
    assert graphs() == 2  # the first number of tokens, then any


@pytest.mark.parametrize("rank", [0, 4])
def test_layers_of_the_language_model_share_graphs(demo: Path, rank: int) -> None:
    tune = "lora" if rank else "full"
    config = TextConfig(tune=tune, lora_rank=rank, lora_dropout=0.0, max_length=32)
    tower = TextTower(config, demo / "llm")
    assert len(tower.layers) == 2
    inputs = []
    for length in (7, 12, 20):
        mask = torch.ones(3, length, dtype=torch.long)
        mask[1, 5:] = 0
        inputs.append((torch.arange(length).expand(3, -1) + 3, mask, mask))
    expected = [tower(*one) for one in inputs]
    compile_blocks(nn.ModuleList([tower]), "eager")
    for one, other in zip(inputs, expected, strict=True):
        actual = tower(*one)
        assert torch.allclose(actual, other, atol=1e-5)
        actual.sum().backward()
    assert 0 < graphs() <= 3 * len(tower.layers)
    assert not counters["graph_break"], counters["graph_break"]
