"""Commands that run on the files written by commit 9205be0, in a copy of them."""

from __future__ import annotations

import hashlib
import json
import os
import runpy
import shutil
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
FIXTURE = ROOT / "tests" / "fixtures" / "9205be0"
SCRIPT = ROOT / "tests" / "fixtures" / "record_9205be0.py"
RUNNER = ROOT / "tests" / "compatibility" / "run_commands.py"
HELPERS = runpy.run_path(str(SCRIPT), run_name="helpers")
RECORD = json.loads((FIXTURE / "record.json").read_text())
NAMES = json.loads((FIXTURE / "names.json").read_text())  # of side files, as commands printed them
# Results are equal bit for bit on this machine and torch; elsewhere they are close.
SAME_MACHINE = HELPERS["machine"]() == {key: RECORD[key] for key in ("torch", "cpu")}
# Since then, mae embeds visible patches and predicts masked ones only: sums have another order.
ROUNDED = ("mae",)
STAGES = ("mae", "hashtag", "text", "clip")
AS_THEN = ("model.sincos=rows",)  # settings whose default is another one today
SHARDS = ("data/photos", "data/clips", "data/heldout", "data/gallery")
LLM = next((FIXTURE / "data" / "hub").glob("*/snapshots/*")).relative_to(FIXTURE)
RECIPE = ("--recipe", "recipe.yaml")

READING: dict[str, list[str]] = {
    "features": [str(SCRIPT), "features", "out"],
    **{f"lineage_{s}": ["lineage", f"runs/full/{s}", "--verify", "--json"] for s in STAGES},
    "eval_clip": [
        *("eval", "runs/full/clip", *RECIPE),
        *("--suite", "zero_shot,retrieval,knn", "--out", "out/clip.json"),
    ],
    "eval_hashtag": [
        *("eval", "runs/full/hashtag", *RECIPE, "--suite", "tags", "--out", "out/hashtag.json"),
    ],
    "eval_keep_rates": [
        *("eval", "runs/full/clip", *RECIPE, "--suite", "zero_shot"),
        *("--keep-rates", "1,.5", "--out", "out/keep_rates.json"),
    ],
    "check": ["data", "check", *SHARDS, "--json", "out/check.json"],
    "index": ["data", "index", *SHARDS, "--checksum"],
    "tags": ["data", "tags", "data/photos", "data/clips", "--out", "out/tags.json", "min_count=2"],
    "metadata": [
        *("data", "metadata", "data/photos", "min_count=2", "min_pmi=0"),
        *("--out", "out/metadata.txt"),
    ],
    "curate": [
        *("data", "curate", "data/photos", "metadata=metadata.txt", "t=4", "seed=3"),
        *("dedup.exact=true", f"filters.scores={NAMES['scores']}", "filters.min_score=-1"),
        *("--json", "out/curation.json", "--report", "out/curation.html"),
    ],
    "teacher": [
        *("data", "pseudo-tags", "runs/full/hashtag", "data/photos", "data/clips"),
        "threshold=0.01",
    ],
    "teacher_clip": [
        *("data", "pseudo-tags", "runs/full/clip", "data/photos", "--vocabulary", "tags.json"),
    ],
    "embeddings": ["data", "embeddings", "runs/full/hashtag", "data/photos"],
    "scores": ["data", "scores", "runs/full/clip", "data/photos"],
    "embed": ["embed", "runs/full/clip", "data/photos", "--out", "embeddings/photos.parquet"],
    "embed_int8": [
        *("embed", "runs/full/clip", "data/photos", "--out", "embeddings/photos.npy"),
        *("--dtype", "int8", "--dim", "8"),
    ],
    "embed_texts": [
        *("embed", "runs/full/text", "data/photos", "--out", "embeddings/texts.parquet", "--texts"),
    ],
    "embed_other": [
        *("embed", "runs/full/hashtag", "data/photos", "--out", "embeddings/photos.parquet"),
    ],
    "embed_new": ["embed", "runs/full/clip", "data/photos", "--out", "out/photos.parquet"],
    "search": [
        *("search", "embeddings/photos.parquet", HELPERS["TEXTS"][0]),
        *("--artifact", "runs/full/clip", "--top", "3"),
    ],
    "search_int8": [
        *("search", "embeddings/photos.npy", HELPERS["TEXTS"][0]),
        *("--artifact", "runs/full/clip", "--top", "3"),
    ],
    **{
        f"export_{name}": ["export", *arguments, "--out", f"out/export_{name}"]
        for name, arguments in HELPERS["EXPORTS"].items()
    },
    "replay": ["debug", "replay", "runs/broken/bundles/step_00000001"],
    "config": ["config", "recipe.yaml"],
    "report": ["report", "runs/unfinished/clip"],
}
TRAINING: dict[str, list[str]] = {
    "finished": ["run", "recipe.yaml"],
    "refused_recipe": ["run", "recipe.yaml", "mae.mask_ratio=0.5"],
    "refused_resume": [
        *("train", "hashtag", "--resume", "runs/unfinished/hashtag", "hashtag.loss=softmax"),
    ],
    "refused_data": [
        *("train", "mae", "--resume", "runs/unfinished/mae", "data.sources.photos.shards=gallery"),
    ],
    "resume_mae": ["run", "recipe.yaml", "stages=[mae]", "out=runs/unfinished"],
    "resume_hashtag": ["train", "hashtag", "--resume", "runs/unfinished/hashtag"],
    "resume_clip": ["train", "clip", "--resume", "runs/unfinished/clip", f"text.llm={LLM}"],
    "init_from": [
        *("train", "clip", *RECIPE, "--init-from", "runs/full/hashtag"),
        *("--out", "runs/next", "train.samples=24", "text.features=live"),
    ],
    "again": ["run", "recipe.yaml", "out=runs/again", *AS_THEN],
    "ablate": ["ablate", "ablation.yaml"],
}


