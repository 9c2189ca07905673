"""Models loaded from artifacts."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from xray.artifacts.artifact import Artifact
from xray.artifacts.language_model import Language
from xray.artifacts.limits import check_size, sized
from xray.artifacts.manifest_config import (
    data_config,
    decoder_config,
    head_section,
    joint_head,
    model_config,
    text_config,
)
from xray.artifacts.offers import JOINT, SENTENCES, TAGS, VISION
from xray.config import DataConfig, Precision
from xray.config.schedule import largest
from xray.errors import ArtifactError, ConfigError, DataError
from xray.losses.named import tag_loss
from xray.models.backbone import VisionBackbone
from xray.models.heads import Normalize, TagHead, image_head, text_head
from xray.models.inference import autocast, one_behind
from xray.models.mae_decoder import MaeDecoder
from xray.models.token_reduction import KeepRate
from xray.models.tokenizer import CaptionTokenizer, TokenIds
from xray.models.weight_loading import load_adapted, part
from xray.progress import progress_of

TEXTS = 256  # captions per batch


def class_weights(
    encode: Callable[[Sequence[str]], Tensor], names: Sequence[str], templates: Sequence[str]
) -> Tensor:
    """Compute class features [C, E]: normalised means over prompts (CLIP, 2103.00020).

    templates: prompts with `{}` for the class name.
    """
    prompts = [template.replace("{}", name) for name in names for template in templates]
    features = F.normalize(encode(prompts), dim=-1).reshape(len(names), len(templates), -1)
    return F.normalize(features.mean(dim=1), dim=-1)


class VisionEncoder(nn.Module):
    """Backbone of an artifact; encodes [B, T, 3, H, W] uint8 pixels in its `precision`."""

    precision: Precision = "fp32"

    def __init__(self, artifact: Artifact) -> None:
        super().__init__()
        self.artifact = artifact
        model, data = model_config(artifact), data_config(artifact)
        self.keep_rate: KeepRate = artifact.manifest["keep_rate"]
        with torch.device("meta"):  # its weights are loaded below
            vision = VisionBackbone(model, largest(data.resolution), largest(data.frames))
        stored = artifact.load("backbone")
        _check_tables(artifact, vision, stored)
        self.vision = vision.to_empty(device="cpu")
        load_adapted(self.vision, stored, str(artifact.path))
        self.normalize = Normalize(*data.normalisation)
        self.eval()

    def choose(self, keep_rate: KeepRate) -> None:
        """Set another keep rate; raises ConfigError if the model cannot have it."""
        try:
            self.vision.rates(keep_rate)
        except ConfigError as error:
            raise ConfigError(f"{self.artifact.path}: {error}") from error
        self.keep_rate = keep_rate

    @torch.no_grad()
    def features(self, pixels: Tensor) -> Tensor:
        """Encode [B, T, 3, H, W] to normalised CLS features [B, D] on CPU."""
        return F.normalize(self.cls(pixels).float(), dim=-1).cpu()

    def cls(self, pixels: Tensor) -> Tensor:
        """Encode [B, T, 3, H, W] pixels in 0..255 to CLS features [B, D] on the model's device.

        Float pixels receive a gradient through kept and fused tokens, not through their choice.
        """
        pixels = pixels.to(self.normalize.mean.device, non_blocking=True)
        with autocast(pixels.device, self.precision):
            return self.vision(self.normalize(pixels), self.keep_rate).cls


def _check_tables(artifact: Artifact, vision: VisionBackbone, stored: Mapping[str, Tensor]) -> None:
    """Raise ArtifactError if the manifest gives other sizes of positions, or a far larger model."""
    for name, field in (("pos_embed", "data.resolution"), ("pos_temporal", "data.frames")):
        table = getattr(vision, name)
        if table is not None and name in stored and table.shape[1] != stored[name].shape[1]:
            raise ArtifactError(
                f"{artifact.path}: config.{field} in its manifest makes {name} of "
                f"{list(table.shape)}, and it stores {list(stored[name].shape)}: the manifest is "
                "damaged"
            )
    check_size(artifact, stored, "config.model", lambda: vision)


class ImageEncoder(VisionEncoder):
    """Vision side of a joint space, whose features are float32 and normalised."""

    def __init__(self, artifact: Artifact) -> None:
        super().__init__(artifact)
        options = self.options = joint_head(artifact)
        head = artifact.load("head")
        sizes = options.image_head, self.vision.embed_dim, options.embed_dim, options.head_bias
        section = "config of the joint space"
        self.vision_projection = sized(artifact, head, section, lambda: image_head(*sizes))
        self.vision_projection.load_state_dict(part(head, "vision_projection."))
        self.logit_scale = head["logit_scale"].exp()
        self.eval()

    @torch.no_grad()
    def encode_pixels(self, pixels: Tensor) -> Tensor:
        """Encode [B, T, 3, H, W] to [B, E] in the joint space, normalised, on CPU."""
        return self.image_features(pixels).cpu()

    def image_features(self, pixels: Tensor) -> Tensor:
        """Encode [B, T, 3, H, W] to normalised [B, E] in the joint space, on the model's device."""
        return self.joint(self.cls(pixels))

    def joint(self, cls: Tensor) -> Tensor:
        """Project CLS features [B, D] to [B, E] in the joint space, normalised."""
        with autocast(cls.device, self.precision):
            projected = self.vision_projection(cls)
        return F.normalize(projected.float(), dim=-1)


