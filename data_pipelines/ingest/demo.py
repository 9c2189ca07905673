"""Generated data set: JPEG pictures and H.264 clips of coloured, moving shapes.

Every sample has a colour, a shape and further attributes; its captions and hashtags name them.
Some colour-shape pairs never occur in training and are used for evaluation.
"""

from __future__ import annotations

import io
import itertools
import json
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, ImageDraw

from xray.errors import ConfigError
from xray.files import making, replacing
from xray.records import parse_record

log = logging.getLogger("xray")

COLORS = {
    "red": (214, 40, 40),
    "orange": (242, 140, 40),
    "yellow": (244, 211, 66),
    "green": (56, 160, 72),
    "blue": (45, 98, 214),
    "purple": (128, 62, 170),
    "pink": (240, 130, 180),
    "brown": (122, 78, 44),
}
SHAPES = ("circle", "square", "triangle", "star", "cross", "ring")
GROUNDS = {"white": (245, 245, 245), "gray": (150, 150, 150), "black": (22, 22, 22)}
SIZES = {"small": 0.17, "large": 0.30}  # half width, as a share of the picture
PLACES = {
    "in the middle": (0.5, 0.5),
    "at the top": (0.5, 0.33),
    "at the bottom": (0.5, 0.67),
    "on the left": (0.33, 0.5),
    "on the right": (0.67, 0.5),
}
MOTIONS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}
PAIRS = tuple(itertools.product(COLORS, SHAPES))
# Eight of the 48: each colour misses one shape, each shape one or two colours.
HELD_OUT = tuple(zip(COLORS, itertools.cycle(SHAPES), strict=False))


@dataclass
class DemoConfig:
    """Sizes of the generated sets."""

    photos: int = 2400  # pictures for training
    clips: int = 400  # clips for training
    heldout: int = 120  # photos of pairs that are not in training; the gallery gets the rest
    per_shard: int = 600  # samples per shard
    side: int = 64  # width and height, in pixels
    frames: int = 12  # frames per clip
    seed: int = 0  # of all random draws
    version: int = 1  # 2: photos have the box of their shape (object_box); 3: its mask, too


@dataclass(frozen=True)
class Scene:
    """Content of a picture or clip."""

    color: str
    shape: str
    ground: str
    size: str
    place: str
    motion: str = ""

    @property
    def label(self) -> int:
        """Class among the held-out pairs; -1 for a pair of the training set."""
        pair = (self.color, self.shape)
        return HELD_OUT.index(pair) if pair in HELD_OUT else -1

    def captions(self) -> list[str]:
        """Return three captions."""
        thing, moves = f"{self.color} {self.shape}", f" moving {self.motion}" if self.motion else ""
        kind = "clip" if self.motion else "picture"
        return [
            f"a {self.size} {thing}{moves} {self.place} on a {self.ground} background",
            f"a {kind} of a {self.size} {thing}{moves}, {self.place}, background {self.ground}",
            f"{self.ground} background with a {self.size} {thing} {self.place}{moves}",
        ]

    def hashtags(self) -> list[str]:
        """Return the hashtags."""
        tags = [self.color, self.shape, self.size, f"{self.ground}background"]
        tags += [f"moving{self.motion}"] if self.motion else []
        return [f"#{tag}" for tag in tags]


def make_demo(root: Path, config: DemoConfig) -> None:
    """Write all sets below root, unless they exist; raises ConfigError for other files."""
    if _is_made(root, config):
        return
    with making(root):
        if not _is_made(root, config):
            # an empty folder at root is replaced
            with replacing(root, root.with_name(f".{root.name}.xray-demo")) as folder:
                _write_sets(folder, config)


def _is_made(root: Path, config: DemoConfig) -> bool:
    """Return True if root has these sets; raises ConfigError for other files."""
    known = root / "demo.json"
    if known.is_file():
        _check_same(known, config)
        return True
    if root.exists() and not (root.is_dir() and not any(root.iterdir())):
        raise ConfigError(
            f"data.root={root} contains other files, and this recipe generates its data there "
            "(prepare.demo): name a new folder, or a recipe over your own data"
        )
    return False


