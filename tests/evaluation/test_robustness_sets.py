"""ImageNet-C's folders and sets from other sources, against suites on each folder and by hand."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING

import pytest
from in_process import invoke
from PIL import Image, ImageOps

from data_pipelines.shards.source import open_source
from xray.artifacts.artifact import open_artifact
from xray.artifacts.encoders import Encoder
from xray.config.loading import build, parse_overrides
from xray.evaluation.config import EvalConfig
from xray.evaluation.evaluator import Evaluator
from xray.evaluation.feature_extraction import label_of
from xray.evaluation.linear_probe import SOLVERS
from xray.evaluation.suites.linear_probe import LINEAR_PROBE
from xray.evaluation.zero_shot import NamedClasses

if TYPE_CHECKING:
    from conftest import Trained

NOTHING = "corruptions: [], resolutions: [], aspects: [], attacks: []"
HEADS = {
    "zero_shot": "eval.zero_shot.shards={}",
    "linear_probe": "eval.linear_probe={{train: set, test: {}, solver: sgd}}",
}
BOTH = [setting.format("set") for setting in HEADS.values()]


@pytest.fixture(scope="module")
def clip(trained: Trained) -> Path:
    return trained("clip", "train.samples=24")


@pytest.fixture(scope="module")
def root(demo: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Held-out photos in a folder per class, by name and by code, and changed copies of them."""
    root = tmp_path_factory.mktemp("sets")
    names = (demo / "classes.txt").read_text().split("\n")
    source, own = open_source("heldout", str(demo / "heldout"), "image"), set[str]()
    for number, place in enumerate(source.places()):
        files = source.read(*place)
        name = names[label_of(files)].replace(" ", "_")
        own.add(name)
        path = root / "set" / name / f"{number:03d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(files["jpg"])
    for code, name in enumerate(sorted(own)):
        shutil.copytree(root / "set" / name, root / "coded" / f"n{code:02}")
    (root / "words.txt").write_text("\n".join(sorted(own)))
    for part, change in (("drawn", lambda image: ImageOps.posterize(image, 3)),):
        for path in sorted((root / "set").rglob("*.jpg")):
            target = root / part / path.relative_to(root / "set").with_suffix(".JPEG")
            target.parent.mkdir(parents=True, exist_ok=True)
            change(Image.open(path)).save(target, quality=95)
    return root


def results(
    clip: Path, root: Path, out: Path, suites: str, *settings: str
) -> tuple[dict[str, dict[str, float]], str, str]:
    """The results of `xray eval`, and what it printed on stdout and stderr."""
    arguments = ["--suite", suites, f"data.root={root}", "data.workers=0", *settings]
    done = invoke("eval", clip, *arguments, "--out", out)
    assert done.exit_code == 0, done.output
    return json.loads(out.read_text()), done.stdout, done.stderr


def few(root: Path, where: Path, form: str, classes: int = 3) -> Path:
    """Some classes of the posterised photos in class folders, by their names or their codes."""
    names = sorted(path.name for path in (root / "drawn").iterdir())
    for code, name in [*enumerate(names)][1 : 1 + classes]:
        shutil.copytree(root / "drawn" / name, where / (name if form == "names" else f"n{code:02}"))
    return where


