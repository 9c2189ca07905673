"""Evaluation on the samples that sources hold out, and samples that were trained on."""

from __future__ import annotations

import dataclasses
import json
import re
import shlex
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from in_process import invoke
from shards import photo, write_tar

from data_pipelines.ingest.labelled import open_labelled
from xray.artifacts.artifact import open_artifact
from xray.config import SourceConfig
from xray.config.loading import build, parse_overrides
from xray.evaluation.config import EvalConfig
from xray.evaluation.held_out import TaggedSources, with_held_out
from xray.evaluation.overlap import _shared, _unknown, overlap_lines, trained_on

TAGGED = TaggedSources(frozenset({"photos"}), "hashtags")


def sample(number: int, **facts: Any) -> dict[str, bytes]:
    facts = {"captions": [f"a {number}", f"b {number}"], "label_name": "cd"[number % 2], **facts}
    facts = {key: value for key, value in facts.items() if value is not None}
    return {f"{number:03d}.jpg": photo(number), f"{number:03d}.json": json.dumps(facts).encode()}


def source(root: Path, held: dict[int, dict[str, Any]], trained: int = 24, **facts: Any) -> str:
    """Write `trained` samples, and those held out, by number with their own facts."""
    write_tar(root / "0.tar", {k: v for n in range(trained) for k, v in sample(n, **facts).items()})
    files = {k: v for n, own in held.items() for k, v in sample(n, **{**facts, **own}).items()}
    if files:
        write_tar(root / "val" / "0.tar", files)
    return str(root)


def config(*overrides: str) -> EvalConfig:
    return build(EvalConfig, parse_overrides(["eval.held_out=true", *overrides])["eval"])


def filled(shards: str, *overrides: str, **settings: Any) -> tuple[EvalConfig, list[str]]:
    sources = {"photos": SourceConfig(shards=shards, **settings)}
    return with_held_out(config(*overrides), sources, TAGGED)


def sets(found: EvalConfig) -> dict[str, str]:
    return dict(found.data_sets(found.configured()))


def test_the_suites_that_the_samples_have_fields_for_are_filled(tmp_path: Path) -> None:
    shards = source(tmp_path, {n: {"hashtags": ["x"]} for n in range(50, 56)})
    val = str(tmp_path / "val")
    found, lines = filled(shards)
    probe = {"train": shards, "test": val}
    expected = {
        f"{suite}.{key}": v for suite in ("knn", "linear_probe") for key, v in probe.items()
    }
    shown = ("retrieval", "captions", "zero_shot", "tags.photos")
    assert sets(found) == {f"{suite}.shards": val for suite in shown} | expected
    assert len(lines) == 1 and lines[0].startswith("6 samples held out of photos evaluate ")
    off = build(EvalConfig, {})
    assert with_held_out(off, {"photos": SourceConfig(shards=shards)}, TAGGED) == (off, [])


def test_what_the_user_sets_wins(tmp_path: Path) -> None:
    shards = source(tmp_path, {n: {} for n in range(50, 56)})
    own = ("eval.retrieval.shards=mine", "eval.knn={train: a, test: b}", "eval.tags.t.shards=c")
    found, _ = filled(shards, *own, "eval.captions.captions={raw: 2}")
    known = sets(found)
    assert known["retrieval.shards"] == "mine" and known["knn.train"] == "a"
    assert [key for key in known if key.startswith("tags")] == ["tags.t.shards"]
    assert known["zero_shot.shards"] == str(tmp_path / "val")
    assert found.captions.captions == {"raw": 2}  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("held", "facts", "expected"),
    [
        # a sample without a caption, and no two captions of a sample
        ({50: {}, 51: {"captions": None}}, {"captions": ["x"]}, {"zero_shot", "linear_probe"}),
        ({50: {}, 52: {}}, {}, {"retrieval", "captions", "tags"}),  # one class
        ({50: {}, 51: {"label_name": "e"}}, {}, {"retrieval", "captions", "zero_shot", "tags"}),
        ({50: {}}, {"label_name": None}, {"captions", "tags"}),  # too few
        (
            {50: {"label": 0}, 51: {"label": 1}},
            {"label_name": None, "label": 1, "captions": None},
            set(),  # class 0 never occurs in training
        ),
        ({50: {}, 51: {}}, {"label_name": None, "captions": None}, set()),
    ],
)
def test_suites_that_would_fail_are_left_out(
    tmp_path: Path, held: dict[int, dict[str, Any]], facts: dict[str, Any], expected: set[str]
) -> None:
    shards = source(tmp_path, held, trained=19, **facts)  # fewer than kNN's 20 neighbours
    found, lines = filled(shards, tags="caption_words")
    suites = {key.split(".")[0] for key in sets(found)}
    if facts.get("captions"):
        expected = expected | {"tags"}
    assert suites == expected
    assert len(lines) == 1 and ("nothing" in lines[0]) == (not expected)


