"""Lineage of artifacts, and loading them after they were moved, copied or put at a URL."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import fsspec
import pytest
import torch
from in_process import invoke
from tiny import train

from xray.artifacts.artifact import open_artifact
from xray.artifacts.encoders import Encoder
from xray.artifacts.lineage import Link, lineage
from xray.errors import ArtifactError

STAGES = ["clip", "hashtag", "mae", "text"]
Copy = Callable[[str], Path]


@pytest.fixture(scope="module")
def runs(demo: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run of one step per stage, which these tests move and change."""
    root, short = tmp_path_factory.mktemp("chain"), "train.samples=12"
    train("mae", demo, root / "mae", short, "model.keep_rate=1.0")
    train("hashtag", demo, root / "hashtag", short, init_from=[root / "mae" / "artifact"])
    train("text", demo, root / "text", short)
    parents = [root / "hashtag" / "artifact", root / "text" / "artifact"]
    train("clip", demo, root / "clip", short, init_from=parents)
    return root


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def copied(runs: Path, tmp_path: Path) -> Copy:
    """Return a function that copies a stage's artifact to another folder."""

    def copy(stage: str) -> Path:
        shutil.copytree(runs / stage / "artifact", tmp_path / "elsewhere" / stage)
        return tmp_path / "elsewhere" / stage

    return copy


@contextmanager
def gone(path: Path) -> Iterator[None]:
    """Rename a folder while the block runs."""
    aside = path.with_name(f"{path.name}.aside")
    path.rename(aside)
    try:
        yield
    finally:
        aside.rename(path)


@contextmanager
def changed(path: Path) -> Iterator[None]:
    """Flip one bit of a file's last byte while the block runs; its format cannot notice."""
    whole = path.read_bytes()
    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    try:
        yield
    finally:
        path.write_bytes(whole)


def put(folder: Path, url: str) -> None:
    fs, path = fsspec.core.url_to_fs(url)
    fs.put(str(folder), path, recursive=True)


# lineage ----------------------------------------------------------------------------------------


def test_lineage_lists_hashes_samples_and_changed_settings(runs: Path) -> None:
    done = invoke("lineage", runs / "clip", "--json")
    assert done.exit_code == 0, done.stderr
    rows = json.loads(done.stdout)
    assert [(row["stage"], row["slot"], row["depth"]) for row in rows] == [
        ("clip", "", 0), ("hashtag", "vision", 1), ("mae", "vision", 2), ("text", "text", 1),
    ]  # fmt: skip
    clip, hashtag, mae, text = rows
    for row in rows:
        manifest = runs / row["stage"] / "artifact" / "manifest.json"
        assert row["manifest"] == hashlib.sha256(manifest.read_bytes()).hexdigest()
        assert row["path"] == str(manifest.parent) and row["where"] == "found" and row["sound"]
        content = json.loads(manifest.read_text())
        for key in ("samples", "data_digest", "config_hash", "versions", "inputs", "metrics"):
            assert row[key] == content[key], key
        assert row["files"] == {}  # no file was hashed
    assert clip["parents"] == {"vision": hashtag["manifest"], "text": text["manifest"]}
    assert "model.keep_rate: 1.0 -> 0.7" in mae["differs"]
    assert not any("keep_rate" in line for line in hashtag["differs"])
    assert "text.tune: 'lora' -> 'none'" in text["differs"] and clip["differs"] == []
    assert not any("workers" in line or "llm" in line for row in rows for line in row["differs"])
    words = invoke("lineage", runs / "clip").stdout
    assert "12 samples seen" in words and "its child changed model.keep_rate: 1.0 -> 0.7" in words
    assert f"inputs: llm {clip['inputs']['llm'][:12]}" in words and "torch" in words


def test_verify_hashes_every_file_and_names_the_changed_one(
    runs: Path, demo: Path, tmp_path: Path
) -> None:
    weights = runs / "hashtag" / "artifact" / "backbone.safetensors"
    whole = invoke("lineage", runs / "clip", "--verify")
    named = [json.loads((runs / s / "artifact" / "manifest.json").read_text()) for s in STAGES]
    assert whole.exit_code == 0
    assert whole.stdout.count(" ok\n") == sum(len(manifest["files"]) for manifest in named)
    with changed(weights):
        assert invoke("lineage", runs / "clip").exit_code == 0  # only manifests are read
        broken = invoke("lineage", runs / "clip", "--verify")
        assert broken.exit_code == 1 and "backbone.safetensors changed" in broken.stdout
        with pytest.raises(ArtifactError, match=r"backbone\.safetensors was changed after"):
            train("clip", demo, tmp_path / "clip", "train.samples=12", init_from=[weights.parent])
        assert not (tmp_path / "clip").exists()
    with gone(weights):
        broken = invoke("lineage", runs / "clip", "--verify")
        assert broken.exit_code == 1 and "backbone.safetensors missing" in broken.stdout
    extra = runs / "clip" / "artifact" / "llm" / "added_tokens.json"
    extra.write_text("{}")
    broken = invoke("lineage", runs / "clip", "--verify")
    assert broken.exit_code == 1 and "llm/added_tokens.json unnamed" in broken.stdout
    with pytest.raises(ArtifactError, match=r"added_tokens.json is not listed in .* manifest"):
        open_artifact(runs / "clip")
    extra.unlink()


