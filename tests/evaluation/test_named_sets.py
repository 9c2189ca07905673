"""Many named data sets in one evaluation: eval.sets of `xray eval`, `xray compare` and recipes."""

from __future__ import annotations

import csv
import io
import json
import os
import re
import signal
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from child_process import xray
from in_process import invoke
from shards import photo, write_tar
from sklearn.linear_model import LogisticRegression

from xray.artifacts.artifact import open_artifact
from xray.artifacts.encoders import Encoder, Tagger, VisionEncoder
from xray.commands.named_sets import suites_with_data
from xray.config import DataConfig
from xray.config.loading import build
from xray.errors import XrayError
from xray.evaluation import feature_extraction
from xray.evaluation.config import EvalConfig
from xray.evaluation.evaluator import Evaluator
from xray.evaluation.named_sets import named_sets
from xray.evaluation.set_features import Data, SharedSets, data_of
from xray.evaluation.set_page import write_page
from xray.evaluation.set_runs import SetResult, SetRun
from xray.evaluation.set_tables import DATACOMP, canonical, mean_table, summary
from xray.evaluation.suite import Suite
from xray.evaluation.suites.compositional import COMPOSITIONAL
from xray.evaluation.suites.compression import COMPRESSION
from xray.evaluation.suites.keypoints import KEYPOINTS
from xray.evaluation.suites.retrieval import DIRECTIONS, RETRIEVAL
from xray.evaluation.suites.robustness import ROBUSTNESS
from xray.evaluation.suites.segmentation import SEGMENTATION
from xray.evaluation.suites.tagging import TAGS
from xray.evaluation.suites.zero_shot import MAP
from xray.recipes.recipe import Recipe
from xray.recipes.report import write_run_report
from xray.recipes.report_examples import confused, retrieved
from xray.recipes.run import evaluate as evaluate_recipe

if TYPE_CHECKING:
    from conftest import Trained

COLOURS = ("red", "blue", "dark green")


@pytest.fixture(scope="module")
def clip(trained: Trained) -> Path:
    return trained("clip", "train.samples=24")


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Keys of the pictures that are decoded in this process, in order."""
    seen = list[str]()
    original = feature_extraction.load_pixels

    def counted(sample: Any, *given: Any) -> torch.Tensor:
        seen.append(f"{sample.source}/{sample.key}")
        return original(sample, *given)

    monkeypatch.setattr(feature_extraction, "load_pixels", counted)
    return seen


def npy(row: Sequence[int]) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, np.array(row))
    return buffer.getvalue()


def wds(
    folder: Path,
    label: Callable[[int], dict[str, bytes]],
    splits: tuple[str, ...] = ("test",),
    names: bool = True,
    kind: str = "",
    samples: int = 6,
    seed: int = 0,
) -> Path:
    """Write a set as CLIP_benchmark's webdataset builder does, with two shards per split."""
    for number, split in enumerate(splits):
        for shard in range(2):
            files: dict[str, bytes] = {}
            for i in range(shard, samples, 2):
                files[f"s{i:07d}.jpg"] = photo(1000 * seed + 100 * number + i, (32, 32))
                files |= {f"s{i:07d}.{end}": text for end, text in label(i).items()}
            write_tar(folder / split / f"{shard}.tar", files)
        (folder / split / "nshards.txt").write_text("2\n")
    if names:
        (folder / "classnames.txt").write_text("\n".join(COLOURS) + "\n")
        templates = "a photo of a {c}.\na {c} thing\n"
        (folder / "zeroshot_classification_templates.txt").write_text(templates)
    if kind:
        (folder / "dataset_type.txt").write_text(f"{kind}\n")
    return folder


def of_class(i: int) -> dict[str, bytes]:
    return {"cls": str(i % 3).encode()}


def captions(i: int) -> dict[str, bytes]:
    return {"txt": f"picture number {i}\nthe {i}th of them".encode()}


