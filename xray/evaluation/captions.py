"""Retrieval of captions by captions: how well a text tower groups the captions of an image."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from xray.artifacts.encoders import TextEncoder
from xray.artifacts.offers import SENTENCES
from xray.errors import ArtifactError, DataError
from xray.evaluation.confidence import share
from xray.evaluation.datasets import Sets
from xray.evaluation.feature_extraction import flat_captions, read_all_captions
from xray.evaluation.suite import CaptionedConfig, Measures, Row, Suite, share_row, titled
from xray.evaluation.zero_shot import HELD


def caption_retrieval(texts: Tensor, owner: Tensor) -> dict[str, float]:
    """Measure the share of captions whose nearest other caption is of the same image, with chance.

    texts: [M, D] normalised. owner: [M], the image of each. If several are equally near, the share
    of correct ones counts. Raises DataError if no image has two captions.
    """
    M = len(texts)
    partners = (torch.bincount(owner)[owner] - 1).double()
    queries = torch.nonzero(partners > 0)[:, 0]
    if not len(queries):
        raise DataError("caption retrieval needs samples with two captions or more")
    hits_of = []
    for rows in queries.split(max(1, HELD // M)):
        similarity = texts[rows] @ texts.t()
        similarity[torch.arange(len(rows)), rows] = -torch.inf
        nearest = similarity == similarity.amax(dim=1, keepdim=True)
        same = owner[rows, None] == owner
        hits_of.append((nearest & same).sum(dim=1) / nearest.sum(dim=1))
    hits = torch.bincount(owner[queries], torch.cat(hits_of).double())
    weights = torch.bincount(owner[queries])
    chance = float((partners[queries] / (M - 1)).mean())
    measures = share("top1", hits[weights > 0], weights[weights > 0])
    return measures | {"chance_top1": chance, "captions": float(M)}


def _run(sets: Sets, config: CaptionedConfig) -> Measures:
    """Measure the tuned model, and its base model as `before_*`, if the base model is there."""
    encoder = sets.encoder
    if not isinstance(encoder, TextEncoder):
        raise ArtifactError(f"{sets.what}: it has no tuned text tower")
    source = sets.open("captions", config.shards, config.modality)
    captions = [own for own in read_all_captions(source, config.captions) if own]
    texts, owner = flat_captions(captions, "eval.captions.shards")
    measures = caption_retrieval(encoder.encode_text(texts), owner)
    base = TextEncoder.before(encoder.artifact)
    if base is not None:
        base.to(next(encoder.parameters()).device)
        before = caption_retrieval(base.encode_text(texts), owner)
        measures |= {f"before_{k}": v for k, v in before.items() if k.startswith("top1")}
    return measures


def _rows(measures: Measures) -> Iterator[Row]:
    title, over = "caption to caption top1", f"{measures['captions']:.0f} captions"
    chance = measures["chance_top1"]
    if "before_top1" in measures:
        yield share_row(f"{title}, before tuning", measures, "before_top1", chance, over)
    yield share_row(title, measures, "top1", chance, over)


CAPTIONS = Suite(
    "captions",
    CaptionedConfig,
    needs=frozenset({SENTENCES}),
    run=_run,
    rows=_rows,
    title=titled("caption to caption"),
)