def test_an_artifact_alone_contains_its_lineage(runs: Path, copied: Copy) -> None:
    clip = copied("clip")
    with gone(runs):
        rows = lineage(clip, verify=True)
        words = invoke("lineage", clip)
    assert [row.stage for row in rows] == STAGES and all(row.manifest for row in rows)
    assert [row.where for row in rows] == ["found", "gone", "gone", "gone"]
    assert words.exit_code == 0 and words.stdout.count("samples seen") == 4
    assert f"no longer at {runs / 'mae' / 'artifact'}\n    " in words.stdout
    assert rows[2].digest in words.stdout


def test_another_artifact_at_an_ancestors_path_is_detected(runs: Path, copied: Copy) -> None:
    mae = runs / "mae"
    with gone(mae):
        shutil.copytree(runs / "text", mae)
        done = invoke("lineage", runs / "hashtag")
        shutil.rmtree(mae)
    assert done.exit_code == 1
    assert f"no longer at {mae / 'artifact'}, where another artifact is now" in done.stdout
    forged = copied("hashtag")
    with changed(next((forged / "lineage").iterdir())):
        done = invoke("lineage", forged)
    assert done.exit_code == 1 and ".json changed" in done.stdout


def test_artifacts_without_their_ancestors_manifests_still_open(copied: Copy, runs: Path) -> None:
    """Older artifacts do not contain them; lineage reads the ancestors if they are found."""
    old = copied("clip")
    manifest = json.loads((old / "manifest.json").read_text())
    manifest["files"] = {k: v for k, v in manifest["files"].items() if "lineage/" not in k}
    (old / "manifest.json").write_text(json.dumps(manifest))
    shutil.rmtree(old / "lineage")

    def stages(links: list[Link]) -> list[tuple[str, bool]]:
        return [(link.stage, link.manifest is not None) for link in links]

    assert stages(lineage(old)) == [(stage, True) for stage in STAGES]
    with gone(runs):
        assert stages(lineage(old)) == [("clip", True), ("hashtag", False), ("text", False)]
        assert "nothing else is known" in invoke("lineage", old).stdout
        open_artifact(old)


# other places -----------------------------------------------------------------------------------


def test_a_copied_artifact_works_without_its_run(
    runs: Path, copied: Copy, demo: Path, tmp_path: Path
) -> None:
    clip, hashtag, mae = copied("clip"), copied("hashtag"), copied("mae")
    pixels = torch.randint(0, 256, (2, 1, 3, 32, 32), dtype=torch.uint8)
    before = Encoder(open_artifact(runs / "clip")).encode_pixels(pixels)
    sets = [f"eval.retrieval={{shards: {demo / 'heldout'}}}", "--suite", "retrieval"]
    llm = tmp_path / "copied llm"
    shutil.copytree(demo / "llm", llm)
    with gone(runs), gone(demo / "llm"):
        lost = invoke("eval", clip, *sets)
        assert lost.exit_code == 2 and len(lost.stderr.strip().splitlines()) == 1
        assert f"the LLM is not at {demo / 'llm'}: set text.llm" in lost.stderr
        done = invoke("eval", clip, f"text.llm={llm}", *sets)
        assert done.exit_code == 0, done.stderr
        assert "text to image R@1" in done.stdout
        after = Encoder(open_artifact(clip, str(llm))).encode_pixels(pixels)
        assert torch.equal(before, after)
        tagged = invoke("data", "pseudo-tags", hashtag, demo / "heldout", "workers=0")
        assert tagged.exit_code == 0, tagged.stderr
        scored = invoke("data", "scores", clip, demo / "heldout", "workers=0", f"llm={llm}")
        assert scored.exit_code == 0, scored.stderr
        short = ["train.samples=12", f"text.llm={llm}"]
        child = train("clip", demo, tmp_path / "c", *short, init_from=[clip])
        assert child.manifest["parents"]["vision"]["path"] == str(clip)
        taught = [f"clip.teacher={clip}", *short]  # the teacher uses the LLM of the run
        assert train("clip", demo, tmp_path / "t", *taught).manifest["inputs"]["teacher"]
        assert train("hashtag", demo, tmp_path / "h", short[0], init_from=[mae]).path.is_dir()


