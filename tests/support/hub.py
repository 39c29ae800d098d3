"""A stand-in for the Hugging Face hub: as much of its API as huggingface_hub uses to push, list and read repositories.

Files above a few bytes are stored by Git LFS, as on the hub; Xet, its newer storage, is switched off.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest

USER, TOKEN = "me", "hf_standinstandinstandin"
LFS_BYTES = 5_000


@dataclass
class Repository:
    """A repository: its files by path, and its commits' messages."""

    private: bool
    files: dict[str, bytes] = field(default_factory=dict)
    commits: list[str] = field(default_factory=list)

    @property
    def commit(self) -> str:
        """The newest commit."""
        # Python keeps the hash of bytes.
        content = sorted((name, hash(data)) for name, data in self.files.items())
        return hashlib.sha1(repr(content).encode()).hexdigest()


@dataclass
class Hub:
    """The state of the stand-in.

    Attributes:
        url: its address.
        repositories: by kind and id, such as `datasets/me/captured`.
        requests: (method, path, bytes sent back) of each request.
        failing: (method, pattern of the path) → (status, number of times) of requests that are refused.
    """

    url: str = ""
    repositories: dict[str, Repository] = field(default_factory=dict)
    blobs: dict[str, bytes] = field(default_factory=dict)
    requests: list[tuple[str, str, int]] = field(default_factory=list)
    failing: dict[tuple[str, str], tuple[int, int]] = field(default_factory=dict)

    def read(self, pattern: str) -> int:
        """Bytes that were sent of files whose path matches."""
        return sum(size for method, path, size in self.requests if method == "GET" and re.search(pattern, path))


def _oid(data: bytes) -> str:
    return hashlib.sha1(f"blob {len(data)}\0".encode() + data).hexdigest()


