"""Labels of samples, with and without a teacher, and tag balance."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from shards import jpeg, write_tar
from tagged import with_tags

from data_pipelines.shards.sidecar import open_sidecar, pack_rows, write_sidecar
from data_pipelines.shards.source import open_source
from data_pipelines.tags.balance import Replication, replication, slots_of, uniform
from data_pipelines.tags.labels import TEACHER_COLUMNS, Labeller, TeacherRules, balanced, label
from data_pipelines.tags.reader import TagRules
from data_pipelines.tags.vocabulary import TagCounts, Vocabulary, build_vocabulary, count_tags
from xray.errors import DataError


def zipf_rows(samples: int, tags: int, seed: int) -> list[np.ndarray]:
    """Draw one to three Zipf-distributed tags per sample."""
    rng = np.random.default_rng(seed)
    p = 1 / np.arange(1, tags + 1)
    return [np.unique(rng.choice(tags, rng.integers(1, 4), p=p / p.sum())) for _ in range(samples)]


def slope(counts: np.ndarray) -> float:
    """Fit the slope of log(count) over log(rank)."""
    used = counts > 0
    ranks = np.arange(1, len(counts) + 1)
    return float(np.polyfit(np.log(ranks)[used], np.log(counts[used]), 1)[0])


def test_square_root_balance_halves_the_slope() -> None:
    """A tag with frequency f occurs max(f, sqrt(T f)) times in an epoch."""
    tags = 200
    rng = np.random.default_rng(0)
    p = 1 / np.arange(1, tags + 1)
    drawn = rng.choice(tags, 60_000, p=p / p.sum())
    rows = [np.array([tag]) for tag in drawn]
    ids, ends = pack_rows(rows, np.int32)
    counts = np.bincount(ids, minlength=tags)
    square_root, threshold = replication(counts, counts, "sqrt", length=60.0)
    assert threshold > counts.max()  # the epoch is so long that every tag is repeated
    u = rng.random(len(rows))
    copies = square_root.copies(ids, ends, u)
    assert copies.sum() == pytest.approx(60 * len(rows), rel=0.01)
    balanced_counts = np.bincount(ids, weights=copies, minlength=tags)
    assert slope(counts) == pytest.approx(-1, abs=0.05)
    assert slope(balanced_counts) == pytest.approx(slope(counts) / 2, abs=0.02)
    even, _ = replication(counts, counts, "uniform", length=60.0)
    assert abs(slope(np.bincount(ids, weights=even.copies(ids, ends, u), minlength=tags))) < 0.02


def test_copies_of_a_small_example() -> None:
    factors = Replication(np.array([1.0, 2.5, 4.0]))
    ids, ends = pack_rows([np.array(row) for row in ([0], [0, 1], [], [1, 2])], np.int32)
    u = np.array([0.9, 0.6, 0.9, 0.4])
    assert factors.copies(ids, ends, u).tolist() == [1, 3, 0, 4]
    labels = [factors.kept(np.array([1, 2]), 0.4, copy).tolist() for copy in range(4)]
    assert labels == [[True, True], [True, True], [False, True], [False, True]]
    members, copies = slots_of([1, 3, 0, 2])
    assert members.tolist() == [0, 1, 1, 1, 3, 3] and copies.tolist() == [0, 0, 1, 2, 0, 1]


@pytest.mark.parametrize("length", [1.0, 1.3, 2.0])
def test_an_epoch_has_the_configured_length(tmp_path: Path, length: float) -> None:
    rows = [[f"t{tag}" for tag in row] for row in zipf_rows(400, 30, seed=1)]
    source = with_tags(tmp_path / "s", rows, each=100)
    rules = TagRules(min_count=1)
    vocabulary, _ = build_vocabulary(count_tags(source, "hashtags", rules), rules, "s")
    labels = label(Labeller(source, "hashtags", rules, vocabulary))
    result = balanced(source, labels, len(vocabulary), "sqrt", length, seed=3)
    assert result.unique == 400
    assert result.slots == pytest.approx(400 * length, rel=0.05)
    assert result.counts.tolist() == list(vocabulary.counts)
    # Every sample has a slot. Its first copy has all its tags, later copies only the rarer ones.
    label_counts: Counter[int] = Counter()
    whole: Counter[int] = Counter()
    for shard in range(4):
        members, copies = result.source.slots.of(shard)
        assert set(members.tolist()) == set(range(100))
        for member, copy in zip(members.tolist(), copies.tolist(), strict=True):
            ids, weights = result.labels_of(shard, member, copy, strip=True)
            assert len(ids) and (weights == 1).all()
            all_ids = [int(i) for i in result.labels_of(shard, member, copy, strip=False)[0]]
            u = uniform(3, source.identity(shard, member))
            r = result.replication.factors
            assert ids.tolist() == [i for i in all_ids if copy == 0 or int(r[i] + u) > copy]
            label_counts.update(ids.tolist())
            whole.update(all_ids)
    seen = np.array([whole[tag] for tag in range(len(vocabulary))])
    assert np.allclose(result.frequency(False), (seen + 0.5) / (result.slots + 1))
    if length > 1:
        ratio = label_counts[0] / label_counts[len(vocabulary) - 1]
        assert ratio < result.counts[0] / result.counts[-1]


def test_slots_are_reproducible_and_depend_on_the_seed(tmp_path: Path) -> None:
    rows = [[f"t{tag}" for tag in row] for row in zipf_rows(60, 10, seed=1)]
    source, rules = with_tags(tmp_path / "s", rows, each=20), TagRules(min_count=1)
    vocabulary, _ = build_vocabulary(count_tags(source, "hashtags", rules), rules, "s")
    labels = label(Labeller(source, "hashtags", rules, vocabulary))
    digests = {}
    for seed in (0, 1, 0):
        digest = balanced(source, labels, len(vocabulary), "sqrt", 1.5, seed).source.digest
        assert digests.setdefault(seed, digest) == digest
    assert len({*digests.values(), source.digest}) == 3
    again = label(Labeller(source, "hashtags", rules, vocabulary), workers=2)
    assert again.digest == labels.digest
    # Labels are made again if a tar changes.
    write_tar(tmp_path / "s" / "000.tar", {"x.jpg": jpeg(), "x.json": b'{"hashtags": ["t0"]}'})
    changed = open_source("photos", str(tmp_path / "s"), "image")
    assert open_sidecar(changed, labels.name) is None
    assert label(Labeller(changed, "hashtags", rules, vocabulary)).digest != labels.digest


def test_an_interrupted_sidecar_is_continued(tmp_path: Path) -> None:
    source = with_tags(tmp_path / "s", [["a"]] * 12)
    done: list[int] = []

    def work(shard: int) -> dict[str, np.ndarray]:
        if len(done) == 2:
            raise KeyboardInterrupt
        done.append(shard)
        return {"members": np.arange(4, dtype=np.int32) + shard}

    with pytest.raises(KeyboardInterrupt):
        write_sidecar(source, "x", work, {})
    assert open_sidecar(source, "x") is None and done == [0, 1]
    done.clear()
    written = write_sidecar(source, "x", work, {"setting": 1})
    assert done == [2] and written.counts.tolist() == [4, 4, 4] and written.facts["setting"] == 1
    opened = open_sidecar(source, "x")
    assert opened is not None and opened.digest == written.digest
    assert opened.table(1)["members"].tolist() == [1, 2, 3, 4]


def test_a_teacher_adds_and_drops_tags(tmp_path: Path) -> None:
    source = with_tags(tmp_path / "s", [["a", "b"], [], ["a"], []])
    vocabulary = Vocabulary(("a", "b", "c"), (2, 1, 1))
    prior = np.array([0.3, 0.5, 0.3], np.float32)
    rows = [
        ([0, 1, 2], [0.6, 0.1, 0.3], [1, 0, 1]),
        ([1, 2], [0.7, 0.2], [1, 1]),
        ([0, 2], [0.1, 0.8], [0, 1]),
        ([], [], []),
    ]

    def teach(shard: int) -> dict[str, np.ndarray]:
        kinds = (np.int32, np.float32, np.uint8)
        packed = [
            pack_rows([np.array(row[i]) for row in rows], kind) for i, kind in enumerate(kinds)
        ]
        columns = {n: values for n, (values, _) in zip(TEACHER_COLUMNS, packed, strict=True)}
        return {**columns, "ends": packed[0][1]}

    written = write_sidecar(source, "teacher", teach, {})
    teacher = replace(written, totals={**written.totals, "prior": prior})

    def labels(min_lift: float, pseudo_weight: float) -> list[tuple[list[int], list[float]]]:
        use = TeacherRules(min_lift, pseudo_weight)
        made = label(Labeller(source, "hashtags", TagRules(), vocabulary, teacher, use))
        return [
            (
                made.row(0, m, "ids").tolist(),
                made.row(0, m, "weights").astype(float).round(3).tolist(),
            )
            for m in range(4)
        ]

    plain = [([0, 1], [1, 1]), ([], []), ([0], [1]), ([], [])]
    assert labels(0, 0) == plain
    assert labels(1.0, 0) == [([0], [1]), ([], []), ([], []), ([], [])]
    assert labels(0, 0.5) == [plain[0], ([1, 2], [0.35, 0.1]), plain[2], plain[3]]
    assert labels(1.0, 0.5)[2] == ([2], [0.4])  # its tag was dropped, so the teacher adds others


def test_a_source_without_labels_is_an_error(tmp_path: Path) -> None:
    source = with_tags(tmp_path / "s", [["a"], []])
    labels = label(Labeller(source, "hashtags", TagRules(), Vocabulary(("z",), (1,))))
    with pytest.raises(DataError, match="'photos' has no sample with a tag of the vocabulary"):
        balanced(source, labels, 1, "sqrt", 1.5, seed=0)


def test_counts_of_shards_are_added() -> None:
    one, two = TagCounts(), TagCounts()
    one.add(["dog", "dogs"])
    two.add(["dogs"])
    one.join(two)
    assert one.tags == {"dog": 1, "dogs": 2} and one.both == {("dogs", "dog"): 1}
