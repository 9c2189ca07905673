"""Principal components of embeddings: fitted on training embeddings, stored in the file.

The facts of an embedding file whose rows were projected hold the projection as `pca`: safetensors
in base64, their sha256, the number of samples of the fit, and the share of the variance that is
kept. Queries are projected by the same. Files without `pca` hold the features themselves.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load, save

from xray.search.quantisation import normalised, shortened


@dataclass(frozen=True)
class Pca:
    """Directions of the largest variance of embeddings of D features."""

    mean: np.ndarray  # [D] float32
    components: np.ndarray  # [K, D] float32, orthonormal, the largest variance first
    variance: np.ndarray  # [K] float32, along each component
    samples: int  # number of embeddings it was fitted on
    total: float  # variance of all D features

    @classmethod
    def fit(cls, blocks: Iterable[np.ndarray]) -> Pca:
        """Fit all components to blocks of rows [n, D]; holds D x D numbers.

        The sign of a component is that of its largest entry, so that equal rows give an equal
        file. N rows have at most N - 1 components. Raises ValueError for fewer than two rows.
        """
        samples, total, products = 0, np.float64(0), np.float64(0)
        for rows in blocks:
            own = rows.astype(np.float64)
            samples += len(own)
            total, products = total + own.sum(axis=0), products + own.T @ own
        if samples < 2:
            raise ValueError(f"{samples} embeddings have no principal components")
        mean = total / samples
        covariance = (products - samples * np.outer(mean, mean)) / (samples - 1)
        values, vectors = np.linalg.eigh(covariance)
        kept = min(samples - 1, len(mean))
        components = vectors.T[::-1][:kept]
        largest = np.abs(components).argmax(axis=1)[:, None]
        components = components * np.sign(np.take_along_axis(components, largest, axis=1))
        variance = values[::-1][:kept].clip(min=0)
        mean, components, variance = (x.astype(np.float32) for x in (mean, components, variance))
        return cls(mean, components, variance, samples, float(np.trace(covariance)))

    def first(self, dim: int) -> Pca:
        """Return the projection to the first `dim` components."""
        return replace(self, components=self.components[:dim], variance=self.variance[:dim])

    def project(self, rows: np.ndarray) -> np.ndarray:
        """Return the components of rows [N, D], normalised: [N, K] float32."""
        return normalised((rows.astype(np.float32) - self.mean) @ self.components.T)

    def facts(self) -> dict[str, Any]:
        """Return the projection for the facts of an embedding file."""
        names = ("mean", "components", "variance")
        content = save({name: np.ascontiguousarray(getattr(self, name)) for name in names})
        kept = float(self.variance.sum(dtype=np.float64)) / self.total if self.total else 0.0
        return {
            "digest": hashlib.sha256(content).hexdigest(),
            "samples": self.samples,
            "total": self.total,
            "variance_kept": kept,
            "tensors": base64.b64encode(content).decode(),
        }

    @classmethod
    def of(cls, facts: Mapping[str, Any]) -> Pca | None:
        """Read the projection from the facts of an embedding file; None if it has none.

        Raises ValueError for one that is damaged or of other sizes than the facts say.
        """
        own = facts.get("pca")
        if own is None:
            return None
        try:
            tensors = load(base64.b64decode(own["tensors"], validate=True))
            mean, components, variance = (tensors[k] for k in ("mean", "components", "variance"))
            samples, total = int(own["samples"]), float(own["total"])
        except (SafetensorError, LookupError, TypeError) as error:
            raise ValueError(f"its pca cannot be read: {error}") from error
        width, dim = facts["width"], facts["dim"]
        if (mean.shape, components.shape, variance.shape) != ((width,), (dim, width), (dim,)):
            raise ValueError(f"its pca does not project {width} features to {dim}")
        return cls(mean, components, variance, samples, total)


def shaped(rows: np.ndarray, facts: Mapping[str, Any]) -> np.ndarray:
    """Return features [N, width] as an embedding file has them: [N, dim] float32, normalised."""
    pca = Pca.of(facts)
    return shortened(rows, facts["dim"]) if pca is None else pca.project(rows)
