"""README and docs are true: code runs, commands and options exist, links and anchors resolve."""

from __future__ import annotations

import re
import shlex
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
import yaml

from xray.commands.main import app

ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "README.md"
DOCS = ROOT / "docs"
PAGES = [README, *sorted({*DOCS.rglob("*.md")} - {*DOCS.glob("results/**/*.md")})]
MOST_LINES = 150
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
LINK = re.compile(r"\]\(([^()\s]+)\)")
WEB = ("https://", "http://")
# The part of a shell line that comes before the arguments of `xray`.
LAUNCHED = re.compile(r"^(?:\w+=\S+ )*(?:torchrun .*-m |python -m )?xray (?=[a-z])")
LAUNCHER = re.compile(r"^(?:\w+=\S+ )*(?:sbatch .*)?tools/launch/\w+\.(?:sh|sbatch) (?=[a-z])")
FILE = re.compile(
    r"\b(?:xray|stages|data_pipelines|configs|tools|tests|docs)/[\w./-]+"
    r"\.(?:py|ya?ml|md|json|csv|png|sh|sbatch)\b"
)
MODULE = re.compile(r"-m ((?:tools|data_pipelines)\.[\w.]*\w)")
OPTION = re.compile(r"^\[?(--?[a-z][\w-]*)")

each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))


def blocks(text: str, language: str) -> list[str]:
    """The fenced blocks of a page in a language; "" = blocks without one, which are shell."""
    return [body for name, body in FENCE.findall(text) if name == language]


def prose(text: str) -> str:
    """A page without its code."""
    return re.sub(r"`[^`]*`", "", FENCE.sub("", text))


def commands(text: str) -> Iterator[list[str]]:
    """Arguments of each `xray` call in the shell blocks and the code spans of a page."""
    lines = "".join(blocks(text, "")).replace("\\\n", " ").splitlines()
    spans = re.findall(r"`([^`]+)`", FENCE.sub("", text))
    for line in [*lines, *(" ".join(span.split()) for span in spans)]:
        call = LAUNCHED.match(line) or LAUNCHER.match(line)
        if call:
            yield shlex.split(line[call.end() :], comments=True)


def mistake(arguments: list[str]) -> str:
    """The first command or option of a call that does not exist; "" if all exist."""
    command: Any = typer.main.get_command(app)
    rest = list(arguments)
    while hasattr(command, "commands") and rest and not rest[0].startswith("-"):
        name = rest.pop(0)
        if name == "...":  # any of its commands
            return ""
        if name not in command.commands:
            return name
        command = command.commands[name]
    options = {"--help"}
    for parameter in command.params:
        options |= {*parameter.opts, *parameter.secondary_opts}
    found = (OPTION.match(item) for item in rest)
    return next((match[1] for match in found if match and match[1] not in options), "")


def anchors(text: str) -> set[str]:
    """The anchors that GitHub gives the headings of a page."""
    found: set[str] = set()
    for heading in re.findall(r"^#+ (.+)$", FENCE.sub("", text), re.MULTILINE):
        plain = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).lower()
        slug = re.sub(r"[^\w\- ]", "", plain).strip().replace(" ", "-")
        copies = (f"{slug}-{number}" for number in range(1, 100))
        found.add(slug if slug not in found else next(c for c in copies if c not in found))
    return found


def broken_links(page: Path, text: str) -> list[str]:
    """The links of a page whose file or anchor does not exist."""
    broken = []
    for link in LINK.findall(prose(text)):
        if link.startswith(WEB):
            continue
        name, _, anchor = link.partition("#")
        target = page.parent / name if name else page
        exists = target.is_file()
        if not exists or (anchor and anchor not in anchors(target.read_text() if name else text)):
            broken.append(link)
    return broken


@each_page
def test_links_resolve(page: Path) -> None:
    assert broken_links(page, page.read_text()) == []


