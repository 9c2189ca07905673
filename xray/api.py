"""Python API: an artifact as a model of images, clips and texts.

model = xray.load("runs/quickstart/clip")
likeness = model.encode_image("photo.jpg") @ model.encode_text(["a dog", "a cat"]).T
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from data_pipelines.decode.transforms import modality_of, read_media, read_picture
from data_pipelines.tags.vocabulary import Vocabulary
from xray import dist
from xray.artifacts.artifact import Artifact, open_artifact
from xray.artifacts.encoders import (
    Encoder,
    PromptTagger,
    Tagger,
    TextEncoder,
    VisionEncoder,
    restore_encoder,
)
from xray.artifacts.manifest_config import data_config
from xray.config.schedule import value_at
from xray.errors import ArtifactError, ConfigError, DataError, brief
from xray.files import printable
from xray.models.token_reduction import KeepRate

Media = str | Path | Image.Image | Tensor  # a file, an image, or a result of `preprocess`
TEMPLATE = "a photo of a {}"


def load(
    artifact: str | Path, *, device: str = "auto", keep_rate: KeepRate | None = None, llm: str = ""
) -> Model:
    """Load the model of an artifact.

    Args:
        artifact: its folder, its stage's folder, or a URL that fsspec reads (downloaded once).
        device: auto (a GPU if there is one), or a torch device: cpu, cuda, cuda:1.
        keep_rate: share of patch tokens kept at each reducing block, or one per block, instead of
            the artifact's own; 1 = all.
        llm: folder of the base LLM, if it has moved since training.

    Raises ArtifactError for a missing or damaged artifact, ConfigError for an impossible keep rate.
    """
    return Model(open_artifact(artifact, llm), device, keep_rate)


class Model:
    """Model of an artifact; all features are float32, normalised, on CPU.

    artifact: with the manifest. encoder: the torch module. A method that the artifact does not
    support raises ArtifactError; a file or value that cannot be read raises DataError.
    """

    def __init__(
        self, artifact: Artifact, device: str = "auto", keep_rate: KeepRate | None = None
    ) -> None:
        place = _device(device)
        self.artifact = artifact
        self.encoder = restore_encoder(artifact).to(place)
        if keep_rate is not None:
            self._vision("keep_rate").choose(keep_rate)
        self.data = data_config(artifact)

    def __repr__(self) -> str:
        return f"<xray {self.stage} model of {self.artifact.origin}>"

    @property
    def stage(self) -> str:
        """Name of the stage that made the artifact."""
        return self.artifact.stage

    @property
    def resolution(self) -> int:
        """Side in pixels of the images that the model sees."""
        return value_at(self.data.resolution, 1.0)

    @property
    def frames(self) -> int:
        """Number of frames that the model sees of a clip."""
        return value_at(self.data.frames, 1.0)

    @property
    def tags(self) -> tuple[str, ...]:
        """Tags of a hashtag artifact, the most frequent first."""
        if not isinstance(self.encoder, Tagger):
            raise self._cannot("tags", "a hashtag artifact")
        return Vocabulary.load(self.artifact.file("vocabulary.json")).tags

    def preprocess(self, media: str | Path | Image.Image) -> Tensor:
        """Decode an image to [3, S, S] uint8, or a clip file to [T, 3, S, S], as in evaluation.

        Takes the largest centred square, resized once, and the middle frames. The model normalises.
        """
        self._vision("preprocess")
        pixels = self._read(media)
        return pixels if _is_clip(media) else pixels[0]

    def encode_image(self, images: Media | Sequence[Media], batch_size: int = 64) -> Tensor:
        """Encode images to [N, E]: in the joint space with texts (clip), else CLS features.

        A tensor is one image [3, S, S] or many [N, 3, S, S], uint8 from `preprocess`.
        """
        return self._encode(_each(images, (3,), "encode_image"), False, batch_size)

    def encode_video(self, clips: Media | Sequence[Media], batch_size: int = 8) -> Tensor:
        """Encode clips to [N, E], as `encode_image`; a tensor is uint8 [T, 3, S, S] or [N, ...]."""
        return self._encode(_each(clips, (4,), "encode_video"), True, batch_size)

    def encode_text(self, texts: str | Sequence[str]) -> Tensor:
        """Encode texts to [N, E]: in the joint space (clip), or sentence vectors (text)."""
        if not isinstance(self.encoder, Encoder | TextEncoder):
            raise self._cannot("encode_text", "a clip or text artifact")
        wrong = "encode_text takes a text or a list of texts, and at least one"
        if not isinstance(texts, Iterable):
            raise DataError(f"{wrong}: not {texts!r}")
        texts = [texts] if isinstance(texts, str) else list(texts)
        if not texts or not all(isinstance(text, str) for text in texts):
            raise DataError(wrong)
        return self.encoder.encode_text([printable(text) for text in texts])

    def tag(
        self,
        media: Media | Sequence[Media],
        tags: Iterable[str] | None = None,
        top: int = 5,
        template: str = TEMPLATE,
        batch_size: int = 64,
    ) -> list[list[tuple[str, float]]]:
        """Return the `top` tags of each image or clip with their probabilities, most probable
        first.

        A hashtag artifact has its own tags. A clip artifact chooses among `tags` by a softmax over
        similarities to prompts: `template` with the tag in place of {}. A tensor is one image
        [3, S, S]; in a list also a clip [T, 3, S, S].
        """
        if top < 1:
            raise ConfigError(f"top={top} must be at least 1")
        tagger, names = self._tagger(tags, template)
        shown = min(top, len(names))
        ranked = []
        for pixels in _batches(map(self._read, _each(media, (3, 4), "tag")), batch_size):
            values, places = tagger(pixels).float().cpu().topk(shown, dim=1)
            for row, ids in zip(values.tolist(), places.tolist(), strict=True):
                ranked.append([(names[i], value) for i, value in zip(ids, row, strict=True)])
        return ranked

    def _tagger(
        self, tags: Iterable[str] | None, template: str
    ) -> tuple[Callable[[Tensor], Tensor], Sequence[str]]:
        """Return a function from [B, T, 3, S, S] to probabilities [B, V], and the V names."""
        if isinstance(self.encoder, Tagger):
            if tags is not None:
                raise ConfigError("a hashtag artifact has fixed tags (model.tags): leave out tags=")
            return self.encoder.probabilities, self.tags
        if not isinstance(self.encoder, Encoder):
            raise self._cannot("tag", "a hashtag or clip artifact")
        names = [] if tags is None or isinstance(tags, str) else list(tags)
        if not names or not all(isinstance(name, str) for name in names):
            raise ConfigError("a clip artifact needs the names of the tags: tag(..., tags=[...])")
        if "{}" not in template:
            raise ConfigError(f"template={template!r} needs {{}} in the place of the tag")
        tagger = PromptTagger(self.encoder, list(map(printable, names)), template)
        return tagger.probabilities, names

    def _encode(self, media: Sequence[Media], clips: bool, batch_size: int) -> Tensor:
        encoder = self._vision("encode_video" if clips else "encode_image")
        encode = encoder.encode_pixels if isinstance(encoder, Encoder) else encoder.features
        for item in media:
            if not isinstance(item, Tensor) and _is_clip(item) != clips:
                which = ("encode_image", "encode_video")[not clips]
                raise DataError(f"{item} is {'not ' if clips else ''}a clip: use {which}")
        batches = _batches(map(self._read, media), batch_size)
        return torch.cat([encode(pixels) for pixels in batches])

    def _read(self, media: Media) -> Tensor:
        """Read one item as [T, 3, S, S] uint8."""
        if isinstance(media, Tensor):
            return media if media.ndim == 4 else media[None]
        if isinstance(media, Image.Image):
            return read_picture(media, self.data)
        return read_media(Path(os.path.expanduser(media)), self.data)

    def _vision(self, what: str) -> VisionEncoder:
        if not isinstance(self.encoder, VisionEncoder):
            raise self._cannot(what, "an artifact with a backbone (mae, hashtag or clip)")
        return self.encoder

    def _cannot(self, what: str, needed: str) -> ArtifactError:
        return ArtifactError(
            f"{self.artifact.origin} is of stage {self.stage}: {what} needs {needed}"
        )


def _device(name: str) -> torch.device:
    if name in ("auto", "cpu"):
        return dist.choose_device(name)
    try:
        return torch.empty(0, device=name).device
    except (AssertionError, RuntimeError) as error:  # no such device, or a torch without CUDA
        raise ConfigError(f"device={name!r} cannot be used: {brief(error)}") from error


def _is_clip(media: str | Path | Image.Image) -> bool:
    return not isinstance(media, Image.Image) and modality_of(Path(media)) == "video"


def _each(media: Media | Sequence[Media], dimensions: tuple[int, ...], what: str) -> list[Media]:
    """Return one item or many as a list; dimensions: those that an item's tensor may have."""
    if isinstance(media, Tensor) and media.ndim == dimensions[0] + 1:
        if media.ndim in dimensions:
            raise DataError(
                f"{what} was given a tensor {list(media.shape)}, which is a clip or several "
                "pictures: give [tensor] for the clip, list(tensor) for the pictures"
            )
        media = list(media)
    many = isinstance(media, Sequence) and not isinstance(media, str)
    items: list[Any] = list(media) if many else [media]  # type: ignore[arg-type]
    if not items:
        raise DataError(f"{what} was given nothing")
    for item in items:
        if isinstance(item, Tensor):
            good = item.dtype == torch.uint8 and item.ndim in dimensions and item.shape[-3] == 3
            if not good:
                raise DataError(
                    f"{what} was given a tensor {list(item.shape)} of {item.dtype}: it takes uint8 "
                    "pixels from preprocess, with or without a batch dimension"
                )
        elif not isinstance(item, str | Path | Image.Image):
            raise DataError(
                f"{what} was given a {type(item).__name__}: it takes files, PIL pictures, tensors "
                "of preprocess, or a list of them"
            )
    return items


def _batches(each: Iterator[Tensor], size: int) -> Iterator[Tensor]:
    """Stack up to `size` consecutive items of the same shape to [B, T, 3, S, S]."""
    if size < 1:
        raise ConfigError(f"batch_size={size} must be at least 1")
    batch: list[Tensor] = []
    for pixels in each:
        if batch and (len(batch) == size or batch[0].shape != pixels.shape):
            yield torch.stack(batch)
            batch = []
        batch.append(pixels)
    yield torch.stack(batch)
