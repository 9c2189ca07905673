"""Hostile pickles, and checks that a file was refused without being loaded."""

from __future__ import annotations

import hashlib
import io
import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from click.testing import Result
from in_process import invoke

from xray.artifacts.language_model import Language
from xray.config import TextConfig


class Hostile:
    """Object whose pickle makes a folder when it is loaded."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (str(self.folder),)


def pickled(ran: Path, kind: str = "torch") -> bytes:
    """Write a pickle that makes the folder `ran`, as pickle, torch.save or np.save does."""
    buffer = io.BytesIO()
    if kind == "plain":
        return pickle.dumps(Hostile(ran), protocol=2)  # the one of torch.save
    if kind == "torch":
        torch.save(Hostile(ran), buffer)
    else:
        np.save(buffer, np.array([Hostile(ran)], object), allow_pickle=True)
    return buffer.getvalue()


def evaluate(artifact: Path, demo: Path) -> Result:
    """Run `xray eval` on an artifact."""
    sets = f"eval.retrieval={{shards: {demo / 'heldout'}}}"
    return invoke("eval", artifact, sets, "--suite", "retrieval")


def assert_refused(done: Result, name: str, ran: Path) -> None:
    """Require an error of one line that names the file, and that no pickle was loaded."""
    assert done.exit_code == 2, (done.output, done.exception)
    assert name in done.stderr and len(done.stderr.strip().splitlines()) == 1, done.stderr
    assert not ran.exists()


def forge(artifact: Path, name: str, content: bytes) -> None:
    """Replace a file of an artifact and its hash in the manifest."""
    (artifact / name).write_bytes(content)
    manifest = json.loads((artifact / "manifest.json").read_text())
    manifest["files"][name] = hashlib.sha256(content).hexdigest()
    (artifact / "manifest.json").write_text(json.dumps(manifest))


def llm_loader(demo: Path, folder: Path, change: dict[str, bytes | None]) -> Callable[[], object]:
    """Copy the tiny LLM with files changed (None removes one); return a function that loads it."""
    shutil.copytree(demo / "llm", folder)
    for name, content in change.items():
        (folder / name).parent.mkdir(exist_ok=True)
        if content is None:
            (folder / name).unlink()
        else:
            (folder / name).write_bytes(content)
    return lambda: Language(TextConfig(str(folder), "none")).build()
