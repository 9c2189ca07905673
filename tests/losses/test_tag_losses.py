from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from xray.errors import ConfigError
from xray.losses.named import tag_loss
from xray.losses.sampled_softmax import draw_classes, sampled_softmax, sampling_probabilities
from xray.losses.tags import (
    AsymmetricLoss,
    BinaryLoss,
    SoftmaxLoss,
    TagLoss,
    truncate,
)

V, D = 23, 5
KINDS: dict[str, TagLoss] = {
    "softmax": SoftmaxLoss(),
    "bce": BinaryLoss(),
    "asymmetric": AsymmetricLoss(),
    "focused positives": AsymmetricLoss(gamma_pos=1.0, gamma_neg=2.5, margin=0.2),
    "shifted only": AsymmetricLoss(gamma_neg=0.0, margin=0.2),
    "roots, no margin": AsymmetricLoss(gamma_pos=0.5, gamma_neg=0.5, margin=0.0),
}
# a full row; a padded one; one with id 7 twice and a sum above 1; one with a small sum
TAGS = torch.tensor([[3, 0, 22, 11], [9, -1, -1, -1], [7, 2, 7, 21], [16, 1, -1, -1]])
TARGETS = torch.tensor(
    [[0.25, 0.25, 0.25, 0.25], [1, 0, 0, 0], [0.6, 0.2, 0.7, 0.3], [0.3, 0.2, 0, 0]],
    dtype=torch.float64,
)


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Use one thread: tensors are so small that waiting for threads takes longest."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def head(rows: int = 4, classes: int = V) -> tuple[Tensor, Tensor, Tensor]:
    """Make features, weight and bias: float64 leaves."""
    torch.manual_seed(0)
    shapes = ((rows, D), (classes, D), (classes,))
    features, weight, bias = (torch.randn(s, dtype=torch.float64).requires_grad_() for s in shapes)
    return features, weight, bias


def run(
    loss: TagLoss, inputs: Sequence[Tensor], tags: Tensor = TAGS, targets: Tensor = TARGETS
) -> tuple[Tensor, Tensor]:
    features, weight, bias = inputs
    return loss(features, weight, bias, tags, targets)


def dense_targets(tags: Tensor, targets: Tensor, classes: int) -> Tensor:
    actual = torch.zeros(len(tags), classes, dtype=torch.float64)
    for row, (ids, values) in enumerate(zip(tags.tolist(), targets.tolist(), strict=True)):
        for tag, value in zip(ids, values, strict=True):
            if tag >= 0:
                actual[row, tag] += value
    return actual


def truth(loss: TagLoss, logits: Tensor, t: Tensor) -> Tensor:
    """Compute the losses [B] by the plain formulas, from dense targets."""
    eps = loss.smoothing
    if isinstance(loss, SoftmaxLoss):
        t = (1 - eps) * t + eps * t.sum(1, keepdim=True) / t.shape[1]
        return -(t * logits.log_softmax(1)).sum(1)
    y = t.clamp(0, 1) * (1 - eps) + eps / 2
    if isinstance(loss, BinaryLoss):
        return F.binary_cross_entropy_with_logits(logits, y, reduction="none").sum(1)
    assert isinstance(loss, AsymmetricLoss)
    p = logits.sigmoid()
    shifted = (p - loss.margin).clamp(min=0)
    positive = -((1 - p) ** loss.gamma_pos) * p.log()
    negative = -(shifted**loss.gamma_neg) * (1 - shifted).log()
    return (y * positive + (1 - y) * negative).sum(1)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("chunk", [0, 1, 5, 100])
@pytest.mark.parametrize("kind", KINDS)
def test_values_and_gradients_equal_the_formula(kind: str, chunk: int, smoothing: float) -> None:
    loss, inputs = replace(KINDS[kind], smoothing=smoothing, chunk=chunk), head()
    logits = F.linear(*inputs)
    expected = truth(loss, logits, dense_targets(TAGS, TARGETS, V))
    actual, top = run(loss, inputs)
    torch.testing.assert_close(actual, expected)
    assert top.equal(logits.argmax(1))
    weights = torch.tensor([1.0, -2.0, 0.5, 0.0], dtype=torch.float64)  # gradients of the caller
    ours = torch.autograd.grad(actual, inputs, weights)
    for ours_one, one in zip(ours, torch.autograd.grad(expected, inputs, weights), strict=True):
        torch.testing.assert_close(ours_one, one)


