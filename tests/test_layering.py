"""Who may import whom, read from the source; and what must be imported in one place only."""

from __future__ import annotations

from pathlib import Path

import pytest
from source_code import ROOT, files, imports

PACKAGES = ("xray", "stages", "data_pipelines")
# A package or module may import what is listed on its row, what that may import, and itself.
ROWS: dict[str, set[str]] = {
    "xray.errors": set(),
    "xray.processes": set(),
    "xray.progress": {"xray.words"},
    "xray.version": set(),
    "xray.words": set(),
    "xray.urls": {"xray.errors"},
    "xray.hub": {"xray.errors"},
    "xray.files": {"xray.errors"},
    "xray.records": {"xray.errors"},
    "xray.agreement": {"xray.errors"},
    "xray.slurm": set(),
    "xray.dist": {"xray.agreement", "xray.slurm"},
    "xray.config": {"xray.files", "xray.urls"},
    "xray.losses": {"xray.dist", "xray.config"},
    "xray.optim": {"xray.config"},
    "xray.models": {"xray.config", "xray.files", "xray.hub", "xray.records"},
    "data_pipelines": {
        *("xray.config", "xray.dist", "xray.files", "xray.hub", "xray.processes"),
        *("xray.progress", "xray.records", "xray.words"),
    },
    "xray.reports": {"data_pipelines"},
    "xray.artifacts": {"xray.models", "xray.losses", "data_pipelines", "xray.version"},
    "stages": {"xray.artifacts", "xray.imports", "xray.losses", "xray.optim"},
    "xray.search.quantisation": set(),
    "xray.search.pca": {"xray.search.quantisation"},
    "xray.evaluation": {
        *("xray.artifacts", "xray.losses", "xray.optim", "xray.reports", "xray.search.pca"),
    },
    "xray.merging": {"xray.evaluation"},
    "xray.visualize": {"xray.artifacts", "xray.reports"},
    "xray.exports": {"xray.artifacts"},
    "xray.imports": {"xray.exports"},
    "xray.precompute": {"xray.artifacts"},
    "xray.search": {"xray.precompute", "xray.reports", "xray.search.pca"},
    "xray": {"xray.artifacts"},  # xray/__init__.py and api.py
    "xray.embeddings": {"xray.search"},
    "xray.training": {"stages"},
    "xray.doctor": {"data_pipelines", "xray.version"},
    "xray.planning": {"xray.training", "xray.reports"},
    "xray.recipes": {
        *("xray.planning", "xray.training", "xray.evaluation", "xray.precompute"),
        "xray.visualize",
    },
    "xray.ablations": {"xray.recipes"},
    "xray.commands": {
        *("xray", "xray.ablations", "xray.doctor", "xray.imports", "xray.merging"),
        *("xray.planning", "xray.search"),
    },
    "xray.__main__": {"xray.commands"},
}
# Inside data_pipelines, in the same way.
DATA_ROWS: dict[str, set[str]] = {
    "data_pipelines.shards": set(),
    "data_pipelines.decode": {"data_pipelines.shards"},
    "data_pipelines.text": {"data_pipelines.shards"},
    "data_pipelines.tags": {"data_pipelines.text"},
    "data_pipelines.stream": {"data_pipelines.decode", "data_pipelines.text"},
    "data_pipelines.ingest": {"data_pipelines.stream", "data_pipelines.tags"},
    "data_pipelines.checks": {"data_pipelines.ingest"},
    "data_pipelines.curation": {"data_pipelines.ingest"},
}
PLACES = {  # of heavy libraries
    "deepspeed": ["xray/training/deepspeed_setup.py", "xray/training/engine.py"],
    "peft": ["xray/models/text_tower.py"],
    "decord": ["data_pipelines/decode/decoders.py"],
    "ahocorasick": ["data_pipelines/tags/concept_matcher.py"],
    "ray": ["data_pipelines/curation/ray_engine.py"],
    "open_clip": [
        "stages/clip_teacher.py",
        "xray/evaluation/prompts.py",
        "xray/exports/to_open_clip.py",
        "xray/imports/source.py",
        "xray/imports/texts.py",
    ],
    "onnxruntime": ["xray/exports/to_onnx.py"],
    "wandb": ["xray/training/metrics.py"],
}


