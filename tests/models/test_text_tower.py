"""Tests of the text tower: attention, padding, pooling, LoRA and loading from folders."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tokenizers.processors import TemplateProcessing
from transformers import AutoModel, AutoModelForTextEncoding, AutoTokenizer

from xray.artifacts.language_model import Language
from xray.config import TextConfig
from xray.errors import ArtifactError, ConfigError
from xray.models.heads import TextAdapter
from xray.models.llm_folder import find_llm, llm_digest, load_llm
from xray.models.text_tower import TextTower, check_bidirectional
from xray.models.tiny_llm import build_tiny_llm
from xray.models.tokenizer import TOKENS, CaptionTokenizer

SIZES = {
    "vocab_size": 320, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 1,
}  # fmt: skip
GROUPED = {**SIZES, "num_key_value_heads": 2}
DECODERS: dict[str, dict[str, Any]] = {
    "Llama": GROUPED,
    "Mistral": {**GROUPED, "sliding_window": 4},
    "Qwen2": GROUPED,
    "Qwen3": {**GROUPED, "head_dim": 8},
    "Gemma": {**GROUPED, "head_dim": 8},
    "Gemma2": {**GROUPED, "head_dim": 8},
    "Gemma3Text": {**GROUPED, "head_dim": 8, "sliding_window": 4},
    "Phi": SIZES,
    "Phi3": GROUPED,
}
ENCODERS: dict[str, dict[str, Any]] = {
    "Bert": SIZES,
    "Roberta": {**SIZES, "max_position_embeddings": 70},
    "ModernBert": {**SIZES, "cls_token_id": 1, "sep_token_id": 1, "local_attention": 8},
    "T5": {
        "vocab_size": 320, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4,
    },
}  # fmt: skip
SHORT, LONG = "a red circle", "a picture of a small blue star on the left"


@pytest.fixture
def folder(demo: Path) -> Path:
    return demo / "llm"


def family(name: str, settings: dict[str, Any], demo: Path, path: Path) -> Path:
    """Write a folder with a tiny random model of a family and the demo data's tokenizer."""
    config = getattr(transformers, f"{name}Config")(**settings)
    kind = AutoModelForTextEncoding if name == "T5" else AutoModel
    kind.from_config(config).save_pretrained(path)
    for file in (demo / "llm").glob("tokenizer*"):
        shutil.copy(file, path)
    return path


@pytest.mark.parametrize("name", [*DECODERS, *ENCODERS])
def test_families_are_bidirectional_and_ignore_padding(
    name: str, demo: Path, tmp_path: Path
) -> None:
    path = family(name, (DECODERS | ENCODERS)[name], demo, tmp_path)
    config = TextConfig(llm=str(path), tune="lora", lora_rank=2, lora_dropout=0.0, max_length=24)
    language = Language(config)
    tower = language.build().eval()
    with torch.no_grad():
        alone, together = (
            tower(**language.tokenizer(captions)) for captions in ([SHORT], [SHORT, LONG])
        )
    assert tower.width == 32 and torch.allclose(alone[0], together[0], atol=1e-5)
    names = [n for n, p in tower.named_parameters() if p.requires_grad]
    assert len(names) >= 8 and all(".lora_" in n for n in names)
    tower(**language.tokenizer([SHORT])).square().sum().backward()
    assert any(p.grad is not None and p.grad.abs().max() > 0 for p in tower.parameters())


def test_attention_is_bidirectional_also_with_padding(folder: Path) -> None:
    llm = load_llm(folder)
    check_bidirectional(llm)
    llm.config.is_causal = True
    with pytest.raises(ConfigError, match="stays causal"):
        check_bidirectional(llm)


def test_causal_only_family_is_rejected(demo: Path, tmp_path: Path) -> None:
    config = transformers.MambaConfig(vocab_size=320, hidden_size=32, num_hidden_layers=1)
    AutoModel.from_config(config).save_pretrained(tmp_path)
    settings = TextConfig(tune="none", lora_rank=0)
    with pytest.raises(ConfigError, match=r"MambaModel stays causal.*text.attention=causal"):
        TextTower(settings, tmp_path)


