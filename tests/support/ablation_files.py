"""Ablation files for tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from child_process import RECIPE

from xray.ablations.trials import load_ablation

FILE = f"""
base: {RECIPE}
seeds: [0, 1]
baseline: all_tokens
common: {{stages: [mae, clip], eval.zero_shot.shards: ""}}
arms:
  all_tokens: {{clip.model.keep_rate: 1.0}}
  half: {{clip: {{model: {{keep_rate: 0.5}}}}}}
metrics: [retrieval.text_to_image_R@5, clip.photos/loss]
"""


def load(tmp_path: Path, text: str, *overrides: str) -> Any:
    """Write an ablation file and load it."""
    return load_ablation(write(tmp_path / "a.yaml", text), ["data.root=somewhere", *overrides])


def write(path: Path, text: str = FILE) -> str:
    """Write an ablation file and return its path."""
    path.write_text(text)
    return str(path)