class Encoder(ImageEncoder):
    """Joint space of images, clips and texts: backbone, text tower and their projections."""

    def __init__(self, artifact: Artifact) -> None:
        super().__init__(artifact)
        text = dataclasses.replace(text_config(artifact), tune="none")
        language = Language(text, artifact)
        self.text, self.tokenizer = language.build(), language.tokenizer
        options = self.options
        sizes = self.text.width, options.embed_dim, options.adapter_blocks, options.head_bias
        self.matryoshka, head = options.matryoshka, artifact.load("head")
        self.text_adapter = sized(
            artifact, head, "config of the text head", lambda: text_head(options.text_head, *sizes)
        )
        # the bias of the sigmoid loss does not change a ranking
        alone = ("logit_scale", "logit_bias")
        state = {name: value for name, value in head.items() if name not in alone}
        wrong = self.load_state_dict(state, strict=False).unexpected_keys
        if wrong:
            raise ArtifactError(f"{artifact.path}: head.safetensors has an unknown {wrong[0]}")
        self.eval()

    def text_features(self, tokens: TokenIds) -> Tensor:
        """Encode tokens [..., L] to [..., E] in the joint space, normalised."""
        with autocast(tokens["input_ids"].device, self.precision):
            adapted = self.text_adapter(self.text(**tokens))
        return F.normalize(adapted.float(), dim=-1)

    @torch.no_grad()
    def encode_text(self, captions: Sequence[str]) -> Tensor:
        """Encode N captions to [N, E] in the joint space, normalised, on CPU."""
        device = self.normalize.mean.device
        return encode_captions(captions, self.tokenizer, self.text_features, device)


class TextEncoder(nn.Module):
    """Text tower of a text artifact, or its base model before tuning; runs in its `precision`."""

    precision: Precision = "fp32"

    def __init__(self, artifact: Artifact, language: Language) -> None:
        super().__init__()
        self.artifact, self.tokenizer = artifact, language.tokenizer
        self.text = language.build()
        self.eval()

    @classmethod
    def after(cls, artifact: Artifact) -> TextEncoder:
        """Load the tuned model."""
        config = dataclasses.replace(text_config(artifact), tune="none")
        return cls(artifact, Language(config, artifact))

    @functools.cached_property
    def base(self) -> TextEncoder | None:
        """Load the model before tuning; None if its folder is gone or contains another model."""
        artifact = self.artifact
        config = dataclasses.replace(text_config(artifact), tune="none", lora_rank=0)
        if config.pooling == "latent":  # the base model has no such weights
            config = dataclasses.replace(config, pooling="mean")
        try:
            language = Language(config)
        except ConfigError:
            return None
        if language.digest != artifact.manifest["inputs"]["llm"]:
            return None
        base = TextEncoder(artifact, language).to(next(self.parameters()).device)
        base.precision = self.precision
        return base

    def text_features(self, tokens: TokenIds) -> Tensor:
        """Encode tokens [..., L] to sentence vectors [..., W]."""
        with autocast(tokens["input_ids"].device, self.precision):
            vectors: Tensor = self.text(**tokens)
        return vectors

    @torch.no_grad()
    def encode_text(self, captions: Sequence[str]) -> Tensor:
        """Encode N captions to sentence vectors [N, W], normalised, on CPU."""
        device = next(self.text.parameters()).device
        return encode_captions(captions, self.tokenizer, self.text_features, device)


def encode_captions(
    captions: Sequence[str],
    tokenizer: CaptionTokenizer,
    encode: Callable[[TokenIds], Tensor],
    device: torch.device,
) -> Tensor:
    """Encode N captions to normalised float32 [N, D] on CPU; raises DataError if not finite."""

    def encode_all(captions: Sequence[str]) -> Tensor:
        starts = range(0, len(captions), TEXTS)
        rows = caption_rows(captions, starts, tokenizer, encode, device)
        return normalised_rows(progress_of("texts")(rows, len(starts)))

    return encode_longest_first(captions, tokenizer, encode_all)


