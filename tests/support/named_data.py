"""Data sets in CLIP_benchmark's layout, and evaluations of eval.sets."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from in_process import invoke
from shards import photo, write_tar

if TYPE_CHECKING:
    pass


COLOURS = ("red", "blue", "dark green")


def npy(row: Sequence[int]) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, np.array(row))
    return buffer.getvalue()


def wds(
    folder: Path,
    label: Callable[[int], dict[str, bytes]],
    splits: tuple[str, ...] = ("test",),
    names: bool = True,
    kind: str = "",
    samples: int = 6,
    seed: int = 0,
) -> Path:
    """Write a set as CLIP_benchmark's webdataset builder does, with two shards per split."""
    for number, split in enumerate(splits):
        for shard in range(2):
            files: dict[str, bytes] = {}
            for i in range(shard, samples, 2):
                files[f"s{i:07d}.jpg"] = photo(1000 * seed + 100 * number + i, (32, 32))
                files |= {f"s{i:07d}.{end}": text for end, text in label(i).items()}
            write_tar(folder / split / f"{shard}.tar", files)
        (folder / split / "nshards.txt").write_text("2\n")
    if names:
        (folder / "classnames.txt").write_text("\n".join(COLOURS) + "\n")
        templates = "a photo of a {c}.\na {c} thing\n"
        (folder / "zeroshot_classification_templates.txt").write_text(templates)
    if kind:
        (folder / "dataset_type.txt").write_text(f"{kind}\n")
    return folder


def of_class(i: int) -> dict[str, bytes]:
    return {"cls": str(i % 3).encode()}


def captions(i: int) -> dict[str, bytes]:
    return {"txt": f"picture number {i}\nthe {i}th of them".encode()}


def labels(i: int) -> dict[str, bytes]:
    return {"npy": npy([i % 2, i % 3 == 0, 1])}


def evaluate(clip: Path, sets: Path, out: Path, *more: object) -> dict[str, Any]:
    done = invoke("eval", clip, f"eval.sets={sets}", "data.workers=0", *more, "--out", out)
    assert done.exit_code == 0, (done.stderr, done.exception)
    return {**json.loads((out / "results.json").read_text()), "printed": done.stdout}


def measures(results: dict[str, Any]) -> dict[str, dict[str, dict[str, float]]]:
    return {
        name: {suite: result["measures"] for suite, result in own.items()}
        for name, own in results["sets"].items()
    }


def pictures(folder: Path, split: str = "test") -> list[tuple[bytes, dict[str, bytes]]]:
    """(picture, the other files) of each sample, in the order of the shards, read by tarfile."""
    import tarfile

    found: list[tuple[bytes, dict[str, bytes]]] = []
    for path in sorted((folder / split).glob("*.tar")):
        with tarfile.open(path) as archive:
            own: dict[str, dict[str, bytes]] = {}
            for member in archive:
                key, _, ending = member.name.partition(".")
                file = archive.extractfile(member)
                assert file is not None
                own.setdefault(key, {})[ending] = file.read()
        found += [(files.pop("jpg"), files) for files in own.values()]
    return found


def named(path: Path, sets: dict[str, Any]) -> Path:
    path.write_text(json.dumps(sets))  # json is yaml
    return path
