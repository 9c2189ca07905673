"""ImageNet-C's folders and sets from other sources, against suites on each folder and by hand."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from in_process import invoke
from PIL import Image, ImageOps

from data_pipelines.shards.source import open_source
from xray.artifacts.artifact import open_artifact
from xray.artifacts.encoders import Encoder
from xray.config.loading import build, parse_overrides
from xray.evaluation.config import EvalConfig
from xray.evaluation.corruption_error import Errors, corruption_errors
from xray.evaluation.corruption_folders import list_corruptions, means, missing
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
    for part, change in (
        ("c/fog/1", lambda image: image),
        ("c/fog/4", ImageOps.invert),
        ("c/speckle_noise/2", ImageOps.mirror),
        ("c/blue/5", lambda image: ImageOps.solarize(image, 90)),
        ("drawn", lambda image: ImageOps.posterize(image, 3)),
    ):
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


def test_corrupted_folders_equal_an_evaluation_of_each_folder(
    clip: Path, root: Path, tmp_path: Path
) -> None:
    """Both heads, means and corruption errors, against a file of errors and own results."""
    folders = ["fog/1", "fog/4", "speckle_noise/2", "blue/5"]
    apart: dict[str, dict[str, float]] = {head: {} for head in HEADS}
    for part in ("set", *(f"c/{part}" for part in folders)):
        sets = [setting.format(part) for setting in HEADS.values()]
        found, *_ = results(clip, root, tmp_path / "apart.json", ",".join(HEADS), *sets)
        for head in HEADS:
            apart[head][part.removeprefix("c/")] = found[head]["top1"]
    (tmp_path / "base.json").write_text(
        json.dumps({"clean": 0.1, "fog": [0.2, 0.3, 0.4, 0.5, 0.6], "blue": 0.9})
    )
    settings = f"eval.robustness={{{NOTHING}, corrupted: c, baseline: {tmp_path / 'base.json'}}}"
    out = tmp_path / "robust.json"
    found, printed, told = results(clip, root, out, "robustness", *BOTH, settings)
    measures = found["robustness"]
    for head, alone in apart.items():
        own = {key.removeprefix(f"{head}/"): value for key, value in measures.items()}
        for part in folders:
            assert own[f"corrupted_files/{part}"] == alone[part]
        fog = fmean([alone["fog/1"], alone["fog/4"]])
        assert own["corrupted_files/fog"] == pytest.approx(fog, abs=1e-12)
        assert own["corrupted_files"] == pytest.approx(fmean([fog, alone["blue/5"]]), abs=1e-12)
        assert own["corrupted_files_extra"] == alone["speckle_noise/2"]
        assert own["corrupted_files_low"] <= own["corrupted_files"] <= own["corrupted_files_high"]
        # blue has only the mean of five severities in the baseline, and one severity here
        assert own["mCE"] == own["CE/fog"] == pytest.approx(2 * (1 - fog) / 0.7, abs=1e-12)
        relative = 2 * (alone["set"] - fog) / (0.7 - 2 * 0.1)
        assert own["relative_mCE"] == pytest.approx(relative, abs=1e-12)
        assert own["mCE_corruptions"] == 1 and "CE/blue" not in own
        assert f"{head}: 1 of 3 errors have none in eval.robustness.baseline" in told
    assert "1 of ImageNet-C's 15 corruptions, without gaussian_noise, shot_noise," in told
    assert "11 of 15 severities are missing" in told and "fog/2, fog/3, fog/5, speckle" in told
    assert "fog (files)" in printed and "relative mCE" in printed
    assert {len(line) for line in printed.splitlines() if line.startswith("│")} == {80}
    assert (tmp_path / "robust.robustness.png").stat().st_size > 10_000
    again = f"eval.robustness={{{NOTHING}, corrupted: c, baseline: {out}}}"
    found, *_ = results(clip, root, tmp_path / "same.json", "robustness", *BOTH, again)
    for head in HEADS:
        assert found["robustness"][f"{head}/mCE"] == pytest.approx(1, abs=1e-12)
        assert found["robustness"][f"{head}/mCE_corruptions"] == 2


def test_means_over_severities_and_corruptions_equal_brute_force() -> None:
    """Pictures in another order in each folder, ImageNet-C's extra corruptions apart."""
    generator = torch.Generator().manual_seed(0)
    hits, table = {}, dict[str, np.ndarray]()
    for corruption, severities in (("fog", 5), ("snow", 2), ("spatter", 3)):
        parts, rows = [], []
        for _ in range(severities):
            numbers = torch.randperm(30, generator=generator)
            right = torch.rand(30, generator=generator) < 0.4
            parts.append((numbers, right))
            rows.append([bool(right[numbers == picture]) for picture in range(30)])
        hits[corruption], table[corruption] = parts, np.array(rows, float)
    scores = means("own", hits)
    for corruption, rows in table.items():
        assert scores[f"own/{corruption}"] == pytest.approx(rows.mean(), abs=1e-12)
    main = (table["fog"].mean() + table["snow"].mean()) / 2
    assert scores["own"] == pytest.approx(main, abs=1e-12)
    assert scores["own_extra"] == pytest.approx(table["spatter"].mean(), abs=1e-12)
    draws = np.random.default_rng(0).integers(30, size=(1000, 30))
    per_picture = (table["fog"].mean(axis=0) + table["snow"].mean(axis=0)) / 2
    low, high = np.percentile(per_picture[draws].mean(axis=1), [2.5, 97.5])
    assert (scores["own_low"], scores["own_high"]) == pytest.approx((low, high), abs=1e-12)


