"""Typed configuration: dataclasses <- yaml layers <- `key=value`, strict, dumped and hashed.

A field is *identity* (it changes the result, is hashed, and must be equal when a run is resumed)
unless it is declared with `runtime()`: workers, micro-batch, ZeRO stage, logging, saving, paths.
"""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import importlib.util
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

from omegaconf import OmegaConf
from omegaconf.errors import ConfigKeyError, OmegaConfBaseException

from xray.errors import ConfigError

# Sections whose value may be the name of a shipped yaml: `model=vit_b16`, `zero=2`.
PRESETS = ("model", "zero")
# The linear layers of Llama-style decoders, where LoRA goes by default.
LINEAR_LAYERS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def runtime(default: Any = dataclasses.MISSING, factory: Any = dataclasses.MISSING) -> Any:
    """Declare a field that does not change the result and is left out of the config's hash."""
    return field(default=default, default_factory=factory, metadata={"runtime": True})


@dataclass
class ModelConfig:
    """The vision backbone."""

    name: str = "vit_tiny_patch16_224"  # any standard timm VisionTransformer
    kwargs: dict[str, Any] = field(default_factory=dict)  # passed to timm (embed_dim, depth, ...)
    tubelet: int = 2  # frames per video token
    reduce: Literal["none", "evit"] = "evit"
    reduce_at: list[int] | None = None  # zero-based blocks; None = depth/4, 2/4, 3/4
    keep_rate: float = 1.0  # share of patch tokens kept at each reducing block, at the end
    keep_rate_levels: int = 8  # steps from 1 to keep_rate
    keep_rate_span: list[float] = field(default_factory=lambda: [0.0, 0.5])  # of the stage
    drop_path: float = 0.0
    pretrained: str = runtime("")  # timm weights: a local .safetensors file, or "timm" for the hub
    grad_checkpointing: bool = runtime(False)


@dataclass
class SourceConfig:
    """One set of webdataset shards."""

    shards: str = ""  # a folder, a glob or a {000..123} pattern, under data.root if relative
    modality: Literal["image", "video"] = "image"
    tags: Literal["hashtags", "caption_words"] = "hashtags"  # where the hashtag stage finds tags


@dataclass
class BlockConfig:
    """A single-modality part of every step."""

    source: str = ""
    samples: int = 0
    weight: float | None = None  # of this block's loss; None = its share of samples


@dataclass
class DataConfig:
    """What a step is made of and how samples are read."""

    sources: dict[str, SourceConfig] = field(default_factory=dict)
    blocks: list[BlockConfig] = field(default_factory=list)
    modalities: list[str] = field(default_factory=lambda: ["image", "video"])  # blocks left in
    validation: list[BlockConfig] = field(default_factory=list)  # a fixed set, never trained on
    lanes: int | None = None  # None = largest power of two <= min(block, 256)
    shuffle_shards: int = 8  # shards whose samples are shuffled together
    resolution: int = 224  # pixels, square
    frames: int = 8  # per clip
    crop_scale: list[float] = field(default_factory=lambda: [0.4, 1.0])  # area of the random crop
    flip: bool = True
    mean: list[float] = field(default_factory=lambda: [0.485, 0.456, 0.406])
    std: list[float] = field(default_factory=lambda: [0.229, 0.224, 0.225])
    max_bad_fraction: float = runtime(0.01)  # of samples read; beyond it the run stops
    root: str = runtime("")
    workers: int = runtime(2)  # loader processes per rank; 0 = in the training process


@dataclass
class TextConfig:
    """The LLM text tower; a run that starts from a text artifact takes the structure from there."""

    llm: str = runtime("")  # a transformers folder or a hub name; its files' hash is recorded
    tune: Literal["none", "lora", "full"] = "lora"  # what is trained of the LLM
    lora_rank: int = 16  # 0 = no LoRA
    lora_alpha: int = 32
    lora_dropout: float = 0.05
    lora_targets: list[str] = field(default_factory=lambda: list(LINEAR_LAYERS))
    max_length: int = 64  # tokens; longer captions are cut


