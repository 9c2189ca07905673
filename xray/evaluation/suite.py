"""The record that describes an evaluation suite, shared settings, and rows of the results table."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Generic, Literal, TypeVar

from xray.artifacts.offers import VISION
from xray.config.identity import added
from xray.errors import ConfigError
from xray.words import count

if TYPE_CHECKING:
    from data_pipelines.shards.source import Source
    from xray.evaluation.datasets import Sets

C = TypeVar("C")
Measures = Mapping[str, float]
Row = tuple[str, str, str, str]  # measure, result, chance, number of samples
RECALL = "mean_per_class_recall"  # a measure of classifiers; the balanced accuracy

# A key that names a data set holds shards (a folder, glob, {000..123} pattern or URL), a folder
# with a folder per class, or a .csv file with the columns path and label or caption.


@dataclass
class SuiteConfig:
    """Settings of a suite; a subclass lists the keys that name data sets."""

    required_sets: ClassVar[tuple[str, ...]] = ()
    optional_sets: ClassVar[tuple[str, ...]] = ()

    def sets(self) -> dict[str, str]:
        """Return the patterns of the data sets that are set, by key."""
        keys = (*self.required_sets, *self.optional_sets)
        return {key: getattr(self, key) for key in keys if getattr(self, key)}

    def files(self) -> dict[str, str]:
        """Return the data sets and other files that the suite reads, by key."""
        return self.sets()

    def open(self, sets: Sets, key: str, name: str) -> Source:
        """Open the data set `name`; `key` is the section's below eval, for errors."""
        modality: Any = getattr(self, "modality", "image")
        captions = getattr(self, "captions", ())
        return sets.open(key, getattr(self, name), modality, captions)

    def has_data(self) -> bool:
        """Check if all required data sets are set."""
        return bool(self.required_sets) and self.sets().keys() >= set(self.required_sets)

    def validate(self, key: str) -> None:
        """Raise ConfigError naming the key to change; `key` is the section's, such as eval.knn."""
        there = [name for name in self.required_sets if name in self.sets()]
        missing = [name for name in self.required_sets if name not in there]
        if there and missing:
            raise ConfigError(f"{key}.{there[0]} is set: set {key}.{missing[0]}, too")


@dataclass
class CaptionedConfig(SuiteConfig):
    """Images or videos with captions; the suite `captions` also takes texts without images."""

    required_sets = ("shards",)

    shards: str = ""  # samples with captions: shards, a folder or a list
    modality: Literal["image", "video", "text"] = "image"  # of the samples
    captions: dict[str, float] = field(default_factory=dict)  # json fields and their weights


@dataclass
class LabelledConfig(SuiteConfig):
    """Labelled samples for training and for test; a probe without sets takes those of eval.knn."""

    required_sets = ("train", "test")
    optional_sets = ("splits",)

    train: str = ""  # labelled samples to fit on: shards, a folder of class folders, or a list
    test: str = ""  # labelled samples to test on, with the same classes
    modality: Literal["image", "video"] = "image"  # of the samples
    # folder of split files of HMDB51 or UCF101, which divide the clips of `train` into both sets
    splits: str = added("")
    split: Literal["all", 1, 2, 3] = added("all")  # of `splits`; all = the mean over all of them

    def has_data(self) -> bool:
        """Check if both sets are set, or one with split files that divide it."""
        return bool(self.train and self.splits) or super().has_data()

    def validate(self, key: str) -> None:
        """Raise ConfigError naming the key to change."""
        check_split(key, self.splits, self.split)
        if not self.splits:
            super().validate(key)
        elif self.test:
            raise ConfigError(f"{key}.splits divides the clips of {key}.train: remove {key}.test")
        elif not self.train:
            raise ConfigError(f"{key}.splits is set: set {key}.train, too")


def check_split(key: str, splits: str, split: object) -> None:
    """Raise ConfigError for the number of a split without split files."""
    if split != "all" and not splits:
        raise ConfigError(f"{key}.split={split}: set {key}.splits, too, the folder of split files")


@dataclass
class MaskedConfig(SuiteConfig):
    """Pictures with masks for training and for test; a pixel value of a mask is a class number."""

    required_sets = ("train", "test")
    modality: ClassVar[Literal["image"]] = "image"

    train: str = ""  # pictures with masks to learn from: shards, a folder or a list
    test: str = ""  # pictures with masks to test on
    images: str = "images"  # folder of the pictures in the folder of a set
    masks: str = "masks"  # folder of the masks beside it, with the same file names
    mask: str = "mask.png"  # ending of a mask in shards: KEY.mask.png
    classes: int = 0  # number of classes, 0 to classes - 1; 0 = those in the masks of `train`
    ignore: list[int] = field(default_factory=lambda: [255])  # values of pixels without a class

    def open(self, sets: Sets, key: str, name: str) -> Source:
        return sets.masked(key, self)[name == "test"]

    def validate(self, key: str) -> None:
        super().validate(key)
        if self.classes < 0 or self.classes == 1:
            raise ConfigError(f"{key}.classes={self.classes} must be 0, or at least 2")
        if not (self.images and self.masks and self.mask.strip(".")):
            raise ConfigError(f"{key}: images, masks and mask must not be empty")


