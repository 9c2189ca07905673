"""`xray embed` and `xray search`: what is encoded, by how many, stopped and taken up again."""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from child_process import SUPPORT, torchrun
from in_process import invoke
from shards import photo, write_tar
from tiny import train

from data_pipelines.decode.transforms import load_pixels
from data_pipelines.ingest.user_data import open_corpus
from data_pipelines.shards.source import open_source
from data_pipelines.text.captions import read_captions
from xray.artifacts.artifact import Artifact
from xray.artifacts.encoders import Encoder, TextEncoder, VisionEncoder, data_of, restore_encoder
from xray.errors import DataError
from xray.search import embed as job
from xray.search import embedding_file
from xray.search.config import EmbedConfig
from xray.search.embedding_file import Embeddings, open_embeddings
from xray.search.quantisation import restored


@pytest.fixture(scope="module")
def artifacts(demo: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Artifact]:
    """A clip artifact with a trained prefix of 8 of its 16 dimensions, a mae and a text one."""
    root = tmp_path_factory.mktemp("artifacts")
    settings = {"clip": ["clip.matryoshka=[8]"], "mae": [], "text": []}
    settings["text"] = ["data.blocks=[{source: photos, samples: 12}]"]
    return {
        stage: train(stage, demo, root / stage, "train.samples=12", *more)
        for stage, more in settings.items()
    }


def xray(*arguments: object, expect: int = 0) -> str:
    result = invoke(*arguments)
    assert result.exit_code == expect, result.output
    return " ".join(result.output.split())


def embedded(artifact: Artifact, source: object, out: Path, *more: object) -> Embeddings:
    xray("embed", artifact.path, source, "--out", out, "--workers", 0, *more)
    return open_embeddings(out)


def rows_of(found: Embeddings) -> np.ndarray:
    return restored(np.concatenate(list(found.chunks())), found.facts)


def alone(artifact: Artifact, pattern: Path, modality: Any) -> tuple[list[str], np.ndarray]:
    """Keys and features of a source, each sample encoded by itself."""
    source, encoder = open_source("test", str(pattern), modality), restore_encoder(artifact)
    assert isinstance(encoder, VisionEncoder)
    data, keys, rows = data_of(artifact, 0), [], []
    encode = encoder.encode_pixels if isinstance(encoder, Encoder) else encoder.features
    for shard, member in source.places():
        pixels = load_pixels(source.sample(shard, member, 32, 4), data, None)[None]
        keys.append(source.index(shard).key(member))
        rows.append(encode(pixels)[0].numpy())
    return keys, np.stack(rows)


@pytest.mark.parametrize(
    ("stage", "shards", "modality", "ending"),
    [
        ("clip", "photos", "image", ".parquet"),
        ("clip", "clips", "video", ".npy"),
        ("mae", "heldout", "image", ".npy"),
    ],
)
def test_pictures_and_clips_as_they_are_encoded_alone(
    artifacts: dict[str, Artifact], demo: Path, tmp_path: Path,
    stage: str, shards: str, modality: str, ending: str,
) -> None:  # fmt: skip
    out = tmp_path / f"x{ending}"
    found = embedded(artifacts[stage], demo / shards, out, "--batch-size", 10)
    keys, expected = alone(artifacts[stage], demo / shards, modality)
    assert np.allclose(rows_of(found), expected, atol=2e-6)
    names = found.names(list(range(len(keys))))
    assert names.keys == keys and set(names.paths) <= {f"{i:05d}.tar" for i in range(9)}
    assert found.facts["artifact"]["digest"] == artifacts[stage].digest
    assert list(tmp_path.iterdir()) == [out] or ending == ".npy"


