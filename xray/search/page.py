"""Hits of a search, as a table and as a page of pictures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from data_pipelines.checks.check_shard import Thumbnail, png_of
from data_pipelines.decode.decoders import FrameChoice
from data_pipelines.decode.images import decode_image
from data_pipelines.decode.sandbox import clip_decoder
from data_pipelines.decode.transforms import media_of
from data_pipelines.ingest.endings import MEDIA, ending_of
from data_pipelines.ingest.user_data import Corpus, open_corpus
from data_pipelines.shards.remote import is_remote
from data_pipelines.text.captions import find_captions
from data_pipelines.text.names import name_at
from xray.config import DataConfig
from xray.errors import BadSample, DataError
from xray.files import is_inside, printable
from xray.reports.html import paragraph, write_report
from xray.reports.shards import sheet
from xray.reports.tables import ResultTable
from xray.search.embedding_file import Facts, Names

SIDE = 192  # longer side of a picture, in pixels
EMPTY = np.full((SIDE * 3 // 4, SIDE, 3), 225, np.uint8)


@dataclass(frozen=True)
class Hit:
    """Result of a search.

    path: of its file or tar, as in the embedding file. where: full path or URL of the same. name:
    for people, of a sample in a tar; "" for a file.
    """

    score: float
    key: str
    path: str
    where: str
    name: str = ""
    text: str | None = None

    @property
    def link(self) -> str:
        """URL of the file, "" for a sample in a tar."""
        outside = self.name or is_remote(self.where) or not is_inside(self.path)
        local = not outside and Path(self.where).is_absolute()
        return Path(self.where).as_uri() if local else ""


def hits_table(query: str, hits: Sequence[Hit]) -> ResultTable:
    """Return a row per hit, best first; samples in tars have keys, and names if they differ."""
    texts = any(hit.text is not None for hit in hits)
    columns = {
        "rank": True,
        "score": True,
        "key": texts or any(hit.name for hit in hits),
        "name": any(hit.name not in ("", hit.key) for hit in hits),
        "text": texts,
        "path": True,
    }
    table = ResultTable(query, [name for name, shown in columns.items() if shown])
    for rank, hit in enumerate(hits, 1):
        cells = (str(rank), f"{hit.score:.4f}", hit.key, hit.name, hit.text or "", hit.where)
        shown = zip(columns.values(), cells, strict=True)
        table.rows.append([cell for wanted, cell in shown if wanted])
    return table


def write_page(out: Path, query: str, hits: Sequence[Hit], media: Media) -> list[str]:
    """Write a self-contained page of the hits; return the errors of missing pictures."""
    found, missing, facts = list[Thumbnail](), list[str](), media.facts
    for rank, hit in enumerate(hits, 1):
        pixels, caption = EMPTY, ""
        try:
            if hit.text is None:
                pixels, caption = media.shown(hit)
        except DataError as error:
            missing.append(f"{hit.key}: {error}")
        label = f"{rank}. {hit.score:.3f} · {hit.name or Path(hit.where).name}"
        place = f"{hit.where}:{hit.key}" if hit.name else hit.where
        png = png_of(pixels)
        found.append(Thumbnail("", hit.path, hit.key, caption, png, label, hit.link, place))
    asked = ""
    if ending_of(query) in MEDIA:
        whole = open_corpus([query])
        shown = Thumbnail("", "", Path(query).name, "", png_of(_pixels_of(whole, 0, 0)))
        asked = sheet("Query", [shown])
    made = facts["artifact"]
    note = f"{len(found)} of {facts['rows']:,} embeddings ({facts['dtype']}, {facts['dim']} "
    note += f"dimensions) by the {made['stage']} artifact {made['digest'][:12]}; cosines"
    texts = facts["modality"] == "text"
    listing = hits_table("Hits", hits).html() if texts else sheet("Hits", found)
    write_report(out, query, [paragraph(note), asked, listing])
    return missing


class Media:
    """Reader of the samples of an embedding file, by key and path.

    The file may come from others: without `trust_paths`, its paths stay in its folder, and no URL
    is fetched.
    """

    def __init__(self, facts: Facts, trust_paths: bool = False) -> None:
        self.facts, self.trust_paths = facts, trust_paths
        self.where: str = facts["source"]["where"]
        self.in_tars = facts["source"]["kind"] == "shards"
        self.corpus: Corpus | None = None
        self.shards: dict[str, int] = {}

    def hits(self, names: Names, scores: Sequence[float]) -> list[Hit]:
        """Return the hits of a search, best first; one whose tar is missing is named by its key."""
        found = list[Hit]()
        for n, (score, key, path) in enumerate(zip(scores, names.keys, names.paths, strict=True)):
            name = self._name(key, path) if self.in_tars else ""
            text = names.texts[n] if names.texts is not None else None
            found.append(Hit(score, key, path, self._full(path), name, text))
        return found

    def _full(self, path: str) -> str:
        """Return the full path or URL of a file or a tar."""
        if self.in_tars:
            folder = self.where  # of a pattern, its folder
            while folder.endswith(".tar") or any(c in folder for c in "*?[{"):
                folder = folder.rpartition("/")[0]
            return f"{folder.rstrip('/')}/{path}"
        lines = ending_of(self.where) == "txt"  # of a text file
        return self.where if lines else str(Path(self.where) / path)

    def _name(self, key: str, path: str) -> str:
        try:
            corpus, shard, member = self._opened(key, path)
            return name_at(corpus.source, shard, member)
        except DataError:
            return key

    def shown(self, hit: Hit) -> tuple[np.ndarray, str]:
        """Return (picture, first caption or ""); raises DataError if it is missing."""
        corpus, shard, member = self._opened(hit.key, hit.path)
        captions = find_captions(corpus.source, shard, member, corpus.captions)
        caption = printable(captions[0]) if captions else ""
        return _pixels_of(corpus, shard, member), caption

    def _opened(self, key: str, path: str) -> tuple[Corpus, int, int]:
        """Return the corpus of a sample and its place there; raises DataError if it is missing."""
        if not self.trust_paths and is_remote(self.where):
            raise DataError(f"{self.where} is a URL: add --trust-paths to fetch it")
        if not (self.trust_paths or is_inside(path)):
            raise DataError(f"{path} is outside {self.where}: add --trust-paths to show it")
        if not self.in_tars:
            return open_corpus([str(Path(self.where) / path)], self.facts["modality"]), 0, 0
        if self.corpus is None:
            texts = self.facts["modality"] == "text"
            kind = "" if texts else self.facts["modality"]
            self.corpus = open_corpus([self.where], kind, texts)
            names = self.corpus.source.manifest.names
            self.shards = {name: number for number, name in enumerate(names)}
        if path not in self.shards:
            raise DataError(f"{self.where} no longer has {path}")
        shard = self.shards[path]
        keys = self.corpus.source.index(shard).keys
        if key not in keys:
            raise DataError(f"{path} no longer has {key}")
        return self.corpus, shard, keys.index(key)


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
