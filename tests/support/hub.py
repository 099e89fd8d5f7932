"""A small hub on loopback: repositories in memory, served as ``huggingface_hub`` and ``datasets`` ask for them."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

_ROUTE = re.compile(r"/api/(?P<kinds>models|datasets)/(?P<repo>[^/]+/[^/]+)(/(?P<what>[\w-]+)(/(?P<rest>.*))?)?")
_FILE = re.compile(r"/(?P<kinds>datasets/)?(?P<repo>[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<path>.+)")


def folder(directory: Path) -> dict[str, bytes]:
    """The files of a directory, by name."""
    return {path.name: path.read_bytes() for path in directory.iterdir() if path.is_file()}


@dataclass(kw_only=True)
class Repo:
    """A repository: files by commit, commits by branch or tag."""

    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)
    gated: bool = False
    private: bool = False

    def push(self, files: Mapping[str, bytes], *, ref: str = "main") -> str:
        """A new commit of these files, which ``ref`` means from now on."""
        text = json.dumps([ref, len(self.commits), {k: hashlib.sha1(v).hexdigest() for k, v in files.items()}])
        commit = hashlib.sha1(text.encode()).hexdigest()
        self.commits[commit] = dict(files)
        self.refs[ref] = commit
        return commit


@dataclass(kw_only=True)
class Hub:
    """The server. ``requests`` is all that was asked, ``METHOD /path``; ``cut`` ends a file's next answer early."""

    url: str
    repos: dict[tuple[str, str], Repo] = field(default_factory=dict)
    requests: list[str] = field(default_factory=list)
    ranges: list[str] = field(default_factory=list)
    cut: dict[str, int] = field(default_factory=dict)
    objects: dict[str, bytes] = field(default_factory=dict)  # large files that were uploaded, by their SHA-256
    pushes: list[dict[str, Any]] = field(default_factory=list)  # headers of commits
    readers_only: bool = False  # whether nobody may write

    def model(self, name: str, **facts: Any) -> Repo:
        return self.repos.setdefault(("models", name), Repo(**facts))

    def dataset(self, name: str, **facts: Any) -> Repo:
        return self.repos.setdefault(("datasets", name), Repo(**facts))

    def asked(self, ending: str) -> int:
        """How often a file's content was asked for."""
        return sum(line.startswith("GET") and line.endswith(ending) for line in self.requests)