@pytest.mark.parametrize(
    ("stage", "shards", "modality", "name", "grid"),
    [
        ("clip", "heldout", "image", "x.npy", [4, 4]),
        ("mae", "clips", "video", "x.parquet", [2, 4, 4]),
    ],
)
def test_patch_tokens_as_they_are_encoded_alone(
    artifacts: dict[str, Artifact], demo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    stage: str, shards: str, modality: Any, name: str, grid: list[int],
) -> None:  # fmt: skip
    """In their grid, also at another keep rate; in files whose groups have few rows."""
    monkeypatch.setattr(embedding_file, "GROUP_BYTES", 7 * 2 * 32 * math.prod(grid))
    monkeypatch.setattr(job, "MOST_BYTES", 5 * 4 * 32 * math.prod(grid))
    more = "--patches", "--dtype", "fp16", "--keep-rate", 0.5, "--modality", modality
    found = embedded(artifacts[stage], demo / shards, tmp_path / name, *more)
    source = open_source("test", str(demo / shards), modality)
    encoder = restore_encoder(artifacts[stage])
    assert isinstance(encoder, VisionEncoder)
    data, expected = data_of(artifacts[stage], 0), []
    for place in source.places():
        pixels = load_pixels(source.sample(*place, 32, 4), data, None)[None]
        with torch.no_grad():
            tokens = encoder.vision(encoder.normalize(pixels), 0.5, track=True).dense()
        expected.append(tokens[0].reshape(*grid, 32).numpy())
    chunks = list(found.chunks())
    rows = np.concatenate(chunks)
    assert rows.shape == (24, *grid, 32) and rows.dtype == np.float16 and len(chunks) == 3
    assert np.allclose(rows, np.stack(expected), atol=5e-3)
    assert np.array_equal(found.take(np.array([9, 2, 23])), rows[[9, 2, 23]])
    assert found.facts["grid"] == grid and found.facts["dim"] == 32
    if name.endswith(".npy"):
        assert np.load(tmp_path / name).shape == rows.shape
    told = xray("search", tmp_path / name, "a star", expect=2)
    assert "has patch tokens, and xray search takes one row per sample" in told


def test_patch_tokens_are_refused_where_they_do_not_fit(
    artifacts: dict[str, Artifact], demo: Path, tmp_path: Path
) -> None:
    out = tmp_path / "x.npy"
    command = "embed", artifacts["mae"].path, demo / "heldout", "--out", out, "--workers", 0
    for more in (["--dtype", "int8"], ["--dim", 8]):
        told = xray(*command, "--patches", *more, expect=2)
        assert "--patches: use --dtype fp32 or fp16, and leave out --dim" in told
    xray(*command)
    assert "contains other embeddings (grid: None -> [4, 4])" in xray(
        *command, "--patches", expect=2
    )
    texts = "embed", artifacts["text"].path, demo / "heldout", "--out", tmp_path / "y.npy"
    assert "--patches applies to pictures and clips" in xray(*texts, "--patches", expect=2)


def test_texts_as_they_are_encoded_alone(
    artifacts: dict[str, Artifact], demo: Path, tmp_path: Path
) -> None:
    lines = ["a red circle", "", "one small blue square on white", "  a star  "]
    (tmp_path / "lines.txt").write_text("\r\n".join(lines))
    wanted = [lines[0], lines[2], "a star"]
    for stage in ("clip", "text"):
        found = embedded(artifacts[stage], tmp_path / "lines.txt", tmp_path / f"{stage}.parquet")
        encoder = restore_encoder(artifacts[stage])
        assert isinstance(encoder, Encoder | TextEncoder)
        expected = torch.cat([encoder.encode_text([text]) for text in wanted]).numpy()
        assert np.allclose(rows_of(found), expected, atol=2e-6)
        names = found.names([0, 1, 2])
        assert names.keys == ["1", "3", "4"] and names.texts == wanted
        assert found.facts["left_out"] == {"empty line": 1}
    found = embedded(artifacts["clip"], demo / "heldout", tmp_path / "x.npy", "--texts")
    source = open_source("test", str(demo / "heldout"), "image")
    samples = [(source.index(s).key(m), source.read(s, m)) for s, m in source.places()]
    captions = [(k, c.text) for k, files in samples for c in read_captions(files)]
    names = found.names(list(range(len(found))))
    assert list(zip(names.keys, names.texts or (), strict=True)) == captions
    encoder = restore_encoder(artifacts["clip"])
    assert isinstance(encoder, Encoder)
    expected = encoder.encode_text([text for _, text in captions]).numpy()
    assert np.allclose(rows_of(found), expected, atol=2e-6)


