"""Curation of small pools from end to end, compared with simple loops."""

from __future__ import annotations

import hashlib
import io
import json
import shutil
import subprocess
import sys
import tarfile
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pools import config, dropped, kept, pool
from shards import jpeg

from data_pipelines.curation.balance import Matches, draw
from data_pipelines.curation.config import CurationConfig, FilterConfig
from data_pipelines.curation.curate import curate, write_shards
from data_pipelines.shards.sidecar import write_sidecar
from data_pipelines.shards.source import open_source
from data_pipelines.text.captions import captions_of
from xray.errors import ConfigError, DataError


def photos_with_words(samples: int, per_shard: int) -> list[list[dict[str, Any]]]:
    """Make rows with one to three texts of Zipf-distributed words w1, w2, ..."""
    rng = np.random.default_rng(0)
    rows: list[dict[str, Any]] = []
    for number in range(samples):
        texts = [
            " ".join(f"w{min(w, 60)}" for w in rng.zipf(1.6, rng.integers(1, 6)))
            for _ in range(rng.integers(1, 4))
        ]
        rows.append({"key": f"{number:05d}", "captions": texts})
    return [rows[start : start + per_shard] for start in range(0, samples, per_shard)]


ENTRIES = [f"w{number}" for number in range(1, 50)] + ["w1 w2", "w1 w1"]


def test_curation_equals_a_simple_loop(tmp_path: Path) -> None:
    shards = photos_with_words(300, 80)
    source = pool(tmp_path / "pool", shards)
    settings = config(tmp_path, ENTRIES, t=15, seed=3)
    curated = curate(source, settings)
    texts = {row["key"]: row["captions"] for rows in shards for row in rows}
    shard_of = {row["key"]: f"{shard:05d}.tar" for shard, rows in enumerate(shards) for row in rows}
    matches = {
        (key, number): [e for e, entry in enumerate(ENTRIES) if f" {entry} " in f" {text} "]
        for key, captions in texts.items()
        for number, text in enumerate(captions)
    }
    counts = Counter(entry for entries in matches.values() for entry in entries)
    expected: dict[str, list[int]] = {}
    for (key, number), entries in matches.items():
        digest = hashlib.blake2b(f"{shard_of[key]}\0{key}".encode(), digest_size=8).digest()
        one = Matches(
            np.frombuffer(digest, np.int64),
            np.array([1]),
            np.array([number], np.int32),
            np.array([len(entries)]),
            np.array(entries, np.int32),
        )
        if draw(one, np.array([min(1, 15 / max(1, counts[e])) for e in range(51)]), 3)[0]:
            expected.setdefault(key, []).append(number)
    assert kept(curated) == expected and 20 < len(expected) < 250
    report = curated.report
    assert {(row.entry, row.before) for row in report.top + report.tail} >= {
        (ENTRIES[e], n) for e, n in counts.most_common(40)
    }
    after = Counter(
        entry for key, numbers in expected.items() for n in numbers for entry in matches[key, n]
    )
    assert all(row.after == after[ENTRIES.index(row.entry)] for row in report.top + report.tail)
    (row,) = report.languages
    assert (row.before, row.after) == (sum(map(bool, matches.values())), report.kept[1])
    assert row.unmatched == len(ENTRIES) - len(counts)
    assert report.read == (300, len(matches)) and report.kept[0] == len(expected)
    assert report.read[0] - sum(step.samples for step in report.steps) == report.kept[0]
    assert report.read[1] - sum(step.texts for step in report.steps) == report.kept[1]
    assert report.curve["before"][-1] == counts.total()
    assert report.curve["after"][-1] == after.total()
    assert len(curated.source) == len(expected)


