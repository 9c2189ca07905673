"""Retrieval by the language of the captions, and the forms of captions in several languages."""

from __future__ import annotations

import csv
import json
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from in_process import invoke
from shards import photo, write_tar
from vectors import unit

from data_pipelines.ingest.labelled import open_labelled
from data_pipelines.ingest.pack import PackConfig, pack
from data_pipelines.ingest.plain_files import Request
from data_pipelines.ingest.user_data import list_files, open_data
from data_pipelines.text.captions import is_by_language, read_captions
from xray.config.loading import build, parse_overrides
from xray.errors import BadSample, ConfigError, DataError
from xray.evaluation import confidence as bootstrap
from xray.evaluation.comparison import comparison_table
from xray.evaluation.config import EvalConfig
from xray.evaluation.languages import all_captions, by_language, captions_of, chosen
from xray.evaluation.retrieval import retrieval
from xray.evaluation.suites import title_of
from xray.evaluation.suites.retrieval import RETRIEVAL, RetrievalConfig

if TYPE_CHECKING:
    from conftest import Trained

# of three pictures
CAPTIONS: list[dict[str, list[str]]] = [
    {"en": ["a dog", "a brown dog"], "de": ["ein Hund"]},
    {"en": ["a cat"], "de": ["eine Katze", "die Katze"]},
    {"de": ["ein Auto"]},
]


def flat(own: dict[str, list[str]]) -> list[tuple[str, str]]:
    return [(language, text) for language, texts in own.items() for text in texts]


def write_lines(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), "utf-8")
    return path


def write_csv(path: Path, rows: list[dict[str, Any]]) -> Path:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, [*rows[0]])
        writer.writeheader()
        writer.writerows(rows)
    return path


@pytest.fixture(scope="module")
def forms(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, dict[str, float]]]:
    """The captions of three pictures in each form, with the fields to read."""
    root = tmp_path_factory.mktemp("languages")
    names = [f"{number}.jpg" for number in range(3)]
    for number, name in enumerate(names):
        (root / name).write_bytes(photo(number))
    each = [*zip(names, CAPTIONS, strict=True)]
    long = [{"path": n, "caption": t, "language": c} for n, own in each for c, t in flat(own)]
    beside = [
        {"path": n, "captions": [t for _, t in flat(own)], "language": [c for c, _ in flat(own)]}
        for n, own in each
    ]
    objects = [
        {"path": n, "captions": [{"text": t, "language": c} for c, t in flat(own)]}
        for n, own in each
    ]
    published = [
        {
            "image/key": n.removesuffix(".jpg"),
            "image/locale": "en",
            **{c: {"caption": own[c], "caption/tokenized": ["x"]} for c in own},
        }
        for n, own in each
    ]
    wide = [
        {"path": n, **{c: own.get(c, [])[place : place + 1] for c in ("en", "de")}}
        for n, own in each
        for place in range(2)
    ]
    cells = [{key: "".join(value) for key, value in row.items()} for row in wide]
    numbered = [row | {"id": number} for number, row in enumerate(long)]
    found: dict[str, tuple[Path, dict[str, float]]] = {
        "rows": (write_csv(root / "rows.csv", long), {}),
        "numbered rows": (write_csv(root / "numbered.csv", numbered), {}),
        "lists": (write_lines(root / "lists.jsonl", beside), {}),
        "objects": (write_lines(root / "objects.jsonl", objects), {}),
        "mapping": (
            write_lines(root / "map.jsonl", [{"path": n, "captions": own} for n, own in each]),
            {},
        ),
        "caption": (
            write_lines(root / "one.jsonl", [{"path": n, "caption": own} for n, own in each]),
            {},
        ),
        "crossmodal": (write_lines(root / "captions.jsonl", published), {}),
        "columns": (write_csv(root / "columns.csv", cells), {"en": 1.0, "de": 1.0}),
    }
    for name in ("mapping", "caption", "crossmodal"):
        pack(found[name][0], root / f"{name}_shards", PackConfig())
        found[f"packed {name}"] = root / f"{name}_shards", {}
    return found


