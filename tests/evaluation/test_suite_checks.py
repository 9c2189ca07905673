"""Every suite is checked before the first one encodes anything."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from shards import photo, write_tar

from xray.artifacts.artifact import open_artifact
from xray.artifacts.encoders import Encoder, Tagger, VisionEncoder
from xray.config.loading import build
from xray.errors import XrayError
from xray.evaluation.checks import check_data
from xray.evaluation.config import EvalConfig
from xray.evaluation.datasets import Sets
from xray.evaluation.evaluator import Evaluator
from xray.evaluation.suites import SUITES
from xray.evaluation.suites.retrieval import CAPTIONS

if TYPE_CHECKING:
    from conftest import Trained


@pytest.fixture
def encoded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the tasks that are encoded."""
    seen: list[str] = []

    def watched(sets: Sets, task: Any) -> Iterator[Any]:
        seen.append(task.name)
        return iter(())

    monkeypatch.setattr(Sets, "encoded", watched)
    return seen


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pictures in shards with and without captions, tags and boxes, and in class folders."""
    root = tmp_path_factory.mktemp("checked")
    contents = {
        "captioned": {"caption": "a photo"},
        "bare": {},
        "boxed": {"object_box": [0, 0, 2, 2]},
    }
    for name, content in contents.items():
        own = json.dumps(content).encode()
        files = {f"{i}.{end}": data for i in range(4) for end, data in
                 (("jpg", photo(i, (32, 32))), ("json", own))}  # fmt: skip
        write_tar(root / name / "0.tar", files)
    for where, names in {"set": ("red", "blue"), "other": ("red", "green")}.items():
        for name in names:
            for i in range(2):
                path = root / where / name / f"{i}.jpg"
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(photo(i, (32, 32)))
    (root / "other" / "blue").mkdir()
    (root / "other" / "blue" / "0.jpg").write_bytes(photo(9, (32, 32)))
    (root / "pairs.csv").write_text("path,caption\na.jpg,a picture\n")
    return root


PROBED = {"train": "set", "test": "set"}
ZERO_SHOT = {"shards": "set"}
CAPTIONED = {"shards": "captioned"}
MISTAKES: dict[str, tuple[dict[str, Any], str]] = {
    "zero_shot": ({"shards": "captioned"}, "captioned has no class names"),
    "retrieval": ({"shards": "bare"}, "none of the 4 samples has a caption"),
    "video_retrieval": ({"shards": "bare"}, "has no video files"),
    "compression": (CAPTIONED | {"dims": [16]}, "the artifact has 16 dimensions"),
    "captions": (CAPTIONED, "samples with two captions or more"),
    "compositional": ({"pairs": "pairs.csv"}, "no column of wrong captions"),
    "knn": (PROBED | {"k": 9}, "k=9 needs that many samples"),
    "linear_probe": ({"train": "set", "test": "other"}, "'green' of eval.linear_probe.test is not"),
    "few_shot": (PROBED | {"shots": [4]}, "shots"),
    "attentive_probe": ({"train": "set", "test": "captioned"}, "needs a class for every sample"),
    "finetune": ({"train": "bare", "test": "set"}, "needs a class for every sample"),
    "segmentation": (PROBED, "neither .tar shards nor a folder images"),
    "correspondence": (PROBED, "neither .tar shards nor a folder images"),
    "keypoints": ({"pairs": "pairs.csv"}, "has no column 'source'"),
    "robustness": ({"shift": {"v2": "bare"}}, "shift.v2 needs a class for every sample"),
    "tags": ({"a": {"shards": "bare"}}, "eval.tags.a: no sample has a tag of the vocabulary"),
    "token_selection": ({"shards": "boxed"}, "json field object_box=[0, 0, 2, 2] must be"),
}
MORE: list[tuple[str, dict[str, Any], str]] = [
    ("compression", {"shards": "bare"}, "none of the 4 samples has a caption"),
    ("compression", CAPTIONED | {"train": "set", "dims": [8]}, "has 4 samples: PCA to 8"),
    ("captions", {"shards": "bare"}, "none of the 4 samples has a caption"),
    ("finetune", PROBED | {"shots": 4}, "eval.finetune.shots: 4 samples per class, but class"),
    ("robustness", {"shift": "other"}, "of eval.robustness.shift is not among"),
    ("robustness", {"corrupted": "set"}, "contains no folder CORRUPTION/SEVERITY/CLASS"),
]


def test_the_data_of_every_suite_are_checked_before_any_picture_is_encoded(
    trained: Trained, tagger: Path, root: Path, encoded: list[str]
) -> None:
    assert {suite.name for suite in SUITES} == {*MISTAKES}
    joint = Encoder(open_artifact(trained("clip", "train.samples=24")))
    seen = Tagger(open_artifact(tagger))
    for name, given, message in [(name, *own) for name, own in MISTAKES.items()] + MORE:
        beside = {"zero_shot": ZERO_SHOT} if name == "robustness" else {}
        config = build(EvalConfig, {"knn": PROBED | {"k": 1}, **beside, name: given})
        encoder: VisionEncoder = seen if name == "tags" else joint
        evaluator = Evaluator(encoder, config, str(root), 0)
        with pytest.raises(XrayError) as error:
            if name == "captions":  # of a text artifact
                check_data(CAPTIONS, evaluator.sets)
            evaluator.run([*({"knn"} - {name}), name])
        assert message in str(error.value), (name, error.value)
    assert not encoded
