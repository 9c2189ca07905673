"""Damage to files: flipped bits of every kind, disks that are full, and hostile files."""

from __future__ import annotations

import random
import shutil
import tarfile
from pathlib import Path

from tools.faults.commands import Command, Outcome, same_result, train

# kind of file -> where it is, below a copy of the data (data) or of an unfinished run (run)
FLIPPED = {
    "tar": "data/photos/*.tar",
    "index": "data/photos/*.index",
    "manifest of shards": "data/photos/*.manifest",
    "demo.json": "data/demo.json",
    "checkpoint's weights": "run/mae/checkpoints/step_*/portable/*.safetensors",
    "checkpoint's index": "run/mae/checkpoints/step_*/portable/index.json",
    "checkpoint's state": "run/mae/checkpoints/step_*/state.json",
    "run.json": "run/mae/run.json",
    "config.yaml": "run/mae/config.yaml",
    "metrics.jsonl": "run/mae/metrics.jsonl",
}
ENDINGS = ("jpg", "png", "webp", "gif", "mp4", "mkv", "webm", "txt", "json")
WHOLE = ("tar", "csv", "tsv", "jsonl", "parquet")  # data in one file
CODES = (0, 1, 2)


def flipped_bit(folder: Path, data: Path, rng: random.Random) -> Outcome:
    """Flip a bit of a file below an unfinished run: found, or without an effect on the result."""
    what = rng.choice(list(FLIPPED))
    shutil.copytree(data, folder / "data")
    shutil.copytree(folder.parent / "halfway", folder / "run")
    paths = sorted(folder.glob(FLIPPED[what]))
    if not paths:
        return Outcome(f"flipped bit: {what}", "no such file")
    newest = [path for path in paths if path.parent == paths[-1].parent]  # of the checkpoints
    path = rng.choice(newest)
    content = bytearray(path.read_bytes())
    content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    path.write_bytes(content)
    running = train(folder / "run", folder / "data")
    code = running.wait()
    fault = running.fault(code, CODES)
    if not fault and code == 0 and what != "tar":  # a tar's pictures may be other ones
        log = running.log.read_text("utf-8", errors="replace")
        told = path.name in log or "damaged" in log
        fault = "" if told else same_result(folder.parent / "unkilled", folder / "run")
    return Outcome(f"flipped bit: {what}", fault)


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
        shutil.copy(_picture(data, folder), folder / "files" / f"{number}.jpg")

    def command(bytes_: int) -> Command:
        if kind == "run":
            return train(folder / "run", data, bytes_=bytes_)
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
    picture = _picture(data, folder).read_bytes()
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


def _picture(data: Path, folder: Path) -> Path:
    """Write the first picture of the data to a file."""
    path = folder / "picture.jpg"
    with tarfile.open(min((data / "photos").glob("*.tar"))) as archive:
        file = archive.extractfile(next(each for each in archive if each.name.endswith(".jpg")))
        assert file is not None
        path.write_bytes(file.read())
    return path
