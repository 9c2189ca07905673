"""Robustness: accuracy of a zero-shot and a linear-probe head on corrupted and attacked images."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from xray.artifacts.offers import VISION
from xray.config.identity import added
from xray.errors import ConfigError
from xray.evaluation.corruptions import CORRUPTIONS, EXTRA
from xray.evaluation.suite import Measures, Row, Suite, SuiteConfig, share_row, titled
from xray.evaluation.suites.linear_probe import LINEAR_PROBE
from xray.evaluation.suites.zero_shot import ZERO_SHOT
from xray.words import count

if TYPE_CHECKING:
    from xray.evaluation.datasets import Sets

CLASSIC = ("fgsm", "pgd", "square")
ATTACKS = (*CLASSIC, "apgd_ce", "apgd_dlr")
ATTACKED = (*ATTACKS, "adversarial")  # changes whose strength is eps
SHIFTS = ("resolution", "aspect")
FILES = "corrupted_files"  # measure of pictures in the folders of ImageNet-C
ENDS = ("", "_low", "_high")  # of the keys of a measure with its interval
TITLES = {
    "corrupted": "mean of corruptions",
    "attacked_clean": "those attacked, clean",
    "apgd_ce": "APGD-CE",
    "apgd_dlr": "APGD-DLR",
    "adversarial": "all attacks",
}


@dataclass
class RobustnessConfig(SuiteConfig):
    """Changes to the labelled samples of eval.zero_shot and eval.linear_probe."""

    optional_sets = ("shift", "corrupted", "baseline")

    corruptions: list[str] = field(default_factory=lambda: list(CORRUPTIONS))  # as in ImageNet-C
    severities: list[int] = field(default_factory=lambda: [1, 2, 3, 4, 5])  # of each corruption
    # resolutions to test at, as factors of the artifact's own
    resolutions: list[float] = field(default_factory=lambda: [0.5, 0.75, 1.5])
    # pictures are stretched by these factors of width / height
    aspects: list[float] = field(default_factory=lambda: [0.5, 2.0])
    # adversarial attacks; those of AutoAttack that are here: [apgd_ce, apgd_dlr, square]
    attacks: list[str] = field(default_factory=lambda: list(CLASSIC))
    # largest change of a pixel value by an attack, in 1/255 (L-infinity)
    eps: list[float] = field(default_factory=lambda: [0.5, 1.0, 2.0])
    steps: int = 5  # gradient steps of the attack pgd
    apgd_steps: int = added(20)  # gradient steps of apgd_ce and apgd_dlr; AutoAttack takes 100
    queries: int = 100  # model calls of the black-box attack, square
    attacked: int = 200  # samples that are attacked, evenly spaced
    # labelled samples of the same classes from another source; several as NAME: samples
    shift: str | dict[str, str] = ""
    corrupted: str = added("")  # folder of ImageNet-C: CORRUPTION/SEVERITY/CLASS/*.JPEG in it
    # for mCE: results.json of another model on `corrupted`, or json of its errors by corruption
    baseline: str = added("")
    seed: int = 0  # of noise and attacks

    def shifts(self) -> dict[str, str]:
        """Return the sets from other sources by name; "" is the name of a single set."""
        if isinstance(self.shift, dict):
            return dict(self.shift)
        return {"": self.shift} if self.shift else {}

    def sets(self) -> dict[str, str]:
        own = {key: place for key, place in super().sets().items() if key != "shift"}
        named = {f"shift.{name}".rstrip("."): place for name, place in self.shifts().items()}
        return named | own

    def validate(self, key: str) -> None:
        for option, known in (("corruptions", CORRUPTIONS), ("attacks", ATTACKS)):
            for name in getattr(self, option):
                if name not in known:
                    there = f"there are {', '.join(known)}"
                    raise ConfigError(f"{key}.{option} names {name!r}: {there}")
        if not self.severities or any(s not in (1, 2, 3, 4, 5) for s in self.severities):
            raise ConfigError(f"{key}.severities={self.severities} must be in 1 to 5")
        if any(value <= 0 for value in (*self.resolutions, *self.aspects, *self.eps)):
            raise ConfigError(f"{key}: resolutions, aspects and eps must be above 0")
        if min(self.steps, self.apgd_steps, self.queries, self.attacked) < 1:
            raise ConfigError(f"{key}: steps, apgd_steps, queries, attacked must be at least 1")
        if self.baseline and not self.corrupted:
            raise ConfigError(f"{key}.baseline is for corrupted pictures: set {key}.corrupted, too")
        for name, place in self.shifts().items():
            if "/" in name or not isinstance(place, str) or not place:
                raise ConfigError(
                    f"{key}.shift.{name}={place}: give a data set for a name without /"
                )


def _run(sets: Sets, config: RobustnessConfig) -> Measures:
    from xray.evaluation.robustness import robustness

    return robustness(sets, config)


def _check(sets: Sets, config: RobustnessConfig) -> None:
    from xray.evaluation.robustness import check_robustness

    check_robustness(sets, config)


def _changed(measures: Measures) -> Iterator[tuple[str, str, str, float]]:
    """Yield (head, change, strength, accuracy) of every changed data set."""
    for key, value in measures.items():
        head, change, strength = (*key.split("/"), "", "")[:3]
        end = strength.endswith(ENDS[1:])
        if strength and not end and change in CORRUPTIONS + SHIFTS + ATTACKED:
            yield head, change, strength, value


def _rows(measures: Measures) -> Iterator[Row]:
    """Make the rows of each head; a corruption has one, the mean over its severities."""
    for head in dict.fromkeys(key.split("/")[0] for key in measures):
        prefix, name = f"{head}/", head.replace("_", "-")
        own = {key.removeprefix(prefix): v for key, v in measures.items() if key.startswith(prefix)}
        steps = [(change, strength) for h, change, strength, _ in _changed(measures) if h == head]
        for title, key, over in (*_listed(own, steps), *_listed_files(own)):
            yield _share(f"{name}, {title}", own, key, own["chance"], over)
        for title, value, chance, over in (*_ratios(own), *_shifted(own)):
            yield f"{name}, {title}", value, chance, over


def _share(title: str, own: Measures, key: str, chance: float, over: str) -> Row:
    """Make the row of a measure whose interval is from KEY_low to KEY_high, also for a/b."""
    ends = {f"share{end}": own[f"{key}{end}"] for end in ENDS if f"{key}{end}" in own}
    return share_row(title, ends, "share", chance, over)


def _listed(own: Measures, steps: Sequence[tuple[str, str]]) -> Iterator[tuple[str, str, str]]:
    """Yield (title, measure, number of samples) of computed changes and attacks that have a row."""
    every, some = (count(own[key], "sample") for key in ("samples", "attacked_samples"))
    corruptions = dict.fromkeys(change for change, _ in steps if change in CORRUPTIONS)
    for key in ("clean", *corruptions, "corrupted"):
        if key in own:
            yield TITLES.get(key, key.replace("_", " ")), key, every
    for change, strength in steps:
        if change in SHIFTS:
            yield f"{change} {strength}", f"{change}/{strength}", every
    if "attacked_clean" in own:
        yield TITLES["attacked_clean"], "attacked_clean", some
    for change, strength in steps:
        if change in ATTACKED:
            title = f"{TITLES.get(change, change)} {strength}/255"
            yield title, f"{change}/{strength}", some


def _listed_files(own: Measures) -> Iterator[tuple[str, str, str]]:
    """Yield (title, measure, number of severities) of each corruption of the folders, and means."""
    found: dict[str, list[str]] = {}
    for name, severity in _severities(own):
        found.setdefault(name, []).append(severity)
    for name, severities in found.items():
        over = count(len(severities), "severity", "severities")
        yield f"{name.replace('_', ' ')} (files)", f"{FILES}/{name}", over
    extra = len(set(EXTRA) & found.keys())
    for title, key, number in (
        ("mean of corruptions (files)", FILES, len(found) - extra),
        ("mean of extra (files)", f"{FILES}_extra", extra),
    ):
        if key in own:
            yield title, key, count(number, "corruption")


def _severities(own: Measures) -> Iterator[tuple[str, str]]:
    """Yield (corruption, severity) of the folders of corrupted pictures."""
    for key in own:
        first, *parts = key.split("/")
        if first == FILES and len(parts) == 2 and parts[1].isdecimal():
            yield parts[0], parts[1]


def _ratios(own: Measures) -> Iterator[Row]:
    """Make the rows of the mean corruption errors; 100 % is the baseline's error."""
    for key in ("mCE", "relative_mCE"):
        if key in own:
            over = count(own[f"{key}_corruptions"], "corruption")
            yield key.replace("_", " "), f"{100 * own[key]:.1f}", "", over


