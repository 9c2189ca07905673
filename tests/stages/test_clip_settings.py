"""Limits of the clip stage's settings."""

from __future__ import annotations

from pathlib import Path

import pytest
from tiny import settings, train

from xray.errors import ConfigError

REFUSED = [
    ("clip.logit_scale=0.5", r"clip\.logit_scale=0\.5 .*clip\.logit_scale_max=100"),
    ("clip.logit_scale=200", r"clip\.logit_scale=200"),
    ("clip.loss=sigmoid clip.logit_scale_max=5", r"clip\.logit_scale=10.*clip\.logit_scale_max=5"),
    ("clip.loss=other", r"clip\.loss"),
    ("clip.captions=0", r"clip\.captions"),
    ("clip.embed_dim=0", r"clip\.embed_dim"),
    ("clip.adapter_blocks=17", r"clip\.adapter_blocks=17"),
    ("clip.adapter_blocks=-1", r"clip\.adapter_blocks=-1"),
    ("clip.matryoshka=[4,16]", r"clip\.matryoshka: 16 .*clip\.embed_dim=16"),
    ("clip.matryoshka=[0]", r"clip\.matryoshka: 0"),
    ("clip.mask_ratio=1", r"clip\.mask_ratio=1"),
    ("clip.mask_ratio=-0.1", r"clip\.mask_ratio=-0\.1"),
    ("clip.mask_ratio=nan", r"clip\.mask_ratio=nan"),
    ("clip.mask_span=[0.5]", r"clip\.mask_span=\[0\.5\]"),
    ("clip.mask_span=[0.6,0.5]", r"clip\.mask_span=\[0\.6, 0\.5\]"),
    ("clip.mask_span=[0.5,1.5]", r"clip\.mask_span=\[0\.5, 1\.5\]"),
    ("optim.betas=[0.9]", r"optim\.betas=\[0\.9\]"),
    ("optim.clip_grad=-1", r"optim\.clip_grad=-1"),
    ("optim.warmup=1", r"optim\.warmup=1"),
    ("optim.vision.freeze=1.5", r"optim\.vision\.freeze=1\.5"),
    ("optim.text.freeze=-0.1", r"optim\.text\.freeze=-0\.1"),
    ("optim.vision.lr=0", r"optim\.vision: lr=0"),
    ("optim.text.layer_decay=0", r"optim\.text: .*layer_decay=0"),
    ("optim.vision.layer_decay=1.1", r"optim\.vision: .*layer_decay=1\.1"),
    ("optim.text.lr=0.1", r"optim\.text .*text\.tune=none"),
    ("text.max_length=0", r"text\.max_length=0"),
    ("text.latents=0", r"text\.latents=0"),
    ("text.lora_rank=-1", r"text\.lora_rank=-1"),
    ("text.features=int8 text.tune=full", r"text\.features=int8 .*text\.tune=none"),
    (
        "text.features=int8 text.tune=none text.bucket_by_length=true",
        r"text\.bucket_by_length .*text\.features=int8",
    ),
    ("text.tune=full text.dtype=bf16", r"text\.dtype=bf16 .*text\.tune=full"),
]


@pytest.mark.parametrize(("overrides", "message"), REFUSED)
def test_impossible_settings_are_refused_by_key(
    demo: Path, tmp_path: Path, overrides: str, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        settings("clip", demo, tmp_path, *overrides.split())


def test_settings_at_their_limits_are_accepted(demo: Path, tmp_path: Path) -> None:
    overrides = (
        "clip.logit_scale=100", "clip.adapter_blocks=0", "clip.matryoshka=[15,1]",
        "clip.mask_ratio=0.99", "clip.mask_span=[0.5,0.5]", "optim.warmup=0",
        "optim.vision.freeze=1", "optim.text.layer_decay=1", "optim.clip_grad=0",
    )  # fmt: skip
    assert settings("clip", demo, tmp_path, *overrides).clip.matryoshka == [15, 1]


def test_a_block_larger_than_its_source_is_warned_about(
    demo: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for samples, warned in ((96, False), (97, True)):
        blocks = f"data.blocks=[{{source: photos, samples: {samples}}}]"
        train("clip", demo, tmp_path / str(samples), blocks, f"train.samples={samples}")
        assert ("source photos has 96 samples, but a block 97" in caplog.text) == warned