def module_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts)


def row_of(module: str, rows: dict[str, set[str]]) -> str:
    """The row of a module; a module or package of xray without one has none."""
    top, *rest = module.split(".")
    if top == "xray" and rest[:1] in ([], ["__init__"], ["api"], ["load"]):
        return "xray"
    own = [row for row in rows if row != "xray" and f"{module}.".startswith(f"{row}.")]
    assert own, f"{module} has no row in tests/test_layering.py"
    return max(own, key=len)


def below(row: str, rows: dict[str, set[str]]) -> set[str]:
    """A row, and everything that it may import."""
    return {row}.union(*(below(other, rows) for other in rows[row]))


def upward(path: Path, rows: dict[str, set[str]], tops: tuple[str, ...]) -> list[str]:
    """Imports of a file that its row does not allow."""
    allowed = below(row_of(module_of(path), rows), rows)
    named = {m for m in imports(path) if m.split(".")[0] in PACKAGES and m.startswith(tops)}
    # `from xray.config import DataConfig` gives xray.config and xray.config.DataConfig
    modules = {m for m in named if m not in ("xray", *tops) and is_module(m)}
    return sorted(m for m in modules if row_of(m, rows) not in allowed)


def is_module(name: str) -> bool:
    path = ROOT.joinpath(*name.split("."))
    return path.is_dir() or path.with_suffix(".py").is_file()


@pytest.mark.parametrize("package", PACKAGES)
def test_imports_point_downward(package: str) -> None:
    for path in files(package):
        assert not upward(path, ROWS, PACKAGES), path.relative_to(ROOT)


def test_imports_inside_the_data_pipelines_point_downward() -> None:
    for path in files("data_pipelines"):
        if path.parent.name != "data_pipelines":
            assert not upward(path, DATA_ROWS, ("data_pipelines.",)), path.relative_to(ROOT)


def test_every_row_exists_and_is_needed() -> None:
    for row in ROWS | DATA_ROWS:
        assert is_module(row), f"{row} is gone: remove its row"


def test_the_rows_have_no_circle() -> None:
    for rows in (ROWS, DATA_ROWS):
        for row in rows:
            assert all(row not in below(other, rows) for other in rows[row]), row


@pytest.mark.parametrize("library", PLACES)
def test_imported_where_it_belongs(library: str) -> None:
    for folder in PACKAGES:
        for path in files(folder):
            if str(path.relative_to(ROOT)) not in PLACES[library]:
                assert library not in {m.split(".")[0] for m in imports(path)}, path


def test_rank_is_read_in_one_place() -> None:
    for folder in PACKAGES:
        for path in files(folder):
            reads = any(f'"{name}"' in path.read_text() for name in ("RANK", "WORLD_SIZE"))
            assert reads == (path.name == "dist.py"), path


def test_an_unknown_home_is_no_crash() -> None:
    """os.path.expanduser leaves ~UNKNOWN as it is; the method of Path raises RuntimeError."""
    for folder in PACKAGES:
        for path in files(folder):
            assert ".expanduser()" not in path.read_text(), path


def test_processes_are_started_in_one_place() -> None:
    """There, each is tied to its parent; ray ties its own processes."""
    starters = ("Popen(", "subprocess.run(", "os.fork", "get_context(", "ProcessPoolExecutor(")
    for folder in PACKAGES:
        for path in files(folder):
            text = path.read_text()
            here = any(name in text for name in (*starters, "os.system", "os.spawn"))
            assert here == (path.name == "processes.py"), path
            tied = text.count("multiprocessing_context=LoaderContext()")
            assert text.count("DataLoader(") == tied, path
