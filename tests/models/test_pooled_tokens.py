"""Tests of the tokens that are read and pooled, against the pooled output of each source library.

CLIP and SigLIP: `pooler_output` of transformers. Sentence encoders: the definition of
sentence-transformers. Decoders: the mean over a caption's own tokens (LLM2Vec, 2404.05961).
"""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers
from tokenizers.processors import TemplateProcessing
from torch import Tensor
from transformers import AutoModel, PreTrainedTokenizerFast

from xray.artifacts.language_model import Language
from xray.config import TextConfig
from xray.errors import ConfigError
from xray.models.llm_folder import own_pooling
from xray.models.tokenizer import CaptionTokenizer

WORDS = ["a", "red", "circle", "small", "blue", "star", "on", "the", "left", "query", ":"]
SPECIAL = ["<unk>", "<pad>", "<bos>", "<eos>"]
CAPTIONS = ["a red circle", "a small blue star on the left", "star"]
PROMPT = "query: "
LENGTH = 16
SIZES = {
    "vocab_size": 32, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "max_position_embeddings": LENGTH, "pad_token_id": 1,
    "bos_token_id": 2, "eos_token_id": 3,
}  # fmt: skip
FAMILIES: dict[str, tuple[str, str]] = {  # model -> template of its tokenizer, padding token
    "CLIPText": ("<bos> $A <eos>", "<eos>"),
    "MetaClip2Text": ("<bos> $A <eos>", "<pad>"),
    "SiglipText": ("$A <eos>", "<eos>"),
    "Siglip2Text": ("$A <eos>", "<pad>"),
    "Bert": ("<bos> $A <eos>", "<pad>"),
    "Llama": ("<bos> $A", "<pad>"),
    "Qwen3": ("<bos> $A <eos>", "<pad>"),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A folder of each family: a tiny random model and a tokenizer of words."""
    made = {}
    for name, (template, pad) in FAMILIES.items():
        made[name] = tmp_path_factory.mktemp(name)
        torch.manual_seed(0)
        more = {"projection_size": 24} if name.startswith("Siglip") else {}
        more |= {"num_key_value_heads": 2, "head_dim": 8} if name in ("Llama", "Qwen3") else {}
        config = getattr(transformers, f"{name}Config")(**SIZES, **more)
        getattr(transformers, f"{name}Model")(config).save_pretrained(made[name])
        vocabulary = {word: number for number, word in enumerate([*SPECIAL, *WORDS])}
        tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
        tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
        around = [(word, vocabulary[word]) for word in ("<bos>", "<eos>")]
        tokenizer.post_processor = TemplateProcessing(template, special_tokens=around)
        fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token=pad, unk_token="<unk>")
        fast.save_pretrained(made[name])
    return made


def encoded(folder: Path, captions: Sequence[str] = CAPTIONS, **settings: Any) -> Tensor:
    """Encode captions as xray does, in two calls, so that they have other neighbours."""
    text = TextConfig(str(folder), "none", max_length=LENGTH, **settings)
    text.validate()
    language = Language(text)
    tower = language.build().eval()
    with torch.no_grad():
        parts = [tower(**language.tokenizer(part)) for part in (captions[:1], captions[1:])]
    return torch.cat(parts)


def original(folder: Path, name: str) -> Any:
    return getattr(transformers, f"{name}Model").from_pretrained(folder).eval()


@torch.no_grad()
@pytest.mark.parametrize("name", ["CLIPText", "MetaClip2Text"])
def test_last_pooling_is_clips_end_token(folders: dict[str, Path], name: str) -> None:
    """Also if the padding token is the end token, as CLIP's is."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(folders[name])
    tokens = tokenizer(CAPTIONS, padding="max_length", max_length=LENGTH, return_tensors="pt")
    assert ((tokens["input_ids"] == 3).sum(dim=1) > 1).all() == (name == "CLIPText")
    theirs = original(folders[name], name)(**tokens).pooler_output
    ours = encoded(folders[name], attention="causal", pooling="last")
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)