def test_a_line_counts_the_samples_without_captions(tmp_path: Path) -> None:
    found, lines = filled(source(tmp_path, {50: {}, 51: {}, 52: {"captions": None}}))
    assert "retrieval.shards" in sets(found)
    assert lines[0].endswith("; captions leave out 1 sample without any")
    _, lines = filled(source(tmp_path / "all", {50: {}, 51: {}}))
    assert "leave out" not in lines[0]


def test_samples_whose_suites_are_set_already_are_said_to_evaluate_nothing(tmp_path: Path) -> None:
    first, second = (source(tmp_path / name, {50: {}, 51: {}}) for name in "ab")
    sources = {name: SourceConfig(shards=path) for name, path in (("a", first), ("b", second))}
    _, lines = with_held_out(config(), sources, TAGGED)
    assert "nothing" not in lines[0]
    assert re.fullmatch(
        r".* of b evaluate nothing: the data of .*retrieval.* are set already", lines[1]
    )


def test_broken_held_out_shards_do_not_stop_a_run(tmp_path: Path) -> None:
    shards = source(tmp_path, {50: {}, 51: {}})
    write_tar(tmp_path / "val" / "1.tar", {"a.txt": b"no picture"})
    found, lines = filled(shards)
    assert not sets(found) and "of photos are not used: " in lines[0]


def test_the_advice_without_held_out_samples_works_as_it_is_printed(tmp_path: Path) -> None:
    shards = source(tmp_path / "my photos", {})
    found, lines = filled(shards)
    assert not sets(found) and len(lines) == 1
    command, setting = re.findall(r"run xray (data split .* val=0\.05) and set (.*)", lines[0])[0]
    done = invoke(*shlex.split(command))
    assert done.exit_code == 0, done.stderr
    key, where = shlex.split(setting)[0].split("=")
    assert key == "data.sources.photos.shards"
    assert sets(filled(where)[0])["retrieval.shards"] == f"{where}/val"
    explicit = "eval.retrieval.shards=mine"
    assert filled(shards, explicit) == (config(explicit), [])


# overlap ----------------------------------------------------------------------------------------


def test_a_stage_that_cannot_be_compared_does_not_hide_the_imported_weights() -> None:
    assert _unknown(False, []) == ""
    line = _unknown(True, ["hashtag (photos)"])
    assert line.startswith("overlap: what the imported weights were trained on is not known; not ")
    assert "stage hashtag (photos) trained on could be compared" in line


