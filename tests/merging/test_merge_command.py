"""`xray merge`: evaluated lines and soups, what is chosen, and what is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from export_checks import assert_refused, rewritten
from in_process import invoke

from xray.artifacts.artifact import Artifact, open_artifact
from xray.merging import search
from xray.models.text_tower import TextTower

Varied = Callable[..., Artifact]
BOTH = "--choose=zero_shot.top1,retrieval.text_to_image_R@1"


@pytest.fixture(scope="module")
def data(demo: Path) -> list[str]:
    """Settings of two suites."""
    return [
        f"data.root={demo}", "data.workers=0", "eval.retrieval.shards=heldout",
        "eval.zero_shot={shards: heldout, classes: classes.txt}",
    ]  # fmt: skip


@pytest.fixture
def evaluated(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """The suites of every evaluation that runs."""
    seen: list[list[str]] = []
    original = search.Judge.evaluate

    def counted(judge: search.Judge, artifact: Artifact, suites: Sequence[str]) -> search.Results:
        seen.append([*suites])
        return original(judge, artifact, suites)

    monkeypatch.setattr(search.Judge, "evaluate", counted)
    return seen


def stored(out: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((out / "merge.json").read_text())
    return content


def test_one_value_writes_at_once(
    base: Artifact, varied: Varied, tmp_path: Path, evaluated: list[list[str]]
) -> None:
    other, out = varied(1), tmp_path / "merged"
    done = invoke("merge", base.path, other.path, "--alpha", ".25", "--out", out)
    assert done.exit_code == 0, done.stderr
    assert "0.75 of member 1, 0.25 of member 2 (alpha 0.25)" in done.stdout
    assert not evaluated and sorted(path.name for path in out.iterdir()) == ["artifact"]
    again = invoke("merge", base.path, other.path, "--alpha", ".25", "--out", out)
    assert again.exit_code == 0 and again.stdout == done.stdout
    another = invoke("merge", base.path, other.path, "--alpha", ".5", "--out", out)
    assert_refused(another, f"{out}/artifact is another artifact: choose another --out")
    uniform = invoke("merge", base.path, other.path, "--soup", "uniform", "--out", tmp_path / "u")
    assert uniform.exit_code == 0 and "(uniform soup)" in uniform.stdout


def test_a_line_is_evaluated_and_goes_on_where_it_stopped(
    base: Artifact, varied: Varied, data: list[str], tmp_path: Path, evaluated: list[list[str]]
) -> None:
    other, out = varied(1, 0.3), tmp_path / "merged"
    (out / "candidate").mkdir(parents=True)  # of a process that was killed
    command = ["merge", base.path, other.path, "--out", out, *data]
    done = invoke(*command, "--alpha", "0,1", "--suite", "retrieval")
    assert done.exit_code == 0, done.stderr
    assert "no artifact is written: add --choose" in done.stdout and not (out / "artifact").exists()
    assert evaluated == [["retrieval"]] * 2
    done = invoke(*command, "--alpha", "0:1:.5", BOTH)
    assert done.exit_code == 0, done.stderr
    # the suites that earlier calls did not run; the new mixture has none
    assert evaluated[2:] == [["zero_shot"], ["zero_shot", "retrieval"], ["zero_shot"]]
    facts, rows = stored(out), stored(out)["mixtures"]
    by_weight = {tuple(row["weights"]): row["results"] for row in rows}
    assert by_weight.keys() == {(1, 0), (0.5, 0.5), (0, 1)}
    for weights, artifact in (((1, 0), base.path), ((0, 1), other.path)):
        invoke("eval", artifact, *data, "--out", tmp_path / "own.json")
        own = json.loads((tmp_path / "own.json").read_text())
        for suite in ("zero_shot", "retrieval"):
            assert by_weight[weights][suite] == own[suite]
    means = {
        weights: own["zero_shot"]["top1"] + own["retrieval"]["text_to_image_R@1"]
        for weights, own in by_weight.items()
    }
    chosen = tuple(facts["chosen"]["weights"])
    assert means[chosen] == max(means.values())
    written = open_artifact(out / "artifact")
    weights = [*written.manifest["mixture"]["weights"].values()]
    assert weights == [weight for weight in chosen if weight]
    page = (out / "merge.html").read_text()
    assert page.count("data:image/svg+xml") == 4 and facts["chosen"]["by"] in page
    assert "alpha" in done.stdout and "*" in done.stdout and "chance" in done.stdout
    count = len(evaluated)
    again = invoke(*command, "--alpha", "0:1:.5", BOTH)
    assert again.exit_code == 0 and len(evaluated) == count, again.stderr
    assert sorted(path.name for path in out.iterdir()) == ["artifact", "merge.html", "merge.json"]
    changed = invoke(*command, "--alpha", "0:1:.5", "eval.views.crops=3")
    assert_refused(changed, "merge.json has results of another merge (views.crops: 1 -> 3)")


def test_the_artifact_of_a_mixture_has_the_results_that_chose_it(
    base: Artifact, varied: Varied, data: list[str], tmp_path: Path
) -> None:
    out = tmp_path / "merged"
    done = invoke("merge", base.path, varied(1).path, "--alpha", ".5", "--out", out, *data)
    assert done.exit_code == 0, done.stderr
    invoke("eval", out, *data, "--out", tmp_path / "own.json")
    own = json.loads((tmp_path / "own.json").read_text())
    (row,) = stored(out)["mixtures"]
    assert row["results"]["retrieval"] == own["retrieval"]


def test_texts_are_encoded_once_by_a_tower_that_all_share(
    base: Artifact, data: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    head = {name: tensor * 1.5 for name, tensor in base.load("head").items()}
    other = rewritten(base.path, tmp_path / "other", base.manifest["config"], {"head": head})
    batches: list[int] = []
    original = TextTower.forward

    def counted(tower: TextTower, **tokens: torch.Tensor) -> torch.Tensor:
        batches.append(len(tokens["input_ids"]))
        return original(tower, **tokens)

    monkeypatch.setattr(TextTower, "forward", counted)
    out = tmp_path / "merged"
    done = invoke("merge", base.path, other.path, "--alpha", "0:1:.5", "--out", out, *data)
    assert done.exit_code == 0, done.stderr
    assert len(batches) == 2  # class names, and captions
    invoke("eval", other.path, *data, "--out", tmp_path / "own.json")
    own = json.loads((tmp_path / "own.json").read_text())
    assert stored(out)["mixtures"][-1]["results"]["retrieval"] == own["retrieval"]


def test_artifacts_without_a_common_ancestor_are_named(
    trained: Callable[..., Path], base: Artifact, varied: Varied, tmp_path: Path
) -> None:
    words = "have no common ancestor"
    other = rewritten(varied(1).path, tmp_path / "other", base.manifest["config"], {})
    done = invoke("merge", base.path, other.path, "--alpha", "1", "--out", tmp_path / "a")
    assert words in done.stderr and done.exit_code == 0
    first = trained("mae", "train.samples=12", "model.keep_rate=1.0")
    second = trained("mae", "train.samples=12", "model.keep_rate=1.0", "seed=1", init_from=[first])
    for pair in ((first, second), (second, first)):
        done = invoke("merge", *pair, "--alpha", ".5", "--out", tmp_path / pair[0].parent.name)
        assert done.exit_code == 0 and words not in done.stderr, done.stderr


def test_a_greedy_soup_is_never_below_its_best_member(
    base: Artifact, varied: Varied, data: list[str], tmp_path: Path, evaluated: list[list[str]]
) -> None:
    members = [varied(1, 0.5), base, varied(2, 0.01)]
    out, measure = tmp_path / "soup", "retrieval.image_to_text_R@5"
    done = invoke(
        "merge", *(member.path for member in members), "--soup", "greedy", "--choose", measure,
        "--suite", "retrieval", "--out", out, *data,
    )  # fmt: skip
    assert done.exit_code == 0, done.stderr
    values = {
        tuple(position for position, weight in enumerate(row["weights"]) if weight):
            row["results"]["retrieval"]["image_to_text_R@5"]
        for row in stored(out)["mixtures"]
    }  # fmt: skip
    singles = sorted((position,) for position in range(3))
    assert len(evaluated) == len(values) == 5 and singles == sorted(k for k in values if len(k) < 2)
    order = sorted(range(3), key=lambda position: -values[(position,)])
    soup = order[:1]
    for position in order[1:]:  # the recipe of the paper, on the same results
        if values[tuple(sorted([*soup, position]))] >= values[tuple(sorted(soup))]:
            soup.append(position)
    weights = stored(out)["chosen"]["weights"]
    assert [p for p, weight in enumerate(weights) if weight] == sorted(soup)
    assert values[tuple(sorted(soup))] >= max(values[(p,)] for p in range(3))
    assert 0 not in soup  # its weights are mostly noise
    assert f"greedy soup by {measure}" in done.stdout and "members" in done.stdout
    assert "image to text R@5" in (out / "merge.html").read_text()  # the measure that chose
    parents = open_artifact(out / "artifact").manifest["parents"]
    assert [*parents] == [f"member {position + 1}" for position in sorted(soup)]


def different(base: Artifact, varied: Varied, tagger: Path, folder: Path) -> list[tuple[Path, str]]:
    """Artifacts that cannot be merged with the base, and the difference that is told."""
    config = base.manifest["config"]
    other_llm = rewritten(base.path, folder / "llm", config, {})
    shutil.copytree(other_llm.path, folder / "tokenizer")
    manifest = json.loads((other_llm.path / "manifest.json").read_text())
    inputs = json.dumps({**manifest, "inputs": {"llm": "f" * 64}})
    (other_llm.path / "manifest.json").write_text(inputs)
    name = next(n for n in manifest["files"] if n.startswith("llm/") and "tokenizer" in n)
    files = {**manifest["files"], name: "0" * 64}
    (folder / "tokenizer" / "manifest.json").write_text(json.dumps({**manifest, "files": files}))
    shutil.copytree(folder / "tokenizer", folder / "wider")
    wider = json.loads((base.path / "llm/config.json").read_text())
    wider |= {"hidden_size": 1 + wider["hidden_size"]}
    (folder / "wider" / "llm/config.json").write_text(json.dumps(wider))
    head = base.load("head")
    smaller = {**head, "logit_scale": head["logit_scale"].double()}
    rewritten(base.path, folder / "typed", config, {"head": smaller})
    heads = {**config["model"]["kwargs"], "num_heads": 4}
    return [
        (tagger, "stage: 'clip' -> 'hashtag'"),
        (folder / "llm", "the LLM in "),
        (folder / "tokenizer", f"; {name} is another file"),
        (folder / "wider", f"; llm.hidden_size: {wider['hidden_size'] - 1} -> "),
        (folder / "typed", "; head.logit_scale: 'F32 [1]' -> 'F64 [1]'"),
        (varied(1, model={"kwargs": heads}).path, "; model.kwargs.num_heads: 2 -> 4"),
        (
            varied(1, model={"kwargs": heads}, data={"mean": [0.5, 0.5, 0.5]}).path,
            ", model.kwargs.num_heads: 2 -> 4",
        ),
        (varied(1, data={"mean": [0.5, 0.5, 0.5]}).path, "; data.mean"),
        (varied(1, data={"resolution": [[0.0, 32], [0.5, 16]]}).path, "; data.resolution"),
        (varied(1, text={"prompt": "query: "}).path, "; text.prompt: '' -> 'query: '"),
        (varied(1, clip={"matryoshka": [8]}).path, "; joint.matryoshka"),
    ]


def test_other_models_are_refused_before_anything_is_read(
    base: Artifact, varied: Varied, tagger: Path, tmp_path: Path
) -> None:
    for path, words in different(base, varied, tagger, tmp_path):
        done = invoke("merge", base.path, path, "--alpha", ".5", "--out", tmp_path / "out")
        assert_refused(done, words)
        assert "cannot be merged with" in done.stderr and not (tmp_path / "out").exists()


def test_settings_of_training_may_differ(base: Artifact, varied: Varied, tmp_path: Path) -> None:
    other = varied(1, model={"drop_path": 0.1, "keep_rate": 0.5}, optim={"base_lr": 1e-5})
    done = invoke("merge", base.path, other.path, "--alpha", ".5", "--out", tmp_path / "out")
    assert done.exit_code == 0, done.stderr


def test_each_mistake_is_one_line_of_error(
    base: Artifact, varied: Varied, data: list[str], tmp_path: Path
) -> None:
    other, out = varied(1).path, tmp_path / "out"
    two = (base.path, other)
    cases: list[tuple[Sequence[object], str]] = [
        ((*two,), "give one of --alpha, such as --alpha .5 or 0:1:.1, and --soup"),
        ((*two, "--alpha", ".5", "--soup", "uniform"), "give one of --alpha"),
        ((*two, "--soup", "both"), "--soup both: use uniform or greedy"),
        ((*two, "--soup", "greedy", *data), "--soup greedy needs --choose SUITE.MEASURE"),
        ((*two, "--alpha", ".5", "--choose", "knn.top1"), "--alpha 0.5 is one mixture: leave out"),
        ((*two, "--soup", "uniform", "--choose", "a.b"), "--soup uniform is one mixture"),
        ((*two, "--alpha", "0:1"), "--alpha 0:1: write a number"),
        ((*two, "--alpha", "0:1:.5"), "there are no data: set eval.SUITE.KEY= or --recipe"),
        ((base.path, "--alpha", ".5"), "two artifacts or more"),
        ((base.path, base.path, "--alpha", ".5"), "is given twice"),
        ((base.path, tmp_path / "none", "--alpha", ".5"), "there is no such folder"),
        ((*two, "--alpha", "0:1:.5", *data, "--choose", "knn.top1"), "with a suite that runs"),
        ((*two, "--alpha", "0,1", *data, "--choose", "retrieval"), "write SUITE.MEASURE"),
        ((*two, "--alpha", "0,1", *data, "--suite", "knn"), "suite knn has no data"),
        ((*two, "--alpha", "0,1", *data, "--suite", "kn"), "unknown suite 'kn'"),
        ((*two, "--alpha", "0,1", "eval.knn.trian=a"), "unknown key 'eval.knn.trian'"),
    ]
    for arguments, words in cases:
        assert_refused(invoke("merge", *arguments, "--out", out), words)
        assert not (out / "artifact").exists()
    for folder in (base.path, base.path.parent):
        assert_refused(invoke("merge", *two, "--alpha", ".5", "--out", folder), "another --out")
    ranks = ("--alpha", "0,1", *data, "--choose", "retrieval.text_to_image_median_rank")
    done = invoke("merge", *two, *ranks, "--out", out)
    assert_refused_at_last(done.stderr, "suite retrieval has retrieval.text_to_image_R@1")
    assert len(stored(out)["mixtures"]) == 1  # it was told after the first evaluation


def assert_refused_at_last(stderr: str, words: str) -> None:
    assert words in stderr.strip().splitlines()[-1], stderr
