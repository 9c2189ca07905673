"""The manual: the site builds without warnings, and its references name what the code has."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from in_process import invoke
from test_readme import PAGES, ROOT, blocks, commands

from stages import STAGES
from xray.recipes.settings import scopes

if TYPE_CHECKING:
    from conftest import Trained

DOCS = ROOT / "docs"
LOADED = re.compile(r"<(?:script|img|link|iframe)\b[^>]*?\b(?:src|href)=\"(https?:)?//[^\"]*")
ROW = re.compile(r"^\| (`[^|]+`[^|]*) \|", re.MULTILINE)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("sphinx")
    pytest.importorskip("furo")
    out = tmp_path_factory.mktemp("site")
    call = [sys.executable, "-m", "sphinx", "-q", "-W", "--keep-going", "-b", "html"]
    done = subprocess.run(
        [*call, "-d", out / "doctrees", DOCS, out / "html"],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return out / "html"


def test_the_site_has_every_page_and_loads_nothing_from_other_hosts(site: Path) -> None:
    pages = [page.relative_to(DOCS).with_suffix("") for page in PAGES[1:]]
    assert [page for page in pages if not (site / f"{page}.html").is_file()] == []
    for page in site.rglob("*.html"):
        text = page.read_text("utf-8")
        assert not LOADED.search(text), page.name
        assert "<!-- generated" not in text and "&lt;!-- generated" not in text, page.name


def test_the_references_name_every_key_and_command(site: Path) -> None:
    settings = (site / "reference" / "settings.html").read_text("utf-8")
    keys = {own.key for settings in scopes().values() for own in settings}
    assert [key for key in keys if f">{key}<" not in settings] == []
    listed = (site / "reference" / "commands.html").read_text("utf-8")
    help_text = invoke("data", "--help").output
    assert "xray data pack" in listed and "short_side" in listed and "pack" in help_text
    api = (site / "reference" / "python.html").read_text("utf-8")
    assert "Model.encode_image" in api and "ArtifactError" in api


def described(section: str) -> list[re.Pattern[str]]:
    """The names in the first column of the tables of a section of metrics.md, as patterns."""
    text = (DOCS / "reference" / "metrics.md").read_text("utf-8")
    body = text.split("\n## ")[[t.split("\n")[0] for t in text.split("\n## ")].index(section)]
    names = [name for row in ROW.findall(body) for name in re.findall(r"`([^`]+)`", row)]
    parts = {"SOURCE": r"\w+", "NAME": r".+", "N": r"\d+", "K": r"\d+", "RATE": r"[\d.]+"}
    split = [re.split(r"(\b[A-Z]+\b)", name) for name in names]
    return [re.compile("".join(parts.get(p, re.escape(p)) for p in name)) for name in split]


def logged(folder: Path) -> Iterator[str]:
    for path in folder.rglob("metrics.jsonl"):
        for line in path.read_text("utf-8").splitlines():
            yield from json.loads(line)


def test_metrics_of_real_runs_are_described(trained: Trained, tagger: Path, control: Path) -> None:
    runs = (trained("mae", "train.samples=24"), tagger, control)
    names = {name for run in runs for name in logged(run.parent)}
    assert {"loss", "lr", "step"} <= names
    patterns = described("metrics.jsonl")
    assert sorted(n for n in names if not any(p.fullmatch(n) for p in patterns)) == []
    assert not any(p.fullmatch("nonsense") for p in patterns)


def test_measures_of_recorded_evaluations_are_described() -> None:
    patterns = described("Results of an evaluation")
    recorded = DOCS / "results" / "quickstart.json", DOCS / "results" / "eval_mae_quickstart.json"
    for path in recorded:
        for suite, measures in json.loads(path.read_text("utf-8")).items():
            for measure in measures:
                plain = re.sub(r"^chance_|_(low|high)$", "", measure)
                assert any(p.fullmatch(plain) for p in patterns), (suite, measure)


def test_files_of_a_real_run_are_described(control: Path) -> None:
    text = (DOCS / "reference" / "files.md").read_text("utf-8")
    run = control.parent if control.name == "artifact" else control
    names = {path.name for path in [*run.iterdir(), *(run / "artifact").iterdir()]}
    assert sorted(name for name in names if f"`{name}" not in text) == []


def test_every_key_of_a_tutorial_exists() -> None:
    """Commands and options are checked with those of the other pages, in test_readme."""
    from xray.recipes.settings import explain_key, section_of

    for page in sorted(DOCS.rglob("tutorials/*.md")):
        for call in commands(page.read_text("utf-8")):
            if call[0] in ("run", "plan", "eval"):
                keys = [item.split("=")[0] for item in call[1:] if re.match(r"[a-z_.]+=", item)]
                wrong = [key for key in keys if not explain_key(key) and not section_of(key)]
                assert not wrong, (page.name, wrong)
        assert blocks(page.read_text("utf-8"), ""), page.name
    assert set(STAGES) == {"mae", "hashtag", "text", "clip"}
