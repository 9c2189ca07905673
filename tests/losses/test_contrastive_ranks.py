"""InfoNCE and the sigmoid loss over ranks, against plain sums over all pairs in float64."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from child_process import SUPPORT, python
from contrast_ranks import BATCH, cases, features, ids_of, inputs, teacher, texts_of
from torch import Tensor


def by_pairs(
    name: str, images: Tensor, texts: Tensor, given: dict[str, Tensor], same: Tensor
) -> Tensor:
    """Compute the losses pair by pair, as in their papers."""
    logits = given["scale"] * images @ texts.t()
    if name == "sigmoid_loss":
        signs = 2 * same.to(logits.dtype) - 1
        return -torch.log(torch.sigmoid(signs * (logits + given["bias"]))).sum() / len(texts)
    if name == "distillation":
        a, b = teacher(given, slice(None))
        known = 7.0 * a @ b.t()
        wished = known.softmax(dim=1), known.t().softmax(dim=1)
    else:
        hits = same.to(logits.dtype)
        wished = hits / hits.sum(dim=1, keepdim=True), (hits / hits.sum(dim=0)).t()
    rows = -(wished[0] * torch.log(torch.softmax(logits, dim=1))).sum() / len(images)
    if name == "contrast":
        return rows
    return (rows - (wished[1] * torch.log(torch.softmax(logits.t(), dim=1))).sum() / len(texts)) / 2


def expected() -> dict[str, list[list[float]]]:
    actual = {}
    for name, pairing in cases():
        given = inputs(torch.float64)
        leaves = [given[n].requires_grad_() for n in ("weight", "scale", "bias")]
        images, texts = features(given, slice(None), texts_of(pairing))
        query_ids, key_ids = ids_of(pairing)
        query_ids = torch.arange(BATCH) if query_ids is None else query_ids
        key_ids = query_ids if key_ids is None else key_ids
        texts, key_ids = texts[key_ids >= 0], key_ids[key_ids >= 0]
        loss = by_pairs(name, images, texts, given, query_ids[:, None] == key_ids)
        grads = torch.autograd.grad(loss, leaves, allow_unused=True)
        row = [loss.detach(), *(torch.zeros(1) if g is None else g for g in grads)]
        actual[f"{name}, {pairing}"] = [x.flatten().tolist() for x in row]
    return actual


@pytest.mark.parametrize(
    ("world", "dtype", "most_logits"),
    [
        (1, "float64", 1 << 24),
        (1, "float64", 70),
        (2, "float64", 1 << 24),
        (2, "float64", 20),
        (3, "float64", 70),
        (5, "float64", 1 << 24),
        (5, "float32", 40),
    ],
)
def test_ranks_equal_the_sum_over_pairs(
    world: int, dtype: str, most_logits: int, tmp_path: Path
) -> None:
    arguments = [
        str(SUPPORT / "contrast_ranks.py"),
        str(world),
        dtype,
        str(most_logits),
        str(tmp_path),
    ]
    done = python(*arguments)
    assert done.returncode == 0, done.stderr[-2000:]
    actual = json.loads((tmp_path / "found.json").read_text())
    tolerance = 1e-9 if dtype == "float64" else 1e-5
    wanted = expected()
    assert actual.keys() == wanted.keys()
    for case, values in wanted.items():
        for mine, theirs in zip(actual[case], values, strict=True):
            assert mine == pytest.approx(theirs, rel=tolerance, abs=tolerance), case
