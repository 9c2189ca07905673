"""Credentials in URLs open the data, and appear in no file, message, report or digest."""

from __future__ import annotations

import base64
import json
import logging
import pickle
import shutil
import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from in_process import invoke
from run_comparison import assert_same
from tiny import ALL_TOKENS, train

from data_pipelines.shards.remote import ShardCache, fetch_small
from data_pipelines.shards.source import open_source
from xray import urls
from xray.ablations.jobs import Jobs
from xray.ablations.trials import load_ablation, write_recipes
from xray.artifacts.artifact import open_artifact
from xray.artifacts.lineage import describe, lineage
from xray.config.loading import build
from xray.config.training import TrainConfig
from xray.errors import ConfigError, DataError

PASSWORD, SIGNATURE = "PaSS-w0rd", "S1gnature%2Bof"


class Guard(SimpleHTTPRequestHandler):
    """Serves a folder to who has the password, or a signature of one path."""

    server: Any

    def log_message(self, *args: object) -> None:
        pass

    def do_GET(self) -> None:
        path, _, query = self.path.partition("?")
        basic = base64.b64encode(f"bob:{PASSWORD}".encode()).decode()
        allowed = self.headers["Authorization"] == f"Basic {basic}"
        if allowed or f"X-Amz-Signature={self.server.signatures.get(path, '-')}" in query.split(
            "&"
        ):
            self.path = path
            super().do_GET()
        else:
            self.send_error(403)


@pytest.fixture(autouse=True)
def nothing_known(monkeypatch: pytest.MonkeyPatch) -> None:
    """Begin each test without the credentials of another one."""
    monkeypatch.setattr(urls, "_users", {})
    monkeypatch.setattr(urls, "_queries", {})


@pytest.fixture
def guarded(demo: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Any]:
    """A server of the demo data that asks for credentials."""
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    server: Any = ThreadingHTTPServer(("127.0.0.1", 0), partial(Guard, directory=str(demo)))
    server.signatures = {}
    server.host = f"127.0.0.1:{server.server_address[1]}"
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def holding(secret: str, *folders: Path) -> list[str]:
    """Files below the folders that have a secret in their bytes or their name."""
    paths = [path for folder in folders for path in folder.rglob("*") if path.is_file()]
    return [str(p) for p in paths if secret.encode() in p.read_bytes() or secret in str(p)]


@pytest.mark.parametrize(
    ("given", "shown"),
    [
        ("http://bob:PW@h/a/0.tar", "http://h/a/0.tar"),
        ("https://ghp_PW@h/a", "https://h/a"),
        ("ftp://bob:P/W@h/a@b", "ftp://h/a@b"),
        ("http://bob:P@W@h/a@b", "http://h/a@b"),
        (
            "http://h/0.tar?X-Amz-Signature=PW&versionId=3&X-Amz-Date=1",
            "http://h/0.tar?versionId=3",
        ),
        ("https://h/0.tar?sv=1&se=2&sig=PW%3D", "https://h/0.tar"),
        ("https://h/0.tar?Expires=1&Signature=PW&Key-Pair-Id=2", "https://h/0.tar"),
        ("http://h/{0.tar?token=PW,1.tar?token=QW}", "http://h/{0.tar,1.tar}"),
        ("http://h/{0..9}.tar?access_token=PW", "http://h/{0..9}.tar"),
    ],
)
def test_urls_lose_their_credentials_and_get_them_again(given: str, shown: str) -> None:
    assert urls.conceal(given) == urls.conceal(shown) == shown
    assert "PW" not in urls.redact(f"x {given!r}: HTTP 403") and "W@" not in urls.redact(given)


@pytest.mark.parametrize(
    "url",
    [
        "s3://bucket/a@b", "abfs://box@account.dfs.core.windows.net/x", "http://h:8080/a@b",
        "http://[::1]:80/a@b", "github://org:repo@main/x", "sftp://me@h/x", "hdfs://h/x",
        "http://h/x.tar?download=1&versionId=2", "photos/{000..123}.tar", "why?key",
    ],
)  # fmt: skip
def test_other_urls_stay_as_they_are(url: str) -> None:
    assert urls.redact(url) == urls.conceal(url) == urls.reveal(url) == url


