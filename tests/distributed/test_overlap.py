"""Reduction of gradients during the backward pass (`zero.overlap`)."""

from __future__ import annotations

import pytest
from child_process import SUPPORT, torchrun

from xray.config import RunConfig, ZeroConfig
from xray.errors import ConfigError
from xray.optim import reduce_bucket


def test_gradients_are_reduced_during_the_backward_pass() -> None:
    """ZeRO 0 and 2 on two processes; the weights equal those without overlap, bit for bit."""
    torchrun(str(SUPPORT / "overlap_ranks.py"))


def test_a_bucket_is_a_part_of_the_gradients() -> None:
    assert reduce_bucket(ZeroConfig(0), 800) == 800
    assert reduce_bucket(ZeroConfig(0, overlap=True), 800) == 100
    assert reduce_bucket(ZeroConfig(0, overlap=True), 10**9) == 25_000_000


def test_keys_that_overlap_does_not_know_are_refused() -> None:
    config = RunConfig()
    config.zero = ZeroConfig(0, overlap=True, deepspeed={"prescale_gradients": True})
    with pytest.raises(ConfigError, match=r"zero\.overlap=true.*prescale_gradients.*zero\.stage=2"):
        config.zero.validate()
    config.zero.stage = 2
    config.zero.validate()