def test_bad_samples_are_left_out_and_named(artifacts: dict[str, Artifact], tmp_path: Path) -> None:
    folder = tmp_path / "photos"
    (folder / "deep").mkdir(parents=True)
    for number in range(6):
        content = b"broken" if number in (1, 4) else photo(number)
        (folder / "deep" / f"{number}.jpg").write_bytes(content)
    (folder / "film.mp4").write_bytes(b"")
    command = ("embed", artifacts["clip"].path, folder, "--out", tmp_path / "x.parquet")
    told = xray(*command, "--batch-size", 2, "--workers", 1)
    assert "4 rows" in told and "undecodable image: 2 (deep/1.jpg:deep/1, deep/4.jpg" in told
    assert "skipped: 1 files that are not image" in told
    write_tar(tmp_path / "0.tar", {"0.jpg": photo(0), "1.mp4": b""})
    told = xray("embed", artifacts["clip"].path, tmp_path, "--out", tmp_path / "z.npy")
    assert "1 row (" in told and "skipped: 1 samples that are not image" in told
    found = open_embeddings(tmp_path / "x.parquet")
    assert found.names([0, 1, 2, 3]).paths == [f"deep/{n}.jpg" for n in (0, 2, 3, 5)]
    files = [folder / "deep" / f"{n}.jpg" for n in (0, 2, 3, 5)]
    xray("embed", artifacts["clip"].path, *files, "--out", tmp_path / "y.npy")
    assert np.allclose(rows_of(found), rows_of(open_embeddings(tmp_path / "y.npy")), atol=2e-6)
    listed = (tmp_path / "x.parquet.left_out.jsonl").read_text().splitlines()
    assert [json.loads(line)["key"] for line in listed] == ["deep/1", "deep/4"]
    (tmp_path / "x.parquet").unlink()
    for number in (1, 4):
        (folder / "deep" / f"{number}.jpg").unlink()
    assert "4 rows" in xray(*command)
    assert not (tmp_path / "x.parquet.left_out.jsonl").exists()
    for number in (0, 2, 3, 5):
        (folder / "deep" / f"{number}.jpg").write_bytes(b"broken")
    command = ("embed", artifacts["clip"].path, folder, "--out", tmp_path / "z.parquet")
    assert "nothing in" in xray(*command, expect=2)


def test_dimensions_and_dtypes(artifacts: dict[str, Artifact], demo: Path, tmp_path: Path) -> None:
    clip, source = artifacts["clip"], demo / "heldout"
    whole = rows_of(embedded(clip, source, tmp_path / "whole.npy"))
    for dim, warns in ((8, False), (5, True), (16, False)):
        out = tmp_path / f"{dim}.npy"
        told = xray("embed", clip.path, source, "--out", out, "--dim", dim)
        assert ("warning: a prefix of 5 dimensions was not trained" in told) == warns
        expected = whole[:, :dim] / np.linalg.norm(whole[:, :dim], axis=1, keepdims=True)
        assert np.allclose(rows_of(open_embeddings(out)), expected, atol=1e-6)
    for dtype, error in (("fp16", 2**-11), ("int8", 0.5 / 127)):
        found = rows_of(embedded(clip, source, tmp_path / f"{dtype}.npy", "--dtype", dtype))
        assert 0 < np.abs(found - whole).max() < error
    signs = rows_of(embedded(clip, source, tmp_path / "bits.parquet", "--dtype", "binary"))
    assert np.array_equal(signs > 0, whole > 0)
    again = ("embed", clip.path, source, "--out", tmp_path / "bits.parquet")
    assert "(dtype: 'binary' -> 'fp32'): delete it" in xray(*again, expect=2)
    less = rows_of(embedded(clip, source, tmp_path / "less.npy", "--keep-rate", 0.5))
    assert not np.allclose(less, whole, atol=1e-3)


@pytest.fixture
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(job, "LEAST", 16)