def test_corruption_errors_equal_the_equations_of_the_paper() -> None:
    """CE = sum E / sum E of the baseline; relative CE with clean errors subtracted from each."""
    own = {"fog": [0.3, 0.4, 0.5, 0.6, 0.7], "frost": [0.2] * 5, "spatter": [0.9] * 5}
    base = {"fog": [0.5, 0.6, 0.7, 0.8, 0.9], "frost": [0.4] * 5, "spatter": [1.0] * 5}

    def errors(clean: float, rates: Mapping[str, list[float]]) -> Errors:
        return Errors(clean, {name: dict(enumerate(row, 1)) for name, row in rates.items()})

    scores = corruption_errors(errors(0.2, own), errors(0.4, base), "head")
    assert scores["CE/fog"] == pytest.approx(2.5 / 3.5) and scores["CE/frost"] == 0.5
    assert scores["mCE"] == pytest.approx((2.5 / 3.5 + 0.5) / 2)
    assert scores["relative_CE/fog"] == pytest.approx((2.5 - 1) / (3.5 - 2))
    # the baseline loses nothing on frost: there is no relative error to divide by
    assert scores["relative_mCE"] == scores["relative_CE/fog"]
    assert scores["mCE_corruptions"] == 2 and scores["relative_mCE_corruptions"] == 1
    assert not any("spatter" in name for name in scores)


def test_folders_are_listed_in_imagenets_order_and_gaps_are_counted(tmp_path: Path) -> None:
    for part in ("zebra/1/a", "frost/1/a", "frost/5/a", "gaussian_blur/2/a", "notes/x", "fog/3/a"):
        (tmp_path / part).mkdir(parents=True)
    found = list_corruptions(str(tmp_path))
    assert found == {"frost": [1, 5], "fog": [3], "gaussian_blur": [2], "zebra": [1]}
    assert list(found) == ["frost", "fog", "gaussian_blur", "zebra"]
    first, second = missing(found)
    assert first.startswith("2 of ImageNet-C's 15 corruptions, without gaussian_noise")
    assert second.startswith("15 of 20 severities are missing") and "fog/2, fog/4" in second
    assert missing({"own": [1, 2, 3, 4, 5]}) == []


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


def mistakes(root: Path, tmp_path: Path) -> list[tuple[str, str]]:
    """(settings of the suite, message) of unsuitable data, which are found before any attack."""
    bad = {
        "text": "errors of AlexNet",
        "list": "[0.5]",
        "percent": '{"clean": 43.5, "fog": 81.9}',
        "four": '{"fog": [0.1, 0.2, 0.3, 0.4]}',
        "clean": '{"clean": 0.4}',
        "other": '{"robustness": {"zero_shot/clean": 0.5}}',
    }
    for name, content in bad.items():
        (tmp_path / f"{name}.json").write_text(content)
    stray = tmp_path / "stray"
    shutil.copytree(root / "c", stray / "c")
    shutil.copytree(root / "set", stray / "other" / "fog" / "1")
    (stray / "other" / "fog" / "1" / "unicorn").mkdir()
    shutil.copy(next((root / "set").rglob("*.jpg")), stray / "other" / "fog" / "1" / "unicorn")
    one = few(root, tmp_path / "one", "names", 1)
    (tmp_path / "strange").mkdir()
    for name in ("unicorn", "dragon"):
        shutil.copytree(next((root / "set").iterdir()), tmp_path / "strange" / name)
    json_of = {name: f"corrupted: c, baseline: {tmp_path / name}.json" for name in bad}
    return [
        ("corrupted: set", "contains no folder CORRUPTION/SEVERITY/CLASS, such as fog/3/"),
        ("corrupted: nowhere", "eval.robustness.corrupted=nowhere: there is no"),
        (f"corrupted: {stray}/other", "class 'unicorn' of eval.robustness.corrupted fog/1 is not"),
        ("baseline: words.txt", "set eval.robustness.corrupted, too"),
        ("corrupted: c, baseline: none.json", "eval.robustness.baseline=none.json: there is no"),
        (json_of["text"], "text.json is not json (line 1)"),
        (json_of["list"], "list.json: give an object of errors"),
        (json_of["percent"], "percent.json: clean is 43.5: give the error, a share from 0 to 1"),
        (json_of["four"], "give the error, a share from 0 to 1, or a list of five"),
        (json_of["clean"], 'give {"clean": error, CORRUPTION: error, ...}'),
        (json_of["other"], "has no errors of zero_shot on corrupted pictures"),
        ("shift: {a: nowhere}", "eval.robustness.shift.a=nowhere: there is no"),
        ("shift: {a/b: set}", "eval.robustness.shift.a/b=set: give a data set for a name"),
        (f"shift: {{a: {one}}}", "needs samples of at least two classes"),
        (f"shift: {{a: {tmp_path}/strange}}", "of eval.robustness.shift.a is not among"),
        ("shift: {a: 5}", "eval.robustness.shift: give a text or sections of keys"),
        ("apgd_steps: 0", "steps, apgd_steps, queries, attacked must be at least 1"),
    ]


def test_each_mistake_is_one_line(clip: Path, root: Path, tmp_path: Path) -> None:
    for settings, message in mistakes(root, tmp_path):
        given = "eval.zero_shot.shards=set", f"eval.robustness={{{settings}}}"
        done = invoke("eval", clip, "--suite", "robustness", f"data.root={root}", *given)
        lines = [line for line in done.stderr.splitlines() if "missing" not in line]
        lines = [line for line in lines if "of ImageNet-C's 15" not in line]
        assert done.exit_code == 2 and len(lines) == 1, (settings, done.output)
        assert message in lines[0], (settings, lines)
