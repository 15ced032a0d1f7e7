"""The feature browser with a box for texts of your own: the language model runs behind it.

    python -m data_visualization.serve RUN_FOLDER
    python -m data_visualization.serve RUN_FOLDER --name l1_x04_l0-30_s0 --port 8000

On this machine alone (127.0.0.1), until Ctrl-C. Builds the site first if it is not there. Without
a server, and without texts of your own: python -m data_visualization.dashboard RUN_FOLDER
"""

import argparse
import json
import subprocess
import sys
import threading
from collections.abc import Callable
from functools import partial
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from data_visualization.dashboard import build, sources
from data_visualization.files import refuse

HOST = "127.0.0.1"
MAX_BODY = 100_000  # bytes
TYPES = {".html": "text/html", ".js": "text/javascript", ".css": "text/css"}

Encode = Callable[[str], dict[str, Any]]


class Handler(BaseHTTPRequestHandler):
    """Files of one folder, and POST encode."""

    server_version, sys_version = "dashboard", ""
    timeout = 60  # seconds: a request that never ends does not hold its thread for ever

    def __init__(self, *arguments: Any, folder: Path, encode: Encode, lock: threading.Lock):
        self.folder, self.encode, self.lock = folder.resolve(), encode, lock
        super().__init__(*arguments)

    def do_GET(self) -> None:
        """A file of the site by its name; nothing outside the folder, no links out of it."""
        if not self._is_asked_here():
            return
        name = unquote(urlsplit(self.path).path).lstrip("/") or "index.html"
        try:
            path = (self.folder / name).resolve()
            is_inside = path.is_relative_to(self.folder) and path.is_file()
        except (OSError, ValueError):  # names that no file can have
            is_inside = False
        if not is_inside or path.suffix not in TYPES:
            self._answer(HTTPStatus.NOT_FOUND, b"not found", "text/plain")
            return
        self._answer(HTTPStatus.OK, path.read_bytes(), TYPES[path.suffix])

    def do_POST(self) -> None:
        """{"text": ...} to {"tokens", "features"}, or {"error": one line}."""
        if not self._is_asked_here():
            return
        length = self.headers.get("Content-Length", "")
        if urlsplit(self.path).path != "/encode":
            self._say(HTTPStatus.NOT_FOUND, "there is nothing but /encode")
        elif self.headers.get_content_type() != "application/json":
            # A page of another site may not send this type without being allowed to.
            self._say(HTTPStatus.UNSUPPORTED_MEDIA_TYPE, "send application/json")
        elif not length.isdecimal() or int(length) > MAX_BODY:
            self._say(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, f"send at most {MAX_BODY:,} bytes")
        else:
            self._encoded(self.rfile.read(int(length)))

    def _encoded(self, body: bytes) -> None:
        try:
            content = json.loads(body)
            text = content.get("text") if isinstance(content, dict) else None
            if not isinstance(text, str):
                raise ValueError('send {"text": "..."}')
            with self.lock:  # one model, one text at a time
                found = self.encode(text)
        except (ValueError, RecursionError) as error:
            self._say(HTTPStatus.BAD_REQUEST, str(error).splitlines()[0])
            return
        self._answer(HTTPStatus.OK, json.dumps(found).encode(), "application/json")

    def _is_asked_here(self) -> bool:
        """Whether the browser asks for this machine: a foreign name may be made to lead here."""
        port = self.server.server_address[1]
        here = {f"{name}:{port}" for name in (HOST, "localhost")}
        origin = self.headers.get("Origin")
        if self.headers.get("Host") in here and origin in {None, *(f"http://{h}" for h in here)}:
            return True
        self._say(HTTPStatus.FORBIDDEN, f"ask http://{HOST}:{port}")
        return False

    def _say(self, status: HTTPStatus, error: str) -> None:
        self._answer(status, json.dumps({"error": error}).encode(), "application/json")

    def _answer(self, status: HTTPStatus, body: bytes, kind: str) -> None:
        self.send_response(status)
        self.send_header("Content-Type", f"{kind}; charset=utf-8")
        self.send_header("Content-Length", str(len(body)))
        self.send_header("X-Content-Type-Options", "nosniff")
        self.send_header("Cache-Control", "no-store")
        self.send_header(
            "Content-Security-Policy",
            "default-src 'none'; script-src 'self'; style-src 'self'; img-src data:; "
            "connect-src 'self'; frame-ancestors 'none'",
        )
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *arguments: Any) -> None:
        """Texts of a reader are nobody's business."""


class Reader:
    """The language model in a process of its own, asked line by line; nothing here knows torch."""

    def __init__(self, run_folder: Path, name: str, device: str) -> None:
        command = [sys.executable, "-m", "analysis.live_features", str(run_folder), name]
        self.process = subprocess.Popen(
            [*command, "--device", device],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        if not self.process.stdout.readline():  # it says that it is ready, or ends with its error
            sys.exit(self.process.wait())

    def encode(self, text: str) -> dict[str, Any]:
        """`ValueError` with the reader's one line if it cannot read this text."""
        try:
            self.process.stdin.write(json.dumps({"text": text}) + "\n")
            self.process.stdin.flush()
            found = json.loads(self.process.stdout.readline())
        except (OSError, ValueError):
            raise ValueError("the language model has stopped; start the server again") from None
        if "error" in found:
            raise ValueError(found["error"])
        return found


def make_server(folder: Path, encode: Encode, port: int = 0) -> ThreadingHTTPServer:
    """A server of one site; port 0 is any that is free."""
    handler = partial(Handler, folder=folder, encode=encode, lock=threading.Lock())
    return ThreadingHTTPServer((HOST, port), handler)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m data_visualization.serve")
    parser.description = __doc__.splitlines()[0]
    parser.add_argument("run_folder", type=Path, help="a run's folder, or outputs")
    parser.add_argument("--name", help="which dictionary; default: the first that was collected")
    parser.add_argument("--port", type=int, default=8000, help="0: any that is free")
    parser.add_argument("--device", default="auto", help="where the language model runs")
    arguments = parser.parse_args()
    try:
        source = sources(arguments.run_folder, arguments.name)[0]
        site = arguments.run_folder / "dashboard" / source.name
        if not (site / "index.html").is_file():
            build(source, site)
        reader = Reader(arguments.run_folder, source.name, arguments.device)
        server = make_server(site, reader.encode, arguments.port)
    except (ValueError, OSError, OverflowError) as error:
        refuse(error)
    print(f"http://{HOST}:{server.server_address[1]} shows {source.name}; Ctrl-C ends it")
    try:
        server.serve_forever()
    except KeyboardInterrupt:
        print()


if __name__ == "__main__":
    main()