def labels(i: int) -> dict[str, bytes]:
    return {"npy": npy([i % 2, i % 3 == 0, 1])}


@pytest.fixture(scope="module")
def benchmarks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of sets in CLIP_benchmark's layout, class folders and a list."""
    root = tmp_path_factory.mktemp("benchmarks")
    wds(root / "wds_cifar10_test", of_class, seed=1)
    wds(root / "wds_mnist", of_class, ("test", "train"), seed=2)
    wds(root / "flickr30k", captions, names=False, kind="retrieval", seed=3)
    wds(root / "voc2007_multilabel", labels, kind="multilabel", seed=4)
    for number, name in enumerate(COLOURS):
        for i in range(2):
            path = root / "folders" / name.replace(" ", "_") / f"{i}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(photo(5000 + 10 * number + i))
    listed = root / "listed"
    listed.mkdir()
    rows = [("path", "caption")] + [(f"{i}.jpg", f"photo {i}") for i in range(4)]
    for i in range(4):
        (listed / f"{i}.jpg").write_bytes(photo(6000 + i))
    with (listed / "test.csv").open("w", newline="") as file:
        csv.writer(file).writerows(rows)
    return root


def evaluate(clip: Path, sets: Path, out: Path, *more: object) -> dict[str, Any]:
    done = invoke("eval", clip, f"eval.sets={sets}", "data.workers=0", *more, "--out", out)
    assert done.exit_code == 0, (done.stderr, done.exception)
    return {**json.loads((out / "results.json").read_text()), "printed": done.stdout}


def measures(results: dict[str, Any]) -> dict[str, dict[str, dict[str, float]]]:
    return {
        name: {suite: result["measures"] for suite, result in own.items()}
        for name, own in results["sets"].items()
    }


def pictures(folder: Path, split: str = "test") -> list[tuple[bytes, dict[str, bytes]]]:
    """(picture, the other files) of each sample, in the order of the shards, read by tarfile."""
    import tarfile

    found: list[tuple[bytes, dict[str, bytes]]] = []
    for path in sorted((folder / split).glob("*.tar")):
        with tarfile.open(path) as archive:
            own: dict[str, dict[str, bytes]] = {}
            for member in archive:
                key, _, ending = member.name.partition(".")
                file = archive.extractfile(member)
                assert file is not None
                own.setdefault(key, {})[ending] = file.read()
        found += [(files.pop("jpg"), files) for files in own.values()]
    return found


def embed(encoder: Encoder, samples: Sequence[tuple[bytes, dict[str, bytes]]]) -> torch.Tensor:
    """Embed pictures of 32 x 32 pixels, which need no resize, into the joint space."""
    from PIL import Image

    arrays = [np.asarray(Image.open(io.BytesIO(data)).convert("RGB")) for data, _ in samples]
    pixels = torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2)[:, None]
    return encoder.encode_pixels(pixels)


def prompts(encoder: Encoder) -> torch.Tensor:
    """Embed the class names in both templates: [C, E]."""
    rows = []
    for name in COLOURS:
        texts = encoder.encode_text([f"a photo of a {name}.", f"a {name} thing"])
        rows.append(torch.nn.functional.normalize(texts.mean(0), dim=0))
    return torch.stack(rows)


