"""Paths and URLs in an embedding file are data: none outside its folder is read or fetched."""

from __future__ import annotations

import base64
import io
import re
import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from in_process import invoke
from PIL import Image
from shards import jpeg

from xray.search.embedding_file import Embeddings, Names, open_embeddings, write_embeddings
from xray.search.page import EMPTY


class Counting(SimpleHTTPRequestHandler):
    """Serves a folder and notes each request."""

    seen: list[str]

    def log_message(self, *args: object) -> None:
        pass

    def do_GET(self) -> None:
        self.seen.append(self.path)
        super().do_GET()

    def do_HEAD(self) -> None:
        self.seen.append(self.path)
        super().do_HEAD()


@pytest.fixture
def served(tagger: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Any]:
    """A server of an artifact's folder, its URL and its requests."""
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(Counting, "seen", [], raising=False)
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Counting, directory=str(tagger)))
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}", Counting.seen
    server.shutdown()
    server.server_close()


def pictures(page: Path) -> list[np.ndarray]:
    """The pictures of a page."""
    found = re.findall(r"base64,([\w+/=]+)", page.read_text())
    return [np.asarray(Image.open(io.BytesIO(base64.b64decode(one)))) for one in found]


@pytest.fixture
def embedded(tagger: Path, tmp_path: Path) -> Any:
    """A function that embeds two pictures and changes the facts and the paths in the file."""
    photos = tmp_path / "data" / "photos"
    photos.mkdir(parents=True)
    (tmp_path / "private").mkdir()
    for path, colour in ((photos / "a.jpg", 0), (tmp_path / "private" / "secret.jpg", 200)):
        path.write_bytes(jpeg((colour, 9, 9)))
    plain = tmp_path / "plain.parquet"
    assert invoke("embed", tagger, photos, "--out", plain).exit_code == 0
    made: Embeddings = open_embeddings(plain)

    def forge(path: str, **facts: Any) -> Path:
        own = {**made.facts, **facts}
        out = tmp_path / "x.parquet"
        rows = next(iter(made.chunks()))
        write_embeddings(out, own, [(rows, Names(["k"], [path]))])
        return out

    return forge, made.facts, photos


@pytest.mark.parametrize("trusted", [False, True])
def test_a_page_shows_no_picture_outside_the_folder(
    embedded: Any, tmp_path: Path, trusted: bool
) -> None:
    forge, _, photos = embedded
    page, option = tmp_path / "page.html", ["--trust-paths"] * trusted
    query = photos / "a.jpg"
    for path in ("../../private/secret.jpg", str(tmp_path / "private" / "secret.jpg")):
        done = invoke("search", forge(path), query, "--html", page, *option)
        assert done.exit_code == 0, done.output
        refused = f"{path} is outside {photos}: add --trust-paths"
        assert (refused in done.output) is not trusted
        reds = [int(shown[0, 0, 0]) for shown in pictures(page)]
        assert any(190 < red < 210 for red in reds) is trusted
        assert (EMPTY[0, 0, 0] in reds) is not trusted
    done = invoke("search", forge("a.jpg"), query, "--html", page)
    assert "missing" not in done.output and len(pictures(page)) == 2


def test_a_search_fetches_no_url_that_its_file_names(
    embedded: Any, served: Any, tmp_path: Path
) -> None:
    forge, facts, photos = embedded
    (url, seen), query = served, photos / "a.jpg"
    file = forge("a.jpg", artifact={**facts["artifact"], "where": url})
    done = invoke("search", file, query)
    assert done.exit_code == 2 and "give it as --artifact, or add --trust-paths" in done.stderr
    assert seen == []
    assert invoke("search", file, query, "--artifact", url).exit_code == 0
    assert invoke("search", file, query, "--trust-paths").exit_code == 0
    assert "/manifest.json" in seen
    seen.clear()
    for kind in ("shards", "files"):
        where = {**facts["source"], "where": f"{url}/photos", "kind": kind}
        done = invoke("search", forge("a.jpg", source=where), query, "--html", tmp_path / "p.html")
        assert done.exit_code == 0 and "is a URL: add --trust-paths" in done.output
    assert seen == []
