"""A server of files on this machine that can misbehave, and a stub of the hub's routes on it.

The fixtures are for a test module that takes them over by name: `site = file_server.site`.
"""

import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

import pytest

from pretrained import download
from sparse_coding.errors import UserError

CONTENT = bytes(i * i % 251 for i in range(100_003))  # no two places look alike
PATH = "/weights.bin"
TOKEN = "hf_not-a-real-token"


@dataclass
class Site:
    """Files by path, how they are served, and which requests came."""

    files: dict[str, bytes] = field(default_factory=dict)
    repos: dict[str, dict[str, bytes]] = field(default_factory=dict)
    """Hugging Face repositories: owner/name to files; every file is kept as LFS but .json."""
    cut: dict[str, list[int]] = field(default_factory=dict)
    """By path: after how many bytes of the body the next answers break off."""
    status: dict[str, list[int]] = field(default_factory=dict)
    """By path: the status of the next answers instead of the file."""
    knows_head: bool = False
    knows_ranges: bool = True
    has_etag: bool = True
    minds_if_range: bool = True
    requests: list[tuple[str, str, dict[str, str]]] = field(default_factory=list)
    """Method, path and headers (lower case) in the order they came."""
    port: int = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def asked(self, path: str) -> list[dict[str, str]]:
        """Headers of the GETs of a path."""
        return [headers for method, there, headers in self.requests
                if method == "GET" and there == path]  # fmt: skip

    def content(self, path: str) -> bytes | None:
        """A plain file, or a repository's below /cdn/owner/name/."""
        match = re.fullmatch(r"/cdn/([\w-]+/[\w.-]+)/(.*)", path)
        return self.repos[match[1]].get(match[2]) if match else self.files.get(path)

    def json_answer(self, path: str, form: dict[str, list[str]]) -> object | None:
        """What the hub's routes answer, or None for a path that is none of them."""
        match = re.fullmatch(r"/api/models/([\w-]+/[\w.-]+)(/.*)?", path)
        if not match or match[1] not in self.repos:
            return None
        files, route = self.repos[match[1]], match[2] or ""
        if not route:
            return {"id": match[1], "modelId": match[1], "sha": COMMIT}
        if route.startswith("/paths-info/"):
            wanted = form["paths"]
            folders = [p for p in wanted if any(f.startswith(p + "/") for f in files)]
            found = [entry(name, files[name]) for name in wanted if name in files]
            return found + [{"type": "directory", "path": p, "oid": "0" * 40} for p in folders]
        below = route.removeprefix(f"/tree/{COMMIT}").strip("/")
        return [entry(n, b) for n, b in files.items() if not below or n.startswith(below + "/")]


COMMIT = "c0ffee" + "0" * 34


def entry(path: str, content: bytes) -> dict[str, object]:
    """A file as the hub's tree lists it."""
    if path.endswith(".json"):
        oid = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
        return {"type": "file", "path": path, "size": len(content), "oid": oid}
    lfs = {"oid": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 130}
    return {"type": "file", "path": path, "size": len(content), "oid": "1" * 40, "lfs": lfs}


class Handler(BaseHTTPRequestHandler):
    site: Site

    def log_message(self, *_: object) -> None:
        pass

    def do_POST(self) -> None:  # noqa: N802
        body = self.rfile.read(int(self.headers.get("content-length", 0))).decode()
        self._answer("POST", parse_qs(body))

    def do_HEAD(self) -> None:  # noqa: N802
        if self.site.knows_head:
            self._answer("HEAD", {})
        else:
            self.send_error(501)

    def do_GET(self) -> None:  # noqa: N802
        self._answer("GET", {})

    def _answer(self, method: str, form: dict[str, list[str]]) -> None:
        path, site = unquote(urlsplit(self.path).path), self.site
        headers = {key.lower(): value for key, value in self.headers.items()}
        site.requests.append((method, path, headers))
        if site.status.get(path):
            self._send(site.status[path].pop(0), b"")
        elif (content := site.json_answer(path, form)) is not None:
            self._send(200, json.dumps(content).encode())
        elif path.startswith("/api/models/"):
            self._send(404, b"", **{"X-Error-Code": "RepoNotFound"})
        elif resolved := re.fullmatch(rf"/([\w-]+/[\w.-]+)/resolve/{COMMIT}/(.*)", path):
            # As the real hub: the bytes are on another host, which must not see the login.
            cdn = f"http://localhost:{site.port}/cdn/{resolved[1]}/{resolved[2]}"
            self._send(302, b"", Location=cdn)
        else:
            self._send_file(path, headers)

    def _send_file(self, path: str, headers: dict[str, str]) -> None:
        site = self.site
        content = site.content(path)
        if content is None:
            self._send(404, b"")
            return
        etag = f'"{hashlib.md5(content).hexdigest()}"'
        extra = {"ETag": etag} if site.has_etag else {}
        begin = re.fullmatch(r"bytes=(\d+)-", headers.get("range", ""))
        same = headers.get("if-range", etag) == etag or not site.minds_if_range
        if begin and site.knows_ranges and same:
            first = int(begin[1])
            if first >= len(content):
                self._send(416, b"", **extra, **{"Content-Range": f"bytes */{len(content)}"})
                return
            extra["Content-Range"] = f"bytes {first}-{len(content) - 1}/{len(content)}"
            self._send(206, content[first:], path, **extra)
        else:
            self._send(200, content, path, **extra)

    def _send(self, status: int, body: bytes, path: str = "", **headers: str) -> None:
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        cuts = self.site.cut.get(path, [])
        if self.command != "HEAD":
            self.wfile.write(body[: cuts.pop(0)] if cuts else body)


@contextmanager
def serving(site: Site) -> Iterator[Site]:
    """The site on a free port of this machine, until the block ends."""
    handler = type("Handler", (Handler,), {"site": site})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    site.port = server.server_port
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield site
    finally:
        server.shutdown()
        server.server_close()


@pytest.fixture
def quiet(monkeypatch):
    """Online for this machine only, no pause between attempts, a login that must not leak."""
    import huggingface_hub
    from huggingface_hub import constants

    monkeypatch.setenv("NO_PROXY", "*")
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(download, "PAUSE_SECONDS", 0.0)
    huggingface_hub.close_session()


@pytest.fixture
def offline(quiet, monkeypatch):
    """As with HF_HUB_OFFLINE=1."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)


@pytest.fixture
def site(quiet):
    """A server with one file."""
    with serving(Site(files={PATH: CONTENT})) as site:
        yield site


@pytest.fixture
def hub(site, monkeypatch):
    """The site as the hub of this process."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", site.url)
    template = site.url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    return site


def error_of(call, *arguments) -> str:
    """The one line of a `UserError`; the login is not in it."""
    with pytest.raises(UserError) as error:
        call(*arguments)
    assert "\n" not in str(error.value)
    assert TOKEN not in str(error.value)
    return str(error.value)