def test_clip_benchmarks_folders_are_read_as_they_are(
    clip: Path, benchmarks: Path, tmp_path: Path
) -> None:
    results = evaluate(clip, benchmarks, tmp_path, "eval.knn.k=3")
    found = measures(results)
    assert {name: list(own) for name, own in found.items()} == {
        "flickr30k": ["retrieval"],
        "folders": ["zero_shot"],
        "listed": ["retrieval"],
        "voc2007_multilabel": ["zero_shot"],
        "wds_cifar10_test": ["zero_shot"],
        "wds_mnist": ["zero_shot", "knn", "linear_probe"],
    }
    encoder = Encoder(open_artifact(clip))
    classes = prompts(encoder)

    samples = pictures(benchmarks / "wds_cifar10_test")
    truth = torch.tensor([int(files["cls"]) for _, files in samples])
    top1 = float(((embed(encoder, samples) @ classes.T).argmax(1) == truth).double().mean())
    own = found["wds_cifar10_test"]["zero_shot"]
    assert own["top1"] == pytest.approx(top1, abs=1e-6) and own["classes"] == 3
    assert own["samples"] == 6

    samples = pictures(benchmarks / "voc2007_multilabel")
    rows = np.stack([np.load(io.BytesIO(files["npy"])) for _, files in samples])
    scores = (embed(encoder, samples) @ classes.T).double().numpy()
    from sklearn.metrics import average_precision_score

    by_class = [average_precision_score(rows[:, c], scores[:, c]) for c in range(3)]
    own = found["voc2007_multilabel"]["zero_shot"]
    assert own["mean_average_precision"] == pytest.approx(np.mean(by_class), abs=1e-6)

    samples = pictures(benchmarks / "flickr30k")
    images = embed(encoder, samples)
    texts = [files["txt"].decode().split("\n") for _, files in samples]
    assert all(len(lines) == 2 for lines in texts)
    owner = np.repeat(np.arange(6), 2)
    similarity = (encoder.encode_text([t for lines in texts for t in lines]) @ images.T).numpy()
    own = found["flickr30k"]["retrieval"]
    nearest = similarity.argmax(1) == owner
    back = owner[similarity.argmax(0)] == np.arange(6)
    assert own["text_to_image_R@1"] == pytest.approx(nearest.mean(), abs=1e-6)
    assert own["image_to_text_R@1"] == pytest.approx(back.mean(), abs=1e-6)
    assert own["texts"] == 12

    printed = results["printed"]
    assert "voc2007_multilabel" in printed and "zero-shot mAP" in printed
    assert len(re.findall(r"mean of 3 sets", printed)) == 3  # top1, top5 and recall


def test_means_over_sets_and_the_average_of_datacomp(
    clip: Path, benchmarks: Path, tmp_path: Path
) -> None:
    results = evaluate(clip, benchmarks, tmp_path, "--suite", "zero_shot,retrieval")
    found = measures(results)
    of_top1 = ["folders", "wds_cifar10_test", "wds_mnist"]
    top1 = [found[name]["zero_shot"]["top1"] for name in of_top1]
    mean = results["means"]["zero_shot"]["top1"]
    assert mean == {"mean": pytest.approx(np.mean(top1)), "sets": 3}
    assert not {"top1_low", "samples"} & results["means"]["zero_shot"].keys()
    assert results["means"]["zero_shot"]["mean_average_precision"]["sets"] == 1
    recall = [found["flickr30k"]["retrieval"][f"{way}_R@1"] for way in
              ("text_to_image", "image_to_text")]  # fmt: skip
    known = [*top1[1:], np.mean(recall)]
    assert results["datacomp"] == {"mean": pytest.approx(np.mean(known)), "sets": 3, "of": 38}
    assert "DataComp's average" in results["printed"] and "3 of its 38" in results["printed"]
    assert f"{100 * np.mean(known):.1f}" in results["printed"]
    page = (tmp_path / "results.html").read_text()
    assert page.count("data:image/svg+xml") == 4 and "DataComp&#x27;s average" in page
    assert DATACOMP == 38
    for name in ("wds_vtab-caltech101_test", "vtab/caltech101", "caltech101", "Caltech101"):
        assert canonical(name) == "caltech101"
    assert canonical("wds_imagenet-a") == "imagenet-a"


def robust(clean: float, *shifts: str) -> SetResult:
    """Measures of robustness on one set, and on others from elsewhere."""
    own = {
        "samples": 4.0,
        "attacked_samples": 0.0,
        "chance": 0.5,
        "shift": 0.5,
        "chance_shift": 0.5,
    }
    own |= {"clean": clean, "clean_low": clean - 0.25, "clean_high": clean + 0.25}
    for name in shifts:
        own |= {f"shift/{name}": 0.5, f"shift/chance_{name}": 0.5, f"shift_samples/{name}": 2.0}
        own |= {f"shift_classes/{name}": 2.0, f"shift_left_out/{name}": 0.0}
    return SetResult("", {f"zero_shot/{key}": value for key, value in own.items()})