def test_the_result_is_the_same_with_more_processes_and_after_a_resume(tmp_path: Path) -> None:
    shards = photos_with_words(120, 20)
    media = [jpeg((20 * i, 90, 250 - 30 * i)) for i in range(8)]
    for rows in shards:
        for row in rows:
            row["media"] = media[int(row["key"]) % 8] + row["key"][:4].encode()  # duplicates
    settings = {"t": 10, "dedup": {"exact": True}, "filters": {"same_text": 5}}
    one = curate(pool(tmp_path / "one", shards), config(tmp_path, ENTRIES, **settings))
    assert {"exact duplicate", "same_text", "balance"} <= dropped(one).keys()
    pooled = tmp_path / "two"
    folder = pooled / ".xray"
    both = config(tmp_path, ENTRIES, workers=2, **settings)
    two = curate(pool(pooled, shards), both)
    assert kept(two) == kept(one) and two.kept.digest == one.kept.digest
    assert two.report.steps == one.report.steps
    removed = [*folder.glob("shards-*.*"), *folder.glob("0000[135].tar.*-*")]
    left = {path: path.stat().st_mtime_ns for path in folder.glob("*.tar.*-*")}
    left = {path: time for path, time in left.items() if path not in removed}
    assert len(removed) >= 12 and len(left) >= 12
    for path in removed:
        path.unlink()
    again = curate(pool(pooled, shards), config(tmp_path, ENTRIES, **settings))
    assert again.kept.digest == one.kept.digest and again.report.steps == one.report.steps
    assert all(path.stat().st_mtime_ns == time for path, time in left.items())


ROWS: list[dict[str, Any]] = [
    {"key": "a", "captions": ["dog one two", "dog"], "width": 100, "height": 50, "user": "u"},
    {"key": "b", "captions": ["dog dog dog cat x"], "width": 40, "height": 80, "user": "u"},
    {"key": "c", "captions": ["nothing here"], "width": 60, "height": 60, "user": "u"},
    {"key": "d", "captions": ["Dog  one TWO", "loooong cat"], "width": 50, "height": 50},
    {"key": "e", "captions": [], "width": 50, "height": 50},
    {"key": "f", "caption": {"text": "cat", "language": "de"}, "media": jpeg(size=(30, 20))},
]
ALL = {"a": [0, 1], "b": [0], "d": [0, 1], "f": [0]}


@pytest.mark.parametrize(
    ("settings", "keys", "counts"),
    [
        ({}, ALL, {}),
        ({"casefold": True}, ALL, {}),
        ({"filters.min_width": 41}, {"a": [0, 1], "d": [0, 1]}, {"min_width": (2, 2)}),
        ({"filters.max_width": 99}, {k: ALL[k] for k in "bdf"}, {"max_width": (1, 2)}),
        ({"filters.min_height": 21}, {k: ALL[k] for k in "abd"}, {"min_height": (1, 1)}),
        ({"filters.max_height": 79}, {k: ALL[k] for k in "adf"}, {"max_height": (1, 1)}),
        ({"filters.min_aspect": 0.6}, {k: ALL[k] for k in "adf"}, {"min_aspect": (1, 1)}),
        ({"filters.max_aspect": 1.6}, {k: ALL[k] for k in "bdf"}, {"max_aspect": (1, 2)}),
        ({"filters.min_words": 2}, {"a": [0], "b": [0], "d": [0, 1]}, {"min_words": (1, 2)}),
        ({"filters.max_words": 2}, {"a": [1], "d": [1], "f": [0]}, {"max_words": (1, 3)}),
        ({"filters.min_chars": 4}, {"a": [0], "b": [0], "d": [0, 1]}, {"min_chars": (1, 2)}),
        ({"filters.max_chars": 11}, {"a": [0, 1], "d": [1], "f": [0]}, {"max_chars": (2, 3)}),
        ({"filters.languages": ["de", "en"]}, {"f": [0]}, {"languages": (4, 6)}),
        ({"filters.max_word_share": 0.5}, {k: ALL[k] for k in "adf"}, {"max_word_share": (1, 1)}),
        ({"filters.max_run": 3}, {**ALL, "d": [0]}, {"max_run": (0, 1)}),
        ({"captions": {"caption": 1.0}}, {"f": [0]}, {}),
    ],
)
def test_filters_of_samples_and_texts(
    tmp_path: Path, settings: dict[str, Any], keys: dict[str, list[int]], counts: dict[str, Any]
) -> None:
    curation = config(tmp_path, ["dog", "cat", "one TWO"])
    for name, value in settings.items():
        section, _, field = name.rpartition(".")
        setattr(getattr(curation, section) if section else curation, field, value)
    curated = curate(pool(tmp_path / "pool", [ROWS[:3], ROWS[3:]]), curation)
    assert kept(curated) == keys
    assert {name: dropped(curated)[name] for name in counts} == counts
    if not settings:
        assert dropped(curated) == {"no caption": (1, 0), "no entry matches": (1, 1)}
        assert [step.keys for step in curated.report.steps] == [["e"], ["c"], []]


