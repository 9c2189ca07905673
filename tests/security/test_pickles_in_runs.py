"""Pickles in artifacts, checkpoints and configs are refused without being loaded."""

from __future__ import annotations

import hashlib
import io
import pickle
import shutil
import zipfile
from pathlib import Path

import numpy as np
import pytest
from hostile_files import assert_refused, evaluate, forge, pickled
from in_process import invoke
from tiny import copy_run, train

from xray.config.loading import read_yaml
from xray.errors import ArtifactError, ConfigError


def test_a_hostile_pickle_makes_its_folder_when_loaded(ran: Path, hostile: bytes) -> None:
    buffer = io.BytesIO(hostile)
    if hostile.startswith(b"\x93NUMPY"):
        np.load(buffer, allow_pickle=True)
    elif hostile.startswith(b"PK"):
        with zipfile.ZipFile(buffer) as archive:
            pickle.loads(archive.read(next(n for n in archive.namelist() if "data.pkl" in n)))
    else:
        pickle.load(buffer)
    assert ran.is_dir()


@pytest.mark.parametrize("name", ["backbone", "head", "text"])
def test_artifact_weights_that_are_pickles_are_refused(
    artifacts: dict[str, Path], demo: Path, tmp_path: Path, hostile: bytes, ran: Path, name: str
) -> None:
    artifact = tmp_path / "clip"
    shutil.copytree(artifacts["clip"], artifact)
    (artifact / f"{name}.safetensors").write_bytes(hostile)
    assert_refused(evaluate(artifact, demo), f"{name}.safetensors was changed", ran)
    forge(artifact, f"{name}.safetensors", hostile)
    assert_refused(
        evaluate(artifact, demo), f"{name}.safetensors is not a readable safetensors file", ran
    )


def test_other_artifact_files_that_are_pickles_are_refused(
    artifacts: dict[str, Path], demo: Path, tmp_path: Path, ran: Path
) -> None:
    content = pickled(ran, "plain")
    for stage, name, message in (
        ("clip", "manifest.json", "manifest.json"),
        ("clip", "llm/config.json", "llm/config.json"),
        ("clip", "llm/tokenizer.json", "llm has no usable tokenizer"),
        ("clip", "llm/tokenizer_config.json", "llm/tokenizer_config.json"),
        ("hashtag", "vocabulary.json", "vocabulary.json"),
    ):
        artifact = tmp_path / stage
        shutil.copytree(artifacts[stage], artifact)
        if name == "manifest.json":
            (artifact / name).write_bytes(content)
            assert_refused(invoke("lineage", artifact), message, ran)
        else:
            forge(artifact, name, content)
        if stage == "clip":
            done = evaluate(artifact, demo)
        else:
            done = invoke("data", "pseudo-tags", artifact, demo / "heldout", "workers=0")
        assert_refused(done, message, ran)
        shutil.rmtree(artifact)
    artifact = tmp_path / "clip"
    shutil.copytree(artifacts["clip"], artifact)
    carried = f"lineage/{hashlib.sha256(content).hexdigest()}.json"  # the manifest of an ancestor
    forge(artifact, carried, content)
    assert_refused(invoke("lineage", artifact, "--verify"), carried, ran)


def test_teachers_and_parents_with_pickles_are_refused(
    artifacts: dict[str, Path], demo: Path, tmp_path: Path, ran: Path
) -> None:
    clip, hashtag = tmp_path / "clip", tmp_path / "hashtag"
    shutil.copytree(artifacts["clip"], clip)
    forge(clip, "head.safetensors", pickled(ran))
    with pytest.raises(
        ArtifactError, match=r"head\.safetensors is not a readable safetensors file"
    ):
        train("clip", demo, tmp_path / "out", "train.samples=12", f"clip.teacher={clip}")
    shutil.copytree(artifacts["hashtag"], hashtag)
    forge(hashtag, "backbone.safetensors", pickled(ran))
    with pytest.raises(
        ArtifactError, match=r"backbone\.safetensors is not a readable safetensors file"
    ):
        train("clip", demo, tmp_path / "out", "train.samples=12", init_from=[hashtag])
    assert not ran.exists()


@pytest.mark.parametrize(
    ("name", "kind"),
    [("portable/00000.safetensors", "torch"), ("portable/buffers.safetensors", "numpy"),
     ("portable/index.json", "plain"), ("state.json", "torch"), ("quarantine.jsonl", "plain"),
     ("../../run.json", "plain")],
)  # fmt: skip
def test_checkpoint_files_that_are_pickles_are_refused(
    artifacts: dict[str, Path], demo: Path, tmp_path: Path, ran: Path, name: str, kind: str
) -> None:
    shutil.rmtree(copy_run(artifacts["hashtag"], tmp_path / "hashtag"))
    (checkpoint,) = (tmp_path / "hashtag" / "checkpoints").glob("step_*")
    assert (checkpoint / name).is_file()
    (checkpoint / name).write_bytes(pickled(ran, kind))
    (checkpoint / "COMPLETE").write_text("")  # who forges a file can also remove its hash
    damaged = (checkpoint / name).resolve()
    with pytest.raises((ArtifactError, ConfigError), match=rf"{damaged} cannot be read"):
        train("hashtag", demo, tmp_path / "hashtag", "train.samples=24")
    assert not ran.exists()


def test_configs_that_are_pickles_or_call_python_are_refused(tmp_path: Path, ran: Path) -> None:
    (tmp_path / "config.yaml").write_bytes(pickled(ran))
    assert_refused(invoke("train", "mae", "--resume", tmp_path), "config.yaml", ran)
    for tag in ("object/apply", "object/new"):
        (tmp_path / "mine.yaml").write_text(f"a: !!python/{tag}:os.mkdir ['{ran}']\n")
        with pytest.raises(ConfigError, match=r"mine\.yaml is not valid yaml"):
            read_yaml(tmp_path / "mine.yaml")
        assert_refused(invoke("run", tmp_path / "mine.yaml"), "mine.yaml", ran)
    assert not ran.exists()


def test_runs_write_no_pickle(artifacts: dict[str, Path]) -> None:
    runs = [artifact.parent for artifact in artifacts.values()]
    written = [path for run in runs for path in run.rglob("*") if path.is_file()]
    assert len(written) > 30
    for path in written:
        start = path.read_bytes()[:2]
        assert start not in (b"PK", b"\x93N") and not start.startswith(b"\x80"), path
    endings = {path.suffix for path in written if "tfevents" not in path.name}
    assert endings <= {".safetensors", ".json", ".jsonl", ".yaml", ".md", ""}, endings
