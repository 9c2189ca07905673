"""Pickles and code beside the weights of other libraries are refused without being run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hostile_files import llm_loader, pickled

from xray.config import ModelConfig
from xray.errors import ArtifactError, ConfigError
from xray.models import VisionBackbone
from xray.models.weight_loading import load_pretrained


@pytest.mark.parametrize("ending", ["safetensors", "pth", "pt", "bin", "npz"])
def test_pretrained_weights_that_are_pickles_are_refused(
    tmp_path: Path, ran: Path, hostile: bytes, ending: str
) -> None:
    small = {"embed_dim": 32, "depth": 1, "num_heads": 2}

    def load(source: str) -> None:
        config = ModelConfig("vit_tiny_patch16_224", small, pretrained=source)
        load_pretrained(VisionBackbone(config, 32, 4), config)

    file = tmp_path / f"weights.{ending}"
    file.write_bytes(hostile)
    why = "plain tensors" if ending in ("pth", "pt", "bin") else "a readable safetensors"
    with pytest.raises(ArtifactError, match=rf"{file} (is not|cannot be read as) {why}") as error:
        load(str(file))
    assert "\n" not in str(error.value)
    folder = tmp_path / "timm"
    folder.mkdir()
    settings = {"architecture": "vit_tiny_patch16_224", "num_classes": 10}
    (folder / "config.json").write_text(json.dumps(settings))
    for name in (f"model.{ending}", f"pytorch_model.{ending}"):
        (folder / name).write_bytes(hostile)
        with pytest.raises(
            ConfigError, match=rf"no weights for model.pretrained=local-dir:{folder}"
        ):
            load(f"local-dir:{folder}")
        (folder / name).unlink()
    assert not ran.exists()


def test_open_clip_weights_that_are_pickles_are_refused(tmp_path: Path, ran: Path) -> None:
    from stages.clip_teacher import load_teacher

    open_clip = pytest.importorskip("open_clip")
    vision = {"image_size": 32, "layers": 1, "width": 64, "patch_size": 16}
    text = {"context_length": 77, "vocab_size": 49408, "width": 64, "heads": 1, "layers": 1}
    config = {"embed_dim": 16, "vision_cfg": vision, "text_cfg": text}
    (tmp_path / "tiny-and-hostile.json").write_text(json.dumps(config))
    open_clip.add_model_config(tmp_path / "tiny-and-hostile.json")
    (tmp_path / "weights.bin").write_bytes(pickled(ran))
    name = f"open_clip:tiny-and-hostile:{tmp_path / 'weights.bin'}"
    with pytest.raises(ConfigError, match=r"weights\.bin cannot be loaded"):
        load_teacher(name, torch.device("cpu"))
    assert not ran.exists()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("model.safetensors", "cannot load the weights in"),
        ("pytorch_model.bin", "pytorch_model.bin is a pickle, which xray does not load"),
        ("pytorch_model-00001-of-00002.bin", "00002.bin is a pickle, which xray does not load"),
        ("config.json", "config.json is not valid JSON"),
        ("tokenizer.json", "no usable tokenizer"),
        ("tokenizer_config.json", "tokenizer_config.json is not valid JSON"),
        ("added_tokens.json", "no usable tokenizer"),
        ("modules.json", "modules.json is not valid JSON"),
        ("1_Pooling/config.json", "config.json is not valid JSON"),
        ("generation_config.json", ""),  # not read
        ("vocab.json", ""),
        ("tokenizer.model", ""),
    ],
)
def test_llm_files_that_are_pickles_are_refused(
    demo: Path, tmp_path: Path, ran: Path, name: str, message: str
) -> None:
    for kind in ("plain", "torch"):
        change: dict[str, bytes | None] = {name: pickled(ran, kind)}
        if name.endswith(".bin"):
            change["model.safetensors"] = None
        load = llm_loader(demo, tmp_path / kind, change)
        if message:
            with pytest.raises(ConfigError, match=message) as error:
                load()
            assert str(tmp_path / kind) in str(error.value)
        else:
            load()
        assert not ran.exists()


def test_code_in_an_llm_folder_is_not_run(demo: Path, tmp_path: Path, ran: Path) -> None:
    """Loading never asks for permission to run it either."""
    code = f"import os\nos.mkdir({str(ran)!r})\n".encode()
    settings = json.loads((demo / "llm" / "config.json").read_text())
    named = {"auto_map": {"AutoConfig": "code.Config", "AutoModel": "code.Model"}}
    unknown = json.dumps({**settings, **named, "model_type": "unheard_of"}).encode()
    load = llm_loader(demo, tmp_path / "unknown", {"config.json": unknown, "code.py": code})
    with pytest.raises(ConfigError, match=r"config.json asks for its own Python code"):
        load()
    # A model type that transformers implements itself.
    own = json.dumps({**settings, **named}).encode()
    llm_loader(demo, tmp_path / "known", {"config.json": own, "code.py": code})()
    settings = json.loads((demo / "llm" / "tokenizer_config.json").read_text())
    named = {"auto_map": {"AutoTokenizer": ["code.Slow", "code.Fast"]}}
    own = json.dumps({**settings, **named, "tokenizer_class": "Fast"}).encode()
    llm_loader(demo, tmp_path / "tokenizer", {"tokenizer_config.json": own, "code.py": code})()
    assert not ran.exists()


def test_torch_load_refuses_pickles_for_all_libraries(tmp_path: Path, ran: Path) -> None:
    """DeepSpeed's checkpoint loading, which xray does not use, is covered as well."""
    (tmp_path / "evil.pt").write_bytes(pickled(ran))
    code = """
import sys, xray.commands.main, torch
from pickle import UnpicklingError
from deepspeed.runtime.checkpoint_engine.torch_checkpoint_engine import TorchCheckpointEngine
for load in (lambda x: torch.load(x, weights_only=False), TorchCheckpointEngine().load):
    try:
        load(sys.argv[1])
    except UnpicklingError as error:
        print("refused", "mkdir" in str(error))
"""
    switched_off = {**os.environ, "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD": "1", "DS_ACCELERATOR": "cpu"}
    command = [sys.executable, "-c", code, str(tmp_path / "evil.pt")]
    done = subprocess.run(command, capture_output=True, text=True, env=switched_off)
    assert done.stdout.count("refused True") == 2, done.stdout + done.stderr
    assert not ran.exists()
