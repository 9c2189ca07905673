"""DataComp's lists of uids as a source's keep-list, against a loop over the samples."""

from __future__ import annotations

import json
import logging
import pickle
import re
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from shards import jpeg, write_tar

from data_pipelines.checks.clean import find_derived
from data_pipelines.curation.tables import kept_sources
from data_pipelines.curation.uids import UID, UidMatcher, keep_uids
from data_pipelines.shards.source import Source, open_source
from data_pipelines.stream.sampling import SamplePlan
from xray.config import DataConfig, SourceConfig
from xray.errors import ConfigError

SHARDS, EACH = 3, 8
NO_UID = {5: {}, 11: {"uid": "123"}, 12: {"uid": 7}, 20: {"uid": "g" * 32}}


def uid_of(number: int) -> str:
    """Return a uid; neighbours share their first half, so that the second half orders them."""
    return f"{(number // 2 + 2**63) * 0x9E3779B97F4A7C15 % 2**64:016x}{2**64 - 1 - number:016x}"


@pytest.fixture(scope="module")
def pool(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pool")
    for shard in range(SHARDS):
        files: dict[str, bytes] = {}
        for number in range(shard * EACH, (shard + 1) * EACH):
            facts = NO_UID.get(number, {"uid": uid_of(number)})
            files[f"{number:04d}.jpg"] = jpeg()
            files[f"{number:04d}.json"] = b"{" if number == 21 else json.dumps(facts).encode()
        write_tar(folder / f"{shard}.tar", files)
    return folder


def saved(path: Path, uids: list[str]) -> Path:
    halves = [(int(uid[:16], 16), int(uid[16:], 16)) for uid in uids]
    np.save(path, np.sort(np.array(halves, UID)))
    return path


def keys(source: Source) -> Counter[str]:
    return Counter(source.index(shard).key(member) for shard, member in source.places())


def test_a_list_keeps_its_samples(
    pool: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    listed = [0, 1, 4, 5, 7, 9, 9, 9, 11, 14, 900, 901]  # 5 and 11 have no uid; 9 three times
    path = saved(tmp_path / "mine.npy", [uid_of(number) for number in listed])
    data = DataConfig(root=str(tmp_path), workers=1)
    data.sources = {"photos": SourceConfig(keep=path.name), "all": SourceConfig()}
    sources = {name: open_source(name, str(pool), "image") for name in data.sources}
    with caplog.at_level(logging.INFO):
        kept = kept_sources(sources, data)
    assert kept["all"] is sources["all"]
    found = kept["photos"]
    expected = Counter(f"{n:04d}" for n in listed if n < 900 and n not in NO_UID)
    assert keys(found) == expected and len(found) == 8
    assert found.counts.tolist() == [4, 4, 0]
    plan = SamplePlan(found, 2, 2, seed=0)
    places = zip(*plan.locate(np.arange(len(found))), strict=True)
    drawn = [found.index(s).key(found.member(s, slot)) for s, slot in places]
    assert Counter(drawn) == expected  # an epoch of training
    repeated = [found.sample(1, int(m), 32, 1, s).copy for s, m in enumerate(found.members(1))]
    assert sorted(repeated) == [0, 0, 1, 2]
    assert (
        f"photos.keep={path.name}: 6 of 24 samples are kept, 8 times in all; 4 of 10 uids of the "
        "list are not in the shards; 5 samples without a uid in the json" in caplog.text
    )
    assert found.digest != sources["photos"].digest
    work = UidMatcher(sources["photos"], path)
    table, again = work(1), pickle.loads(pickle.dumps(work))(1)  # as a worker process has it
    assert all(np.array_equal(table[name], again[name]) for name in table)


def test_the_places_are_found_once(
    pool: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = saved(tmp_path / "once.npy", [uid_of(3), uid_of(16)])
    source = open_source("once", str(pool), "image")
    first = keep_uids(source, str(path))
    assert {item.kind.name for item in find_derived(pool).derived} >= {"uids"}
    monkeypatch.setattr(Source, "read", lambda *given: pytest.fail("a sample was read again"))
    again = keep_uids(open_source("once", str(pool), "image"), str(path))
    assert keys(again) == keys(first) == {"0003": 1, "0016": 1} and again.digest == first.digest
    monkeypatch.undo()
    saved(path, [uid_of(3)])
    assert keys(keep_uids(source, str(path))) == {"0003": 1}  # the file changed


def test_lists_that_cannot_be_used_are_one_line(pool: Path, tmp_path: Path) -> None:
    ran = tmp_path / "ran"

    class Hostile:
        def __reduce__(self) -> tuple[object, tuple[Path]]:
            return Path.touch, (ran,)

    np.save(tmp_path / "pickle.npy", np.array([Hostile()], object), allow_pickle=True)
    np.save(tmp_path / "ints.npy", np.arange(4))
    np.save(tmp_path / "square.npy", np.zeros((2, 2), UID))
    np.save(tmp_path / "falls.npy", np.array([(1, 2), (1, 1)], UID))
    np.save(tmp_path / "empty.npy", np.zeros(0, UID))
    np.savez(tmp_path / "archive.npz", np.zeros(2, UID))
    (tmp_path / "archive.npz").rename(tmp_path / "archive.npy")
    (tmp_path / "text.npy").write_text("uids\n")
    header = (tmp_path / "ints.npy").read_bytes().replace(b"{'descr'", b"('descr'")
    (tmp_path / "header.npy").write_bytes(header)
    (tmp_path / "cut.npy").write_bytes((tmp_path / "archive.npy").read_bytes()[:50])
    saved(tmp_path / "others.npy", [uid_of(900)])
    source = open_source("photos", str(pool), "image")
    for name, says in {
        "gone": "cannot be read: No such file",
        "pickle": "no .npy file with uids",
        "text": "no .npy file with uids",
        "header": "no .npy file with uids",
        "cut": "no .npy file with uids",
        "empty": "is empty: it has no uids",
        "archive": "is no .npy file",
        "ints": r"holds int64 \[4\]: it must be a list of uids of dtype u8,u8",
        "square": r"\[2, 2\]: it must be a list",
        "falls": "not in ascending order",
        "others": "0 of 24 samples are kept; 1 of 1 uid of the list",
    }.items():
        with pytest.raises(ConfigError) as raised:
            keep_uids(source, f"{name}.npy", str(tmp_path))
        text = str(raised.value)
        assert text.startswith(f"data.sources.photos.keep={name}.npy") and "\n" not in text
        assert re.search(says, text), text
    assert not ran.exists()
