"""Retrieval with quantised and shortened embeddings, compared with fp32.

    python -m tools.experiments.compare_embeddings ARTIFACT SHARDS [--dims 512,256,128] \
        [--modality image]
        [--captions FIELD,...] [--keep FOLDER] [--out FILE.json] [--llm FOLDER]

The job of `xray embed` embeds images (or clips) and captions of the shards once. They are stored in
each dtype and dimension and searched as in `xray search`, with fp32 queries: captions search stored
images, and images search stored captions, of which any caption of the image is a hit.

"binary" ranks by Hamming distance alone. "binary + query" ranks 4 times as many hits again by the
fp32 query against the signs, and "binary + fp32" ranks them again by the fp32 rows. Samples without
a readable image or without a caption are left out.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data_pipelines.ingest.user_data import open_corpus
from tools.common.tables import Table
from xray import dist
from xray.artifacts.artifact import open_artifact
from xray.artifacts.encoders import Encoder, restore_encoder
from xray.errors import ConfigError, XrayError
from xray.progress import progress_bar
from xray.search.config import EmbedConfig
from xray.search.embed import embed
from xray.search.embedding_file import Embeddings, Names, open_embeddings, write_embeddings
from xray.search.exact import search
from xray.search.quantisation import Dtype, calibrate, restored, shortened

KS = (1, 5, 10)
OVERSAMPLE = 4
Variant = tuple[str, Dtype, int, bool]  # name, dtype, oversample, rank again by fp32 rows
VARIANTS: list[Variant] = [
    ("fp32", "fp32", 1, False),
    ("fp16", "fp16", 1, False),
    ("int8", "int8", 1, False),
    ("binary", "binary", 1, False),
    ("binary + query", "binary", OVERSAMPLE, False),
    ("binary + fp32", "binary", OVERSAMPLE, True),
]


@dataclass(frozen=True)
class Pairs:
    """Normalised embeddings of images and their captions.

    Attributes:
        images: [N, D].
        captions: [M, D].
        owner: index of each caption's image, [M].
    """

    images: np.ndarray
    captions: np.ndarray
    owner: np.ndarray


def read_pairs(options: argparse.Namespace, folder: Path) -> tuple[Pairs, list[int]]:
    """Embed the shards; return the pairs and the trained Matryoshka prefixes."""
    artifact = open_artifact(options.artifact, options.llm)
    encoder = restore_encoder(artifact).to(dist.choose_device("auto"))
    if not isinstance(encoder, Encoder):
        raise ConfigError(
            f"{artifact.path} is an artifact of stage {artifact.stage}: use a clip artifact"
        )
    fields = {name: 1.0 for name in options.captions.split(",") if name}
    sides = []
    for kind in ("pictures", "captions"):
        texts = kind == "captions"
        corpus = open_corpus([options.shards], options.modality, texts, fields)
        config = EmbedConfig(captions=fields, workers=options.workers)
        with progress_bar(kind) as progress:
            embed(encoder, corpus, config, folder / f"{kind}.npy", progress)
        embeddings = open_embeddings(folder / f"{kind}.npy")
        rows = restored(np.concatenate(list(embeddings.chunks())), embeddings.facts)
        names = embeddings.names(range(len(embeddings)))
        sides.append((rows, list(zip(names.paths, names.keys, strict=True))))
    return join(*sides[0], *sides[1]), encoder.matryoshka


def join(
    images: np.ndarray,
    image_names: Sequence[object],
    captions: np.ndarray,
    caption_names: Sequence[object],
) -> Pairs:
    """Join images and captions by name; leave out names that only one side has."""
    both = set(image_names) & set(caption_names)
    kept = [number for number, name in enumerate(image_names) if name in both]
    index = {image_names[number]: row for row, number in enumerate(kept)}
    texts = [number for number, name in enumerate(caption_names) if name in both]
    owner = np.array([index[caption_names[number]] for number in texts])
    return Pairs(images[kept], captions[texts], owner)


def store(path: Path, rows: np.ndarray, dtype: Dtype) -> Embeddings:
    """Write rows to a file of a dtype and open it."""
    facts = {"rows": len(rows), "dim": rows.shape[1], "dtype": dtype, "modality": "image"}
    facts |= {"artifact": {}, "source": {}, "keep_rate": None}
    if dtype == "int8":
        scale, offset = calibrate(rows.min(axis=0), rows.max(axis=0))
        facts |= {"scale": scale.tolist(), "offset": offset.tolist()}
    write_embeddings(path, facts, [(rows, Names([""] * len(rows), [""] * len(rows)))])
    return open_embeddings(path)


def recalls(pairs: Pairs, dim: int, variant: Variant, folder: Path) -> list[float]:
    """Return R@1, R@5 and R@10 of text to image, then of image to text."""
    _, dtype, oversample, by_fp32 = variant
    images, captions = shortened(pairs.images, dim), shortened(pairs.captions, dim)
    values: list[float] = []
    for rows, queries, is_hit in (
        (images, captions, lambda hits: hits == pairs.owner[:, None]),
        (captions, images, lambda hits: pairs.owner[hits] == np.arange(len(images))[:, None]),
    ):
        fp32_rows = store(folder / "fp32.npy", rows, "fp32") if by_fp32 else None
        embeddings = store(folder / f"{dtype}.npy", rows, dtype)
        hits = search(embeddings, queries, max(KS), oversample, fp32_rows).rows
        values += [float(is_hit(hits)[:, :k].any(axis=1).mean()) for k in KS]
    return values


def tables(pairs: Pairs, dims: Sequence[int], trained: Sequence[int]) -> Iterator[Table]:
    """Make a table of recalls, and one of their ratios to fp32 with all dimensions."""
    width = pairs.images.shape[1]
    counts = f"{len(pairs.images):,} images, {len(pairs.captions):,} captions"
    heads = ["dim", "dtype", "bytes"]
    heads += [f"{direction} R@{k}" for direction in ("text to image", "image to text") for k in KS]
    recall_rows, share_rows = [], []
    reference: list[float] = []
    with tempfile.TemporaryDirectory() as name:
        for dim in dims:
            label = f"{dim}{'' if dim == width or dim in trained else ' (not trained)'}"
            for variant in VARIANTS:
                values = recalls(pairs, dim, variant, Path(name))
                reference = reference or values
                sizes = {"fp32": 4 * dim, "fp16": 2 * dim, "int8": dim, "binary": -(-dim // 8)}
                size = f"{sizes[variant[1]]}{f' + {4 * dim}' if variant[3] else ''}"
                cells = [label, variant[0], size]
                recall_rows.append([*cells, *(f"{100 * value:.1f}" for value in values)])
                pairs_of_values = zip(values, reference, strict=True)
                share_rows.append(
                    [*cells, *(f"{a / b:.3f}" if b else "-" for a, b in pairs_of_values)]
                )
    yield Table(f"Recall in percent: {counts}", heads, recall_rows)
    yield Table(f"Share of fp32 with {dims[0]} dimensions", heads, share_rows)


def main() -> None:
    """Print and write the tables."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("artifact", help="a clip artifact")
    parser.add_argument("shards", help="shards of captioned images or clips")
    parser.add_argument(
        "--dims", default="", help="dimensions to test; default: all, and each trained prefix"
    )
    parser.add_argument("--modality", default="", help="image or video")
    parser.add_argument("--captions", default="", help="json fields that hold captions")
    parser.add_argument("--workers", type=int, default=2, help="loader processes")
    parser.add_argument("--llm", default="", help="the text model's folder, if it has moved")
    parser.add_argument("--keep", type=Path, help="folder that keeps the embeddings for later runs")
    parser.add_argument("--out", type=Path, help="also write the tables to this JSON file")
    options = parser.parse_args()
    try:
        run(options)
    except XrayError as error:
        sys.exit(f"compare_embeddings: {error}")


def run(options: argparse.Namespace) -> None:
    """Embed the shards, then print and write the tables; raises ConfigError for bad options."""
    with tempfile.TemporaryDirectory() as name:
        pairs, trained = read_pairs(options, options.keep or Path(name))
    width = pairs.images.shape[1]
    dims = [int(dim) for dim in options.dims.split(",") if dim]
    dims = dims or sorted({width, *trained}, reverse=True)
    if any(not 0 < dim <= width for dim in dims):
        raise ConfigError(f"--dims {options.dims}: the artifact has {width} dimensions")
    if len(pairs.images) < 2:
        raise ConfigError(f"{options.shards} has fewer than two images with captions")
    printed = list(tables(pairs, dims, trained))
    for table in printed:
        print(table)
    if options.out is not None:
        content = {"artifact": options.artifact, "shards": options.shards}
        content["tables"] = [vars(table) for table in printed]
        options.out.write_text(json.dumps(content, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    main()
