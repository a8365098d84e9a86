"""A Hugging Face hub with one dataset, on the loopback address, which serves the requests of `datasets`."""

from __future__ import annotations

import hashlib
import http.server
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

REPOSITORY, COMMIT = "someone/stories", "a" * 40
FILES = {
    "README.md": b"---\nlicense: mit\n---\n",
    "data/train.jsonl": b'{"text": "once upon a time"}\n{"text": "the end"}\n',
    "data/validation.jsonl": b'{"text": "held out"}\n',
}


class _Hub(http.server.BaseHTTPRequestHandler):
    def log_message(self, *_: Any) -> None:
        return None

    def _send(self, body: bytes, **headers: str) -> None:
        wanted = self.headers.get("Range")
        part = body
        if wanted:
            first, last = wanted.removeprefix("bytes=").split("-")
            part = body[int(first) : int(last or len(body)) + 1]
            headers["Content-Range"] = f"bytes {first}-{int(first) + len(part) - 1}/{len(body)}"
        self.send_response(206 if wanted else 200)
        for name, value in {"Content-Length": str(len(part)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(part)

    def _entries(self, folder: str) -> list[dict[str, Any]]:
        depth = folder.count("/") + 1 if folder else 0
        found = {}
        for name, body in FILES.items():
            if name.startswith(folder):
                parts = name.split("/")
                path = "/".join(parts[: depth + 1])
                kind = "file" if path == name else "directory"
                found[path] = {"type": kind, "path": path, "size": len(body), "oid": hashlib.sha1(body).hexdigest()}
        return list(found.values())

    def do_GET(self) -> None:
        path = self.path.split("?")[0]
        api = f"/api/datasets/{REPOSITORY}"
        name = path.split("/resolve/")[-1].partition("/")[2]
        if path.startswith(f"{api}/tree/{COMMIT}"):
            self._send(json.dumps(self._entries(path.removeprefix(f"{api}/tree/{COMMIT}").strip("/"))).encode())
        elif path.startswith(api):
            siblings = [{"rfilename": name} for name in FILES]
            self._send(json.dumps({"_id": "1", "id": REPOSITORY, "sha": COMMIT, "siblings": siblings}).encode())
        elif "/resolve/" in path and name in FILES:
            tag = hashlib.sha1(FILES[name]).hexdigest()
            self._send(FILES[name], ETag=f'"{tag}"', X_Repo_Commit=COMMIT, Accept_Ranges="bytes")
        else:
            self.send_response(404)
            self.send_header("X-Error-Code", "EntryNotFound")
            self.send_header("Content-Length", "0")
            self.end_headers()

    do_HEAD = do_GET


@contextmanager
def hub() -> Iterator[str]:
    """Address of the hub, for HF_ENDPOINT."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