@torch.no_grad()
def test_clip_text_transformer_is_causal_and_pooled_at_its_end(tmp_path: Path) -> None:
    captions = [SHORT, LONG] * 20
    build_tiny_llm(captions, tmp_path, 300, 32, 2, 4, "clip")
    config = TextConfig(str(tmp_path), "full", "causal", pooling="last", lora_rank=0, max_length=24)
    language = Language(config)
    tower, tokens = language.build().eval(), language.tokenizer([SHORT, LONG])
    hidden = tower.llm(**{k: tokens[k] for k in TOKENS[:2]}).last_hidden_state
    ends = tokens["attention_mask"].sum(dim=1) - 1
    assert (tokens["input_ids"][torch.arange(2), ends] == 1).all()  # <eos>
    assert torch.equal(tower(**tokens), hidden[torch.arange(2), ends])
    alone = tower.llm(**{k: v[:1, :2] for k, v in tokens.items() if k in TOKENS[:2]})
    assert torch.allclose(alone.last_hidden_state, hidden[:1, :2], atol=1e-5)  # causal
    with pytest.raises(ConfigError, match="CLIPTextModel stays causal"):
        Language(TextConfig(str(tmp_path), tune="none")).build()


@torch.no_grad()
@pytest.mark.parametrize("pooling", ["mean", "last", "cls", "latent"])
def test_pooling_ignores_padding_and_accepts_any_leading_shape(folder: Path, pooling: Any) -> None:
    config = TextConfig(str(folder), "full", pooling=pooling, lora_rank=0, max_length=32)
    language = Language(config)
    tower, tokenizer = language.build().eval(), language.tokenizer
    alone, together = tower(**tokenizer([SHORT])), tower(**tokenizer([SHORT, LONG]))
    assert torch.allclose(alone[0], together[0], atol=1e-5)
    assert not torch.allclose(together[0], together[1], atol=1e-4)
    pairs = tokenizer.pad([tokenizer([SHORT, SHORT]), tokenizer([LONG, SHORT])])
    output = tower(**pairs)
    assert output.shape == (2, 2, 32) and torch.allclose(output[:, 0], together, atol=1e-5)
    empty = tower(*(torch.zeros(1, 4, dtype=torch.long) for _ in TOKENS))
    assert empty.isfinite().all()


