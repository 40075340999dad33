"""Shards behind a URL, by fsspec: http(s) and every object store that it knows. The only importer of fsspec.

A failed request is told by its kind and status; of its own text no URL's user or query is repeated, since it may be a
signed one that a server redirected to.
"""

import asyncio
import re
import threading
from collections.abc import Callable, Coroutine
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeout
from html import unescape
from http import HTTPStatus
from typing import Any, TypeVar
from urllib.parse import quote, unquote, urljoin, urlsplit

from trainer.data.fetched import Pace, TryAgain
from trainer.data.growing import Changed, NoRoom, Part, Stopped
from trainer.data.store import is_shard

T = TypeVar("T")
BLOCK = 16 << 20  # bytes of a request
_SMALLEST = 256 << 10  # after time-outs
_PACKAGES = {
    "http": "aiohttp", "https": "aiohttp", "s3": "s3fs", "s3a": "s3fs", "gs": "gcsfs", "gcs": "gcsfs", "az": "adlfs",
    "abfs": "adlfs", "abfss": "adlfs", "hf": "huggingface_hub", "sftp": "paramiko", "ssh": "paramiko",
}  # fmt: skip
_GIVEN = (
    "credentials are given to fsspec in its own ways (~/.config/fsspec/*.json, FSSPEC_ variables, ~/.netrc, ~/.aws)"
)
_RANGE = re.compile(r"bytes (?:(\d+)-\d+|\*)/(\d+|\*)")  # RFC 9110, 14.4
_LINK = re.compile(r"""<a\s[^>]*?href\s*=\s*["']?([^"'\s>]+)""", re.IGNORECASE)
_LISTING = 64 << 20  # bytes of a page of links: a million shards
_PASSING = (408, 425, 429)  # statuses that may pass, and 5xx


def redacted(text: str) -> str:
    """Text without what may be secret in its URLs: user and password, and the query."""
    text = re.sub(r"(\w[\w+.-]*://)[^\s/@'\"]*@", r"\1", text)
    return re.sub(r"(\w[\w+.-]*://[^\s?#'\"]*)[?#][^\s'\"]*", r"\1", text)


def refuse_secrets(url: str) -> None:
    """ValueError for a URL with a credential in it, or what may be one. Needs no fsspec."""
    parts = urlsplit(url)
    user, at, _ = parts.netloc.rpartition("@")
    if at and (":" in user or parts.scheme in ("http", "https")):
        raise ValueError(f"data.path: {redacted(url)} has a user or password in it; take it out: {_GIVEN}")
    if "?" in url or "#" in url:
        raise ValueError(
            f"data.path: {redacted(url)} has a query (after ? or #), which a folder has not; take it out; {_GIVEN}"
        )


class _Answered(Exception):
    def __init__(self, status: int, pause: float) -> None:
        """pause: seconds that the server asks for."""
        super().__init__(status)
        self.status, self.pause = status, pause


