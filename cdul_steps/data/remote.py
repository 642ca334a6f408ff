"""Images on remote storage: what a URL in a data set's table or as its root stands for.

HTTP and HTTPS are read by the standard library, all others by fsspec's file systems, of which those
of PROTOCOLS alone are made: a URL is never taken for a chain of them. Nothing here is imported or
asked where a data set names no URL.
"""

import importlib.util
import re
import time
from collections.abc import Callable, Iterable
from contextlib import closing
from datetime import datetime
from functools import cache
from hashlib import blake2b
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import quote

from cdul_steps.errors import UserError, first_line
from cdul_steps.limits import MAX_BYTES

if TYPE_CHECKING:
    from urllib.request import OpenerDirector

T = TypeVar("T")
Found = tuple[int | None, int, bytes]
"""Bytes of an image, None where nothing says it; when it changed, as `_when` has it; its bytes."""

PROTOCOLS = {"http": "", "https": "", "s3": "s3fs", "gs": "gcsfs", "memory": "", "file": ""}
"""The protocols, and the package that fsspec needs for each."""
HEAD = 1 << 16
"""Bytes that are fetched to read a header, which is nearly always within them."""
TIMEOUT = 30.0
"""Seconds without an answer after which a request is given up."""
WHOLE = 600.0
"""Seconds that an image may take: a server that sends a byte now and then never ends."""
PAUSES = (1.0, 4.0)
"""Seconds before another try, for each of them."""
SILENT = 3
"""Images in a row that a host does not answer for before it is left alone."""
REST = 60.0
"""Seconds for which it is: of a host that is down, each image would cost all tries and timeouts."""
_BUSY = (408, 425, 429)
"""Statuses of HTTP that another try may change, besides those from 500 on."""
_GONE = (404, 410)
_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+)://")
_silent: dict[str, tuple[int, float]] = {}
"""By host how many images in a row it did not answer for, and when it may be asked again."""


class UnreachableError(Exception):
    """An image that cannot be fetched; its message is one line that says why."""


class _BusyError(Exception):
    """An answer that may be another one soon."""


def is_url(text: str) -> bool:
    """Whether a text is a URL of one of PROTOCOLS, and not the path of a file."""
    found = _SCHEME.match(text)
    return found is not None and found[1] in PROTOCOLS


def is_web(text: str) -> bool:
    """Whether a text is a URL that a browser opens."""
    return text.startswith(("http://", "https://"))


def check_protocol(text: str, where: str) -> None:
    """Raise UserError, which begins with `where`, for a URL that is not of PROTOCOLS."""
    if (found := _SCHEME.match(text)) and found[1] not in PROTOCOLS:
        known = ", ".join(f"{name}://" for name in PROTOCOLS)
        raise UserError(f"{where}: {found[0]} is none of {known}; copy the images, or correct it")


def check_packages(urls: Iterable[str], where: str) -> None:
    """Raise UserError, which begins with `where`, where a package that a URL needs is missing."""
    for protocol in sorted({url.partition(":")[0] for url in urls}):
        package = PROTOCOLS[protocol]
        if package and importlib.util.find_spec(package) is None:
            raise UserError(
                f"{where}: {protocol}:// needs the package {package}: pip install {package}"
            )


def fetch(url: str, *, whole: bool) -> Found:
    """An image, or its first HEAD bytes; of one of more than MAX_BYTES as many as it likes.

    Tried again after what may pass: timeouts, broken connections, HTTP's 5xx. Raises
    FileNotFoundError without `errno` for what is not there, and UnreachableError for what cannot be
    fetched.
    """
    return _tried(url, lambda: (_fetch_web if is_web(url) else _fetch_stored)(url, whole))


def state(url: str) -> tuple[int, int] | None:
    """Bytes and time of change, each 0 where the store does not say; None if it cannot be reached.

    Costs a request, which fetches no image.
    """
    try:
        if is_web(url):
            size, modified, _ = fetch(url, whole=False)
        else:
            size, modified = _tried(url, lambda: _info(url)[:2])
    except (FileNotFoundError, UnreachableError):
        return None
    return size or 0, modified


