"""A stage's run in a folder: its config, data, parents and identity."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import IO, Any, Literal

import torch
from torch import Tensor

from data_pipelines.curation.tables import kept_sources
from data_pipelines.decode.device import cannot_decode
from data_pipelines.ingest.user_data import open_sources
from data_pipelines.shards.source import Source, check_same_on_all_ranks
from data_pipelines.stream.sampling import SamplePlan, make_plans
from stages.base import Parents, Stage, StageModule, split_parents
from stages.tuning import parameter_counts, set_trained
from xray import dist
from xray.artifacts.artifact import Artifact, open_artifact, write_artifact
from xray.artifacts.model_card import artifact_card
from xray.artifacts.offers import VISION
from xray.config import RunConfig, dump
from xray.config.identity import (
    config_hash,
    differences,
    hash_json,
    identity,
    with_older,
)
from xray.errors import ConfigError, DataError
from xray.files import lock_folder, write_text
from xray.models.lora import merged
from xray.training.checkpoint import complete_checkpoints
from xray.training.length import sizes_of
from xray.training.metrics import check_sinks
from xray.training.mirror import Mirror
from xray.training.open_settings import decided
from xray.training.run_record import as_begun, as_recorded, completed, recorded, run_record
from xray.training.state import TrainState
from xray.training.step_data import check_batches, check_loading
from xray.urls import conceal_all, redact_all

log = logging.getLogger("xray")


@dataclass
class Run:
    """A stage's run: config, checked data and parents, and the record that identifies it."""

    stage: Stage
    config: RunConfig
    parents: Parents
    sources: dict[str, Source]
    plans: dict[str, SamplePlan]  # of the training blocks, by source
    validation_plans: dict[str, SamplePlan]
    record: dict[str, Any]  # contents of run.json
    mirror: Mirror | None  # on rank 0, if train.mirror is set
    lock: IO[str] | None = None  # of the folder, on rank 0 from `begin` to `release`

    @classmethod
    def open(cls, stage_class: type[Stage], config: RunConfig) -> Run:
        """Open and check parents and data; writes nothing to the run's folder. Collective.

        Raises ConfigError, ArtifactError or DataError.
        """
        conceal_all(config)
        config.validate()
        config = as_begun(config)
        parents = split_parents(stage_class, [open_artifact(path) for path in config.init_from])
        stage = stage_class(config)
        check_batches(stage, config)
        check_sinks(config.train)
        names = [block.source for block in [*config.blocks, *config.validation]]
        opened = as_recorded(open_sources(config.data, names), config)

        def prepare() -> dict[str, Source]:
            kept = kept_sources(opened, config.data)
            stage.config = stage.config.with_length(sizes_of(kept))
            return stage.prepare(kept, parents)

        sources = dist.main_first(prepare, "preparing the data of the stage")
        config = stage.config  # as `prepare` completed it
        check_same_on_all_ranks(sources)
        dist.together(lambda: check_loading(stage, config, sources), doing="checking its limits")
        _warn_about_repeats(stage, config, sources)
        plans = make_plans(config.blocks, sources, config.data, config.seed)
        validation_plans = make_plans(config.validation, sources, config.data, config.seed)
        record = run_record(stage, config, sources, named(parents))
        url = config.train.mirror
        mirror = Mirror(url, stage.name, Path(config.out)) if url and dist.is_main() else None
        return cls(stage, config, parents, sources, plans, validation_plans, record, mirror)

    @property
    def out(self) -> Path:
        return Path(self.config.out)

    def check_folder(self, folder: Path | None = None, place: str = "") -> None:
        """Raise ConfigError if the run's folder, or a copy at a place, belongs to another run.

        Settings that the config leaves open become what the run that is there began with.
        """
        folder = folder or self.out
        place = place or str(folder)
        old = recorded(folder, self.config)
        if old:
            self._replace_config(with_older(self.config, old["config"]))
        if old and self.config.data.decode == "auto":
            self._decode_on(old["config"]["data"]["decode"])
        new = completed(json.loads(json.dumps(self.record)), self.config)
        changed = differences(redact_all(old), new) if old else []
        if changed:
            more = f" (and {len(changed) - 1} more)" if len(changed) > 1 else ""
            raise ConfigError(
                f"{place} contains another run: {changed[0]}{more}; choose another "
                f"{'train.mirror' if '://' in place else 'out'}=, or delete that folder"
            )

    def restore(self) -> None:
        """Check the folder and the mirror, and fetch a mirrored run into a new folder.

        Rank 0 goes first. Raises ConfigError if one of them contains another run, DataError if the
        folder is new and the mirror cannot be reached.
        """
        self.check_folder()
        mirror, begun = self.mirror, (self.out / "run.json").exists()
        if mirror is None:
            return
        try:
            mirrored = mirror.holds(lambda folder: self.check_folder(folder, mirror.url))
        except DataError as error:
            if not begun:
                raise
            log.warning("%s; the run continues with the files in %s", error, self.out)
            return
        if mirrored and not begun:
            mirror.fetch()

    def settle(self, device: torch.device) -> None:
        """Decide the settings that a new run leaves open, and check that it can decode. Collective.

        data.decode=auto becomes `gpu` if the devices of all ranks can decode JPEGs. Raises
        ConfigError.
        """
        weights = self.config.model if VISION in self.stage.offers else None
        self._replace_config(decided(self.config, self.parents.vision, weights))
        decode = dist.broadcast_object(self.config.data.decode)  # rank 0 knows an earlier decision
        if decode == "auto":
            reasons = dist.gather_objects(cannot_decode(device))
            decode = "cpu" if any(reasons) else "gpu"
            log.info("data.decode=auto: %s %s", decode, next(filter(None, reasons), ""))
        self._decode_on(decode)
        check_decoding(self.config, device)

    def _decode_on(self, decode: Literal["cpu", "gpu"]) -> None:
        self._replace_config(replace(self.config, data=replace(self.config.data, decode=decode)))

    def _replace_config(self, config: RunConfig) -> None:
        self.config = self.stage.config = config
        self.record = {**self.record, "config": identity(config)}

    def copy(self) -> None:
        """Start copying new checkpoints and the artifact to the mirror, if one is set."""
        if self.mirror is not None:
            artifact = [path for path in [self.out / "artifact"] if path.is_dir()]
            self.mirror.send([*complete_checkpoints(self.out / "checkpoints"), *artifact])

    def finished(self) -> Artifact | None:
        """Return the verified artifact of this run, if it was trained to the end before."""
        path = self.out / "artifact"
        if not path.exists():
            return None
        log.info("stage %s is finished: %s", self.stage.name, path)
        artifact = open_artifact(path)
        self.copy()  # an earlier copy may have been interrupted
        if self.mirror is not None:
            self.mirror.wait()
        return artifact

    def build(self) -> StageModule:
        """Return the module before the first step, equal on every rank."""
        torch.manual_seed(self.config.seed)
        module = self.stage.build(self.parents)
        set_trained(module, self.config.optim)
        return module

    def begin(self) -> None:
        """Lock the run's folder and write its config and record. Collective.

        Raises ConfigError if another process trains in the folder.
        """

        def write() -> None:
            self.out.mkdir(parents=True, exist_ok=True)
            self.lock = lock_folder(self.out, "trained in")
            dump(self.config, self.out / "config.yaml")
            if not (self.out / "run.json").exists():
                write_text(self.out / "run.json", json.dumps(self.record, indent=1))

        dist.on_main(write)

    def release(self) -> None:
        """Release the folder's lock."""
        if self.lock is not None:
            self.lock.close()

    def write_artifact(
        self,
        path: Path,
        module: StageModule,
        state_dict: dict[str, Tensor],
        state: TrainState,
        metrics: dict[str, float],
        weights: str,
    ) -> None:
        """Write the artifact of a module; weights: `last`, or `ema` for their moving average."""
        facts = {
            "stage": self.stage.name,
            "offers": sorted(self.stage.offers),
            "heads": dict(self.stage.heads),
            "summary": self.stage.summary,
            "config": asdict(self.config),
            "config_hash": config_hash(self.config),
            "data_digest": hash_json(self.record["data"]),
            "sources": self.record["data"],
            "inputs": self.record["inputs"],
            "parameters": parameter_counts(module, state_dict),
            "keep_rate": module.keep_rate(state.step / self.config.steps),
            "weights": weights,
            "step": state.step,
            "samples": state.samples,
            "seconds": round(state.seconds, 1),
            "bad_samples": state.bad,
            "metrics": metrics,
        }
        parts = self.stage.export(module, merged(module, state_dict))
        files = self.stage.export_files()
        write_artifact(path, parts, files, facts, named(self.parents), artifact_card)


