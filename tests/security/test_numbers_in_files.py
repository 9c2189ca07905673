"""Numbers in manifests and headers are bounded before memory is taken for them."""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hostile_files import forge
from in_process import invoke

from data_pipelines.shards.columns import open_columns, pack_texts, save_columns, unpack_texts
from xray.artifacts.artifact import open_artifact
from xray.artifacts.encoders import TextEncoder, restore_decoder, restore_encoder
from xray.errors import ArtifactError, ConfigError, DataError
from xray.search.embedding_file import Names, open_embeddings, write_embeddings

BILLION = 10**9


def forged(artifact: Path, to: Path, key: str, value: Any) -> Path:
    """Copy an artifact with another value in its manifest."""
    shutil.copytree(artifact, to)
    manifest = json.loads((to / "manifest.json").read_text())
    *sections, name = key.split(".")
    part = manifest
    for section in sections:
        part = part[int(section)] if isinstance(part, list) else part[section]
    part[name] = value
    (to / "manifest.json").write_text(json.dumps(manifest))
    return to


@pytest.mark.parametrize(
    ("stage", "key", "value"),
    [
        ("hashtag", "config.model.kwargs.depth", BILLION),
        ("hashtag", "config.model.kwargs.embed_dim", BILLION),
        ("hashtag", "config.model.kwargs.mlp_ratio", 1e300),
        ("hashtag", "config.model.kwargs.qkv_extra", BILLION),
        ("hashtag", "config.model.reduce_at", list(range(20_000))),
        ("hashtag", "config.model.keep_rate_levels", BILLION),
        ("hashtag", "config.data.resolution", [[0.0, 32], [0.5, BILLION]]),
        ("hashtag", "config.data.frames", BILLION),
        ("hashtag", "config.data.blocks.0.samples", 1 << 70),
        ("hashtag", "config.train.micro_batch", 1 << 40),
        ("hashtag", "keep_rate", BILLION),
        ("clip", "config.clip.adapter_blocks", BILLION),
        ("clip", "config.clip.embed_dim", BILLION),
        ("text", "config.text.lora_rank", BILLION),
        ("text", "config.text.max_length", BILLION),
        ("text", "config.text.latents", BILLION),
    ],
)
def test_a_manifests_numbers_have_bounds(
    artifacts: dict[str, Path], tmp_path: Path, stage: str, key: str, value: Any
) -> None:
    path = forged(artifacts[stage], tmp_path / "a", key, value)
    with pytest.raises(ArtifactError, match=rf"manifest\.json: {key}[= ]"):
        open_artifact(path)
    done = invoke("lineage", path)
    assert done.exit_code == 2 and key in done.stderr


@pytest.mark.parametrize(
    ("stage", "key", "value", "message"),
    [
        ("hashtag", "config.model.kwargs.embed_dim", 60_000, r"config\.model in its manifest asks"),
        ("hashtag", "config.data.resolution", 8192, r"config\.data\.resolution in its manifest m"),
        ("hashtag", "config.data.frames", 16_000, r"config\.data\.frames in its manifest makes"),
        ("clip", "config.clip.embed_dim", 65_000, r"config of the joint space in its manifest"),
        ("clip", "config.clip.adapter_blocks", 1000, r"config of the text head in its manifest as"),
        ("mae", "config.mae.decoder_dim", 64_000, r"config of the decoder in its manifest asks"),
        ("lora", "config.text.lora_rank", 60_000, r"config\.text\.lora_rank=60000 in its manifest"),
    ],
)  # fmt: skip
def test_a_manifest_asks_for_no_more_than_is_stored(
    artifacts: dict[str, Path], trained: Callable[..., Path], tmp_path: Path, stage: str, key: str,
    value: Any, message: str,
) -> None:  # fmt: skip
    short = {"mae": ("mae", "train.samples=24"), "lora": ("text", "train.samples=12")}
    own = trained(*short[stage]) if stage in short else artifacts[stage]
    opened = open_artifact(forged(own, tmp_path / "a", key, value))
    with pytest.raises(ArtifactError, match=message):
        encoder: Any = restore_encoder(opened)
        restore_decoder(opened, encoder.vision)


@pytest.mark.parametrize(
    ("key", "value", "error", "message"),
    [
        ("vocab_size", 1 << 23, ArtifactError, r"llm/config\.json in its manifest asks for"),
        ("vocab_size", BILLION, ConfigError, r"config\.json: vocab_size=1000000000 must be at"),
        ("num_hidden_layers", 5000, ConfigError, r"config\.json: num_hidden_layers=5000 must"),
    ],
)
def test_the_sizes_of_a_carried_llm_have_bounds(
    artifacts: dict[str, Path], tmp_path: Path, key: str, value: int, error: type, message: str
) -> None:
    path = tmp_path / "a"
    shutil.copytree(artifacts["text"], path)
    settings = json.loads((path / "llm" / "config.json").read_text())
    settings |= {key: value}
    settings["layer_types"] = ["full_attention"] * min(settings["num_hidden_layers"], 10_000)
    forge(path, "llm/config.json", json.dumps(settings).encode())
    with pytest.raises(error, match=message):
        TextEncoder.after(open_artifact(path))


def test_headers_of_tables_have_bounds(tmp_path: Path) -> None:
    path = tmp_path / "x.index"
    with path.open("wb") as file:  # sparse: a header of 200 MB
        file.write(struct.pack("<Q", 200_000_000))
        file.truncate(200_000_008)
    with pytest.raises(ValueError, match="not a table of columns"):
        open_columns(path)
    path.write_bytes(struct.pack("<Q", 1 << 62) + b"{}")
    with pytest.raises(ValueError, match="not a table of columns"):
        open_columns(path)
    save_columns(path, {"rows": np.zeros(4, np.int64)}, {})
    path.write_bytes(path.read_bytes().replace(b'"shape":[4]', b'"shape":[9]'))
    with pytest.raises(ValueError, match="reshape"):
        open_columns(path)


def test_names_that_overlap_are_refused() -> None:
    blob, ends = pack_texts(["a" * 1000] * 1000)
    assert len(unpack_texts(blob, ends)) == 1000
    for wrong in (ends * 2, ends[::-1], ends - 2000):
        with pytest.raises(DataError, match="names in an index are damaged"):
            unpack_texts(blob, wrong)
    alternating = np.where(np.arange(1000) % 2, len(blob), 0)  # would give 500 MB
    with pytest.raises(DataError, match="names in an index are damaged"):
        unpack_texts(blob, alternating)


def test_the_dimensions_of_embeddings_are_those_of_their_rows(tmp_path: Path) -> None:
    path = tmp_path / "x.parquet"
    facts = {"rows": 3, "dim": 8, "dtype": "fp32", "modality": "image"}
    rows = np.eye(3, 8, dtype=np.float32)
    write_embeddings(path, facts, [(rows, Names(["a", "b", "c"], ["p"] * 3))])
    table = pq.read_table(path)
    said = {**facts, "version": 1, "dim": 10**12}
    pq.write_table(table.replace_schema_metadata({b"xray": json.dumps(said)}), path)
    assert table.schema.field("embedding").type == pa.binary(32)
    with pytest.raises(
        DataError, match=r"x\.parquet is not a sound embedding file.*dim=1000000000000"
    ):
        open_embeddings(path)
