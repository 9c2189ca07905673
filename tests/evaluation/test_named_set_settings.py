"""Settings of eval.sets: paths, mistakes, and changes that repeat a result."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from in_process import invoke
from named_data import (
    captions,
    named,
    npy,
    of_class,
    wds,
)
from shards import photo, write_tar

from xray.artifacts.artifact import open_artifact
from xray.artifacts.encoders import Encoder, VisionEncoder
from xray.commands.named_sets import suites_with_data
from xray.config.loading import build
from xray.errors import XrayError
from xray.evaluation.config import EvalConfig
from xray.evaluation.evaluator import Evaluator
from xray.evaluation.named_sets import named_sets
from xray.evaluation.set_features import SharedSets, data_of
from xray.evaluation.set_runs import SetRun
from xray.evaluation.suite import Suite
from xray.evaluation.suites.compositional import COMPOSITIONAL
from xray.evaluation.suites.compression import COMPRESSION
from xray.evaluation.suites.keypoints import KEYPOINTS
from xray.evaluation.suites.retrieval import RETRIEVAL
from xray.evaluation.suites.robustness import ROBUSTNESS
from xray.evaluation.suites.segmentation import SEGMENTATION


def test_settings_of_other_data_stay_there(tmp_path: Path) -> None:
    """A set has the evaluation's settings of a suite, but for those of the suite's own data."""
    sets = {"a": {"suite": ["knn", "retrieval"], "train": "x", "test": "y", "shards": "z"}}
    where = str(named(tmp_path / "sets.yaml", sets))
    given: dict[str, Any] = {"sets": where, "knn": {"k": 3}, "retrieval": {"captions": {"alt": 1}}}
    (own,) = named_sets(build(EvalConfig, given), "", ())
    assert own.config.knn.k == 3 and own.config.retrieval.captions == {"alt": 1}
    given["knn"] |= {"train": "clips", "splits": "splits", "split": 1}
    given["retrieval"] |= {"shards": "photos"}
    (own,) = named_sets(build(EvalConfig, given), "", ())
    assert own.config.knn.k == 3 and own.config.knn.split == "all"
    assert own.config.retrieval.captions == {}


def test_paths_start_at_the_yaml(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir("/")
    for name in ("photos", "v2"):
        (tmp_path / name).mkdir()
    own = {"suite": "robustness", "shards": "photos", "shift": {"v2": "v2", "r": "gone"}}
    path = named(tmp_path / "sets.yaml", {"a": own})
    (found,) = named_sets(build(EvalConfig, {"sets": str(path)}), "", ())
    assert found.config.zero_shot.shards == str(tmp_path / "photos")
    assert found.config.robustness.shift == {"v2": str(tmp_path / "v2"), "r": "gone"}


def wrong_yamls() -> Iterator[tuple[dict[str, Any], str]]:
    yield {"a": {"suite": "zeroshot", "shards": "set"}}, "set a: unknown suite 'zeroshot'"
    yield {"a": {"suite": "zero_shot", "shards": "nowhere"}}, "set a: shards=nowhere: there is no"
    yield {"a": {"shards": "set"}}, "set suite, such as suite: zero_shot"
    yield {"a": 3}, "write a: FOLDER, or a: {suite: ..., KEY: ...}"
    yield (
        {"a": {"suite": "zero_shot", "shard": "set"}},
        "unknown key 'shard'; did you mean 'shards'",
    )
    yield {"a": {"suite": "knn", "k": 3}}, "set a: suite knn has no data: set train and test"
    yield {"a": {"suite": "knn", "train": "set/test"}}, "set a: train is set: set test, too"
    yield {"a": {"suite": "knn", "train": "set/test", "test": "set/test"}}, "k=20 needs that many"
    yield {"a": "nowhere"}, "set a: there is no folder nowhere"
    yield (
        {"a": {"suite": "zero_shot", "shards": "set/test", "classes": "two.txt"}},
        "a label is 2, but there are 2 class names",
    )
    yield (
        {"a": {"suite": "linear_probe", "train": "other", "test": "folders"}},
        "set a: class 'green' of test is not among the classes of train",
    )
    yield {"a": {"suite": "retrieval", "shards": "set/test"}}, "none of the 6 samples has a caption"
    yield (
        {"a": {"suite": "retrieval", "shards": "texts/test", "languages": ["all"]}},
        "languages: no caption of shards has a language",
    )
    yield {"a": {"folder": "many"}}, "labels of sample s0000000 are not 3 zeros and ones"


def test_wrong_sets_are_one_line_before_the_first_set_starts(
    clip: Path, tmp_path: Path, decoded: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    wds(tmp_path / "set", of_class)
    wds(tmp_path / "many", lambda i: {"npy": npy([1, 0])}, kind="multilabel")
    wds(tmp_path / "texts", captions)
    (tmp_path / "two.txt").write_text("red\nblue\n")
    for where, classes in (("folders", ("red", "green")), ("other", ("red", "blue"))):
        for name in classes:
            (tmp_path / where / name).mkdir(parents=True)
            (tmp_path / where / name / "0.jpg").write_bytes(photo(0))
    encoder = Encoder(open_artifact(clip))

    def run(where: str) -> None:
        evaluator = Evaluator(encoder, build(EvalConfig, {"sets": where}), "", 0)
        SetRun(evaluator).evaluate({}, lambda results: pytest.fail("a set has run"))

    for sets, message in wrong_yamls():
        with pytest.raises(XrayError) as error:
            run(str(named(tmp_path / "sets.yaml", {"first": "set"} | sets)))
        assert str(error.value).startswith("set a: ") and message in str(error.value), sets
    done = invoke("eval", clip, "eval.sets=sets.yaml", "data.workers=0")
    assert done.exit_code == 2 and len(done.stderr.strip().splitlines()) == 1
    (tmp_path / "set" / "test" / "nshards.txt").write_text("3\n")
    for where, message in (
        ("nowhere", "eval.sets=nowhere: there is no folder"),
        ("set", "eval.sets=set is one data set, with test: give the folder"),
        ("folders/red", "contains no folders"),
        (".", "set set: ./set/test/nshards.txt says '3' shards, and there are 2"),
    ):
        with pytest.raises(XrayError) as error:
            run(where)
        assert message in str(error.value)
    assert not decoded
    done = invoke("eval", clip, "eval.sets=.", "--keep-rates", "1,.5")
    assert done.exit_code == 2 and "--keep-rates takes eval.SUITE.KEY=" in done.stderr


def test_suites_beside_the_sets_are_those_with_data(
    clip: Path, tagger: Path, benchmarks: Path
) -> None:
    digits = benchmarks / "wds_mnist"
    knn = {"train": str(digits / "train"), "test": str(digits / "test")}
    zero_shot = {"shards": str(digits / "test"), "classes": str(digits / "classnames.txt")}
    config = build(EvalConfig, {"sets": "a", "knn": knn, "zero_shot": zero_shot})
    seeing = Evaluator(VisionEncoder(open_artifact(tagger)), config, "", 0)
    assert suites_with_data(seeing, ()) == ["knn"]
    joint = Evaluator(Encoder(open_artifact(clip)), config, "", 0)
    assert suites_with_data(joint, ()) == ["zero_shot", "knn"]
    asked = ["linear_probe", "robustness", "retrieval"]  # of eval.knn, of others, without data
    assert suites_with_data(joint, asked) == asked[:2]


def test_results_are_repeated_after_any_change_of_the_data(clip: Path, tmp_path: Path) -> None:
    """Each suite's own form of data: (suite, its settings, files a change of which is seen)."""

    def written(*names: str) -> list[Path]:
        for number, name in enumerate(names):
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_bytes(photo(number, (32, 32)))
        return [tmp_path / name for name in names]

    def table(name: str, text: str) -> Path:
        (tmp_path / name).write_text(text)
        return tmp_path / name

    shifted = written("elsewhere/red/0.jpg", "elsewhere/blue/0.jpg")
    masked = [path for part in ("train", "test") for path in
              written(f"{part}/images/0.jpg", f"{part}/masks/0.png")]  # fmt: skip
    titles = table("titles.csv", "path,remark\na.jpg,one\n")
    points = "source,target,source_x,source_y,target_x,target_y\nb.jpg,c.jpg,1,2,3,4\n"
    pairs = table("points.csv", points)
    questions = table("questions.csv", "path,caption,negative_caption\nd.jpg,one,two\n")
    plain = written("a.jpg", "b.jpg", "c.jpg", "d.jpg")
    for shard in range(2):
        write_tar(tmp_path / f"fit{shard}.tar", {f"{shard}.jpg": photo(shard)})
    cases: list[tuple[Suite[Any], dict[str, Any], list[Path]]] = [
        (ROBUSTNESS, {"shift": {"v2": "elsewhere"}}, shifted),
        (SEGMENTATION, {"train": "train", "test": "test"}, masked),
        (RETRIEVAL, {"shards": "titles.csv", "captions": {"remark": 1.0}}, [titles, plain[0]]),
        (KEYPOINTS, {"pairs": "points.csv"}, [pairs, *plain[1:3]]),
        (COMPOSITIONAL, {"pairs": "questions.csv"}, [questions, plain[3]]),
        (COMPRESSION, {"shards": "titles.csv", "captions": {"remark": 1.0},
                       "train": "fit{0..1}.tar"}, [tmp_path / "fit1.tar"]),
    ]  # fmt: skip
    encoder = Encoder(open_artifact(clip))
    for suite, settings, files in cases:
        config = build(EvalConfig, {suite.name: settings})

        def state(suite: Suite[Any] = suite, config: EvalConfig = config) -> dict[str, str]:
            found = [*data_of(SharedSets(encoder, config, str(tmp_path), 0), [suite])]
            assert found and all(own.source is not None for own in found)
            return {own.place: own.fingerprint for own in found}

        for path in files:
            before = state()
            assert state() == before
            facts = path.stat()
            os.utime(path, ns=(facts.st_atime_ns, facts.st_mtime_ns + 10**9))
            if path.suffix == ".csv":
                path.write_text(path.read_text().replace("one", "three").replace(",4", ",5"))
            assert state() != before, path