@dataclass
class OptimConfig:
    """Optimizer and schedule; lr = base_lr * global_batch / 256."""

    name: Literal["adamw", "lion"] = "adamw"
    base_lr: float = 1e-3
    min_lr: float = 0.0  # at the end, as a share of the peak
    warmup: float = 0.05  # share of the stage's samples
    weight_decay: float = 0.05
    betas: list[float] = field(default_factory=lambda: [0.9, 0.95])
    eps: float = 1e-8
    layer_decay: float = 1.0  # lr factor per vision block, from the top down
    clip_grad: float = 1.0  # global norm; 0 = off


@dataclass
class ZeroConfig:
    """DeepSpeed's partitioning."""

    stage: Literal[0, 1, 2, 3] = 0
    offload: bool = False  # optimizer state (and ZeRO-3 parameters) to CPU memory


@dataclass
class TrainConfig:
    """Length, precision and housekeeping of a stage."""

    samples: int = 0  # samples seen in this stage, all blocks together
    precision: Literal["fp32", "bf16"] = "fp32"  # bf16 = autocast over fp32 weights
    micro_batch: int = runtime(0)  # samples per device and forward; 0 = the rank's whole block
    log_every: int = runtime(10)  # steps
    save_every: int = runtime(200)  # steps
    keep_checkpoints: int = runtime(2)
    validate_every: int = runtime(0)  # steps; 0 = at the end only
    device: Literal["auto", "cpu", "cuda"] = runtime("auto")


@dataclass
class RunConfig:
    """Everything one stage's run is made of; stages add their own section."""

    stage: str = ""
    seed: int = 0
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    zero: ZeroConfig = runtime(factory=ZeroConfig)
    init_from: list[str] = runtime(factory=list)  # artifacts of earlier stages
    out: str = runtime("")  # this stage's folder

    @property
    def blocks(self) -> list[BlockConfig]:
        """The blocks of a step that `data.modalities` leaves in."""
        sources = self.data.sources
        return [b for b in self.data.blocks if sources[b.source].modality in self.data.modalities]

    @property
    def validation(self) -> list[BlockConfig]:
        """The validation blocks that `data.modalities` leaves in."""
        sources = self.data.sources
        blocks = self.data.validation
        return [b for b in blocks if sources[b.source].modality in self.data.modalities]

    @property
    def global_batch(self) -> int:
        return sum(block.samples for block in self.blocks)

    @property
    def steps(self) -> int:
        return max(1, round(self.train.samples / self.global_batch))

    def validate(self) -> None:
        """Check rules that span fields; raises ConfigError naming the key to change."""
        _validate_data(self.data)
        if not self.blocks:
            raise ConfigError(
                f"data.blocks has no block of data.modalities={self.data.modalities}: "
                "add a block, or widen data.modalities"
            )
        if self.train.samples < 1:
            raise ConfigError("train.samples is not set: give the samples to see in this stage")
        if self.seed < 0:
            raise ConfigError(f"seed={self.seed} must be 0 or more")
        model = self.model
        if not 0 < model.keep_rate <= 1:
            raise ConfigError(f"model.keep_rate={model.keep_rate} must be in (0, 1]")
        if model.tubelet < 1 or model.keep_rate_levels < 1:
            raise ConfigError("model.tubelet and model.keep_rate_levels must be at least 1")
        if len(model.keep_rate_span) != 2 or not 0 <= min(model.keep_rate_span) <= 1:
            raise ConfigError(f"model.keep_rate_span={model.keep_rate_span} must be [start, end]")
        if self.data.frames % model.tubelet:
            raise ConfigError(
                f"data.frames={self.data.frames} is not a multiple of model.tubelet="
                f"{model.tubelet}: change data.frames to a multiple"
            )
        if len(self.optim.betas) != 2:
            raise ConfigError(f"optim.betas={self.optim.betas} must be two numbers")
        if self.train.micro_batch < 0 or self.data.workers < 0:
            raise ConfigError("train.micro_batch and data.workers must be 0 or more")
        if self.optim.clip_grad < 0:
            raise ConfigError(f"optim.clip_grad={self.optim.clip_grad} must be >= 0 (0 = off)")
        if not 0 <= self.optim.warmup < 1:
            raise ConfigError(f"optim.warmup={self.optim.warmup} must be in [0, 1)")


