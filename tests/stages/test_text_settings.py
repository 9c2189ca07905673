"""Reading and pooling of captions by older runs, artifacts and stored vectors: as it was."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from tiny import train
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer, SiglipTextConfig, SiglipTextModel

from data_pipelines.shards.source import open_source
from data_pipelines.text.feature_store import open_store, store_facts
from xray.artifacts.artifact import open_artifact
from xray.artifacts.encoders import TextEncoder
from xray.artifacts.language_model import Language
from xray.config import TextConfig
from xray.errors import ConfigError
from xray.precompute.config import TextFeaturesConfig
from xray.precompute.text_features import write_text_features
from xray.training.metrics import read_metrics

PHOTOS = ("data.blocks=[{source: photos, samples: 8}]", "train.samples=24", "train.save_every=1")
NEW = ("pool_prompt", "pool_special", "padding")  # keys that older runs lack


@pytest.fixture(scope="module")
def llm(demo: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo's decoder with a special token before each caption, as Llama's BOS."""
    folder = shutil.copytree(demo / "llm", tmp_path_factory.mktemp("bos") / "llm")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    before = TemplateProcessing("<eos> $A", special_tokens=[("<eos>", 1)])
    tokenizer.backend_tokenizer.post_processor = before
    tokenizer.save_pretrained(folder)
    return folder


def text_of(path: Path) -> dict[str, Any]:
    text: dict[str, Any] = json.loads((path / "manifest.json").read_text())["config"]["text"]
    return text


@pytest.fixture(scope="module")
def older(demo: Path, llm: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text run as an older version left it: BOS is pooled, and no file has the new keys."""
    run = tmp_path_factory.mktemp("older") / "run"
    train("text", demo, run, *PHOTOS, f"text.llm={llm}", "text.pool_special=true")
    config = yaml.safe_load((run / "config.yaml").read_text())
    record, manifest = (
        json.loads((run / name).read_text()) for name in ("run.json", "artifact/manifest.json")
    )
    for content in (config, record["config"], manifest["config"]):
        for name in NEW:
            content["text"].pop(name, None)
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    (run / "run.json").write_text(json.dumps(record))
    (run / "artifact" / "manifest.json").write_text(json.dumps(manifest))
    return run


def test_an_older_run_continues_with_what_it_pooled(
    demo: Path, llm: Path, older: Path, tmp_path: Path
) -> None:
    args = (*PHOTOS, f"text.llm={llm}")
    run = shutil.copytree(older, tmp_path / "run")
    finished = train("text", demo, run, *args)
    assert finished.digest == open_artifact(older / "artifact").digest  # not trained again
    shutil.rmtree(run / "artifact")
    shutil.rmtree(run / "checkpoints" / "step_00000003")
    made = train("text", demo, run, *args)
    assert [text_of(made.path)[name] for name in NEW] == [False, True, "longest"]
    weights = (load_file(path / "artifact" / "text.safetensors") for path in (run, older))
    assert all(torch.equal(a, b) for a, b in zip(*(w.values() for w in weights), strict=True))
    with pytest.raises(ConfigError, match=r"config.text.pool_special: True -> False"):
        train("text", demo, run, *args, "text.pool_special=false")
    new = train("text", demo, tmp_path / "new", *args)
    assert text_of(new.path)["pool_special"] is False
    first = [read_metrics(path / "metrics.jsonl")[0]["loss"] for path in (older, tmp_path / "new")]
    assert first[0] != first[1]


def test_an_older_run_that_is_only_at_its_mirror_continues(
    demo: Path, llm: Path, older: Path, tmp_path: Path
) -> None:
    shutil.copytree(older, tmp_path / "bucket" / "text")
    shutil.rmtree(tmp_path / "bucket" / "text" / "artifact")
    given = (*PHOTOS, f"text.llm={llm}", f"train.mirror=file://{tmp_path}/bucket")
    made = train("text", demo, tmp_path / "new disk", *given)
    assert text_of(made.path)["pool_special"] is True


def test_a_run_keeps_what_its_older_text_artifact_pools(
    demo: Path, llm: Path, older: Path, tmp_path: Path
) -> None:
    parent = open_artifact(older / "artifact")
    language = Language(TextConfig(tune="none"), parent)
    assert language.config.pool_special is True and not {*NEW} & {*language.identity()}
    tokens = TextEncoder.after(parent).tokenizer(["a red circle"])
    assert torch.equal(tokens["pooled_mask"], tokens["attention_mask"])
    start = ("train.samples=12", "train.save_every=0", f"text.llm={llm}")
    made = train("clip", demo, tmp_path / "clip", *start, init_from=[parent.path])
    assert text_of(made.path)["pool_special"] is True
    other = (*start, "text.pool_special=false")
    with pytest.raises(ConfigError, match=r"text.pool_special=False cannot be: .* with True"):
        train("clip", demo, tmp_path / "x", *other, init_from=[parent.path])


def test_older_stores_serve_older_settings_only(demo: Path, llm: Path) -> None:
    source = open_source("photos", str(demo / "photos"), "image")

    def facts(**settings: Any) -> dict[str, Any]:
        language = Language(TextConfig(str(llm), "none", max_length=12, **settings))
        return store_facts(source, language.identity(), {}, "fp32")

    config = TextFeaturesConfig(
        str(llm), "none", max_length=12, features="fp32", workers=0, pool_special=True
    )
    write_text_features(source, Language(config), config, torch.device("cpu"))
    older = {"llm", "artifact", "attention", "pooling", "prompt", "max_length", "dtype"}
    assert {*facts(pool_special=True)} == older | {"captions", "features", "shards"}
    assert open_store(source, facts(pool_special=True)).width == 32
    with pytest.raises(ConfigError, match="the most similar has pool_special: True -> False"):
        open_store(source, facts())
    with pytest.raises(ConfigError, match="padding: 'longest' -> 'full'"):
        open_store(source, facts(pool_special=True, padding="full"))
    without = Language(TextConfig(str(demo / "llm"), "none")).identity()  # an LLM without BOS
    assert {*without} == older


def test_siglips_text_tower_is_tuned_and_read_at_full_length(demo: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(demo / "llm", tmp_path / "llm")
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    more = {"num_attention_heads": 2, "max_position_embeddings": 32, "vocab_size": 320}
    SiglipTextModel(SiglipTextConfig(**sizes, **more)).save_pretrained(folder)
    own = ("text.tune=full", "text.lora_rank=0", "text.padding=full", "text.pooling=last")
    tuned = train("text", demo, tmp_path / "text", *PHOTOS, f"text.llm={folder}", *own)
    encoder = TextEncoder.after(tuned)
    tokens = encoder.tokenizer(["a red circle"])
    assert tokens["input_ids"].shape == (1, 32) and tokens["attention_mask"].all()
    alone, beside = (encoder.encode_text(["a red circle", "a"][:n])[0] for n in (1, 2))
    torch.testing.assert_close(alone, beside)
    start = ("train.samples=12", "train.save_every=0")
    with pytest.raises(ConfigError, match=r"text.max_length=16 cannot be: .* was made with 32"):
        args = (*start, "text.max_length=16")
        train("clip", demo, tmp_path / "x", *args, init_from=[tuned.path])
    made = train("clip", demo, tmp_path / "clip", *start, init_from=[tuned.path])
    text = text_of(made.path)
    assert (text["padding"], text["pooling"], text["max_length"]) == ("full", "last", 32)
