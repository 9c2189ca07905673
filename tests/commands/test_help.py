"""Help texts: every command has one, and settings come from the config dataclasses."""

from __future__ import annotations

import dataclasses
import importlib
from dataclasses import dataclass, field
from typing import Literal

import pytest
from in_process import invoke

from xray.commands.common import settings_of
from xray.commands.main import COMMANDS, DATA, DEBUG

ALL = [
    *((name,) for name in COMMANDS),
    *(("data", name) for name in DATA),
    *(("debug", n) for n in DEBUG),
]
WITH_SETTINGS = {name: command.takes for name, command in DATA.items() if hasattr(command, "takes")}  # type: ignore[attr-defined]


@dataclass
class Inner:
    rate: float = 20_000.0  # per second


@dataclass
class Base:
    # what is above
    # a field
    name: str = "a b"
    many: list[int] = field(default_factory=lambda: [1, 2])  # behind the last line


@dataclass
class Settings(Base):
    mode: Literal["x", "y"] = "y"  # how
    inner: Inner = field(default_factory=Inner)
    plain: bool = False

    def method(self) -> None:
        local: int = 1  # no field
        assert local


def test_settings_of_a_dataclass() -> None:
    assert list(settings_of(Settings)) == [
        ("name='a b'", "what is above a field"),
        ("many=[1, 2]", "behind the last line"),
        ("mode=y", "x | y; how"),
        ("inner.rate=20000", "per second"),
        ("plain=false", ""),
    ]


@pytest.mark.parametrize("words", ALL, ids=" ".join)
def test_every_command_has_help(words: tuple[str, ...]) -> None:
    done = invoke(*words, "--help")
    assert done.exit_code == 0 and "Usage:" in done.output, done.output
    assert "Settings:" not in done.output  # typed by hand


@pytest.mark.parametrize("name", WITH_SETTINGS)
def test_help_lists_every_setting_with_its_default(name: str) -> None:
    path, given = WITH_SETTINGS[name]
    module, _, config = path.partition(":")
    kind = getattr(importlib.import_module(module), config)
    output = invoke("data", name, "--help").output
    listed = output[output.index("Settings, KEY=VALUE") :].split()
    for own in dataclasses.fields(kind):
        here = [word for word in listed if word.startswith((f"{own.name}=", f"{own.name}."))]
        assert bool(here) == (own.name not in given), own.name


def test_commands_that_take_settings_list_them() -> None:
    assert set(WITH_SETTINGS) == set(DATA) - {"index", "check", "stats"}
