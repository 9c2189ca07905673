"""Student's t-distribution (1908): p-values, and confidence intervals of a mean."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence


def student_p(t: float, df: int) -> float:
    """Return P(|T| >= |t|) for Student's t-distribution with `df` degrees of freedom (an integer).

    Source: the finite series 26.7.3 and 26.7.4 of Abramowitz and Stegun (1964).
    """
    angle = math.atan2(abs(t), math.sqrt(df))
    sine, cosine = math.sin(angle), math.cos(angle)
    odd = df % 2 == 1
    term = cosine if odd else 1.0
    total = term if df > 1 else 0.0
    for k in range(3 if odd else 2, df - 1, 2):
        term *= (k - 1) / k * cosine**2
        total += term
    inside = 2 / math.pi * (angle + sine * total) if odd else sine * total
    return max(0.0, 1.0 - inside)


def mean_interval(values: Sequence[float], covered: float = 0.95) -> tuple[float, float]:
    """Return both ends of the confidence interval of the mean of two values or more."""
    error = statistics.stdev(values) / math.sqrt(len(values))
    low, high = 0.0, 1e3  # of the quantile t; bisection
    for _ in range(60):
        t = (low + high) / 2
        if student_p(t, len(values) - 1) > 1 - covered:
            low = t
        else:
            high = t
    return statistics.fmean(values) - high * error, statistics.fmean(values) + high * error