def test_a_row_that_some_sets_do_not_have_has_no_mean() -> None:
    """The mean over v2 and r, and that over v2 and s, are of different sets."""
    first, second = robust(0.5, "v2", "r"), robust(0.75, "v2", "s")
    rows = mean_table({"": {"a": {"robustness": first}, "b": {"robustness": second}}}).rows
    assert [row[1] for row in rows] == ["zero-shot, clean", "zero-shot, shift v2"]
    assert rows[0][:2] == ("mean of 2 sets", "zero-shot, clean") and "62.5" in rows[0][2]


def by_language(recall: float) -> SetResult:
    """Measures of retrieval on a set with captions in English."""
    own = {"images": 4.0, "texts": 4.0}
    for name in (f"{way}_R@{k}" for way in DIRECTIONS for k in (1, 5, 10)):
        own |= {name: recall, f"{name}_low": recall - 0.25, f"{name}_high": recall + 0.25}
        own[f"chance_{name}"] = 0.25
    return SetResult("", {"languages": 1.0, **own} | {f"en/{key}": own[key] for key in own})


def test_a_mean_has_no_interval(tmp_path: Path) -> None:
    """Ends of intervals are NAME_low/PREFIX, or NAME_low for all of a name."""
    results = {
        name: {"robustness": robust(value), "retrieval": by_language(value)}
        for name, value in {"a": 0.25, "b": 0.5}.items()
    }
    rows = {row[1]: row[2] for row in mean_table({"": results}).rows}
    assert rows["zero-shot, clean"] == rows["text to image R@1, en"] == "37.5"
    assert not any("[" in value for value in rows.values())
    means = summary(results)["means"]
    assert means["robustness"] == {"zero_shot/clean": {"mean": 0.375, "sets": 2}}
    assert "en/text_to_image_R@1" in means["retrieval"]
    write_page(tmp_path / "page.html", {"a model": results}, [])
    assert "zero shot/clean of each set" in (tmp_path / "page.html").read_text()


def named(path: Path, sets: dict[str, Any]) -> Path:
    path.write_text(json.dumps(sets))  # json is yaml
    return path


