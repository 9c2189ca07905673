"""Job of `xray embed`: encodes all samples of a corpus into one file of embeddings.

The samples are split into parts by position, each written to its own file in `OUT.parts/`. Of n
processes each makes every nth part; rank 0 joins them. A part's rows do not depend on the process
that makes it, so one process and many write the same bytes.
"""

from __future__ import annotations

import hashlib
import json
import math
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from data_pipelines.ingest.user_data import Corpus
from data_pipelines.shards.columns import (
    Columns,
    open_first,
    pack_texts,
    save_columns,
    unpack_texts,
)
from data_pipelines.shards.side_files import user_cache
from xray import dist
from xray.artifacts.artifact import Artifact
from xray.artifacts.encoders import TextEncoder, VisionEncoder, data_of, restore_encoder
from xray.config.identity import differences
from xray.errors import BadSample, ConfigError, DataError
from xray.files import lock_folder, make_folder
from xray.models.inference import one_behind
from xray.precompute.inference import Place, Places, cut, pixels_of
from xray.progress import Progress
from xray.records import parse_record
from xray.search.config import EmbedConfig
from xray.search.embedding_file import (
    Block,
    Facts,
    Names,
    by_digest,
    check_out,
    open_embeddings,
    write_embeddings,
)
from xray.search.encoding import (
    of_patches,
    of_pixels,
    of_texts,
    patch_grid,
    set_keep_rate,
    warn_of_prefix,
    width_of,
)
from xray.search.pca import Pca
from xray.search.projection import projection
from xray.search.quantisation import calibrate, shortened

PARTS = 256  # per corpus, unless they would be too small or too large
LEAST, MOST = 256, 16_384  # samples per part
MOST_BYTES = 2**28  # of patch tokens per part, which then has fewer samples
Rows = tuple[Place, np.ndarray, list[str]]  # a sample, its rows [n, D], their texts
Found = tuple[list[Rows], dict[Place, str]]  # of one batch, and the cause of each bad sample


@dataclass(frozen=True)
class EmbedReport:
    """Result of an embedding job.

    left_out: samples without rows, by cause, listed in the file `listed`. reused: those of the
    `parts` that an earlier call made.
    """

    rows: int
    left_out: Mapping[str, int]
    listed: Path
    reused: int
    parts: int


def embed(
    encoder: VisionEncoder | TextEncoder,
    corpus: Corpus,
    config: EmbedConfig,
    out: Path,
    progress: Progress | None = None,
) -> EmbedReport:
    """Write the embeddings of a corpus, in its order; the same call continues an interrupted one.

    All ranks call it. Raises ConfigError for a modality that the artifact cannot encode and for an
    `out` of another job, DataError if nothing can be read.
    """
    check_out(out)
    pca = projection(config.pca, encoder.artifact, config.dim)
    job = dist.main_first(lambda: _Job(encoder, corpus, config, out, pca), "planning the parts")
    listed = out.with_name(f"{out.name}.left_out.jsonl")
    if dist.is_main() and pca is None and job.dim < job.width:
        warn_of_prefix(encoder, job.dim)
    todo: list[int] = []
    if not dist.main_first(job.finished):
        with dist.main_first(job.claim):
            missing = [part for part in range(len(job.parts)) if job.load(part) is None]
            todo = dist.broadcast_object(missing)  # another rank may have made some by now
            mine = todo[dist.rank() :: dist.world_size()]
            dist.together(lambda: job.run(mine, progress), dist.PREPARATION, doing="embedding")
            dist.together(lambda: job.finish(listed) if dist.is_main() else None, dist.PREPARATION)
        if dist.is_main():  # the lock is released
            shutil.rmtree(job.folder)
    facts, parts = open_embeddings(out).facts, len(job.parts)
    return EmbedReport(facts["rows"], facts["left_out"], listed, parts - len(todo), parts)


def cached_embeddings(
    artifact: Artifact, corpus: Corpus, progress: Progress | None = None
) -> tuple[Path, EmbedReport | None]:
    """Return the file in the user's cache with the embeddings of a corpus by an artifact.

    Also returns the report of the job, None if the file is there already. Raises as `embed`.
    """
    made_of = f"{artifact.digest} {corpus.digest} {corpus.modality}"
    name = hashlib.sha256(made_of.encode()).hexdigest()[:32]
    out = user_cache("embeddings") / f"{name}.parquet"
    if out.is_file():
        return out, None
    make_folder(out.parent, "the folder of embeddings", "XDG_CACHE_HOME")
    encoder = restore_encoder(artifact).to(dist.choose_device("auto"))
    return out, embed(encoder, corpus, EmbedConfig(), out, progress)


