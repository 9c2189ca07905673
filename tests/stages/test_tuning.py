"""Training of a part of the image tower: which one, in which stages, and with what result."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from clip_runs import parts_equal
from export_checks import normalised, pixels_of
from in_process import invoke
from run_comparison import assert_same, assert_same_losses
from tiny import ALL_TOKENS, settings, train
from torch import nn
from two_process import halfway

from stages.tuning import parameter_counts, set_trained
from xray.artifacts.artifact import open_artifact
from xray.config import ModelConfig, OptimConfig, VisionOptim
from xray.errors import ConfigError
from xray.models import VisionBackbone
from xray.training.checkpoint_export import choose, export_checkpoint, find_run
from xray.training.portable_state import read_weights

LORA = ("optim.vision.tune=lora", "optim.vision.lora_rank=2", "optim.vision.lora_alpha=4")
ADDED = {"pos_temporal"}  # beside what timm's model has
TOWER = {"patch_size": 8, "embed_dim": 32, "depth": 4, "num_heads": 2}


def tuned(tune: str, name: str = "vit_tiny_patch16_224", **kwargs: Any) -> VisionBackbone:
    """A tower without values, of which a part is trained."""
    with torch.device("meta"):
        tower = VisionBackbone(ModelConfig(name=name, kwargs=kwargs), 224, 4)
    module = nn.Module()
    module.towers = nn.ModuleDict({"vision": tower})
    set_trained(module, OptimConfig(vision=VisionOptim(tune=tune)))
    return tower


def trained_names(tower: nn.Module) -> set[str]:
    return {name for name, p in tower.named_parameters() if p.requires_grad}


def names_in(tower: nn.Module, kind: type[nn.Module], ending: str = "") -> set[str]:
    """Names of the parameters of all modules of a kind."""
    return {
        f"{where}.{name}"
        for where, module in tower.named_modules()
        if isinstance(module, kind)
        for name, _ in module.named_parameters(recurse=False)
        if name.endswith(ending)
    }


def test_the_trained_part_is_the_one_that_is_named() -> None:
    biases = names_in(tuned("full", **TOWER), nn.Module, "bias")
    norms = names_in(tuned("full", **TOWER), nn.LayerNorm)
    assert len(biases) == 4 * 6 + 2 and len(norms) == 2 * (4 * 2 + 1)
    assert trained_names(tuned("bias", **TOWER)) == biases | ADDED
    assert trained_names(tuned("norm", **TOWER)) == norms | ADDED
    every = {name for name, _ in tuned("full", **TOWER).named_parameters()}
    assert trained_names(tuned("full", **TOWER)) == every
    assert trained_names(tuned("none", **TOWER)) == set()
    top = {n for n in every if n.startswith(("blocks.2.", "blocks.3.", "norm."))}
    assert trained_names(tuned("last:2", **TOWER)) == top
    with pytest.raises(ConfigError, match=r"tune=last:5.*only 4 blocks"):
        tuned("last:5", **TOWER)
    # SigLIP's tower gets a CLS token, which its weights lack
    siglip = tuned("norm", "vit_base_patch16_siglip_224", **TOWER)
    assert {"cls_token", "pos_temporal"} <= trained_names(siglip)


def test_lora_of_rank_8_is_a_fiftieth_of_vit_s() -> None:
    tower = tuned("lora", "vit_small_patch16_224")
    lora = trained_names(tower) - ADDED
    assert lora == {
        f"blocks.{block}.attn.{layer}.{matrix}"
        for block in range(12)
        for layer in ("qkv", "proj")
        for matrix in ("lora_a", "lora_b")
    }
    module = nn.Module()
    module.towers = nn.ModuleDict({"vision": tower})
    count = parameter_counts(module, dict(module.named_parameters()))["vision"]
    assert count["trained"] <= 0.02 * count["all"]
    assert count["trained"] == 12 * 8 * (384 + 1152 + 384 + 384) + 384  # positions of a 2nd slot


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("tune=lroa",), r"optim\.vision\.tune=lroa must be full, .* last:N.*did you mean"),
        (("tune=last:0",), r"optim\.vision\.tune=last:0 must be"),
        (("tune=bias", "freeze=1"), r"optim\.vision\.freeze=1 and tune=bias contradict"),
        (("tune=lora", "lora_rank=0"), r"optim\.vision: lora_rank=0"),
        (("lora_rank=4",), r"optim\.vision\.lora_rank=4 does nothing with .*tune=full"),
    ],
)
def test_impossible_settings_are_refused(
    tmp_path: Path, overrides: tuple[str, ...], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        settings("mae", tmp_path, tmp_path, *(f"optim.vision.{each}" for each in overrides))


@pytest.fixture(scope="module")
def parent(trained: Callable[..., Path]) -> Path:
    return trained("mae", ALL_TOKENS, "train.samples=24")


@pytest.fixture(scope="module")
def adapted(trained: Callable[..., Path], parent: Path) -> Callable[..., Path]:
    """Train a stage with LoRA from the mae artifact, and return the run's folder."""

    def run(stage: str, *more: str) -> Path:
        return trained(stage, ALL_TOKENS, *LORA, *more, init_from=(parent,)).parent

    return run


@pytest.mark.parametrize("stage", ["mae", "hashtag", "clip"])
def test_each_stage_writes_a_plain_backbone(
    parent: Path, adapted: Callable[..., Path], stage: str
) -> None:
    artifact = open_artifact(adapted(stage) / "artifact")
    before, after = (each.load("backbone") for each in (open_artifact(parent), artifact))
    assert before.keys() == after.keys()
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    expected = {f"blocks.{n}.attn.{layer}.weight" for n in range(4) for layer in ("qkv", "proj")}
    assert moved == expected | ADDED
    count = artifact.manifest["parameters"]["vision"]
    lora = 4 * 2 * (32 + 96 + 32 + 32)  # blocks, rank, inputs and outputs of both layers
    assert count["all"] == sum(value.numel() for value in after.values()) + lora
    assert count["trained"] == lora + after["pos_temporal"].numel()
    share = f"trained {100 * count['trained'] / count['all']:.3g} % of the backbone's parameters"
    assert share in (artifact.path / "README.md").read_text()