def test_shared_samples_are_those_of_equal_bytes(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    sides = [sorted(rng.choice(60, 25, replace=False).tolist()) for _ in range(2)]
    opened = []
    for name, numbers in zip("ab", sides, strict=True):
        files = {f"{name}{n}.jpg": photo(n) for n in numbers}
        write_tar(tmp_path / name / "0.tar", files)
        opened.append(open_labelled(name, str(tmp_path / name), "image"))
    one, two = ([s.read(*p)["jpg"] for p in s.places()] for s in opened)
    assert _shared(opened[0], opened[1]).tolist() == [media in two for media in one]
    assert 0 < sum(media in two for media in one) < 25
    plain = tmp_path / "plain"
    for number, media in enumerate(two):
        (plain / "cd"[number % 2]).mkdir(parents=True, exist_ok=True)
        (plain / "cd"[number % 2] / f"{number}.jpg").write_bytes(media)
    files_ = open_labelled("plain", str(plain), "image")
    assert _shared(opened[0], files_).tolist() == [media in two for media in one]
    assert _shared(files_, opened[1]).all() and not _shared(files_, None).any()


def test_an_evaluation_says_which_samples_were_trained_on(
    demo: Path, control: Path, tmp_path: Path
) -> None:
    trained = open_labelled("photos", str(demo / "photos"), "image")
    heldout = open_labelled("heldout", str(demo / "heldout"), "image")
    places = [(own, place) for own in (trained, heldout) for place in list(own.places())[:6]]
    files = {
        f"{number}.{ending}": content
        for number, (own, place) in enumerate(places)
        for ending, content in own.read(*place, ("jpg", "json")).items()
    }
    write_tar(tmp_path / "mixed" / "0.tar", files)

    def results(shards: Path, *more: str) -> tuple[dict[str, float], str]:
        out = tmp_path / "out.json"
        done = invoke("eval", control, f"eval.retrieval.shards={shards}", *more, "--out", str(out))
        assert done.exit_code == 0, done.stderr
        return json.loads(out.read_text()).get("overlap", {}), done.stdout

    half, text = results(tmp_path / "mixed")
    assert half == {"retrieval.shards": 0.5}
    assert overlap_lines(half)[0] in " ".join(text.split())
    gallery, heldout_ = demo / "gallery", demo / "heldout"
    probe = f"eval.knn={{train: {gallery}, test: {gallery}, k: 5}}"
    same, text = results(heldout_, probe)
    assert same["knn.test in train"] == 1 and "retrieval.shards" not in same
    assert "overlap: 100.0 % of the samples of eval.knn.test are in the training set" in text
    none, text = results(heldout_, f"eval.knn={{train: {gallery}, test: {heldout_}, k: 5}}")
    assert not none and "overlap" not in text


def test_shards_that_are_gone_are_known_by_their_digest(
    demo: Path, control: Path, tmp_path: Path
) -> None:
    found, unknown = trained_on(open_artifact(control))
    assert {own.name for own in found} == {"photos", "clips"} and not unknown
    photos = next(own for own in found if own.name == "photos")
    moved = tmp_path / "moved"
    shutil.copytree(demo / "photos", moved, ignore=shutil.ignore_patterns("*.index", "*.manifest"))
    gone = dataclasses.replace(photos, where=str(tmp_path / "gone"))
    assert gone.source is None
    assert gone.is_all_of(open_labelled("photos", str(moved), "image"))
    assert not gone.is_all_of(open_labelled("photos", str(demo / "heldout"), "image"))


def test_shards_that_changed_since_training_are_named(
    demo: Path, trained: Any, tmp_path: Path
) -> None:
    data = tmp_path / "data"
    shutil.copytree(demo, data)
    settings = f"data.root={data}", "data.modalities=[image]", "train.samples=8"
    run = trained("clip", *settings)
    evaluate = "eval", run, f"eval.retrieval.shards={demo / 'heldout'}"
    assert "overlap" not in invoke(*evaluate).stdout
    tar = sorted((data / "photos").glob("*.tar"))[0]
    write_tar(tar, {"new.jpg": photo(7), "new.txt": b"a new picture"})
    changed = " ".join(invoke(*evaluate).stdout.split())
    assert f"stage clip ({data / 'photos'}) trained on could be compared" in changed
    shutil.rmtree(data)
    assert f"stage clip ({data / 'photos'})" in " ".join(invoke(*evaluate).stdout.split())


def test_pictures_and_clips_of_one_folder_are_two_sources(control: Path, tmp_path: Path) -> None:
    older = tmp_path / "older"
    shutil.copytree(control, older)
    manifest = json.loads((older / "manifest.json").read_text())
    for source_ in manifest["config"]["data"]["sources"].values():
        source_["shards"] = "both"
    manifest["sources"] = {}  # without digests
    (older / "manifest.json").write_text(json.dumps(manifest))
    found, _ = trained_on(open_artifact(older))
    assert {own.modality for own in found} == {"image", "video"}


def test_an_artifact_without_sources_is_told_what_to_set() -> None:
    found, lines = with_held_out(config(), {}, TAGGED)
    assert not sets(found) and len(lines) == 1 and "Set eval.SUITE.shards" in lines[0]
