"""Read ranges of remote files, through a small interface over the file systems of fsspec.

Every response identifies the version of its file (by an etag or a generation), so that ranges of two versions are never
joined. Messages show a URL without user information and query and never quote the error of a library, because both may
contain a token.
"""

from __future__ import annotations

import base64
import importlib
import posixpath
import random
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar
from urllib.parse import unquote, urlsplit, urlunsplit

from vcelltools.errors import DataError, EnvironmentFault, UsageError, spell

T = TypeVar("T")
SCHEMES = ("file", "memory", "http", "https", "gs", "s3")
TIMEOUT_SECONDS = 60.0
RETRIES = 6
_LONGEST_WAIT = 60.0
_EXTRAS = {"http": ("aiohttp", "http"), "https": ("aiohttp", "http"), "gs": ("gcsfs", "gcs"), "s3": ("s3fs", "s3")}
_BUSY = (408, 425, 429)
_PIECE = 1 << 20
_REFUSED_HINT = "log in with the tool of the cloud provider, or ask the owner for access"


class Changed(Exception):
    """The file has changed since the download began."""


class NoRanges(Exception):
    """The server sends the whole file although a part was requested."""


class GivenUp(EnvironmentFault):
    """A server failed as often as was allowed; its other files may still be available."""


class Busy(Exception):
    """A transient failure to retry: an overloaded server, a lost connection, or a timeout.

    Parameters
    ----------
    seconds
        The wait that the server requests, or None.
    """

    def __init__(self, what: str, seconds: float | None = None) -> None:
        super().__init__(what)
        self.seconds = seconds


@dataclass(frozen=True, kw_only=True)
class Facts:
    """Facts about a remote file before it is read.

    Attributes
    ----------
    size
        Size in bytes.
    validator
        Etag, generation or modification time, which identifies the version. None if the source has none.
    md5, crc32c
        Hexadecimal digests that the source publishes, or None.
    """

    size: int
    validator: str | None
    md5: str | None = None
    crc32c: str | None = None


@dataclass(frozen=True, kw_only=True)
class Access:
    """Settings for the access to sources.

    Attributes
    ----------
    billing_project
        Google Cloud project that pays for reading a requester-pays bucket; None bills nobody.
    requester_pays
        Whether the account pays for reading a requester-pays bucket of S3.
    timeout
        Seconds without data after which a connection counts as lost.
    retries
        Number of retries after a transient failure of a request.
    first_wait
        Seconds before the first retry, which double (with jitter) before each further one.
    endpoint_url
        Another address of the cloud's interface (for a mirror or a test).
    """

    billing_project: str | None = None
    requester_pays: bool = False
    timeout: float = TIMEOUT_SECONDS
    retries: int = RETRIES
    first_wait: float = 0.5
    endpoint_url: str | None = None


def retry(do: Callable[[], T], access: Access, note: Callable[[str], None], moved: Callable[[], int]) -> T:
    """Call ``do`` until it succeeds; the count of tries restarts after a try that ``moved`` bytes.

    Raises
    ------
    GivenUp
        After the last try.
    """
    tries, at = 0, moved()
    while True:
        try:
            return do()
        except Busy as e:
            if moved() != at:
                tries, at = 0, moved()
            if tries >= access.retries:
                raise GivenUp(
                    f"{e}: given up after {tries + 1} tries", hint="run the same command again to resume"
                ) from None
            wait = min(access.first_wait * 2**tries, _LONGEST_WAIT) * random.uniform(0.5, 1.0)
            if e.seconds is not None:
                wait = max(wait, min(e.seconds, 10 * _LONGEST_WAIT))
            tries += 1
            if wait > 5:
                note(f"{e}: try {tries + 1} in {wait:.0f} s")
            time.sleep(wait)


def get_scheme(url: str) -> str:
    """Return the scheme of a URL; a path without one is ``file``."""
    m = re.match(r"^([A-Za-z][A-Za-z0-9+.-]*)://", url)
    return m.group(1).lower() if m else "file"


def show_url(url: str) -> str:
    """Return a URL without user information, query and fragment, so that it can be shown and stored."""
    if get_scheme(url) == "file":
        return url.removeprefix("file://")
    parts = urlsplit(url)
    return urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "", ""))