def encode_longest_first(
    captions: Sequence[str], tokenizer: CaptionTokenizer, encode: Callable[[Sequence[str]], Tensor]
) -> Tensor:
    """Encode N captions to [N, D]; `encode` gets them sorted, so that batches have little padding.

    The longest ones are first: if they do not fit in memory, this is seen at once.
    """
    order = torch.tensor(tokenizer.lengths(captions)).argsort(descending=True, stable=True)
    return encode([captions[number] for number in order.tolist()])[order.argsort()]


def caption_rows(
    captions: Sequence[str],
    starts: Iterable[int],
    tokenizer: CaptionTokenizer,
    encode: Callable[[TokenIds], Tensor],
    device: torch.device,
) -> Iterator[dict[str, Tensor]]:
    """Yield the rows [n, D] float32 of up to TEXTS captions from each start, on the device."""
    for start in starts:
        tokens = tokenizer(captions[start : start + TEXTS])
        yield {"rows": encode({k: v.to(device) for k, v in tokens.items()}).float()}


def normalised_rows(batches: Iterable[Mapping[str, Tensor]]) -> Tensor:
    """Join the rows of captions, normalised, on CPU; raises DataError if they are not finite."""
    parts = []
    for _, batch in one_behind((None, batch) for batch in batches):
        parts.append(batch["rows"])
        if not parts[-1].isfinite().all():
            raise DataError("the text tower's features are NaN or infinite")
    return F.normalize(torch.cat(parts), dim=-1)


class Tagger(VisionEncoder):
    """Backbone and tag head of an artifact."""

    def __init__(self, artifact: Artifact) -> None:
        super().__init__(artifact)
        weights = artifact.load("head")
        self.head = TagHead(self.vision.embed_dim, len(weights["bias"]))
        self.head.load_state_dict(weights)
        loss = head_section(artifact, TAGS).get("loss", "softmax")
        self.loss = tag_loss(loss, f"{artifact.path}: hashtag.loss")()
        self.eval()

    @torch.no_grad()
    def probabilities(self, pixels: Tensor, temperature: float = 1.0) -> Tensor:
        """Compute tag probabilities [B, V] of [B, T, 3, H, W]: softmax or sigmoid, as trained."""
        cls = self.cls(pixels)
        with autocast(cls.device, self.precision):
            logits = self.head(cls)
        return self.loss.activate(logits.float() / temperature)


class PromptTagger(nn.Module):
    """Zero-shot tagger: a softmax over the similarity to each tag's prompt."""

    def __init__(self, encoder: Encoder, tags: Sequence[str], template: str) -> None:
        super().__init__()
        self.encoder = encoder
        self.weights = class_weights(encoder.encode_text, tags, [template])

    def probabilities(self, pixels: Tensor, temperature: float = 1.0) -> Tensor:
        """Compute probabilities [B, V] of [B, T, 3, H, W], on CPU."""
        scale = self.encoder.logit_scale / temperature
        return (scale * self.encoder.encode_pixels(pixels) @ self.weights.t()).softmax(dim=1)


def restore_encoder(artifact: Artifact) -> VisionEncoder | TextEncoder:
    """Load the most capable encoder that an artifact offers; raises ArtifactError for none."""
    if VISION in artifact.offers:
        return vision_encoder(artifact, Encoder)
    if SENTENCES in artifact.offers:
        return TextEncoder.after(artifact)
    raise ArtifactError(f"{artifact.path}, of stage {artifact.stage}, has no encoder")


def vision_encoder(artifact: Artifact, joint: type[ImageEncoder] = ImageEncoder) -> VisionEncoder:
    """Load the backbone of an artifact with its tag head, or as `joint` if it has a joint space."""
    if JOINT in artifact.offers:
        return joint(artifact)
    return (Tagger if TAGS in artifact.offers else VisionEncoder)(artifact)


def restore_decoder(artifact: Artifact, vision: VisionBackbone) -> MaeDecoder:
    """Build the MAE decoder of an artifact with its weights, in eval mode."""
    options = decoder_config(artifact)
    sizes = options.decoder_dim, options.decoder_depth, options.decoder_heads
    stored = artifact.load("decoder")
    decoder = sized(
        artifact, stored, "config of the decoder",
        lambda: MaeDecoder(vision.embed_dim, vision.patch_values, *sizes, vision.rows_first),
    )  # fmt: skip
    decoder.load_state_dict(stored)
    return decoder.eval()


def data_of(artifact: Artifact, workers: int) -> DataConfig:
    """Return how the artifact's own run read its samples, for this number of workers."""
    return dataclasses.replace(data_config(artifact), workers=workers)
