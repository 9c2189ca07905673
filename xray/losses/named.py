"""Losses that a config names, and what a config needs to know of them; all without torch."""

from __future__ import annotations

import importlib
import math
from abc import ABC, abstractmethod
from collections.abc import Iterable
from typing import TYPE_CHECKING, ClassVar

from xray.errors import ConfigError, nearest

if TYPE_CHECKING:
    from torch import Tensor

    from xray.losses.tags import TagLoss


class ContrastiveLoss(ABC):
    """A contrastive loss, with the values that its parameters start from and its chance level."""

    logit_scale: ClassVar[float]  # at the start of training
    needs_large_blocks: ClassVar[bool] = True  # each sample is compared only with its block

    def logit_bias(self, samples: int) -> float | None:
        """Return the initial bias for blocks of this size; None if the loss has no bias."""
        return None

    @abstractmethod
    def chance(self, samples: int, captions: int = 1) -> float:
        """Compute the loss of a block if all features are equal; captions: per sample."""

    @abstractmethod
    def __call__(
        self, queries: Tensor, keys: Tensor, scale: Tensor, bias: Tensor | None, *ids: Tensor | None
    ) -> Tensor:
        """Compute the loss; queries, keys, and ids of both as in `info_nce`."""


class InfoNce(ContrastiveLoss):
    """Symmetric InfoNCE, with CLIP's initial temperature (2103.00020)."""

    logit_scale = 1 / 0.07

    def chance(self, samples: int, captions: int = 1) -> float:
        return math.log(samples) + math.log(captions) / 2

    def __call__(
        self, queries: Tensor, keys: Tensor, scale: Tensor, bias: Tensor | None, *ids: Tensor | None
    ) -> Tensor:
        from xray.losses.contrastive import info_nce

        return info_nce(queries, keys, scale, *ids)


class Sigmoid(ContrastiveLoss):
    """SigLIP's sigmoid loss; at its initial bias a pair is as likely as one of a block."""

    logit_scale = 10.0
    needs_large_blocks = False

    def logit_bias(self, samples: int) -> float:
        return -math.log(samples)

    def chance(self, samples: int, captions: int = 1) -> float:
        p = 1 / samples
        return -math.log(p) - (samples - 1) * math.log1p(-p) if samples > 1 else 0.0

    def __call__(
        self, queries: Tensor, keys: Tensor, scale: Tensor, bias: Tensor | None, *ids: Tensor | None
    ) -> Tensor:
        from xray.losses.contrastive import sigmoid_loss

        assert bias is not None
        return sigmoid_loss(queries, keys, scale, bias, *ids)


CONTRASTIVE_LOSSES: dict[str, ContrastiveLoss] = {"info_nce": InfoNce(), "sigmoid": Sigmoid()}


def contrastive_loss(name: str) -> ContrastiveLoss:
    """Find a contrastive loss; raises ConfigError naming the key for an unknown one."""
    if name not in CONTRASTIVE_LOSSES:
        raise _unknown("clip.loss", name, CONTRASTIVE_LOSSES)
    return CONTRASTIVE_LOSSES[name]


# Their classes need torch: `module:Class`, imported on first use.
TAG_LOSSES = {
    "softmax": "xray.losses.tags:SoftmaxLoss",
    "bce": "xray.losses.tags:BinaryLoss",
    "asymmetric": "xray.losses.tags:AsymmetricLoss",
}


def tag_loss(name: str, key: str = "hashtag.loss") -> type[TagLoss]:
    """Import a tag loss; raises as check_tag_loss does."""
    check_tag_loss(name, key)
    module, kind = TAG_LOSSES[name].split(":")
    found: type[TagLoss] = getattr(importlib.import_module(module), kind)
    return found


def check_tag_loss(name: str, key: str) -> None:
    """Raise ConfigError naming the key for an unknown tag loss."""
    if name not in TAG_LOSSES:
        raise _unknown(key, name, TAG_LOSSES)


def _unknown(key: str, name: str, names: Iterable[str]) -> ConfigError:
    return ConfigError(
        f"{key}={name} is unknown: there are {', '.join(names)}{nearest(name, names)}"
    )
