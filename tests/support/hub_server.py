"""Stand-in for the Hugging Face Hub: the part of its HTTP API that huggingface_hub calls."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote

import pytest

from data_pipelines.shards import remote

TOKEN = "hf_" + "aBcDeFgHiJ" * 3 + "kLmN"  # may write to ORG
READER = "hf_" + "ZyXwVuTsRq" * 3 + "pOnM"  # may only read
ORG = "acme"
LARGE = 20_000  # bytes of the files that git keeps as LFS objects, as .safetensors and .tar are
LFS = (".safetensors", ".tar", ".onnx", ".bin")
SIGNED = "X-Amz-Signature=5igned"  # query of the addresses of LFS objects

Files = dict[str, bytes]


def git_hash(content: bytes) -> str:
    """Hash a file as git does."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


class Repository:
    """Files of a repository, by revision; `gated` and `private` restrict who may read it."""

    def __init__(self, gated: bool = False, private: bool = False) -> None:
        self.gated, self.private = gated, private
        self.revisions: dict[str, Files] = {"main": {}}
        self.commits: list[str] = []  # their titles

    @property
    def sha(self) -> str:
        return hashlib.sha1(str(len(self.commits)).encode()).hexdigest()


class HubServer(ThreadingHTTPServer):
    """The hub on a local port.

    repositories: by kind and name, `models/acme/vit`. objects: contents of LFS objects by sha256.
    seen: `METHOD /path` of all requests. uploaded: hashes of the LFS objects that were sent.
    faults: `METHOD /path` -> status codes of its next answers. leaks: requests that carried a
    token to a place that must not have it.
    """

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), HubHandler)
        self.repositories: dict[str, Repository] = {}
        self.objects: dict[str, bytes] = {}
        self.seen: list[str] = []
        self.uploaded: list[str] = []
        self.leaks: list[str] = []
        self.faults: dict[str, list[int]] = {}
        self.root = f"http://127.0.0.1:{self.server_address[1]}"
        self.store = f"http://localhost:{self.server_address[1]}"  # another host, for LFS objects

    def add(self, name: str, files: Files, revision: str = "main", **access: bool) -> Repository:
        """Add files to a repository, which is made if it is new."""
        repository = self.repositories.setdefault(name, Repository(**access))
        repository.revisions.setdefault(revision, {}).update(files)
        return repository

    def handle_error(self, *args: object) -> None:  # for example, the client was stopped
        pass


