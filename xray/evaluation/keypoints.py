"""Keypoint correspondence: the patch of a target picture that is nearest to a source's keypoint.

PCK, the percentage of correct keypoints, is the share of matches within a threshold of the target's
keypoint (SPair-71k, 1908.10543).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from data_pipelines.decode.images import open_image, upright_size
from data_pipelines.decode.preparation import view_geometry
from data_pipelines.decode.transforms import load_pixels, media_of
from data_pipelines.ingest.keypoints import KeypointPairs, open_pairs
from data_pipelines.shards.source import Sample
from data_pipelines.stream.loaded import Fields
from xray.artifacts.encoders import VisionEncoder
from xray.errors import DataError
from xray.evaluation.confidence import share
from xray.evaluation.datasets import Sets
from xray.evaluation.feature_extraction import Samples
from xray.evaluation.masked_tokens import dense_tokens
from xray.evaluation.suites.keypoints import KeypointsConfig
from xray.evaluation.token_files import Rows, batch_of, stored, token_folder
from xray.progress import progress_of

SAME = 1e-6  # difference of cosines of patches that share a token


@dataclass(frozen=True)
class TokensAndPlaces(Samples):
    """Encoding of pictures to their patch tokens, and the places of their views in them."""

    def fields(self, sample: Sample) -> Fields:
        """Load a picture, [1, 3, S, S] uint8, and its place: left, top, across, down, W, H, S."""
        size = upright_size(open_image(media_of(sample)))
        corner, scales = view_geometry(*size, self.data, sample.resolution)
        place = torch.tensor([*corner, *scales, *size, sample.resolution], dtype=torch.float64)
        return {"pixels": load_pixels(sample, self.data, None), "place": place}

    @torch.no_grad()
    def encode(self, encoder: VisionEncoder, numbers: Iterable[int]) -> Iterator[Fields]:
        """Yield tokens [B, h, w, D] float16 and places [B, 7] of these batches."""
        for batch in self.load(numbers):
            yield {"tokens": dense_tokens(encoder, batch["pixels"]), "place": batch["place"]}


def match_keypoints(sets: Sets, config: KeypointsConfig) -> dict[str, float]:
    """Measure PCK over all keypoints, with its interval over pairs, and that of a random patch.

    A keypoint's feature is interpolated between the patches of the source, and matches the centre
    of the target's patch of the highest cosine; the mean over patches that share a merged token
    counts. Keypoints outside of the view of a picture are left out and counted. Raises DataError
    for one outside of its picture, and if none is left.
    """
    device = sets.vision.normalize.mean.device
    pairs = open_pairs("eval.keypoints.pairs", config.pairs, sets.data.root)
    task = TokensAndPlaces(pairs.source, sets.data, sets.config.batch_size)
    with token_folder() as folder, torch.no_grad():
        files = stored(pairs.source, sets.encoded(task), folder / "pictures")
        places = torch.from_numpy(np.array(files["place"]))
        views, shown = _in_views(pairs, places)
        if not shown.any():
            raise DataError(f"{pairs.where}: all keypoints are outside of the pictures' views")
        hits, chances = _matches(pairs, files["tokens"], places, views, shown, config, device)
    of_pair = torch.from_numpy(pairs.pair)[shown]
    counts = torch.zeros(3, len(pairs.pictures), dtype=torch.float64)
    counts.index_add_(1, of_pair, torch.stack([hits, chances, torch.ones_like(hits)]))
    hit, chance, keypoints = counts[:, counts[2] > 0]
    return share("PCK", hit, keypoints) | {
        "chance_PCK": (chance.sum() / keypoints.sum()).item(),
        "alpha": config.alpha,
        "pairs": float(len(keypoints)),
        "keypoints": keypoints.sum().item(),
        "left_out": float((~shown).sum()),
    }


def _in_views(pairs: KeypointPairs, places: Tensor) -> tuple[Tensor, Tensor]:
    """Return the keypoints in the views, in [0, 1): [K, 2 pictures, 2], and which are shown [K]."""
    own = places[torch.from_numpy(pairs.pictures[pairs.pair])]  # [K, 2, 7]
    points = torch.from_numpy(pairs.points).view(-1, 2, 2)
    outside = ((points < 0) | (points > own[..., 4:6])).any(dim=2).any(dim=1)
    if outside.any():
        row = int(outside.nonzero()[0, 0])
        raise DataError(f"{pairs.where}, data row {row + 1}: a keypoint is outside of its picture")
    views = (points - own[..., :2]) / own[..., 2:4] / own[..., 6:]
    return views, ((views >= 0) & (views < 1)).all(dim=2).all(dim=1)


def _matches(
    pairs: KeypointPairs,
    tokens: Rows,
    places: Tensor,
    views: Tensor,
    shown: Tensor,
    config: KeypointsConfig,
    device: torch.device,
) -> tuple[Tensor, Tensor]:
    """Return the shares of the nearest, and of all patches that are correct, of shown keypoints."""
    h, w = tokens.shape[1:3]
    rows, columns = torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij")
    centres = torch.stack([(columns + 0.5) / w, (rows + 0.5) / h], dim=2).flatten(0, 1).double()
    hits, chances = torch.zeros(2, len(pairs.pair), dtype=torch.float64)
    chosen = [np.flatnonzero((pairs.pair == n) & shown.numpy()) for n in range(len(pairs.pictures))]
    for number, own in enumerate(progress_of("keypoints")(iter(chosen), len(chosen))):
        source, target = pairs.pictures[number]
        features = F.normalize(
            batch_of(tokens, np.array([source, target]), device).permute(0, 3, 1, 2), dim=1
        )
        asked = interpolated(features[0], views[own, 0].to(device))
        cosines = (asked @ features[1].flatten(1)).cpu()
        best = (cosines >= cosines.amax(dim=1, keepdim=True) - SAME).double()
        left, top, across, down, width, height, side = places[target].tolist()
        scale = torch.tensor([across * side, down * side], dtype=torch.float64)
        wanted = torch.from_numpy(pairs.points[own, 2:])
        distance = (centres * scale + torch.tensor([left, top]) - wanted[:, None]).norm(dim=2)
        size = torch.from_numpy(pairs.sizes[own]).nan_to_num(max(width, height))
        correct = (distance <= config.alpha * size[:, None]).double()
        hits[own] = (best * correct).sum(dim=1) / best.sum(dim=1)
        chances[own] = correct.mean(dim=1)
    return hits[shown], chances[shown]


def interpolated(features: Tensor, points: Tensor) -> Tensor:
    """Interpolate features [D, h, w] at points [n, 2], x and y in [0, 1]: [n, D], normalised."""
    grid = (2 * points - 1).to(features.dtype)[None, None]
    found = F.grid_sample(features[None], grid, padding_mode="border", align_corners=False)
    return F.normalize(found[0, :, 0].t(), dim=-1)