@torch.no_grad()
@pytest.mark.parametrize("name", ["SiglipText", "Siglip2Text"])
def test_full_padding_is_siglips(
    folders: dict[str, Path], name: str, caplog: pytest.LogCaptureFixture
) -> None:
    """SigLIP reads captions padded to full length without a mask, and pools the last position."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(folders[name])
    padded = tokenizer(CAPTIONS, padding="max_length", max_length=LENGTH, return_tensors="pt")
    model = original(folders[name], name)
    theirs = model(input_ids=padded["input_ids"]).pooler_output
    ours = encoded(folders[name], padding="full")
    assert not caplog.text
    torch.testing.assert_close(model.head(ours), theirs, atol=1e-5, rtol=0)
    masked = encoded(folders[name], pooling="last")
    assert not torch.allclose(model.head(masked), theirs, atol=1e-3)
    tokens = CaptionTokenizer(folders[name], TextConfig(max_length=LENGTH, padding="full"))([""])
    assert tokens["input_ids"].tolist() == [[3, *[padded["input_ids"][0, -1]] * (LENGTH - 1)]]
    assert tokens["attention_mask"].all() and tokens["pooled_mask"].all()
    caplog.clear()
    config = Language(TextConfig(str(folders[name]), "none", max_length=LENGTH)).config
    assert config.pooling == "last" and "set text.padding=full" in caplog.text
    with pytest.raises(ConfigError, match="bucket_by_length has nothing to order"):
        TextConfig(padding="full", bucket_by_length=True).validate()


@torch.no_grad()
def sentence_transformers(folder: Path, prompt: str, include_prompt: bool) -> Tensor:
    """Mean pooling by its documented definition, with the length of the prompt without [SEP]."""
    tokenizer, model = transformers.AutoTokenizer.from_pretrained(folder), original(folder, "Bert")
    tokens = tokenizer([prompt + text for text in CAPTIONS], padding=True, return_tensors="pt")
    hidden, mask = model(**tokens).last_hidden_state, tokens["attention_mask"].clone()
    if prompt and not include_prompt:
        mask[:, : len(tokenizer([prompt])["input_ids"][0]) - 1] = 0
    summed = (hidden * mask[..., None]).sum(dim=1)
    return summed / mask.sum(dim=1, keepdim=True).clamp(min=1e-9)


@pytest.mark.parametrize("prompt", ["", PROMPT])
@pytest.mark.parametrize("include", [True, False, None])
def test_sentence_encoders_pool_what_their_folder_says(
    folders: dict[str, Path], tmp_path: Path, include: bool | None, prompt: str
) -> None:
    folder = shutil.copytree(folders["Bert"], tmp_path / "encoder")
    pooling = {"pooling_mode_mean_tokens": True}
    if include is not None:
        pooling["include_prompt"] = include
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(pooling))
    theirs = sentence_transformers(folder, prompt, include is not False)
    torch.testing.assert_close(encoded(folder, prompt=prompt), theirs, atol=1e-5, rtol=0)
    for own in (True, False):  # as the user says
        theirs = sentence_transformers(folder, prompt, own)
        ours = encoded(folder, prompt=prompt, pool_prompt=own)
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)


@pytest.mark.parametrize("mode", ["mean", "cls", "lasttoken", "max"])
def test_pooling_of_newer_folders_is_read(tmp_path: Path, mode: str) -> None:
    """Newer versions of sentence-transformers write one name instead of a flag for each mode."""
    (tmp_path / "1_Pooling").mkdir()
    config = {"embedding_dimension": 32, "pooling_mode": mode, "include_prompt": True}
    (tmp_path / "1_Pooling" / "config.json").write_text(json.dumps(config))
    if mode == "max":
        with pytest.raises(ConfigError, match="asks for pooling_mode=max, which xray does not"):
            own_pooling(tmp_path)
    else:
        assert own_pooling(tmp_path) == mode.removesuffix("token")


def test_a_default_prompt_of_a_sentence_encoder_is_named(
    folders: dict[str, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = shutil.copytree(folders["Bert"], tmp_path / "encoder")
    settings = {"prompts": {"query": PROMPT, "passage": ""}, "default_prompt_name": "query"}
    (folder / "config_sentence_transformers.json").write_text(json.dumps(settings))
    with caplog.at_level(logging.WARNING, "xray"):
        Language(TextConfig(str(folder), "none", prompt=PROMPT))
        assert not caplog.text
        Language(TextConfig(str(folder), "none"))
    assert "after the prompt 'query: ' (default_prompt_name" in caplog.text


@torch.no_grad()
@pytest.mark.parametrize("prompt", ["", PROMPT])
@pytest.mark.parametrize("name", ["Llama", "Qwen3"])
def test_decoders_pool_neither_bos_nor_the_prompt(
    folders: dict[str, Path], name: str, prompt: str
) -> None:
    tower = Language(TextConfig(str(folders[name]), "none", max_length=LENGTH)).build().eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folders[name])
    before = 1 + len(tokenizer.tokenize(prompt))
    own, old = [], []
    for caption in CAPTIONS:
        tokens = tokenizer([prompt + caption], return_tensors="pt")
        hidden = tower.llm(**tokens).last_hidden_state[0]
        own.append(hidden[before:].mean(dim=0))
        old.append(hidden[before if prompt else 0 :].mean(dim=0))
    ours = encoded(folders[name], prompt=prompt)
    torch.testing.assert_close(ours, torch.stack(own), atol=1e-5, rtol=0)
    then = encoded(folders[name], prompt=prompt, pool_special=True, pool_prompt=False)
    torch.testing.assert_close(then, torch.stack(old), atol=1e-5, rtol=0)
    assert torch.allclose(ours, then, atol=1e-5) == bool(prompt)
    everything = encoded(folders[name], prompt=prompt, pool_special=True, pool_prompt=True)
    assert not torch.allclose(everything, ours, atol=1e-3)
    assert encoded(folders[name], ["", "star"], prompt=prompt).isfinite().all()


def test_auto_is_resolved_by_the_model_and_its_tokenizer(
    demo: Path, folders: dict[str, Path], tmp_path: Path
) -> None:
    """A setting that changes nothing keeps the older value, so that older stores are found."""

    def resolved(folder: Path, **settings: Any) -> tuple[Any, Any]:
        config = Language(TextConfig(str(folder), "none", **settings)).config
        return config.pool_special, config.pool_prompt

    assert resolved(demo / "llm") == (True, False)  # a decoder without BOS
    assert resolved(folders["Llama"]) == (False, False)
    assert resolved(folders["Llama"], prompt=PROMPT) == (False, False)
    assert resolved(folders["Bert"]) == (True, False)
    assert resolved(folders["Bert"], prompt=PROMPT) == (True, True)
    assert resolved(folders["CLIPText"], attention="causal") == (True, False)
    tuned = shutil.copytree(folders["Llama"], tmp_path / "llm")  # a decoder as a sentence encoder
    (tuned / "1_Pooling").mkdir()
    (tuned / "1_Pooling" / "config.json").write_text('{"pooling_mode_lasttoken": true}')
    assert resolved(tuned, prompt=PROMPT) == (True, True)


def test_incomplete_text_towers_are_rejected(folders: dict[str, Path], tmp_path: Path) -> None:
    """SigLIP's projection may be missing, because it is not part of the sentence vector."""
    model = AutoModel.from_pretrained(folders["Bert"])
    assert type(model).__name__ == "BertModel"  # the registered towers change no other model
    path = shutil.copytree(folders["SiglipText"], tmp_path / "llm")
    settings = json.loads((path / "config.json").read_text())
    Language(TextConfig(str(path), "none", max_length=LENGTH)).build().llm.save_pretrained(path)
    Language(TextConfig(str(path), "none", max_length=LENGTH)).build()
    (path / "config.json").write_text(json.dumps({**settings, "num_hidden_layers": 3}))
    with pytest.raises(ConfigError, match=r"layers.2.* is missing or has another shape"):
        Language(TextConfig(str(path), "none", max_length=LENGTH)).build()