def named(parents: Parents) -> dict[str, Artifact]:
    """Return the parent artifacts by slot, without empty slots."""
    return {slot: artifact for slot, artifact in vars(parents).items() if artifact is not None}


def _warn_about_repeats(stage: Stage, config: RunConfig, sources: Mapping[str, Source]) -> None:
    """Warn if a block holds a sample twice: a contrastive loss would contrast it with itself."""
    for block in filter(lambda block: stage.contrasts(block.source), config.blocks):
        available = len(sources[block.source])
        if block.samples > available and dist.is_main() and not config.debug.overfit_batch:
            log.warning(
                "source %s has %d samples, but a block %d: samples are contrasted with themselves; "
                "set its samples in data.blocks to %d or less",
                *(block.source, available, block.samples, available),
            )


def samples_of(run: Run, step: int) -> dict[str, list[dict[str, Any]]]:
    """Position, shard and key of the samples that a step draws, by source."""
    drawn = 0 if run.config.debug.overfit_batch else step
    samples: dict[str, list[dict[str, Any]]] = {}
    for block in run.config.blocks:
        plan = run.plans[block.source]
        positions = plan.positions(drawn, block.samples // run.config.data.views)
        shards, slots = plan.locate(positions)
        rows = zip(positions.tolist(), shards.tolist(), slots.tolist(), strict=True)
        samples[block.source] = [
            {
                "position": position,
                "shard": plan.source.manifest.name(shard),
                "key": plan.source.index(shard).key(plan.source.member(shard, slot)),
            }
            for position, shard, slot in rows
        ]
    return samples


def check_decoding(config: RunConfig, device: torch.device) -> None:
    """Raise ConfigError if data.decode=gpu, but the device of a rank cannot decode. Collective."""

    def check() -> None:
        reason = cannot_decode(device) if config.data.decode == "gpu" else ""
        if reason:
            raise ConfigError(f"data.decode=gpu: {reason}; set data.decode to cpu")

    dist.together(check)
