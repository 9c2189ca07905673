"""Training state by parameter name, which any world size and ZeRO stage can load.

portable/ 00000.safetensors ...  index.json, with `weight/NAME`, and `SLOT/NAME` for each moment of
the optimizer, in fp32. Ranks take turns in writing the files, and hold one file in memory at a
time.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from xray import dist
from xray.artifacts.artifact import save_tensors
from xray.errors import ArtifactError, brief
from xray.files import inside, sha256_file, sync_file
from xray.records import read_record
from xray.training.engine import Engine
from xray.training.state import FILE_BYTES

FOLDER, INDEX, BUFFERS = "portable", "index.json", "buffers.safetensors"
VERSION = 1
WEIGHT = "weight"


@dataclass(frozen=True)
class Index:
    """Contents of an index.json. files: names of the parameters in each file."""

    version: int
    steps: int
    slots: list[str]
    files: dict[str, list[str]]


Content = dict[str, Tensor] | str  # of a file: safetensors or text


def portable_files(
    engine: Engine, keep: Callable[[Tensor], Tensor] = Tensor.cpu
) -> Iterator[tuple[str, Content]]:
    """Yield the names and contents of the files that this rank writes. Collective.

    The other ranks wait in its collectives, so that a caller reads it to the end even if it cannot
    write a file. keep: makes the copy of a value in the host's memory. No content changes when
    training goes on.
    """
    files: dict[str, list[str]] = {}
    for number, names in enumerate(_layout(engine)):
        file = f"{number:05d}.safetensors"
        files[file] = names
        writes = _writes(number)
        tensors: dict[str, Tensor] = {}
        for name in names:
            for slot in (None, *engine.slots):
                value = engine.read(name, slot)
                if writes:
                    tensors[f"{slot or WEIGHT}/{name}"] = keep(value)
        if writes:
            yield file, tensors
    if dist.is_main():
        weights = {name for name, _ in engine.module.named_parameters(remove_duplicate=False)}
        state = engine.module.state_dict()
        buffers = {name: value for name, value in state.items() if name not in weights}
        yield BUFFERS, {name: value.to("cpu", copy=True) for name, value in buffers.items()}
        yield INDEX, json.dumps(asdict(Index(VERSION, engine.steps, list(engine.slots), files)))


def own_values(engine: Engine) -> int:
    """Count the values of the parameters and their slots that this rank writes."""
    own = (names for number, names in enumerate(_layout(engine)) if _writes(number))
    return (1 + len(engine.slots)) * sum(engine.trained[name] for names in own for name in names)


def write_files(files: Iterable[tuple[str, Content]], checkpoint: Path) -> dict[str, str]:
    """Write files of the state to a checkpoint, flush them to disk, and return their sha256.

    Raises ArtifactError after the last of them.
    """
    hashes: dict[str, str] = {}
    failure = None
    for file, content in files:
        try:
            hashes[f"{FOLDER}/{file}"] = _write(checkpoint / FOLDER / file, content)
        except (OSError, SafetensorError) as error:
            failure = ArtifactError(brief(error))
        del content  # the next file is read before the loop would let go of this one
    if failure:
        raise failure
    return hashes


def load_portable(engine: Engine, checkpoint: Path) -> None:
    """Load a state that was saved with any world size and ZeRO stage; collective.

    Raises ArtifactError if it is damaged, or of other parameters or another optimizer.
    """
    index = _index(checkpoint)
    _check(index, engine, checkpoint)
    for file, names in index.files.items():
        with _tensors(checkpoint, file) as tensors:
            for name in names:
                for slot in (None, *engine.slots):
                    engine.write(name, tensors.get_tensor(f"{slot or WEIGHT}/{name}"), slot)
    with _named(checkpoint / FOLDER / BUFFERS):
        state = engine.module.state_dict()
        for name, value in read_buffers(checkpoint).items():
            state[name].copy_(value)
    engine.set_steps(index.steps)


def read_weights(checkpoint: Path, slot: str | None = None) -> dict[str, Tensor]:
    """Read a checkpoint's trained parameters, or a slot of them, by name, without an engine.

    Raises ArtifactError if it is damaged or has no such slot.
    """
    weights: dict[str, Tensor] = {}
    index = _index(checkpoint)
    if slot is not None and slot not in index.slots:
        raise ArtifactError(f"checkpoint {checkpoint} has no {slot} of the weights")
    for file, names in index.files.items():
        with _tensors(checkpoint, file) as tensors:
            weights |= {name: tensors.get_tensor(f"{slot or WEIGHT}/{name}") for name in names}
    return weights


def read_buffers(checkpoint: Path) -> dict[str, Tensor]:
    """Read a checkpoint's buffers; raises ArtifactError if it is damaged."""
    with _tensors(checkpoint, BUFFERS) as tensors:
        return {name: tensors.get_tensor(name) for name in tensors.keys()}  # noqa: SIM118 - not a mapping


def _index(checkpoint: Path) -> Index:
    """Read and check a checkpoint's index."""
    index = read_record(checkpoint / FOLDER / INDEX, Index)
    if index.version != VERSION:
        raise ArtifactError(
            f"checkpoint {checkpoint} has version {index.version}, this xray reads {VERSION}"
        )
    return index


@contextmanager
def _tensors(checkpoint: Path, file: str) -> Iterator[Any]:
    """Open a file; raises ArtifactError if it is outside the folder or cannot be read."""
    path = inside(checkpoint / FOLDER, file)
    with _named(path), safe_open(path, "pt") as tensors:
        yield tensors


@contextmanager
def _named(path: Path) -> Iterator[None]:
    """Convert read errors to an ArtifactError that names the file."""
    try:
        yield
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise ArtifactError(f"checkpoint {path} cannot be read: {brief(error)}") from error


def _layout(engine: Engine) -> list[list[str]]:
    """Return the parameter names of each file, in order."""
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


def _writes(number: int) -> bool:
    """Return True if this rank writes the file of a number."""
    return dist.rank() == number % dist.world_size()


def _write(path: Path, content: Content) -> str:
    """Write a file and return its sha256."""
    if isinstance(content, str):
        path.write_text(content, "utf-8")
    else:
        save_tensors(path, content)
    with ThreadPoolExecutor(1) as pool:  # it is read from memory while it is flushed to disk
        flushed = pool.submit(sync_file, path)
        digest = sha256_file(path)
    flushed.result()
    return digest


def _check(index: Index, engine: Engine, checkpoint: Path) -> None:
    """Raise ArtifactError for other parameters or another optimizer."""
    saved = {name for names in index.files.values() for name in names}
    changed = sorted(saved ^ engine.trained.keys())
    if changed or tuple(index.slots) != engine.slots:
        what = f"parameter {changed[0]}" if changed else f"the optimizer's {index.slots}"
        raise ArtifactError(
            f"checkpoint {checkpoint} is of another model or optimizer: {what} (of "
            f"{len(changed)}) is only in one of them; choose another out="
        )