class _Job:
    """Request of an embedding job, and its finished parts."""

    def __init__(
        self,
        encoder: VisionEncoder | TextEncoder,
        corpus: Corpus,
        config: EmbedConfig,
        out: Path,
        pca: Pca | None = None,
    ) -> None:
        self.encoder, self.corpus, self.config, self.out = encoder, corpus, config, out
        self.pca = None if pca is None else pca.facts()
        self.places = Places(corpus.source, range(len(corpus.source.counts)))
        if not len(self.places):
            raise DataError(f"{corpus.where} contains no samples")
        self.text = corpus.modality == "text"
        self.grid = patch_grid(encoder, corpus.modality) if config.patches else []
        self.width = width_of(encoder, self.text, config.patches)
        self.dim = config.dim or self.width
        self.reduced: Callable[[np.ndarray], np.ndarray] = partial(shortened, dim=self.dim)
        if pca is not None:
            self.dim, self.reduced = len(pca.components), pca.project
        if self.dim > self.width:
            raise ConfigError(f"--dim {self.dim}: the artifact has {self.width} dimensions")
        set_keep_rate(encoder, config.keep_rate, self.text)
        encoder.precision = config.precision
        self.length = math.prod((*self.grid, self.dim))  # numbers per row
        size = min(max(LEAST, -(-len(self.places) // PARTS)), MOST)
        size = min(size, max(1, MOST_BYTES // (4 * self.length))) if self.grid else size
        self.parts = list(cut(range(len(self.places)), size))
        self.folder = out.with_name(f"{out.name}.parts")
        self.identity = {
            "artifact": encoder.artifact.digest,
            "source": corpus.digest,
            "modality": corpus.modality,
            "dim": self.dim,
            "keep_rate": None if self.text else cast(VisionEncoder, encoder).keep_rate,
            "precision": config.precision,
            "captions": config.captions,
            **({"grid": self.grid} if self.grid else {}),
        }
        if self.pca is not None:  # parts of older versions lack the key
            self.identity["pca"] = self.pca["digest"]

    def finished(self) -> bool:
        """Return True if the file is complete; raises ConfigError for a file of another command."""
        if not self.out.exists():
            return False
        asked = {"grid": None, "pca": None, **self.identity, "dtype": self.config.dtype}
        there = by_digest(open_embeddings(self.out).facts)
        changed = differences({name: there.get(name) for name in asked}, asked)
        if changed:
            raise ConfigError(
                f"{self.out} contains other embeddings ({'; '.join(changed)}): delete it, or "
                "choose another --out"
            )
        if dist.is_main() and self._claimed() == self.identity:  # a kill left them
            shutil.rmtree(self.folder)
        return True

    def claim(self) -> AbstractContextManager[object]:
        """Claim the folder of parts; raise ConfigError if it belongs to another command.

        Returns a context that holds the folder's lock, on rank 0.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        lock = lock_folder(self.folder, "written to", "--out") if dist.is_main() else None
        held = self._claimed()
        if held is None:
            (self.folder / "job.json").write_text(json.dumps(self.identity), "utf-8")
        elif changed := differences(held, self.identity):
            raise ConfigError(
                f"{self.folder} contains parts of another command ({'; '.join(changed)}): delete "
                "it, or choose another --out"
            )
        return lock or nullcontext()

    def _claimed(self) -> Any:
        """Return the job of the folder of parts; None if it is missing or incomplete."""
        try:
            return parse_record((self.folder / "job.json").read_bytes(), dict[str, Any])
        except (OSError, ValueError):
            return None

    def _path(self, part: int) -> Path:
        return self.folder / f"{part:06d}"

    def _facts_of(self, part: int) -> dict[str, Any]:
        numbers = self.parts[part]
        return {"job": self.identity, "samples": [numbers.start, numbers.stop]}

    def load(self, part: int) -> tuple[Columns, Mapping[str, Any]] | None:
        """Return the columns and facts of a part; None if it is missing or of another command."""
        columns, facts = open_first([self._path(part)], self._facts_of(part))
        return (columns, facts) if facts else None

    @torch.inference_mode()
    def run(self, todo: Sequence[int], progress: Progress | None) -> None:
        """Make some parts, in order."""
        batches = self._texts(todo) if self.text else self._media(todo)
        total, done = sum(len(self.parts[part]) for part in todo), 0
        for part in todo:
            numbers = self.parts[part]
            rows: list[Rows] = []
            bad: dict[Place, str] = {}
            while len(rows) + len(bad) < len(numbers):
                found, causes = next(batches)
                rows += found
                bad |= causes
                done += len(found) + len(causes)
                if progress is not None:
                    progress(done, total)
            self._save(part, rows, bad)

    def _save(self, part: int, rows: Sequence[Rows], bad: Mapping[Place, str]) -> None:
        names = [(*self.corpus.name(*place), text) for place, _, texts in rows for text in texts]
        columns: Columns = {}
        for at, name in enumerate(("keys", "paths", "texts")):
            columns[name], columns[f"{name}_ends"] = pack_texts(row[at] for row in names)
        none = np.empty((0, self.length), np.float32)
        columns["rows"] = np.concatenate([none, *(found for _, found, _ in rows)])
        wrong = np.flatnonzero(~np.isfinite(columns["rows"]).all(axis=1))
        if len(wrong):  # one row would make int8's scale, and so all rows, NaN
            key, path, _ = names[wrong[0]]
            raise DataError(f"{path}:{key}: the model's features are NaN or infinite")
        left_out = [[*self.corpus.name(*place), cause] for place, cause in bad.items()]
        save_columns(self._path(part), columns, {**self._facts_of(part), "left_out": left_out})

    def _media(self, todo: Sequence[int]) -> Iterator[Found]:
        """Yield rows of pictures or clips by batch; no batch spans two parts."""
        encode = of_patches(self.encoder) if self.grid else of_pixels(self.encoder)
        size = self.config.batch_size
        batches = (batch for part in todo for batch in cut(self.parts[part], size))
        data = data_of(self.encoder.artifact, self.config.workers)
        read = pixels_of(self.corpus.source, self.places, data, batches)

        def encoded() -> Iterator[tuple[Any, dict[str, Tensor]]]:
            for here, pixels, bad in read:
                rows = {} if pixels is None else {"rows": encode(pixels).float()}
                yield (here, bad), rows

        for (here, bad), batch in one_behind(encoded()):
            found: Any = batch["rows"].numpy() if batch else []
            if batch and not self.grid:
                found = self.reduced(found)
            yield [(p, row[None], [""]) for p, row in zip(here, found, strict=True)], bad

    def _texts(self, todo: Sequence[int]) -> Iterator[Found]:
        """Yield rows of all captions by part; texts of similar length share a batch."""
        encode, size = of_texts(self.encoder), self.config.batch_size
        for part in todo:
            own: list[tuple[Place, list[str]]] = []
            bad: dict[Place, str] = {}
            for number in self.parts[part]:
                place = self.places[number]
                try:
                    own.append((place, self.corpus.texts(*place)))
                except BadSample as error:
                    bad[place] = error.cause
            flat = [text for _, texts in own for text in texts]
            order = np.argsort([len(text) for text in flat], kind="stable")
            rows = np.empty((len(flat), self.dim), np.float32)
            batches = [order[at.start : at.stop] for at in cut(range(len(flat)), size)]
            encoded = (
                (some, {"rows": encode([flat[n] for n in some]).float()}) for some in batches
            )
            for some, batch in one_behind(encoded):
                rows[some] = self.reduced(batch["rows"].numpy())
            ends = np.cumsum([len(texts) for _, texts in own])
            parts = np.split(rows, ends[:-1]) if own else []
            yield [(p, r, t) for (p, t), r in zip(own, parts, strict=True)], bad

    def finish(self, listed: Path) -> None:
        """Join the parts, and list the samples that were left out."""
        counts, bad = 0, []
        low = np.full(self.length, np.inf, np.float32)
        high = -low
        for columns, facts in self._loaded():
            counts += len(columns["rows"])
            bad += facts["left_out"]
            low = np.minimum(low, columns["rows"].min(axis=0, initial=np.inf))
            high = np.maximum(high, columns["rows"].max(axis=0, initial=-np.inf))
        causes = dict(Counter(cause for _, _, cause in bad))
        if not counts:
            shutil.rmtree(self.folder, ignore_errors=True)  # its lock is still open
            told = ", ".join(f"{cause}: {n:,}" for cause, n in sorted(causes.items()))
            raise DataError(f"nothing in {self.corpus.where} can be embedded ({told})")
        whole = self._facts(counts, causes)
        if self.config.dtype == "int8":
            scale, offset = calibrate(low, high)
            whole |= {"scale": scale.tolist(), "offset": offset.tolist()}
        listed.unlink(missing_ok=True)  # may be of an earlier run
        if bad:
            rows = [dict(zip(("key", "path", "cause"), row, strict=True)) for row in bad]
            listed.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
        write_embeddings(self.out, whole, (self._block(columns) for columns, _ in self._loaded()))

    def _loaded(self) -> Iterator[tuple[Columns, Mapping[str, Any]]]:
        for part in range(len(self.parts)):
            found = self.load(part)
            if found is None:
                raise DataError(
                    f"{self._path(part)} is not here: all hosts must share the folder of --out"
                )
            yield found

    def _block(self, columns: Columns) -> Block:
        keys, paths, texts = (
            unpack_texts(columns[name], columns[f"{name}_ends"])
            for name in ("keys", "paths", "texts")
        )
        rows = columns["rows"].reshape(-1, *self.grid, self.dim)
        return rows, Names(keys, paths, texts if self.text else None)

    def _facts(self, rows: int, left_out: Mapping[str, int]) -> Facts:
        artifact, corpus = self.encoder.artifact, self.corpus
        made = {"digest": artifact.digest, "stage": artifact.stage, "where": artifact.origin}
        return {
            **self.identity,
            **({} if self.pca is None else {"pca": self.pca}),
            "rows": rows,
            "dtype": self.config.dtype,
            "width": self.width,
            "artifact": made,
            "source": {"digest": corpus.digest, "where": corpus.where, "kind": corpus.kind},
            "left_out": dict(left_out),
        }