def _shifted(own: Measures) -> Iterator[Row]:
    """Make the rows of sets from other sources, and of their gaps to the head's own samples."""
    if "shift_samples" in own:  # a single set
        over = count(own["shift_samples"], "sample")
        yield _share("elsewhere", own, "shift", own["chance"], over)
        return
    names = [key.removeprefix("shift_samples/") for key in own if key.startswith("shift_samples/")]
    for name in names:
        classes = count(own[f"shift_classes/{name}"], "class", "classes")
        over = f"{count(own[f'shift_samples/{name}'], 'sample')}, {classes}"
        if left := own[f"shift_left_out/{name}"]:
            over += f"; {left:,.0f} of others left out"
        yield _share(f"shift {name}", own, f"shift/{name}", own[f"shift/chance_{name}"], over)
        if f"shift_gap/{name}" in own:
            clean = f"clean {100 * own[f'shift_clean/{name}']:.1f}"
            yield f"gap to {name}", f"{100 * own[f'shift_gap/{name}']:.1f}", "", clean
    if len(names) > 1:
        over = count(len(names), "set")
        yield _share("mean of shifts", own, "shift", own["chance_shift"], over)
        if "shift_gap" in own:
            yield "mean gap", f"{100 * own['shift_gap']:.1f}", "", over


