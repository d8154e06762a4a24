"""A Hugging Face Hub on this machine: the calls that loading a model or a data set makes, over a folder.

with serving(folder) as url: ...     # folder/models/OWNER/NAME/*, folder/datasets/OWNER/NAME/*; HF_ENDPOINT=url
"""

import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

COMMIT = "c0ffee" + "0" * 34
API = re.compile(r"/api/(?P<kind>models|datasets)/(?P<repo>[\w.-]+/[\w.-]+)(?P<rest>/.*)?")
FILE = re.compile(r"/(?P<kind>datasets/)?(?P<repo>[\w.-]+/[\w.-]+)/resolve/[^/]+/(?P<path>.+)")


@contextmanager
def serving(folder: Path) -> Iterator[str]:
    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *_):
            pass

        def do_HEAD(self):
            self.do_GET()

        def do_GET(self):
            path = unquote(urlsplit(self.path).path)
            if found := FILE.fullmatch(path):
                self._file(folder / (found["kind"] or "models") / found["repo"] / found["path"])
            elif found := API.fullmatch(path):
                self._about(folder / found["kind"] / found["repo"], found["repo"], found["rest"] or "")
            else:
                self._send(404, b"{}")

        def do_POST(self):
            body = self.rfile.read(int(self.headers["Content-Length"])).decode()
            found = API.fullmatch(unquote(urlsplit(self.path).path))
            paths = json.loads(body)["paths"] if body.startswith("{") else parse_qs(body).get("paths", [])
            root = folder / found["kind"] / found["repo"]
            self._json([_entry(root, root / path) for path in paths if (root / path).exists()])

        def _file(self, path: Path) -> None:
            if not path.is_file():
                return self._send(404, b"", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": COMMIT})
            content = path.read_bytes()
            size = len(content)
            if asked := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
                first, last = int(asked[1]), min(int(asked[2] or size - 1), size - 1)
                ranged = {"Content-Range": f"bytes {first}-{last}/{size}"}
                return self._send(206, content[first : last + 1], _headers(content) | ranged)
            return self._send(200, content, _headers(content))

        def _about(self, root: Path, repo: str, rest: str) -> None:
            if not root.is_dir():
                return self._send(404, b"{}", {"X-Error-Code": "RepoNotFound"})
            below = root / re.sub(r"^/tree/[^/]+/?", "", rest) if rest.startswith("/tree/") else None
            if below is None:
                files = [{"rfilename": str(p.relative_to(root))} for p in sorted(root.rglob("*")) if p.is_file()]
                return self._json({"id": repo, "sha": COMMIT, "private": False, "tags": [], "siblings": files})
            if not below.is_dir():
                return self._send(404, b"{}", {"X-Error-Code": "EntryNotFound"})
            deep = "recursive=true" in self.path.lower()
            return self._json([_entry(root, path) for path in sorted(below.rglob("*") if deep else below.iterdir())])

        def _json(self, value: object) -> None:
            self._send(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

        def _send(self, code: int, content: bytes, headers: dict[str, str] | None = None) -> None:
            self.send_response(code)
            for name, value in ({"Content-Length": str(len(content))} | (headers or {})).items():
                self.send_header(name, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(content)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


def _headers(content: bytes) -> dict[str, str]:
    etag = hashlib.sha1(content).hexdigest()
    return {"ETag": f'"{etag}"', "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}


def _entry(root: Path, path: Path) -> dict[str, object]:
    entry = {"path": str(path.relative_to(root)), "oid": COMMIT, "type": "directory" if path.is_dir() else "file"}
    return entry if path.is_dir() else entry | {"size": path.stat().st_size}
