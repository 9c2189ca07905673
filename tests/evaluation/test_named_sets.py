"""Many named data sets in one evaluation (eval.sets): results, and what is not computed twice."""

from __future__ import annotations

import csv
import io
import json
import re
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from child_process import xray
from named_data import (
    COLOURS,
    evaluate,
    measures,
    named,
    of_class,
    pictures,
    wds,
)
from shards import photo
from sklearn.linear_model import LogisticRegression

from xray.artifacts.artifact import open_artifact
from xray.artifacts.encoders import Encoder
from xray.evaluation.set_features import Data, SharedSets


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


def encoder_rows(encoder: Encoder, samples: Any) -> np.ndarray:
    """Embed pictures into the backbone's space, [N, D] normalised."""
    from PIL import Image

    arrays = [np.asarray(Image.open(io.BytesIO(data)).convert("RGB")) for data, _ in samples]
    pixels = torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2)[:, None]
    rows: np.ndarray = encoder.features(pixels).double().numpy()
    return rows


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