class Remote:
    """The source behind a URL."""

    def __init__(self, url: str, split: str, *, timeout: float) -> None:
        """timeout: seconds without a byte. ValueError says what is wrong with the URL, or what to install."""
        refuse_secrets(url)
        scheme = urlsplit(url).scheme.lower()
        if scheme in ("file", "local") or "::" in url:
            raise ValueError(f"data.path: {url}: name a folder of this machine without file://, and use no ::")
        if scheme in _PACKAGES and not urlsplit(url).netloc:
            raise ValueError(f"data.path: {url} names no host or bucket")
        self.name = self.key = f"{url.rstrip('/')}/{split}"
        self._timeout = timeout
        self._web = scheme in ("http", "https")
        self._block = BLOCK
        self._fs, self._root = _connect(self.name, scheme)

    def names(self) -> list[str]:
        try:
            if self._web:
                names = self._asked(
                    self.name, lambda: _run(self._fs.loop, _links(self._fs, f"{self._root}/", self._timeout))
                )
            else:
                found = self._call(self.name, self._fs.ls, self._root, detail=False)
                names = {path.rpartition("/")[2] for path in found}
        except (FileNotFoundError, NotADirectoryError, NotImplementedError):
            names = set()
        shards = [name for name in names if is_shard(name)]
        if not shards:
            raise ValueError(
                f"data.path: {self.name} has no index.json and lists no .tar files; make an index with `tandem data "
                "index` where the shards are and copy it beside them, or give a URL that can be listed"
            )
        return shards

    def more(self, name: str, part: Part) -> bool:
        """One range of the file; on the web all that the server sends where it knows no ranges."""
        where, path = f"{self.name}/{name}", f"{self._root}/{quote(name) if self._web else name}"
        if part.size is not None and part.bytes == part.size:
            return True
        stop = part.bytes + self._block if part.size is None else min(part.bytes + self._block, part.size)
        if not self._web:
            return self._from_any(where, path, part, stop)
        return self._asked(where, lambda: _run(self._fs.loop, _get(self._fs, path, part, stop, self._timeout)))

    def _from_any(self, where: str, path: str, part: Part, stop: int) -> bool:
        if part.bytes == 0:
            size = self._call(where, self._fs.info, path).get("size")
            if size is not None:
                part.expect(size)
                stop = min(stop, size)
        start = part.bytes
        try:
            block = self._call(where, self._fs.cat_file, path, start=start, end=stop)
        except TryAgain:
            self._block = max(_SMALLEST, self._block // 2)  # the deadline is that of a whole request: a slow line
            raise
        if len(block) > stop - start:  # all of it, whatever was asked for
            block = memoryview(block)[start:]
        part.write(block)
        if len(block) < stop - start and part.size is not None:
            raise TryAgain(f"ended after {part.bytes:,} of {part.size:,} bytes")
        return part.bytes == part.size if part.size is not None else not block

    def _call(self, where: str, method: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
        """The method's result within the deadline. fsspec takes a `timeout` where it runs a coroutine."""
        if self._fs.async_impl:
            return self._asked(where, lambda: method(*arguments, timeout=self._timeout, **options))
        return self._asked(where, lambda: _within(self._timeout, lambda: method(*arguments, **options)))

    def _asked(self, where: str, request: Callable[[], T]) -> T:
        """The result of a request, its errors in our words."""
        try:
            return request()
        except (TryAgain, Changed, Stopped, NoRoom, NotImplementedError):
            raise
        except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
            raise FileNotFoundError(f"{where}: is not there") from None
        except (TimeoutError, asyncio.TimeoutError, FutureTimeout):  # one and the same from Python 3.11 on
            raise TryAgain(f"gave no byte for {self._timeout:g} s") from None
        except Exception as error:  # noqa: BLE001  what any protocol raises; none is lost
            raise _explained(where, error) from None


def _connect(url: str, scheme: str) -> tuple[Any, str]:
    """The file system, and how it calls the URL."""
    try:
        import fsspec
        from fsspec.config import apply_config

        kind = fsspec.get_filesystem_class(scheme)
        options: dict[str, Any] = {"use_listings_cache": False}
        if scheme in ("http", "https"):  # proxies and ~/.netrc, beside what the user's own configuration says
            options["client_kwargs"] = {"trust_env": True} | apply_config(kind, {}).get("client_kwargs", {})
        files, root = fsspec.core.url_to_fs(url, **options)
        return files, root
    except ImportError as error:
        package = _PACKAGES.get(scheme)
        what = f"`pip install {package}`" if package else redacted(str(error))
        raise ValueError(f"data.path: {url}: {scheme}:// needs a package that is not installed: {what}") from None
    except Exception as error:  # noqa: BLE001  bad options in a user's fsspec configuration, an unknown protocol
        raise ValueError(f"data.path: {url}: {_words(error)}") from None


async def _get(fs: Any, url: str, part: Part, stop: int, timeout: float) -> bool:
    """Appends to `part` up to `stop` what comes, as it comes: a cut leaves what was there, and memory stays small
    where a server sends more than asked."""
    start = part.bytes
    session = await fs.set_session()
    asked = _asking(fs, timeout, Range=f"bytes={start}-{stop - 1}")
    async with session.get(fs.encode_url(url), **asked) as answer:
        skip = _first(answer, part, start)
        if skip is None:
            return True
        ranged = answer.status == HTTPStatus.PARTIAL_CONTENT
        pace = Pace(timeout)
        async for block in answer.content.iter_any():
            pace(len(block))
            part.write(memoryview(block)[skip : skip + stop - part.bytes if ranged else None])
            skip = max(0, skip - len(block))
            if ranged and part.bytes == stop:
                break
    if part.size is None:
        return not ranged  # read to its end
    if part.bytes == start:
        raise TryAgain(f"ended after {part.bytes:,} of {part.size:,} bytes")
    return part.bytes == part.size


async def _links(fs: Any, url: str, timeout: float) -> set[str]:
    """Names of what a folder's page on the web links to in that folder. Read by ourselves: it may have no end."""
    session = await fs.set_session()
    async with session.get(fs.encode_url(url), **_asking(fs, timeout)) as answer:
        if answer.status != HTTPStatus.OK:
            raise _refused(answer)
        page, pace = bytearray(), Pace(timeout)
        async for block in answer.content.iter_any():
            pace(len(block))
            page += block
            if len(page) > _LISTING:
                raise NoRoom(f"{redacted(url)}: its list of files is larger than {_LISTING:,} bytes; make an index")
        folder = urlsplit(str(answer.url))
    linked = (
        urlsplit(urljoin(folder.geturl(), unescape(link))) for link in _LINK.findall(page.decode("utf-8", "replace"))
    )
    paths = [link.path for link in linked if link.netloc == folder.netloc]
    return {unquote(path.rpartition("/")[2]) for path in paths if f"{path.rpartition('/')[0]}/" == folder.path}


def _asking(fs: Any, timeout: float, **headers: str) -> dict[str, Any]:
    """Options of a request, beside what the user's configuration says."""
    from aiohttp import ClientTimeout

    options = {name: value for name, value in fs.kwargs.items() if name != "timeout"}
    # identity: a range of a compressed answer would be one of other bytes
    options["headers"] = options.get("headers", {}) | {"Accept-Encoding": "identity"} | headers
    return options | {"timeout": ClientTimeout(total=None, connect=timeout, sock_connect=timeout, sock_read=timeout)}


def _refused(answer: Any) -> _Answered:
    pause = answer.headers.get("Retry-After", "")
    return _Answered(answer.status, float(pause) if pause.isdecimal() else 0.0)


def _first(answer: Any, part: Part, start: int) -> int | None:
    """Bytes of the answer's body that `part` has already; None where the body is the end of a file of unknown size."""
    if answer.status == HTTPStatus.PARTIAL_CONTENT:
        found = _RANGE.fullmatch(answer.headers.get("Content-Range", ""))
        if not found or found[1] is None or int(found[1]) != start:
            raise TryAgain("answered with another range than was asked for")
        if found[2] != "*":
            part.expect(int(found[2]))
        return 0
    if answer.status == HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE:
        if part.size is not None and part.size > 0:
            raise Changed(f"ends before byte {start:,}, its index says {part.size:,} bytes")
        return None
    if answer.status != HTTPStatus.OK:
        raise _refused(answer)
    if answer.content_length is not None and "Content-Encoding" not in answer.headers:
        part.expect(answer.content_length)
    return start


def _explained(where: str, error: Exception) -> Exception:
    status = getattr(error, "status", None) or getattr(error, "code", None)
    if isinstance(status, int) and status >= HTTPStatus.BAD_REQUEST:
        return _by_status(where, status, getattr(error, "pause", 0.0))
    if isinstance(error, PermissionError) or "Credential" in type(error).__name__:
        return ValueError(f"{where}: is refused, or not there ({_words(error)}); {_GIVEN}")
    if isinstance(error, (ValueError, TypeError, AttributeError, ImportError)):
        return ValueError(f"{where}: cannot be asked for ({_words(error)})")
    return TryAgain(f"failed ({_words(error)})")


def _by_status(where: str, status: int, pause: float) -> Exception:
    said = f"{status} {HTTPStatus(status).phrase}" if status in list(HTTPStatus) else str(status)
    if status in (HTTPStatus.NOT_FOUND, HTTPStatus.GONE):
        return FileNotFoundError(f"{where}: is not there")
    if status in (HTTPStatus.UNAUTHORIZED, HTTPStatus.FORBIDDEN, HTTPStatus.PROXY_AUTHENTICATION_REQUIRED):
        return ValueError(f"{where}: is refused, or not there ({said}); {_GIVEN}")
    if status in _PASSING or status >= HTTPStatus.INTERNAL_SERVER_ERROR:
        return TryAgain(f"answered {said}", pause=pause)
    return ValueError(f"{where}: cannot be had, the server answered {said}")


def _words(error: Exception) -> str:
    """Kind and text of an error, on one line, without secrets."""
    if hasattr(error, "request_info") or hasattr(error, "url"):  # aiohttp's, of a URL that may be a signed one
        return type(error).__name__
    text = redacted(" ".join(str(error).split()))
    return f"{type(error).__name__}: {text[:200]}" if text else type(error).__name__


def _run(loop: asyncio.AbstractEventLoop, request: Coroutine[Any, Any, T]) -> T:
    result = asyncio.run_coroutine_threadsafe(request, loop)
    try:
        return result.result()
    finally:
        result.cancel()  # a consumer that was interrupted; else it is done


def _within(timeout: float, request: Callable[[], T]) -> T:
    """The result of a request that knows no deadline; after one its thread is left to itself."""
    result: Future[T] = Future()

    def run() -> None:
        try:
            result.set_result(request())
        except Exception as error:  # noqa: BLE001  raised where it is waited for
            result.set_exception(error)

    threading.Thread(target=run, name="request", daemon=True).start()
    return result.result(timeout)
