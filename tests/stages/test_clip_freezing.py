"""Frozen towers keep their weights, under ZeRO and after an interruption too."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from clip_runs import LORA, State, assert_same_training, parts_equal
from tiny import QUICK, train

from stages.clip import ClipModule, ClipStage
from xray import optim
from xray.artifacts.artifact import open_artifact
from xray.models.backbone import VisionBackbone
from xray.models.text_tower import TextTower
from xray.training.engine import Engine


@dataclasses.dataclass
class Recording:
    """Weights before a run and after each step, and the mode of each tower's forward passes."""

    states: list[State] = dataclasses.field(default_factory=list)
    optimized: set[str] = dataclasses.field(default_factory=set)
    vision: list[tuple[bool, bool]] = dataclasses.field(default_factory=list)  # training, grad
    text: list[tuple[bool, bool]] = dataclasses.field(default_factory=list)

    def moved(self, prefix: str) -> list[set[str]]:
        """Return, for each step, the parameters that differ from those before the run."""
        first = self.states[0]
        return [
            {n for n in first if n.startswith(prefix) and not torch.equal(state[n], first[n])}
            for state in self.states[1:]
        ]


@pytest.fixture
def recording(monkeypatch: pytest.MonkeyPatch) -> Recording:
    """Record the runs of a test by wrapping the engine, the optimizer and the towers."""
    record = Recording()
    start, after, make = Engine.__init__, ClipStage.after_step, optim.make_optimizer
    names: dict[int, str] = {}

    def spy_start(self: Engine, module: Any, config: Any) -> None:
        names.update({id(p): name for name, p in module.named_parameters()})
        start(self, module, config)
        record.states.append(self.state_dict())

    def spy_make(groups: Any, config: Any) -> Any:
        record.optimized |= {names[id(p)] for group in groups for p in group["params"]}
        return make(groups, config)

    def spy_after(self: ClipStage, engine: Engine, module: ClipModule) -> None:
        after(self, engine, module)
        record.states.append(engine.state_dict())

    def spy_tower(kind: Any, seen: list[tuple[bool, bool]]) -> None:
        forward = kind.forward

        def spy(self: Any, *given: Any, **more: Any) -> Any:
            seen.append((self.training, torch.is_grad_enabled()))
            return forward(self, *given, **more)

        monkeypatch.setattr(kind, "forward", spy)

    monkeypatch.setattr(Engine, "__init__", spy_start)
    monkeypatch.setattr(optim, "make_optimizer", spy_make)
    monkeypatch.setattr(ClipStage, "after_step", spy_after)
    spy_tower(VisionBackbone, record.vision)
    spy_tower(TextTower, record.text)
    return record


@pytest.mark.parametrize("zero", [0, 3])
def test_a_frozen_vision_tower_keeps_its_parents_weights(
    demo: Path, tmp_path: Path, clip_run: Callable[..., Path], recording: Recording, zero: int
) -> None:
    parent = open_artifact(clip_run() / "artifact")
    for seen in (recording.states, recording.vision, recording.text, recording.optimized):
        seen.clear()  # drop those of the parent's run
    overrides = ("optim.vision.freeze=1", "optim.weight_decay=0.5", f"zero.stage={zero}")
    child = train(
        "clip", demo, tmp_path, *QUICK, *overrides, "model.drop_path=0.3", init_from=[parent.path]
    )
    assert parts_equal(parent.load("backbone"), child.load("backbone"))
    assert recording.optimized and not any(n.startswith("towers.") for n in recording.optimized)
    assert {"vision_projection.weight", "logit_scale"} <= recording.moved("")[0]
    assert recording.moved("towers.") == [set()] * 4
    assert child.load("head")["logit_scale"] != recording.states[0]["logit_scale"]
    assert len(recording.vision) == 8 and set(recording.vision) == {(False, False)}


@pytest.mark.parametrize(("name", "zero"), [("adamw", 0), ("lion", 0), ("lion", 2)])
def test_a_vision_tower_is_frozen_for_half_of_the_run(
    demo: Path, tmp_path: Path, recording: Recording, name: str, zero: int
) -> None:
    overrides = (f"optim.name={name}", "optim.weight_decay=0.5", f"zero.stage={zero}")
    train(
        "clip", demo, tmp_path, *QUICK, *overrides,
        "optim.vision.freeze=0.5", "train.samples=72", "optim.base_lr=0.004",
    )  # fmt: skip
    moved = recording.moved("towers.vision.")
    assert moved[:3] == [set()] * 3  # neither weight decay nor momentum moves them
    own = {n for n in recording.optimized if n.startswith("towers.vision.")}
    assert len(own) > 40 and moved[3] == moved[5] == own
    assert recording.vision == [(False, False)] * 6 + [(True, True)] * 6
    assert all(step >= {"vision_projection.weight"} for step in recording.moved(""))


@pytest.mark.parametrize("zero", [2, 3])
def test_zero_stages_agree_on_towers_that_unfreeze(
    clip_run: Callable[..., Path], zero: int
) -> None:
    overrides = (
        "optim.vision.freeze=0.5",
        *LORA,
        "text.lora_dropout=0.0",
        "optim.text.freeze=0.25",
    )
    assert_same_training(
        clip_run(*overrides), clip_run(*overrides, f"zero.stage={zero}", "train.micro_batch=4"), 4
    )


@pytest.mark.parametrize("freeze", [0.5, 1])
def test_lora_can_be_frozen_too(
    demo: Path, tmp_path: Path, recording: Recording, freeze: float
) -> None:
    overrides = (*LORA, "text.lora_dropout=0.2", f"optim.text.freeze={freeze}")
    artifact = train("clip", demo, tmp_path, *QUICK, *overrides)
    moved, text = recording.moved("towers.text."), artifact.load("text")
    lora_b = [value for name, value in text.items() if ".lora_B." in name]
    assert lora_b and moved[:2] == [set(), set()]
    assert recording.text[:4] == [(False, False)] * 4
    if freeze == 1:
        assert moved[3] == set() and not any(
            n.startswith("towers.text") for n in recording.optimized
        )
        assert all(not value.any() for value in lora_b)
        assert recording.text[4:] == [(False, False)] * 4
    else:
        assert all(value.any() for value in lora_b) and all(".lora_" in n for n in moved[3])
        assert recording.text[4:] == [(True, True)] * 4
    assert recording.vision == [(True, True)] * 8


@pytest.mark.parametrize(("freeze", "zero"), [(1, 0), (0.5, 2)])
def test_an_interrupted_run_with_a_frozen_tower_ends_like_a_whole_one(
    demo: Path,
    tmp_path: Path,
    clip_run: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
    freeze: float,
    zero: int,
) -> None:
    overrides = (f"optim.vision.freeze={freeze}", f"zero.stage={zero}", "train.samples=72")
    whole, after, calls = clip_run(*overrides), ClipStage.after_step, []

    def stop(self: ClipStage, *given: Any) -> None:
        after(self, *given)
        calls.append(1)
        if len(calls) == 5:
            raise KeyboardInterrupt

    monkeypatch.setattr(ClipStage, "after_step", stop)
    with pytest.raises(KeyboardInterrupt):
        train("clip", demo, tmp_path, *QUICK, *overrides, "train.save_every=2")
    artifact = train("clip", demo, tmp_path, *QUICK, *overrides)
    assert len(calls) == 5 + 2  # from the checkpoint of step 4
    for name in ("backbone", "head"):
        assert parts_equal(artifact.load(name), open_artifact(whole / "artifact").load(name))