def _validate_data(data: DataConfig) -> None:
    names = [block.source for block in [*data.blocks, *data.validation]]
    for block in [*data.blocks, *data.validation]:
        if block.source not in data.sources:
            raise ConfigError(
                f"data.blocks or data.validation names source {block.source!r}, but data.sources "
                f"has {sorted(data.sources)}{nearest(block.source, data.sources)}"
            )
        if block.samples < 1:
            raise ConfigError(f"data.blocks: samples of {block.source!r} must be at least 1")
        if block.weight is not None and block.weight <= 0:
            raise ConfigError(f"data.blocks: weight of {block.source!r} must be above 0")
        if names.count(block.source) > 1:
            raise ConfigError(
                f"source {block.source!r} appears twice in data.blocks and data.validation: "
                "merge the blocks, or give validation a source of its own"
            )
    for modality in data.modalities:
        if modality not in ("image", "video"):
            raise ConfigError(f"data.modalities: {modality!r} is neither 'image' nor 'video'")
    if len(data.crop_scale) != 2 or not 0 < data.crop_scale[0] <= data.crop_scale[1] <= 1:
        raise ConfigError(f"data.crop_scale={data.crop_scale} must be [low, high] within (0, 1]")


C = TypeVar("C")
Layer = Mapping[str, Any]


def nearest(word: str, words: Iterable[str]) -> str:
    """A hint like "; did you mean 'x'?", or nothing."""
    match = difflib.get_close_matches(word, list(words), n=1)
    return f"; did you mean {match[0]!r}?" if match else ""


def config_path(name: str) -> Path:
    """A shipped yaml such as `stage/mae`, from a checkout or an installed wheel."""
    spec = importlib.util.find_spec("configs")
    assert spec is not None and spec.submodule_search_locations
    return Path(next(iter(spec.submodule_search_locations))) / f"{name}.yaml"


def shipped(group: str) -> list[str]:
    """Names of the shipped yaml files of a group (`model`, `zero`, `recipe`, ...)."""
    return sorted(p.stem for p in config_path(f"{group}/x").parent.glob("*.yaml"))


def read_yaml(path: str | Path) -> dict[str, Any]:
    """Read a yaml mapping; raises ConfigError when it is missing or is no mapping."""
    try:
        content = OmegaConf.to_container(OmegaConf.load(path))
    except FileNotFoundError as error:
        raise ConfigError(f"config file {path} does not exist") from error
    except Exception as error:  # yaml has several parser errors of its own
        raise ConfigError(f"{path} is not valid yaml: {_first_line(error)}") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{path} must hold `key: value` lines")
    return {str(key): value for key, value in content.items()}


def parse_overrides(items: Sequence[str]) -> dict[str, Any]:
    """`["a.b=1", "a.c=x"]` -> nested dict; raises ConfigError for anything else."""
    for item in items:
        if "=" not in item or item.startswith("="):
            raise ConfigError(f"{item!r} is not an override: write key=value")
    layers: list[Layer] = []
    for item in sorted(items, key=lambda item: item.split("=", 1)[0] not in PRESETS):
        try:
            parsed = OmegaConf.to_container(OmegaConf.from_dotlist([item]))
        except Exception as error:  # yaml and omegaconf have several parser errors
            raise ConfigError(f"{item!r} cannot be read: {_first_line(error)}") from error
        layers.append(parsed)  # type: ignore[arg-type]
    return merge(*layers)