def _plot(measures: Measures, path: Path) -> None:
    """Plot each head's accuracy over the severity of corruptions and the eps of attacks."""
    steps = list(_changed(measures))
    panels = []
    for head in dict.fromkeys(key.split("/")[0] for key in measures):
        own = [(c, s, 100 * value) for h, c, s, value in steps if h == head]
        corrupted = [row for row in own if row[0] in CORRUPTIONS]
        attacked = [row for row in own if row[0] in ATTACKED]
        prefix = f"{head}/{FILES}/"
        parts = {key.removeprefix(f"{head}/"): value for key, value in measures.items()}
        stored = [(c, s, 100 * measures[f"{prefix}{c}/{s}"]) for c, s in _severities(parts)]
        title = head.replace("_", "-")
        severity, eps = "severity (0 = clean)", "eps of 255 (0 = clean)"
        panels.append((f"{title}: corruptions", head, "clean", severity, corrupted))
        panels.append((f"{title}: corrupted files", head, "clean", severity, stored))
        panels.append((f"{title}: attacks", head, "attacked_clean", eps, attacked))
    panels = [panel for panel in panels if panel[-1]]
    if not panels:
        return
    from xray.reports.figures import subplots

    figure, axes = subplots(len(panels), (4.5 * len(panels), 3.6))
    for axis, (title, head, clean, across, rows) in zip(axes, panels, strict=True):
        _curves(axis, rows, 100 * measures[f"{head}/{clean}"], 100 * measures[f"{head}/chance"])
        axis.set(title=title, xlabel=across)
    figure.savefig(path)


def _curves(axis: Any, rows: Sequence[tuple[str, str, float]], clean: float, chance: float) -> None:
    for change in dict.fromkeys(change for change, *_ in rows):
        points = sorted((float(s), value) for c, s, value in rows if c == change)
        label = TITLES.get(change, change.replace("_", " "))
        axis.plot(*zip((0.0, clean), *points, strict=True), marker="o", ms=3, lw=1.2, label=label)
    axis.axhline(chance, color="gray", lw=0.8, ls=":", label="chance")
    ticks = [0.0, *sorted({float(strength) for _, strength, _ in rows})]
    axis.set(ylabel="top-1 %", ylim=(0, 105), xticks=ticks)
    axis.grid(alpha=0.25)
    axis.legend(fontsize=7)


ROBUSTNESS = Suite(
    "robustness",
    RobustnessConfig,
    needs=frozenset({VISION}),
    run=_run,
    rows=_rows,
    title=titled("robustness"),
    reads=(ZERO_SHOT, LINEAR_PROBE),
    plot=_plot,
    check=_check,
)
