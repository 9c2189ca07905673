"""Right captions against wrong ones: SugarCrepe's, ARO's and Winoground's tables."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from in_process import invoke
from shards import photo
from vectors import unit

from data_pipelines.ingest.caption_pairs import open_questions
from xray.api import load
from xray.errors import DataError
from xray.evaluation import compositional as module
from xray.evaluation import confidence as bootstrap
from xray.evaluation.compositional import CHANCES, pair_hits, two_by_two_hits
from xray.evaluation.suites import title_of
from xray.evaluation.suites.compositional import COMPOSITIONAL

if TYPE_CHECKING:
    from conftest import Trained


def write_csv(path: Path, head: str, *rows: str) -> Path:
    path.write_text("\n".join([head, *rows]) + "\n", "utf-8")
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("pairs")
    (root / "images").mkdir()
    for number in range(4):
        (root / "images" / f"{number}.jpg").write_bytes(photo(number))
        shutil.copy(root / "images" / f"{number}.jpg", root / "images" / f"ex_{number}.png")
    return root


def test_pairs_equal_brute_force_also_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    images, texts, rng = unit(9, 5), unit(30, 5), np.random.default_rng(0)
    picture = torch.from_numpy(rng.integers(9, size=40))
    captions = [rng.choice(30, 2 + number % 3, replace=False).tolist() for number in range(40)]
    expected = []
    for number, (right, *wrong) in zip(picture.tolist(), captions, strict=True):
        near = [float(images[number].double() @ texts[text].double()) for text in (right, *wrong)]
        expected.append(near[0] > max(near[1:]))
    assert pair_hits(images, texts, picture, captions).tolist() == expected
    assert 5 < sum(expected) < 35
    monkeypatch.setattr(module, "HELD", 7 * 5)  # seven pairs at a time
    assert pair_hits(images, texts, picture, captions).tolist() == expected


def test_two_by_two_equals_brute_force_and_random_scores_are_at_chance() -> None:
    images, texts, rng = unit(40, 3), unit(50, 3), np.random.default_rng(0)
    pictures, captions = (
        torch.from_numpy(np.array([rng.choice(n, 2, replace=False) for _ in range(3000)]))
        for n in (40, 50)
    )
    hits = two_by_two_hits(images, texts, pictures, captions)
    for row in range(100):
        s = [[float(images[i] @ texts[c]) for c in captions[row]] for i in pictures[row]]
        text = s[0][0] > s[0][1] and s[1][1] > s[1][0]
        image = s[0][0] > s[1][0] and s[1][1] > s[0][1]
        found = [bool(hits[f"{kind}_score"][row]) for kind in ("text", "image", "group")]
        assert found == [text, image, text and image]
    wide = unit(2000, 64)  # nearly independent similarities
    numbers = torch.arange(2000).view(-1, 2)
    free = two_by_two_hits(wide, unit(2000, 65)[:, :64], numbers, numbers)
    for name, chance in CHANCES.items():
        assert float(free[name].double().mean()) == pytest.approx(chance, abs=0.04), name


def test_a_tie_is_no_success() -> None:
    same = torch.ones(2, 4) / 2
    assert not pair_hits(same, same, torch.tensor([0]), [[0, 1]]).any()
    pairs = torch.tensor([[0, 1]])
    assert not any(hits.any() for hits in two_by_two_hits(same, same, pairs, pairs).values())


ROWS = [
    {"filename": "0.jpg", "caption": "a red dog", "negative_caption": "a blue dog", "kind": "x"},
    {"filename": "0.jpg", "caption": "one, two", "negative_caption": "two, one", "kind": "y"},
    {"filename": "1.jpg", "caption": "a red dog", "negative_caption": "a dog", "kind": "x"},
]
COLUMNS = [
    ("image_path", "true_caption", "false_caption"),  # ARO
    ("path", "right_caption", "wrong_caption"),
]


def test_tables_of_pairs_are_read_as_published(folder: Path) -> None:
    published = folder / "swap_obj.json"  # SugarCrepe: an object of objects
    published.write_text(json.dumps({str(n): row for n, row in enumerate(ROWS)}), "utf-8")
    (folder / "list.jsonl").write_text("\n".join(map(json.dumps, ROWS)), "utf-8")
    tables = [published, folder / "list.jsonl"]
    for number, columns in enumerate(COLUMNS):
        tables.append(folder / f"{number}.csv")
        with tables[-1].open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow((*columns, "kind"))
            writer.writerows([*row.values()] for row in ROWS)
    for table in tables:
        source = open_questions("eval.x", str(table), "", "kind")
        assert [item.path for item in source.items] == [
            folder / "images" / name for name in ("0.jpg", "1.jpg")
        ], table
        assert [own.pictures for own in source.questions] == [(0,), (0,), (1,)]
        assert [own.category for own in source.questions] == ["x", "y", "x"]
        assert source.questions[1].captions == ("one, two", "two, one")
        assert not source.two_by_two and len(source) == 2
    several = [{**ROWS[0], "negative_caption": ["a", "b"]}]
    (folder / "several.jsonl").write_text(json.dumps(several[0]), "utf-8")
    (question,) = open_questions("x", str(folder / "several.jsonl"), "", "category").questions
    assert question == ((0,), ("a red dog", "a", "b"), "")


def winoground(folder: Path) -> Path:
    rows = [
        {"id": 0, "image_0": "ex_0", "image_1": "ex_1", "caption_0": "a b", "caption_1": "b a"},
        {"id": 1, "image_0": "ex_2", "image_1": "ex_0", "caption_0": "c d", "caption_1": "d c"},
    ]
    table = folder / "examples.jsonl"
    table.write_text("\n".join(map(json.dumps, rows)), "utf-8")
    return table


def test_winoground_is_read_as_published(folder: Path) -> None:
    source = open_questions("x", str(winoground(folder)), "", "category")
    assert source.two_by_two
    assert [item.path.name for item in source.items] == ["ex_0.png", "ex_1.png", "ex_2.png"]
    assert source.questions[1] == ((2, 0), ("c d", "d c"), "")


@pytest.mark.parametrize(
    ("head", "rows", "message"),
    [
        ("path,caption", ["0.jpg,a"], "has no column of wrong captions .* it has path, caption"),
        ("path,negative_caption", ["0.jpg,a"], "has no column of right captions"),
        ("photo,caption,negative_caption", ["0.jpg,a,b"], "has no column of pictures"),
        ("image_0,image_1,caption_0", ["0.jpg,1.jpg,a"], "has no column 'caption_1'"),
        (
            "path,caption,negative_caption",
            ["0.jpg,a,b", "1.jpg,a,"],
            "row 2: neg.* is empty",
        ),
        (
            "path,caption,negative_caption",
            ["0.jpg,a,b", "9.jpg,a,b"],
            "data row 2: no file .*9.jpg",
        ),
        ("path,caption,negative_caption", ["a.csv,a,b"], "data row 1: a.csv is no picture"),
    ],
)
def test_wrong_tables_are_one_line(folder: Path, head: str, rows: list[str], message: str) -> None:
    table = write_csv(folder / "images" / "a.csv", head, *rows)
    with pytest.raises(DataError, match=message) as caught:
        open_questions("eval.compositional.pairs", str(table), "", "category")
    assert str(caught.value).startswith("eval.compositional.pairs: ")
    assert "\n" not in str(caught.value)


def test_wrong_settings_are_one_line(folder: Path) -> None:
    table = write_csv(folder / "b.csv", "path,caption,negative_caption", "0.jpg,a,b")
    with pytest.raises(DataError, match="has no column 'kind': it has path, caption"):
        open_questions("x", str(table), "", "kind")
    with pytest.raises(DataError, match="is not a table"):
        open_questions("x", str(folder), "", "category")


def run(artifact: Path, table: Path, out: Path, *more: str) -> dict[str, Any]:
    key = f"eval.compositional.pairs={table}"
    done = invoke("eval", artifact, key, "data.workers=0", *more, "--out", out)
    assert done.exit_code == 0, done.stderr
    assert "compositional" in done.stdout
    measures: dict[str, Any] = json.loads(out.read_text("utf-8"))["compositional"]
    return measures


def test_compositional_from_the_command_line(
    trained: Trained, folder: Path, tmp_path: Path
) -> None:
    artifact, out = trained("clip", "train.samples=24"), tmp_path / "results.json"
    model = load(artifact)
    table = folder / "pairs.jsonl"
    table.write_text("\n".join(map(json.dumps, ROWS)), "utf-8")
    measures = run(artifact, table, out, "eval.compositional.category=kind")
    paths = [str(folder / "images" / row["filename"]) for row in ROWS]
    images = model.encode_image(paths)
    right, wrong = (
        model.encode_text([row[key] for row in ROWS]) for key in ("caption", "negative_caption")
    )
    hits = ((images * right).sum(1) > (images * wrong).sum(1)).double()
    assert measures["accuracy"] == pytest.approx(float(hits.mean()))
    assert measures["accuracy/x"] == pytest.approx(float(hits[[0, 2]].mean()))
    assert measures["accuracy/y"] == float(hits[1]) and measures["samples/x"] == 2
    assert measures["chance_accuracy"] == measures["chance_accuracy/y"] == 0.5
    own, sizes = np.array([float(hits[:2].sum()), float(hits[2])]), np.array([2, 1])
    shares = [own @ row / (sizes @ row) for row in np.concatenate([*bootstrap.resamples(2)])]
    ends = [measures["accuracy_low"], measures["accuracy_high"]]
    assert ends == pytest.approx(np.percentile(shares, [2.5, 97.5]))  # resamples the pictures
    titles = [title for title, *_ in COMPOSITIONAL.rows(measures)]
    assert titles == [f"compositional accuracy{more}" for more in ("", ", x", ", y")]
    assert title_of("compositional", "accuracy/x") == "compositional accuracy, x"

    scores = run(artifact, winoground(folder), out)
    assert {name: scores[f"chance_{name}"] for name in CHANCES} == pytest.approx(CHANCES)
    assert scores["group_score"] <= min(scores["text_score"], scores["image_score"])
    assert scores["samples"] == 2 and "text_score_low" in scores
