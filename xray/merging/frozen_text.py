"""Sentence vectors of a text tower that all mixtures share, computed once."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

from torch import Tensor, nn

from xray.artifacts.artifact import Artifact

Vectors = dict[str, Tensor]  # on the CPU, by the hash of their batch's tokens


class RememberingTower(nn.Module):
    """Text tower that encodes each batch of captions once, also for towers of the same weights."""

    def __init__(self, tower: nn.Module, known: Vectors) -> None:
        super().__init__()
        self.tower, self.known = tower, known

    def forward(self, **tokens: Tensor) -> Tensor:
        """Encode tokens [..., L] to [..., W]."""
        state = hashlib.sha256()
        for name, own in sorted(tokens.items()):
            state.update(f"{name} {list(own.shape)}".encode())
            state.update(own.cpu().numpy().tobytes())
        key = state.hexdigest()
        if key not in self.known:
            self.known[key] = self.tower(**tokens).detach().cpu()
        return self.known[key].to(tokens["input_ids"].device)


def share_text(artifacts: Sequence[Artifact]) -> bool:
    """Check if all artifacts have the same text tower: then mixtures have it, too."""
    files = [artifact.manifest["files"] for artifact in artifacts]
    return all("text.safetensors" in own for own in files) and (
        len({own["text.safetensors"] for own in files}) == 1
    )
