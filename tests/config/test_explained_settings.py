"""Descriptions of settings: every key has a comment, and `xray config` prints it."""

from __future__ import annotations

import dataclasses
import importlib
from dataclasses import dataclass, field
from typing import Any, Literal

import pytest
import yaml
from in_process import invoke

from stages import STAGES, stage_class
from xray.ablations.spec import AblationConfig
from xray.commands.main import COMMANDS, DATA
from xray.config.explain import commented, settings_of, type_in_words
from xray.config.identity import added, identity, runtime
from xray.recipes.settings import explain_key, scopes


@dataclass
class Part:
    """A part with a rate."""

    rate: float = 0.5  # per second


@dataclass
class Whole:
    """Settings of a test."""

    # longer than
    # one line
    name: str = "a b"
    mode: Literal["x", "y"] = "y"  # how
    old: int = added(1)  # of an older run
    free: Part = runtime(factory=Part)  # noqa: RUF009
    parts: dict[str, Part] = field(default_factory=dict)
    many: list[Part] = field(default_factory=list)  # all of them
    one: Part | None = None  # the last one


def commands_with_settings() -> list[type]:
    names = [own.takes[0] for own in {**COMMANDS, **DATA}.values() if hasattr(own, "takes")]
    return [getattr(importlib.import_module(n.split(":")[0]), n.split(":")[1]) for n in names]


def test_settings_of_nested_dataclasses() -> None:
    assert [(own.key, own.meaning, own.role) for own in settings_of(Whole)] == [
        ("name", "longer than one line", "identity"),
        ("mode", "how", "identity"),
        ("old", "of an older run", "added"),
        ("free.rate", "per second", "runtime"),
        ("parts", "A part with a rate.", "identity"),
        ("parts.NAME.rate", "per second", "identity"),
        ("many", "all of them", "identity"),
        ("many.N.rate", "per second", "identity"),
        ("one", "the last one", "identity"),
        ("one.rate", "per second", "identity"),
    ]


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        (int, "integer"),
        (bool | Literal["mlp"], "true or false | mlp"),
        (list[list[float]], "list of lists"),
        (dict[str, float] | None, "NAME: number | null"),
        (dict[str, Any], "keys"),
        (list[Part], "list of sections"),
    ],
)
def test_types_in_words(kind: Any, words: str) -> None:
    assert type_in_words(kind) == words


def test_every_setting_has_a_comment() -> None:
    """A setting that nobody explains cannot be added."""
    every = [(scope, own) for scope, settings in scopes().items() for own in settings]
    for config in [AblationConfig, *commands_with_settings()]:
        every += [(config.__name__, own) for own in settings_of(config)]
    assert [f"{scope}: {own.key}" for scope, own in every if not own.meaning] == []
    assert len({own.key for _, own in every}) > 200


def test_roles_are_those_of_the_identity() -> None:
    """A key marked `runtime` is not in the identity of a run, and any other key is."""
    for stage in STAGES:
        config = stage_class(stage).Config()
        known = identity(config, whole=True)
        for own in settings_of(type(config)):
            if "NAME" in own.key or ".N." in own.key:
                continue
            inside = known
            for part in own.key.split("."):
                inside = inside.get(part, "absent") if isinstance(inside, dict) else inside
            assert (inside == "absent") == (own.role == "runtime"), own.key


def test_a_commented_config_is_the_same_yaml() -> None:
    config = Whole(parts={"a": Part(2.0)}, many=[Part()], one=Part(1e-6))
    lines = list(commented("test", config))
    assert yaml.safe_load("\n".join(lines)) == {"test": dataclasses.asdict(config)}
    assert "  mode: y  # x | y" in lines and "  old: 1  # integer; added" in lines
    assert "    rate: 0.5  # number; runtime" in lines
    assert lines[:4] == ["# Settings of a test.", "test:", "  # longer than one line", lines[3]]


@pytest.mark.parametrize("name", ["clip", "eval"])
def test_config_explain_prints_the_values_of_config(name: str) -> None:
    plain, explained = invoke("config", name), invoke("config", name, "--explain")
    assert plain.exit_code == explained.exit_code == 0
    assert yaml.safe_load(plain.output) == yaml.safe_load(explained.output)
    assert explained.output.count("#") > 2 * plain.output.count(":") - 20


def test_config_of_a_key() -> None:
    done = invoke("config", "data.crop_scale")
    assert done.exit_code == 0
    for words in (
        "smallest and largest area of the random crop",
        "list of numbers",
        "default:  [0.4, 1.0]",
        "stages:   mae, hashtag, text, clip",
        "identity: changes the result",
        "configs/stage/mae.yaml: [0.2, 1.0]",
        "configs/recipe/small.yaml: [0.5, 1.0]; mae: [0.3, 1.0]",
    ):
        assert words in done.output, (words, done.output)
    assert max(map(len, done.output.splitlines())) <= 80


@pytest.mark.parametrize(
    ("given", "key"),
    [
        ("clip.optim.base_lr", "optim.base_lr"),
        ("clip.embed_dim", "clip.embed_dim"),
        ("data.sources.images.tags", "data.sources.NAME.tags"),
        ("data.blocks[0].samples", "data.blocks.N.samples"),
        ("eval.tags.food.field", "eval.tags.NAME.field"),
        ("prepare.llm.width", "prepare.llm.width"),
        ("stages", "stages"),
    ],
)
def test_keys_as_a_user_writes_them(given: str, key: str) -> None:
    found = explain_key(given)
    assert found is not None and {own.key for own in found.scopes.values()} == {key}


def test_defaults_that_differ_by_stage_are_told_apart() -> None:
    output = invoke("config", "text.tune").output
    assert "lora (text)" in output and "none (clip)" in output


def test_config_of_a_section_lists_its_keys() -> None:
    lines = invoke("config", "zero").output.splitlines()
    assert lines[0] == "zero.stage=0" and "zero.overlap=false" in lines
    named = invoke("config", "data.sources.images").output.splitlines()
    assert named[0] == "data.sources.NAME.shards=" and "data.sources.NAME.keep=" in named
    assert invoke("config", "clip.zero").output.splitlines() == lines


@pytest.mark.parametrize(
    ("key", "hint"), [("data.crop_scal", "data.crop_scale"), ("trian.samples", "train.samples")]
)
def test_a_key_that_does_not_exist(key: str, hint: str) -> None:
    done = invoke("config", key)
    assert done.exit_code == 2
    assert f"unknown key {key!r}; did you mean {hint!r}?" in done.stderr
