"""Settings of the data: sources, blocks of a step, decoding, augmentation and the cache."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from xray.config import schedule
from xray.config.identity import added, left_open, runtime
from xray.errors import ConfigError, nearest

# Settings of how evaluation and inference prepare a picture, beside its size.
PREPARATION = ("resize", "interpolation", "crop_pct")
IMAGENET: tuple[list[float], list[float]] = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
Resize = Literal["auto", "crop", "shortest", "squash"]
Interpolation = Literal["bicubic", "bilinear"]


@dataclass
class SourceConfig:
    """A set of webdataset shards."""

    shards: str = ""  # a folder, glob, {000..123} pattern or URL, under data.root if relative
    modality: Literal["image", "video", "text"] = "image"  # text = captions only (text stage)
    animations: Literal["image", "video"] = "image"  # how GIF and WebP files are read
    # origin of the tags: the json field hashtag.field, #tags in captions, words of captions, or
    # names of the vocabulary found in captions
    tags: Literal["hashtags", "caption_hashtags", "caption_words", "concepts"] = "hashtags"
    # captioned = only samples with captions; a keep-list of `xray data curate`; or a .npy list of
    # DataComp's uids, under data.root or the working folder; "" = all samples
    keep: str = ""
    # json fields and their weights, e.g. {captions: 1, synthetic: 3}; "txt" is the .txt file;
    # joined(hashtags) is a list of tags as one caption;
    # {} = the first that exists of curation.captions (of a curation), captions, caption and txt
    captions: dict[str, float] = field(default_factory=dict)


@dataclass
class BlockConfig:
    """A part of every step that has one modality and comes from one source."""

    source: str = ""  # name of an entry of data.sources
    samples: int = 0  # samples per step, over all processes
    weight: float | None = None  # of this block's loss; null = its share of the step


@dataclass
class DataConfig:
    """Blocks of a training step and how samples are read."""

    sources: dict[str, SourceConfig] = field(default_factory=dict)  # name -> a set of shards
    blocks: list[BlockConfig] = field(default_factory=list)  # parts of a training step
    # blocks without a weight share the loss in proportion to their samples or their tokens
    weigh_blocks_by: Literal["samples", "tokens"] = "samples"
    # modalities to train on; blocks of other modalities are left out
    modalities: list[str] = field(default_factory=lambda: ["image", "video", "text"])
    validation: list[BlockConfig] = field(default_factory=list)  # a fixed set, not trained on
    # views of a decoded sample in a step: a block of N samples reads N / views of its source
    views: int = added(1)
    # parallel read positions in a source; null = largest power of two <= min(block, 256)
    lanes: int | None = None
    shuffle_shards: int = 8  # samples of this many shards are shuffled together
    # JPEGs of training are decoded by the loader's workers (cpu) or on the GPU (gpu); auto = on the
    # GPU if it can, decided when a run begins
    decode: Literal["cpu", "gpu", "auto"] = added("cpu")
    # pixels per side: a number, or steps over the progress of the stage, such as
    # [[0.0, 96], [0.6, 160], [0.9, 224]]
    resolution: Any = 224
    frames: Any = 8  # frames per clip: a number, or steps as in data.resolution
    frame_sampling: Literal["uniform", "strided", "segment"] = "uniform"  # which frames of a clip
    frame_rate: float = 8.0  # frames per second (strided)
    segment_seconds: float = 2.0  # length of the random segment (segment)
    # how evaluation and inference make a picture square: crop the centre and resize it; resize the
    # short side and crop; or resize both sides, whatever their ratio. auto = as the parent artifact
    # does, otherwise crop. Runs made before the key existed have crop
    resize: Resize = added("auto", older="crop")
    # of evaluation and inference; the default becomes the parent artifact's with data.resize=auto
    interpolation: Interpolation = added("bicubic", older="bicubic")
    # side of their centre crop, as a share of the picture's; likewise
    crop_pct: float = added(1.0, older=1.0)
    # smallest and largest area of the random crop, as a share of the picture
    crop_scale: list[float] = field(default_factory=lambda: [0.4, 1.0])
    flip: bool = True  # horizontal flip; turn off if text or left and right matter
    # brightness, contrast, saturation, hue; 0 = off
    color_jitter: list[float] = field(default_factory=lambda: [0.0, 0.0, 0.0, 0.0])
    rand_augment: list[int] = field(default_factory=lambda: [0, 9])  # operations, magnitude (0-30)
    erase: float = 0.0  # probability of erasing a random rectangle
    # mean of red, green and blue, in [0, 1], for normalising; null = that of the parent artifact or
    # of the weights of model.pretrained, otherwise ImageNet's
    mean: list[float] | None = left_open(IMAGENET[0])
    # standard deviation of red, green and blue, likewise
    std: list[float] | None = left_open(IMAGENET[1])
    # image and video tokens per forward pass, instead of train.micro_batch; 0 = off
    tokens_per_batch: int = runtime(0)
    max_bad_fraction: float = runtime(0.01)  # the run stops above this share of broken samples
    decode_seconds: float = runtime(30.0)  # seconds to decode a clip; a slower clip is rejected
    decode_gb: float = runtime(2.0)  # GB a decoder may use; a clip that needs more is rejected
    cache: str = runtime("")  # folder for remote shards; "" = the user's cache folder
    cache_gb: float = runtime(50.0)  # size limit of the cache, in GB
    fetch_patience: float = runtime(600.0)  # seconds to keep trying to fetch one shard
    root: str = runtime("")  # base of relative shards: a folder or a URL
    workers: int = runtime(2)  # loader processes per rank; 0 = in the training process

    @property
    def resizes_first(self) -> bool:
        """True if evaluation resizes the whole picture, before it crops."""
        return self.resize in ("shortest", "squash")

    @property
    def normalisation(self) -> tuple[list[float], list[float]]:
        """Mean and standard deviation; ImageNet's where they are not decided."""
        return self.mean or IMAGENET[0], self.std or IMAGENET[1]