def list_folders(urls: Iterable[str]) -> None:
    """Have the folders of URLs listed, whose file systems then know the state of what is in them.

    Without it each image would be asked for. A folder that cannot be listed is left alone.
    """
    for folder in sorted({url.rpartition("/")[0] for url in urls if _is_cached(url)}):
        try:
            system, path = _system(folder)
            _tried(folder, lambda s=system, p=path: s.ls(p, **_timeout(s, WHOLE)))  # type: ignore[misc]
        except (FileNotFoundError, UnreachableError):
            continue


def list_files(root: str) -> list[str]:
    """The paths below `root` of all files in it, in order.

    Raises UserError where they cannot be listed.
    """
    if is_web(root):
        raise UserError(
            f"{root}: the files of a web site cannot be listed; give a table with a column 'path' "
            "of their URLs"
        )
    check_packages([root], root)
    try:
        system, path = _system(root)
        found = _tried(root, lambda: system.find(path, **_timeout(system, WHOLE)))
    except (FileNotFoundError, UnreachableError) as error:
        raise UserError(f"{root}: cannot be listed: {first_line(error)}") from error
    top = f"{path.rstrip('/')}/"
    return sorted(name.removeprefix(top) for name in found if name.startswith(top))


def _tried(url: str, ask: Callable[[], T]) -> T:
    """What `ask` returns, by a few tries. Raises as `fetch` does."""
    host = "/".join(url.split("/", 3)[:3])  # or bucket, with its protocol
    for pause in (*PAUSES, None):
        missed, until = _silent.get(host, (0, 0.0))
        if missed >= SILENT and time.monotonic() < until:
            raise UnreachableError(f"{host} did not answer for {missed} images in a row")
        try:
            answer = ask()
        except (FileNotFoundError, UnreachableError, _BusyError, MemoryError) as error:
            _silent.pop(host, None)
            if not isinstance(error, _BusyError):
                raise
            problem = str(error)
        except (PermissionError, ImportError, ValueError) as error:
            raise UnreachableError(first_line(error)) from error
        # The libraries behind fsspec have exceptions of their own for what may pass.
        except Exception as error:
            problem = first_line(error)
            if pause is None:
                _silent[host] = (missed + 1, time.monotonic() + REST)
        else:
            _silent.pop(host, None)
            return answer
        if pause is not None:
            time.sleep(pause)
    raise UnreachableError(problem)


@cache
def _opener() -> "OpenerDirector":
    """What opens web addresses, and none of ftp: and file:, where a server could send us."""
    import ssl
    import urllib.request as web

    opener = web.OpenerDirector()
    # Made once, since reading the certificates takes longer than many an image.
    opener.add_handler(web.HTTPSHandler(context=ssl.create_default_context()))
    for handler in (
        *(web.ProxyHandler, web.HTTPHandler, web.UnknownHandler),
        *(web.HTTPRedirectHandler, web.HTTPDefaultErrorHandler, web.HTTPErrorProcessor),
    ):
        opener.add_handler(handler())
    return opener