def test_scores_of_samples_and_of_texts(tmp_path: Path) -> None:
    source = pool(tmp_path / "pool", [ROWS[:3], ROWS[3:]])
    text_scores = [[[0.9, 0.1], [0.2], [0.9]], [[0.1, 0.3], [], [0.8]]]
    write_sidecar(
        source,
        "agreement",
        lambda shard: {
            "score": np.array([s for row in text_scores[shard] for s in row], np.float32),
            "ends": np.cumsum([len(row) for row in text_scores[shard]]),
        },
        {},
    )
    filters = {"scores": "agreement", "min_score": 0.3}
    curated = curate(source, config(tmp_path, ["dog", "cat", "two"], filters=filters))
    assert kept(curated) == {"a": [0], "d": [1], "f": [0]} and dropped(curated)["scores"] == (1, 3)
    sample_scores = [{"members": [0, 1], "score": [0.5, 0.1]}, {"members": [2], "score": [0.5]}]
    write_sidecar(
        source,
        "similarity",
        lambda shard: {
            "members": np.array(sample_scores[shard]["members"], np.int32),
            "score": np.array(sample_scores[shard]["score"], np.float32),
        },
        {},
    )
    filters["scores"] = "similarity"
    curated = curate(source, config(tmp_path, ["dog", "cat", "two"], filters=filters))
    assert kept(curated) == {"a": [0, 1], "f": [0]}
    with pytest.raises(ConfigError, match=r"filters\.scores=other"):
        curate(source, config(tmp_path, ["dog"], filters={"scores": "other"}))


def test_caps_of_equal_texts_and_of_a_field(tmp_path: Path) -> None:
    rows = [
        {"key": str(k), "captions": ["Buy  dog NOW", f"dog {k}"], "user": "u"} for k in range(9)
    ]
    rows += [{"key": "x", "caption": "buy dog now", "user": "v"}]
    source = pool(tmp_path / "pool", [rows[:4], rows[4:]])
    curated = curate(source, config(tmp_path, ["dog"], filters={"same_text": 3}))
    with_copy = [key for key, texts in kept(curated).items() if 0 in texts]
    assert len(with_copy) == 3 and sum(map(len, kept(curated).values())) == 9 + 3
    assert dropped(curated) == {"same_text": (int("x" not in with_copy), 7)}
    capped = {"per_field": "user", "per_value": 2}
    for seed in (0, 1, 2):
        settings = config(tmp_path, ["dog"], filters=capped, seed=seed)
        expected = kept(curate(source, settings))
        assert len(expected) == 3 and "x" in expected and expected["x"] == [0]
        # The draw depends neither on the folder of the shards nor on the pattern that names them.
        copy = tmp_path / f"other{seed}"
        shutil.copytree(tmp_path / "pool", copy)
        for pattern in (copy, copy / "*.tar"):
            assert kept(curate(open_source("x", str(pattern), "image"), settings)) == expected
    most = [{**row, "user": None} for row in rows[:-1]]  # samples without a user are not capped
    anonymous = pool(tmp_path / "anonymous", [[*most, rows[-1]]])
    assert len(kept(curate(anonymous, config(tmp_path, ["dog"], filters=capped)))) == len(rows)
    with pytest.raises(ConfigError, match="per_field=usr: no sample has this field in its JSON"):
        wrong = {"per_field": "usr", "per_value": 2}
        curate(source, config(tmp_path, ["dog"], filters=wrong))


def test_without_metadata_only_filters_drop_texts(tmp_path: Path) -> None:
    shards = photos_with_words(300, 80)
    source = pool(tmp_path / "pool", shards)
    settings = CurationConfig("none", t=1, filters=FilterConfig(min_words=3))
    expected = {
        row["key"]: [number for number, text in enumerate(row["captions"]) if text.count(" ") > 1]
        for rows in shards
        for row in rows
    }
    assert kept(curate(source, settings)) == {k: texts for k, texts in expected.items() if texts}