def _write_sets(folder: Path, config: DemoConfig) -> None:
    rng = np.random.default_rng(config.seed)
    seen = [pair for pair in PAIRS if pair not in HELD_OUT]
    for name, count, motion in (("photos", config.photos, False), ("clips", config.clips, True)):
        scenes = [_random_scene(rng, seen, motion) for _ in range(count)]
        _write(folder / name, scenes, config, rng)
    options = list(itertools.product(HELD_OUT, GROUNDS, SIZES, PLACES))
    scenes = [Scene(*options[i][0], *options[i][1:]) for i in rng.permutation(len(options))]
    _write(folder / "heldout", scenes[: config.heldout], config, rng)
    _write(folder / "gallery", scenes[config.heldout :], config, rng)
    names = [" ".join(pair) for pair in HELD_OUT]
    (folder / "classes.txt").write_text("\n".join(names) + "\n", "utf-8")
    (folder / "demo.json").write_text(json.dumps({"config": vars(config)}, indent=1), "utf-8")


def _check_same(known: Path, config: DemoConfig) -> None:
    try:
        there = parse_record(known.read_bytes(), dict[str, dict[str, Any]])["config"]
    except (OSError, ValueError, KeyError) as error:
        raise ConfigError(f"{known} cannot be read ({error}): delete {known.parent}") from error
    if there.get("version", 1) < config.version:  # older folders do not record it
        missing = "masks" if config.version > 2 else "boxes"
        log.info("%s has no %s of shapes: delete it to have them made", known.parent, missing)
    for key, value in vars(config).items():
        if key != "version" and there.get(key) != value:
            raise ConfigError(
                f"{known.parent} was generated with {key}={there.get(key)}, not {value}: delete "
                "it, or name another data.root"
            )


def example(motion: str = "") -> bytes:
    """Return a generated picture as JPEG, or with a motion a clip of 12 frames as mp4."""
    scene = Scene("red", "circle", "white", "large", "in the middle", motion)
    rng = np.random.default_rng(0)
    return _clip(scene, DemoConfig(), rng) if motion else _photo(scene, DemoConfig(), rng).jpeg


def _random_scene(rng: np.random.Generator, pairs: list[tuple[str, str]], motion: bool) -> Scene:
    def pick(options: Any) -> str:
        return list(options)[rng.integers(len(options))]

    color, shape = pairs[rng.integers(len(pairs))]
    moves = pick(MOTIONS) if motion else ""
    place = "in the middle" if motion else pick(PLACES)
    return Scene(color, shape, pick(GROUNDS), pick(SIZES), place, moves)


def _write(folder: Path, scenes: list[Scene], config: DemoConfig, rng: np.random.Generator) -> None:
    """Write shards in the layout of img2dataset and video2dataset."""
    import webdataset  # it imports torch

    folder.mkdir(parents=True)
    for start in range(0, len(scenes), config.per_shard):
        shard = start // config.per_shard
        with webdataset.TarWriter(str(folder / f"{shard:05d}.tar"), mtime=0.0) as sink:
            for number, scene in enumerate(scenes[start : start + config.per_shard]):
                captions = scene.captions()
                meta = {
                    "caption": captions[0],
                    "captions": captions,
                    "hashtags": scene.hashtags(),
                    "label": scene.label,
                    "key": f"{shard:05d}{number:04d}",
                }
                files: dict[str, Any] = {"txt": captions[0], "json": meta}
                if scene.motion:
                    files["mp4"] = _clip(scene, config, rng)
                else:
                    photo = _photo(scene, config, rng)
                    files["jpg"] = photo.jpeg
                    meta |= {"object_box": photo.box} if config.version > 1 else {}
                    files |= {"mask.png": photo.mask} if config.version > 2 else {}
                sink.write({"__key__": meta["key"], **files})


class _Photo(NamedTuple):
    jpeg: bytes
    box: list[float]  # of its shape
    mask: bytes  # PNG: 0 = the ground, 1 to 6 = the number of the shape in SHAPES, from 1


