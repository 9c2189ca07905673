"""Compilation of the transformer blocks of a model with torch.compile."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from timm.models.vision_transformer import Block
from torch import nn

from xray.errors import ConfigError
from xray.models.backbone import VisionBackbone
from xray.models.text_tower import TextTower

# Graphs per function. Each kind of block and each mode (gradient, no gradient, evaluation) needs
# one or two; torch's limit of 8 is too low for them, and beyond it blocks run without compilation.
LIMIT = 64


def compile_blocks(module: nn.Module, backend: str = "inductor") -> None:
    """Compile all transformer blocks in a module, for any number of tokens.

    These are the blocks of backbones, with or without token reduction, of decoders and adapters,
    and the layers of language models. `explained_limit` reports too many compilations. Compiled
    code of earlier stages is dropped: it would count too.
    """
    import torch._dynamo

    torch._dynamo.reset()
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, LIMIT)
    torch._dynamo.config.fail_on_recompile_limit_hit = True
    for part in module.modules():
        if isinstance(part, Block):
            part.compile(backend=backend)
        elif isinstance(part, VisionBackbone):
            part.run_block = torch.compile(part.run_block, backend=backend)
        elif isinstance(part, TextTower):
            for layer in part.layers:
                layer.compile(backend=backend)


@contextlib.contextmanager
def explained_limit() -> Iterator[None]:
    """Raise ConfigError in place of torch's error if the limit of compilations is reached."""
    try:
        yield
    except Exception as error:
        # by name, because importing torch._dynamo takes seconds
        if type(error).__name__ != "FailOnRecompileLimitHit":
            raise
        raise ConfigError(
            f"train.compile=true: a block was compiled {LIMIT} times, for too many kinds of inputs;"
            " torch's warning `hit config.recompile_limit` names the function and the last reason."
            " Set train.compile=false to go on without compilation"
        ) from error