def test_a_url_works_like_a_folder(
    runs: Path, demo: Path, tmp_path: Path, server: tuple[str, Path, list[str]]
) -> None:
    address, folder, seen = server
    for stage in ("hashtag", "text", "clip"):
        shutil.copytree(runs / stage / "artifact", folder / stage / "artifact")
    url = f"{address}/hashtag"  # the folder of a run works too
    child = train("clip", demo, tmp_path / "clip", "train.samples=12",
                  init_from=[url, f"{address}/text/artifact/"])  # fmt: skip
    parent = child.manifest["parents"]["vision"]
    assert parent["path"] == f"{url}/artifact"
    digest = hashlib.sha256((runs / "hashtag" / "artifact" / "manifest.json").read_bytes())
    assert parent["manifest"] == digest.hexdigest()
    begun = len(seen)
    rows = lineage(child.path, verify=True)  # lineage does not contact the server
    assert [row.where for row in rows] == ["found", "url", "found", "url"] and len(seen) == begun
    assert "which was not checked" in invoke("lineage", child.path).stdout
    begun = len(seen)
    done = invoke("lineage", f"{address}/clip")
    assert done.exit_code == 0 and done.stdout.count("samples seen") == 4
    assert not any("safetensors" in request for request in seen[begun:])
    assert "head.safetensors ok" in invoke("lineage", f"{address}/clip", "--verify").stdout
    sets = [f"eval.retrieval={{shards: {demo / 'heldout'}}}", "--suite", "retrieval"]
    assert invoke("eval", f"{address}/clip", *sets).exit_code == 0
    with changed(folder / "clip" / "artifact" / "head.safetensors"):
        broken = invoke("lineage", f"{address}/clip", "--verify")
        assert broken.exit_code == 1 and "head.safetensors changed" in broken.stdout


@pytest.mark.parametrize("scheme", ["memory", "file"])
def test_an_artifact_is_loaded_from_any_fsspec_url(runs: Path, tmp_path: Path, scheme: str) -> None:
    url = f"{scheme}:///{tmp_path}/bucket/clip".replace("////", "///")
    put(runs / "clip" / "artifact", url)
    here, there = open_artifact(runs / "clip"), open_artifact(url)
    assert there.digest == here.digest and there.origin == url
    for part in here.manifest["tensors"]:
        theirs = there.load(part)
        assert all(torch.equal(tensor, theirs[name]) for name, tensor in here.load(part).items())
    with pytest.raises(ArtifactError, match="nothing is not an artifact: it has no manifest"):
        open_artifact(f"{scheme}:///{tmp_path}/nothing".replace("////", "///"))


def test_a_url_is_fetched_once_per_host_and_the_copy_is_verified(
    runs: Path, server: tuple[str, Path, list[str]]
) -> None:
    address, folder, seen = server
    shutil.copytree(runs / "hashtag" / "artifact", folder / "hashtag")
    url = f"{address}/hashtag"
    with ThreadPoolExecutor(4) as ranks:  # each takes its own lock, as processes do
        opened = list(ranks.map(open_artifact, [url] * 4))
    files = opened[0].manifest["files"]
    for name in files:
        assert sum(request.endswith(f"/{name}") for request in seen) == 1, name
    weights = opened[0].file("backbone.safetensors")
    (weights.parent / "lineage" / "more.json").write_text("{}")
    with changed(weights):
        repaired = open_artifact(url)
        assert repaired.load("backbone") and len(list((weights.parent / "lineage").iterdir())) == 1
        assert sum(request.endswith("/backbone.safetensors") for request in seen) == 2
    (folder / "hashtag" / "head.safetensors").unlink()
    shutil.rmtree(weights.parent)
    with pytest.raises(ArtifactError, match=rf"{url}/head.safetensors is missing"):
        open_artifact(url)
    (folder / "hashtag" / "head.safetensors").write_bytes(b"another")
    with pytest.raises(ArtifactError, match=rf"{url}/head.safetensors was changed"):
        open_artifact(url)
    assert not (weights.parent / "head.safetensors").exists()