def test_languages_are_read_in_every_form(
    forms: dict[str, tuple[Path, dict[str, float]]],
) -> None:
    for form, (where, fields) in forms.items():
        source = open_labelled("eval.retrieval", str(where), "image", "", fields)
        read = [captions_of(source, *place, fields) for place in source.places()]
        pairs = [sorted((c.language, c.text) for c in own) for own in read]
        assert pairs == [sorted(flat(own)) for own in CAPTIONS], form


def test_lines_of_a_caption_keep_its_language(tmp_path: Path) -> None:
    files = {"a.jpg": photo(0), "a.txt": b"eins\n\nzwei\n", "a.json": b'{"language": "de"}'}
    write_tar(tmp_path / "0.tar", files)
    source = open_labelled("x", str(tmp_path), "image")
    (own,) = all_captions(source, RetrievalConfig(lines=True))
    assert [(c.language, c.text) for c in own] == [("de", "eins"), ("de", "zwei")]


def test_a_list_of_another_length_says_nothing_about_languages(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(photo(0))
    row = {"path": "a.jpg", "captions": ["a", "b"], "language": ["en"]}
    source = open_labelled("x", str(write_lines(tmp_path / "a.jsonl", [row])), "image")
    read = captions_of(source, *next(source.places()), {})
    assert [caption.language for caption in read] == ["", ""]


def read_beside(root: Path, facts: dict[str, Any], **fields: float) -> list[tuple[str, str]]:
    """(language, text) of the captions in a json file beside a picture, read without packing."""
    (root / "a.jpg").write_bytes(photo(0))
    (root / "a.json").write_text(json.dumps(facts), "utf-8")
    files = open_data(str(root), Request("x", "image")).read(0, 0, ("json", "txt"))
    return [(caption.language, caption.text) for caption in read_captions(files, fields)]


def test_captions_by_language_keep_their_fields(tmp_path: Path) -> None:
    both, own = [("en", "a dog"), ("de", "ein Hund")], {"en": "a dog", "de": "ein Hund"}
    for column in ("caption", "captions", "text"):
        assert read_beside(tmp_path, {column: own}) == both, column
        assert read_beside(tmp_path, {column: own}, **{f"{column}.en": 1}) == [("", "a dog")]
    facts = {"captions": {"en": [{"raw": "a dog"}, None], "de": None}}
    assert read_beside(tmp_path, facts) == both[:1]


def test_captions_beside_empty_ones_keep_their_languages(tmp_path: Path) -> None:
    both = [("en", "a dog"), ("de", "ein Hund")]
    languages = ["en", "", "de"]
    texts, objects = ["a dog", None, "ein Hund"], [{"text": t, "language": c} for c, t in both]
    mapping = {"en": "a dog", "de": "ein Hund"}
    for column in ("caption", "captions", "text"):
        for facts in (
            {column: texts, "language": languages},
            {column: [{"raw": text} for text in texts], "lang": languages},
            {column: [*objects, None]},
            {column: objects},
            {column: [mapping]},
            {column: [None, objects[0], {"de": {"raw": "ein Hund"}}]},
        ):
            assert read_beside(tmp_path, facts) == both, facts
        facts = {column: ["a dog", None], "language": "en"}
        assert read_beside(tmp_path, facts) == both[:1], column


def test_rows_are_packed_by_language_as_before(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(photo(0))
    for codes in ((1, 1, 2), ("en", "en", "de")):
        rows: list[dict[str, Any]] = [
            {"path": "a.jpg", "caption": text, "language": code}
            for text, code in zip(("one", "two", "drei"), codes, strict=True)
        ]
        items = list_files(str(write_lines(tmp_path / "a.jsonl", rows)))
        assert [item.meta for item in items] == [
            {"language": codes[0], "captions": ["one", "two"]},
            {"language": codes[2], "caption": "drei"},
        ]


def test_objects_with_other_short_keys_are_not_captions_by_language(tmp_path: Path) -> None:
    for key in ("alt", "url", "raw", "src", "xx", "pt-", "English"):
        assert not is_by_language({"en": "a dog", key: "x"}), key
    codes = ("en", "fil", "quz", "pt-BR", "zh-Hans", "eng_Latn", "npi_Deva", "zh_Hant_TW", "iw")
    assert is_by_language(dict.fromkeys(codes, "a dog"))
    with pytest.raises(BadSample, match="broken caption"):
        read_beside(tmp_path, {"caption": {"alt": "a dog", "url": "http://x"}})


def test_captions_of_rows_of_a_file_are_merged_once(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(photo(0))
    texts = ["one", "two", "three"]
    rows = [{"path": "a.jpg", "id": n, "captions": text} for n, text in enumerate(texts)]
    where, fields = str(write_csv(tmp_path / "a.csv", rows)), {"captions": 1.0}
    source = open_labelled("x", where, "image", "", fields)
    assert [caption.text for caption in captions_of(source, 0, 0, fields)] == texts


def test_each_language_equals_retrieval_on_its_captions_and_the_mean_brute_force() -> None:
    images, texts = unit(12, 4), unit(60, 4)
    owner = torch.arange(60) % 12
    masks = {"en": torch.arange(60) < 30, "de": torch.arange(60) >= 30}
    masks["de"] &= owner > 2  # three pictures without a German caption
    measures = by_language(images, texts, owner, masks)
    for language, mask in masks.items():
        pictures = owner[mask].unique().tolist()
        own = retrieval(
            images[pictures], texts[mask], torch.tensor([pictures.index(o) for o in owner[mask]])
        )
        assert {k: measures[f"{language}/{k}"] for k in own} == own
    assert measures["de/images"] == 9 and measures["en/images"] == 12
    assert measures["languages"] == 2 and measures["texts"] == 60
    similarity = images @ texts.t()
    hits = np.zeros((2, 12)), np.zeros((2, 12))  # of texts and of their number
    for column, mask in enumerate(masks.values()):
        gallery = owner[mask].unique()
        for text in torch.nonzero(mask)[:, 0].tolist():
            best = gallery[similarity[gallery, text].argmax()]
            hits[0][column, owner[text]] += int(best == owner[text])
            hits[1][column, owner[text]] += 1
    shares = hits[0].sum(1) / hits[1].sum(1)
    assert measures["text_to_image_R@1"] == pytest.approx(shares.mean(), abs=1e-9)
    means = [
        (hits[0] @ row / (hits[1] @ row)).mean()
        for row in np.concatenate([*bootstrap.resamples(12)])
    ]
    ends = [measures[f"text_to_image_R@1_{end}"] for end in ("low", "high")]
    assert ends == pytest.approx(np.percentile(means, [2.5, 97.5]), abs=1e-9)
    for key in ("image_to_text_R@5", "chance_image_to_text_R@5", "chance_text_to_image_R@10"):
        both = measures[f"en/{key}"], measures[f"de/{key}"]
        assert measures[key] == pytest.approx(sum(both) / 2)
    assert "text_to_image_median_rank" not in measures


def test_equal_captions_of_a_language_share_their_pictures() -> None:
    images, texts, owner = unit(8, 4), unit(16, 4), torch.arange(16) % 8
    kind = torch.arange(16) % 5
    mask = torch.arange(16) >= 6
    measures = by_language(images, texts, owner, {"de": mask, "en": ~mask | (owner == 7)}, kind)
    pictures = owner[mask].unique()
    own = torch.searchsorted(pictures, owner[mask])
    alone = retrieval(images[pictures], texts[mask], own, kind=kind[mask])
    assert {key: measures[f"de/{key}"] for key in alone} == alone


def test_english_and_worldwide_models_are_in_one_table() -> None:
    images, owner = unit(10, 8), torch.arange(20) % 10
    masks = {"de": torch.arange(20) < 10, "en": torch.arange(20) >= 10}
    worldwide = images[owner]
    english = torch.where(masks["en"][:, None], worldwide, unit(20, 8))
    results = {
        name: {"retrieval": by_language(images, texts, owner, masks)}
        for name, texts in (("english", english), ("worldwide", worldwide))
    }
    table = comparison_table(results)
    rows = {title: cells for title, *cells in table.rows}
    mean, german = (rows[f"text to image R@1, {of}"] for of in ("mean", "de"))
    assert mean[1].startswith("100.0") and german[1].startswith("100.0")
    assert rows["text to image R@1, en"][0].startswith("100.0")
    measured = results["english"]["retrieval"]
    assert german[0].startswith(f"{100 * measured['de/text_to_image_R@1']:.1f}")
    assert measured["de/text_to_image_R@1"] < 0.6
    assert german[2] == "10.00" and len(rows) == 2 * 3 * 3
    lines = {row[0]: row[3] for row in RETRIEVAL.rows(measured)}
    assert lines["image to text R@10, de"] == "10 pictures, 10 captions"
    assert title_of("retrieval", "de/text_to_image_R@1") == "text to image R@1, de"
    assert (
        title_of("video_retrieval", "text_to_image_R@1/8") == "text to clip R@1, first 8 features"
    )


def settings(*overrides: str) -> EvalConfig:
    own = build(EvalConfig, parse_overrides(overrides).get("eval", {}), section="eval.")
    own.validate()
    return own


def test_wrong_languages_are_one_line() -> None:
    for given, message in (
        ("[all, en]", r"give \[all\], or names"),
        ("[no, en]", "yaml reads no as false: write 'no' in quotes"),
        ("en", "give a list"),
    ):
        with pytest.raises(ConfigError, match=r"eval\.retrieval\.languages.*" + message):
            settings(f"eval.retrieval.languages={given}")
    assert settings('eval.retrieval.languages=["no", en]').of(RETRIEVAL).languages == ["no", "en"]
    counts = Counter({"en": 1200, "de": 3})
    with pytest.raises(DataError, match=r"is in 'dee'; there are de \(3\), en \(1,200\); did you"):
        chosen(["en", "dee"], counts, "eval.retrieval")
    with pytest.raises(DataError, match=r"no caption of eval\.retrieval\.shards has a language"):
        chosen(["en"], {}, "eval.retrieval")
    assert chosen(["all"], counts, "") == ["de", "en"] and chosen(["en", "en"], counts, "") == [
        "en"
    ]


def test_retrieval_by_language_from_the_command_line(
    trained: Trained, forms: dict[str, tuple[Path, dict[str, float]]], tmp_path: Path
) -> None:
    artifact, (table, _) = trained("clip", "train.samples=24"), forms["rows"]
    mixed = table.with_name("mixed.csv")
    rows = [*csv.DictReader(table.open(encoding="utf-8", newline=""))]
    rows += [{"path": f"{number}.jpg", "caption": "?", "language": ""} for number in range(2)]
    write_csv(mixed, rows)
    where, key = f"eval.retrieval.shards={mixed}", "eval.retrieval.languages"
    out = tmp_path / "results.json"
    done = invoke("eval", artifact, where, f"{key}=[all]", "data.workers=0", "--out", out)
    assert done.exit_code == 0, done.stderr
    measures = json.loads(out.read_text("utf-8"))["retrieval"]
    assert measures["languages"] == 2 and measures["images"] == 3 and measures["texts"] == 7
    assert measures["en/images"] == 2 and measures["en/texts"] == 3 and measures["de/texts"] == 4
    assert measures["without_language"] == 2 and "uncaptioned" not in measures
    over = next(iter(RETRIEVAL.rows(measures)))[3]
    unknown = "2 captions of unknown language, left out"
    assert over == f"2 languages, 3 pictures, 7 captions; {unknown}"
    assert "text to image R@1, mean" in done.stdout and "text to image R@1, de" in done.stdout
    english = invoke("eval", artifact, where, f"{key}=[en]", "data.workers=0", "--out", out)
    assert english.exit_code == 0, english.stderr
    alone = json.loads(out.read_text("utf-8"))["retrieval"]
    assert alone["uncaptioned"] == 1 and alone["images"] == 2  # a picture has no English caption
    for name in ("text_to_image_R@1", "image_to_text_R@1"):
        assert alone[name] == alone[f"en/{name}"] == measures[f"en/{name}"]
    write_csv(mixed, [row for row in rows if row["language"] != "en" or row["path"] == "0.jpg"])
    for languages, message in (("[fr]", "is in 'fr'; there are"), ("[en]", "of a single sample")):
        wrong = invoke("eval", artifact, where, f"{key}={languages}", "data.workers=0")
        assert wrong.exit_code == 2 and message in wrong.stderr, wrong.stderr
        assert len(wrong.stderr.strip().splitlines()) == 1, wrong.stderr
