"""`xray eval` on shards, folders and tables, with one small artifact."""

from __future__ import annotations

import csv
import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
import torch.nn.functional as F
from evaluating import config, evaluator, results
from in_process import invoke

from data_pipelines.decode.transforms import load_views
from data_pipelines.ingest.labelled import open_labelled
from data_pipelines.ingest.pack import PackConfig, pack
from xray.artifacts.artifact import Artifact, open_artifact
from xray.artifacts.encoders import VisionEncoder
from xray.errors import ConfigError
from xray.evaluation import suites
from xray.evaluation.evaluator import Evaluator
from xray.evaluation.keep_rates import over_keep_rates
from xray.evaluation.suites.finetune import FINETUNE
from xray.evaluation.zero_shot import NamedClasses
from xray.models.tokenizer import CaptionTokenizer, TokenIds

if TYPE_CHECKING:
    from conftest import Trained


@pytest.fixture(scope="module")
def clip(trained: Trained) -> Artifact:
    return open_artifact(trained("clip", "train.samples=24"))


def test_folders_and_tables_give_the_same_results_as_shards(
    clip: Artifact, demo: Path, folder: Path, tmp_path: Path
) -> None:
    """Classes are matched by name, whatever their numbers are."""
    names = "zero_shot,retrieval,knn,linear_probe"
    packed = results(
        clip, tmp_path, "--suite", names, f"data.root={demo}",
        "eval.zero_shot={shards: heldout, classes: classes.txt}", "eval.retrieval.shards=heldout",
        "eval.knn={train: gallery, test: heldout, k: 5}",
    )  # fmt: skip
    assert list(packed) == names.split(",")
    plain = results(
        clip, tmp_path, "--suite", "zero_shot,retrieval", f"data.root={folder}",
        "eval.zero_shot.shards=set", "eval.retrieval.shards=captions.csv",
    )  # fmt: skip
    assert plain["zero_shot"]["classes"] == len(list((folder / "set").iterdir()))
    for key, value in packed["retrieval"].items():  # images are in another order
        if "R@" in key and not key.endswith(("low", "high")):
            assert plain["retrieval"][key] == pytest.approx(value)
    table = results(
        clip, tmp_path, "--suite", "zero_shot", "eval.zero_shot.shards=labels.csv",
        f"data.root={folder}", f"eval.zero_shot.classes={demo / 'classes.txt'}",
    )  # fmt: skip
    for key in ("top1", "top5", "chance_top1"):
        assert table["zero_shot"][key] == packed["zero_shot"][key]
    both = results(
        clip, tmp_path, "--suite", "knn", f"data.root={folder}",
        "eval.knn={train: set, test: labels.csv, k: 1}",
    )  # fmt: skip
    assert both["knn"]["top1"] == 1  # each is its own nearest


