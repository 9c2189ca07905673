"""Stored sentence vectors: written once per caption, equal to live ones, checked when opened."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from in_process import invoke
from shards import jpeg, without_checksum, write_tar
from tiny import QUICK, train

from data_pipelines.shards.source import Source, open_source
from data_pipelines.text.captions import read_captions
from data_pipelines.text.feature_store import TextStore, open_store, packed, store_facts, unpacked
from xray.artifacts.artifact import open_artifact
from xray.artifacts.language_model import Language
from xray.config import TextConfig
from xray.errors import ConfigError, DataError
from xray.precompute import text_features
from xray.precompute.config import TextFeaturesConfig
from xray.precompute.text_features import write_text_features
from xray.training.metrics import read_metrics

# Captions of two shards with four samples each; "a red circle" occurs three times.
CAPTIONS = [
    [["a red circle", "one round thing"], ["a blue star"], [], ["a red circle", "a star"]],
    [["a dot"], ["a red circle"], ["one green box"], []],
]
UNIQUE = 6


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    """A folder of two shards with four samples each, some without captions."""
    (tmp_path / "shards").mkdir()
    for shard, rows in enumerate(CAPTIONS, start=1):
        files: dict[str, bytes] = {}
        for number, captions in enumerate(rows):
            files[f"{number}.jpg"] = jpeg()
            files[f"{number}.json"] = json.dumps({"captions": captions}).encode()
        write_tar(tmp_path / "shards" / f"{shard}.tar", files)
    return tmp_path / "shards"


def config_of(demo: Path, **more: Any) -> TextFeaturesConfig:
    given = {"llm": str(demo / "llm"), "tune": "none", "workers": 0, **more}
    return TextFeaturesConfig(**given)


def open_stored(source: Source, config: TextFeaturesConfig) -> TextStore:
    identity = Language(config).identity()
    return open_store(source, store_facts(source, identity, config.captions, config.features))  # type: ignore[arg-type]


def stored(source: Source, config: TextFeaturesConfig) -> tuple[TextStore, int]:
    """Write a store, or complete it; return it and its number of captions."""
    language = Language(config)
    facts = store_facts(source, language.identity(), config.captions, config.features)  # type: ignore[arg-type]
    written = write_text_features(source, language, config, torch.device("cpu"))
    return open_store(source, facts), written.facts["captions_stored"]


def assert_live(source: Source, store: TextStore, config: TextFeaturesConfig) -> None:
    """Require that each stored vector equals the tower's output for its caption without others."""
    language = Language(config)
    tower = language.build().eval()
    tolerance = 1e-5 if config.features == "fp32" else 0.03
    for shard, member in source.places():
        files = source.read(shard, member)
        texts = json.loads(files["json"])["captions"]
        for number, text in enumerate(texts):
            with torch.no_grad():
                live = tower(**language.tokenizer([text]))[0]
            kept = store.vectors(shard, member, [number])[0]
            assert np.allclose(kept, live.numpy(), atol=tolerance), text


@pytest.mark.parametrize(
    ("kind", "size", "error"), [("fp32", 4, 0.0), ("bf16", 2, 2**-8), ("int8", 1, 0.501 / 127)]
)
def test_formats_round_to_half_of_their_last_bit(kind: Any, size: int, error: float) -> None:
    vectors = np.random.default_rng(0).normal(size=(50, 64)).astype(np.float32)
    vectors[3] = 0
    kept, scales = packed(vectors, kind)
    back = np.stack([unpacked(kept[i], scales[i : i + 1]) for i in range(len(kept))])
    assert back.dtype == np.float32 and kept.nbytes == vectors.size * size
    largest = np.abs(vectors).max(axis=1, keepdims=True) if kind == "int8" else np.abs(vectors)
    assert (np.abs(back - vectors) <= error * largest).all()
    if kind == "bf16":
        theirs = torch.from_numpy(vectors).bfloat16().float().numpy()
        assert np.array_equal(back, theirs)


