"""Disks that are full, and hostile files."""

from __future__ import annotations

import random
import shutil
import tarfile
from pathlib import Path

from tools.faults.commands import CODES, Command, Outcome, same_result, train
from tools.faults.kills import STAGES

ENDINGS = ("jpg", "png", "webp", "gif", "mp4", "mkv", "webm", "txt", "json")
WHOLE = ("tar", "csv", "tsv", "jsonl", "parquet")  # data in one file


def full_disk(folder: Path, data: Path, rng: random.Random) -> Outcome:
    """Let no file grow beyond a size: one line; then the same command without a limit ends well."""
    kind = rng.choice(("run", "tiny-llm", "tags", "pack"))
    size = int(10 ** rng.uniform(2, 5))
    log = folder / f"{kind}.log"
    arguments: dict[str, list[object]] = {
        "tiny-llm": ["data", "tiny-llm", folder / "llm", "--captions", data / "photos"],
        "tags": ["data", "tags", data / "photos", "--out", folder / "tags.json", "--workers", 1],
        "pack": ["data", "pack", folder / "files", folder / "packed", "workers=1"],
    }
    (folder / "files").mkdir()
    for number in range(3):
        (folder / "files" / f"{number}.txt").write_text(f"picture {number}", "utf-8")
        shutil.copy(first_picture(data, folder), folder / "files" / f"{number}.jpg")

    def command(bytes_: int) -> Command:
        if kind == "run":
            return train(folder / "run", data, *STAGES, bytes_=bytes_)
        log.unlink(missing_ok=True)
        return Command(log, *arguments[kind], bytes_=bytes_)

    limited = command(size)
    fault = limited.fault(limited.wait(), CODES)
    if not fault:
        again = command(0)
        fault = again.fault(again.wait(), (0,))
    if not fault and kind == "run":
        fault = same_result(folder.parent / "unkilled", folder / "run")
    return Outcome(f"full disk: {kind}", fault)


def hostile_files(folder: Path, data: Path, rng: random.Random) -> Outcome:
    """Check random bytes, damaged pictures and tables: a report or one line, and no hang."""
    picture = first_picture(data, folder).read_bytes()
    target = folder / "files"
    target.mkdir()
    for number in range(6):
        content = rng.randbytes(rng.randint(0, 3000))
        if rng.random() < 0.6:
            content = bytearray(picture)
            for _ in range(rng.randint(1, 30)):
                content[rng.randrange(len(content))] = rng.randrange(256)
            content = bytes(content[: rng.randint(1, len(content))])
        (target / f"{number}.{rng.choice(ENDINGS)}").write_bytes(content)
    what: Path = target
    if rng.random() < 0.5:
        ending = rng.choice(WHOLE)
        what = folder / f"one.{ending}"
        head = b"file,caption\n" if ending == "csv" else rng.randbytes(8)
        what.write_bytes(head + rng.randbytes(rng.randint(0, 4000)))
    running = Command(folder / "check.log", "data", "check", what, "--workers", 1)
    return Outcome("hostile files", running.fault(running.wait(), CODES))


def first_picture(data: Path, folder: Path) -> Path:
    """Write the first picture of the data to a file."""
    path = folder / "picture.jpg"
    with tarfile.open(min((data / "photos").glob("*.tar"))) as archive:
        file = archive.extractfile(next(each for each in archive if each.name.endswith(".jpg")))
        assert file is not None
        path.write_bytes(file.read())
    return path
