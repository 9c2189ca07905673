"""Configs: layers, overrides, errors that name the key, and the identity hash."""

from __future__ import annotations

from pathlib import Path

import pytest

from stages.mae_config import MaeConfig
from xray.config import dump
from xray.config import loading as cfg
from xray.config.identity import config_hash
from xray.errors import ConfigError


def mae(*overrides: str) -> MaeConfig:
    return cfg.load_config(MaeConfig, "mae", cfg.parse_overrides(overrides))


def test_later_layers_override_earlier_ones() -> None:
    config = mae("optim.base_lr=0.5", "model=vit_b16", "model.keep_rate=0.5")
    assert config.optim.base_lr == 0.5  # over configs/stage/mae.yaml
    assert config.optim.betas == [0.9, 0.95]  # from it
    assert config.model.name == "vit_base_patch16_224"
    assert config.model.keep_rate == 0.5


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("optim.base_lrr=1", "did you mean 'optim.base_lr'"),
        ("optm.base_lr=1", "did you mean 'optim'"),
        ("train.samples=many", "train.samples"),
        ("optim.name=sgd", "optim.name"),
        ("model=vit_b17", "did you mean 'vit_b16'"),
        ("samples", "KEY=VALUE"),
        ("optim.betas=1", r"optim.betas: give a list, such as \[1, 2\]"),
        ("model.name=", "model.name: give a value"),
    ],
)
def test_mistakes_name_the_key(override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        mae(override)


@pytest.mark.parametrize(
    ("given", "value"),
    [
        ("query: ", "query: "),
        ("query: what is", "query: what is"),
        ('"query: "', "query: "),
        ("two words ", "two words "),
        ("{query: 1}", {"query": 1}),
        ("[a, b]", ["a", "b"]),
        (" 1e-3", 1e-3),
        ("a=b", "a=b"),
        ("null", None),
    ],
)
def test_text_values_are_kept_unchanged(given: str, value: object) -> None:
    assert cfg.parse_overrides([f"text.prompt={given}"]) == {"text": {"prompt": value}}


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("optim.base_lr=-1", "optim.base_lr=-1.0 must be 0 or more"),
        ("optim.weight_decay=-0.1", "optim.weight_decay=-0.1 must be 0 or more"),
        ("optim.betas=[0.9,1.0]", r"optim.betas=\[0.9, 1.0\] must be two numbers in \[0, 1\)"),
        ("optim.eps=0", "optim.eps=0.0 must be above 0"),
    ],
)
def test_impossible_optimizers_are_refused(override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        mae(override).optim.validate()


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.save_every=-1", r"train.save_every=-1 must be 0 \(off\) or more"),
        ("train.log_every=-5", r"train.log_every=-5 must be 0 \(off\) or more"),
        ("train.keep_checkpoints=0", "train.keep_checkpoints=0 must be at least 1"),
    ],
)
def test_impossible_intervals_are_refused(override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        mae("train.samples=8", override).train.validate()


def test_naming_a_model_drops_the_previous_models_kwargs() -> None:
    from xray.recipes.recipe import load_recipe

    (run,) = load_recipe("quickstart", ["stages=[mae]", "model=vit_s16"]).runs
    assert run.model.name == "vit_small_patch16_224" and run.model.kwargs == {}
    (run,) = load_recipe("quickstart", ["stages=[mae]", "model.kwargs.depth=2"]).runs
    assert run.model.kwargs["depth"] == 2 and run.model.kwargs["embed_dim"] == 96


def test_runtime_fields_are_not_hashed() -> None:
    base = config_hash(mae())
    assert config_hash(mae("train.save_in_background=true")) == base
    assert config_hash(mae("data.workers=7", "train.micro_batch=2", "zero=2")) == base
    assert config_hash(mae("mae.mask_ratio=0.6")) != base


def test_a_dumped_config_loads_as_the_same_config(tmp_path: Path) -> None:
    config = mae("model=vit_s16", "data.sources.a.shards=x", "train.samples=5")
    dump(config, tmp_path / "config.yaml")
    again = cfg.load_config(MaeConfig, "mae", cfg.read_yaml(tmp_path / "config.yaml"))
    assert again == config


NEEDED = {name: ["text.llm=there"] for name in ("one_gpu", "real_pretrained", "small")}
NEEDED["adapt"] = ["text.llm=there", "model.pretrained=timm"]


def test_every_shipped_yaml_is_valid() -> None:
    from stages import STAGES, stage_class
    from xray.recipes.recipe import load_recipe

    for stage in STAGES:
        cfg.load_config(stage_class(stage).Config, stage)
    for name in cfg.shipped("recipe"):
        recipe = load_recipe(name, ["data.root=somewhere", *NEEDED.get(name, [])])
        assert recipe.runs, name
    with pytest.raises(ConfigError, match=r"^text\.llm is not set"):  # clip.text.llm refers to it
        load_recipe("real_pretrained", ["data.root=somewhere"])


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ([], "data.blocks"),
        (["data.blocks=[{source: a, samples: 4}]"], "data.sources"),
        (
            ["data.sources.a.shards=x", "data.blocks=[{source: b, samples: 4}]"],
            "did you mean|data.sources has",
        ),
        (["data.sources.a.shards=x", "data.blocks=[{source: a, samples: 4}]"], "train.samples"),
    ],
)
def test_rules_across_fields_are_checked(overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        mae(*overrides).validate()


@pytest.mark.parametrize(("steps", "every"), [(1, 1), (19, 1), (60, 3), (199, 9), (5000, 10)])
def test_a_short_run_logs_at_least_twenty_lines(steps: int, every: int) -> None:
    source = (
        "data.sources={a: {shards: x, modality: image}}",
        "data.blocks=[{source: a, samples: 8}]",
    )
    config = mae(*source, f"train.samples={8 * steps}")
    assert config.train.log_every is None and config.log_every == every
    assert steps // config.log_every >= min(steps, 20)
    asked = mae(f"train.samples={8 * steps}", "train.log_every=50")
    assert asked.log_every == 50 and mae("train.log_every=0").log_every == 0
