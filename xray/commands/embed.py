"""`xray embed` and `xray search`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import nullcontext
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from xray import dist
from xray.commands.common import (
    ArtifactName,
    KeepRate,
    Modality,
    check_artifact,
    checking,
    connected_device,
    guarded,
)
from xray.commands.help import examples
from xray.errors import ConfigError
from xray.progress import progress_bar
from xray.words import count, counted

if TYPE_CHECKING:
    import torch

    from data_pipelines.ingest.user_data import Corpus
    from xray.artifacts.artifact import Artifact
    from xray.search.config import EmbedConfig
    from xray.search.page import Hit, Media

SHOWN = 5  # left-out samples that are printed

Llm = Annotated[
    str, typer.Option(metavar="FOLDER", help="Folder of the artifact's LLM, if it was moved")
]


@examples(
    (
        "xray embed runs/small/clip/artifact photos --out photos.parquet",
        "one row for each picture of a folder",
    ),
    (
        "xray embed runs/small/clip/artifact /data/val --texts --out captions.npy",
        "the captions of shards",
    ),
    (
        "xray embed runs/small/clip/artifact photos --out small.parquet --dtype int8",
        "a quarter of the bytes",
    ),
    (
        "xray embed runs/a/clip photos --out patches.npy --patches --dtype fp16",
        "the patch tokens of each picture, [N, h, w, D]",
    ),
    (
        "xray embed runs/a/clip photos --out 64.npy --pca train.npy --dim 64",
        "64 principal components of the embeddings in train.npy",
    ),
)
@guarded
def embed(
    artifact: ArtifactName,
    source: Annotated[
        list[str],
        typer.Argument(
            help="Shards (folder, glob, {000..123} pattern, URL), a folder or list of pictures or "
            "clips, single files, or a .txt of one text per line"
        ),
    ],
    out: Annotated[Path, typer.Option(help=".parquet or .npy file to write")],
    dtype: Annotated[str, typer.Option(help="fp32, fp16, int8 or binary")] = "fp32",
    dim: Annotated[
        int,
        typer.Option(help="Number of leading features (Matryoshka) or components to keep; 0 = all"),
    ] = 0,
    pca: Annotated[
        str,
        typer.Option(
            metavar="FILE",
            help="Reduce to --dim principal components of the embeddings in this file, or to "
            "those stored in it",
        ),
    ] = "",
    patches: Annotated[
        bool,
        typer.Option(
            "--patches", help="Patch tokens of the backbone, not normalised, instead of one feature"
        ),
    ] = False,
    texts: Annotated[
        bool, typer.Option("--texts", help="Embed captions instead of pictures")
    ] = False,
    captions: Annotated[
        str,
        typer.Option(
            metavar="FIELDS", help="Json fields of captions, a,b (default: the usual ones)"
        ),
    ] = "",
    modality: Modality = "",
    keep_rate: KeepRate = None,
    precision: Annotated[str, typer.Option(help="Precision of the encoder: fp32 or bf16")] = "fp32",
    batch_size: Annotated[int, typer.Option(help="Samples per forward pass")] = 64,
    workers: Annotated[int, typer.Option(help="Loader processes per rank")] = 2,
    llm: Llm = "",
) -> None:
    """Embed pictures, clips or texts as normalised features; a clip artifact's share one space.

    --patches writes the patch tokens of pictures or clips.

    After an interruption, run the same command again: it continues. With torchrun, each process
    does a part.
    """
    from data_pipelines.ingest.user_data import open_corpus
    from xray.artifacts.artifact import open_artifact
    from xray.artifacts.offers import VISION
    from xray.search.config import EmbedConfig
    from xray.search.embedding_file import check_out, open_embeddings

    config = EmbedConfig(
        dtype=dtype,  # type: ignore[arg-type]  # checked by validate()
        dim=dim,
        pca=pca,
        keep_rate=keep_rate,
        precision=precision,  # type: ignore[arg-type]
        captions={name.strip(): 1.0 for name in captions.split(",") if name.strip()},
        patches=patches,
        batch_size=batch_size,
        workers=workers,
    )
    with checking():
        config.validate()
        check_out(out)
        check_artifact(artifact)
        if pca:
            open_embeddings(Path(pca))
    device = connected_device()
    opened = dist.main_first(lambda: open_artifact(artifact, llm), "opening the artifact")
    wanted = texts or VISION not in opened.offers
    corpus = dist.main_first(
        lambda: open_corpus(source, modality, wanted, config.captions), "listing the samples"
    )
    _write(opened, corpus, config, out, device)


def _write(
    artifact: Artifact, corpus: Corpus, config: EmbedConfig, out: Path, device: torch.device
) -> None:
    """Embed the samples, each rank its part, and print what was written and left out."""
    from xray.artifacts.encoders import restore_encoder
    from xray.search.embed import embed as write
    from xray.search.embedding_file import open_embeddings

    encoder = restore_encoder(artifact).to(device)
    with progress_bar("embedding") if dist.is_main() else nullcontext() as progress:
        report = write(encoder, corpus, config, out, progress)
    if dist.is_main():
        again = f", {report.reused} of {report.parts} parts were there" if report.reused else ""
        print(f"{out}: {count(report.rows, 'row')} ({config.dtype}){again}")
        if fitted := open_embeddings(out).facts.get("pca"):
            print(
                f"PCA of {count(fitted['samples'], 'embedding')} in {config.pca} keeps "
                f"{100 * fitted['variance_kept']:.1f} % of their variance"
            )
        _print_left_out(report.left_out, report.listed, corpus)


def _print_left_out(causes: Mapping[str, int], listed: Path, corpus: Corpus) -> None:
    if corpus.others:
        what = "files" if corpus.kind == "files" else "samples"
        print(f"skipped: {corpus.others:,} {what} that are not {corpus.modality} (--modality)")
    if not causes:
        return
    with listed.open(encoding="utf-8") as lines:
        first = [json.loads(line) for line in islice(lines, SHOWN)]
    names = ", ".join(f"{row['path']}:{row['key']}" for row in first)
    more = ", ..." if sum(causes.values()) > SHOWN else ""
    print(f"left out: {counted(causes)} ({names}{more}); listed in {listed}")


@examples(
    ('xray search photos.parquet "a dog on a beach" --html found.html', "search by text"),
    (
        'xray search photos "a dog on a beach" --artifact runs/small/clip/artifact',
        "the same of a folder, which is embedded once",
    ),
    ("xray search photos.parquet photo.jpg --top 20", "search by picture"),
    (
        'xray search small.parquet "a dog" --rescore photos.parquet',
        "rank the candidates of small embeddings again with exact ones",
    ),
)
@guarded
def search(
    data: Annotated[
        str,
        typer.Argument(
            metavar="X",
            help="Embedding file of xray embed, .parquet or .npy; or a folder, a .csv or "
            ".parquet list or shards of pictures or clips, which are embedded once",
        ),
    ],
    query: Annotated[str, typer.Argument(help="A text, or the file of a picture or clip")],
    top: Annotated[int, typer.Option(min=1, help="Number of hits")] = 10,
    html: Annotated[
        Path | None, typer.Option(help="Also write an HTML page of the pictures")
    ] = None,
    artifact: Annotated[
        str,
        typer.Option(
            help="The artifact, a folder or a URL, that embeds X; of an embedding file, the one "
            "that made it, if it was moved"
        ),
    ] = "",
    oversample: Annotated[
        int,
        typer.Option(
            min=1, help="Candidates per hit that are ranked again; binary: 1 = Hamming only"
        ),
    ] = 4,
    rescore: Annotated[
        Path | None,
        typer.Option(help="The same embeddings in a finer dtype, to rank candidates again"),
    ] = None,
    trust_paths: Annotated[
        bool,
        typer.Option(
            "--trust-paths", help="Fetch URLs that X names, and show files outside its folder"
        ),
    ] = False,
    llm: Llm = "",
) -> None:
    """Find the pictures, clips or texts of X that are nearest to QUERY."""
    from xray.search.embedding_file import is_embedding_file, open_embeddings

    if html is not None and html.suffix != ".html":
        raise ConfigError(f"--html {html} must end in .html")
    given = Path(data)
    embeddings = given if is_embedding_file(given) else _embedded(data, artifact, llm)
    opened = open_embeddings(embeddings)
    finer = None if rescore is None else open_embeddings(rescore)
    if "grid" in opened.facts:
        raise ConfigError(
            f"{embeddings} has patch tokens, and xray search takes one row per sample"
        )
    from xray.search.encoding import encode_query, open_maker
    from xray.search.exact import check_same_rows
    from xray.search.exact import search as find
    from xray.search.page import Media

    if finer is not None:
        check_same_rows(opened, finer)
    maker = open_maker(opened.facts, artifact, llm, trust_paths)
    rows = encode_query(maker, opened.facts, query, dist.choose_device("auto"))
    hits = find(opened, rows, top, oversample, finer)
    media = Media(opened.facts, trust_paths)
    found = media.hits(opened.names(hits.rows[0].tolist()), hits.scores[0].tolist())
    _print_hits(query, found, media, html)


def _print_hits(query: str, found: list[Hit], media: Media, html: Path | None) -> None:
    """Print the hits, and write their page."""
    from xray.search.page import hits_table, write_page

    hits_table(query, found).print()
    if html is not None:
        missing = write_page(html, query, found, media)
        print(f"written: {html}")
        if missing:
            print(f"missing: {count(len(missing), 'picture')}, the first {missing[0]}")


def _embedded(data: str, artifact: str, llm: str) -> Path:
    """Embed pictures or clips, unless they are, and return the file in the user's cache."""
    from data_pipelines.ingest.user_data import open_corpus
    from xray.artifacts.artifact import open_artifact
    from xray.artifacts.offers import VISION

    if not artifact:
        raise ConfigError(
            f"{data} is not an embedding file (.parquet, .npy): give the artifact that is to embed "
            "it as --artifact"
        )
    with checking():
        check_artifact(artifact)
    opened = open_artifact(artifact, llm)
    corpus = open_corpus([data], "", VISION not in opened.offers)
    from xray.search.embed import cached_embeddings

    with progress_bar("embedding") as progress:
        out, report = cached_embeddings(opened, corpus, progress)
    if report is not None:
        print(f"{data}: embedded {count(report.rows, 'sample')} once, in {out}")
        _print_left_out(report.left_out, report.listed, corpus)
    return out
