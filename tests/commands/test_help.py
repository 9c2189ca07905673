"""Help texts: every command has one, and settings come from the config dataclasses."""

from __future__ import annotations

import dataclasses
import importlib
import shlex
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pytest
import typer
from in_process import invoke

from stages import stage_class
from xray.ablations.trials import load_ablation
from xray.commands.evaluate import eval_settings
from xray.commands.help import help_rows
from xray.commands.main import COMMANDS, DATA, DEBUG, app
from xray.config.loading import build, kinds_of, parse_overrides
from xray.recipes.recipe import load_recipe, stage_from_recipe
from xray.version import __version__

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


def test_help_rows_of_a_dataclass() -> None:
    assert list(help_rows(Settings)) == [
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
    assert set(WITH_SETTINGS) == set(DATA) - {"index", "check", "stats", "clean"}


WITH_EXAMPLES = ["run", "train", "eval", "embed", "search", "export", "plan", "ablate", "data pack"]
LINES = [
    (name, line)
    for group, commands in (("", COMMANDS), ("data ", DATA))
    for name, command in ((group + word, command) for word, command in commands.items())
    for line, _ in getattr(command, "examples", ())
]


def parsed(line: str) -> dict[str, Any]:
    """The parameters that a command gets from a line, without running it."""
    words = shlex.split(line)
    words = words[words.index("xray") + 1 :]
    command: Any = typer.main.get_command(app)
    while hasattr(command, "commands"):
        command = command.commands[words.pop(0)]
    return dict(command.make_context("command", words).params)


def test_the_main_commands_have_examples() -> None:
    assert {name for name, _ in LINES} >= set(WITH_EXAMPLES)


@pytest.mark.parametrize(("name", "line"), LINES, ids=[line for _, line in LINES])
def test_examples_parse_and_their_keys_exist(
    name: str, line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert f"xray {name} " in line and len(line) <= 78
    assert f"  {line}\n" in invoke(*name.split(), "-h").output
    (tmp_path / "mine.yaml").write_text("base: quickstart\n")
    monkeypatch.chdir(tmp_path)
    given = parsed(line)
    items = given.get("overrides") or given.get("settings") or []
    if name in ("run", "plan"):
        load_recipe(given.get("recipe") or given["name"], items)
    elif name == "eval":
        eval_settings(items, given["recipe"])
    elif name == "ablate":
        load_ablation(given["file"], items)
    elif name == "train" and given["recipe"]:
        stage_from_recipe(given["stage"], given["recipe"], items)
    elif name == "train":
        schema = stage_class(given["stage"]).Config
        build(schema, parse_overrides(items, kinds_of(schema)))
    elif name == "data pack":
        module, _, config = WITH_SETTINGS["pack"][0].partition(":")
        schema = getattr(importlib.import_module(module), config)
        build(schema, parse_overrides(items, kinds_of(schema)))


def test_wrong_examples_would_be_found() -> None:
    for line in ("xray run", "xray plan small --devices 0", "xray export x --too timm"):
        with pytest.raises(Exception, match=r"(?i)missing|range|greater than|no such option"):
            parsed(line)


@pytest.mark.parametrize("words", [(), ("data",), *ALL], ids=" ".join)
def test_h_is_help(words: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    short = invoke(*words, "-h")
    assert short.exit_code == 0
    assert short.output == invoke(*words, "--help").output
    assert max(map(len, short.output.splitlines())) <= 80
    assert "<bool>" not in short.output and "<str>" not in short.output


def test_options_show_what_they_take() -> None:
    output = invoke("export", "-h").output
    assert "--to FORMAT " in output and "--frames N " in output and "[1 or more]" in output
    assert "--weights WEIGHTS " in output and "[default: last]" in output
    lines = invoke("run", "-h").output.splitlines()
    assert lines[0].endswith(" run [OPTIONS] RECIPE [KEY=VALUE]...")
    assert "  --plan      Print the stages, then stop" in lines  # a flag takes no value
    assert "  DATA...  " in invoke("data", "stats", "-h").output


def test_the_version_is_an_option_and_a_command() -> None:
    for words in (("--version",), ("version",)):
        done = invoke(*words)
        assert (done.exit_code, done.output) == (0, f"{__version__}\n")