@each_page
def test_commands_and_options_exist(page: Path) -> None:
    calls = list(commands(page.read_text()))
    assert [(" ".join(call), wrong) for call in calls if (wrong := mistake(call))] == []


@each_page
def test_blocks_parse(page: Path) -> None:
    text = page.read_text()
    assert {name for name, _ in FENCE.findall(text)} <= {"", "python", "yaml", "mermaid"}
    assert text.count("```") == 2 * len(FENCE.findall(text))
    for code in blocks(text, "python"):
        compile(code, str(page), "exec")
    for content in blocks(text, "yaml"):
        assert isinstance(yaml.safe_load(content), dict)


@each_page
def test_files_that_are_named_exist(page: Path) -> None:
    text = page.read_text()
    named = {name for name in FILE.findall(text) if "NAME" not in name}
    named |= {f"{name.replace('.', '/')}.py" for name in MODULE.findall(text)}
    assert {name for name in named if not (ROOT / name).is_file()} == set()


def test_the_checks_find_mistakes() -> None:
    text = """# A page: `one`
[there](docs/data.md#shards) [gone](docs/none.md) [no heading](docs/data.md#none)
[here](#a-page-one)
```
torchrun --nproc_per_node 8 -m xray run mine.yaml --plam   # --not-this
xray data index A \\
    --checksums
NNODES=2 tools/launch/torchrun.sh rum mine.yaml
xray plan RECIPE [--devices N] [--gb 80] [--tag N]
xray eval A --suite knn
```
`xray trai` and `xray data ...`, `xray search X --html Y`
"""
    assert broken_links(README, text) == ["docs/none.md", "docs/data.md#none"]
    found = [mistake(call) for call in commands(text)]
    assert found == ["--plam", "--checksums", "rum", "--tag", "", "trai", "", ""]


def test_the_readme_shows_the_main_commands() -> None:
    shown = {call[0] for call in commands(README.read_text())}
    assert {"run", "data", "eval"} <= shown
    everywhere = {call[0] for page in PAGES for call in commands(page.read_text())}
    assert set(typer.main.get_command(app).commands) - {"version"} <= everywhere  # type: ignore[attr-defined]


def test_the_readme_is_short() -> None:
    assert len(README.read_text().splitlines()) <= MOST_LINES


def test_every_page_is_linked_from_the_readme_or_the_manual() -> None:
    index = DOCS / "index.md"
    linked = {ROOT / link for link in LINK.findall(README.read_text())}
    assert index in linked and {*DOCS.glob("*.md")} <= linked
    listed = {DOCS / link for link in LINK.findall(index.read_text())}
    assert {*PAGES[1:]} - {index} <= listed


def python_block(page: Path, words: str) -> str:
    """The one Python block of a page that contains these words."""
    (code,) = [code for code in blocks(page.read_text(), "python") if words in code]
    return code


def test_the_model_of_the_readme_runs(
    control: Path, media: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(media, tmp_path, dirs_exist_ok=True)
    shutil.copytree(control, tmp_path / "runs" / "quickstart" / "clip")
    monkeypatch.chdir(tmp_path)
    code, names = python_block(README, "xray.load"), dict[str, Any]()
    assert len(code.strip().splitlines()) <= 12
    exec(code, names)
    assert names["images"].shape == names["texts"].shape == (2, 16)
    assert names["clips"].shape == names["features"].shape == (1, 16)
    assert names["pixels"].shape == (3, 32, 32)
    assert not torch.equal(names["features"], names["images"][:1])  # fewer tokens


def test_the_backbone_of_the_docs_runs() -> None:
    names: dict[str, Any] = {}
    exec(python_block(ROOT / "docs" / "backbone.md", "VisionBackbone"), names)
    tokens = names["tokens"]
    assert tokens.cls.shape == (1, 384) and tokens.patches.shape == (1, 497, 384)
    assert [a.shape for a in tokens.assign] == [(1, 1440)] * 3
    assert tokens.dense().shape == (1, 1440, 384) and names["vit"].reduce_at == [3, 6, 9]