def validate_data(data: DataConfig) -> None:
    """Check the settings together; raises ConfigError that names the key to change."""
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
                "merge the blocks, or use another source for validation"
            )
    _validate_augmentation(data)
    if data.views < 1:
        raise ConfigError(f"data.views={data.views} must be at least 1")
    for block in data.blocks:
        if block.samples % data.views:
            lower = block.samples // data.views * data.views
            better = f"{lower} or {lower + data.views}" if lower else str(data.views)
            raise ConfigError(
                f"data.blocks: {block.samples} samples of {block.source!r} do not divide by "
                f"data.views={data.views}: use {better}"
            )
    if data.lanes is not None and data.lanes < 1:
        raise ConfigError(f"data.lanes={data.lanes} must be at least 1")
    for name in ("frame_rate", "segment_seconds", "decode_seconds", "decode_gb", "cache_gb"):
        if getattr(data, name) <= 0:
            raise ConfigError(f"data.{name}={getattr(data, name)} must be above 0")
    for name, source in data.sources.items():
        if any(weight <= 0 for weight in source.captions.values()):
            raise ConfigError(f"data.sources.{name}.captions: every weight must be above 0")
    schedule.check(data.resolution, "data.resolution")
    schedule.check(data.frames, "data.frames")
    for modality in data.modalities:
        if modality not in ("image", "video", "text"):
            raise ConfigError(f"data.modalities: {modality!r} is not one of image, video, text")
    mean, std = data.normalisation
    if not len(mean) == len(std) == 3 or min(std) <= 0:
        raise ConfigError(
            f"data.mean={mean} and data.std={std} must have three numbers each, std above 0"
        )
    if not 0 < data.crop_pct <= 1:
        raise ConfigError(f"data.crop_pct={data.crop_pct} must be in (0, 1]")
    if len(data.crop_scale) != 2 or not 0 < data.crop_scale[0] <= data.crop_scale[1] <= 1:
        raise ConfigError(f"data.crop_scale={data.crop_scale} must be [low, high] within (0, 1]")


def _validate_augmentation(data: DataConfig) -> None:
    jitter = data.color_jitter
    if len(jitter) != 4 or min(jitter) < 0 or jitter[3] > 0.5:
        raise ConfigError(
            f"data.color_jitter={jitter} must be [brightness, contrast, saturation, hue], "
            "none below 0, hue at most 0.5"
        )
    policy = data.rand_augment
    if len(policy) != 2 or policy[0] < 0 or not 0 <= policy[1] <= 30:
        raise ConfigError(
            f"data.rand_augment={policy} must be [operations, magnitude], magnitude in [0, 30]"
        )
    if not 0 <= data.erase <= 1:
        raise ConfigError(f"data.erase={data.erase} must be in [0, 1]")