def test_equal_keys_in_different_shards_are_drawn_independently(tmp_path: Path) -> None:
    shards = [[{"key": f"{k:03d}", "caption": "dog"} for k in range(20)] for _ in range(50)]
    source = pool(tmp_path / "pool", shards)
    settings = [config(tmp_path, ["dog"], t=50, seed=seed) for seed in (0, 1, 2)]
    drawn = [len(curate(source, each).source) for each in settings]
    assert all(25 < count < 80 for count in drawn)


def test_one_text_per_sample_is_drawn_by_weight(tmp_path: Path) -> None:
    rows = [
        {"key": f"{k:03d}", "real": "dog", "made": ["cat", "nothing"], "user": k}
        for k in range(400)
    ]
    source = pool(tmp_path / "pool", [rows])
    settings = {"texts": "one", "captions": {"real": 1, "made": 3}}
    curated = curate(source, config(tmp_path, ["dog", "cat"], **settings))
    numbers = Counter(texts[0] for texts in kept(curated).values())
    assert all(len(texts) == 1 for texts in kept(curated).values()) and set(numbers) == {0, 1}
    for number, p in ((0, 0.25), (1, 0.375)):  # the two texts of `made` share its weight of 3/4
        assert abs(numbers[number] - 400 * p) < 4 * np.sqrt(400 * p * (1 - p))
    samples, texts = dropped(curated)["no entry matches"]
    assert samples == texts == 400 - numbers.total()
    assert dropped(curated)["one text per sample"] == (0, 800)


def first_letter(text: str) -> str:
    """Guess the language of a text by its first letter."""
    return {"d": "en", "H": "de"}.get(text[0], "")


def test_languages(tmp_path: Path) -> None:
    rows = [
        {"key": "a", "captions": [{"text": "dog Hund", "language": "en"}, "dog"]},
        {"key": "b", "caption": "Hund dog", "language": "de"},
        {"key": "c", "caption": "dog", "language": "fr"},
        {"key": "d", "caption": "dog", "lang": "en", "tongue": "de"},
    ]
    source, entries = pool(tmp_path / "pool", [rows]), {"en": ["dog", "cat"], "de": ["Hund"]}
    curated = curate(source, config(tmp_path, entries))
    assert kept(curated) == {"a": [0], "b": [0], "d": [0]}
    assert curated.report.unknown_languages == {"": 1, "fr": 1}
    assert dropped(curated) == {"no metadata": (1, 2)}
    rows = curated.report.languages
    assert [(row.language, row.before, row.after) for row in rows] == [("en", 2, 2), ("de", 1, 1)]
    curated = curate(source, config(tmp_path, entries, fallback="en"))
    assert kept(curated) == {"a": [0, 1], "b": [0], "c": [0], "d": [0]}
    assert curated.report.unknown_languages == {"": 1, "fr": 1} and not dropped(curated)
    curated = curate(source, config(tmp_path, entries, language="tongue", fallback="en"))
    assert kept(curated) == {"a": [0, 1], "b": [0], "c": [0]}
    curated = curate(source, config(tmp_path, entries, language=f"{__name__}:first_letter"))
    assert kept(curated) == {"a": [0, 1], "b": [0], "c": [0], "d": [0]}
    settings = {"language": f"{__name__}:first_letter", "filters": {"languages": ["de", "fr"]}}
    assert kept(curate(source, config(tmp_path, entries, **settings))) == {"b": [0]}
    curated = curate(source, config(tmp_path, entries, t=1, reference="en", fallback="en"))
    assert [row.t for row in curated.report.languages] == [1.0, 1.0]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"reference": "fr"}, "reference=fr: the metadata do not have this language; .* en, de"),
        ({"fallback": "fr"}, "fallback=fr"),
        ({"language": "no.module:find"}, "language=no.module:find cannot be imported"),
        ({"t": 0}, "t=0"),
        ({"filters": {"min_words": 9, "max_words": 2}}, r"filters\.min_words=9 is above"),
        ({"filters": {"per_value": 2}}, r"filters\.per_field and filters\.per_value must be set"),
        ({"dedup": {"distance": 4}}, r"dedup\.distance=4"),
        ({"dedup": {"embeddings": "e"}}, r"dedup\.embeddings=e: .* has no embeddings"),
        ({"metadata": ""}, "metadata is missing"),
    ],
)
def test_errors_in_settings(tmp_path: Path, settings: dict[str, Any], message: str) -> None:
    source = pool(tmp_path / "pool", [ROWS])
    with pytest.raises(ConfigError, match=message) as error:
        curate(source, config(tmp_path, {"en": ["dog"], "de": ["Hund", "cat"]}, **settings))
    assert "\n" not in str(error.value)