def test_hard_labels_give_the_asymmetric_loss_of_the_paper() -> None:
    logits = torch.tensor([[2.0, -1.0, 0.5]], dtype=torch.float64)
    tags, targets = torch.tensor([[1]]), torch.ones(1, 1, dtype=torch.float64)
    expected = -math.log(1 / (1 + math.exp(1)))
    for z in (2.0, 0.5):
        shifted = 1 / (1 + math.exp(-z)) - 0.05
        expected -= shifted**4 * math.log(1 - shifted)
    actual, _ = AsymmetricLoss().from_logits(logits, tags, targets)
    assert math.isclose(actual.item(), expected, rel_tol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_gradcheck(kind: str) -> None:
    loss = replace(KINDS[kind], smoothing=0.1, chunk=3)
    tags = torch.tensor([[6, 3, -1], [1, 5, 1]])
    targets = torch.tensor([[0.5, 0.5, 0], [0.3, 0.2, 0.4]], dtype=torch.float64)
    inputs = head(rows=2, classes=7)
    assert torch.autograd.gradcheck(lambda *args: run(loss, args, tags, targets)[0], inputs)


@pytest.mark.parametrize("trained", [n for n in itertools.product((0, 1), repeat=3) if any(n)])
def test_gradients_of_some_inputs_only(trained: tuple[int, ...]) -> None:
    inputs = head()
    expected = torch.autograd.grad(run(SoftmaxLoss(), inputs)[0].square().sum(), inputs)
    some = [x.detach().requires_grad_(bool(on)) for x, on in zip(inputs, trained, strict=True)]
    run(SoftmaxLoss(chunk=6), some)[0].square().sum().backward()
    for x, on, grad in zip(some, trained, expected, strict=True):
        if on:
            torch.testing.assert_close(x.grad, grad)
        else:
            assert x.grad is None


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("chunk", [0, 7])
def test_large_logits_stay_finite_in_fp32(kind: str, chunk: int) -> None:
    logits = torch.tensor([[300.0, -300.0, 40.0, -40.0, 0.0, 300.0, -300.0, 110.0, -95.0]])
    logits.requires_grad_()
    tags, targets = torch.tensor([[0, 1, 2, 3]]), torch.full((1, 4), 0.25)
    loss = replace(KINDS[kind], smoothing=0.1, chunk=chunk)
    one, bias = torch.ones(1, 1, requires_grad=True), torch.zeros(9)
    actual, _ = loss(one, logits.t(), bias, tags, targets)
    actual.sum().backward()
    for x in (actual, one.grad, logits.grad):
        assert x is not None and x.isfinite().all()
    exact = logits.detach().double()
    if kind != "roots, no margin":  # else log(1 - p) overflows, in float64 as well
        expected = truth(loss, exact, dense_targets(tags, targets, 9))
        torch.testing.assert_close(actual.double(), expected, rtol=1e-5, atol=1e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_autocast_multiplies_in_bf16_and_reduces_in_fp32(kind: str) -> None:
    exact = [x.detach().bfloat16().float() for x in head()]  # exact in bf16
    inputs = [x.requires_grad_() for x in exact]
    results = []
    for chunk in (0, 6):
        loss = replace(KINDS[kind], chunk=chunk)
        with torch.autocast("cpu", torch.bfloat16):
            losses, top = run(loss, inputs, TAGS, TARGETS.float())
        assert losses.dtype == torch.float32
        grads = torch.autograd.grad(losses.sum(), inputs)
        assert {grad.dtype for grad in grads} == {torch.float32}
        results.append((losses, top, *grads))
    dense, chunked = results
    torch.testing.assert_close(chunked[:2], dense[:2], rtol=1e-5, atol=1e-5)  # the same logits
    torch.testing.assert_close(chunked[2:], dense[2:], rtol=2e-2, atol=2e-2)
    logits = F.linear(*(x.detach().double() for x in inputs)).bfloat16().double()
    expected = truth(loss, logits, dense_targets(TAGS, TARGETS, V))
    torch.testing.assert_close(chunked[0].double(), expected, rtol=2e-2, atol=2e-2)


def test_half_precision_sums_in_fp32_over_many_chunks() -> None:
    rows, classes = 8, 3000
    inputs = [x.detach().bfloat16().requires_grad_() for x in head(rows, classes)]
    tags, targets = torch.randint(classes, (rows, 3)), torch.full((rows, 3), 1 / 3)
    losses, _ = run(SoftmaxLoss(chunk=10), inputs, tags, targets)
    assert losses.dtype == torch.float32
    grads = torch.autograd.grad(losses.sum(), inputs)
    exact = [x.detach().double().requires_grad_() for x in inputs]
    expected = truth(SoftmaxLoss(), F.linear(*exact), dense_targets(tags, targets, classes))
    for grad, one in zip(grads, torch.autograd.grad(expected.sum(), exact), strict=True):
        assert grad.dtype == torch.bfloat16
        assert (grad - one).norm() < 0.005 * one.norm()  # bf16 keeps 8 bits


class Sizes(TorchDispatchMode):
    """Records the storages that operations allocate; keeps them, so that no address repeats."""

    def __init__(self, known: list[Tensor]) -> None:
        super().__init__()
        self.old = {x.untyped_storage().data_ptr() for x in known}
        self.new: dict[int, torch.UntypedStorage] = {}
        self.views = 0  # elements of the largest tensor

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for x in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(x, Tensor) and x.untyped_storage().data_ptr() not in self.old:
                self.new[x.untyped_storage().data_ptr()] = x.untyped_storage()
                self.views = max(self.views, x.numel())
        return result


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_no_tensor_of_all_logits_and_one_of_the_weight(kind: str, autocast: bool) -> None:
    rows, classes, chunk = 64, 1024, 32
    inputs = [x.detach().float().requires_grad_() for x in head(rows, classes)]
    tags = torch.randint(classes, (rows, 3))
    targets = torch.full((rows, 3), 1 / 3)
    for loss, expected in ((replace(KINDS[kind], chunk=chunk), True), (SoftmaxLoss(), False)):
        for x in inputs:
            x.grad = None
        with Sizes([*inputs, tags, targets]) as sizes:
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                losses, _ = run(loss, inputs, tags, targets)
            losses.sum().backward()
        large = [s.nbytes() for s in sizes.new.values()]
        large = [size for size in large if size >= 2 * classes * D]  # a copy in bf16, too
        small = sizes.views <= classes * D and large == [4 * classes * D]
        assert small == expected, (sizes.views, large)
        assert inputs[1].grad is not None


def test_evaluation_needs_no_gradient() -> None:
    inputs = [x.detach() for x in head()]
    with torch.no_grad():
        losses, top = run(SoftmaxLoss(chunk=6), inputs)
    assert not losses.requires_grad
    assert top.equal(F.linear(*inputs).argmax(1))


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_the_floor_is_the_minimum_of_the_loss(smoothing: float) -> None:
    single = TAGS.clone()
    single[2, 2] = 5  # no id twice
    t = dense_targets(single, TARGETS, V)
    smooth = (1 - smoothing) * t + smoothing * t.sum(1, keepdim=True) / V
    logits = (smooth / smooth.sum(1, keepdim=True)).clamp(min=1e-300).log().requires_grad_()
    losses, _ = SoftmaxLoss(smoothing=smoothing).from_logits(logits, single, TARGETS)
    floor = SoftmaxLoss(smoothing=smoothing).floor(TARGETS, V)
    torch.testing.assert_close(floor, losses.detach())
    (grad,) = torch.autograd.grad(losses.sum(), logits)
    assert grad.abs().max() < 1e-12  # a convex function's minimum


def test_the_floor_of_equal_tags_is_log_k() -> None:
    floor = SoftmaxLoss().floor(torch.tensor([[0.25, 0.25, 0.25, 0.25], [1.0, 0, 0, 0]]), 4)
    torch.testing.assert_close(floor, torch.tensor([math.log(4), 0.0]))


def exponentials(losses: Tensor, logits: Tensor, t: Tensor) -> Tensor:
    """Recover the sum of exponentials of a softmax loss, [B]."""
    return ((losses + (t * logits).sum(1)) / t.sum(1)).exp()


def test_sampled_sum_of_exponentials_is_unbiased() -> None:
    """The expectation over all V^M draws of M classes is the exact sum."""
    classes, number = 6, 3
    inputs = head(3, classes)
    tags = torch.tensor([[2, 4, -1], [0, -1, -1], [5, 1, 5]])
    targets = torch.tensor([[0.5, 0.5, 0], [0.4, 0, 0], [0.5, 0.2, 0.3]], dtype=torch.float64)
    t, logits = dense_targets(tags, targets, classes), F.linear(*inputs)
    q = sampling_probabilities(torch.tensor([50, 20, 10, 4, 2, 0]))
    assert math.isclose(q.sum().item(), 1) and math.isclose(q[0] / q[5], 50**0.75)
    mean = torch.zeros(3, dtype=torch.float64)
    for draw in itertools.product(range(classes), repeat=number):
        drawn = torch.tensor(draw)
        losses = sampled_softmax(*inputs, tags, targets, drawn, q[drawn].log())
        mean += q[drawn].prod() * exponentials(losses, logits, t)
    torch.testing.assert_close(mean, logits.exp().sum(1))


def test_sampled_softmax_equals_its_formula_and_gradient() -> None:
    inputs, drawn = head(), torch.tensor([7, 3, 3, 20, 0, 1])
    q = sampling_probabilities(torch.arange(V, 0, -1))
    actual = sampled_softmax(*inputs, TAGS, TARGETS, drawn, q[drawn].log())
    logits, expected = F.linear(*inputs), []
    for row, ids in enumerate(TAGS.tolist()):
        own = {tag for tag in ids if tag >= 0}
        terms = [logits[row, tag].exp() for tag in own]
        terms += [logits[row, c].exp() / q[c] / len(drawn) for c in drawn.tolist() if c not in own]
        total, share = torch.stack(terms).sum(), dense_targets(TAGS, TARGETS, V)[row]
        expected.append(share.sum() * total.log() - (share * logits[row]).sum())
    torch.testing.assert_close(actual, torch.stack(expected))
    grads = torch.autograd.grad(actual.square().sum(), inputs, retain_graph=True)
    plain = torch.autograd.grad(torch.stack(expected).square().sum(), inputs)
    torch.testing.assert_close(grads, plain)


def test_draws_follow_the_probabilities_of_a_million_classes() -> None:
    counts = 1e6 / torch.arange(1, 10**6 + 1)
    q = sampling_probabilities(counts)
    ids, log_q = draw_classes(q, 200_000, torch.Generator().manual_seed(0))
    assert ids.equal(draw_classes(q, 200_000, torch.Generator().manual_seed(0))[0])
    torch.testing.assert_close(log_q, q[ids].log().float())
    actual = torch.histc(ids.float(), 20, 0, 10**6) / len(ids)  # 20 groups of ranks
    expected = q.view(20, -1).sum(1).float()
    assert ((actual - expected).abs() < 5 * (expected / len(ids)).sqrt()).all()


def test_truncation_drops_the_most_doubtful_and_their_gradients() -> None:
    losses = torch.tensor([3.0, 9.0, 1.0, 7.0, 2.0], requires_grad=True)
    mean = truncate(losses, losses, 0.5, 0.4)  # 2.5 rounds to 2
    assert mean.item() == 2.0
    (grad,) = torch.autograd.grad(mean, losses)
    assert grad.tolist() == pytest.approx([1 / 3, 0, 1 / 3, 0, 1 / 3])
    assert truncate(losses, losses, 0.5, 0.6).item() == 1.5  # or to 3
    assert truncate(losses, -losses, 0.4, 0.0).item() == pytest.approx(19 / 3)
    assert truncate(losses, losses, 0.0, 0.99).item() == pytest.approx(losses.mean().item())
    assert truncate(losses, losses, 0.99, 0.99).item() == 1.0  # one is always left


def test_small_batches_leave_out_the_same_share_on_average() -> None:
    losses = torch.arange(8.0)
    torch.manual_seed(0)
    means = [truncate(losses, losses, 0.1, float(torch.rand(()))).item() for _ in range(4000)]
    # without its largest the mean is 3, else 3.5
    assert means.count(3.0) / 4000 == pytest.approx(0.8, abs=0.03)


@pytest.mark.parametrize(
    ("key", "value"),
    [("smoothing", 1.0), ("margin", -0.1), ("chunk", -1), ("gamma_neg", -1.0)],
)
def test_errors_name_the_invalid_setting(key: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=f"{key}={value}"):
        AsymmetricLoss(**{key: value})


def test_an_unknown_loss_is_one_error() -> None:
    with pytest.raises(ConfigError, match=r"hashtag\.loss=softmx is unknown.*mean 'softmax'"):
        tag_loss("softmx")


@pytest.mark.parametrize("kind", KINDS)
def test_chance_is_the_expected_loss_of_the_frequencies(kind: str) -> None:
    """Over all combinations of tags, by their probabilities, with a constant prediction."""
    frequency = torch.tensor([0.5, 0.25, 0.25, 0.125], dtype=torch.float64)
    loss, total, samples = KINDS[kind], 0.0, 0.0
    if isinstance(loss, SoftmaxLoss):  # one tag per sample
        frequency = frequency / frequency.sum()
    logits = loss.initial_bias(frequency)[None]
    for present in itertools.product((0, 1), repeat=len(frequency)):
        if isinstance(loss, SoftmaxLoss) and sum(present) != 1:
            continue
        p = math.prod(
            f if there else 1 - f for f, there in zip(frequency.tolist(), present, strict=True)
        )
        if isinstance(loss, SoftmaxLoss):
            p = float(frequency[present.index(1)])
        targets = torch.tensor([present], dtype=torch.float64)
        total += p * float(loss.from_logits(logits, torch.arange(4)[None], targets)[0])
        samples += p
    assert samples == pytest.approx(1)
    assert loss.chance(frequency) == pytest.approx(total)