def _fetch_web(url: str, whole: bool) -> Found:
    import urllib.error
    from http.client import InvalidURL
    from urllib.request import Request

    headers = {"User-Agent": "cdul-steps"}  # some sites refuse that of Python
    if not whole:
        headers["Range"] = f"bytes=0-{HEAD - 1}"
    asked = Request(quote(url, safe="%/:=&?~#+!$,;'@()*[]"), headers=headers)
    deadline = time.monotonic() + WHOLE
    try:
        with closing(_opener().open(asked, timeout=TIMEOUT)) as answer:
            size, modified = _size(answer), _when(answer.headers)
            if size is not None and size > MAX_BYTES:
                return size, modified, b""
            limit = min(MAX_BYTES + 1 if whole else HEAD, MAX_BYTES + 1 if size is None else size)
            data = bytearray()
            while len(data) < limit and (part := answer.read1(limit - len(data))):
                data += part
                if time.monotonic() > deadline:
                    raise TimeoutError(f"not complete after {WHOLE:g} seconds")
    except urllib.error.HTTPError as error:
        with error:
            said = f"{error.code} {error.reason}"
            if error.code == 416:  # an empty file has no first bytes
                return 0, _when(error.headers), b""
            if error.code in _GONE:
                raise FileNotFoundError(said) from error
            if error.code in _BUSY or error.code >= 500:
                raise _BusyError(said) from error
            raise UnreachableError(said) from error
    except urllib.error.URLError as error:
        if isinstance(error.reason, str):  # what urllib itself has to say against a URL
            raise UnreachableError(error.reason) from error
        raise error.reason from error
    except InvalidURL as error:
        raise UnreachableError(first_line(error)) from error
    if size is None:
        size = len(data) if len(data) < limit else None
    elif len(data) < limit:
        raise ConnectionError(f"broken off after {len(data)} of {limit} bytes")
    return size, modified, bytes(data)


def _size(answer: Any) -> int | None:
    """The bytes of a whole file by the headers of an answer; None where they do not say it."""
    if answer.status == 206:
        total = answer.headers.get("Content-Range", "").rpartition("/")[2]
    else:
        total = answer.headers.get("Content-Length", "")
    return int(total) if total.isdecimal() else None


def _when(headers: Any) -> int:
    """The time of change in ns by the headers of an answer, or a number made of the tag; else 0."""
    from email.utils import parsedate_to_datetime

    try:
        return int(parsedate_to_datetime(headers["Last-Modified"]).timestamp() * 1e9)
    except (TypeError, ValueError, OverflowError):  # there is none, or it is no date
        return _number(headers["ETag"])


def _number(tag: str | None) -> int:
    """A number that is another one for another tag; 0 for none."""
    digest = blake2b((tag or "").encode(), digest_size=7).digest()
    return int.from_bytes(digest, "big") if tag else 0


def _system(url: str) -> tuple[Any, str]:
    """The file system of a URL, and the path in it. Raises ImportError without its package."""
    import fsspec

    # Not fsspec's own way to open a URL, which would take `::` for a chain of file systems.
    system = fsspec.filesystem(url.partition(":")[0])
    return system, system._strip_protocol(url)


def _timeout(system: Any, seconds: float) -> dict[str, float]:
    """The option for a timeout, of file systems that wait for a network."""
    return {"timeout": seconds} if system.async_impl else {}


def _is_cached(url: str) -> bool:
    """Whether a file system keeps what it has listed."""
    return bool(PROTOCOLS[url.partition(":")[0]])


def _info(url: str) -> tuple[int, int, Any, str]:
    """Bytes, time of change, file system and path of a file."""
    system, path = _system(url)
    found = system.info(path, **_timeout(system, TIMEOUT))
    if found["type"] == "directory":
        raise UnreachableError("is a folder")
    if found["type"] != "file":  # opening a pipe would wait for ever
        raise UnreachableError("not a regular file")
    times = (found.get(name) for name in ("mtime", "LastModified", "updated", "created"))
    when = next((time for time in times if time), None)
    if isinstance(when, str):
        when = datetime.fromisoformat(when)
    if isinstance(when, datetime):
        when = when.timestamp()
    modified = int(when * 1e9) if when else _number(found.get("ETag"))
    return found["size"] or 0, modified, system, path


def _fetch_stored(url: str, whole: bool) -> Found:
    size, modified, system, path = _info(url)
    end = size if whole else min(size, HEAD)
    if size > MAX_BYTES or not size:  # S3 has no first bytes of an empty file
        return size, modified, b""
    data = system.cat_file(path, start=0, end=end, **_timeout(system, WHOLE))
    if len(data) < end:
        raise ConnectionError(f"broken off after {len(data)} of {end} bytes")
    return size, modified, data
