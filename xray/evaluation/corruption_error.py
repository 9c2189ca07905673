"""Corruption errors: error rates on corrupted pictures relative to a baseline's (1903.12261)."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from xray.errors import ConfigError
from xray.evaluation.corruptions import EXTRA, SEVERITIES
from xray.evaluation.suites.robustness import FILES
from xray.files import read_text

log = logging.getLogger("xray")

KEY = "eval.robustness.baseline"
Rates = Mapping[int, float]  # error rate by severity


@dataclass(frozen=True)
class Errors:
    """Error rates of a classifier, as shares from 0 to 1: on clean and on corrupted pictures.

    corrupted: by corruption and severity; 0 stands for the mean of all five, if only it is known.
    """

    clean: float | None
    corrupted: Mapping[str, Rates]


def measured_errors(measures: Mapping[str, float], head: str) -> Errors:
    """Take the errors of a head from the measures of the robustness suite."""
    corrupted: dict[str, dict[int, float]] = {}
    for key, accuracy in measures.items():
        parts = key.split("/")
        if parts[:2] == [head, FILES] and len(parts) == 4 and parts[3].isdecimal():
            corrupted.setdefault(parts[2], {})[int(parts[3])] = 1 - accuracy
    clean = measures.get(f"{head}/clean")
    return Errors(None if clean is None else 1 - clean, corrupted)


def read_baseline(path: str, heads: Sequence[str]) -> dict[str, Errors]:
    """Read the errors to compare each head with; raises ConfigError for an unsuitable file.

    The file is the results.json of another model, with the suite robustness on corrupted pictures,
    or {"clean": error, CORRUPTION: error or [five errors], ...}, which is for every head.
    """
    try:
        content = json.loads(read_text(path, KEY))
    except json.JSONDecodeError as error:
        raise ConfigError(f"{KEY}={path} is not json (line {error.lineno}): {error.msg}") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{KEY}={path}: give an object of errors, or results of xray eval")
    if not isinstance(measures := content.get("robustness"), dict):
        return dict.fromkeys(heads, _given(path, content))
    found = {head: measured_errors(measures, head) for head in heads}
    found = {head: errors for head, errors in found.items() if errors.corrupted}
    if not found:
        raise ConfigError(
            f"{KEY}={path} has no errors of {', '.join(heads)} on corrupted pictures: evaluate the "
            "other model with eval.robustness.corrupted, too"
        )
    for head in heads:
        if head not in found:
            log.warning("%s=%s has no %s: this head gets no corruption error", KEY, path, head)
    return found


def _given(path: str, content: Mapping[str, Any]) -> Errors:
    """Read errors that a person has written; raises ConfigError for other values."""
    corrupted: dict[str, Rates] = {}
    for name, value in content.items():
        values, severities = (value, SEVERITIES) if isinstance(value, list) else ([value], (0,))
        numbers = all(type(one) in (int, float) and 0 <= one <= 1 for one in values)
        if not numbers or len(values) != len(severities):
            raise ConfigError(
                f"{KEY}={path}: {name} is {value!r}: give the error, a share from 0 to 1, or a "
                "list of five, for severities 1 to 5"
            )
        corrupted[name] = dict(zip(severities, map(float, values), strict=True))
    clean = corrupted.pop("clean", {}).get(0)
    if not corrupted:
        raise ConfigError(f'{KEY}={path}: give {{"clean": error, CORRUPTION: error, ...}}')
    return Errors(clean, corrupted)


def corruption_errors(own: Errors, base: Errors, where: str) -> dict[str, float]:
    """Compute CE of each corruption, their mean (mCE), and both relative to clean errors.

    CE is the sum of errors over severities, divided by the baseline's. Relative CE first subtracts
    each classifier's clean error. ImageNet-C's extra corruptions have no CE. Errors that cannot be
    compared are left out, and lines say so; mCE_corruptions is the number of corruptions in mCE.
    where: the head, for the lines.
    """
    scores: dict[str, float] = {}
    pairs, kinds = _paired(own, base, where), {"CE": (0.0, 0.0)}
    if own.clean is not None and base.clean is not None:
        kinds["relative_CE"] = own.clean, base.clean
    else:
        log.warning("%s: no relative mCE, %s has no clean error", where, KEY)
    for kind, clean in kinds.items():
        ratios: dict[str, float] = {}
        for name, errors in pairs.items():
            mine, theirs = (
                sum(error - less for error in column)
                for column, less in zip(zip(*errors, strict=True), clean, strict=True)
            )
            if theirs > 1e-9:
                ratios[name] = mine / theirs
            else:
                log.warning("%s: no %s of %s, %s has no error above 0", where, kind, name, KEY)
        if ratios:
            mean = kind.replace("CE", "mCE")
            scores |= {f"{kind}/{name}": ratio for name, ratio in ratios.items()}
            scores |= {mean: fmean(ratios.values()), f"{mean}_corruptions": float(len(ratios))}
    return scores


def _paired(own: Errors, base: Errors, where: str) -> dict[str, list[tuple[float, float]]]:
    """Pair the errors of the severities that both have; those without a pair are logged.

    A mean over the five severities has a pair only if all five were measured.
    """
    pairs: dict[str, list[tuple[float, float]]] = {}
    without: list[str] = []
    for name, rates in own.corrupted.items():
        theirs = base.corrupted.get(name, {})
        if 0 in theirs and len(rates) == len(SEVERITIES):
            theirs = dict.fromkeys(SEVERITIES, theirs[0])
        if name in EXTRA:
            continue
        if shared := [severity for severity in rates if severity in theirs]:
            pairs[name] = [(rates[severity], theirs[severity]) for severity in shared]
        without += [f"{name}/{severity}" for severity in rates if severity not in theirs]
    if without:
        number = sum(map(len, pairs.values())) + len(without)
        log.warning(
            "%s: %d of %d errors have none in %s to compare with, and are not in mCE: %s",
            where, len(without), number, KEY, ", ".join(without),
        )  # fmt: skip
    return pairs
