"""Values of overrides: text keys take them as they are given, and wrong kinds are explained."""

from __future__ import annotations

from pathlib import Path

import pytest
from in_process import invoke

from stages.mae_config import MaeConfig
from xray.ablations.spec import read_ablation
from xray.config import dump
from xray.config import loading as cfg
from xray.errors import ConfigError
from xray.recipes.recipe import load_recipe
from xray.search.config import EmbedConfig

TEXTS = [
    "/x/pets #2", "1e3", "007", "0x1F", "on", "off", "no", "1_000", "[pets]", "[pets", "{a: b}",
    "null", "~", "12:30:00", "2020-01-01", "a: b", "x: ", " y ", "- z", "&a", "*", "!tag", "%",
    "1.", "nan",
]  # fmt: skip


def mae(*overrides: str) -> MaeConfig:
    return cfg.load_config(
        MaeConfig, "mae", cfg.parse_overrides(overrides, cfg.kinds_of(MaeConfig))
    )


@pytest.mark.parametrize("text", TEXTS)
def test_a_text_key_takes_the_text_as_given(text: str, tmp_path: Path) -> None:
    config = mae(f"data.root={text}", f"data.sources.a.shards={text}", f"train.wandb={text}")
    assert config.data.root == config.data.sources["a"].shards == config.train.wandb == text
    dump(config, tmp_path / "config.yaml")  # and a resumed run reads the same
    again = cfg.load_config(MaeConfig, "mae", cfg.read_yaml(tmp_path / "config.yaml"))
    assert again == config
    shared = f"data.root={text}", f"mae.data.sources.b.shards={text}", f"name={text}"
    recipe = load_recipe("quickstart", ["stages=[mae]", *shared])
    assert (recipe.root, recipe.name) == (text, text)
    assert recipe.runs[0].data.sources["b"].shards == text
    _, line = read_ablation("stages", [f"data.root={text}"]).common
    assert line == {"data": {"root": text}}


@pytest.mark.parametrize(
    ("text", "value"),
    [('"007"', "007"), ("'a # b'", "a # b"), ("''", ""), ("'a' or 'b'", "'a' or 'b'")],
)
def test_quotes_around_a_whole_text_are_removed(text: str, value: str) -> None:
    assert mae(f"data.root={text}").data.root == value


def test_other_keys_are_read_as_yaml() -> None:
    config = mae("seed=0007", "optim.base_lr=1e-3", "data.flip=off", "data.lanes=null",
                 "model.kwargs.depth=4", "data.resolution=[[0.0, 96], [0.5, 128]]",
                 "data.modalities=[image]", "model.grad_checkpointing=mlp")  # fmt: skip
    assert (config.seed, config.optim.base_lr, config.data.flip) == (7, 1e-3, False)
    assert config.data.lanes is None and config.model.kwargs["depth"] == 4
    assert config.data.resolution == [[0.0, 96], [0.5, 128]]
    assert config.data.modalities == ["image"] and config.model.grad_checkpointing == "mlp"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "stage.mask_ratoi=0.5",
            r"^unknown key 'stage\.mask_ratoi'; did you mean 'mae\.mask_ratio'",
        ),
        ("stage.zzz=0.5", r"^unknown key 'stage\.zzz': write mae\.KEY=VALUE"),
        ("stage=clip", r"^stage=clip: the stage to train is mae"),
        ("seed={x: 3}", r"^seed: give a whole number, not {'x': 3}$"),
        ("seed.x=3", r"^seed: give a whole number, not {'x': 3}$"),
        ("data.flip=perhaps", r"^data\.flip: give true or false, not 'perhaps'$"),
        ("optim.base_lr=fast", r"^optim\.base_lr: give a number, not 'fast'$"),
        ("optim.betas=[a, b]", r"^optim\.betas\[0\]: give a number, not 'a'$"),
        (
            "data.modalities=image",
            r"^data\.modalities: give a list, such as \[1, 2\], not 'image'$",
        ),
        ("data.sources=3", r"^data\.sources: give sections of keys, as KEY\.NAME={\.\.\.}, not 3$"),
        ("train=3", r"^train: give sections of keys, as KEY\.NAME={\.\.\.}, not 3$"),
        ("model.reduce=off", r"^model\.reduce: give none or evit or tome or random, not 'off'$"),
        ("model.keep_rates=1", r"^model\.keep_rates: give a list, such as \[1, 2\], not 1$"),
        (
            "model.grad_checkpointing=5",
            r"^model\.grad_checkpointing: give true or false or mlp, not",
        ),
        (
            "data.sources.a.captions={x: y}",
            r"^data\.sources\.a\.captions\.x: give a number, not 'y'$",
        ),
    ],
)  # fmt: skip
def test_a_wrong_kind_is_explained_in_plain_words(override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        mae(override)


def test_commands_take_texts_as_given(tmp_path: Path) -> None:
    root = tmp_path / "pets #2"
    (root / "b").mkdir(parents=True)
    given = [f"data.root={root}", "data.sources.a.shards=1e3", "data.sources.b.shards=b"]
    blocks = "data.blocks=[{source: a, samples: 4}, {source: b, samples: 4}]"
    done = invoke("train", "mae", *given, blocks, "train.samples=8")
    assert done.exit_code == 2 and f"{root}/1e3 does not exist" in done.stderr
    done = invoke("train", "mae", "stage.mask_ratoi=0.5")
    assert done.exit_code == 2 and "did you mean 'mae.mask_ratio'" in done.stderr
    parsed = cfg.parse_overrides(["dtype=1e3"], cfg.kinds_of(EmbedConfig))
    assert parsed == {"dtype": "1e3"}