def test_forty_sets_decode_each_picture_once(
    clip: Path, tmp_path: Path, decoded: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Twenty sets of classes, and twenty lists of their pictures with captions and one more."""
    sets: dict[str, Any] = {}
    for number in range(20):
        rows = [("path", "caption")]
        for i in range(4):
            path = tmp_path / f"classes{number}" / COLOURS[i % 2] / f"{i}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(photo(10 * number + i, (32, 32)))
            rows.append((f"classes{number}/{COLOURS[i % 2]}/{i}.jpg", f"photo {i}"))
        (tmp_path / f"{number}.jpg").write_bytes(photo(10 * number + 9, (32, 32)))
        with (tmp_path / f"captions{number}.csv").open("w", newline="") as file:
            csv.writer(file).writerows([*rows, (f"{number}.jpg", "one more")])
        sets[f"classes{number}"] = f"classes{number}"
    for number in range(20):
        sets[f"captions{number}"] = {"suite": "retrieval", "shards": f"captions{number}.csv"}
    held = list[int]()
    following = SharedSets.following

    def watched(own: SharedSets, *given: Any) -> SharedSets:
        after = following(own, *given)
        held.append(sum(len(f["joint"].rows) for f in after._features.values()))
        return after

    monkeypatch.setattr(SharedSets, "following", watched)
    results = evaluate(clip, named(tmp_path / "sets.yaml", sets), tmp_path / "out")
    assert list(results["sets"]) == list(sets) and len(sets) == 40
    assert len(decoded) == 20 * 5
    assert max(held) == 4 and held[-1] == 0  # those of a set that another one still needs
    alone = {"captions7": sets["captions7"]}
    once = evaluate(clip, named(tmp_path / "one.yaml", alone), tmp_path / "alone")
    assert len(decoded) == 20 * 5 + 5
    whole = measures(results)["captions7"]["retrieval"]
    assert measures(once)["captions7"]["retrieval"] == pytest.approx(whole)


def test_a_kill_in_the_middle_repeats_nothing(
    clip: Path, tmp_path: Path, decoded: list[str]
) -> None:
    root, out = tmp_path / "sets", tmp_path / "out"
    for number in range(4):
        wds(root / f"set{number}", of_class, seed=10 + number)
    settings = (f"eval.sets={root}", "data.workers=0", "--out", str(out))
    killed = xray("eval", str(clip), *settings, killed_at="set:3")
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    before = json.loads((out / "results.json").read_text())["sets"]
    assert list(before) == ["set0", "set1"]
    results = evaluate(clip, root, out)
    assert len(decoded) == 2 * 6
    assert {name: results["sets"][name] for name in ("set0", "set1")} == {
        name: before[name] for name in ("set0", "set1")
    }
    whole = evaluate(clip, root, tmp_path / "whole")
    assert results["sets"] == whole["sets"] and len(decoded) == (2 + 4) * 6

    decoded.clear()  # other settings or data of a set repeat this set only
    wds(root / "set1", of_class, seed=99)
    (root / "set2" / "classnames.txt").write_text("red\nblue\ngreen\n")
    again = evaluate(clip, root, out)
    assert len(decoded) == 2 * 6
    assert again["sets"]["set0"] == whole["sets"]["set0"]
    assert again["sets"]["set1"]["zero_shot"] != whole["sets"]["set1"]["zero_shot"]
    evaluate(clip, root, out, "eval.zero_shot.templates=['a {} of a kind']")
    assert len(decoded) == 2 * 6  # the sets have templates of their own
    evaluate(clip, root, out, "eval.views.clips=2")
    assert len(decoded) == (2 + 4) * 6


def test_a_set_has_several_suites_and_settings_of_its_own(
    clip: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hashed: list[Data] = []
    original = Data.fingerprint.func
    monkeypatch.setattr(Data.fingerprint, "func", lambda own: hashed.append(own) or original(own))
    wds(tmp_path / "toys", of_class, ("train", "test"), samples=12)
    sets = {
        "all": {"suite": ["zero_shot", "knn", "linear_probe"], "train": "toys/train",
                "test": "toys/test", "classes": "toys/classnames.txt", "k": 3},
        "whole": "toys",
        "part": {"folder": "toys", "suite": "knn"},
    }  # fmt: skip
    results = evaluate(clip, named(tmp_path / "s.yaml", sets), tmp_path / "out", "eval.knn.k=5")
    found = measures(results)
    assert len(hashed) == 3 + 3 + 2  # train, test and the file of class names, each once
    assert {name: list(own) for name, own in found.items()} == {
        "all": ["zero_shot", "knn", "linear_probe"],
        "whole": ["zero_shot", "knn", "linear_probe"],
        "part": ["knn"],
    }
    others = ("--suite", "linear_probe", "eval.knn.k=5")  # the results of other suites stay
    again = measures(evaluate(clip, tmp_path / "s.yaml", tmp_path / "out", *others))
    assert again == found
    sets = {"whole": "toys"}
    others = ("--suite", "zero_shot", "eval.precision=bf16")  # not those of another precision
    again = measures(evaluate(clip, named(tmp_path / "s.yaml", sets), tmp_path / "out", *others))
    assert {name: list(own) for name, own in again.items()} == {"whole": ["zero_shot"]}
    assert found["part"]["knn"] == found["whole"]["knn"] and found["whole"]["knn"]["samples"] == 12
    encoder = Encoder(open_artifact(clip))
    train, test = (pictures(tmp_path / "toys", split) for split in ("train", "test"))
    x, y = (encoder_rows(encoder, own) for own in (train, test))
    truth, own = ([int(files["cls"]) for _, files in part] for part in (train, test))
    mean, deviation = x.mean(0), x.std(0, ddof=1) + 1e-6
    strength = found["whole"]["linear_probe"]["l2"]
    judge = LogisticRegression(C=1 / (strength * 12), tol=1e-10, max_iter=10_000)
    judge.fit((x - mean) / deviation, truth)
    score = judge.score((y - mean) / deviation, own)
    assert found["whole"]["linear_probe"]["top1"] == pytest.approx(score, abs=1e-6)


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


def encoder_rows(encoder: Encoder, samples: Any) -> np.ndarray:
    """Embed pictures into the backbone's space, [N, D] normalised."""
    from PIL import Image

    arrays = [np.asarray(Image.open(io.BytesIO(data)).convert("RGB")) for data, _ in samples]
    pixels = torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2)[:, None]
    rows: np.ndarray = encoder.features(pixels).double().numpy()
    return rows


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
    masks = {"train": "unmasked", "test": "unmasked"}
    yield {"a": {"suite": "segmentation", **masks}}, "there is no folder of masks"
    yield {"a": {"suite": "keypoints", "pairs": "pairs.csv"}}, "has no column 'source'"
    yield {"a": {"suite": "compositional", "pairs": "pairs.csv"}}, "no column of wrong captions"
    yield {"a": {"folder": "many"}}, "labels of sample s0000000 are not 3 zeros and ones"