def test_sets_are_encoded_once(clip: Artifact, demo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sets = evaluator(
        clip, demo, "eval.zero_shot={shards: heldout, classes: classes.txt}",
        "eval.retrieval.shards=heldout", "eval.knn={train: gallery, test: heldout, k: 5}",
    )  # fmt: skip
    seen: list[int] = []
    original = VisionEncoder.cls

    def counted(encoder: VisionEncoder, pixels: torch.Tensor) -> torch.Tensor:
        seen.append(len(pixels))
        return original(encoder, pixels)

    monkeypatch.setattr(VisionEncoder, "cls", counted)
    sets.run(["zero_shot", "retrieval", "knn", "linear_probe"])
    gallery = len(open_labelled("g", "gallery", "image", str(demo)))
    assert sum(seen) == 24 + gallery


def test_views_are_averaged_and_normalised(clip: Artifact, demo: Path) -> None:
    sets = evaluator(clip, demo, "eval.views={clips: 3, crops: 3}", "eval.batch_size=20").sets
    source = sets.open("video_retrieval", "clips", "video")
    encoded = sets.features(source, "joint")
    assert encoded.views.shape == (24, 9, 16)
    encoder, place = sets.joint, next(source.places())
    views = load_views(source.sample(*place, 32, 4), sets.data, 3, 3)
    rows = torch.cat([encoder.encode_pixels(view[None]) for view in views])
    assert torch.allclose(encoded.rows[0], F.normalize(rows.mean(0), dim=0), atol=1e-6)
    photos = sets.features(sets.open("knn", "heldout", "image"))
    assert photos.views.shape[1] == 1 and torch.equal(photos.views[:, 0], photos.rows)


def test_keep_rates_measure_accuracy_against_speed(
    clip: Artifact, demo: Path, tmp_path: Path
) -> None:
    sets = [f"data.root={demo}", "eval.knn={train: gallery, test: heldout, k: 5}"]
    by_rate = results(clip, tmp_path, *sets, "--keep-rates", "1,.7,.5")
    assert list(by_rate) == ["1", "0.7", "0.5"]
    flops = [r["gflops"] for r in by_rate.values()]
    assert flops == sorted(flops, reverse=True) and by_rate["1"]["speed"] == 1
    assert all(r["samples_per_s"] > 0 for r in by_rate.values())
    own = results(clip, tmp_path, *sets, "--suite", "knn")["knn"]  # the artifact's rate is .7
    assert by_rate["0.7"]["knn/top1"] == own["top1"]
    assert (tmp_path / "results.png").stat().st_size > 10_000


def test_texts_are_encoded_once_for_all_keep_rates(
    clip: Artifact, demo: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []
    original = CaptionTokenizer.__call__

    def counted(tokenizer: CaptionTokenizer, texts: Sequence[str]) -> TokenIds:
        seen.append(len(texts))
        return original(tokenizer, texts)

    monkeypatch.setattr(CaptionTokenizer, "__call__", counted)
    sets = evaluator(
        clip, demo, "eval.zero_shot={shards: heldout, classes: classes.txt}",
        "eval.retrieval.shards=heldout",
    )  # fmt: skip
    by_rate = over_keep_rates(sets, [1.0, 0.5], ["zero_shot", "retrieval"], batch=2)
    assert len(by_rate) == 2 and len(seen) == 2  # prompts, and captions


def mistakes(root: Path) -> list[tuple[list[str], str]]:
    names = sorted(path.name.replace("_", " ") for path in (root / "set").iterdir())
    (root / "odd.txt").write_text("\n".join([names[0] + "s", *names[1:]]))
    one = root / "one.csv"
    one.write_text("path,label\n" + f"{next((root / 'set').rglob('*.jpg'))},a\n")
    return [
        (["zero_shot", "eval.zero_shot.shards=one.csv"], "names 1 class"),
        (["knn", "eval.knn={train: one.csv, test: one.csv}"], "at least two classes"),
        (["linear_probe", "eval.knn={train: one.csv, test: set}"], "at least two classes"),
        (["zero_shot", "eval.zero_shot={shards: set, classes: odd.txt}"], "is not among those of"),
        (["zero_shot", "eval.zero_shot={shards: set, templates: [a photo]}"], "each needs {}"),
        (["knn", "eval.knn={train: set, test: set, k: 0}"], "k must be at least 1"),
        (
            ["knn", "eval.knn={train: set, test: set}", "eval.finetune.crop_scale=[.5]"],
            "crop_scale",
        ),
        (["knn", "eval.knn={train: set, test: set}", "data.rooot=a"], "unknown key 'data.rooot'"),
        (["linear_probe"], "suite linear_probe has no data: set eval.linear_probe.train and .test"),
        (["robustness"], "suite robustness has no data: set eval.zero_shot.shards"),
        (
            ["robustness", "eval.knn={train: set, test: set}", "eval.robustness.attacks=[bim]"],
            "there are fgsm, pgd, square",
        ),
        (
            ["tags", "eval.tags.a.shards=set"],
            "suite tags needs an artifact that offers tags, this one offers joint, vision",
        ),
        (["zero", "eval.zero_shot.shards=set"], "unknown suite 'zero'"),
        (
            ["knn", "eval.knn.trian=set"],
            "unknown key 'eval.knn.trian'; did you mean 'eval.knn.train'",
        ),
        (["knn", "eval.knn.train=set"], "eval.knn.train is set: set eval.knn.test, too"),
        (["tags", "eval.tags={shards: set}"], "eval.tags.shards: give sections of keys"),
    ]


def test_each_mistake_is_one_line_of_error(clip: Artifact, folder: Path) -> None:
    for (name, *settings), message in mistakes(folder):
        done = invoke("eval", clip.path, "--suite", name, f"data.root={folder}", *settings)
        assert done.exit_code == 2, (name, settings, done.stdout)
        assert message in done.stderr, done.stderr
        assert len(done.stderr.strip().splitlines()) == 1, done.stderr


def test_invalid_keep_rates_are_refused(clip: Artifact, demo: Path) -> None:
    sets = [f"data.root={demo}", "eval.knn={train: gallery, test: heldout, k: 5}"]
    for rates, names, message in (
        ("1,0", "knn", "in (0, 1]"),
        ("1,x", "knn", "write numbers"),
        ("1,.5", "knn,finetune", "compares none of"),
    ):
        done = invoke("eval", clip.path, *sets, "--suite", names, "--keep-rates", rates)
        assert done.exit_code == 2 and message in done.stderr


def test_keep_rates_and_attacks_the_model_cannot_do_are_refused(clip: Artifact, demo: Path) -> None:
    run = evaluator(clip, demo, "eval.knn={train: gallery, test: heldout, k: 5}")
    run.sets.vision.vision.reduction = "none"
    with pytest.raises(ConfigError, match=r"model\.reduce=none: it keeps every token"):
        over_keep_rates(run, [0.5], ["knn"])
    run.sets.vision.vision.reduction = "tome"
    with pytest.raises(ConfigError, match=r"at least 0\.5"):
        over_keep_rates(run, [0.4], ["knn"])
    sets = config("eval.zero_shot={shards: heldout, classes: classes.txt}")
    with pytest.raises(ConfigError, match="robustness is measured with a linear probe"):
        Evaluator(VisionEncoder(clip), sets, str(demo), 0).run(["robustness"])


def test_class_names_are_matched_by_name_or_by_position(
    clip: Artifact, folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """By name in another order, with underscores or in another case; by position if no name
    matches, with a line."""
    names = sorted(path.name for path in (folder / "set").iterdir())
    others = [f"thing {n}" for n in range(len(names))]
    upper = [name.upper() for name in names[1:]] + names[:1]
    matched = []
    for listed in (names, names[::-1], upper, others):
        assert "matched by position" not in caplog.text
        (tmp_path / "classes.txt").write_text("\n".join(listed))
        sets = evaluator(
            clip, folder, "eval.zero_shot.shards=set",
            f"eval.zero_shot.classes={tmp_path / 'classes.txt'}",
        ).sets  # fmt: skip
        classes = NamedClasses.open(sets)
        labels = classes.number(torch.arange(len(names)), classes.source)
        matched.append([classes.names[label] for label in labels])
    assert matched[0] == matched[1] == list(classes.source.classes)
    assert matched[2] == [matched[0][0], *(name.upper() for name in matched[0][1:])]
    assert matched[3] == others
    line = f"none of the class names is among those of {tmp_path / 'classes.txt'}: classes are"
    assert caplog.text.count(line) == 1


def test_results_are_written_after_each_suite(
    clip: Artifact, demo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = [f"data.root={demo}", "eval.knn={train: gallery, test: heldout, k: 5}"]
    seen: list[object] = []

    def fails(*_: object) -> dict[str, float]:
        seen.append(1)
        raise ZeroDivisionError

    broken = dataclasses.replace(FINETUNE, run=fails)
    patched = tuple(broken if own is FINETUNE else own for own in suites.SUITES)
    monkeypatch.setattr(suites, "SUITES", patched)
    out = tmp_path / "results.json"
    done = invoke("eval", clip.path, *settings, "--suite", "knn,finetune", "--out", out)
    assert isinstance(done.exception, ZeroDivisionError) and list(json.loads(out.read_text())) == [
        "knn"
    ]
    assert "kNN top1" in done.stdout
    for suites_asked, *more in (
        ("finetune,tags",),
        ("finetune,retrieval", "eval.retrieval.shards=heldot"),
        ("finetune,robustness", "eval.robustness.shift=heldot"),
        ("finetune,zero_shot", "eval.zero_shot={shards: heldout, classes: clases.txt}"),
    ):  # nothing starts if a later suite would fail
        refused = invoke("eval", clip.path, *settings, *more, "--suite", suites_asked)
        assert refused.exit_code == 2 and len(seen) == 1, refused.output


def test_pictures_without_captions_are_left_out_of_retrieval_and_counted(
    clip: Artifact, folder: Path, tmp_path: Path
) -> None:
    with (folder / "captions.csv").open(newline="") as file:
        head, *rows = csv.reader(file)
    paths = list(dict.fromkeys(path for path, _ in rows))
    some = [(folder / path, text) for path, text in rows if paths.index(path) % 2]
    none = [(folder / path, "") for path in paths[::2]]
    found = {}
    for name, own in (("some", some), ("all", [*none, *some])):
        with (tmp_path / f"{name}.csv").open("w", newline="") as file:
            csv.writer(file).writerows([head, *own])
        pack(tmp_path / f"{name}.csv", tmp_path / name, PackConfig())
        given = "--suite", "retrieval", f"eval.retrieval.shards={tmp_path / name}"
        found[name] = results(clip, tmp_path, *given)["retrieval"]
    assert found["all"].pop("uncaptioned") == len(none) == 12
    assert found["all"] == pytest.approx(found["some"], abs=1e-9)
