"""Flipped bits in files of every kind: found, or without an effect on the result."""

from __future__ import annotations

import os
import random
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tools.faults.commands import CODES, Command, Outcome, same_result, train
from tools.faults.kills import STAGES

STORED = ("stages=[hashtag,clip]", "clip.text.tune=none", "clip.text.features=bf16")
EMBEDDING = "embeddings.npy"


@dataclass(frozen=True)
class Reader:
    """Command that reads damaged files.

    copies: folders of undisturbed results that it works on. run: starts it in a folder that holds
    the copies. differs: compares its result with the undisturbed one, "" if they are equal.
    """

    copies: tuple[str, ...]
    run: Callable[[Path], Command]
    differs: Callable[[Path], str]


def embed(folder: Path, artifact: Path, data: Path) -> Command:
    """Start the embedding of some pictures."""
    given = ["embed", artifact, data / "heldout", "--out", folder / EMBEDDING, "--workers", 0]
    return Command(folder / "embed.log", *given)


def search(folder: Path, artifact: Path, query: Path) -> Command:
    """Start a search for the nearest pictures of a picture."""
    given = ["search", folder / EMBEDDING, query, "--artifact", artifact, "--top", 3]
    return Command(folder / "search.log", *given)


def check(folder: Path) -> Command:
    """Start a check of the pictures, whose indexes hold the sha256 of each tar."""
    return Command(folder / "check.log", "data", "check", folder / "data/photos", "--workers", 1)


def _resume(folder: Path) -> Command:
    return train(folder / "halfway", folder / "data", *STAGES)


def _train_on_tables(folder: Path) -> Command:
    return train(folder / "run", folder / "data", *STORED)


def _embed_again(folder: Path) -> Command:
    return embed(folder, folder / "unkilled/mae/artifact", folder.parent / "data")


def _search_again(folder: Path) -> Command:
    shutil.copytree(folder / "embedded", folder, dirs_exist_ok=True)
    artifact = folder.parent / "unkilled/mae/artifact"
    return search(folder, artifact, folder.parent / "picture.jpg")


def _same_run(reference: str, own: str) -> Callable[[Path], str]:
    return lambda folder: same_result(folder.parent / reference, folder / own)


def _same_file(name: str) -> Callable[[Path], str]:
    def differs(folder: Path) -> str:
        one, two = (place / name for place in (folder.parent / "embedded", folder))
        return "" if one.read_bytes() == two.read_bytes() else f"other {name} in silence"

    return differs


RESUME = Reader(("data", "halfway"), _resume, _same_run("unkilled", "halfway"))
TABLES = Reader(("data",), _train_on_tables, _same_run("stored", "run"))
EMBED = Reader(("unkilled",), _embed_again, _same_file(EMBEDDING))
SEARCH = Reader(("embedded",), _search_again, _same_file("search.log"))
CHECK = Reader(("data",), check, lambda folder: "not found")
# kind of file -> who reads it, and where it is
FILES: dict[str, tuple[Reader, str]] = {
    "tar": (CHECK, "data/photos/*.tar"),
    "index of a tar": (RESUME, "data/photos/**/*.index"),
    "manifest of shards": (RESUME, "data/photos/**/*.manifest"),
    "record of generated data": (RESUME, "data/demo.json"),
    "checkpoint's weights": (RESUME, "halfway/mae/checkpoints/step_*/portable/*.safetensors"),
    "checkpoint's index": (RESUME, "halfway/mae/checkpoints/step_*/portable/index.json"),
    "checkpoint's state": (RESUME, "halfway/mae/checkpoints/step_*/state.json"),
    "run.json": (RESUME, "halfway/mae/run.json"),
    "config.yaml": (RESUME, "halfway/mae/config.yaml"),
    "metrics.jsonl": (RESUME, "halfway/mae/metrics.jsonl"),
    "tables of tags": (TABLES, "data/photos/**/*.labels-*"),
    "store of text features": (TABLES, "data/photos/**/*.text-features*"),
    "samples of an epoch": (TABLES, "data/photos/**/*.slots-*"),
    "numbers of captions in a store": (TABLES, "data/photos/**/*.caption-ids-*"),
    "language model": (TABLES, "data/llm/*"),
    "artifact's weights": (EMBED, "unkilled/mae/artifact/*.safetensors"),
    "artifact's other files": (EMBED, "unkilled/mae/artifact/*.[!s]*"),
    "embeddings": (SEARCH, f"embedded/{EMBEDDING}"),
    "embeddings' record": (SEARCH, "embedded/*.j*"),
}


def flipped_bit(folder: Path, data: Path, rng: random.Random) -> Outcome:
    """Flip a bit of a file, at rest: its size and its times stay."""
    kind = rng.choice([*FILES])
    reader, pattern = FILES[kind]
    for name in reader.copies:
        shutil.copytree(folder.parent / name, folder / name)
    paths = [path for path in sorted(folder.glob(pattern)) if path.is_file()]
    if not paths:
        return Outcome(f"flipped bit: {kind}", "no such file", 0)
    newest = [path for path in paths if path.parent == paths[-1].parent]  # of the checkpoints
    path = rng.choice(newest)
    _flip(path, rng)
    running = reader.run(folder)
    code = running.wait()
    fault = running.fault(code, CODES)
    if not fault and code == 0:
        log = running.log.read_text("utf-8", errors="replace")
        fault = "" if path.name in log or "damaged" in log else reader.differs(folder)
    return Outcome(f"flipped bit: {kind}", f"{fault} ({path.name})" if fault else "")


def _flip(path: Path, rng: random.Random) -> None:
    before = path.stat()
    content = bytearray(path.read_bytes())
    content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    path.chmod(0o644)
    path.write_bytes(content)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