def _photo(scene: Scene, config: DemoConfig, rng: np.random.Generator) -> _Photo:
    """Draw a photo."""
    jitter = rng.uniform(-0.04, 0.04, 2)
    place = np.array(PLACES[scene.place]) + jitter
    buffer, mask = io.BytesIO(), io.BytesIO()
    scale = rng.uniform(0.9, 1.1)
    image = _draw(scene, place, config.side, scale, rng)
    image.save(buffer, format="JPEG", quality=90)
    numbers = Image.new("L", (4 * config.side,) * 2, 0)
    _draw_shape(numbers, scene, place, scale, 1 + SHAPES.index(scene.shape), 0)
    numbers.resize((config.side,) * 2, Image.Resampling.NEAREST).save(mask, format="PNG")
    box = _box(scene, place, SIZES[scene.size] * scale)
    return _Photo(buffer.getvalue(), box, mask.getvalue())


def _box(scene: Scene, place: np.ndarray, r: float) -> list[float]:
    """Return left, top, right and bottom of a shape, as shares of the picture's sides."""
    x, y = place.tolist()
    if scene.shape in ("circle", "ring", "cross"):
        ends = np.array([(x - r, y - r), (x + r, y + r)])
    else:
        ends = np.array(_corners(scene.shape, x, y, r))
    box = np.concatenate([ends.min(axis=0), ends.max(axis=0)]).clip(0, 1)
    return [round(share, 4) for share in box.tolist()]


def _clip(scene: Scene, config: DemoConfig, rng: np.random.Generator) -> bytes:
    import av

    start = np.array([0.5, 0.5]) - 0.2 * np.array(MOTIONS[scene.motion])
    start = start + rng.uniform(-0.05, 0.05, 2)
    scale = rng.uniform(0.9, 1.1)
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as container:
        # x264's macroblock tree gives frames this small other bytes in every run
        options = {"crf": "20", "x264-params": "mbtree=0"}
        stream: Any = container.add_stream("libx264", rate=12, options=options)
        stream.width = stream.height = config.side
        stream.pix_fmt = "yuv420p"
        stream.codec_context.thread_count = 1
        for number in range(config.frames):
            share = number / (config.frames - 1)
            place = start + 0.4 * share * np.array(MOTIONS[scene.motion])
            image = _draw(scene, place, config.side, scale, rng)
            container.mux(stream.encode(av.VideoFrame.from_image(image)))
        container.mux(stream.encode())
    return buffer.getvalue()


def _draw(
    scene: Scene, place: np.ndarray, side: int, scale: float, rng: np.random.Generator
) -> Image.Image:
    """Draw at four times the size, shrink, and add noise."""
    big = 4 * side
    image = Image.new("RGB", (big, big), GROUNDS[scene.ground])
    _draw_shape(image, scene, place, scale, COLORS[scene.color], GROUNDS[scene.ground])
    pixels = np.asarray(image.resize((side, side), Image.Resampling.LANCZOS), np.float32)
    noisy = pixels + rng.normal(0, 4, pixels.shape)
    return Image.fromarray(noisy.clip(0, 255).astype(np.uint8))


def _draw_shape(
    image: Image.Image, scene: Scene, place: np.ndarray, scale: float, fill: Any, hole: Any
) -> None:
    """Draw the shape on a square image; hole: fill of the middle of a ring."""
    canvas, big = ImageDraw.Draw(image), image.width
    x, y = (place * big).tolist()
    r = SIZES[scene.size] * scale * big
    if scene.shape in ("circle", "ring"):
        canvas.ellipse((x - r, y - r, x + r, y + r), fill=fill)
        if scene.shape == "ring":
            h = 0.55 * r
            canvas.ellipse((x - h, y - h, x + h, y + h), fill=hole)
    elif scene.shape == "cross":
        w = 0.33 * r
        canvas.rectangle((x - r, y - w, x + r, y + w), fill=fill)
        canvas.rectangle((x - w, y - r, x + w, y + r), fill=fill)
    else:
        canvas.polygon(_corners(scene.shape, x, y, r), fill=fill)


def _corners(shape: str, x: float, y: float, r: float) -> list[tuple[float, float]]:
    if shape == "square":
        angles, radii = np.arange(4) * np.pi / 2 + np.pi / 4, [r * 1.25] * 4
    elif shape == "triangle":
        angles, radii = np.arange(3) * 2 * np.pi / 3 - np.pi / 2, [r * 1.15] * 3
    else:  # star
        angles, radii = np.arange(10) * np.pi / 5 - np.pi / 2, [r * 1.15, r * 0.5] * 5
    return [(x + q * np.cos(a), y + q * np.sin(a)) for a, q in zip(angles, radii, strict=True)]
