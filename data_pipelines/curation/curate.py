"""Curation of a pool of image-text samples by metadata (MetaCLIP 2309.16671, 2507.22062).

    texts   filters, then entries found in each text        per shard, in processes
    left    leaks, duplicates and caps over the whole pool  on hashes; only if configured
    counts  texts per entry -> t per language -> p_e        [E] numbers
    kept    texts drawn by the sampling                     per shard, in processes

The result of each step is a sidecar whose name contains a hash of its settings, so existing results
are reused. Sampling comes last, on the texts that the other steps left. Only the hashes of `left`
need memory that grows with the pool.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from data_pipelines.curation.balance import Balance, balance, count_entries
from data_pipelines.curation.config import CurationConfig
from data_pipelines.curation.dedup import MediaHasher
from data_pipelines.curation.filters import NO_METADATA, open_scores
from data_pipelines.curation.metadata import Metadata, read_metadata
from data_pipelines.curation.pool import Decision, Pool, decide, decision_in
from data_pipelines.curation.report import CurationReport, add_sampling, report_on_texts
from data_pipelines.curation.tables import (
    KeptSlots,
    TextMatcher,
    TextTables,
    language_function,
    sample_texts,
)
from data_pipelines.ingest.recode import TEMPORARY
from data_pipelines.ingest.tar_writer import check_flat_names, flat_name, new_tar
from data_pipelines.shards.process_pool import Progress, over_shards
from data_pipelines.shards.sidecar import Sidecar, Work, open_sidecar, write_sidecar
from data_pipelines.shards.source import Source, open_source
from data_pipelines.text.captions import metadata_of, read_captions
from xray.config.identity import hash_json
from xray.errors import ConfigError, DataError
from xray.files import replacing, sole_writer
from xray.records import parse_record


@dataclass(frozen=True)
class Curated:
    """Result of a curation."""

    config: CurationConfig
    source: Source  # the pool, with the kept samples as slots
    kept: Sidecar  # the kept members and texts
    report: CurationReport  # effect of each step

    @property
    def slots(self) -> KeptSlots:
        """Slots of the kept samples."""
        return KeptSlots(self.kept)


def curate(source: Source, config: CurationConfig, progress: Progress | None = None) -> Curated:
    """Choose samples and texts of a pool; raises ConfigError, DataError if none is left."""
    config.validate()
    metadata = read_metadata(config.metadata, config.casefold)
    reference = metadata.of(config.reference, "reference") if config.reference else -1
    if config.fallback:
        metadata.of(config.fallback, "fallback")
    make = _Maker(source, config, progress)
    texts = make.texts(metadata)
    left, decision = make.left(texts)
    pool, report = TextTables(texts, left), report_on_texts(texts, decision, config)
    counts = count_entries(pool, len(metadata))
    languages = [metadata.slice(number) for number in range(len(metadata.languages))]
    t = config.t if not metadata.all_texts else max(1.0, float(counts.sum()))
    drawn = balance(counts, languages, t, reference)
    kept = make.kept(pool, drawn)
    add_sampling(report, pool, kept, metadata, drawn)
    if not report.kept[0]:
        raise DataError(
            f"no sample of source {source.name!r} is left; of {report.read[0]:,}, these steps "
            f"dropped: {report.losses()}; change their settings or the metadata"
            f"{_hint(report, config)}"
        )
    return Curated(config, source.with_slots(KeptSlots(kept)), kept, report)


def _hint(report: CurationReport, config: CurationConfig) -> str:
    """Return more advice for the error, if steps that depend on languages dropped samples."""
    if not {"languages", NO_METADATA} & {step.name for step in report.steps if step.samples}:
        return ""
    return (
        f", or the origin of the language of a text: language={config.language} "
        "(a JSON field, or package.module:function)"
    )


@dataclass(frozen=True)
class _Maker:
    """Maker of the sidecars of the steps; existing ones are reused."""

    source: Source
    config: CurationConfig
    progress: Progress | None

    def texts(self, metadata: Metadata) -> Sidecar:
        """Filter the texts of all samples and match them with the metadata."""
        config, name = self.config, self.config.filters.scores
        if ":" in config.language:
            language_function(config.language)  # raise its errors here, not in a worker process
        scored = open_scores(self.source, name) if name else None
        settings = {
            **config.matching_settings(),
            "metadata": metadata.digest,
            "scores": scored.digest if scored is not None else "",
        }
        work = TextMatcher(self.source, metadata, config, scored)
        return self._made(self.source, "texts", work, settings)

    def left(self, texts: Sidecar) -> tuple[Sidecar | None, Decision]:
        """Run the steps that need the whole pool; returns no sidecar if none of them is set."""
        config, dedup = self.config, self.config.dedup
        limits = config.filters.same_text, config.filters.per_value
        if not (dedup.media or dedup.embeddings or any(limits)):
            return None, Decision()
        hashes = self._hashes(self.source) if dedup.media else None
        evaluation = self._evaluation()
        embeddings = open_sidecar(self.source, dedup.embeddings) if dedup.embeddings else None
        settings = {
            "texts": texts.digest,
            "dedup": vars(dedup),
            "limits": limits,
            "seed": config.seed,
            "hashes": hashes.digest if hashes is not None else "",
            "evaluation": {name: sidecar.digest for name, sidecar in evaluation.items()},
            "embeddings": embeddings.digest if embeddings is not None else "",
        }
        name = _named("left", settings)
        left = open_sidecar(self.source, name)
        if left is None:
            pool = Pool(self.source, texts, config.seed)
            decision = decide(pool, config, hashes, evaluation)
            left = write_sidecar(self.source, name, pool.table, asdict(decision))
        return left, decision_in(left.facts)

    def kept(self, pool: TextTables, drawn: Balance) -> Sidecar:
        """Draw the texts to keep."""
        settings = {
            "pool": pool.digest,
            "thresholds": drawn.thresholds,
            "seed": self.config.seed,
            "captions": self.config.captions,  # they define the numbers of the texts
        }
        work = partial(sample_texts, pool, drawn.rates, self.config.seed)
        return self._made(self.source, "kept", work, settings)

    def _evaluation(self) -> dict[str, Sidecar]:
        """Hash the media of the evaluation sets; raises DataError for unusable shards."""
        hashes = {}
        for name, pattern in self.config.dedup.evaluation.items():
            kinds = self.source.modality, "", self.source.animations
            hashes[name] = self._hashes(open_source(name, pattern, *kinds, self.source.cache))
        return hashes

    def _hashes(self, source: Source) -> Sidecar:
        dedup = self.config.dedup
        perceptual = dedup.perceptual or bool(dedup.evaluation)
        work = MediaHasher(source, dedup.sha256, perceptual)
        return self._made(source, "hashes", work, {"sha256": dedup.sha256, "looks": perceptual})

    def _made(self, source: Source, kind: str, work: Work, settings: Mapping[str, Any]) -> Sidecar:
        """Open the sidecar with these settings, or make it by the configured engine."""
        name = _named(kind, {**settings, "source": source.digest})
        existing, workers = open_sidecar(source, name), self.config.workers
        if existing is not None:
            return existing
        if self.config.engine == "ray":
            from data_pipelines.curation.ray_engine import make_tables

            make_tables(source, name, work, workers, self.progress)
            return write_sidecar(source, name, work, settings)  # writes only the summary
        return write_sidecar(source, name, work, settings, workers, self.progress)


def _named(kind: str, settings: Mapping[str, Any]) -> str:
    return f"{kind}-{hash_json(settings)[:12]}"


RECORD = "curation.json"


def write_shards(
    curated: Curated, out: Path, workers: int = 1, progress: Progress | None = None
) -> int:
    """Write the kept samples to a folder, and return their number.

    Keys and files are the same as in the pool, except that the JSON gets a field "curation":
    {"captions": [{text, weight, language}], "numbers": [positions in the captions of the sample]}.
    Readers prefer these captions to the original ones. Raises ConfigError for a folder with other
    shards.
    """
    check_folder(out, curated.source)
    work = _Writer(curated.source, curated.slots, curated.config.captions, out)
    with sole_writer(out, "--out"):
        _claim(out, curated)
        return sum(over_shards(work, len(curated.source.manifest), workers, progress))


def check_folder(out: Path, source: Source) -> None:
    """Check that a curation of a source can be written to a folder.

    Raises ConfigError, and DataError for two shards that would be written to one file.
    """
    if out.exists() and not out.is_dir():
        raise ConfigError(f"{out} is a file: choose a folder to write to")
    if out.resolve() == Path(source.manifest.folder).resolve():
        raise ConfigError(f"{out} is the pool itself: choose another folder to write to")
    if any(out.glob("*.tar")) and not (out / RECORD).is_file():
        raise ConfigError(f"{out} contains other shards: choose another folder")
    check_flat_names(source.manifest.names)


def _claim(out: Path, curated: Curated) -> None:
    """Record the curation in its folder; raises ConfigError if it has another."""
    for path in out.glob(f"{TEMPORARY}*"):
        path.unlink(missing_ok=True)
    wanted = {"kept": curated.kept.digest, "manifest": curated.source.manifest.digest}
    if any(out.glob("*.tar")):
        try:
            recorded = parse_record((out / RECORD).read_bytes(), dict[str, str])
        except (OSError, ValueError):
            recorded = None
        if recorded != wanted:
            raise ConfigError(
                f"{out} contains another curation: choose another folder or delete it"
            )
    (out / RECORD).write_text(json.dumps(wanted, indent=1) + "\n", "utf-8")


@dataclass(frozen=True)
class _Writer:
    """Function that writes one shard; pickled to the worker processes."""

    source: Source
    slots: KeptSlots
    captions: dict[str, float]
    out: Path

    def __call__(self, shard: int) -> int:
        """Write the kept samples of a shard, and return their number."""
        members, _ = self.slots.of(shard)
        target = self.out / flat_name(self.source.manifest.name(shard))
        if not len(members) or target.is_file():
            return len(members)  # readers refuse a tar without samples, so write none
        temporary = target.with_name(f"{TEMPORARY}{target.name}.{os.getpid()}")
        with replacing(target, temporary), new_tar(temporary) as add:
            for slot, member in enumerate(members.tolist()):
                key = self.source.index(shard).safe_key(member)
                add(key, self._curated(shard, member, self.slots.texts(shard, slot)))
        return len(members)

    def _curated(self, shard: int, member: int, numbers: np.ndarray) -> dict[str, bytes]:
        """Read a sample and add the kept captions to its JSON."""
        files = self.source.read(shard, member)
        captions = read_captions(files, self.captions)
        kept = [asdict(captions[number]) for number in numbers.tolist()]
        record = {"captions": kept, "numbers": numbers.tolist()}
        content = json.dumps({**metadata_of(files), "curation": record}).encode()
        return {**files, "json": content}
