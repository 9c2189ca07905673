"""Text features that two processes write: at first rank 1 cannot write, then both continue.

usage: torchrun --nproc_per_node 2 text_feature_ranks.py LLM SHARDS OUT
OUT/error.RANK has the error that each rank raised, OUT/encoded.RANK the captions that it encoded
when it continued.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from data_pipelines.shards.source import open_source
from xray import dist
from xray.artifacts.language_model import Language
from xray.errors import DataError
from xray.precompute import text_features
from xray.precompute.config import TextFeaturesConfig
from xray.precompute.text_features import write_text_features
from xray.training.deepspeed_setup import init_distributed


def full_disk(*args: Any) -> None:
    """Raise the error of a full disk."""
    raise OSError("no space left on device")


def main() -> None:
    """Write the store twice."""
    llm, shards, out = sys.argv[1], sys.argv[2], Path(sys.argv[3])
    device = torch.device("cpu")
    init_distributed(device)
    source = dist.main_first(lambda: open_source("s", shards, "image"))
    config = TextFeaturesConfig(llm=llm, tune="none", workers=0, features="fp32")
    language, own = Language(config), f"{dist.rank()}"
    with pytest.MonkeyPatch.context() as patch:
        if dist.rank() == 1:
            patch.setattr(text_features, "save_table", full_disk)
        try:
            write_text_features(source, language, config, device)
        except DataError as error:
            (out / f"error.{own}").write_text(str(error))
    encoded: list[str] = []
    encode = text_features._encoded

    def counted(language: Any, tower: Any, texts: Any, settings: Any) -> Any:
        encoded.extend(texts)
        return encode(language, tower, texts, settings)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(text_features, "_encoded", counted)
        write_text_features(source, language, config, device)
    (out / f"encoded.{own}").write_text(json.dumps(encoded))
    dist.leave()


if __name__ == "__main__":
    main()