def test_an_empty_result_names_the_steps_that_dropped_samples(tmp_path: Path) -> None:
    source = pool(tmp_path / "pool", [ROWS[:3], ROWS[3:]])
    settings = config(tmp_path, ["two"], filters={"max_words": 2}, dedup={"exact": True})
    with pytest.raises(
        DataError, match=r"of 6.* dropped: no caption 1, max_words 1, no entry matches 4"
    ):
        curate(source, settings)


# new shards -----------------------------------------------------------------------------------


def test_new_shards_contain_the_kept_samples(tmp_path: Path) -> None:
    source = pool(tmp_path / "pool", [ROWS[:2], ROWS[2:3], ROWS[3:]])
    curated = curate(source, config(tmp_path, ["one", "cat"]))
    out = tmp_path / "out"
    assert write_shards(curated, out) == 4
    assert sorted(path.name for path in out.iterdir()) == [
        "00000.tar",
        "00002.tar",
        "curation.json",
    ]
    written = open_source("new", str(out), "image")
    assert [written.index(s).key(m) for s, m in written.places()] == list("abdf")
    for shard, member in written.places():
        files = written.read(shard, member)
        record = json.loads(files["json"])
        row = next(row for row in ROWS if row["key"] == written.index(shard).key(member))
        numbers = kept(curated)[row["key"]]
        assert record.pop("curation")["numbers"] == numbers
        assert record == {k: v for k, v in row.items() if k not in ("key", "media")}
        assert files["jpg"] == row.get("media", b"no picture " + row["key"].encode())
        texts = captions_of({"json": json.dumps(record).encode()})
        assert captions_of(files) == [texts[number] for number in numbers]
    before = (out / "00000.tar").read_bytes()
    (out / "00000.tar").unlink()
    assert write_shards(curated, out) == 4 and (out / "00000.tar").read_bytes() == before
    with tarfile.open(fileobj=io.BytesIO(before)) as archive:
        assert archive.getnames() == ["a.jpg", "a.json", "b.jpg", "b.json"]
    other = curate(source, config(tmp_path, ["one"]))
    with pytest.raises(ConfigError, match="contains another curation"):
        write_shards(other, out)


def test_a_folder_that_another_process_writes_is_refused(tmp_path: Path) -> None:
    curated = curate(pool(tmp_path / "pool", [ROWS[:2]]), config(tmp_path, ["one", "cat"]))
    out = tmp_path / "out"
    code = (
        "import sys; from pathlib import Path; from xray.files import sole_writer\n"
        "with sole_writer(Path(sys.argv[1]), '--out'): print(1, flush=True); input()"
    )
    command = [sys.executable, "-c", code, str(out)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout is not None and other.stdout.readline() == b"1\n"
        (out / ".packing.half").touch()  # as of the other process
        with pytest.raises(ConfigError, match=rf"\(process {other.pid} on .*choose another --out"):
            write_shards(curated, out)
        assert (out / ".packing.half").exists() and not list(out.glob("*.tar"))
        other.kill()
    assert write_shards(curated, out) == 2  # the lock of a killed process is free
    assert not (out / "lock").exists()


# ray ------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_ray_gives_the_same_result(tmp_path: Path) -> None:
    pytest.importorskip("ray", reason="needs Ray: pip install ray")
    shards = photos_with_words(60, 20)
    settings = {"t": 10, "dedup": {"exact": True}}
    local = curate(pool(tmp_path / "local", shards), config(tmp_path, ENTRIES, **settings))
    source = pool(tmp_path / "ray", shards)
    by_ray = curate(source, config(tmp_path, ENTRIES, engine="ray", **settings))
    assert kept(by_ray) == kept(local) and by_ray.kept.digest == local.kept.digest
    assert by_ray.report.steps == local.report.steps
