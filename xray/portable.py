"""The state of training by parameter name, which any number of ranks and any ZeRO stage takes up.

portable/ 00000.safetensors ...  index.json, with `weight/NAME` and `SLOT/NAME` for each moment of
the optimizer, in fp32. The ranks take turns in writing the files, and hold one at a time; of a
moment a rank reads only what it keeps.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from xray import dist
from xray.engine import Engine
from xray.errors import ArtifactError, brief
from xray.files import inside, usual_mode

FOLDER, INDEX, BUFFERS = "portable", "index.json", "buffers.safetensors"
VERSION = 1
FILE_BYTES = 1 << 29  # of tensors in one file, if they are not larger themselves
WEIGHT = "weight"


def save_portable(engine: Engine, checkpoint: Path) -> None:
    """Write the state below a checkpoint's folder; collective.

    Raises ArtifactError on every rank where one of them cannot write.
    """
    folder, failure = checkpoint / FOLDER, None
    if dist.is_main():
        failure = _attempt(folder.mkdir)
    dist.agree(failure)
    files: dict[str, list[str]] = {}
    for number, names in enumerate(_layout(engine)):
        file = f"{number:05d}.safetensors"
        writes = dist.rank() == number % dist.world_size()
        tensors: dict[str, Tensor] = {}
        for name in names:
            for slot in (None, *engine.slots):
                value = engine.read(name, slot)
                if writes:
                    tensors[f"{slot or WEIGHT}/{name}"] = value.cpu()
        files[file] = names
        if writes:  # the others go on into the next collective, whatever happens here
            failure = _attempt(partial(_write, tensors, folder / file)) or failure
    buffers, facts = engine.buffers(), {"version": VERSION, "steps": engine.steps}
    index = json.dumps({**facts, "slots": list(engine.slots), "files": files})
    if dist.is_main():
        failure = _attempt(partial(_write, buffers, folder / BUFFERS)) or failure
        failure = _attempt(partial((folder / INDEX).write_text, index)) or failure
    dist.agree(failure)


def load_portable(engine: Engine, checkpoint: Path) -> None:
    """Take up a state that any number of ranks saved in any ZeRO stage; collective.

    Raises ArtifactError where it is damaged, or of other parameters or another optimizer.
    """
    folder = checkpoint / FOLDER
    reading = folder / INDEX
    try:
        index = dict(json.loads(reading.read_text()))
        files = dict(index["files"])
        _check(index, engine, checkpoint)
        for file, names in files.items():
            reading = inside(folder, file)
            with safe_open(reading, "pt") as tensors:
                for name in names:
                    for slot in (None, *engine.slots):
                        engine.write(name, tensors.get_tensor(f"{slot or WEIGHT}/{name}"), slot)
        reading = inside(folder, BUFFERS)
        with safe_open(reading, "pt") as tensors:
            engine.write_buffers({name: tensors.get_tensor(name) for name in tensors.keys()})  # noqa: SIM118
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise ArtifactError(f"checkpoint {reading} cannot be read: {brief(error)}") from error
    engine.set_steps(int(index["steps"]))


def _layout(engine: Engine) -> list[list[str]]:
    """The parameters of each file, in order."""
    files: list[list[str]] = []
    room = 0
    for name, numel in engine.trained.items():
        size = 4 * numel * (1 + len(engine.slots))
        if size > room:
            files.append([])
            room = FILE_BYTES
        files[-1].append(name)
        room -= size
    return files


def _write(tensors: dict[str, Tensor], path: Path) -> None:
    with usual_mode(path):
        save_file(tensors, path)


def _attempt(work: Callable[[], object]) -> ArtifactError | None:
    """Do a piece of writing; returns what went wrong."""
    try:
        work()
    except (OSError, SafetensorError) as error:
        return ArtifactError(brief(error))
    return None


def _check(index: dict[str, Any], engine: Engine, checkpoint: Path) -> None:
    if index["version"] != VERSION:
        raise ArtifactError(
            f"checkpoint {checkpoint} has version {index['version']}, this one reads {VERSION}"
        )
    saved = {name for names in index["files"].values() for name in names}
    changed = sorted(saved ^ engine.trained.keys())
    if changed or tuple(index["slots"]) != engine.slots:
        what = f"parameter {changed[0]}" if changed else f"the optimizer's {index['slots']}"
        raise ArtifactError(
            f"checkpoint {checkpoint} is not of this model or optimizer: {what} (of "
            f"{len(changed)}) is in one of them only; choose another out="
        )