@dataclass(frozen=True)
class Suite(Generic[C]):
    """An evaluation suite: its settings, what it needs, how it runs and how results are shown.

    Chance is one of the measures that `run` returns; `rows` puts it beside the result.
    """

    name: str  # of its section in the config, and of its results
    Config: type[C]  # of its section; dict[str, X] for several data sets with names
    needs: frozenset[str]  # capabilities that the artifact must offer (xray/artifacts/offers.py)
    run: Callable[[Sets, C], Measures]
    rows: Callable[[Measures], Iterable[Row]]  # of the results table
    title: Callable[[str], str]  # of a measure, in plots and reports
    compared: tuple[str, ...] = ()  # measures that --keep-rates compares; () = it cannot
    sets_from: Suite[Any] | None = None  # whose data sets it takes if it has none
    reads: tuple[Suite[Any], ...] = ()  # suites whose data sets and heads it uses
    plot: Callable[[Measures, Path], None] | None = None
    notes: Callable[[Measures], Iterable[str]] | None = None  # lines below the results table
    added: bool = False  # older evaluations lack its section
    # raises an error for data that `run` cannot use, without decoding pictures; data sets are
    # opened, and the classes of a LabelledConfig are compared, without it
    check: Callable[[Sets, C], None] | None = None

    def sections(self, section: C) -> dict[str, SuiteConfig]:
        """Return the suite's settings by their key below eval: one, or one for each named set."""
        if isinstance(section, dict):
            return {f"{self.name}.{name}": part for name, part in section.items()}
        assert isinstance(section, SuiteConfig)
        return {self.name: section}

    def has_data(self, section: C) -> bool:
        """Check if the required data sets of all sections are set."""
        parts = self.sections(section).values()
        return bool(parts) and all(part.has_data() for part in parts)

    def data_keys(self) -> str:
        """Return the keys below eval that give the suite its data."""
        if self.reads:
            return ", or eval.".join(suite.data_keys() for suite in self.reads)
        types = getattr(self.Config, "__args__", None)  # of dict[str, X]
        config: Any = types[1] if types else self.Config
        return f"{self.name}{'.NAME' if types else ''}." + " and .".join(config.required_sets)


def probe_suite(
    name: str, config: type[C], run: Callable[[Sets, C], Measures], label: str, **more: Any
) -> Suite[C]:
    """Make a suite that measures accuracy on labels and needs only a backbone."""

    def rows(measures: Measures) -> Iterator[Row]:
        over = count(measures["samples"], "sample")
        yield from classifier_rows(label, measures, ("top1",), over)

    return Suite(name, config, frozenset({VISION}), run, rows, titled(label), **more)


def classifier_rows(
    label: str, measures: Measures, tops: Iterable[str], over: str
) -> Iterator[Row]:
    """Make the rows of top-k accuracies and of the mean per-class recall.

    Results of older versions lack the recall.
    """
    for key in (*tops, RECALL):
        if key in measures:
            yield share_row(titled(label)(key), measures, key, measures[f"chance_{key}"], over)


def share_row(title: str, measures: Measures, key: str, chance: float, over: str) -> Row:
    """Make the row of a share and of its interval, if it has one, in percent."""
    value = f"{100 * measures[key]:.1f}"
    low, high = interval_keys(key)
    if low in measures:
        value += f" [{100 * measures[low]:.1f}, {100 * measures[high]:.1f}]"
    return title, value, f"{100 * chance:.2f}", over


def rank_row(title: str, measures: Measures, key: str, chance: float, over: str) -> Row:
    """Make the row of a median rank and of its interval, if it has one."""
    low, high = interval_keys(key)
    value = f"place {measures[key]:.1f}"
    if low in measures:
        value += f" [{measures[low]:.1f}, {measures[high]:.1f}]"
    return title, value, f"place {chance:.1f}", over


def titled(label: str) -> Callable[[str], str]:
    """Make the titles of a suite's measures: its label, then the measure."""
    return lambda measure: f"{label} {measure}".replace("_", " ")


def interval_keys(key: str) -> tuple[str, str]:
    """Return the keys of both ends of a measure's interval: of R@1/64, R@1_low/64 and _high/64."""
    name, slash, prefix = key.partition("/")
    return f"{name}_low{slash}{prefix}", f"{name}_high{slash}{prefix}"


def ends_of(key: str, measures: Measures) -> tuple[str, ...]:
    """Return the keys of both ends of a measure's interval, () if it has none.

    Of NAME/PREFIX, they are NAME_low/PREFIX or NAME/PREFIX_low.
    """
    forms = interval_keys(key), (f"{key}_low", f"{key}_high")
    return next((ends for ends in forms if ends[0] in measures), ())


def with_bars(points: Sequence[tuple[Measures, str]]) -> tuple[list[float], list[list[float]]]:
    """Return (measures, key) in percent, and the lengths of the error bars below and above."""
    values = [100 * measures[key] for measures, key in points]
    ends = [[100 * measures[end] for end in ends_of(key, measures)] for measures, key in points]
    below = [value - low for value, (low, _) in zip(values, ends, strict=True)]
    above = [high - value for value, (_, high) in zip(values, ends, strict=True)]
    return values, [below, above]