@torch.no_grad()
def test_prompt_between_special_tokens(demo: Path, tmp_path: Path) -> None:
    """BERT adds a token at both ends; the last one is pooled with the caption."""
    path = family("Bert", SIZES, demo, tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(demo / "llm")
    around = TemplateProcessing("<pad> $A <eos>", special_tokens=[("<pad>", 0), ("<eos>", 1)])
    tokenizer.backend_tokenizer.post_processor = around
    tokenizer.save_pretrained(path)
    config = TextConfig(prompt="find: ", pool_prompt=False, max_length=48)
    tokens = CaptionTokenizer(path, config)([SHORT, LONG])
    for row in range(2):
        inside = tokens["input_ids"][row][tokens["pooled_mask"][row].bool()]
        plain = AutoTokenizer.from_pretrained(demo / "llm")([SHORT, LONG][row])["input_ids"]
        assert inside.tolist() == [*plain, 1]
    with pytest.raises(ConfigError, match="the tokenizer's special tokens take 2 tokens"):
        CaptionTokenizer(path, TextConfig(max_length=2))


@torch.no_grad()
def test_an_empty_caption_is_encoded_alike_alone_and_beside_others(folder: Path) -> None:
    config = TextConfig(llm=str(folder), tune="none", lora_rank=0)
    tokenizer, tower = CaptionTokenizer(folder, config), TextTower(config, folder).eval()
    with torch.no_grad():
        alone, beside = (tower(**tokenizer(texts)) for texts in ([""], ["", "a red circle"]))
    assert tokenizer([""])["input_ids"].shape == (1, 1)
    torch.testing.assert_close(alone[0], beside[0])


def test_prompt_is_read_but_not_pooled(folder: Path) -> None:
    config = TextConfig(str(folder), "none", prompt="find the picture: ", max_length=48)
    language = Language(config)
    tower, tokens = language.build().eval(), language.tokenizer([SHORT, LONG])
    plain = CaptionTokenizer(folder, TextConfig(max_length=48))([SHORT, LONG])
    assert torch.equal(tokens["pooled_mask"].sum(dim=1), plain["attention_mask"].sum(dim=1))
    inside = tokens["pooled_mask"].bool()
    assert torch.equal(
        tokens["input_ids"][inside], plain["input_ids"][plain["attention_mask"].bool()]
    )
    hidden = tower.llm(**{k: tokens[k] for k in TOKENS[:2]}).last_hidden_state
    assert torch.allclose(tower(**tokens)[0], hidden[0][inside[0]].mean(dim=0), atol=1e-5)
    assert not torch.allclose(tower(**tokens), tower(**plain), atol=1e-3)
    with pytest.raises(ConfigError, match=r"take \d+ tokens.*none of text.max_length=4"):
        CaptionTokenizer(folder, TextConfig(prompt="find the picture: ", max_length=4))


def test_pooling_is_read_from_a_sentence_encoders_folder(
    demo: Path, folder: Path, tmp_path: Path
) -> None:
    shutil.copytree(folder, tmp_path / "llm")
    (tmp_path / "llm" / "1_Pooling").mkdir()
    modes = tmp_path / "llm" / "1_Pooling" / "config.json"
    assert Language(TextConfig(str(folder), "none")).config.pooling == "mean"
    modes.write_text(
        json.dumps({"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False})
    )
    assert Language(TextConfig(str(tmp_path / "llm"), "none")).config.pooling == "cls"
    modes.write_text("[1]")  # sets no pooling
    Language(TextConfig(str(tmp_path / "llm"), "none"))
    for content, message in (
        ('{"pooling_mode_max_tokens": true}', "set text.pooling"),
        ("no json", "download it again"),
    ):
        modes.write_text(content)
        with pytest.raises(ConfigError, match=message):
            Language(TextConfig(str(tmp_path / "llm"), "none"))
    modes.write_text('{"pooling_mode_mean_tokens": true, "pooling_mode_max_tokens": true}')
    with pytest.raises(ConfigError, match="asks for pooling_mode_mean_tokens and pooling_mode_max"):
        Language(TextConfig(str(tmp_path / "llm"), "none"))
    modes.write_text('{"pooling_mode_mean_tokens": true}')
    listed = [{"type": "sentence_transformers.models.Dense"}]
    (tmp_path / "llm" / "modules.json").write_text(json.dumps(listed))
    with pytest.raises(ConfigError, match="Dense module after the pooling"):
        Language(TextConfig(str(tmp_path / "llm"), "none"))
    assert Language(TextConfig(str(tmp_path / "llm"), "none", pooling="mean")).config.pooling


def test_bucketed_captions_are_the_same_with_less_padding(folder: Path) -> None:
    tokenizer = CaptionTokenizer(folder, TextConfig())
    words = [["x " * n, "x " * m] for n, m in ((9, 2), (1, 1), (3, 12), (2, 3), (7, 7), (1, 0))]
    batches = [tokenizer.pad([tokenizer(row) for row in words[i : i + 2]]) for i in (0, 2, 4)]
    bucketed, rows = tokenizer.bucket(batches)
    assert [len(batch["input_ids"]) for batch in bucketed] == [2, 2, 2]
    shapes = [batch["input_ids"].shape[-1] for batch in bucketed]
    assert shapes == sorted(shapes) and shapes[0] < shapes[1] < shapes[2]

    def read(sides: list[dict[str, torch.Tensor]]) -> list[list[list[int]]]:
        return [
            [ids[mask > 0].tolist() for ids, mask in zip(*row, strict=True)]
            for side in sides
            for row in zip(side["input_ids"], side["attention_mask"], strict=True)
        ]

    found = read(bucketed)
    assert sorted(rows.tolist()) == list(range(6)) != rows.tolist()
    assert [found[row] for row in rows] == read(batches)
    padding = torch.cat([b["input_ids"][b["attention_mask"] == 0] for b in bucketed])
    assert padding.unique().tolist() == [tokenizer.tokenizer.pad_token_id]


@pytest.mark.parametrize(
    ("tune", "share"), [("none", (0, 0)), ("lora", (0.001, 0.5)), ("full", (1, 1))]
)
def test_share_of_trained_parameters(folder: Path, tune: Any, share: tuple[float, float]) -> None:
    tower = TextTower(TextConfig(tune=tune, lora_rank=4), folder)
    total = sum(p.numel() for p in tower.parameters())
    trained = sum(p.numel() for p in tower.parameters() if p.requires_grad)
    assert share[0] <= trained / total <= share[1]


def test_lora_is_fp32_when_frozen_weights_are_bf16(folder: Path) -> None:
    tower = TextTower(TextConfig(tune="lora", lora_rank=2, dtype="bf16"), folder)
    dtypes = {".lora_" in name: p.dtype for name, p in tower.named_parameters()}
    assert dtypes == {False: torch.bfloat16, True: torch.float32}
    with pytest.raises(ConfigError, match=r"text.dtype=bf16 is for frozen weights"):
        TextConfig(tune="full", dtype="bf16").validate()


@pytest.mark.parametrize("pooling", ["mean", "latent"])
def test_changes_are_restored_by_load_changes(folder: Path, pooling: Any) -> None:
    config = TextConfig(tune="lora", lora_rank=4, pooling=pooling, latents=4)
    tower = TextTower(config, folder)
    for parameter in tower.parameters():
        if parameter.requires_grad:
            parameter.data.normal_()
    changes = tower.changes(tower.state_dict())
    assert changes and all(".lora_" in n or n.startswith("pooler.") for n in changes)
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


def test_errors_of_unusable_folders_name_the_key(demo: Path, folder: Path, tmp_path: Path) -> None:
    small = family("Llama", {**GROUPED, "vocab_size": 40}, demo, tmp_path / "small")
    with pytest.raises(ConfigError, match=r"gives token \d+, the model there embeds 40"):
        Language(TextConfig(str(small), "none")).build()
    with pytest.raises(ConfigError, match=r"text.max_length=9999 is more than the \d+ tokens"):
        Language(TextConfig(str(folder), "none", max_length=9999)).build()
    bare = tmp_path / "bare"
    bare.mkdir()
    shutil.copy(folder / "config.json", bare)
    for file in folder.glob("model*"):
        shutil.copy(file, bare)
    with pytest.raises(
        ConfigError, match=r"bare has no tokenizer: it contains none of .*tokenizer.json"
    ):
        Language(TextConfig(str(bare), "none"))
    (bare / "config.json").write_text("{")
    with pytest.raises(ConfigError, match=r"bare/config.json is not valid JSON: download it"):
        Language(TextConfig(str(bare), "none"))
    with pytest.raises(ConfigError, match="latent has weights to be trained"):
        Language(TextConfig(str(folder), "none", pooling="latent"))


def test_incomplete_weights_are_rejected(demo: Path, tmp_path: Path) -> None:
    """transformers would initialise the missing weights randomly on each load."""
    path = family("Llama", GROUPED, demo, tmp_path)
    settings = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**settings, "num_hidden_layers": 3}))
    with pytest.raises(ConfigError, match=r"layers.2.* is missing or has another shape"):
        Language(TextConfig(str(path), "none")).build()