@dataclass(frozen=True)
class Done:
    """A copy of the fixture in which commands ran.

    before: the state of every file, by path, before the first command.
    """

    folder: Path
    codes: Mapping[str, int]
    before: Mapping[str, tuple[int, str]]

    def text(self, name: str, stream: str = "out") -> str:
        """The output of a command, with its line breaks and the tables' padding as one space."""
        return " ".join((self.folder / "out" / f"{name}.{stream}").read_text().split())

    def check(self, *names: str, code: int = 0) -> None:
        """Fail unless the commands ended with an exit code."""
        for name in names:
            assert self.codes[name] == code, f"{name}: {self.text(name, 'err')[-2000:]}"

    def json(self, path: str) -> Any:
        return json.loads((self.folder / path).read_text())

    def changed(self, *parts: str) -> set[str]:
        """Files below some folders that were written, added or removed, except reports."""
        now = states(self.folder)
        paths = {p for p in {*now, *self.before} if p.startswith(parts)}
        different = {path for path in paths if now.get(path) != self.before.get(path)}
        return {path for path in different if not path.endswith((".html", ".lock", "/lock"))}


def states(folder: Path) -> dict[str, tuple[int, str]]:
    """The modification time and sha256 of every file below a folder."""
    return {
        str(path.relative_to(folder)): (
            path.stat().st_mtime_ns,
            hashlib.sha256(path.read_bytes()).hexdigest(),
        )
        for path in folder.rglob("*")
        if path.is_file()
    }


def run_in_copy(folder: Path, commands: Mapping[str, list[str]], moved: bool) -> Done:
    """Copy the fixture, run the commands there in one process, and return what they left.

    moved: whether shards have new modification times, as copied ones do, so that their indexes are
    made again. Otherwise they have those that the indexes know.
    """
    shutil.copytree(FIXTURE, folder)
    for name, time in RECORD["mtimes"].items() if not moved else []:
        os.utime(folder / name, ns=(time, time))
    (folder / "out").mkdir()
    before = states(folder)
    group = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    env = {key: value for key, value in os.environ.items() if key not in group} | {
        "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "HF_HUB_CACHE": str(folder / "data" / "hub"),
        "HF_HUB_OFFLINE": "1",
    }
    command = [sys.executable, str(RUNNER), "out"]
    given = json.dumps(commands)
    done = subprocess.run(command, input=given, text=True, cwd=folder, env=env, timeout=600)
    codes = json.loads((folder / "out" / "codes.json").read_text())
    assert done.returncode == 0 and codes.keys() == commands.keys(), codes
    return Done(folder, codes, before)
