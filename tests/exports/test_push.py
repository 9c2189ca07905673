"""`xray push`, and `hf://` artifacts: against a stand-in of the hub's HTTP API."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from export_checks import assert_refused
from hub_server import ORG, READER, SIGNED, TOKEN, HubServer, Repository, hub_server
from in_process import invoke
from safetensors.torch import load

import xray
from xray.artifacts import shards
from xray.artifacts.artifact import open_artifact
from xray.errors import ArtifactError
from xray.exports.convert import convert
from xray.files import sha256_file

RUNS = Path(__file__).parents[1] / "fixtures" / "9205be0" / "runs"
CLIP, TAGGER = (RUNS / "full" / stage / "artifact" for stage in ("clip", "hashtag"))
TARGET = f"hf://{ORG}/photos"
LICENCE = ("--license", "apache-2.0")
COMMIT = f"POST /api/models/{ORG}/photos/commit/main"


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[HubServer]:
    """A hub that the token of this process may write to."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    with hub_server(monkeypatch, TOKEN) as server:
        yield server


def published(hub: HubServer) -> Repository:
    return hub.repositories[f"models/{ORG}/photos"]


def test_an_artifact_is_pushed_once_and_then_only_what_differs(hub: HubServer) -> None:
    done = invoke("push", CLIP, TARGET, *LICENCE)
    names = {*open_artifact(CLIP).manifest["files"], "manifest.json", "README.md"}
    assert (
        f"pushed: {len(names)} files, 0 unchanged" in done.stdout and f"{ORG}/photos" in done.stdout
    )
    files = published(hub).revisions["main"]
    assert files.keys() == names | {".gitattributes"}
    assert all(files[name] == (CLIP / name).read_bytes() for name in names - {"README.md"})
    card = files["README.md"].decode()
    assert card.startswith("---\nlicense: apache-2.0\nlibrary_name: xray\n")
    assert f'xray.load("{TARGET}")' in card and "nobody has stated it" not in card
    assert "license: unknown" in (CLIP / "README.md").read_text()  # the folder stays as it is

    hub.seen.clear()
    assert "nothing to push" in invoke("push", CLIP, TARGET, *LICENCE).stdout
    assert not any("commit" in line or "lfs" in line for line in hub.seen)
    hub.uploaded.clear()
    assert "pushed: 1 file," in invoke("push", CLIP, TARGET, "--license", "MIT").stdout
    assert b"license: mit\n" in published(hub).revisions["main"]["README.md"]
    assert not hub.uploaded and len(published(hub).commits) == 2


def test_a_push_that_was_stopped_leaves_nothing_and_is_continued(hub: HubServer) -> None:
    hub.faults[COMMIT] = [500]
    stopped = invoke("push", CLIP, TARGET, *LICENCE)
    assert_refused(stopped, f"was not pushed to {TARGET}")
    assert "run the same command to continue" in stopped.stderr
    assert set(published(hub).revisions["main"]) == {".gitattributes"} and hub.uploaded
    hub.uploaded.clear()
    assert invoke("push", CLIP, TARGET, *LICENCE).exit_code == 0
    assert not hub.uploaded  # the large files were there, but in no commit
    assert "manifest.json" in published(hub).revisions["main"]


def test_the_parts_of_an_earlier_artifact_are_removed_and_people_s_files_kept(
    hub: HubServer,
) -> None:
    invoke("push", CLIP, TARGET, *LICENCE)
    hub.add(f"models/{ORG}/photos", {"examples.md": b"mine", "figures/a.png": b"png"})
    done = invoke("push", TAGGER, TARGET, *LICENCE)
    assert " removed" in done.stdout
    files = published(hub).revisions["main"]
    named = {*open_artifact(TAGGER).manifest["files"], "manifest.json", "README.md"}
    assert files.keys() == named | {".gitattributes", "examples.md", "figures/a.png"}


def test_a_pushed_artifact_is_opened_by_its_address(
    hub: HubServer, media: Path, tmp_path: Path
) -> None:
    invoke("push", TAGGER, f"{TARGET}@v2", *LICENCE)
    assert "manifest.json" not in published(hub).revisions["main"]
    assert_refused(invoke("lineage", TARGET), f"xray import {TARGET} reads released weights")
    address, here = f"{TARGET}@v2", open_artifact(TAGGER)
    opened = open_artifact(address)
    assert opened.digest == here.digest and opened.origin == address
    pixels = xray.load(str(TAGGER)).encode_image(media / "photo.jpg")
    assert (xray.load(address).encode_image(media / "photo.jpg") == pixels).all()
    made = tmp_path / "made"
    assert invoke("export", address, "--to", "safetensors", "--out", made).exit_code == 0
    assert invoke("show", address, media / "photo.jpg", "--out", tmp_path / "a.png").exit_code == 0
    out = ("--out", tmp_path / "e.npy")
    assert invoke("embed", address, media, *out).exit_code == 0


def test_an_artifact_that_was_pushed_again_is_read_anew(hub: HubServer) -> None:
    invoke("push", CLIP, TARGET, *LICENCE)
    assert open_artifact(TARGET).stage == "clip"
    invoke("push", TAGGER, TARGET, *LICENCE)
    assert open_artifact(TARGET).stage == "hashtag"