def join_url(base: str, *names: str) -> str:
    """Return the URL of a file under ``base``; a query of the base stays at the end."""
    tail = "/".join(n.strip("/") for n in names)
    if get_scheme(base) in ("http", "https"):
        parts = urlsplit(base)
        return urlunsplit((parts.scheme, parts.netloc, f"{parts.path.rstrip('/')}/{tail}", parts.query, ""))
    return f"{base.rstrip('/')}/{tail}"


def get_place(url: str) -> tuple[str, str]:
    """Return the owner of a URL as (scheme, bucket or host); files have no owner."""
    scheme = get_scheme(url)
    if scheme in ("file", "memory"):
        return scheme, ""
    return ("https" if scheme == "http" else scheme), urlsplit(url).netloc.rpartition("@")[2].lower()


def check_segments(path: str, where: str) -> None:
    """Raise an error if a path leaves its folder, in any encoding, or contains control characters."""
    plain = path
    for _ in range(3):  # plain, encoded once, and encoded twice
        if any(s == ".." for s in re.split(r"[/\\]", plain)) or "\\" in plain or re.search(r"[\x00-\x1f\x7f]", plain):
            raise DataError(
                f"{where}: the path {path!r} is not allowed", hint="it leads out of the folder of the source"
            )
        plain = unquote(plain)


def open_remote(url: str, access: Access | None = None) -> Remote:
    """Return the reader for the scheme of a URL.

    Raises
    ------
    UsageError
        If the scheme is not one of ``SCHEMES``.
    EnvironmentFault
        If the library for it is not installed.
    """
    scheme, access = get_scheme(url), access or Access()
    if scheme not in SCHEMES:
        raise UsageError(f"{scheme}:// is not a supported scheme", hint=f"one of: {', '.join(SCHEMES)}")
    if scheme in _EXTRAS:
        module, extra = _EXTRAS[scheme]
        _need(module, extra, scheme)
    _need("fsspec", "atlas", scheme)
    kinds: dict[str, type[Remote]] = {"http": _Http, "https": _Http, "gs": _Gcs, "s3": _S3}
    return kinds.get(scheme, _Plain)(scheme, access)


