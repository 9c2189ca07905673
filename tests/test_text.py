"""The LLM tower: bidirectional, blind to padding, and its weights where they belong."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModel, AutoTokenizer, LlamaConfig, Qwen2Config

from xray.config import TextConfig
from xray.errors import ArtifactError, ConfigError
from xray.models.text import (
    TextAdapter,
    TextTower,
    check_bidirectional,
    find_llm,
    llm_digest,
    load_llm,
    load_tokenizer,
    tokenize,
)


@pytest.fixture
def folder(demo: Path) -> Path:
    return demo / "llm"


def test_attention_is_bidirectional_also_with_padding(folder: Path) -> None:
    llm = load_llm(folder)
    check_bidirectional(llm)
    llm.config.is_causal = True
    with pytest.raises(ConfigError, match="stays causal"):
        check_bidirectional(llm)


@pytest.mark.parametrize("family", [LlamaConfig, Qwen2Config])
def test_other_families(family: type, tmp_path: Path, folder: Path) -> None:
    settings = family(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2,
    )  # fmt: skip
    AutoModel.from_config(settings).save_pretrained(tmp_path)
    check_bidirectional(load_llm(tmp_path))


@torch.no_grad()
def test_pooling_is_blind_to_padding_and_takes_any_leading_shape(folder: Path) -> None:
    tower = TextTower(TextConfig(tune="none", lora_rank=0), folder).eval()
    tokenizer = load_tokenizer(folder)
    short, long = "a red circle", "a picture of a small blue star on the left"
    alone = tower(**tokenize(tokenizer, [short], 32))
    together = tower(**tokenize(tokenizer, [short, long], 32))
    assert torch.allclose(alone[0], together[0], atol=1e-5)
    tokens = {k: v[:, None] for k, v in tokenize(tokenizer, [short, long], 32).items()}
    assert torch.allclose(tower(**tokens)[:, 0], together, atol=1e-6)
    empty = tower(torch.zeros(1, 4, dtype=torch.long), torch.zeros(1, 4, dtype=torch.long))
    assert empty.isfinite().all()


@pytest.mark.parametrize(
    ("tune", "share"), [("none", (0, 0)), ("lora", (0.001, 0.5)), ("full", (1, 1))]
)
def test_what_is_trained(folder: Path, tune: str, share: tuple[float, float]) -> None:
    tower = TextTower(TextConfig(tune=tune, lora_rank=4), folder)  # type: ignore[arg-type]
    total = sum(p.numel() for p in tower.parameters())
    trained = sum(p.numel() for p in tower.parameters() if p.requires_grad)
    assert share[0] <= trained / total <= share[1]


def test_changes_round_trip(folder: Path) -> None:
    config = TextConfig(tune="lora", lora_rank=4)
    tower = TextTower(config, folder)
    for parameter in tower.parameters():
        if parameter.requires_grad:
            parameter.data.normal_()
    changes = tower.changes(tower.state_dict())
    assert changes and all(".lora_" in name for name in changes)
    other = TextTower(config, folder)
    other.load_changes(changes, "x")
    assert all(
        torch.equal(a, b) for a, b in zip(tower.parameters(), other.parameters(), strict=True)
    )
    with pytest.raises(ArtifactError, match="does not fit the LLM"):
        TextTower(TextConfig(tune="lora", lora_rank=8), folder).load_changes(changes, "x")


def test_folders_are_found_and_hashed(folder: Path, tmp_path: Path) -> None:
    assert find_llm(str(folder)) == folder
    with pytest.raises(ConfigError, match=r"text.llm is not set"):
        find_llm("")
    with pytest.raises(ConfigError, match=r"has no config.json"):
        find_llm(str(tmp_path))
    before = llm_digest(folder)
    assert before == llm_digest(folder) and len(before) == 64
    assert len(AutoTokenizer.from_pretrained(folder)) <= 300


def test_adapter_starts_as_norm_and_projection() -> None:
    adapter = TextAdapter(8, 4, 2)
    x = torch.randn(3, 8)
    plain = adapter.project(adapter.norm(torch.nn.functional.normalize(x, dim=-1)))
    assert torch.allclose(adapter(x), plain, atol=1e-6)
