"""Names in manifests, indexes and archives cannot lead outside their folder."""

from __future__ import annotations

import hashlib
import io
import json
import shutil
import tarfile
from pathlib import Path

import pytest
from hostile_files import llm_loader
from in_process import invoke
from shards import jpeg, write_tar

from data_pipelines.shards import columns
from data_pipelines.shards.source import open_source
from xray.artifacts.artifact import open_artifact
from xray.artifacts.lineage import lineage
from xray.errors import ArtifactError, ConfigError, DataError


def test_manifests_cannot_name_files_outside(tagger: Path, tmp_path: Path) -> None:
    artifact, outside = tmp_path / "artifact", tmp_path / "outside.json"
    shutil.copytree(tagger, artifact)
    outside.write_text("{}")
    manifest = json.loads((artifact / "manifest.json").read_text())
    digest = hashlib.sha256(b"{}").hexdigest()
    names = ["../outside.json", str(outside), "a/../../outside.json", "lineage/../../outside.json"]
    names += ["", "."]
    for name in names:
        forged = {**manifest, "files": {**manifest["files"], name: digest}}
        (artifact / "manifest.json").write_text(json.dumps(forged))
        for use in (open_artifact, lineage):
            with pytest.raises(ArtifactError, match="names a file outside its folder"):
                use(artifact)
            with pytest.raises(ArtifactError, match="names a file outside its folder"):
                use(f"file://{artifact}")
    forged = {**manifest, "files": {**manifest["files"], "link.json": digest}}
    (artifact / "manifest.json").write_text(json.dumps(forged))
    (artifact / "link.json").symlink_to(outside)
    with pytest.raises(ArtifactError, match=r"names a file outside of it: link\.json"):
        open_artifact(artifact)
    for damaged in (
        [],
        {"schema": 1},
        {**manifest, "files": []},
        {**manifest, "parents": {"vision": {}}},
    ):
        (artifact / "manifest.json").write_text(json.dumps(damaged))
        with pytest.raises(ArtifactError, match=r"manifest\.json"):
            lineage(artifact)


def test_an_llms_index_cannot_name_weights_outside(demo: Path, tmp_path: Path) -> None:
    shutil.copy(demo / "llm" / "model.safetensors", tmp_path / "outside.safetensors")
    names = {"weight_map": {"embed_tokens.weight": "../outside.safetensors"}}
    index: dict[str, bytes | None] = {
        "model.safetensors": None,
        "model.safetensors.index.json": json.dumps(names).encode(),
    }
    with pytest.raises(ConfigError, match=r"names a file outside its folder: \.\./outside"):
        llm_loader(demo, tmp_path / "llm", index)()


def test_a_manifest_at_a_url_cannot_name_shards_outside(tmp_path: Path) -> None:
    folder = tmp_path / "photos"
    (folder / "in").mkdir(parents=True)
    write_tar(folder / "0.tar", {"0.jpg": jpeg()})
    write_tar(folder / "in" / "0.tar", {"0.jpg": jpeg()})
    assert invoke("data", "index", folder).exit_code == 0
    table, facts = columns.open_columns(folder / ".xray" / "shards.manifest")
    table["names"], table["name_ends"] = columns.pack_texts(["../0.tar"])
    columns.save_columns(folder / "in" / "shards.manifest", table, facts)
    with pytest.raises(DataError, match=r"shards\.manifest lists shards outside its folder"):
        open_source("photos", f"file://{folder}/in", "image")


def test_archives_write_nothing_outside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    outside, folder = tmp_path / "outside", tmp_path / "in" / "photos"
    outside.mkdir()
    folder.mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "in")  # reports are written to the working folder
    (outside / "kept.txt").write_text("as it was")
    paths = ["../../outside/a", str(folder / "../../outside/b"), str(outside / "c"), "../d", "e"]
    with tarfile.open(folder / "0.tar", "w") as archive:
        for path in paths:
            for ending, content in (("jpg", jpeg()), ("txt", b"words")):
                member = tarfile.TarInfo()
                member.name, member.size = f"{path}.{ending}", len(content)
                archive.addfile(member, io.BytesIO(content))
        for kind, name in ((tarfile.SYMTYPE, "link.txt"), (tarfile.LNKTYPE, "hard.txt")):
            member = tarfile.TarInfo(name)
            member.type, member.linkname = kind, str(outside / "kept.txt")
            archive.addfile(member)
    (tmp_path / "metadata.txt").write_text("words\n")
    listed = tmp_path / "in" / "list.csv"
    (tmp_path / "in" / "up.jpg").write_bytes(jpeg())
    listed.write_text("file,caption,key\nphotos/../up.jpg,words,../../outside/f\n")
    before = tree(outside)
    for command in (
        ["data", "index", folder],
        ["data", "check", folder],
        ["data", "pack", listed, tmp_path / "in" / "packed"],
    ):
        done = invoke(*command)
        assert done.exit_code in (0, 1), done.output
    with tarfile.open(tmp_path / "in" / "packed" / "00000.tar") as archive:
        assert all("/" not in name for name in archive.getnames())
    metadata = f"metadata={tmp_path / 'metadata.txt'}"  # curate refuses to copy such names
    done = invoke("data", "curate", folder, metadata, "t=9", "--out", tmp_path / "in" / "curated")
    assert done.exit_code == 2 and "would be unpacked outside of the folder" in done.stderr
    assert tree(outside) == before
    known = {"in", "outside", "cache", "metadata.txt"}
    assert {path.name for path in tmp_path.iterdir()} <= known


def tree(folder: Path) -> dict[str, str]:
    return {str(path): path.read_text() for path in folder.rglob("*") if path.is_file()}
