"""A real HTTP server on loopback that serves a folder, with ranges, and misbehaves by plan."""

from __future__ import annotations

import base64
import hashlib
import re
import socket
import struct
import threading
import time
from collections import defaultdict
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path


@dataclass
class Plan:
    """What goes wrong, by the end of a path: each GET with a range takes the next fault of its list.

    Faults: ``503`` (any status), ``503:2`` (with Retry-After), ``short:N`` (N bytes, then the connection closes),
    ``honest:N`` (N bytes, as announced), ``reset:N`` (N bytes, then a reset), ``flip`` (one bit, under the right hash),
    ``stall`` (no byte until the client gives up), ``slow`` (in small pieces), ``replace`` (another file from now on),
    ``ok``.
    """

    faults: dict[str, list[str]] = field(default_factory=dict)
    no_ranges: bool = False
    hashes: bool = True
    forbidden: tuple[str, ...] = ()
    delay: float = 0.0
    closed: bool = False
    log: list[dict] = field(default_factory=list)
    replaced: dict[str, bytes] = field(default_factory=dict)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def next_fault(self, path: str) -> str:
        with self.lock:
            for end, todo in self.faults.items():
                if path.endswith(end) and todo:
                    return todo.pop(0)
        return "ok"

    def sent(self, end: str) -> int:
        """Bytes that were sent of the files whose path ends so."""
        return sum(e["sent"] for e in self.log if e["path"].endswith(end))

    def starts(self, end: str) -> list[int]:
        """First bytes of the ranges that were asked for, in order."""
        return [e["start"] for e in self.log if e["path"].endswith(end) and e["method"] == "GET"]


def make_handler(root: Path, plan: Plan):
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *args):
            pass

        def _load(self) -> tuple[str, bytes | None]:
            path = self.path.split("?")[0]
            if path in plan.replaced:
                return path, plan.replaced[path]
            file = root / path.lstrip("/")
            return path, file.read_bytes() if file.is_file() else None

        def _headers(self, body: bytes) -> dict[str, str]:
            md5 = hashlib.md5(body).digest()
            out = {"ETag": f'"v-{md5.hex()[:12]}"', "Accept-Ranges": "bytes"}
            if plan.hashes:
                out["x-goog-hash"] = f"md5={base64.b64encode(md5).decode()}"
            return out

        def _answer(self, status: int, headers: dict[str, str], body: bytes, *, path: str, start: int, head=False):
            entry = {"method": self.command, "path": path, "status": status, "start": start, "sent": 0,
                     "headers": dict(self.headers), "query": self.path.partition("?")[2]}  # fmt: skip
            with plan.lock:
                plan.log.append(entry)
            self.send_response(status)
            for k, v in headers.items():
                self.send_header(k, v)
            self.end_headers()
            if not head:
                try:
                    self.wfile.write(body)
                    entry["sent"] = len(body)
                except OSError:
                    self.close_connection = True
            return entry

        def parse_request(self):
            if plan.closed:  # a connection that was kept alive past the server's end
                self.close_connection = True
                return False
            return super().parse_request()

        def do_HEAD(self):
            path, body = self._load()
            if any(path.endswith(x) for x in plan.forbidden):
                return self._answer(403, {"Content-Length": "0"}, b"", path=path, start=0, head=True)
            if body is None:
                return self._answer(404, {"Content-Length": "0"}, b"", path=path, start=0, head=True)
            headers = {**self._headers(body), "Content-Length": str(len(body))}
            return self._answer(200, headers, b"", path=path, start=0, head=True)

        def do_GET(self):
            path, body = self._load()
            if any(path.endswith(x) for x in plan.forbidden):
                return self._answer(403, {"Content-Length": "6"}, b"denied", path=path, start=0)
            if body is None:
                return self._answer(404, {"Content-Length": "0"}, b"", path=path, start=0)
            fault = plan.next_fault(path)
            kind, _, number = fault.partition(":")
            if plan.delay:
                time.sleep(plan.delay)
            if kind == "replace":
                with plan.lock:
                    plan.replaced[path] = bytes(reversed(body)) if number != "same" else body + b""
                    other = root / number if number and number != "same" else None
                    if other is not None:
                        plan.replaced[path] = other.read_bytes()
                body = plan.replaced[path]
            if kind.isdigit():
                wait = {"Retry-After": number} if number else {}
                return self._answer(int(kind), {"Content-Length": "0", **wait}, b"", path=path, start=-1)
            m = re.match(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
            headers = self._headers(body)
            start, stop, status = 0, len(body), 200
            if m and not plan.no_ranges:
                start = int(m.group(1))
                stop = min(int(m.group(2)) + 1, len(body)) if m.group(2) else len(body)
                status = 206
                headers["Content-Range"] = f"bytes {start}-{stop - 1}/{len(body)}"
            part = body[start:stop]
            if kind == "flip":
                part = bytes([part[0] ^ 4]) + part[1:]
            if kind == "honest":
                part = part[: int(number)]
                headers["Content-Range"] = f"bytes {start}-{start + len(part) - 1}/{len(body)}"
            headers["Content-Length"] = str(len(part))
            if kind in ("short", "reset"):
                entry = self._answer(status, headers, part[: int(number)], path=path, start=start)
                entry["fault"] = kind
                self.wfile.flush()
                self.close_connection = True
                if kind == "reset":
                    time.sleep(0.05)  # let the client read what came before
                    self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                    self.connection.close()
                return None
            if kind == "stall":
                with plan.lock:
                    plan.log.append({"method": "GET", "path": path, "status": 0, "start": start, "sent": 0})
                time.sleep(1.5)
                self.close_connection = True
                return None
            if kind == "slow":
                self.send_response(status)
                for k, v in headers.items():
                    self.send_header(k, v)
                self.end_headers()
                for i in range(0, len(part), 4096):
                    self.wfile.write(part[i : i + 4096])
                    time.sleep(0.002)
                with plan.lock:
                    plan.log.append(
                        {"method": "GET", "path": path, "status": status, "start": start, "sent": len(part)}
                    )
                return None
            return self._answer(status, headers, part, path=path, start=start)

    return Handler


@contextmanager
def serve(root: Path, plan: Plan | None = None, *, port: int = 0):
    """Serve a folder; yield (address, plan). A ``port`` of before gives the same address again."""
    plan = plan or Plan()
    server = ThreadingHTTPServer(("127.0.0.1", port), make_handler(root, plan))
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}", plan
    finally:
        plan.closed = True
        server.shutdown()
        server.server_close()
        thread.join()


def count_by_file(plan: Plan) -> dict[str, int]:
    """Bytes sent of each file."""
    out: dict[str, int] = defaultdict(int)
    for e in plan.log:
        out[e["path"].rpartition("/")[2]] += e["sent"]
    return dict(out)
