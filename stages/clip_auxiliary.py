"""Auxiliary losses of the clip stage: masked reconstruction and tag classification."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from data_pipelines.shards.source import Sample, Source
from data_pipelines.tags.labels import Labeller, label, mean_frequency, tag_frequency
from stages.base import Batch, VisionModule, sketch
from stages.clip_config import ClipConfig
from stages.hashtag import find_vocabulary
from stages.mae import draw_noise, make_decoder, reconstruct
from xray.losses.named import tag_loss
from xray.losses.reconstruction import masked_patch_mse
from xray.models.backbone import VisionBackbone
from xray.models.heads import TagHead


class AuxiliaryLosses(nn.Module):
    """MAE decoder and tag head, if their weights are above 0; they give a loss per sample.

    They are used in training only and are not part of the artifact.
    """

    def __init__(self, config: ClipConfig, vision: VisionBackbone, tags: int) -> None:
        super().__init__()
        self.mae, self.hashtag = config.mae, config.hashtag
        self.decoder = make_decoder(self.mae, vision) if config.clip.mae_weight else None
        self.tag_head = TagHead(vision.embed_dim, tags) if config.clip.hashtag_weight else None
        self.tag_loss = tag_loss(self.hashtag.loss)(self.hashtag.smoothing, self.hashtag.chunk)

    def forward(
        self,
        module: VisionModule,
        batch: Batch,
        pixels: Tensor,
        cls: Tensor | None,
        progress: float,
    ) -> dict[str, Tensor]:
        """Compute mae_loss and hashtag_loss, [B] each; 0 for a sample without tags.

        cls: the backbone's feature, which only the tag loss reads.
        """
        terms = {}
        if self.decoder is not None:
            noise = batch["mask_noise"]
            given = reconstruct(module, self.decoder, self.mae, pixels, noise, progress)
            terms["mae_loss"] = masked_patch_mse(given["predictions"], given["targets"])
        if self.tag_head is not None and cls is not None:
            tags, weights = batch["tags"], batch["weights"]
            targets = self.tag_loss.targets(weights)
            losses, _ = self.tag_head(cls, lambda x, w, b: self.tag_loss(x, w, b, tags, targets))
            terms["hashtag_loss"] = losses * (weights.sum(dim=1) > 0)
        return terms


class AuxiliaryData:
    """Inputs of the auxiliary losses for each sample: noise for the masks, and tags."""

    def __init__(self, config: ClipConfig, sources: dict[str, Source]) -> None:
        self.config = config
        self.tags = 0
        if config.clip.hashtag_weight:
            self.vocabulary = find_vocabulary(config, config.hashtag, sources)
            self.tags = len(self.vocabulary)
            self.labels = {}
            for name, source in sources.items():
                own = config.data.sources[name]
                work = Labeller(
                    source, own.tags, config.hashtag, self.vocabulary, captions=own.captions
                )
                self.labels[name] = label(work, config.data.workers)
            seen = [
                (block.samples, tag_frequency(self.labels[block.source], self.tags))
                for block in config.blocks
            ]
            self.frequency = torch.from_numpy(mean_frequency(seen))
        if config.clip.mae_weight:
            self.geometry = sketch(config).geometry

    def start(self, losses: AuxiliaryLosses) -> None:
        """Initialise the tag head's bias from the tags' frequencies."""
        if losses.tag_head is not None:
            losses.tag_head.start(losses.tag_loss.initial_bias(self.frequency))

    def transform(self, sample: Sample, pixels: Tensor, rng: np.random.Generator | None) -> Batch:
        batch: Batch = {}
        if self.config.clip.mae_weight:
            batch["mask_noise"] = draw_noise(self.config.mae, self.geometry, pixels, rng)
        if self.tags:
            labels, place = self.labels[sample.source], (sample.shard, sample.member)
            batch["tags"] = torch.tensor(labels.row(*place, "ids"), dtype=torch.long)
            batch["weights"] = torch.tensor(labels.row(*place, "weights"))
        return batch

    def inputs(self) -> dict[str, str]:
        """Return hashes of the inputs."""
        return {"vocabulary": self.vocabulary.digest} if self.tags else {}
