"""The part of Google Cloud Storage's JSON interface that reading needs, on loopback: objects, listings, media."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import struct
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

import numpy as np

from vcelltools.kernels.crc32c import TABLES, crc32c


class Bucket:
    """Objects of a bucket, from a folder.

    Attributes
    ----------
    pays
        Whether the reader pays: requests without a user project are refused.
    queries
        The query of every request, with its path.
    faults
        End of an object's name -> faults of the next media requests: ``503``, ``replace``.
    md5
        Whether objects have an MD5; composed objects have none.
    """

    def __init__(self, name: str, root: Path, *, pays: bool = False, md5: bool = True) -> None:
        self.name, self.pays, self.md5 = name, pays, md5
        self.objects = {str(p.relative_to(root)): p.read_bytes() for p in sorted(root.rglob("*")) if p.is_file()}
        self.generation = dict.fromkeys(self.objects, 1000)
        self.queries: list[tuple[str, dict[str, list[str]], dict[str, str]]] = []
        self.faults: dict[str, list[str]] = {}

    def describe(self, key: str) -> dict:
        body = self.objects[key]
        crc = int(crc32c(np.frombuffer(body, np.uint8), np.uint32(0), TABLES))
        out = {"kind": "storage#object", "name": key, "bucket": self.name, "size": str(len(body)),
               "generation": str(self.generation[key]), "etag": f"e{self.generation[key]}",
               "crc32c": base64.b64encode(struct.pack(">I", crc)).decode()}  # fmt: skip
        if self.md5:
            out["md5Hash"] = base64.b64encode(hashlib.md5(body).digest()).decode()
        return out


def make_handler(bucket: Bucket):
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *args):
            pass

        def _send(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
            self.send_response(status)
            for k, v in {
                "Content-Length": str(len(body)),
                "Content-Type": "application/json",
                **(headers or {}),
            }.items():
                self.send_header(k, v)
            self.end_headers()
            self.wfile.write(body)

        def _refuse(self, status: int, message: str) -> None:
            self._send(status, json.dumps({"error": {"code": status, "message": message}}).encode())

        def do_GET(self):
            parts = urlsplit(self.path)
            query = parse_qs(parts.query)
            bucket.queries.append((parts.path, query, dict(self.headers)))
            if bucket.pays and "userProject" not in query:
                return self._refuse(400, "Bucket is a requester pays bucket but no user project provided.")
            m = re.fullmatch(r"(/download)?/storage/v1/b/([^/]+)/o(?:/(.+))?", parts.path)
            if not m or unquote(m.group(2)) != bucket.name:
                return self._refuse(404, "Not Found")
            media, key = m.group(1) is not None, unquote(m.group(3) or "")
            if not key:
                return self._list(query)
            if key not in bucket.objects:
                return self._refuse(404, f"No such object: {bucket.name}/{key}")
            if not media:
                return self._send(200, json.dumps(bucket.describe(key)).encode())
            return self._media(key)

        def _media(self, key: str) -> None:
            todo = next((t for end, t in bucket.faults.items() if key.endswith(end) and t), [])
            fault = todo.pop(0) if todo else ""
            if fault == "503":
                return self._refuse(503, "Backend Error")
            if fault == "replace":
                bucket.generation[key] += 1
            body = bucket.objects[key]
            headers = {"x-goog-generation": str(bucket.generation[key])}
            r = re.match(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
            if not r:
                return self._send(200, body, headers)
            a, b = int(r.group(1)), int(r.group(2) or len(body) - 1)
            part = body[a : b + 1]
            headers["Content-Range"] = f"bytes {a}-{a + len(part) - 1}/{len(body)}"
            return self._send(206, part, headers)

        def _list(self, query: dict) -> None:
            prefix, delimiter = query.get("prefix", [""])[0], query.get("delimiter", [""])[0]
            items, prefixes = [], set()
            for key in bucket.objects:
                if not key.startswith(prefix):
                    continue
                rest = key[len(prefix) :]
                if delimiter and delimiter in rest:
                    prefixes.add(prefix + rest.split(delimiter)[0] + delimiter)
                else:
                    items.append(bucket.describe(key))
            self._send(200, json.dumps({"items": items, "prefixes": sorted(prefixes)}).encode())

    return Handler


@contextmanager
def serve_bucket(bucket: Bucket):
    """Serve a bucket; yield the address of the interface."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), make_handler(bucket))
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