def test_wrong_sets_are_one_line_before_the_first_set_starts(
    clip: Path, tmp_path: Path, decoded: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    wds(tmp_path / "set", of_class)
    wds(tmp_path / "many", lambda i: {"npy": npy([1, 0])}, kind="multilabel")
    wds(tmp_path / "texts", captions)
    (tmp_path / "pairs.csv").write_text("path,caption\nset/a.jpg,a picture\n")
    (tmp_path / "unmasked" / "images").mkdir(parents=True)
    (tmp_path / "unmasked" / "images" / "0.jpg").write_bytes(photo(0))
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


def test_damaged_results_are_not_overwritten(clip: Path, tmp_path: Path) -> None:
    wds(tmp_path / "sets" / "a", of_class)
    (tmp_path / "results.json").write_text('{"sets": {"a": 3}}')
    done = invoke("eval", clip, f"eval.sets={tmp_path / 'sets'}", "--out", tmp_path)
    assert done.exit_code == 2 and "cannot be read" in done.stderr and "delete it" in done.stderr
    assert (tmp_path / "results.json").read_text() == '{"sets": {"a": 3}}'


def test_models_are_compared_on_sets(
    clip: Path, tagger: Path, benchmarks: Path, tmp_path: Path, decoded: list[str]
) -> None:
    sets = {"a": str(benchmarks / "wds_mnist"), "b": str(benchmarks / "folders")}
    path = named(tmp_path / "sets.yaml", sets)
    command = ("compare", clip, tagger, f"eval.sets={path}", "eval.knn.k=3", "data.workers=0",
               "--out", tmp_path / "all.json")  # fmt: skip
    done = invoke(*command)
    assert done.exit_code == 0, (done.stderr, done.exception)
    models = json.loads((tmp_path / "all.json").read_text())["models"]
    offered = [
        {name: list(own) for name, own in model["sets"].items()} for model in models.values()
    ]
    assert offered == [
        {"a": ["zero_shot", "knn", "linear_probe"], "b": ["zero_shot"]},
        {"a": ["knn", "linear_probe"]},
    ]
    assert "b" in done.stdout and "mean of 2 sets" in done.stdout
    assert "xray: " in (tmp_path / "all.html").read_text()
    before = len(decoded)
    assert invoke(*command).exit_code == 0 and len(decoded) == before

    named(path, {"b": str(benchmarks / "folders")})  # the first model can run nothing of it
    command = ("compare", tagger, clip, *command[3:])
    done = invoke(*command)
    assert done.exit_code == 0, (done.stderr, done.exception)
    models = json.loads((tmp_path / "all.json").read_text())["models"]
    assert [model.get("sets", {}).keys() for model in models.values()] == [set(), {"b"}]
    named(path, {"c": {"suite": "captions", "shards": str(benchmarks / "listed")}})
    done = invoke(*command)
    assert done.exit_code == 2 and "nor on another of the models" in done.stderr


def with_titles(folder: Path) -> dict[str, Any]:
    """Settings of a list whose captions are in a column of its own."""
    for i in range(4):
        (folder / f"{i}.jpg").write_bytes(photo(7000 + i, (32, 32)))
    rows = [("path", "remark"), *((f"{i}.jpg", f"red title {i}") for i in range(4))]
    with (folder / "titles.csv").open("w", newline="") as file:
        csv.writer(file).writerows(rows)
    return {"shards": str(folder / "titles.csv"), "captions": {"remark": 1.0}}


def test_a_recipe_evaluates_its_sets(
    clip: Path, tagger: Path, benchmarks: Path, tmp_path: Path, decoded: list[str],
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """The last artifact that can run a suite runs it; sets.json has the results of all."""
    recipe = Recipe("named", tmp_path)
    settings = {"sets": str(benchmarks), "knn": {"k": 3}}
    recipe.eval = build(EvalConfig, settings)
    artifacts = [open_artifact(clip), open_artifact(tagger)]
    assert evaluate_recipe(recipe, artifacts) is None  # there are no other suites
    stored = json.loads((tmp_path / "sets.json").read_text())
    assert {name: list(own) for name, own in stored["sets"].items()}["wds_mnist"] == [
        "zero_shot",
        "knn",
        "linear_probe",
    ]
    assert stored["datacomp"]["sets"] == 3 and "mean of 3 sets" in capsys.readouterr().out
    page = write_run_report(recipe, [], None).read_text()
    assert "wds_mnist: kNN top1" in page and "mean of 3 sets: zero-shot top1" in page
    before = len(decoded)
    evaluate_recipe(recipe, artifacts)
    assert json.loads((tmp_path / "sets.json").read_text()) == stored and len(decoded) == before
    recipe.eval = EvalConfig()
    evaluate_recipe(recipe, artifacts)
    assert not (tmp_path / "sets.json").exists()
    many = {"shards": str(benchmarks / "voc2007_multilabel" / "test"),
            "classes": str(benchmarks / "voc2007_multilabel" / "classnames.txt")}  # fmt: skip
    recipe.eval = build(EvalConfig, {"zero_shot": many, "keep_rates": {"rates": [1, 0.5]}})
    assert evaluate_recipe(recipe, artifacts) is not None  # samples with several classes
    mean = json.loads((tmp_path / "results.json").read_text())["zero_shot"][MAP]
    rates = json.loads((tmp_path / "keep_rates.json").read_text())
    data, encoder = DataConfig(resolution=32), Encoder(artifacts[0])
    assert confused(encoder, recipe, data) == ""
    tagged = {"t": with_titles(tmp_path) | {"tags": "caption_words"}}
    sets = Evaluator(Tagger(artifacts[1]), build(EvalConfig, {"tags": tagged}), "", 0).sets
    assert TAGS.run(sets, sets.config.of(TAGS))["t/samples"] == 4
    recipe.eval = build(EvalConfig, {"retrieval": with_titles(tmp_path)})
    assert "of 4 captions the nearest image" in retrieved(encoder, recipe, data)
    assert rates["0.5"].keys() >= {f"zero_shot/{MAP}", f"zero_shot/{MAP}_low"}
    assert 0 < mean <= 1 and rates["1"][f"zero_shot/{MAP}"] <= 1


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
