"""Typed views of the run's config in a manifest; a key that an older version lacks has the value
that it stood for then.

All raise ArtifactError that names the artifact if its manifest lacks the section.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

from xray.artifacts.artifact import Artifact
from xray.artifacts.offers import DECODER, JOINT, USUAL_SECTION
from xray.config import BlockConfig, DataConfig, ModelConfig, SourceConfig, TextConfig
from xray.config.identity import older_values
from xray.config.model import ImageHead, TextHead
from xray.config.schedule import value_at
from xray.errors import ArtifactError, brief

if TYPE_CHECKING:
    from xray.models.mae_decoder import Masking

T = TypeVar("T")
OF_RUN = ("data", "optim", "train", "debug", "zero")  # sections of the run, not of the model


@dataclass(frozen=True)
class JointHead:
    """Sizes of the projections into the joint space."""

    embed_dim: int
    adapter_blocks: int
    text_head: TextHead = "adapter"
    image_head: ImageHead = "linear"
    head_bias: bool = False  # of linear heads
    matryoshka: list[int] = field(default_factory=list)  # prefixes trained to work alone


@dataclass(frozen=True)
class DecoderConfig:
    """A MAE decoder and the masks it was trained with."""

    decoder_dim: int
    decoder_depth: int
    decoder_heads: int
    mask_ratio: float
    video_mask_ratio: float
    norm_pix_loss: bool
    video_mask: str = "tube"
    norm_pix: str = "tubelet"

    @property
    def masking(self) -> Masking:
        """The masks of training."""
        from xray.models.mae_decoder import Masking

        return Masking(self.mask_ratio, self.video_mask_ratio, self.video_mask)


def model_config(artifact: Artifact) -> ModelConfig:
    """Read the backbone's settings; its weights are in the artifact and need no download."""
    return dataclasses.replace(read_section(ModelConfig, artifact, "model"), pretrained="")


def data_config(artifact: Artifact) -> DataConfig:
    """Read how images and clips are decoded and normalised, without the training sources."""
    config = read_section(DataConfig, artifact, "data")
    return dataclasses.replace(config, sources={}, blocks=[], validation=[])


def training_blocks(artifact: Artifact) -> list[tuple[BlockConfig, SourceConfig]]:
    """Read the blocks of a training step, each with its source."""
    data = _section(artifact, "data")
    sources = {n: _read(SourceConfig, s, artifact) for n, s in data.get("sources", {}).items()}
    blocks = [_read(BlockConfig, block, artifact) for block in data.get("blocks", ())]
    return [(block, sources[block.source]) for block in blocks if block.source in sources]


def image_side(artifact: Artifact) -> int:
    """Read the side in pixels of an image at the end of training."""
    return value_at(data_config(artifact).resolution, 1.0)


def text_config(artifact: Artifact) -> TextConfig:
    """Read the structure of the text tower."""
    if "text" not in artifact.manifest["config"]:
        raise ArtifactError(f"{artifact.path}, of stage {artifact.stage}, has no text tower")
    config = read_section(TextConfig, artifact, "text")
    config = dataclasses.replace(config, llm=artifact.llm or config.llm)
    # a tower that was tuned whole has no LoRA, whatever a later stage trains of it
    has_lora = any(".lora_" in name for name in artifact.manifest["tensors"].get("text", {}))
    return config if has_lora else dataclasses.replace(config, lora_rank=0)


def joint_head(artifact: Artifact) -> JointHead:
    """Read the projections into the joint space."""
    return _read(JointHead, head_section(artifact, JOINT), artifact)


def decoder_config(artifact: Artifact) -> DecoderConfig:
    """Read the MAE decoder's sizes and masks."""
    return _read(DecoderConfig, head_section(artifact, DECODER), artifact)


def license_of(manifest: Mapping[str, Any]) -> str:
    """Read the licence of the weights as the run stated it, "" if it did not."""
    return str(manifest["config"].get("license", ""))


def stage_sections(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """Select the sections of the model and of the stages, without those of a single run."""
    return {k: v for k, v in manifest["config"].items() if isinstance(v, dict) and k not in OF_RUN}


def head_section(artifact: Artifact, capability: str) -> Mapping[str, Any]:
    """Read the section of a capability's head, as the stage named it in the manifest."""
    heads = artifact.manifest.get("heads", {})
    return _section(artifact, heads.get(capability, USUAL_SECTION[capability]))


def read_section(schema: type[T], artifact: Artifact, name: str) -> T:
    """Read a section of the config as a dataclass, without keys that it does not know."""
    return _read(schema, _section(artifact, name), artifact)


def _section(artifact: Artifact, name: str) -> Mapping[str, Any]:
    section = artifact.manifest["config"].get(name)
    if not isinstance(section, Mapping):
        raise ArtifactError(f"the manifest of {artifact.path} has no section config.{name}")
    return section


def _read(schema: type[T], section: Mapping[str, Any], artifact: Artifact) -> T:
    names = {item.name for item in dataclasses.fields(schema)}  # type: ignore[arg-type]
    known = {key: value for key, value in section.items() if key in names}
    try:
        return schema(**(older_values(schema) | known))
    except TypeError as error:
        raise ArtifactError(
            f"the config in the manifest of {artifact.path} is incomplete: {brief(error)}"
        ) from error