def _entry(path: str, data: bytes) -> dict[str, Any]:
    entry: dict[str, Any] = {"type": "file", "path": path, "size": len(data), "oid": _oid(data)}
    if len(data) >= LFS_BYTES:
        entry["lfs"] = {"oid": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 134}
    return entry


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *arguments: Any) -> None:
        """Says nothing."""

    def do_GET(self) -> None:
        self._answer("GET")

    def do_HEAD(self) -> None:
        self._answer("HEAD")

    def do_POST(self) -> None:
        self._answer("POST")

    def do_PUT(self) -> None:
        self._answer("PUT")

    def _answer(self, method: str) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        path = unquote(urlsplit(self.path).path)
        for (refused, pattern), (status, times) in list(self.hub.failing.items()):
            if times and refused == method and re.search(pattern, path):
                self.hub.failing[refused, pattern] = (status, times - 1)
                self._send(status, {"error": "refused by the stand-in"})
                return
        if method == "PUT":
            self.hub.blobs[path.rsplit("/", 1)[-1]] = body
            self._send(200, {})
            return
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            self._send(401, {"error": "Invalid credentials"})
            return
        self._route(path, body)

    def _route(self, path: str, body: bytes) -> None:
        if path == "/api/whoami-v2":
            self._send(200, {"name": USER, "type": "user"})
        elif path == "/api/validate-yaml":
            self._send(200, {"errors": [], "warnings": []})
        elif path == "/api/repos/create":
            self._create(json.loads(body))
        elif found := re.fullmatch(r"/((?:datasets/)?[^/]+/[^/]+)\.git/info/lfs/objects/batch", path):
            self._batch(json.loads(body))
        elif found := re.fullmatch(r"/((?:datasets/)?[^/]+/[^/]+)/resolve/[^/]+/(.+)", path):
            self._file(_key(found[1]), found[2])
        elif found := re.fullmatch(r"/api/((?:models|datasets)/[^/]+/[^/]+)(?:/(.*))?", path):
            self._api(found[1], found[2] or "", body)
        else:
            self._send(404, {"error": f"no such page: {path}"})

    def _create(self, wanted: dict[str, Any]) -> None:
        owner = wanted.get("organization") or USER
        key = f"{wanted.get('type', 'model')}s/{owner}/{wanted['name']}"
        if owner != USER:
            self._send(403, {"error": f"You don't have the rights to create a repository in {owner}"})
            return
        url = f"{self.hub.url}/{key.removeprefix('models/')}"
        if key in self.hub.repositories:
            self._send(409, {"error": "You already created this repo", "url": url})
            return
        private = wanted.get("private", wanted.get("visibility") == "private")
        self.hub.repositories[key] = Repository(bool(private))
        self._send(200, {"url": url, "name": f"{owner}/{wanted['name']}"})

    def _api(self, key: str, what: str, body: bytes) -> None:
        repository = self.hub.repositories.get(key)
        if repository is None:
            self._send(404, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"})
            return
        word = what.partition("/")[0]
        if word in ("", "revision"):
            sha = repository.commit
            names = [{"rfilename": name} for name in repository.files]
            self._send(200, {"id": key.partition("/")[2], "sha": sha, "private": repository.private, "siblings": names})
        elif word == "tree":
            below = what.split("/", 2)[2] if what.count("/") >= 2 else ""
            names = [name for name in repository.files if name.startswith(below)]
            self._send(200, [_entry(name, repository.files[name]) for name in sorted(names)])
        elif word == "paths-info":
            names = _paths(body, self.headers.get("Content-Type", ""))
            self._send(200, [_entry(name, repository.files[name]) for name in names if name in repository.files])
        elif word == "preupload":
            modes = [
                {
                    "path": file["path"],
                    "uploadMode": "lfs" if file["size"] >= LFS_BYTES else "regular",
                    "shouldIgnore": False,
                    "oid": _oid(repository.files[file["path"]]) if file["path"] in repository.files else None,
                }
                for file in json.loads(body)["files"]
            ]
            self._send(200, {"files": modes})
        elif word == "commit":
            self._commit(key, repository, body)
        else:
            self._send(404, {"error": f"no such call: {what}"})

    def _commit(self, key: str, repository: Repository, body: bytes) -> None:
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            if line["key"] == "header":
                repository.commits.append(value["summary"])
            elif line["key"] == "file":
                repository.files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                repository.files[value["path"]] = self.hub.blobs[value["oid"]]
        url = f"{self.hub.url}/{key.removeprefix('models/')}/commit/{repository.commit}"
        self._send(200, {"success": True, "commitOid": repository.commit, "commitUrl": url, "hookOutput": ""})

    def _batch(self, wanted: dict[str, Any]) -> None:
        objects: list[dict[str, Any]] = []
        for each in wanted["objects"]:
            answer = {"oid": each["oid"], "size": each["size"]}
            if each["oid"] not in self.hub.blobs:
                answer["actions"] = {"upload": {"href": f"{self.hub.url}/lfs/{each['oid']}", "header": {}}}
            objects.append(answer)
        self._send(200, {"transfer": "basic", "objects": objects})

    def _file(self, key: str, name: str) -> None:
        repository = self.hub.repositories.get(key)
        if repository is None:
            self._send(404, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"})
            return
        if name not in repository.files:
            self._send(404, {"error": "Entry not found"}, {"X-Error-Code": "EntryNotFound"})
            return
        data = repository.files[name]
        headers = {"ETag": f'"{hashlib.sha256(data).hexdigest()}"', "X-Repo-Commit": repository.commit}
        found = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if found is None:
            self._send(200, data, headers)
            return
        start, end = int(found[1]), min(int(found[2] or len(data)), len(data) - 1)
        headers["Content-Range"] = f"bytes {start}-{end}/{len(data)}"
        self._send(206, data[start : end + 1], headers)

    def _send(self, status: int, content: Any, headers: dict[str, str] | None = None) -> None:
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        sent = b"" if self.command == "HEAD" else data
        self.hub.requests.append((self.command, unquote(urlsplit(self.path).path), len(sent)))
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.send_header("Content-Type", "application/json")
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        if status >= 400 and isinstance(content, dict):
            self.send_header("X-Error-Message", content["error"])
        self.end_headers()
        self.wfile.write(sent)


def _key(repo: str) -> str:
    return repo if repo.startswith("datasets/") else f"models/{repo}"


def _paths(body: bytes, kind: str) -> list[str]:
    if kind.startswith("application/json"):
        paths = json.loads(body)["paths"]
        return [paths] if isinstance(paths, str) else paths
    fields = [part.partition("=") for part in body.decode().split("&")]
    return [unquote(value.replace("+", " ")) for name, _, value in fields if name == "paths"]


@contextmanager
def running_hub() -> Iterator[Hub]:
    """A stand-in that listens on this machine."""
    hub = Hub()
    handler = type("Handler", (_Handler,), {"hub": hub})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        server.daemon_threads = True
        hub.url = f"http://127.0.0.1:{server.server_address[1]}"
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
        thread.start()
        try:
            yield hub
        finally:
            server.shutdown()
            thread.join()


@contextmanager
def using(hub: Hub, cache: Path, patch: pytest.MonkeyPatch) -> Iterator[None]:
    """Let huggingface_hub, which read its environment when it was imported, use a stand-in."""
    import huggingface_hub
    from huggingface_hub import constants

    patch.setenv("HF_TOKEN", TOKEN)
    patch.setattr(constants, "ENDPOINT", hub.url)
    patch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.url + "/{repo_id}/resolve/{revision}/{filename}")
    patch.setattr(constants, "HF_HUB_OFFLINE", False)
    patch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    patch.setattr(constants, "HF_HUB_CACHE", str(cache))
    patch.setenv("HF_HUB_DISABLE_XET", "1")
    # Made once in a process, with the address of then.
    patch.setattr("transformers.utils.hub._hf_api", None, raising=False)
    huggingface_hub.HfFileSystem.clear_instance_cache()
    yield
    huggingface_hub.HfFileSystem.clear_instance_cache()
