"""Samples held out for validation: near-duplicates are on one side of the cut."""

from __future__ import annotations

import io
import json
import os
from collections import Counter
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from in_process import invoke
from PIL import Image

from data_pipelines.decode.near_duplicates import dhash_of, near_duplicates
from data_pipelines.ingest.held_out import Stratum, Traits, hold_out, quotas
from data_pipelines.ingest.pack import PackConfig, pack
from data_pipelines.ingest.recode import pack_clip
from data_pipelines.shards.tar_index import index_shard
from xray.errors import BadSample, ConfigError


def scene(seed: int) -> Image.Image:
    """Make a picture of smooth random colours, unlike the others."""
    grid = np.random.default_rng(seed).integers(0, 255, (7, 9, 3), np.uint8)
    return Image.fromarray(grid).resize((180, 140), Image.Resampling.BICUBIC)


def jpeg(image: Image.Image, quality: int = 90) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=quality)
    return buffer.getvalue()


def variants(image: Image.Image) -> list[bytes]:
    """Return copies of a picture: of other quality, smaller, and with a pixel less on each side."""
    width, height = image.size
    return [
        jpeg(image, 45),
        jpeg(image.resize((width // 2, height // 2))),
        jpeg(image.crop((1, 1, width - 1, height - 1))),
    ]


def held_names(out: Path) -> set[str]:
    return set(names_of(out / "val"))


def names_of(folder: Path) -> list[str]:
    found = []
    for tar in sorted(folder.glob("*.tar")):
        index = index_shard(tar)
        metas = (json.loads(index.read(n, ("json",))["json"]) for n in range(len(index)))
        found += [str(meta["original_name"]) for meta in metas]
    return found


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """60 pictures; every third has a near-duplicate, every twelfth a copy of equal bytes."""
    root = tmp_path_factory.mktemp("photos")
    for number in range(60):
        image = scene(number)
        (root / f"DSC {number:02d}.jpg").write_bytes(jpeg(image))
        (root / f"DSC {number:02d}.txt").write_text(f"picture {number}")
        if number % 3 == 0:
            (root / f"near {number:02d}.jpg").write_bytes(variants(image)[number // 3 % 3])
        if number % 12 == 0:
            (root / f"same {number:02d}.jpg").write_bytes(jpeg(image))
    (root / "broken.jpg").write_bytes(jpeg(scene(0))[:200])
    return root


def groups_by_brute_force(traits: list[Traits], distance: int) -> list[set[int]]:
    """Join samples while any pair of two groups is similar; written without numpy."""
    groups = [{number} for number in range(len(traits))]

    def near(a: Traits, b: Traits) -> bool:
        bits = bin((a.dhash ^ b.dhash) % 2**64).count("1")
        return a.exact == b.exact or (a.dhash != 0 != b.dhash and bits <= distance)

    while True:
        for i, one in enumerate(groups):
            other = next(
                (
                    g
                    for g in groups[i + 1 :]
                    if any(near(traits[a], traits[b]) for a in one for b in g)
                ),
                None,
            )
            if other is not None:
                groups.remove(other)
                one |= other
                break
        else:
            return groups


def random_traits(number: int, seed: int) -> list[Traits]:
    """Make samples in chains of similar ones, some of equal bytes, some without a dHash."""
    rng = np.random.default_rng(seed)
    made: list[Traits] = []
    for _ in range(number):
        exact, dhash = (int(v) for v in rng.integers(-(2**63), 2**63, 2))
        draw = rng.random()
        if made and draw < 0.4:  # a few bits from an earlier one
            dhash = made[rng.integers(len(made))].dhash
            for bit in rng.integers(0, 63, rng.integers(1, 5)):
                dhash ^= 1 << int(bit)
        elif made and draw < 0.5:
            exact = made[rng.integers(len(made))].exact
        elif draw < 0.6:
            dhash = 0
        made.append(Traits(exact, dhash, Stratum("image", str(rng.integers(3)))))
    return made


@pytest.mark.parametrize("seed", range(4))
def test_groups_equal_those_of_a_loop_over_all_pairs(seed: int) -> None:
    traits = random_traits(90, seed)
    exact, dhashes = (np.array([t[n] for t in traits], np.int64) for n in (0, 1))
    for distance in (0, 3, 6):
        found = near_duplicates(exact, dhashes, distance).tolist()
        own = [{n for n, g in enumerate(found) if g == first} for first in sorted(set(found))]
        expected = groups_by_brute_force(traits, distance)
        assert sorted(map(sorted, own)) == sorted(map(sorted, expected))


@pytest.mark.parametrize("seed", range(4))
def test_no_group_is_cut_and_the_order_does_not_matter(seed: int) -> None:
    traits: list[Traits | None] = [*random_traits(120, seed)]
    traits[5] = traits[70] = None
    cut = hold_out(traits, 0.2)
    assert 15 <= len(cut.held) <= round(0.2 * 118) and not {5, 70} & set(cut.held)
    known = [t for t in traits if t is not None]
    groups = [[known[n] for n in group] for group in groups_by_brute_force(known, 6)]
    held = {traits[n] for n in cut.held}
    assert all(held.isdisjoint(group) or held.issuperset(group) for group in groups)
    several = [group for group in groups if len(group) > 1]
    assert (cut.near_duplicates, cut.groups) == (sum(map(len, several)), len(several))
    order = np.random.default_rng(seed).permutation(len(traits)).tolist()
    again = hold_out([traits[n] for n in order], 0.2)
    assert sorted(order[n] for n in again.held) == list(cut.held)


def test_the_share_is_held_out_of_each_modality_and_class() -> None:
    sizes = {Stratum("image", "cat"): 60, Stratum("image", "dog"): 39, Stratum("image", "owl"): 1}
    wanted = quotas({**sizes, Stratum("video"): 23}, 0.05)
    assert list(wanted.values()) == [3, 2, 0, 2]  # of 100 pictures 5, of 23 clips at least two
    assert quotas({Stratum("image"): 3}, 0.1) == {Stratum("image"): 1}
    assert quotas({Stratum("image"): 1}, 0.5) == {Stratum("image"): 0}


def test_a_share_of_a_folder_is_held_out(photos: Path, tmp_path: Path) -> None:
    report = pack(photos, tmp_path, PackConfig(val=0.2, per_shard=10))
    assert report.skipped == {"undecodable image": 1} and report.cut.groups == 20
    assert report.cut.near_duplicates == 20 + 20 + 5
    assert 14 <= report.held_out <= 17 and report.held_out + report.samples == 85
    trained, held = names_of(tmp_path), names_of(tmp_path / "val")
    assert len(trained) == report.samples and len(held) == report.held_out
    assert set(trained) | set(held) == {p.name for p in photos.glob("*.jpg")} - {"broken.jpg"}

    def scenes(names: list[str]) -> set[str]:
        return {name.split()[1] for name in names}

    assert not scenes(trained) & scenes(held)
    assert sorted(held) == held  # in the order of the folder
    assert all(name.startswith("0000") for name in os.listdir(tmp_path / "val") if "tar" in name)


def test_the_choice_depends_on_the_content_alone(photos: Path, tmp_path: Path) -> None:
    pack(photos, tmp_path / "a", PackConfig(val=0.2))
    pack(photos, tmp_path / "b", PackConfig(val=0.2, workers=1, per_shard=7, short_side=40))
    renamed = tmp_path / "renamed"
    renamed.mkdir()
    new = {}
    for number, path in enumerate(sorted(photos.glob("*.jpg"), reverse=True)):
        new[path.name] = f"{number:03d}.jpg"
        (renamed / new[path.name]).write_bytes(path.read_bytes())
    pack(renamed, tmp_path / "c", PackConfig(val=0.2))
    held = held_names(tmp_path / "a")
    assert held and held_names(tmp_path / "b") == held
    assert held_names(tmp_path / "c") == {new[name] for name in held}


def test_class_folders_are_held_out_by_class(tmp_path: Path) -> None:
    for number in range(60):
        folder = tmp_path / "in" / ("cat" if number % 3 else "dog")
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{number}.jpg").write_bytes(jpeg(scene(number)))
    pack(tmp_path / "in", tmp_path / "out", PackConfig(val=0.2))
    held = Counter(name.split("/")[0] for name in names_of(tmp_path / "out" / "val"))
    assert held == {"cat": 8, "dog": 4}


def test_an_interrupted_packing_continues(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, part = tmp_path / "whole", tmp_path / "part"
    settings = PackConfig(val=0.2, per_shard=10)
    pack(photos, whole, settings)
    pack(photos, part, settings)
    for gone in (part / "00001.tar", part / "val" / "00000.tar"):
        gone.unlink()

    def again(*_: Any) -> int:
        raise AssertionError("the choice is recorded")

    monkeypatch.setattr("data_pipelines.ingest.held_out.traits_of", again)
    report = pack(photos, part, PackConfig(val=0.2, per_shard=10, workers=1))
    assert report.reused == len([*whole.rglob("*.tar")]) - 2
    for tar in whole.rglob("*.tar"):
        assert (part / tar.relative_to(whole)).read_bytes() == tar.read_bytes()


def test_the_record_of_an_older_version_held_nothing_out(photos: Path, tmp_path: Path) -> None:
    pack(photos, tmp_path, PackConfig())
    record = json.loads((tmp_path / "pack.json").read_text())
    assert record["config"].pop("val") == 0 and "held_out" not in record
    (tmp_path / "pack.json").write_text(json.dumps(record))
    assert pack(photos, tmp_path, PackConfig()).reused == 1
    with pytest.raises(ConfigError, match=r"another packing \(val: 0.0 -> 0.1\)"):
        pack(photos, tmp_path, PackConfig(val=0.1))


def test_the_command_says_what_it_held_out(photos: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = invoke("data", "pack", str(photos), str(out), "val=0.2")
    held = len(held_names(out))
    assert f"{out}: {85 - held} samples in 1 shard" in done.stdout
    line = f"{out}/val: {held} samples held out for validation; 45 near-duplicates in 20 groups"
    assert f"{line} stay together" in done.stdout
    assert "captions: 60 of 85 samples have captions" in done.stdout
    for wrong in ("0.6", "-0.1"):
        refused = invoke("data", "pack", str(photos), str(tmp_path / "b"), f"val={wrong}")
        assert refused.exit_code == 2 and "use a share 0 (none) to 0.5" in refused.stderr
    alike = tmp_path / "alike"
    alike.mkdir()
    for quality in range(60, 70):
        (alike / f"{quality}.jpg").write_bytes(jpeg(scene(1), quality))
    none = invoke("data", "pack", str(alike), str(tmp_path / "c"), "val=0.2")
    assert "val: 0 samples held out for validation: there are too few" in none.stdout
    assert not (tmp_path / "c" / "val").exists()


def moving(seed: int) -> bytes:
    """Encode a clip of eight frames, a picture that brightens."""
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as container:
        stream: Any = container.add_stream("libx264", rate=8)
        stream.width, stream.height, stream.pix_fmt = 180, 140, "yuv420p"
        for number in range(8):
            pixels = np.asarray(scene(seed).point(lambda v, n=number: v * (8 + n) // 16))
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, "rgb24")))
        container.mux(stream.encode())
    return buffer.getvalue()


def test_clips_are_compared_by_their_middle_frame(tmp_path: Path) -> None:
    clips = [moving(seed) for seed in range(3)]
    clips += [pack_clip(clips[1], "mp4", 70, 4, 30, tmp_path)[0]]  # half the size
    dhashes = np.array([dhash_of(clip, True) for clip in clips], np.int64)
    assert near_duplicates(np.arange(4), dhashes).tolist() == [0, 1, 2, 1]
    with pytest.raises(BadSample):
        dhash_of(b"no clip", True)
