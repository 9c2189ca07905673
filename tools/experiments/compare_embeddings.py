"""What quantised and shortened embeddings lose: retrieval by each dtype and dim against fp32.

    python -m tools.experiments.compare_embeddings ARTIFACT SHARDS [--dims 512,256,128] \
        [--modality image]
        [--captions FIELD,...] [--keep FOLDER] [--out FILE.json] [--llm FOLDER]

Pictures (or clips) and captions of the shards are embedded by `xray embed`'s job, once, then stored
in each dtype and searched as `xray search` searches: captions as they are in stored pictures, and
pictures as they are in stored captions, where any caption of the picture is a hit. "binary" is
Hamming distance alone; "+ query" compares 4 times as many again by the query against the signs, and
"+ fp32" by the fp32 rows. Samples without a readable picture or a caption are left out.
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

from data_pipelines.ingest.corpus import open_corpus
from tools.common.tables import Table
from xray import dist
from xray.artifacts.artifact import open_artifact
from xray.artifacts.encoders import Encoder, restore_encoder
from xray.errors import ConfigError, XrayError
from xray.progress import progress_bar
from xray.search.embed import EmbedConfig, embed
from xray.search.embedding_file import (
    Dtype,
    Embeddings,
    Names,
    calibrate,
    open_embeddings,
    restored,
    shortened,
    write_embeddings,
)
from xray.search.exact import search

KS = (1, 5, 10)
OVERSAMPLE = 4
WAYS: list[tuple[str, Dtype, int, bool]] = [  # name, dtype, oversample, compared again by fp32
    ("fp32", "fp32", 1, False),
    ("fp16", "fp16", 1, False),
    ("int8", "int8", 1, False),
    ("binary", "binary", 1, False),
    ("binary + query", "binary", OVERSAMPLE, False),
    ("binary + fp32", "binary", OVERSAMPLE, True),
]


@dataclass(frozen=True)
class Pairs:
    """Pictures [N, D] and captions [M, D], normalised; owner [M]: the picture of each caption."""

    pictures: np.ndarray
    captions: np.ndarray
    owner: np.ndarray


def read_pairs(options: argparse.Namespace, folder: Path) -> tuple[Pairs, list[int]]:
    """The embeddings of the shards, and the prefixes that were trained."""
    artifact = open_artifact(options.artifact, options.llm)
    encoder = restore_encoder(artifact).to(dist.choose_device("auto"))
    if not isinstance(encoder, Encoder):
        raise ConfigError(f"{artifact.path} is of stage {artifact.stage}: give a clip artifact")
    fields = {name: 1.0 for name in options.captions.split(",") if name}
    found = []
    for kind in ("pictures", "captions"):
        texts = kind == "captions"
        corpus = open_corpus([options.shards], options.modality, texts, fields)
        config = EmbedConfig(captions=fields, workers=options.workers)
        with progress_bar(kind) as progress:
            embed(encoder, corpus, config, folder / f"{kind}.npy", progress)
        opened = open_embeddings(folder / f"{kind}.npy")
        rows = restored(np.concatenate(list(opened.chunks())), opened.facts)
        names = opened.names(range(len(opened)))
        found.append((rows, list(zip(names.paths, names.keys, strict=True))))
    return joined(*found[0], *found[1]), encoder.matryoshka


def joined(
    pictures: np.ndarray, whose: Sequence[object], captions: np.ndarray, of: Sequence[object]
) -> Pairs:
    """Pictures with a caption, and captions with a picture, by their names."""
    both = set(whose) & set(of)
    kept = [number for number, name in enumerate(whose) if name in both]
    place = {whose[number]: at for at, number in enumerate(kept)}
    texts = [number for number, name in enumerate(of) if name in both]
    return Pairs(pictures[kept], captions[texts], np.array([place[of[n]] for n in texts]))


def stored(path: Path, rows: np.ndarray, dtype: Dtype) -> Embeddings:
    """Rows in a file of a dtype."""
    facts = {"rows": len(rows), "dim": rows.shape[1], "dtype": dtype, "modality": "image"}
    if dtype == "int8":
        scale, offset = calibrate(rows.min(axis=0), rows.max(axis=0))
        facts |= {"scale": scale.tolist(), "offset": offset.tolist()}
    write_embeddings(path, facts, [(rows, Names([""] * len(rows), [""] * len(rows)))])
    return open_embeddings(path)


def recalls(pairs: Pairs, dim: int, way: tuple[str, Dtype, int, bool], folder: Path) -> list[float]:
    """R@1, 5, 10 of pictures by captions, then of captions by pictures."""
    _, dtype, oversample, by_fp32 = way
    pictures, captions = shortened(pairs.pictures, dim), shortened(pairs.captions, dim)
    found: list[float] = []
    for rows, queries, right in (
        (pictures, captions, lambda hits: hits == pairs.owner[:, None]),
        (captions, pictures, lambda hits: pairs.owner[hits] == np.arange(len(pictures))[:, None]),
    ):
        finer = stored(folder / "fp32.npy", rows, "fp32") if by_fp32 else None
        kept = stored(folder / f"{dtype}.npy", rows, dtype)
        hits = search(kept, queries, max(KS), oversample, finer).rows
        found += [float(right(hits)[:, :k].any(axis=1).mean()) for k in KS]
    return found


def tables(pairs: Pairs, dims: Sequence[int], trained: Sequence[int]) -> Iterator[Table]:
    """One of figures, one of their shares of fp32 with all dimensions."""
    width = pairs.pictures.shape[1]
    counts = f"{len(pairs.pictures):,} pictures, {len(pairs.captions):,} captions"
    heads = ["dim", "stored as", "bytes"]
    heads += [f"{way} R@{k}" for way in ("text to image", "image to text") for k in KS]
    values, shares = [], []
    whole: list[float] = []
    with tempfile.TemporaryDirectory() as name:
        for dim in dims:
            label = f"{dim}{'' if dim == width or dim in trained else ' (not trained)'}"
            for way in WAYS:
                found = recalls(pairs, dim, way, Path(name))
                whole = whole or found
                size = {"fp32": 4 * dim, "fp16": 2 * dim, "int8": dim, "binary": -(-dim // 8)}
                told = f"{size[way[1]]}{f' + {4 * dim}' if way[3] else ''}"
                cells = [label, way[0], told]
                values.append([*cells, *(f"{100 * value:.1f}" for value in found)])
                ratios = [f"{a / b:.3f}" if b else "-" for a, b in zip(found, whole, strict=True)]
                shares.append([*cells, *ratios])
    yield Table(f"Recall in percent: {counts}", heads, values)
    yield Table(f"Share of what fp32 with {dims[0]} dimensions finds", heads, shares)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("artifact")
    parser.add_argument("shards")
    parser.add_argument("--dims", default="", help="all of the features, and each trained prefix")
    parser.add_argument("--modality", default="", help="image or video")
    parser.add_argument("--captions", default="", help="json fields")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--llm", default="")
    parser.add_argument("--keep", type=Path, help="where the embeddings stay, to go on from")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    try:
        run(options)
    except XrayError as error:
        sys.exit(f"compare_embeddings: {error}")


def run(options: argparse.Namespace) -> None:
    with tempfile.TemporaryDirectory() as name:
        pairs, trained = read_pairs(options, options.keep or Path(name))
    width = pairs.pictures.shape[1]
    dims = [int(dim) for dim in options.dims.split(",") if dim]
    dims = dims or sorted({width, *trained}, reverse=True)
    if any(not 0 < dim <= width for dim in dims):
        raise ConfigError(f"--dims {options.dims}: the artifact has {width} dimensions")
    if len(pairs.pictures) < 2:
        raise ConfigError(f"{options.shards} has fewer than two pictures with captions")
    made = list(tables(pairs, dims, trained))
    for table in made:
        print(table)
    if options.out is not None:
        content = {"artifact": options.artifact, "shards": options.shards}
        content["tables"] = [vars(table) for table in made]
        options.out.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