def test_a_set_with_some_classes_is_measured_among_these(
    clip: Path, root: Path, tmp_path: Path
) -> None:
    """Against a loop over its pictures; a class that the head does not have is left out."""
    place = few(root, tmp_path / "few", "names")
    shutil.copytree(next((root / "set").iterdir()), place / "unicorn")
    shift = f"eval.robustness={{{NOTHING}, shift: {{few: {place}, drawn: drawn}}}}"
    found, printed, _ = results(clip, root, tmp_path / "out.json", "robustness", *BOTH, shift)
    config = build(EvalConfig, parse_overrides(BOTH)["eval"])
    sets = Evaluator(Encoder(open_artifact(clip)), config, str(root), 0).sets
    names = sets.open("set", "set", "image").classes
    train, _ = sets.probe("linear_probe", config.of(LINEAR_PROBE))
    probe = SOLVERS["sgd"](train.views, train.labels)
    weights = NamedClasses.open(sets).weights(sets)

    def accuracy(head: str, pattern: str, among: Sequence[str]) -> float:
        source, hits = sets.open("", pattern, "image"), list[bool]()
        features = sets.features(source, {"zero_shot": "joint"}.get(head, "backbone"))
        for row, label in zip(features.rows, features.labels, strict=True):
            scores = weights @ row if head == "zero_shot" else probe.logits(row)
            chosen = {name: float(scores[names.index(name)]) for name in among}
            if (truth := source.classes[label]) in among:
                hits.append(max(chosen, key=chosen.__getitem__) == truth)
        return fmean(hits)

    for head in HEADS:
        own = {
            key.removeprefix(f"{head}/"): value
            for key, value in found["robustness"].items()
            if key.startswith(head)
        }
        some = names[1:4]
        assert own["shift/few"] == pytest.approx(accuracy(head, str(place), some), abs=1e-12)
        assert own["shift_clean/few"] == pytest.approx(accuracy(head, "set", some), abs=1e-12)
        assert own["shift/drawn"] == pytest.approx(accuracy(head, "drawn", names), abs=1e-12)
        assert own["shift_clean/drawn"] == own["clean"]
        gaps = [own[f"shift_clean/{name}"] - own[f"shift/{name}"] for name in ("few", "drawn")]
        assert [own["shift_gap/few"], own["shift_gap/drawn"]] == gaps
        assert own["shift_gap"] == pytest.approx(fmean(gaps), abs=1e-12)
        assert own["shift"] == pytest.approx((own["shift/few"] + own["shift/drawn"]) / 2)
        assert own["shift_classes/few"] == 3 and own["shift/chance_few"] == 1 / 3
        assert own["shift_left_out/few"] == len(list((place / "unicorn").iterdir()))
        assert own["shift_samples/drawn"] == 24 and own["shift_left_out/drawn"] == 0
    assert "zero-shot, shift few" in printed and "mean of shifts" in printed
    assert {len(line) for line in printed.splitlines() if line.startswith("│")} == {80}


def test_sets_with_codes_of_classes_are_matched_by_the_heads_own_samples(
    clip: Path, root: Path, tmp_path: Path
) -> None:
    """ImageNet's folders have codes, n01440764, whose words come from a file of class names."""
    both = {}
    for form, own in (("names", "set"), ("codes", "coded")):
        place = few(root, tmp_path / form, form)
        given = [f"eval.zero_shot={{shards: {own}, classes: words.txt}}"]
        given += [f"eval.linear_probe={{train: {own}, test: {own}, solver: sgd}}"]
        given += [f"eval.robustness={{{NOTHING}, shift: {{few: {place}}}}}"]
        found, *_ = results(clip, root, tmp_path / "out.json", "robustness", *given)
        both[form] = found["robustness"]
    assert both["names"] == both["codes"]
    assert both["codes"]["zero_shot/shift_classes/few"] == 3


def test_worst_case_and_two_classes(clip: Path, root: Path, tmp_path: Path) -> None:
    """A sample counts under all attacks if no attack changes it; DLR needs three classes."""
    nothing = NOTHING.replace("attacks: []", "attacks: [pgd, apgd_ce, apgd_dlr, square]")
    settings = f"eval.robustness={{{nothing}, eps: [4, 16], apgd_steps: 4, queries: 4}}"
    found, printed, _ = results(clip, root, tmp_path / "a.json", "robustness", *BOTH, settings)
    for head in HEADS:
        own = found["robustness"]
        for eps in (4, 16):
            each = [own[f"{head}/{name}/{eps}"] for name in ("pgd", "apgd_ce", "apgd_dlr")]
            least = min(*each, own[f"{head}/square/{eps}"], own[f"{head}/attacked_clean"])
            assert own[f"{head}/adversarial/{eps}"] <= least
        assert own[f"{head}/adversarial/16"] <= own[f"{head}/adversarial/4"]
    assert "APGD-DLR 4/255" in printed and "all attacks 16/255" in printed
    two = few(root, tmp_path / "two", "names", 2)
    given = f"eval.zero_shot.shards={two}"
    found, _, told = results(clip, root, tmp_path / "b.json", "robustness", given, settings)
    assert "zero_shot: apgd_dlr is left out: its loss needs three classes, not two" in told
    assert "zero_shot/adversarial/4" in found["robustness"]
    assert not any("apgd_dlr" in key for key in found["robustness"])