def test_models_that_contradict_the_text_section_are_rejected(demo: Path, tmp_path: Path) -> None:
    bert = family("Bert", SIZES, demo, tmp_path / "bert")
    with pytest.raises(ConfigError, match="BertModel has bidirectional attention"):
        Language(TextConfig(str(bert), "none", "causal", pooling="last")).build()
    with pytest.raises(ConfigError, match="the first token, which sees no other"):
        TextConfig(attention="causal", pooling="cls").validate()
    small = {"d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 32}
    more = {"decoder_ffn_dim": 32, "encoder_attention_heads": 2, "decoder_attention_heads": 2}
    bart = family("Bart", {**small, **more, "vocab_size": 320}, demo, tmp_path / "bart")
    with pytest.raises(ConfigError, match="encoder-decoder"):
        Language(TextConfig(str(bart), "none")).build()
    roberta = family("Roberta", ENCODERS["Roberta"], demo, tmp_path / "roberta")
    with pytest.raises(
        ConfigError, match="more than the 69 tokens"
    ):  # 70 positions, one for padding
        Language(TextConfig(str(roberta), "none", max_length=70)).build()


def test_unused_tokens_beyond_the_embedding_table_are_accepted(demo: Path, tmp_path: Path) -> None:
    """Gemma 3's text model has an image token beyond its embedding table."""
    path = family("Llama", GROUPED, demo, tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(demo / "llm")
    tokenizer.add_special_tokens({"additional_special_tokens": [f"<{i}>" for i in range(40)]})
    tokenizer.save_pretrained(path)
    assert len(tokenizer) > 320
    Language(TextConfig(str(path), "none")).build()


def test_truncated_captions_are_logged(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    language = Language(TextConfig(str(folder), "none", max_length=12))
    with caplog.at_level("WARNING", "xray"):
        language.warn_of_cut([SHORT])
        assert not caplog.records
        language.warn_of_cut([SHORT, LONG])
    assert "50 % of captions are longer than text.max_length=12" in caplog.text
    assert "raise it to 512 at most, or use shorter captions" in caplog.text
    longer = Language(TextConfig(str(folder), "none", max_length=512))
    with caplog.at_level("WARNING", "xray"):
        longer.warn_of_cut([LONG * 60])
    assert "are cut there: the model reads no more, so use shorter captions" in caplog.text


def test_adapter_is_norm_and_projection_at_the_start() -> None:
    adapter = TextAdapter(8, 4, 2)
    x = torch.randn(3, 8)
    plain = adapter.project(adapter.norm(torch.nn.functional.normalize(x, dim=-1)))
    assert torch.allclose(adapter(x), plain, atol=1e-6)
