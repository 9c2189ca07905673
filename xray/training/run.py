"""A stage's run in a folder: its data, its parents and what it is, whether or not it is trained."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from data_pipelines.curation.keep_list import keep_listed
from data_pipelines.shards.source import Source, check_same_on_all_ranks, open_sources
from data_pipelines.stream.sampling import make_plans
from stages.base import Stage, StageModule, split_parents
from xray import dist
from xray.artifacts.artifact import Artifact, open_artifact, write_artifact
from xray.artifacts.model_card import artifact_card
from xray.config import RunConfig, dump
from xray.config.identity import config_hash, hash_json, identity, to_dict
from xray.errors import DataError
from xray.files import lock_folder, write_text
from xray.training.checkpoint import complete_checkpoints
from xray.training.metrics import check_sinks
from xray.training.mirror import Mirror
from xray.training.run_identity import check_same_run, run_record
from xray.training.state import TrainState
from xray.training.step_shape import check_batches

log = logging.getLogger("xray")


class Run:
    """What a config asks for, checked against its data, its parents and what its folder holds.

    Raises ConfigError, ArtifactError or DataError where the cause can be known.
    """

    def __init__(self, stage_class: type[Stage], config: Any) -> None:
        config.validate()
        self.config: RunConfig = config
        self.out = Path(config.out)
        parents = split_parents(stage_class, [open_artifact(path) for path in config.init_from])
        self.parents = {
            slot: artifact
            for slot, artifact in (("vision", parents.vision), ("text", parents.text))
            if artifact is not None
        }
        self.stage = stage_class(config)
        check_batches(self.stage, config)
        check_sinks(config.train)
        names = [block.source for block in [*config.blocks, *config.validation]]
        opened = open_sources(config.data, names)

        def prepared() -> dict[str, Source]:
            kept = {n: keep_listed(s, config.data.sources[n]) for n, s in opened.items()}
            return self.stage.prepare(kept, parents)

        self.sources = dist.main_first(prepared)
        check_same_on_all_ranks(self.sources)
        if self.stage.spans_batch:
            self._warn_of_repeats()
        self.plans, self.validation_plans = (
            make_plans(blocks, self.sources, config.data, config.seed)
            for blocks in (config.blocks, config.validation)
        )
        self.record = run_record(self.stage, config, self.sources, self.parents)
        self.mirror = mirror_of(self)
        dist.main_first(self._check)
        self._start_from = parents

    def _warn_of_repeats(self) -> None:
        """A sample that is in a block twice is to be told from itself."""
        for block in self.config.blocks:
            there = len(self.sources[block.source])
            if block.samples > there and dist.is_main() and not self.config.debug.overfit_batch:
                log.warning(
                    "source %s has %d samples, and a block %d: each is compared with itself; set "
                    "its samples in data.blocks to %d or less",
                    *(block.source, there, block.samples, there),
                )

    def _check(self) -> None:
        """That the folder holds this run or none, and the mirror likewise, which fills it then."""
        defaults = identity(type(self.config)())
        check_same_run(self.out, self.record, defaults, str(self.out))
        if self.mirror is not None:
            url, begun = self.mirror.url, (self.out / "run.json").exists()
            try:
                there = self.mirror.holds(
                    lambda folder: check_same_run(folder, self.record, defaults, url)
                )
            except DataError as error:
                if not begun:
                    raise
                log.warning("%s; the run goes on with what is in %s", error, self.out)
                return
            if there and not begun:
                self.mirror.fetch()

    def copy(self) -> None:
        """Have the mirror, if there is one, look like the run before long."""
        if self.mirror is not None:
            artifact = [path for path in [self.out / "artifact"] if path.is_dir()]
            self.mirror.send([*complete_checkpoints(self.out / "checkpoints"), *artifact])

    def finished(self) -> Artifact | None:
        """The artifact of this run, verified, if it ran to its end before."""
        path = self.out / "artifact"
        if not path.exists():
            return None
        log.info("stage %s is finished: %s", self.stage.name, path)
        artifact = open_artifact(path)
        self.copy()  # which may have been cut off
        if self.mirror is not None:
            self.mirror.wait()
        return artifact

    def build(self) -> StageModule:
        """The module as it is before the first step, the same on every rank."""
        torch.manual_seed(self.config.seed)
        return self.stage.build(self._start_from)

    def begin(self) -> None:
        """Write down what this run is, for the next time; raises ConfigError where it is trained
        by others."""

        def write() -> None:
            self.out.mkdir(parents=True, exist_ok=True)
            self._lock = lock_folder(self.out, "trained in")
            dump(self.config, self.out / "config.yaml")
            if not (self.out / "run.json").exists():
                write_text(self.out / "run.json", json.dumps(self.record, indent=1))

        dist.on_main(write)

    def write_artifact(
        self,
        path: Path,
        module: Any,
        state_dict: dict[str, Tensor],
        state: TrainState,
        metrics: dict[str, float],
        weights: str,
    ) -> None:
        """Write the artifact of a module with these weights (`last`, or `ema`: their average)."""
        facts = {
            "stage": self.stage.name,
            "config": to_dict(self.config),
            "config_hash": config_hash(self.config),
            "data_digest": hash_json(self.record["data"]),
            "sources": self.record["data"],
            "inputs": self.record["inputs"],
            "keep_rate": module.keep_rate(state.step / self.config.steps),
            "weights": weights,
            "step": state.step,
            "samples": state.samples,
            "seconds": round(state.seconds, 1),
            "bad_samples": state.bad,
            "metrics": metrics,
        }
        parts = self.stage.export(module, state_dict)
        files = self.stage.export_files()
        write_artifact(path, parts, files, facts, self.parents, artifact_card)


def mirror_of(run: Run) -> Mirror | None:
    """Where rank 0 copies a run to."""
    url = run.config.train.mirror
    return Mirror(url, run.stage.name, run.out) if url and dist.is_main() else None


def samples_of(run: Run, step: int) -> dict[str, list[dict[str, Any]]]:
    """Position, shard and key of what the sample plan gives a step, by source."""
    drawn = 0 if run.config.debug.overfit_batch else step
    found: dict[str, list[dict[str, Any]]] = {}
    for block in run.config.blocks:
        plan = run.plans[block.source]
        positions = plan.positions(drawn, block.samples)
        shards, slots = plan.locate(positions)
        rows = zip(positions.tolist(), shards.tolist(), slots.tolist(), strict=True)
        found[block.source] = [
            {
                "position": position,
                "shard": plan.source.manifest.name(shard),
                "key": plan.source.index(shard).key(plan.source.member(shard, slot)),
            }
            for position, shard, slot in rows
        ]
    return found