def test_a_stopped_job_goes_on(
    artifacts: dict[str, Artifact], demo: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, small_parts: None,
) -> None:  # fmt: skip
    def run(name: str, **more: Any) -> job.EmbedReport:
        encoder = restore_encoder(artifacts["clip"])
        corpus = open_corpus([str(demo / "photos")])
        return job.embed(encoder, corpus, EmbedConfig(workers=0, **more), tmp_path / name)

    assert run("whole.parquet", dtype="int8").reused == 0
    save, saved = job._Job._save, []

    def save_or_stop(self: Any, part: int, *what: Any) -> None:
        if len(saved) == 2:
            raise KeyboardInterrupt
        save(self, part, *what)
        saved.append(part)

    monkeypatch.setattr(job._Job, "_save", save_or_stop)
    with pytest.raises(KeyboardInterrupt):
        run("again.parquet", dtype="int8")
    assert saved == [0, 1] and not (tmp_path / "again.parquet").exists()
    (tmp_path / "again.parquet.parts" / "000001").write_bytes(b"cut off")
    monkeypatch.setattr(job._Job, "_save", save)
    with pytest.raises(job.ConfigError, match=r"parts of another command \(dim: 16 -> 8\)"):
        run("again.parquet", dim=8)
    report = run("again.parquet", dtype="int8", batch_size=16)
    assert (report.reused, report.parts, report.rows) == (1, 6, 96)
    one, two = (rows_of(open_embeddings(tmp_path / f"{n}.parquet")) for n in ("whole", "again"))
    assert np.allclose(one, two, atol=1e-4) and not (tmp_path / "again.parquet.parts").exists()
    assert run("again.parquet", dtype="int8").reused == 6  # it is there: nothing is done
    monkeypatch.setattr(job.shutil, "rmtree", lambda folder: None)  # killed before they went
    run("third.parquet")
    monkeypatch.undo()
    assert (tmp_path / "third.parquet.parts").exists() and run("third.parquet").rows == 96
    assert not (tmp_path / "third.parquet.parts").exists()