def test_large_weights_are_sent_in_parts_and_joined_again(
    hub: HubServer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    artifact = open_artifact(CLIP)
    monkeypatch.setattr(shards, "SHARD", 8_000)
    invoke("push", CLIP, TARGET, *LICENCE)
    files = published(hub).revisions["main"]
    parts = sorted(name for name in files if name.startswith("backbone-"))
    assert "backbone.safetensors" not in files and len(parts) > 2
    assert parts[-1] == f"backbone-{len(parts):05d}-of-{len(parts):05d}.safetensors"
    weights = {name: tensor for part in parts for name, tensor in load(files[part]).items()}
    expected = artifact.load("backbone")
    assert weights.keys() == expected.keys()
    assert all(torch.equal(weights[name], expected[name]) for name in expected)
    index = json.loads(files["backbone.safetensors.index.json"])
    assert index["weight_map"].keys() == expected.keys()
    opened = open_artifact(TARGET)  # verifies every byte
    assert (opened.path / "backbone.safetensors").read_bytes() == (
        CLIP / "backbone.safetensors"
    ).read_bytes()
    assert not list(opened.path.glob("*-of-*"))

    hub.seen.clear()
    assert "nothing to push" in invoke("push", CLIP, TARGET, *LICENCE).stdout
    monkeypatch.setattr(shards, "SHARD", 5_000_000_000)
    done = invoke("push", CLIP, TARGET, *LICENCE)
    assert " removed" in done.stdout and "backbone.safetensors" in published(hub).revisions["main"]
    assert not any("-of-" in name for name in published(hub).revisions["main"])
    del published(hub).revisions["main"]["backbone.safetensors"]
    shutil.rmtree(tmp_path / "home")
    with pytest.raises(ArtifactError, match=r"backbone.safetensors is missing"):
        open_artifact(TARGET)


def test_parts_of_weights_in_a_subfolder_are_joined_there(
    hub: HubServer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    copy, name = tmp_path / "copy", "parts/backbone.safetensors"
    above = (CLIP / "backbone.safetensors").read_bytes()
    shutil.copytree(CLIP, copy)
    (copy / "parts").mkdir()
    below = above[:-1] + bytes([above[-1] ^ 1])  # its parts have the names of the other's
    (copy / name).write_bytes(below)
    manifest = json.loads((copy / "manifest.json").read_text())
    manifest["files"][name] = sha256_file(copy / name)
    (copy / "manifest.json").write_text(json.dumps(manifest))
    monkeypatch.setattr(shards, "SHARD", 8_000)
    assert invoke("push", copy, TARGET, *LICENCE).exit_code == 0
    files = published(hub).revisions["main"]
    assert f"{name}.index.json" in files and name not in files
    opened = open_artifact(TARGET).path
    assert (opened / name).read_bytes() == below
    assert (opened / "backbone.safetensors").read_bytes() == above


def test_an_export_is_pushed_and_loaded_by_its_library(hub: HubServer, tmp_path: Path) -> None:
    import timm

    folder = tmp_path / "timm"
    convert(open_artifact(TAGGER), "timm", folder)
    (folder / ".cache").mkdir()
    (folder / ".cache" / "notes.json").write_text("{}")
    assert_refused(invoke("push", folder, TARGET), "has no licence: give one with --license")
    assert invoke("push", folder, TARGET, *LICENCE).exit_code == 0
    files = published(hub).revisions["main"]
    assert files.keys() == {"README.md", "config.json", "model.safetensors", ".gitattributes"}
    name = f"hf-hub:{ORG}/photos"
    assert name in files["README.md"].decode()
    models = [
        timm.create_model(place, pretrained=True, cache_dir=tmp_path / "cache").eval()
        for place in (name, f"local-dir:{folder}")
    ]
    pixels = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(models[0](pixels), models[1](pixels))


def test_private_is_for_new_repositories_only(hub: HubServer) -> None:
    assert invoke("push", CLIP, TARGET, *LICENCE, "--private").exit_code == 0
    assert published(hub).private
    assert invoke("push", TAGGER, TARGET, *LICENCE, "--private").exit_code == 0
    published(hub).private = False
    hub.uploaded.clear()
    done = invoke("push", CLIP, TARGET, *LICENCE, "--private")
    assert_refused(done, "exists and is public: --private is for a new repository")
    assert not hub.uploaded


MISTAKES: dict[str, tuple[object, ...]] = {
    "has no licence: give one with --license": (CLIP, TARGET),
    "give an SPDX identifier": (CLIP, TARGET, "--license", "my own"),
    "give hf://ORG/NAME": (CLIP, f"{ORG}/photos", *LICENCE),
    "is not a model on the hub": (CLIP, f"hf://datasets/{ORG}/photos", *LICENCE),
    "is no address on the hub": (CLIP, "hf://photos", *LICENCE),
    "neither an artifact nor an export": (RUNS.parent, TARGET, *LICENCE),
    "your token does not permit this": (CLIP, "hf://others/photos", *LICENCE),
}


@pytest.mark.parametrize("words", MISTAKES)
def test_a_mistake_is_one_line_and_sends_nothing(hub: HubServer, words: str) -> None:
    assert_refused(invoke("push", *MISTAKES[words]), words)
    assert not hub.repositories and not hub.uploaded


TOKENS: dict[str, tuple[str, str]] = {  # words of the error -> token, state of the hub
    "run `hf auth login`, or set HF_TOKEN": ("", ""),
    "the hub does not accept your token": ("hf_" + "x" * 34, ""),
    "your token does not permit this": (READER, ""),
    "HF_HUB_OFFLINE is set": (TOKEN, "offline"),
    "does not answer": (TOKEN, "gone"),
}


@pytest.mark.parametrize("words", TOKENS)
def test_a_push_without_access_is_one_line(
    hub: HubServer, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    token, state = TOKENS[words]
    monkeypatch.setenv("HF_TOKEN", token)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", state == "offline")
    if state == "gone":
        monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    assert_refused(invoke("push", CLIP, TARGET, *LICENCE), words)
    assert not hub.repositories


def test_files_with_credentials_are_not_sent(hub: HubServer, tmp_path: Path) -> None:
    secrets: dict[str, Callable[[str], str]] = {
        "README.md": lambda text: f"{text}\nwget https://bob:PaSSw0rd@example.org/a.tar\n",
        "manifest.json": lambda text: json.dumps(json.loads(text) | {"note": TOKEN}),
    }
    for name, spoil in secrets.items():
        copy = tmp_path / name
        shutil.copytree(CLIP, copy)
        (copy / name).write_text(spoil((copy / name).read_text()))
        done = invoke("push", copy, TARGET, *LICENCE)
        assert_refused(done, f"{name} contains credentials")
        assert "PaSSw0rd" not in done.output and TOKEN not in done.output
    assert not hub.repositories


def exported(folder: Path) -> Path:
    """Write what push takes for an export."""
    folder.mkdir(parents=True)
    (folder / "README.md").write_text(
        "---\nlicense: mit\n---\n# Photos, exported by xray to timm\n"
    )
    (folder / "model.safetensors").write_bytes(b"weights")
    return folder


def test_links_in_a_folder_are_not_followed(hub: HubServer, tmp_path: Path) -> None:
    (tmp_path / "secret").mkdir()
    (tmp_path / "secret" / "id_rsa").write_text("private")
    targets = {"notes.txt": "../secret/id_rsa", "more": "../secret", "all.txt": "model.safetensors"}
    for name, target in targets.items():
        folder = exported(tmp_path / name.partition(".")[0])
        (folder / name).symlink_to(target)
        assert_refused(invoke("push", folder, TARGET), f"{name} is a link, and was not sent")
    copy = tmp_path / "copy"
    shutil.copytree(CLIP, copy)
    (copy / "README.md").unlink()
    (copy / "README.md").symlink_to("../secret/id_rsa")
    done = invoke("push", copy, TARGET, *LICENCE)
    assert_refused(done, "names a file outside of it: README.md")
    assert not hub.repositories


def test_every_small_text_is_searched_for_credentials(hub: HubServer, tmp_path: Path) -> None:
    texts = {
        "train.env": f"HF_TOKEN={TOKEN}".encode(),
        "logs/latin.txt": f"\xe9 {TOKEN}".encode("latin-1"),
    }
    for name, text in texts.items():
        folder = exported(tmp_path / Path(name).stem)
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(text)
        assert_refused(invoke("push", folder, TARGET), f"{name} contains credentials")
    copy = tmp_path / "copy"
    shutil.copytree(CLIP, copy)
    (copy / "llm" / "train.env").write_bytes(texts["train.env"])
    manifest = json.loads((copy / "manifest.json").read_text())
    manifest["files"]["llm/train.env"] = sha256_file(copy / "llm" / "train.env")
    (copy / "manifest.json").write_text(json.dumps(manifest))
    done = invoke("push", copy, TARGET, *LICENCE)
    assert_refused(done, "train.env contains credentials")
    assert not hub.repositories
    folder = exported(tmp_path / "words")
    (folder / "vocab.json").write_text('{"http://a:b@c": 0}')  # a token of a tokenizer
    (folder / "figure.png").write_bytes(b"\0\xff")
    assert invoke("push", folder, TARGET).exit_code == 0


def test_the_token_is_in_no_file_and_no_message(
    hub: HubServer, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    hub.faults[f"POST /{ORG}/photos.git/info/lfs/objects/batch"] = [400]  # repeats the token
    done = [invoke("push", CLIP, TARGET, *LICENCE) for _ in range(2)]
    assert [one.exit_code for one in done] == [2, 0] and "a fault" in done[0].stderr
    open_artifact(TARGET)
    said = "".join(one.output for one in done) + caplog.text
    assert TOKEN not in said and SIGNED not in said
    paths = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert paths and not any(TOKEN.encode() in path.read_bytes() for path in paths)
    files = published(hub).revisions["main"]
    assert not any(TOKEN.encode() in body for body in files.values())
    assert not hub.leaks  # nor to the store of large files, which is another host
