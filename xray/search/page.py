"""Hits of a search, as a table and as a page of pictures."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from data_pipelines.checks.check_shard import Thumbnail, png_of
from data_pipelines.decode.decoders import FrameChoice, decode_image
from data_pipelines.decode.sandbox import clip_decoder
from data_pipelines.decode.transforms import media_of
from data_pipelines.ingest.endings import MEDIA, ending_of
from data_pipelines.ingest.user_data import Corpus, open_corpus
from data_pipelines.shards.remote import is_remote
from data_pipelines.text.captions import find_captions
from xray.config import DataConfig
from xray.errors import BadSample, DataError
from xray.files import is_inside, printable
from xray.reports.html import paragraph, write_report
from xray.reports.shards import sheet
from xray.reports.tables import ResultTable
from xray.search.embedding_file import Facts, Names

SIDE = 192  # longer side of a picture, in pixels
LETTERS = 120  # of a caption
EMPTY = np.full((SIDE * 3 // 4, SIDE, 3), 225, np.uint8)


def hits_table(query: str, names: Names, scores: Sequence[float]) -> ResultTable:
    """Return a row per hit, best first."""
    texts = names.texts or names.paths
    table = ResultTable(query, ("rank", "score", "key", "text" if names.texts else "path"))
    for rank, (score, key, text) in enumerate(zip(scores, names.keys, texts, strict=True), 1):
        table.rows.append((str(rank), f"{score:.4f}", key, text))
    return table


def write_page(
    out: Path,
    query: str,
    facts: Facts,
    names: Names,
    scores: Sequence[float],
    trust_paths: bool = False,
) -> list[str]:
    """Write a self-contained page of the hits; return the errors of missing pictures.

    trust_paths: also show pictures at a URL, or outside the folder that was embedded.
    """
    found, missing, media = list[Thumbnail](), list[str](), _Media(facts, trust_paths)
    texts = names.texts or [""] * len(names.keys)
    for rank, (key, path, text) in enumerate(zip(names.keys, names.paths, texts, strict=True)):
        pixels, caption = EMPTY, text
        try:
            if names.texts is None:
                pixels, caption = media.shown(key, path)
        except DataError as error:
            missing.append(f"{key}: {error}")
        label = f"{rank + 1}. {scores[rank]:.3f} · {caption or path}"
        found.append(Thumbnail(str(rank), path, key, label, png_of(pixels)))
    asked = ""
    if ending_of(query) in MEDIA:
        whole = open_corpus([query])
        shown = Thumbnail("", "", Path(query).name, "", png_of(_pixels_of(whole, 0, 0)))
        asked = sheet("Query", [shown])
    made = facts["artifact"]
    note = f"{len(found)} of {facts['rows']:,} embeddings ({facts['dtype']}, {facts['dim']} "
    note += f"dimensions) by the {made['stage']} artifact {made['digest'][:12]}; cosines"
    listing = hits_table("Hits", names, scores).html() if names.texts else sheet("Hits", found)
    write_report(out, query, [paragraph(note), asked, listing])
    return missing


class _Media:
    """Reader of the pictures and clips of an embedding file, by key and path.

    The file may come from others: without `trust_paths`, its paths stay in its folder, and no URL
    is fetched.
    """

    def __init__(self, facts: Facts, trust_paths: bool) -> None:
        self.facts, self.trust_paths = facts, trust_paths
        self.corpus: Corpus | None = None
        self.shards: dict[str, int] = {}

    def shown(self, key: str, path: str) -> tuple[np.ndarray, str]:
        """Return (picture, first caption or ""); raises DataError if it is missing."""
        where = self.facts["source"]["where"]
        if not self.trust_paths and is_remote(where):
            raise DataError(f"{where} is a URL: add --trust-paths to fetch it")
        if not (self.trust_paths or is_inside(path)):
            raise DataError(f"{path} is outside {where}: add --trust-paths to show it")
        if self.facts["source"]["kind"] == "files":
            return _shown(open_corpus([str(Path(where) / path)], self.facts["modality"]), 0, 0)
        if self.corpus is None:
            self.corpus = open_corpus([where], self.facts["modality"])
            names = self.corpus.source.manifest.names
            self.shards = {name: number for number, name in enumerate(names)}
        if path not in self.shards:
            raise DataError(f"{where} no longer has {path}")
        shard = self.shards[path]
        keys = self.corpus.source.index(shard).keys
        if key not in keys:
            raise DataError(f"{path} no longer has {key}")
        return _shown(self.corpus, shard, keys.index(key))


def _shown(corpus: Corpus, shard: int, member: int) -> tuple[np.ndarray, str]:
    captions = find_captions(corpus.source, shard, member, corpus.captions)
    caption = printable(captions[0])[:LETTERS] if captions else ""
    return _pixels_of(corpus, shard, member), caption


def _pixels_of(corpus: Corpus, shard: int, member: int) -> np.ndarray:
    """Return a thumbnail of a picture or of a clip's first frame: [H, W, 3] uint8."""
    sample, data = corpus.sample(shard, member, SIDE, 1), DataConfig()
    try:
        media = media_of(sample)
        if sample.modality == "image":
            image = decode_image(media, (SIDE, SIDE))
        else:
            first = FrameChoice(1, start=0.0, offsets=(0.0,))
            decoder = clip_decoder(data)
            image = Image.fromarray(decoder.decode(media, first, SIDE).pixels[0])
    except BadSample as error:
        raise DataError(str(error)) from error
    image.thumbnail((SIDE, SIDE))
    return np.asarray(image)