def test_another_command_is_not_disturbed(
    artifacts: dict[str, Artifact], demo: Path, tmp_path: Path
) -> None:
    out = tmp_path / "x.parquet"
    folder = tmp_path / "x.parquet.parts"
    folder.mkdir()
    command = ["embed", artifacts["clip"].path, demo / "heldout", "--out", out]
    held = (
        "import sys, pathlib, xray.files; "
        "lock = xray.files.lock_folder(pathlib.Path(sys.argv[1]), 'x'); input()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", held, str(folder)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as other:
        while not (folder / "lock").exists() or not (folder / "lock").read_text():
            assert other.poll() is None
            time.sleep(0.05)
        assert f"by another process (process {other.pid} on" in xray(*command, expect=2)
        assert not out.exists()
        other.communicate()
    xray(*command)
    assert len(open_embeddings(out)) == 24 and not folder.exists()


def test_features_that_are_no_numbers_are_refused(
    artifacts: dict[str, Artifact], demo: Path, tmp_path: Path
) -> None:
    encoder = restore_encoder(artifacts["mae"])
    encoder.vision.norm.weight.data[0] = torch.nan
    corpus = open_corpus([str(demo / "heldout")])
    with pytest.raises(DataError, match=r"00000\.tar:000000000: the model's features are NaN"):
        job.embed(encoder, corpus, EmbedConfig(workers=0), tmp_path / "x.npy")


def test_two_processes_write_what_one_does(
    artifacts: dict[str, Artifact], demo: Path, tmp_path: Path, small_parts: None
) -> None:
    files = {f"{n:03d}.jpg": photo(n) if n % 9 else b"broken" for n in range(100)}
    (tmp_path / "mine").mkdir()
    write_tar(tmp_path / "mine" / "00000.tar", files)
    command = ["embed", artifacts["clip"].path, tmp_path / "mine", "--dtype", "int8", "--workers"]
    xray(*command, 0, "--out", tmp_path / "one.parquet")
    arguments = [*command, "1", "--out", tmp_path / "two.parquet"]
    torchrun(str(SUPPORT / "embed_ranks.py"), *map(str, arguments))
    one, two = (tmp_path / f"{name}.parquet" for name in ("one", "two"))
    assert len(open_embeddings(two)) == 88 and open_embeddings(two).facts["left_out"]
    assert np.allclose(rows_of(open_embeddings(one)), rows_of(open_embeddings(two)), atol=1e-5)
    names = [open_embeddings(path).names(list(range(88))) for path in (one, two)]
    assert names[0] == names[1] and len(set(names[0].keys)) == 88


def test_search_prints_and_shows_what_it_finds(
    artifacts: dict[str, Artifact], demo: Path, tmp_path: Path
) -> None:
    out, page = tmp_path / "x.parquet", tmp_path / "page.html"
    found = embedded(artifacts["clip"], demo / "heldout", out)
    told = xray("search", out, "a red circle", "--top", 3, "--html", page)
    encoder = restore_encoder(artifacts["clip"])
    assert isinstance(encoder, Encoder)
    scores = rows_of(found) @ encoder.encode_text(["a red circle"]).numpy()[0]
    best = np.argsort(-scores)[:3]
    assert re.findall(r"\d{9}", told) == found.names(best.tolist()).keys
    assert f"{scores[best[0]]:.4f}" in told
    content = page.read_text()
    assert content.count("data:image/png") == 3 and "http" not in content
    source = open_source("test", str(demo / "heldout"), "image")
    (tmp_path / "query.jpg").write_bytes(source.read(0, source.member(0, 7))["jpg"])
    told = xray("search", out, tmp_path / "query.jpg", "--top", 1, "--html", page)
    assert found.names([7]).keys[0] in told and "1.0000" in told
    assert page.read_text().count("data:image/png") == 2
    film = source_clip(demo, tmp_path)
    embedded(artifacts["clip"], demo / "clips", tmp_path / "clips.npy")
    assert "1.0000" in xray("search", tmp_path / "clips.npy", film, "--html", page)
    assert page.read_text().count("data:image/png") == 11
    (tmp_path / "lines.txt").write_text("a red circle\na blue star\n")
    embedded(artifacts["clip"], tmp_path / "lines.txt", tmp_path / "lines.npy", "--dtype", "binary")
    told = xray("search", tmp_path / "lines.npy", tmp_path / "query.jpg", "--html", page)
    assert "a blue star" in told and "a blue star" in page.read_text()


def source_clip(demo: Path, tmp_path: Path) -> Path:
    source = open_source("test", str(demo / "clips"), "video")
    (tmp_path / "query.mp4").write_bytes(source.read(0, source.member(0, 3))["mp4"])
    return tmp_path / "query.mp4"


def test_mistakes_give_one_line(artifacts: dict[str, Artifact], demo: Path, tmp_path: Path) -> None:
    clip, mae, text = (artifacts[stage].path for stage in ("clip", "mae", "text"))
    (tmp_path / "none").mkdir()
    (tmp_path / "a.txt").write_text("a dog\n")
    (tmp_path / "no.txt").write_text("")
    (tmp_path / "a.jpg").write_bytes(photo(0))
    out, lines = ("--out", tmp_path / "x.npy"), tmp_path / "a.txt"
    for arguments, says in (
        ((clip, tmp_path / "gone", *out), "gone does not exist"),
        ((clip, tmp_path / "gone.jpg", *out), "gone.jpg does not exist"),
        ((clip, tmp_path / "none", *out), "contains neither .tar shards nor pictures or clips"),
        ((clip, tmp_path / "no.txt", *out), "no.txt is empty"),
        ((clip, lines, lines, *out), "give one folder, list, text file or pattern of shards"),
        ((clip, lines, "--out", "x.csv"), "must end in .parquet or .npy"),
        ((clip, lines, *out, "--dtype", "int4"), "use fp32, fp16, int8, binary"),
        ((clip, lines, *out, "--dim", 17), "--dim 17: the artifact has 16 dimensions"),
        ((clip, lines, *out, "--keep-rate", 0.5), "these are texts"),
        ((clip, demo / "clips", *out, "--modality", "image"), "has no image files"),
        ((mae, lines, *out), "texts are encoded by a clip or text artifact"),
        ((text, tmp_path / "a.jpg", *out), "no caption"),
    ):
        assert says in xray("embed", *arguments, expect=2), says
    embedded(artifacts["mae"], tmp_path / "a.jpg", tmp_path / "mae.npy")
    embedded(artifacts["clip"], tmp_path / "a.txt", tmp_path / "x.npy")
    for arguments, says in (
        ((tmp_path / "gone.npy", "a dog"), "gone.npy does not exist"),
        ((lines, "a dog"), "give the artifact that is to embed it as --artifact"),
        ((tmp_path / "x.npy", " "), "the query is empty"),
        ((tmp_path / "x.npy", "gone.jpg"), "gone.jpg does not exist"),
        ((tmp_path / "x.npy", "a dog", "--html", "x.png"), "must end in .html"),
        ((tmp_path / "x.npy", "a dog", "--artifact", mae), "is not the clip artifact"),
        ((tmp_path / "x.npy", "a dog", "--rescore", tmp_path / "mae.npy"), "other rows"),
        ((tmp_path / "mae.npy", "a dog"), "encodes no text: give the file of a picture"),
    ):
        assert says in xray("search", *arguments, expect=2), says
