"""Metrics of contrastive training; detects from them that it fails, and says what to change."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from stages.clip_config import ClipOptions
from xray.config import BlockConfig
from xray.losses.named import contrastive_loss

WARM = 0.1  # progress before which no warning is given
PATIENCE = 10  # consecutive checks that must agree
FEW = 64  # samples in a block below which a warning is given
LOOKED_AT = 256  # rows per rank that the alignment metrics are computed on


@torch.no_grad()
def alignment(image: Tensor, text: Tensor, captions: int) -> dict[str, Tensor]:
    """Compute mean cosines of positive and of all pairs, and in-batch top-1, on this rank."""
    image, text = image[:LOOKED_AT], text[: LOOKED_AT * captions : captions]
    with torch.autocast(image.device.type, enabled=False):  # bf16 would give many ties
        cosines = image @ text.t()
    right = cosines.argmax(dim=1) == torch.arange(len(image), device=image.device)
    return {
        "positive_cosine": cosines.diagonal().mean(),
        "mean_cosine": cosines.mean(),
        "top1": right.float().mean(),
    }


class ContrastGuard:
    """Monitor of the logged metrics of each block; gives each warning once."""

    def __init__(self, blocks: Sequence[BlockConfig], options: ClipOptions) -> None:
        self.blocks, self.options = blocks, options
        self._rows: dict[str, int] = {}  # problem -> consecutive checks with it
        self._given: set[str] = set()

    def check(self, values: Mapping[str, float], progress: float) -> list[str]:
        """Return the warnings that are due at a progress."""
        problems: dict[str, str] = {}
        for block in self.blocks:
            prefix = f"{block.source}/"
            own = {k.removeprefix(prefix): v for k, v in values.items() if k.startswith(prefix)}
            if block.samples < FEW and contrastive_loss(self.options.loss).needs_large_blocks:
                problems[f"few {block.source}"] = (
                    f"a block of {block.samples} samples of {block.source!r} has only "
                    f"{block.samples - 1} negatives for each sample: raise its samples in "
                    "data.blocks; a small train.micro_batch limits the memory"
                )
            if progress >= WARM and own:
                problems |= self._problems_of(block, own)
        self._rows = {problem: self._rows.get(problem, 0) + 1 for problem in problems}
        due = [
            problem
            for problem in problems
            if self._rows[problem] >= PATIENCE or problem.startswith("few")
        ]
        new = [problem for problem in due if problem not in self._given]
        self._given |= set(new)
        return [problems[problem] for problem in new]

    def _problems_of(self, block: BlockConfig, own: Mapping[str, float]) -> dict[str, str]:
        source, options, problems = block.source, self.options, {}
        chance = options.chance(block.samples)
        contrast = own.get("contrast", own["loss"])  # without auxiliary terms
        if contrast > 0.98 * chance:
            problems[f"stuck {source}"] = (
                f"the contrastive loss of {source!r} is {contrast:.2f}, and that of random "
                f"guessing is {chance:.2f}: nothing is learned. Set debug.overfit_batch=true to "
                "see if the model can learn one batch. If it can, change optim.base_lr, or check "
                "that captions belong to their pictures"
            )
        if own["mean_cosine"] > 0.95 and own["positive_cosine"] - own["mean_cosine"] < 0.01:
            problems[f"collapsed {source}"] = (
                f"all features of {source!r} are nearly equal (mean cosine "
                f"{own['mean_cosine']:.2f}): lower optim.base_lr or raise optim.warmup, "
                "and start again"
            )
        scale = own["logit_scale"]
        ceiling = options.logit_scale_max
        if scale > 0.999 * ceiling > options.first_scale:
            problems["clamped"] = (
                f"logit_scale is at clip.logit_scale_max={options.logit_scale_max:g}: this is "
                "usual late in a long run; if it happens early, lower optim.logit_scale_lr"
            )
        if scale < 0.5 * options.first_scale:
            problems["falling"] = (
                f"logit_scale fell from {options.first_scale:.1f} to {scale:.1f}: lower "
                "optim.base_lr or optim.logit_scale_lr, or raise clip.logit_scale (Lion needs it)"
            )
        return problems
