"""A server on this machine that answers huggingface_hub as the Hugging Face hub does, and keeps a log of requests."""

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

Files = dict[str, bytes]


@dataclass
class Hub:
    """What is on the hub, and how it behaves.

    Attributes:
        endpoint: for HF_ENDPOINT.
        models: name -> commit -> the files.
        revisions: (name, branch or tag) -> commit.
        datasets, gated: names.
        failing: files whose content is answered with an error.
        cut: file -> bytes after which the connection ends, once.
        log: (method, path, Range header) of each request.
    """

    endpoint: str = ""
    models: dict[str, dict[str, Files]] = field(default_factory=dict)
    revisions: dict[tuple[str, str], str] = field(default_factory=dict)
    datasets: set[str] = field(default_factory=set)
    gated: set[str] = field(default_factory=set)
    failing: set[str] = field(default_factory=set)
    cut: dict[str, int] = field(default_factory=dict)
    log: list[tuple[str, str, str | None]] = field(default_factory=list)

    def add(self, name: str, files: Files) -> str:
        """Commits the files of a model to its branch main. Returns the commit."""
        commit = hashlib.sha1(repr((name, sorted(files.items()))).encode()).hexdigest()
        self.models.setdefault(name, {})[commit] = files
        self.revisions[name, "main"] = commit
        return commit

    def asked(self, part: str) -> list[str]:
        """The paths of requests that hold this text."""
        return [path for _, path, _ in self.log if part in path]

    def downloaded(self) -> list[str]:
        """The names of the files whose content was asked for, in any order."""
        return sorted(path.split("/", 5)[5] for method, path, _ in self.log if method == "GET" and "/resolve/" in path)


@contextmanager
def serving() -> Iterator[Hub]:
    """Serves an empty hub, to be filled, until the block ends."""
    hub = Hub()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, format: str, *args: Any) -> None:
            pass

        def do_HEAD(self) -> None:
            self._answer()

        def do_GET(self) -> None:
            self._answer()

        def _answer(self) -> None:
            path = unquote(urlsplit(self.path).path)
            hub.log.append((self.command, path, self.headers.get("Range")))
            kind, *rest = path.strip("/").split("/")[1:] if path.startswith("/api/") else ["", *path[1:].split("/")]
            name = "/".join(rest[:2])
            if kind == "datasets" and name in hub.datasets:
                return self._json({"id": name, "sha": "0" * 40})
            if kind not in ("", "models") or name not in hub.models:
                return self._error(401, "RepoNotFound")
            revision = rest[3] if len(rest) > 3 else "main"
            commit = hub.revisions.get((name, revision), revision)
            if commit not in hub.models[name]:
                return self._error(404, "RevisionNotFound")
            files = hub.models[name][commit]
            if kind and rest[2:3] == ["tree"]:
                listing = [
                    {"type": "file", "path": file, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
                    for file, content in files.items()
                ]
                return self._json(listing)
            if kind:
                siblings = [{"rfilename": file} for file in files]
                return self._json({"id": name, "sha": commit, "siblings": siblings})
            if name in hub.gated:
                return self._error(403, "GatedRepo")
            self._file("/".join(rest[4:]), files, commit)

        def _file(self, file: str, files: Files, commit: str) -> None:
            if file not in files:
                return self._error(404, "EntryNotFound")
            if file in hub.failing and self.command == "GET":
                return self._error(503, "")
            content = files[file]
            etag = hashlib.sha1(content).hexdigest()
            start = int((self.headers.get("Range") or "bytes=0-").removeprefix("bytes=").split("-")[0])
            self.send_response(206 if self.headers.get("Range") else 200)
            if self.headers.get("Range"):
                self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
            self._end({"ETag": f'"{etag}"', "X-Repo-Commit": commit}, len(content) - start)
            if self.command == "GET":
                stop = hub.cut.pop(file, None)
                self.wfile.write(content[start:stop])
                self.close_connection = stop is not None

        def _json(self, content: Any) -> None:
            body = json.dumps(content).encode()
            self.send_response(200)
            self._end({"Content-Type": "application/json"}, len(body))
            if self.command == "GET":
                self.wfile.write(body)

        def _error(self, status: int, code: str) -> None:
            self.send_response(status)
            self._end({"X-Error-Code": code} if code else {}, 0)

        def _end(self, headers: dict[str, str], length: int) -> None:
            for name, value in {**headers, "Content-Length": str(length)}.items():
                self.send_header(name, value)
            self.end_headers()

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    hub.endpoint = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