def test_each_caption_is_encoded_once_and_read_back(
    demo: Path, shards: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, config = open_source("s", str(shards), "image"), config_of(demo, features="fp32")
    encoded: list[str] = []
    encode = text_features._encoded

    def counted(language: Any, tower: Any, texts: Any, settings: Any) -> Any:
        encoded.extend(texts)
        return encode(language, tower, texts, settings)

    monkeypatch.setattr(text_features, "_encoded", counted)
    store, unique = stored(source, config)
    assert unique == UNIQUE
    assert sorted(encoded) == sorted({c for rows in CAPTIONS for own in rows for c in own})
    assert_live(source, store, config)
    # Nothing is encoded again.
    assert stored(source, config)[0].digest == store.digest and len(encoded) == unique


def test_an_interrupted_store_is_completed(
    demo: Path, shards: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, config = open_source("s", str(shards), "image"), config_of(demo)
    save, saved = text_features.save_table, []

    def once(*args: Any) -> None:
        if saved:
            raise KeyboardInterrupt
        saved.append(save(*args))

    monkeypatch.setattr(text_features, "save_table", once)
    with pytest.raises(KeyboardInterrupt):
        stored(source, config)
    language = Language(config)
    facts = store_facts(source, language.identity(), {}, "bf16")
    with pytest.raises(ConfigError, match="current shards: it has none"):
        open_store(source, facts)
    monkeypatch.setattr(text_features, "save_table", save)
    steps: list[tuple[int, int]] = []
    cpu = torch.device("cpu")
    write_text_features(source, language, config, cpu, lambda *x: steps.append(x))
    assert steps == [(UNIQUE, UNIQUE)]  # the first shard's are not encoded again
    assert_live(source, open_store(source, facts), config)


def test_each_selection_of_shards_has_its_own_store(demo: Path, shards: Path) -> None:
    """Vectors are addressed by the shard's number, which changes with the selection."""
    config = config_of(demo, features="fp32")
    whole = open_source("s", str(shards), "image")
    assert_live(whole, stored(whole, config)[0], config)
    alone = open_source("s", str(shards / "2.tar"), "image")
    assert_live(alone, stored(alone, config)[0], config)
    files = {"9.jpg": jpeg(), "9.json": json.dumps({"captions": ["a dot", "new"]}).encode()}
    write_tar(shards / "0.tar", files)
    grown = open_source("s", str(shards), "image")
    assert_live(grown, stored(grown, config)[0], config)
    assert_live(alone, stored(alone, config)[0], config)


def test_a_bit_that_flipped_in_the_language_model_is_warned_of(
    demo: Path, shards: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Another model is no error, but with settings that agree it may be a damaged one."""
    llm = shutil.copytree(demo / "llm", tmp_path / "llm")
    source, config = open_source("s", str(shards), "image"), config_of(demo, llm=str(llm))
    stored(source, config)
    stored(source, config_of(demo, llm=str(llm), features="fp32"))
    assert "is damaged" not in caplog.text
    weights = llm / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    stored(source, config)
    assert f"those of {llm}" in caplog.text and "it is damaged" in caplog.text


def test_a_store_with_other_settings_is_refused_with_the_difference(
    demo: Path, shards: Path
) -> None:
    source = open_source("s", str(shards), "image")
    stored(source, config_of(demo))

    def asked(**more: Any) -> TextStore:
        text = TextConfig(str(demo / "llm"), "none")
        language = Language(dataclasses.replace(text, **more))
        return open_store(source, store_facts(source, language.identity(), {}, "bf16"))

    assert asked().width == 32
    stored(source, config_of(demo, max_length=16))
    with pytest.raises(ConfigError, match=r"the most similar has prompt: ''"):
        asked(prompt="a ")
    with pytest.raises(ConfigError, match=r"max_length: 64 -> 32.*text.features=live"):
        asked(max_length=32)
    with pytest.raises(ConfigError, match="pooling: 'mean' -> 'last'"):
        asked(pooling="last")
    files = {"9.jpg": jpeg(), "9.txt": b"a new one"}
    write_tar(shards / "3.tar", files)
    grown = open_source("s", str(shards), "image")
    language = Language(TextConfig(str(demo / "llm"), "none"))
    with pytest.raises(ConfigError, match=r"fit this run and its current shards: it has none"):
        open_store(grown, store_facts(grown, language.identity(), {}, "bf16"))


def test_bf16_of_the_model_is_close_recorded_and_asked_for(demo: Path, shards: Path) -> None:
    """Vectors lose at most 0.05 of about 1. A run finds them only with the same text.precision."""
    source = open_source("s", str(shards), "image")
    kept = []
    for precision in ("bf16", "fp32"):
        config = config_of(demo, features="fp32", precision=precision)
        if precision == "fp32":  # not there yet, but for the other precision
            with pytest.raises(ConfigError, match="precision: 'bf16' -> 'fp32'"):
                open_stored(source, config)
        store, _ = stored(source, config)
        assert store.sidecar.facts.get("precision", "fp32") == precision
        kept.append(np.concatenate([store.sidecar.table(shard)["vectors"] for shard in (0, 1)]))
    assert 0 < np.abs(kept[0] - kept[1]).max() < 0.05
    identity = Language(config_of(demo)).identity()
    assert "precision" not in identity  # stores of earlier versions are fp32
    with pytest.raises(ConfigError, match=r"text\.precision=bf16 is for stored vectors"):
        TextConfig(tune="none", precision="bf16").validate()


def damage(path: Path, start: int, bad: bytes) -> None:
    content = path.read_bytes()
    path.write_bytes(content[:start] + bad + content[start + len(bad) :])


def test_a_damaged_store_is_named_and_can_be_rewritten(demo: Path, shards: Path) -> None:
    source, config = open_source("s", str(shards), "image"), config_of(demo, features="fp32")
    store, _ = stored(source, config)
    expected, digest = store.vectors(1, 1, [0]), store.digest
    name = store.sidecar.name
    table, summary = source.derived(name, 0), source.derived(name)
    whole = table.read_bytes()

    table.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match=r"1.tar.text-features-\w+ is missing, damaged or"):
        open_stored(source, config).vectors(1, 1, [0])  # "a red circle" is in this table
    assert stored(source, config)[0].digest == digest and table.read_bytes() == whole

    last = 4 * 32 * 4  # size of the shard's four vectors in bytes
    damage(table, len(whole) - last, b"\xff" * last)  # nan
    with pytest.raises(DataError, match=r"1.tar.text-features-\w+ is missing, damaged or"):
        open_stored(source, config).vectors(1, 1, [0])
    assert stored(source, config)[0].digest == digest and table.read_bytes() == whole

    without_checksum(table)
    damage(table, table.stat().st_size - last, b"\xff" * last)
    with pytest.raises(DataError, match=r"1.tar.text-features-\w+ is damaged: delete it, and run"):
        for member, captions in enumerate(CAPTIONS[0]):
            open_stored(source, config).vectors(0, member, range(len(captions)))
    table.unlink()
    assert np.array_equal(stored(source, config)[0].vectors(1, 1, [0]), expected)

    summary.unlink()
    with pytest.raises(ConfigError, match=r"text-features-\w+ is missing; write them"):
        open_stored(source, config)
    assert stored(source, config)[0].digest == digest


def test_training_on_stored_vectors_equals_training_on_live_ones(
    demo: Path, trained: Callable[..., Path], tmp_path: Path
) -> None:
    """With fp32 the losses are equal, with bf16 and int8 close. Artifacts keep their text tower."""
    live = open_artifact(trained("clip", *QUICK))
    rows = read_metrics(live.path.parent / "metrics.jsonl")
    folders = [str(demo / name) for name in ("photos", "clips")]
    for kind, tolerance in (("fp32", 1e-5), ("bf16", 1e-2), ("int8", 2e-2)):
        keys = [f"llm={demo / 'llm'}", "max_length=32", f"features={kind}", "workers=0"]
        done = invoke("data", "text-features", *folders, *keys)
        assert done.exit_code == 0 and f"text.features={kind}" in done.output, done.output
        offline = train("clip", demo, tmp_path / kind, *QUICK, f"text.features={kind}")
        others = read_metrics(tmp_path / kind / "metrics.jsonl")
        assert [r["loss"] for r in others] == pytest.approx(
            [r["loss"] for r in rows], rel=tolerance
        )
        assert offline.manifest["files"].keys() == live.manifest["files"].keys()
    with pytest.raises(ConfigError, match="prompt"):
        train("clip", demo, tmp_path / "x", *QUICK, "text.features=bf16", "text.prompt=x")


def test_captions_of_an_image_have_weights_and_numbers() -> None:
    files = {"json": json.dumps({"captions": ["a", "b"], "long": "c"}).encode()}
    captions = read_captions(files, {"captions": 1, "long": 3})
    assert [(c.text, c.weight, c.number) for c in captions] == [
        ("a", 0.5, 0),
        ("b", 0.5, 1),
        ("c", 3, 2),
    ]