def load_preset(group: str, name: str) -> dict[str, Any]:
    """The section that `configs/GROUP/NAME.yaml` holds."""
    path = config_path(f"{group}/{name}")
    if not path.is_file():
        names = shipped(group)
        raise ConfigError(
            f"unknown {group} {name!r}: there are {', '.join(names)}{nearest(name, names)}"
        )
    return read_yaml(path)


def merge(*layers: Layer) -> dict[str, Any]:
    """Merge nested mappings, later ones winning; lists replace.

    A section of PRESETS may be a preset's name. Naming a model drops what an earlier layer gave
    as its `kwargs`: they belong to the name.
    """
    result: dict[str, Any] = {}
    for layer in layers:
        for key, value in layer.items():
            if key in PRESETS and isinstance(value, str | int):
                value = load_preset(key, str(value))
            if key in PRESETS and isinstance(value, Mapping) and "name" in value:
                kept = result.get(key, {})
                result[key] = {name: kept[name] for name in kept if name != "kwargs"}
            if isinstance(value, Mapping) and isinstance(result.get(key), Mapping):
                result[key] = merge(result[key], value)
            else:
                result[key] = merge(value) if isinstance(value, Mapping) else value
    return result


def build(schema: type[C], *layers: Layer) -> C:
    """Check layers against a dataclass; raises ConfigError for unknown keys and wrong types."""
    merged = merge(*layers)
    try:
        typed = OmegaConf.merge(OmegaConf.structured(schema), OmegaConf.create(merged))
        return OmegaConf.to_object(typed)  # type: ignore[return-value]
    except ConfigKeyError as error:
        key = str(error.full_key)
        where = _fields_beside(schema, key.split("."))
        hint = nearest(key.split(".")[-1], where)
        raise ConfigError(f"unknown key {key!r}{hint or f'; there are {sorted(where)}'}") from error
    except OmegaConfBaseException as error:
        raise ConfigError(f"{error.full_key}: {_first_line(error)}") from error


def load_config(schema: type[C], stage: str, *layers: Layer) -> C:
    """base.yaml <- stage/STAGE.yaml <- layers, as one checked dataclass."""
    shipped_layers = (read_yaml(config_path("base")), read_yaml(config_path(f"stage/{stage}")))
    return build(schema, *shipped_layers, *layers, {"stage": stage})


def to_dict(config: Any) -> dict[str, Any]:
    """A dataclass as plain nested containers."""
    return dataclasses.asdict(config)


def dump(config: Any, path: Path) -> None:
    """Write the resolved config as yaml that can be given back."""
    path.write_text(OmegaConf.to_yaml(OmegaConf.create(to_dict(config))))


def identity(config: Any) -> dict[str, Any]:
    """The config without its runtime fields."""
    result = {}
    for item in dataclasses.fields(config):
        value = getattr(config, item.name)
        if item.metadata.get("runtime"):
            continue
        result[item.name] = _identity_of(value)
    return result


def _identity_of(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        return identity(value)
    if isinstance(value, dict):
        return {key: _identity_of(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_identity_of(item) for item in value]
    return value


def config_hash(config: Any) -> str:
    """sha256 of the identity fields."""
    return hash_json(identity(config))


def hash_json(value: Any) -> str:
    """sha256 of a value's canonical JSON."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def differences(old: Any, new: Any, prefix: str = "") -> list[str]:
    """Lines `key: old -> new` for two nested containers."""
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        lines = []
        for key in sorted({*old, *new}):
            path = f"{prefix}.{key}" if prefix else str(key)
            lines += differences(old.get(key), new.get(key), path)
        return lines
    return [] if old == new else [f"{prefix}: {old!r} -> {new!r}"]


def _fields_beside(schema: type, path: list[str]) -> list[str]:
    """The valid names at the place of a key that does not exist."""
    node: Any = OmegaConf.structured(schema)
    for part in path[:-1]:
        node = node.get(part, {})
    return [str(key) for key in node]


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0]
