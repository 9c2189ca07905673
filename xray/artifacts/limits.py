"""Limits of the numbers in a manifest, checked before anything is built with them.

They are far above every real model, and stop a forged or damaged manifest from taking the memory or
the time of the machine. What is below them is compared with the stored tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, TypeVar

from xray.errors import ArtifactError

if TYPE_CHECKING:  # an artifact that is not there is reported without torch
    from torch import Tensor, nn

M = TypeVar("M", bound="nn.Module")
WIDTH, DEPTH, COUNT = 1 << 16, 1 << 10, 1 << 30
# Largest values by the last part of a setting's key, in every section of the config.
LARGEST = {
    **dict.fromkeys(("embed_dim", "decoder_dim", "latents", "lora_rank", "patch_size"), WIDTH),
    **dict.fromkeys(("num_heads", "decoder_heads", "mlp_ratio", "keep_rate_levels"), WIDTH),
    **dict.fromkeys(("depth", "decoder_depth", "adapter_blocks", "tubelet", "reg_tokens"), DEPTH),
    **{"reduce_at": DEPTH, "matryoshka": WIDTH, "resolution": 1 << 14, "frames": 1 << 14},
    **{"img_size": 1 << 14, "max_length": 1 << 20, "micro_batch": COUNT, "samples": 1 << 60},
    **{"tokens_per_batch": COUNT, "views": COUNT, "workers": WIDTH, "mean": 1e3, "std": 1e3},
}
LONGEST = 1 << 14  # items of a list
SLACK = 1 << 20  # numbers that a module may have beyond twice the stored ones


def check_numbers(manifest: Mapping[str, Any], where: str) -> None:
    """Raise ArtifactError naming the first field of a manifest whose number is out of bounds."""
    for key, value in _fields(manifest["config"], "config"):
        largest = WIDTH if ".kwargs." in key else LARGEST.get(key.rpartition(".")[2])
        largest = LARGEST.get(key.rpartition(".")[2], largest)
        if largest is not None:
            _check(value, largest, f"{where}: {key}")
    _check(manifest.get("keep_rate", 1.0), 1, f"{where}: keep_rate")


def sized(artifact: Any, part: Mapping[str, Tensor], field: str, build: Callable[[], M]) -> M:
    """Build a module if its parameters are about as many as those stored for it.

    field: the settings that size it. Raises ArtifactError naming it.
    """
    check_size(artifact, part, field, build)
    return build()


def check_size(
    artifact: Any, part: Mapping[str, Tensor], field: str, build: Callable[[], nn.Module]
) -> None:
    """Raise ArtifactError if a module would need far more memory than the stored tensors."""
    import torch

    with torch.device("meta"):
        needed = sum(weights.numel() for weights in build().parameters())
    stored = sum(tensor.numel() for tensor in part.values())
    if needed > 2 * stored + SLACK:
        raise ArtifactError(
            f"{artifact.path}: {field} in its manifest asks for {needed:,} weights, and it stores "
            f"{stored:,}: the manifest is damaged"
        )


def _fields(value: Any, key: str) -> Iterator[tuple[str, Any]]:
    """Yield (dotted key, value) of every setting; a list of sections counts as sections."""
    if isinstance(value, Mapping):
        for name, item in value.items():
            yield from _fields(item, f"{key}.{name}")
    elif isinstance(value, list) and value and all(isinstance(item, Mapping) for item in value):
        for number, item in enumerate(value):
            yield from _fields(item, f"{key}.{number}")
    else:
        yield key, value


def _check(value: Any, largest: float, field: str) -> None:
    """Check a number, or the numbers of a list of numbers or of pairs."""
    if isinstance(value, list):
        if len(value) > LONGEST:
            raise ArtifactError(f"{field} has {len(value):,} items, at most {LONGEST:,} are read")
        for item in value:
            _check(item, largest, field)
    elif isinstance(value, int | float) and not -largest <= value <= largest:
        raise ArtifactError(f"{field}={str(value)[:40]} must be at most {largest:,}")
