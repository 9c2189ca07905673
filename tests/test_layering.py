"""Who may import whom, read from the source; and what must be imported in one place only."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
LEAF = {
    "xray",
    "xray.config",
    "xray.deepspeed_keys",
    "xray.dist",
    "xray.errors",
    "xray.files",
    "xray.gpus",
    "xray.hashing",
    "xray.level",
    "xray.progress",
    "xray.schedule",
}
MODELS = {"xray.models", "xray.losses", "xray.tag_losses", "xray.optim"}
DATA = {"data_pipelines"}
STAGE_USES = LEAF | MODELS | DATA | {"xray.artifact", "xray.language", "stages.base"}
TRAINS = LEAF | DATA | {"stages.base", "xray.checkpoint", "xray.engine", "xray.feed", "xray.run"}
RULES: dict[str, set[str]] = {
    "xray/errors.py": set(),
    "xray/hashing.py": set(),
    "xray/fields.py": set(),
    "xray/data_config.py": {"xray.errors", "xray.fields", "xray.schedule"},
    "xray/config.py": {"xray.data_config", "xray.deepspeed_keys", "xray.errors", "xray.fields"}
    | {"xray.hashing", "xray.schedule"},
    "xray/deepspeed_keys.py": set(),
    "xray/config_files.py": {"xray.config", "xray.errors"},
    "xray/schedule.py": {"xray.errors"},
    "xray/dist.py": {"xray.errors"},
    "xray/findings.py": set(),
    "xray/libraries.py": {"xray.findings"},
    "xray/doctor.py": LEAF | DATA | {"xray", "xray.findings", "xray.libraries"},
    "xray/gpus.py": set(),
    "xray/level.py": set(),
    "xray/optim.py": LEAF,
    "xray/losses.py": {"xray.dist"},
    "xray/tag_losses.py": {"xray.errors", "xray.losses"},
    "xray/figures.py": set(),
    "xray/models": {"xray.config", "xray.errors", "xray.files", "xray.models"},
    "xray/files.py": {"xray.errors"},
    "xray/places.py": {"data_pipelines.remote", "xray.files"},
    "xray/artifact.py": {"data_pipelines.remote", "data_pipelines.shards"}
    | {"xray", "xray.errors", "xray.files", "xray.places"},
    "xray/lineage.py": LEAF | {"xray.artifact", "xray.places"},
    "xray/language.py": LEAF | MODELS | DATA | {"xray.artifact"},
    "xray/restore.py": LEAF | MODELS | {"xray.artifact", "xray.language"},
    "xray/media.py": LEAF | DATA,
    "xray/api.py": LEAF | MODELS | DATA | {"xray.artifact", "xray.media", "xray.restore"},
    "xray/card.py": LEAF | {"xray.lineage"},
    "xray/exports": LEAF
    | MODELS
    | {"xray.artifact", "xray.card", "xray.exports", "xray.language", "xray.lineage"}
    | {"xray.restore"},
    "xray/pictures.py": LEAF | MODELS | {"xray.restore"},
    "xray/evaluation": LEAF
    | MODELS
    | DATA
    | {"xray.evaluation", "xray.figures", "xray.restore", "xray.report"},
    "xray/eval_cli.py": LEAF
    | {"xray.artifact", "xray.command", "xray.config_files", "xray.evaluation"}
    | {"xray.recipe", "xray.restore"},
    "xray/engine.py": LEAF | {"xray.optim", "stages.base"},
    "xray/checkpoint.py": LEAF | DATA | {"xray.artifact", "xray.engine", "xray.portable"},
    "xray/portable.py": LEAF | {"xray.engine"},
    "xray/mirror.py": LEAF | DATA,
    "xray/bad_samples.py": LEAF | DATA | {"xray.checkpoint"},
    "xray/report.py": set(),
    "xray/sinks.py": LEAF | {"xray.artifact", "xray.checkpoint", "xray.report"},
    "xray/pace.py": LEAF | DATA | {"stages.base", "xray.models.flops"},
    "xray/data_report.py": LEAF | DATA | {"xray.report", "xray.figures"},
    "xray/tag_report.py": LEAF | DATA | {"xray.report", "xray.figures"},
    "xray/curation_page.py": LEAF | DATA | {"xray.report", "xray.figures", "xray.data_report"},
    "xray/offline": LEAF
    | MODELS
    | DATA
    | {"xray.offline", "xray.artifact", "xray.embeddings", "xray.restore", "xray.language"},
    "xray/embeddings.py": {"xray.errors", "xray.files"},
    "xray/search.py": {"xray.embeddings", "xray.errors"},
    "xray/query.py": LEAF
    | DATA
    | {"xray.artifact", "xray.embeddings", "xray.offline.stream", "xray.restore"},
    "xray/search_page.py": LEAF | DATA | {"xray.data_report", "xray.embeddings", "xray.report"},
    "xray/run.py": LEAF
    | DATA
    | {"stages.base", "xray.artifact", "xray.checkpoint", "xray.feed", "xray.mirror"}
    | {"xray.card", "xray.run_record", "xray.sinks"},
    "xray/preflight.py": LEAF
    | DATA
    | {"stages", "stages.base", "xray.artifact"}
    | {"xray.evaluation.config", "xray.evaluation.sets"},
    "xray/bundle.py": TRAINS | {"xray.accumulate"},
    "xray/spikes.py": TRAINS | {"xray.bundle"},
    "xray/watchdog.py": {"xray.dist"},
    "xray/trainer.py": TRAINS
    | {"xray.bad_samples", "xray.optim", "xray.accumulate", "xray.sinks", "xray.artifact"}
    | {"xray.bundle", "xray.pace", "xray.spikes", "xray.watchdog"},
    "xray/accumulate.py": {"xray.dist", "data_pipelines", "stages.base", "xray.engine"},
    "xray/feed.py": LEAF | DATA | {"stages.base"},
    "xray/live_bytes.py": set(),
    "xray/rehearsal.py": LEAF | DATA | {"stages", "xray.feed", "xray.live_bytes", "xray.optim"},
    "xray/resources.py": LEAF | DATA | {"stages.sketches", "xray.optim", "xray.rehearsal"},
    "xray/plan_facts.py": LEAF
    | DATA
    | {"stages.hashtag", "stages.sketches", "xray.language", "xray.models", "xray.recipe"},
    "xray/ablation_file.py": LEAF | {"stages", "xray.config_files", "xray.recipe"},
    "xray/ablation.py": LEAF
    | {"stages", "xray.ablation_file", "xray.artifact", "xray.config_files", "xray.recipe"},
    "xray/comparison.py": LEAF | {"xray.ablation", "xray.artifact"},
    "xray/ablation_jobs.py": LEAF | {"xray.ablation", "xray.artifact"},
    "xray/run_figures.py": LEAF | {"xray.figures", "xray.report"},
    "xray/run_examples.py": LEAF
    | DATA
    | {
        "xray.artifact",
        "xray.evaluation.features",
        "xray.evaluation.sets",
        "xray.figures",
        "xray.recipe",
        "xray.report",
        "xray.restore",
    },
    "stages/sketches.py": LEAF | MODELS | {"stages"},
    "xray/run_record.py": LEAF | DATA | {"stages.base", "xray.artifact", "xray.places"},
    "xray/show.py": LEAF
    | MODELS
    | DATA
    | {"xray.artifact", "xray.media", "xray.pictures", "xray.report", "xray.restore"},
    "data_pipelines": {"data_pipelines", *LEAF},
    "stages/base.py": STAGE_USES,
    "stages/mae.py": STAGE_USES,
    "stages/hashtag.py": STAGE_USES,
    "stages/text.py": STAGE_USES,
    "stages/guards.py": {"xray.config", "stages.clip_config"},
    "xray/teacher.py": LEAF | {"xray.artifact", "xray.language", "xray.places", "xray.restore"},
    "stages/auxiliary.py": STAGE_USES | {"stages.hashtag", "stages.mae"},
    "stages/clip.py": STAGE_USES
    | {"xray.teacher"}
    | {f"stages.{name}" for name in ("auxiliary", "clip_config", "guards")},
    "stages/clip_config.py": STAGE_USES
    | {f"stages.{name}" for name in ("auxiliary", "hashtag", "mae")},
}
PLACES = {  # of heavy libraries
    "deepspeed": ["xray/engine.py"],
    "peft": ["xray/models/text.py"],
    "decord": ["data_pipelines/decode.py"],
    "ahocorasick": ["data_pipelines/matching.py"],
    "ray": ["data_pipelines/curation/ray_engine.py"],
    "open_clip": ["xray/teacher.py", "xray/exports/to_open_clip.py"],
    "onnxruntime": ["xray/exports/to_onnx.py"],
    "wandb": ["xray/sinks.py"],
}


def imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


def files(place: str) -> list[Path]:
    path = ROOT / place
    return sorted(path.rglob("*.py")) if path.is_dir() else [path]


@pytest.mark.parametrize("place", RULES)
def test_imports_point_one_way(place: str) -> None:
    allowed = RULES[place]
    for path in files(place):
        for module in imports(path):
            if module.split(".")[0] not in ("xray", "stages", "data_pipelines"):
                continue
            if module in ("xray", "xray.__version__"):  # `from xray import dist` adds xray.dist
                continue
            known = any(module == a or module.startswith(f"{a}.") for a in allowed - {"xray"})
            assert known, f"{path.relative_to(ROOT)} may not import {module}"


@pytest.mark.parametrize("library", PLACES)
def test_imported_where_it_belongs(library: str) -> None:
    for folder in ("xray", "stages", "data_pipelines"):
        for path in files(folder):
            if str(path.relative_to(ROOT)) not in PLACES[library]:
                assert library not in {m.split(".")[0] for m in imports(path)}, path


def test_rank_is_read_in_one_place() -> None:
    for folder in ("stages", "data_pipelines", "xray"):
        for path in files(folder):
            reads = any(f'"{name}"' in path.read_text() for name in ("RANK", "WORLD_SIZE"))
            assert reads == (path.name == "dist.py"), path
