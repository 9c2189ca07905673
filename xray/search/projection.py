"""PCA of an embedding job: read from an embedding file, or fitted on its rows."""

from __future__ import annotations

from pathlib import Path

from xray import dist
from xray.artifacts.artifact import Artifact
from xray.errors import ConfigError
from xray.search.embedding_file import open_embeddings
from xray.search.pca import Pca
from xray.search.quantisation import restored
from xray.words import count


def projection(file: str, artifact: Artifact, dim: int) -> Pca | None:
    """Return the PCA of --pca on all ranks, read or fitted on rank 0; None for no file.

    dim: number of components, 0 = all. Raises ConfigError for an embedding file that PCA cannot be
    fitted on, that another artifact made, or that gives fewer components.
    """
    if not file:
        return None
    made: list[Pca] = []

    def make() -> None:
        made.append(_pca_of(Path(file), artifact, dim))

    dist.on_main(make, dist.PREPARATION, "fitting PCA")
    pca: Pca = dist.broadcast_object(made[0] if made else None)
    return pca


def _pca_of(path: Path, artifact: Artifact, dim: int) -> Pca:
    found = open_embeddings(path)
    facts = found.facts
    if facts["artifact"]["digest"] != artifact.digest:
        raise ConfigError(
            f"--pca {path} was made by artifact {facts['artifact']['digest'][:12]}, not by "
            f"{artifact.path} ({artifact.digest[:12]})"
        )
    if "grid" in facts:
        raise ConfigError(f"--pca {path} has patch tokens: name embeddings of whole pictures")
    pca = Pca.of(facts)
    if pca is None:
        whole = facts["dim"] == facts["width"] and facts["dtype"] != "binary"
        if not whole or len(found) < 2:
            raise ConfigError(
                f"--pca {path}: PCA is fitted on two embeddings or more with all features, in "
                f"fp32, fp16 or int8; the file has {count(len(found), 'row')} of {facts['dim']} "
                f"of {facts['width']} features in {facts['dtype']}"
            )
        pca = Pca.fit(restored(rows, facts) for rows in found.chunks())
    if dim > len(pca.components):
        raise ConfigError(f"--dim {dim}: --pca {path} gives {len(pca.components)} components")
    return pca.first(dim or len(pca.components))