def test_the_merged_artifact_has_the_features_of_the_run(
    demo: Path, tmp_path: Path, adapted: Callable[..., Path]
) -> None:
    """Also after an export to timm, and for averaged weights."""
    folder = adapted("hashtag", "train.ema=0.9")
    run = find_run(folder, {})
    checkpoint = choose(folder, "last", run.config.train)
    for weights in ("last", "ema"):
        module: Any = run.build()
        own = dict(module.named_parameters())
        for name, value in read_weights(checkpoint, None if weights == "last" else weights).items():
            own[name].data.copy_(value)
        path, out = tmp_path / weights, tmp_path / f"timm_{weights}"
        artifact = export_checkpoint(folder, "last", path, weights, {})  # type: ignore[arg-type]
        done = invoke("export", path, "--to", "timm", "--out", out)
        assert done.exit_code == 0, done.stderr
        theirs = timm.create_model(f"local-dir:{out}", pretrained=True).eval()
        pixels = normalised(pixels_of(demo), artifact)
        with torch.no_grad():
            expected = module.vision.eval()(pixels[:, None], 1.0).cls
            features = theirs(pixels)
        torch.testing.assert_close(features, expected, rtol=0, atol=1e-5)
        assert any(p.any() for name, p in own.items() if name.endswith("lora_b"))


def test_a_resumed_run_is_bit_equal(
    demo: Path, tmp_path: Path, parent: Path, adapted: Callable[..., Path]
) -> None:
    whole = adapted("clip")
    out = halfway(whole, tmp_path / "run")
    train("clip", demo, out, ALL_TOKENS, *LORA, init_from=[parent])
    assert_same(whole, out, exact=True)
    with pytest.raises(ConfigError, match=r"contains another run: config\.optim\.vision"):
        train("clip", demo, out, ALL_TOKENS, "optim.vision.tune=bias", init_from=[parent])


def test_a_part_of_a_tower_with_random_weights_is_warned_about(
    demo: Path, tmp_path: Path, parent: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", logger="xray")
    some = "optim.vision.tune=last:1", "train.samples=12"
    train("mae", demo, tmp_path / "adapted", *some, init_from=[parent])
    assert "trains vision 12,768 of 63,808 (20 %), other " in caplog.text
    assert "random" not in caplog.text
    train("mae", demo, tmp_path / "scratch", *some)
    assert "leaves weights of the image tower as they start, at random" in caplog.text


# Beside LoRA: towers that unfreeze, averaged weights and an auxiliary loss.
MUCH = ("train.samples=36", "optim.vision.layer_decay=0.7", "optim.vision.freeze=0.3",
        "train.ema=0.9", "train.export=ema", "clip.mae_weight=0.5", "mae.decoder_dim=32",
        "mae.decoder_depth=1", "mae.decoder_heads=2")  # fmt: skip
SHARDED = "zero.deepspeed.zero_optimization.stage3_param_persistence_threshold=0"


@pytest.mark.parametrize(
    "changes",
    [
        ("zero.stage=1", "train.micro_batch=4"),
        ("zero.stage=2", "model.grad_checkpointing=mlp"),
        ("zero.stage=3", "model.grad_checkpointing=true", SHARDED),
    ],
)
def test_zero_stages_and_the_gradient_cache_change_nothing(
    demo: Path,
    tmp_path: Path,
    parent: Path,
    adapted: Callable[..., Path],
    changes: Iterable[str],
) -> None:
    plain = adapted("clip", *MUCH)
    other = train("clip", demo, tmp_path, ALL_TOKENS, *LORA, *MUCH, *changes, init_from=[parent])
    assert_same_losses(plain, tmp_path, 3)
    for part in ("backbone", "head"):
        one = open_artifact(plain / "artifact").load(part)
        for name, value in other.load(part).items():
            torch.testing.assert_close(value, one[name], rtol=0, atol=2e-3, msg=name)


def test_none_is_a_tower_that_is_frozen_for_the_whole_stage(clip_run: Callable[..., Path]) -> None:
    """Also beside settings that only matter to a tower in training."""
    frozen = open_artifact(clip_run("optim.vision.freeze=1") / "artifact")
    none = ("optim.vision.tune=none", "optim.vision.freeze=0.2", "optim.vision.lr=0.1")
    artifact = open_artifact(clip_run(*none) / "artifact")
    assert all(parts_equal(frozen.load(p), artifact.load(p)) for p in ("backbone", "head"))
    assert artifact.manifest["parameters"]["vision"]["trained"] == 0


def test_no_gradient_reaches_the_blocks_below_the_last(demo: Path, tmp_path: Path) -> None:
    tower = tuned("last:1", **TOWER).to_empty(device="cpu")
    with torch.no_grad():
        for parameter in tower.parameters():
            parameter.normal_(std=0.02)
    seen: list[bool] = []
    for block in tower.blocks.children():
        block.register_forward_hook(lambda *given: seen.append(given[2].requires_grad))
    out = tower.train()(torch.randn(2, 1, 3, 224, 224))
    assert seen == [False] * 3 + [True]
    F.normalize(out.cls, dim=-1)[:, 0].sum().backward()
    assert all(p.grad is not None for p in tower.parameters() if p.requires_grad)
