"""Mixtures: the weights of the artifacts that are averaged, and the mixtures to compare.

A line goes from the first artifact to the mean of the others (WiSE-FT, 2109.01903). A uniform soup
is the mean of all artifacts; a greedy soup is the mean of those that improve it (2203.05482).
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from xray.errors import ConfigError

MOST = 1001  # values of --alpha


@dataclass(frozen=True)
class Mixture:
    """Weights of the artifacts, in their order; they sum to 1.

    name: the value of alpha, or the numbers of the artifacts of a soup, such as 1+3.
    """

    name: str
    weights: tuple[float, ...]

    @property
    def members(self) -> list[int]:
        """Positions of the artifacts whose weight is above 0."""
        return [position for position, weight in enumerate(self.weights) if weight > 0]


def line(alphas: Collection[float], artifacts: int) -> list[Mixture]:
    """Make the mixtures of a line: 1 - alpha of the first artifact, alpha of the others' mean."""
    others = artifacts - 1
    return [Mixture(f"{a:g}", (1 - a, *[a / others] * others)) for a in alphas]


def soup(members: Collection[int], artifacts: int) -> Mixture:
    """Make the mean of the artifacts at these positions."""
    chosen = sorted(members)
    weights = [1 / len(chosen) if position in chosen else 0.0 for position in range(artifacts)]
    return Mixture("+".join(str(position + 1) for position in chosen), tuple(weights))


def parse_alphas(text: str) -> list[float]:
    """Parse --alpha: a number, numbers separated by commas, or START:END:STEP with both ends."""
    try:
        if ":" in text:
            start, end, step = (float(item) for item in text.split(":"))
            count = int((end - start) / step + 1e-6) + 1
            values = [round(start + i * step, 10) for i in range(min(count, MOST + 1))]
        else:
            values = [float(item) for item in text.split(",")]
    except (ValueError, ZeroDivisionError, OverflowError) as error:
        raise ConfigError(
            f"--alpha {text}: write a number, numbers such as 0,.3,1, or START:END:STEP such as "
            "0:1:.1"
        ) from error
    if not values or len(values) > MOST or not all(0 <= value <= 1 for value in values):
        raise ConfigError(f"--alpha {text}: give 1 to {MOST:,} numbers from 0 to 1")
    return sorted(set(values))