@contextmanager
def serving() -> Iterator[Hub]:
    """The hub, for as long as the block lasts."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
    hub = Hub(url=f"http://127.0.0.1:{server.server_port}")
    server.hub = hub  # type: ignore[attr-defined]
    thread = threading.Thread(target=lambda: server.serve_forever(poll_interval=0.02), daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def use_hub(url: str, home: Path | str, *, offline: bool = False) -> None:
    """Point the libraries of this process at a hub; they have read the environment when they were imported."""
    for (module, name), value in _settings(url, Path(home), offline).items():
        setattr(module, name, value)


@contextmanager
def using_hub(url: str, home: Path | str, *, offline: bool = False) -> Iterator[None]:
    """The same, for as long as the block lasts."""
    kept = {(module, name): getattr(module, name) for module, name in _settings(url, Path(home), offline)}
    use_hub(url, home, offline=offline)
    try:
        yield
    finally:
        for (module, name), value in kept.items():
            setattr(module, name, value)


def _settings(url: str, home: Path, offline: bool) -> dict[tuple[Any, str], Any]:
    import datasets.config
    from huggingface_hub import constants

    return {
        (constants, "ENDPOINT"): url,
        (constants, "HUGGINGFACE_CO_URL_TEMPLATE"): url + "/{repo_id}/resolve/{revision}/{filename}",
        (constants, "HF_HUB_CACHE"): str(home / "hub"),
        (constants, "HF_TOKEN_PATH"): str(home / "token"),
        (constants, "HF_HUB_OFFLINE"): offline,
        (constants, "HF_HUB_DISABLE_XET"): True,  # large files go by the LFS protocol, which is a few routes
        (datasets.config, "HF_ENDPOINT"): url,
        (datasets.config, "HF_DATASETS_CACHE"): home / "datasets",
        (datasets.config, "DOWNLOADED_DATASETS_PATH"): home / "datasets" / "downloads",
        (datasets.config, "EXTRACTED_DATASETS_PATH"): home / "datasets" / "downloads" / "extracted",
        (datasets.config, "HF_MODULES_CACHE"): str(home / "modules"),
        (datasets.config, "HF_HUB_OFFLINE"): offline,
    }


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None: ...

    @property
    def hub(self) -> Hub:
        return self.server.hub  # type: ignore[attr-defined]

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def do_POST(self) -> None:
        self._answer()

    def do_PUT(self) -> None:
        data = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.hub.requests.append(f"PUT {self.path}")
        self.hub.objects[hashlib.sha256(data).hexdigest()] = data
        self.send_response(200)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def _answer(self) -> None:
        path = unquote(urlsplit(self.path).path)
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.hub.requests.append(f"{self.command} {path}")
        if path == "/api/repos/create":
            self._create(json.loads(body))
        elif path == "/api/validate-yaml":
            self._json({"warnings": [], "errors": []})
        elif path.endswith(".git/info/lfs/objects/batch"):
            self._batch(json.loads(body))
        elif found := _ROUTE.fullmatch(path):
            self._api(found, body)
        elif found := _FILE.fullmatch(path):
            kinds = "datasets" if found["kinds"] else "models"
            self._file(kinds, found["repo"], found["revision"], found["path"])
        else:
            self._error(404, None, "no such route")

    def _repo(self, kinds: str, name: str, *, content: bool) -> Repo | None:
        repo = self.hub.repos.get((kinds, name))
        if repo is None:
            return self._error(401, "RepoNotFound", "Invalid username or password.")
        if repo.gated and content:
            return self._error(403, "GatedRepo", f"Access to {name} is restricted.")
        return repo

    def _commit(self, repo: Repo, revision: str) -> str | None:
        commit = revision if revision in repo.commits else repo.refs.get(revision)
        return commit or self._error(404, "RevisionNotFound", f"Invalid rev id: {revision}")

    def _api(self, found: re.Match[str], body: bytes) -> None:
        kinds, what, rest = found["kinds"], found["what"] or "revision", found["rest"] or ""
        repo = self._repo(kinds, found["repo"], content=what != "revision")
        revision, _, below = rest.partition("/") if what != "revision" else (rest, "", "")
        if repo is None or (commit := self._commit(repo, revision or "main")) is None:
            return
        files = repo.commits[commit]
        if what == "revision":
            siblings = [{"rfilename": name} for name in sorted(files)]
            facts = {"id": found["repo"], "sha": commit, "siblings": siblings, "private": False, "tags": []}
            self._json({**facts, "modelId": found["repo"], "downloads": 0, "likes": 0})
        elif what == "tree":
            self._json([_entry(name, data) for name, data in sorted(files.items()) if name.startswith(below)])
        elif what == "paths-info":
            paths = json.loads(body or b"{}").get("paths", [])
            paths = [paths] if isinstance(paths, str) else paths
            self._json([_entry(name, files[name]) for name in paths if name in files])
        elif what == "preupload":
            asked = json.loads(body)["files"]
            modes = {True: "lfs", False: "regular"}
            files_ = [{"path": f["path"], "uploadMode": modes[f["path"].endswith(".safetensors")]} for f in asked]
            self._json({"files": [{**one, "shouldIgnore": False} for one in files_]})
        elif what == "commit":
            self._json(self._push(found["repo"], repo, body))
        else:
            self._error(404, None, f"no {what} here")

    def _create(self, asked: dict[str, Any]) -> None:
        if self.hub.readers_only:
            return self._error(403, None, "You don't have the rights to create a model under this namespace")
        owner, name = asked.get("organization"), asked["name"]
        full = f"{owner}/{name}" if owner else name
        repo = self.hub.model(full, private=asked.get("visibility") == "private")
        if not repo.commits:
            repo.push({})
        self._json({"url": f"{self.hub.url}/{full}", "name": full, "id": full})

    def _batch(self, asked: dict[str, Any]) -> None:
        objects = [
            {**one, "actions": {"upload": {"href": f"{self.hub.url}/objects/{one['oid']}"}}} for one in asked["objects"]
        ]
        self._json({"transfer": "basic", "objects": objects})

    def _push(self, name: str, repo: Repo, body: bytes) -> dict[str, Any]:
        files = dict(repo.commits[repo.refs["main"]])
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            if line["key"] == "header":
                self.hub.pushes.append(value)
            elif line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.hub.objects[value["oid"]]
        commit = repo.push(files)
        return {"success": True, "commitOid": commit, "commitUrl": f"{self.hub.url}/{name}/commit/{commit}"}

    def _file(self, kinds: str, name: str, revision: str, path: str) -> None:
        repo = self._repo(kinds, name, content=True)
        if repo is None or (commit := self._commit(repo, revision)) is None:
            return
        data = repo.commits[commit].get(path)
        if data is None:
            return self._error(404, "EntryNotFound", f"no {path}")
        first, asked = 0, self.headers.get("Range")
        if asked and self.command == "GET":
            self.hub.ranges.append(f"{path} {asked}")
            first = int(asked.removeprefix("bytes=").split("-")[0])
        self.send_response(206 if first else 200)
        self.send_header("X-Repo-Commit", commit)
        self.send_header("ETag", f'"{hashlib.sha256(data).hexdigest()}"')
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("Content-Length", str(len(data) - first))
        if first:
            self.send_header("Content-Range", f"bytes {first}-{len(data) - 1}/{len(data)}")
        self.end_headers()
        if self.command == "GET":
            end = first + self.hub.cut.pop(path, len(data))
            self.wfile.write(data[first:end])
            if end < len(data):
                self.close_connection = True

    def _json(self, content: Any) -> None:
        data = json.dumps(content).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def _error(self, status: int, code: str | None, text: str) -> None:
        self.send_response(status)
        if code:
            self.send_header("X-Error-Code", code)
        self.send_header("X-Error-Message", text)
        self.send_header("Content-Length", "0")
        self.end_headers()


def _entry(name: str, data: bytes) -> dict[str, Any]:
    digest = hashlib.sha256(data).hexdigest()
    lfs = {"oid": digest, "size": len(data), "pointerSize": 130} if name.endswith(".safetensors") else None
    entry = {"type": "file", "path": name, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
    return entry | ({"lfs": lfs} if lfs else {})