class HubHandler(BaseHTTPRequestHandler):
    """Request handler of HubServer."""

    protocol_version = "HTTP/1.1"
    server: HubServer

    def log_message(self, *args: object) -> None:
        pass

    # routes -------------------------------------------------------------------------------------

    def handle_request(self) -> None:
        path, _, self.query = self.path.partition("?")
        self.body = self.rfile.read(int(self.headers["Content-Length"] or 0))
        self.token = (self.headers["Authorization"] or "").removeprefix("Bearer ")
        line = f"{self.command} {unquote(path)}"
        self.server.seen.append(line)
        if faults := self.server.faults.get(line):
            self.answer(faults.pop(0), {"error": f"a fault, for {self.token}"})
            return
        for method, pattern, handler in ROUTES:
            match = re.fullmatch(pattern, path)
            if match and self.command in method.split():
                handler(self, *(unquote(part or "") for part in match.groups()))
                return
        self.answer(404, {"error": f"no such page: {line}"})

    def do_GET(self) -> None:
        self.handle_request()

    def do_HEAD(self) -> None:
        self.handle_request()

    def do_POST(self) -> None:
        self.handle_request()

    def do_PUT(self) -> None:
        self.handle_request()

    def home(self) -> None:
        self.answer(200, b"<html>")

    def create(self) -> None:
        wanted = json.loads(self.body)
        name = f"models/{wanted['organization']}/{wanted['name']}"
        if not self.token or self.token not in (TOKEN, READER):
            self.answer(401, {"error": "Invalid username or password."})
        elif self.token == READER or wanted["organization"] != ORG:
            message = "You don't have the rights to create a model under this namespace"
            self.answer(403, {"error": message})
        elif name in self.server.repositories:
            url = f"{self.server.root}/{name.removeprefix('models/')}"
            self.answer(409, {"error": "You already created this model repo", "url": url})
        else:
            private = wanted.get("visibility") == "private"
            first = {".gitattributes": b"*.safetensors filter=lfs\n"}
            self.server.add(name, first, private=private)
            self.answer(200, {"url": f"{self.server.root}/{name.removeprefix('models/')}"})

    def branch(self, kind: str, name: str, branch: str) -> None:
        known = self.files(kind, name, "main") if self.may_write() else None
        if known is not None:
            self.server.repositories[f"{kind}/{name}"].revisions.setdefault(branch, dict(known))
            self.answer(200, {})

    def info(self, kind: str, name: str, revision: str) -> None:
        if self.files(kind, name, revision) is not None:
            repository = self.server.repositories[f"{kind}/{name}"]
            self.answer(200, {"id": name, "sha": repository.sha, "private": repository.private})

    def tree(self, kind: str, name: str, revision: str, folder: str) -> None:
        files = self.files(kind, name, revision)
        if files is None:
            return
        start = f"{folder}/" if folder else ""
        inside = {path: body for path, body in files.items() if path.startswith(start)}
        if folder and not inside:
            self.answer(404, {"error": "not found"}, {"X-Error-Code": "EntryNotFound"})
            return
        entries = []
        folders = {}
        for path, body in sorted(inside.items()):
            first, slash, _ = path.removeprefix(start).partition("/")
            if slash:
                folders[start + first] = {"type": "directory", "path": start + first, "oid": "0"}
            if not slash or "recursive=true" in self.query.lower():
                entries.append(self.entry(path, body))
        self.answer(200, [*folders.values(), *entries])

    def entry(self, path: str, body: bytes) -> dict[str, Any]:
        own: dict[str, Any] = {"type": "file", "path": path, "size": len(body)}
        if is_large(path, body):
            oid = hashlib.sha256(body).hexdigest()
            own["lfs"] = {"oid": oid, "size": len(body), "pointerSize": 130}
        return own | {"oid": git_hash(body)}

    def preupload(self, kind: str, name: str, revision: str) -> None:
        if not self.may_write():
            return
        known = self.files(kind, name, revision)
        if known is None:
            return
        files = []
        for item in json.loads(self.body)["files"]:
            path, size = item["path"], item["size"]
            large = path.endswith(LFS) or size >= LARGE
            body = known.get(path)
            oid = None
            if body is not None:
                oid = hashlib.sha256(body).hexdigest() if large else git_hash(body)
            mode = "lfs" if large else "regular"
            files.append({"path": path, "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        self.answer(200, {"files": files})

    def batch(self, name: str) -> None:
        if not self.may_write():
            return
        objects = []
        for item in json.loads(self.body)["objects"]:
            own = {"oid": item["oid"], "size": item["size"]}
            if item["oid"] not in self.server.objects:
                href = f"{self.server.store}/lfs/{item['oid']}?{SIGNED}"
                own["actions"] = {"upload": {"href": href}}
            objects.append(own)
        self.answer(200, {"transfer": "basic", "objects": objects})

    def receive(self, oid: str) -> None:
        if self.token:
            self.server.leaks.append(self.path)
        if hashlib.sha256(self.body).hexdigest() != oid:
            self.answer(400, {"error": "the hash is not that of the content"})
            return
        self.server.objects[oid] = self.body
        self.server.uploaded.append(oid)
        self.answer(200, b"")

    def validate(self) -> None:
        content = json.loads(self.body)["content"]
        if re.match(r"---\n(.*\n)*license: \S+\n(.*\n)*---\n", content):
            self.answer(200, {"errors": [], "warnings": []})
        else:
            self.answer(400, {"errors": [{"message": '"license" must be a string'}]})

    def commit(self, kind: str, name: str, revision: str) -> None:
        if not self.may_write():
            return
        files = self.files(kind, name, revision)
        if files is None:
            return
        changed = dict(files)
        for line in self.body.splitlines():
            item = json.loads(line)
            value = item["value"]
            if item["key"] == "header":
                self.server.repositories[f"{kind}/{name}"].commits.append(value["summary"])
            elif item["key"] == "file":
                changed[value["path"]] = base64.b64decode(value["content"])
            elif item["key"] == "lfsFile":
                changed[value["path"]] = self.server.objects[value["oid"]]
            elif item["key"] == "deletedFile":
                del changed[value["path"]]
        self.server.repositories[f"{kind}/{name}"].revisions[revision] = changed
        sha = self.server.repositories[f"{kind}/{name}"].sha
        url = f"{self.server.root}/{name}/commit/{sha}"
        self.answer(200, {"commitUrl": url, "commitOid": sha, "pullRequestUrl": None})

    def resolve(self, kind: str, name: str, revision: str, path: str) -> None:
        kind = kind or "models"
        files = self.files(kind, name, revision)
        if files is None:
            return
        repository = self.server.repositories[f"{kind}/{name}"]
        if repository.gated and self.token != TOKEN:
            status = 403 if self.token else 401
            message = f"Access to model {name} is restricted"
            code = {"X-Error-Code": "GatedRepo", "X-Error-Message": message}
            self.answer(status, {"error": message}, code)
        elif path not in files:
            self.answer(404, b"Entry not found", {"X-Error-Code": "EntryNotFound"})
        else:
            body = files[path]
            about = {"ETag": f'"{git_hash(body)}"', "X-Repo-Commit": repository.sha}
            if is_large(path, body):
                oid = hashlib.sha256(body).hexdigest()
                self.server.objects[oid] = body
                about |= {"X-Linked-Size": str(len(body)), "X-Linked-Etag": f'"{oid}"'}
                about["Location"] = f"{self.server.store}/lfs/{oid}?{SIGNED}"
                self.answer(302, b"", about)
            else:
                self.send(body, about)

    def download(self, oid: str) -> None:
        if self.token:
            self.server.leaks.append(self.path)
        if SIGNED in self.query:
            self.send(self.server.objects[oid], {"ETag": f'"{oid}"'})
        else:
            self.answer(403, b"unsigned")

    # access -------------------------------------------------------------------------------------

    def may_write(self) -> bool:
        """Answer with an error if the token may not write."""
        if self.token == TOKEN:
            return True
        self.answer(403 if self.token == READER else 401, {"error": "You may not write here"})
        return False

    def files(self, kind: str, name: str, revision: str) -> Files | None:
        """Return the files of a revision; None after an answer that there are none."""
        repository = self.server.repositories.get(f"{kind}/{name}")
        if repository is not None and revision == repository.sha:
            revision = "main"
        known = self.token in (TOKEN, READER)
        if self.token and not known:
            message = "Invalid credentials in Authorization header"
            self.answer(401, {"error": message}, {"X-Error-Message": message})
        elif repository is None or (repository.private and self.token != TOKEN):
            message = "Repository not found"
            code = {"X-Error-Code": "RepoNotFound", "X-Error-Message": message}
            self.answer(404 if known else 401, {"error": message}, code)
        elif (revision or "main") not in repository.revisions:
            message = f"Invalid rev id: {revision}"
            code = {"X-Error-Code": "RevisionNotFound", "X-Error-Message": message}
            self.answer(404, {"error": message}, code)
        else:
            return repository.revisions[revision or "main"]
        return None

    # answers ------------------------------------------------------------------------------------

    def send(self, body: bytes, headers: dict[str, str]) -> None:
        """Answer with a file, or with the part of it that is asked for."""
        span = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers["Range"] or "")
        if span is None:
            self.answer(200, body, headers)
            return
        first, last = int(span[1]), int(span[2] or len(body) - 1)
        headers["Content-Range"] = f"bytes {first}-{last}/{len(body)}"
        self.answer(206, body[first : last + 1], headers)

    def answer(self, status: int, body: Any, headers: dict[str, str] | None = None) -> None:
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        kind = "application/octet-stream" if isinstance(body, bytes) else "application/json"
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(content)))
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)