def test_credentials_return_where_they_were_given() -> None:
    for url in ("http://ann:1@h/a/{0..9}.tar", "http://bob:2@h/a/b", "http://h/c?token=3",
                "http://h/{x.tar?sig=4,y.tar?v=1&sig=5}"):  # fmt: skip
        urls.conceal(url)
    opened = {
        "http://h/a/0.tar.index": "http://ann:1@h/a/0.tar.index",
        "http://h/a/b/0.tar": "http://bob:2@h/a/b/0.tar",
        "http://h/c/manifest.json": "http://h/c/manifest.json?token=3",
        "http://h/x.tar": "http://h/x.tar?sig=4",
        "http://h/y.tar?v=1": "http://h/y.tar?v=1&sig=5",
        "http://h/x.tar.index": "http://h/x.tar.index",
        "http://other/a/0.tar": "http://other/a/0.tar",
    }
    assert {url: urls.reveal(url) for url in opened} == opened


def test_two_credentials_of_one_address_are_refused() -> None:
    given = {"mirror": "http://h/get?token=a", "wandb": "http://h/get?token=b"}
    with pytest.raises(ConfigError, match=r"^http://h/get is set twice with different cred"):
        build(TrainConfig, given)


def test_a_run_keeps_no_password_and_resumes_with_it(
    demo: Path, guarded: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    caplog.set_level(logging.INFO)
    out, plain, mirror = tmp_path / "run", tmp_path / "plain", tmp_path / "bucket"
    root = f"http://bob:{PASSWORD}@{guarded.host}"
    public = f"http://{guarded.host}"
    sources = [f"data.sources.{name}.shards={root}/{name}" for name in ("photos", "clips")]
    settings = [ALL_TOKENS, f"data.cache={tmp_path / 'cache'}", f"train.mirror=file://{mirror}"]
    half = train("mae", demo, out, *settings, *sources)
    child = train("mae", demo, tmp_path / "child", *settings[:2], *sources, init_from=[half.path])
    assert not holding(PASSWORD, tmp_path) and PASSWORD not in caplog.text
    assert half.manifest["config"]["data"]["sources"]["photos"]["shards"] == f"{public}/photos"
    assert f"`{public}/photos`" in (child.path / "README.md").read_text()
    # without credentials: the cache was emptied, and the password is missing
    for name in ("artifact", "checkpoints/step_00000006"):
        shutil.rmtree(out / name)
    shutil.rmtree(tmp_path / "cache")
    monkeypatch.setattr(urls, "_users", {})
    again = [s.replace(root, public) for s in sources]
    with pytest.raises(DataError, match=rf"{public}.*403"):
        train("mae", demo, out, *settings[:2], *again)
    # the environment gives it anew
    monkeypatch.setenv(urls.ENVIRONMENT, f"https://x:y@elsewhere {root}/")
    urls.read_environment()
    resumed = train("mae", demo, out, *settings[:2], *again)
    assert resumed.manifest["files"] == half.manifest["files"]
    # data without credentials give the same samples
    local = train("mae", demo, plain, ALL_TOKENS)
    assert local.manifest["sources"] == half.manifest["sources"]
    assert_same(plain, out, exact=True)


def test_signatures_are_renewed_without_another_digest(
    demo: Path, guarded: Any, tmp_path: Path
) -> None:
    tars = sorted(path.name for path in (demo / "photos").glob("*.tar"))

    def pattern(signature: str) -> str:
        guarded.signatures = {f"/photos/{name}": signature for name in tars}
        signed = [f"{name}?X-Amz-Expires=9&X-Amz-Signature={signature}" for name in tars]
        return f"http://{guarded.host}/photos/{{{','.join(signed)}}}"

    def digest(url: str, name: str) -> tuple[str, list[bytes]]:
        source = open_source("a", url, "image", cache=ShardCache(tmp_path / name, 10**9, 5.0))
        for shard in range(len(source.manifest)):
            assert source.read(shard, 0)
        return source.digest, [source.identity(0, 0).encode(), *source.manifest.names]

    first = digest(pattern(SIGNATURE), "one")
    assert first == digest(pattern("other"), "two") == digest(pattern("third"), "one")
    assert first[0] == open_source("a", str(demo / "photos"), "image").digest
    assert not holding(SIGNATURE, tmp_path) and not holding("other", tmp_path / "two")


def test_errors_and_reports_show_no_credentials(
    guarded: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    url = f"http://bob:{PASSWORD}@{guarded.host}/photos"
    report = tmp_path / "report.json"
    done = invoke("data", "check", url, "--json", report, "--cache", tmp_path / "cache")
    assert done.exit_code == 0 and PASSWORD not in done.output + report.read_text()
    wrong = url.replace(f"{PASSWORD}@", "Wr0ng@") + "/{000..001}.tar"
    for command in (["data", "check"], ["data", "index"], ["lineage"]):
        done = invoke(*command, f"{wrong}?token=T0ken")
        assert done.exit_code in (1, 2), done.output
        assert "Wr0ng" not in done.output and "T0ken" not in done.output
        assert "403" in done.output
    done = invoke("train", "mae", f"data.root={wrong}", "data.lanes=x")
    assert done.exit_code == 2 and "Wr0ng" not in done.output
    with pytest.raises(DataError) as raised:
        fetch_small(f"{wrong}/a?token=T0ken", 0.0)
    assert "Wr0ng" not in str(raised.value) and "T0ken" not in str(raised.value)


def test_an_older_runs_secrets_are_not_handed_on(demo: Path, tmp_path: Path) -> None:
    """A child of an artifact whose manifest has a password does not copy that manifest."""
    parent = train("mae", demo, tmp_path / "run", ALL_TOKENS)
    path = parent.path / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["config"]["data"]["sources"]["photos"]["shards"] = f"ftp://bob:{PASSWORD}@h/photos"
    path.write_text(json.dumps(manifest))
    child = train("mae", demo, tmp_path / "child", ALL_TOKENS, init_from=[parent.path])
    assert not holding(PASSWORD, tmp_path / "child")
    assert open_artifact(child.path).digest == child.digest
    for moved in (False, True):
        if moved:
            shutil.rmtree(tmp_path / "run")
        told = "\n".join(describe(lineage(child.path, verify=True)))
        assert PASSWORD not in told and ("credentials in a URL" in told) is moved


@pytest.mark.parametrize("secret", [f"bob:{PASSWORD}@", f"?token={SIGNATURE}"])
def test_an_older_run_with_secrets_continues(
    demo: Path, guarded: Any, tmp_path: Path, secret: str
) -> None:
    """run.json of earlier versions has the URL, and digests of signed URLs."""
    host, tar = guarded.host, sorted((demo / "photos").glob("*.tar"))[0].name
    user, query = (secret, "") if secret.endswith("@") else ("", secret)
    guarded.signatures = {}
    url = f"http://{user}{host}/photos/{tar}{query}"
    if query:  # only a server that does not check signatures could be used
        url = url.replace(host, f"bob:{PASSWORD}@{host}")
    settings = [ALL_TOKENS, f"data.sources.photos.shards={url}", f"data.cache={tmp_path / 'c'}"]
    out = tmp_path / "run"
    train("mae", demo, out, *settings)
    record = json.loads((out / "run.json").read_text())
    record["config"]["data"]["sources"]["photos"]["shards"] = url
    fresh = dict(record["data"])
    if query:
        record["data"]["photos"] = older_digest(url, tmp_path / "c")
        assert record["data"] != fresh
    (out / "run.json").write_text(json.dumps(record))
    shutil.rmtree(out / "artifact")
    again = train("mae", demo, out, *settings)
    assert again.manifest["sources"] == record["data"]
    assert not holding(PASSWORD, out / "artifact") and not holding(SIGNATURE, out / "artifact")
    assert SIGNATURE not in (out / "config.yaml").read_text()


def older_digest(url: str, cache: Path) -> str:
    """The digest of a source before signatures were left out of its shards' names."""
    import hashlib

    source = open_source("photos", url, "image", cache=ShardCache(cache, 10**9, 5.0))
    name = url.rpartition("/")[2].encode()
    ends = len(name).to_bytes(8, "little")
    parts = [name, ends, source.manifest.columns["digests"].tobytes()]
    whole = hashlib.sha256(b"\0".join(parts)).hexdigest()
    return hashlib.sha256(f"photos\0image\0image\0{whole}".encode()).hexdigest()


def test_other_processes_get_the_credentials(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = f"http://bob:{PASSWORD}@h/data"
    urls.conceal(root)
    pickled = pickle.dumps(ShardCache(tmp_path, 10**9, 5.0))
    urls._users.clear()
    pickle.loads(pickled)  # as a worker that is not forked does
    assert urls.reveal("http://h/data/a.tar") == f"{root}/a.tar"
    urls._users.clear()
    spec = tmp_path / "abl.yaml"
    spec.write_text("base: quickstart\nseeds: [0]\narms: {a: {}, b: {mae.mask_ratio: 0.5}}\n")
    ablation = load_ablation(str(spec), [f"data.root={root}", f"out={tmp_path / 'out'}"])
    write_recipes(ablation)
    assert not holding(PASSWORD, tmp_path / "out")
    assert "http://h/data" in (tmp_path / "out" / "command_line.yaml").read_text()
    with (tmp_path / "lock").open("w") as lock:
        env = Jobs(tmp_path / "out", 1, lock)._environment(0)
    urls._users.clear()
    monkeypatch.setenv(urls.ENVIRONMENT, env[urls.ENVIRONMENT])
    urls.read_environment()
    assert urls.reveal("http://h/data/a.tar") == f"{root}/a.tar"