def _need(module: str, extra: str, scheme: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as e:
        raise EnvironmentFault(
            f"reading {scheme}:// needs {module}, which is not installed", hint=f'pip install "vcelltools[{extra}]"'
        ) from e


class Remote:
    """A reader of the files of one scheme."""

    def __init__(self, scheme: str, access: Access) -> None:
        self.scheme, self.access = scheme, access

    def stat(self, url: str) -> Facts:
        """Return the facts about a file.

        Raises
        ------
        DataError
            If it does not exist.
        EnvironmentFault
            If access is denied.
        Busy
            If a retry may help.
        """
        raise NotImplementedError

    def read(self, url: str, start: int, stop: int, facts: Facts, sink: Callable[[bytes], None]) -> None:
        """Pass the bytes ``start:stop`` of a file, or fewer of them, to ``sink``, in pieces as they arrive.

        Raises
        ------
        Changed
            If the response belongs to another version than ``facts``.
        NoRanges
            If the server would send the file from its beginning.
        """
        raise NotImplementedError

    def ls(self, url: str) -> list[str]:
        """Return the sorted URLs in a folder, with a slash after folders; none if the folder does not exist."""
        raise NotImplementedError

    def _patiently(self, do: Callable[[], T]) -> T:
        return retry(do, self.access, lambda text: None, lambda: 0)

    def find(self, url: str) -> Facts:
        """Return the result of :meth:`stat`, with retries."""
        return self._patiently(lambda: self.stat(url))

    def exists(self, url: str) -> bool:
        """Return whether a file exists."""
        try:
            self.find(url)
        except DataError:
            return False
        return True

    def find_all(self, url: str) -> list[str]:
        """Return the result of :meth:`ls`, with retries."""
        return self._patiently(lambda: self.ls(url))

    def read_whole(self, url: str, limit: int) -> bytes:
        """Return the content of a file of at most ``limit`` bytes."""

        def read() -> bytes:
            facts = self.stat(url)
            if facts.size > limit:
                raise DataError(f"{show_url(url)} has {facts.size:,} bytes, but a table may have at most {limit:,}")
            out = bytearray()
            while len(out) < facts.size:
                before = len(out)
                try:
                    self.read(url, before, facts.size, facts, out.extend)
                except (Changed, NoRanges):
                    raise Busy(f"{show_url(url)} changed while it was being read") from None
                if len(out) == before:
                    raise Busy(f"{show_url(url)} ended early")
            return bytes(out[: facts.size])

        return self._patiently(read)


def _missing(url: str) -> DataError:
    return DataError(
        f"{show_url(url)} does not exist", hint="list the content of the source with vcelltools atlas list"
    )


def _refused(url: str, what: str = "") -> EnvironmentFault:
    hint = _REFUSED_HINT
    if re.search(r"requester.?pays|userproject|user project", what, re.I):
        hint = (
            f"this bucket bills the reader: pass {spell('billing_project')} with a project that pays for the transfer; "
            "a project subscribed to the free allowance of the atlas uses that first"
        )
    return EnvironmentFault(f"{show_url(url)}: access is denied", hint=hint)


class _Plain(Remote):
    """Local files, and files in memory of fsspec."""

    def __init__(self, scheme: str, access: Access) -> None:
        super().__init__(scheme, access)
        import fsspec

        self._fs = fsspec.filesystem(scheme)

    def stat(self, url: str) -> Facts:
        try:
            info = self._fs.info(url)
        except (FileNotFoundError, NotADirectoryError):
            raise _missing(url) from None
        except PermissionError:
            raise _refused(url) from None
        if info.get("type") == "directory":
            raise _missing(url)
        return Facts(size=int(info["size"]), validator=f"{info.get('mtime', info.get('created'))}-{info['size']}")

    def read(self, url: str, start: int, stop: int, facts: Facts, sink: Callable[[bytes], None]) -> None:
        if self.stat(url).validator != facts.validator:
            raise Changed
        try:
            for a in range(start, stop, 4 * _PIECE):
                sink(self._fs.cat_file(url, start=a, end=min(a + 4 * _PIECE, stop)))
        except FileNotFoundError:
            raise _missing(url) from None
        except PermissionError:
            raise _refused(url) from None

    def ls(self, url: str) -> list[str]:
        try:
            found = self._fs.ls(url, detail=True)
        except (FileNotFoundError, NotADirectoryError):
            return []
        except PermissionError:
            raise _refused(url) from None
        head = "memory:/" if self.scheme == "memory" else "file://" if url.startswith("file://") else ""
        return sorted(head + e["name"] + ("/" if e["type"] == "directory" else "") for e in found)


class _Http(Remote):
    """HTTP through the session of fsspec (aiohttp), with a check of the headers of every response."""

    def __init__(self, scheme: str, access: Access) -> None:
        super().__init__(scheme, access)
        import aiohttp
        import fsspec
        from fsspec.asyn import sync

        times = aiohttp.ClientTimeout(total=None, sock_connect=access.timeout, sock_read=access.timeout)
        self._fs = fsspec.filesystem("http", client_kwargs={"timeout": times})
        self._sync: Callable[..., Any] = lambda f, *args: sync(self._fs.loop, f, *args)
        self._session = self._sync(self._fs.set_session)

    def _ask(self, f: Callable[..., Any], url: str, *args: Any) -> Any:
        import aiohttp

        try:
            return self._sync(f, url, *args)
        except (aiohttp.ClientError, TimeoutError, ConnectionError) as e:
            raise Busy(f"{show_url(url)}: {type(e).__name__}") from None

    async def _check(self, url: str, answer: Any) -> None:
        if answer.status < 400:
            return
        if answer.status in _BUSY or answer.status >= 500:
            raise Busy(f"{show_url(url)}: status {answer.status}", _get_wait(answer.headers.get("Retry-After")))
        text = (await answer.content.read(4096)).decode("utf-8", "replace") if answer.method != "HEAD" else ""
        if answer.status in (401, 402, 403) or "UserProjectMissing" in text:
            raise _refused(url, text)
        if answer.status in (404, 410):
            raise _missing(url)
        if answer.status == 412:
            raise Changed
        raise DataError(f"{show_url(url)}: the server responded with status {answer.status}")

    def stat(self, url: str) -> Facts:
        return self._ask(self._stat, url)

    async def _stat(self, url: str) -> Facts:
        plain = {"Accept-Encoding": "identity"}
        async with self._session.head(url, headers=plain, allow_redirects=True) as answer:
            headers, status = answer.headers, answer.status
            if status not in (405, 501) and not (status < 400 and "Content-Length" not in headers):
                await self._check(url, answer)
                return _get_facts(headers, int(headers["Content-Length"]))
        async with self._session.get(url, headers={**plain, "Range": "bytes=0-0"}) as answer:
            await self._check(url, answer)
            total = re.search(r"/(\d+)$", answer.headers.get("Content-Range", ""))
            size = total.group(1) if total else answer.headers.get("Content-Length")
            if size is None:
                raise DataError(f"{show_url(url)}: the server does not report the size of the file")
            return _get_facts(answer.headers, int(size))

    def read(self, url: str, start: int, stop: int, facts: Facts, sink: Callable[[bytes], None]) -> None:
        self._ask(self._read, url, start, stop, facts, sink)

    async def _read(self, url: str, start: int, stop: int, facts: Facts, sink: Callable[[bytes], None]) -> None:
        import asyncio

        headers = {"Accept-Encoding": "identity", "Range": f"bytes={start}-{stop - 1}"}
        async with self._session.get(url, headers=headers) as answer:
            if answer.status == 416:
                raise Changed
            await self._check(url, answer)
            if _get_validator(answer.headers) != facts.validator:
                raise Changed
            if answer.status != 206:
                if start:
                    raise NoRanges
                stop = facts.size
            elif not re.match(rf"bytes {start}-", answer.headers.get("Content-Range", "")):
                raise Busy(f"{show_url(url)}: the server returned another range than the one requested")
            left = stop - start
            loop = asyncio.get_running_loop()
            while left > 0 and (piece := await answer.content.read(min(_PIECE, left))):
                await loop.run_in_executor(None, sink, piece)
                left -= len(piece)

    def ls(self, url: str) -> list[str]:
        try:
            found = self._ask(self._fs._ls, url.rstrip("/") + "/", True)
        except FileNotFoundError:
            return []
        base = show_url(url).rstrip("/") + "/"
        return sorted(e["name"] for e in found if show_url(e["name"]).startswith(base))


def _get_wait(text: str | None) -> float | None:
    """Return the seconds of a Retry-After header, which contains seconds or a date."""
    if not text:
        return None
    if text.strip().isdigit():
        return float(text)
    from datetime import UTC, datetime
    from email.utils import parsedate_to_datetime

    try:
        return max(0.0, (parsedate_to_datetime(text) - datetime.now(UTC)).total_seconds())
    except (TypeError, ValueError):
        return None


def _get_validator(headers: Any) -> str | None:
    return headers.get("x-goog-generation") or headers.get("ETag") or headers.get("Last-Modified")


def _get_facts(headers: Any, size: int) -> Facts:
    """Return the facts in the headers of a response: Google's hashes, Content-MD5, or an etag that is an MD5 (S3)."""
    md5 = crc = None
    for text in headers.getall("x-goog-hash", []):
        for part in text.split(","):
            kind, _, value = part.strip().partition("=")
            md5 = _to_hex(value, 16) if kind == "md5" else md5
            crc = _to_hex(value, 4) if kind == "crc32c" else crc
    etag = headers.get("ETag", "").strip('"')
    if md5 is None and "Content-MD5" in headers:
        md5 = _to_hex(headers["Content-MD5"], 16)
    if md5 is None and re.fullmatch(r"[0-9a-f]{32}", etag):
        md5 = etag
    return Facts(size=size, validator=_get_validator(headers), md5=md5, crc32c=crc)


def _to_hex(text: str | None, length: int) -> str | None:
    """Return the hexadecimal form of a base64 digest of ``length`` bytes, or None if it is not one."""
    try:
        raw = base64.b64decode(text or "", validate=True)
    except ValueError:
        return None
    return raw.hex() if len(raw) == length else None


class _Gcs(Remote):
    """Google Cloud Storage through gcsfs; anonymous unless a billing project is set."""

    def __init__(self, scheme: str, access: Access) -> None:
        super().__init__(scheme, access)
        import gcsfs

        project = access.billing_project
        options: dict[str, Any] = {"requester_pays": project} if project else {"token": "anon"}
        if access.endpoint_url:
            options["endpoint_url"] = access.endpoint_url
        self._fs = gcsfs.GCSFileSystem(cache_timeout=0, **options)

    def _ask(self, url: str, f: Callable[..., Any], *args: Any, **options: Any) -> Any:
        import aiohttp

        try:
            return f(*args, **options)
        except FileNotFoundError:
            raise _missing(url) from None
        except (aiohttp.ClientError, TimeoutError, ConnectionError) as e:
            raise Busy(f"{show_url(url)}: {type(e).__name__}") from None
        except Exception as e:
            raise _judge(e, url) from None

    def stat(self, url: str) -> Facts:
        info = self._ask(url, self._fs.info, url)
        if info.get("type") == "directory":
            raise _missing(url)
        return Facts(
            size=int(info["size"]),
            validator=str(info.get("generation") or info.get("etag")),
            md5=_to_hex(info.get("md5Hash"), 16),
            crc32c=_to_hex(info.get("crc32c"), 4),
        )

    def read(self, url: str, start: int, stop: int, facts: Facts, sink: Callable[[bytes], None]) -> None:
        there = self._fs.url(self._fs._strip_protocol(url))
        headers, body = self._ask(url, self._fs.call, "GET", there, headers={"Range": f"bytes={start}-{stop - 1}"})
        if str(headers.get("x-goog-generation", facts.validator)) != facts.validator:
            raise Changed
        if start and "Content-Range" not in headers:
            raise NoRanges
        sink(body[: facts.size - start])

    def ls(self, url: str) -> list[str]:
        try:
            found = self._ask(url, self._fs.ls, url, detail=True)
        except DataError:
            return []
        return sorted(f"gs://{e['name']}" + ("/" if e["type"] == "directory" else "") for e in found)


class _S3(Remote):
    """S3 through s3fs; anonymous unless ``requester_pays`` is set."""

    def __init__(self, scheme: str, access: Access) -> None:
        super().__init__(scheme, access)
        import s3fs

        options: dict[str, Any] = {"requester_pays": True} if access.requester_pays else {"anon": True}
        if access.endpoint_url:
            options["endpoint_url"] = access.endpoint_url
        self._fs = s3fs.S3FileSystem(use_listings_cache=False, **options)

    def _ask(self, url: str, f: Callable[..., Any], *args: Any, **options: Any) -> Any:
        try:
            return f(*args, **options)
        except FileNotFoundError:
            raise _missing(url) from None
        except PermissionError as e:
            raise _refused(url, str(e)) from None
        except Exception as e:
            raise _judge(e, url) from None

    def stat(self, url: str) -> Facts:
        info = self._ask(url, self._fs.info, url)
        if info.get("type") == "directory":
            raise _missing(url)
        etag = str(info.get("ETag", "")).strip('"')
        md5 = etag if re.fullmatch(r"[0-9a-f]{32}", etag) else None
        return Facts(size=int(info["size"]), validator=etag or None, md5=md5)

    def read(self, url: str, start: int, stop: int, facts: Facts, sink: Callable[[bytes], None]) -> None:
        bucket, key, _ = self._fs.split_path(url)
        wanted = {"Bucket": bucket, "Key": key, "Range": f"bytes={start}-{stop - 1}"}
        sink(self._ask(url, self._read, wanted, facts))

    def _read(self, wanted: dict[str, str], facts: Facts) -> bytes:
        from fsspec.asyn import sync

        async def get() -> bytes:
            answer = await self._fs._call_s3("get_object", **wanted, **self._fs.req_kw)
            async with answer["Body"] as body:
                if str(answer.get("ETag", "")).strip('"') != (facts.validator or ""):
                    raise Changed
                if "ContentRange" not in answer and not wanted["Range"].startswith("bytes=0-"):
                    raise NoRanges
                return await body.read()

        return sync(self._fs.loop, get)

    def ls(self, url: str) -> list[str]:
        try:
            found = self._ask(url, self._fs.ls, url, detail=True)
        except DataError:
            return []
        return sorted(f"s3://{e['name']}" + ("/" if e["type"] == "directory" else "") for e in found)


def _judge(e: Exception, url: str) -> Exception:
    """Return the error that an exception of a cloud library stands for."""
    if isinstance(e, Changed | NoRanges | Busy | DataError | EnvironmentFault):
        return e
    text, code = str(e), str(getattr(e, "code", ""))
    if code in ("401", "403") or re.search(
        r"forbidden|denied|requester pays|user project|unauthorized|401|403", text, re.I
    ):
        return _refused(url, text)
    return Busy(f"{show_url(url)}: {type(e).__name__}")


def get_name(url: str) -> str:
    """Return the last part of the path of a URL."""
    return posixpath.basename(show_url(url).rstrip("/"))
