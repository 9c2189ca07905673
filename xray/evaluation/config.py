"""Settings of an evaluation: a section for each suite, and what all suites share."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import TypeVar

from xray.config import Precision
from xray.config.identity import added
from xray.errors import ConfigError
from xray.evaluation.suite import C, CaptionedConfig, Suite
from xray.evaluation.suites import SUITES, suite_named

E = TypeVar("E")


@dataclass
class ViewsConfig:
    """Views of a clip, whose features are averaged: evenly spaced times and squares."""

    clips: int = 1  # evenly spaced times per video
    crops: int = 1  # squares per frame: 1 in the centre, or 3: left, centre, right

    def validate(self) -> None:
        """Raise ConfigError naming the key to change."""
        if self.clips < 1 or self.crops not in (1, 3):
            raise ConfigError("eval.views.clips must be at least 1, and eval.views.crops 1 or 3")


@dataclass
class KeepRatesConfig:
    """Comparison of keep rates at the end of a recipe: accuracy against speed."""

    rates: list[float] = field(default_factory=list)  # such as [1, 0.7, 0.5]; [] = no comparison
    suites: list[str] = field(default_factory=list)  # [] = all that have data and can be compared

    def validate(self) -> None:
        """Raise ConfigError naming the key to change."""
        if any(not 0 < rate <= 1 for rate in self.rates):
            raise ConfigError(f"eval.keep_rates.rates={self.rates} must be numbers in (0, 1]")
        for name in self.suites:
            if not suite_named(name).compared:
                known = ", ".join(suite.name for suite in SUITES if suite.compared)
                raise ConfigError(f"eval.keep_rates.suites names {name}: use some of {known}")


def with_sections(cls: type[E]) -> type[E]:
    """Make a dataclass with a field for each of SUITES before the fields of `cls`.

    Sections of captions come first, as `xray config eval` prints them.
    """
    ordered = sorted(SUITES, key=lambda suite: not isinstance(suite.Config(), CaptionedConfig))
    for suite in ordered:
        own = added(factory=suite.Config) if suite.added else field(default_factory=suite.Config)
        setattr(cls, suite.name, own)
    cls.__annotations__ = {suite.name: suite.Config for suite in ordered} | cls.__annotations__
    return dataclass(cls)


@with_sections
class EvalConfig:
    """The settings of each suite; suites without data are left out, unless asked for by name."""

    views: ViewsConfig = field(default_factory=ViewsConfig)
    batch_size: int = 64  # samples per forward pass
    # fill the data sets that are not set with the samples that the sources hold out in a folder val
    held_out: bool = added(False)
    precision: Precision = added("fp32")  # of backbone and text tower, and of training in suites
    keep_rates: KeepRatesConfig = added(factory=KeepRatesConfig)
    # named data sets: a folder with a folder for each, or a .yaml file of their settings
    sets: str = added("")

    def of(self, suite: Suite[C]) -> C:
        """Return the section of a suite."""
        section: C = getattr(self, suite.name)
        return section

    def validate(self) -> None:
        """Check all suites; raises ConfigError naming the key to change."""
        if self.batch_size < 1:
            raise ConfigError(f"eval.batch_size={self.batch_size} must be at least 1")
        self.views.validate()
        self.keep_rates.validate()
        for suite in SUITES:
            for key, part in suite.sections(self.of(suite)).items():
                part.validate(f"eval.{key}")

    def configured(self) -> list[str]:
        """List the suites that have data of their own."""
        return [suite.name for suite in SUITES if suite.has_data(self.of(suite))]

    def possible(self, offers: frozenset[str]) -> list[str]:
        """List the suites whose data sets are set and that an artifact can run."""
        return [name for name in self.configured() if suite_named(name).needs <= offers]

    def in_recipe(self, offers: Mapping[str, frozenset[str]]) -> dict[str, list[str]]:
        """List the suites that the artifact of each stage runs at the end of a recipe.

        offers: what each artifact offers, in the order of the stages. The last artifact that can
        run a suite runs it.
        """
        last = {name: stage for stage, own in offers.items() for name in self.possible(own)}
        return {
            stage: [name for name in self.possible(own) if last[name] == stage]
            for stage, own in offers.items()
        }

    def data_sets(self, suites: Sequence[str]) -> Iterator[tuple[str, str]]:
        """Yield (key, pattern) of every data set and file that these suites read."""
        asked = [suite_named(name) for name in suites]
        reads = [other for suite in asked for other in suite.reads]
        asked += [other for other in reads if other.has_data(self.of(other))]
        for suite in {suite.name: suite for suite in asked}.values():
            for key, part in suite.sections(self.of(suite)).items():
                yield from ((f"{key}.{name}", place) for name, place in part.files().items())

    def filled(self) -> EvalConfig:
        """Return a copy in which each suite without data sets has those of `sets_from`.

        It also has the settings that belong to them, such as `modality`, unless they are its own.
        """
        lent = {}
        for suite in SUITES:
            own = self.of(suite)
            if suite.sets_from is not None and not suite.has_data(own):
                lender = self.of(suite.sets_from)
                kind = next(cls for cls in type(lender).__mro__ if isinstance(own, cls))
                usual = type(own)()
                left = (key.name for key in fields(kind))
                left = (key for key in left if getattr(own, key) == getattr(usual, key))
                lent[suite.name] = replace(own, **{key: getattr(lender, key) for key in left})
        return replace(self, **lent)  # type: ignore[type-var]
