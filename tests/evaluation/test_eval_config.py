"""Settings of an evaluation: which suites have data, and which artifact runs them."""

from __future__ import annotations

import pytest

from xray.config.identity import identity
from xray.config.loading import build
from xray.errors import ConfigError
from xray.evaluation.config import EvalConfig
from xray.evaluation.suites import SUITES, suite_named
from xray.evaluation.suites.knn import KNN
from xray.evaluation.suites.linear_probe import LINEAR_PROBE

OFFERS = {
    "mae": frozenset({"vision", "decoder"}),
    "hashtag": frozenset({"vision", "tags"}),
    "text": frozenset({"sentences"}),
    "clip": frozenset({"vision", "joint"}),
}


def config() -> EvalConfig:
    labelled = {"train": "a", "test": "b"}
    sections = {
        "knn": labelled,
        "finetune": labelled,
        "zero_shot": {"shards": "c"},
        "captions": {"shards": "d"},
        "tags": {"x": {"shards": "e"}},
    }
    return build(EvalConfig, sections)


@pytest.mark.parametrize(
    ("stages", "suites"),
    [
        (("mae",), {"mae": ["knn", "finetune"]}),
        (("mae", "hashtag"), {"mae": [], "hashtag": ["knn", "finetune", "tags"]}),
        (("mae", "text"), {"mae": ["knn", "finetune"], "text": ["captions"]}),
        (
            ("mae", "hashtag", "text", "clip"),
            {
                "mae": [],
                "hashtag": ["tags"],
                "text": ["captions"],
                "clip": ["zero_shot", "knn", "finetune"],
            },
        ),
    ],
)
def test_the_last_artifact_that_can_runs_a_suite(
    stages: tuple[str, ...], suites: dict[str, list[str]]
) -> None:
    assert config().in_recipe({stage: OFFERS[stage] for stage in stages}) == suites


def test_probes_without_data_sets_take_those_of_knn() -> None:
    own = build(EvalConfig, {"knn": {"train": "a", "test": "b", "modality": "video"}})
    probe = own.filled().of(LINEAR_PROBE)
    assert (probe.train, probe.test, probe.modality) == ("a", "b", "video")
    assert own.of(LINEAR_PROBE).train == "" and own.configured() == ["knn"]
    assert list(own.filled().data_sets(["robustness"])) == [
        ("linear_probe.train", "a"),
        ("linear_probe.test", "b"),
    ]


def test_settings_that_came_later_leave_the_identity_of_older_evaluations() -> None:
    own = identity(config())
    assert "token_selection" not in own and "keep_rates" not in own and "retrieval" in own
    assert own["robustness"]["attacks"] == ["fgsm", "pgd", "square"]
    assert not {"apgd_steps", "corrupted", "baseline"} & own["robustness"].keys()
    sections = {"token_selection": {"shards": "c"}, "keep_rates": {"rates": [0.5]}}
    added = identity(build(EvalConfig, sections))
    assert added["token_selection"]["shards"] == "c" and added["keep_rates"]["rates"] == [0.5]


def test_keep_rates_name_suites_that_can_be_compared() -> None:
    for wrong, message in (
        ({"rates": [0]}, r"eval\.keep_rates\.rates=\[0\.0\] must be numbers in \(0, 1\]"),
        ({"suites": ["tags"]}, "eval.keep_rates.suites names tags: use some of zero_shot"),
        ({"suites": ["knnn"]}, "unknown suite 'knnn'"),
    ):
        with pytest.raises(ConfigError, match=message):
            build(EvalConfig, {"keep_rates": wrong}).validate()


def test_every_suite_names_the_keys_of_its_data() -> None:
    assert KNN.data_keys() == "knn.train and .test"
    assert suite_named("tags").data_keys() == "tags.NAME.shards"
    assert suite_named("robustness").data_keys() == (
        "zero_shot.shards, or eval.linear_probe.train and .test"
    )
    assert len({suite.name for suite in SUITES}) == len(SUITES)
    with pytest.raises(ConfigError, match="unknown suite 'knnn': there are zero_shot, retrieval"):
        suite_named("knnn")