def is_large(path: str, body: bytes) -> bool:
    """Check if a file is kept as an LFS object."""
    return path.endswith(LFS) or len(body) >= LARGE


KINDS, NAME = "(models|datasets)", "([^/]+/[^/]+)"
ROUTES: list[tuple[str, str, Any]] = [
    ("GET HEAD", "/?", HubHandler.home),
    ("POST", "/api/repos/create", HubHandler.create),
    ("POST", "/api/validate-yaml", HubHandler.validate),
    ("GET", f"/api/{KINDS}/{NAME}(?:/revision/([^/]+))?", HubHandler.info),
    ("GET", f"/api/{KINDS}/{NAME}/tree/([^/]+)(?:/(.+))?", HubHandler.tree),
    ("POST", f"/api/{KINDS}/{NAME}/branch/([^/]+)", HubHandler.branch),
    ("POST", f"/api/{KINDS}/{NAME}/preupload/([^/]+)", HubHandler.preupload),
    ("POST", f"/api/{KINDS}/{NAME}/commit/([^/]+)", HubHandler.commit),
    ("POST", rf"/{NAME}\.git/info/lfs/objects/batch", HubHandler.batch),
    ("PUT", r"/lfs/(\w+)", HubHandler.receive),
    ("GET HEAD", r"/lfs/(\w+)", HubHandler.download),
    ("GET HEAD", f"/(?:(datasets)/)?{NAME}/resolve/([^/]+)/(.+)", HubHandler.resolve),
]


@contextmanager
def hub_server(patch: pytest.MonkeyPatch, token: str = "") -> Iterator[HubServer]:
    """Serve a hub that huggingface_hub of this process uses, with a token or without one."""
    from huggingface_hub import constants, file_download

    server = HubServer()
    patch.setenv("NO_PROXY", "127.0.0.1,localhost")
    patch.setenv("HF_TOKEN", token)
    patch.setattr(constants, "ENDPOINT", server.root)
    url = "/{repo_id}/resolve/{revision}/{filename}"
    for module in (constants, file_download):
        patch.setattr(module, "HUGGINGFACE_CO_URL_TEMPLATE", server.root + url, raising=False)
    patch.setattr(constants, "HF_HUB_OFFLINE", False)
    patch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    patch.setattr(constants, "HF_TOKEN_PATH", "/nonexistent/token")
    patch.setattr(remote, "_hub_answers", False)
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
